"""The split, and the judge: how often it errs on what is alike, how soon it finds what is not.

Whatever is simulated has a fixed seed. `python -m tests.unit.test_canary` simulates 2,000 of each.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from convoy_service.rollout.canary import (
    Canary,
    Counts,
    compare,
    evidence_over,
    evidence_under,
    highest,
    judge,
    lowest,
    position,
    same_classes,
)

Floats = npt.NDArray[np.float64]
Figures = Callable[[np.random.Generator, int], "Simulated"]


# So many looks are worked out at once.
_LOOKS = 100


class Simulated(NamedTuple):
    """Figures of each of the compared batches."""

    failed: Floats
    slower: Floats
    disagreed: Floats


def times(rng: np.random.Generator, n: int, ratio: float, noise: float) -> Floats:
    """Whether each of `n` batches took the candidate over 1.2 times as long as the stable version.
    The machine has slow spells, one in twenty runs is stopped for a while, with a heavy tail, and who
    comes second finds warm caches.
    """
    spells = np.exp(np.repeat(rng.normal(0, 0.7, n // 50 + 1), 50)[:n])

    first = rng.random(n) < 0.5

    def one(first: npt.NDArray[np.bool_]) -> Floats:
        hiccups = (rng.random(n) < 0.05) * rng.pareto(1.1, n)
        return np.asarray(
            spells * (np.exp(rng.normal(0, noise, n)) + hiccups) * (0.95 + 0.05 * first)
        )

    return np.asarray(ratio * one(~first) > 1.2 * one(first), np.float64)


def alike(rng: np.random.Generator, n: int) -> Simulated:
    """One and the same model."""
    return Simulated(np.zeros(n), times(rng, n, 1.0, 0.3), np.zeros(n))


def retrained(rng: np.random.Generator, n: int) -> Simulated:
    """A usual next version: 10% slower, of another mind on 2% of the images."""
    return Simulated(
        (rng.random(n) < 0.001).astype(float),
        times(rng, n, 1.1, 0.1),
        rng.binomial(4, 0.02, n) / 4,
    )


def at_the_limits(rng: np.random.Generator, n: int) -> Simulated:
    """The most that is within them; and figures that depend on those before: after a batch with a
    disagreement another is half as likely.
    """
    disagreed = np.zeros(n)
    for i, chance in enumerate(rng.random(n)):
        disagreed[i] = chance < (0.025 if i and disagreed[i - 1] else 0.05)
    return Simulated(
        (rng.random(n) < 0.01).astype(float), (rng.random(n) < 0.5).astype(float), disagreed
    )


def at_one_limit(rng: np.random.Generator, n: int) -> Simulated:
    """The least that is beyond one of them."""
    return alike(rng, n)._replace(disagreed=(rng.random(n) < 0.05).astype(float))


def counted(figures: Simulated, n: int) -> Counts:
    """After `n` batches."""
    failed, slower, disagreed = (float(each[:n].sum()) for each in figures)
    return Counts(
        stable_batches=9 * n, candidate_batches=n, compared=n, images=4 * n,
        failed=failed, slower=slower, disagreed=disagreed,
    )  # fmt: skip


def verdict(canary: Canary, figures: Simulated, every: int = 1) -> tuple[str, int]:
    """What becomes of it, and after how many batches, when the judge looks after `every` one. It is
    asked where the evidence says that something is to happen, and at the look before.
    """
    looks = np.arange(every, len(figures.failed) + 1.0, every)
    totals = np.cumsum(figures, axis=1)[:, every - 1 :: every]
    limits = (canary.max_error, 0.5, canary.max_disagreement)
    end = int(looks[-1]) + every
    for start in range(0, len(looks), _LOOKS):
        n, sums = looks[start : start + _LOOKS], totals[:, start : start + _LOOKS]
        over = [evidence_over(sum_, n, limit) for sum_, limit in zip(sums, limits, strict=True)]
        under = [evidence_under(sum_, n, limit) for sum_, limit in zip(sums, limits, strict=True)]
        broken = np.max(over, axis=0) >= math.log(4 / canary.alpha)
        kept = (np.min(under, axis=0) >= math.log(1 / canary.alpha)) & (n >= canary.after)
        if (broken | kept).any():
            end = int(n[np.flatnonzero(broken | kept)[0]])
            break
    assert judge(canary, counted(figures, end - every)).verdict == "go on"
    if end > looks[-1]:
        return "go on", end - every
    decided = judge(canary, counted(figures, end)).verdict
    assert decided != "go on"
    return decided, end


def verdicts(
    canary: Canary, figures: Figures, runs: int, batches: int, every: int = 10
) -> "Counter[str]":
    rng = np.random.default_rng(6)
    return Counter(verdict(canary, figures(rng, batches), every)[0] for _ in range(runs))


# The split.


def sides(keys: Iterable[str | None], share: float, salt: str = "digits/4") -> list[bool]:
    return [position(key, salt) < share for key in keys]


def test_a_key_sticks_to_its_side() -> None:
    users = [f"user-{n}" for n in range(1000)]
    assert sides(users, 0.1) == sides(users, 0.1)
    # In every process, and release: a canary goes on where the others left it.
    assert [user for user, side in zip(users, sides(users, 0.1), strict=True) if side][:4] == [
        "user-21",
        "user-24",
        "user-30",
        "user-31",
    ]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_the_share_is_right_with_keys_and_without(share: float) -> None:
    n = 50_000
    slack = 5 * math.sqrt(share * (1 - share) / n)
    assert abs(sum(sides(map(str, range(n)), share)) / n - share) < slack
    assert abs(sum(sides([None] * n, share)) / n - share) < slack


def test_all_or_none() -> None:
    keys = (None, "", "a", "\udcff", "x" * 10_000)
    assert all(sides(keys, 1.0))
    assert not any(sides(keys, 0.0))


def test_a_growing_share_only_adds_keys() -> None:
    keys = [str(n) for n in range(5000)]
    few, more, many = (sides(keys, share) for share in (0.05, 0.1, 0.4))
    assert sum(few) < sum(more) < sum(many)
    assert all(b >= a for a, b in zip(few, more, strict=True))
    assert all(b >= a for a, b in zip(more, many, strict=True))


def test_the_next_candidate_draws_other_keys() -> None:
    keys = [str(n) for n in range(20_000)]
    both = zip(sides(keys, 0.1, "m/2"), sides(keys, 0.1, "m/3"), strict=True)
    assert sum(a and b for a, b in both) / len(keys) == pytest.approx(0.01, abs=0.004)


# The evidence.


@pytest.mark.parametrize("limit", [0.01, 0.05, 0.5, 0.9])
def test_bets_at_the_limit_are_fair_and_beyond_it_lose(limit: float) -> None:
    """The whole distribution of twelve figures that are 0 or 1: what the bets are worth on average."""
    n = 12

    def expected(evidence: Callable[[float, float, float], Floats], rate: float) -> float:
        return math.fsum(
            math.comb(n, k) * rate**k * (1 - rate) ** (n - k) * math.exp(evidence(k, n, limit))
            for k in range(n + 1)
        )

    assert expected(evidence_over, limit) == pytest.approx(1)
    assert expected(evidence_under, limit) == pytest.approx(1)
    for share in (0.2, 0.7):
        assert expected(evidence_over, limit * share) < 1
        assert expected(evidence_under, 1 - (1 - limit) * share) < 1
    # And they win where they should.
    assert expected(evidence_over, 1 - (1 - limit) * 0.5) > 1
    assert expected(evidence_under, limit * 0.5) > 1


def test_figures_between_0_and_1_earn_no_more() -> None:
    """Three images a batch, wrong together or not: the same mean, whatever lies between."""
    n, limit = 4, 0.2
    parts = {0.0: 0.55, 1 / 3: 0.35, 2 / 3: 0.05, 1.0: 0.05}
    assert math.fsum(x * p for x, p in parts.items()) == pytest.approx(limit)
    expected = math.fsum(
        math.prod(parts[x] for x in figures) * math.exp(evidence_over(sum(figures), n, limit))
        for figures in itertools.product(parts, repeat=n)
    )
    assert expected < 1


def test_bounds_close_in_on_the_mean() -> None:
    rng = np.random.default_rng(3)
    sums = np.cumsum(rng.random(100_000) < 0.07)
    widths = []
    for n in (10, 100, 1000, 10_000, 100_000):
        low, high = lowest(sums[n - 1], n, 0.01), highest(sums[n - 1], n, 0.01)
        assert 0 <= low <= 0.07 <= high <= 1
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < 0.01
    assert (lowest(0, 0, 0.01), highest(0, 0, 0.01)) == (0, 1)
    # Where the evidence just suffices.
    assert evidence_over(60, 500, lowest(60, 500, 0.01)) == pytest.approx(-math.log(0.01))
    assert evidence_under(60, 500, highest(60, 500, 0.01)) == pytest.approx(-math.log(0.01))


# What a batch counts for.


def answers(*best: int, classes: int = 4) -> npt.NDArray[np.float32]:
    rows = np.full((len(best), classes), 0.1, np.float32)
    rows[np.arange(len(best)), best] = 0.7
    return rows


def test_a_batch_is_counted() -> None:
    stable, candidate = answers(0, 1, 2, 3, 3, 3, 3, 3), answers(0, 1, 2, 0, 3, 3, 3, 3)
    candidate[4, 1] = np.nan  # only the candidate fails
    stable[5] = np.nan  # only the stable version
    candidate[6] = stable[6] = np.inf  # both
    candidate[7] = (0.2, 0.1, 0.1, 0.6)
    counts, difference = compare(
        stable, candidate, same_classes(list("abcd"), list("abcd")), 1, 1.3, 1.2
    )
    assert counts == Counts(
        compared=1, images=8, failed=1 / 8, slower=1, disagreed=1 / 8, stable_s=1, candidate_s=1.3,
        stable_confidence=counts.stable_confidence, candidate_confidence=counts.candidate_confidence,
    )  # fmt: skip
    assert counts.stable_confidence == pytest.approx(0.7)
    assert counts.candidate_confidence == pytest.approx(0.68)
    assert difference == pytest.approx(0.6)
    counts, _ = compare(stable, stable, same_classes(list("abcd"), list("abcd")), 1, 1.2, 1.2)
    assert (counts.failed, counts.slower, counts.disagreed) == (0, 0, 0)


def test_classes_are_told_apart_by_their_labels() -> None:
    same = same_classes(["cat", "dog", "cow"], ["cow", "cat", "dog", "emu"])
    assert same.tolist() == [2, 0, 1, -1]
    stable = np.array([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], np.float32)
    candidate = np.array([[0.1, 0.7, 0.2, 0], [0.1, 0.3, 0.1, 0.5]], np.float32)
    counts, difference = compare(stable, candidate, same, 1, 1, 1.2)
    assert counts.disagreed == 0.5  # an emu
    assert difference == pytest.approx(0.4)


def test_a_batch_on_which_all_fails_says_nothing_of_classes() -> None:
    nan = np.full((2, 4), np.nan, np.float32)
    same = same_classes(list("abcd"), list("abcd"))
    counts, difference = compare(answers(0, 1), nan, same, 0, 0, 1.2)
    assert counts == Counts(compared=1, images=2, failed=1)
    assert difference == 0


# The judge.


def test_alike_models_are_promoted_and_not_rolled_back() -> None:
    assert verdicts(Canary(), alike, 200, 1200) == {"promote": 200}


def test_a_usual_next_version_is_promoted() -> None:
    counted = verdicts(Canary(), retrained, 50, 3000)
    assert counted["roll back"] == 0
    assert counted["promote"] >= 45


def test_at_the_limits_the_judge_errs_as_rarely_as_it_says() -> None:
    """Both ways, at every look: with an alpha of 0.2, so that there are errors to count."""
    canary, runs = Canary(alpha=0.2), 100
    # 4 standard deviations over what is allowed.
    most = runs * 0.2 + 4 * math.sqrt(runs * 0.2 * 0.8)
    assert verdicts(canary, at_the_limits, runs, 2000)["roll back"] <= most
    assert verdicts(canary, at_one_limit, runs, 2000)["promote"] <= most


# 10% of labels swapped, 30% slower, NaN for one class of ten; in batches of four images.
def swapped(rng: np.random.Generator, n: int) -> Simulated:
    return alike(rng, n)._replace(disagreed=rng.binomial(4, 0.1, n) / 4)


def slower(rng: np.random.Generator, n: int) -> Simulated:
    return alike(rng, n)._replace(slower=times(rng, n, 1.3, 0.05))


def nan_for_one_class(rng: np.random.Generator, n: int) -> Simulated:
    return alike(rng, n)._replace(failed=rng.binomial(4, 0.1, n) / 4)


# How many batches it takes at most, in 2,000 simulations.
PLANTED = [(swapped, 1000), (slower, 200), (nan_for_one_class, 200)]


@pytest.mark.parametrize(("plant", "within"), PLANTED)
def test_what_is_planted_is_rolled_back(plant: Figures, within: int) -> None:
    rng = np.random.default_rng(11)
    for _ in range(20):
        assert verdict(Canary(), plant(rng, within))[0] == "roll back"


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_promotion_waits_for_the_requests_and_for_the_proof(mode: str) -> None:
    canary = msgspec.convert({"mode": mode, "after": 1000}, Canary)
    clean = Counts(stable_batches=900, compared=700, images=700)
    assert judge(canary, clean).verdict == "go on"
    assert "700 of 1000 requests" in judge(canary, clean).why
    answered = clean._replace(candidate_requests=300, candidate_batches=300)
    assert judge(canary, answered).verdict == "promote"
    # Enough requests, and too few comparisons to tell.
    hasty = answered._replace(compared=200, candidate_requests=5000)
    assert judge(canary, hasty).verdict == "go on"
    assert judge(canary, hasty).why.endswith("within the limit: failures")
    # As fast as the limit, or nearly.
    assert judge(canary, answered._replace(slower=330)).why.endswith("the limit: latency")


def test_a_decision_has_its_numbers() -> None:
    bad = Counts(compared=300, images=600, disagreed=60, stable_s=3, candidate_s=3.3,
                 stable_confidence=270, candidate_confidence=240)  # fmt: skip
    decision = judge(Canary(mode="shadow"), bad)
    assert decision.verdict == "roll back"
    assert decision.why == "over the limit: disagreement"
    assert decision.latency_ratio == pytest.approx(1.1)
    assert decision.confidence_shift == pytest.approx(-0.1)
    text = str(decision)
    assert text.startswith("roll back: over the limit: disagreement; failures 0 (0 to 0.0")
    assert "disagreement 0.2 (0.1" in text
    assert "limit 0.05, 300 batches)" in text
    assert text.endswith("latency x1.1, confidence -0.1")


def test_failures_that_only_show_in_answers_roll_back() -> None:
    fine = Counts(stable_batches=5000, candidate_batches=500, compared=100)
    assert judge(Canary(), fine).verdict == "go on"
    crashing = fine._replace(candidate_failed=50)
    assert judge(Canary(), crashing).why == "over the limit: failures in answers"
    # Where images fail as often on the stable version, it is the images.
    assert judge(Canary(), crashing._replace(stable_failed=500)).verdict == "go on"
    # Without anything to compare with, nothing is said.
    alone = crashing._replace(stable_batches=0)
    assert judge(Canary(), alone).verdict == "go on"


def test_a_limit_of_1_is_none() -> None:
    canary = Canary(max_error=1, max_disagreement=1, mode="shadow")
    other = Counts(compared=2000, images=2000, failed=1000, disagreed=1000)
    assert judge(canary, other).verdict == "promote"


def test_processes_add_up() -> None:
    one = Counts(compared=100, disagreed=3, candidate_requests=40)
    two = Counts(compared=50, disagreed=4, candidate_batches=7)
    both = Counts(*map(sum, zip(one, two, strict=True)))
    assert both.since(one) == two
    assert both == Counts(compared=150, disagreed=7, candidate_requests=40, candidate_batches=7)


# Settings.


def test_the_table_is_read() -> None:
    text = '[canary]\nshare = 1\nmode = "shadow"\nafter = 50\nmax_latency_ratio = 2\n'
    tables = msgspec.toml.decode(text, type=dict[str, Canary])
    assert tables["canary"] == Canary(share=1.0, mode="shadow", after=50, max_latency_ratio=2.0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("share = 1.5", "`float` <= 1.0"),
        ("share = 0", 'share is 0: set one, or mode = "shadow"'),
        ("share = nan", "`float` >= 0.0"),
        ("max_latency_ratio = nan", "`float` > 1.0"),
        ("after = 0", "`int` >= 1"),
        ("max_error = 0", "`float` > 0.0"),
        ("max_latency_ratio = 1", "`float` > 1.0"),
        ("max_disagreement = 1.1", "`float` <= 1.0"),
        ("alpha = 0.5", "`float` < 0.5"),
        ("compare = 0", "`float` > 0.0"),
        ("max_eror = 0.1", "max_eror"),
    ],
)
def test_what_makes_no_sense_is_refused(line: str, words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=re.escape(words)):
        msgspec.toml.decode(f"[canary]\n{line}", type=dict[str, Canary])


def main() -> None:
    """Prints what the documentation states."""
    runs, batches = 2000, 3000
    canary = Canary()
    for figures in (alike, retrained):
        print(figures.__name__, dict(verdicts(canary, figures, runs, batches, 1)))
    rng = np.random.default_rng(12)
    for plant, within in PLANTED:
        found = [verdict(canary, plant(rng, batches)) for _ in range(runs)]
        print(
            plant.__name__, dict(Counter(each for each, _ in found)), "batches: median, 99%, most",
            np.percentile([n for _, n in found], [50, 99, 100]), "stated", within,
        )  # fmt: skip
    for figures, alpha in itertools.product((at_the_limits, at_one_limit), (0.01, 0.2)):
        ends = verdicts(Canary(alpha=alpha), figures, runs // 4, batches, 1)
        print(figures.__name__, "alpha", alpha, dict(ends))


if __name__ == "__main__":
    main()
