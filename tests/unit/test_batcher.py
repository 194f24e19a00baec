"""Who waits, who goes together, and that every caller gets its own rows whatever happens around."""

import random
import threading
import time
from concurrent.futures import CancelledError, Future
from contextlib import closing

import numpy as np
import pytest

from service.batcher import Answer, Batch, Batcher, Outputs, Rows
from service.errors import DeadlineExceeded, InferenceFailed, NotReady

MAX = 4
# Only decides how long a test that hangs takes to fail.
TIMEOUT_S = 30.0


def rows(*numbers: int) -> Rows:
    """A row for each number, which it carries in its four bytes."""
    return np.array(numbers, "<u4").view(np.uint8).reshape(-1, 4)


def numbers(rows: Rows) -> list[int]:
    return [int(n) for n in np.ascontiguousarray(rows).view("<u4").ravel()]


def outputs(*numbers: int) -> Outputs:
    """The right answers for `rows` of these numbers."""
    return np.array([[n, 2 * n + 1] for n in numbers], np.float32)


class Device:
    """Stands in for a model: answers each row from what it holds. `batches` are what it ran.

    Each run waits for `finish`, until `open`.
    """

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.fail: Exception | BaseException | None = None
        self._entered = threading.Semaphore(0)
        self._may_finish = threading.Semaphore(0)

    def __call__(self, rows: Rows) -> Outputs:
        self.batches.append(numbers(rows))
        self._entered.release()
        assert self._may_finish.acquire(timeout=TIMEOUT_S)
        if self.fail:
            raise self.fail
        return outputs(*numbers(rows))

    def wait_until_busy(self) -> None:
        assert self._entered.acquire(timeout=TIMEOUT_S)

    def finish(self) -> None:
        self._may_finish.release()

    def open(self) -> None:
        self._may_finish.release(1000)


def answer(future: "Future[Answer]") -> Answer:
    return future.result(TIMEOUT_S)


def end(future: "Future[Answer]") -> BaseException | None:
    """Waits for the end of a request: None for an answer, else what became of it."""
    try:
        return future.exception(TIMEOUT_S)
    except CancelledError as error:
        return error


def given(future: "Future[Answer]") -> list[list[float]]:
    values: list[list[float]] = answer(future).outputs.tolist()
    return values


def occupied(batcher: Batcher, device: Device) -> "Future[Answer]":
    """Keeps the device busy with row 1000."""
    future = batcher.submit(rows(1000))
    device.wait_until_busy()
    return future


# Order and ownership.


def test_an_answer_has_the_rows_of_its_request_in_their_order() -> None:
    device = Device()
    device.open()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        futures = {n: batcher.submit(rows(*range(n, n + n % MAX + 1))) for n in range(50)}
        for n, future in futures.items():
            assert np.array_equal(answer(future).outputs, outputs(*range(n, n + n % MAX + 1)))


def test_an_idle_device_takes_a_lone_request_at_once() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        future = batcher.submit(rows(7))
        device.wait_until_busy()
        device.finish()
        assert answer(future).batch_size == 1
        assert device.batches == [[7]]


def test_what_arrives_while_the_device_is_busy_goes_together() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        futures = [batcher.submit(rows(n)) for n in range(3)]
        device.open()
        assert [given(future) for future in futures] == [[[0, 1]], [[1, 3]], [[2, 5]]]
        assert device.batches == [[1000], [0, 1, 2]]
        assert {answer(future).batch_size for future in futures} == {3}


def test_a_request_larger_than_a_batch_is_split_and_put_together() -> None:
    device = Device()
    device.open()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        future = batcher.submit(rows(*range(10)))
        assert np.array_equal(answer(future).outputs, outputs(*range(10)))
        assert device.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert answer(future).batch_size == MAX


def test_batches_are_filled_across_requests_oldest_first() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        futures = [batcher.submit(rows(*some)) for some in [(0, 1, 2), (3, 4, 5), (6,)]]
        device.open()
        assert [end(future) for future in futures] == [None] * 3
        assert device.batches == [[1000], [0, 1, 2, 3], [4, 5, 6]]
        assert np.array_equal(answer(futures[1]).outputs, outputs(3, 4, 5))


