"""How good a classifier is, and how well it knows: one set of figures for the network, the ONNX file
and the running server.

Distributions and metrics are SciPy's and scikit-learn's where these have them. Both are imported
where they are needed: what only counts right answers runs without the extra `train`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Parity, Probabilities, Scores, Thresholds
from convoy_service.errors import ConvoyError, InferenceFailed
from convoy_training.data.datasets import Labels, Split

Predict = Callable[[Pixels], Probabilities]
Right = npt.NDArray[np.bool_]
_Floats = npt.NDArray[np.float64]

# Enough rows to keep the device busy, few enough for any memory.
_CHUNK = 256

# Of every interval in here.
_CONFIDENCE = 0.95

# As in Guo and others, arXiv:1706.04599.
_BINS = 15

# Rows add up to 1 but for rounding; a last layer in int8 rounds each share to 1/256.
ROUNDING = 1e-2

# Beyond these an answer's probabilities are all but equal, or all but 0 and 1, whatever the logits.
_COLDEST, _HOTTEST = 0.05, 20.0
# Beyond these it is not the network's certainty any more; and a power below a half would make of what
# a float32 is rounded by near 1 more than `max_parity`.
_LEAST_BEND, _MOST_BEND = 0.5, 2.5
# What chance gains by one thing more to choose, in 1 of 20: half of the 95th percentile of chi-squared.
_BY_CHANCE = 1.92
# What means of as many images as there are may be off by.
_ROUNDED = 1e-12
# How far temperatures and bends are expected from 1, as the standard deviation of their logarithms: two
# in three between 0.6 and 1.6. A prior, which counts as much as a few images do.
_SPREAD = 0.5

# Fewer images than this choose no threshold.
_ENOUGH = 50

# Shares of the images that are answered, for which the accuracy is told.
_COVERAGES = (1.0, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)

# Finer where trained networks are: a drift shows as shares moving between these.
_CONFIDENCES = [*(n / 10 for n in range(10)), 0.95, 0.98, 0.99, 0.995, 0.999, 1.0]

# Images of each kind of strangers, at most.
_STRANGERS = 200


class NotEvaluable(ConvoyError):
    """Answers that no figures can be made of; the text says what is wrong with them."""


@dataclass(frozen=True)
class Interval:
    """The 95% confidence interval of a figure."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:.4f}, {self.high:.4f}]"


@dataclass(frozen=True)
class ClassFigures:
    """Of one class: `support` test images show it, `named` were taken for it.

    Where there are none of these, recall or precision is 0.
    """

    name: str
    support: int
    named: int
    precision: float
    recall: float
    recall_interval: Interval
    f1: float


@dataclass(frozen=True)
class Bin:
    """The images whose confidence is over `low`, up to `high`."""

    low: float
    high: float
    confidence: float
    accuracy: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """How far confidence (the label's probability) is from accuracy.

    `error` is the expected calibration error (Naeini and others, 2015; Guo and others,
    arXiv:1706.04599): the difference between mean confidence and accuracy in 15 bins of equal width,
    weighted by their images. It is above 0 for the best of classifiers, since images are few:
    `by_chance` is what one whose every confidence is true would stay below in 19 of 20 test splits of
    this size (consistency resampling: Bröcker and Smith, 2007; Vaicenavicius and others,
    arXiv:1902.06977). Bins without images are left out.
    """

    error: float
    by_chance: float
    bins: list[Bin]


@dataclass(frozen=True)
class CoveragePoint:
    """Where only answers of at least `threshold` are taken: the share of images that have one, and
    the share of these that are right.
    """

    threshold: float
    coverage: float
    accuracy: float


