"""Calls of grpcio's public threaded server, given to the same loop."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import grpc

from convoy_service.tasks import ignore
from convoy_service.transport.call import Exchange, Trailers
from convoy_service.transport.loop import CLOSE_S, NAP_S, NEVER_S, Loop, Options

# The server's threads: each call that is worked on holds one, and one while it is read.
_THREADS = 256


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
        stopped = self._server.stop(CLOSE_S)
        # Threads wait for the ends of the calls that are cut off, and their callers for the rest.
        while not (stopped.is_set() and self._events.empty()):
            with suppress(queue.Empty):
                self._while_it_stops(self._events.get(timeout=NAP_S))
        self._pool.shutdown()
        self._readers.shutdown()

    def _wake(self) -> None:
        self._events.put(ignore)

    def _handle(
        self, method: str, messages: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        """On one of the server's threads: the call's answers, until its end."""
        remaining = context.time_remaining()
        known = remaining is not None and remaining < NEVER_S
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
