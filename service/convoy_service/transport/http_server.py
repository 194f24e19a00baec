"""Requests over HTTP, as calls on the transport's loop.

uvicorn speaks HTTP, on a thread with an event loop of its own. What a request asks for is a call of a
gRPC method, whose message goes the way of all others: limits, statuses, counting, deadlines and
draining are `front`'s. Here is what is particular to HTTP: bodies, their compression, and callers who
are slow, or leave.
"""

import asyncio
import functools
import logging
import math
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import grpc
import msgspec
import uvicorn
from google.protobuf.message import Message
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from convoy_service import errors
from convoy_service.settings import Settings
from convoy_service.tasks import ignore
from convoy_service.transport.call import Exchange, Http, Trailers
from convoy_service.transport.dispatcher import status_of, trailers_of
from convoy_service.transport.loop import Loop

log = logging.getLogger("convoy.web")

T = TypeVar("T")

Code = grpc.StatusCode

# https://github.com/googleapis/googleapis/blob/master/google/rpc/code.proto
_HTTP_STATUS = {
    Code.OK: 200,
    Code.CANCELLED: 499,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503,
    Code.INTERNAL: 500,
}
_BY_NAME = {code.name: status for code, status in _HTTP_STATUS.items()}
HTTP_STATUS = {code.value[0]: status for code, status in _HTTP_STATUS.items()}

# How long the head of a request may take in all, and what is left of a body that nobody wants; how
# long a body may pause; how long a connection may rest between two requests.
_HEAD_S, _PAUSE_S, _REST_S = 10.0, 10.0, 75
_HEAD_BYTES = 65_536
# How long the kernel tries to hand over an answer that is not taken.
_UNTAKEN_S = 30.0

# Bodies from this size on are worked on by other threads, as they take more than a millisecond.
_SMALL_BYTES = 64_000
_THREADS = 2
# They unpack so much at a time, for one request after the other.
_PIECE_BYTES = 1_000_000
# So many requests may wait on one connection for the answer to the one before them.
_PIPELINED = 100
# Answers from this size on are compressed, for those who ask for it.
_COMPRESSED_BYTES = 1000
_COMPRESSION = 1  # of 9: the network is seldom slower

# As gRPC writes it: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}

_STOPPED = (
    Code.UNAVAILABLE.value[0],
    errors.SHUTTING_DOWN,
    (),
)
_LATE = (Code.DEADLINE_EXCEEDED.value[0], "the time that the request allowed is over", ())


class Reply(NamedTuple):
    status: int
    body: bytes
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()
    # May be compressed for who asks for it. Only answers to inference are, as Triton's: tritonclient's
    # asyncio asks for it in every request, and reads no others.
    packs: bool = False


class Refused(Exception):
    """A no for which HTTP has a status of its own."""

    def __init__(self, status: int, words: str, *headers: tuple[str, str]) -> None:
        super().__init__(words)
        self.reply = refusal(status, words, *headers)


class _Left(Exception):
    """The caller has hung up."""


def refusal(status: int, words: str, *headers: tuple[str, str]) -> Reply:
    return Reply(status, msgspec.json.encode({"error": words}), headers=headers)


def _refused(code: int, words: str, trailers: Trailers) -> Reply:
    """With gRPC's pushback as whole seconds, which is all that HTTP has."""
    later = [
        ("retry-after", str(math.ceil(int(value) / 1000)))
        for name, value in trailers
        if name == "grpc-retry-pushback-ms"
    ]
    return refusal(HTTP_STATUS.get(code, 500), words, *later)


