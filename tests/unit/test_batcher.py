"""Who waits, who goes together, and that every caller gets its own rows whatever happens around."""

import heapq
import itertools
import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from convoy_service.engine.batcher import Answer, Batch, Batcher, BatchTimes, Outputs, Rows
from convoy_service.errors import (
    Cancelled,
    ConvoyError,
    DeadlineExceeded,
    InferenceFailed,
    NotReady,
    Overloaded,
)
from tests.unit.graphs import graph, value

MAX = 4
# Only decides how long a test that hangs takes to fail.
TIMEOUT_S = 30.0
# Longer than any test's fake time.
FOREVER_S = 1e9


def rows(*numbers: int) -> Rows:
    """A row for each number, which it carries in its four bytes."""
    return np.array(numbers, "<u4").view(np.uint8).reshape(-1, 4)


def numbers(rows: Rows) -> list[int]:
    return [int(n) for n in np.ascontiguousarray(rows).view("<u4").ravel()]


def outputs(*numbers: int) -> Outputs:
    """The right answers for `rows` of these numbers."""
    return np.array([[n, 2 * n + 1] for n in numbers], np.float32)


class Clock:
    """Stands still unless it is moved. `script` are moves that its next readings make first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.script: list[float] = []

    def __call__(self) -> float:
        if self.script:
            self.now += self.script.pop(0)
        return self.now


class Device:
    """Stands in for a model that takes `seconds(rows)`: answers each row from what it holds.

    `batches` are what it ran; `during` is called within each run; a batch with a number of `poison`
    raises, a row of `odd` gives no number.
    """

    def __init__(
        self, clock: Clock | None = None, seconds: Callable[[int], float] = lambda size: 0.0
    ) -> None:
        self.batches: list[list[int]] = []
        self.given: list[Rows] = []
        self.during: Callable[[], object] = lambda: None
        self.poison: set[int] = set()
        self.odd: set[int] = set()
        self._clock, self._seconds = clock or Clock(), seconds

    def __call__(self, rows: Rows) -> Outputs:
        self.batches.append(numbers(rows))
        self.given.append(rows)
        self.during()
        self._clock.now += self._seconds(len(rows))
        if not self.poison.isdisjoint(numbers(rows)):
            raise RuntimeError("secret detail")
        answers = outputs(*numbers(rows))
        answers[[n in self.odd for n in numbers(rows)], 1] = np.inf
        return answers


class Heard:
    """What the requests of a test ended with, by name; each may end once."""

    def __init__(self) -> None:
        self.endings: dict[Any, Answer | Exception] = {}

    def by(self, name: Any) -> Callable[[Answer | Exception], None]:
        def done(ending: Answer | Exception) -> None:
            assert name not in self.endings, f"{name} ended twice"
            self.endings[name] = ending

        return done

    def answer(self, name: Any) -> Answer:
        ending = self.endings[name]
        assert isinstance(ending, Answer), ending
        return ending

    def given(self, name: Any) -> list[list[float]]:
        values: list[list[float]] = self.answer(name).outputs.tolist()
        return values


def batch_times(seconds: Callable[[int], float], max_batch_size: int) -> BatchTimes:
    """Certain of what a batch of each size takes."""
    times = BatchTimes(max_batch_size)
    for size in [*(2**n for n in range((max_batch_size - 1).bit_length())), max_batch_size]:
        for _ in range(100):
            times.record(size, seconds(size))
    return times


class Bench:
    """A batcher whose batches run when it is told, on a clock that only the device moves."""

    def __init__(
        self,
        seconds: Callable[[int], float] = lambda size: 0.0,
        *,
        max_batch_size: int = MAX,
        known: bool = True,
        max_wait_s: float = FOREVER_S,
        **options: Any,
    ) -> None:
        self.clock, self.heard, self.told = Clock(), Heard(), list[Batch]()
        self.device = Device(self.clock, seconds)
        self.times = batch_times(seconds, max_batch_size) if known else BatchTimes(max_batch_size)
        self.batcher = Batcher(
            self.device,
            (4,),
            max_batch_size,
            times=self.times,
            max_wait_s=max_wait_s,
            on_batch=self.told.append,
            clock=self.clock,
            **options,
        )

    def send(self, *numbers: int, **options: Any) -> Any:
        """A request whose name is its first number."""
        return self.batcher.submit(rows(*numbers), self.heard.by(numbers[0]), **options)

    def run(self) -> list[list[int]]:
        """Runs all that waits; what ran."""
        before = len(self.device.batches)
        while self.batcher.run_next():
            pass
        return self.device.batches[before:]


# Order and ownership.


def test_an_answer_has_the_rows_of_its_request_in_their_order() -> None:
    bench = Bench()
    for n in range(50):
        bench.send(*range(100 * n, 100 * n + n % 11 + 1))
    bench.run()
    for n in range(50):
        expected = outputs(*range(100 * n, 100 * n + n % 11 + 1))
        assert np.array_equal(bench.heard.answer(100 * n).outputs, expected)


def test_what_waits_goes_together_oldest_first() -> None:
    bench = Bench()
    for some in [(1, 2, 3), (4, 5, 6), (7,)]:
        bench.send(*some)
    assert bench.run() == [[1, 2, 3, 4], [5, 6, 7]]
    assert [bench.heard.answer(n).batch_size for n in (1, 4, 7)] == [4, 4, 3]
    assert bench.heard.given(4) == outputs(4, 5, 6).tolist()


def test_whether_something_waits_is_known_and_nothing_is_run_where_nothing_does() -> None:
    bench = Bench()
    waiting = [bench.batcher.waiting]
    bench.send(1)
    waiting.append(bench.batcher.waiting)
    ran = [bench.batcher.run_next(), bench.batcher.run_next()]
    assert [*waiting, bench.batcher.waiting] == [False, True, False]
    assert ran == [True, False]
    assert len(bench.told) == 1


def test_who_waits_is_counted_until_all_of_it_is_on_the_device() -> None:
    bench = Bench()
    bench.send(1)
    ticket = bench.send(2)
    bench.send(*range(100, 106))
    queued = [bench.batcher.queued()]
    ticket.cancel()
    queued.append(bench.batcher.queued())
    bench.device.during = lambda: queued.append(bench.batcher.queued())
    assert bench.run() == [[1, 100, 101, 102], [103, 104, 105]]
    assert queued == [3, 2, 1, 0]


def test_a_batch_tells_what_took_time_before_and_after_the_run() -> None:
    bench = Bench(lambda size: 2.0)
    bench.send(1)
    bench.send(2)
    bench.clock.script = [
        0,
        5,
        0,
        3,
    ]  # at taking, just before the run, after it, when all is shared out
    bench.run()
    (batch,) = bench.told
    assert (batch.gather_s, batch.run_s, batch.split_s) == (5, 2, 3)
    assert bench.heard.answer(1)[1:3] == (5, 2)


def test_those_who_wait_go_before_the_rest_of_a_large_request() -> None:
    bench = Bench()
    bench.send(*range(100, 116))
    bench.send(50)
    bench.send(*range(60, 65))
    assert bench.run() == [
        [100, 101, 102, 103],
        [50, 60, 61, 62],
        [63, 64, 104, 105],
        [106, 107, 108, 109],
        [110, 111, 112, 113],
        [114, 115],
    ]
    assert np.array_equal(bench.heard.answer(100).outputs, outputs(*range(100, 116)))
    assert bench.heard.answer(100).batch_size == MAX


def test_a_batch_that_is_part_of_one_request_is_not_copied() -> None:
    bench = Bench()
    pixels = rows(*range(6))
    bench.batcher.submit(pixels, bench.heard.by("large"))
    bench.run()
    assert bench.device.batches == [[0, 1, 2, 3], [4, 5]]
    assert all(np.shares_memory(given, pixels) for given in bench.device.given)


def test_the_model_gets_contiguous_rows() -> None:
    bench = Bench()
    bench.batcher.submit(rows(*range(6))[::-2], bench.heard.by("odd"))
    bench.run()
    assert bench.device.given[0].flags.c_contiguous
    assert np.array_equal(bench.heard.answer("odd").outputs, outputs(5, 3, 1))


def test_answers_do_not_change_when_later_batches_run() -> None:
    bench = Bench()
    for n in range(40):
        bench.send(n)
    bench.run()
    assert [bench.heard.given(n) for n in range(40)] == [[[n, 2 * n + 1]] for n in range(40)]


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
    bench = Bench()
    with pytest.raises(ValueError, match="uint8"):
        bench.batcher.submit(wrong, bench.heard.by("wrong"))
    assert not bench.batcher.waiting


def test_an_answer_says_how_long_its_request_waited_and_ran() -> None:
    bench = Bench(lambda size: 10.0 * size)
    bench.send(*range(5))
    bench.clock.now += 7
    bench.send(50)
    bench.run()
    assert bench.heard.answer(0)[1:4] == (7, 60, 4)
    assert bench.heard.answer(50)[1:4] == (40, 20, 2)


def test_receipts_agree_with_the_batches_that_were_told_of() -> None:
    bench = Bench(lambda size: 1.0 + size)
    bench.device.poison = {11}
    bench.device.odd = {23}
    for some in [(1, 2, 3, 4, 5, 6), (10, 11), (20,), (21, 22, 23)]:
        bench.send(*some)
    bench.run()
    receipts = sum(bench.heard.answer(n).run_s for n in (1, 10, 20, 21))
    assert receipts == pytest.approx(sum(batch.run_s * batch.requests for batch in bench.told))
    assert sum(batch.failed_rows for batch in bench.told) == 2


# Cancelled.


def test_what_is_cancelled_while_it_waits_never_runs() -> None:
    bench = Bench()
    tickets = [bench.send(n) for n in range(3)]
    tickets[1].cancel()
    assert isinstance(bench.heard.endings[1], Cancelled)
    assert bench.run() == [[0, 2]]
    for ticket in tickets:
        ticket.cancel()
    assert bench.heard.given(0) == [[0, 1]]


def test_what_is_cancelled_while_it_runs_affects_nobody_else() -> None:
    bench = Bench()
    tickets = [bench.send(n) for n in range(3)]
    bench.device.during = tickets[1].cancel
    bench.run()
    assert isinstance(bench.heard.endings[1], Cancelled)
    assert [bench.heard.given(n) for n in (0, 2)] == [[[0, 1]], [[2, 5]]]


def test_the_rest_of_what_is_cancelled_half_way_never_runs() -> None:
    bench = Bench()
    large = bench.send(*range(10))
    bench.send(50)
    bench.device.during = large.cancel
    assert bench.run() == [[0, 1, 2, 3], [50]]


class Copied(np.ndarray[Any, np.dtype[np.uint8]]):
    """Rows that do something else when they are read."""

    hook: Callable[[], object]

    def __getitem__(self, key: Any) -> Any:
        self.hook()
        return super().__getitem__(key)


def test_what_is_cancelled_while_a_batch_is_put_together_does_not_run() -> None:
    bench = Bench()
    tickets = [bench.send(n) for n in range(2)]
    slow = rows(2).view(Copied)
    slow.hook = tickets[0].cancel
    bench.batcher.submit(slow, bench.heard.by(2))
    assert bench.run() == [[1, 2]]
    assert isinstance(bench.heard.endings[0], Cancelled)
    assert [bench.heard.given(n) for n in (1, 2)] == [[[1, 3]], [[2, 5]]]


def test_a_queue_of_nothing_but_cancelled_requests_runs_nothing() -> None:
    bench = Bench()
    for ticket in [bench.send(n) for n in range(10)]:
        ticket.cancel()
    assert not bench.batcher.waiting
    assert bench.run() == []


def test_the_rows_of_what_was_cancelled_are_not_kept() -> None:
    bench = Bench()
    pixels = rows(1)
    ticket = bench.batcher.submit(pixels, bench.heard.by(1))
    ticket.cancel()
    assert not np.shares_memory(ticket.rows, pixels)
    assert len(ticket.rows) == 0


# Deadlines. A batch of n rows takes 10 + n seconds.


def linear(size: int) -> float:
    return 10.0 + size


# Before it: requests of so many rows that wait, and seconds that a batch of 4 has been running. The
# rows, the seconds that it has, and by how much these are too few.
ADMITTED: dict[str, tuple[list[int], float | None, int, float, float]] = {
    "alone, in time": ([], None, 1, 11.01, 0),
    "alone, too little time": ([], None, 1, 10, 1),
    "alone, a batch, too little time": ([], None, 4, 12, 2),
    "two batches, in time": ([], None, 8, 28.01, 0),
    "two batches, too little time": ([], None, 8, 27, 1),
    "two, of which the second is counted as full": ([], None, 5, 27, 1),
    "behind a running batch, in time": ([], 5, 1, 9 + 14.01, 0),
    "behind a running batch, too little time for a larger one": ([], 5, 1, 20.5, 0),
    "behind a running batch, too little time": ([], 5, 1, 9 + 8, 3),
    "behind a batch that is overdue": ([], 24, 1, 10 + 14.01, 0),
    "behind a batch that is overdue, too little time": ([], 24, 1, 20, 1),
    "behind those who wait, in time": ([1, 1, 2, 3], None, 1, 28.01, 0),
    "behind those who wait, too little time": ([1, 1, 2, 3], None, 1, 27.5, 11.5),
    "behind both, in time": ([4, 3], 5, 1, 9 + 28.01, 0),
    "behind a turn of a large request": ([100], None, 1, 28.01, 0),
}


@pytest.mark.parametrize("case", ADMITTED)
def test_what_cannot_be_done_in_time_is_refused_on_arrival(case: str) -> None:
    ahead, running_s, count, seconds, missing = ADMITTED[case]
    bench = Bench(linear)

    def arrive() -> None:
        bench.device.during = lambda: None
        bench.clock.now += running_s or 0
        for n, size in enumerate(ahead):
            bench.send(*range(100 * n + 100, 100 * n + 100 + size))
        deadline = bench.clock.now + seconds
        if not missing:
            bench.send(*range(count), deadline=deadline)
            return
        with pytest.raises(Overloaded, match="the deadline leaves") as caught:
            bench.send(*range(count), deadline=deadline)
        assert caught.value.retry_after_s == pytest.approx(missing)

    if running_s is None:
        arrive()
    else:
        bench.device.during = arrive
        bench.send(90, 91, 92, 93)
    bench.run()
    assert (0 in bench.heard.endings) == (not missing)


def test_what_is_late_on_arrival_is_refused_as_such() -> None:
    bench = Bench()
    bench.clock.now = 5
    with pytest.raises(DeadlineExceeded):
        bench.send(1, deadline=5.0)
    assert not bench.batcher.waiting


def test_what_can_no_longer_be_done_in_time_is_dropped_before_it_runs() -> None:
    bench = Bench(linear)
    bench.send(1, deadline=30.0)
    bench.send(2, deadline=50.0)
    bench.send(3)
    bench.clock.now += 19.5
    assert bench.run() == [[2, 3]]
    assert isinstance(bench.heard.endings[1], DeadlineExceeded)


def test_a_batch_is_no_larger_than_its_oldest_can_wait_for() -> None:
    bench = Bench(linear)
    bench.send(1, deadline=40.0)
    for n in (2, 3, 4):
        bench.send(n)
    bench.clock.now += 27.5
    assert bench.run() == [[1, 2], [3, 4]]
    assert not isinstance(bench.heard.endings[1], Exception)


@pytest.mark.parametrize(
    ("others", "ran"), [(60.0, [[2, 3, 4, 5], [6]]), (None, [[1], [2, 3, 4, 5], [6]])]
)
def test_the_oldest_is_given_up_where_saving_it_would_make_its_like_late(
    others: float | None, ran: list[list[int]]
) -> None:
    bench = Bench(linear)
    bench.send(1, deadline=30.0)
    for n in (2, 3, 4, 5, 6):
        bench.send(n, deadline=others)
    bench.clock.now += 18.5
    assert bench.run() == ran
    assert isinstance(bench.heard.endings[1], DeadlineExceeded) == (others is not None)


def test_what_becomes_late_while_its_batch_is_put_together_does_not_run() -> None:
    bench = Bench()
    bench.send(1, deadline=10.0)
    bench.send(2)
    bench.clock.script = [5, 5]  # at taking, at the last look
    assert bench.run() == [[2]]
    assert isinstance(bench.heard.endings[1], DeadlineExceeded)
    assert [batch.late_rows for batch in bench.told] == [0]


def test_the_rest_of_what_is_late_half_way_never_runs() -> None:
    bench = Bench(linear)
    bench.send(*range(10), deadline=45.0)
    bench.device.during = lambda: setattr(bench.clock, "now", bench.clock.now + 20)
    assert bench.run() == [[0, 1, 2, 3]]
    assert isinstance(bench.heard.endings[0], DeadlineExceeded)


def test_the_wait_is_bounded_without_deadlines_too() -> None:
    bench = Bench(linear, max_wait_s=20)
    for n in range(2 * MAX):
        bench.send(n)
    with pytest.raises(Overloaded, match="back off") as caught:
        bench.send(100)
    assert caught.value.retry_after_s == pytest.approx(2 * 14 - 20)
    bench.run()
    assert max(bench.heard.answer(n).queue_s for n in range(2 * MAX)) <= 20


def test_a_request_that_waits_for_nobody_is_never_refused_for_its_wait() -> None:
    bench = Bench(lambda size: 100.0, max_wait_s=0.001)
    bench.send(*range(MAX * 3))
    bench.run()
    assert len(bench.heard.answer(0).outputs) == MAX * 3


def test_the_expected_wait_is_that_for_the_answer() -> None:
    bench = Bench(linear)
    assert bench.batcher.wait_s() == pytest.approx(11)
    bench.send(1, 2, 3)
    assert bench.batcher.wait_s(0) == pytest.approx(13)
    assert bench.batcher.wait_s(1) == pytest.approx(14)
    assert bench.batcher.wait_s(2) == pytest.approx(14 + 11)


def test_the_time_between_batches_counts_too() -> None:
    bench = Bench(linear)
    waits: list[float] = []

    def more() -> None:
        waits.append(bench.batcher.wait_s(0))
        bench.batcher.submit(rows(1, 2, 3, 4), lambda ending: None)

    bench.device.during = more
    bench.send(0)
    for _ in range(60):
        bench.batcher.run_next()
        bench.clock.now += 2
    # The one that runs.
    assert waits[-1] == pytest.approx(14 + 2, rel=0.01)
    # One that waits, and two.
    assert bench.batcher.wait_s(8) == pytest.approx(3 * (14 + 2), rel=0.01)


def test_the_time_of_a_batch_includes_putting_it_together() -> None:
    bench = Bench(known=False)
    bench.send(1)
    bench.send(2)
    bench.clock.script = [0, 5, 0]  # at taking, just before the run, after it
    bench.run()
    assert bench.heard.answer(1)[1:3] == (5, 0)
    assert bench.batcher.wait_s(2) >= 5


# Estimates that are wrong.


def test_an_idle_device_is_tried_again_after_a_hiccup() -> None:
    bench = Bench(lambda size: 0.02)
    bench.device.during = lambda: setattr(bench.clock, "now", bench.clock.now + 5)
    bench.send(0)
    bench.run()
    bench.device.during = lambda: None
    refused = 0
    for n in range(1, 200):
        try:
            bench.send(n, deadline=bench.clock.now + 0.025)
        except Overloaded:
            refused += 1
        bench.run()
        bench.clock.now += 0.1
    assert 0 < refused < 50
    answered = [n for n in range(100, 200) if isinstance(bench.heard.endings.get(n), Answer)]
    assert len(answered) == 100


def test_an_estimate_that_nothing_confirms_counts_for_less_and_less() -> None:
    bench = Bench(linear)
    waits = []
    for _ in range(3):
        waits.append(bench.batcher.wait_s(2))
        bench.clock.now += 1
    assert waits == pytest.approx([12, 6, 4])
    bench.send(1, 2)
    assert bench.batcher.wait_s(0) == pytest.approx(12)


def test_what_no_device_could_do_in_time_is_hardly_ever_tried() -> None:
    bench = Bench(lambda size: 0.02)
    for n in range(1000):
        try:
            bench.send(n, deadline=bench.clock.now + 0.001)
        except Overloaded:
            bench.clock.now += 0.1
        bench.run()
    assert len(bench.device.batches) <= 30


def sizes_below(most: int) -> Sequence[int]:
    return sorted({size for size in (1, 2, 3, most // 3, most // 2, most - 1) if 0 < size < most})


@pytest.mark.parametrize("most", [1, 2, 3, 32, 48, 4096])
def test_times_are_linear_between_what_was_measured(most: int) -> None:
    times = batch_times(linear, most)
    for size in [*sizes_below(most), most]:
        assert times.estimate(size) == pytest.approx(linear(size))
        assert times.largest(linear(size) + 0.001) == size
    assert times.estimate(0) == 0
    assert times.largest(10.5) == 0
    assert times.largest(1e6) == most


def test_nothing_is_known_before_the_first_measurement() -> None:
    times = BatchTimes(32)
    assert times.estimate(32) == 0
    assert times.largest(0.001) == 32
    times.record(8, 1.0)
    assert 1 <= times.estimate(1) <= times.estimate(8) <= 2
    assert times.estimate(32) >= 4


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_batch_is_never_expected_to_take_less(seed: int) -> None:
    chance, most = random.Random(seed), 48
    times = BatchTimes(most)
    for _ in range(300):
        times.record(chance.randint(1, most), chance.lognormvariate(0, 1))
        estimates = [times.estimate(size) for size in range(most + 1)]
        assert estimates == sorted(estimates)
        seconds = chance.random() * 2 * estimates[-1]
        fits = times.largest(seconds)
        assert fits == 0 or times.estimate(fits) <= seconds * (1 + 1e-9)
        assert fits == most or times.estimate(fits + 1) > seconds * (1 - 1e-9)


def test_a_promise_is_kept_by_nearly_all_runs_and_is_not_much_longer_than_they_are() -> None:
    chance = random.Random(1)
    times, kept, promised = BatchTimes(32), 0, 0.0
    for size in [1, 2, 4, 8, 16, 32] * 10 + [chance.randint(1, 32) for _ in range(2000)]:
        usual = 1 + 0.1 * size
        seconds = usual * chance.gauss(1, 0.1)
        kept += seconds <= times.estimate(size)
        promised += times.estimate(size) / usual
        times.record(size, seconds)
    assert kept / 2060 > 0.9
    assert promised / 2060 < 1.4


@pytest.mark.parametrize("factor", [0.1, 0.5, 3, 20])
@pytest.mark.parametrize("size", [1, 20, 32])
def test_a_device_that_becomes_slower_or_faster_is_followed(factor: float, size: int) -> None:
    times = batch_times(linear, 32)
    for _ in range(60):
        times.record(size, factor * linear(size))
    assert 0.95 < times.estimate(size) / (factor * linear(size)) < 1.4


def test_one_slow_run_does_not_spoil_the_estimate() -> None:
    times = batch_times(linear, 32)
    times.record(32, 1e6)
    assert times.estimate(32) < 2.5 * linear(32)
    for _ in range(12):
        times.record(32, linear(32))
    assert times.estimate(32) < 1.2 * linear(32)


# Overload, by discrete events: no time goes by but on the fake clock.


class Load:
    """Requests of one row that arrive at given times, all to be answered within `bound_s`."""

    def __init__(
        self,
        arrivals: Sequence[float],
        bound_s: float | None,
        *,
        fixed_s: float,
        row_s: float,
        noise: float = 0.0,
        max_batch_size: int = 32,
        max_wait_s: float = FOREVER_S,
    ) -> None:
        self._arrivals, self._next, self._bound_s = arrivals, 0, bound_s
        self._chance, self._noise = random.Random(1), noise
        self._fixed_s, self._row_s = fixed_s, row_s
        self.clock, self.good, self.late, self.refused = Clock(), 0, 0, 0
        self.queue_s: list[float] = []
        self.told: list[Batch] = []
        times = BatchTimes(max_batch_size)
        for size in [1, 2, 4, 8, 16, 32] * 4:
            times.record(size, self._seconds(size))
        self._batcher = Batcher(
            self._run,
            (1,),
            max_batch_size,
            times=times,
            max_wait_s=max_wait_s,
            on_batch=self.told.append,
            clock=self.clock,
        )

    def play(self) -> "Load":
        while self._next < len(self._arrivals) or self._batcher.waiting:
            if not self._batcher.run_next():
                self._arrive(self._arrivals[self._next])
        assert all(batch.late_rows == 0 for batch in self.told)
        return self

    def goodput(self) -> float:
        return self.good / self.clock.now

    def _seconds(self, size: int) -> float:
        return (self._fixed_s + self._row_s * size) * max(0.1, self._chance.gauss(1, self._noise))

    def _run(self, rows: Rows) -> Outputs:
        end = self.clock.now + self._seconds(len(rows))
        self._arrive(end)
        self.clock.now = end
        return np.zeros((len(rows), 1), np.float32)

    def _arrive(self, until: float) -> None:
        while self._next < len(self._arrivals) and self._arrivals[self._next] <= until:
            now = self._arrivals[self._next]
            self._next += 1
            self.clock.now = max(self.clock.now, now)
            deadline = None if self._bound_s is None else now + self._bound_s

            def done(ending: Answer | Exception, deadline: float | None = deadline) -> None:
                if isinstance(ending, Answer):
                    self.queue_s.append(ending.queue_s)
                    in_time = deadline is None or self.clock.now <= deadline
                    self.good += in_time
                    self.late += not in_time

            try:
                self._batcher.submit(np.zeros((1, 1), np.uint8), done, deadline=deadline)
            except Overloaded:
                self.refused += 1


def poisson(rate: float, seconds: float) -> list[float]:
    chance, arrivals, now = random.Random(2), list[float](), 0.0
    while (now := now + chance.expovariate(rate)) < seconds:
        arrivals.append(now)
    return arrivals


# Fixed seconds of a batch, seconds of a row, of which 32 are a batch; the bound is 50 ms.
DEVICES = {
    "a small network, 2 ms a batch": (0.0001, 0.00006),
    "all in the fixed part, 8 ms a batch": (0.0075, 0.0000156),
    "20 ms a batch": (0.003, 0.00053),
    "a batch nearly as long as the bound, 35 ms": (0.003, 0.001),
}


@pytest.mark.parametrize("noise", [0, 0.1])
@pytest.mark.parametrize("device", DEVICES)
def test_goodput_holds_when_more_comes_than_can_be_done(device: str, noise: float) -> None:
    fixed_s, row_s = DEVICES[device]
    capacity = 32 / (fixed_s + 32 * row_s)
    seconds = 2_500 / capacity

    def goodput(load: float) -> float:
        arrivals = poisson(load * capacity, seconds)
        return Load(arrivals, 0.05, fixed_s=fixed_s, row_s=row_s, noise=noise).play().goodput()

    peak = max(map(goodput, (0.8, 1)))
    assert peak > 0.7 * capacity
    assert goodput(2) > 0.95 * peak
    assert goodput(3) > 0.95 * peak


@pytest.mark.parametrize("device", DEVICES)
def test_of_a_burst_as_much_is_answered_in_time_as_can_be(device: str) -> None:
    fixed_s, row_s = DEVICES[device]
    batch_s = fixed_s + 32 * row_s
    played = Load([1.0] * 3000, 0.05, fixed_s=fixed_s, row_s=row_s).play()
    assert played.good >= 0.8 * 32 * (0.05 // batch_s)
    assert played.late == 0
    assert played.good + played.refused == 3000


def test_without_deadlines_the_wait_stays_bounded_under_overload() -> None:
    fixed_s, row_s = DEVICES["20 ms a batch"]
    arrivals = poisson(3 * 32 / 0.02, 2)
    played = Load(arrivals, None, fixed_s=fixed_s, row_s=row_s, max_wait_s=0.1).play()
    assert 0.05 < max(played.queue_s) <= 0.1 + 0.02
    assert played.goodput() > 0.95 * 32 / 0.02


# Priorities: 1 is the highest, 0 asks for the default, which is 2.


def test_the_higher_priority_goes_first() -> None:
    bench = Bench()
    for n, priority in enumerate([3, 0, 1, 2, 1, 9, 10**12]):
        bench.send(n, priority=priority)
    assert bench.run() == [[2, 4, 1, 3], [0, 5, 6]]


def test_the_lowest_priority_does_not_wait_for_ever() -> None:
    bench = Bench(lambda size: 1.0)
    bench.send(0, priority=10)
    for n in range(1, 20 * MAX):
        bench.send(n, priority=1)
        if n % MAX == 0:
            bench.batcher.run_next()
    assert 5 < bench.heard.answer(0).queue_s < 10


def test_only_those_who_go_first_count_in_the_wait() -> None:
    bench = Bench(linear, max_wait_s=20)
    for n in range(2 * MAX):
        bench.send(n)
    bench.send(100, priority=1)
    for priority in (0, 2, 3):
        with pytest.raises(Overloaded):
            bench.send(101, priority=priority)
    assert bench.run()[0] == [100, 0, 1, 2]


def test_those_of_a_lower_priority_who_have_waited_long_count_in_the_wait() -> None:
    bench = Bench(lambda size: 1.0, max_wait_s=1.5)
    for n in range(2 * MAX):
        bench.send(n, priority=3)
    bench.send(100, priority=2)
    bench.clock.now += 1.5
    with pytest.raises(Overloaded):
        bench.send(101, priority=2)
    assert bench.run() == [[100, 0, 1, 2], [3, 4, 5, 6], [7]]


# Failed.


def test_only_the_guilty_row_fails_when_a_run_does(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    bench.device.poison = {2}
    for some in [(0, 1), (2,), (3, 4)]:
        bench.send(*some)
    assert bench.run() == [[0, 1, 2, 3], [0], [1], [2], [3], [4]]
    assert isinstance(bench.heard.endings[2], InferenceFailed)
    assert "secret detail" not in str(bench.heard.endings[2])
    assert [bench.heard.given(n) for n in (0, 3)] == [
        outputs(0, 1).tolist(),
        outputs(3, 4).tolist(),
    ]
    assert [(b.rows, b.requests, b.failed, b.failed_rows) for b in bench.told] == [
        (4, 3, True, 0),
        (1, 1, False, 0),
        (1, 1, False, 0),
        (1, 1, True, 1),
        (1, 1, False, 0),
        (1, 1, False, 0),
    ]
    assert [record.message for record in caplog.records] == [
        "the model failed on a batch of 4 rows",
        "run apart, 1 of these 4 rows failed",
    ]
    assert "secret detail" in caplog.text


def test_a_row_that_ran_alone_is_not_tried_again() -> None:
    bench = Bench()
    bench.device.poison = {1}
    bench.send(1)
    assert bench.run() == [[1]]
    assert isinstance(bench.heard.endings[1], InferenceFailed)


def test_rows_that_failed_are_nan_in_the_answer() -> None:
    bench = Bench()
    bench.device.poison = {2}
    bench.device.odd = {5}
    bench.send(*range(7))
    bench.run()
    expected = outputs(*range(7))
    expected[[2, 5]] = np.nan
    assert np.array_equal(bench.heard.answer(0).outputs, expected, equal_nan=True)
    assert bench.heard.answer(0).failed_rows == 2
    assert sum(batch.failed_rows for batch in bench.told) == 2


def test_a_request_of_nothing_but_infinite_answers_fails_and_its_neighbours_do_not() -> None:
    bench = Bench()
    bench.device.odd = {0, 1}
    bench.send(0, 1)
    bench.send(2)
    assert bench.run() == [[0, 1, 2]]
    assert isinstance(bench.heard.endings[0], InferenceFailed)
    assert bench.heard.given(2) == [[2, 5]]
    assert [(batch.failed, batch.failed_rows) for batch in bench.told] == [(False, 2)]


def test_a_broken_device_costs_one_more_run_a_row_and_two_lines_of_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    bench.device.poison = set(range(100))
    bench.send(0, 1)
    bench.send(2, 3)
    assert len(bench.run()) == 1 + 4
    assert {type(ending) for ending in bench.heard.endings.values()} == {InferenceFailed}
    assert len(caplog.records) == 2


def test_what_is_cancelled_or_late_meanwhile_is_not_tried_apart() -> None:
    bench = Bench(lambda size: 1.0)
    bench.device.poison = {1}
    bench.send(1)
    cancelled = bench.send(2, 3)
    bench.send(4, deadline=2.5)
    bench.device.during = lambda: cancelled.cancel() if len(bench.device.batches) == 2 else None
    bench.send(5)
    assert bench.run() == [[1, 2, 3, 4], [1], [4], [5]]
    assert isinstance(bench.heard.endings[2], Cancelled)
    assert bench.heard.given(4) == [[4, 9]]

    bench = Bench(lambda size: 1.0)
    bench.device.poison = {1}
    bench.send(1, 2)
    bench.send(3, deadline=2.5)
    assert bench.run() == [[1, 2, 3], [1], [2]]
    assert isinstance(bench.heard.endings[3], DeadlineExceeded)
    assert [batch.late_rows for batch in bench.told] == [0, 0, 0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_run_that_gives_another_number_of_rows_fails(count: int) -> None:
    bench = Bench()
    bench.batcher._run = lambda rows: outputs(*range(count)) if len(rows) > 1 else outputs(7)
    bench.send(1, 2)
    bench.run()
    assert bench.heard.given(1) == outputs(7, 7).tolist()
    assert [batch.failed for batch in bench.told] == [True, False, False]


def test_a_failed_run_teaches_nothing_about_time() -> None:
    bench = Bench(lambda size: 1.0)
    bench.device.poison = {1}
    bench.device.during = lambda: setattr(bench.clock, "now", bench.clock.now + 100)
    before = bench.times.estimate(1)
    bench.send(1)
    bench.run()
    assert bench.times.estimate(1) == before


@pytest.mark.parametrize("failing", ["on_batch", "done"])
def test_a_bug_strands_nobody_and_is_told_of(
    failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    bugs: list[BaseException] = []
    bug = ZeroDivisionError("a bug")

    def fail(_: object) -> None:
        raise bug

    bench = Bench(on_bug=bugs.append)
    if failing == "on_batch":
        bench.batcher._on_batch = fail
        bench.send(0)
    else:
        bench.batcher.submit(rows(0), fail)
    bench.send(1)
    bench.send(*range(10, 20))
    bench.send(30)
    bench.run()
    assert bugs == [bug]
    assert bench.heard.given(1) == [[1, 3]]
    for n in (10, 30):
        assert isinstance(bench.heard.endings[n], InferenceFailed)
        assert str(bench.heard.endings[n]) == "internal error"
    with pytest.raises(NotReady):
        bench.send(99)
    assert "bug in the batcher" in caplog.text
    bench.batcher.close()


def test_a_run_that_ends_the_thread_strands_nobody() -> None:
    bugs, ended = list[BaseException](), threading.Event()
    heard = Heard()

    def run(rows: Rows) -> Outputs:
        raise SystemExit

    def on_bug(bug: BaseException) -> None:
        bugs.append(bug)
        ended.set()

    batcher = Batcher(run, (4,), MAX, times=BatchTimes(MAX), max_wait_s=FOREVER_S, on_bug=on_bug)
    batcher.submit(rows(*range(10)), heard.by(0))
    batcher.submit(rows(1), heard.by(1))
    batcher.start()
    assert ended.wait(TIMEOUT_S)
    assert [str(heard.endings[n]) for n in (0, 1)] == ["internal error"] * 2
    batcher.close()
    assert [type(bug) for bug in bugs] == [SystemExit]


# The same bits, whatever goes along.


def test_a_deterministic_batch_always_has_the_same_shape_and_zeros_behind() -> None:
    bench = Bench(sizes=(MAX,))
    bench.send(9, 9, 9, 9)
    bench.send(1)
    bench.send(2, 3)
    assert bench.run() == [[9, 9, 9, 9], [1, 2, 3, 0]]
    assert bench.heard.given(2) == outputs(2, 3).tolist()
    assert [batch.rows for batch in bench.told] == [4, 3]


def test_rows_of_a_failed_deterministic_batch_run_apart_in_the_same_shape() -> None:
    bench = Bench(sizes=(MAX,))
    bench.device.poison = {2}
    bench.send(1)
    bench.send(2)
    assert bench.run() == [[1, 2, 0, 0], [1, 0, 0, 0], [2, 0, 0, 0]]
    assert bench.heard.given(1) == [[1, 3]]


def test_a_deterministic_batch_takes_as_long_as_a_full_one() -> None:
    bench = Bench(linear, sizes=(MAX,))
    with pytest.raises(Overloaded):
        bench.send(1, deadline=13.0)
    bench.send(2, deadline=14.01)
    bench.send(3, deadline=14.01)
    assert bench.run() == [[2, 3, 0, 0]]
    slower = Device(bench.clock, lambda size: 20.0)
    bench.batcher._run = slower
    for n in range(100, 200):
        bench.send(n)
        bench.run()
    assert bench.batcher.wait_s(4) == pytest.approx(20, rel=0.01)


def convolution(size: int = 12) -> bytes:
    """conv 3x3, ReLU, max-pool, dense, softmax, with random weights."""
    chance = np.random.default_rng(3)
    side = (size - 2) // 2
    weights = {
        "kernels": chance.normal(0, 0.02, (8, 3, 3, 3)).astype(np.float32),
        "dense": chance.normal(0, 0.02, (8 * side * side, 5)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["floats"], ["first"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["first", "kernels"], ["found"]),
        helper.make_node("Relu", ["found"], ["positive"]),
        helper.make_node("MaxPool", ["positive"], ["less"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["less"], ["flat"]),
        helper.make_node("MatMul", ["flat", "dense"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["shares"]),
    ]
    inputs = [value("pixels", TensorProto.UINT8, ["N", size, size, 3])]
    outputs = [value("shares", TensorProto.FLOAT, ["N", 5])]
    return graph(nodes, inputs, outputs, weights)


# Of probabilities, for the same pixels in batches of other sizes, in float32 on a CPU. They were
# equal to the bit where this was written; other processors split their sums in other ways.
TOLERANCE = 1e-6


@pytest.mark.parametrize("deterministic", [True, False])
def test_an_image_gets_the_same_answer_in_every_place_and_company(deterministic: bool) -> None:
    session = ort.InferenceSession(convolution(), providers=["CPUExecutionProvider"])
    heard, most, chance = Heard(), 8, np.random.default_rng(4)
    image = chance.integers(0, 256, (1, 12, 12, 3), np.uint8)
    batcher = Batcher(
        lambda rows: session.run(None, {"pixels": rows})[0],
        image.shape[1:],
        most,
        times=BatchTimes(most),
        max_wait_s=FOREVER_S,
        sizes=(most,) if deterministic else (),
    )
    places = [(before, after) for before in range(most) for after in range(most - before)]
    for n, (before, after) in enumerate(places):
        for count, company in [(before, "before"), (1, "image"), (after, "after")]:
            if count:
                pixels = chance.integers(0, 256, (count, 12, 12, 3), np.uint8)
                batcher.submit(image if company == "image" else pixels, heard.by((n, company)))
        batcher.run_next()
    answers = [heard.answer((n, "image")) for n in range(len(places))]
    assert {answer.batch_size for answer in answers} == set(range(1, most + 1))
    values = [answer.outputs for answer in answers]
    assert np.ptp(values, axis=0).max() <= TOLERANCE
    if deterministic:
        assert len({value.tobytes() for value in values}) == 1


def test_batches_are_padded_to_the_sizes_that_are_run() -> None:
    given: dict[int, Rows] = {}

    def buffer(size: int, lane: int) -> Rows:
        return given.setdefault(size, np.full((size, 4), 255, np.uint8))

    bench = Bench(max_batch_size=8, sizes=(1, 2, 4, 8), buffer=buffer)
    ran: list[Rows] = []
    run = bench.batcher._run
    bench.batcher._run = lambda rows: ran.append(rows) or run(rows)  # type: ignore[func-returns-value]
    for numbers in ((1,), (2, 3), (4, 5, 6), (7, 8, 9, 10, 11)):
        bench.send(*numbers)
        bench.run()
    assert [len(rows) for rows in ran] == [1, 2, 4, 8]
    # Where there was room, they are put together where the device reads them, zeros behind.
    assert ran[2] is given[4]
    assert ran[3] is given[8]
    assert not ran[2][3:].any()
    assert not ran[3][5:].any()
    for first, count in ((1, 1), (2, 2), (4, 3), (7, 5)):
        answer = bench.heard.answer(first)
        assert (len(answer.outputs), answer.batch_size) == (count, count)


def test_a_padded_batch_takes_as_long_as_one_of_its_size() -> None:
    bench = Bench(linear, max_batch_size=8, sizes=(1, 2, 4, 8))
    assert bench.batcher.wait_s(5) == bench.batcher.wait_s(8) > bench.batcher.wait_s(4)
    # Time for 4 rows, but not for 8: the fifth waits for the next.
    deadline = bench.clock() + bench.times.estimate(8) * 0.9
    for number in range(1, 6):
        bench.send(number, **({"deadline": deadline} if number == 1 else {}))
    assert [len(batch) for batch in bench.run()] == [4, 1]


def test_only_a_deterministic_batcher_hides_the_batch_size_from_the_model() -> None:
    def answers(deterministic: bool) -> set[float]:
        bench = Bench(sizes=(MAX,) if deterministic else ())
        bench.batcher._run = lambda rows: np.full((len(rows), 1), len(rows), np.float32)
        for size in range(1, MAX + 1):
            bench.send(*range(100 * size, 100 * size + size))
            bench.run()
        return {float(bench.heard.answer(100 * size).outputs[0, 0]) for size in range(1, MAX + 1)}

    assert answers(deterministic=True) == {MAX}
    assert answers(deterministic=False) == {1, 2, 3, 4}


# On a thread of its own.


class Gate:
    """A device on whose runs a test can wait, and which it can hold."""

    def __init__(self) -> None:
        self.device = Device()
        self._entered, self._may_finish = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, rows: Rows) -> Outputs:
        self._entered.release()
        assert self._may_finish.acquire(timeout=TIMEOUT_S)
        return self.device(rows)

    def wait_until_busy(self) -> None:
        assert self._entered.acquire(timeout=TIMEOUT_S)

    def open(self) -> None:
        self._may_finish.release(10_000)


def on_a_thread(run: Callable[[Rows], Outputs], **options: Any) -> Batcher:
    times = BatchTimes(MAX)
    batcher = Batcher(run, (4,), MAX, times=times, max_wait_s=FOREVER_S, **options)
    batcher.start()
    return batcher


def test_an_idle_device_takes_a_lone_request_at_once() -> None:
    gate, heard = Gate(), Heard()
    with closing(on_a_thread(gate)) as batcher:
        batcher.submit(rows(7), heard.by(7))
        gate.wait_until_busy()
        for n in range(3):
            batcher.submit(rows(n), heard.by(n))
        gate.open()
    assert gate.device.batches == [[7], [0, 1, 2]]
    assert heard.answer(7).batch_size == 1


def test_a_thread_sleeps_and_wakes_as_often_as_it_must() -> None:
    device, ended = Device(), threading.Semaphore(0)
    with closing(on_a_thread(device)) as batcher:
        for n in range(200):
            batcher.submit(rows(n), lambda ending: ended.release())
            assert ended.acquire(timeout=TIMEOUT_S)
    assert device.batches == [[n] for n in range(200)]


def test_a_batch_is_not_begun_while_another_runs() -> None:
    gate, heard = Gate(), Heard()
    with closing(on_a_thread(gate)) as batcher:
        batcher.submit(rows(1), heard.by(1))
        gate.wait_until_busy()
        batcher.submit(rows(2), heard.by(2))
        assert batcher.waiting
        assert not batcher.run_next()
        gate.open()
    assert gate.device.batches == [[1], [2]]


# Closed.


def test_close_finishes_what_waits_and_then_refuses() -> None:
    gate, heard = Gate(), Heard()
    batcher = on_a_thread(gate)
    for n in range(10):
        batcher.submit(rows(*range(100 * n, 100 * n + 3)), heard.by(n))
    closer = threading.Thread(target=batcher.close)
    closer.start()
    count = 10
    while True:  # until `close` has begun
        try:
            batcher.submit(rows(0, 1, 2), heard.by(count))
            count += 1
        except NotReady:
            break
    assert closer.is_alive()
    gate.open()
    closer.join(TIMEOUT_S)
    assert not closer.is_alive()
    assert len([heard.answer(n) for n in range(count)]) == count
    batcher.close()


def test_close_without_a_thread_finishes_what_waits_here() -> None:
    bench = Bench()
    bench.send(*range(10))
    bench.batcher.close()
    assert len(bench.heard.answer(0).outputs) == 10
    with pytest.raises(NotReady):
        bench.send(11)


@pytest.mark.parametrize("threaded", [True, False])
def test_close_may_be_called_where_an_answer_arrives(threaded: bool) -> None:
    gate, heard = Gate(), Heard()
    batcher = Batcher(gate, (4,), MAX, times=BatchTimes(MAX), max_wait_s=FOREVER_S)
    batcher.submit(rows(*range(4)), lambda ending: batcher.close())
    batcher.submit(rows(9), heard.by(9))
    gate.open()
    if threaded:
        batcher.start()
    while not threaded and batcher.waiting:
        batcher.run_next()
    batcher.close()
    assert heard.given(9) == [[9, 19]]


# All of it at once.


@pytest.mark.parametrize(("threaded", "lanes"), [(True, 1), (False, 1), (True, 2)])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_every_request_ends_once_and_every_row_is_its_own(
    seed: int, threaded: bool, lanes: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    most, threads, requests = 8, 6, 400
    ran: Counter[int] = Counter()
    told: list[Batch] = []
    bugs: list[BaseException] = []
    faults = random.Random(seed)
    poisoned = {n for n in range(threads * requests * 3 * most) if n % 97 == 0}
    odd = {n for n in range(threads * requests * 3 * most) if n % 89 == 0}

    counting, beside = threading.Lock(), Counter[int]()

    def run(given: Rows) -> Outputs:
        assert 1 <= len(given) <= most
        before = numbers(given)
        with counting:
            ran.update(n for n in before if n or lanes == 1)  # zeros are padding
            running.append(given)
            beside[len(running)] += 1
        try:
            return answer(given)
        finally:
            with counting:
                running.pop(next(n for n, each in enumerate(running) if each is given))
            assert numbers(given) == before, "another batch was put where this one is"

    running: list[Rows] = []
    memory = {
        (size, lane): np.zeros((size, 4), np.uint8)
        for size in range(1, most + 1)
        for lane in (0, 1)
    }

    def answer(given: Rows) -> Outputs:
        if lanes > 1:
            time.sleep(0)  # so that the other lane has its turn
        if not poisoned.isdisjoint(numbers(given)):
            raise RuntimeError("poison")
        if len(given) > 1:  # alone they are well
            match faults.randrange(30):
                case 0:
                    raise RuntimeError("injected")
                case 1:
                    return outputs(*numbers(given)[:-1])
        answers = outputs(*numbers(given))
        answers[[n in odd for n in numbers(given)], 0] = np.nan
        return answers

    batcher = Batcher(
        run,
        (4,),
        most,
        times=BatchTimes(most),
        max_wait_s=FOREVER_S,
        sizes=tuple(range(1, most + 1)) if lanes > 1 else (),
        buffer=lambda size, lane: memory[size, lane] if lanes > 1 else None,
        lanes=lanes,
        on_batch=told.append,
        on_bug=bugs.append,
    )
    clock = batcher._clock

    class Sent:
        def __init__(self, thread: int, request: int, chance: random.Random) -> None:
            first = (thread * requests + request) * 3 * most
            self.numbers = range(first, first + chance.choice([1, 1, 2, most, 3 * most - 1]))
            self.deadline = clock() + chance.random() * 0.02 if chance.random() < 0.3 else None
            self.endings: list[Answer | Exception] = []
            self.ended = threading.Event()
            self.ticket: Any = None
            try:
                self.ticket = batcher.submit(
                    rows(*self.numbers),
                    self._done,
                    deadline=self.deadline,
                    priority=chance.randrange(5),
                )
            except ConvoyError as refusal:
                self._done(refusal)

        def _done(self, ending: Answer | Exception) -> None:
            self.endings.append(ending)
            self.ended.set()

    arrived = threading.Semaphore(0)
    sent: list[list[Sent]] = [[] for _ in range(threads)]

    def call(thread: int) -> None:
        chance = random.Random(f"{seed} {thread}")
        for request in range(requests):
            sent[thread].append(Sent(thread, request, chance))
            arrived.release()
            if chance.random() < 0.2 and (victim := chance.choice(sent[thread][-4:])).ticket:
                victim.ticket.cancel()
            assert sent[thread][max(0, request - 10)].ended.wait(TIMEOUT_S)

    callers = [threading.Thread(target=call, args=(thread,)) for thread in range(threads)]
    for caller in callers:
        caller.start()
    if threaded:
        batcher.start()
    else:
        for _ in range(threads * requests):
            assert arrived.acquire(timeout=TIMEOUT_S)
            while batcher.run_next():
                pass
    for caller in callers:
        caller.join(TIMEOUT_S)
        assert not caller.is_alive()
    batcher.close()

    assert bugs == []
    kinds: Counter[type] = Counter()
    run_s = 0.0
    for one in [one for of_thread in sent for one in of_thread]:
        [ending] = one.endings
        kinds[type(ending)] += 1
        broken = [n in poisoned or n in odd for n in one.numbers]
        match ending:
            case Answer():
                expected = outputs(*one.numbers)
                expected[broken] = np.nan
                assert np.array_equal(ending.outputs, expected, equal_nan=True)
                assert ending.failed_rows == sum(broken)
                run_s += ending.run_s
            case InferenceFailed():
                assert all(broken)
            case DeadlineExceeded():
                assert one.deadline is not None
        if one.ticket is None:
            assert ran.keys().isdisjoint(one.numbers), "refused, but run"
    assert {Answer, Cancelled, InferenceFailed} <= set(kinds) <= {
        Answer, Cancelled, InferenceFailed, DeadlineExceeded, Overloaded,
    }  # fmt: skip
    assert kinds[Answer] > requests
    assert max(ran.values()) <= 2, "a row is run once, and once more apart"
    assert all(batch.late_rows == 0 for batch in told)
    assert (beside[2] > 0, beside[3]) == (lanes == 2, 0)
    assert run_s <= sum(batch.run_s * batch.requests for batch in told) * (1 + 1e-9)


@pytest.mark.parametrize(("rows", "bound_s"), [(128, 0.05), (640, 0.1), (4096, 0.5)])
@pytest.mark.parametrize("load", [2.0, 3.0])
def test_requests_of_several_batches_keep_their_goodput_under_overload(
    rows: int, bound_s: float, load: float
) -> None:
    now, arrives, in_time = [0.0], 0.0, []
    times = BatchTimes(64)
    for size in (1, 2, 4, 8, 16, 32, 64) * 3:
        times.record(size, 0.0005 + size * 0.0000235)

    def run(pixels: Rows) -> Outputs:
        now[0] += 0.0005 + len(pixels) * 0.0000235
        return np.zeros((len(pixels), 2), np.float32)

    def told(due: float) -> Callable[[Answer | Exception], None]:
        return lambda outcome: in_time.append(isinstance(outcome, Answer) and now[0] <= due)

    batcher = Batcher(run, (1,), 64, times=times, max_wait_s=10, clock=lambda: now[0])
    capacity = 64 / (0.0005 + 64 * 0.0000235) / rows
    arrivals, pixels, seconds = (
        np.random.default_rng(1),
        np.zeros((rows, 1), np.uint8),
        60 * bound_s,
    )
    while now[0] < seconds:
        while arrives <= now[0]:
            due = arrives + bound_s
            arrives += arrivals.exponential(1 / (capacity * load))
            with suppress(Overloaded, DeadlineExceeded):
                batcher.submit(pixels, told(due), deadline=due)
        if not batcher.run_next():
            now[0] = arrives
    assert sum(in_time) >= 0.95 * capacity * seconds


# Two lanes: a device that copies while it computes.


class Pipeline:
    """A device that copies one batch after the other, and computes one after the other; lanes that run
    batches on it; and a clock that goes from event to event. Of its threads one runs at a time, and
    which one is no matter of chance.
    """

    def __init__(
        self,
        copy_s: Callable[[int], float],
        compute_s: Callable[[int], float],
        *,
        most: int = 8,
        lanes: int = 2,
    ) -> None:
        self.now, self.ran = 0.0, list[list[int]]()
        self._copied = self._computed = 0.0
        self._copy_s, self._compute_s = copy_s, compute_s
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        memory = {
            (size, lane): np.zeros((size, 4), np.uint8)
            for size in range(1, most + 1)
            for lane in range(lanes)
        }
        self._lane_of = {id(rows): lane for (_, lane), rows in memory.items()}
        self._on_device: set[int] = set()
        self._turns = [threading.Semaphore(0) for _ in range(lanes)]
        self._back = threading.Semaphore(0)
        self._over = False
        self.batcher = Batcher(
            self._device,
            (4,),
            most,
            # As warm-up measures: each batch alone.
            times=batch_times(lambda size: copy_s(size) + compute_s(size), most),
            max_wait_s=FOREVER_S,
            sizes=tuple(range(1, most + 1)),
            buffer=lambda size, lane: memory[size, lane],
            lanes=lanes,
            clock=lambda: self.now,
        )
        self._threads = [threading.Thread(target=self._lane, args=(n,)) for n in range(lanes)]
        for thread in self._threads:
            thread.start()

    def at(self, when: float, event: Callable[[], object]) -> None:
        heapq.heappush(self._events, (when, next(self._order), event))

    def run(self) -> None:
        """Until nothing is to happen any more."""
        while self._events:
            self.now, _, event = heapq.heappop(self._events)
            event()
            before = -1
            while before != len(self.ran):
                before = len(self.ran)
                for lane in range(len(self._turns)):
                    if lane not in self._on_device:
                        self._let(lane)

    def close(self) -> None:
        self._over = True
        for turn, thread in zip(self._turns, self._threads, strict=True):
            turn.release()
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()

    def _let(self, lane: int) -> None:
        """The lane goes on until the device has its batch, or there is none for it."""
        self._on_device.discard(lane)
        self._turns[lane].release()
        assert self._back.acquire(timeout=TIMEOUT_S)

    def _lane(self, lane: int) -> None:
        while self._turns[lane].acquire(timeout=TIMEOUT_S) and not self._over:
            self.batcher.run_next(lane)
            self._back.release()

    def _device(self, given: Rows) -> Outputs:
        lane, size = self._lane_of[id(given)], len(given)
        self.ran.append(numbers(given))
        self._copied = max(self.now, self._copied) + self._copy_s(size)
        self._computed = max(self._copied, self._computed) + self._compute_s(size)
        self.at(self._computed, lambda: self._let(lane))
        self._on_device.add(lane)
        self._back.release()
        assert self._turns[lane].acquire(timeout=TIMEOUT_S)
        return outputs(*numbers(given))


@pytest.mark.parametrize(
    ("copy_s", "compute_s", "lanes", "seconds"),
    [(4, 6, 1, 100 * 10), (4, 6, 2, 4 + 100 * 6), (6, 4, 2, 100 * 6 + 4), (0, 6, 2, 100 * 6)],
)
def test_with_two_lanes_the_slower_of_copying_and_computing_is_the_clock(
    copy_s: float, compute_s: float, lanes: int, seconds: float
) -> None:
    heard = Heard()
    with closing(Pipeline(lambda size: copy_s, lambda size: compute_s, lanes=lanes)) as device:
        for n in range(100):
            device.batcher.submit(rows(*range(8 * n, 8 * n + 8)), heard.by(n))
        device.at(0, lambda: None)
        device.run()
        assert device.now == seconds
    for n in range(100):
        assert heard.given(n) == outputs(*range(8 * n, 8 * n + 8)).tolist()
    # Neither is one who waits charged with the batch before his own, nor is that lost.
    told = [heard.answer(n) for n in range(100)]
    assert all(answer.run_s <= copy_s + compute_s for answer in told)
    assert told[-1].queue_s + told[-1].run_s == seconds


def test_what_is_not_full_waits_for_the_device_and_gathers() -> None:
    heard = Heard()
    with closing(Pipeline(lambda size: 1, lambda size: 10)) as device:
        for n in range(8):
            when = float(n)
            device.at(when, partial(device.batcher.submit, rows(n), heard.by(n)))
        # Now there is a full batch, which goes while the device has another.
        device.at(12.5, lambda: device.batcher.submit(rows(*range(10, 20)), heard.by(10)))
        device.run()
    assert device.ran == [[0], list(range(1, 8)), list(range(10, 18)), [18, 19]]
    assert device.now == (1 + 10) + (1 + 10) + 10 + (1 + 10)


def test_what_is_promised_holds_while_two_are_under_way() -> None:
    """The estimates learn that batches follow each other faster than each is done."""
    heard = Heard()
    with closing(Pipeline(lambda size: 4, lambda size: 6)) as device:
        for n in range(60):
            device.batcher.submit(rows(*range(8 * n, 8 * n + 8)), heard.by(n))
        promised: list[float] = []
        device.at(0, lambda: promised.append(device.batcher.wait_s(8)))
        device.at(300, lambda: promised.append(device.now + device.batcher.wait_s(8)))
        device.at(300, lambda: device.batcher.submit(rows(*range(1000, 1008)), heard.by("last")))
        device.run()
    assert promised[0] == pytest.approx(61 * 10)
    assert promised[1] == pytest.approx(4 + 61 * 6, rel=0.1)
    assert promised[1] >= device.now


def test_a_batch_that_overtakes_another_does_not_count_for_both() -> None:
    """Of two at once the device's time is told from one landing to the next, whichever lands."""
    memory = np.zeros((2, MAX, MAX, 4), np.uint8)
    both, landed = threading.Barrier(2), threading.Event()
    taken, heard = list[float](), Heard()
    now = [0.0]

    def run(given: Rows) -> Outputs:
        first = numbers(given)[0]
        both.wait(TIMEOUT_S)
        if first == 0:
            # The later one is done after 1 s, this one after 1 s more.
            landed.wait(TIMEOUT_S)
            now[0] = 2.0
        else:
            now[0] = 1.0
        return outputs(*numbers(given))

    times = batch_times(lambda size: 1.0, MAX)
    record = times.record

    def recorded(size: int, seconds: float) -> None:
        taken.append(seconds)
        record(size, seconds)
        landed.set()

    times.record = recorded  # type: ignore[method-assign]
    batcher = Batcher(
        run,
        (4,),
        MAX,
        times=times,
        max_wait_s=FOREVER_S,
        sizes=range(1, MAX + 1),
        buffer=lambda size, lane: memory[lane, size - 1, :size],
        lanes=2,
        clock=lambda: now[0],
    )
    for n in (0, MAX):
        batcher.submit(rows(*range(n, n + MAX)), heard.by(n))
    batcher.start()
    batcher.close()
    assert set(heard.endings) == {0, MAX}
    assert taken == [1.0, 1.0]


