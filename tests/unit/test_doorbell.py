import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from convoy_service.errors import ConvoyError
from convoy_service.transport.doorbell import Doorbell
from tests.conftest import TIMEOUT_S

core: Any = import_module("grpc._cython.cygrpc")


class Loop:
    """A loop that does nothing but hear its doorbell."""

    def __init__(self) -> None:
        self.heard = 0
        self.queue = core.CompletionQueue()
        self.doorbell = Doorbell(core, self.queue, self._hear)

    def _hear(self) -> None:
        self.heard += 1

    def turn(self, wait_s: float = 0.0) -> bool:
        """Takes one event; whether there was one."""
        event = self.queue.poll(time.time() + wait_s if wait_s else 0.0)
        if event.completion_type == core.CompletionType.queue_timeout:
            return False
        event.tag(event)
        return True

    def hear(self, times: int) -> None:
        """Takes events until the doorbell has been heard so often."""
        while self.heard < times:
            assert self.turn(TIMEOUT_S), "a ring was lost"

    def close(self) -> None:
        self.doorbell.close()
        while not self.doorbell.closed:
            assert self.turn(TIMEOUT_S), "gRPC keeps the server"
        self.queue.shutdown()
        while self.queue.poll().completion_type != core.CompletionType.queue_shutdown:
            pass
        self.doorbell.destroy()


@contextmanager
def opened() -> Iterator[Loop]:
    loop = Loop()
    loop.doorbell.open()
    try:
        yield loop
    finally:
        loop.close()


def listeners() -> set[str]:
    """The abstract sockets on which doorbells of this machine listen."""
    return {
        line.split()[-1]
        for line in Path("/proc/net/unix").read_text().splitlines()
        if "@convoy-" in line
    }


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_it_wakes_a_loop_that_sleeps() -> None:
    with opened() as loop:
        ringing = threading.Timer(0.05, loop.doorbell.ring)
        ringing.start()
        loop.hear(1)
        ringing.join()


def test_rings_that_have_not_been_heard_are_one_and_later_ones_are_heard_again() -> None:
    with opened() as loop:
        for _ in range(3):
            loop.doorbell.ring()
        while loop.turn(0.05):
            pass
        assert loop.heard == 1
        loop.doorbell.ring()
        loop.hear(2)


def test_before_it_is_open_and_after_it_is_closed_nothing_happens() -> None:
    loop = Loop()
    loop.doorbell.ring()
    loop.doorbell.open()
    while loop.turn(0.05):
        pass
    loop.close()
    loop.doorbell.ring()
    assert loop.heard == 0


def test_no_ring_of_many_threads_is_lost_also_long_after_its_call_has_gone() -> None:
    threads, turns = 4, 1000
    posted = [0] * threads
    seen = [0] * threads
    with opened() as loop:
        # gRPC closes the connection of the call, and its listener, while events are taken.
        while loop.turn(0.2):
            pass

        def see() -> None:
            seen[:] = posted

        loop.doorbell._on_ring = see

        def work(number: int) -> None:
            for turn in range(1, turns + 1):
                posted[number] = turn
                loop.doorbell.ring()

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        deadline = time.monotonic() + TIMEOUT_S
        # Each wait is for an event: a lost ring ends the last one without any.
        while seen != [turns] * threads:
            assert loop.turn(TIMEOUT_S), (seen, posted)
            assert time.monotonic() < deadline
        for worker in workers:
            worker.join()


def test_threads_that_ring_while_it_closes_harm_nobody() -> None:
    for _ in range(10):
        ended = threading.Event()
        loop = Loop()

        def work(loop: Loop = loop, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                loop.doorbell.ring()

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        loop.doorbell.open()
        loop.hear(10)
        loop.close()
        ended.set()
        for worker in workers:
            worker.join()


def test_nobody_can_connect_to_it_and_no_descriptor_is_left() -> None:
    before, sockets = descriptors(), listeners()
    with opened() as loop:
        while loop.turn(0.2):
            pass
        assert listeners() <= sockets
    gc.collect()
    deadline = time.monotonic() + TIMEOUT_S
    # gRPC closes what it had open on a thread of its own.
    while descriptors() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_call_is_released_with_it() -> None:
    loop = Loop()
    loop.doorbell.open()
    loop.close()
    released = weakref.ref(loop.doorbell)
    del loop
    gc.collect()
    assert released() is None


def test_a_call_that_does_not_arrive_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convoy_service.transport.doorbell._BEGIN_CALL", b"")
    monkeypatch.setattr("convoy_service.transport.doorbell._OPEN_S", 0.05)
    loop = Loop()
    with pytest.raises(ConvoyError, match="--front public"):
        loop.doorbell.open()
    # The test's process goes on, and must end.
    loop.doorbell._server.shutdown(loop.queue, loop.doorbell._on_shut)
    loop.close()
