"""Sends one load from several processes and keeps when each request was due, sent and answered.

Open loop: the moments are drawn before and kept to, whatever the server does, and latency counts from
them. A client that waits for slow answers before it goes on leaves out just the requests that would
have suffered ("coordinated omission", Gil Tene, "How NOT to Measure Latency"). What the client itself
is late by is kept beside, so that it can't pass for the server's.
"""

import ctypes
import gc
import multiprocessing
import select
import signal
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from convoy.bench.http2 import CODES, OK, REFUSED, UNAVAILABLE, Answer, Connection, frame
from convoy_protos import classifier_pb2
from convoy_service.errors import ConvoyError

Floats = NDArray[np.float64]

# Answers may differ by so much from what the same request was answered alone.
TOLERANCE = 1e-3

_CODE = {name: code for code, name in CODES.items()}
_UNANSWERED = 255
_PR_SET_TIMERSLACK = 29

# Requests that are sent without looking at answers in between, however late they are.
_BURST = 64
# Between attempts to connect anew.
_RECONNECT_S = 0.1
# A client that is later than this can't send at that rate: there is nothing to be measured.
_LATEST_S = 2.0
# From the order to begin until the first request: it must have reached every process.
_LEAD_S = 0.02

Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Work:
    """What every load of a run sends, and where to."""

    target: str
    """HOST:PORT."""
    path: str
    """/package.Service/Method; of a stream, requests are its messages."""
    payloads: Sequence[bytes]
    """Serialised requests, sent in turn; for a stream, without their ids."""
    stream: bool = False
    connections: int = 1
    truths: Sequence[Rows] | None = None
    """For each payload the rows that must be answered, if answers are to be checked."""
    read: Callable[[bytes], Rows] | None = None
    """Reads the rows of an answer. Raises ValueError."""


@dataclass(frozen=True)
class Load:
    """How requests follow each other: exactly one of `rate` and `concurrency`."""

    rate: float | None = None
    """Open loop: requests a second."""
    concurrency: int | None = None
    """Closed loop: requests in flight."""
    arrivals: Literal["poisson", "constant"] = "poisson"
    duration_s: float = 10.0
    warmup_s: float = 1.0
    """Requests due in this time, before the duration, are sent but not counted."""
    timeout_s: float = 30.0
    """Deadline of each request."""
    patience_s: float | None = None
    """After the last request is sent, how long answers are waited for; None is until the deadline."""
    seed: int = 0

    @property
    def length_s(self) -> float:
        return self.warmup_s + self.duration_s

    def schedule(self) -> Floats:
        """When requests are due in the open loop, in seconds from the start."""
        assert self.rate is not None
        if self.arrivals == "constant":
            return np.arange(0, self.length_s, 1 / self.rate)
        random = np.random.default_rng(self.seed)
        count = self.rate * self.length_s
        # Six standard deviations more than are expected.
        gaps = random.exponential(1 / self.rate, round(count + 6 * count**0.5) + 10)
        due = np.cumsum(gaps)
        return due[due < self.length_s]


@dataclass(frozen=True)
class Samples:
    """One value a request, in seconds from the start of the load where not said otherwise."""

    due: Floats
    """When it should have been sent."""
    sent: Floats
    answered: Floats
    code: NDArray[np.uint8]
    """gRPC status code."""
    wrong_rows: int = 0
    """Answers, or images of them, that are not what the request was answered alone."""
    cpu: float = 0.0
    """CPU time of the client over the time that passed; of the busiest process."""
    details: dict[int, str] = field(default_factory=dict)
    """For each code other than OK the message of the first that had it."""

    @property
    def latency(self) -> Floats:
        """From when each was due until its answer, in seconds."""
        return self.answered - self.due

    @property
    def lag(self) -> Floats:
        """How much later than due the client sent each, in seconds."""
        return self.sent - self.due


def merge(parts: Sequence[Samples]) -> Samples:
    """The samples of several processes as those of one: every request is kept as it is."""
    details: dict[int, str] = {}
    for part in parts:
        details = part.details | details
    return Samples(
        due=np.concatenate([part.due for part in parts]),
        sent=np.concatenate([part.sent for part in parts]),
        answered=np.concatenate([part.answered for part in parts]),
        code=np.concatenate([part.code for part in parts]),
        wrong_rows=sum(part.wrong_rows for part in parts),
        cpu=max(part.cpu for part in parts),
        details=details,
    )


