"""Calls <-> plain handlers: statuses, admission, counting and draining, the same for every API.

A handler is `async (request message, Call) -> response message`, which may be serialised already,
and awaits nothing but `task.Wait`. What it raises becomes a status here, and nowhere else.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message

from convoy_service import errors
from convoy_service.tasks import Task, Wait, ignore
from convoy_service.telemetry.counters import Metrics, Requests
from convoy_service.transport import protobuf_scan as wire
from convoy_service.transport.call import Exchange
from convoy_service.transport.loop import Loop

if TYPE_CHECKING:
    from convoy_service.telemetry.tracing import Trace, Tracing  # needs OpenTelemetry

log = logging.getLogger("convoy.front")

Code = grpc.StatusCode
_STATUS: dict[type[Exception], grpc.StatusCode] = {
    errors.InvalidRequest: Code.INVALID_ARGUMENT,
    errors.UnknownModel: Code.NOT_FOUND,
    errors.UnknownRegion: Code.NOT_FOUND,
    errors.AlreadyThere: Code.ALREADY_EXISTS,
    errors.NotAllowed: Code.PERMISSION_DENIED,
    errors.NotPossible: Code.FAILED_PRECONDITION,
    errors.Unsupported: Code.UNIMPLEMENTED,
    errors.Overloaded: Code.RESOURCE_EXHAUSTED,
    errors.NotReady: Code.UNAVAILABLE,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    errors.Cancelled: Code.CANCELLED,
    errors.InferenceFailed: Code.INTERNAL,
}
_INTERNAL = "internal error: please report it; the server's log says more"

# The metadata by which callers say which requests belong together.
KEY = "x-convoy-key"

# What a caller is asked to wait, in seconds, where nobody can say better, and at the least and most.
_RETRY_S = (0.1, 0.01, 5.0)

# What one stream may owe before no more of it is read: so many answers, and so many bytes of
# requests that are worked on and of answers that are not taken.
_STREAM_WINDOW = 256
_STREAM_WINDOW_BYTES = 16_000_000

# How long the message of a call may keep room from others that they need.
_UNREAD_S = 10.0

# Only larger bodies are looked at before they are parsed; these are parsed in a millisecond.
_SMALL_BYTES = 1_000_000
# From here on, looking for the tensor in a body costs less than copying it.
_SPLIT_BYTES = 64_000

# Status messages travel as metadata, of which gRPC refuses more than 8 kB; there each byte of a
# character that is not ASCII takes three. Some of them quote what the caller sent.
_MAX_WORDS_BYTES = 2000


class Call:
    """What a handler knows of its call. `arrived` and `deadline` are on `time.monotonic`'s clock."""

    __slots__ = (
        "arrived", "deadline", "held", "metadata", "model", "raw", "requests", "times", "trace",
    )  # fmt: skip

    def __init__(
        self, deadline: float | None, metadata: Sequence[tuple[str, str | bytes]] = ()
    ) -> None:
        self.arrived, self.deadline = time.monotonic(), deadline
        self.metadata = metadata
        # Bytes of the fields that were left out when the message was parsed, see `Front.unary`.
        self.raw: Sequence[memoryview] = ()
        # Set by the handler once it knows: the label under which the call is counted, and what else
        # takes how it ends.
        self.model = ""
        self.requests: Requests | None = None
        # See `ran`, and when that was.
        self.times: tuple[float, float, float, float] | None = None
        # What it holds in memory, in bytes; `Front.hold` adds to it.
        self.held = 0
        # Of one that is traced: what it went through is noted there.
        self.trace: Trace | None = None

    def key(self) -> str | None:
        """Who asks, or about what, by the caller's metadata; None where that does not say."""
        for name, value in self.metadata:
            if name == KEY:
                return value if isinstance(value, str) else value.decode(errors="replace")
        return None

    def ran(self, decode_s: float, queue_s: float, run_s: float) -> None:
        """What took time until there was an answer, which is now: for `requests`."""
        self.times = decode_s, queue_s, run_s, time.monotonic()

    def limit(self, deadline: float) -> None:
        """The caller asked, in the request itself, for an answer by then."""
        if self.deadline is None or deadline < self.deadline:
            self.deadline = deadline
            self._end_by(deadline)

    def _end_by(self, deadline: float) -> None:
        """Where gRPC does not end it by itself."""


