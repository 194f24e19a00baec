"""What lets a version through: every figure, and no less than what serves; and the scores behind it."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from service import bundle as bundles
from service.bundle import Golden, Manifest, Parity, Probabilities, Scores
from service.images import Pixels, Target
from tests.unit.graphs import classifier, logits, softmax
from training.data import Dataset, Split
from training.evaluate import answers, score, score_answers
from training.publish import GateClosed, Serving, gate, provenance, serving_version
from training.run import gate_table
from training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    min_accuracy=0.9, max_parity=1e-4, min_agreement=0.99, max_regression=0.02
)
PARITY = Parity(1e-6, 1.0, 100, [1, 3, 64])


def scores(correct: float, images: int = 1000) -> Scores:
    return Scores(correct / images, int(correct) if math.isfinite(correct) else 0, images, 0.1)


def failed(
    *,
    right: Scores = scores(950),
    parity: Parity = PARITY,
    serving: Serving | None = None,
    guessing: float = 0.5,
    compare: bool = True,
) -> list[str]:
    settings = replace(SETTINGS, compare=compare)
    checks = gate(right, parity, serving, settings, guessing)
    return [check.name for check in checks if not check.passed]


# The checks.


@pytest.mark.parametrize(
    ("figures", "expected"),
    [
        ({}, []),
        ({"right": scores(900)}, []),
        ({"right": scores(899)}, ["accuracy"]),
        ({"right": scores(math.nan)}, ["accuracy", "better than guessing"]),
        ({"guessing": 0.949}, []),
        ({"guessing": 0.95}, ["better than guessing"]),
        ({"right": scores(999)}, []),
        ({"right": scores(1000)}, []),
        ({"parity": replace(PARITY, max_abs_difference=1e-4)}, []),
        ({"parity": replace(PARITY, max_abs_difference=1.1e-4)}, ["parity"]),
        ({"parity": replace(PARITY, max_abs_difference=math.inf)}, ["parity"]),
        ({"parity": replace(PARITY, max_abs_difference=math.nan)}, ["parity"]),
        ({"parity": replace(PARITY, label_agreement=0.99)}, []),
        ({"parity": replace(PARITY, label_agreement=0.989)}, ["agreement"]),
        ({"parity": replace(PARITY, label_agreement=math.nan)}, ["agreement"]),
        ({"serving": Serving(4, scores(950))}, []),
        ({"serving": Serving(4, scores(970))}, []),
        ({"serving": Serving(4, scores(971))}, ["not worse than version 4"]),
        ({"right": scores(math.nan), "serving": Serving(4, scores(1))},
         ["accuracy", "better than guessing", "not worse than version 4"]),
        ({"serving": Serving(4, None, "its classes are x, y")}, ["comparable with version 4"]),
        ({"serving": Serving(4, None, "its classes are x, y"), "compare": False}, []),
        ({"serving": Serving(4, scores(999)), "compare": False}, []),
    ],
)  # fmt: skip
def test_each_check_passes_up_to_its_limit(figures: dict[str, Any], expected: list[str]) -> None:
    assert failed(**figures) == expected


@pytest.mark.parametrize(("right", "doubt"), [(scores(51, 51), True), (scores(50, 50), False)])
def test_a_perfect_score_on_more_than_a_handful_is_reported(right: Scores, doubt: bool) -> None:
    checks = gate(right, PARITY, None, SETTINGS)
    assert all(check.passed for check in checks)
    assert [check.name for check in checks if check.suspicious] == ["accuracy is plausible"] * int(
        doubt
    )
    output = io.StringIO()
    Console(file=output, width=200).print(gate_table(checks))
    assert ("SUSPICIOUS" in output.getvalue()) is doubt


def test_what_is_exactly_as_much_worse_as_allowed_passes() -> None:
    """Whatever binary fractions make of the difference."""
    for percent in range(1, 10):
        settings = replace(SETTINGS, min_accuracy=0, max_regression=percent / 100)
        for correct in range(100, 1000):
            serving = Serving(1, scores(correct))
            for lost, passes in [(percent * 10, True), (percent * 10 + 1, False)]:
                checks = gate(scores(correct - lost), PARITY, serving, settings)
                assert checks[-1].passed == passes, (correct, lost)


def test_a_first_version_is_compared_with_none() -> None:
    names = [check.name for check in gate(scores(950), PARITY, None, SETTINGS)]
    assert names == [
        "accuracy", "better than guessing", "accuracy is plausible", "parity", "agreement",
    ]  # fmt: skip


def test_every_failed_check_is_listed_with_its_value_and_its_limit() -> None:
    checks = gate(scores(10), Parity(0.5, 0.25, 100, [1]), Serving(7, scores(960)), SETTINGS)
    closed = GateClosed(checks)
    assert closed.checks == checks
    assert str(closed) == (
        "the gate is closed (accuracy, parity, agreement, not worse than version 7): "
        "nothing was published"
    )
    output = io.StringIO()
    Console(file=output, width=200).print(gate_table(checks))
    cells = [line.split("│") for line in output.getvalue().splitlines()]
    rows = {name[1].strip(): [cell.strip() for cell in name[2:5]] for name in cells if name[4:]}
    assert rows["accuracy"] == ["0.0100", "at least 0.9000", "FAILED"]
    assert rows["accuracy is plausible"][::2] == ["10 of 1000 right", "passed"]
    assert rows["parity"][::2] == ["5.00e-01", "FAILED"]
    assert rows["agreement"][::2] == ["0.2500", "FAILED"]
    assert rows["not worse than version 7"][::2] == ["0.0100", "FAILED"]


# Against what serves.

SHAPE = (4, 5, 3)
CLASSES = ("a", "b", "c")


def dataset(wrong: int = 0, count: int = 40) -> Dataset:
    """Test images that `classifier` labels rightly, but for the first few."""
    inputs = np.random.default_rng(0).integers(0, 256, (count, *SHAPE), np.uint8)
    labels = logits(inputs).argmax(axis=1)
    labels[:wrong] = (labels[:wrong] + 1) % 3
    split = Split(inputs, labels)
    return Dataset("test", CLASSES, Target(*SHAPE), split, split, split)


def publish(
    model: Path, onnx: bytes | None = None, shape: tuple[int, int, int] = SHAPE, **changes: Any
) -> None:
    pixels = np.zeros((1, *shape), np.uint8)
    golden = Golden(pixels, softmax(logits(pixels)).astype(np.float32))
    manifest = Manifest("pixels", "probabilities", Target(*shape), list(CLASSES), 8, "")
    onnx = onnx or classifier(shape)
    bundles.write(model, replace(manifest, **changes), onnx, golden)


def test_where_nothing_serves_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    assert serving_version(tmp_path / "m", dataset()) is None


def test_what_serves_is_scored_on_the_test_images_of_the_candidate(tmp_path: Path) -> None:
    publish(tmp_path / "m", scores=Scores(0.1, 1, 10, 9.0))
    serving = serving_version(tmp_path / "m", dataset(wrong=4))
    assert serving
    assert serving.scores
    assert serving.version == 1
    assert (serving.scores.correct, serving.scores.images) == (36, 40)
    worse, equal = scores(35, 40), scores(36, 40)
    settings = replace(SETTINGS, min_accuracy=0, max_regression=0)
    assert not gate(worse, PARITY, serving, settings)[-1].passed
    assert gate(equal, PARITY, serving, settings)[-1].passed


def publish_damaged(model: Path) -> None:
    publish(model)
    (model / "2" / "model.onnx").write_bytes(b"")


@pytest.mark.parametrize(
    "newest",
    [
        lambda model: (model / "2").mkdir(),
        publish_damaged,
        lambda model: publish(model, classifier(added=0.1)),
    ],
    ids=["empty", "damaged", "other answers"],
)
def test_a_version_that_does_not_serve_is_passed_over(newest: Any, tmp_path: Path) -> None:
    publish(tmp_path / "m")
    newest(tmp_path / "m")
    assert bundles.versions(tmp_path / "m") == [1, 2]
    serving = serving_version(tmp_path / "m", dataset())
    assert serving
    assert serving.version == 1


def test_other_classes_can_not_be_compared_and_nothing_older_stands_in(tmp_path: Path) -> None:
    publish(tmp_path / "m")
    publish(tmp_path / "m", labels=["a", "b", "d"])
    serving = serving_version(tmp_path / "m", dataset())
    assert serving == Serving(2, None, "its classes are a, b, d")


def test_the_same_classes_in_another_order_are_compared_by_name(tmp_path: Path) -> None:
    publish(tmp_path / "m", labels=["c", "a", "b"])
    data = dataset()
    renamed = np.array([2, 0, 1])[data.test.labels]
    data = replace(data, test=Split(data.test.inputs, renamed))
    serving = serving_version(tmp_path / "m", data)
    assert serving
    assert serving.scores
    assert serving.scores.correct == 40


def test_what_serves_at_another_size_is_scored_at_its_own(tmp_path: Path) -> None:
    """The candidate's images are twice as large; each pixel stands four times."""
    publish(tmp_path / "m")
    data = dataset()
    doubled = data.test.inputs.repeat(2, axis=1).repeat(2, axis=2)
    height, width, channels = SHAPE
    target = Target(2 * height, 2 * width, channels)
    larger = replace(data, target=target, test=Split(doubled, data.test.labels))
    serving = serving_version(tmp_path / "m", larger)
    assert serving
    assert serving.scores
    assert serving.scores.images == 40
    assert serving.scores.correct > 30


