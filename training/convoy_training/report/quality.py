"""What the sections about the answers' quality say: class by class, and how certain the answers are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from convoy_service.artifacts.reader import Thresholds
from convoy_training.evaluation.scores import STRAIGHT, Evaluation
from convoy_training.report import charts
from convoy_training.report.charts import Figure, Series
from convoy_training.report.record import Record
from convoy_training.report.wording import percent, percent_range

_MOST_CLASSES, _MOST_PAIRS = 100, 12


@dataclass(frozen=True)
class Pair:
    """Images of one class that the network took for another. `share` is of the class's images."""

    shown: str
    taken_for: str
    times: str
    share: float
    percent: str


@dataclass(frozen=True)
class ClassRow:
    """The figures of one class. `whisker` is None and `interval` is "" if no test image shows the class."""

    name: str
    images: str
    whisker: Markup | None
    recall: str
    interval: str
    precision: str
    f1: str
    unsure: str


@dataclass(frozen=True)
class Classes:
    """`unsure` tells whether the classes have thresholds."""

    summary: str
    confusion: Figure
    pairs: Sequence[Pair]
    rows: Sequence[ClassRow]
    unsure: bool
    caption: str


def classes(record: Record) -> Classes | None:
    """Which classes the network takes for which, and the figures of each class. The weakest come first."""
    evaluation = record.evaluation
    if not evaluation:
        return None
    names = [figures.name for figures in evaluation.classes]
    counts = np.array(evaluation.confusion)
    thresholds = record.manifest.thresholds
    per_class = thresholds.per_class if thresholds else []

    def weakness(position: int) -> tuple[bool, float, int]:
        figures = evaluation.classes[position]
        return not figures.support, figures.recall, -figures.support

    shown = sorted(range(len(names)), key=weakness)[:_MOST_CLASSES]
    summary = (
        f"Means over classes: recall {percent(evaluation.macro_recall)}, precision "
        f"{percent(evaluation.macro_precision)}, F1 {evaluation.macro_f1:.3f}. Always naming the most "
        f"frequent class would be right in {percent(evaluation.guessing)}."
    )
    confusion = Figure(
        "What was taken for what",
        charts.confusion(counts, names),
        "A row for what images show, a column for what they were taken for. Blue is right, "
        "orange is wrong; the darker, the larger the share of the row.",
    )
    return Classes(
        summary,
        confusion,
        # The matrix of two classes shows their only pair already.
        _pairs(counts, names) if len(names) > 2 else [],
        [_class_row(evaluation, position, per_class) for position in shown],
        bool(per_class),
        _classes_caption(len(names) - len(shown), unsure=bool(per_class)),
    )


