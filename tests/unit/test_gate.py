"""What lets a version through: every figure, and no less than what serves; and the scores behind it."""

import dataclasses
import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Golden, Manifest, Parity, Probabilities, Scores, Variant
from convoy_training.data.datasets import Dataset, Split
from convoy_training.evaluation.scores import (
    Calibration,
    ClassFigures,
    Right,
    answers,
    evaluate,
    mcnemar,
    score,
    score_answers,
    wilson,
)
from convoy_training.pipeline.run import gate_table
from convoy_training.provenance import provenance
from convoy_training.release.publish import (
    Check,
    Findings,
    GateClosed,
    NotBetter,
    Serving,
    Verdict,
    choose_golden,
    gate,
    judge,
    serving_version,
    time_side_by_side,
)
from convoy_training.settings import TrainingSettings
from tests.unit.graphs import classifier, logits, softmax

SETTINGS = TrainingSettings(
    min_accuracy=0.9, max_parity=1e-4, min_agreement=0.99, max_regression=0.02, variants=()
)
PARITY = Parity(1e-6, 1.0, 100, [1, 3, 64])


def right(correct: int, images: int = 1000, *, last: bool = False) -> Right:
    """The first so many of the images, or the last, are right."""
    chosen = np.arange(images) < correct
    return chosen[::-1].copy() if last else chosen


def two_classes(correct: int, images: int, rare: int) -> tuple[Probabilities, Any]:
    """All of the rare class are right, if so many are."""
    labels = np.zeros(images, np.int64)
    labels[:rare] = 1
    hits = right(correct, images)
    given = np.where((labels == 1) == hits, 0.05, 0.95).astype(np.float32)
    return np.stack([given, 1 - given], axis=1), labels


def found(
    correct: int = 950, images: int = 1000, *, guessing: float = 0.5, **changes: Any
) -> Findings:
    given, labels = two_classes(correct, images, round(images * (1 - guessing)))
    evaluation = evaluate(given, labels, ("a", "b"))
    named = {"parity": PARITY, "right": given.argmax(axis=1) == labels, **changes}
    return Findings([], {"fp32": 2_000_000}, **{"evaluation": evaluation, **named})


# Evaluating takes most of a test's time.
FOUND = found()
EVALUATION = FOUND.evaluation
assert EVALUATION


def but(**changes: Any) -> Findings:
    """Those findings, with other figures in the evaluation."""
    assert EVALUATION
    return replace(FOUND, evaluation=replace(EVALUATION, **changes))


def serving(correct: int, images: int = 1000, *, version: int = 4) -> Serving:
    """Right where the candidate is, as far as both are."""
    hits = right(correct, images)
    return Serving(version, Scores(correct / images, correct, images, 0.1), "", hits)


def figures(recall: float, support: int, name: str = "a") -> ClassFigures:
    interval = wilson(round(recall * support) if math.isfinite(recall) else 0, support)
    return ClassFigures(name, support, support, 1.0, recall, interval, 1.0)


def failed(checks: list[Check]) -> list[str]:
    return [check.name for check in checks if not check.passed]


# The checks.


