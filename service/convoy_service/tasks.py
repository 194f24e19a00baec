"""Handlers as coroutines, driven by whoever ends what they wait for: no event loop of their own."""

from collections.abc import Callable, Coroutine, Generator
from queue import SimpleQueue
from threading import Thread, get_ident
from typing import Any, Generic, Protocol, TypeVar

from convoy_service.errors import Cancelled

T = TypeVar("T")

Done = Callable[[T | Exception], None]


def ignore(_: object = None) -> None:
    """A callback that does nothing, for a caller that needs no call."""


class Cancellable(Protocol):
    def cancel(self) -> object: ...


class Loop(Protocol):
    """Where tasks run: `transport.Loop`."""

    thread: int  # as `threading.get_ident` says

    def post(self, callback: Callable[[], None], /) -> None: ...


class Wait(Generic[T]):
    """What a handler awaits. `start(done)` begins it and returns what can cancel it.

    `done` takes the result or an exception, once, from any thread, but not from within `start`. What
    is cancelled must call it too. An exception that `start` raises is the handler's.
    """

    __slots__ = ("start",)

    def __init__(self, start: Callable[[Done[T]], Cancellable]) -> None:
        self.start = start

    def __await__(self) -> Generator["Wait[T]", T, T]:
        return (yield self)


async def elsewhere(work: Callable[[], T], begin: Callable[[Callable[[], None]], object]) -> T:
    """What `work` returns or raises, done wherever `begin` has it done: on a pool, or a thread of its
    own. What is begun is finished, whether it is waited for or not.
    """

    def start(done: Done[T]) -> Cancellable:
        def run() -> None:
            try:
                outcome: T | Exception = work()
            except Exception as error:
                outcome = error
            done(outcome)

        begin(run)
        return _Begun()

    result: T = await Wait(start)
    return result


class _Begun:
    def cancel(self) -> None:
        """Too late."""


class Shared(Generic[T]):
    """What `find` returns or raises, found on a thread of its own. However many ask for it while it is
    found, that is done once more for all of them.
    """

    def __init__(self, find: Callable[[], T]) -> None:
        self._find = find
        self._asking: SimpleQueue[Done[T]] = SimpleQueue()
        self._thread: Thread | None = None

    async def get(self) -> T:
        """To be awaited by handlers of one loop."""
        result: T = await Wait(self._ask)
        return result

    def _ask(self, done: Done[T]) -> Cancellable:
        self._asking.put(done)
        if self._thread is None:
            self._thread = Thread(target=self._work, name="shared", daemon=True)
            self._thread.start()
        return _Begun()

    def _work(self) -> None:
        while True:
            asking = [self._asking.get()]
            while not self._asking.empty():
                asking.append(self._asking.get())
            try:
                outcome: T | Exception = self._find()
            except Exception as error:
                outcome = error
            for done in asking:
                done(outcome)


class Task:
    """A handler on its way. Runs on one thread, wherever what it waits for ends.

    `then` takes the handler's result, or what it raised.
    """

    __slots__ = ("_cancelled", "_handler", "_loop", "_then", "_ticket")

    def __init__(
        self, handler: Coroutine[Wait[Any], Any, Any], then: Done[Any], loop: Loop
    ) -> None:
        self._handler, self._then, self._loop = handler, then, loop
        self._ticket: Cancellable | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Cancels what the handler waits for, now or next; Cancelled is raised in it."""
        self._cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()

    def run(self, outcome: Any = None) -> None:
        """Goes on until the handler waits, or ends."""
        self._ticket = None
        while True:
            try:
                if isinstance(outcome, Exception):
                    wait = self._handler.throw(outcome)
                else:
                    wait = self._handler.send(outcome)
            except StopIteration as end:
                self._then(end.value)
                return
            # Whatever a handler raises is its result: who takes it says what becomes of it.
            except Exception as error:
                self._then(error)
                # Its frames hold the request, and whoever brought it still has the error: together
                # they would wait for the garbage collector.
                error.__traceback__ = None
                return
            if self._cancelled:
                outcome = Cancelled("the caller hung up")
                continue
            try:
                self._ticket = wait.start(self._done)
                return
            except Exception as error:
                outcome = error

    def _done(self, outcome: Any) -> None:
        loop = self._loop
        if get_ident() == loop.thread:
            self.run(outcome)
        else:
            loop.post(lambda: self.run(outcome))
