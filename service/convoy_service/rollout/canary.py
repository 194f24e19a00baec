"""Which requests a new version gets on trial, what is counted of it, and when that is enough to tell.

Nothing here waits, reads a clock or knows a process: a split, sums, and a judge of the sums. How the
figures come about is `convoy_service.registry.shadow_runner`'s.

The judge looks as often as it likes and errs as rarely as it says. Each limit is one on the mean of
figures between 0 and 1, of which the sum and the number suffice. For a mean m, and a bet r > 1 that
it is higher, the wealth r^sum / (1 + (r - 1) m)^number is no more than 1 in expectation whatever the
mean up to m is, at every step, given all before (of figures that are 0 or 1 it is the likelihood
ratio of odds r times as high; of others less than that bet, as r^x <= 1 + (r - 1) x). So is the mean
over many bets. By Ville's inequality it ever reaches 1 / alpha with a probability of at most alpha,
however often it is looked at: Robbins, Statistical methods related to the law of the iterated
logarithm, 1970; Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic
confidence sequences, 2021; Waudby-Smith and Ramdas, Estimating means of bounded random variables by
betting, 2024. Figures need not be independent of each other, nor of one distribution: it is enough
that none is expected, by those before it, to be over the limit.
"""

import hashlib
import math
import random
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

Share = Annotated[float, Meta(ge=0, le=1)]
PositiveShare = Annotated[float, Meta(gt=0, le=1)]

Probabilities = npt.NDArray[np.float32]
Floats = npt.NDArray[np.float64]
Numbers = float | Floats

# How many times as high the odds may be, by the bets.
_BETS = np.geomspace(1.1, 1000.0, 48)


class Canary(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The table `[canary]` of a model's versions.toml: how a new version shows that it is as good as
    the one that serves.
    """

    mode: Literal["canary", "shadow"] = "canary"
    """canary: the candidate answers its share of the requests. shadow: it answers none."""

    share: Share = 0.1
    """Of the requests that name no version, in a canary: those that the candidate answers."""

    after: Annotated[int, Meta(ge=1)] = 1000
    """Promoted once it has answered so many requests or been compared on so many batches, together,
    and each limit is shown to be kept."""

    max_error: PositiveShare = 0.01
    """Of the images: on which it fails and the stable version does not."""

    max_latency_ratio: Annotated[float, Meta(gt=1)] = 1.2
    """Its time for a batch to the stable version's."""

    max_disagreement: PositiveShare = 0.05
    """Of the images: on which its best class is another."""

    alpha: Annotated[float, Meta(gt=0, lt=0.5)] = 0.01
    """The most likely that one within all limits is ever rolled back; and one beyond any promoted."""

    compare: PositiveShare = 0.1
    """Of the time of one core (or of the card), in each process that runs batches: that comparing
    may take at most."""

    def __post_init__(self) -> None:
        """Raises ValueError."""
        if self.mode == "canary" and not self.share:
            raise ValueError('share is 0: set one, or mode = "shadow"')


def position(key: str | None, salt: str) -> float:
    """Where a request stands between 0 and 1; the candidate gets those below its share. The same key
    always stands at the same place, so where the share grows, only keys come that were on the other
    side. Without a key (None) it is chance.

    Another `salt` (the model, and the candidate's version) puts keys elsewhere, so that not the same
    callers get every new version first.
    """
    if key is None:
        return random.random()
    salted = f"{salt}\0{key}".encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(salted, digest_size=8).digest()) / 2**64


class Counts(NamedTuple):
    """What was counted while a candidate was on trial: sums, so those of several processes add up."""

    # Batches that callers were answered from, and the sum of the shares of their images that failed.
    stable_batches: float = 0.0
    stable_failed: float = 0.0
    candidate_batches: float = 0.0
    candidate_failed: float = 0.0
    # Requests, or parts of such, in the candidate's batches.
    candidate_requests: float = 0.0
    # Batches that both were run on, and their images.
    compared: float = 0.0
    images: float = 0.0
    # Over the compared batches: the shares of images on which only the candidate failed; how often
    # it took longer than the limit; the shares on which both had a best class, and not the same.
    failed: float = 0.0
    slower: float = 0.0
    disagreed: float = 0.0
    # Seconds, and the means of the probabilities of the best classes where both had one.
    stable_s: float = 0.0
    candidate_s: float = 0.0
    stable_confidence: float = 0.0
    candidate_confidence: float = 0.0

    def since(self, start: "Counts") -> "Counts":
        """What was counted after `start`."""
        return Counts(*(now - then for now, then in zip(self, start, strict=True)))


