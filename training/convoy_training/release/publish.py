"""The gate, and the way of a trained network through it into the models folder.

`examine` measures a candidate, `judge` holds what was found against the limits and against what
serves, `publish` writes what may be written.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts import reference_statistics as profile
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import (
    DATA,
    Bundle,
    Golden,
    Manifest,
    Parity,
    Probabilities,
    Scores,
    Thresholds,
    Variant,
)
from convoy_service.artifacts.reference_statistics import Profile
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion, ConvoyError, InferenceFailed
from convoy_training.data.datasets import Dataset, Split
from convoy_training.evaluation.scores import (
    ROUNDING,
    STRAIGHT,
    Evaluation,
    NotEvaluable,
    PairedTest,
    Predict,
    Right,
    Scaling,
    answers,
    check_probabilities,
    choose_thresholds,
    compare,
    evaluate,
    mcnemar,
    score_answers,
    strangers,
    sure,
)
from convoy_training.provenance import provenance
from convoy_training.settings import TrainingSettings

# On fewer test images than this, all of them right is no reason to wonder.
_HANDFUL = 50

# Of a class with so many test images, one at least is found: where half of them would be, none is
# with a chance of 1 in 32.
_DEAD = 5

_GOLDEN = 8

# Images whose values are looked at, one by one, for those that float16 can't hold.
_RANGED, _RANGED_BATCH = 256, 16

# Timing side by side: so long, but so many rounds at least.
_TIMED_S, _ROUNDS = 1.0, 3


@dataclass(frozen=True)
class Check:
    """One condition of the gate, as it is shown to a person.

    What is `suspicious` passes, but should be looked at. Where a check that does not close fails, only
    the variant that it is about is left out. A `comparison` is one with the version that serves.
    """

    name: str
    value: str
    wanted: str
    passed: bool
    suspicious: bool = False
    closes: bool = True
    comparison: bool = False


class GateClosed(ConvoyError):
    """The version was not published: `checks` has every check, passed and failed."""

    def __init__(self, checks: list[Check]) -> None:
        failed = ", ".join(check.name for check in _closed(checks)) or "no better than what serves"
        super().__init__(f"the gate is closed ({failed}): nothing was published")
        self.checks = checks


class NotBetter(GateClosed):
    """All that is wrong with it is that what serves is as good or better."""


def _closed(checks: Sequence[Check]) -> list[Check]:
    return [check for check in checks if check.closes and not check.passed]


@dataclass(frozen=True)
class Candidate:
    """What a training run would have published: graphs by their names in `bundle.VARIANTS`, fp32 among
    them, and what it knows of them.

    `network` is the trained network itself, uint8 `[N, H, W, C]` to probabilities with its `scaling`;
    `labels` are those of its outputs, in order.
    """

    graphs: Mapping[str, bytes] = field(repr=False)
    labels: Sequence[str]
    network: Predict
    scaling: Scaling = STRAIGHT
    # What graphs have in `bundle.DATA`.
    data: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class Findings:
    """What `examine` found. Without an `evaluation`, `checks` has the reason."""

    # Of the form of the float32 graph and of its answers.
    checks: list[Check]
    # Bytes of each graph, and of what they have in common by the name `bundle.DATA`.
    sizes: dict[str, int]
    parity: Parity | None = None
    evaluation: Evaluation | None = None
    thresholds: Thresholds | None = None
    # Of the float32 graph, for each test image.
    right: Right | None = field(default=None, repr=False)
    probabilities: Probabilities | None = field(default=None, repr=False)
    # All that can be used, fp32 among them; against which the others were paired; and why others can't.
    variants: dict[str, Variant] = field(default_factory=dict)
    paired: dict[str, PairedTest] = field(default_factory=dict)
    unusable: dict[str, str] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict, repr=False)

    def megabytes(self, name: str) -> float:
        """Of one graph, with the weights that it has in common with others."""
        return (self.sizes[name] + self.sizes.get(DATA, 0)) / 1e6


@dataclass(frozen=True)
class Serving:
    """The version that a candidate has to live up to: its scores on the candidate's test images, or
    None and the `reason` why it can't be compared; which of them it has right, and what it runs on.
    """

    version: int
    scores: Scores | None
    reason: str = ""
    right: Right | None = field(default=None, repr=False, compare=False)
    predict: Predict | None = field(default=None, repr=False, compare=False)
    # The test images at the size that it takes.
    inputs: Pixels | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Verdict:
    """Every check, and what they come to.

    `better`: it has more test images right than what serves, or there is nothing that it could be
    compared with. That chance may have made the difference is no reason against it: of two
    versions the one that did better is the better guess, and what is really worse is for
    `significance` to find. `variants` are those to publish, by their names; fp32 is one.
    """

    checks: list[Check]
    better: bool
    variants: dict[str, Variant]
    compared: PairedTest | None = None

    @property
    def passed(self) -> bool:
        return not _closed(self.checks)

    def admit(self, *, retrain: bool = False) -> None:
        """Raises GateClosed where a check closes the gate; with `retrain` NotBetter where it is sound,
        but has to give way to what serves, be it only for not being better.
        """
        closed = _closed(self.checks)
        if any(not check.comparison for check in closed) or (closed and not retrain):
            raise GateClosed(self.checks)
        if retrain and (closed or not self.better):
            raise NotBetter(self.checks)


def serving_version(model: Path, data: Dataset) -> Serving | None:
    """What serves from the folder `model`: the newest version that proves itself; None for nothing.

    It is scored on the same test images, brought to the size that it takes.
    """
    found = newest_proven(model)
    if found is None:
        return None
    bundle, loaded = found
    labels = bundle.manifest.labels
    if sorted(labels) != sorted(data.classes):
        return Serving(bundle.version, None, f"its classes are {', '.join(labels)}")
    order = [labels.index(name) for name in data.classes]
    target = bundle.manifest.pixels
    inputs = data.test.inputs if target == data.target else data.test.at(target)
    given = answers(loaded.run, inputs)[:, order]
    right = given.argmax(axis=1) == data.test.labels
    scores = score_answers(given, data.test.labels)
    return Serving(bundle.version, scores, "", right, loaded.run, inputs)


def newest_proven(model: Path) -> tuple[Bundle, Model] | None:
    """The newest version in the folder `model` that proves itself, loaded; None where none does."""
    for version in reversed(bundles.versions(model)):
        try:
            bundle = bundles.read(model / str(version))
            return bundle, Model.load(bundle, device="cpu")
        except BrokenVersion:
            continue
    return None


# Measured.


def examine(
    candidate: Candidate, data: Dataset, settings: TrainingSettings, device: str = "cpu"
) -> Findings:
    """Everything that can be found out about a candidate by itself.

    The thresholds come from the validation images; the test images choose nothing.
    """
    sizes = {name: len(graph) for name, graph in candidate.graphs.items()}
    if candidate.data:
        sizes[DATA] = len(candidate.data)
    checks: list[Check] = []

    def check(name: str, value: str, wanted: str, *, passed: bool) -> bool:
        checks.append(Check(name, value, wanted, passed))
        return passed

    try:
        model = Model(candidate.graphs["fp32"], device, data=candidate.data)
    except BrokenVersion as error:
        check("loads", _first_line(error), "a classifier that ONNX Runtime takes", passed=False)
        return Findings(checks, sizes)
    check("loads", "yes", "a classifier that ONNX Runtime takes", passed=True)
    takes, wanted = _shape(model.fixed_batch or "N", model.shape), _shape("N", data.target.shape)
    check("input", takes, f"{wanted}, N being free", passed=takes == wanted)
    test, classes = data.test, len(data.classes)
    try:
        parity = compare(candidate.network, model.run, test.inputs, settings.max_batch_size)
        given = answers(model.run, test.inputs)
        strange = {kind: answers(model.run, each) for kind, each in strangers(test.inputs).items()}
        beyond = half_overflows(candidate.graphs["fp32"], test.inputs)
    except (NotEvaluable, InferenceFailed) as error:
        check("answers", _first_line(error), "to every image, in any batch size", passed=False)
        return Findings(checks, sizes)
    check("answers", "yes", "to every image, in any batch size", passed=True)
    check(
        "labels",
        f"{given.shape[1]} outputs for {', '.join(candidate.labels)}",
        ", ".join(data.classes),
        passed=list(candidate.labels) == list(data.classes) and given.shape[1] == classes,
    )
    everything = np.concatenate([given, *strange.values()])
    finite = np.isfinite(everything).all(axis=1)
    with np.errstate(invalid="ignore"):
        off = float(np.maximum(np.abs(everything.sum(axis=1) - 1).max(), -everything.min()))
    sound = [
        given.shape[1] == classes,
        check(
            "finite",
            f"{int((~finite).sum())} of {len(finite)} answers are not{_said(beyond)}",
            "no NaN, no infinity, to test images nor strange ones",
            passed=bool(finite.all()) and not beyond,
        ),
        check(
            "probabilities",
            f"{off:.1e} off 1 at most",
            f"rows add up to 1, within {ROUNDING:g}, and nothing is negative",
            passed=off <= ROUNDING,
        ),
    ]
    if not all(sound):
        return Findings(checks, sizes, parity)
    validation = answers(model.run, data.validation.inputs)
    thresholds = choose_thresholds(validation, data.validation.labels, given, test.labels)
    evaluation = evaluate(
        given,
        test.labels,
        data.classes,
        scaling=candidate.scaling,
        thresholds=thresholds,
        strange=strange,
    )
    models, said, unusable = {"fp32": model}, {"fp32": given}, {}
    for name in sorted(candidate.graphs.keys() - {"fp32"}):
        try:
            models[name], said[name] = _variant(candidate, name, test, classes, device)
        except (BrokenVersion, InferenceFailed, NotEvaluable) as error:
            unusable[name] = _first_line(error)
    batch = _batch(test.inputs, settings.max_batch_size)
    speeds = time_side_by_side([(each.run, batch) for each in models.values()])
    named = {name: found.argmax(axis=1) for name, found in said.items()}
    right: dict[str, Right] = {name: found == test.labels for name, found in named.items()}
    return Findings(
        checks,
        sizes,
        parity,
        evaluation,
        thresholds,
        right["fp32"],
        given,
        variants={
            name: Variant(
                scores=score_answers(said[name], test.labels),
                label_agreement=float((named[name] == named["fp32"]).mean()),
                images_per_s=speed,
                speedup=speed / speeds[0],
                device=models[name].device,
            )
            for name, speed in zip(models, speeds, strict=True)
        },
        paired={name: mcnemar(right[name], right["fp32"]) for name in models if name != "fp32"},
        unusable=unusable,
        models=models,
    )


def _variant(
    candidate: Candidate, name: str, test: Split, classes: int, device: str
) -> tuple[Model, Probabilities]:
    """A graph in another precision, and its answers; raises what is wrong with it."""
    graph = candidate.graphs[name]
    model = Model(graph, device, data=candidate.data)
    if model.fixed_batch is not None:
        raise NotEvaluable(f"its batch axis is fixed to {model.fixed_batch}")
    given = answers(model.run, test.inputs)
    check_probabilities(given, len(test), classes)
    if beyond := half_overflows(graph, test.inputs):
        raise NotEvaluable(f"not all is finite{_said(beyond)}")
    return model, given


def half_overflows(graph: bytes, inputs: Pixels) -> list[str]:
    """Which of the graph's float16 values are beyond the range of that (65504) for some test image, or
    for black or white.

    A CPU's answers would not tell: ONNX Runtime computes halves as float32 there, and what is between
    two operations is never rounded. As outputs of the graph all values have to be. Raises NotEvaluable.
    """
    import onnx
    import onnxruntime as ort

    model = onnx.load_model_from_string(graph)
    half = onnx.TensorProto.FLOAT16
    found = {
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == half and not np.isfinite(onnx.numpy_helper.to_array(tensor)).all()
    }
    values = onnx.shape_inference.infer_shapes(model).graph.value_info
    halves = [value for value in values if value.type.tensor_type.elem_type == half]
    if not halves:
        return sorted(found)
    del model.graph.output[:]
    model.graph.output.extend(halves)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    spread = np.linspace(0, len(inputs) - 1, min(len(inputs), _RANGED)).astype(int)
    extremes = np.stack([np.zeros_like(inputs[0]), np.full_like(inputs[0], 255)])
    chosen = np.concatenate([extremes, inputs[spread]])
    try:
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (source,) = session.get_inputs()
        for start in range(0, len(chosen), _RANGED_BATCH):
            feed = {source.name: chosen[start : start + _RANGED_BATCH]}
            for value, given in zip(halves, session.run(None, feed), strict=True):
                if not np.isfinite(given).all():
                    found.add(value.name)
    # ONNX Runtime raises classes of its own that share no base but Exception.
    except Exception as error:
        raise NotEvaluable(f"its float16 values can't be told: {_first_line(error)}") from error
    return sorted(found)


def _said(beyond: Sequence[str]) -> str:
    if not beyond:
        return ""
    return f"; beyond float16's 65504: {', '.join(beyond[:3])}{', ...' if beyond[3:] else ''}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shape(batch: int | str, shape: Sequence[int]) -> str:
    return f"uint8 [{', '.join(map(str, (batch, *shape)))}]"


def _batch(inputs: Pixels, size: int) -> Pixels:
    return np.resize(inputs, (size, *inputs.shape[1:]))


def time_side_by_side(
    models: Sequence[tuple[Predict, Pixels]], clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Images a second of each model on its pixels, a batch.

    They take turns for about a second in all, so that what else the machine does meets all of them;
    each is told by the median of its turns. The first run of each, which sets up memory, is not timed.
    """
    for predict, pixels in models:
        predict(pixels)
    taken: list[list[float]] = [[] for _ in models]
    ends, rounds = clock() + _TIMED_S, 0
    while rounds < _ROUNDS or clock() < ends:
        # Forwards and back: none is always the one after the other.
        for position in sorted(range(len(models)), reverse=bool(rounds % 2)):
            predict, pixels = models[position]
            began = clock()
            predict(pixels)
            taken[position].append(clock() - began)
        rounds += 1
    return [
        len(pixels) / statistics.median(seconds)
        for (_, pixels), seconds in zip(models, taken, strict=True)
    ]


