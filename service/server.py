"""The life of one process: load and prove the models, open, be ready, drain, stop."""

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from service import classifier_rpc, inference_rpc, metrics, transport
from service.batcher import Batcher
from service.classifier_rpc import ClassifierRpc
from service.cpu import split, usable_cores
from service.errors import ConvoyError
from service.front import Front
from service.health import Health, add_reflection
from service.inference_rpc import InferenceRpc
from service.metrics import Metrics
from service.repository import Repository, Served
from service.settings import Settings, default_models

log = logging.getLogger("convoy.server")

# On one core, batches this short run between two calls; longer ones would keep callers waiting.
_SHORT_S = 0.02


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; the exit status: 0 after a drain, 1 where it can't serve.

    Ready means that every model that serves has proved itself and is warm, and the port is open.
    """
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)-8s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        return _Process(settings).run()
    except (ConvoyError, OSError) as error:
        log.error("%s", error)
        return 1


class _Process:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._acceptor: Acceptor | None = None
        self._signals: list[int] = []
        self._bug: BaseException | None = None

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        settings = self._settings
        budget = split(usable_cores(), 1, 1, settings.decode_threads, settings.run_threads)
        log.info("%s", budget)
        registry = metrics.registry(self._metrics.snapshot)
        http = _serve_http(settings.host, settings.metrics_port, registry, self._ready)
        try:
            repository = Repository(
                settings.models or default_models(),
                settings,
                budget,
                self._metrics,
                self._on_bug,
                lambda: bool(self._signals),
            )
            try:
                if not self._signals:  # one may have come while models loaded
                    acceptor = Acceptor(settings, repository, self._metrics)
                    port = acceptor.bind()
                    self._acceptor = acceptor
                    acceptor.run(lambda: self._tell_ready(repository, port, http.server_port))
            finally:
                repository.close()
        finally:
            http.shutdown()
            http.server_close()
        return 1 if self._bug else 0

    def _ready(self) -> bool:
        return self._acceptor is not None and self._acceptor.ready

    def _tell_ready(self, repository: Repository, port: int, http_port: int) -> None:
        host = _bracketed(self._settings.host)
        log.info(
            "ready in %.2f s: %s; gRPC on %s:%d, metrics on http://%s:%d/metrics",
            _process_age_s(),
            ", ".join(
                f"{entry.name}/{entry.served.version} on {entry.served.device}"
                for entry in repository.entries()
                if entry.served
            ),
            host, port, host, http_port,
        )  # fmt: skip

    def _on_signal(self, number: int, _: object) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            log.warning("second signal: stopping at once")
            os._exit(128 + number)
        if self._acceptor:
            self._acceptor.stop(
                self._settings.shutdown_delay_s if number == signal.SIGTERM else 0.0
            )

    def _on_bug(self, bug: BaseException) -> None:
        self._bug = bug
        if self._acceptor:
            self._acceptor.stop(0.0)


class Acceptor:
    """Takes calls from being ready until it has drained."""

    def __init__(self, settings: Settings, repository: Repository, metrics: Metrics) -> None:
        self._settings, self._repository = settings, repository
        max_bytes = int(settings.max_request_mb * 1e6)
        self._loop = transport.server(
            [
                # Above our own limit, which answers INVALID_ARGUMENT: the library's own answer,
                # RESOURCE_EXHAUSTED, invites retries.
                ("grpc.max_receive_message_length", 2 * max_bytes),
                ("grpc.max_send_message_length", -1),
                # Two servers on one port would each get some of the connections, unnoticed.
                ("grpc.so_reuseport", 0),
                # gRPC answers calls that it has not yet handed to us with CANCELLED, from 1000 on
                # now and then, from 3000 on always. Ours is RESOURCE_EXHAUSTED, and is counted.
                ("grpc.server.max_pending_requests", 100_000),
                ("grpc.server.max_pending_requests_hard_limit", 200_000),
            ],
            public=settings.front == "public",
        )
        self._front = front = Front(
            self._loop,
            metrics,
            max_request_bytes=max_bytes,
            max_in_flight=settings.max_in_flight,
            max_held_bytes=int(settings.max_held_mb * 1e6),
            # Beside its images a request has a few fields of its own.
            max_parts=settings.max_images + 1000,
        )
        self.ready = self._stopping = False
        self._health = Health(front)
        ClassifierRpc(repository, front.hold).register(front)
        InferenceRpc(repository, lambda: self.ready, front.hold).register(front)
        add_reflection(front, [classifier_rpc.SERVICE, inference_rpc.SERVICE, HEALTH])
        self._runs_here: list[Batcher] = []

    def bind(self) -> int:
        """The port it listens on. Raises ConvoyError where it can't."""
        settings = self._settings
        try:
            return self._loop.bind(
                f"{_bracketed(settings.host)}:{settings.port}", _credentials(settings)
            )
        # gRPC does not say why; HTTP could listen on this host, so it must be the port.
        except RuntimeError:
            reason = "it is taken, or not ours"
            raise _no_port(settings.host, settings.port, "--port", reason) from None

    def run(self, on_ready: Callable[[], None]) -> None:
        """Serves until it was stopped and has drained."""
        for entry in self._repository.entries():
            if entry.served:
                self._start(entry.served)
        self._loop.waiting, self._loop.step = self._waiting, self._run_batches
        self._loop.post(lambda: self._open(on_ready))
        self._loop.run()
        log.info("stopped")

    def stop(self, delay_s: float) -> None:
        """From any thread: is no longer ready, drains after `delay_s`, then `run` returns."""
        self._loop.post(lambda: self._withdraw(delay_s))

    def _start(self, served: Served) -> None:
        batcher = served.batcher
        if usable_cores() < 2 and batcher.wait_s(served.manifest.max_batch_size) < _SHORT_S:
            self._runs_here.append(batcher)
        else:
            batcher.start()

    def _waiting(self) -> bool:
        for batcher in self._runs_here:  # noqa: SIM110 (a generator costs more than the look)
            if batcher.waiting:
                return True
        return False

    def _run_batches(self) -> None:
        for batcher in self._runs_here:
            batcher.run_next()

    def _open(self, on_ready: Callable[[], None]) -> None:
        # "" is the process itself: it stays SERVING while it drains, or probes would kill it.
        self._health.set("", True)
        for entry in self._repository.entries():
            self._health.set(entry.name, entry.served is not None)
        for name in (classifier_rpc.SERVICE, inference_rpc.SERVICE):
            self._health.set(name, True)
        self.ready = True
        on_ready()

    def _withdraw(self, delay_s: float) -> None:
        if self._stopping:
            return
        self._stopping, self.ready = True, False
        names = [entry.name for entry in self._repository.entries()]
        for name in (classifier_rpc.SERVICE, inference_rpc.SERVICE, *names):
            self._health.set(name, False)
        if delay_s:
            log.info("not ready; still answering for %g s", delay_s)
        self._loop.at(time.monotonic() + delay_s, self._drain)

    def _drain(self) -> None:
        grace_s = self._settings.drain_grace_s
        log.info("draining, for at most %g s", grace_s)
        self._loop.at(time.monotonic() + grace_s, self._cut_off)
        self._front.drain(self._end)

    def _cut_off(self) -> None:
        log.warning(
            "%d calls were cut off after %g s", self._front.close(), self._settings.drain_grace_s
        )
        self._loop.stop()

    def _end(self) -> None:
        self._front.close()
        self._loop.stop()