class Request:
    """What a caller asks. `headers` have small names; `query` and `path` are unquoted."""

    def __init__(self, web: "Web", scope: Any, receive: Callable[[], Awaitable[Any]]) -> None:
        self._web, self._receive = web, receive
        self.arrived = time.monotonic()
        self.verb: str = scope["method"]
        self.path: str = scope["path"]
        # The path with the names of its parameters, once that is known.
        self.route = ""
        self.scheme: str = scope["scheme"]
        self.metadata = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        self.headers: Mapping[str, str] = dict(self.metadata)
        query = scope["query_string"].decode("latin-1")
        self.query = dict(parse_qsl(query, keep_blank_values=True)) if query else {}
        self._pieces: list[bytes] = []
        self.held = 0
        self.complete = False

    @functools.cached_property
    def deadline(self) -> float | None:
        """On `time.monotonic`'s clock. Raises InvalidRequest."""
        given = self.headers.get("grpc-timeout")
        if given is None:
            return None
        match = _TIMEOUT.fullmatch(given)
        if not match:
            raise errors.InvalidRequest(
                f"header grpc-timeout: {given[:20]!r}; expected a number and a unit, such as 500m "
                "(milliseconds) or 2S (seconds)"
            )
        return self.arrived + int(match[1]) * _UNIT_S[match[2]]

    async def read(self) -> None:
        """More of the body. Raises Refused where that is too much, or does not come."""
        declared = self.headers.get("content-length", "")
        most = self._web.max_bytes
        if not self._pieces and declared.isascii() and declared.isdigit() and int(declared) > most:
            raise self._too_large(int(declared))
        try:
            async with asyncio.timeout(_PAUSE_S):
                event = await self._receive()
        except TimeoutError:
            raise Refused(408, "the rest of the request did not come") from None
        if event["type"] == "http.disconnect":
            raise _Left
        self._pieces.append(event["body"])
        self._web.hold(self, len(event["body"]))
        if self.held > most:
            raise self._too_large(self.held)
        self.complete = not event["more_body"]

    def _too_large(self, size: int) -> Refused:
        most = self._web.max_bytes
        return Refused(
            413,
            f"the request has {size / 1e6:.1f} MB, the limit is {most / 1e6:g}: send less at once",
        )

    async def body(self) -> bytes:
        """All of it, unpacked. Raises as `read` does, and InvalidRequest."""
        while not self.complete:
            await self.read()
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        if coding == "identity" or not body:
            return body
        if coding not in {"gzip", "deflate"}:
            raise Refused(415, f"content-encoding {coding[:20]!r}: expected gzip or deflate")
        return await self._unpacked(body)

    async def _unpacked(self, body: bytes) -> bytes:
        """In pieces, counted as they come: what is small may be a thousand times as large unpacked, and
        so must neither be worked on at once, nor be in memory with all others that are.
        """
        most, size = self._web.max_bytes, 0
        pieces: list[bytes] = []
        unpacker = zlib.decompressobj(wbits=47)  # zlib's or gzip's, as it says itself
        step, rest = _SMALL_BYTES - 1, body
        while True:
            try:
                piece = await self._web.aside(
                    max(step, len(rest)),
                    functools.partial(unpacker.decompress, rest, step),
                )
            except zlib.error as error:
                raise errors.InvalidRequest(f"the body can't be decompressed: {error}") from None
            self._web.hold(self, len(piece))
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise self._too_large(size)
            # What is full may have left more behind, although nothing is left to be read.
            if unpacker.eof or len(piece) < step:
                break
            step, rest = _PIECE_BYTES, unpacker.unconsumed_tail
        if not unpacker.eof or unpacker.unused_data:
            raise errors.InvalidRequest("the compressed body does not end where it should")
        return b"".join(pieces)

    async def left(self) -> None:
        """Ends when the caller hangs up."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _Call(Exchange):
    """A request, as the transport's loop sees it: one message in, one out. `settle` is for the event
    loop of HTTP; all else is called on the transport's thread.
    """

    __slots__ = ("_http", "_then", "begun", "http", "outcome", "over")

    def __init__(self, method: str, request: Request, http: asyncio.AbstractEventLoop) -> None:
        super().__init__(method, request.deadline, request.metadata)
        self._http = http
        self.http = Http(
            request.verb, request.path, request.route, request.scheme, request.arrived, _BY_NAME
        )
        # A status, its words and trailers, or the serialised answer.
        self.outcome: asyncio.Future[bytes | tuple[int, str, Trailers]] = http.create_future()
        self._then: Callable[[bytes | None], None] = ignore
        self.begun = False  # the transport's loop has it, or will
        self.over = False

    def accept(self) -> None:
        pass

    def read(self, then: Callable[[bytes | None], None]) -> None:
        self._then = then

    def received(self, message: bytes | None) -> None:
        then, self._then = self._then, ignore
        then(message)

    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        self.end(code, details, trailers)

    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        raise NotImplementedError("over HTTP a call has one answer")

    def end(
        self, code: int, details: str = "", trailers: Trailers = (), message: bytes | None = None
    ) -> None:
        outcome = (code, details, trailers) if message is None else message
        self._closed()
        with suppress(RuntimeError):  # the event loop is closed: nobody hears it
            self._http.call_soon_threadsafe(self.settle, outcome)

    def abandon(self) -> None:
        """Nobody waits for an answer any more."""
        if not self.over:
            self.gone = True
            self.on_gone()
            self.received(None)
            self._closed()

    def _closed(self) -> None:
        if not self.over:
            self.over = True
            on_closed = self.on_closed
            self.on_gone = self.on_closed = ignore
            on_closed()

    def settle(self, outcome: bytes | tuple[int, str, Trailers] | Exception) -> None:
        if self.outcome.done():
            return
        if isinstance(outcome, Exception):
            self.outcome.set_exception(outcome)
        else:
            self.outcome.set_result(outcome)


class _Flow(FlowControl):
    """Reads no more while requests wait that have been read already: uvicorn does with each answer, and
    would hold what comes faster than it is answered.
    """

    def __init__(self, protocol: "_Protocol") -> None:
        super().__init__(protocol.transport)
        self._waiting = protocol.pipeline

    def resume_reading(self) -> None:
        if not self._waiting:
            super().resume_reading()


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with bounds on what callers may make it hold and wait for."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._in_head, self._in_body, self._head_bytes = True, False, 0
        self._wrong = ""
        self._timer: asyncio.TimerHandle | None = None

    def _limit(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._too_slow) if seconds else None

    def _too_slow(self) -> None:
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(self)
        self._limit(_HEAD_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > _HEAD_BYTES:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._limit(_HEAD_S)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # else it follows the body: nobody reads those
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._limit(None)
        # The parser would leave the body out, and take it for the next request.
        if self.parser.should_upgrade() and any(
            name == b"transfer-encoding" or (name == b"content-length" and int(value))
            for name, value in self.headers
        ):
            self._wrong = "nothing is upgraded here: send a body without the header Upgrade"
            raise ValueError(self._wrong)
        super().on_headers_complete()
        if len(self.pipeline) > _PIPELINED:
            self.transport.abort()

    def on_message_complete(self) -> None:
        self._in_head, self._in_body, self._head_bytes = True, False, 0
        self._limit(None)
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """As uvicorn's, which has no JSON. Called where what callbacks raise has ended the parser."""
        body = refusal(400, self._wrong or msg).body
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"content-length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.transport.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body:
            self._limit(_HEAD_S)


