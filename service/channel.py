"""The way of rows from acceptor processes to engine processes of the same machine (Linux).

An acceptor has one Unix stream socket and one shared memory (an unnamed `memfd`, so nothing is left
behind by a killed process) for each engine. Pixels travel in the shared memory alone; small fixed
records over the socket say where they lie, and the answers take the place of the pixels:

    acceptor -> engine   hello: magic, protocol; the shared memory as a file descriptor
    engine -> acceptor   welcome: magic, protocol; the status page as a file descriptor
    acceptor -> engine   submit or cancel: request, deadline, offset, rows, priority, model, kind
    engine -> acceptor   reply: request, run_s, retry_after_s, batch_size, status

Each submit has exactly one reply, also after a cancel; until then its block is not used again, so
rows can't be mixed. The status page holds what the engine serves, as JSON, and how long a request
would take, which the engine keeps up to date: an acceptor refuses before it copies anything.

No side ever waits for the other to read: what a full socket does not take is kept, and sent when
there is room. All times are on `time.monotonic`'s clock, which the processes of a machine share.
"""

import bisect
import fcntl
import itertools
import logging
import math
import mmap
import os
import select
import socket
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from service.batcher import Answer, Batcher, Done, Outputs, Rows, Ticket
from service.errors import (
    Cancelled,
    ConvoyError,
    DeadlineExceeded,
    InferenceFailed,
    NotReady,
    Overloaded,
)

log = logging.getLogger("convoy.channel")

PROTOCOL = 1
_MAGIC = b"convoy"
_HELLO = struct.Struct("<6sH")
_WELCOME = struct.Struct("<6sHI")  # ..., where the waits begin in the status page
_REQUEST = struct.Struct("<QdQqIHH")
_REPLY = struct.Struct("<QddIH")
_SUBMIT, _CANCEL = 0, 1
_OK = 0
# The status of a reply is the place in this list, from 1. The texts are those of the acceptor.
_ENDINGS: tuple[tuple[type[ConvoyError], str], ...] = (
    (Overloaded, "more is waiting than can be done in time: back off, then retry"),
    (DeadlineExceeded, "the deadline passed before the device was free"),
    (InferenceFailed, "the model failed on this batch"),
    (Cancelled, "cancelled"),
    (NotReady, "the engine is being stopped: retry"),
)
_STATUSES: dict[type[Exception], int] = {kind: n for n, (kind, _) in enumerate(_ENDINGS, 1)}

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_ALIGNMENT = 64
_RETRY_S, _LONGEST_RETRY_S = 0.02, 0.5


class ModelInfo(msgspec.Struct, frozen=True):
    """What an engine says of a model that it serves."""

    name: str
    version: int
    row_shape: tuple[int, ...]
    classes: int
    max_batch_size: int
    device: str
    sha256: str

    def block_bytes(self, rows: int) -> int:
        """Shared memory that `rows` take: their pixels, then in the same place their answers."""
        return rows * max(math.prod(self.row_shape), 4 * self.classes)


class Hosted(NamedTuple):
    """A model and who runs it. `inline`: the server's own thread runs the batches, when all that
    has arrived is taken; else the batcher has a thread.
    """

    info: ModelInfo
    batcher: Batcher
    inline: bool


