"""Requests as OpenTelemetry spans, sent by OTLP (docs/tracing.md). Imported only where that is on.

The thread that callers wait for decides at a request's beginning whether it is sampled, and of one that
is notes when what was done. Spans are made of that when it is over, by a thread that works for a tenth
of a core at most. What it can't keep up with, or nobody takes, is lost, and counted: no request waits or
fails for it.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import TypeAlias

import numpy as np
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, Decision
from opentelemetry.trace import (
    INVALID_SPAN_CONTEXT,
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from convoy_service.duty_cycle import DutyCycle
from convoy_service.engine.batcher import Answer, Outputs
from convoy_service.telemetry.counters import Metrics

log = logging.getLogger("convoy.tracing")

# So many requests may wait for the thread; each takes about a kilobyte.
_MOST_WAITING = 2000
# It takes so many at a time, looks for them so often, and works for this share of one core at most.
# Parts are small since making them keeps the interpreter's lock from others.
_PART, _LOOK_S, _SHARE = 16, 1.0, 0.1
# A batch is told of when no request of it has come up for so long.
_SETTLED_S = 1.0

# Statuses of gRPC that are errors of the server: https://opentelemetry.io/docs/specs/semconv/rpc/grpc
_ERRORS = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)

_ROOT = Context()
_NOTHING: Outputs = np.empty(0, np.float32)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED | TraceFlags.RANDOM_TRACE_ID)

# A call's metadata, or a request's headers: names in lower case, and values.
Headers: TypeAlias = Iterable[tuple[str, str | bytes]]
Attributes: TypeAlias = Mapping[str, str | int]


class Trace:
    """What is noted of a sampled request. Times are on `time.monotonic`'s clock.

    `Served` calls `decodes` to `answered` as the request gets there. Whoever began it ends it, once.
    """

    __slots__ = (
        "answer", "arrived", "attributes", "decoded_at", "decodes_at", "ended", "error", "images",
        "keep", "model", "name", "parent", "queued_at", "statuses", "trace_id",
        "version",
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        attributes: Attributes,
        trace_id: int,
        parent: SpanContext,
        arrived: float,
        keep: "Callable[[Trace], None]",
        statuses: Mapping[str, int] | None = None,
    ) -> None:
        """`keep` takes it when it has ended. `statuses` are those of HTTP, where it came that way."""
        self.name, self.attributes = name, dict(attributes)
        self.trace_id, self.parent = trace_id, parent
        self.arrived, self.ended = arrived, arrived
        self.keep, self.statuses = keep, statuses
        self.model, self.error = "", ""
        self.version = self.images = 0
        # 0: it did not get so far.
        self.decodes_at = self.decoded_at = self.queued_at = 0.0
        # Without its outputs.
        self.answer: Answer | None = None

    def decodes(self, model: str, version: int, images: int) -> None:
        """From now on its images are decoded."""
        self.model, self.version, self.images = model, version, images
        self.decodes_at = time.monotonic()

    def decoded(self) -> None:
        self.decoded_at = time.monotonic()

    def queues(self, model: str, version: int, images: int) -> None:
        """From now on it waits for its batch."""
        self.model, self.version = model, version
        self.images = self.images or images
        self.queued_at = time.monotonic()

    def answered(self, answer: Answer) -> None:
        self.answer = answer._replace(outputs=_NOTHING)

    def end(self, code: str, model: str) -> None:
        """It has ended with the status of gRPC of this name; `model` as far as that is known."""
        self.ended = time.monotonic()
        self.model = self.model or model
        if self.statuses is None:
            self.attributes["rpc.response.status_code"] = code
            self.error = code if code in _ERRORS else ""
        else:
            status = self.statuses.get(code, 500)
            self.attributes["http.response.status_code"] = status
            self.error = str(status) if status >= 500 else ""
        self.keep(self)


class Tracing:
    """The traces of one process. All but `close` is called on the thread that callers wait for."""

    def __init__(self, endpoint: str, metrics: Metrics) -> None:
        """`endpoint` takes OTLP over HTTP: http://collector:4318. The rest is said by OpenTelemetry's
        own variables, which OpenTelemetry reads: docs/tracing.md.
        """
        self._metrics = metrics
        # By OTEL_TRACES_SAMPLER.
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler
        self._propagator, self._ids = TraceContextTextMapPropagator(), RandomIdGenerator()
        self._calls: dict[str, Attributes] = {}
        self._waiting: deque[Trace] = deque()
        # The thread's.
        self._spans = _Spans()
        self._url = _traces_url(endpoint)
        self._exporter = OTLPSpanExporter(self._url)
        self._failing = False
        self._reason = _LastWords()
        # What callers send must not fill the log.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        metrics.traces_begin()
        log.info("traces go to %s", self._url)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracing", daemon=True)
        self._thread.start()

    def rpc(self, path: str, headers: Headers, arrived: float) -> Trace | None:
        """Begins the trace of a call that `arrived` then, of a method that there is: "/package.Service
        /Method". None where it is not sampled; else its `end` ends it.
        """
        attributes = self._calls.get(path)
        if attributes is None:
            attributes = {"rpc.system.name": "grpc", "rpc.method": path[1:]}
            self._calls[path] = attributes
        return self._begin(path[1:], attributes, headers, arrived)

    def http(
        self,
        verb: str,
        path: str,
        route: str,
        scheme: str,
        arrived: float,
        statuses: Mapping[str, int],
        headers: Headers,
    ) -> Trace | None:
        """As `rpc`, of a call that came over HTTP: see `transport.Http`."""
        attributes = {
            "http.request.method": verb,
            "http.route": route,
            "url.path": path,
            "url.scheme": scheme,
        }
        return self._begin(f"{verb} {route}", attributes, headers, arrived, statuses)

    def _begin(
        self,
        name: str,
        attributes: Attributes,
        headers: Headers,
        arrived: float,
        statuses: Mapping[str, int] | None = None,
    ) -> Trace | None:
        context, parent = _ROOT, INVALID_SPAN_CONTEXT
        for key, _ in headers:
            if key == "traceparent":
                context = self._propagator.extract(headers, _ROOT, _GETTER)
                parent = get_current_span(context).get_span_context()
                break
        trace_id = parent.trace_id if parent.is_valid else self._ids.generate_trace_id()
        found = self._sampler.should_sample(context, trace_id, name, SpanKind.SERVER, attributes)
        if found.decision is not Decision.RECORD_AND_SAMPLE:
            return None
        return Trace(name, attributes, trace_id, parent, arrived, self._keep, statuses)

    def _keep(self, trace: Trace) -> None:
        if len(self._waiting) < _MOST_WAITING:
            self._waiting.append(trace)
        else:
            self._metrics.traces("dropped", 1)

    def close(self, timeout_s: float) -> None:
        """Sends what waits, if that can be done in time."""
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("traces were not all sent to %s in %.1f s", self._url, timeout_s)
            self._exporter.shutdown()  # type: ignore[no-untyped-call] # it does not try again

    # All below is done on the thread.

    def _run(self) -> None:
        with self._reason:
            rest_s, duty = _LOOK_S, DutyCycle(_SHARE)
            while not self._closing.wait(rest_s):
                duty.begin()
                self._send(_PART)
                rest_s = duty.rest_s() if self._waiting else _LOOK_S
            # Where nobody takes them, each attempt may last ten seconds.
            while self._waiting and not self._failing:
                self._send(_PART)
            if not self._failing:
                self._send(0, all_batches=True)
            self._metrics.traces("failed", len(self._waiting))
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _send(self, most: int, *, all_batches: bool = False) -> None:
        traces = [self._waiting.popleft() for _ in range(min(most, len(self._waiting)))]
        try:
            spans = self._spans.of(traces, all_batches)
            if not spans:
                return
            taken = self._exporter.export(spans) is SpanExportResult.SUCCESS
        # A bug costs what it was at, and nothing else.
        except Exception as error:
            log.debug("bug in tracing", exc_info=True)
            self._reason.words, taken = repr(error), False
        self._metrics.traces("exported" if taken else "failed", len(traces))
        if taken and self._failing:
            log.info("%s takes traces again", self._url)
        elif not taken and not self._failing:
            log.warning(
                "%s takes no traces: until it does they are lost, and counted in "
                'convoy_traces_total{outcome="failed"}: %s',
                self._url, self._reason.words,
            )  # fmt: skip
        self._failing = not taken


class _Batch:
    """What its sampled requests tell of a batch."""

    __slots__ = ("began_ns", "context", "ended_ns", "links", "model", "seen", "size", "version")

    def __init__(
        self, context: SpanContext, model: str, version: int, began_ns: int, ended_ns: int
    ) -> None:
        self.context, self.model, self.version = context, model, version
        self.began_ns, self.ended_ns = began_ns, ended_ns
        self.links: list[Link] = []
        # 0: nobody knows it who ran in no other.
        self.size, self.seen = 0, 0.0


class _Spans(SpanProcessor):
    """Makes spans of what was noted, each with the times that it had."""

    def __init__(self) -> None:
        self._ids = _Ids()
        provider = TracerProvider(
            ALWAYS_ON, _resource(), shutdown_on_exit=False, id_generator=self._ids
        )
        provider.add_span_processor(self)
        self._tracer = provider.get_tracer("convoy", metadata.version("convoy-serving"))
        self._made: list[ReadableSpan] = []
        # By the numbers that batchers give them.
        self._batches: dict[int, _Batch] = {}
        self._shift_ns = 0

    def on_end(self, span: ReadableSpan) -> None:
        """What OpenTelemetry calls with each span that has ended."""
        self._made.append(span)

    def of(self, traces: Iterable[Trace], all_batches: bool) -> list[ReadableSpan]:
        """The spans of these requests, and of batches that they, or earlier ones, were in: of `all`, or
        of those that no other will come up for.
        """
        # How far the clocks are apart now: what people read may be set meanwhile.
        self._shift_ns = time.time_ns() - time.monotonic_ns()
        now = time.monotonic()
        for trace in traces:
            self._add(trace, now)
        for number, batch in list(self._batches.items()):
            if all_batches or batch.seen <= now - _SETTLED_S:
                del self._batches[number]
                self._add_batch(number, batch)
        made, self._made = self._made, []
        return made

    def _ns(self, at: float) -> int:
        return int(1e9 * at) + self._shift_ns

    def _add(self, trace: Trace, now: float) -> None:
        attributes, context = trace.attributes, _ROOT
        if trace.parent.is_valid:
            context = set_span_in_context(NonRecordingSpan(trace.parent), _ROOT)
        else:
            self._ids.trace_id = trace.trace_id
        if trace.model:
            attributes["convoy.model.name"] = trace.model
        if trace.version:
            attributes["convoy.model.version"] = trace.version
            attributes["convoy.images"] = trace.images
        if trace.error:
            attributes["error.type"] = trace.error
        request = self._tracer.start_span(
            trace.name, context, SpanKind.SERVER, attributes, start_time=self._ns(trace.arrived)
        )
        within, ended = set_span_in_context(request, _ROOT), trace.ended

        def stage(
            name: str, begins: float, ends: float, size: int = 0, link: Link | None = None
        ) -> None:
            span = self._tracer.start_span(
                name,
                within,
                attributes={"convoy.batch.size": size} if size else None,
                links=[link] if link else None,
                start_time=self._ns(begins),
            )
            # It is where the request ended.
            if trace.error and ends == ended:
                span.set_status(Status(StatusCode.ERROR))
            span.end(self._ns(ends))

        if trace.decodes_at:
            stage("decode", trace.decodes_at, trace.decoded_at or ended)
        if trace.answer:
            answer = trace.answer
            runs_at = min(trace.queued_at + answer.queue_s, ended)
            ran_at = min(runs_at + answer.run_s, ended)
            batch = self._batch(trace, answer, ran_at)
            batch.links.append(Link(request.get_span_context()))
            batch.seen = now
            stage("queue", trace.queued_at, runs_at)
            stage("run", runs_at, ran_at, answer.batch_size, Link(batch.context))
        elif trace.queued_at:
            stage("queue", trace.queued_at, ended)
        if trace.error:
            request.set_status(Status(StatusCode.ERROR))
        request.end(self._ns(ended))

    def _batch(self, trace: Trace, answer: Answer, ran_at: float) -> _Batch:
        """The one that a request, whose last rows `ran` until then, was in."""
        batch = self._batches.get(answer.batch)
        if batch is None:
            ids = self._ids.generate_trace_id(), self._ids.generate_span_id()
            context = SpanContext(*ids, is_remote=False, trace_flags=_SAMPLED)
            times = self._ns(ran_at - answer.batch_s), self._ns(ran_at)
            batch = _Batch(context, trace.model, trace.version, *times)
            self._batches[answer.batch] = batch
        # Of one that ran in several, it is that of the largest.
        if answer.run_s == answer.batch_s:
            batch.size = answer.batch_size
        return batch

    def _add_batch(self, number: int, batch: _Batch) -> None:
        attributes: dict[str, str | int] = {
            "convoy.model.name": batch.model,
            "convoy.model.version": batch.version,
            # By which one is told of twice that requests of two acceptors were in.
            "convoy.batch.id": f"{number:016x}",
        }
        if batch.size:
            attributes["convoy.batch.size"] = batch.size
        self._ids.trace_id, self._ids.span_id = batch.context.trace_id, batch.context.span_id
        self._tracer.start_span(
            "batch",
            _ROOT,
            attributes=attributes,
            links=batch.links,
            start_time=batch.began_ns,
        ).end(batch.ended_ns)


class _Ids(RandomIdGenerator):
    """Chance decides, but for the next one, where that is known."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        known, self.trace_id = self.trace_id, 0
        return known or super().generate_trace_id()

    def generate_span_id(self) -> int:
        known, self.span_id = self.span_id, 0
        return known or super().generate_span_id()