class _Server(uvicorn.Server):
    """Which waits, and does not look ten times a second, whether it is to end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.told = asyncio.Event()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):  # the header `date`
                    await self.told.wait()


class Web:
    """Listens, and has requests answered."""

    def __init__(
        self, settings: Settings, loop: Loop, answer: Callable[[Request], Awaitable[Reply]]
    ) -> None:
        """`loop` is the transport's; `answer` is called on HTTP's own event loop. Raises ConvoyError
        where the settings for TLS don't fit together.
        """
        self._settings, self._loop, self._answer = settings, loop, answer
        self.max_bytes = int(settings.max_request_mb * 1e6)
        self._max_held = int(settings.max_held_mb * 1e6)
        self._held = 0
        self._calls: set[_Call] = set()
        self._leaving = self._stopped = False
        self._pool = ThreadPoolExecutor(_THREADS, "http")
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._http: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self._socket: socket.socket | None = None
        ca = settings.tls_client_ca
        config = uvicorn.Config(
            self._app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level=logging.ERROR,  # the warnings are about callers, one for each broken request
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_REST_S,
            ssl_certfile=settings.tls_certificate,
            ssl_keyfile=settings.tls_key,
            ssl_ca_certs=str(ca) if ca else None,
            ssl_cert_reqs=ssl.CERT_REQUIRED if ca else ssl.CERT_NONE,
        )
        try:
            config.load()
        except OSError as error:  # as ssl's are
            raise errors.ConvoyError(
                f"--tls-certificate, --tls-key and --tls-client-ca: {error.strerror or error}"
            ) from None
        self._server = _Server(config)

    def bind(self, host: str, port: int, shared: bool) -> int:
        """The port it listens on. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        self._socket = socket.create_server(
            (host, port), family=family, reuse_port=shared, backlog=2048, dualstack_ipv6=both
        )
        # What is accepted inherits these. asyncio sets the first itself, but not where it is handed a
        # socket whose protocol is the default: answers then waited 40 ms for the caller's next ACK.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _UNTAKEN_S))
        return int(self._socket.getsockname()[1])

    def start(self) -> None:
        self._thread.start()
        self._begun.wait()

    def withdraw(self) -> None:
        """From any thread: whoever is answered is to come on another connection, which others may take.
        One that is closed while it rests may have the next request on its way.
        """
        self._leaving = True

    def drain(self) -> None:
        """From any thread: takes no new connections, and closes each when it has answered."""
        self._post(self._end)

    def close(self, grace_s: float) -> None:
        """When the transport's loop has stopped: who still waits hears so. Answers that are on their
        way may take as long as that.
        """
        self._post(self._stop)
        if self._thread.ident is not None:
            self._thread.join(grace_s)
        if self._socket is not None:
            self._socket.close()

    def _post(self, callback: Callable[[], None]) -> None:
        if self._http is not None:
            with suppress(RuntimeError):  # it has ended
                self._http.call_soon_threadsafe(callback)

    def _end(self) -> None:
        self._server.should_exit = True
        self._server.told.set()

    def _stop(self) -> None:
        self._stopped = True
        for call in list(self._calls):
            call.settle(_STOPPED)
        self._end()

    def _run(self) -> None:
        async def serve() -> None:
            self._http = asyncio.get_running_loop()
            self._begun.set()
            assert self._socket is not None
            await self._server.serve(sockets=[self._socket])

        try:
            asyncio.run(serve())
            if self._server.should_exit:
                return
            raise RuntimeError("HTTP has ended by itself")
        except BaseException as error:
            log.critical("bug in HTTP", exc_info=True)
            bug = error

            def end() -> None:
                raise bug

            # A service whose port answers nobody is to be replaced: the bug ends its loop, too.
            self._loop.post(end)
        finally:
            self._begun.set()

    def hold(self, request: Request, size: int) -> None:
        """Counts what a request has brought so far. Raises Overloaded where that is too much."""
        if self._held + size > self._max_held and self._held > request.held:
            raise errors.Overloaded(
                f"{self._held / 1e6:.0f} MB of requests are being received: {errors.BACK_OFF}"
            )
        self._held += size
        request.held += size

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """Does work on so many bytes, on another thread where they are many."""
        if size < _SMALL_BYTES:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def call(self, request: Request, method: str, make: Callable[[bytes], Message]) -> bytes:
        """The serialised answer to the message that `make` makes of the body. Raises Refused where
        there is none, and what `make` does.
        """
        if self._stopped:
            raise _Ended(_STOPPED)
        http = asyncio.get_running_loop()
        call = _Call(method, request, http)
        timer = watch = None
        self._calls.add(call)
        try:
            if request.deadline is not None:
                timer = http.call_at(request.deadline, call.settle, _LATE)
            await request.read()
            if not request.complete:
                # Before it is read, so that it is refused before, if it is.
                self._begin(call)
            message = await self._message(request, call, make)
            if not call.outcome.done():
                self._begin(call, message)
                watch = asyncio.create_task(request.left())
                watch.add_done_callback(
                    lambda done: None if done.cancelled() else call.settle(_Left())
                )
            outcome = await call.outcome
        except (errors.ConvoyError, Refused):
            self._begin(call, None)  # which ends it, so that it is counted
            raise
        finally:
            self._calls.discard(call)
            if timer:
                timer.cancel()
            if watch:
                watch.cancel()
            if call.begun and not call.over:
                self._loop.post(call.abandon)
        if isinstance(outcome, bytes):
            return outcome
        # As gRPC's clients have it, whichever was first.
        late = request.deadline is not None and time.monotonic() >= request.deadline
        raise _Ended(_LATE if late else outcome)

    def _begin(self, call: _Call, *message: bytes | None) -> None:
        """Has the transport's loop take the call, unless it has, and then its message, if given."""
        begun, call.begun = call.begun, True

        def begin() -> None:
            if not begun:
                self._loop.on_call(call)
            if message:
                call.received(message[0])

        self._loop.post(begin)

    async def _message(
        self, request: Request, call: _Call, make: Callable[[bytes], Message]
    ) -> bytes:
        """Empty where the call has ended before the body has."""

        async def read() -> bytes:
            body = await request.body()
            message = await self.aside(len(body), lambda: make(body).SerializeToString())
            self._release(request)
            return message

        if request.complete:
            return await read()
        reading = asyncio.ensure_future(read())
        call.outcome.add_done_callback(lambda _: reading.cancel())
        try:
            return await reading
        except asyncio.CancelledError:
            if not call.outcome.done():
                raise
            return b""

    def _release(self, request: Request) -> None:
        self._held -= request.held
        request.held = 0

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(self, scope, receive)
        try:
            reply = await self._answer(request)
        except _Left:
            return
        except Refused as refused:
            reply = refused.reply
        except Exception as error:  # anything: what is not ours is a bug, and is logged
            code, words = status_of(error)
            reply = _refused(code.value[0], words, trailers_of(error))
        finally:
            self._release(request)
        headers = [(name.encode(), value.encode()) for name, value in reply.headers]
        body, coding = reply.body, ""
        if reply.packs:
            body, coding = await self._packed(request, body)
        if coding:
            headers += [(b"content-encoding", coding.encode()), (b"vary", b"accept-encoding")]
        if self._leaving:
            headers.append((b"connection", b"close"))
        headers += [
            (b"content-type", reply.kind.encode()),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _packed(self, request: Request, body: bytes) -> tuple[bytes, str]:
        """Compressed as the caller likes it, if he does, and what that is called."""
        given = request.headers.get("accept-encoding")
        if not given or len(body) < _COMPRESSED_BYTES:
            return body, ""
        liked = {
            name.strip().lower()
            for name, _, quality in (each.partition(";") for each in given.split(","))
            if not re.fullmatch(r"\s*q=0(\.0*)?\s*", quality)
        }
        for coding, wbits in (("gzip", 31), ("deflate", 15)):
            if coding in liked:
                packer = zlib.compressobj(_COMPRESSION, wbits=wbits)
                packed = await self.aside(len(body), lambda: packer.compress(body) + packer.flush())  # noqa: B023
                return packed, coding
        return body, ""


class _Ended(Refused):
    """A call that ended without an answer."""

    def __init__(self, outcome: tuple[int, str, Trailers]) -> None:
        super().__init__(200, outcome[1])
        self.reply = _refused(*outcome)