def listen(path: str | os.PathLike[str]) -> socket.socket:
    """A listening Unix socket at `path`, for `EngineServer`; replaces one that is left there.

    A parent that makes it and hands it to each new engine process spares acceptors the retries:
    their connections wait in it for the engine to come.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        Path(path).unlink(missing_ok=True)
        listener.bind(os.fspath(path))
        Path(path).chmod(0o600)
        listener.listen()
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"can't listen at {path}: {error.strerror or error}") from error
    return listener


class _Malformed(Exception):
    """The other side does not keep to the protocol."""


def _shared_memory(size: int) -> int:
    """A file descriptor of `size` bytes of memory, all zero; they take no room until written to."""
    fd = os.memfd_create("convoy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def _receive_memory(
    sock: socket.socket, message: struct.Struct, access: int = mmap.ACCESS_WRITE
) -> tuple[tuple[Any, ...], mmap.mmap]:
    """The fields of the first message of a connection, and the shared memory that came with it."""
    data, fds, _, _ = socket.recv_fds(sock, message.size, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            raise ConnectionResetError("the other side has gone")
        if len(data) != message.size or not fds:
            raise _Malformed("it did not begin with a greeting and its memory")
        # Reading memory that has shrunk meanwhile would kill this process.
        if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise _Malformed("its shared memory is not sealed")
        return message.unpack(data), mmap.mmap(fds[0], 0, access=access)
    finally:
        for fd in fds:
            os.close(fd)


def _bell(owner: object) -> int:
    """An eventfd that wakes a poller; it lives as long as its owner, whom any thread may still call
    after its end.
    """
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    weakref.finalize(owner, os.close, fd)
    return fd


def _check_protocol(magic: bytes, protocol: int) -> None:
    if (magic, protocol) != (_MAGIC, PROTOCOL):
        raise _Malformed(
            f"it speaks protocol {protocol}, this process {PROTOCOL}: restart all processes"
        )


def _ending(status: int, retry_after_s: float) -> ConvoyError:
    """The error that a reply's status stands for."""
    kind, text = _ENDINGS[status - 1]
    if kind is Overloaded:
        return Overloaded(text, retry_after_s)
    return kind(text)


class _Wire:
    """Fixed records over a non-blocking stream socket; sending never waits for the reader.

    `put` and `flush` may be called from any thread. Where the socket is full, its poller is told to
    wait for room, and has to `flush` then.
    """

    def __init__(self, sock: socket.socket, poller: select.epoll, incoming: struct.Struct) -> None:
        self._socket, self._poller, self._incoming = sock, poller, incoming
        self._buffer = memoryview(bytearray(1 << 16))
        self._left = 0  # bytes of an incomplete record at the buffer's beginning
        self._lock = threading.Lock()
        self._unsent = bytearray()
        self._full = False
        poller.register(sock, select.EPOLLIN)

    def receive(self) -> list[tuple[Any, ...]]:
        """The records that have arrived. Raises OSError where the other side is gone."""
        try:
            count = self._socket.recv_into(self._buffer[self._left :])
        except BlockingIOError:
            return []
        if not count:
            raise ConnectionResetError("the other side has gone")
        end = self._left + count
        self._left = end % self._incoming.size
        whole = end - self._left
        records = list(self._incoming.iter_unpack(self._buffer[:whole]))
        self._buffer[: self._left] = self._buffer[whole:end]
        return records

    def put(self, record: bytes) -> None:
        with self._lock:
            self._unsent += record

    def flush(self) -> None:
        with self._lock:
            if self._unsent:
                try:
                    del self._unsent[: self._socket.send(self._unsent)]
                except BlockingIOError:
                    pass
                # Who waits for the socket hears of its end; there is no one left to send to.
                except OSError:
                    self._unsent.clear()
            if self._full != bool(self._unsent):
                self._full = not self._full
                self._poller.modify(self._socket, select.EPOLLIN | self._full * select.EPOLLOUT)

    @property
    def empty(self) -> bool:
        return not self._unsent

    def close(self) -> None:
        with self._lock:
            self._unsent.clear()
            self._full = False
            self._socket.close()  # which ends the poller's interest


# ---------------------------------------------------------------------------------- engine side


class _Job:
    """A submitted request on the engine's side."""

    __slots__ = ("acceptor", "number", "offset", "rows", "ticket")

    def __init__(self, acceptor: "_Acceptor", number: int, offset: int, rows: int) -> None:
        self.acceptor, self.number, self.offset, self.rows = acceptor, number, offset, rows
        self.ticket: Ticket | None = None


class _Acceptor:
    """One connected acceptor."""

    def __init__(self, sock: socket.socket, poller: select.epoll) -> None:
        self.socket = sock
        self.wire = _Wire(sock, poller, _REQUEST)
        self.memory: mmap.mmap | None = None  # until the hello, and after the end
        self.jobs: dict[int, _Job] = {}


