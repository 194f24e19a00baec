"""Several processes behind one port: acceptors, engines, and the supervisor that minds them.

Each worker has a pipe to the supervisor. Down it come its orders (what to be, to stop, to tell its
metrics), up it go its answers; its end is the end of the other side. Pixels never travel there.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from service import gpu
from service.acceptor import Acceptor, is_short, no_port
from service.batcher import Batcher
from service.bundle import Bundle
from service.channel import Engines, EngineServer, Hosted, ModelInfo, RemoteBatcher, listen
from service.cpu import Budget, split, usable_cores
from service.device import Device
from service.errors import ConvoyError
from service.life import Alone, Director
from service.metrics import Metrics, Snapshot, merge
from service.repository import Made, Make, Repository, Route, runs_here
from service.settings import Settings, default_models

log = logging.getLogger("convoy.workers")

# A worker that lived this long had begun well: the next one is started at once. Others wait, each
# time twice as long, up to the longest.
_SETTLED_S, _RETRY_S, _LONGEST_RETRY_S = 30.0, 0.1, 10.0

# What a killed worker counted after the last time it was asked is lost.
_ASK_S = 1.0
# How long /metrics waits for workers that are busy, and how many questions one may leave open: more
# would fill its pipe, and then who asks would wait for it.
_ANSWER_S, _OPEN_QUESTIONS = 0.5, 10

# After the time for draining, how long a worker may take to end.
_END_S = 5.0


def log_to_stderr(settings: Settings, process: str = "") -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)-8s {process and process + ' '}%(name)s: %(message)s",
        stream=sys.stderr,
    )


class Pin(NamedTuple):
    """The version of a model that serves, on which device, in which variant."""

    version: int
    device: str
    variant: str


def serving(pins: "dict[str, Pin]") -> str:
    return ", ".join(f"{name}/{pin.version} on {pin.device}" for name, pin in pins.items())


@dataclass(frozen=True)
class Orders:
    """What a worker is to be. With `engines` (paths) it hands its rows to these; with a `listener`
    (file descriptor) it is an engine; with neither it does everything.
    """

    name: str
    settings: Settings
    budget: Budget
    port: int = 0
    listener: int = -1
    engines: tuple[str, ...] = ()
    pins: dict[str, Pin] | None = None


# Not `-m`: what is pickled would then be of two modules. Workers import what this process does, also
# where the working directory has a folder named as one of ours.
_MAIN = "import sys; sys.path[:] = sys.argv[2:]; from service.workers import main; main()"

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


# The worker's side.


def main() -> None:
    """A worker's process: its first argument is the file descriptor of its pipe."""
    sys.exit(work(Connection(int(sys.argv[1]))))


def work(pipe: Connection) -> int:
    """One worker, until it is told to stop; its exit status."""
    orders: Orders
    try:
        _, orders = pipe.recv()
    except (EOFError, OSError):  # the supervisor has ended already
        return 1
    log_to_stderr(orders.settings, orders.name)
    worker = _Worker(orders, pipe)
    try:
        worker.engine() if orders.listener >= 0 else worker.acceptor()
    except (ConvoyError, OSError) as error:
        log.error("%s", error)
        return 1
    return 1 if worker.bug else 0


