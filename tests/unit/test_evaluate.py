"""The figures of an evaluation, against values worked out by hand, published, or by scikit-learn."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from scipy import special
from sklearn import metrics
from sklearn.calibration import calibration_curve

from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Manifest, Probabilities, Thresholds
from convoy_service.errors import InferenceFailed
from convoy_training.data.datasets import Labels
from convoy_training.evaluation.scores import (
    Interval,
    NotEvaluable,
    Scaling,
    calibration,
    choose_thresholds,
    compare,
    evaluate,
    fit_scaling,
    mcnemar,
    score_answers,
    strangers,
    sure,
    unscaled,
    wilson,
)
from convoy_training.settings import TrainingSettings
from tests.unit.graphs import logits, softmax

NAMES = ("a", "b", "c")


def rows(*shares: Sequence[float]) -> Probabilities:
    return np.array(shares, np.float32)


def drawn(
    count: int, classes: int = 5, sharpness: float = 1.0, seed: int = 0
) -> tuple[npt.NDArray[np.float64], Labels]:
    """Logits, and labels that come true as often as these say when multiplied with `sharpness`."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 2, (count, classes))
    shares = special.softmax(sharpness * values, axis=1)
    labels = (shares.cumsum(axis=1) < random.random((count, 1))).sum(axis=1)
    return values, np.minimum(labels, classes - 1)


def answered(values: npt.NDArray[np.float64]) -> Probabilities:
    given: Probabilities = special.softmax(values, axis=1).astype(np.float32)
    return given


