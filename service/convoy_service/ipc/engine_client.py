"""The acceptor's side of the channel."""

import bisect
import itertools
import logging
import math
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from convoy_service.backoff import Backoff
from convoy_service.engine.batcher import LOWEST_LEVEL, Answer, Done, Outputs, Rows
from convoy_service.errors import (
    BACK_OFF,
    Cancelled,
    ConvoyError,
    DeadlineExceeded,
    InferenceFailed,
    NotReady,
    Overloaded,
)
from convoy_service.ipc.protocol import (
    CANCEL,
    HELLO,
    LAST_STATUS,
    MAGIC,
    MOST_MODELS,
    NEWS,
    OK,
    PAGE_BYTES,
    PROTOCOL,
    REPLY,
    REQUEST,
    SUBMIT,
    TIMES_AT,
    WELCOME,
    Malformed,
    ModelInfo,
    Wire,
    bell,
    check_protocol,
    error_of,
    read_offers,
    receive_memory,
    shared_memory,
)

log = logging.getLogger("convoy.channel")

_ALIGNMENT = 64
_RETRY_S, _LONGEST_RETRY_S = 0.02, 0.5
# A request in pieces has two of them, each of this share of the memory at most.
_LARGEST_PIECE = 1 / 8
_NO_PIXELS: Rows = np.empty(0, np.uint8)

_Ended = tuple[Done, Answer | Exception]


class _Heap:
    """Blocks of variable size in `size` bytes. The lowest hole that is large enough is taken, so
    that the memory in use stays small and warm. Time grows with the holes: at most one more than
    there are blocks, and one where all blocks are of one size.
    """

    def __init__(self, size: int) -> None:
        # The holes, in order, never touching each other.
        self._starts, self._ends = [0], [size]

    def take(self, size: int) -> int | None:
        """The offset of a free block, or None where there is no room for it."""
        size += -size % _ALIGNMENT
        starts, ends = self._starts, self._ends
        for i, start in enumerate(starts):
            if ends[i] - start >= size:
                starts[i] += size
                if starts[i] == ends[i]:
                    del starts[i], ends[i]
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        end = start + size + -size % _ALIGNMENT
        starts, ends = self._starts, self._ends
        i = bisect.bisect(starts, start)
        if i and ends[i - 1] == start:
            if i < len(starts) and starts[i] == end:
                ends[i - 1] = ends.pop(i)
                del starts[i]
            else:
                ends[i - 1] = end
        elif i < len(starts) and starts[i] == end:
            starts[i] = start
        else:
            starts.insert(i, start)
            ends.insert(i, end)


class _Route:
    """A model on a connected engine."""

    __slots__ = ("index", "info", "link", "rows", "times")

    def __init__(
        self, link: "_Link", index: int, info: ModelInfo, times: "memoryview[float]"
    ) -> None:
        self.link, self.index, self.info = link, index, info
        self.times = times  # see `EngineServer`
        self.rows = 0  # that have a block

    def ahead_s(self, now: float) -> float:
        """Until those are done who are before a request that is submitted now: by what the engine
        says, and by what it may not have seen yet. 0 where nothing is known to wait; infinite where
        the engine is stopping.
        """
        done_at, row_s = self.times
        return max(done_at - now, self.rows * row_s, 0.0)

    @property
    def row_s(self) -> float:
        """What each row takes, in full batches."""
        return float(self.times[1])