class _Worker:
    def __init__(self, orders: Orders, pipe: Connection) -> None:
        self._orders, self._pipe = orders, pipe
        self._metrics = Metrics()
        self._sending = threading.Lock()
        self.bug: BaseException | None = None
        self._stop: Callable[[float], None] = lambda delay_s: os._exit(0)
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            while True:
                kind, value = self._pipe.recv()
                if kind == "stop":
                    self._stop(value)
                else:
                    self._tell("snapshot", (value, self._metrics.snapshot()))
        # Nobody is left who would start another worker, or ask this one for its metrics.
        except (EOFError, OSError):
            os._exit(1)

    def _tell(self, kind: str, value: Any) -> None:
        with self._sending:
            self._pipe.send((kind, value))

    def _on_bug(self, bug: BaseException) -> None:
        self.bug = bug
        self._stop(0.0)

    def _repository(self, make: Make) -> Repository:
        orders = self._orders
        folder = Path(orders.settings.models or default_models())
        repository = Repository(folder, orders.settings, orders.budget, self._metrics, make)
        if orders.pins is None:
            Director(folder, Alone(repository), self._metrics).settle()
        else:
            for name, pin in orders.pins.items():
                repository.load(name, pin.version, variant=pin.variant)
                repository.route(name, Route(pin.version))
        return repository

    def _runs_here(self) -> Make:
        orders = self._orders
        return runs_here(orders.settings, orders.budget, self._metrics, self._on_bug)

    def engine(self) -> None:
        repository = self._repository(self._runs_here())
        hosted = []
        for entry in repository.entries():
            if (served := entry.served) and isinstance(served.batcher, Batcher):
                inline = is_short(served)
                hosted.append(Hosted(_info(served.bundle, served.device), served.batcher, inline))
                if not inline:
                    served.batcher.start()
        server = EngineServer(socket.socket(fileno=self._orders.listener), hosted)
        self._stop = lambda delay_s: server.close()
        self._tell("ready", _pins(repository))
        server.serve()
        repository.close()

    def acceptor(self) -> None:
        orders, acceptor = self._orders, None
        engines = None
        make = self._runs_here()
        if orders.engines:
            engines = Engines(
                orders.engines,
                on_change=lambda path, models: acceptor.changed() if acceptor else None,
                on_bug=self._on_bug,
            )
            make = self._runs_there(engines)
        repository = self._repository(make)
        acceptor = Acceptor(
            orders.settings,
            repository,
            self._metrics,
            one_core=orders.budget.cores < 2 * orders.budget.acceptors,
            shared_port=True,
            on_ready=lambda ready: self._tell("ready", _pins(repository) if ready else None),
        )
        acceptor.bind(orders.port)
        self._stop = acceptor.stop
        acceptor.run()
        repository.close()
        if engines:
            engines.close()

    def _runs_there(self, engines: Engines) -> Make:
        """What makes a batcher whose batches run in the engines."""
        settings, pins = self._orders.settings, self._orders.pins or {}

        def make(bundle: Bundle, variant: str = "", gently: bool = False) -> Made:
            pin = pins[bundle.name]
            info = _info(bundle, pin.device)
            batcher = RemoteBatcher(engines, info, max_wait_s=settings.max_wait_s)
            return Made(pin.device, pin.variant, batcher)

        return make


def _pins(repository: Repository) -> dict[str, Pin]:
    return {
        entry.name: Pin(entry.served.version, entry.served.device, entry.served.variant)
        for entry in repository.entries()
        if entry.served
    }


def _info(bundle: Bundle, device: str) -> ModelInfo:
    manifest = bundle.manifest
    return ModelInfo(
        bundle.name,
        bundle.version,
        manifest.pixels.shape,
        len(manifest.labels),
        manifest.max_batch_size,
        device,
        bundle.sha256,
    )


# The supervisor's side.


def _decided(pins: dict[str, Pin]) -> dict[str, tuple[int, str]]:
    return {name: (pin.version, pin.variant) for name, pin in pins.items()}