class Fleet:
    """Processes that send, from the start of the first load to the end of the last; use `with`."""

    def __init__(self, work: Work, processes: int) -> None:
        # A forked child would inherit threads and locks of gRPC's that are in use.
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Pipe] = []
        self._processes = []
        for index in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, index, processes), daemon=True, name=f"bench-{index}"
            )
            process.start()
            theirs.close()
            ours.send(work)
            self._pipes.append(ours)
            self._processes.append(process)
        self._collect(lambda: None)

    def run(self, load: Load, tick: Callable[[float], None] = lambda _: None) -> Samples:
        """Sends the load, waits for its answers; `tick` is told the seconds since the start, often.

        Raises ConvoyError where the server can't be reached, or a process has died.
        """
        for pipe in self._pipes:
            pipe.send(load)
        self._collect(lambda: None)
        begin = time.perf_counter() + _LEAD_S
        for pipe in self._pipes:
            pipe.send(begin)
        return merge(self._collect(lambda: tick(time.perf_counter() - begin)))

    def _collect(self, tick: Callable[[], None]) -> list[Any]:
        answers: dict[Pipe, Any] = {}
        while len(answers) < len(self._pipes):
            for pipe in wait([p for p in self._pipes if p not in answers], timeout=0.25):
                assert isinstance(pipe, Pipe)
                try:
                    answer = pipe.recv()
                except EOFError:
                    raise ConvoyError("a process of the client has died: see above") from None
                if isinstance(answer, Exception):
                    raise answer
                answers[pipe] = answer
            tick()
        return [answers[pipe] for pipe in self._pipes]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if kind is not None:
                process.terminate()
            process.join()


def _serve(pipe: Pipe, index: int, count: int) -> None:
    """One process of a fleet, until the pipe is closed."""
    # Ctrl-C reaches the parent, too, and that one ends us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Linux lets a process sleep 50 microseconds longer than it asked for; requests would be late by that.
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    work: Work = pipe.recv()
    if not work.stream:
        work = replace(work, payloads=[frame(message) for message in work.payloads])
    pipe.send(None)
    while True:
        try:
            load: Load = pipe.recv()
        except EOFError:
            return
        try:
            sender = _Sender(work, load, index, count)
            pipe.send(None)
            pipe.send(sender.run(pipe.recv()))
        except ConvoyError as error:
            pipe.send(error)
        except OSError as error:
            pipe.send(ConvoyError(f"{work.target}: {error}"))


