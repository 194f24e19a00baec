"""gRPC's server <-> plain handlers: the one place that knows how calls arrive and how they end.

A handler is `async (request message, Call) -> response message`. What it raises becomes a status
here; a call counts as in flight here; and here it is refused when there are too many.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from service import errors
from service.metrics import Metrics

log = logging.getLogger("convoy.front")

Code = grpc.StatusCode
_STATUS: dict[type[errors.ConvoyError], grpc.StatusCode] = {
    errors.InvalidRequest: Code.INVALID_ARGUMENT,
    errors.UnknownModel: Code.NOT_FOUND,
    errors.Overloaded: Code.RESOURCE_EXHAUSTED,
    errors.NotReady: Code.UNAVAILABLE,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
}
_INTERNAL = "internal error: please report it; the server's log says more"
_PUSHBACK = (("grpc-retry-pushback-ms", "100"),)

# What one stream may owe before no more of it is read: so many answers, and so many bytes of
# requests that are worked on and of answers that are not taken.
_STREAM_WINDOW = 256
_STREAM_WINDOW_BYTES = 16_000_000

# Only larger bodies are looked at before they are parsed; these are parsed in milliseconds.
_SMALL_BYTES = 1_000_000

# Status messages travel as metadata, of which gRPC refuses more than 8 kB; there each byte of a
# character that is not ASCII takes three. Some of them quote what the caller sent.
_MAX_WORDS_BYTES = 2000


@dataclass
class Call:
    """What a handler knows of its call. `arrived` and `deadline` are on `time.monotonic`'s clock."""

    arrived: float
    deadline: float | None
    # Set by the handler once it knows: the label under which the call is counted.
    model: str = ""


Handler = Callable[[Any, Call], Awaitable[Message]]

