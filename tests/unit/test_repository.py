"""Who answers whom, and how a version comes and goes: with functions in the place of models."""

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle
from convoy_service.engine.batcher import Batcher, BatchTimes, Outputs, Rows
from convoy_service.engine.cpu import split
from convoy_service.engine.isolated_verifier import Proof
from convoy_service.errors import BrokenVersion, NotReady, UnknownModel
from convoy_service.lifecycle.manager import Alone, Director
from convoy_service.registry.registry import (
    Answered,
    Made,
    ModelState,
    Repository,
    Route,
    VersionState,
    runs_here,
)
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics
from tests.integration.models import add_colours
from tests.unit.versions import GOLDEN, write, write_rich

TIMEOUT_S = 30.0


class Session:
    """What holds a version's memory."""

    def __call__(self, rows: Rows) -> Outputs:
        return np.tile(np.array([0.25, 0.75], np.float32), (len(rows), 1))


class Shop:
    """A repository of versions of `pets`, whose models are played."""

    def __init__(self, folder: Path, versions: int = 2) -> None:
        self.folder, self.metrics = folder, Metrics()
        for _ in range(versions):
            write_rich(folder / "pets")
        self.sessions: list[weakref.ref[Session]] = []
        self.freed: list[int] = []
        self.wanted: list[tuple[str, bool]] = []
        self.fail: Exception | None = None
        budget = split(1, 1, 0, 1, 1)
        self.repository = Repository(folder, Settings(), budget, self.metrics, self.make)

    def make(
        self,
        bundle: Bundle,
        variant: str = "",
        gently: bool = False,
        proof: Proof | None = None,
    ) -> Made:
        self.wanted.append((variant, gently))
        if self.fail:
            raise self.fail
        session, size = Session(), bundle.manifest.max_batch_size
        self.sessions.append(weakref.ref(session))
        shape = bundle.manifest.pixels.shape
        batcher = Batcher(session, shape, size, times=BatchTimes(size), max_wait_s=10)
        batcher.start()
        number = bundle.version
        return Made("cpu", variant or "fp32", batcher, "", lambda: self.freed.append(number))

    def info(self) -> list[str]:
        return [labels[1] for labels, _ in self.metrics.snapshot()["model_info"]]


