import gc
import threading
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from convoy_service.errors import Cancelled
from convoy_service.tasks import Shared, Task, Wait


class Work:
    """Something to wait for, which the test ends."""

    def __init__(self) -> None:
        self.done: Callable[[Any], None]
        self.cancelled = 0

    def start(self, done: Callable[[Any], None]) -> "Work":
        self.done = done
        return self

    def cancel(self) -> None:
        """Like everything that can be cancelled, it tells so."""
        self.cancelled += 1
        self.done(Cancelled("cancelled"))


class Here:
    """A loop on this thread."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def post(self, callback: Callable[[], None]) -> None:
        callback()


class Handled:
    """A handler that runs on this thread, and what became of it."""

    def __init__(self, handler: Coroutine[Wait[Any], Any, Any]) -> None:
        self.results: list[Any] = []
        self.posted: list[Callable[[], None]] = []
        self.thread = threading.get_ident()
        self.task = Task(handler, self.results.append, self)
        self.task.run()

    def post(self, callback: Callable[[], None]) -> None:
        self.posted.append(callback)


async def twice(first: Work, second: Work) -> Any:
    one = await Wait(first.start)
    return one, await Wait(second.start)


def test_a_handler_that_waits_for_nothing_ends_at_once() -> None:
    async def handler() -> int:
        return 7

    assert Handled(handler()).results == [7]


def test_each_wait_gives_what_ended_it() -> None:
    first, second = Work(), Work()
    handled = Handled(twice(first, second))
    assert handled.results == []
    first.done(1)
    assert handled.results == []
    second.done(2)
    assert handled.results == [(1, 2)]


def test_what_ends_on_another_thread_goes_on_here() -> None:
    first, second = Work(), Work()
    handled = Handled(twice(first, second))
    thread = threading.Thread(target=lambda: first.done(1))
    thread.start()
    thread.join()
    (go_on,) = handled.posted
    assert not hasattr(second, "done"), "it went on over there"
    go_on()
    second.done(2)
    assert handled.results == [(1, 2)]


def test_an_error_that_ends_a_wait_is_raised_in_the_handler() -> None:
    async def handler(work: Work) -> str:
        try:
            await Wait(work.start)
        except ValueError as error:
            return str(error)
        return "no error"

    work = Work()
    handled = Handled(handler(work))
    work.done(ValueError("so it is"))
    assert handled.results == ["so it is"]


def test_an_error_that_a_wait_begins_with_is_raised_in_the_handler() -> None:
    def refuse(done: object) -> Work:
        raise ValueError("not today")

    async def handler() -> str:
        with pytest.raises(ValueError, match="not today"):
            await Wait(refuse)
        return "went on"

    assert Handled(handler()).results == ["went on"]


def test_what_a_handler_raises_is_its_result() -> None:
    async def handler(work: Work) -> None:
        await Wait(work.start)

    work, error = Work(), ValueError("mine")
    handled = Handled(handler(work))
    work.done(error)
    assert handled.results == [error]


def test_cancelling_ends_what_it_waits_for() -> None:
    first, second = Work(), Work()
    handled = Handled(twice(first, second))
    first.done(1)
    handled.task.cancel()
    assert (first.cancelled, second.cancelled) == (0, 1)
    (result,) = handled.results
    assert isinstance(result, Cancelled)


def test_a_handler_that_goes_on_after_it_was_cancelled_begins_nothing_new() -> None:
    async def handler(first: Work, second: Work) -> str:
        try:
            await Wait(first.start)
        except Cancelled:
            with pytest.raises(Cancelled):
                await Wait(second.start)
        return "ended"

    first, second = Work(), Work()
    handled = Handled(handler(first, second))
    handled.task.cancel()
    assert handled.results == ["ended"]
    assert not hasattr(second, "done")


def test_cancelling_what_has_ended_does_nothing() -> None:
    first, second = Work(), Work()
    handled = Handled(twice(first, second))
    first.done(1)
    second.done(2)
    handled.task.cancel()
    assert (first.cancelled, second.cancelled) == (0, 0)
    assert handled.results == [(1, 2)]


@pytest.mark.parametrize("ending", ["answered", "raised", "brought", "refused"])
def test_a_task_that_has_ended_keeps_nothing_until_the_garbage_collector_comes(ending: str) -> None:
    class Request:
        """What a handler holds, which may be large."""

    def refuse(done: object) -> Work:
        raise ValueError

    async def handler(request: Request, work: Work) -> None:
        if ending == "refused":
            await Wait(refuse)
        await Wait(work.start)
        if ending == "raised":
            raise ValueError

    request, work = Request(), Work()
    kept = weakref.ref(request)
    gc.disable()
    try:
        outcomes: list[type] = []
        task = Task(
            handler(request, work),
            lambda outcome: outcomes.append(type(outcome)),
            Here(),
        )
        task.run()
        del request
        if ending != "refused":
            # As who brings it would: it has the error still when the handler has ended.
            outcome = ValueError() if ending == "brought" else None
            work.done(outcome)
        assert outcomes == [type(None) if ending == "answered" else ValueError]
        del task, work
        assert kept() is None
    finally:
        gc.enable()


def test_those_who_ask_while_it_is_found_share_what_is_found_next() -> None:
    finding, go_on = threading.Event(), threading.Semaphore(0)
    found = iter([1, 0, 3])

    def find() -> int:
        finding.set()
        assert go_on.acquire(timeout=30)
        if value := next(found):
            return value
        raise ValueError("no")

    shared, told = Shared(find), threading.Semaphore(0)
    results: list[Any] = []

    def ask() -> None:
        def then(result: Any) -> None:
            results.append(result)
            told.release()

        Task(shared.get(), then, Here()).run()

    def wait_for(count: int) -> list[Any]:
        go_on.release()
        for _ in range(count):
            assert told.acquire(timeout=30)
        now = results[:]
        results.clear()
        return now

    ask()
    assert finding.wait(30)
    for _ in range(3):
        ask()
    assert wait_for(1) == [1]
    assert [str(each) for each in wait_for(3)] == ["no"] * 3
    ask()
    assert wait_for(1) == [3]
