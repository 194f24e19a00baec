"""The whole line from a candidate to a version that serves, and what of it catches which bad export."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from sklearn.linear_model import LogisticRegression

from service import bundle as bundles
from service.bundle import Bundle, Probabilities
from service.errors import BrokenVersion
from service.images import Pixels, Target
from service.model import Model
from tests.conftest import REPOSITORY
from tests.unit import planted
from tests.unit.graphs import graph, value
from training import data as datasets
from training import publish as publishing
from training.data import Dataset, Labels, Split
from training.evaluate import Predict
from training.publish import (
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
from training.settings import TrainingSettings

SETTINGS = TrainingSettings()


class Honest(NamedTuple):
    """A graph, the network that it was exported from, and its data."""

    data: Dataset
    onnx: bytes
    network: Predict


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
    """The shipped model; for the network stands ONNX's own interpreter in numpy, which shares no code
    with ONNX Runtime.
    """
    file = (REPOSITORY / "models" / "digits" / "1" / "model.onnx").read_bytes()
    interpreter = ReferenceEvaluator(onnx.load_model_from_string(file))
    (name,) = interpreter.input_names
    return Honest(
        datasets.load(TrainingSettings()),
        file,
        remembered(lambda pixels: interpreter.run(None, {name: pixels})[0]),
    )


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

    regression = LogisticRegression(C=0.01).fit(flat(train.inputs), train.labels)
    constants = {
        "scale": np.float32(1 / 255).reshape(1),
        "weights": regression.coef_.T.astype(np.float32),
        "bias": regression.intercept_.astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Flatten", ["scaled"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
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
        remembered(lambda pixels: regression.predict_proba(flat(pixels)).astype(np.float32)),
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
    """As `training.run` goes about it."""
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
    data, file, network = request.getfixturevalue(name)
    variants = {"fp32": file, "fp16": planted.half(file)}
    first = line(tmp_path / name, Candidate(variants, data.classes, network), data)
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
    for variant in ("fp32", "fp16"):
        model = Model.load(bundle, device="cpu", variant=variant)
        assert model.variant == variant
        given = model.run(data.test.inputs)
        assert (given.argmax(axis=1) == data.test.labels).mean() > 0.9
    # The same once more is as good, and no better.
    second = line(tmp_path / name, Candidate({"fp32": file}, data.classes, network), data)
    assert second.failed == set()
    assert second.bundle
    assert second.bundle.version == 2
    assert (second.verdict.passed, second.verdict.better) == (True, False)
    with pytest.raises(NotBetter):
        second.verdict.admit(retrain=True)


PLANTED: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "swapped labels": ("digits", planted.swapped_labels, "agreement"),
    "RGB for BGR": ("colours", planted.bgr, "agreement"),
    "pixels divided twice": ("digits", planted.scaled(1 / 255), "agreement"),
    "pixels not divided": ("colours", planted.scaled(255), "parity"),
    "fixed batch axis": ("digits", planted.fixed_batch, "input"),
    "fixed batch inside": ("digits", planted.batch_of_64_inside, "answers"),
    "dead class": ("digits", planted.dead_class, "every class is found"),
    "NaN weight": ("digits", planted.nan_weight, "finite"),
    "truncated": ("digits", planted.truncated, "loads"),
    "no softmax": ("digits", planted.logits_for_probabilities, "probabilities"),
    "float16 weights": ("digits", planted.half_weights_overflow, "finite"),
    "float16 activations": ("digits", planted.half_activations_overflow, "finite"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_bad_export_is_caught(fault: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    name, plant, check = PLANTED[fault]
    data, file, network = request.getfixturevalue(name)
    bad = plant(file)
    assert bad != file
    made = line(tmp_path / name, Candidate({"fp32": bad}, data.classes, network), data)
    assert check in made.failed
    print(fault, made.failed)
    assert made.bundle is None
    assert bundles.versions(tmp_path / name) == []
