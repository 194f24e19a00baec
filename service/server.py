"""The life of one process: load and prove the models, open, be ready, drain, stop."""

import asyncio
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
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import SERVICE_NAME as HEALTH
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from prometheus_client.exposition import choose_encoder

from service import classifier_rpc, inference_rpc
from service.classifier_rpc import ClassifierRpc
from service.errors import ConvoyError
from service.front import Front
from service.inference_rpc import InferenceRpc
from service.metrics import Metrics
from service.repository import Repository
from service.settings import Settings, default_models

log = logging.getLogger("convoy.server")

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


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
        return asyncio.run(_Server(settings).run())
    except (ConvoyError, OSError) as error:
        log.error("%s", error)
        return 1


class _Server:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._ready = False
        self._stopping = asyncio.Event()
        self._signals: list[signal.Signals] = []
        self._bug: BaseException | None = None

    async def run(self) -> int:
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._on_signal, number)
        settings = self._settings
        http = _serve_http(settings.host, settings.metrics_port, self._metrics, lambda: self._ready)
        try:
            # On a thread, so that signals and /healthz are answered while large models load.
            repository = await asyncio.to_thread(
                Repository,
                settings.models or default_models(),
                settings,
                self._metrics,
                self._on_bug,
                self._stopping.is_set,
            )
            try:
                if not self._stopping.is_set():  # a signal may have come while models loaded
                    await self._serve(repository, http.server_port)
            finally:
                await asyncio.to_thread(repository.close)
        finally:
            http.shutdown()
            http.server_close()
        return 1 if self._bug else 0

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            log.warning("second signal: stopping at once")
            os._exit(128 + number)
        self._stopping.set()

    def _on_bug(self, bug: BaseException) -> None:
        self._bug = bug
        self._loop.call_soon_threadsafe(self._stopping.set)

    async def _serve(self, repository: Repository, http_port: int) -> None:
        settings = self._settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        max_bytes = int(settings.max_request_mb * 1e6)
        server = grpc.aio.server(
            options=[
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
            ]
        )
        # Beside its images a request has a few fields of its own.
        max_parts = settings.max_images + 1000
        front = Front(self._metrics, max_bytes, settings.max_in_flight, max_parts)
        checker = health.HealthServicer()
        names = [classifier_rpc.SERVICE, inference_rpc.SERVICE]
        server.add_generic_rpc_handlers(
            (
                ClassifierRpc(repository).handlers(front),
                InferenceRpc(repository, lambda: self._ready).handlers(front),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(checker, server)
        reflection.enable_server_reflection([*names, HEALTH, reflection.SERVICE_NAME], server)
        try:
            port = server.add_insecure_port(f"{host}:{settings.port}")
        # gRPC does not say why; HTTP could listen on this host, so it must be the port.
        except RuntimeError:
            reason = "it is taken, or not ours"
            raise _no_port(settings.host, settings.port, "--port", reason) from None
        await server.start()

        entries = repository.entries()
        # "" is the process itself: it stays SERVING while it drains, or probes would kill it.
        await checker.set("", _SERVING)
        for entry in entries:
            await checker.set(entry.name, _SERVING if entry.served else _NOT_SERVING)
        for name in names:
            await checker.set(name, _SERVING)
        self._ready = True
        log.info(
            "ready in %.2f s: %s; gRPC on %s:%d, metrics on http://%s:%d/metrics",
            _process_age_s(),
            ", ".join(
                f"{entry.name}/{entry.served.version} on {entry.served.model.device}"
                for entry in entries
                if entry.served
            ),
            host,
            port,
            host,
            http_port,
        )

        await self._stopping.wait()
        self._ready = False
        for name in [*names, *(entry.name for entry in entries)]:
            await checker.set(name, _NOT_SERVING)
        if self._signals == [signal.SIGTERM] and settings.shutdown_delay_s:
            log.info("SIGTERM: not ready; still answering for %g s", settings.shutdown_delay_s)
            await asyncio.sleep(settings.shutdown_delay_s)
        log.info("draining, for at most %g s", settings.drain_grace_s)
        # The first stop refuses new calls. It would wait for the streams of Watch until its grace is
        # over, so the second ends it as soon as none of our calls is left, or their grace is over.
        # Were both to end at once, grpc would cancel the calls of a server it has destroyed.
        closing = asyncio.create_task(server.stop(settings.drain_grace_s + 3600))
        drained = await front.drain(settings.drain_grace_s)
        await server.stop(0.1 if drained else 0)
        await closing
        log.info("stopped")


def _no_port(host: str, port: int, flag: str, reason: str) -> ConvoyError:
    return ConvoyError(
        f"can't listen on port {port} of {host}: {reason}; choose another with {flag}, or a --host"
    )


def _process_age_s() -> float:
    """Since the kernel started this process: imports count in how soon it is ready."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _serve_http(
    host: str, port: int, metrics: Metrics, ready: Callable[[], bool]
) -> ThreadingHTTPServer:
    """/metrics, /healthz (the process lives) and /readyz (send it requests), on a thread."""

    class Handler(BaseHTTPRequestHandler):
        # Seconds of silence: a caller who stops half-way would keep its thread for ever.
        timeout = 10

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path == "/metrics":
                encode, kind = choose_encoder(self.headers.get("Accept", ""))
                self._respond(200, kind, encode(metrics.registry))
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