# Judged.


def judge(
    findings: Findings, data: Dataset, serving: Serving | None, settings: TrainingSettings
) -> Verdict:
    """Makes every check of the gate, timed side by side with what serves.

    Hold `bundles.exclusive` from `serving_version` to `publish`.
    """
    speeds = None
    model = findings.models.get("fp32")
    compared = None
    if serving and settings.compare:
        if model and serving.predict and serving.inputs is not None:
            ours, theirs = time_side_by_side(
                [
                    (run, _batch(inputs, settings.max_batch_size))
                    for run, inputs in (
                        (model.run, data.test.inputs),
                        (serving.predict, serving.inputs),
                    )
                ]
            )
            speeds = ours, theirs
        if findings.right is not None and serving.right is not None:
            compared = mcnemar(findings.right, serving.right)
    checks = gate(findings, serving, settings, speeds)
    failed = {check.name for check in checks if not check.passed}
    return Verdict(
        checks,
        compared is None or compared.difference > 0,
        {name: each for name, each in findings.variants.items() if name not in failed},
        compared,
    )


def gate(
    findings: Findings,
    serving: Serving | None,
    settings: TrainingSettings,
    speeds: tuple[float, float] | None = None,
) -> list[Check]:
    """Every check of the gate, all of them made whatever the first ones say, as far as there is
    something to check. `speeds` in images a second, of the candidate and of what serves.

    A comparison with NaN is False, so that a figure that is no number fails its check.
    """
    checks = list(findings.checks)
    if findings.evaluation:
        checks += _quality(findings.evaluation, settings)
    if findings.parity:
        checks += [
            Check(
                "parity",
                f"{findings.parity.max_abs_difference:.2e}",
                f"at most {settings.max_parity:.2e} off the network's answers",
                findings.parity.max_abs_difference <= settings.max_parity,
            ),
            Check(
                "agreement",
                f"{findings.parity.label_agreement:.4f}",
                f"at least {settings.min_agreement:.4f} of the network's labels",
                findings.parity.label_agreement >= settings.min_agreement,
            ),
        ]
    others = sorted(findings.sizes.keys() - {"fp32", DATA}) if findings.evaluation else []
    variants = [_variant_check(name, findings, settings) for name in others]
    dropped = {check.name for check in variants if not check.passed}
    size = sum(size for name, size in findings.sizes.items() if name not in dropped) / 1e6
    checks += [
        *variants,
        Check(
            "size",
            f"{size:.2f} MB",
            f"at most {settings.max_megabytes:.2f} MB, all graphs together",
            size <= settings.max_megabytes,
        ),
    ]
    return checks + _against(findings, serving, settings, speeds)


