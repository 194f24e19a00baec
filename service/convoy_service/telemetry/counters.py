"""Every metric, as plain numbers that cost little to count, and can be added up over processes.

Times are in seconds, sizes in bytes. Label values come from what is served, never from a caller.
Each thread only touches samples of its own: nothing is locked.
"""

import datetime
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from convoy_service.engine import gpu
from convoy_service.engine.cpu import Budget
from convoy_service.rollout.canary import Counts, Decision

# 0.5 ms to 10 s, each step at most 2.5 times the one before.
SECONDS = (
    0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0,
)  # fmt: skip

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

# Of probabilities: rounding, another device or variant, another network.
DIFFERENCES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)

Labels = tuple[str, ...]


class _Family(NamedTuple):
    kind: str
    help: str
    labels: Labels
    buckets: tuple[float, ...] = ()


_FAMILIES = {
    "requests": _Family(
        "counter", "Requests answered, by gRPC status code; in streams each message.",
        ("call", "model", "code"),
    ),
    "stage_seconds": _Family(
        "histogram",
        "Time of a request in each stage: decode, queue (waiting for the device), run (on it), "
        "whole (arrival to answer).",
        ("model", "stage"), SECONDS,
    ),
    "requests_in_flight": _Family("gauge", "Requests being worked on.", ()),
    "held_bytes": _Family("gauge", "Bytes of requests and their pixels that are worked on.", ()),
    "requests_waiting": _Family(
        "gauge", "Requests that wait for the device.", ("model", "version")
    ),
    "images": _Family(
        "counter",
        "Images by outcome: ok, invalid (could not be read), failed, refused (too much was waiting), "
        "late (the deadline passed first), cancelled.",
        ("model", "outcome"),
    ),
    "unsure": _Family(
        "counter",
        "Images answered by Classify with a probability below the version's thresholds.", ("model",),
    ),
    "batch_size": _Family("histogram", "Images in each run on the device.", ("model",), ROWS),
    "batch_seconds": _Family("histogram", "Time of each run on the device.", ("model",), SECONDS),
    "batch_failures": _Family("counter", "Runs on the device that failed.", ("model",)),
    "rows_run_after_deadline": _Family(
        "counter", "Images that cost device time though nobody waited any more: stays 0.", ("model",)
    ),
    "model_info": _Family(
        "gauge", "1 for each version that is loaded, and can be asked.",
        ("model", "version", "sha256", "device", "variant"),
    ),
    "model_serving_version": _Family(
        "gauge", "The version that answers requests which name none; 0 where none does.", ("model",)
    ),
    "model_created_timestamp_seconds": _Family(
        "gauge", "When that version was made, in seconds since 1970.", ("model",)
    ),
    "model_version_state": _Family(
        "gauge",
        "1 for the state of each version: incomplete, idle, loading, ready, standby, draining or "
        "broken.",
        ("model", "version", "state"),
    ),
    "model_switches": _Family(
        "counter", "Times that requests were given to another version.", ("model",)
    ),
    "model_broken_versions": _Family(
        "gauge",
        "Versions newer than the one that serves which are broken or not whole; the log says why.",
        ("model",),
    ),
    "observer_failures": _Family(
        "counter", "Answers that something which looks on could not take; the log says why.",
        ("model",),
    ),
    "model_fallback": _Family(
        "gauge",
        "1 where a model runs on the CPU though a card was preferred, or in fp32 though another "
        "variant was; the log says why.",
        ("model",),
    ),
    "feedback_images": _Family(
        "counter",
        "Images for the feedback folder by outcome: written, busy (left out, as more came than may be "
        "written), disk (left out, as the folder can't be written to), large (too large to be kept), "
        "lost (had waited when the process ended, or an error came).",
        ("model", "outcome"),
    ),
    "feedback_bytes": _Family("gauge", "Bytes in the feedback folder.", ()),
    "feedback_files_deleted": _Family(
        "counter", "Feedback files deleted as the oldest, to keep the folder within its bound.", ()
    ),
    "feedback_failures": _Family(
        "counter", "Times that the feedback folder could not be written to; the log says why.", ()
    ),
    # What `statistics` are made of; not shown.
    "version_requests": _Family(
        "sums", "See `Requests.sums`.", ("model", "version")
    ),
    "version_batches": _Family(
        "sums", "See `Batches.by_size`.", ("model", "version", "size")
    ),
    "version_last_batch": _Family(
        "latest", "When the last one was, in seconds since 1970.", ("model", "version")
    ),
    # What drift is told from, see service/convoy_service/observers/drift_monitor.py; not shown.
    "drift_reference": _Family(
        "bins", "Test images in each bin of the training profile.",
        ("model", "version", "profile", "feature"),
    ),
    "drift_seen": _Family(
        "bins", "Images answered in each bin of the training profile.",
        ("model", "version", "profile", "feature"),
    ),
    # What it is told as, by `convoy_service.observers.drift_monitor.Watch`.
    "drift_images": _Family(
        "counter", "Images looked at for drift, of those answered.", ("model", "version")
    ),
    "drift_window_images": _Family(
        "gauge", "Images in the last whole window, of which the figures of drift are.",
        ("model", "version"),
    ),
    "drift_psi": _Family(
        "gauge",
        "Population stability index of the last window against the training profile, less what "
        "chance gives.",
        ("model", "version", "feature"),
    ),
    "drift_js": _Family(
        "gauge",
        "Jensen-Shannon divergence of the last window from the training profile, in bits, 0 to 1.",
        ("model", "version", "feature"),
    ),
    "drift_p_value": _Family(
        "gauge",
        "Chance that a window without drift is as far from the training profile as the last, by the "
        "chi-square test.",
        ("model", "version", "feature"),
    ),
    "drift_alarm": _Family(
        "gauge", "1 where the last window drifted, by more than --drift-psi and by more than chance.",
        ("model", "version", "feature"),
    ),
    "canary_counts": _Family(
        "counter",
        "What a candidate is judged by, see docs/canary.md: batches and requests answered, batches and "
        "images compared, and sums over these of failures, of runs over the latency limit, of "
        "disagreements, of seconds and of confidences.",
        ("model", "stable", "candidate", "of"),
    ),
    "canary_difference": _Family(
        "histogram",
        "Largest difference between a candidate's and the stable version's probability of a class, of "
        "each batch compared.",
        ("model", "stable", "candidate"), DIFFERENCES,
    ),
    "canary_figure": _Family(
        "gauge",
        "Of a candidate against the stable version, on the same images: agreement (share with the same "
        "best class), error_delta (share on which only it failed), confidence_shift (of the mean "
        "probability of the best class), latency_ratio.",
        ("model", "candidate", "figure"),
    ),
    "canary_limit": _Family(
        "gauge",
        "Of each limit of a candidate: value; and mean, lowest and highest of what is held against it, "
        "as far as it is known.",
        ("model", "candidate", "limit", "of"),
    ),
    "canary_decisions": _Family(
        "counter", "Candidates promoted and rolled back by what was counted of them.",
        ("model", "verdict"),
    ),
    "cpu_budget_cores": _Family("gauge", "Cores that may be used, by cgroup and affinity.", ()),
    "threads": _Family(
        "gauge", "How the cores are shared out: processes and threads by role.", ("role",)
    ),
    "store_last_sync_timestamp_seconds": _Family(
        "gauge",
        "When the cache last held all that is wanted of the object store, in seconds since 1970.", (),
    ),
    "store_errors": _Family(
        "counter",
        "What went wrong with the object store: store (not to be reached), denied, corrupt (a file is "
        "not what its manifest says), changed (a version that serves was replaced), disk (the cache "
        "has no room).",
        ("kind",),
    ),
    "store_fetched_bytes": _Family("counter", "Bytes of models fetched from the object store.", ()),
    "store_waiting_versions": _Family(
        "gauge",
        "Versions in the object store that are incomplete, or can't be taken; the log says why.", (),
    ),
    "traces": _Family(
        "counter",
        "Sampled requests by what became of their spans: exported, dropped (more than could be exported "
        "waited), failed (nobody took them).", ("outcome",),
    ),
    "process_starts": _Family(
        "counter", "Starts of each of the processes; over 1, one has died and was replaced.",
        ("process",),
    ),
}  # fmt: skip


