"""The engine's side of the channel."""

import logging
import math
import mmap
import os
import queue
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convoy_service.engine.batcher import Answer, Batcher, Outputs, Rows, Ticket
from convoy_service.errors import ConvoyError, NotReady, Overloaded
from convoy_service.ipc.protocol import (
    CANCEL,
    HELLO,
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
    Offer,
    Wire,
    bell,
    check_protocol,
    receive_memory,
    shared_memory,
    status_of,
    write_offers,
)

log = logging.getLogger("convoy.channel")


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


class _Acceptor:
    """A connection."""

    def __init__(self, sock: socket.socket, poller: select.epoll) -> None:
        self.socket = sock
        self.wire = Wire(sock, poller, REQUEST)
        self.memory: mmap.mmap | None = None  # until the hello, and after the end
        self.jobs: dict[int, _Job] = {}


class _Job:
    """A submitted request."""

    __slots__ = ("acceptor", "model", "number", "offset", "rows", "server", "ticket")

    def __init__(
        self,
        server: "EngineServer",
        acceptor: _Acceptor,
        model: Hosted,
        number: int,
        offset: int,
        rows: int,
    ) -> None:
        self.server, self.acceptor, self.model = server, acceptor, model
        self.number, self.offset, self.rows = number, offset, rows
        self.ticket: Ticket | None = None

    def done(self, outcome: Answer | Exception) -> None:
        """Replies. On whichever thread ends the request."""
        acceptor, memory, classes = self.acceptor, self.acceptor.memory, self.model.info.classes
        status, run_s, batch_s, retry_after_s, batch, size, failed_rows = OK, 0.0, 0.0, 0.0, 0, 0, 0
        outputs: Outputs | float | None = None
        if isinstance(outcome, Answer):
            outputs, _, run_s, size, failed_rows, batch, batch_s = outcome
        elif (status := status_of(outcome)) == OK:
            outputs, failed_rows = math.nan, self.rows
        elif isinstance(outcome, Overloaded):
            retry_after_s = outcome.retry_after_s
        if outputs is not None and memory is not None:
            np.ndarray((self.rows, classes), np.float32, memory, self.offset)[...] = outputs
        self.ticket = None  # which knows this job by its `done`
        # It is gone where the acceptor is.
        if acceptor.jobs.pop(self.number, None):
            acceptor.wire.put(
                REPLY.pack(
                    self.number, run_s, batch_s, retry_after_s, batch, size, failed_rows, status
                )
            )
            self.server.wake()