def _quality(found: Evaluation, settings: TrainingSettings) -> list[Check]:
    interval, worst, calibrated = found.accuracy_interval, found.worst, found.calibrated
    missed = [figures for figures in found.classes if figures.support and not figures.recall]
    dead = [figures for figures in missed if figures.support >= _DEAD]
    better = found.accuracy > found.guessing
    return [
        Check(
            "accuracy",
            f"{found.accuracy:.4f} {interval}",
            f"at least {settings.min_accuracy:.4f}",
            found.accuracy >= settings.min_accuracy,
        ),
        Check(
            "better than guessing",
            f"{found.accuracy:.4f} {interval}",
            f"over {found.guessing:.4f}, the share of the most frequent class",
            better,
            # On so few images, who only guesses can be as lucky.
            better and not interval.low > found.guessing,
        ),
        Check(
            "accuracy is plausible",
            f"{found.correct} of {found.images} right",
            "not every one: are test images among the trained, does something give the class away?",
            True,
            found.correct == found.images and found.images > _HANDFUL,
        ),
        Check(
            "every class is found",
            "; ".join(f"none of {each.support} of {each.name}" for each in dead or missed) or "yes",
            f"an image at least of each class that has {_DEAD} or more",
            not dead,
            bool(missed) and not dead,
        ),
        Check(
            "worst recall",
            f"{worst.recall:.4f} {worst.recall_interval}, of {worst.name}",
            f"at least {settings.min_recall:.4f}",
            worst.recall >= settings.min_recall,
        ),
        Check(
            "calibration",
            f"{calibrated.error:.4f}; by chance alone up to {calibrated.by_chance:.4f}",
            f"an expected error of at most {settings.max_calibration_error:.4f}",
            calibrated.error <= settings.max_calibration_error,
        ),
    ]