M = TypeVar("M", bound=Message)


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status and words that a caller gets for `error`. A bug gets fixed words, and is logged."""
    for kind, code in _STATUS.items():
        if isinstance(error, kind):
            return code, _cut(str(error))
    log.error("a request failed", exc_info=error)
    return Code.INTERNAL, _INTERNAL


def _cut(words: str) -> str:
    data = words.encode(errors="replace")
    if len(data) <= _MAX_WORDS_BYTES:
        return words
    return data[:_MAX_WORDS_BYTES].decode(errors="ignore") + " ..."


class Front:
    """Wraps handlers for `grpc.aio`, counts what is in flight, and lets it drain."""

    def __init__(
        self, metrics: Metrics, max_request_bytes: int, max_in_flight: int, max_parts: int
    ) -> None:
        """`max_parts`: fields in a large body, see `_check_parts`."""
        self._metrics = metrics
        self._max_bytes, self._max_in_flight = max_request_bytes, max_in_flight
        self._max_parts = max_parts
        self._in_flight = self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()

    def unary(
        self, name: str, kind: type[Message], handler: Handler, *, always: bool = False
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """A unary call `name` (for metrics) whose requests are `kind`.

        `always`: is answered however much is in flight, and takes nobody's place there, as what
        asks for no work should be: a server that is only busy would else be taken for dead.
        """

        async def behaviour(data: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
            self._opened(context)
            call, request = _call(context), None
            try:
                with self._counted(name, call, always):
                    request = self._parse(kind, data)
                    return (await handler(request, call)).SerializeToString()
            except Exception as error:
                code, words = status_of(error)
                # gRPC keeps the error until the next garbage collection: not the request with it.
                error.__traceback__, request, data = None, None, b""
                trailers = _PUSHBACK if code is Code.RESOURCE_EXHAUSTED else ()
                await context.abort(code, words, trailers)
                raise AssertionError("abort raises") from error

        return grpc.unary_unary_rpc_method_handler(behaviour)

    def stream(
        self,
        name: str,
        kind: type[Message],
        handler: Handler,
        refusal: Callable[[Any, grpc.StatusCode, str], Message],
    ) -> "grpc.RpcMethodHandler[Any, Any]":
        """A bidirectional call: each message is answered as by `unary`, in the order of finishing.

        `refusal` makes the answer for a message whose handler raised. When the server drains, what
        was read is answered and the stream ends with UNAVAILABLE.
        """

        async def answer(data: bytes, context: "grpc.aio.ServicerContext[Any, Any]") -> bytes:
            request = kind()
            call = _call(context)
            try:
                with self._counted(name, call):
                    request = self._parse(kind, data)
                    return (await handler(request, call)).SerializeToString()
            except Exception as error:
                return refusal(request, *status_of(error)).SerializeToString()

        async def behaviour(
            _requests: AsyncIterator[bytes], context: "grpc.aio.ServicerContext[Any, Any]"
        ) -> None:
            self._opened(context)
            writing = asyncio.Lock()
            owed, room = _Owed(), asyncio.Event()

            async def respond(data: bytes) -> None:
                size = len(data)
                try:
                    response = await answer(data, context)
                    del data
                    owed.bytes += len(response) - size
                    size = len(response)
                    # A write fails where the caller has gone: nobody is left to be told.
                    async with writing:
                        with contextlib.suppress(grpc.aio.BaseError):
                            await context.write(response)
                finally:
                    owed.answers -= 1
                    owed.bytes -= size
                    room.set()

            draining = asyncio.create_task(self._draining.wait())
            try:
                # A caller who hangs up cancels this task, and the group cancels its answers.
                async with asyncio.TaskGroup() as answers:
                    while not self._draining.is_set():
                        while owed.full():
                            room.clear()
                            await room.wait()
                        read: asyncio.Task[Any] = asyncio.ensure_future(context.read())
                        await asyncio.wait({read, draining}, return_when=asyncio.FIRST_COMPLETED)
                        if not read.done():
                            read.cancel()
                            break
                        if read.result() is grpc.aio.EOF:
                            return
                        owed.answers += 1
                        owed.bytes += len(read.result())
                        answers.create_task(respond(read.result()))
            finally:
                draining.cancel()
            await context.abort(Code.UNAVAILABLE, "this server is shutting down: open a new stream")

        return grpc.stream_stream_rpc_method_handler(behaviour)

    async def drain(self, grace_s: float) -> bool:
        """Ends streams, waits for every call's end; False where that took over `grace_s`."""
        self._draining.set()
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            log.warning("%d calls were cut off after %g s", self._calls, grace_s)
            return False
        return True

    def _opened(self, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        """A call keeps the server from stopping until its caller has taken all of its answers."""

        def closed(_: object) -> None:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

        self._calls += 1
        self._idle.clear()
        # The type stubs have a plain class where they mean a protocol.
        context.add_done_callback(closed)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def _counted(self, name: str, call: Call, always: bool = False) -> Iterator[None]:
        code = Code.OK
        self._in_flight += not always
        self._metrics.started()
        try:
            if not always and self._in_flight > self._max_in_flight:
                raise errors.Overloaded(
                    f"{self._max_in_flight} requests are in flight here: back off, then retry"
                )
            yield
        except asyncio.CancelledError:
            late = call.deadline is not None and call.deadline <= time.monotonic()
            code = Code.DEADLINE_EXCEEDED if late else Code.CANCELLED
            raise
        except Exception as error:
            code = next(
                (c for kind, c in _STATUS.items() if isinstance(error, kind)), Code.INTERNAL
            )
            raise
        finally:
            self._in_flight -= not always
            seconds = time.monotonic() - call.arrived
            self._metrics.finished(name, call.model, code.name, seconds)

    def _parse(self, kind: type[M], data: bytes) -> M:
        if len(data) > self._max_bytes:
            raise errors.InvalidRequest(
                f"the request has {len(data) / 1e6:.1f} MB, the limit is {self._max_bytes / 1e6:g}: "
                "send fewer images a call"
            )
        try:
            if len(data) > _SMALL_BYTES:
                _check_parts(kind, data, self._max_parts)
            return kind.FromString(data)
        except DecodeError:
            raise errors.InvalidRequest(f"the body is no {kind.DESCRIPTOR.full_name}") from None


@dataclass
class _Owed:
    """What a stream has read and not yet written."""

    answers: int = 0
    bytes: int = 0

    def full(self) -> bool:
        return self.answers >= _STREAM_WINDOW or self.bytes >= _STREAM_WINDOW_BYTES


def _check_parts(kind: type[Message], data: bytes, most: int) -> None:
    """Raises InvalidRequest where `data` has more than `most` fields, not counting those of messages
    that hold no list; DecodeError where it is no message.

    Parsing holds the interpreter's lock, so that no other call is answered meanwhile: on one core
    0.04 s for 60 MB in one image, but 2 s, and 1.5 GB, for 60 MB of empty ones.
    """
    parts = 0
    spans = [(kind.DESCRIPTOR, 0, len(data))]
    while spans:
        message, at, end = spans.pop()
        while at < end:
            parts += 1
            if parts > most:
                raise errors.InvalidRequest(
                    f"the request has more than {most} parts: send several requests, or a stream"
                )
            tag, at = _varint(data, at, end)
            match tag & 7:
                case 0:
                    _, at = _varint(data, at, end)
                case 1:
                    at += 8
                case 2:
                    length, at = _varint(data, at, end)
                    field = message.fields_by_number.get(tag >> 3)
                    inner = field.message_type if field else None
                    if inner and any(each.is_repeated for each in inner.fields):
                        spans.append((inner, at, min(at + length, end)))
                    at += length
                case 5:
                    at += 4
                case 6 | 7:
                    raise DecodeError
        if at > end:
            raise DecodeError


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """The varint at `at`, and where it ends."""
    value = 0
    for position in range(at, min(at + 10, end)):
        value |= (data[position] & 0x7F) << 7 * (position - at)
        if data[position] < 0x80:
            return value, position + 1
    raise DecodeError


def _call(context: "grpc.aio.ServicerContext[Any, Any]") -> Call:
    now, remaining = time.monotonic(), context.time_remaining()
    return Call(now, None if remaining is None else now + remaining)