@pytest.mark.parametrize(
    ("candidate", "expected"),
    [
        (FOUND, []),
        (found(900), []),
        (found(899), ["accuracy"]),
        (but(accuracy=math.nan), ["accuracy", "better than guessing"]),
        (found(guessing=0.949), []),
        (found(guessing=0.95), ["better than guessing"]),
        (found(999), []),
        (found(1000), []),
        (replace(FOUND, parity=replace(PARITY, max_abs_difference=1e-4)), []),
        (replace(FOUND, parity=replace(PARITY, max_abs_difference=1.1e-4)), ["parity"]),
        (replace(FOUND, parity=replace(PARITY, max_abs_difference=math.inf)), ["parity"]),
        (replace(FOUND, parity=replace(PARITY, max_abs_difference=math.nan)), ["parity"]),
        (replace(FOUND, parity=replace(PARITY, label_agreement=0.99)), []),
        (replace(FOUND, parity=replace(PARITY, label_agreement=0.989)), ["agreement"]),
        (replace(FOUND, parity=replace(PARITY, label_agreement=math.nan)), ["agreement"]),
        (but(classes=[figures(0.7, 10), figures(1, 10)]), []),
        (but(classes=[figures(0.69, 100), figures(1, 10)]), ["worst recall"]),
        (but(classes=[figures(math.nan, 100)]), ["worst recall"]),
        (but(classes=[figures(0, 5), figures(1, 10)]), ["every class is found", "worst recall"]),
        (but(classes=[figures(0, 4), figures(1, 10)]), ["worst recall"]),
        (but(classes=[figures(0, 0), figures(1, 10)]), []),
        (but(calibrated=Calibration(0.1, 0.1, [])), []),
        (but(calibrated=Calibration(0.101, 0.2, [])), ["calibration"]),
        (but(calibrated=Calibration(math.nan, 0.2, [])), ["calibration"]),
        (replace(FOUND, sizes={"fp32": 3_000_000}), []),
        (replace(FOUND, sizes={"fp32": 3_000_001}), ["size"]),
        (Findings([Check("loads", "no", "yes", False)], {"fp32": 1}), ["loads"]),
    ],
)
def test_each_check_passes_up_to_its_limit(candidate: Findings, expected: list[str]) -> None:
    settings = replace(SETTINGS, min_recall=0.7, max_calibration_error=0.1, max_megabytes=3.0)
    assert failed(gate(candidate, None, settings)) == expected


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (serving(950), []),
        (serving(954), []),
        # 5 of 5 that only one has right are the other's: p = 1/32.
        (serving(955), ["not significantly worse than version 4"]),
        (serving(970), ["not significantly worse than version 4"]),
        (serving(971), ["not worse than version 4", "not significantly worse than version 4"]),
        (serving(900), []),
        (Serving(4, None, "its classes are x, y"), ["comparable with version 4"]),
    ],
)
def test_what_serves_is_compared_with_image_by_image(other: Serving, expected: list[str]) -> None:
    assert failed(gate(FOUND, other, SETTINGS)) == expected
    at_will = replace(SETTINGS, compare=False)
    assert failed(gate(FOUND, other, at_will)) == []
    assert not judge(FOUND, dataset(), other, at_will).checks[-1].comparison


def test_the_same_difference_says_less_where_both_err_on_other_images() -> None:
    """5 images fewer: 5 against 0, or 50 against 55."""
    other = replace(serving(955), right=right(955, last=True))
    assert failed(gate(FOUND, other, SETTINGS)) == []
    (check,) = [c for c in gate(FOUND, other, SETTINGS) if c.name.startswith("not significantly")]
    p_value = mcnemar(right(950), right(955, last=True)).p_worse
    assert check.value == (f"p = {p_value:.3g}; 45 only this one has right, 50 only that one")


@pytest.mark.parametrize(
    ("speeds", "passes"),
    [
        ((100.0, 100.0), True), ((50.0, 100.0), True), ((49.0, 100.0), False),
        ((math.nan, 100.0), False),
    ],
)  # fmt: skip
def test_how_much_slower_it_may_be_is_a_ratio(speeds: tuple[float, float], passes: bool) -> None:
    check = gate(FOUND, serving(950), SETTINGS, speeds)[-1]
    assert (check.name, check.passed) == ("not slower than version 4", passes)
    assert check.comparison


VARIANT = Variant(Scores(0.945, 945, 1000, 0.2), 0.99, 300.0, 1.5, "cpu")


def with_variant(correct: int) -> Findings:
    """Of a variant that has so many right, of those that fp32 has right or more."""
    variant = replace(VARIANT, scores=Scores(correct / 1000, correct, 1000, 0.2))
    return replace(
        FOUND,
        sizes={"fp32": 2_000_000, "int8": 500_000},
        variants={"fp32": VARIANT, "int8": variant},
        paired={"int8": mcnemar(right(correct), right(950))},
    )


@pytest.mark.parametrize(("correct", "kept"), [(960, True), (945, True), (944, False)])
def test_a_variant_that_loses_too_much_is_left_out_and_closes_nothing(
    correct: int, kept: bool
) -> None:
    verdict = judge(with_variant(correct), dataset(), None, SETTINGS)
    check = next(check for check in verdict.checks if check.name == "int8")
    assert (check.passed, check.closes) == (kept, False)
    assert check.value.startswith(f"0.{correct}0, {(correct - 950) / 1000:+.4f} [")
    assert verdict.passed
    assert set(verdict.variants) == ({"fp32", "int8"} if kept else {"fp32"})
    verdict.admit()
    size = next(check for check in verdict.checks if check.name == "size")
    assert size.value == ("2.50 MB" if kept else "2.00 MB")