def test_those_who_wait_go_before_the_rest_of_a_large_request() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        large = batcher.submit(rows(*range(16)))
        futures = [batcher.submit(rows(50)), batcher.submit(rows(*range(60, 65)))]
        device.open()
        assert [end(future) for future in futures] == [None] * 2
        assert np.array_equal(answer(large).outputs, outputs(*range(16)))
    assert device.batches == [
        [1000],
        [0, 1, 2, 3],
        [50, 60, 61, 62],
        [63, 64, 4, 5],
        [6, 7, 8, 9],
        [10, 11, 12, 13],
        [14, 15],
    ]


def test_rows_need_not_be_contiguous() -> None:
    device = Device()
    device.open()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        future = batcher.submit(rows(*range(6))[::-2])
        assert np.array_equal(answer(future).outputs, outputs(5, 3, 1))


def test_answers_do_not_change_when_later_batches_run() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        early = [batcher.submit(rows(1)), batcher.submit(rows(2))]
        device.open()
        assert [end(future) for future in early] == [None] * 2
        later = [batcher.submit(rows(n)) for n in range(100, 140)]
        assert [end(future) for future in later] == [None] * 40
        assert [given(future) for future in early] == [[[1, 3]], [[2, 5]]]


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 4), np.float32),
        np.zeros((1, 5), np.uint8),
        np.zeros((1, 2, 2), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4), np.uint8),
    ],
    ids=["type", "row size", "rank", "no batch axis", "no rows"],
)
def test_rows_of_the_wrong_kind_are_refused_at_once(wrong: Rows) -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher, pytest.raises(ValueError, match="uint8"):
        batcher.submit(wrong)
    assert device.batches == []


def test_an_answer_says_how_long_its_request_waited_and_ran() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        first = occupied(batcher, device)
        began = time.monotonic()
        second = batcher.submit(rows(1))
        while time.monotonic() < began + 0.02:  # the clock is what is waited for
            pass
        device.open()
        assert answer(first).run_s >= 0.02
        assert answer(second).queue_s >= 0.02
        assert answer(second).run_s >= 0
        assert answer(first).queue_s >= 0


def test_every_run_is_told_of() -> None:
    device, told = Device(), list[Batch]()
    with closing(Batcher(device, (4,), MAX, on_batch=told.append)) as batcher:
        occupied(batcher, device)
        for some in [(0, 1), (2,)]:
            batcher.submit(rows(*some))
        device.open()
    assert [(b.rows, b.requests, b.failed) for b in told] == [(1, 1, False), (3, 2, False)]


# Cancelled.


def test_what_is_cancelled_while_it_waits_never_runs() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        futures = [batcher.submit(rows(n)) for n in range(3)]
        assert futures[1].cancel()
        device.open()
        assert [given(futures[0]), given(futures[2])] == [[[0, 1]], [[2, 5]]]
    assert device.batches == [[1000], [0, 2]]


def test_what_is_cancelled_while_it_runs_affects_nobody_else() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        futures = [batcher.submit(rows(n)) for n in range(3)]
        device.finish()
        device.wait_until_busy()
        assert futures[1].cancel()
        later = batcher.submit(rows(9))
        device.open()
        assert [given(f) for f in (futures[0], futures[2], later)] == [
            [[0, 1]],
            [[2, 5]],
            [[9, 19]],
        ]
    assert futures[1].cancelled()


def test_the_rest_of_what_is_cancelled_half_way_never_runs() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        large = batcher.submit(rows(*range(10)))
        device.wait_until_busy()
        small = batcher.submit(rows(50))
        assert large.cancel()
        device.open()
        assert given(small) == [[50, 101]]
    assert device.batches == [[0, 1, 2, 3], [50]]


def test_a_queue_of_nothing_but_cancelled_requests_runs_nothing() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        for future in [batcher.submit(rows(n)) for n in range(10)]:
            future.cancel()
        device.open()
    assert device.batches == [[1000]]


# Late.