Handler = Callable[[Any, Call], Coroutine[Wait[Any], Any, Message | bytes]]
Refusal = Callable[[Any, grpc.StatusCode, str], Message]
# Starts to tell `send` of changes, and returns what ends that.
Subscribe = Callable[[Any, Callable[[Message], None]], Callable[[], None]]


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and words that a caller gets for `error`. A bug gets fixed words, and is logged."""
    code = _STATUS.get(type(error)) or next(
        (code for kind, code in _STATUS.items() if isinstance(error, kind)), None
    )
    if code is not None:
        return code, _cut(str(error))
    log.error("a request failed", exc_info=error)
    return Code.INTERNAL, _INTERNAL


def _cut(words: str) -> str:
    data = words.encode(errors="replace")
    if len(data) <= _MAX_WORDS_BYTES:
        return words
    return data[:_MAX_WORDS_BYTES].decode(errors="ignore") + " ..."


def trailers_of(error: Exception) -> tuple[tuple[str, str], ...]:
    """The pushback of gRPC's retries: https://github.com/grpc/proposal/blob/master/A6-client-retries.md."""
    if not isinstance(error, errors.Overloaded):
        return ()
    default, least, most = _RETRY_S
    seconds = min(max(error.retry_after_s or default, least), most)
    return (("grpc-retry-pushback-ms", str(round(1000 * seconds))),)


