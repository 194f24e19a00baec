"""Who waits, who goes together, whose deadline has passed. Knows no gRPC and no ONNX Runtime.

The device is the clock: while it runs a batch, requests gather; when it is free, whatever waits
goes, up to the largest batch. There is no timer and no polling.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from service.errors import DeadlineExceeded, InferenceFailed, NotReady

Rows = npt.NDArray[np.uint8]
Outputs = npt.NDArray[np.float32]

log = logging.getLogger("convoy.batcher")


class Answer(NamedTuple):
    """`outputs` belong to the submitted rows, in their order. Times are in seconds."""

    outputs: Outputs
    queue_s: float
    run_s: float
    batch_size: int


class Batch(NamedTuple):
    """What one run on the device was: for metrics."""

    rows: int
    requests: int
    run_s: float
    failed: bool


@dataclass(eq=False)
class _Request:
    rows: Rows
    deadline: float | None
    future: "Future[Answer]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)
    taken: int = 0
    answered: int = 0
    outputs: Outputs | None = None
    run_s: float = 0.0
    batch_size: int = 0


class _Slice(NamedTuple):
    request: _Request
    start: int
    stop: int


class Batcher:
    """Gathers the rows of concurrent requests into batches for `run`, on a thread of its own.

    `run` takes uint8 `[n, *row_shape]`, n up to `max_batch_size`, and gives float32 `[n, classes]`.
    Safe to call from any thread.
    """

    def __init__(
        self,
        run: Callable[[Rows], Outputs],
        row_shape: tuple[int, ...],
        max_batch_size: int,
        *,
        on_batch: Callable[[Batch], None] = lambda batch: None,
        on_bug: Callable[[BaseException], None] = lambda bug: None,
        name: str = "batcher",
    ) -> None:
        """`on_batch` hears of every run; `on_bug` of an error in the batcher itself, after which
        every waiting request has failed and new ones are refused.
        """
        self._run = run
        self._row_shape = row_shape
        self._max = max_batch_size
        self._on_batch = on_batch
        self._on_bug = on_bug
        self._buffer = np.empty((max_batch_size, *row_shape), np.uint8)
        self._waiting: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, rows: Rows, deadline: float | None = None) -> "Future[Answer]":
        """Queues `rows` uint8 `[n >= 1, *row_shape]`; more than a batch holds are split.

        `deadline` is on `time.monotonic`'s clock; what is still waiting then fails with
        DeadlineExceeded and never runs. Cancelling the future has the same effect at once. A failed
        run fails its requests with InferenceFailed. Raises NotReady after `close`.
        """
        if rows.dtype != np.uint8 or rows.shape[1:] != self._row_shape or not len(rows):
            raise ValueError(f"{rows.dtype} {rows.shape} for uint8 [n >= 1, *{self._row_shape}]")
        request = _Request(rows, deadline)
        with self._changed:
            if self._closed:
                raise NotReady("this version is being unloaded: retry")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def close(self) -> None:
        """Refuses new requests, finishes those that wait, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self) -> None:
        batch: list[_Slice] = []
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._closed:
                        self._changed.wait()
                    if not self._waiting:
                        return
                    batch, late = self._take()
                for request in late:
                    _fail(
                        request, DeadlineExceeded("the deadline passed before the device was free")
                    )
                if batch:
                    self._run_batch(batch)
        # A bug here must not leave callers waiting for a thread that is gone.
        except BaseException as bug:
            log.critical("bug in the batcher", exc_info=True)
            with self._changed:
                self._closed = True
                stranded = [s.request for s in batch] + list(self._waiting)
                self._waiting.clear()
            for request in stranded:
                _fail(request, InferenceFailed("internal error"))
            self._on_bug(bug)

    def _take(self) -> tuple[list[_Slice], list[_Request]]:
        """The next batch, oldest first but for the rest of large requests, and those requests whose
        deadline has passed.
        """
        batch: list[_Slice] = []
        late: list[_Request] = []
        room, now = self._max, time.monotonic()
        while self._waiting and room:
            request = self._waiting[0]
            if request.future.done():  # cancelled, or failed with an earlier slice
                self._waiting.popleft()
            elif request.deadline is not None and request.deadline <= now:
                late.append(self._waiting.popleft())
            else:
                start = request.taken
                request.taken = min(start + room, len(request.rows))
                room -= request.taken - start
                batch.append(_Slice(request, start, request.taken))
                if request.taken == len(request.rows):
                    self._waiting.popleft()
                # It had a whole batch and wants more: those who wait already go first.
                elif request.taken - start == self._max:
                    self._waiting.rotate(-1)
        return batch, late

    def _run_batch(self, batch: list[_Slice]) -> None:
        if len(batch) == 1:
            request, start, stop = batch[0]
            rows = request.rows[start:stop]
        else:
            size = 0
            for request, start, stop in batch:
                self._buffer[size : size + stop - start] = request.rows[start:stop]
                size += stop - start
            rows = self._buffer[:size]
        began = time.monotonic()
        outputs: Outputs | None = None
        try:
            answers = self._run(rows)
            if len(answers) != len(rows):
                raise InferenceFailed(f"{len(answers)} answers for {len(rows)} rows")
            outputs = answers
        # Whatever the runtime raises fails this batch and no other.
        except Exception:
            log.exception("a batch of %d rows failed", len(rows))
        run_s = time.monotonic() - began
        offset = 0
        for piece in batch:
            if outputs is None:
                _fail(piece.request, InferenceFailed("the model failed on this batch"))
            else:
                count = piece.stop - piece.start
                _give(piece, outputs[offset : offset + count], run_s, len(rows))
                offset += count
        self._on_batch(Batch(len(rows), len(batch), run_s, outputs is None))


def _give(piece: _Slice, outputs: Outputs, run_s: float, batch_size: int) -> None:
    request = piece.request
    request.run_s += run_s
    request.batch_size = max(request.batch_size, batch_size)
    request.answered += len(outputs)
    if len(outputs) == len(request.rows):
        request.outputs = outputs
    else:
        if request.outputs is None:
            request.outputs = np.empty((len(request.rows), *outputs.shape[1:]), outputs.dtype)
        request.outputs[piece.start : piece.stop] = outputs
    if request.answered == len(request.rows):
        queue_s = time.monotonic() - request.arrived - request.run_s
        answer = Answer(request.outputs, max(0.0, queue_s), request.run_s, request.batch_size)
        # The caller may have cancelled meanwhile.
        with contextlib.suppress(InvalidStateError):
            request.future.set_result(answer)


def _fail(request: _Request, error: Exception) -> None:
    with contextlib.suppress(InvalidStateError):
        request.future.set_exception(error)