class EngineServer:
    """Takes rows from acceptors, hands them to batchers, and gives the answers back.

    `serve` is the engine process's main loop. What an acceptor's end leaves waiting is cancelled;
    what it sends against the protocol ends its connection, with a line in the log, and no other.
    """

    def __init__(self, listener: socket.socket, models: Sequence[Hosted]) -> None:
        """`listener` is a listening Unix socket, which `close` closes: see `listen`. The batchers
        stay the caller's, who closes them after `serve` has returned.
        """
        self._listener, self._models = listener, tuple(models)
        self._acceptors: dict[int, _Acceptor] = {}
        self._poller = select.epoll()
        self._bell = _bell(self)
        self._rung = False
        self._closing = False
        self._thread = 0
        infos = msgspec.json.encode([hosted.info for hosted in models])
        infos += b" " * (-len(infos) % 8)
        self._page_fd = _shared_memory(len(infos) + 16 * len(models))
        page = mmap.mmap(self._page_fd, 0)
        page[: len(infos)] = infos
        self._waits = memoryview(page)[len(infos) :].cast("d")
        self._welcome = _WELCOME.pack(_MAGIC, PROTOCOL, len(infos))
        self._publish()

    def serve(self) -> None:
        """Serves on the calling thread until `close` is called and all that waited is answered."""
        self._thread = threading.get_ident()
        inline = [hosted.batcher for hosted in self._models if hosted.inline]
        self._listener.setblocking(False)
        listening, bell = self._listener.fileno(), self._bell
        self._poller.register(listening, select.EPOLLIN)
        self._poller.register(bell, select.EPOLLIN)
        try:
            while not self._finished():
                busy = any(batcher.waiting for batcher in inline)
                if not busy:
                    self._publish()
                for fd, events in self._poller.poll(0 if busy else None):
                    if fd == bell:
                        os.eventfd_read(bell)
                        self._rung = False
                    elif fd == listening:
                        self._accept()
                    elif fd in self._acceptors:
                        self._hear(self._acceptors[fd], events)
                if self._closing and listening >= 0:
                    self._poller.unregister(listening)
                    self._listener.close()
                    listening = -1
                for batcher in inline:
                    if batcher.waiting:
                        self._publish()
                        batcher.run_next()
                self._flush()
        finally:
            while self._acceptors:
                self._drop(next(iter(self._acceptors.values())))
            self._listener.close()
            self._poller.close()
            os.close(self._page_fd)

    def close(self) -> None:
        """Ends `serve`, when all that waits is answered; new requests hear NotReady. Any thread, or
        a signal handler.
        """
        self._closing = True
        os.eventfd_write(self._bell, 1)

    def _finished(self) -> bool:
        return self._closing and all(
            not acceptor.jobs and acceptor.wire.empty for acceptor in self._acceptors.values()
        )

    def _publish(self) -> None:
        """Tells acceptors when those who wait will be done, and what each row more takes."""
        now = time.monotonic()
        for i, (info, batcher, _) in enumerate(self._models):
            ahead_s, size = batcher.wait_s(0), info.max_batch_size
            self._waits[2 * i] = math.inf if self._closing else now + ahead_s
            self._waits[2 * i + 1] = (batcher.wait_s(size) - ahead_s) / size

    def _flush(self) -> None:
        for acceptor in self._acceptors.values():
            acceptor.wire.flush()

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        sock.setblocking(False)
        self._acceptors[sock.fileno()] = _Acceptor(sock, self._poller)

    def _drop(self, acceptor: _Acceptor) -> None:
        del self._acceptors[acceptor.socket.fileno()]
        acceptor.memory = None  # unmapped when the last rows that still run are let go
        for job in list(acceptor.jobs.values()):
            if job.ticket:
                job.ticket.cancel()
        acceptor.jobs.clear()
        acceptor.wire.close()

    def _hear(self, acceptor: _Acceptor, events: int) -> None:
        try:
            if events & (select.EPOLLHUP | select.EPOLLERR):
                self._drop(acceptor)  # whatever it has still sent, nobody waits for the answers
            elif acceptor.memory is None:
                self._greet(acceptor)
            elif events & select.EPOLLIN:
                for record in acceptor.wire.receive():
                    self._take(acceptor, *record)
        except _Malformed as error:
            log.error("an acceptor was cut off: %s", error)
            self._drop(acceptor)
        except BlockingIOError:  # a hello is still to come
            pass
        except OSError:
            self._drop(acceptor)

    def _greet(self, acceptor: _Acceptor) -> None:
        (magic, protocol), acceptor.memory = _receive_memory(acceptor.socket, _HELLO)
        _check_protocol(magic, protocol)
        socket.send_fds(acceptor.socket, [self._welcome], [self._page_fd])

    def _take(
        self,
        acceptor: _Acceptor,
        number: int,
        deadline: float,
        offset: int,
        priority: int,
        rows: int,
        model: int,
        kind: int,
    ) -> None:
        if kind == _CANCEL:
            cancelled = acceptor.jobs.get(number)  # None: answered meanwhile
            if cancelled and cancelled.ticket:
                cancelled.ticket.cancel()
            return
        memory = acceptor.memory
        if memory is None:
            return
        if (
            kind != _SUBMIT
            or model >= len(self._models)
            or not rows
            or offset + self._models[model].info.block_bytes(rows) > len(memory)
            or math.isnan(deadline)
            or number in acceptor.jobs
        ):
            raise _Malformed(
                f"request {number} of kind {kind}: {rows} rows at {offset} of {len(memory)} bytes, "
                f"model {model}, deadline {deadline}"
            )
        info, batcher, _ = self._models[model]
        job = acceptor.jobs[number] = _Job(acceptor, number, offset, rows)
        if self._closing:
            self._reply(job, NotReady("stopping"))
            return
        pixels: Rows = np.ndarray((rows, *info.row_shape), np.uint8, memory, offset)
        try:
            job.ticket = batcher.submit(
                pixels,
                lambda outcome: self._end(job, info.classes, outcome),
                deadline=None if deadline == math.inf else deadline,
                priority=priority,
            )
        except ConvoyError as error:
            self._reply(job, error)

    def _end(self, job: _Job, classes: int, outcome: Answer | Exception) -> None:
        """On whichever thread ends the request."""
        memory = job.acceptor.memory
        if memory is not None and isinstance(outcome, Answer):
            if outcome.outputs.shape == (job.rows, classes):
                place = np.ndarray((job.rows, classes), np.float32, memory, job.offset)
                place[...] = outcome.outputs
            else:
                log.error("answers %s for %s", outcome.outputs.shape, (job.rows, classes))
                outcome = InferenceFailed("the model's answers have the wrong shape")
        self._reply(job, outcome)
        if threading.get_ident() != self._thread and not self._rung:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def _reply(self, job: _Job, outcome: Answer | Exception) -> None:
        if isinstance(outcome, Answer):
            record = _REPLY.pack(job.number, outcome.run_s, 0.0, outcome.batch_size, _OK)
        else:
            retry_after_s = outcome.retry_after_s if isinstance(outcome, Overloaded) else 0.0
            status = _STATUSES.get(type(outcome), _STATUSES[InferenceFailed])
            record = _REPLY.pack(job.number, 0.0, retry_after_s, 0, status)
        job.ticket = None  # which knows this job by its `done`
        # Gone already where its acceptor has died.
        if job.acceptor.jobs.pop(job.number, None):
            job.acceptor.wire.put(record)