class Histogram:
    """Counts of values by bucket, and their sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


# Triton's reasons for what failed, by gRPC status code. What a caller did wrong is OTHER.
_REJECTED, _CANCELED, _BACKEND, _OTHER = "REJECTED", "CANCELED", "BACKEND", "OTHER"
REASONS = (_REJECTED, _CANCELED, _BACKEND, _OTHER)
_REASON = {
    "RESOURCE_EXHAUSTED": _REJECTED,
    "DEADLINE_EXCEEDED": _REJECTED,
    "CANCELLED": _CANCELED,
    "INTERNAL": _BACKEND,
}


class Requests:
    """What became of the requests to one version. One thread counts."""

    __slots__ = (
        "fail_s", "failures", "infer_s", "input_s", "output_s", "queue_s", "success", "success_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.success = 0
        self.success_s = self.input_s = self.queue_s = self.infer_s = self.output_s = 0.0
        self.failures = dict.fromkeys(REASONS, 0)
        self.fail_s = 0.0

    def succeeded(
        self, whole_s: float, input_s: float, queue_s: float, infer_s: float, output_s: float
    ) -> None:
        """An answer was given after so many seconds: of decoding, of waiting for the device, on it, and
        since.
        """
        self.success += 1
        self.success_s += whole_s
        self.input_s += input_s
        self.queue_s += queue_s
        self.infer_s += infer_s
        self.output_s += output_s

    def failed(self, code: str, whole_s: float) -> None:
        """It ended with this gRPC status after so many seconds."""
        self.failures[_REASON.get(code, _OTHER)] += 1
        self.fail_s += whole_s

    def sums(self) -> list[float]:
        """What may be added up over processes, in the order of `Statistics`."""
        return [
            self.success, self.success_s, self.input_s, self.queue_s, self.infer_s, self.output_s,
            self.fail_s, *self.failures.values(),
        ]  # fmt: skip


class Batches:
    """What ran of one version, by the size of the batch. One thread counts."""

    __slots__ = ("by_size", "last")

    def __init__(self) -> None:
        # Their number, and seconds of each of the stages in `Runs`.
        self.by_size: dict[int, list[float]] = {}
        self.last = 0.0

    def ran(self, size: int, input_s: float, infer_s: float, output_s: float) -> None:
        """A batch gave answers: seconds of putting it together, of running it, and of sharing out what
        it gave.
        """
        sums = self.by_size.get(size)
        if sums is None:
            sums = self.by_size[size] = [0.0] * len(Runs._fields)
        sums[0] += 1
        sums[1] += input_s
        sums[2] += infer_s
        sums[3] += output_s
        self.last = time.time()


class Runs(NamedTuple):
    """Batches of one size, and the seconds that they took: see `Batches.ran`."""

    executions: int
    input_s: float
    infer_s: float
    output_s: float


class Statistics(NamedTuple):
    """What one version has done since the service began, in the terms of Triton's statistics. Times are
    sums, in seconds. Those of stages are of the requests that succeeded, as is `success_s`, from
    arrival to answer.
    """

    success: int = 0
    success_s: float = 0.0
    input_s: float = 0.0
    queue_s: float = 0.0
    infer_s: float = 0.0
    output_s: float = 0.0
    fail_s: float = 0.0
    # By REASONS.
    failures: Mapping[str, int] = {}
    # By their size, smallest first; only those that gave answers.
    batches: Mapping[int, Runs] = {}
    # When the last one ran, in seconds since 1970; 0 before the first.
    last: float = 0.0
    # Requests that wait for the device now.
    waiting: int = 0

    @property
    def fail(self) -> int:
        """Requests that failed."""
        return sum(self.failures.values())

    @property
    def inferences(self) -> int:
        """Rows that were run."""
        return sum(size * runs.executions for size, runs in self.batches.items())

    @property
    def executions(self) -> int:
        """Batches that were run."""
        return sum(runs.executions for runs in self.batches.values())


# What one process counted: family -> (labels, number or counts and sum).
Snapshot = dict[str, list[tuple[Labels, float | tuple[list[Any], float]]]]


def statistics(snapshot: Snapshot) -> dict[tuple[str, str], Statistics]:
    """Of each model and version that was ever loaded."""
    taken: Any = snapshot
    batches: dict[Labels, dict[int, Runs]] = {}
    for (model, version, size), (sums, _) in taken["version_batches"]:
        batches.setdefault((model, version), {})[int(size)] = Runs(int(sums[0]), *sums[1:])
    last, waiting = dict(taken["version_last_batch"]), dict(taken["requests_waiting"])
    found = {}
    for of, (sums, _) in taken["version_requests"]:
        success, times, failures = sums[0], sums[1 : -len(REASONS)], sums[-len(REASONS) :]
        found[of] = Statistics._make(
            (
                int(success),
                *times,
                dict(zip(REASONS, map(int, failures), strict=True)),
                dict(sorted(batches.get(of, {}).items())),
                last.get(of, 0.0),
                waiting.get(of, 0),
            )
        )
    return found


class Metrics:
    """The metrics of one process. Plain values are handed in."""

    def __init__(self) -> None:
        self._numbers: dict[str, dict[Labels, float]] = {
            name: {} for name, family in _FAMILIES.items() if family.kind in {"counter", "gauge"}
        }
        self._histograms: dict[str, dict[Labels, Histogram]] = {
            name: {} for name, family in _FAMILIES.items() if family.kind == "histogram"
        }
        self._bins: dict[str, dict[Labels, list[int]]] = {
            name: {} for name, family in _FAMILIES.items() if family.kind == "bins"
        }
        self._version_requests: dict[tuple[str, str], Requests] = {}
        self._version_batches: dict[tuple[str, str], Batches] = {}
        self._waiting: dict[tuple[str, str], Callable[[], int]] = {}
        self._requests, self._images = self._numbers["requests"], self._numbers["images"]
        self._stages = self._histograms["stage_seconds"]
        self.in_flight: Callable[[], int] = int
        self.held_bytes: Callable[[], int] = int

    def finished(self, call: str, model: str, code: str, whole_s: float | None) -> None:
        """`whole_s`: None for calls that ask for no work, whose times would hide those that do."""
        _add(self._requests, (call, model, code), 1)
        if model and whole_s is not None:
            self.stage(model, "whole").observe(whole_s)

    def stage(self, model: str, stage: str) -> Histogram:
        """Takes the seconds that requests to `model` spend in `stage`."""
        return self._histogram("stage_seconds", (model, stage))

    def images(self, model: str, outcome: str, count: int) -> None:
        if count:
            _add(self._images, (model, outcome), count)

    def unsure(self, model: str, count: int) -> None:
        _add(self._numbers["unsure"], (model,), count)

    def batch(self, model: str, rows: int, seconds: float, failed: bool, late_rows: int) -> None:
        self._histogram("batch_size", (model,)).observe(rows)
        self._histogram("batch_seconds", (model,)).observe(seconds)
        _add(self._numbers["batch_failures"], (model,), failed)
        _add(self._numbers["rows_run_after_deadline"], (model,), late_rows)

    def requests_to(self, model: str, version: int) -> Requests:
        """Takes what becomes of the requests to a version."""
        return self._version_requests.setdefault((model, str(version)), Requests())

    def batches_of(self, model: str, version: int) -> Batches:
        """Takes what runs of a version here."""
        return self._version_batches.setdefault((model, str(version)), Batches())

    def serving(
        self,
        model: str,
        version: int,
        sha256: str,
        device: str,
        variant: str,
        waiting: Callable[[], int] = int,
    ) -> None:
        """`waiting` says how many requests wait for the device, here."""
        self._numbers["model_info"][model, str(version), sha256, device, variant] = 1
        self._waiting[model, str(version)] = waiting

    def not_serving(self, model: str, version: int, sha256: str, device: str, variant: str) -> None:
        self._numbers["model_info"].pop((model, str(version), sha256, device, variant), None)
        self._waiting.pop((model, str(version)), None)

    def versions(
        self, model: str, stable: int, states: Iterable[tuple[int, str]], created: str = ""
    ) -> None:
        """What has become of each version of a model; which is `stable`, 0 for none; and when that was
        `created`, in ISO 8601, "" where nobody knows.
        """
        self._numbers["model_serving_version"][model,] = stable
        try:
            made = datetime.datetime.fromisoformat(created).timestamp()
            self._numbers["model_created_timestamp_seconds"][model,] = made
        except (ValueError, OverflowError):
            self._numbers["model_created_timestamp_seconds"].pop((model,), None)
        # There before the first: Prometheus sees an increase only of what it knows.
        for verdict in ("promote", "roll back"):
            _add(self._numbers["canary_decisions"], (model, verdict), 0)
        known = self._numbers["model_version_state"]
        now: dict[Labels, float] = {}
        for version, state in states:
            now[model, str(version), state] = 1.0
        for labels in [each for each in known if each[0] == model and each not in now]:
            del known[labels]
        known.update(now)

    def canary(
        self,
        model: str,
        stable: int,
        candidate: int,
        counts: Counts,
        difference: float | None = None,
    ) -> None:
        """Adds what was counted of a candidate; `difference`: of a batch that was compared."""
        versions = (model, str(stable), str(candidate))
        for name, value in zip(Counts._fields, counts, strict=True):
            if value:
                _add(self._numbers["canary_counts"], (*versions, name), value)
        if difference is not None:
            self._histogram("canary_difference", versions).observe(difference)

    def judged(self, model: str, candidate: int, decision: Decision | None) -> None:
        """What was found of a model's candidate; None: it has none any more."""
        figures, limits = self._numbers["canary_figure"], self._numbers["canary_limit"]
        for known in (figures, limits):
            for labels in [each for each in known if each[0] == model]:
                del known[labels]
        if decision is None:
            return
        version = str(candidate)
        for figure, value in decision.figures().items():
            figures[model, version, figure] = value
        for bound in decision.bounds:
            limits[model, version, bound.name, "value"] = bound.limit
            for name in ("mean", "lowest", "highest"):
                limits[model, version, bound.name, name] = getattr(bound, name)

    def decided(self, model: str, verdict: str) -> None:
        _add(self._numbers["canary_decisions"], (model, verdict), 1)

    def switched(self, model: str) -> None:
        _add(self._numbers["model_switches"], (model,), 1)

    def forget(self, model: str) -> None:
        """Drops what was told of a model that is not there any more; what was counted stays."""
        for name, family in _FAMILIES.items():
            if family.kind == "gauge" and family.labels[:1] == ("model",):
                for labels in [each for each in self._numbers[name] if each[0] == model]:
                    del self._numbers[name][labels]

    def broken_versions(self, model: str, count: int) -> None:
        self._numbers["model_broken_versions"][model,] = count

    def observer_failed(self, model: str, times: int = 1) -> None:
        _add(self._numbers["observer_failures"], (model,), times)

    def fallback(self, model: str, has: bool) -> None:
        self._numbers["model_fallback"][model,] = has

    def feedback(self, model: str, outcome: str, images: int) -> None:
        if images:
            _add(self._numbers["feedback_images"], (model, outcome), images)

    def feedback_bytes(self, size: int) -> None:
        self._numbers["feedback_bytes"][()] = size

    def feedback_deleted(self, files: int) -> None:
        _add(self._numbers["feedback_files_deleted"], (), files)

    def feedback_failed(self, times: int) -> None:
        _add(self._numbers["feedback_failures"], (), times)

    def drift(self, labels: Labels, reference: list[int]) -> list[int]:
        """To be added to: what is seen in each bin, where there were `reference` test images. `labels`:
        model, version, what tells its profile, and the feature.
        """
        self._bins["drift_reference"][labels] = reference
        return self._bins["drift_seen"].setdefault(labels, [0] * len(reference))

    def forget_drift(self, here: Container[tuple[str, str]]) -> None:
        """Drops the counts of models and versions that are not `here`."""
        for bins in self._bins.values():
            for labels in list(bins):
                if labels[:2] not in here:
                    del bins[labels]

    def budget(self, budget: Budget) -> None:
        self._numbers["cpu_budget_cores"][()] = budget.cores
        for role in ("acceptors", "engines", "decode_threads", "run_threads"):
            self._numbers["threads"][role,] = getattr(budget, role)

    def process_started(self, process: str) -> None:
        _add(self._numbers["process_starts"], (process,), 1)

    def traces_begin(self) -> None:
        for outcome in ("exported", "dropped", "failed"):
            self.traces(outcome, 0)

    def traces(self, outcome: str, count: int) -> None:
        _add(self._numbers["traces"], (outcome,), count)

    def store_begins(self) -> None:
        for kind in ("store", "denied", "corrupt", "changed", "disk"):
            self.store_error(kind, 0)
        self.store_fetched(0)

    def store_synced(self) -> None:
        self._numbers["store_last_sync_timestamp_seconds"][()] = time.time()

    def store_error(self, kind: str, count: int = 1) -> None:
        _add(self._numbers["store_errors"], (kind,), count)

    def store_fetched(self, bytes: int) -> None:
        _add(self._numbers["store_fetched_bytes"], (), bytes)

    def store_waiting(self, versions: int) -> None:
        self._numbers["store_waiting_versions"][()] = versions

    def _histogram(self, name: str, labels: Labels) -> Histogram:
        histograms = self._histograms[name]
        histogram = histograms.get(labels)
        if histogram is None:
            histogram = histograms[labels] = Histogram(_FAMILIES[name].buckets)
        return histogram

    def snapshot(self) -> Snapshot:
        """Everything as it is now; may be called from any thread."""
        self._numbers["requests_in_flight"][()] = self.in_flight()
        self._numbers["held_bytes"][()] = self.held_bytes()
        self._numbers["requests_waiting"] = {
            labels: waiting() for labels, waiting in list(self._waiting.items())
        }
        # Lists first: what they are made of may get entries meanwhile.
        taken: Snapshot = {name: list(values.items()) for name, values in self._numbers.items()}
        for name, histograms in self._histograms.items():
            taken[name] = [(k, (list(h.counts), h.sum)) for k, h in list(histograms.items())]
        for name, bins in self._bins.items():
            taken[name] = [(labels, (list(counts), 0.0)) for labels, counts in list(bins.items())]
        taken["version_requests"] = [
            (labels, (requests.sums(), 0.0))
            for labels, requests in list(self._version_requests.items())
        ]
        batches = list(self._version_batches.items())
        taken["version_batches"] = [
            ((*labels, str(size)), (list(sums), 0.0))
            for labels, each in batches
            for size, sums in list(each.by_size.items())
        ]
        taken["version_last_batch"] = [(labels, each.last) for labels, each in batches]
        return taken