def _variant_check(name: str, findings: Findings, settings: TrainingSettings) -> Check:
    wanted = f"at most {settings.max_variant_loss:.4f} less accurate than fp32, or it is left out"
    if name not in findings.paired:
        reason = findings.unusable.get(name, "not measured")
        return Check(name, reason, wanted, False, closes=False)
    paired, measured = findings.paired[name], findings.variants[name]
    return Check(
        name,
        f"{measured.scores.accuracy:.4f}, {paired.difference:+.4f} {paired.interval}; "
        f"{measured.speedup:.2f} times as fast",
        wanted,
        paired.difference >= -settings.max_variant_loss - _HAIR,
        closes=False,
    )


# The binary fractions of 0.8 - 0.1 are above those of 0.7.
_HAIR = 1e-9


def _against(
    findings: Findings,
    serving: Serving | None,
    settings: TrainingSettings,
    speeds: tuple[float, float] | None,
) -> list[Check]:
    if not serving:
        return []
    version = f"version {serving.version}"
    if not settings.compare:
        return [Check(f"compared with {version}", "no", "--no-compare", True, True)]
    if serving.right is None:
        return [
            Check(
                f"comparable with {version}",
                f"no: {serving.reason}",
                "the same classes; --no-compare publishes all the same",
                False,
            )
        ]
    checks = []
    if findings.right is not None:
        found = mcnemar(findings.right, serving.right)
        checks += [
            Check(
                f"not worse than {version}",
                f"{found.difference:+.4f} {found.interval}",
                f"at most {settings.max_regression:.4f} less accurate, on the same test images",
                found.difference >= -settings.max_regression - _HAIR,
                comparison=True,
            ),
            Check(
                f"not significantly worse than {version}",
                f"p = {found.p_worse:.3g}; {found.only_candidate} only this one has right, "
                f"{found.only_serving} only that one",
                f"p of at least {settings.significance:g}, McNemar's exact test",
                found.p_worse >= settings.significance,
                comparison=True,
            ),
        ]
    if speeds:
        ours, theirs = speeds
        checks.append(
            Check(
                f"not slower than {version}",
                f"{theirs / ours:.2f} times the time: {ours:,.0f} images/s, that one {theirs:,.0f}",
                f"at most {settings.max_slowdown:.2f} times, side by side",
                theirs / ours <= settings.max_slowdown,
                comparison=True,
            )
        )
    return checks