# -------------------------------------------------------------------------------- acceptor side


class _Heap:
    """Blocks of variable size in `size` bytes. The lowest hole that is large enough is taken, so
    that the memory in use stays small and warm. Time grows with the holes: at most one more than
    blocks in use, one where all blocks are of one size.
    """

    def __init__(self, size: int) -> None:
        # The holes, in order, never touching each other.
        self._starts, self._ends = [0], [size]

    def take(self, size: int) -> int | None:
        """The offset of a free block, or None where there is no room for it."""
        size += -size % _ALIGNMENT
        for i, start in enumerate(self._starts):
            if self._ends[i] - start >= size:
                if self._ends[i] - start == size:
                    del self._starts[i], self._ends[i]
                else:
                    self._starts[i] += size
                return start
        return None

    def give_back(self, start: int, size: int) -> None:
        end = start + size + -size % _ALIGNMENT
        i = bisect.bisect(self._starts, start)
        after = i < len(self._starts) and self._starts[i] == end
        if i and self._ends[i - 1] == start:
            if after:
                self._ends[i - 1] = self._ends[i]
                del self._starts[i], self._ends[i]
            else:
                self._ends[i - 1] = end
        elif after:
            self._starts[i] = start
        else:
            self._starts.insert(i, start)
            self._ends.insert(i, end)