# Intervals.


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [
        # Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_as_published(count: int, of: int, low: float, high: float) -> None:
    found = wilson(count, of)
    assert found.low == pytest.approx(low, abs=5e-5)
    assert found.high == pytest.approx(high, abs=5e-5)


def test_of_no_image_nothing_is_known() -> None:
    assert wilson(0, 0) == Interval(0.0, 1.0)


# All figures.

GIVEN = rows(
    [0.7, 0.2, 0.1],  # a, right
    [0.5, 0.3, 0.2],  # a, right
    [0.1, 0.8, 0.1],  # a, taken for b
    [0.25, 0.6, 0.15],  # b, right
    [0.6, 0.3, 0.1],  # b, taken for a
    [0.4, 0.35, 0.25],  # c, taken for a
)
TRUTH = np.array([0, 0, 0, 1, 1, 2])


def test_every_figure_of_six_images_is_the_one_worked_out_by_hand() -> None:
    found = evaluate(GIVEN, TRUTH, NAMES)
    assert (found.images, found.correct, found.accuracy, found.guessing) == (6, 3, 0.5, 0.5)
    assert found.confusion == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert [(c.name, c.support, c.named) for c in found.classes] == [
        ("a", 3, 4), ("b", 2, 2), ("c", 1, 0),
    ]  # fmt: skip
    assert [c.precision for c in found.classes] == pytest.approx([2 / 4, 1 / 2, 0])
    assert [c.recall for c in found.classes] == pytest.approx([2 / 3, 1 / 2, 0])
    assert [c.f1 for c in found.classes] == pytest.approx([4 / 7, 1 / 2, 0])
    assert found.macro_precision == pytest.approx((1 / 2 + 1 / 2) / 3)
    assert found.macro_recall == pytest.approx((2 / 3 + 1 / 2) / 3)
    assert found.macro_f1 == pytest.approx((4 / 7 + 1 / 2) / 3)
    assert found.log_loss == pytest.approx(
        -np.log([0.7, 0.5, 0.1, 0.6, 0.3, 0.25]).mean(), rel=1e-6
    )
    squares = [0.14, 0.38, 1.46, 0.245, 0.86, 0.845]
    assert found.brier == pytest.approx(np.mean(squares), rel=1e-6)
    assert found.worst.name == "c"
    assert found.accuracy_interval == wilson(3, 6)
    assert found.classes[2].recall_interval == wilson(0, 1)
    assert found.out_of_distribution is None


def test_figures_are_those_of_scikit_learn() -> None:
    values, labels = drawn(2000)
    given = answered(values)
    found = evaluate(given, labels, tuple("abcde"))
    named = given.argmax(axis=1)
    report = metrics.classification_report(
        labels, named, target_names=list("abcde"), output_dict=True
    )
    for figures in found.classes:
        for name in ("precision", "recall", "f1-score", "support"):
            assert getattr(figures, name.split("-")[0]) == pytest.approx(report[figures.name][name])
    assert found.macro_f1 == pytest.approx(report["macro avg"]["f1-score"])
    assert found.log_loss == pytest.approx(metrics.log_loss(labels, given), rel=1e-6)
    assert found.scores == score_answers(given, labels)


def test_a_class_without_test_images_does_not_lower_the_means() -> None:
    found = evaluate(rows([0.8, 0.1, 0.1], [0.2, 0.7, 0.1]), np.array([0, 1]), NAMES)
    assert (found.macro_precision, found.macro_recall, found.macro_f1) == (1, 1, 1)
    assert found.classes[2].recall_interval == Interval(0, 1)
    assert found.worst.name in "ab"


@pytest.mark.parametrize("given", [rows([0.9, 0.1]), rows([0.0, 1.0]), rows([0.5, 0.5])])
def test_one_image_is_enough(given: Probabilities) -> None:
    right = float(given[0].argmax() == 0)
    found = evaluate(given, np.array([0]), ("a", "b"), strange={"noise": given})
    assert (found.images, found.accuracy, found.guessing) == (1, right, 1)
    assert found.calibrated.error == pytest.approx(abs(float(given.max()) - right))
    assert [(p.coverage, p.accuracy) for p in found.coverage] == [(1, right)]
    assert found.out_of_distribution
    assert found.out_of_distribution.auroc == 0.5


def test_all_right_and_certain_is_no_special_case() -> None:
    labels = np.arange(100) % 3
    found = evaluate(np.eye(3, dtype=np.float32)[labels], labels, NAMES, scaling=Scaling(0.5))
    assert (found.accuracy, found.macro_f1, found.brier) == (1, 1, 0)
    assert found.calibrated.error == found.uncalibrated.error == found.calibrated.by_chance == 0
    assert found.confidences.counts == [0] * 14 + [100]


def test_an_evaluation_is_plain_data_and_survives_the_manifest() -> None:
    values, labels = drawn(300)
    given = answered(values)
    found = evaluate(given, labels, tuple("abcde"), strange={"noise": given[:7]})
    plain = dataclasses.asdict(found)
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    manifest = Manifest("i", "o", Target(4, 5, 3), list("abcde"), 8, "", evaluation=plain)
    read = msgspec.json.decode(msgspec.json.encode(manifest), type=Manifest)
    assert read.evaluation == plain
    assert msgspec.convert(read.evaluation, type(found)) == found


@pytest.mark.parametrize(
    ("given", "labels", "says"),
    [
        (rows([math.nan, 0.5], [0.5, 0.5]), [0, 1], "NaN or infinity in the answers to 1 of 2"),
        (rows([math.inf, 0.5]), [0], "NaN or infinity in the answers to 1 of 1"),
        (rows([2.0, -1.0]), [0], "from -1 to 2"),
        (rows([0.9, 0.3]), [0], "softmax"),
        (rows([0.2, 0.3, 0.5]), [0], r"shape \[1, 3\] to 1 images of 2 classes"),
        (rows([0.5, 0.5]), [0, 1], r"shape \[1, 2\] to 2 images"),
        (rows([0.5, 0.5]), [2], "labels from 2 to 2 for 2 classes"),
        (rows([0.5, 0.5]), [-1], "labels from -1"),
        (np.zeros((0, 2), np.float32), [], "to 0 images"),
    ],
)
def test_what_no_figures_can_be_made_of_is_refused(
    given: Probabilities, labels: list[int], says: str
) -> None:
    truth = np.array(labels, np.int64)
    with pytest.raises(NotEvaluable, match=says):
        evaluate(given, truth, ("a", "b"))
    with pytest.raises(NotEvaluable, match=says):
        choose_thresholds(given, truth, given, truth) if given.shape[1] == 2 else evaluate(
            given, truth, ("a", "b")
        )


# Calibration.


def test_the_calibration_error_of_four_images_is_the_one_worked_out_by_hand() -> None:
    """0.9 and 0.92 share the bin of 13/15 to 14/15; 0.6 = 9/15 is the upper edge of its own."""
    found = calibration(np.array([0.9, 0.92, 0.6, 0.62]), np.array([True, False, True, True]))
    assert found.error == pytest.approx((abs(1.82 - 1) + abs(0.6 - 1) + abs(0.62 - 1)) / 4)
    assert [each.images for each in found.bins] == [1, 1, 2]
    assert [each.accuracy for each in found.bins] == [1, 1, 0.5]
    assert [each.confidence for each in found.bins] == pytest.approx([0.6, 0.62, 0.91])
    assert [each.low for each in found.bins] == pytest.approx([8 / 15, 9 / 15, 13 / 15])
    assert [each.high for each in found.bins] == pytest.approx([9 / 15, 10 / 15, 14 / 15])


def test_bins_are_those_of_scikit_learn() -> None:
    values, labels = drawn(3000)
    given = answered(values)
    right, confidence = given.argmax(axis=1) == labels, given.max(axis=1).astype(float)
    found = calibration(confidence, right)
    accuracy, mean = calibration_curve(right, confidence, n_bins=15)
    assert [each.accuracy for each in found.bins] == pytest.approx(accuracy)
    assert [each.confidence for each in found.bins] == pytest.approx(mean)


def test_chance_alone_covers_what_is_calibrated_and_not_what_is_too_sure() -> None:
    covered = [calibrated_error(1.0, seed) for seed in range(40)]
    # 95% of them in the long run; fewer than 33 of 40 would come about 7 times in 10,000.
    assert sum(error <= by_chance for error, by_chance in covered) >= 33
    for error, by_chance in [calibrated_error(0.5, seed) for seed in range(5)]:
        assert error > 2 * by_chance


def calibrated_error(sharpness: float, seed: int) -> tuple[float, float]:
    values, labels = drawn(1000, sharpness=sharpness, seed=seed)
    given = answered(values)
    found = calibration(given.max(axis=1), given.argmax(axis=1) == labels)
    return found.error, found.by_chance


@pytest.mark.parametrize("sharpness", [0.3, 0.5, 1.0, 2.0])
def test_a_temperature_makes_up_for_logits_that_are_too_large_or_too_small(
    sharpness: float,
) -> None:
    """Labels come true as `sharpness` times the logits say: 1 / sharpness is to be found."""
    values, labels = drawn(20_000, sharpness=sharpness)
    found = fit_scaling(values, labels).temperature
    assert found == pytest.approx(1 / sharpness, rel=0.05)
    assert fit_scaling(special.log_softmax(values, axis=1), labels).temperature == pytest.approx(
        found
    )
    before = calibration(answered(values).max(axis=1), values.argmax(axis=1) == labels)
    given = answered(values / found)
    after = calibration(given.max(axis=1), given.argmax(axis=1) == labels)
    assert after.error < 0.02
    if sharpness != 1:
        assert after.error < before.error / 2


def test_the_temperature_is_where_the_log_loss_is_least() -> None:
    """The prior weighs as much as an image or so."""
    values, labels = drawn(5000, sharpness=0.6)
    found = fit_scaling(values, labels).temperature
    temperatures = np.linspace(1.4, 2.0, 121)
    losses = [metrics.log_loss(labels, special.softmax(values / t, axis=1)) for t in temperatures]
    assert found == pytest.approx(temperatures[np.argmin(losses)], rel=0.01)


@pytest.mark.parametrize("count", [1, 2, 10, 1000])
@pytest.mark.parametrize("gap", [0.1, 3.0, 50.0])
def test_who_has_seen_no_mistake_gets_no_certainty_from_that(count: int, gap: float) -> None:
    """A log loss alone would go to its coldest end, and every answer to 100%."""
    values = np.zeros((count, 4))
    values[:, 1] = gap
    found = fit_scaling(values, np.ones(count, np.int64)).temperature
    assert 0.05 <= found <= 1
    confidence = special.softmax(values / found, axis=1).max(axis=1).mean()
    before = special.softmax(values, axis=1).max(axis=1).mean()
    assert confidence <= max(before, (count + 1) / (count + 2) + 1e-6)


def test_nor_does_who_has_seen_one_close_mistake_in_thousands() -> None:
    values = np.zeros((5000, 4))
    values[:, 1] = 4.0
    values[0] = [0.01, 0, 0, 0]
    labels = np.ones(5000, np.int64)
    found = fit_scaling(values, labels).temperature
    confidence = special.softmax(values / found, axis=1).max(axis=1).mean()
    assert confidence == pytest.approx(5000 / 5002, abs=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_a_few_mistakes_do_not_make_every_answer_a_guess(count: int) -> None:
    values = np.zeros((count, 4))
    values[:, 1] = 8.0
    assert 1 < fit_scaling(values, np.zeros(count, np.int64)).temperature < 10


def test_all_wrong_ends_at_the_bound() -> None:
    values = np.zeros((5000, 4))
    values[:, 1] = 8.0
    assert 15 < fit_scaling(values, np.zeros(5000, np.int64)).temperature <= 20


@pytest.mark.parametrize(
    ("values", "labels", "says"),
    [
        (np.array([[0.0, math.nan]]), [0], "NaN or infinity in the answers to 1 of 1"),
        (np.array([[0.0, -math.inf]]), [0], "NaN or infinity"),
        (np.zeros((0, 3)), [], r"shape \[0, 3\]"),
        (np.zeros((2, 3)), [0], r"shape \[2, 3\] to 1"),
        (np.zeros((1, 1)), [0], r"shape \[1, 1\]"),
        (np.zeros((1, 2)), [2], "labels from 2"),
    ],
)
def test_a_temperature_of_nothing_is_refused(values: Any, labels: list[int], says: str) -> None:
    with pytest.raises(NotEvaluable, match=says):
        fit_scaling(values, np.array(labels, np.int64))


@pytest.mark.parametrize("scaling", [Scaling(), Scaling(0.6), Scaling(2.3, 1.6), Scaling(0.7, 0.5)])
def test_a_scaling_can_be_taken_out_of_probabilities_again(scaling: Scaling) -> None:
    values, labels = drawn(1000)
    served = scaled(values, scaling)
    before = special.softmax(values, axis=1)
    assert np.array_equal(served.argmax(axis=1), before.argmax(axis=1))
    assert np.allclose(unscaled(served, scaling), before, atol=1e-5)
    found = evaluate(served, labels, tuple("abcde"), scaling=scaling)
    straight = evaluate(answered(values), labels, tuple("abcde"))
    assert found.uncalibrated.error == pytest.approx(straight.calibrated.error, abs=1e-4)
    assert (found.temperature, found.bend) == scaling


def test_who_was_certain_of_one_class_in_hundreds_comes_out_so() -> None:
    """Though most of the others have become 0 by a scaling that is as sharp as any."""
    values = np.random.default_rng(0).normal(0, 5, (500, 100))
    before = special.softmax(values, axis=1).max(axis=1)
    scaling = Scaling(0.5, 2.5)
    found = unscaled(scaled(values, scaling), scaling).max(axis=1)
    assert abs(found - before).mean() < 0.03


@pytest.mark.parametrize("bend", [0.6, 1.5, 2.0])
def test_what_is_bent_is_found_to_be(bend: float) -> None:
    """Labels come true as the bent logits say."""
    values, _ = drawn(50_000)
    shares = scaled(values, Scaling(1.3, bend)).astype(np.float64)
    random = np.random.default_rng(1)
    labels = (shares.cumsum(axis=1) < random.random((len(shares), 1))).sum(axis=1)
    labels = np.minimum(labels, 4)
    found = fit_scaling(values, labels)
    assert (found.temperature, found.bend) == pytest.approx((1.3, bend), rel=0.05)
    right = values.argmax(axis=1) == labels
    after = calibration(scaled(values, found).max(axis=1), right)
    assert after.error < after.by_chance
    assert after.error < calibration(answered(values).max(axis=1), right).error / 5


def test_there_is_no_bend_where_chance_could_be_all_that_it_follows() -> None:
    found = [fit_scaling(*drawn(300, seed=seed)).bend for seed in range(40)]
    # 1 in 50 in the long run, by the criterion for so many images.
    assert sum(bend != 1 for bend in found) <= 4


def test_a_bend_does_not_do_what_the_prior_keeps_a_temperature_from() -> None:
    """A third, and no bend, is what makes these right."""
    found = []
    for seed in range(40):
        random = np.random.default_rng(seed)
        labels = random.integers(0, 10, 180)
        values = random.normal(size=(180, 10)) + 3 * np.eye(10)[labels]
        found.append(fit_scaling(values, labels).bend)
    assert sum(bend != 1 for bend in found) <= 4


def test_what_float32_is_rounded_by_is_not_seen_where_a_bend_is_at_its_bound() -> None:
    """Near 1 a float32 has steps of 6e-8, and a power below 1 makes more of them."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 10, 2000)
    # However sure it is, it is wrong in 4 of 10.
    named = (labels + (random.random(2000) < 0.4)) % 10
    values = random.uniform(0.5, 30, (2000, 1)) * np.eye(10)[named]
    found = fit_scaling(values, labels)
    assert found.bend < 0.51
    surprise = np.arange(30) * 2.0**-24
    off = np.diff(surprise**found.bend).max() / found.temperature / 4
    assert off < TrainingSettings().max_parity


def test_the_scaling_takes_few_passes_over_many_classes() -> None:
    """A validation split of 5,000 images of 1,000 classes has 5 million probabilities."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 500, 1000)
    values = random.normal(size=(1000, 500)) + 5 * np.eye(500)[labels]

    def seconds(work: Callable[[], object]) -> float:
        began = time.thread_time()
        work()
        return time.thread_time() - began

    once = min(seconds(lambda: special.log_softmax(values, axis=1)) for _ in range(5))
    assert seconds(lambda: fit_scaling(values, labels)) < 200 * once


def scaled(values: npt.NDArray[np.float64], scaling: Scaling) -> Probabilities:
    return answered(-((-special.log_softmax(values, axis=1)) ** scaling.bend) / scaling.temperature)


# Not sure.


def two(confidence: Sequence[float], right: Sequence[bool]) -> tuple[Probabilities, Labels]:
    """Answers that name the first of two classes, with this confidence."""
    top = np.array(confidence, np.float32)
    return np.stack([top, 1 - top], axis=1), np.where(right, 0, 1)


def test_the_threshold_is_the_lowest_that_halves_the_mistakes() -> None:
    """Of 100 images 10 are wrong, every fourth from the third to the 39th. From the 28th on there are
    73 and 3 wrong, 4.1%; from the 24th on 77 and 4 wrong, more than 5%.
    """
    confidence = [0.5 + n / 200 for n in range(100)]
    wrong = range(2, 42, 4)
    given, labels = two(confidence, [n not in wrong for n in range(100)])
    found = choose_thresholds(given, labels, given, labels)
    assert found.unsure == given[27, 0]
    assert found.per_class == [found.unsure, found.unsure]
    assert (found.coverage, found.accuracy) == pytest.approx((0.73, 70 / 73))
    strict = choose_thresholds(given, labels, given, labels, errors=0.0)
    assert strict.unsure == given[39, 0]
    assert (strict.coverage, strict.accuracy) == (0.61, 1)
    free = choose_thresholds(given, labels, given, labels, errors=1.0, outliers=0.0)
    assert (free.unsure, free.coverage, free.accuracy) == pytest.approx((0, 1, 0.9))


def test_half_of_the_images_are_answered_whatever_is_wanted() -> None:
    """The mistakes are the most confident answers."""
    given, labels = two(np.linspace(0.6, 0.9, 100).tolist(), [n < 90 for n in range(100)])
    found = choose_thresholds(given, labels, given, labels, outliers=0.0)
    assert (found.unsure, found.coverage) == (0, 1)
    given, labels = two(
        np.linspace(0.6, 0.9, 100).tolist(), [n in range(20, 90) for n in range(100)]
    )
    found = choose_thresholds(given, labels, given, labels, errors=0.1, outliers=0.0)
    assert (found.unsure, found.coverage) == (given[20, 0], 0.8)


def test_answers_of_the_same_confidence_go_together() -> None:
    given, labels = two([0.7] * 40 + [0.9] * 60, [False] * 10 + [True] * 90)
    found = choose_thresholds(given, labels, given, labels)
    assert (found.unsure, found.coverage, found.accuracy) == (given[-1, 0], 0.6, 1)


@pytest.mark.parametrize(("count", "rank"), [(98, 0), (99, 1), (198, 1), (199, 2), (1000, 10)])
def test_without_a_mistake_one_in_a_hundred_is_unsure_all_the_same(count: int, rank: int) -> None:
    given, labels = two(np.linspace(0.6, 0.9, count).tolist(), [True] * count)
    found = choose_thresholds(given, labels, given, labels)
    assert found.unsure == (given[rank - 1, 0] if rank else 0)
    assert found.coverage == 1 - max(rank - 1, 0) / count


def test_new_images_of_the_same_kind_are_unsure_with_at_most_that_chance() -> None:
    given = np.stack([np.linspace(0.5, 1, 40_000)] * 2, axis=1).astype(np.float32)
    given[:, 1] = 1 - given[:, 0]
    random, labels = np.random.default_rng(0), np.zeros(100, np.int64)
    shares = []
    for _ in range(200):
        validation, test = given[random.integers(0, 40_000, (2, 100))]
        shares.append(1 - choose_thresholds(validation, labels, test, labels).coverage)
    # Of 20,000 images the standard error is about 0.001.
    assert np.mean(shares) == pytest.approx(1 / 101, abs=0.003)


@pytest.mark.parametrize("count", [1, 10, 49])
def test_a_handful_of_images_chooses_nothing(count: int) -> None:
    given, labels = two([0.5 + n / 200 for n in range(count)], [n % 2 == 0 for n in range(count)])
    found = choose_thresholds(given, labels, given, labels)
    assert (found.unsure, found.per_class, found.coverage) == (0, [0, 0], 1)


def test_a_class_that_is_mistaken_more_often_has_a_threshold_of_its_own() -> None:
    """Of 200 answers a and 200 answers b, 2 and 38 are wrong: 10%. From 0.9 on all are right."""
    top = np.tile(np.linspace(0.6, 0.95, 200), 2).astype(np.float32)
    is_b = np.arange(400) >= 200
    given = np.stack([np.where(is_b, 1 - top, top), np.where(is_b, top, 1 - top)], axis=1)
    wrong = np.isin(np.arange(400), [0, 1, *range(200, 352, 4)])
    labels = np.where(wrong, ~is_b, is_b).astype(np.int64)
    found = choose_thresholds(given, labels, given, labels)
    a, b = found.per_class
    assert a == found.unsure < b
    named = given.argmax(axis=1)
    for label in (0, 1):
        answered_so = (named == label) & sure(given, found)
        assert wrong[answered_so].mean() <= 0.05
    assert found.coverage == sure(given, found).mean()
    # Half as many answers b are too few for one of its own.
    few = np.r_[0:200, 200:400:5]
    assert len(set(choose_thresholds(given[few], labels[few], given, labels).per_class)) == 1


def test_a_class_has_none_for_a_few_mistakes_more_that_chance_explains() -> None:
    """51 of 400 are wrong, and 6.4% are wanted. There 10 of 170 answers a are wrong, and 11 of 170
    answers b: 6.5%.
    """
    top = np.tile(np.linspace(0.6, 0.95, 200), 2).astype(np.float32)
    is_b = np.arange(400) >= 200
    given = np.stack([np.where(is_b, 1 - top, top), np.where(is_b, top, 1 - top)], axis=1)
    wrong = np.isin(np.arange(400), [*range(40), *range(245, 400, 15)])
    labels = np.where(wrong, ~is_b, is_b).astype(np.int64)
    found = choose_thresholds(given, labels, given, labels)
    taken = sure(given, found)
    assert [(int(wrong[taken & c].sum()), int((taken & c).sum())) for c in (~is_b, is_b)] == [
        (10, 170), (11, 170),
    ]  # fmt: skip
    assert wrong[taken & is_b].mean() > wrong.mean() / 2
    assert found.per_class == [found.unsure] * 2


def test_where_no_test_image_is_answered_none_is_right() -> None:
    given, labels = two([0.9 + n / 2000 for n in range(100)], [True] * 100)
    low, truth = two([0.6], [True])
    found = choose_thresholds(given, labels, low, truth)
    assert (found.coverage, found.accuracy) == (0, 0)


def test_thresholds_are_what_the_manifest_takes() -> None:
    """Also where a softmax's rounding gives more than 1."""
    given = np.tile(np.array([[1.0000002, 0.0]], np.float32), (200, 1))
    labels = np.zeros(200, np.int64)
    found = choose_thresholds(given, labels, given, labels)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Thresholds) == found
    assert (found.unsure, found.coverage) == (1, 1)


def test_the_curve_tells_the_accuracy_of_the_most_confident() -> None:
    confidence = [0.5 + n / 200 for n in range(100)]
    given, labels = two(confidence, [n >= 20 for n in range(100)])
    found = evaluate(given, labels, ("a", "b")).coverage
    assert [p.coverage for p in found] == [1, 0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5]
    assert [p.accuracy for p in found] == pytest.approx(
        [0.8, 80 / 99, 80 / 95, 80 / 90, 1, 1, 1, 1]
    )
    assert [p.threshold for p in found] == [given[n, 0] for n in (0, 1, 5, 10, 20, 30, 40, 50)]


def test_the_histogram_counts_every_image_once() -> None:
    given, labels = two([0.5, 0.55, 0.6, 0.95, 0.951, 0.9995, 1.0], [True] * 7)
    found = evaluate(given, labels, ("a", "b")).confidences
    assert len(found.edges) == len(found.counts) + 1
    assert sum(found.counts) == 7
    expected, _ = np.histogram(given[:, 0], found.edges)
    assert expected.sum() == 7
    by_edge = dict(zip(found.edges[1:], found.counts, strict=True))
    assert (by_edge[0.5], by_edge[1.0]) == (1, 2)


# Strangers.


@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 6, 3), (4, 4, 1), (2, 3, 1)])
@pytest.mark.parametrize("count", [1, 30, 500])
def test_strangers_have_the_shape_of_images_and_are_the_same_again(
    shape: tuple[int, int, int], count: int
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)
    found = strangers(pixels)
    assert len(found) == 5
    for kind, images in found.items():
        assert images.dtype == np.uint8
        assert images.shape == (min(count, 200), *shape), kind
        assert np.array_equal(images, strangers(pixels)[kind])
    assert not np.array_equal(found["noise"], strangers(pixels, seed=1)["noise"])