def _pairs(counts: "npt.NDArray[np.int64]", names: Sequence[str]) -> list[Pair]:
    """The most frequent confusions."""
    mistakes = counts - np.diag(np.diag(counts))
    order = np.argsort(-mistakes, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = []
    for i, j in (divmod(int(at), len(names)) for at in order if mistakes.flat[at]):
        share = mistakes[i, j] / counts[i].sum()
        pairs.append(Pair(names[i], names[j], f"{mistakes[i, j]:,}", share, percent(share)))
    return pairs


def _class_row(evaluation: Evaluation, position: int, per_class: Sequence[float]) -> ClassRow:
    figures = evaluation.classes[position]
    precision = percent(figures.precision) if figures.named else "–"
    unsure = f"{per_class[position]:.2f}" if per_class else ""
    if not figures.support:
        return ClassRow(figures.name, "0", None, "–", "", precision, "–", unsure)
    return ClassRow(
        figures.name,
        f"{figures.support:,}",
        charts.whisker(figures.recall, figures.recall_interval),
        percent(figures.recall),
        percent_range(figures.recall_interval),
        precision,
        f"{figures.f1:.3f}",
        unsure,
    )


def _classes_caption(left_out: int, *, unsure: bool) -> str:
    caption = (
        "The weakest first. Recall: the share of a class's images that were found, with the 95% "
        "interval that so many images allow. Precision: the share of answers with this class that "
        "were right."
    )
    if unsure:
        caption += " Unsure: an answer with a lower probability does not count as sure."
    if left_out:
        caption += f" The other {left_out:,} classes do better than these."
    return caption


@dataclass(frozen=True)
class StrangeKind:
    """Images of a kind that belongs to no class."""

    kind: str
    images: str
    auroc: str
    unsure: str


@dataclass(frozen=True)
class Strange:
    """Out-of-distribution samples by kind, and all of them together."""

    kinds: Sequence[StrangeKind]
    together: StrangeKind
    caption: str


@dataclass(frozen=True)
class Certainty:
    summary: str
    figures: Sequence[Figure]
    strange: Strange | None


def certainty(record: Record) -> Certainty | None:
    """Whether the probabilities can be believed."""
    evaluation = record.evaluation
    if not evaluation:
        return None
    summary = (
        f"Log loss {evaluation.log_loss:.4f}, Brier score {evaluation.brier:.4f}. Can the probabilities be "
        "believed, and what is gained by leaving doubtful images to a person?"
    )
    figures = _calibration(evaluation)
    if len(evaluation.coverage) > 1:
        figures.append(_coverage(evaluation, record.manifest.thresholds))
    return Certainty(summary, figures, _strange(evaluation))


def _calibration(evaluation: Evaluation) -> list[Figure]:
    """Answers by their probability: before the scaling, if there is one, and after it."""
    before, after = evaluation.uncalibrated, evaluation.calibrated
    caption = (
        "Answers by the probability that they were given with. On the diagonal, answers given with 80% "
        "are right in 80%; below it, the network is too sure of itself. "
    )
    by_chance = (
        "Larger dots stand for more images; small ones may be off by chance. A classifier whose every "
        f"probability is true would stay below {percent(after.by_chance)} in 19 of 20 test splits of "
        "this size."
    )
    if (evaluation.temperature, evaluation.bend) == STRAIGHT:
        title = f"Calibration error {percent(after.error)}"
        return [Figure(title, charts.reliability(after, "a"), caption + by_chance)]
    bend = f" and a bend of {evaluation.bend:.3f}" if evaluation.bend != 1 else ""
    scaling = (
        "A scaling that was chosen on validation images is part of the exported graph: a temperature "
        f"of {evaluation.temperature:.3f}{bend}. "
    )
    return [
        Figure(
            f"Before scaling: calibration error {percent(before.error)}",
            charts.reliability(before, "b"),
            caption,
        ),
        Figure(
            f"After scaling: calibration error {percent(after.error)}",
            charts.reliability(after, "a"),
            scaling + by_chance,
        ),
    ]


def _coverage(evaluation: Evaluation, thresholds: Thresholds | None) -> Figure:
    """The accuracy of the answers that remain if the network answers only where it is sure."""
    caption = (
        "To answer only where the network is sure is to err less. From right to left, ever more "
        "images are left unanswered."
    )
    mark = None
    if thresholds:
        mark = (thresholds.coverage, thresholds.accuracy)
        caption += (
            f" The ring is where the version draws the line: below {thresholds.unsure:.2f}, or its "
            f"class's threshold, an answer is unsure. That leaves {percent(thresholds.coverage)} "
            f"of the images, of which {percent(thresholds.accuracy)} are right."
        )
    points = [(point.coverage, point.accuracy) for point in evaluation.coverage]
    chart = charts.lines(
        [Series("right", "a", points)],
        "share of images answered",
        percent=True,
        shares=True,
        mark=mark,
    )
    return Figure("Answered against right", chart, caption)


def _strange(evaluation: Evaluation) -> Strange | None:
    samples = evaluation.out_of_distribution
    if not samples:
        return None

    def row(kind: str, images: int, auroc: float, unsure: float) -> StrangeKind:
        return StrangeKind(kind, f"{images:,}", f"{auroc:.3f}", percent(unsure))

    images = sum(kind.images for kind in samples.kinds)
    return Strange(
        [row(kind.kind, kind.images, kind.auroc, kind.unsure) for kind in samples.kinds],
        row("all of these", images, samples.auroc, samples.unsure),
        "AUROC: the chance that such an image gets a lower probability than a test image; 0.5 "
        "is no better than a coin. Unsure: how many are kept from being answered; of the test "
        f"images it is {percent(samples.test_unsure)}.",
    )
