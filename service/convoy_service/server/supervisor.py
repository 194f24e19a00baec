"""Several processes behind one port: acceptors, engines, and the supervisor that minds them.

Each worker has a pipe to the supervisor. Down it come its orders (what to be; versions to load, to
route to and to unload; to tell its metrics; to stop), up it go its answers; its end is the end of the
other side. Pixels never travel there.

What is loaded is decided by the supervisor's `life.Director`. A version is loaded when every engine
has it, and then every acceptor; it goes the other way round. A worker that takes the place of a dead
one is born with what is decided by then.
"""

import itertools
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

from convoy_service.api import shared_memory
from convoy_service.api.shared_memory import SharedMemory
from convoy_service.artifacts.reader import Bundle
from convoy_service.backoff import Backoff
from convoy_service.crashes import CrashReport, ending
from convoy_service.engine import gpu
from convoy_service.engine import isolated_verifier as aside
from convoy_service.engine.batcher import Batcher
from convoy_service.engine.cpu import Budget, split, usable_cores
from convoy_service.engine.isolated_verifier import Proof
from convoy_service.engine.session import Device
from convoy_service.errors import BrokenVersion, ConvoyError
from convoy_service.ipc.engine_client import Engines, RemoteBatcher
from convoy_service.ipc.engine_server import EngineServer, Hosted, listen
from convoy_service.ipc.protocol import ModelInfo
from convoy_service.lifecycle.manager import Alone, Director, Refused, leave
from convoy_service.registry.registry import (
    Loaded,
    Made,
    Make,
    ModelState,
    Repository,
    Route,
    Served,
    runs_here,
)
from convoy_service.registry.shadow_runner import Trials
from convoy_service.server.frontend import HTTP_FLAG, Acceptor, is_short, no_port
from convoy_service.settings import Settings, default_models
from convoy_service.telemetry.counters import Metrics, Snapshot, Statistics, merge, statistics

log = logging.getLogger("convoy.workers")

# A worker that lived this long had begun well: the next one is started at once. Others wait, each
# time twice as long, up to the longest.
_SETTLED_S, _RETRY_S, _LONGEST_RETRY_S = 30.0, 0.2, 10.0
# The longest for one that can't load what others have.
_LACKING_S = 60.0

# What a killed worker counted after the last time it was asked is lost.
_ASK_S = 1.0
# How long /metrics waits for workers that are busy, and how many questions one may leave open: more
# would fill its pipe, and then who asks would wait for it.
_ANSWER_S, _OPEN_QUESTIONS = 0.5, 10

# How long an acceptor may take to hear from engines what the supervisor has heard already.
_NEWS_S = 5.0

# After the time for draining, how long a worker may take to end.
_END_S = 5.0


def log_to_stderr(settings: Settings, process: str = "") -> None:
    logging.basicConfig(
        level=settings.log_level.upper(),
        format=f"%(asctime)s %(levelname)-8s {process and process + ' '}%(name)s: %(message)s",
        stream=sys.stderr,
    )


class Load(NamedTuple):
    """A version to load. By others that have it already: `digest` (these contents), `variant` (which
    graph), the `device` that engines have it on, and `fallback` (why not otherwise). `proof`: that it
    works, of a process that serves nobody.
    """

    name: str
    version: int
    gently: bool = False
    digest: str = ""
    variant: str = ""
    device: str = ""
    fallback: str = ""
    proof: Proof | None = None


class Present(NamedTuple):
    """What is decided: which versions every worker has, which of them answers whom, and what callers
    are told of all of them.
    """

    loads: tuple[Load, ...] = ()
    routes: tuple[tuple[str, Route], ...] = ()
    states: tuple[ModelState, ...] = ()


