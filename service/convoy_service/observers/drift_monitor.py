"""Drift: whether what is served still looks like the images that a version was judged on.

Where a version answers, an `Observer` counts in the bins of its profile what it sees; where /metrics is
shown, a `Watch` compares the counts of all processes with the profile's, window by window.
"""

import hashlib
import logging
import math
import random
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from convoy_service.artifacts import reference_statistics as profile
from convoy_service.telemetry.counters import Metrics, Snapshot

if TYPE_CHECKING:
    from convoy_service.registry.registry import Answered, Served

log = logging.getLogger("convoy.drift")

# Of one request, at most so many images are looked at: they are alike, and the loop's thread waits.
_AT_ONCE = 8

# A window without drift alarms with less than this chance, by all its features together.
_FALSE_ALARMS = 0.001
# Bins in which fewer images are expected are taken together, else the test can't be trusted (Cochran,
# 1954); so a window needs some for each class.
_EXPECTED, _FOR_EACH_CLASS = 5, 10


# Counting.


class Observer:
    """Counts what versions that have a profile answer; one of `Repository.observers`, for one thread."""

    def __init__(
        self, metrics: Metrics, images_per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Looks at so many images a second of each version at most."""
        self._metrics, self._rate, self._clock = metrics, images_per_s, clock
        self._watched: WeakKeyDictionary[Served, _Watched] = WeakKeyDictionary()

    def __call__(self, answered: "Answered") -> None:
        served = answered.served
        watched = self._watched.get(served)
        if watched is None:
            watched = self._watched[served] = self._begin(served)
        if watched.bins and (rows := watched.take(len(answered.pixels), self._clock(), self._rate)):
            watched.count(answered, rows)

    def _begin(self, served: "Served") -> "_Watched":
        found = profile.read(served.manifest)
        if found is None:
            log.info(
                "%s/%d has no training profile: drift is not watched; train it anew for one",
                served.name,
                served.version,
            )
            return _Watched({}, 0.0)
        # What was counted for versions that are gone is of no more use.
        here = {(each.name, str(each.version)) for each in [*self._watched, served]}
        self._metrics.forget_drift(here)
        # Should the version's folder ever be another: its bins are others, too.
        digest = hashlib.sha256(repr(found).encode()).hexdigest()[:12]
        labels = served.name, str(served.version), digest
        bins = {
            feature: (each.edges, self._metrics.drift((*labels, feature), each.counts))
            for feature, each in found.features.items()
        }
        return _Watched(bins, self._clock())


class _Watched:
    """Of one version, by feature the edges of the bins and the counts in them."""

    def __init__(self, bins: dict[str, tuple[list[float], list[int]]], now: float) -> None:
        self.bins = bins
        self._due, self._seen_at = 1.0, now

    def take(self, there: int, now: float, rate: float) -> range:
        """Which of so many rows are looked at, spread over all of them; may be none."""
        # What was not used up within a second is lost, or a burst would be all there is to see.
        due = min(max(1.0, rate), self._due + (now - self._seen_at) * rate)
        rows = min(there, _AT_ONCE, int(due))
        self._due, self._seen_at = due - rows, now
        if not rows:
            return range(0)
        step = there // rows
        start = random.randrange(there - step * (rows - 1))
        return range(start, start + step * (rows - 1) + 1, step)

    def count(self, answered: "Answered", rows: range) -> None:
        chosen = slice(rows.start, rows.stop, rows.step)
        pixels, probabilities = answered.pixels[chosen], answered.probabilities[chosen]
        measured = profile.measure(pixels, probabilities, answered.unsure[chosen])
        # Rows that the model failed on have no answer.
        confidences = measured["confidence"].tolist()
        good = [not math.isnan(confidence) for confidence in confidences]
        for feature, values in measured.items():
            if feature in self.bins:
                edges, counts = self.bins[feature]
                for value, is_good in zip(values.tolist(), good, strict=True):
                    if is_good:
                        counts[bisect_left(edges, value)] += 1
        if "size" in self.bins:
            edges, counts = self.bins["size"]
            for row in rows:
                image = answered.inputs[row]
                # Pixels of the model's own size may have been resized by who sent them.
                if isinstance(image, bytes) or image.shape != pixels.shape[1:]:
                    counts[bisect_left(edges, profile.size_of(image))] += 1


# Comparing.


class Distance(NamedTuple):
    """How far counts are from reference counts in the same bins, see `distance`."""

    psi: float
    js: float
    p: float


def distance(reference: Sequence[int], seen: Sequence[int]) -> Distance:
    """Of two samples, neither of them empty, that were sorted into the same bins:

    - psi: the population stability index, sum((s - r) ln(s / r)) of their shares, which is Jeffreys'
      divergence. Of two samples of one population it is (bins - 1)(1/n + 1/m) on average (Yurdakul and
      Naranjo, 2020), which is taken off; at least 0.
    - js: the Jensen-Shannon divergence in bits, 0 to 1 (Lin, 1991), which empty bins don't disturb.
    - p: the chance that two samples of one population differ by as much or more, by Pearson's
      chi-square test of homogeneity.
    """
    r, s = np.asarray(reference, np.float64), np.asarray(seen, np.float64)
    m, n = r.sum(), s.sum()
    rare = (r + s) * min(m, n) / (m + n) < _EXPECTED
    if rare.any():
        r, s = np.append(r[~rare], r[rare].sum()), np.append(s[~rare], s[rare].sum())
        r, s = r[r + s > 0], s[r + s > 0]
    bins = len(r)
    if bins < 2:
        return Distance(0.0, 0.0, 1.0)
    chi_square = float(((s * math.sqrt(m / n) - r * math.sqrt(n / m)) ** 2 / (r + s)).sum())
    # Half an image more in each bin: the logarithm of 0 says nothing.
    p, q = (r + 0.5) / (m + 0.5 * bins), (s + 0.5) / (n + 0.5 * bins)
    psi = float(((q - p) * np.log(q / p)).sum() - (bins - 1) * (1 / n + 1 / m))
    p, q = r / m, s / n
    middle = (p + q) / 2
    js = sum(
        float((each[each > 0] * np.log2(each[each > 0] / middle[each > 0])).sum()) / 2
        for each in (p, q)
    )
    return Distance(max(0.0, psi), max(0.0, js), over_chi_square(chi_square, bins - 1))


def over_chi_square(value: float, degrees: int) -> float:
    """The chance of more than `value` by chi-square with so many degrees of freedom, 1 or more:
    Abramowitz and Stegun, 26.4.4 and 26.4.5.
    """
    half = value / 2
    if half <= 0:
        return 1.0
    start = degrees % 2 / 2
    terms = (
        math.exp(power * math.log(half) - half - math.lgamma(power + 1))
        for power in (start + number for number in range(degrees // 2))
    )
    return min(1.0, math.fsum(terms) + (math.erfc(math.sqrt(half)) if start else 0.0))


class _Window:
    """The images of a version that are being gathered, and what the window before showed."""

    def __init__(self) -> None:
        self.base: dict[str, list[int]] = {}
        self.images = 0
        self.distances: dict[str, Distance] = {}
        self.alarms: set[str] = set()


class Watch:
    """Compares what all processes counted with the profiles, where metrics are shown."""

    def __init__(self, window: int, psi: float) -> None:
        """A window closes at so many images; `psi` is that from which on a feature alarms."""
        self._size, self._psi = window, psi
        self._windows: dict[tuple[str, ...], _Window] = {}
        self._lock = threading.Lock()

    def shown(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot and what it says about drift; may be called from any thread."""
        seen = dict(snapshot["drift_seen"])
        served = {labels[:2] for labels, _ in snapshot["model_info"]}
        versions: dict[tuple[str, ...], dict[str, tuple[list[int], list[int]]]] = {}
        for labels, reference in snapshot["drift_reference"]:
            assert isinstance(reference, tuple)
            if labels[:2] not in served:
                continue
            counts = seen.get(labels)
            there = counts[0] if isinstance(counts, tuple) else [0] * len(reference[0])
            versions.setdefault(labels[:3], {})[labels[3]] = reference[0], there
        shown: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _SHOWN}
        with self._lock:
            self._windows = {key: self._windows.get(key, _Window()) for key in versions}
            for (model, version, digest), features in versions.items():
                window = self._windows[model, version, digest]
                self._look(f"{model}/{version}", window, features)
                key = model, version
                shown["drift_images"][key] = sum(features["class"][1])
                if window.images:
                    shown["drift_window_images"][key] = window.images
                for feature, found in window.distances.items():
                    shown["drift_psi"][*key, feature] = found.psi
                    shown["drift_js"][*key, feature] = found.js
                    shown["drift_p_value"][*key, feature] = found.p
                    shown["drift_alarm"][*key, feature] = feature in window.alarms
        return {**snapshot, **{name: list(values.items()) for name, values in shown.items()}}

    def _look(
        self, name: str, window: _Window, features: dict[str, tuple[list[int], list[int]]]
    ) -> None:
        """Closes the window where it is full."""
        now = {feature: there for feature, (_, there) in features.items()}
        window.base = window.base or _nothing(now)
        gathered = {
            feature: [
                after - before for before, after in zip(window.base[feature], there, strict=True)
            ]
            for feature, there in now.items()
        }
        # Counts that fall are those of a process that began anew.
        if any(min(counts) < 0 for counts in gathered.values()):
            window.base, gathered = _nothing(now), now
        classes = gathered["class"]
        images = sum(classes)
        if images < max(self._size, _FOR_EACH_CLASS * len(classes)):
            return
        window.base, window.images = now, images
        window.distances = {
            feature: distance(reference, gathered[feature])
            for feature, (reference, _) in features.items()
            if sum(gathered[feature])
        }
        least = _FALSE_ALARMS / len(features)
        alarms = {
            feature
            for feature, found in window.distances.items()
            if found.psi >= self._psi and found.p < least
        }
        if alarms - window.alarms:
            log.warning("%s drifts: %s, in %d images", name, _said(window, alarms), images)
        elif window.alarms and not alarms:
            log.info(
                "%s drifts no more: %s, in %d images", name, _said(window, window.alarms), images
            )
        window.alarms = alarms


_SHOWN = (
    "drift_images", "drift_window_images", "drift_psi", "drift_js", "drift_p_value", "drift_alarm",
)  # fmt: skip


def _nothing(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    return {feature: [0] * len(each) for feature, each in counts.items()}


def _said(window: _Window, features: set[str]) -> str:
    return ", ".join(
        f"{feature} (PSI {found.psi:.3g}, p {found.p:.2g})"
        for feature, found in sorted(window.distances.items())
        if feature in features
    )