def _add(numbers: dict[Labels, float], labels: Labels, count: float) -> None:
    numbers[labels] = numbers.get(labels, 0) + count


def canary_counts(snapshot: Snapshot, model: str, stable: int, candidate: int) -> Counts:
    """What was counted of a candidate."""
    versions = (model, str(stable), str(candidate))
    found = {
        labels[3]: value for labels, value in snapshot["canary_counts"] if labels[:3] == versions
    }
    return Counts(**found)  # type: ignore[arg-type]


# Of these every process tells the same; of the others, what the processes have is added up.
_SAME = frozenset(
    {
        "model_info",
        "model_broken_versions",
        "model_fallback",
        "cpu_budget_cores",
        "threads",
        "feedback_bytes",
        "drift_reference",
    }
)


def merge(snapshots: Iterable[Snapshot], dead: Iterable[Snapshot] = ()) -> Snapshot:
    """What several processes counted, as if one had. Of the `dead`, what was counted stays and what
    is merely so now (gauges) is gone.
    """
    total: dict[str, dict[Labels, Any]] = {name: {} for name in _FAMILIES}
    tagged = [(each, True) for each in snapshots] + [(each, False) for each in dead]
    for snapshot, alive in tagged:
        for name, values in snapshot.items():
            family, into = _FAMILIES[name], total[name]
            if not alive and (family.kind == "gauge" or name in _SAME):
                continue
            for each, value in values:
                labels = tuple(each)
                if isinstance(value, (int, float)):
                    known, largest = into.get(labels, 0), name in _SAME or family.kind == "latest"
                    into[labels] = max(known, value) if largest else known + value
                elif name in _SAME:
                    into[labels] = value
                else:
                    counts, sum_ = into.get(labels, ([0] * len(value[0]), 0.0))
                    added = [a + b for a, b in zip(counts, value[0], strict=True)]
                    into[labels] = (added, sum_ + value[1])
    return {name: list(values.items()) for name, values in total.items()}