def test_what_is_late_when_the_device_is_free_never_runs() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        occupied(batcher, device)
        in_time = batcher.submit(rows(1), time.monotonic() + TIMEOUT_S)
        late = batcher.submit(rows(2), time.monotonic())
        also_in_time = batcher.submit(rows(3))
        device.open()
        with pytest.raises(DeadlineExceeded):
            answer(late)
        assert [given(in_time), given(also_in_time)] == [[[1, 3]], [[3, 7]]]
    assert device.batches == [[1000], [1, 3]]


def test_what_is_late_on_arrival_never_runs_on_an_idle_device() -> None:
    device = Device()
    device.open()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        late = batcher.submit(rows(2), time.monotonic() - 1)
        with pytest.raises(DeadlineExceeded):
            answer(late)
        assert given(batcher.submit(rows(3))) == [[3, 7]]
    assert device.batches == [[3]]


def test_the_rest_of_what_is_late_half_way_never_runs() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        deadline = time.monotonic() + 0.05
        # If even this comes too late on a slow machine, nothing runs; it ends the same.
        large = batcher.submit(rows(*range(10)), deadline)
        while time.monotonic() <= deadline:  # the clock is what is waited for
            pass
        device.open()
        with pytest.raises(DeadlineExceeded):
            answer(large)
    assert len(device.batches) <= 1


# Failed.


def test_a_run_that_raises_fails_its_batch_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    device, told = Device(), list[Batch]()
    with closing(Batcher(device, (4,), MAX, on_batch=told.append)) as batcher:
        first = occupied(batcher, device)
        failing = [batcher.submit(rows(n)) for n in range(MAX)]
        after = batcher.submit(rows(9))
        device.finish()
        device.wait_until_busy()
        device.fail = RuntimeError("secret detail")
        device.finish()
        for future in failing:
            with pytest.raises(InferenceFailed, match=r"^the model failed on this batch$"):
                answer(future)
        device.wait_until_busy()
        device.fail = None
        device.open()
        assert [given(first), given(after)] == [[[1000, 2001]], [[9, 19]]]
    assert [batch.failed for batch in told] == [False, True, False]
    assert "secret detail" in caplog.text