def test_a_variant_that_can_not_be_used_is_left_out_with_the_reason() -> None:
    broken = replace(FOUND, sizes={"fp32": 1, "fp16": 1}, unusable={"fp16": "it is NaN"})
    check = next(check for check in gate(broken, None, SETTINGS) if check.name == "fp16")
    assert (check.value, check.passed, check.closes) == ("it is NaN", False, False)


@pytest.mark.parametrize(
    ("candidate", "doubts"),
    [
        (found(51, 51), ["accuracy is plausible"]),
        (found(50, 50), []),
        # 8 of 10 are more than 5, but not much; and an image that was missed was the only one.
        (found(8, 10), ["better than guessing"]),
        (but(classes=[figures(0, 4), figures(1, 9)]), ["every class is found"]),
    ],
)
def test_what_passes_but_should_be_looked_at_is_said(
    candidate: Findings, doubts: list[str]
) -> None:
    checks = gate(candidate, None, replace(SETTINGS, min_accuracy=0))
    assert failed(checks) == []
    assert [check.name for check in checks if check.suspicious] == doubts
    output = io.StringIO()
    Console(file=output, width=200).print(gate_table(checks))
    assert ("SUSPICIOUS" in output.getvalue()) is bool(doubts)


def test_names_of_classes_are_shown_as_they_are() -> None:
    names = "x [/b], y [bold]"
    output = io.StringIO()
    Console(file=output, width=200).print(gate_table([Check("labels", names, names, True)]))
    assert output.getvalue().count(names) == 2


def test_what_is_exactly_as_much_worse_as_allowed_passes() -> None:
    """Whatever binary fractions make of the difference."""
    for percent in range(1, 10):
        settings = replace(SETTINGS, max_regression=percent / 100)
        for correct in range(100, 1000, 77):
            for lost, passes in [(percent * 10, True), (percent * 10 + 1, False)]:
                candidate = replace(FOUND, right=right(correct - lost))
                checks = gate(candidate, serving(correct), settings)
                (check,) = [c for c in checks if c.name == "not worse than version 4"]
                assert check.passed == passes, (correct, lost)


def test_a_first_version_is_compared_with_none() -> None:
    names = [check.name for check in gate(FOUND, None, SETTINGS)]
    assert names == [
        "accuracy", "better than guessing", "accuracy is plausible", "every class is found",
        "worst recall", "calibration", "parity", "agreement", "size",
    ]  # fmt: skip
    assert judge(FOUND, dataset(), None, SETTINGS).better


def test_every_failed_check_is_listed_with_its_value_and_its_limit() -> None:
    poor = found(10, parity=Parity(0.5, 0.25, 100, [1]))
    checks = gate(poor, serving(960, version=7), SETTINGS)
    closed = GateClosed(checks)
    assert closed.checks == checks
    assert str(closed) == (
        "the gate is closed (accuracy, better than guessing, every class is found, parity, agreement, "
        "not worse than version 7, not significantly worse than version 7): nothing was published"
    )
    output = io.StringIO()
    Console(file=output, width=200).print(gate_table(checks))
    cells = [line.split("│") for line in output.getvalue().splitlines()]
    rows = {name[1].strip(): [cell.strip() for cell in name[2:5]] for name in cells if name[4:]}
    assert rows["accuracy"] == ["0.0100 [0.0054, 0.0183]", "at least 0.9000", "FAILED"]
    assert rows["accuracy is plausible"][::2] == ["10 of 1000 right", "passed"]
    assert rows["every class is found"][::2] == ["none of 500 of a", "FAILED"]
    assert rows["parity"][::2] == ["5.00e-01", "FAILED"]
    assert rows["agreement"][::2] == ["0.2500", "FAILED"]
    interval = mcnemar(right(10), right(960)).interval
    assert rows["not worse than version 7"][::2] == [f"-0.9500 {interval}", "FAILED"]


# The verdict.

PASSED, WORSE = Check("a", "", "", True), Check("c", "", "", False, comparison=True)
POOR, DROPPED = Check("b", "", "", False), Check("int8", "", "", False, closes=False)