class _Convoy(Collector):
    """Families for Prometheus from a snapshot taken when they are asked for."""

    def __init__(self, snapshot: Callable[[], Snapshot], triton: bool) -> None:
        self._snapshot, self._triton = snapshot, triton

    def collect(self) -> Iterator[Metric]:
        snapshot = self._snapshot()
        for name, values in snapshot.items():
            family = _FAMILIES[name]
            full = f"convoy_{name}"
            if family.kind in {"bins", "sums", "latest"}:
                continue
            if family.kind == "histogram":
                histogram = HistogramMetricFamily(full, family.help, labels=family.labels)
                for labels, value in values:
                    assert isinstance(value, tuple)
                    histogram.add_metric(labels, _buckets(family.buckets, value[0]), value[1])
                yield histogram
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(full, family.help, labels=family.labels)
            for labels, value in values:
                assert isinstance(value, (int, float))
                metric.add_metric(labels, value)
            yield metric
        if self._triton:
            yield from _triton(statistics(snapshot))


def _buckets(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Prometheus counts every value in each bucket whose bound is not below it."""
    below, buckets = 0, []
    for bound, count in zip([*map(str, map(float, bounds)), "+Inf"], counts, strict=True):
        below += count
        buckets.append((bound, float(below)))
    return buckets


# Triton's names for what we count, with what it says of them, and where that is found.
_NV: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "request_success": (
        "Number of successful inference requests, all batch sizes", lambda of: of.success,
    ),
    "count": ("Number of inferences performed", lambda of: of.inferences),
    "exec_count": ("Number of model executions performed", lambda of: of.executions),
    "request_duration_us": (
        "Cumulative inference request duration in microseconds", lambda of: _us(of.success_s),
    ),
    "queue_duration_us": (
        "Cumulative inference queuing duration in microseconds", lambda of: _us(of.queue_s),
    ),
    "compute_input_duration_us": (
        "Cumulative compute input duration in microseconds", lambda of: _us(of.input_s),
    ),
    "compute_infer_duration_us": (
        "Cumulative compute inference duration in microseconds", lambda of: _us(of.infer_s),
    ),
    "compute_output_duration_us": (
        "Cumulative inference compute output duration in microseconds",
        lambda of: _us(of.output_s),
    ),
}  # fmt: skip


def _us(seconds: float) -> int:
    return int(1e6 * seconds)


def _triton(found: Mapping[tuple[str, str], Statistics]) -> Iterator[Metric]:
    """The families that boards made for Triton ask for.

    OpenMetrics has counters end in _total, which these do not: there, their type is unknown.
    """
    by = ("model", "version")
    for name, (help, number) in _NV.items():
        family = UnknownMetricFamily(f"nv_inference_{name}", help, labels=by)
        for of, each in found.items():
            family.add_metric(of, number(each))
        yield family
    failures = UnknownMetricFamily(
        "nv_inference_request_failure",
        "Number of failed inference requests, all batch sizes",
        labels=(*by, "reason"),
    )
    pending = GaugeMetricFamily(
        "nv_inference_pending_request_count",
        "Instantaneous number of pending requests awaiting execution per-model.",
        labels=by,
    )
    for of, each in found.items():
        for reason, count in each.failures.items():
            failures.add_metric((*of, reason), count)
        pending.add_metric(of, each.waiting)
    yield failures
    yield pending


def registry(snapshot: Callable[[], Snapshot], *, triton: bool = False) -> CollectorRegistry:
    """What /metrics shows: `snapshot()`, and the process that shows it; with Triton's names, too."""
    made = CollectorRegistry()
    ProcessCollector(registry=made)
    PlatformCollector(registry=made)
    GCCollector(registry=made)
    made.register(_Convoy(snapshot, triton))
    made.register(gpu.Cards(gpu.nvml()))
    return made


_NV_COUNTER = re.compile(rb"^(# TYPE nv_\w+) untyped$", re.MULTILINE)


def written(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    """The body of /metrics in what the header `accept` asks for, and its content type."""
    encode, kind = choose_encoder(accept)
    body = encode(registry)
    if kind.startswith("text/plain"):
        # Here counters may have any name, but the library adds _total; and agents pass over what has
        # no type.
        body = _NV_COUNTER.sub(rb"\1 counter", body)
    return body, kind
