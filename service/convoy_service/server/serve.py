"""`convoy serve`: one process that does everything, or a supervisor of several."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from convoy_service.api import shared_memory
from convoy_service.api.shared_memory import SharedMemory
from convoy_service.engine import isolated_verifier as aside
from convoy_service.engine.cpu import split, usable_cores
from convoy_service.errors import ConvoyError
from convoy_service.lifecycle.manager import Alone, Director, leave
from convoy_service.observers.drift_monitor import Watch
from convoy_service.registry.registry import Repository, runs_here
from convoy_service.registry.shadow_runner import Trials
from convoy_service.server.frontend import Acceptor, bracketed, no_port
from convoy_service.server.supervisor import Supervisor, log_to_stderr
from convoy_service.settings import Settings, default_models
from convoy_service.telemetry import counters as metrics
from convoy_service.telemetry.counters import Metrics, Snapshot, merge

if TYPE_CHECKING:
    from convoy_service.object_store.mirror import Store

log = logging.getLogger("convoy.server")


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; the exit status: 0 after a drain, 1 where it can't serve.

    Ready means that every model that serves has proved itself and is warm, and the port is open.
    """
    log_to_stderr(settings)
    try:
        if not isinstance(settings.models, str):
            return _serve(settings)
        from convoy_service.object_store.mirror import Store  # needs obstore

        store = Store.of(settings)
        try:
            return _serve(replace(settings, models=store.folder), store)
        finally:
            store.close()
    except (ConvoyError, OSError) as error:
        log.error("%s", error)
        return 1


def _serve(settings: Settings, store: "Store | None" = None) -> int:
    several = settings.acceptors > 1 or settings.engines > 0
    server: _Alone | _Several = _Several(settings) if several else _Alone(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.on_signal)

    watch = Watch(settings.drift_window, settings.drift_psi)

    def snapshot() -> Snapshot:
        return watch.shown(
            merge([server.snapshot(), *([store.metrics.snapshot()] if store else [])])
        )

    registry = metrics.registry(snapshot, triton=settings.metrics_compat == "triton")
    http = _serve_http(settings.host, settings.metrics_port, registry, server.ready)
    try:
        if store:
            store.in_use = server.in_use
            store.start(server.stopping)
        return server.run(http.server_port)
    finally:
        http.shutdown()
        http.server_close()


def _tell_ready(
    settings: Settings, models: str, port: int, metrics_port: int, http_port: int | None
) -> None:
    host = bracketed(settings.host)
    scheme = "https" if settings.tls_certificate else "http"
    http = "" if http_port is None else f"HTTP on {scheme}://{host}:{http_port}, "
    log.info(
        "ready in %.2f s: %s; %sgRPC on %s:%d, metrics on http://%s:%d/metrics",
        _process_age_s(), models, http, host, port, host, metrics_port,
    )  # fmt: skip


class _Alone:
    """Acceptor and engine in this process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._acceptor: Acceptor | None = None
        self._signals: list[int] = []
        self._bug: BaseException | None = None
        self._director: Director | None = None
        self.snapshot = self._metrics.snapshot

    def run(self, metrics_port: int) -> int:
        settings, cores = self._settings, usable_cores()
        budget = split(cores, 1, 0, settings.decode_threads, settings.run_threads)
        log.info("%s", budget)
        self._metrics.budget(budget)
        folder = Path(settings.models or default_models())
        trials = Trials(settings, self._metrics)
        make = runs_here(settings, budget, self._metrics, self._on_bug, trials)
        repository = Repository(folder, settings, budget, self._metrics, make, trials)
        crew = Alone(
            repository,
            lambda name, version: aside.prove(folder / name / str(version), settings),
        )
        director = Director(
            folder,
            crew,
            self._metrics,
            watch_s=settings.watch_s,
            rollback_window_s=settings.rollback_window_s,
            snapshot=self._metrics.snapshot,
        )
        self._director = director
        told = False

        def on_ready(ready: bool) -> None:
            nonlocal told
            if ready and not told:
                told = True
                _tell_ready(settings, director.serving(), port, metrics_port, http_port)

        if settings.http:  # whose modules take a tenth of a second, while models load
            threading.Thread(
                target=import_module, args=("convoy_service.api.rest",), daemon=True
            ).start()
        try:
            director.settle(lambda: bool(self._signals))
            if self._signals:  # one came while models loaded
                return 0
            with shared_memory.folder(settings.allow_shared_memory) as regions:
                acceptor = Acceptor(
                    settings,
                    repository,
                    self._metrics,
                    one_core=cores < 2,
                    statistics=lambda: metrics.statistics(self._metrics.snapshot()),
                    on_ready=on_ready,
                    order=director.order,
                    memory=SharedMemory(regions) if regions else None,
                )
                port = acceptor.bind(settings.port)
                http_port = acceptor.bind_http(settings.http_port) if settings.http else None
                self._acceptor = acceptor
                if self._signals or self._bug:  # one came before there was an acceptor to tell
                    acceptor.stop(0.0)
                crew.start()
                director.start()
                acceptor.run()
        finally:
            director.close()
            repository.close()
        status = 1 if self._bug else 0
        leave(status, crew.busy)
        return status

    def ready(self) -> bool:
        return self._acceptor is not None and self._acceptor.ready

    def stopping(self) -> bool:
        return bool(self._signals)

    def in_use(self) -> set[tuple[str, int]]:
        """See `life.Director`."""
        return self._director.in_use() if self._director else set()

    def on_signal(self, number: int, _: object) -> None:
        self._signals.append(number)
        if len(self._signals) > 1:
            log.warning("second signal: stopping at once")
            os._exit(128 + number)
        if self._acceptor:
            self._acceptor.stop(self._settings.delay_s(number))

    def _on_bug(self, bug: BaseException) -> None:
        self._bug = bug
        if self._acceptor:
            self._acceptor.stop(0.0)


class _Several:
    """Acceptors and engines in processes of their own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._supervisor = Supervisor(settings)
        self.snapshot, self.ready = self._supervisor.snapshot, self._supervisor.ready
        self._signals = 0

    def run(self, metrics_port: int) -> int:
        def on_ready(models: str, port: int, http_port: int | None) -> None:
            _tell_ready(self._settings, models, port, metrics_port, http_port)

        return self._supervisor.run(on_ready)

    def in_use(self) -> set[tuple[str, int]]:
        """See `life.Director`."""
        return self._supervisor.in_use()

    def stopping(self) -> bool:
        return bool(self._signals)

    def on_signal(self, number: int, _: object) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("second signal: stopping at once")
            self._supervisor.kill()
            os._exit(128 + number)
        self._supervisor.stop(self._settings.delay_s(number))


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
                body, kind = metrics.written(registry, self.headers.get("Accept", ""))
                self._respond(200, kind, body)
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
        raise no_port(host, port, "--metrics-port", error.strerror or str(error)) from error
    server.daemon_threads = True
    # The interval is how long `shutdown` may take.
    threading.Thread(target=server.serve_forever, args=(0.1,), name="http", daemon=True).start()
    return server
