"""A candidate on trial: it and the stable version run on copies of what was answered, side by side.

Both have a session of their own for that, on a thread of its own, so that they are treated alike: one
that serves finds its threads and its memory at hand and in use. With those, the same file came out
1.2 times as slow as itself on a busy machine. On a CPU the sessions have one thread, whose computing
time is taken, not the time that goes by, of which others who are busy make most of the noise.
"""

import contextlib
import logging
import math
import queue
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Bundle, Probabilities
from convoy_service.duty_cycle import DutyCycle
from convoy_service.engine.batcher import Batch
from convoy_service.engine.onnx_model import Model
from convoy_service.engine.session import Card, Device
from convoy_service.errors import BrokenVersion
from convoy_service.rollout.canary import Canary, Counts, compare, same_classes
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics

log = logging.getLogger("convoy.trial")

# A comparison takes about so long: rows of the batch are left out for that. Where it is much shorter,
# it is made again and the shortest times count: in a run of 0.5 ms, what others have done to the
# caches is half of it, and one that is 30% slower comes out so in 45 of 100 comparisons; the best of
# four in 59.
_COMPARISON_S = 0.02
_SHORT_S, _ROUNDS = 0.004, 4

_NONE: Probabilities = np.empty((0, 0), np.float32)

# How long the end of a thread is waited for, which may be at a run that nothing can interrupt.
_END_S = 1.0


class Arm(NamedTuple):
    """What runs a version, and may raise anything, and the labels of its classes."""

    run: Callable[[Pixels], Probabilities]
    labels: list[str]


class Pair(NamedTuple):
    """Two versions to compare, the clock that says how long a run takes, and what frees them."""

    stable: Arm
    candidate: Arm
    clock: Callable[[], float]
    free: Callable[[], None] = lambda: None