class _Sender:
    """One load, as far as one process of several sends it."""

    def __init__(self, work: Work, load: Load, index: int, count: int) -> None:
        """Connects, and makes all that can be made before. Raises OSError."""
        self._work, self._load, self._index, self._count = work, load, index, count
        self._schedule = load.schedule()[index::count] if load.concurrency is None else None
        connections = _share(max(work.connections, count), index, count)
        self._links = [_Link(work, load.timeout_s) for _ in range(connections)]
        self._due, self._sent, self._answered = array("d"), array("d"), array("d")
        self._code = bytearray()
        self._streams: list[_Stream | None] = []
        self._in_flight = 0
        # Every request before this one has ended.
        self._oldest = 0
        self._wrong_rows = 0
        self._details: dict[int, str] = {}
        for link in self._links:
            link.connect()

    def run(self, begin: float) -> Samples:
        """Sends the load; `begin` is when, on the clock of time.perf_counter."""
        gc.disable()
        try:
            time.sleep(max(0.0, begin - time.perf_counter()))
            cpu, start = time.process_time(), time.perf_counter()
            if self._schedule is not None:
                self._open((begin + self._schedule).tolist())
            else:
                self._closed(begin + self._load.length_s)
            self._finish()
            cpu, passed = time.process_time() - cpu, time.perf_counter() - start
        finally:
            gc.enable()
            for link in self._links:
                link.close()
        return Samples(
            # Not back from the clock: a sum rounded may fall on the other side of a limit.
            due=np.array(self._due) - begin if self._schedule is None else self._schedule,
            sent=np.array(self._sent) - begin,
            answered=np.array(self._answered) - begin,
            code=np.array(self._code, np.uint8),
            wrong_rows=self._wrong_rows,
            cpu=cpu / passed,
            details=self._details,
        )

    def _open(self, due: list[float]) -> None:
        position = 0
        while position < len(due):
            burst = min(position + _BURST, len(due))
            while position < burst and due[position] <= time.perf_counter():
                self._start(due[position])
                position += 1
            self._poll(due[position] if position < len(due) else 0)
            if position < len(due) and time.perf_counter() > due[position] + _LATEST_S:
                raise ConvoyError(
                    f"the client can't send {self._load.rate:,.6g}/s, and is {_LATEST_S:g} s behind: "
                    "give it more --processes, or a lower --rate"
                )

    def _closed(self, end: float) -> None:
        concurrency = _share(self._load.concurrency or 0, self._index, self._count)
        while (now := time.perf_counter()) < end:
            for _ in range(concurrency - self._in_flight):
                self._start(time.perf_counter())
            # Fewer are in flight only where there is no connection.
            self._poll(end if self._in_flight == concurrency else now + _RECONNECT_S)

    def _finish(self) -> None:
        """Waits for the answers that are due yet, and gives up what is not there in time."""
        load = self._load
        patience = load.timeout_s if load.patience_s is None else load.patience_s
        end = time.perf_counter() + patience
        while self._in_flight and time.perf_counter() < end:
            self._poll(end)
        now = time.perf_counter()
        for token in range(self._oldest, len(self._code)):
            self._give_up(token, now)
        for link in self._links:
            link.flush()

    def _start(self, due: float) -> None:
        now = time.perf_counter()
        self._due.append(due)
        self._sent.append(now)
        self._answered.append(now)
        self._code.append(_UNANSWERED)
        self._streams.append(None)
        self._in_flight += 1
        self._send(len(self._due) - 1, now)

    def _send(self, token: int, now: float) -> None:
        link = self._links[token % len(self._links)]
        try:
            self._streams[token] = link.start(token, self._work.payloads[self._payload(token)])
        except OSError as error:
            self._end(Answer(token, UNAVAILABLE, f"can't connect: {error}"), now)

    def _payload(self, token: int) -> int:
        return (token * self._count + self._index) % len(self._work.payloads)

    def _poll(self, until: float) -> None:
        """Hands over what is to be sent, waits for answers or `until`, and takes what is there."""
        links = {connection: link for link in self._links for connection in link.connections}
        for connection in links:
            connection.flush()
        if self._oldest < len(self._sent):
            until = min(until, self._sent[self._oldest] + self._load.timeout_s)
        unflushed = [connection for connection in links if connection.unflushed]
        readable, _, _ = select.select(links, unflushed, (), max(0.0, until - time.perf_counter()))
        now = time.perf_counter()
        for connection in readable:
            for answer in links[connection].receive(connection):
                self._end(answer, now)
        # All have the same deadline: they pass it in the order of sending.
        late = now - self._load.timeout_s
        while self._oldest < len(self._code):
            if self._code[self._oldest] == _UNANSWERED:
                if self._sent[self._oldest] > late:
                    break
                self._give_up(self._oldest, now)
            self._streams[self._oldest] = None
            self._oldest += 1

    def _give_up(self, token: int, now: float) -> None:
        if self._code[token] == _UNANSWERED:
            self._links[token % len(self._links)].forget(token, self._streams[token])
            late = now >= self._sent[token] + self._load.timeout_s
            code = _CODE["DEADLINE_EXCEEDED" if late else "CANCELLED"]
            self._end(Answer(token, code, "the client has given up waiting"), now)

    def _end(self, answer: Answer, now: float) -> None:
        token, code = answer.token, answer.code
        assert code is not None
        if code == REFUSED:
            self._send(token, now)
            return
        self._answered[token] = now
        self._code[token] = code
        self._in_flight -= 1
        if code != OK:
            self._details.setdefault(code, answer.details)
        elif self._work.truths is not None:
            assert self._work.read is not None
            truth = self._work.truths[self._payload(token)]
            self._wrong_rows += wrong_rows(self._work.read, answer.message, truth)


