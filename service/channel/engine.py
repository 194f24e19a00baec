"""The engine's side of the channel."""

import logging
import math
import mmap
import os
import select
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from service.batcher import Answer, Batcher, Outputs, Rows, Ticket
from service.channel.protocol import (
    CANCEL,
    HELLO,
    MAGIC,
    OK,
    PROTOCOL,
    REPLY,
    REQUEST,
    SUBMIT,
    WELCOME,
    Malformed,
    ModelInfo,
    Wire,
    bell,
    check_protocol,
    receive_memory,
    shared_memory,
    status_of,
)
from service.errors import ConvoyError, NotReady, Overloaded

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
        status, run_s, retry_after_s, batch_size, failed_rows = OK, 0.0, 0.0, 0, 0
        outputs: Outputs | float | None = None
        if isinstance(outcome, Answer):
            outputs, _, run_s, batch_size, failed_rows = outcome
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
                REPLY.pack(self.number, run_s, retry_after_s, batch_size, failed_rows, status)
            )
            self.server.wake()


class EngineServer:
    """Takes rows from acceptors, hands them to batchers, and gives the answers back.

    `serve` is the engine process's main loop. What an acceptor leaves waiting when it ends is
    cancelled; what it sends against the protocol ends its connection, with a line in the log, and
    no other.
    """

    def __init__(self, listener: socket.socket, models: Sequence[Hosted]) -> None:
        """`listener` is a listening Unix socket, which `serve` closes: see `listen`. The batchers
        stay the caller's, who closes them when `serve` has returned.
        """
        self._listener, self._models = listener, tuple(models)
        self._row_bytes = [model.info.row_bytes for model in models]
        self._acceptors: dict[int, _Acceptor] = {}  # by file descriptor
        self._poller = select.epoll()
        self._bell, self._rung = bell(self), False
        self._closing = False
        self._thread = 0
        infos = msgspec.json.encode([model.info for model in models])
        infos += b" " * (-len(infos) % 8)
        self._page_fd = shared_memory(len(infos) + 16 * len(models))
        page = mmap.mmap(self._page_fd, 0)
        page[: len(infos)] = infos
        # Of each model: when those who wait will be done, and the seconds of each row more.
        self._times = memoryview(page)[len(infos) :].cast("d")
        self._welcome = WELCOME.pack(MAGIC, PROTOCOL, len(infos))

    def serve(self) -> None:
        """Serves on the calling thread until `close` is called and all that waited is answered."""
        self._thread = threading.get_ident()
        inline = [model.batcher for model in self._models if model.inline]
        self._listener.setblocking(False)
        listening = self._listener.fileno()
        self._poller.register(listening, select.EPOLLIN)
        self._poller.register(self._bell, select.EPOLLIN)
        try:
            while not self._finished():
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
        for i, (info, batcher, _) in enumerate(self._models):
            ahead_s, size = batcher.wait_s(0), info.max_batch_size
            self._times[2 * i] = math.inf if self._closing else now + ahead_s
            # A batch that ends between the two makes this less.
            self._times[2 * i + 1] = max(0.0, batcher.wait_s(size) - ahead_s) / size

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
        if (
            kind != SUBMIT
            or index >= len(self._models)
            or not rows
            or offset + rows * self._row_bytes[index] > len(memory)
            or math.isnan(deadline)
            or number in jobs
        ):
            raise Malformed(
                f"request {number} of kind {kind}: {rows} rows at {offset} of {len(memory)} bytes, "
                f"model {index}, deadline {deadline}"
            )
        model = self._models[index]
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