class _Piece:
    """A block of shared memory, and the rows of a request that are in it."""

    __slots__ = ("number", "offset", "request", "room", "route", "rows", "start")

    def __init__(self, request: "RemoteTicket", route: _Route, offset: int, room: int) -> None:
        self.request, self.route, self.offset = request, route, offset
        self.room = room  # rows that the block holds
        self.number = self.start = self.rows = 0
        route.rows += room

    def fill(self) -> None:
        """Copies the next rows of the request, none where there are no more. Holds no lock: one
        thread at a time does it.
        """
        request, pixels = self.request, self.request.pixels
        self.start = request.taken
        stop = request.taken = min(self.start + self.room, request.total)
        self.rows = stop - self.start
        if self.rows != request.total:
            pixels = pixels[self.start : stop]
        np.ndarray(pixels.shape, np.uint8, self.route.link.memory, self.offset)[...] = pixels
        if stop == request.total:
            request.pixels = _NO_PIXELS  # those may be a whole message

    def free(self, row_bytes: int) -> None:
        """The engine has answered for it: others may have the block. The lock is held."""
        self.route.rows -= self.room
        self.route.link.heap.give_back(self.offset, self.room * row_bytes)


class RemoteTicket:
    """A submitted request. All but `cancel` is for the channel, which holds the lock."""

    __slots__ = (
        "answered", "batch", "batch_s", "batch_size", "batcher", "began", "deadline", "done", "ended",
        "failed_rows", "outputs", "pieces", "pixels", "priority", "run_s", "taken", "total",
    )  # fmt: skip

    def __init__(
        self, batcher: "RemoteBatcher", pixels: Rows, done: Done, deadline: float, priority: int
    ) -> None:
        self.batcher, self.done, self.deadline = batcher, done, deadline
        # Callers' priorities have 64 bits.
        self.priority = min(priority, LOWEST_LEVEL)
        self.pixels, self.total = pixels, len(pixels)
        self.began = time.monotonic()
        self.taken = self.answered = self.batch = self.batch_size = self.failed_rows = 0
        self.run_s = self.batch_s = 0.0
        self.outputs: Outputs | None = None
        self.pieces: list[_Piece] = []  # that engines have
        self.ended = False

    def cancel(self) -> None:
        """Ends the request, unless it has ended: `done` hears Cancelled at once, and the engines to
        run no more of it. May be called on any thread.
        """
        engines = self.batcher.engines
        with engines.lock:
            if self.ended:
                return
            self.end()
        engines.flush()
        self.done(Cancelled("the request was cancelled"))

    def take(
        self,
        piece: _Piece,
        run_s: float,
        batch_s: float,
        batch: int,
        batch_size: int,
        failed_rows: int,
    ) -> Answer | InferenceFailed | None:
        """Copies the answers for a piece out of the shared memory; gives what to tell `done` where
        they were the last.
        """
        self.run_s += run_s
        self.batch, self.batch_s = batch, batch_s
        self.batch_size = max(self.batch_size, batch_size)
        self.failed_rows += failed_rows
        route = piece.route
        found: Outputs = np.ndarray(
            (piece.rows, route.info.classes), np.float32, route.link.memory, piece.offset
        )
        if piece.rows == self.total:
            self.outputs = found.copy()
        else:
            if self.outputs is None:
                self.outputs = np.empty((self.total, route.info.classes), np.float32)
            self.outputs[piece.start : piece.start + piece.rows] = found
        self.answered += piece.rows
        if self.answered < self.total:
            return None
        if self.failed_rows == self.total:
            return InferenceFailed("the model failed on these images")
        queue_s = max(0.0, time.monotonic() - self.began - self.run_s)
        return Answer(
            self.outputs,
            queue_s,
            self.run_s,
            self.batch_size,
            self.failed_rows,
            self.batch,
            self.batch_s,
        )

    def end(self) -> None:
        """Who ends it tells `done`, when the lock is free. What engines still have is cancelled;
        its blocks are free when they have answered.
        """
        self.ended = True
        for piece in self.pieces:
            self.batcher.engines.cancel(piece)
        self.pieces.clear()
        self.pixels = _NO_PIXELS
        self.batcher.forget()