class EngineServer:
    """Takes rows from acceptors, hands them to batchers, and gives the answers back.

    `serve` is the engine process's main loop. What an acceptor leaves waiting when it ends is
    cancelled; what it sends against the protocol ends its connection, with a line in the log, and
    no other.
    """

    def __init__(self, listener: socket.socket, models: Sequence[Hosted] = ()) -> None:
        """`listener` is a listening Unix socket, which `serve` closes: see `listen`. The batchers
        stay the caller's, who closes them when `serve` has returned, or after `drop`.
        """
        self._listener = listener
        # By their numbers; and the places of their times.
        self._models: dict[int, Hosted] = {}
        self._places: dict[int, int] = {}
        self._given = 0  # numbers
        self._inline: list[Batcher] = []
        self._changes: deque[Callable[[], None]] = deque()
        self._acceptors: dict[int, _Acceptor] = {}  # by file descriptor
        self._poller = select.epoll()
        self._bell, self._rung = bell(self), False
        self._closing = self._ended = False
        self._thread = 0
        self._page_fd = shared_memory(PAGE_BYTES)
        self._page = mmap.mmap(self._page_fd, 0)
        # Of each model: when those who wait will be done, and the seconds of each row more.
        self._times = memoryview(self._page)[TIMES_AT:].cast("d")
        self._welcome = WELCOME.pack(MAGIC, PROTOCOL, TIMES_AT)
        for model in models:
            self._add(model)
        self._offer()

    def host(self, model: Hosted) -> None:
        """Serves one more model; returns when acceptors have been told. May be called on any thread
        but `serve`'s, while that runs or is about to.

        Raises ValueError where there is no room for more.
        """
        self._change(lambda: self._add(model))

    def drop(self, batcher: Batcher) -> None:
        """Takes no more requests for this one, of which those that it has still are to be finished:
        `Batcher.close`. To be called as `host`.
        """
        self._change(lambda: self._remove(batcher))

    def _change(self, change: Callable[[], None]) -> None:
        done: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def run() -> None:
            try:
                change()
                self._offer()
            except ValueError as error:
                done.put(error)
            else:
                done.put(None)

        self._changes.append(run)
        os.eventfd_write(self._bell, 1)
        if self._ended:
            self._make_changes()
        if error := done.get():
            raise error

    def _make_changes(self) -> None:
        with suppress(IndexError):
            while True:
                self._changes.popleft()()

    def _add(self, model: Hosted) -> None:
        if len(self._models) == MOST_MODELS:
            raise ValueError(f"an engine serves {MOST_MODELS} versions at most")
        index, self._given = self._given, self._given + 1
        self._models[index] = model
        self._places[index] = min(set(range(MOST_MODELS)) - set(self._places.values()))

    def _remove(self, batcher: Batcher) -> None:
        for index, model in list(self._models.items()):
            if model.batcher is batcher:
                del self._models[index], self._places[index]

    def _offer(self) -> None:
        """Says what is served now."""
        self._inline = [model.batcher for model in self._models.values() if model.inline]
        self._publish()
        offers = [Offer(n, self._places[n], model.info) for n, model in self._models.items()]
        write_offers(self._page, offers)
        news = REPLY.pack(NEWS, 0.0, 0.0, 0.0, 0, 0, 0, OK)
        for acceptor in self._acceptors.values():
            if acceptor.memory is not None:
                acceptor.wire.put(news)
                acceptor.wire.flush()

    def serve(self) -> None:
        """Serves on the calling thread until `close` is called and all that waited is answered."""
        self._thread = threading.get_ident()
        self._listener.setblocking(False)
        listening = self._listener.fileno()
        self._poller.register(listening, select.EPOLLIN)
        self._poller.register(self._bell, select.EPOLLIN)
        try:
            while not self._finished():
                if self._changes:
                    self._make_changes()
                inline = self._inline
                busy = any(batcher.waiting for batcher in inline)
                if not busy:
                    self._publish()
                for fd, events in self._poller.poll(0 if busy else None):
                    if fd == self._bell:
                        os.eventfd_read(fd)
                        self._rung = False
                    elif fd == listening:
                        self._accept()
                    elif fd in self._acceptors:
                        self._hear(self._acceptors[fd], events)
                for batcher in inline:
                    if batcher.waiting:
                        self._publish()
                        batcher.run_next()
                for fd in self._acceptors:
                    self._acceptors[fd].wire.flush()
        finally:
            self._ended = True
            self._make_changes()  # nobody may wait for them
            while self._acceptors:
                self._drop(next(iter(self._acceptors.values())))
            self._listener.close()
            self._poller.close()
            os.close(self._page_fd)

    def close(self) -> None:
        """Ends `serve` when all that waits is answered; new requests hear NotReady. May be called
        on any thread, and by a signal handler.
        """
        self._closing = True
        os.eventfd_write(self._bell, 1)

    def wake(self) -> None:
        """Has `serve` send what another thread has put in line."""
        if not self._rung and threading.get_ident() != self._thread:
            self._rung = True
            os.eventfd_write(self._bell, 1)

    def _finished(self) -> bool:
        return self._closing and all(
            not acceptor.jobs and acceptor.wire.empty for acceptor in self._acceptors.values()
        )

    def _publish(self) -> None:
        now = time.monotonic()
        for index, (info, batcher, _) in self._models.items():
            ahead_s, size, at = batcher.wait_s(0), info.max_batch_size, 2 * self._places[index]
            self._times[at] = math.inf if self._closing else now + ahead_s
            # A batch that ends between the two makes this less.
            self._times[at + 1] = max(0.0, batcher.wait_s(size) - ahead_s) / size

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
                return
            if events & select.EPOLLOUT:
                acceptor.wire.go_on()
            if acceptor.memory is None:
                (magic, protocol), memory = receive_memory(acceptor.socket, HELLO)
                check_protocol(magic, protocol)
                acceptor.memory = memory
                socket.send_fds(acceptor.socket, [self._welcome], [self._page_fd])
            else:
                for record in acceptor.wire.receive():
                    self._take(acceptor, acceptor.memory, *record)
        except BlockingIOError:
            pass  # the hello is still to come
        except Malformed as error:
            log.error("an acceptor was cut off: %s", error)
            self._drop(acceptor)
        except OSError:
            self._drop(acceptor)

    def _take(
        self,
        acceptor: _Acceptor,
        memory: mmap.mmap,
        number: int,
        deadline: float,
        offset: int,
        priority: int,
        rows: int,
        index: int,
        kind: int,
    ) -> None:
        jobs = acceptor.jobs
        if kind == CANCEL:
            if (known := jobs.get(number)) and known.ticket:  # else it is answered meanwhile
                known.ticket.cancel()
            return
        model = self._models.get(index)
        if (
            kind != SUBMIT
            or index >= self._given
            or not rows
            or (model and offset + rows * model.info.row_bytes > len(memory))
            or math.isnan(deadline)
            or number in jobs
        ):
            raise Malformed(
                f"request {number} of kind {kind}: {rows} rows at {offset} of {len(memory)} bytes, "
                f"model {index}, deadline {deadline}"
            )
        if model is None:  # dropped, while the request was on its way
            acceptor.wire.put(REPLY.pack(number, 0.0, 0.0, 0.0, 0, 0, 0, status_of(NotReady())))
            return
        job = jobs[number] = _Job(self, acceptor, model, number, offset, rows)
        try:
            if self._closing:
                raise NotReady("stopping")
            pixels: Rows = np.ndarray((rows, *model.info.row_shape), np.uint8, memory, offset)
            job.ticket = model.batcher.submit(
                pixels, job.done, deadline=deadline, priority=priority
            )
        except ConvoyError as error:
            job.done(error)
