"""The whole line from a candidate to a version that serves, and what of it catches which bad export."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from scipy import special
from sklearn.linear_model import LogisticRegression

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts import reference_statistics as profile
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Bundle, Probabilities
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion
from convoy_training.data import datasets
from convoy_training.data.datasets import Dataset, Labels, Split
from convoy_training.evaluation.scores import STRAIGHT, Predict, Scaling, fit_scaling
from convoy_training.release import publish as publishing
from convoy_training.release.publish import (
    Candidate,
    Findings,
    GateClosed,
    NotBetter,
    Verdict,
    examine,
    judge,
    manifest,
    publish,
    serving_version,
)
from convoy_training.settings import TrainingSettings
from tests.conftest import REPOSITORY
from tests.unit import planted
from tests.unit.graphs import graph, value

SETTINGS = TrainingSettings()


class Honest(NamedTuple):
    """A graph, the network that it was exported from, and its data."""

    data: Dataset
    onnx: bytes
    network: Predict
    scaling: Scaling = STRAIGHT

    def candidate(self, **graphs: bytes) -> Candidate:
        graphs = {"fp32": self.onnx, **graphs}
        return Candidate(graphs, self.data.classes, self.network, self.scaling)


def remembered(predict: Predict) -> Predict:
    """It is asked the same again and again."""
    said: dict[bytes, Probabilities] = {}

    def answer(pixels: Pixels) -> Probabilities:
        key = pixels.tobytes()
        if key not in said:
            said[key] = predict(pixels)
        return said[key]

    return answer


@pytest.fixture(scope="module")
def digits() -> Honest:
    """The shipped model. For the network stands ONNX's own interpreter in numpy, which shares no code
    with ONNX Runtime.
    """
    file = (REPOSITORY / "models" / "digits" / "1" / "model.onnx").read_bytes()
    interpreter = ReferenceEvaluator(onnx.load_model_from_string(file))
    name = str(interpreter.input_names[0])

    def network(pixels: Pixels) -> Probabilities:
        (given,) = interpreter.run(None, {name: pixels})
        return np.asarray(given, np.float32)

    return Honest(datasets.load(TrainingSettings()), file, remembered(network))


@pytest.fixture(scope="module")
def colours() -> Honest:
    """Squares in more or less red, green or blue on a noisy ground, and a logistic regression."""
    random = np.random.default_rng(0)

    def split(count: int) -> Split:
        labels: Labels = random.integers(0, 3, count)
        images = random.normal(110, 40, (count, 8, 8, 3))
        for image, label in zip(images, labels, strict=True):
            top, left = random.integers(0, 4, 2)
            tint = random.normal(0, 35, 3)
            tint[label] += 90
            image[top : top + 5, left : left + 5] += tint
        return Split(images.clip(0, 255).astype(np.uint8), labels)

    train, validation, test = split(600), split(200), split(300)
    data = Dataset("colours", ("red", "green", "blue"), Target(8, 8, 3), train, validation, test)

    def flat(pixels: Pixels) -> np.ndarray:
        return pixels.reshape(len(pixels), -1).astype(np.float64) / 255

    # Held so tight, it is too unsure of itself.
    regression = LogisticRegression(C=0.005).fit(flat(train.inputs), train.labels)
    scaling = fit_scaling(regression.decision_function(flat(validation.inputs)), validation.labels)
    assert scaling.bend != 1

    def network(pixels: Pixels) -> Probabilities:
        surprise = -special.log_softmax(regression.decision_function(flat(pixels)), axis=1)
        scaled = special.softmax(-(surprise**scaling.bend) / scaling.temperature, axis=1)
        return np.asarray(scaled, np.float32)

    constants = {
        "bend": np.array(scaling.bend, np.float32),
        "colder": np.array(-1 / scaling.temperature, np.float32),
        "scale": np.array([1 / 255], np.float32),
        "weights": regression.coef_.T.astype(np.float32),
        "bias": regression.intercept_.astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["shares"]),
        helper.make_node("Flatten", ["shares"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("LogSoftmax", ["logits"], ["logarithms"], axis=1),
        helper.make_node("Neg", ["logarithms"], ["opposite"]),
        helper.make_node("Relu", ["opposite"], ["surprise"]),
        helper.make_node("Pow", ["surprise", "bend"], ["bent"]),
        helper.make_node("Mul", ["bent", "colder"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["probabilities"], axis=1),
    ]
    made = graph(
        nodes,
        [value("pixels", TensorProto.UINT8, ["N", 8, 8, 3])],
        [value("probabilities", TensorProto.FLOAT, ["N", 3])],
        constants,
    )
    return Honest(
        data,
        made,
        remembered(network),
        scaling,
    )


@pytest.fixture(autouse=True)
def no_second_for_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "_TIMED_S", 0.0)


class Line(NamedTuple):
    findings: Findings
    verdict: Verdict
    bundle: Bundle | None

    @property
    def failed(self) -> set[str]:
        return {check.name for check in self.verdict.checks if not check.passed}


def line(
    folder: Path, candidate: Candidate, data: Dataset, settings: TrainingSettings = SETTINGS
) -> Line:
    """As `convoy_training.pipeline.run` goes about it."""
    findings = examine(candidate, data, settings)
    with bundles.exclusive(folder):
        verdict = judge(findings, data, serving_version(folder, data), settings)
        if not verdict.passed:
            with pytest.raises(GateClosed):
                verdict.admit()
            return Line(findings, verdict, None)
        described = manifest(
            candidate, findings, verdict, data, settings, created="now", training={"epochs": []}
        )
        made = publish(folder, candidate, findings, verdict, described, data.test)
    return Line(findings, verdict, made)


@pytest.mark.parametrize("name", ["digits", "colours"])
def test_an_honest_export_passes_the_whole_line(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    honest: Honest = request.getfixturevalue(name)
    data = honest.data
    first = line(tmp_path / name, honest.candidate(fp16=planted.half(honest.onnx)), data)
    assert first.failed == set()
    assert first.bundle
    bundle = bundles.read(first.bundle.folder)
    written = bundle.manifest
    assert first.findings.evaluation
    assert written.scores == first.findings.evaluation.scores
    assert written.scores.accuracy > 0.9
    assert written.parity
    assert written.parity.max_abs_difference < 1e-5
    assert set(written.variants) == {"fp32", "fp16"}
    assert written.variants["fp32"].label_agreement == written.variants["fp32"].speedup == 1
    assert written.thresholds == first.findings.thresholds
    assert written.evaluation == json.loads(
        json.dumps(dataclasses.asdict(first.findings.evaluation))
    )
    assert [check["name"] for check in written.training["gate"]] == [
        check.name for check in first.verdict.checks
    ]
    watched = profile.read(written)
    assert watched
    assert first.findings.probabilities is not None
    named = np.bincount(first.findings.probabilities.argmax(axis=1), minlength=len(data.classes))
    assert watched.features["class"].counts == named.tolist()
    assert {sum(bins.counts) for bins in watched.features.values()} == {len(data.test)}
    for variant in ("fp32", "fp16"):
        model = Model.load(bundle, device="cpu", variant=variant)
        assert model.variant == variant
        given = model.run(data.test.inputs)
        assert (given.argmax(axis=1) == data.test.labels).mean() > 0.9
    # The same once more is as good, and no better.
    second = line(tmp_path / name, honest.candidate(), data)
    assert second.failed == set()
    assert second.bundle
    assert second.bundle.version == 2
    assert (second.verdict.passed, second.verdict.better) == (True, False)
    with pytest.raises(NotBetter):
        second.verdict.admit(retrain=True)


def test_a_handful_of_images_passes_too(colours: Honest, tmp_path: Path) -> None:
    """One to validate with, three to test with: nobody knows much then, and it says so."""
    _, first = np.unique(colours.data.test.labels, return_index=True)
    validation, test = (
        Split(split.inputs[chosen], split.labels[chosen])
        for split, chosen in ((colours.data.validation, np.array([0])), (colours.data.test, first))
    )
    data = dataclasses.replace(colours.data, validation=validation, test=test)
    made = line(tmp_path / "colours", colours.candidate(), data)
    assert made.failed == set()
    assert made.bundle
    found = made.findings.evaluation
    assert found
    assert found.accuracy_interval.high - found.accuracy_interval.low > 0.5
    assert made.findings.thresholds
    assert made.findings.thresholds.unsure == 0


# Than what serves.
WORSE = {"not worse than version 1", "not significantly worse than version 1"}

PLANTED: dict[str, tuple[str, Callable[[bytes], bytes], set[str]]] = {
    "swapped labels": (
        "digits", planted.swapped_labels, {"parity", "agreement", "every class is found"},
    ),
    "RGB for BGR": ("colours", planted.bgr, {"parity", "agreement", "better than guessing"}),
    "pixels divided twice": (
        "digits", planted.scaled(1 / 255), {"parity", "agreement", "better than guessing"},
    ),
    "pixels not divided": ("colours", planted.scaled(255), {"parity", "agreement"}),
    "fixed batch axis": ("digits", planted.fixed_batch, {"input"}),
    "fixed batch inside": ("digits", planted.batch_of_64_inside, {"answers"}),
    "dead class": ("digits", planted.dead_class, {"parity", "agreement", "every class is found"}),
    "NaN weight": ("digits", planted.nan_weight, {"finite", "parity"}),
    "truncated": ("digits", planted.truncated, {"loads"}),
    "no softmax": ("digits", planted.logits_for_probabilities, {"probabilities"}),
    "float16 weights": ("digits", planted.half_weights_overflow, {"finite"}),
    "float16 activations": ("digits", planted.half_activations_overflow, {"finite"}),
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_a_bad_export_is_caught(fault: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name, plant, checks = PLANTED[fault]
    honest: Honest = request.getfixturevalue(name)
    bad = plant(honest.onnx)
    assert bad != honest.onnx
    made = line(tmp_path / name, honest.candidate(fp32=bad), honest.data)
    assert checks <= made.failed
    assert made.bundle is None
    assert bundles.versions(tmp_path / name) == []


# As where the network itself was trained so: the export is what it should be.
BLIND: dict[str, tuple[str, Callable[[bytes], bytes], set[str]]] = {
    "swapped labels": ("digits", planted.swapped_labels, WORSE),
    "RGB for BGR": ("colours", planted.bgr, WORSE),
    "pixels divided twice": ("digits", planted.scaled(1 / 255), WORSE),
    # What is largest stays it; but all are all but certain.
    "pixels not divided": ("colours", planted.scaled(255), {"calibration"}),
    "dead class": ("digits", planted.dead_class, WORSE | {"worst recall"}),
}


@pytest.mark.parametrize("fault", BLIND)
def test_what_was_wrong_before_the_export_is_caught_by_what_serves(
    fault: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name, plant, checks = BLIND[fault]
    honest: Honest = request.getfixturevalue(name)
    settings = dataclasses.replace(SETTINGS, max_calibration_error=0.05, min_recall=0.5)
    folder = tmp_path / name
    first = line(folder, honest.candidate(), honest.data, settings)
    assert first.bundle, first.failed
    bad = plant(honest.onnx)
    blind = honest._replace(network=remembered(Model(bad, device="cpu").run))
    made = line(folder, blind.candidate(fp32=bad), honest.data, settings)
    assert made.failed.isdisjoint({"parity", "agreement"})
    assert checks <= made.failed
    assert bundles.versions(folder) == [1]


@pytest.mark.parametrize(
    "labels", [tuple("1023456789"), tuple("012345678"), (*"0123456789", "10")], ids=len
)
def test_stale_labels_are_caught(labels: tuple[str, ...], digits: Honest, tmp_path: Path) -> None:
    candidate = dataclasses.replace(digits.candidate(), labels=labels)
    assert line(tmp_path / "digits", candidate, digits.data).failed == {"labels"}


@pytest.mark.parametrize("classes", [9, 11])
def test_a_graph_with_other_outputs_than_classes_is_caught(
    classes: int, digits: Honest, tmp_path: Path
) -> None:
    """As after a class was added, or taken away, and the old graph was exported."""
    data = dataclasses.replace(digits.data, classes=tuple(map(str, range(classes))))
    candidate = dataclasses.replace(digits.candidate(), labels=data.classes)
    assert line(tmp_path / "digits", candidate, data).failed == {"labels"}


def test_another_size_of_images_is_caught(colours: Honest, tmp_path: Path) -> None:
    data = dataclasses.replace(colours.data, target=Target(16, 16, 3))
    assert line(tmp_path / "colours", colours.candidate(), data).failed == {"input"}


@pytest.mark.parametrize("count", [2, 4])
def test_labels_that_were_changed_in_the_manifest_keep_a_version_from_serving(
    count: int, colours: Honest, tmp_path: Path
) -> None:
    data, folder = colours.data, tmp_path / "colours"
    made = line(folder, colours.candidate(), data)
    assert made.bundle
    path = made.bundle.folder / bundles.MANIFEST
    written = json.loads(path.read_text())
    written["labels"] = [*data.classes, "grey"][:count]
    written["thresholds"] = None
    path.write_text(json.dumps(written))
    with pytest.raises(BrokenVersion, match=f"{count} labels"):
        Model.load(bundles.read(made.bundle.folder), device="cpu")
    assert serving_version(folder, data) is None


@pytest.mark.parametrize(
    ("name", "plant", "says"),
    [
        ("fp16", planted.half_activations_overflow, "beyond float16's 65504"),
        ("fp16", planted.half_weights_overflow, "65504|NaN"),
        ("fp16", planted.truncated, "can't load"),
        ("int8", planted.nan_weight, "NaN or infinity in the answers to 354 of 354"),
        ("int8", planted.fixed_batch, "batch axis is fixed to 16"),
        ("int8", planted.batch_of_64_inside, "reshape"),
        ("int8", planted.logits_for_probabilities, "no probabilities"),
        ("int8", planted.swapped_labels, r"^0\.[78].*, -0\.[12]"),
    ],
)
def test_a_bad_variant_is_left_out_and_the_rest_is_published(
    name: str, plant: Callable[[bytes], bytes], says: str, digits: Honest, tmp_path: Path
) -> None:
    candidate = digits.candidate(**{name: plant(digits.onnx)})
    made = line(tmp_path / "digits", candidate, digits.data)
    assert made.failed == {name}
    (check,) = [check for check in made.verdict.checks if check.name == name]
    assert not check.closes
    assert re.search(says, check.value), check.value
    assert set(made.verdict.variants) == {"fp32"}
    (size,) = [check for check in made.verdict.checks if check.name == "size"]
    assert size.value == f"{len(digits.onnx) / 1e6:.2f} MB"
    assert made.bundle
    assert {f.name for f in made.bundle.folder.iterdir()} == {
        "model.onnx", "golden.npz", "manifest.json",
    }  # fmt: skip
    assert bundles.read(made.bundle.folder).variants == {}


def test_what_does_not_prove_itself_is_not_written(digits: Honest, tmp_path: Path) -> None:
    """Another graph than was judged, at the last moment."""
    data, candidate = digits.data, digits.candidate()
    findings = examine(candidate, data, SETTINGS)
    verdict = judge(findings, data, None, SETTINGS)
    described = manifest(candidate, findings, verdict, data, SETTINGS, created="now", training={})
    other = dataclasses.replace(candidate, graphs={"fp32": planted.swapped_labels(digits.onnx)})
    with pytest.raises(BrokenVersion, match="golden"):
        publish(tmp_path / "digits", other, findings, verdict, described, data.test)
    assert bundles.versions(tmp_path / "digits") == []