@dataclass(frozen=True)
class Histogram:
    """`counts[i]` are those over `edges[i]`, up to `edges[i + 1]`; the first bin has its low edge too."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class StrangerFigures:
    """How images of one `kind` that belong to no class are told from test images.

    `auroc`: the chance that one of them gets a lower confidence than a test image; 0.5 where confidence
    tells nothing. `unsure`: the share that the thresholds keep from being answered.
    """

    kind: str
    images: int
    auroc: float
    unsure: float


@dataclass(frozen=True)
class OutOfDistribution:
    """Confidence as what tells strangers from test images (Hendrycks and Gimpel, arXiv:1610.02136): of
    all kinds together, and of each. Of the test images the share `test_unsure` is kept from being
    answered, too.
    """

    auroc: float
    unsure: float
    test_unsure: float
    kinds: list[StrangerFigures]


@dataclass(frozen=True)
class Evaluation:
    """Everything that was found on the test images; plain data for `dataclasses.asdict` and JSON.

    `guessing` is the accuracy of always naming the most frequent class. Macro figures are means over
    the classes that have test images. Rows of `confusion` are what images show, columns what they
    were taken for. `brier` is the sum over classes of squared errors, 0 to 2 (Brier, 1950).
    """

    images: int
    correct: int
    accuracy: float
    accuracy_interval: Interval
    guessing: float
    classes: list[ClassFigures]
    macro_precision: float
    macro_recall: float
    macro_f1: float
    confusion: list[list[int]]
    log_loss: float
    brier: float
    temperature: float
    uncalibrated: Calibration
    calibrated: Calibration
    coverage: list[CoveragePoint]
    confidences: Histogram
    out_of_distribution: OutOfDistribution | None
    bend: float = 1.0

    @property
    def scores(self) -> Scores:
        return Scores(self.accuracy, self.correct, self.images, self.log_loss)

    @property
    def worst(self) -> ClassFigures:
        """The class with the lowest recall, among those that have test images."""
        return min((c for c in self.classes if c.support), key=lambda c: (c.recall, -c.support))


@dataclass(frozen=True)
class PairedTest:
    """A candidate and another classifier on the same images.

    `difference` is the candidate's accuracy less the other's. `p_worse` is the chance that a candidate
    that is as good would come out as badly as this or worse, `p_better` that it would come out as well
    or better: McNemar's test, exact and one-sided, of the images that only one has right.
    """

    images: int
    only_candidate: int
    only_serving: int
    difference: float
    interval: Interval
    p_worse: float
    p_better: float


def score(predict: Predict, split: Split) -> Scores:
    """Scores of `predict`, a function from uint8 `[N, H, W, C]` to probabilities `[N, classes]`."""
    return score_answers(answers(predict, split.inputs), split.labels)


def answers(predict: Predict, inputs: Pixels) -> Probabilities:
    """What `predict` says about `inputs`, asked for in chunks."""
    chunks = [predict(inputs[start : start + _CHUNK]) for start in range(0, len(inputs), _CHUNK)]
    return np.concatenate(chunks)


def score_answers(probabilities: Probabilities, labels: Labels) -> Scores:
    """Scores of answers that are there already: `probabilities` `[N, classes]`, `labels` `[N]`."""
    correct = int((probabilities.argmax(axis=1) == labels).sum())
    # Clipped as a probability of 0 for what came true would make any mean infinite.
    given = np.clip(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-7, 1)
    return Scores(correct / len(labels), correct, len(labels), float(-np.log(given).mean()))


class Scaling(NamedTuple):
    """How a network's logits become the probabilities that are served: the softmax of
    `-(-log p) ** bend / temperature`, where `p` is the softmax of the logits.

    With a `bend` of 1 that is what logits divided by the temperature give (Guo and others,
    arXiv:1706.04599). Neither changes the order of classes.
    """

    temperature: float = 1.0
    bend: float = 1.0


STRAIGHT = Scaling()


def evaluate(
    probabilities: Probabilities,
    labels: Labels,
    classes: Sequence[str],
    *,
    scaling: Scaling = STRAIGHT,
    thresholds: Thresholds | None = None,
    strange: Mapping[str, Probabilities] = MappingProxyType({}),
) -> Evaluation:
    """Every figure of answers `[N, classes]` to test images that show `labels` `[N]`.

    The answers are those of the exported graph, `scaling` included; what they would be without is
    worked out from them, see `unscaled`. `strange` are answers to images that belong to no class, by
    their kinds, see `strangers`. Raises NotEvaluable.
    """
    from sklearn import metrics

    _check_labels(labels, len(classes))
    given = check_probabilities(probabilities, len(labels), len(classes))
    scores = score_answers(probabilities, labels)
    named, confidence = probabilities.argmax(axis=1), given.max(axis=1)
    right, every = named == labels, np.arange(len(classes))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, named, labels=every, zero_division=0
    )
    confusion = metrics.confusion_matrix(labels, named, labels=every)
    there = support > 0
    figures = [
        ClassFigures(
            name,
            int(support[i]),
            int(confusion[:, i].sum()),
            float(precision[i]),
            float(recall[i]),
            wilson(int(confusion[i, i]), int(support[i])),
            float(f1[i]),
        )
        for i, name in enumerate(classes)
    ]
    before = unscaled(given, scaling)
    return Evaluation(
        images=len(labels),
        correct=scores.correct,
        accuracy=scores.accuracy,
        accuracy_interval=wilson(scores.correct, len(labels)),
        guessing=float(support.max() / len(labels)),
        classes=figures,
        macro_precision=float(precision[there].mean()),
        macro_recall=float(recall[there].mean()),
        macro_f1=float(f1[there].mean()),
        confusion=confusion.tolist(),
        log_loss=scores.log_loss,
        brier=float(metrics.brier_score_loss(labels, given, labels=every, scale_by_half=False)),
        temperature=float(scaling.temperature),
        uncalibrated=calibration(before.max(axis=1), right),
        calibrated=calibration(confidence, right),
        coverage=_coverage(confidence, right),
        confidences=_histogram(confidence),
        out_of_distribution=_out_of_distribution(probabilities, strange, thresholds)
        if strange
        else None,
        bend=float(scaling.bend),
    )


def check_probabilities(probabilities: Probabilities, images: int, classes: int) -> _Floats:
    """Answers `[images, classes]` without what rounding leaves of rows that should add up to 1.

    Raises NotEvaluable where they have another shape or are no probabilities.
    """
    if probabilities.shape != (images, classes) or not images or classes < 2:
        raise NotEvaluable(
            f"answers of shape {list(probabilities.shape)} to {images} images of {classes} classes"
        )
    _check_finite(probabilities)
    given: _Floats = probabilities.astype(np.float64)
    sums = given.sum(axis=1)
    if given.min() < 0 or np.abs(sums - 1).max() > ROUNDING:
        raise NotEvaluable(
            f"answers that are no probabilities: from {given.min():.3g} to {given.max():.3g}, and rows "
            f"add up to between {sums.min():.3g} and {sums.max():.3g}; does the graph end in a softmax?"
        )
    given /= sums[:, np.newaxis]
    return given


def _check_labels(labels: Labels, classes: int) -> None:
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        raise NotEvaluable(f"labels from {labels.min()} to {labels.max()} for {classes} classes")


def _check_finite(values: npt.NDArray[np.floating[Any]]) -> None:
    broken = int((~np.isfinite(values)).any(axis=1).sum())
    if broken:
        raise NotEvaluable(
            f"NaN or infinity in the answers to {broken} of {len(values)} images: the weights are "
            "broken, or a number is too large for the graph's precision"
        )


def wilson(count: int, of: int) -> Interval:
    """The interval of a share (Wilson, 1927); all of 0 to 1 for a share of nothing."""
    if not of:
        return Interval(0.0, 1.0)
    from scipy import stats

    low, high = stats.binomtest(count, of).proportion_ci(_CONFIDENCE, "wilson")
    return Interval(float(low), float(high))


# Calibration.


def fit_scaling(logits: npt.NDArray[np.floating[Any]], labels: Labels) -> Scaling:
    """The scaling with which logits `[N, classes]` (or logarithms of probabilities) of validation
    images have the least log loss.

    Label smoothing leaves a certainty that is too high here and too low there, which no temperature can
    mend. A bend can, but is one more thing to choose: it has to be worth it by the Bayesian information
    criterion (Schwarz, 1978), else there is none.

    Of few images the log loss says little, and of images that are all right it only says: the colder,
    the better, up to a certainty that nobody has seen. So there are two bounds to it, which many images
    make loose. The logarithms of both have normal priors around 0, which hold back where a handful of
    images would go far; without its own the bend would do what the temperature may not. And answers
    become more certain only as long as their mean confidence stays below (right + 1) / (N + 2),
    Laplace's rule of succession: who saw ten of ten right has not seen 99%.

    Raises NotEvaluable for NaN or infinity, and for shapes that don't fit.
    """
    from scipy import optimize, special

    values: _Floats = np.asarray(logits, np.float64)
    if values.ndim != 2 or values.shape[0] != len(labels) or not len(labels) or values.shape[1] < 2:
        raise NotEvaluable(f"logits of shape {list(values.shape)} to {len(labels)} images")
    _check_labels(labels, values.shape[1])
    _check_finite(values)
    surprise: _Floats = np.maximum(-special.log_softmax(values, axis=1), 0)
    right = int((surprise.argmin(axis=1) == labels).sum())
    given = float(np.exp(-surprise.min(axis=1)).mean())
    ceiling = max(given, (right + 1) / (len(labels) + 2))
    straight, straight_loss = _fit_temperature(-surprise, labels, ceiling)
    with np.errstate(divide="ignore"):
        powers = np.log(surprise)

    def bent(log_bend: float) -> tuple[float, float]:
        values = -np.exp(powers * math.exp(log_bend))
        temperature, loss = _fit_temperature(values, labels, ceiling)
        return temperature, loss + _prior(log_bend, len(labels))

    bounds = math.log(_LEAST_BEND), math.log(_MOST_BEND)
    found = optimize.minimize_scalar(lambda bend: bent(bend)[1], bounds=bounds, method="bounded")
    gained = (straight_loss - float(found.fun)) * len(labels)
    if gained <= max(math.log(len(labels)) / 2, _BY_CHANCE):
        return Scaling(straight)
    return Scaling(bent(found.x)[0], math.exp(found.x))


def _fit_temperature(values: _Floats, labels: Labels, ceiling: float) -> tuple[float, float]:
    """What `values` are to be divided by for the log loss of their softmax to be least, and that loss,
    while the mean confidence is at most `ceiling`.
    """
    from scipy import optimize

    gaps = values - values.max(axis=1, keepdims=True)
    true = gaps[np.arange(len(labels)), labels]
    # With many classes all the time goes into passes over this.
    shares = np.empty_like(gaps)

    def sums(log_temperature: float) -> _Floats:
        np.multiply(gaps, math.exp(-log_temperature), out=shares)
        found: _Floats = np.exp(shares, out=shares).sum(axis=1)
        return found

    def slope(log_temperature: float) -> float:
        """Of the loss."""
        whole = sums(log_temperature)
        mean = np.einsum("ij,ij->i", shares, gaps) / whole
        rise = (true - mean).mean() * math.exp(-log_temperature)
        return float(rise + log_temperature / _SPREAD**2 / len(labels))

    def excess(log_temperature: float) -> float:
        return float((1 / sums(log_temperature)).mean() - ceiling)

    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    if slope(low) >= 0:
        best = low
    elif slope(high) <= 0:
        best = high
    else:
        best = optimize.brentq(slope, low, high)
    # Confidence falls with the temperature: there is one crossing at most.
    if excess(best) > _ROUNDED:
        best = optimize.brentq(excess, best, high) if excess(high) < 0 else high
    # A temperature that is 1 but for rounding is 1.
    best = best if abs(best) > 1e-9 else 0.0
    loss = (np.log(sums(best)) - true * math.exp(-best)).mean()
    return math.exp(best), float(loss + _prior(best, len(labels)))


def _prior(logarithm: float, images: int) -> float:
    return (logarithm / _SPREAD) ** 2 / 2 / images


def unscaled(probabilities: npt.NDArray[np.floating[Any]], scaling: Scaling) -> _Floats:
    """What served probabilities `[N, classes]` were before the `scaling`."""
    from scipy import special

    # What has become 0 in float32 stays 0: as the least above that, hundreds of classes would come out
    # as a large share where the scaling is sharp.
    with np.errstate(divide="ignore"):
        surprise: _Floats = -np.log(np.asarray(probabilities, np.float64))
    temperature, bend = scaling
    if bend == 1:
        given: _Floats = special.softmax(-surprise * temperature, axis=1)
        return given

    def before(shift: _Floats) -> _Floats:
        straight: _Floats = np.maximum(surprise - shift, 0) * temperature
        return np.exp(-(straight ** (1 / bend)))

    # A softmax takes no notice of a constant: the one with which they add up to 1.
    high = surprise.min(axis=1, keepdims=True)
    low = high - math.log(surprise.shape[1]) ** bend / temperature
    for _ in range(60):
        middle = (low + high) / 2
        over = before(middle).sum(axis=1, keepdims=True) > 1
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return before(low)


def calibration(confidence: npt.NDArray[np.floating[Any]], right: Right) -> Calibration:
    """Of answers with this `confidence` `[N]` that are `right` `[N]` or not."""
    edges = np.linspace(0, 1, _BINS + 1)
    # A bin has its upper edge, not its lower one.
    index = np.digitize(confidence, edges[1:-1], right=True)
    images = np.bincount(index, minlength=_BINS)
    sums = np.bincount(index, confidence, _BINS)

    def error(hits: npt.NDArray[np.bool_]) -> float:
        return float(np.abs(np.bincount(index, hits, _BINS) - sums).sum() / len(confidence))

    random = np.random.default_rng(0)
    chance = [error(random.random(len(confidence)) < confidence) for _ in range(400)]
    hits = np.bincount(index, right, _BINS)
    bins = [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            float(sums[i] / images[i]),
            float(hits[i] / images[i]),
            int(images[i]),
        )
        for i in np.flatnonzero(images)
    ]
    return Calibration(error(right), float(np.quantile(chance, 0.95)), bins)


# Not sure.


def choose_thresholds(
    validation_probabilities: Probabilities,
    validation_labels: Labels,
    test_probabilities: Probabilities,
    test_labels: Labels,
    *,
    errors: float = 0.5,
    outliers: float = 0.01,
) -> Thresholds:
    """Below which confidence an answer is unsure, chosen on validation images; how many test images are
    answered then, and how many of these rightly (0 where none is).

    `unsure`, for all classes, is the higher of two. One is the lowest threshold at which the share of
    wrong answers is `errors` times that of answering everything (selective classification: Geifman
    and El-Yaniv, arXiv:1705.08500); where none gets there with half of the images answered, the one
    that comes nearest. The other is what an image as those of the validation split falls short of
    with a chance of at most `outliers`, whatever the classifier (a conformal p-value: Bates and
    others, arXiv:2104.08279): a guard against strangers where validation shows no mistake.

    A class, by what images were taken for, has a higher one where its answers would else be wrong more
    often than that, and chance alone would seldom (p < 0.05) have it so. Fewer than 50 images choose
    nothing: no threshold at all, or that of all classes.

    Raises NotEvaluable.
    """
    classes = validation_probabilities.shape[-1]
    for given, truth in (
        (validation_probabilities, validation_labels), (test_probabilities, test_labels)
    ):  # fmt: skip
        _check_labels(truth, classes)
        check_probabilities(given, len(truth), classes)
    named, confidence = _top(validation_probabilities)
    right = named == validation_labels
    wanted = errors * float((~right).mean())
    unsure = 0.0
    if len(right) >= _ENOUGH:
        unsure = max(_least(confidence, right, wanted), _lowest(confidence, outliers))
    own = [unsure] * classes
    for label in range(classes):
        chosen = (named == label) & (confidence >= unsure)
        images, wrong = int(chosen.sum()), int((~right[chosen]).sum())
        if images >= _ENOUGH and _is_more(wrong, images, wanted):
            own[label] = max(unsure, _least(confidence[chosen], right[chosen], wanted))
    found = Thresholds(unsure, own, 0.0, 0.0)
    taken = sure(test_probabilities, found)
    hits = _top(test_probabilities)[0][taken] == test_labels[taken]
    return Thresholds(unsure, own, float(taken.mean()), float(hits.mean()) if taken.any() else 0.0)


def sure(probabilities: Probabilities, thresholds: Thresholds) -> Right:
    """Which of the answers `[N, classes]` are sure, `[N]`."""
    reached: Right = probabilities.max(axis=1) >= thresholds.limits(probabilities)
    return reached


def _top(probabilities: Probabilities) -> tuple[Labels, _Floats]:
    """The label of each answer and its probability; rounding can make that more than 1."""
    named: Labels = probabilities.argmax(axis=1)
    return named, np.minimum(probabilities.max(axis=1).astype(np.float64), 1.0)


def _least(confidence: _Floats, right: Right, wanted: float) -> float:
    """The lowest confidence from which on the share of wrong answers is `wanted` at most, or the least
    that can be had with half of the images; 0 where all may be answered.
    """
    order = np.argsort(-confidence, kind="stable")
    falling, wrong = confidence[order], np.cumsum(~right[order])
    answered = np.arange(1, len(order) + 1)
    # Images of the same confidence are answered together or not at all.
    possible = np.append(falling[1:] < falling[:-1], True) & (2 * answered >= len(order))
    shares = wrong[possible] / answered[possible]
    reached = shares <= max(wanted, shares.min())
    last = int(answered[possible][reached][-1])
    return 0.0 if last == len(order) else float(falling[last - 1])


def _is_more(count: int, of: int, share: float) -> bool:
    """Whether chance would seldom make it so many, were their share `share`."""
    from scipy import stats

    p_value = stats.binomtest(count, of, share, alternative="greater").pvalue
    return bool(p_value < 1 - _CONFIDENCE)


def _lowest(confidence: _Floats, share: float) -> float:
    """What one more of the same kind falls short of with a chance of at most `share`."""
    # Its rank among them and itself is any of N + 1, each as likely.
    rank = math.floor(share * (len(confidence) + 1))
    return float(np.sort(confidence)[rank - 1]) if rank else 0.0


def _coverage(confidence: _Floats, right: Right) -> list[CoveragePoint]:
    falling = np.sort(confidence)[::-1]
    # Of few images several come to the same.
    limits = {float(falling[math.ceil(share * len(falling)) - 1]): None for share in _COVERAGES}
    return [
        CoveragePoint(limit, float(taken.mean()), float(right[taken].mean()))
        for limit in limits
        for taken in [confidence >= limit]
    ]


def _histogram(confidence: _Floats) -> Histogram:
    inner = np.array(_CONFIDENCES[1:-1])
    counts = np.bincount(np.digitize(confidence, inner, right=True), minlength=len(inner) + 1)
    return Histogram(list(_CONFIDENCES), counts.tolist())


# Strangers.


def strangers(pixels: Pixels, seed: int = 0) -> dict[str, Pixels]:
    """Images that belong to no class, by kind, made from test images uint8 `[N, H, W, C]`: as many of
    each kind as there are of these, at most 200. The same `seed` makes the same ones.

    Of noise; of one colour; of large squares, a quarter of the side, each of some colour; of test
    images the pixels in any order, and a grid of 4 by 4 patches in any order.
    """
    random = np.random.default_rng(seed)
    count = min(len(pixels), _STRANGERS)
    shape = (count, *pixels.shape[1:])
    _, height, width, channels = shape
    chosen = pixels[np.sort(random.permutation(len(pixels))[:count])]

    def colours(rows: int, columns: int) -> Pixels:
        return random.integers(0, 256, (count, rows, columns, channels), np.uint8)

    down, across = -(-height // 4), -(-width // 4)
    squares = colours(4, 4).repeat(down, axis=1).repeat(across, axis=2)
    return {
        "noise": colours(height, width),
        "one colour": np.broadcast_to(colours(1, 1), shape).copy(),
        "squares": squares[:, :height, :width],
        "shuffled pixels": _shuffle(chosen, (height, width), random),
        "shuffled patches": _shuffle(chosen, (4, 4), random),
    }


def _shuffle(pixels: Pixels, grid: tuple[int, int], random: np.random.Generator) -> Pixels:
    """Each image cut by `grid` rows and columns, the pieces in an order of its own. What a division
    leaves over at the right and below stays.
    """
    count, height, width, channels = pixels.shape
    rows, columns = min(grid[0], height), min(grid[1], width)
    down, across = height // rows, width // columns
    cut = pixels[:, : rows * down, : columns * across]
    pieces = cut.reshape(count, rows, down, columns, across, channels).swapaxes(2, 3)
    pieces = pieces.reshape(count, rows * columns, -1)
    order = random.permuted(np.tile(np.arange(rows * columns), (count, 1)), axis=1)
    pieces = np.take_along_axis(pieces, order[:, :, np.newaxis], axis=1)
    pieces = pieces.reshape(count, rows, columns, down, across, channels).swapaxes(2, 3)
    shuffled = pixels.copy()
    shuffled[:, : rows * down, : columns * across] = pieces.reshape(cut.shape)
    return shuffled


def _out_of_distribution(
    known: Probabilities, strange: Mapping[str, Probabilities], thresholds: Thresholds | None
) -> OutOfDistribution:
    from sklearn import metrics

    classes = known.shape[1]
    thresholds = thresholds or Thresholds(0.0, [0.0] * classes, 1.0, 0.0)

    def told(kind: str, others: Probabilities) -> StrangerFigures:
        check_probabilities(others, len(others), classes)
        is_strange = np.repeat([0, 1], [len(known), len(others)])
        doubt = -np.concatenate([known.max(axis=1), others.max(axis=1)])
        auroc = float(metrics.roc_auc_score(is_strange, doubt))
        return StrangerFigures(kind, len(others), auroc, float(1 - sure(others, thresholds).mean()))

    together = told("", np.concatenate(list(strange.values())))
    return OutOfDistribution(
        together.auroc,
        together.unsure,
        float(1 - sure(known, thresholds).mean()),
        [told(kind, others) for kind, others in strange.items()],
    )


# One against the other.


def compare(network: Predict, exported: Predict, images: Pixels, max_batch_size: int) -> Parity:
    """How far what was `exported`, under the code that serves it, is from the `network`.

    On `images` and on all-black and all-white pixels, at batch sizes 1, 3 and the largest: a free
    batch axis that is only free for one size shows here. Raises NotEvaluable where a size fails.
    """
    extremes = np.stack([np.zeros_like(images[0]), np.full_like(images[0], 255)])
    inputs = np.concatenate([images, extremes])
    if len(inputs) < max_batch_size:  # or the largest batch would not be tried
        inputs = np.resize(inputs, (max_batch_size, *inputs.shape[1:]))
    expected = answers(network, inputs)
    difference, agreement = 0.0, 1.0
    for size in sorted({1, 3, max_batch_size}):
        try:
            given = np.concatenate(
                [exported(inputs[start : start + size]) for start in range(0, len(inputs), size)]
            )
        except InferenceFailed as error:
            raise NotEvaluable(f"batches of {size} fail: {str(error).splitlines()[0]}") from error
        if given.shape != expected.shape:
            raise NotEvaluable(
                f"answers of shape {list(given.shape)} in batches of {size}, the network gives "
                f"{list(expected.shape)}"
            )
        # max() of NaN is NaN, which fails every comparison of the gate.
        with np.errstate(invalid="ignore"):
            difference = float(np.maximum(difference, np.abs(given - expected).max()))
        agreement = min(agreement, float((given.argmax(1) == expected.argmax(1)).mean()))
    return Parity(difference, agreement, len(inputs), sorted({1, 3, max_batch_size}))


def mcnemar(candidate_right: Right, serving_right: Right) -> PairedTest:
    """Compares two classifiers on the same images, by which of them each has right, `[N]`.

    The interval of the difference is Newcombe's for paired proportions ("Improved confidence intervals
    for the difference between binomial proportions based on paired data", Statistics in Medicine 17,
    1998, method 10), from Wilson's of both. Raises NotEvaluable where there is nothing to compare.
    """
    from scipy import stats

    if len(candidate_right) != len(serving_right) or not len(candidate_right):
        raise NotEvaluable(
            f"answers to {len(candidate_right)} and to {len(serving_right)} images can't be paired"
        )
    images = len(candidate_right)
    both = int((candidate_right & serving_right).sum())
    ours = int((candidate_right & ~serving_right).sum())
    theirs = int((~candidate_right & serving_right).sum())
    p_worse = p_better = 1.0
    if ours + theirs:
        p_worse = float(stats.binomtest(ours, ours + theirs, alternative="less").pvalue)
        p_better = float(stats.binomtest(ours, ours + theirs, alternative="greater").pvalue)
    return PairedTest(
        images,
        ours,
        theirs,
        (ours - theirs) / images,
        _newcombe(both, ours, theirs, images - both - ours - theirs),
        p_worse,
        p_better,
    )


def _newcombe(both: int, first_only: int, second_only: int, neither: int) -> Interval:
    images = both + first_only + second_only + neither
    first, second = both + first_only, both + second_only
    one, other = wilson(first, images), wilson(second, images)
    p, q = first / images, second / images
    product = first * (images - first) * second * (images - second)
    covariance = float(both * neither - first_only * second_only)
    if covariance > 0:  # corrected for continuity
        covariance = max(covariance - images / 2, 0.0)
    phi = covariance / math.sqrt(product) if product else 0.0

    def margin(a: float, b: float) -> float:
        # Never below 0 but by rounding, as phi is never over 1.
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0))

    difference = (first_only - second_only) / images
    return Interval(
        difference - margin(p - one.low, other.high - q),
        difference + margin(one.high - p, q - other.low),
    )
