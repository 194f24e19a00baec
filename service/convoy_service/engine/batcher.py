"""Who waits, who goes together, whose deadline has passed. Knows no gRPC and no ONNX Runtime.

The device is the clock: while it runs a batch, requests gather; when it is free, what waits goes,
up to the largest batch that keeps the deadlines. There is no timer and no polling.
"""

import itertools
import logging
import math
import random
import threading
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from convoy_service.errors import (
    BACK_OFF,
    Cancelled,
    DeadlineExceeded,
    InferenceFailed,
    NotReady,
    Overloaded,
)

Rows = npt.NDArray[np.uint8]
Outputs = npt.NDArray[np.float32]

log = logging.getLogger("convoy.batcher")

_UINT8 = np.dtype(np.uint8)

# Jacobson and Karels, Congestion Avoidance and Control, 1988: a mean that follows by an eighth of
# the error, a deviation by a quarter, and a promise of the mean and four deviations.
_MEAN_GAIN, _DEVIATION_GAIN, _DEVIATIONS = 1 / 8, 1 / 4, 4
# Of what was measured once.
_FIRST_DEVIATION = 1 / 8

# The Open Inference Protocol leaves priorities to the server; as in Triton 1 is the highest, and 0
# asks for the default. Each level counts as having arrived so much later than the one above, so
# that no one waits for ever.
_DEFAULT_LEVEL, LOWEST_LEVEL, _LEVEL_S = 2, 8, 1.0

# On an idle device an estimate is worth half after so long without a run, a third after twice that.
_CERTAIN_S = 1.0


class Answer(NamedTuple):
    """`outputs` float32 `[n, classes]` belong to the submitted rows, in their order; the
    `failed_rows` that the model failed on are NaN. Times are in seconds: waiting for the device, and
    on it. `batch_size` is that of the largest batch any of its rows ran in. `batch` is the number of
    the last one, which those have who ran with it, and no other batch of this machine; it took
    `batch_s`.
    """

    outputs: Outputs
    queue_s: float
    run_s: float
    batch_size: int
    failed_rows: int = 0
    batch: int = 0
    batch_s: float = 0.0


Done: TypeAlias = Callable[[Answer | Exception], None]


class Batch(NamedTuple):
    """What one run on the device was: for metrics.

    The sum of `run_s` times `requests` over all runs is the sum of `Answer.run_s` over all answers,
    where none was cancelled or late while it ran.
    """

    rows: int
    requests: int
    run_s: float
    # The run raised, or gave the wrong number of rows; more than one are then run apart.
    failed: bool
    # Ended as NaN.
    failed_rows: int
    # Had passed their deadline when the run began. Stays 0.
    late_rows: int
    # In seconds: of putting the rows together before the run, of sharing the answers out after it.
    gather_s: float = 0.0
    split_s: float = 0.0


