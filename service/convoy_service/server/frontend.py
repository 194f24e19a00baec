"""The side of the service that callers see: APIs, health, readiness and draining, on one loop."""

import gc
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH

from convoy_service.api import classifier as classifier_rpc
from convoy_service.api import inference as inference_rpc
from convoy_service.api.classifier import ClassifierRpc
from convoy_service.api.control import Order
from convoy_service.api.health import Health, add_reflection
from convoy_service.api.inference import InferenceRpc
from convoy_service.api.shared_memory import SharedMemory
from convoy_service.engine.batcher import Batcher
from convoy_service.errors import ConvoyError
from convoy_service.ipc.engine_client import RemoteBatcher
from convoy_service.observers import drift_monitor as drift
from convoy_service.observers.feedback_writer import keeping
from convoy_service.registry.registry import Repository, Served
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics, Statistics
from convoy_service.transport import grpc_server as transport
from convoy_service.transport.dispatcher import Front

if TYPE_CHECKING:
    from convoy_service.api.rest import Rest
    from convoy_service.telemetry.tracing import Tracing

log = logging.getLogger("convoy.acceptor")

# How long the last traces may take to be sent, of the time for draining.
_TRACES_S = 3.0

# Batches this short run between two calls, on one core; longer ones would keep callers waiting.
_SHORT_S = 0.05

HTTP_FLAG = "--http-port (--no-http: none)"

# How long answers over HTTP may take on their way, when the time for draining is over.
_LAST_S = 0.2


def is_short(served: Served) -> bool:
    """Whether its batches may run on a thread that others wait for: a second lane needs its own."""
    batcher = served.batcher
    return isinstance(batcher, Batcher) and batcher.lanes == 1 and batcher.full_batch_s < _SHORT_S