def test_the_newest_of_several_is_compared_with(tmp_path: Path) -> None:
    for _ in range(3):
        publish(tmp_path / "m")
    serving = serving_version(tmp_path / "m", dataset())
    assert serving
    assert serving.version == 3


def test_provenance_names_the_packages_that_had_a_part() -> None:
    assert {"python", "numpy", "pillow", "onnxruntime"} <= provenance().keys()


# Scores.

ANSWERS = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [1, 0]], np.float32)


def test_scores_count_the_right_ones() -> None:
    given = score_answers(ANSWERS, np.array([0, 1, 0, 0]))
    assert (given.correct, given.images, given.accuracy) == (3, 4, 0.75)
    assert given.log_loss == pytest.approx(-np.log([0.9, 0.6, 0.2, 1]).mean())


def test_a_probability_of_0_costs_much_but_not_everything() -> None:
    given = score_answers(ANSWERS[3:], np.array([1]))
    assert given.log_loss == pytest.approx(-math.log(1e-7))


@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_any_function_from_pixels_to_probabilities_is_scored(count: int) -> None:
    data = dataset(wrong=count // 7, count=count)
    sizes = []

    def predict(pixels: Pixels) -> Probabilities:
        sizes.append(len(pixels))
        return softmax(logits(pixels)).astype(np.float32)

    given = score(predict, data.test)
    assert (given.correct, given.images) == (count - count // 7, count)
    assert sum(sizes) == count
    assert max(sizes) <= 256
    assert np.array_equal(answers(predict, data.test.inputs), predict(data.test.inputs))