class _Route:
    """A model on a connected engine."""

    __slots__ = ("index", "info", "link", "rows")

    def __init__(self, link: "_Link", index: int, info: ModelInfo) -> None:
        self.link, self.index, self.info = link, index, info
        self.rows = 0  # sent and not answered

    def ahead_s(self, now: float) -> float:
        """Until those are done who are before a request that is submitted now: by what the engine
        says, and by what it may not have seen yet. 0 where nothing is known to wait; infinite where
        the engine is stopping.
        """
        waits = self.link.waits
        done_at, row_s = waits[2 * self.index], waits[2 * self.index + 1]
        return max(0.0, done_at - now, self.rows * row_s)

    @property
    def row_s(self) -> float:
        """What each row costs in a full batch."""
        return self.link.waits[2 * self.index + 1]


class _Piece:
    """A block of shared memory, and the rows of a request that are in it."""

    __slots__ = ("number", "offset", "request", "room", "route", "rows", "start")

    def __init__(self, request: "RemoteTicket", route: _Route, offset: int, room: int) -> None:
        self.request, self.route, self.offset = request, route, offset
        self.room = room  # rows that the block holds
        self.number = self.start = self.rows = 0
        route.rows += room

    def fill(self) -> None:
        """Copies the next rows of the request. One thread at a time; holds no lock meanwhile."""
        request, pixels = self.request, self.request.pixels
        self.start = request.taken
        self.rows = min(self.room, request.total - self.start)
        place = np.ndarray(
            (self.rows, *pixels.shape[1:]), np.uint8, self.route.link.memory, self.offset
        )
        place[...] = pixels[self.start : self.start + self.rows]
        request.taken += self.rows
        if request.taken == request.total:
            request.pixels = _NO_PIXELS  # they may be a whole message

    def free(self) -> None:
        """The engine has answered for it: others may have the block. The lock is held."""
        route = self.route
        route.rows -= self.room
        route.link.heap.give_back(self.offset, route.info.block_bytes(self.room))


_NO_PIXELS: Rows = np.empty(0, np.uint8)
_Ended = tuple[Done, Answer | Exception]


class RemoteTicket:
    """A request and its ticket. All but `cancel` is called with the lock held."""

    __slots__ = (
        "answered", "batch_size", "batcher", "began", "deadline", "done", "ended", "outputs",
        "pieces", "pixels", "priority", "run_s", "taken", "total",
    )  # fmt: skip

    def __init__(
        self, batcher: "RemoteBatcher", pixels: Rows, done: Done, deadline: float, priority: int
    ) -> None:
        self.batcher, self.done, self.deadline, self.priority = batcher, done, deadline, priority
        self.pixels, self.total = pixels, len(pixels)
        self.began = time.monotonic()
        self.taken = self.answered = self.batch_size = 0
        self.run_s = 0.0
        self.outputs: Outputs | None = None
        self.pieces: list[_Piece] = []  # that engines have
        self.ended = False

    def cancel(self) -> None:
        """`done` hears Cancelled at once; the blocks are kept until the engines have answered."""
        engines = self.batcher.engines
        with engines.lock:
            if self.ended:
                return
            done, outcome = self.end(Cancelled("cancelled"))
        engines.flush()
        done(outcome)

    def take(self, piece: _Piece, run_s: float, batch_size: int) -> bool:
        """Copies the answers for a piece out of the shared memory; whether they were the last."""
        self.run_s += run_s
        self.batch_size = max(self.batch_size, batch_size)
        route = piece.route
        classes = route.info.classes
        place = np.ndarray((piece.rows, classes), np.float32, route.link.memory, piece.offset)
        if self.outputs is None:
            if piece.rows == self.total:
                self.outputs = place.copy()
                return True
            self.outputs = np.empty((self.total, classes), np.float32)
        self.outputs[piece.start : piece.start + piece.rows] = place
        self.answered += piece.rows
        return self.answered == self.total

    def end(self, error: ConvoyError | None) -> _Ended:
        """Whom to tell what, when the lock is free. Engines hear that what they have is not wanted."""
        self.ended = True
        engines = self.batcher.engines
        for piece in self.pieces:
            engines.cancel(piece)
        self.pieces.clear()
        self.batcher.forget()
        if error is not None or self.outputs is None:
            return self.done, error or InferenceFailed("no answer")
        queue_s = max(0.0, time.monotonic() - self.began - self.run_s)
        return self.done, Answer(self.outputs, queue_s, self.run_s, self.batch_size)