@pytest.mark.parametrize(
    ("checks", "better", "raised", "raised_in_retraining"),
    [
        ([PASSED], True, None, None),
        ([PASSED], False, None, NotBetter),
        ([PASSED, DROPPED], True, None, None),
        ([PASSED, WORSE], False, GateClosed, NotBetter),
        ([PASSED, WORSE], True, GateClosed, NotBetter),
        ([POOR, WORSE], False, GateClosed, GateClosed),
        ([POOR], True, GateClosed, GateClosed),
    ],
)
def test_in_retraining_what_is_no_better_is_told_from_what_is_bad(
    checks: list[Check], better: bool, raised: Any, raised_in_retraining: Any
) -> None:
    verdict = Verdict(checks, better, {})
    for retrain, expected in [(False, raised), (True, raised_in_retraining)]:
        if expected is None:
            verdict.admit(retrain=retrain)
            continue
        with pytest.raises(GateClosed) as caught:
            verdict.admit(retrain=retrain)
        assert type(caught.value) is expected
        assert caught.value.checks == checks


@pytest.mark.parametrize(("correct", "better"), [(949, True), (950, False), (951, False)])
def test_better_is_what_has_more_images_right(correct: int, better: bool) -> None:
    verdict = judge(FOUND, dataset(), serving(correct), SETTINGS)
    assert (verdict.passed, verdict.better) == (True, better)
    assert verdict.compared
    assert verdict.compared.difference == pytest.approx((950 - correct) / 1000)


def test_checks_are_plain_data() -> None:
    checks = gate(with_variant(900), serving(960), SETTINGS, (1.0, 2.0))
    plain = [dataclasses.asdict(check) for check in checks]
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


# Side by side.


def test_models_take_turns_and_are_told_by_the_median() -> None:
    """Now and then the machine stalls for ten times as long."""
    now, turns = 0.0, []

    def model(name: str, seconds: float) -> Callable[[Pixels], Probabilities]:
        def run(pixels: Pixels) -> Probabilities:
            nonlocal now
            turns.append(name)
            now += seconds * len(pixels) * (10 if len(turns) % 7 == 0 else 1)
            return np.zeros((len(pixels), 2), np.float32)

        return run

    pixels = np.zeros((4, 2, 2, 1), np.uint8)
    fast, slow = model("a", 0.001), model("b", 0.002)
    speeds = time_side_by_side([(fast, pixels), (slow, pixels[:2])], clock=lambda: now)
    assert speeds == pytest.approx([1000, 500])
    assert "".join(turns[:10]) == "ab" + "abba" * 2
    assert now < 1.1
    assert turns.count("a") == turns.count("b") > 50


def test_a_slow_model_has_three_turns_after_its_first() -> None:
    now = 0.0

    def run(pixels: Pixels) -> Probabilities:
        nonlocal now
        now += 5
        return np.zeros((len(pixels), 2), np.float32)

    pixels = np.zeros((10, 2, 2, 1), np.uint8)
    assert time_side_by_side([(run, pixels)], clock=lambda: now) == [2]
    assert now == 20


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
    assert serving.right is not None
    assert serving.right.tolist() == [False] * 4 + [True] * 36
    settings = replace(SETTINGS, max_regression=0)
    for hits, passes in [(serving.right, True), (right(35, 40), False), (right(36, 40), True)]:
        checks = gate(replace(FOUND, right=hits), serving, settings)
        (check,) = [c for c in checks if c.name == "not worse than version 1"]
        assert check.passed is passes


def test_what_serves_is_timed_at_its_own_size(tmp_path: Path) -> None:
    publish(tmp_path / "m")
    serving = serving_version(tmp_path / "m", dataset())
    assert serving
    assert serving.predict
    assert serving.inputs is not None
    assert serving.inputs.shape == (40, *SHAPE)
    assert np.array_equal(serving.predict(serving.inputs).argmax(axis=1), dataset().test.labels)


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
    assert serving.right is not None
    assert serving.scores.correct == serving.right.sum() == 40


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


def test_golden_images_are_of_as_many_classes_as_there_are() -> None:
    inputs = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    labels = np.array([0] * 15 + [1] * 3 + [2] * 2)
    chosen = choose_golden(Split(inputs, labels))
    assert chosen[:, 0, 0, 0].tolist() == [0, 15, 18, 1, 2, 3, 4, 5]
    assert len(choose_golden(Split(inputs[:3], labels[:3]))) == 3


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