class _Link:
    """A connection to an engine, and the memory that it reads."""

    def __init__(self, path: str, poller: select.epoll, memory_bytes: int) -> None:
        """Raises OSError where no engine listens at `path`."""
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        memory = shared_memory(memory_bytes)
        try:
            self.memory = mmap.mmap(memory, 0)
            self.socket.connect(path)
            socket.send_fds(self.socket, [HELLO.pack(MAGIC, PROTOCOL)], [memory])
        except OSError:
            self.socket.close()
            raise
        finally:
            os.close(memory)
        self.wire = Wire(self.socket, poller, REPLY)
        self.heap = _Heap(memory_bytes)
        self.pieces: dict[int, _Piece] = {}  # that wait for a reply
        self.routes: dict[int, _Route] = {}  # by the numbers that the engine gave the models
        self.page: mmap.mmap | None = None  # from the welcome to the end
        self.dead = False

    def greet(self) -> None:
        """Takes the engine's welcome. Raises what `receive_memory` raises."""
        (magic, protocol, begin), page = receive_memory(self.socket, WELCOME, mmap.ACCESS_READ)
        check_protocol(magic, protocol)
        if len(page) != PAGE_BYTES or begin != TIMES_AT:
            raise Malformed(f"its status page has {len(page)} bytes, times from {begin}")
        self.page = page

    def read_routes(self) -> bool:
        """Whether the engine serves other models now than were known. Raises Malformed."""
        assert self.page is not None
        offers = read_offers(self.page)
        if offers is None:
            return False
        known, self.routes = self.routes, {}
        for index, place, info in ((each.index, each.place, each.info) for each in offers):
            if not 0 <= place < MOST_MODELS:
                raise Malformed(f"the times of {info.name} are at {place}")
            times = memoryview(self.page)[TIMES_AT + 16 * place :][:16].cast("d")
            self.routes[index] = known.get(index) or _Route(self, index, info, times)
        return known.keys() != self.routes.keys()