class Trial:
    """Compares on a thread of its own, one batch after another, until it is closed."""

    def __init__(
        self,
        name: str,
        canary: Canary,
        load: Callable[[], Pair],
        record: Callable[[Counts, float], None],
    ) -> None:
        """`load` is called on the thread, and may raise BrokenVersion: then nothing is compared.
        `record` hears of each comparison what `canary.compare` says.
        """
        self._canary, self._load, self._record = canary, load, record
        # Whether a batch is wanted, and how many of its rows.
        self.wanted, self._most = False, 1
        self._batches: queue.SimpleQueue[Pixels | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._told = False
        self._name = name
        self._thread = threading.Thread(target=self._work, name=f"trial {name}", daemon=True)
        self._thread.start()

    def offer(self, rows: Pixels) -> None:
        """A batch, uint8 `[N, H, W, C]`: some of it is copied if it is `wanted`. From any thread."""
        self.wanted = False
        self._batches.put(rows[: self._most].copy())

    def close(self) -> None:
        """Ends it, soon."""
        self._closing.set()
        self._batches.put(None)

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    @property
    def busy(self) -> bool:
        """It has not ended."""
        return self._thread.is_alive()

    def _work(self) -> None:
        # At the priority of the others: with a lower one it would be put off while it has the
        # interpreter's lock, and with it all who serve.
        try:
            pair = self._load()
        except BrokenVersion as error:
            log.error("%s can't be compared: %s", self._name, error)
            return
        try:
            self._compare_all(pair)
        # Who serves must not end for it. Without comparisons nothing is promoted.
        except Exception:
            log.exception("bug in the comparison of %s", self._name)
        finally:
            self.wanted = False
            pair.free()

    def _compare_all(self, pair: Pair) -> None:
        duty = DutyCycle(self._canary.compare, pair.clock)
        same = same_classes(pair.stable.labels, pair.candidate.labels)
        while not self._closing.is_set():
            self.wanted = True
            rows = self._batches.get()
            if rows is None:
                return
            duty.begin()
            self._record(*self._compared(pair, rows, same))
            self._closing.wait(duty.rest_s())

    def _compared(
        self, pair: Pair, rows: Pixels, same: npt.NDArray[np.intp]
    ) -> tuple[Counts, float]:
        """What `canary.compare` makes of them."""
        arms = (pair.stable, pair.candidate)
        shortest, answers, spent = [math.inf, math.inf], [_NONE, _NONE], 0.0
        for rounds in range(_ROUNDS):
            # Who comes second may find more at hand, or less.
            for one in random.sample((0, 1), 2):
                answers[one], seconds = self._timed(arms[one], rows, pair.clock)
                shortest[one] = min(shortest[one], seconds)
                spent += seconds
            if not rounds:
                fit = int(len(rows) * _COMPARISON_S / max(spent, 1e-6))
                self._most = max(1, min(fit, 2 * len(rows)))
            if spent > _SHORT_S:
                break
        stable_s, candidate_s = shortest if max(shortest) < math.inf else (0.0, 0.0)
        limit = self._canary.max_latency_ratio
        return compare(answers[0], answers[1], same, stable_s, candidate_s, limit)

    def _timed(
        self, arm: Arm, rows: Pixels, clock: Callable[[], float]
    ) -> tuple[Probabilities, float]:
        """Its answers and the time that it took; where it fails they are given row by row, NaN for
        those that fail, as callers get them, and the time says nothing.
        """
        began = clock()
        try:
            return arm.run(rows), clock() - began
        # Whatever the runtime raises is what is looked for.
        except Exception:
            if not self._told:
                self._told = True
                log.exception("%s: a comparison failed", self._name)
        answers = np.full((len(rows), len(arm.labels)), np.nan, np.float32)
        for number in range(len(rows)):
            with contextlib.suppress(Exception):
                answers[number] = arm.run(rows[number : number + 1])[0]
        return answers, math.inf


class Version(NamedTuple):
    """A version that serves: its folder (the graphs may be left out), in which variant, and where."""

    bundle: Bundle
    variant: str
    device: str


class _Running(NamedTuple):
    stable: Version
    candidate: Version
    canary: Canary
    trial: Trial


class Trials:
    """The trials of one process that runs batches: at most one of each model."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self._running: dict[str, _Running] = {}
        self._ending: list[Trial] = []

    def set(
        self, name: str, stable: Version | None, candidate: Version | None, canary: Canary
    ) -> None:
        """From now on these two versions of the model are compared; where one is None, none are."""
        running = self._running.get(name)
        if running and running[:3] == (stable, candidate, canary):
            return
        if running:
            del self._running[name]
            running.trial.close()
            self._ending = [*(each for each in self._ending if each.busy), running.trial]
        if stable is None or candidate is None:
            return
        if stable.bundle.manifest.pixels.shape != candidate.bundle.manifest.pixels.shape:
            return  # what one takes is not what the other would get
        one, other = stable.bundle.version, candidate.bundle.version
        trial = Trial(
            f"{name}/{other}",
            canary,
            lambda: _load(stable, candidate, self._settings),
            partial(self._metrics.canary, name, one, other),
        )
        self._running[name] = _Running(stable, candidate, canary, trial)

    def ran(self, name: str, version: int, batch: Batch) -> None:
        """Hears of every batch that was run for callers."""
        running = self._running.get(name)
        # A batch that has failed is run again, row by row.
        if running is None or (batch.failed and batch.rows > 1):
            return
        stable, candidate = running.stable.bundle.version, running.candidate.bundle.version
        failed = batch.failed_rows / batch.rows
        if version == stable:
            counts = Counts(stable_batches=1, stable_failed=failed)
        elif version == candidate:
            counts = Counts(
                candidate_batches=1, candidate_failed=failed, candidate_requests=batch.requests
            )
        else:
            return
        self._metrics.canary(name, stable, candidate, counts)

    def offer(self, name: str, version: int, rows: Pixels) -> None:
        """Hears of the pixels of these batches, uint8 `[N, H, W, C]`, while they are still there."""
        running = self._running.get(name)
        if running and running.trial.wanted:
            numbers = running.stable.bundle.version, running.candidate.bundle.version
            if version in numbers:
                running.trial.offer(rows)

    @property
    def busy(self) -> bool:
        """A thread has not ended yet, as what it is at can't be interrupted."""
        return any(trial.busy for trial in self._ending)

    def close(self) -> None:
        """Ends them all, unless that would take long."""
        for name in list(self._running):
            self.set(name, None, None, Canary())
        ends = time.monotonic() + _END_S
        for trial in self._ending:
            trial.join(max(0.0, ends - time.monotonic()))


def _load(stable: Version, candidate: Version, settings: Settings) -> Pair:
    """Both once more, each with a session to itself. Raises BrokenVersion."""
    models = []
    for version in (stable, candidate):
        bundle = bundles.read(version.bundle.folder)
        bundle.check(version.bundle.digest)
        models.append(
            Model.load(
                bundle,
                version.device,
                1,
                variant=version.variant,
                card=Card(settings.gpu_memory_mb, settings.cuda_graphs),
                gently=True,
            )
        )
    arms = [
        Arm(partial(_run, model), version.bundle.manifest.labels)
        for model, version in zip(models, (stable, candidate), strict=True)
    ]

    def free() -> None:
        for model in models:
            model.close()

    on_cpu = all(Device.parse(model.device).kind == "cpu" for model in models)
    return Pair(arms[0], arms[1], time.thread_time if on_cpu else time.perf_counter, free)


def _run(model: Model, rows: Pixels) -> Probabilities:
    """In a size that is warm, where it has some."""
    size = next((size for size in model.sizes if size >= len(rows)), len(rows))
    if size == len(rows):
        return model.run(rows)
    padding = [(0, size - len(rows)), (0, 0), (0, 0), (0, 0)]
    return model.run(np.pad(rows, padding))[: len(rows)]