class Acceptor:
    """Takes calls from being ready until it has drained."""

    def __init__(
        self,
        settings: Settings,
        repository: Repository,
        metrics: Metrics,
        *,
        one_core: bool,
        statistics: Callable[[], Mapping[tuple[str, str], Statistics]],
        shared_port: bool = False,
        on_ready: Callable[[bool], None] = lambda ready: None,
        order: Order | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        """`one_core`: short batches run on the loop's own thread. `statistics`: of the whole service.
        `shared_port`: others listen on the same one. `on_ready` hears of each change of `ready`. `order` carries out what operators say,
        if the settings allow that. `memory` is what callers share, if they may.
        """
        self._settings, self._repository, self._one_core = settings, repository, one_core
        self._shared_port = shared_port
        self._rest: Rest | None = None
        self._metrics, self._on_ready = metrics, on_ready
        max_bytes = int(settings.max_request_mb * 1e6)
        self._loop = transport.server(
            [
                # Above our own limit, which answers INVALID_ARGUMENT: the library's own answer,
                # RESOURCE_EXHAUSTED, invites retries.
                ("grpc.max_receive_message_length", 2 * max_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would each get some of the connections, unnoticed.
                ("grpc.so_reuseport", int(shared_port)),
                # gRPC answers calls that it has not yet handed to us with CANCELLED, from 1000 on
                # now and then, from 3000 on always. Ours is RESOURCE_EXHAUSTED, and is counted.
                ("grpc.server.max_pending_requests", 100_000),
                ("grpc.server.max_pending_requests_hard_limit", 200_000),
                # A read hands on 32 calls, and leaves the rest of what it brought to another thread.
                ("grpc.http2.max_requests_per_read", 100_000),
                # Which gRPC varies by a tenth. Calls that last longer are not cut off.
                *_connection_age(settings.max_connection_age_s),
            ],
            public=settings.front == "public",
        )
        self._tracing = _tracing(settings, metrics)
        self._front = front = Front(
            self._loop,
            metrics,
            max_request_bytes=max_bytes,
            max_in_flight=settings.max_in_flight,
            max_held_bytes=int(settings.max_held_mb * 1e6),
            # Beside its images a request has a few fields of its own.
            max_parts=settings.max_images + 1000,
            check=repository.check,
            tracing=self._tracing,
        )
        self._open = self._stopping = self._was_ready = False
        # By when it is to have drained.
        self._ends = math.inf
        self._health = Health(front)
        order = order if settings.allow_repository_control else None
        ClassifierRpc(repository, front.hold, order).register(front)
        InferenceRpc(
            repository, lambda: self.ready, front.hold, settings, statistics, order, memory
        ).register(front)
        services = [classifier_rpc.SERVICE, classifier_rpc.CONTROL, inference_rpc.SERVICE, HEALTH]
        add_reflection(front, services)
        self._runs_here: tuple[Batcher | RemoteBatcher, ...] = ()
        repository.attach(self._start, self._stop, self.changed)
        if settings.drift_images_per_s:
            repository.observers.append(drift.Observer(metrics, settings.drift_images_per_s))

    @property
    def ready(self) -> bool:
        """Every model that has a version that works can be asked."""
        return (
            self._open
            and not self._stopping
            and all(
                entry.served.batcher.ready for entry in self._repository.entries() if entry.served
            )
        )

    def bind(self, port: int) -> int:
        """The port it listens on. Raises ConvoyError where it can't."""
        settings = self._settings
        try:
            return self._loop.bind(f"{bracketed(settings.host)}:{port}", _credentials(settings))
        # gRPC does not say why; HTTP could listen on this host, so it must be the port, or TLS.
        except RuntimeError:
            reason = "it is taken, or not ours"
            if settings.tls_certificate:
                reason += "; or --tls-certificate and --tls-key are no PEM files that fit together"
            raise no_port(settings.host, port, "--port", reason) from None

    def bind_http(self, port: int) -> int:
        """The port it listens on for HTTP. Raises ConvoyError where it can't."""
        from convoy_service.api.rest import Rest  # a tenth of a second, for who wants it

        host, rest = self._settings.host, Rest(self._settings, self._loop)
        try:
            bound = rest.web.bind(host, port, self._shared_port)
        except OSError as error:
            reason = error.strerror or str(error)
            raise no_port(host, port, HTTP_FLAG, reason) from error
        self._rest = rest
        return bound

    def run(self) -> None:
        """Serves until it was stopped and has drained."""
        self._loop.waiting, self._loop.step = self._waiting, self._run_batches
        self._loop.post(self._begin)
        # What is there now stays: the collector need not look through it again and again.
        gc.collect()
        gc.freeze()
        if self._rest:
            self._rest.web.start()
        with keeping(self._settings, self._repository.observers, self._metrics):
            self._loop.run()
        if self._rest:
            self._rest.web.close(max(_LAST_S, self._ends - time.monotonic()))
        if self._tracing is not None:
            self._tracing.close(min(_TRACES_S, max(0.0, self._ends - time.monotonic())))
        log.info("stopped")

    def stop(self, delay_s: float) -> None:
        """From any thread: is no longer ready, drains after `delay_s`, then `run` returns."""
        self._loop.post(lambda: self._withdraw(delay_s))

    def changed(self) -> None:
        """From any thread: models may have become ready, or no longer be."""
        self._loop.post(self._tell)

    def _start(self, served: Served) -> None:
        # What is sent to engines goes when all that has arrived is taken, in one go.
        if isinstance(served.batcher, RemoteBatcher) or (self._one_core and is_short(served)):
            self._runs_here = (*self._runs_here, served.batcher)
        else:
            served.batcher.start()

    def _stop(self, served: Served) -> None:
        self._runs_here = tuple(each for each in self._runs_here if each is not served.batcher)

    def _waiting(self) -> bool:
        for batcher in self._runs_here:  # noqa: SIM110 (a generator costs more than the look)
            if batcher.waiting:
                return True
        return False

    def _run_batches(self) -> None:
        for batcher in self._runs_here:
            batcher.run_next()

    def _begin(self) -> None:
        self._open = True
        # "" is the process itself: it stays SERVING while it drains, or probes would kill it.
        self._health.set("", True)
        self._tell()

    def _tell(self) -> None:
        if not self._open:
            return
        for entry in self._repository.entries():
            serving = entry.served is not None and entry.served.batcher.ready
            self._health.set(entry.name, serving and not self._stopping)
        ready = self.ready
        for name in (classifier_rpc.SERVICE, inference_rpc.SERVICE):
            self._health.set(name, ready)
        if ready != self._was_ready:
            self._was_ready = ready
            self._on_ready(ready)

    def _withdraw(self, delay_s: float) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._tell()
        if self._rest:
            self._rest.web.withdraw()
        if delay_s:
            log.info("not ready; still answering for %g s", delay_s)
        self._loop.at(time.monotonic() + delay_s, self._drain)

    def _drain(self) -> None:
        grace_s = self._settings.drain_grace_s
        log.info("draining, for at most %g s", grace_s)
        self._ends = time.monotonic() + grace_s
        self._loop.at(self._ends, self._cut_off)
        if self._rest:
            self._rest.web.drain()
        self._front.drain(self._end)

    def _cut_off(self) -> None:
        calls, grace_s = self._front.close(), self._settings.drain_grace_s
        log.warning("%d calls were cut off after %g s", calls, grace_s)
        self._loop.stop()

    def _end(self) -> None:
        self._front.close()
        self._loop.stop()


def _tracing(settings: Settings, metrics: Metrics) -> "Tracing | None":
    if not settings.otlp_endpoint:
        return None
    from convoy_service.telemetry.tracing import Tracing  # needs OpenTelemetry

    return Tracing(settings.otlp_endpoint, metrics)


def _connection_age(seconds: float) -> list[tuple[str, int]]:
    age_ms = max(1, min(round(1000 * seconds), 2**31 - 1))
    return [("grpc.max_connection_age_ms", age_ms)] if seconds else []


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """For TLS. Raises ConvoyError where the settings or files are incomplete."""
    certificate, key, ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if not (certificate or key or ca):
        return None
    if not (certificate and key):
        raise ConvoyError("TLS needs both --tls-certificate and --tls-key")
    return grpc.ssl_server_credentials(
        [(key.read_bytes(), certificate.read_bytes())],
        ca.read_bytes() if ca else None,
        require_client_auth=ca is not None,
    )


def no_port(host: str, port: int, flag: str, reason: str) -> ConvoyError:
    return ConvoyError(
        f"can't listen on port {port} of {host}: {reason}; choose another with {flag}, or a --host"
    )
