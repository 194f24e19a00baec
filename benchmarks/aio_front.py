"""grpc.aio behind the interface of the transport: a candidate for the front, for `load.py fronts`.

python benchmarks/aio_front.py serve ARGUMENTS   is `convoy serve ARGUMENTS` on this front

It answers all calls of the tests of Convoy, and costs what grpc.aio costs: each read, write and end of a
call is a task of asyncio. It is kept to be measured, not to be served with.
"""

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grpc

from convoy_service.tasks import ignore
from convoy_service.transport import grpc_public
from convoy_service.transport import grpc_server as transport
from convoy_service.transport.call import Exchange, Trailers
from convoy_service.transport.loop import Loop, Options


class AioServer(Loop):
    """One asyncio loop on one thread, which does everything else between its turns."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.aio = asyncio.new_event_loop()
        asyncio.set_event_loop(self.aio)
        self._server = grpc.aio.server(options=tuple(options))
        self._server.add_generic_rpc_handlers((_AnyMethod(self._handle),))
        self._due = False
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self, address: str, credentials: "grpc.ServerCredentials | None") -> int:
        if credentials is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, credentials))

    def run(self) -> None:
        self.thread = threading.get_ident()
        self.aio.run_until_complete(self._run())
        self.aio.close()

    async def _run(self) -> None:
        await self._server.start()
        self.kick()
        await self._ended.wait()
        await self._server.stop(0.2)

    def stop(self) -> None:
        super().stop()
        self.aio.call_soon_threadsafe(self._ended.set)

    def kick(self) -> None:
        """Has a turn follow what has arrived by now."""
        if not self._due:
            self._due = True
            self.aio.call_soon(self._turn)

    def _turn(self) -> None:
        self._due = False
        nap_s = self._chores()
        if self.waiting():
            self.step()
            self.kick()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._timers:
            self._timer = self.aio.call_later(nap_s, self.kick)

    def _wake(self) -> None:
        if self.thread:
            self.aio.call_soon_threadsafe(self.kick)

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.aio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _handle(self, method: str, context: Any) -> None:
        left_s = context.time_remaining()
        exchange = _AioExchange(
            self,
            context,
            method,
            None if left_s is None else time.monotonic() + left_s,
            context.invocation_metadata(),
        )
        try:
            self.on_call(exchange)
            self.kick()
            code, details, trailers, message = await exchange.outcome
            if message is not None:
                await context.write(message)
            context.set_trailing_metadata(tuple(trailers))
            context.set_code(grpc_public._CODES[code])
            context.set_details(details)
        except asyncio.CancelledError:
            exchange.gone = True
            exchange.on_gone()
            raise
        finally:
            exchange.closed()
            self.kick()


class _AnyMethod(grpc.GenericRpcHandler):
    def __init__(self, handle: Callable[[str, Any], Coroutine[Any, Any, None]]) -> None:
        self._handle = handle

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        method = details.method

        async def handler(_: Any, context: Any) -> None:
            await self._handle(method, context)

        return grpc.stream_stream_rpc_method_handler(handler)


class _AioExchange(Exchange):
    __slots__ = ("_context", "_loop", "outcome")

    def __init__(
        self, loop: AioServer, context: Any, method: str, deadline: float | None, metadata: Any
    ) -> None:
        super().__init__(method, deadline, metadata)
        self._loop, self._context = loop, context
        self.outcome: asyncio.Future[Any] = loop.aio.create_future()
        self._due = 1

    def accept(self) -> None:
        pass

    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        self.end(code, details, trailers)

    def read(self, then: Callable[[bytes | None], None]) -> None:
        self._due += 1
        self._loop.begin(self._read(then))

    async def _read(self, then: Callable[[bytes | None], None]) -> None:
        try:
            message = await self._context.read()
        except Exception:
            message = grpc.aio.EOF
        then(None if message is grpc.aio.EOF else message)
        self._done()
        self._loop.kick()

    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        self._due += 1
        self._loop.begin(self._write(message, then))

    async def _write(self, message: bytes, then: Callable[[], None]) -> None:
        try:
            await self._context.write(message)
        except Exception:
            self.gone = True
        then()
        self._done()
        self._loop.kick()

    def end(
        self, code: int, details: str = "", trailers: Trailers = (), message: bytes | None = None
    ) -> None:
        if not self.outcome.done():
            self.outcome.set_result((code, details, trailers, message))

    def closed(self) -> None:
        self.on_gone = ignore
        self._done()


def main() -> None:
    import convoy.__main__ as command

    transport.server = lambda options, public=False: AioServer(options)
    command.main()


if __name__ == "__main__":
    main()