# Published.


def manifest(
    candidate: Candidate,
    findings: Findings,
    verdict: Verdict,
    data: Dataset,
    settings: TrainingSettings,
    *,
    created: str,
    training: Mapping[str, Any],
) -> Manifest:
    """What is written down of a candidate that was judged; `training` tells how it was trained."""
    model, evaluation = findings.models["fp32"], findings.evaluation
    assert evaluation
    return Manifest(
        input=model.input,
        output=model.output,
        pixels=data.target,
        labels=list(candidate.labels),
        max_batch_size=settings.max_batch_size,
        created=created,
        scores=evaluation.scores,
        parity=findings.parity,
        variants=verdict.variants,
        thresholds=findings.thresholds,
        evaluation=asdict(evaluation),
        training={
            **training,
            "profile": asdict(_profile(findings, data.test)),
            "gate": [asdict(check) for check in verdict.checks],
            "compared": verdict.compared and asdict(verdict.compared),
        },
        provenance=provenance(),
    )


def _profile(findings: Findings, test: Split) -> Profile:
    """What the test images look like and what the float32 graph says, for `convoy_service.observers.drift_monitor`."""
    given, thresholds = findings.probabilities, findings.thresholds
    assert given is not None
    unsure = None if thresholds is None else ~sure(given, thresholds)
    sizes = [profile.size_of(test.encoded(position)) for position in range(len(test))]
    return profile.make(test.inputs, given, unsure, sizes)


