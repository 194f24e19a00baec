"""Calls as they come over the wire, on one loop: grpcio's core without grpcio's servers.

`CoreServer` drives `grpc._cython.cygrpc`, the pieces that grpcio's own servers are written on, from
one thread, which takes whatever has arrived before it starts the next batch. That is a private
interface: docs/decisions/0001-grpcio-core.md. Only releases that were tried are trusted with it; on
others `grpc_server.server` falls back to `PublicServer`.

The loop's thread calls everything that is handed in here, except where it says otherwise.
"""

import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc

from convoy_service.tasks import ignore
from convoy_service.transport.call import Exchange, Trailers
from convoy_service.transport.doorbell import Doorbell
from convoy_service.transport.loop import CLOSE_S, NAP_S, NEVER_S, Loop, Options

# While calls keep coming, a batch starts after this many events at the latest: with less, calls age
# in the transport when there are more than can be answered; with more, those that were read do.
_EVENTS_A_BATCH = 1000

# Calls that gRPC may hand over before it is asked again: a burst costs fewer turns.
_ASKED = 64


class CoreServer(Loop):
    """On grpcio's core. One thread polls the one completion queue and does everything else.

    Every object of grpcio's core belongs to that thread, but for the doorbell, which any thread may
    ring: docs/decisions/0001-grpcio-core.md.
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
        # The queue takes no operations any more: gRPC would end the process.
        self.closed = False

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
            deadline = None if deadline > NEVER_S else time.monotonic() + left_s
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
        ends = time.time() + CLOSE_S
        while not (self._shut and self._doorbell.closed):
            event = self._queue.poll(ends)
            if event.completion_type == self.core.CompletionType.queue_timeout:
                self._server.cancel_all_calls()
                self._doorbell.cancel()
                ends += NAP_S
            else:
                self._while_it_stops(partial(event.tag, event))
            event = None
        self.closed = True
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
        if self._loop.closed:  # the call has ended with the loop
            return
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
