"""Calls as they come over the wire, on one loop: grpcio's core without grpcio's servers.

`CoreServer` drives `grpc._cython.cygrpc`, the pieces that grpcio's own servers are written on, from
one thread, which takes whatever has arrived before it starts the next batch. That is a private
interface, so only releases that were tried are trusted with it; on others `serve` falls back to
`PublicServer`, which gives the same calls to the same loop from grpcio's threaded server.

Everything that is handed in here is called on the loop's thread, except where it says otherwise.
"""

import heapq
import itertools
import logging
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import grpc

from convoy_service.tasks import ignore
from convoy_service.transport.doorbell import Doorbell

log = logging.getLogger("convoy.transport")

# Releases of grpcio, from and below, whose private interface tests/unit/test_transport.py has held
# against the public one.
_TRIED = ((1, 81), (1, 86))

# How long the loop sleeps where nothing happens. Python runs signal handlers between its sleeps.
_NAP_S = 0.2

# How long the last answers may take on their way when it stops.
_CLOSE_S = 0.2

# While calls keep coming, a batch starts after this many events at the latest: with less, calls age
# in the transport when there are more than can be answered; with more, those that were read do.
_EVENTS_A_BATCH = 1000

# Calls that gRPC may hand over before it is asked again: a burst costs fewer turns.
_ASKED = 64

# Timers that were taken back are cleared away when they are so many more than the others.
_FORGOTTEN = 100

# From here on a deadline is none: gRPC says "never" in seconds since 1970.
_NEVER_S = 1e11

# The public server's threads: each call that is worked on holds one, and one while it is read.
_THREADS = 256

Options = Sequence[tuple[str, int]]
Trailers = Sequence[tuple[str, str]]


class Http(NamedTuple):
    """The request that a call was made of: its method, its path, that with the parameters' names, the
    scheme, when it `arrived`, and with which status each of gRPC's is answered.
    """

    verb: str
    path: str
    route: str
    scheme: str
    arrived: float
    statuses: Mapping[str, int]


class Exchange(ABC):
    """One call: messages in, messages and a status out.

    `method` is its path, `deadline` on `time.monotonic`'s clock. `gone` is true, and `on_gone` is
    called, once nobody waits for an answer: the caller hung up, or the deadline passed. `on_closed`
    is called when all is over, however it ended.
    """

    __slots__ = ("_due", "deadline", "gone", "metadata", "method", "on_closed", "on_gone")

    # Of those that came over HTTP.
    http: Http | None = None

    def __init__(self, method: str, deadline: float | None, metadata: Any) -> None:
        self.method, self.deadline, self.metadata = method, deadline, metadata
        self.gone = False
        self.on_gone: Callable[[], None] = ignore
        self.on_closed: Callable[[], None] = ignore
        self._due = 0  # what was begun and is not over

    def _done(self) -> None:
        self._due -= 1
        if not self._due:
            on_closed = self.on_closed
            # What these hold, holds this: without them it goes as soon as gRPC lets go of it.
            self.on_gone = self.on_closed = ignore
            on_closed()

    @abstractmethod
    def accept(self) -> None:
        """Once, before anything else, for a call that is not refused."""

    @abstractmethod
    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        """Ends a call at once, unread: what costs least."""

    @abstractmethod
    def read(self, then: Callable[[bytes | None], None]) -> None:
        """Asks for the next message; None where there is none any more."""

    @abstractmethod
    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        """Sends one of several answers, the next only after `then`. `more`: it follows at once."""

    @abstractmethod
    def end(
        self,
        code: int,
        details: str = "",
        trailers: Trailers = (),
        message: bytes | None = None,
    ) -> None:
        """Sends the status, after the one and only answer where a `message` is given."""