class BatchTimes:
    """How long a batch of each size takes on this device, measured, kept up to date by every run.

    It holds a mean and a deviation for each power of two and for the largest size; between them
    they are linear. Thread-safe.
    """

    def __init__(self, max_batch_size: int) -> None:
        self._sizes = [1 << n for n in range((max_batch_size - 1).bit_length())] + [max_batch_size]
        self._means = [0.0] * len(self._sizes)
        self._deviations = [0.0] * len(self._sizes)
        self._seen = [0.0] * len(self._sizes)
        self._bounds = (0.0,) * len(self._sizes)
        self._lock = threading.Lock()

    def estimate(self, size: int) -> float:
        """Seconds in which a batch of `size` rows, 0 to the largest, is done in all likelihood.

        Never less for more rows; 0 where nothing was recorded yet.
        """
        bounds = self._bounds
        if size <= 1:
            return bounds[0] if size else 0.0
        upper = (size - 1).bit_length()
        high, to = self._sizes[upper], bounds[upper]
        if size == high:
            return to
        low, since = self._sizes[upper - 1], bounds[upper - 1]
        return since + (to - since) * (size - low) / (high - low)

    def largest(self, seconds: float) -> int:
        """The most rows whose estimate is within `seconds`; 0 where even one takes longer."""
        bounds = self._bounds
        above = bisect_right(bounds, seconds)
        if above in {0, len(self._sizes)}:
            return self._sizes[-1] if above else 0
        low, high = self._sizes[above - 1 : above + 1]
        since, to = bounds[above - 1 : above + 1]
        return low + int((high - low) * (seconds - since) / (to - since))

    def record(self, size: int, seconds: float) -> None:
        """A batch of `size` rows took `seconds`."""
        upper = (size - 1).bit_length()
        lower = max(0, upper - 1)
        low, high = self._sizes[lower], self._sizes[upper]
        share = (size - low) / (high - low) if high > low else 1.0
        with self._lock:
            if not self._means[-1]:
                # Until they are measured, larger batches are taken to cost as much a row.
                self._means = [seconds * max(1.0, each / size) for each in self._sizes]
                self._deviations = [mean * _FIRST_DEVIATION for mean in self._means]
            expected = self._means[lower] * (1 - share) + self._means[upper] * share
            # Cut at twice the expected time: one hiccup can't spoil the table.
            error = min(seconds - expected, expected)
            self._learn(upper, share, error)
            if share < 1:
                self._learn(lower, 1 - share, error)
            self._order(lower, upper, share)
            # Replaced, never changed: it is read without the lock.
            self._bounds = tuple(
                mean + _DEVIATIONS * deviation
                for mean, deviation in zip(self._means, self._deviations, strict=True)
            )

    def _learn(self, knot: int, weight: float, error: float) -> None:
        self._seen[knot] += weight
        self._means[knot] += error * weight * max(_MEAN_GAIN, 1 / self._seen[knot])
        if self._seen[knot] <= 1:
            self._deviations[knot] = self._means[knot] * _FIRST_DEVIATION
        else:
            # A batch that was done early breaks no promise.
            difference = max(0.0, error) - self._deviations[knot]
            self._deviations[knot] += difference * weight * _DEVIATION_GAIN

    def _order(self, lower: int, upper: int, share: float) -> None:
        """No batch takes longer than a larger one: what was just learned at two knots holds."""
        for values in (self._means, self._deviations):
            if values == sorted(values):
                continue
            if values[lower] > values[upper]:
                values[lower] += (values[upper] - values[lower]) * share
                values[upper] = values[lower]
            for knot in range(lower):
                values[knot] = min(values[knot], values[lower])
            for knot in range(upper + 1, len(values)):
                values[knot] = max(values[knot], values[upper])


class _Queue:
    """Those of one priority, oldest first; the cancelled are passed over when their turn comes."""

    __slots__ = ("handicap_s", "level", "rows", "tickets")

    def __init__(self, level: int) -> None:
        self.level = level
        self.handicap_s = level * _LEVEL_S
        self.tickets: deque[Ticket] = deque()
        # Rows that go in the next turn of each: at most a batch.
        self.rows = 0

    def before(self, rank: float) -> int:
        """Rows that go before `rank`, as if all had come evenly."""
        if not self.rows:
            return 0
        first, last = self.tickets[0].rank, self.tickets[-1].rank
        if first > rank:
            return 0
        return self.rows if last <= rank else int(self.rows * (rank - first) / (last - first))


class Ticket:
    """A submitted request; all but `cancel` is the batcher's."""

    __slots__ = (
        "answered", "arrived", "batch", "batch_s", "batch_size", "batcher", "count", "deadline",
        "done", "ended", "failed_rows", "on_trial", "outputs", "queue", "rank", "rows", "run_s", "taken",
    )  # fmt: skip

    def __init__(
        self,
        batcher: "Batcher",
        queue: _Queue,
        rows: Rows,
        done: Done,
        arrived: float,
        deadline: float,
        on_trial: bool,
    ) -> None:
        self.batcher = batcher
        self.queue = queue
        self.rows = rows
        self.count = len(rows)
        self.done = done
        self.arrived = arrived
        self.deadline = deadline
        # Let in against the estimate: see `_admit`.
        self.on_trial = on_trial
        self.rank = arrived + queue.handicap_s
        # How many rows went into batches, came back, and came back as failed.
        self.taken = self.answered = self.failed_rows = 0
        self.outputs: Outputs | None = None
        self.run_s = self.batch_s = 0.0
        self.batch = self.batch_size = 0
        self.ended = False

    def cancel(self) -> None:
        """Ends the request, unless it has ended: `done` hears Cancelled, and none of its rows that
        still wait will run. May be called on any thread.
        """
        if self.batcher._withdraw(self):
            self.done(Cancelled("the request was cancelled"))