def same_classes(stable: list[str], candidate: list[str]) -> npt.NDArray[np.intp]:
    """For each of the candidate's classes the stable version's of that label; -1 where it has none."""
    places = {label: place for place, label in enumerate(stable)}
    return np.array([places.get(label, -1) for label in candidate], np.intp)


def compare(
    stable: Probabilities,
    candidate: Probabilities,
    same: npt.NDArray[np.intp],
    stable_s: float,
    candidate_s: float,
    max_latency_ratio: float,
) -> tuple[Counts, float]:
    """What one batch counts for, and the largest difference between two probabilities of a class.

    Both are float32 `[N, classes]` for the same N >= 1 images, not finite where the model failed;
    `same` as `same_classes` gives it.
    """
    stable_works = np.isfinite(stable).all(axis=1)
    candidate_works = np.isfinite(candidate).all(axis=1)
    works = stable_works & candidate_works
    stable_best, candidate_best = stable[works].argmax(axis=1), candidate[works].argmax(axis=1)
    images, shown = len(stable), int(works.sum())
    difference = stable_confidence = candidate_confidence = 0.0
    if shown:
        known = same >= 0
        off = np.abs(stable[works][:, same[known]] - candidate[works][:, known])
        difference = float(off.max(initial=0.0))
        stable_confidence = float(stable[works].max(axis=1).mean())
        candidate_confidence = float(candidate[works].max(axis=1).mean())
    counts = Counts(
        compared=1,
        images=images,
        failed=float((stable_works & ~candidate_works).sum()) / images,
        slower=float(candidate_s > max_latency_ratio * stable_s),
        disagreed=float((same[candidate_best] != stable_best).sum()) / images,
        stable_s=stable_s,
        candidate_s=candidate_s,
        stable_confidence=stable_confidence,
        candidate_confidence=candidate_confidence,
    )
    return counts, difference


def _wealth(total: Numbers, number: Numbers, mean: float, bets: Floats) -> Floats:
    """The logarithm of what the bets against `mean` have made of 1."""
    logs = np.multiply.outer(total, np.log(bets))
    logs -= np.multiply.outer(number, np.log1p((bets - 1) * mean))
    most = logs.max(axis=-1)
    return np.asarray(most + np.log(np.exp(logs - most[..., np.newaxis]).mean(axis=-1)))


def evidence_over(total: Numbers, number: Numbers, limit: float) -> Floats:
    """The logarithm of the evidence that so many figures with this sum have a mean over `limit`:
    where that is not so, it ever reaches -log(alpha) with a probability of at most alpha.
    """
    return _wealth(total, number, limit, _BETS)


def evidence_under(total: Numbers, number: Numbers, limit: float) -> Floats:
    """The same for a mean below `limit`."""
    return _wealth(total, number, limit, 1 / _BETS)


def lowest(total: float, number: float, alpha: float) -> float:
    """What the mean of these figures is not below; wrong, ever, with a probability of `alpha`."""
    return _boundary(total, number, alpha, 0.0, evidence_over)


def highest(total: float, number: float, alpha: float) -> float:
    """What the mean of these figures is not over; wrong, ever, with a probability of `alpha`."""
    return _boundary(total, number, alpha, 1.0, evidence_under)


def _boundary(
    total: float,
    number: float,
    alpha: float,
    end: float,
    evidence: Callable[[Numbers, Numbers, float], Floats],
) -> float:
    """Between `end` and the mean that was seen: where the evidence ceases to suffice."""
    if not number:
        return end
    enough, refuted, open_ = -math.log(alpha), end, total / number
    if evidence(total, number, end) < enough:
        return end
    for _ in range(40):
        middle = (refuted + open_) / 2
        if evidence(total, number, middle) >= enough:
            refuted = middle
        else:
            open_ = middle
    return refuted