def test_a_bug_in_one_lane_ends_both_and_strands_nobody() -> None:
    heard, gate, bugs = Heard(), Gate(), list[BaseException]()
    memory = np.zeros((2, MAX, MAX, 4), np.uint8)
    started = threading.Barrier(2)

    def run(given: Rows) -> Outputs:
        first = numbers(given)[0]
        if first < 20:
            started.wait(TIMEOUT_S)
        if first == 10:
            raise SystemExit
        return gate(given)

    batcher = on_a_thread(
        run,
        sizes=range(1, MAX + 1),
        buffer=lambda size, lane: memory[lane, size - 1, :size],
        lanes=2,
        on_bug=bugs.append,
    )
    for n in (0, 10, 20):
        batcher.submit(rows(*range(n, n + MAX)), heard.by(n))
    gate.wait_until_busy()
    gate.open()
    batcher.close()
    assert [type(bug) for bug in bugs] == [SystemExit]
    assert isinstance(heard.endings[10], InferenceFailed)
    # What the other lane has is finished; what waits is not begun any more, or was already.
    assert heard.given(0) == outputs(0, 1, 2, 3).tolist()
    assert set(heard.endings) == {0, 10, 20}
    assert not any(thread.is_alive() for thread in batcher._threads)


@pytest.mark.parametrize(("count", "bound_s"), [(1, 60.0), (8, 80.0), (32, 150.0)])
@pytest.mark.parametrize("load", [2.0, 3.0])
def test_goodput_is_kept_under_overload_with_two_lanes(
    count: int, bound_s: float, load: float
) -> None:
    def copy_s(size: int) -> float:
        return 1 + size / 8

    def compute_s(size: int) -> float:
        return 4 + size / 2

    capacity = 8 / max(copy_s(8), compute_s(8)) / count
    chance, seconds, good, late = random.Random(1), 100 * bound_s, [0], [0]
    with closing(Pipeline(copy_s, compute_s)) as device:

        def arrive() -> None:
            due = device.now + bound_s
            if (next_at := device.now + chance.expovariate(capacity * load)) < seconds:
                device.at(next_at, arrive)

            def done(ending: Answer | Exception) -> None:
                in_time = isinstance(ending, Answer) and device.now <= due
                good[0] += in_time
                late[0] += not in_time and isinstance(ending, Answer)

            with suppress(Overloaded, DeadlineExceeded):
                device.batcher.submit(np.zeros((count, 4), np.uint8), done, deadline=due)

        device.at(0, arrive)
        device.run()
    assert good[0] >= 0.95 * capacity * seconds
    assert late[0] <= 0.01 * good[0]