class _Member:
    """A place in the crew, and the process that fills it, if one does."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.ready = self.stopped = False
        # What it has counted, as it said when it answered this question; how many are open; and what
        # those counted who were here before.
        self.snapshot: Snapshot = {}
        self.answered = self.open = 0
        self.past: Snapshot = {}
        self.started = 0.0
        self.start_at = 0.0
        self.retry_s = _RETRY_S

    @property
    def engine(self) -> bool:
        return self.orders.listener >= 0


def on_card(settings: Settings, n: int, cards: Callable[[], int] = gpu.count) -> Settings:
    """What the nth process that runs batches is to be: on the next card, where none is named."""
    device = Device.parse(settings.device)
    if device.kind == "cpu" or device.number is not None or not (there := cards()):
        return settings
    return replace(settings, device=str(device._replace(number=n % there)))


class Supervisor:
    """Starts the workers, replaces those that die, adds their metrics up, and stops them in order."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._metrics = Metrics()
        self._members: list[_Member] = []
        self._questions, self._ask_at = 0, 0.0
        # Guards what is known of the members, which /metrics asks for on its own threads.
        self._changed = threading.Condition()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopping: float | None = None  # by then everyone has ended
        self._delay_s: float | None = None
        self._failed = self._was_ready = False
        self._killed = False

    def run(self, on_ready: Callable[[str, int], None]) -> int:
        """Until `stop`, and all have ended; the exit status. `on_ready` hears what serves, and the
        port, when all are ready for the first time.
        """
        settings, cores = self._settings, usable_cores()
        acceptors, engines = settings.acceptors, settings.engines
        budget = split(cores, acceptors, engines, settings.decode_threads, settings.run_threads)
        log.info("%s", budget)
        self._metrics.budget(budget)
        with tempfile.TemporaryDirectory(prefix="convoy-") as folder, _reserve(settings) as port:
            self._port = port.getsockname()[1]
            paths = tuple(str(Path(folder) / f"engine-{n}") for n in range(engines))
            listeners = [listen(path) for path in paths]
            for n, listener in enumerate(listeners):
                here = on_card(settings, n)
                self._members.append(
                    _Member(Orders(f"engine-{n}", here, budget, listener=listener.fileno()))
                )
            for n in range(acceptors):
                here = settings if engines else on_card(settings, n)
                self._members.append(
                    _Member(Orders(f"acceptor-{n}", here, budget, self._port, engines=paths))
                )
            try:
                while not self._ended():
                    self._mind(on_ready)
            finally:
                self.kill()
                for listener in listeners:
                    listener.close()
        log.info("stopped")
        return 1 if self._failed else 0

    def stop(self, delay_s: float) -> None:
        """From a signal handler: acceptors drain after `delay_s`, then engines end."""
        self._delay_s = delay_s
        os.eventfd_write(self._bell, 1)

    def kill(self) -> None:
        """Ends all workers at once."""
        self._killed = True
        for member in self._members:
            if member.process:
                member.process.kill()

    def ready(self) -> bool:
        return self._delay_s is None and any(
            member.ready for member in self._members if not member.engine
        )

    def snapshot(self) -> Snapshot:
        """What all counted, the dead too; may be called from any thread."""
        with self._changed:
            number, asked = self._ask()
            self._changed.wait_for(
                lambda: all(member.answered >= number for member in asked if member.pipe),
                _ANSWER_S,
            )
            # In the same order before and after a death: else sums, rounded, would go backwards.
            known = [merge([member.snapshot], [member.past]) for member in self._members]
        return merge([*known, self._metrics.snapshot()])

    def _ask(self) -> tuple[int, list[_Member]]:
        """Asks for the metrics: the number of the question, and who got it. The lock is held."""
        self._questions += 1
        asked = []
        for member in self._members:
            if (
                member.pipe
                and member.open < _OPEN_QUESTIONS
                and _send(member.pipe, "snapshot", self._questions)
            ):
                member.open += 1
                asked.append(member)
        return self._questions, asked

    def _mind(self, on_ready: Callable[[str, int], None]) -> None:
        """Waits for something to happen, and sees to it."""
        now = time.monotonic()
        if self._delay_s is not None and self._stopping is None:
            self._begin_stop(now)
        self._start_due(now)
        if now >= self._ask_at:
            self._ask_at = now + _ASK_S
            with self._changed:
                self._ask()
        if self._stopping is not None and now >= self._stopping and not self._killed:
            log.warning("workers that had not ended in time were killed")
            self.kill()
        pipes = {member.pipe: member for member in self._members if member.pipe}
        for source in wait([*pipes, self._bell], self._nap(now)):
            if source == self._bell:
                os.eventfd_read(self._bell)
            else:
                self._hear(pipes[source])  # type: ignore[index]
        if self._delay_s is None and not self._was_ready and all(m.ready for m in self._members):
            self._was_ready = True
            on_ready(serving(self._pins() or {}), self._port)

    def _nap(self, now: float) -> float:
        due = [self._ask_at, *(member.start_at for member in self._missing())]
        return max(0.0, min(due) - now)

    def _missing(self) -> list[_Member]:
        """Whose processes are to be started, now or later."""
        if self._delay_s is not None:
            return []
        # Acceptors serve what the engines have found to work.
        return [
            member
            for member in self._members
            if not member.process and (not member.orders.engines or self._pins() is not None)
        ]

    def _start_due(self, now: float) -> None:
        for member in self._missing():
            if member.start_at <= now:
                member.orders = replace(member.orders, pins=self._pins())
                self._start(member, now)

    def _pins(self) -> dict[str, Pin] | None:
        for member in self._members:
            if member.orders.pins is not None:
                return member.orders.pins
        return None

    def _start(self, member: _Member, now: float) -> None:
        member.started = now
        try:
            process, pipe = _spawn(member.orders)
        except OSError as error:
            if not self._was_ready:
                raise
            # Processes, files or memory may be there again by and by.
            self._put_off(member, now, f"can't be started ({error})")
            return
        with self._changed:
            member.process, member.pipe = process, pipe
            member.answered, member.open = self._questions, 0
            _send(member.pipe, "orders", member.orders)  # where it has died, its pipe says so
        self._metrics.process_started(member.orders.name)

    def _hear(self, member: _Member) -> None:
        assert member.pipe
        try:
            kind, value = member.pipe.recv()
        except (EOFError, OSError):
            self._bury(member)
            return
        with self._changed:
            if kind == "snapshot":
                member.answered, member.snapshot = value
                member.open -= 1
                self._changed.notify_all()
                return
            member.ready = value is not None
        if value is None:
            if self._stopping is None:
                log.warning("%s is not ready", member.orders.name)
            return
        log.info("%s is ready (pid %d)", member.orders.name, member.process and member.process.pid)
        decided = self._pins()
        if decided is None:
            member.orders = replace(member.orders, pins=value)
        elif _decided(value) != _decided(decided):
            # A version was published while engines started. The next one takes what is decided.
            log.warning("%s has other versions than the others: it is replaced", member.orders.name)
            if member.process:
                member.process.kill()

    def _bury(self, member: _Member) -> None:
        """Its pipe is closed: it has ended, or does at once."""
        assert member.process
        assert member.pipe
        status = member.process.wait()
        now, name = time.monotonic(), member.orders.name
        with self._changed:
            member.pipe.close()
            member.past = merge([], [member.past, member.snapshot])
            member.process = member.pipe = None
            member.snapshot, was_ready, member.ready = {}, member.ready, False
            self._changed.notify_all()
        if self._delay_s is not None:
            if status and not self._killed:
                log.warning("%s ended with status %d", name, status)
            return
        if not was_ready and not self._was_ready:
            log.error("%s could not start (status %d)", name, status)
            self._failed = True
            self.stop(0.0)
            return
        self._put_off(member, now, f"died (status {status})")

    def _put_off(self, member: _Member, now: float, reason: str) -> None:
        """The next one is started at once where the last had settled, else after a while."""
        delay_s = 0.0
        if member.started < now - _SETTLED_S:
            member.retry_s = _RETRY_S
        else:
            delay_s = member.retry_s = min(2 * member.retry_s, _LONGEST_RETRY_S)
        member.start_at = now + delay_s
        log.error("%s %s: the next one starts in %.1f s", member.orders.name, reason, delay_s)

    def _begin_stop(self, now: float) -> None:
        assert self._delay_s is not None
        if self._delay_s:
            log.info("not ready; still answering for %g s", self._delay_s)
        self._stopping = now + self._delay_s + self._settings.drain_grace_s + _END_S
        for member in self._members:
            if member.pipe and not member.engine:
                _send(member.pipe, "stop", self._delay_s)

    def _ended(self) -> bool:
        """Whether all have ended. Engines are stopped when no acceptor is left to ask them."""
        if self._stopping is None:
            return False
        alive = [member for member in self._members if member.process]
        if all(member.engine for member in alive):
            for member in alive:
                if member.pipe and not member.stopped:
                    member.stopped = _send(member.pipe, "stop", 0.0)
        return not alive


def _spawn(orders: Orders) -> tuple[subprocess.Popen[bytes], Connection]:
    """A worker's process that waits for its orders, and the pipe to it. Raises OSError."""
    passed = [orders.listener] if orders.listener >= 0 else []
    # Signals are for this process, also where a terminal sends them to all: a worker is born with
    # them blocked, and stays so.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno(), *passed],
            )
            return process, Connection(ours.detach())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _send(pipe: Connection, kind: str, value: Any) -> bool:
    try:
        pipe.send((kind, value))
    except OSError:
        return False
    return True


def _reserve(settings: Settings) -> socket.socket:
    """A socket that keeps the port for the acceptors, which share it: nobody else may have it."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            # A port in use by an SO_REUSEPORT server would be shared with it, unnoticed.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((settings.host, settings.port))
        shared = socket.socket(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((settings.host, settings.port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise no_port(settings.host, settings.port, "--port", reason) from error
    return shared