@dataclass(frozen=True)
class Orders:
    """What a worker is to be. With `engines` (paths) it hands its rows to these; with a `listener`
    (file descriptor) it is an engine; with neither it does everything. `present`: what it has before
    it is ready; it takes calls then, if `open`, else when it is told.
    """

    name: str
    settings: Settings
    budget: Budget
    port: int = 0
    http_port: int | None = None
    listener: int = -1
    engines: tuple[str, ...] = ()
    # The folder of the regions that callers have registered; "" where they may not.
    regions: str = ""
    present: Present = Present()  # noqa: RUF009 (it never changes)
    open: bool = False


# Not `-m`: what is pickled would then be of two modules. Workers import what this process does, also
# where the working directory has a folder named as one of ours.
_MAIN = "import sys; sys.path[:] = sys.argv[3:]; from convoy_service.server.supervisor import main; main()"

_SIGNALS = {signal.SIGTERM, signal.SIGINT}


# The worker's side.


def main() -> None:
    """A worker's process. Its arguments are file descriptors: of its pipe, and of its crash report."""
    CrashReport.write_to(int(sys.argv[2]))
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
        self._trials = Trials(orders.settings, self._metrics)
        self._sending = threading.Lock()
        self.bug: BaseException | None = None
        self._stop: Callable[[float], None] = lambda delay_s: os._exit(0)
        self._open = threading.Event()
        self._lacks = False  # something that the others have
        # Those that run the batches, if others do; and what they said of each model and version.
        self._engines: Engines | None = None
        self._told: dict[tuple[str, int], Load] = {}
        # What callers want of the supervisor.
        self._asked: dict[int, queue.SimpleQueue[Any]] = {}
        self._numbers = itertools.count()

    def _begin(self, make: Make) -> tuple[Repository, Alone]:
        """Begins to load what is decided already, and to listen to the supervisor."""
        orders = self._orders
        folder = Path(orders.settings.models or default_models())
        trials = None if self._engines else self._trials
        repository = Repository(folder, orders.settings, orders.budget, self._metrics, make, trials)
        return repository, Alone(repository)

    def _join(self, crew: Alone) -> None:
        """Takes part: loads what is decided already, then what the supervisor says."""
        crew.start()
        present = self._orders.present
        for load in present.loads:
            self._load(crew, load, partial(self._born_with, load))
        for name, route in present.routes:
            crew.route(name, route, lambda: None)
        crew.show(present.states)
        if self._orders.open:
            # After all that is loaded by then, or when it is told to: see `Supervisor._lacks`.
            crew.then(lambda: None if self._lacks else self._open.set())
        threading.Thread(target=self._listen, args=(crew,), daemon=True).start()

    def _load(self, crew: Alone, load: Load, done: Callable[[Loaded | Refused], None]) -> None:
        self._told[load.name, load.version] = load
        crew.load(
            load.name,
            load.version,
            load.gently,
            done,
            digest=load.digest,
            variant=load.variant,
            proof=load.proof,
        )

    def _loaded(self, number: int, load: Load, outcome: Loaded | Refused) -> None:
        """The engines have it, too, but this process hears of that on another thread."""
        if self._engines and isinstance(outcome, Loaded):
            self._engines.wait_for(load.name, load.version, _NEWS_S)
        self._tell("loaded", (number, outcome))

    def _born_with(self, load: Load, outcome: Loaded | Refused) -> None:
        if isinstance(outcome, Refused):
            self._lacks = True
            self._tell("lost", (load.name, load.version, outcome.reason))

    def _listen(self, crew: Alone) -> None:
        try:
            while True:
                kind, value = self._pipe.recv()
                self._obey(crew, kind, value)
        # Nobody is left who would start another worker, or ask this one for its metrics.
        except (EOFError, OSError):
            pass
        # Deaf, it would only be in the way of the next one.
        except Exception:
            log.critical("bug in a worker", exc_info=True)
        os._exit(1)

    def _obey(self, crew: Alone, kind: str, value: Any) -> None:
        if kind == "stop":
            self._stop(value)
        elif kind == "snapshot":
            self._tell("snapshot", (value, self._metrics.snapshot()))
        elif kind == "load":
            number, load = value
            self._load(crew, load, partial(self._loaded, number, load))
        elif kind == "unload":
            number, name, version = value
            crew.unload(name, version, lambda: self._tell("unloaded", number))
        elif kind == "route":
            number, name, route = value
            crew.route(name, route, lambda: self._tell("routed", number))
        elif kind == "show":
            crew.show(value)
        elif kind == "open":
            self._open.set()
        elif kind == "answer":
            number, answer = value
            self._asked.pop(number).put(answer)

    def _tell(self, kind: str, value: Any) -> None:
        # Where nobody hears it, the end of the pipe is for `_listen` to see.
        with self._sending, suppress(OSError):
            self._pipe.send((kind, value))

    def _order(self, verb: str, name: str, versions: Sequence[int]) -> None:
        """Has the supervisor's Director carry out what an operator says: see `orders.Order`."""
        if error := self._ask("order", verb, name, tuple(versions)):
            raise error

    def _statistics(self) -> dict[tuple[str, str], Statistics]:
        """Of the whole service."""
        found: dict[tuple[str, str], Statistics] = self._ask("statistics")
        return found

    def _ask(self, kind: str, *value: Any) -> Any:
        number = next(self._numbers)
        answer = self._asked[number] = queue.SimpleQueue()
        self._tell("ask", (kind, number, *value))
        return answer.get()

    def _on_bug(self, bug: BaseException) -> None:
        self.bug = bug
        self._stop(0.0)

    def _runs_here(self) -> Make:
        orders = self._orders
        return runs_here(orders.settings, orders.budget, self._metrics, self._on_bug, self._trials)

    def engine(self) -> None:
        repository, crew = self._begin(self._runs_here())
        server = EngineServer(socket.socket(fileno=self._orders.listener))

        def start(served: Served) -> None:
            assert isinstance(served.batcher, Batcher)
            inline = is_short(served)
            if not inline:
                served.batcher.start()
            server.host(Hosted(_info(served.bundle, served.device), served.batcher, inline))

        def stop(served: Served) -> None:
            assert isinstance(served.batcher, Batcher)
            server.drop(served.batcher)

        repository.attach(start, stop, lambda: None)
        self._stop = lambda delay_s: server.close()
        self._join(crew)
        threading.Thread(target=self._say_when_open, daemon=True).start()
        server.serve()
        repository.close()
        leave(1 if self.bug else 0, crew.busy)

    def _say_when_open(self) -> None:
        self._open.wait()
        self._tell("ready", True)

    def acceptor(self) -> None:
        orders, acceptor = self._orders, None
        make = self._runs_here()
        if orders.engines:
            self._engines = Engines(
                orders.engines,
                on_change=lambda path, models: acceptor.changed() if acceptor else None,
                on_bug=self._on_bug,
            )
            make = self._runs_there(self._engines)
        repository, crew = self._begin(make)
        acceptor = Acceptor(
            orders.settings,
            repository,
            self._metrics,
            one_core=orders.budget.cores < 2 * orders.budget.acceptors,
            shared_port=True,
            on_ready=lambda ready: self._tell("ready", ready),
            statistics=self._statistics,
            order=self._order,
            memory=SharedMemory(Path(orders.regions)) if orders.regions else None,
        )
        self._join(crew)
        self._open.wait()
        acceptor.bind(orders.port)
        if orders.http_port is not None:
            acceptor.bind_http(orders.http_port)
        self._stop = acceptor.stop
        acceptor.run()
        repository.close()
        if self._engines:
            self._engines.close()
        leave(1 if self.bug else 0, crew.busy)

    def _runs_there(self, engines: Engines) -> Make:
        """What makes a batcher whose batches run in the engines."""
        max_wait_s = self._orders.settings.max_wait_s

        def make(
            bundle: Bundle,
            variant: str = "",
            gently: bool = False,  # noqa: ARG001
            proof: Proof | None = None,  # noqa: ARG001
        ) -> Made:
            told = self._told[bundle.name, bundle.version]
            info = _info(bundle, told.device)
            batcher = RemoteBatcher(engines, info, max_wait_s=max_wait_s)
            return Made(told.device, variant, batcher, told.fallback)

        return make


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