class _Getter(Getter[Headers]):
    def get(self, carrier: Headers, key: str) -> list[str] | None:
        found = [value for name, value in carrier if name == key]
        return [each for each in found if isinstance(each, str)] or None

    def keys(self, carrier: Headers) -> list[str]:
        return [name for name, _ in carrier]


_GETTER = _Getter()


class _LastWords(logging.Handler):
    """Keeps what the exporter says of each failure to itself, for who says it once."""

    _logger = logging.getLogger("opentelemetry.exporter.otlp")

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words = "it does not say why"

    def emit(self, record: logging.LogRecord) -> None:
        self.words = record.getMessage()

    def __enter__(self) -> None:
        self._logger.propagate = False
        self._logger.addHandler(self)

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True


def _traces_url(endpoint: str) -> str:
    """As OpenTelemetry makes it of OTEL_EXPORTER_OTLP_ENDPOINT."""
    return endpoint if endpoint.endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"


def _resource() -> Resource:
    """Who says it: OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES go before what we know."""
    ours: dict[str, str | int] = {
        "service.name": "convoy",
        "service.version": metadata.version("convoy-serving"),
        "service.instance.id": str(uuid.uuid4()),
        "host.name": socket.gethostname(),
        "process.pid": os.getpid(),
    }
    return Resource.create(ours).merge(OTELResourceDetector().detect())