class _Link:
    """A connection to an engine, and the memory that it reads."""

    def __init__(self, path: str, poller: select.epoll, memory_bytes: int) -> None:
        """Raises OSError where no engine listens at `path`."""
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        memory = _shared_memory(memory_bytes)
        try:
            self.memory = mmap.mmap(memory, 0)
            self.socket.connect(path)
            socket.send_fds(self.socket, [_HELLO.pack(_MAGIC, PROTOCOL)], [memory])
        except OSError:
            self.socket.close()
            raise
        finally:
            os.close(memory)
        self.wire = _Wire(self.socket, poller, _REPLY)
        self.heap = _Heap(memory_bytes)
        self.pieces: dict[int, _Piece] = {}  # that wait for a reply
        self.routes: list[_Route] = []  # from the welcome to the end
        self.waits = memoryview(b"").cast("d")
        self.dead = False

    def greet(self) -> None:
        """Takes the engine's welcome."""
        (magic, protocol, begin), page = _receive_memory(self.socket, _WELCOME, mmap.ACCESS_READ)
        _check_protocol(magic, protocol)
        infos = msgspec.json.decode(page[:begin], type=list[ModelInfo])
        self.waits = memoryview(page)[begin:].cast("d")
        self.routes = [_Route(self, i, info) for i, info in enumerate(infos)]