class Bound(NamedTuple):
    """A mean of figures, and what it is held against."""

    name: str
    total: float
    number: float
    limit: float
    # The most likely that it is wrong to say: over the limit; below it.
    alpha_over: float
    alpha_under: float

    @property
    def mean(self) -> float:
        return self.total / self.number if self.number else 0.0

    @property
    def lowest(self) -> float:
        return lowest(self.total, self.number, self.alpha_over)

    @property
    def highest(self) -> float:
        return highest(self.total, self.number, self.alpha_under)

    @property
    def broken(self) -> bool:
        """Surely over the limit."""
        evidence = evidence_over(self.total, self.number, self.limit)
        return self.limit < 1 and bool(evidence >= -math.log(self.alpha_over))

    @property
    def kept(self) -> bool:
        """Surely below the limit."""
        evidence = evidence_under(self.total, self.number, self.limit)
        return self.limit == 1 or bool(evidence >= -math.log(self.alpha_under))

    def __str__(self) -> str:
        return (
            f"{self.name} {self.mean:.3g} ({self.lowest:.3g} to {self.highest:.3g}, limit "
            f"{self.limit:.3g}, {self.number:.0f} batches)"
        )


class Decision(NamedTuple):
    """What is to become of a candidate, and the numbers that say so."""

    verdict: Literal["go on", "promote", "roll back"]
    why: str
    bounds: tuple[Bound, ...]
    # Of the candidate's mean probability of its best class; and the ratio of times.
    confidence_shift: float
    latency_ratio: float

    def figures(self) -> dict[str, float]:
        """What is found on the same images, for a person to look at."""
        failures, _, disagreement, *_ = self.bounds
        return {
            "agreement": 1 - disagreement.mean,
            "error_delta": failures.mean,
            "confidence_shift": self.confidence_shift,
            "latency_ratio": self.latency_ratio,
        }

    def __str__(self) -> str:
        numbers = "; ".join(map(str, self.bounds))
        return (
            f"{self.verdict}: {self.why}; {numbers}; latency x{self.latency_ratio:.3g}, confidence "
            f"{self.confidence_shift:+.3g}"
        )


def judge(canary: Canary, counts: Counts) -> Decision:
    """What the counts since the trial began say.

    A candidate within its limits is ever rolled back with a probability of at most `alpha`, split
    evenly over the limits. One beyond a limit is promoted with at most that: all must be shown to be
    kept, this one too. Between the two it goes on; one that is right at a limit, for ever.

    - failures, disagreement: on the same images as the stable version, so that neither depends on
      who calls which.
    - latency: how often it takes longer than the limit for the same batch, right before or after
      the stable version, which comes first by chance. Were it as fast as the limit, that would be
      every other time, and no tail of the times, no load and no likeness between neighbours changes
      that.
    - failures in answers: what only shows in calls. Here both have other callers; one whose images
      fail on every version, and who sticks to one side, counts against that. So it only rolls back.
    """
    number = counts.compared
    limits = (
        ("failures", counts.failed, canary.max_error),
        ("latency", counts.slower, 0.5),
        ("disagreement", counts.disagreed, canary.max_disagreement),
    )
    live = canary.mode == "canary"
    each = canary.alpha / (len(limits) + live)
    shown = [Bound(name, sum_, number, limit, each, canary.alpha) for name, sum_, limit in limits]
    bounds = [*shown, _failures_in_answers(canary, counts, each)] if live else shown
    requests = counts.candidate_requests + number
    verdict: Literal["go on", "promote", "roll back"] = "go on"
    if broken := [bound.name for bound in bounds if bound.broken]:
        verdict, why = "roll back", f"over the limit: {', '.join(broken)}"
    elif requests < canary.after:
        why = f"{requests:.0f} of {canary.after} requests"
    elif open_ := [bound.name for bound in shown if not bound.kept]:
        why = f"after {requests:.0f} requests not yet shown to be within the limit: {', '.join(open_)}"
    else:
        verdict, why = "promote", f"within all limits after {requests:.0f} requests"
    shift = counts.candidate_confidence - counts.stable_confidence
    return Decision(
        verdict,
        why,
        tuple(bounds),
        shift / number if number else 0.0,
        counts.candidate_s / counts.stable_s if counts.stable_s else 1.0,
    )


def _failures_in_answers(canary: Canary, counts: Counts, alpha: float) -> Bound:
    """Half of `alpha` is for what the candidate does, half for what is usual."""
    usual = highest(counts.stable_failed, counts.stable_batches, alpha / 2)
    return Bound(
        "failures in answers",
        counts.candidate_failed,
        counts.candidate_batches,
        min(1.0, usual + canary.max_error),
        alpha / 2,
        alpha / 2,
    )