def test_a_split_request_fails_once_and_its_rest_never_runs() -> None:
    device = Device()
    with closing(Batcher(device, (4,), MAX)) as batcher:
        large = batcher.submit(rows(*range(10)))
        small = batcher.submit(rows(50))
        device.wait_until_busy()
        device.fail = RuntimeError()
        device.finish()
        with pytest.raises(InferenceFailed):
            answer(large)
        device.wait_until_busy()
        device.fail = None
        device.open()
        assert given(small) == [[50, 101]]
    assert device.batches == [[0, 1, 2, 3], [50]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_run_that_gives_another_number_of_rows_fails(count: int) -> None:
    with (
        closing(Batcher(lambda rows: outputs(*range(count)), (4,), MAX)) as batcher,
        pytest.raises(InferenceFailed),
    ):
        answer(batcher.submit(rows(1, 2)))


def test_a_bug_in_the_batcher_strands_nobody_and_is_told_of() -> None:
    device, bugs, told = Device(), list[BaseException](), threading.Event()
    bug = ZeroDivisionError("a bug")

    def on_batch(batch: Batch) -> None:
        raise bug

    def on_bug(error: BaseException) -> None:
        bugs.append(error)
        told.set()

    batcher = Batcher(device, (4,), MAX, on_batch=on_batch, on_bug=on_bug)
    first = occupied(batcher, device)
    waiting = [batcher.submit(rows(*some)) for some in [(1,), range(10), (2,)]]
    device.open()
    for future in waiting:
        with pytest.raises(InferenceFailed, match=r"^internal error$"):
            answer(future)
    assert given(first) == [[1000, 2001]]
    assert told.wait(TIMEOUT_S)
    assert bugs == [bug]
    with pytest.raises(NotReady):
        batcher.submit(rows(3))
    batcher.close()


def test_a_run_that_ends_the_thread_strands_nobody() -> None:
    device, bugs = Device(), list[BaseException]()
    batcher = Batcher(device, (4,), MAX, on_bug=bugs.append)
    running = occupied(batcher, device)
    waiting = batcher.submit(rows(1))
    device.fail = SystemExit()
    device.open()
    for future in (running, waiting):
        with pytest.raises(InferenceFailed, match=r"^internal error$"):
            answer(future)
    batcher.close()
    assert [type(bug) for bug in bugs] == [SystemExit]


# Closed.


def test_close_finishes_what_waits_and_then_refuses() -> None:
    device = Device()
    batcher = Batcher(device, (4,), MAX)
    occupied(batcher, device)
    futures = [batcher.submit(rows(*range(n, n + 3))) for n in range(10)]
    closer = threading.Thread(target=batcher.close)
    closer.start()
    while True:  # until `close` has begun
        try:
            futures.append(batcher.submit(rows(0, 1, 2)))
        except NotReady:
            break
    assert closer.is_alive()
    device.open()
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    assert all(future.done() and future.exception() is None for future in futures)
    batcher.close()


def test_close_may_be_called_where_an_answer_arrives() -> None:
    device = Device()
    batcher = Batcher(device, (4,), MAX)
    future = occupied(batcher, device)
    future.add_done_callback(lambda done: batcher.close())
    also = batcher.submit(rows(1))
    device.open()
    assert given(also) == [[1, 3]]
    batcher.close()
    with pytest.raises(NotReady):
        batcher.submit(rows(2))


# All of it at once.


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_every_future_ends_and_every_answer_is_its_own(seed: int) -> None:
    most, threads, requests = 8, 12, 150
    ran: list[int] = []
    failed: set[int] = set()
    bugs: list[BaseException] = []
    chance_of_run = random.Random(seed)

    def run(rows: Rows) -> Outputs:
        assert 1 <= len(rows) <= most
        ran.extend(numbers(rows))
        match chance_of_run.randrange(20):
            case 0:
                failed.update(numbers(rows))
                raise RuntimeError("injected")
            case 1:
                failed.update(numbers(rows))
                return outputs(*numbers(rows)[:-1])
        return outputs(*numbers(rows))

    class Sent:
        def __init__(self, thread: int, request: int, chance: random.Random) -> None:
            first = (thread * requests + request) * 3 * most
            self.numbers = range(first, first + chance.randint(1, 3 * most))
            self.late = chance.random() < 0.1
            self.deadline: float | None = None
            if self.late:
                self.deadline = time.monotonic() - 1
            elif chance.random() < 0.2:
                self.deadline = time.monotonic() + chance.random() * 0.01
            self.cancelled = False
            self.future = batcher.submit(rows(*self.numbers), self.deadline)

    batcher = Batcher(run, (4,), most, on_bug=bugs.append)
    sent: list[list[Sent]] = [[] for _ in range(threads)]

    def call(thread: int) -> None:
        chance = random.Random(f"{seed} {thread}")
        for request in range(requests):
            sent[thread].append(Sent(thread, request, chance))
            if chance.random() < 0.2:
                victim = chance.choice(sent[thread][-4:])
                victim.cancelled |= victim.future.cancel()
            if chance.random() < 0.1:
                end(sent[thread][-1].future)

    callers = [threading.Thread(target=call, args=(thread,)) for thread in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(TIMEOUT_S)
    batcher.close()

    everything = [one for of_thread in sent for one in of_thread]
    assert len(everything) == threads * requests
    endings = set()
    for one in everything:
        assert one.future.done()
        error = end(one.future)
        endings.add(type(error))
        assert one.future.cancelled() == one.cancelled
        if error is None:
            assert np.array_equal(one.future.result().outputs, outputs(*one.numbers))
            assert failed.isdisjoint(one.numbers)
            assert not one.late
        assert not isinstance(error, DeadlineExceeded) or one.deadline is not None
        assert not isinstance(error, InferenceFailed) or not failed.isdisjoint(one.numbers)
    assert endings == {type(None), CancelledError, DeadlineExceeded, InferenceFailed}
    assert len(ran) == len(set(ran)), "a row ran twice"
    late = {number for one in everything if one.late for number in one.numbers}
    assert late.isdisjoint(ran)
    assert bugs == []