def test_strangers_are_what_their_names_say() -> None:
    """A pixel tells in its two channels where it was: nothing is lost, all is elsewhere."""
    pixels = np.zeros((50, 8, 8, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.mgrid[0:8, 0:8]
    pixels[..., 2] = np.arange(50)[:, np.newaxis, np.newaxis]
    found = strangers(pixels)
    assert (found["one colour"] == found["one colour"][:, :1, :1]).all()
    assert (found["squares"][:, 0::2] == found["squares"][:, 1::2]).all()
    for kind in ("shuffled pixels", "shuffled patches"):
        shuffled = found[kind]
        assert np.array_equal(shuffled[..., 2], pixels[..., 2])
        places = shuffled[..., 0].astype(int) * 8 + shuffled[..., 1]
        assert np.array_equal(np.sort(places.reshape(50, -1)), np.tile(np.arange(64), (50, 1)))
        moved = (places != np.arange(64).reshape(8, 8)).mean()
        assert moved > 0.9
        assert len({row.tobytes() for row in places}) == 50
    patches = found["shuffled patches"]
    assert (patches[:, 0::2, :, 0] + 1 == patches[:, 1::2, :, 0]).all()
    assert (patches[:, :, 0::2, 1] + 1 == patches[:, :, 1::2, 1]).all()


def test_strangers_are_told_by_their_confidence() -> None:
    known, labels = two([0.9, 0.8, 0.7, 0.95], [True] * 4)
    near, far = two([0.85, 0.75], [True] * 2)[0], two([0.6, 0.5], [True] * 2)[0]
    limits = Thresholds(0.65, [0.72, 0.65], 1, 1)
    found = evaluate(
        known, labels, ("a", "b"), thresholds=limits, strange={"near": near, "far": far}
    ).out_of_distribution
    assert found
    # Pairs in which the stranger is the less confident: 2 and 3 of 4, and 4 and 4.
    assert [(each.kind, each.auroc, each.unsure) for each in found.kinds] == [
        ("near", 5 / 8, 0), ("far", 1, 1),
    ]  # fmt: skip
    assert (found.auroc, found.unsure, found.test_unsure) == (13 / 16, 0.5, 0.25)


def test_nan_for_a_stranger_is_no_confidence() -> None:
    known, labels = two([0.9], [True])
    with pytest.raises(NotEvaluable, match="NaN"):
        evaluate(known, labels, ("a", "b"), strange={"noise": rows([math.nan, math.nan])})


# One against the other.


def paired(both: int, ours: int, theirs: int, neither: int) -> tuple[Any, Any]:
    counts = [both, ours, theirs, neither]
    return (
        np.repeat([True, True, False, False], counts),
        np.repeat([True, False, True, False], counts),
    )


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17, 1998, pages 2635-2650, method 10.
        ((36, 12, 2, 0), 0.0569, 0.3404),
        # Fagerland, Lydersen and Laake, "Statistical Analysis of Contingency Tables", 2017, chapter 8.
        ((1, 1, 7, 12), -0.507, -0.026),
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_the_interval_of_a_paired_difference_is_as_published(
    counts: tuple[int, int, int, int], low: float, high: float
) -> None:
    found = mcnemar(*paired(*counts))
    _, ours, theirs, _ = counts
    assert (found.images, found.only_candidate, found.only_serving) == (sum(counts), ours, theirs)
    assert found.difference == pytest.approx((ours - theirs) / sum(counts))
    digits = 5e-4 if low == -0.507 else 5e-5
    assert found.interval.low == pytest.approx(low, abs=digits)
    assert found.interval.high == pytest.approx(high, abs=digits)


@pytest.mark.parametrize(
    ("ours", "theirs", "p_worse", "p_better"),
    [
        (0, 0, 1, 1),
        (0, 5, 1 / 32, 1),
        (5, 0, 1, 1 / 32),
        (1, 3, 5 / 16, 15 / 16),
        (2, 2, 11 / 16, 11 / 16),
    ],
)
def test_mcnemar_is_the_sum_of_binomial_chances(
    ours: int, theirs: int, p_worse: float, p_better: float
) -> None:
    found = mcnemar(*paired(20, ours, theirs, 3))
    assert (found.p_worse, found.p_better) == pytest.approx((p_worse, p_better))


@pytest.mark.parametrize("counts", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_one_image_can_be_paired(counts: tuple[int, int, int, int]) -> None:
    found = mcnemar(*paired(*counts))
    assert -1 <= found.interval.low <= found.difference <= found.interval.high <= 1
    assert found.interval.high - found.interval.low > 0.5


def test_the_interval_holds_the_true_difference_19_times_in_20() -> None:
    random = np.random.default_rng(0)
    chances, held = [0.88, 0.05, 0.03, 0.04], 0
    for counts in random.multinomial(200, chances, 400):
        interval = mcnemar(*paired(*counts.tolist())).interval
        held += interval.low <= 0.02 <= interval.high
    # Its coverage is not exactly 95%; under 92% of 400 would come about once in 200 times.
    assert 0.92 * 400 <= held <= 0.99 * 400


def test_what_has_no_partner_can_not_be_paired() -> None:
    for ours, theirs in [(2, 3), (0, 0)]:
        with pytest.raises(NotEvaluable, match="paired"):
            mcnemar(np.ones(ours, bool), np.ones(theirs, bool))


# The export against the network.

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 4, 5, 3), np.uint8)


def network(pixels: Pixels) -> Probabilities:
    return softmax(logits(pixels)).astype(np.float32)


@pytest.mark.parametrize(("images", "compared"), [(20, 22), (3, 16)])
def test_an_export_is_compared_at_every_batch_size(images: int, compared: int) -> None:
    sizes = set()

    def exported(pixels: Pixels) -> Probabilities:
        sizes.add(len(pixels))
        return network(pixels) + np.float32(0.25)

    found = compare(network, exported, PIXELS[:images], 16)
    assert found.max_abs_difference == pytest.approx(0.25)
    assert (found.label_agreement, found.images) == (1, compared)
    assert found.batch_sizes == [1, 3, 16]
    assert {1, 3, 16} <= sizes


def test_black_and_white_are_compared_too() -> None:
    def exported(pixels: Pixels) -> Probabilities:
        given = network(pixels)
        given[(pixels == 255).all(axis=(1, 2, 3))] += 1
        return given

    found = compare(network, exported, PIXELS, 16)
    assert found.max_abs_difference == pytest.approx(1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_no_small_difference(value: float) -> None:
    def exported(pixels: Pixels) -> Probabilities:
        given = network(pixels)
        given[0, 1] = value
        return given

    assert not compare(network, exported, PIXELS, 16).max_abs_difference <= 1e9


def test_a_batch_size_that_fails_is_named() -> None:
    def exported(pixels: Pixels) -> Probabilities:
        if len(pixels) == 3:
            raise InferenceFailed("no such\nreshape")
        return network(pixels)

    with pytest.raises(NotEvaluable, match=r"^batches of 3 fail: no such$"):
        compare(network, exported, PIXELS, 16)
    with pytest.raises(NotEvaluable, match=r"shape \[22, 2\] in batches of 1"):
        compare(network, lambda pixels: network(pixels)[:, :2], PIXELS, 16)