class Engines:
    """An acceptor's connections to the engines of its machine, and the thread that hears them.

    An engine that is not there, or dies, is connected to as soon as it listens again.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        memory_bytes: int = 128 << 20,
        on_change: Callable[[str, tuple[ModelInfo, ...]], None] = lambda path, models: None,
        on_bug: Callable[[BaseException], None] = lambda bug: None,
    ) -> None:
        """`paths` of the engines' sockets. `memory_bytes` is shared with each engine; only what has
        been in use takes room. `on_change` hears which models the engine at a path serves, none
        when it is gone; `on_bug` of an error in the thread, which ends it and fails all requests.
        Both, and every `done`, are called on that thread and must not wait.
        """
        self.memory_bytes = memory_bytes
        self._on_change, self._on_bug = on_change, on_bug
        # Guards all that submitting threads and the thread share: the heaps, pieces and requests.
        self.lock = threading.Lock()
        self._numbers = itertools.count()
        self._routes: dict[tuple[str, int, str], list[_Route]] = {}
        self._links: dict[int, _Link] = {}  # by file descriptor
        # Where no engine is connected: when to try again, and how long to wait after that.
        self._retries = {os.fspath(path): (0.0, _RETRY_S) for path in paths}
        self.unsent = False
        self._poller = select.epoll()
        self._bell = _bell(self)
        self._poller.register(self._bell, select.EPOLLIN)
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="engines", daemon=True)
        self._thread.start()

    def routes(self, info: ModelInfo) -> list[_Route]:
        return self._routes.get((info.name, info.version, info.sha256), [])

    def send(self, piece: _Piece) -> None:
        """Puts the filled piece in line for its engine; the lock is held."""
        request, link = piece.request, piece.route.link
        piece.number = next(self._numbers)
        link.pieces[piece.number] = piece
        request.pieces.append(piece)
        link.wire.put(
            _REQUEST.pack(
                piece.number,
                request.deadline,
                piece.offset,
                request.priority,
                piece.rows,
                piece.route.index,
                _SUBMIT,
            )
        )
        self.unsent = True

    def cancel(self, piece: _Piece) -> None:
        """Puts a cancel in line for the piece's engine; the lock is held."""
        piece.route.link.wire.put(
            _REQUEST.pack(piece.number, math.inf, 0, 0, 0, piece.route.index, _CANCEL)
        )
        self.unsent = True

    def flush(self) -> None:
        """Sends what is in line, as far as the sockets take it; the rest follows by itself."""
        self.unsent = False
        for link in tuple(self._links.values()):
            link.wire.flush()

    def close(self) -> None:
        """Ends the connections; what still waits fails with NotReady. After the batchers' `close`."""
        self._closing = True
        os.eventfd_write(self._bell, 1)
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        try:
            while not self._closing:
                now = time.monotonic()
                for path in [path for path, (due, _) in self._retries.items() if due <= now]:
                    self._connect(path, now)
                due = min((due for due, _ in self._retries.values()), default=math.inf)
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
        _, delay = self._retries[path]
        try:
            link = _Link(path, self._poller, self.memory_bytes)
        except OSError:
            self._retries[path] = (now + delay, min(2 * delay, _LONGEST_RETRY_S))
        else:
            self._links[link.socket.fileno()] = link
            self._retries[path] = (math.inf, delay)

    def _hear(self, link: _Link, events: int) -> None:
        try:
            if not link.routes:
                link.greet()
                self._join(link)
            elif events & ~select.EPOLLOUT:
                self._settle(link, link.wire.receive())
            if events & select.EPOLLOUT:
                link.wire.flush()
        except BlockingIOError:  # the welcome is still to come
            pass
        except (_Malformed, msgspec.DecodeError) as error:
            log.error("the engine at %s was cut off: %s", link.path, error)
            self._lose(link)
        except OSError:
            self._lose(link)

    def _join(self, link: _Link) -> None:
        with self.lock:
            for route in link.routes:
                info = route.info
                key = (info.name, info.version, info.sha256)
                self._routes[key] = [*self._routes.get(key, ()), route]
        self._retries[link.path] = (math.inf, _RETRY_S)
        self._on_change(link.path, tuple(route.info for route in link.routes))

    def _lose(self, link: _Link) -> None:
        """Fails all that waits for this engine, and looks out for the next one."""
        del self._links[link.socket.fileno()]
        link.wire.close()
        with self.lock:
            link.dead = True
            for key, routes in list(self._routes.items()):
                self._routes[key] = [route for route in routes if route.link is not link]
            stranded = {id(piece.request): piece.request for piece in link.pieces.values()}
            link.pieces.clear()
            lost = [
                request.end(NotReady("the engine stopped before it answered: retry"))
                for request in stranded.values()
                if not request.ended
            ]
        for done, outcome in lost:
            done(outcome)
        self.flush()  # cancels of pieces that other engines have
        _, delay = self._retries[link.path]
        self._retries[link.path] = (
            time.monotonic() + (0.0 if link.routes else delay),
            delay if link.routes else min(2 * delay, _LONGEST_RETRY_S),
        )
        if link.routes:
            link.routes.clear()  # they know the link: its memory would wait for the collector
            self._on_change(link.path, ())

    def _settle(self, link: _Link, replies: list[tuple[Any, ...]]) -> None:
        """Takes the answers out of the shared memory and uses or frees their blocks."""
        ended: list[_Ended] = []
        again: list[_Piece] = []
        unknown = None
        with self.lock:
            for number, run_s, retry_after_s, batch_size, status in replies:
                piece = link.pieces.pop(number, None)
                if piece is None or status > len(_ENDINGS):
                    unknown = number, status
                    break
                request = piece.request
                if not request.ended:
                    request.pieces.remove(piece)
                    if status != _OK:
                        ended.append(request.end(_ending(status, retry_after_s)))
                    elif request.take(piece, run_s, batch_size):
                        ended.append(request.end(None))
                if not request.ended and request.taken < request.total:
                    again.append(piece)
                else:
                    piece.free()
        for done, outcome in ended:
            done(outcome)
        for piece in again:
            piece.fill()  # with none, where another piece has just taken the last
            with self.lock:
                if piece.request.ended or not piece.rows:
                    piece.free()
                else:
                    self.send(piece)
        if self.unsent:
            self.flush()
        if unknown:
            raise _Malformed(f"request {unknown[0]} was answered with status {unknown[1]}")