class _Flight:
    """A batch that the device has. It is at it since `began`; None while it has another before it."""

    __slots__ = ("began", "expected_s")

    def __init__(self, began: float | None, expected_s: float) -> None:
        self.began, self.expected_s = began, expected_s


# Rows of a request that go into one batch: from, to.
_Slice: TypeAlias = tuple[Ticket, int, int]
_Ending: TypeAlias = tuple[Ticket, Answer | Exception]


class Batcher:
    """Gathers the rows of concurrent requests into batches for `run`, one batch at a time, or as many
    as there are `lanes`.

    `run` takes uint8 `[n, *row_shape]`, n up to `max_batch_size`, and gives float32 `[n, classes]`.
    Batches run on the thread that calls `run_next`, or on one of each lane after `start`. Safe to
    call from any thread. Deadlines are on the clock of `time.monotonic`.
    """

    def __init__(
        self,
        run: Callable[[Rows], Outputs],
        row_shape: tuple[int, ...],
        max_batch_size: int,
        *,
        times: BatchTimes,
        max_wait_s: float,
        sizes: Sequence[int] = (),
        buffer: Callable[[int, int], Rows | None] = lambda size, lane: None,
        lanes: int = 1,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        on_rows: Callable[[Rows], None] = lambda rows: None,
        on_bug: Callable[[BaseException], None] = lambda bug: None,
        name: str = "batcher",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`max_wait_s` is how long a request may be expected to wait before it runs.

        `sizes`: those that are run, up to `max_batch_size`; smaller batches get zeros after the rows
        there are. `buffer(size, lane)` gives the array in which a batch goes to `run`, None where
        any will do.
        `lanes`: with two, a device that copies while it computes has the next batch at hand when
        it is done with one. Only a full batch goes before that: others would be smaller for it.
        `on_batch` hears of every run, and `on_rows` of the rows that were run together, which are
        there for as long as it looks at them; `on_bug` of an error in the batcher itself, after which
        every waiting request has failed and new ones are refused.
        """
        self._run = run
        self._row_shape = row_shape
        self._max = max_batch_size
        self._times = times
        self._max_wait_s = max_wait_s
        self._sizes = tuple(sorted(sizes))
        self._on_batch, self._on_rows = on_batch, on_rows
        self._on_bug = on_bug
        self._name = name
        self._clock = clock
        rows = np.empty((max_batch_size, *row_shape), np.uint8)
        given = [[buffer(size, lane) for size in self._sizes] for lane in range(lanes)]
        self._bound = any(each is not None for each in given[0])
        if lanes > 1 and not self._bound:
            raise ValueError("lanes need buffers of their own")
        self._buffers = [
            [rows if each is None else each for each in of_lane] or [rows] for of_lane in given
        ]
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._asleep = 0
        self._threads: list[threading.Thread] = []
        self._closed = False
        # One for each priority that was ever asked for, the default first.
        self._queues = [_Queue(_DEFAULT_LEVEL)]
        self._rows = 0
        # The lanes at work, until their answers are told; and what the device has, oldest first.
        self._busy: set[int] = set()
        self._flights: list[_Flight] = []
        # While batches run, when the last should be done; after it, when it was.
        self._free_at = clock()
        # The rows of the last batch, and whether others were left. What then goes by for each row
        # until the next starts: answers are given and requests are read, perhaps on the same core.
        self._size = 1
        self._left_some = False
        self._gap_s = 0.0
        # Of batches; no other batcher will come to the same ones.
        self._numbers = itertools.count(random.getrandbits(63) + 1)
        # Rows that were asked for since the last batch, refused ones too: these take time, but must
        # not make those that are taken on look expensive, or ever more would be refused.
        self._asked = 0

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return not self._closed

    @property
    def lanes(self) -> int:
        """How many batches may be under way at once."""
        return len(self._buffers)

    @property
    def full_batch_s(self) -> float:
        """Seconds in which a full batch is done, by what was measured."""
        return self._times.estimate(self._max)

    @property
    def waiting(self) -> bool:
        """Whether there is something to run."""
        return self._rows > 0

    def queued(self) -> int:
        """Requests that wait, and of which not all is on the device yet."""
        # Without the lock: a list is made of a deque in one go.
        queues = list(self._queues)
        return sum(not ticket.ended for queue in queues for ticket in list(queue.tickets))

    def submit(
        self, rows: Rows, done: Done, *, deadline: float | None = None, priority: int = 0
    ) -> Ticket:
        """Queues `rows` uint8 `[n >= 1, *row_shape]`; more than a batch holds are split.

        `done` is called once, on the thread that ends the request, never in here: with the answer,
        or with DeadlineExceeded (it could no longer be done in time, and did not run),
        InferenceFailed (the model failed on every row), or Cancelled.
        `priority`: 1 is the highest, 0 the default, which is 2.

        Raises Overloaded where the expected wait is over `max_wait_s` or the end is past
        `deadline`, DeadlineExceeded where that has passed already, NotReady after `close`.
        """
        count = len(rows)
        if rows.dtype != _UINT8 or rows.shape != (count, *self._row_shape) or not count:
            raise ValueError(f"{rows.dtype} {rows.shape} for uint8 [n >= 1, *{self._row_shape}]")
        with self._lock:
            if self._closed:
                raise NotReady("this version is being unloaded: retry")
            now = self._clock()
            queue = self._queue(priority)
            until = math.inf if deadline is None else deadline
            on_trial = self._admit(queue, count, now, until)
            ticket = Ticket(self, queue, rows, done, now, until, on_trial)
            queue.tickets.append(ticket)
            self._add(queue, min(count, self._max))
            if self._asleep:
                self._rouse()
        return ticket

    def check(self, deadline: float | None) -> None:
        """Raises what `submit` of a single row, at the highest priority that is asked for, would
        raise: then nothing can be taken on, and callers can be told before they are heard.
        """
        # Without a batch's worth of rows before it, it is left to `submit` to judge.
        if self._rows < self._max:
            return
        with self._lock:
            queue = min(self._queues, key=lambda each: each.level)
            until = math.inf if deadline is None else deadline
            self._admit(queue, 1, self._clock(), until)

    def wait_s(self, rows: int = 1) -> float:
        """Seconds until `rows` rows submitted now would be answered, as far as can be told; less and
        less while the device idles and nothing is measured.
        """
        with self._lock:
            now = self._clock()
            seconds = self._rest_s(now) + self._run_s(self._ahead(self._queue(0), now) + rows)
            return seconds * self._trust(now)

    def run_next(self, lane: int = 0) -> bool:
        """Runs one batch on this thread; False where nothing waited, or what did waits for a batch
        that runs already.
        """
        batch: list[_Slice] = []
        try:
            with self._lock:
                if lane in self._busy or not self._due:
                    return False
                self._busy.add(lane)
                now = self._clock()
                if self._left_some:
                    self._learn_gap(now)
                self._asked = 0
                batch, flight, late = self._take(now)
                if self._asleep:
                    self._rouse()
            if late:
                _tell(late)
            if batch:
                self._run_batch(batch, flight, lane, now)
            self._left_some = self._rows > 0
            self._busy.discard(lane)
        # A bug here must not leave callers waiting for what will never come.
        except BaseException as bug:
            log.critical("bug in the batcher", exc_info=True)
            self._abandon(batch)
            self._on_bug(bug)
        return True

    def start(self) -> None:
        """Runs batches on a thread of its own, one for each lane, until `close`."""
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=self._name, daemon=True)
            for lane in range(self.lanes)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Refuses new requests, finishes those that wait (without a thread of its own: here), and
        ends the thread.
        """
        with self._lock:
            self._closed = True
            self._wake.notify_all()
        if not self._threads:
            while self.run_next():
                pass
        elif threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def _work(self, lane: int) -> None:
        while True:
            with self._lock:
                while not self._due and (self._rows or not self._closed):
                    self._asleep += 1
                    self._wake.wait()
                if not self._rows:
                    self._wake.notify_all()
                    return
            self.run_next(lane)

    @property
    def _due(self) -> bool:
        """Whether a lane that is free has something to run."""
        busy = len(self._busy)
        if not busy:
            return self._rows > 0
        return self._rows >= self._max and busy < self.lanes

    def _rouse(self) -> None:
        """Wakes one of the lanes that sleep where it has something to run. The lock is held."""
        if self._due:
            self._asleep -= 1
            self._wake.notify()

    # Estimates. The lock is held.

    def _padded(self, rows: int) -> int:
        """With how many a batch of so many rows is run."""
        sizes = self._sizes
        return sizes[bisect_left(sizes, rows)] if sizes and rows else rows

    def _most(self, seconds: float) -> int:
        """The most rows of a batch that is done by then; 0 where there are none."""
        rows, sizes = self._times.largest(seconds), self._sizes
        return (0, *sizes)[bisect_right(sizes, rows)] if sizes else rows

    def _batch_s(self, rows: int) -> float:
        """To run a batch of `rows`."""
        return self._times.estimate(self._padded(rows))

    def _cycle_s(self, rows: int) -> float:
        """From the start of a batch of `rows` to that of the next."""
        return self._batch_s(rows) + rows * self._gap_s

    def _run_s(self, rows: int) -> float:
        """To run `rows`, in as few batches as they need."""
        batches, rest = divmod(rows, self._max)
        seconds = self._batch_s(rest)
        return seconds + batches * self._cycle_s(self._max) if batches else seconds

    def _rest_s(self, now: float) -> float:
        """Until the device is free. What is overdue by a time is expected to take as long again."""
        return abs(self._free_at - now) + self._size * self._gap_s if self._busy else 0.0

    def _learn_gap(self, now: float) -> None:
        # Cut as the times in `BatchTimes` are.
        most = 2 * self._gap_s + self._batch_s(self._max) / self._max
        idle_s = 0.0 if self._flights else now - self._free_at
        gap_s = min(idle_s / max(self._size, self._asked), most)
        self._gap_s += (gap_s - self._gap_s) * _MEAN_GAIN

    def _trust(self, now: float) -> float:
        """What estimates are worth. Those that are too long would never be mended if they kept
        everything away: while the device idles, they count for less and less.
        """
        if self._busy or self._rows:
            return 1.0
        return _CERTAIN_S / (_CERTAIN_S + now - self._free_at)

    def _ahead(self, queue: _Queue, now: float) -> int:
        """Rows that go before what comes to `queue` now."""
        if queue.rows == self._rows:
            return queue.rows
        rank = now + queue.handicap_s
        return sum(each.before(rank) for each in self._queues)

    def _rows_beside(self, count: int) -> int:
        """Rows that run before the last of a request of `count`, more than a batch: all that were
        promised an end, and of the others as many as take turns with it.
        """
        waiting = (ticket for queue in self._queues for ticket in queue.tickets if not ticket.ended)
        remaining = ((ticket.count - ticket.taken, ticket.deadline) for ticket in waiting)
        return sum(min(rows, count) if until == math.inf else rows for rows, until in remaining)

    def _admit(self, queue: _Queue, count: int, now: float, deadline: float) -> bool:
        """Raises Overloaded or DeadlineExceeded where a request is not to be taken on. True where it
        is let in although the estimate is against it.
        """
        self._asked += count
        ahead, rest_s = self._ahead(queue, now), self._rest_s(now)
        if count > self._max:
            ahead = max(ahead, self._rows_beside(count))
        common, common_s = self._max, self._cycle_s(self._max)
        wait_s = rest_s + ahead // self._max * common_s
        if wait_s > self._max_wait_s:
            raise Overloaded(
                f"those before you take about {wait_s:.2g} s: {BACK_OFF}",
                wait_s - self._max_wait_s,
            )
        if deadline == math.inf:
            return False
        left_s = deadline - now
        if left_s <= 0:
            raise DeadlineExceeded("the deadline has passed")
        # More will come to share its batch. Were it promised an end without them, then under load
        # every batch would have to stay small for that promise, and rows in small batches cost the
        # most. So it is promised a batch of a common size: the largest that can follow another of
        # its kind in the time there is.
        if 2 * common_s > left_s:
            common = self._padded(max(min(count, self._max), self._most(left_s / 2)))
            common_s = self._cycle_s(common)
        batches = -(-(ahead + count) // common)
        end_s = rest_s + batches * common_s
        if end_s * self._trust(now) <= left_s:
            return end_s > left_s
        raise Overloaded(
            f"this would take about {end_s:.2g} s, the deadline leaves {left_s:.2g} s: "
            f"{BACK_OFF}, or allow more time",
            end_s - left_s,
        )

    # Who waits. The lock is held.

    def _queue(self, priority: int) -> _Queue:
        if not priority:
            return self._queues[0]
        level = min(priority, LOWEST_LEVEL) if priority > 0 else _DEFAULT_LEVEL
        for queue in self._queues:
            if queue.level == level:
                return queue
        self._queues.append(_Queue(level))
        return self._queues[-1]

    def _add(self, queue: _Queue, rows: int) -> None:
        queue.rows += rows
        self._rows += rows

    def _first(self) -> _Queue | None:
        """The queue whose oldest is next."""
        first: _Queue | None = None
        for queue in self._queues:
            tickets = queue.tickets
            while tickets and tickets[0].ended:
                tickets.popleft()
            if tickets and (first is None or tickets[0].rank < first.tickets[0].rank):
                first = queue
        return first

    def _take(self, now: float) -> tuple[list[_Slice], _Flight, list[_Ending]]:
        """The next batch, on its way, and those who can no longer be done in time."""
        batch: list[_Slice] = []
        late: list[_Ending] = []
        begins = self._begins(now)
        size, room, full_s = 0, self._max, self._batch_s(self._max)
        while size < room and (queue := self._first()):
            ticket = queue.tickets[0]
            remaining = ticket.count - ticket.taken
            count = min(room - size, remaining)
            left_s = ticket.deadline - begins
            if left_s <= full_s or count < remaining:
                end_s = self._batch_s(size + count) + self._run_s(remaining - count)
                # A larger batch takes longer: no more rows than this one can wait for.
                fits = min(room, max(self._padded(size + count), self._most(left_s)))
                if (end_s > left_s and not ticket.on_trial) or (
                    left_s < full_s and self._costs_more(queue, fits, left_s)
                ):
                    late.append(self._end_late(ticket))
                    continue
                room = fits
            batch.append((ticket, ticket.taken, ticket.taken + count))
            ticket.taken += count
            size += count
            self._add(queue, min(remaining - count, self._max) - min(remaining, self._max))
            if count == remaining:
                queue.tickets.popleft()
            elif count == size:
                self._step_back(queue, now)
        if size:
            self._size = size
        return batch, self._depart(size, begins), late

    def _begins(self, now: float) -> float:
        """When a batch begins that is given to the device now: when that is done with what it has."""
        return now + abs(self._free_at - now) if self._flights else now

    def _depart(self, size: int, begins: float) -> _Flight:
        """A batch of `size` rows, perhaps none, is given to the device."""
        flight = _Flight(None if self._flights else begins, self._batch_s(size))
        self._free_at = begins + flight.expected_s
        if size:
            self._flights.append(flight)
        return flight

    def _land(self, flight: _Flight, now: float) -> float | None:
        """The device is done with a batch: since when it had been at it, None after a bug. Of several
        that is since the last one was done, whichever it was: one may overtake another.
        """
        flights, self._free_at = self._flights, now
        if flight not in flights:
            return None
        began = flights[0].began
        flights.remove(flight)
        if flights:
            flights[0].began = now
            self._free_at = now + sum(each.expected_s for each in flights)
        return began

    def _step_back(self, queue: _Queue, now: float) -> None:
        """The first had a whole batch and wants more: those who wait already go first. But not large
        ones that are due later: taking turns, all would be late together.
        """
        tickets = queue.tickets
        ticket = tickets.popleft()
        if ticket.deadline != math.inf:
            for place, other in enumerate(tickets):
                if other.count > self._max and other.deadline >= ticket.deadline:
                    ticket.rank = other.rank
                    tickets.insert(place, ticket)
                    return
        ticket.rank = now + queue.handicap_s
        tickets.append(ticket)

    def _costs_more(self, queue: _Queue, size: int, seconds: float) -> bool:
        """Whether to keep one deadline by a batch of `size` rows in `seconds` makes others late.

        So it is where these are fewer than half of the rows that full batches do in that time, and
        more than a batch of its like are waiting. Who saves the oldest each time ends with small
        batches and long queues. Shen et al., Nexus, 2019, section 6.3: early drop.
        """
        enough = self._max * seconds / 2
        alike = queue.tickets[-1].deadline != math.inf
        return alike and queue.rows > self._max and size * self._batch_s(self._max) < enough

    def _end(self, ticket: Ticket) -> None:
        """What still waits of it will not run."""
        ticket.ended = True
        self._add(ticket.queue, -min(ticket.count - ticket.taken, self._max))
        ticket.rows = self._buffers[0][0][:0]

    def _end_late(self, ticket: Ticket) -> _Ending:
        self._end(ticket)
        return ticket, DeadlineExceeded("the deadline passed, or could no longer be met")

    def _withdraw(self, ticket: Ticket) -> bool:
        """Ends a request; False where it has ended. Takes the lock."""
        with self._lock:
            if ticket.ended:
                return False
            self._end(ticket)
            return True

    # On the device. The lock is not held.

    def _run_batch(
        self,
        batch: list[_Slice],
        flight: _Flight,
        lane: int,
        taken: float,
        *,
        apart: bool = False,
    ) -> int:
        """Runs what is still wanted of `batch`, which was `taken` then, tells those whose last rows
        these were, and gives the number of rows that failed. `apart`: it is one row of a batch that
        failed.
        """
        rows, size, batch, looked = self._last_look(batch, lane)
        if not batch:
            with self._lock:
                self._land(flight, looked)
            return 0
        outputs, bad = self._outputs(rows, size, quiet=apart)
        ended, number = self._clock(), next(self._numbers)
        retry = outputs is None and size > 1
        endings: list[_Ending] = []
        late_rows = offset = 0
        with self._lock:
            began = self._land(flight, ended)
            # While the device had another before it, it waited.
            run_s = ended - (looked if began is None or began < looked else began)
            for ticket, start, stop in batch:
                part = slice(offset, offset + stop - start)
                offset = part.stop
                if ticket.deadline <= looked:
                    late_rows += stop - start
                ticket.run_s += run_s
                ticket.batch_size = max(ticket.batch_size, size)
                ticket.batch, ticket.batch_s = number, run_s
                if ticket.ended or retry:
                    continue
                if bad is not None:
                    ticket.failed_rows += int(np.count_nonzero(bad[part]))
                ending = _give(
                    ticket, start, stop, outputs if outputs is None else outputs[part], ended
                )
                if ending is not None:
                    endings.append((ticket, ending))
        if outputs is not None and began is not None:
            self._times.record(self._padded(size), ended - began)
        failed = 0 if bad is None or retry else int(np.count_nonzero(bad))
        gather_s, split_s = looked - taken, self._clock() - ended
        # What is answered has been counted already.
        try:
            self._on_batch(
                Batch(
                    size,
                    len(batch),
                    run_s,
                    outputs is None,
                    failed,
                    late_rows,
                    gather_s,
                    split_s,
                )
            )
            if not apart:
                self._on_rows(rows[:size])
        finally:
            _tell(endings)
        if retry:
            failed = 0
            for ticket, start, stop in batch:
                for row in range(start, stop):
                    now = self._clock()
                    with self._lock:
                        again = self._depart(1, self._begins(now))
                    piece = [(ticket, row, row + 1)]
                    failed += self._run_batch(piece, again, lane, now, apart=True)
            log.error("run apart, %d of these %d rows failed", failed, size)
        return failed

    def _last_look(self, batch: list[_Slice], lane: int) -> tuple[Rows, int, list[_Slice], float]:
        """The rows to run and how many they are, the slices of those who still want them, and the
        time at which that was so: just before the run.
        """
        while True:
            rows, size = self._gather(batch, lane)
            wanted: list[_Slice] = []
            late: list[_Ending] = []
            with self._lock:
                now = self._clock()
                for piece in batch:
                    ticket = piece[0]
                    if ticket.ended:
                        continue
                    if ticket.deadline > now:
                        wanted.append(piece)
                    else:
                        late.append(self._end_late(ticket))
            if late:
                _tell(late)
            if len(wanted) == len(batch):
                return rows, size, batch, now
            batch = wanted

    def _gather(self, batch: list[_Slice], lane: int) -> tuple[Rows, int]:
        """The rows of a batch, and how many: a view where one request has them all and the device
        has no memory of its own for them, else a copy.
        """
        if len(batch) == 1 and not self._bound:
            ticket, start, stop = batch[0]
            rows = ticket.rows[start:stop]
            if rows.flags.c_contiguous and len(rows) == self._padded(len(rows)):
                return rows, len(rows)
        # Taken once: those of a request that ends meanwhile are gone.
        parts = [ticket.rows[start:stop] for ticket, start, stop in batch]
        size = sum(map(len, parts))
        padded = self._padded(size)
        buffer = self._buffers[lane][bisect_left(self._sizes, padded)]
        if len(buffer) != padded:
            buffer = buffer[:padded]
        end = 0
        for rows in parts:
            begin, end = end, end + len(rows)
            buffer[begin:end] = rows
        buffer[end:] = 0
        return buffer, size

    def _outputs(
        self, rows: Rows, size: int, *, quiet: bool
    ) -> tuple[Outputs | None, npt.NDArray[np.bool_] | None]:
        """What the model gives for the first `size` rows, None where the run failed; and which of
        them failed, None where none did.
        """
        try:
            outputs = self._run(rows)
            if len(outputs) != len(rows):
                raise InferenceFailed(f"{len(outputs)} answers for {len(rows)} rows")
        # Whatever the runtime raises fails these rows and no others.
        except Exception:
            if not quiet:
                log.exception("the model failed on a batch of %d rows", size)
            return None, np.ones(size, np.bool_)
        outputs = outputs[:size]
        # One that is not finite makes the sum so; looking at each costs several times as much.
        with np.errstate(invalid="ignore", over="ignore"):
            if math.isfinite(np.add.reduce(outputs, axis=None)):
                return outputs, None
        bad = np.logical_not(np.logical_and.reduce(np.isfinite(outputs), axis=1))
        if not bad.any():
            return outputs, None
        if not quiet:
            log.error("the model gave NaN or infinity for %d of %d rows", bad.sum(), size)
        outputs = outputs.copy()
        outputs[bad] = np.nan
        return outputs, bad

    def _abandon(self, batch: list[_Slice]) -> None:
        """After a bug: fails those in `batch` and all that wait."""
        with self._lock:
            self._closed = True
            self._busy.clear()
            self._flights.clear()
            self._wake.notify_all()
            tickets = {ticket for ticket, _, _ in batch}
            tickets.update(ticket for queue in self._queues for ticket in queue.tickets)
            stranded = [ticket for ticket in tickets if not ticket.ended]
            for ticket in stranded:
                self._end(ticket)
        try:
            _tell([(ticket, InferenceFailed("internal error")) for ticket in stranded])
        except BaseException:
            log.exception("a request could not be told")


def _give(
    ticket: Ticket, start: int, stop: int, outputs: Outputs | None, now: float
) -> Answer | Exception | None:
    """Puts the outputs of some rows to their request, None where they failed; gives its ending where
    these were the last.
    """
    ticket.answered += stop - start
    if stop - start == ticket.count:
        ticket.outputs = outputs
    elif outputs is not None:
        if ticket.outputs is None:
            ticket.outputs = np.full((ticket.count, *outputs.shape[1:]), np.nan, outputs.dtype)
        ticket.outputs[start:stop] = outputs
    if ticket.answered < ticket.count:
        return None
    ticket.ended = True
    if ticket.outputs is None or ticket.failed_rows == ticket.count:
        return InferenceFailed("the model failed on every image of this request")
    queue_s = max(0.0, now - ticket.arrived - ticket.run_s)
    return Answer(
        ticket.outputs,
        queue_s,
        ticket.run_s,
        ticket.batch_size,
        ticket.failed_rows,
        ticket.batch,
        ticket.batch_s,
    )


def _tell(endings: list[_Ending]) -> None:
    """All of them hear, though one of them raises."""
    bug: BaseException | None = None
    for ticket, ending in endings:
        try:
            ticket.done(ending)
        except BaseException as error:
            bug = error
    if bug is not None:
        raise bug
