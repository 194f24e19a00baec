"""Every Prometheus object. The rest of the service hands in plain values.

Times are in seconds, sizes in bytes. Label values come from what is served, never from a caller.
"""

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

# 0.5 ms to 10 s, each step at most 2.5 times the one before.
SECONDS = (
    0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05,
    0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0,
)  # fmt: skip
# Each counter would get a second series with the time of its first increment.
disable_created_metrics()  # type: ignore[no-untyped-call]

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Metrics:
    """The metrics of one process, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self._requests = Counter(
            "convoy_requests", "Requests answered, by gRPC status code; in streams each message.",
            ["call", "model", "code"], registry=registry,
        )  # fmt: skip
        self._stages = Histogram(
            "convoy_stage_seconds",
            "Time of a request in each stage: decode, queue (waiting for the device), run (on it), "
            "whole (arrival to answer).",
            ["model", "stage"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._in_flight = Gauge(
            "convoy_requests_in_flight", "Requests being worked on.", registry=registry
        )
        self._images = Counter(
            "convoy_images", "Images by outcome: ok, invalid (could not be read), failed, cancelled.",
            ["model", "outcome"], registry=registry,
        )  # fmt: skip
        self._batch_rows = Histogram(
            "convoy_batch_size", "Images in each run on the device.",
            ["model"], buckets=ROWS, registry=registry,
        )  # fmt: skip
        self._batch_seconds = Histogram(
            "convoy_batch_seconds", "Time of each run on the device.",
            ["model"], buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._batch_failures = Counter(
            "convoy_batch_failures", "Runs on the device that failed.", ["model"], registry=registry
        )
        self._info = Gauge(
            "convoy_model_info", "1 for each model and version that serves.",
            ["model", "version", "sha256", "device"], registry=registry,
        )  # fmt: skip
        self._broken = Gauge(
            "convoy_model_broken_versions",
            "Versions in the models folder that were refused; the log says why.",
            ["model"], registry=registry,
        )  # fmt: skip

    def started(self) -> None:
        self._in_flight.inc()

    def finished(self, call: str, model: str, code: str, whole_s: float) -> None:
        self._in_flight.dec()
        self._requests.labels(call, model, code).inc()
        if model:
            self.stage(model, "whole", whole_s)

    def stage(self, model: str, stage: str, seconds: float) -> None:
        self._stages.labels(model, stage).observe(seconds)

    def images(self, model: str, outcome: str, count: int) -> None:
        if count:
            self._images.labels(model, outcome).inc(count)

    def batch(self, model: str, rows: int, seconds: float, failed: bool) -> None:
        self._batch_rows.labels(model).observe(rows)
        self._batch_seconds.labels(model).observe(seconds)
        if failed:
            self._batch_failures.labels(model).inc()

    def serving(self, model: str, version: int, sha256: str, device: str) -> None:
        self._info.labels(model, str(version), sha256, device).set(1)

    def broken_versions(self, model: str, count: int) -> None:
        self._broken.labels(model).set(count)
