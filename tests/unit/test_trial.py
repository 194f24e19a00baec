"""How a candidate is compared: with plain functions in the place of models, and a clock that they move."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Golden, Probabilities
from convoy_service.engine.batcher import Batch
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion, InferenceFailed
from convoy_service.lifecycle.manager import Director
from convoy_service.registry.shadow_runner import Arm, Pair, Trial, Trials, Version
from convoy_service.rollout.canary import Canary, Counts
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics, canary_counts
from tests.unit import graphs
from tests.unit.test_life import WATCH_S, Crew, Stage
from tests.unit.versions import MANIFEST, write

TIMEOUT_S = 30.0
LABELS = ["a", "b", "c"]
EVERYTHING = Canary(compare=1.0)


class Bench:
    """A trial of two functions, and what it has recorded. Each run takes as long as is said."""

    def __init__(
        self,
        stable: Callable[[Pixels], Probabilities],
        candidate: Callable[[Pixels], Probabilities],
        seconds: tuple[float, float] = (0.01, 0.01),
        canary: Canary = EVERYTHING,
    ) -> None:
        self.now, self.ran, self.freed = 0.0, list[str](), threading.Event()
        self.recorded: list[tuple[Counts, float]] = []
        self.changed = threading.Condition()
        arms = [
            Arm(self._timed(name, run, each), LABELS)
            for name, run, each in zip(
                ("stable", "candidate"), (stable, candidate), seconds, strict=True
            )
        ]
        pair = Pair(arms[0], arms[1], lambda: self.now, self.freed.set)
        self.trial = Trial("m/2", canary, lambda: pair, self._record)

    def _timed(
        self, name: str, run: Callable[[Pixels], Probabilities], seconds: float
    ) -> Callable[[Pixels], Probabilities]:
        def timed(rows: Pixels) -> Probabilities:
            self.ran.append(name)
            self.now += seconds * len(rows)
            return run(rows)

        return timed

    def _record(self, counts: Counts, difference: float) -> None:
        with self.changed:
            self.recorded.append((counts, difference))
            self.changed.notify_all()

    def wait_until_wanted(self) -> None:
        ends = time.monotonic() + TIMEOUT_S
        while not self.trial.wanted:
            assert time.monotonic() < ends
            time.sleep(0.001)

    def offer(self, rows: Pixels) -> Counts:
        """Offers when one is wanted, and waits for what comes of it."""
        self.wait_until_wanted()
        before = len(self.recorded)
        self.trial.offer(rows)
        return self.wait(before)

    def wait(self, before: int = 0) -> Counts:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.recorded) > before, TIMEOUT_S)
            return self.recorded[-1][0]

    def close(self) -> None:
        self.trial.close()
        self.trial.join(TIMEOUT_S)
        assert not self.trial.busy
        assert self.freed.is_set()


def images(*firsts: int) -> Pixels:
    """Which class is answered to each."""
    pixels = np.zeros((len(firsts), 2, 2, 1), np.uint8)
    pixels[:, 0, 0, 0] = firsts
    return pixels


def right(rows: Pixels) -> Probabilities:
    answers = np.full((len(rows), 3), 0.1, np.float32)
    answers[np.arange(len(rows)), rows[:, 0, 0, 0]] = 0.8
    return answers


def test_a_batch_is_copied_run_on_both_and_counted() -> None:
    bench = Bench(right, right, (1 / 128, 1.25 / 128))
    rows = images(0)
    bench.wait_until_wanted()
    bench.trial.offer(rows)
    rows[:] = 7  # the batcher uses it again
    counts = bench.wait()
    assert bench.recorded[0][1] == 0
    assert counts._replace(stable_confidence=0, candidate_confidence=0) == Counts(
        compared=1, images=1, slower=1, stable_s=1 / 128, candidate_s=1.25 / 128
    )  # fmt: skip
    bench.close()


def test_who_comes_first_is_chance() -> None:
    bench = Bench(right, right)
    for _ in range(60):
        bench.offer(images(1))
    firsts = bench.ran[::2]
    assert 10 < firsts.count("stable") < 50
    bench.close()


def test_short_runs_are_repeated_and_the_shortest_count() -> None:
    bench = Bench(right, right, (0.0001, 0.0001))
    assert bench.offer(images(0)).stable_s == pytest.approx(0.0001)
    assert len(bench.ran) == 8
    bench.close()


def test_rows_are_left_out_so_that_it_takes_no_longer_than_it_should() -> None:
    """20 ms are two rows of 4 ms on both."""
    bench = Bench(right, right, (1 / 256, 1 / 256))
    taken = [bench.offer(images(*[0] * 64)).images for _ in range(5)]
    assert taken == [1, 2, 2, 2, 2]
    bench.close()
    fast = Bench(right, right, (0.00001, 0.00001))
    assert [fast.offer(images(*[0] * 64)).images for _ in range(8)] == [1, 2, 4, 8, 16, 32, 64, 64]
    fast.close()


def test_where_a_run_fails_it_is_known_for_which_images() -> None:
    def fails(rows: Pixels) -> Probabilities:
        if (rows[:, 0, 0, 0] == 2).any():
            raise InferenceFailed("no such class")
        return right(rows)

    bench = Bench(right, fails, (0.0001, 0.0001))
    bench.offer(images(0))  # so that more rows are taken
    bench.offer(images(0, 1))
    counts = bench.offer(images(0, 2, 1, 2))
    assert (counts.failed, counts.disagreed, counts.images) == (0.5, 0, 4)
    # A run that has failed says nothing of how long one takes.
    assert (counts.stable_s, counts.candidate_s, counts.slower) == (0, 0, 0)
    bench.close()


def test_it_rests_as_long_as_it_may_not_work() -> None:
    """On a clock that stands still where nothing is run, a rest of 9 x 20 ms is waited for, and one of
    hours is not over.
    """
    bench = Bench(right, right, (0.01, 0.01), Canary(compare=0.1))
    bench.offer(images(0))
    bench.wait_until_wanted()
    bench.close()
    bench = Bench(right, right, (0.01, 0.01), Canary(compare=1e-6))
    bench.offer(images(0))
    assert not bench.trial.wanted
    bench.close()


def test_what_can_not_be_loaded_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    def load() -> Pair:
        raise BrokenVersion("its folder is gone")

    trial = Trial("m/2", EVERYTHING, load, lambda counts, difference: None)
    trial.join(TIMEOUT_S)
    assert not trial.busy
    assert not trial.wanted
    assert "m/2 can't be compared: its folder is gone" in caplog.text
    trial.close()


def version(folder: Path, height: int = 4) -> Version:
    onnx = graphs.classifier((height, 5, 3), classes=2)
    pixels = np.zeros((1, height, 5, 3), np.uint8)
    golden = Golden(pixels, Model(onnx).run(pixels))
    manifest = replace(MANIFEST, pixels=Target(height, 5, 3, "crop"))
    return Version(bundles.write(folder, manifest, onnx, golden), "fp32", "cpu")


@pytest.fixture
def versions(tmp_path: Path) -> tuple[Version, Version]:
    return version(tmp_path / "m"), version(tmp_path / "m")


def test_two_real_versions_are_compared(versions: tuple[Version, Version]) -> None:
    stable, candidate = versions
    metrics = Metrics()
    trials = Trials(Settings(), metrics)
    trials.set("m", stable, candidate, EVERYTHING)
    shape = stable.bundle.manifest.pixels.shape
    rows = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)

    def counted() -> Counts:
        return canary_counts(metrics.snapshot(), "m", 1, 2)

    ends = time.monotonic() + TIMEOUT_S
    while (found := counted()).compared < 5:
        assert time.monotonic() < ends
        trials.offer("m", 1, rows)
        time.sleep(0.001)
    assert (found.failed, found.disagreed) == (0, 0)
    assert found.stable_confidence == found.candidate_confidence > 0
    assert found.stable_s > 0
    trials.close()
    assert not trials.busy


def test_batches_count_for_the_version_that_ran_them(versions: tuple[Version, Version]) -> None:
    stable, candidate = versions
    metrics = Metrics()
    trials = Trials(Settings(), metrics)
    batch = Batch(rows=4, requests=3, run_s=0.1, failed=False, failed_rows=1, late_rows=0)
    trials.ran("m", 1, batch)  # nobody is on trial yet
    trials.set("m", stable, candidate, EVERYTHING)
    trials.ran("m", 1, batch)
    trials.ran("m", 2, batch)
    trials.ran("m", 3, batch)  # asked for by its number
    # What has failed as a whole is run again, row by row.
    trials.ran("m", 2, batch._replace(failed=True, failed_rows=0))
    trials.ran("m", 2, batch._replace(rows=1, requests=1, failed=True, failed_rows=1))
    trials.set("m", stable, None, EVERYTHING)
    trials.ran("m", 2, batch)
    assert canary_counts(metrics.snapshot(), "m", 1, 2) == Counts(
        stable_batches=1, stable_failed=0.25, candidate_batches=2, candidate_failed=1.25,
        candidate_requests=4,
    )  # fmt: skip
    trials.close()


def test_the_same_trial_goes_on(versions: tuple[Version, Version]) -> None:
    """Whenever something is loaded or routed, it is told which versions there are."""
    stable, candidate = versions
    trials = Trials(Settings(), Metrics())
    trials.set("m", stable, candidate, EVERYTHING)
    running = trials._running["m"]
    trials.set("m", stable, candidate, Canary(compare=1.0))
    assert trials._running["m"] is running
    trials.set("m", stable, candidate, Canary(compare=1.0, after=5))
    assert trials._running["m"] is not running
    trials.close()


def test_what_takes_other_images_is_not_compared(
    versions: tuple[Version, Version], tmp_path: Path
) -> None:
    stable, _ = versions
    trials = Trials(Settings(), Metrics())
    trials.set("m", stable, version(tmp_path / "m", height=6), EVERYTHING)
    assert not trials._running
    trials.close()


# What the Director makes of it.


class Judged(Stage):
    """Its Director judges by what is counted in `metrics`, every second."""

    def another(self, crew: Crew) -> Director:
        return Director(
            self.folder,
            crew,
            self.metrics,
            watch_s=WATCH_S,
            snapshot=self.metrics.snapshot,
            clock=lambda: self.now,
        )

    def begin(self, table: str = "") -> "Judged":
        """Version 2 is on trial."""
        self.policy(f"[canary]\n{table}")
        self.director.settle()
        write(self.model)
        return self.count(Counts())

    def count(self, counts: Counts) -> "Judged":
        self.metrics.canary("pets", 1, 2, counts)
        self.go_on(2)
        return self

    @property
    def route(self) -> tuple[int, int]:
        route = self.crew.routes["pets"]
        return route.stable, route.candidate

    def shown(self, name: str) -> dict[tuple[str, ...], float]:
        return {k: v for k, v in self.metrics.snapshot()[name] if isinstance(v, (int, float))}


GOOD = Counts(
    compared=600, images=600, candidate_requests=50, candidate_batches=50, stable_s=6,
    candidate_s=6.6, stable_confidence=540, candidate_confidence=534,
)  # fmt: skip


@pytest.fixture
def judged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Judged:
    caplog.set_level(logging.INFO)
    return Judged(tmp_path, start=False)


def test_a_candidate_within_its_limits_is_promoted(
    judged: Judged, caplog: pytest.LogCaptureFixture
) -> None:
    judged.begin().count(GOOD)
    assert judged.route == (1, 2)
    assert judged.reason(2) == "on trial: 650 of 1000 requests"
    figures = judged.shown("canary_figure")
    assert figures["pets", "2", "agreement"] == 1
    assert figures["pets", "2", "latency_ratio"] == pytest.approx(1.1)
    assert figures["pets", "2", "confidence_shift"] == pytest.approx(-0.01)
    assert judged.shown("canary_limit")["pets", "2", "disagreement", "value"] == 0.05
    judged.count(GOOD)
    assert judged.route == (2, 0)
    assert (
        "pets/2 is promoted: promote: within all limits after 1300 requests; failur" in caplog.text
    )
    assert judged.reason(2) == ""
    assert not judged.shown("canary_figure")
    assert not judged.shown("canary_limit")
    assert judged.shown("canary_decisions") == {("pets", "promote"): 1, ("pets", "roll back"): 0}


def test_a_candidate_beyond_a_limit_is_rolled_back_at_once(
    judged: Judged, caplog: pytest.LogCaptureFixture
) -> None:
    judged.begin('mode = "shadow"').count(Counts(compared=100, images=400, disagreed=25))
    assert judged.route == (1, 0)
    assert "pets/2 is rejected: roll back: over the limit: disagreement" in caplog.text
    assert judged.reason(2).startswith("rejected: roll back: over the limit: disagreement")
    assert judged.shown("canary_decisions") == {("pets", "promote"): 0, ("pets", "roll back"): 1}
    judged.go_on(10)
    assert judged.route == (1, 0)


def test_what_was_counted_before_does_not_count(judged: Judged) -> None:
    """The same two versions once more, or other limits: it begins anew."""
    judged.begin('mode = "shadow"').count(GOOD)
    assert judged.reason(2) == "on trial: 650 of 1000 requests"
    judged.policy('[labels]\nstable = 1\ncanary = 2\n[canary]\nmode = "shadow"\nmax_error = 0.02\n')
    judged.go_on(3)
    assert judged.reason(2) == "on trial: 0 of 1000 requests"
    judged.count(GOOD)
    assert judged.route == (1, 2)


def test_a_verdict_waits_for_a_file_that_a_person_has_to_mend(
    judged: Judged, caplog: pytest.LogCaptureFixture
) -> None:
    judged.begin()
    judged.policy("serve = [")
    judged.count(GOOD).count(GOOD)
    assert judged.route == (1, 2)
    assert "pets/2 stays on trial" in caplog.text
    judged.policy("[labels]\nstable = 1\ncanary = 2\n[canary]\n")
    judged.go_on(3)
    assert judged.route == (2, 0)