class Engines:
    """An acceptor's connections to the engines of its machine, and the thread that hears them.

    An engine that is not there, or dies, is connected to as soon as one listens again.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        *,
        memory_bytes: int = 128 << 20,
        on_change: Callable[[str, tuple[ModelInfo, ...]], None] = lambda path, models: None,
        on_bug: Callable[[BaseException], None] = lambda bug: None,
    ) -> None:
        """`paths` of the engines' sockets. `memory_bytes` is shared with each engine; only what has
        been in use takes room. `on_change` hears which models the engine at a path serves, none
        when it is gone; `on_bug` of an error in the thread, after which all requests fail. Both,
        and every `done`, are called on that thread and must not wait.
        """
        self.memory_bytes = memory_bytes
        self._on_change, self._on_bug = on_change, on_bug
        # Of all that submitting threads and the thread share: heaps, pieces, tickets.
        self.lock = threading.Lock()
        self._news = threading.Condition(self.lock)  # an engine serves what it did not
        self.unsent = False
        self._numbers = itertools.count()
        self._routes: dict[tuple[str, int, str], list[_Route]] = {}
        self._links: dict[int, _Link] = {}  # by file descriptor
        # By path: when to try to connect, `inf` where an engine is connected.
        self._due = {os.fspath(path): 0.0 for path in paths}
        self._backoffs = {path: Backoff(_RETRY_S, _LONGEST_RETRY_S) for path in self._due}
        self._poller = select.epoll()
        self._bell = bell(self)
        self._poller.register(self._bell, select.EPOLLIN)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engines", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the connections, after which no engine is there: what still waits hears NotReady."""
        self._closing = True
        os.eventfd_write(self._bell, 1)
        if self._thread is not threading.current_thread():
            self._thread.join()

    # For `RemoteBatcher`.

    def routes(self, name: str, version: int, sha256: str) -> list[_Route]:
        return self._routes.get((name, version, sha256), [])

    def send(self, piece: _Piece) -> None:
        """Puts a filled piece in line for its engine; the lock is held."""
        request, route = piece.request, piece.route
        number = piece.number = next(self._numbers)
        record = REQUEST.pack(
            number,
            request.deadline,
            piece.offset,
            request.priority,
            piece.rows,
            route.index,
            SUBMIT,
        )
        route.link.pieces[number] = piece
        request.pieces.append(piece)
        route.link.wire.put(record)
        self.unsent = True

    def cancel(self, piece: _Piece) -> None:
        """Puts a cancel in line for the engine that has the piece; the lock is held."""
        route = piece.route
        route.link.wire.put(REQUEST.pack(piece.number, math.inf, 0, 0, 0, route.index, CANCEL))
        self.unsent = True

    def wait_for(self, name: str, version: int, timeout_s: float) -> bool:
        """Waits until an engine that is connected serves the version; False where none does by then."""
        with self._news:
            return self._news.wait_for(
                lambda: any(key[:2] == (name, version) for key in self._routes), timeout_s
            )

    def flush(self) -> None:
        """Sends what is in line, as far as the sockets take it; the rest follows by itself."""
        self.unsent = False
        for link in tuple(self._links.values()):
            link.wire.flush()

    # On the thread.

    def _work(self) -> None:
        try:
            while not self._closing:
                now = time.monotonic()
                for path in [path for path, due in self._due.items() if due <= now]:
                    self._connect(path, now)
                due = min(self._due.values(), default=math.inf)
                timeout = None if due == math.inf else max(0.0, due - now)
                for fd, events in self._poller.poll(timeout):
                    if fd in self._links:
                        self._hear(self._links[fd], events)
        # A bug here must not leave callers waiting for a thread that is gone.
        except BaseException as bug:
            log.critical("bug in the connections to the engines", exc_info=True)
            self._on_bug(bug)
        finally:
            while self._links:
                self._lose(next(iter(self._links.values())))
            self._poller.close()

    def _connect(self, path: str, now: float) -> None:
        try:
            link = _Link(path, self._poller, self.memory_bytes)
        except OSError:
            self._due[path] = now + self._backoffs[path].next_s()
        else:
            self._links[link.socket.fileno()] = link
            self._due[path] = math.inf

    def _hear(self, link: _Link, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                link.wire.go_on()
            if link.page is None:
                link.greet()
                link.read_routes()
                self._join(link)
            else:
                self._settle(link, link.wire.receive())
        except BlockingIOError:
            pass  # the welcome is still to come
        except Malformed as error:
            log.error("the engine at %s was cut off: %s", link.path, error)
            self._lose(link)
        except OSError:
            self._lose(link)

    def _join(self, link: _Link) -> None:
        """The engine is ready, or serves other models than before."""
        with self.lock:
            self._forget(link)
            for route in link.routes.values():
                key = (route.info.name, route.info.version, route.info.sha256)
                self._routes[key] = [*self._routes.get(key, ()), route]
            self._news.notify_all()
        self._due[link.path] = math.inf
        self._backoffs[link.path].reset()
        self._on_change(link.path, tuple(route.info for route in link.routes.values()))

    def _forget(self, link: _Link) -> None:
        """No more goes to it. The lock is held."""
        for key, routes in list(self._routes.items()):
            if left := [route for route in routes if route.link is not link]:
                self._routes[key] = left
            else:
                del self._routes[key]

    def _lose(self, link: _Link) -> None:
        """Fails all that waits for the engine, and looks out for the next one."""
        del self._links[link.socket.fileno()]
        link.wire.close()
        lost: list[Done] = []
        with self.lock:
            link.dead = True
            self._forget(link)
            for piece in link.pieces.values():
                if not piece.request.ended:
                    piece.request.end()
                    lost.append(piece.request.done)
            link.pieces.clear()
        for done in lost:
            done(NotReady("the engine stopped before it answered: retry"))
        self.flush()  # cancels, to other engines that have pieces of these requests
        if link.page is not None:
            link.routes.clear()  # they know the link: its memory would wait for the collector
            self._due[link.path] = 0.0
            self._backoffs[link.path].reset()
            self._on_change(link.path, ())
        else:
            self._due[link.path] = time.monotonic() + self._backoffs[link.path].next_s()

    def _settle(self, link: _Link, replies: list[tuple[Any, ...]]) -> None:
        """Takes answers out of the shared memory, and uses or frees their blocks."""
        told: list[_Ended] = []
        again: list[_Piece] = []
        pieces = link.pieces
        fault, news = "", False
        with self.lock:
            for number, run_s, batch_s, retry_s, batch, size, failed_rows, status in replies:
                if number == NEWS:
                    news = True
                    continue
                piece = pieces.get(number)
                if piece is None or status > LAST_STATUS:
                    fault = f"a reply with status {status} to request {number}"
                    break
                del pieces[number]
                request = piece.request
                if not request.ended:
                    request.pieces.remove(piece)
                    outcome: Answer | ConvoyError | None
                    if status == OK:
                        outcome = request.take(piece, run_s, batch_s, batch, size, failed_rows)
                    else:
                        outcome = error_of(status, retry_s)
                    if outcome is not None:
                        request.end()
                        told.append((request.done, outcome))
                    elif request.taken < request.total:
                        again.append(piece)
                        continue
                piece.free(request.batcher.row_bytes)
        for done, ending in told:
            done(ending)
        for piece in again:
            piece.fill()  # with none, where another piece has just taken the last
            with self.lock:
                if piece.request.ended or not piece.rows:
                    piece.free(piece.request.batcher.row_bytes)
                else:
                    self.send(piece)
        if self.unsent:
            self.flush()
        if fault:
            raise Malformed(fault)
        if news and link.read_routes():
            self._join(link)


class RemoteBatcher:
    """A `Batcher` whose batches run in engine processes: the same interface, for one model.

    A request goes to the engine that has the least to do; a large one in pieces of whole batches,
    two at a time. Each pixel is copied once, into the shared memory; the engine runs it from there,
    or copies it once more to the batch that it goes in.
    """

    def __init__(self, engines: Engines, info: ModelInfo, *, max_wait_s: float) -> None:
        """`info` as an engine gave it: all engines with this name, version and sha256 are used."""
        self.engines, self.row_bytes = engines, info.row_bytes
        if self.row_bytes > engines.memory_bytes:
            raise ValueError(
                f"an image of {info.name} takes {self.row_bytes} bytes, the memory shared with an "
                f"engine has {engines.memory_bytes}: give it more"
            )
        self._row_shape, self._max_wait_s = info.row_shape, max_wait_s
        self._key = (info.name, info.version, info.sha256)
        largest = max(1, int(engines.memory_bytes * _LARGEST_PIECE) // self.row_bytes)
        self._batch_rows = info.max_batch_size
        self._piece_rows = largest - largest % self._batch_rows or largest
        self._open = 0  # requests that are not ended
        self._idle = threading.Condition(engines.lock)
        self._closed = False
        self._eager = False

    def submit(
        self, rows: Rows, done: Done, *, deadline: float | None = None, priority: int = 0
    ) -> RemoteTicket:
        """See `Batcher.submit`. Raises NotReady also where no engine serves the model just now;
        what an engine had when it died ends with NotReady.
        """
        if rows.dtype != np.uint8 or rows.shape[1:] != self._row_shape or not len(rows):
            raise ValueError(f"{rows.dtype} {rows.shape} for uint8 [n >= 1, *{self._row_shape}]")
        ticket = RemoteTicket(
            self, rows, done, math.inf if deadline is None else deadline, priority
        )
        engines = self.engines
        with engines.lock:
            pieces = self._reserve(ticket)
            self._open += 1
        for piece in pieces:
            piece.fill()
        with engines.lock:
            for piece in pieces:
                if piece.route.link.dead:
                    self._give_up(pieces)
            for piece in pieces:
                engines.send(piece)
        if self._eager:
            engines.flush()
        return ticket

    def _reserve(self, ticket: RemoteTicket) -> list[_Piece]:
        """Blocks, on the best engines, for the first rows of the request. Refuses what can't be
        done; the lock is held.
        """
        now, total = ticket.began, ticket.total
        if self._closed:
            raise NotReady("this version is being unloaded: retry")
        if ticket.deadline <= now:
            raise DeadlineExceeded("the deadline has passed")
        route, ahead_s = self._nearest(now)
        # It alone knows who is before a request of the highest priority.
        if ticket.priority != 1:
            self._refuse(route, ahead_s, now, ticket.deadline)
        room = min(total, self._piece_rows)
        pieces: list[_Piece] = []
        while True:
            offset = route.link.heap.take(room * self.row_bytes)
            if offset is not None:
                pieces.append(_Piece(ticket, route, offset, room))
            elif not pieces:
                raise Overloaded(
                    f"the memory shared with the engine is full: {BACK_OFF}",
                    ahead_s + room * route.row_s,
                )
            if room == total or offset is None or len(pieces) == 2:
                return pieces
            try:
                route, _ = self._nearest(now)
            except NotReady:  # the only engine has just begun to stop
                return pieces

    def _refuse(self, route: _Route, ahead_s: float, now: float, deadline: float) -> None:
        """Raises Overloaded where the engine would for certain; the rest is for it to judge."""
        if not ahead_s:
            return
        # The last batch of those who wait may have room for it.
        over_s = max(
            ahead_s - self._batch_rows * route.row_s - self._max_wait_s, now + ahead_s - deadline
        )
        if over_s > 0:
            raise Overloaded(f"those who wait take about {ahead_s:.2g} s: {BACK_OFF}", over_s)

    def check(self, deadline: float | None) -> None:
        """See `Batcher.check`; priorities, too, are refused here."""
        now = time.monotonic()
        route, ahead_s = self._nearest(now)
        self._refuse(route, ahead_s, now, math.inf if deadline is None else deadline)

    def _give_up(self, pieces: list[_Piece]) -> None:
        """An engine has died while its rows were copied."""
        for piece in pieces:
            piece.free(self.row_bytes)
        self.forget()
        raise NotReady("the engine has just stopped: retry")

    def _nearest(self, now: float) -> tuple[_Route, float]:
        """The engine that has the least to do, and for how many seconds."""
        best: _Route | None = None
        least_s = math.inf
        for route in self.engines.routes(*self._key):
            ahead_s = route.ahead_s(now)
            if best is None or (ahead_s, route.rows) < (least_s, best.rows):
                best, least_s = route, ahead_s
        if best is None or least_s == math.inf:
            raise NotReady("no engine serves this model at the moment: retry")
        return best, least_s

    def wait_s(self, rows: int = 1) -> float:
        """Estimated seconds until `rows` submitted now would be answered. Raises NotReady where no
        engine serves the model just now.
        """
        route, ahead_s = self._nearest(time.monotonic())
        return ahead_s + rows * route.row_s

    @property
    def ready(self) -> bool:
        """Whether it takes requests: an engine serves the model."""
        return not self._closed and bool(self.engines.routes(*self._key))

    @property
    def waiting(self) -> bool:
        """Whether there is something that `run_next` would send."""
        return self.engines.unsent

    def queued(self) -> int:
        """See `Batcher.queued`: none wait here, but in the engines."""
        return 0

    def run_next(self) -> bool:
        """Sends all that was submitted, in one go for each engine; False where nothing was."""
        if not self.engines.unsent:
            return False
        self.engines.flush()
        return True

    def start(self) -> None:
        """From now on `submit` sends at once; without it the caller has to call `run_next`."""
        self._eager = True

    def close(self) -> None:
        """Refuses new requests, and returns when all that wait have ended."""
        with self.engines.lock:
            self._closed = True
        self.engines.flush()
        with self.engines.lock:
            self._idle.wait_for(lambda: not self._open)

    def forget(self) -> None:
        """A request has ended; the lock is held."""
        self._open -= 1
        if self._closed and not self._open:
            self._idle.notify_all()