class Front:
    """Takes the calls of a `Loop`, admits them, and lets them drain."""

    def __init__(
        self,
        loop: Loop,
        metrics: Metrics,
        *,
        max_request_bytes: int,
        max_in_flight: int,
        max_held_bytes: int,
        max_parts: int,
        check: Callable[[float | None], None] = ignore,
        tracing: "Tracing | None" = None,
    ) -> None:
        """`max_parts`: fields in a large body, see `wire.check_parts`. `check(deadline)` raises where
        work can't be done by then, whatever it is.
        """
        self.loop, self.metrics, self.tracing = loop, metrics, tracing
        self._max_bytes, self._max_in_flight = max_request_bytes, max_in_flight
        self._max_held, self._max_parts = max_held_bytes, max_parts
        self._check = check
        self._routes: dict[str, tuple[bool, Callable[[Exchange], object]]] = {}
        self._in_flight = self._held = self._calls = 0
        # Calls whose message has not come, oldest first.
        self.unread: dict[_Unary, None] = {}
        self._streams: set[_Stream] = set()
        self._watches: set[_Watch] = set()
        self.draining = False
        self._on_drained: Callable[[], None] = ignore
        metrics.in_flight = lambda: self._in_flight
        metrics.held_bytes = lambda: self._held
        loop.on_call = self._on_call

    def unary(
        self,
        path: str,
        kind: type[Message],
        handler: Handler,
        *,
        always: bool = False,
        raw_field: int = 0,
    ) -> None:
        """Answers unary calls of `path`, whose requests are `kind`.

        `always`: is answered however much is in flight, and takes nobody's place there, as what
        asks for no work should be: a server that is only busy would else be taken for dead.
        `raw_field`: the field whose bytes a large request hands over as `Call.raw`, uncopied.
        """
        name = path.rpartition("/")[2]
        self._routes[path] = (
            always,
            partial(_Unary, _Route(self, name, kind, handler, always, raw_field)),
        )

    def stream(
        self,
        path: str,
        kind: type[Message],
        handler: Handler,
        refusal: Refusal | None = None,
        *,
        strict: tuple[str, str] | None = None,
        ordered: bool = False,
        raw_field: int = 0,
    ) -> None:
        """Answers bidirectional calls: each message as by `unary`, in the order of finishing, or of
        the messages, if `ordered`.

        `refusal` makes the answer for a message whose handler raised; without, or where the call's
        metadata has `strict`, that ends the call, after the answers before it. When the server drains,
        what was read is answered and the stream ends with UNAVAILABLE.
        """
        name = path.rpartition("/")[2]

        def begin(exchange: Exchange) -> None:
            own = None if strict and strict in exchange.metadata else refusal
            route = _StreamRoute(self, name, kind, handler, own, ordered, raw_field)
            self._streams.add(_Stream(route, exchange))

        self._routes[path] = (True, begin)

    def watch(self, path: str, kind: type[Message], subscribe: Subscribe) -> None:
        """Answers server-streaming calls with whatever `subscribe` sends, until the caller leaves."""
        self._routes[path] = (
            True,
            lambda exchange: self._watches.add(_Watch(self, exchange, kind, subscribe)),
        )

    def hold(self, call: Call, size: int) -> None:
        """Counts memory that a call is about to take. Raises Overloaded where that is too much."""
        if self._held + size > self._max_held and self._held > call.held:
            raise self._full()
        self._held += size
        call.held += size

    def drain(self, then: Callable[[], None]) -> None:
        """Refuses new calls and ends streams; `then` is called when no call is left."""
        self.draining = True
        self._on_drained = then
        for stream in list(self._streams):
            stream.end_if_done()
        self._check_drained()

    def close(self) -> int:
        """Ends what only ends with the server; the number of calls that are cut off."""
        for watch in list(self._watches):
            watch.end()
        return self._calls - len(self._watches)

    def _on_call(self, exchange: Exchange) -> None:
        route = self._routes.get(exchange.method)
        if route is None:
            exchange.refuse(Code.UNIMPLEMENTED.value[0], f"no method {_cut(exchange.method)}")
            return
        always, begin = route
        if not always:
            error = self.refusal(exchange.deadline)
            if error is not None:
                code = _STATUS[type(error)]
                self.metrics.finished(exchange.method.rpartition("/")[2], "", code.name, 0.0)
                if trace := self.trace(exchange, time.monotonic()):
                    trace.end(code.name, "")
                exchange.refuse(code.value[0], str(error), trailers_of(error))
                return
        self._calls += 1
        exchange.accept()
        begin(exchange)

    def trace(self, exchange: Exchange, arrived: float) -> "Trace | None":
        """Of a request that `arrived` then; None where it is not traced."""
        if self.tracing is None:
            return None
        if exchange.http is None:
            return self.tracing.rpc(exchange.method, exchange.metadata, arrived)
        return self.tracing.http(*exchange.http, exchange.metadata)

    def refusal(self, deadline: float | None) -> errors.ConvoyError | None:
        """Why no more work is taken on; None where it is."""
        if self.draining:
            return errors.NotReady(errors.SHUTTING_DOWN)
        if self._in_flight >= self._max_in_flight:
            self._end_unread()
            return errors.Overloaded(
                f"{self._max_in_flight} requests are in flight here: {errors.BACK_OFF}"
            )
        if deadline is not None and deadline <= time.monotonic():
            return errors.Overloaded(
                f"by when this call was read, the time that it allowed was over: {errors.BACK_OFF}"
            )
        if self._held >= self._max_held:
            return self._full()
        try:
            self._check(deadline)
        except errors.ConvoyError as error:
            # With it the callers' frames would keep the error, and it them.
            return error.with_traceback(None)
        return None

    def _full(self) -> errors.Overloaded:
        return errors.Overloaded(
            f"{self._held / 1e6:.0f} MB of requests are worked on: {errors.BACK_OFF}"
        )

    def _end_unread(self) -> None:
        """Calls that take up room and do not say what for must not keep others out."""
        ended_by = time.monotonic() - _UNREAD_S
        while self.unread:
            oldest = next(iter(self.unread))
            if oldest.arrived > ended_by:
                return
            oldest.give_up()

    def started(self) -> None:
        self._in_flight += 1

    def ended(self, call: Call, code: grpc.StatusCode) -> float:
        """Counts a request for work that is over; the seconds that it took."""
        self._in_flight -= 1
        self._held -= call.held
        now, requests = time.monotonic(), call.requests
        whole_s = now - call.arrived
        if requests is None:
            return whole_s
        if code is Code.OK:
            decode_s, queue_s, run_s, ran = call.times or (0.0, 0.0, 0.0, now)
            requests.succeeded(whole_s, decode_s, queue_s, run_s, now - ran)
        else:
            requests.failed(code.name, whole_s)
        return whole_s

    def forget(self, call: "_Stream | _Watch") -> None:
        self._streams.discard(call)
        self._watches.discard(call)

    def closed(self) -> None:
        self._calls -= 1
        self._check_drained()

    def _check_drained(self) -> None:
        if self.draining and self._calls <= len(self._watches):
            then, self._on_drained = self._on_drained, ignore
            then()

    def parse(self, kind: type[Message], data: bytes, call: Call, raw_field: int = 0) -> Message:
        """Raises InvalidRequest."""
        if len(data) > self._max_bytes:
            raise errors.InvalidRequest(
                f"the request has {len(data) / 1e6:.1f} MB, the limit is {self._max_bytes / 1e6:g}: "
                "send fewer images a call"
            )
        try:
            if len(data) > _SMALL_BYTES:
                wire.check_parts(kind, data, self._max_parts)
            if raw_field and len(data) > _SPLIT_BYTES:
                data, call.raw = wire.split(data, raw_field)
            return kind.FromString(data)
        except DecodeError:
            raise errors.InvalidRequest(f"the body is no {kind.DESCRIPTOR.full_name}") from None