def publish(
    model: Path,
    candidate: Candidate,
    findings: Findings,
    verdict: Verdict,
    described: Manifest,
    test: Split,
    report: str = "",
    weights: Sequence[npt.NDArray[Any]] = (),
) -> Bundle:
    """Makes the next version in the folder `model`, after each graph has proved itself by its golden
    answers, as it will have to when it is served.

    Raises GateClosed, BrokenVersion, or ConvoyError where the disk refuses.
    """
    verdict.admit()
    pixels = choose_golden(test)
    graphs = {name: candidate.graphs[name] for name in verdict.variants}
    said = {name: findings.models[name].run(pixels) for name in graphs}
    golden = Golden(pixels, said.pop("fp32"), said)
    onnx = graphs.pop("fp32")
    data = candidate.data
    bundle = Bundle(model, model.name, 0, described, onnx, golden, graphs, data)
    for name in ("fp32", *graphs):
        Model.load(bundle, findings.models[name].device, variant=name)
    return bundles.write(model, described, onnx, golden, graphs, report, weights, data)


def choose_golden(split: Split) -> Pixels:
    """A few test images, of as many classes as possible."""
    _, first = np.unique(split.labels, return_index=True)
    rest = np.setdiff1d(np.arange(len(split)), first)
    chosen: Pixels = split.inputs[np.concatenate([first, rest])[:_GOLDEN]]
    return chosen