def test_a_model_that_is_not_there_any_more_is_forgotten(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    repository = shop.repository
    repository.load("pets", 1)
    repository.route("pets", Route(1))
    repository.show([ModelState("pets")])
    repository.route("pets", Route())
    repository.unload("pets", 1)
    assert [entry.name for entry in repository.entries()] == ["pets"]
    repository.show([])
    assert repository.entries() == []
    assert shop.metrics.snapshot()["model_fallback"] == []


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.repository.close()


# Who answers.


def test_a_request_gets_the_version_of_the_route_or_the_one_it_asks_for(shop: Shop) -> None:
    repository = shop.repository
    repository.load("pets", 1)
    repository.load("pets", 2)
    with pytest.raises(NotReady):
        repository.get("pets")
    repository.route("pets", Route(1, labels=(("old", 1), ("stable", 1))))
    assert repository.get("pets").version == repository.get("").version == 1
    assert repository.get("pets", 2).version == 2
    assert repository.get("pets", "old").version == 1
    with pytest.raises(UnknownModel, match="no version 'new'; its labels: old, stable"):
        repository.get("pets", "new")
    with pytest.raises(
        UnknownModel, match="version 7 of model 'pets' is not served: use version 1, 2"
    ):
        repository.get("pets", 7)
    with pytest.raises(UnknownModel, match="no model 'cars' here; there is: pets"):
        repository.get("cars")
    repository.show([ModelState("pets"), ModelState("vans")])
    with pytest.raises(UnknownModel, match="several models are served: name one"):
        repository.get("")
    with pytest.raises(NotReady, match="model 'vans' has no version that works"):
        repository.get("vans")


def test_a_share_goes_to_the_candidate_and_a_key_always_to_the_same(shop: Shop) -> None:
    repository = shop.repository
    repository.load("pets", 1)
    repository.load("pets", 2)
    repository.route("pets", Route(1, 2, 0.25))
    keys = [f"caller {n}" for n in range(2000)]
    first = [repository.get("pets", 0, lambda key=key: key).version for key in keys]  # type: ignore[misc]
    again = [repository.get("pets", 0, lambda key=key: key).version for key in keys]  # type: ignore[misc]
    assert first == again
    # Five standard deviations.
    assert abs(first.count(2) - 500) < 97
    by_chance = [repository.get("pets").version for _ in range(2000)]
    assert abs(by_chance.count(2) - 500) < 97
    repository.route("pets", Route(1, 2, 0.5))
    more = [repository.get("pets", 0, lambda key=key: key).version for key in keys]  # type: ignore[misc]
    assert all(now == 2 for then, now in zip(first, more, strict=True) if then == 2)
    repository.route("pets", Route(1, 2, 0.0, shadow=True))
    assert {repository.get("pets").version for _ in range(100)} == {1}


# Coming and going.


def test_what_fails_to_load_says_why_and_leaves_the_rest(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    repository = shop.repository
    repository.load("pets", 1)
    repository.route("pets", Route(1))
    shop.fail = BrokenVersion("off by 0.5")
    with pytest.raises(BrokenVersion, match=r"off by 0\.5"):
        repository.load("pets", 2)
    assert "Traceback" not in caplog.text
    shop.fail = ZeroDivisionError("a bug")
    with pytest.raises(BrokenVersion, match="a bug"):
        repository.load("pets", 2)
    assert "ZeroDivisionError" in caplog.text
    with pytest.raises(BrokenVersion, match=r"manifest\.json is missing"):
        repository.load("pets", 9)
    shop.fail = None
    with pytest.raises(BrokenVersion, match="a version never changes, publish a new one"):
        repository.load("pets", 2, digest="another")
    assert repository.get("pets").version == 1
    assert shop.info() == ["1"]


def test_loading_again_is_nothing_unless_others_have_another_variant(shop: Shop) -> None:
    repository = shop.repository
    loaded = repository.load("pets", 1, gently=True)
    assert repository.load("pets", 1, digest=loaded.digest, variant="fp32") == loaded
    assert shop.wanted == [("", True)]
    assert repository.load("pets", 1, variant="int8").variant == "int8"
    assert shop.freed == [1]
    with pytest.raises(BrokenVersion, match="never changes"):
        repository.load("pets", 1, digest="another")


def test_requests_finish_on_the_version_that_they_were_admitted_to(shop: Shop) -> None:
    repository = shop.repository
    stopped: list[int] = []
    repository.attach(
        lambda served: None, lambda served: stopped.append(served.version), lambda: None
    )
    repository.load("pets", 1)
    repository.load("pets", 2)
    repository.route("pets", Route(1))
    unloaded = threading.Event()

    def unload() -> None:
        repository.unload("pets", 1)
        unloaded.set()

    with repository.take("pets") as served:
        repository.route("pets", Route(2))
        thread = threading.Thread(target=unload)
        thread.start()
        while not served._leaving:
            assert thread.is_alive()
        assert repository.get("pets").version == 2
        with pytest.raises(UnknownModel):
            repository.get("pets", 1)
        assert not served.enter(), "it took one more"
        # It still decodes, then still runs.
        answered = threading.Event()
        served.batcher.submit(GOLDEN.pixels, lambda outcome: answered.set())
        assert answered.wait(TIMEOUT_S)
        assert not stopped
        assert not unloaded.is_set()
    assert unloaded.wait(TIMEOUT_S)
    thread.join(TIMEOUT_S)
    assert stopped == shop.freed == [1]
    assert shop.info() == ["2"]


def test_thousands_of_requests_and_hundreds_of_versions_miss_each_other_nowhere(
    tmp_path: Path,
) -> None:
    shop = Shop(tmp_path, 2)
    repository, failed, stop = shop.repository, list[BaseException](), threading.Event()
    repository.load("pets", 1)
    repository.route("pets", Route(1))
    turns = requests = 0

    def switch() -> None:
        nonlocal turns
        try:
            while turns < 200 or requests <= 200:
                old, new = (1, 2) if turns % 2 == 0 else (2, 1)
                repository.load("pets", new)
                repository.route("pets", Route(new))
                repository.unload("pets", old)
                turns += 1
        except BaseException as error:
            failed.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=switch)
    thread.start()
    answered = threading.Semaphore(0)
    # As on the loop's thread: taken, kept over other requests, and let go.
    held: list[Any] = []
    while not stop.is_set():
        served = repository.take("pets")
        held.append(served)
        if len(held) == 3:
            first = held.pop(0)
            with first:
                first.batcher.submit(GOLDEN.pixels, lambda outcome: answered.release())
                requests += 1
                assert answered.acquire(timeout=TIMEOUT_S)
    for served in held:
        with served:
            pass
    thread.join(TIMEOUT_S)
    assert not failed
    assert len(shop.freed) == turns
    repository.close()


def test_what_a_version_held_is_free_when_it_is_unloaded(shop: Shop) -> None:
    repository = shop.repository
    repository.load("pets", 1)
    repository.load("pets", 2)
    repository.route("pets", Route(1))
    gc.collect()
    gc.freeze()  # as when a server begins: the collector never looks at these again
    try:
        with repository.take("pets") as served:
            answered = threading.Event()
            served.batcher.submit(GOLDEN.pixels, lambda outcome: answered.set())
            assert answered.wait(TIMEOUT_S)
        del served
        repository.route("pets", Route(2))
        repository.unload("pets", 1)
        assert [session() is None for session in shop.sessions] == [True, False]
    finally:
        gc.unfreeze()


def test_a_real_session_is_free_when_its_version_is_unloaded(tmp_path: Path) -> None:
    add_colours(tmp_path)
    metrics, budget, settings = Metrics(), split(1, 1, 0, 1, 1), Settings(device="cpu")
    make = runs_here(settings, budget, metrics, lambda bug: None)
    repository = Repository(tmp_path, settings, budget, metrics, make)
    Director(tmp_path, Alone(repository), metrics).settle()
    served = repository.get("colours")
    model = served._free.__self__  # type: ignore[attr-defined]
    session = weakref.ref(model._session)
    assert served.bundle.onnx == b"", "the file is kept beside the session"
    repository.unload("colours", 1)
    assert session() is None
    repository.close()


def test_a_version_that_has_no_place_is_refused_and_freed(shop: Shop) -> None:
    def full(served: Any) -> None:
        raise ValueError("an engine serves 1024 versions at most")

    shop.repository.attach(full, lambda served: None, lambda: None)
    with pytest.raises(BrokenVersion, match="1024 versions"):
        shop.repository.load("pets", 1)
    assert shop.freed == [1]
    assert shop.repository.entries() == []


# Who looks on.


def test_observers_hear_of_answers_and_what_fails_in_them_is_not_the_requests(
    shop: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    repository = shop.repository
    heard: list[Answered] = []

    def broken(answered: Answered) -> None:
        raise ValueError("full")

    repository.load("pets", 1)
    repository.route("pets", Route(1))
    served = repository.get("pets")
    assert not served.observed
    repository.observers += [broken, heard.append]
    assert repository.get("pets").observed
    # Thresholds: 0.6 in all, 0.7 for the second class.
    rows = [[0.65, 0.35], [0.35, 0.65], [0.55, 0.45], [np.nan, np.nan]]
    answers = np.array(rows, np.float32)
    inputs = [b"a", b"b", b"c", b"d"]
    for _ in range(3):
        pixels = np.zeros((4, 4, 5, 3), np.uint8)
        served.answered(inputs, pixels, answers, served.unsure(answers))
    assert [each.unsure.tolist() for each in heard] == [[False, True, True, False]] * 3
    assert heard[0].served is served
    assert heard[0].inputs == inputs
    assert caplog.text.count("an observer failed") == 1
    assert dict(shop.metrics.snapshot()["observer_failures"]) == {("pets",): 3}


# What is told.


def test_a_model_tells_why_a_newer_version_does_not_serve(shop: Shop) -> None:
    repository = shop.repository
    repository.load("pets", 1)
    repository.route("pets", Route(1))
    states = (VersionState(1, "ready"), VersionState(2, "broken", "NaN"))
    repository.show([ModelState("pets", states), ModelState("vans", reason="versions.toml: ...")])
    pets, vans = repository.entries()
    assert (pets.served and pets.served.version, pets.reason) == (1, "NaN")
    assert (vans.served, vans.reason) == (None, "versions.toml: ...")
    assert repository.versions("pets") == [1]


def test_load_does_not_depend_on_the_order_of_routes(shop: Shop) -> None:
    """A worker that is born hears of routes before it has loaded what they lead to."""
    repository = shop.repository
    changes: list[Callable[[], None]] = []
    repository.attach(
        lambda served: None, lambda served: None, lambda: changes.append(lambda: None)
    )
    repository.route("pets", Route(2))
    with pytest.raises(NotReady):
        repository.get("pets")
    repository.load("pets", 2)
    assert repository.get("pets").version == 2
    assert len(changes) == 2


def test_a_version_is_read_whole_before_it_is_believed(shop: Shop) -> None:
    written = write(shop.folder / "pets")
    assert bundles.read(written.folder).digest == bundles.read_described(written.folder)[1]
    (written.folder / "manifest.json").write_bytes(
        (written.folder / "manifest.json").read_bytes() + b"\n"
    )
    assert bundles.read(written.folder).digest != written.digest


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