class _Loading:
    """A version on its way into the workers: first the engines, if there are any, then the acceptors."""

    def __init__(self, load: Load, done: Callable[[Loaded | Refused], None], engines: bool) -> None:
        self.load, self.done = load, done
        self.engines = engines  # it is their turn
        # By the places in the crew.
        self.waiting: set[_Member] = set()
        self.outcomes: dict[_Member, Loaded | Refused] = {}
        self.first: Loaded | None = None


class _Routing:
    """A route on its way to the workers."""

    def __init__(self, done: Callable[[], None]) -> None:
        self.done = done
        self.waiting: set[_Member] = set()


class _Unloading:
    """A version on its way out: first of the acceptors, then of the engines."""

    def __init__(self, name: str, version: int, done: Callable[[], None]) -> None:
        self.name, self.version, self.done = name, version, done
        self.engines = False
        self.asked: set[_Member] = set()
        self.waiting: set[_Member] = set()


class _Member:
    """A place in the crew, and the process that fills it, if one does."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None
        self.crash: CrashReport | None = None
        self.ready = self.stopped = False
        # What it has counted, as it said when it answered this question; how many are open; and what
        # those counted who were here before.
        self.snapshot: Snapshot = {}
        self.answered = self.open = 0
        self.past: Snapshot = {}
        self.started = 0.0
        self.start_at = 0.0
        self.backoff = Backoff(_RETRY_S)
        self.lacks = False  # something that others have

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
    """Starts the workers, replaces those that die, adds their metrics up, and stops them in order. It is
    the crew of the `Director` that it holds: see `life.Crew`.
    """

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
        # What other threads want done on this one.
        self._posted: deque[Callable[[], object]] = deque()
        # What is decided.
        self._loads: dict[tuple[str, int], Load] = {}
        self._routes: dict[str, Route] = {}
        self._states: tuple[ModelState, ...] = ()
        self._open = False  # all that was there at the beginning has been judged
        self._numbers = itertools.count(1)
        self._loading: dict[int, _Loading] = {}
        self._routing: dict[int, _Routing] = {}
        self._unloading: dict[int, _Unloading] = {}
        self._director = Director(
            Path(settings.models or default_models()),
            self,
            self._metrics,
            watch_s=settings.watch_s,
            rollback_window_s=settings.rollback_window_s,
            snapshot=self.snapshot,
        )

    def run(self, on_ready: Callable[[str, int, int | None], None]) -> int:
        """Until `stop`, and all have ended; the exit status. `on_ready` hears what serves, and the
        ports of gRPC and HTTP, when all are ready for the first time.
        """
        settings, cores = self._settings, usable_cores()
        acceptors, engines = settings.acceptors, settings.engines
        budget = split(cores, acceptors, engines, settings.decode_threads, settings.run_threads)
        log.info("%s", budget)
        self._metrics.budget(budget)
        with (
            tempfile.TemporaryDirectory(prefix="convoy-") as folder,
            shared_memory.folder(settings.allow_shared_memory) as regions,
            _reserve(settings.host, settings.port, "--port") as port,
            (
                _reserve(settings.host, settings.http_port, HTTP_FLAG)
                if settings.http
                else nullcontext()
            ) as http,
        ):
            self._port = port.getsockname()[1]
            self._http_port = http.getsockname()[1] if http else None
            paths = tuple(str(Path(folder) / f"engine-{n}") for n in range(engines))
            listeners = [listen(path) for path in paths]
            for n, listener in enumerate(listeners):
                here = on_card(settings, n)
                self._members.append(
                    _Member(Orders(f"engine-{n}", here, budget, listener=listener.fileno()))
                )
            for n in range(acceptors):
                here = settings if engines else on_card(settings, n)
                orders = Orders(
                    f"acceptor-{n}",
                    here,
                    budget,
                    self._port,
                    self._http_port,
                    engines=paths,
                    regions=str(regions or ""),
                )
                self._members.append(_Member(orders))
            direct = threading.Thread(target=self._direct, name="director", daemon=True)
            direct.start()
            try:
                while not self._ended():
                    self._mind(on_ready)
            finally:
                self._director.close()
                self.kill()
                for listener in listeners:
                    listener.close()
        log.info("stopped")
        return 1 if self._failed else 0

    def _direct(self) -> None:
        """The Director's first turns, on a thread; it goes on on one of its own."""
        try:
            self._director.settle(lambda: self._delay_s is not None)
        except ConvoyError as error:
            log.error("%s", error)
            self._failed = True
            self.stop(0.0)
        except Exception:
            log.exception("bug in the life of versions")
            self._failed = True
            self.stop(0.0)
        else:
            self._post(self._open_all)
            self._director.start()

    def in_use(self) -> set[tuple[str, int]]:
        """See `life.Director`."""
        return self._director.in_use()

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

    def _mind(self, on_ready: Callable[[str, int, int | None], None]) -> None:
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
                while self._posted:
                    self._posted.popleft()()
            else:
                self._hear(pipes[source])  # type: ignore[index]
        if self._delay_s is None and not self._was_ready and all(m.ready for m in self._members):
            self._was_ready = True
            on_ready(self._director.serving(), self._port, self._http_port)

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
            if not member.process and (not member.orders.engines or self._open)
        ]

    def _start_due(self, now: float) -> None:
        for member in self._missing():
            if member.start_at <= now:
                self._start(member, now)

    def _present(self) -> Present:
        return Present(tuple(self._loads.values()), tuple(self._routes.items()), self._states)

    def _start(self, member: _Member, now: float) -> None:
        member.started = now
        member.orders = replace(member.orders, present=self._present(), open=self._open)
        try:
            process, pipe, crash = _spawn(member.orders)
        except OSError as error:
            if not self._was_ready:
                raise
            # Processes, files or memory may be there again by and by.
            self._put_off(member, now, f"can't be started ({error})")
            return
        with self._changed:
            member.process, member.pipe, member.crash = process, pipe, crash
            member.answered, member.open = self._questions, 0
            _send(member.pipe, "orders", member.orders)  # where it has died, its pipe says so
        self._metrics.process_started(member.orders.name)
        # What is on its way by now.
        for number in list(self._loading):
            self._go_on_loading(number)

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
            if kind == "ready":
                member.ready = value
        if kind == "ready":
            self._tell_ready(member)
        elif kind == "loaded":
            self._was_loaded(member, *value)
        elif kind == "unloaded":
            self._was_unloaded(member, value)
        elif kind == "routed":
            self._was_routed(member, value)
        elif kind == "lost":
            self._lacks(member, *value)
        elif kind == "ask":
            what, number, *asked = value
            find = self._statistics if what == "statistics" else partial(self._order, *asked)
            threading.Thread(
                target=self._answer, args=(member, member.pipe, number, find), daemon=True
            ).start()

    def _lacks(self, member: _Member, name: str, version: int, reason: str) -> None:
        """A worker that was started anew can't load what the others have. It is not needed while these
        serve; and tries again, as a process of its own. Where there are none, something else must.
        """
        others = (m for m in self._members if m is not member and m.engine == member.engine)
        if any(each.ready for each in others):
            log.error("%s can't load %s/%d: %s", member.orders.name, name, version, reason)
            member.lacks = True
            assert member.process
            member.process.kill()
        else:
            self._director.lost(name, version, f"{member.orders.name}: {reason}")
            if self._open:
                self._say(member, "open", None)

    def _tell_ready(self, member: _Member) -> None:
        name = member.orders.name
        if member.ready:
            log.info("%s is ready (pid %d)", name, member.process and member.process.pid)
        elif self._stopping is None:
            log.warning("%s is not ready", name)

    def _answer(
        self, member: _Member, pipe: Connection, number: int, find: Callable[[], object]
    ) -> None:
        """What a caller wants, of an acceptor by this pipe. On a thread of its own."""
        answer = find()

        def reply() -> None:
            if member.pipe is pipe:  # else nobody is left to hear it
                self._say(member, "answer", (number, answer))

        self._post(reply)

    def _statistics(self) -> dict[tuple[str, str], Statistics]:
        return statistics(self.snapshot())

    def _order(self, verb: str, name: str, versions: Sequence[int]) -> ConvoyError | None:
        try:
            self._director.order(verb, name, versions)
        except ConvoyError as error:
            return error.with_traceback(None)
        except Exception:
            log.exception("an order failed")
            return ConvoyError("internal error: please report it; the server's log says more")
        return None

    # The Director's verbs, from its threads: they are done on the supervisor's.

    def load(
        self, name: str, version: int, gently: bool, done: Callable[[Loaded | Refused], None]
    ) -> None:
        def begin(proof: Proof | None = None) -> None:
            engines = any(member.engine for member in self._members)
            number = next(self._numbers)
            load = Load(name, version, gently, proof=proof)
            self._loading[number] = _Loading(load, done, engines)
            self._go_on_loading(number)

        def prove() -> None:
            try:
                proof = aside.prove(self._director.folder / name / str(version), self._settings)
            except BrokenVersion as error:
                done(Refused.by(error))
            else:
                self._post(partial(begin, proof))

        if gently:
            threading.Thread(target=prove, name="prove", daemon=True).start()
        else:
            self._post(begin)

    def route(self, name: str, route: Route, done: Callable[[], None]) -> None:
        def begin() -> None:
            self._routes[name] = route
            number = next(self._numbers)
            self._routing[number] = _Routing(done)
            for member in self._members:
                if self._say(member, "route", (number, name, route)):
                    self._routing[number].waiting.add(member)
            self._was_routed(None, number)

        self._post(begin)

    def unload(self, name: str, version: int, done: Callable[[], None]) -> None:
        def begin() -> None:
            self._loads.pop((name, version), None)
            number = next(self._numbers)
            self._unloading[number] = _Unloading(name, version, done)
            self._go_on_unloading(number)

        self._post(begin)

    def show(self, states: Sequence[ModelState]) -> None:
        def do() -> None:
            self._states = tuple(states)
            names = {state.name for state in states}
            self._routes = {name: r for name, r in self._routes.items() if name in names}
            self._say_to_all("show", self._states)

        self._post(do)

    def _post(self, callback: Callable[[], object]) -> None:
        self._posted.append(callback)
        os.eventfd_write(self._bell, 1)

    def _say(self, member: _Member, kind: str, value: Any) -> bool:
        # /metrics asks on threads of its own.
        with self._changed:
            return bool(member.pipe and _send(member.pipe, kind, value))

    def _say_to_all(self, kind: str, value: Any) -> None:
        for member in self._members:
            self._say(member, kind, value)

    def _open_all(self) -> None:
        self._open = True
        self._say_to_all("open", None)

    def _go_on_loading(self, number: int) -> None:
        """Asks those whose turn it is and who have not been asked; goes on where all have answered."""
        loading = self._loading[number]
        turn = [member for member in self._members if member.engine == loading.engines]
        runs_batches = not turn[0].orders.engines
        for member in turn:
            if member.pipe and member not in loading.waiting | loading.outcomes.keys():
                self._say(member, "load", (number, loading.load))
                loading.waiting.add(member)
        # While all who run batches are dead, it waits for the next ones.
        if loading.waiting or (runs_batches and not loading.outcomes):
            return
        refused = [each for each in loading.outcomes.values() if isinstance(each, Refused)]
        loaded = [each for each in loading.outcomes.values() if isinstance(each, Loaded)]
        load = loading.load
        if not refused and len({each.digest for each in loaded}) > 1:
            refused = [Refused("its folder was changed while it was loaded", passing=True)]
        if refused:
            self._give_up_loading(number, refused[0])
            return
        variants = {each.variant for each in loaded}
        if len(variants) > 1:
            # Some fell back to what all can have.
            loading.load = load._replace(variant="fp32")
            for member, outcome in list(loading.outcomes.items()):
                if isinstance(outcome, Loaded) and outcome.variant != "fp32":
                    del loading.outcomes[member]
            self._go_on_loading(number)
            return
        if loaded:
            first = loaded[0]
            loading.load = load._replace(
                digest=first.digest,
                variant=first.variant,
                device=load.device or first.device,
                fallback=load.fallback or next((e.fallback for e in loaded if e.fallback), ""),
            )
            loading.first = loading.first or first
        if loading.engines:
            loading.engines, loading.outcomes = False, {}
            self._go_on_loading(number)
            return
        del self._loading[number]
        self._loads[load.name, load.version] = loading.load._replace(gently=False, proof=None)
        assert loading.first
        loading.done(loading.first)

    def _give_up_loading(self, number: int, why: Refused) -> None:
        loading = self._loading.pop(number)
        name, version = loading.load.name, loading.load.version
        if (name, version) not in self._loads:  # else it serves, and only was to be loaded anew
            # Number 0: nobody waits for the answer.
            self._say_to_all("unload", (0, name, version))
        loading.done(why)

    def _was_loaded(self, member: _Member, number: int, outcome: Loaded | Refused) -> None:
        loading = self._loading.get(number)
        if loading:
            loading.waiting.discard(member)
            loading.outcomes[member] = outcome
            self._go_on_loading(number)

    def _go_on_unloading(self, number: int) -> None:
        unloading = self._unloading[number]
        for member in self._members:
            if member.pipe and member.engine == unloading.engines and member not in unloading.asked:
                self._say(member, "unload", (number, unloading.name, unloading.version))
                unloading.asked.add(member)
                unloading.waiting.add(member)
        if unloading.waiting:
            return
        if not unloading.engines:
            unloading.engines = True
            self._go_on_unloading(number)
            return
        del self._unloading[number]
        unloading.done()

    def _was_unloaded(self, member: _Member, number: int) -> None:
        unloading = self._unloading.get(number)
        if unloading:
            unloading.waiting.discard(member)
            self._go_on_unloading(number)

    def _was_routed(self, member: _Member | None, number: int) -> None:
        routing = self._routing.get(number)
        if routing:
            if member:
                routing.waiting.discard(member)
            if not routing.waiting:
                del self._routing[number]
                routing.done()

    def _forget(self, member: _Member) -> None:
        """It is dead: nobody waits for it any more."""
        for number, loading in list(self._loading.items()):
            if member in loading.waiting:
                loading.waiting.discard(member)
                if not member.lacks:  # else that is not what it died of
                    reason = f"{member.orders.name} died while it was loaded"
                    loading.outcomes[member] = Refused(reason, passing=True)
            elif isinstance(loading.outcomes.get(member), Loaded):
                del loading.outcomes[member]  # whoever takes its place is asked again
            if number in self._loading:
                self._go_on_loading(number)
        for number in list(self._routing):
            self._was_routed(member, number)
        for number in list(self._unloading):
            self._was_unloaded(member, number)

    def _bury(self, member: _Member) -> None:
        """Its pipe is closed: it has ended, or does at once."""
        assert member.process
        assert member.pipe
        assert member.crash
        status = member.process.wait()
        end, stacks = ending(member.process), member.crash.read()
        now, name = time.monotonic(), member.orders.name
        if status < 0 and -status not in {signal.SIGKILL, signal.SIGTERM}:
            log.critical(
                "%s crashed (%s). Its threads were at:\n%s", name, end, stacks or "unknown"
            )
        member.crash.close()
        with self._changed:
            member.pipe.close()
            member.past = merge([], [member.past, member.snapshot])
            member.process = member.pipe = member.crash = None
            member.snapshot, was_ready, member.ready = {}, member.ready, False
            self._changed.notify_all()
        self._forget(member)
        if self._delay_s is not None:
            # Those that were killed on purpose ended by SIGKILL.
            on_purpose = status == -signal.SIGKILL and (self._killed or member.lacks)
            if status and not on_purpose:
                log.error("%s died while the service stopped (%s)", name, end)
                # Some of its calls had no answer: this is no clean stop.
                self._failed = True
            return
        # A worker that lacks a version was killed on purpose: the others can do without it.
        if not was_ready and not self._was_ready and not member.lacks:
            log.error("%s could not start (%s)", name, end)
            self._failed = True
            self.stop(0.0)
            return
        self._put_off(member, now, f"died ({end})")

    def _put_off(self, member: _Member, now: float, reason: str) -> None:
        """The next one is started at once where the last had settled, else after a while."""
        delay_s = 0.0
        longest_s = _LACKING_S if member.lacks else _LONGEST_RETRY_S
        if member.started < now - _SETTLED_S and not member.lacks:
            member.backoff.reset()
        else:
            delay_s = member.backoff.next_s(longest_s)
        member.lacks = False
        member.start_at = now + delay_s
        log.error("%s %s: the next one starts in %.1f s", member.orders.name, reason, delay_s)

    def _begin_stop(self, now: float) -> None:
        assert self._delay_s is not None
        if self._delay_s:
            log.info("not ready; still answering for %g s", self._delay_s)
        self._stopping = now + self._delay_s + self._settings.drain_grace_s + _END_S
        for member in self._members:
            if not member.engine:
                self._say(member, "stop", self._delay_s)

    def _ended(self) -> bool:
        """Whether all have ended. Engines are stopped when no acceptor is left to ask them."""
        if self._stopping is None:
            return False
        alive = [member for member in self._members if member.process]
        if all(member.engine for member in alive):
            for member in alive:
                if not member.stopped:
                    member.stopped = self._say(member, "stop", 0.0)
        return not alive