class _Route(NamedTuple):
    """A unary call's method: see `Front.unary`."""

    front: Front
    name: str
    kind: type[Message]
    handler: Handler
    always: bool
    raw_field: int


class _Unary(Call):
    __slots__ = ("_ended", "_exchange", "_route", "_task", "_timer")

    def __init__(self, route: _Route, exchange: Exchange) -> None:
        super().__init__(exchange.deadline, exchange.metadata)
        self._route, self._exchange = route, exchange
        self._ended = False
        self._task: Task | None = None
        self._timer: int | None = None
        front = route.front
        if not route.always:
            front.started()
            front.unread[self] = None
            if front.tracing is not None:
                self.trace = front.trace(exchange, self.arrived)
        exchange.on_gone = self._gone
        exchange.on_closed = front.closed
        exchange.read(self._received)

    def _end_by(self, deadline: float) -> None:
        self._timer = self._route.front.loop.at(deadline, self._expired)

    def _received(self, data: bytes | None) -> None:
        route, exchange = self._route, self._exchange
        front = route.front
        front.unread.pop(self, None)
        if self._ended:
            return
        if exchange.gone:
            self._end(errors.Cancelled("the caller hung up"))
            return
        if data is None:
            self._end(errors.InvalidRequest("the call has no message"))
            return
        try:
            if not route.always:
                front.hold(self, len(data))
            request = front.parse(route.kind, data, self, route.raw_field)
        except errors.ConvoyError as error:
            self._end(error)
            return
        del data
        self._task = Task(route.handler(request, self), self._end, front.loop)
        self._task.run()

    def give_up(self) -> None:
        """Its message is not waited for any longer."""
        self._route.front.unread.pop(self, None)
        self._end(errors.InvalidRequest("the message of this call did not come"))

    def _gone(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _expired(self) -> None:
        task = self._task
        self._end(errors.DeadlineExceeded("the time that the request allowed is over"))
        if task is not None:
            task.cancel()

    def _end(self, outcome: Message | bytes | Exception) -> None:
        """With the handler's result; or before it has one, and then again, for nothing."""
        if self._ended:
            return
        self._ended = True
        route, exchange = self._route, self._exchange
        # It leads back here: left to the garbage collector, it would cost more than the call.
        self._task = None
        if self._timer is not None:
            route.front.loop.forget(self._timer)
        if exchange.gone:
            code = _ending(self)
        elif isinstance(outcome, Exception):
            code, words = status_of(outcome)
            exchange.end(code.value[0], words, trailers_of(outcome))
        else:
            code = Code.OK
            exchange.end(0, message=_serialised(outcome))
        front = route.front
        whole_s = None
        if not route.always:
            whole_s = front.ended(self, code)
            if self.trace is not None:
                self.trace.end(code.name, self.model)
        front.metrics.finished(route.name, self.model, code.name, whole_s)


def _serialised(message: Message | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _ending(call: Call) -> grpc.StatusCode:
    """How a call ended for a caller who is gone: gRPC itself ends those whose deadline passes."""
    late = call.deadline is not None and call.deadline <= time.monotonic()
    return Code.DEADLINE_EXCEEDED if late else Code.CANCELLED


class _StreamRoute(NamedTuple):
    """A method of streams, as one call is to have it: see `Front.stream`."""

    front: Front
    name: str
    kind: type[Message]
    handler: Handler
    refusal: Refusal | None
    ordered: bool
    raw_field: int


class _Answer:
    """To a message of a stream: `data` once it is there, or the `ending` of the call in its place: a
    status' number, words and trailers.
    """

    __slots__ = ("data", "ending")

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.ending: tuple[int, str, tuple[tuple[str, str], ...]] | None = None


class _Stream:
    """Reads messages as long as not too much is owed, and writes each answer when it is its turn."""

    def __init__(self, route: _StreamRoute, exchange: Exchange) -> None:
        self._route, self._front, self._exchange = route, route.front, exchange
        self._tasks: dict[int, Task] = {}  # by the identity of their `Call`
        # In the order in which they are written; those of messages that are worked on too, if `ordered`.
        self._answers: deque[_Answer] = deque()
        self._owed = self._owed_bytes = 0
        self._reading = self._writing = self._over = self._ended = False
        exchange.on_gone = self._gone
        exchange.on_closed = self._closed
        self._read()
        self.end_if_done()

    def end_if_done(self) -> None:
        """Ends the call where all that was read is answered and no more is to be read."""
        draining = self._front.draining
        if self._owed or self._ended or not (self._over or draining):
            return
        self._ended = True
        if self._over:
            self._exchange.end(0)
        else:
            self._exchange.end(Code.UNAVAILABLE.value[0], errors.SHUTTING_DOWN)

    def _read(self) -> None:
        full = self._owed >= _STREAM_WINDOW or self._owed_bytes >= _STREAM_WINDOW_BYTES
        if not (full or self._reading or self._over or self._ended or self._front.draining):
            self._reading = True
            self._exchange.read(self._received)

    def _received(self, data: bytes | None) -> None:
        self._reading = False
        # Over, it waits to end with the status of a message before this one.
        if self._ended or self._over:
            return
        if data is None:
            self._over = True
            self.end_if_done()
            return
        front, route = self._front, self._route
        call = Call(self._exchange.deadline, self._exchange.metadata)
        if front.tracing is not None:
            call.trace = front.trace(self._exchange, call.arrived)
        refused, request, size = front.refusal(self._exchange.deadline), None, len(data)
        front.started()
        self._owed += 1
        self._owed_bytes += size
        answer = _Answer()
        if route.ordered:
            self._answers.append(answer)
        try:
            if refused is None:
                front.hold(call, size)
                request = front.parse(route.kind, data, call, route.raw_field)
        except errors.ConvoyError as error:
            self._refuse(data, call, answer, error)
        else:
            if refused is not None:
                self._refuse(data, call, answer, refused)
            else:
                del data
                then = partial(self._answer, request, call, size, answer)
                task = Task(route.handler(request, call), then, front.loop)
                self._tasks[id(call)] = task
                task.run()
        self._read()

    def _refuse(self, data: bytes, call: Call, answer: _Answer, error: errors.ConvoyError) -> None:
        # So that the answer says which message it is for.
        request = _parsed(self._route.kind, data) if len(data) <= _SMALL_BYTES else None
        self._answer(request, call, len(data), answer, error)

    def _answer(
        self,
        request: Message | None,
        call: Call,
        size: int,
        answer: _Answer,
        outcome: Message | bytes | Exception,
    ) -> None:
        front, route, data = self._front, self._route, b""
        self._tasks.pop(id(call), None)
        if self._exchange.gone or self._ended:
            code = _ending(call)
        elif not isinstance(outcome, Exception):
            code = Code.OK
            data = _serialised(outcome)
        else:
            code, words = status_of(outcome)
            if route.refusal is None:
                answer.ending = (code.value[0], words, trailers_of(outcome))
                self._over = True
            else:
                data = route.refusal(request, code, words).SerializeToString()
        whole_s = front.ended(call, code)
        front.metrics.finished(route.name, call.model, code.name, whole_s)
        if call.trace is not None:
            call.trace.end(code.name, call.model)
        if self._exchange.gone or self._ended:
            self._owed -= 1
            self._owed_bytes -= size
            return
        answer.data = data
        self._owed_bytes += len(data) - size
        if not route.ordered:
            self._answers.append(answer)
        self._write()

    def _write(self) -> None:
        answers = self._answers
        if self._writing or not answers or self._ended:
            return
        answer = answers[0]
        data = answer.data
        if data is None:
            return
        answers.popleft()
        if answer.ending:
            self._gone()
            self._exchange.end(*answer.ending)
            return
        self._writing = True
        more = bool(answers) and answers[0].data is not None
        self._exchange.write(data, more, lambda: self._written(len(data)))

    def _written(self, size: int) -> None:
        self._writing = False
        self._owed -= 1
        self._owed_bytes -= size
        self._write()
        self._read()
        self.end_if_done()

    def _gone(self) -> None:
        self._ended = True
        self._answers.clear()
        for task in list(self._tasks.values()):
            task.cancel()

    def _closed(self) -> None:
        self._front.forget(self)
        self._front.closed()


def _parsed(kind: type[Message], data: bytes) -> Message | None:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


class _Watch:
    """One request, then whatever there is to tell."""

    def __init__(
        self, front: Front, exchange: Exchange, kind: type[Message], subscribe: Subscribe
    ) -> None:
        self._front, self._exchange = front, exchange
        self._kind, self._subscribe = kind, subscribe
        self._unsubscribe: Callable[[], None] = ignore
        self._answers: deque[bytes] = deque()
        self._writing = self._over = self._ended = False
        exchange.on_gone = self._gone
        exchange.on_closed = self._closed
        exchange.read(self._received)

    def end(self) -> None:
        """Ends the call, once it has been told what there was to tell."""
        self._over = True
        self._leave()
        self._write()

    def _received(self, data: bytes | None) -> None:
        request = None if data is None else _parsed(self._kind, data)
        if self._ended:
            return
        if request is None:
            self._ended = True
            words = f"the body is no {self._kind.DESCRIPTOR.full_name}"
            self._exchange.end(Code.INVALID_ARGUMENT.value[0], words)
            return
        self._unsubscribe = self._subscribe(request, self._send)

    def _send(self, message: Message) -> None:
        self._answers.append(message.SerializeToString())
        self._write()

    def _write(self) -> None:
        if self._writing or self._ended:
            return
        if self._answers:
            self._writing = True
            self._exchange.write(self._answers.popleft(), bool(self._answers), self._written)
        elif self._over:
            self._ended = True
            self._exchange.end(Code.UNAVAILABLE.value[0], errors.SHUTTING_DOWN)

    def _written(self) -> None:
        self._writing = False
        self._write()

    def _gone(self) -> None:
        self._ended = True
        self._leave()

    def _leave(self) -> None:
        leave, self._unsubscribe = self._unsubscribe, ignore
        leave()

    def _closed(self) -> None:
        self._front.forget(self)
        self._front.closed()