def _bracketed(host: str) -> str:
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


def _no_port(host: str, port: int, flag: str, reason: str) -> ConvoyError:
    return ConvoyError(
        f"can't listen on port {port} of {host}: {reason}; choose another with {flag}, or a --host"
    )


def _process_age_s() -> float:
    """Since the kernel started this process: imports count in how soon it is ready."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _serve_http(
    host: str, port: int, registry: CollectorRegistry, ready: Callable[[], bool]
) -> ThreadingHTTPServer:
    """/metrics, /healthz (the process lives) and /readyz (send it requests), on a thread."""

    class Handler(BaseHTTPRequestHandler):
        # Seconds of silence: a caller who stops half-way would keep its thread for ever.
        timeout = 10

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                self._respond(200, kind, encode(registry))
            elif path == "/healthz":
                self._respond(200, "text/plain", b"ok\n")
            elif path == "/readyz":
                status, body = (200, b"ok\n") if ready() else (503, b"not ready\n")
                self._respond(status, "text/plain", body)
            else:
                self._respond(404, "text/plain", b"there is /metrics, /healthz and /readyz\n")

        do_HEAD = do_GET  # noqa: N815

        def _respond(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            log.debug("http %s", format % args)

    class Server(ThreadingHTTPServer):
        # Where a name has addresses of both, IPv4.
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

    try:
        server = Server((host, port), Handler)
    except OSError as error:
        raise _no_port(host, port, "--metrics-port", error.strerror or str(error)) from error
    server.daemon_threads = True
    # The interval is how long `shutdown` may take.
    threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True).start()
    return server