class RemoteBatcher:
    """A `Batcher` whose batches run in engine processes: the same interface, for one model.

    A request goes to the engine with the least estimated wait; one that is large is cut into pieces
    of whole batches, at most two of which wait at engines at a time. Each pixel is copied once, into
    the shared memory; the engine runs it from there, or from its batch.
    """

    def __init__(self, engines: Engines, info: ModelInfo, *, max_wait_s: float) -> None:
        """`info` as an engine gave it: all engines with this name, version and sha256 are used."""
        self.engines, self._info, self._max_wait_s = engines, info, max_wait_s
        row = info.block_bytes(1)
        if row > engines.memory_bytes:
            raise ValueError(
                f"one image of {info.name} takes {row} bytes, the memory shared with an engine has "
                f"{engines.memory_bytes}: give it more"
            )
        self._most = max(1, engines.memory_bytes // 8 // row)
        if self._most > info.max_batch_size:
            self._most -= self._most % info.max_batch_size
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
        if rows.dtype != np.uint8 or rows.shape[1:] != self._info.row_shape or not len(rows):
            raise ValueError(
                f"{rows.dtype} {rows.shape} for uint8 [n >= 1, *{self._info.row_shape}]"
            )
        until = math.inf if deadline is None else deadline
        request = RemoteTicket(self, rows, done, until, priority)
        with self.engines.lock:
            pieces = self._reserve(request)
            self._open += 1
        for piece in pieces:
            piece.fill()
        with self.engines.lock:
            if any(piece.route.link.dead for piece in pieces):
                for piece in pieces:
                    piece.free()
                self.forget()
                raise NotReady("the engine has just stopped: retry")
            for piece in pieces:
                self.engines.send(piece)
        if self._eager:
            self.engines.flush()
        return request

    def _reserve(self, request: RemoteTicket) -> list[_Piece]:
        """Blocks on the best engines for the first rows of the request; refuses what can't be."""
        if self._closed:
            raise NotReady("this version is being unloaded: retry")
        if request.deadline <= request.began:
            raise DeadlineExceeded("the deadline has passed")
        pieces: list[_Piece] = []
        room = min(request.total, self._most)
        for _ in range(1 if room == request.total else 2):
            route, ahead_s = self._nearest(request.began)
            if not pieces:
                self._admit(request, route, ahead_s)
            offset = route.link.heap.take(self._info.block_bytes(room))
            if offset is not None:
                pieces.append(_Piece(request, route, offset, room))
        if not pieces:
            raise Overloaded(
                "the memory that is shared with the engine is full: back off, then retry", ahead_s
            )
        return pieces

    def _admit(self, request: RemoteTicket, route: _Route, ahead_s: float) -> None:
        """Refuses what the engine would refuse for certain, before its rows are copied. It judges
        the rest: it alone knows who is before a request of the highest priority, and whether an
        estimate is worth anything after an idle time.
        """
        if request.priority == 1:
            return
        # The last batch of those who wait may have room for this one.
        over_s = ahead_s - self._info.max_batch_size * route.row_s - self._max_wait_s
        late_s = request.began + ahead_s - request.deadline
        if over_s > 0 or late_s > 0:
            raise Overloaded(
                f"those who wait take about {ahead_s:.2g} s: back off, then retry",
                max(over_s, late_s),
            )

    def _nearest(self, now: float) -> tuple[_Route, float]:
        """The engine that has the least to do, and for how many seconds."""
        best: _Route | None = None
        least_s = math.inf
        for route in self.engines.routes(self._info):
            ahead_s = route.ahead_s(now)
            if best is None or (ahead_s, route.rows) < (least_s, best.rows):
                best, least_s = route, ahead_s
        if best is None or least_s == math.inf:
            raise NotReady("no engine serves this model at the moment: retry")
        return best, least_s

    def wait_s(self, rows: int = 1) -> float:
        """Estimated seconds until `rows` submitted now would be answered. Raises NotReady where no
        engine serves the model.
        """
        with self.engines.lock:
            route, ahead_s = self._nearest(time.monotonic())
            return ahead_s + rows * route.row_s

    @property
    def ready(self) -> bool:
        """Whether an engine serves the model."""
        return not self._closed and bool(self.engines.routes(self._info))

    @property
    def waiting(self) -> bool:
        """There are requests that `run_next` would send."""
        return self.engines.unsent

    def run_next(self) -> bool:
        """Sends, in one go for each engine, all that was submitted; False where nothing was."""
        if not self.engines.unsent:
            return False
        self.engines.flush()
        return True

    def start(self) -> None:
        """From now on `submit` sends at once; without it the caller has to call `run_next`."""
        self._eager = True

    def forget(self) -> None:
        """A request has ended; the lock is held."""
        self._open -= 1
        if self._closed and not self._open:
            self._idle.notify_all()

    def close(self) -> None:
        """Refuses new requests, and returns when all that wait have ended."""
        with self.engines.lock:
            self._closed = True
        self.engines.flush()
        with self.engines.lock:
            self._idle.wait_for(lambda: not self._open)