class Loop(ABC):
    """Runs calls, timers, and between them whatever work waits."""

    def __init__(self) -> None:
        self.on_call: Callable[[Exchange], None] = ignore
        # Work for this thread: `step` does a piece of it where `waiting`, and may take its time.
        self.waiting: Callable[[], bool] = bool
        self.step: Callable[[], object] = ignore
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int]] = []
        self._due: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self._stopping = False
        # As `threading.get_ident` says.
        self.thread = 0

    def post(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the loop's thread, soon. Any thread may call this."""
        self._posted.append(callback)
        self._wake()

    def at(self, when: float, callback: Callable[[], None]) -> int:
        """Has `callback` called at `when`, on `time.monotonic`'s clock; give or take 2 ms. What it
        gives is for `forget`.
        """
        timer = next(self._numbers)
        self._due[timer] = callback
        heapq.heappush(self._timers, (when, timer))
        return timer

    def forget(self, timer: int) -> None:
        """Has it not called any more, if it has not been."""
        self._due.pop(timer, None)
        if len(self._timers) > 2 * len(self._due) + _FORGOTTEN:
            self._timers = [each for each in self._timers if each[1] in self._due]
            heapq.heapify(self._timers)

    def stop(self) -> None:
        """Has `run` return as soon as it can. Calls that are not over are cancelled."""
        self._stopping = True

    @abstractmethod
    def bind(self, address: str, credentials: "grpc.ServerCredentials | None") -> int:
        """The port it listens on. Raises RuntimeError where it can't."""

    @abstractmethod
    def run(self) -> None:
        """Takes calls until `stop`."""

    @abstractmethod
    def _wake(self) -> None:
        """Ends the sleep of the loop. Any thread may call this."""

    def _chores(self) -> float:
        """Runs what is due; the seconds until something is again."""
        for _ in range(len(self._posted)):
            self._posted.popleft()()
        while self._timers:
            wait = self._timers[0][0] - time.monotonic()
            if wait > 0:
                return min(wait, _NAP_S)
            self._due.pop(heapq.heappop(self._timers)[1], ignore)()
        return _NAP_S

    def _while_it_stops(self, event: Callable[[], None]) -> None:
        """A bug must not keep it from stopping, and there may be one more for each call."""
        try:
            event()
        except Exception:
            log.exception("bug while the server stops")


class CoreServer(Loop):
    """On grpcio's core. One thread polls the one completion queue and does everything else.

    Every object of grpcio's core belongs to that thread, but for the doorbell, which any thread may
    ring: docs/private-grpcio.md.
    """

    def __init__(self, options: Options) -> None:
        super().__init__()
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        self.core = cygrpc
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(tuple(options), False)
        self._server.register_completion_queue(self._queue)
        self._doorbell = Doorbell(cygrpc, self._queue, self._chores)
        # How long calls may have lain in a socket before they were read.
        self._away_s = 0.0
        self._shut = False

    def bind(self, address: str, credentials: "grpc.ServerCredentials | None") -> int:
        if credentials is None:
            port = self._server.add_http2_port(address.encode())
        else:
            port = self._server.add_http2_port(address.encode(), credentials._credentials)  # type: ignore[attr-defined]
        if not port:
            raise RuntimeError(f"can't listen on {address}")
        return int(port)

    def run(self) -> None:
        self.thread = threading.get_ident()
        self._doorbell.open()
        self._server.start(backup_queue=False)
        for _ in range(_ASKED):
            self._ask()
        try:
            self._take_events()
        finally:
            self._close()

    def _take_events(self) -> None:
        poll, timed_out = self._queue.poll, self.core.CompletionType.queue_timeout
        nap, events, began = self._chores(), 0, time.monotonic()
        while not self._stopping:
            # A deadline in 1970 asks for what is there now. One that has just passed would wait for
            # a millisecond.
            event = poll(0.0)
            if event.completion_type == timed_out:
                waiting = self.waiting()
                if waiting:
                    # Threads of gRPC's own read too now and then, and may want this core.
                    os.sched_yield()
                # The first may have found no more than that an operation of ours was over.
                event = poll(0.0)
                if event.completion_type == timed_out and not waiting:
                    event = poll(time.time() + nap)
                    events, began, self._away_s = 0, time.monotonic(), 0.0
            nothing = event.completion_type == timed_out
            if not nothing:
                event.tag(event)
                # It holds the call: kept over the next poll, it would be closed late.
                event = None
                events += 1
            if nothing or events >= _EVENTS_A_BATCH:
                since = time.monotonic() if nothing else began
                if self.waiting():
                    self.step()
                events, began = 0, time.monotonic()
                self._away_s = began - since
            if self._posted or self._timers:
                nap = self._chores()

    def _ask(self) -> None:
        self._server.request_call(self._queue, self._queue, self._on_call)

    def _on_call(self, event: Any) -> None:
        if not event.success:  # so it is for those still asked for when the server shuts down
            return
        if not self._stopping:
            self._ask()
        details = event.call_details
        deadline: float | None = details.deadline
        if deadline is not None:
            # gRPC counts from when it read the call, which under load lay in a socket before: at
            # worst since this thread last left them alone.
            left_s = deadline - time.time() - self._away_s
            deadline = None if deadline > _NEVER_S else time.monotonic() + left_s
        self.on_call(
            _CoreExchange(
                self,
                event.call,
                details.method.decode(errors="replace"),
                deadline,
                event.invocation_metadata,
            )
        )

    def _wake(self) -> None:
        self._doorbell.ring()

    def _close(self) -> None:
        self._stopping = True
        self._doorbell.close()
        self._server.shutdown(self._queue, self._on_shut)
        ends = time.time() + _CLOSE_S
        while not (self._shut and self._doorbell.closed):
            event = self._queue.poll(ends)
            if event.completion_type == self.core.CompletionType.queue_timeout:
                self._server.cancel_all_calls()
                ends += _NAP_S
            else:
                self._while_it_stops(partial(event.tag, event))
            event = None
        self._queue.shutdown()
        while self._queue.poll().completion_type != self.core.CompletionType.queue_shutdown:
            pass
        self._server.destroy()
        self._doorbell.destroy()

    def _on_shut(self, _: object) -> None:
        self._shut = True


class _CoreExchange(Exchange):
    __slots__ = ("_call", "_core", "_loop", "_then", "_told")

    def __init__(
        self, loop: CoreServer, call: Any, method: str, deadline: float | None, metadata: Any
    ) -> None:
        super().__init__(method, deadline, metadata)
        self._loop, self._core, self._call = loop, loop.core, call
        self._told = False  # the initial metadata has been sent
        self._then: Callable[[bytes | None], None] = ignore

    def _start(self, operations: tuple[Any, ...], then: Callable[[Any], None]) -> None:
        # gRPC demands that batches of one call are started by one thread at a time.
        assert threading.get_ident() == self._loop.thread, "only the loop's thread may use a call"
        self._due += 1
        # What gRPC refuses would never be over.
        if self._call.start_server_batch(operations, then):
            raise RuntimeError(
                "a message or status was sent before the last one had gone, or twice"
            )

    def accept(self) -> None:
        self._start((self._core.ReceiveCloseOnServerOperation(0),), self._on_close)

    def _on_close(self, event: Any) -> None:
        if event.batch_operations[0].cancelled():
            self.gone = True
            self.on_gone()
        self._done()

    def read(self, then: Callable[[bytes | None], None]) -> None:
        self._then = then
        self._start((self._core.ReceiveMessageOperation(0),), self._received)

    def _received(self, event: Any) -> None:
        then, self._then = self._then, ignore
        then(event.batch_operations[0].message())
        self._done()

    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        def sent(_: object) -> None:
            then()
            self._done()

        # "more" is a hint that the write may be buffered. The first one would then never be over, as
        # its metadata wait for the next, which waits for this.
        send = self._core.SendMessageOperation(message, 1 if more and self._told else 0)
        self._start((*self._opening(), send), sent)

    def end(
        self,
        code: int,
        details: str = "",
        trailers: Trailers = (),
        message: bytes | None = None,
    ) -> None:
        answer = () if message is None else (self._core.SendMessageOperation(message, 0),)
        self._start((*self._opening(), *answer, self._status(code, details, trailers)), self._ended)

    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        close = self._core.ReceiveCloseOnServerOperation(0)
        self._start((*self._opening(), self._status(code, details, trailers), close), self._ended)

    def _status(self, code: int, details: str, trailers: Trailers) -> Any:
        return self._core.SendStatusFromServerOperation(trailers, code, details.encode(), 0)

    def _ended(self, _: object) -> None:
        self._done()

    def _opening(self) -> tuple[Any, ...]:
        if self._told:
            return ()
        self._told = True
        return (self._core.SendInitialMetadataOperation(None, 0),)


class PublicServer(Loop):
    """On grpcio's threaded server: its threads hand everything to the loop's and wait."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="grpc")
        # Reading blocks, and so must not be where answers are sent from.
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="grpc-read")
        self._server = grpc.server(self._pool, options=tuple(options))
        self._server.add_generic_rpc_handlers((_AnyMethod(self._handle),))

    def bind(self, address: str, credentials: "grpc.ServerCredentials | None") -> int:
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    def run(self) -> None:
        self.thread = threading.get_ident()
        self._server.start()
        try:
            self._take_events()
        finally:
            self._close()

    def _take_events(self) -> None:
        nap = self._chores()
        while not self._stopping:
            try:
                event = self._events.get(timeout=0 if self.waiting() else nap)
            except queue.Empty:
                if self.waiting():
                    self.step()
            else:
                event()
            nap = self._chores()

    def _close(self) -> None:
        stopped = self._server.stop(_CLOSE_S)
        # Threads wait for the ends of the calls that are cut off, and their callers for the rest.
        while not (stopped.is_set() and self._events.empty()):
            with suppress(queue.Empty):
                self._while_it_stops(self._events.get(timeout=_NAP_S))
        self._pool.shutdown()
        self._readers.shutdown()

    def _wake(self) -> None:
        self._events.put(ignore)

    def _handle(
        self, method: str, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """On one of the server's threads: the call's answers, until its end."""
        remaining = context.time_remaining()
        known = remaining is not None and remaining < _NEVER_S
        deadline = time.monotonic() + remaining if known and remaining is not None else None
        exchange = _PublicExchange(
            self._events,
            self._readers,
            messages,
            method,
            deadline,
            context.invocation_metadata(),
        )
        self._events.put(lambda: self.on_call(exchange))
        # It may be over already.
        if not context.add_callback(lambda: self._events.put(exchange.closed)):
            self._events.put(exchange.closed)
        yield from exchange.answers(context)


class _AnyMethod(grpc.GenericRpcHandler):
    """Takes every call as a stream of bytes both ways: on the wire a unary one is no different."""

    def __init__(self, handle: Callable[[str, Iterator[bytes], Any], Iterator[bytes]]) -> None:
        self._handle = handle

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = details.method
        return grpc.stream_stream_rpc_method_handler(
            lambda messages, context: self._handle(method, messages, context)
        )


class _PublicExchange(Exchange):
    __slots__ = ("_answers", "_ended", "_events", "_messages", "_readers")

    def __init__(
        self,
        events: "queue.SimpleQueue[Callable[[], None]]",
        readers: ThreadPoolExecutor,
        messages: Iterator[bytes],
        method: str,
        deadline: float | None,
        metadata: Any,
    ) -> None:
        super().__init__(method, deadline, metadata)
        self._events, self._readers, self._messages = events, readers, messages
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ended = False
        self._due = 1  # its end, and what is being read

    def accept(self) -> None:
        pass

    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        self.end(code, details, trailers)

    def read(self, then: Callable[[bytes | None], None]) -> None:
        self._due += 1
        self._readers.submit(self._read, then)

    def _read(self, then: Callable[[bytes | None], None]) -> None:
        try:
            message = next(self._messages, None)
        except grpc.RpcError:  # so the iterator says that the call is over
            message = None
        self._events.put(partial(self._received, then, message))

    def _received(self, then: Callable[[bytes | None], None], message: bytes | None) -> None:
        then(message)
        self._done()

    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        self._answers.put((message, then))

    def end(
        self,
        code: int,
        details: str = "",
        trailers: Trailers = (),
        message: bytes | None = None,
    ) -> None:
        if message is not None:
            self._answers.put((message, ignore))
        self._answers.put((code, details, trailers))
        self._ended = True

    def closed(self) -> None:
        """The call is over."""
        if not self._ended:
            self._answers.put(None)
            self.gone = True
            self.on_gone()
        self._done()

    def answers(self, context: grpc.ServicerContext) -> Iterator[bytes]:
        """On the server's thread."""
        while (answer := self._answers.get()) is not None:
            if len(answer) == 3:
                code, details, trailers = answer
                context.set_trailing_metadata(tuple(trailers))
                context.set_code(_CODES[code])
                context.set_details(details)
                return
            message, then = answer
            yield message
            self._events.put(then)


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def server(options: Options, public: bool = False) -> Loop:
    """The loop on grpcio's core, or on its public server where `public` asks for that, or where
    the installed grpcio is none that was tried.
    """
    if public:
        return PublicServer(options)
    release = tuple(int(part) for part in grpc.__version__.split(".")[:2])
    if not _TRIED[0] <= release < _TRIED[1]:
        log.warning(
            "grpcio %s was not tried with this release: its public server answers, with a fraction "
            "of the throughput; install grpcio>=%d.%d,<%d.%d",
            grpc.__version__, *_TRIED[0], *_TRIED[1],
        )  # fmt: skip
        return PublicServer(options)
    try:
        return CoreServer(options)
    except (ImportError, AttributeError, TypeError):
        log.warning(
            "grpcio %s is not as expected: its public server answers, with a fraction of the "
            "throughput", grpc.__version__, exc_info=True,
        )  # fmt: skip
        return PublicServer(options)