def _spawn(orders: Orders) -> tuple[subprocess.Popen[bytes], Connection, CrashReport]:
    """A worker's process that waits for its orders, the pipe to it, and what it writes if it crashes.
    Raises OSError.
    """
    passed = [orders.listener] if orders.listener >= 0 else []
    # Signals are for this process, also where a terminal sends them to all: a worker is born with
    # them blocked, and stays so.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        crash = CrashReport()
        with ExitStack() as stack:
            ours, theirs = map(stack.enter_context, socket.socketpair())
            kept = stack.enter_context(ExitStack())
            kept.callback(crash.close)
            descriptors = [theirs.fileno(), crash.descriptor]
            process = subprocess.Popen(
                [sys.executable, "-c", _MAIN, *map(str, descriptors), *sys.path],
                pass_fds=[*descriptors, *passed],
            )
            kept.pop_all()
            return process, Connection(ours.detach()), crash
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _send(pipe: Connection, kind: str, value: Any) -> bool:
    try:
        pipe.send((kind, value))
    except OSError:
        return False
    return True


def _reserve(host: str, port: int, flag: str) -> socket.socket:
    """A socket that keeps the port for the acceptors, which share it: nobody else may have it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            # A port in use by an SO_REUSEPORT server would be shared with it, unnoticed.
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind((host, port))
        shared = socket.socket(family, socket.SOCK_STREAM)
        shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        shared.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise no_port(host, port, flag, reason) from error
    return shared