def wrong_rows(read: Callable[[bytes], Rows], message: bytes, truth: Rows) -> int:
    """How many rows of an answer are not what they must be; all where it can't be read."""
    try:
        rows = read(message)
    except ValueError:
        return len(truth)
    if rows.shape != truth.shape:
        return len(truth)
    return int((~(np.abs(rows - truth) <= TOLERANCE).all(axis=1)).sum())


def _share(total: int, index: int, count: int) -> int:
    return total // count + (index < total % count)


_Stream = tuple[Connection, int]


class _Link:
    """One connection, and the next when the server closes it."""

    def __init__(self, work: Work, timeout_s: float) -> None:
        self._work = work
        # A stream goes on; its messages have the deadline.
        self._timeout_s = None if work.stream else timeout_s
        self.connections: list[Connection] = []
        """Those with calls that have not ended; new ones go to the last."""
        self._failed_at = -_RECONNECT_S
        # Of a stream: its number on the last connection, and what is unanswered of each.
        self._stream = 0
        self._pending: dict[int, dict[int, None]] = {}

    def connect(self) -> Connection:
        """The connection for new calls. Raises OSError where there is none."""
        if self.connections and self.connections[-1].usable:
            return self.connections[-1]
        now = time.perf_counter()
        if now < self._failed_at + _RECONNECT_S:
            raise ConnectionRefusedError("it was tried just now")
        try:
            connection = Connection(
                self._work.target,
                self._work.path,
                timeout_s=self._timeout_s,
                keep=self._work.stream or self._work.truths is not None,
            )
        except OSError:
            self._failed_at = now
            raise
        self.connections.append(connection)
        self._stream = 0
        return connection

    def start(self, token: int, payload: bytes) -> _Stream | None:
        """Sends a request. Raises OSError where there is no connection."""
        connection = self.connect()
        if not self._work.stream:
            return connection, connection.start(token, payload)
        if not self._stream:
            generation = len(self._pending)
            self._pending[generation] = {}
            self._stream = connection.start(generation, half_close=False)
        next(reversed(self._pending.values()))[token] = None
        id = b"%d" % token
        connection.write(self._stream, frame(b"\n" + bytes([len(id)]) + id + payload))
        return None

    def forget(self, token: int, stream: _Stream | None) -> None:
        """Stops waiting for a request's answer."""
        if stream:
            connection, number = stream
            connection.cancel(number)
        for pending in self._pending.values():
            pending.pop(token, None)

    def receive(self, connection: Connection) -> list[Answer]:
        """What has arrived, each request by its own token."""
        answers = connection.receive()
        if not connection.usable and connection.idle:
            connection.close()
            self.connections.remove(connection)
        return self._of_stream(answers) if self._work.stream else answers

    def _of_stream(self, answers: list[Answer]) -> list[Answer]:
        found = []
        for answer in answers:
            pending = self._pending[answer.token]
            if answer.code is None:
                response = _of_message(answer.message)
                # It may have been given up before.
                if response.token in pending:
                    del pending[response.token]
                    found.append(response)
            else:
                if answer.token == len(self._pending) - 1:
                    self._stream = 0
                code = _CODE["UNKNOWN"] if answer.code == OK else answer.code
                found += [Answer(token, code, answer.details) for token in pending]
                pending.clear()
        return found

    def flush(self) -> None:
        for connection in self.connections:
            connection.flush()

    def close(self) -> None:
        for connection in self.connections:
            connection.close()


def _of_message(message: bytes) -> Answer:
    """A ClassifyStreamResponse, whose id is a token, as the answer of that request."""
    # Field 1 is the id, field 2 the response: parsing all would cost more than the rest together.
    after = 2 + message[1]
    if message[0] == 0x0A and message[after] == 0x12:
        return Answer(int(message[2:after]), OK, "", message)
    response = classifier_pb2.ClassifyStreamResponse.FromString(message)
    if response.HasField("error"):
        return Answer(int(response.id), response.error.code, response.error.message)
    return Answer(int(response.id), OK, "", message)
