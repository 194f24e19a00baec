"""Which versions are loaded, which answers, and when one goes: with a crew that is played, and a clock."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Target
from convoy_service.errors import (
    BrokenVersion,
    ConvoyError,
    NotPossible,
    NotReady,
    Overloaded,
    UnknownModel,
)
from convoy_service.lifecycle import manager as life
from convoy_service.lifecycle.manager import Director, Refused
from convoy_service.registry.registry import (
    BROKEN,
    DRAINING,
    IDLE,
    INCOMPLETE,
    LOADING,
    READY,
    STANDBY,
    Loaded,
    ModelState,
    Route,
)
from convoy_service.rollout import policy as policies
from convoy_service.telemetry.counters import Metrics
from tests.unit.versions import GOLDEN, MANIFEST, ONNX, write, write_rich

WATCH_S, WINDOW_S = 1.0, 300.0
TIMEOUT_S = 30.0


class Crew:
    """Loads and unloads at once, or when it is told to; reads what it loads, as a real one does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.did: list[str] = []
        self.held: set[tuple[str, int]] = set()
        self.routes: dict[str, Route] = {}
        self.states: dict[str, ModelState] = {}
        self.refuse: dict[tuple[str, int], Refused] = {}
        self.slow = False
        self.waiting: list[Callable[[], None]] = []
        self.gently: list[bool] = []

    def load(
        self, name: str, version: int, gently: bool, done: Callable[[Loaded | Refused], None]
    ) -> None:
        self.did.append(f"load {name}/{version}")
        self.gently.append(gently)

        def finish() -> None:
            if why := self.refuse.get((name, version)):
                done(why)
                return
            try:
                bundle = bundles.read(self.folder / name / str(version))
            except BrokenVersion as error:
                done(Refused(str(error)))
            else:
                self.held.add((name, version))
                done(Loaded("cpu", "fp32", "", bundle.digest))

        self._do(finish)

    def route(self, name: str, route: Route, done: Callable[[], None]) -> None:
        self.did.append(f"route {name}/{route.stable}")
        needed = {route.stable, route.candidate} - {0}
        assert all((name, number) in self.held for number in needed), "nobody has that"
        self.routes[name] = route
        done()

    def unload(self, name: str, version: int, done: Callable[[], None]) -> None:
        route = self.routes.get(name, Route())
        assert version not in (route.stable, route.candidate), "requests go there"
        self.did.append(f"unload {name}/{version}")

        def finish() -> None:
            self.held.remove((name, version))
            done()

        self._do(finish)

    def show(self, states: Sequence[ModelState]) -> None:
        self.states = {state.name: state for state in states}

    def _do(self, finish: Callable[[], None]) -> None:
        if self.slow:
            self.waiting.append(finish)
        else:
            finish()

    def finish(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Stage:
    """A folder with the model `pets`, its Director, a crew and a clock."""

    def __init__(self, folder: Path, versions: int = 1, start: bool = True) -> None:
        self.folder, self.model = folder, folder / "pets"
        self.now = 1000.0
        self.metrics = Metrics()
        self.crew = Crew(folder)
        for _ in range(versions):
            write(self.model)
        self.director = self.another(self.crew)
        if start:
            self.director.settle()

    def another(self, crew: Crew) -> Director:
        return Director(
            self.folder,
            crew,
            self.metrics,
            watch_s=WATCH_S,
            rollback_window_s=WINDOW_S,
            clock=lambda: self.now,
        )

    def go_on(self, seconds: float = WATCH_S) -> "Stage":
        """As the thread does, for so long."""
        ends = self.now + seconds
        for _ in range(100_000):
            pause_s = self.director.step()
            if not pause_s:
                continue
            if self.now + pause_s > ends:
                self.now = ends
                return self
            self.now += pause_s
        raise AssertionError("it never rests")

    def states(self, name: str = "pets") -> dict[int, str]:
        return {each.version: each.state for each in self.crew.states[name].versions}

    def reason(self, version: int, name: str = "pets") -> str:
        [reason] = [e.reason for e in self.crew.states[name].versions if e.version == version]
        return reason

    def policy(self, text: str) -> None:
        """As an operator writes it: beside, then renamed."""
        beside = self.model / "versions.toml.new"
        beside.write_text(text)
        beside.rename(self.model / "versions.toml")

    @property
    def stable(self) -> int:
        return self.crew.routes["pets"].stable


@pytest.fixture(autouse=True)
def all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


# What serves.


def test_the_newest_version_serves_and_older_ones_are_left_alone(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3)
    assert stage.crew.did == ["load pets/3", "route pets/3"]
    assert stage.states() == {1: IDLE, 2: IDLE, 3: READY}
    assert stage.crew.gently == [False], "nothing else serves yet"
    assert stage.director.serving() == "pets/3 on cpu"
    assert stage.director.in_use() == {("pets", 3)}


def test_a_new_version_takes_over_and_the_old_one_is_kept_for_a_while(stage: Stage) -> None:
    write(stage.model)
    stage.go_on()
    assert stage.crew.did[2:] == ["load pets/2", "route pets/2"]
    assert stage.crew.gently == [False, True]
    assert stage.states() == {1: STANDBY, 2: READY}
    stage.go_on(WINDOW_S - 2 * WATCH_S)
    assert stage.states() == {1: STANDBY, 2: READY}
    stage.go_on(2 * WATCH_S)
    assert stage.crew.did[4:] == ["unload pets/1"]
    assert stage.states() == {1: IDLE, 2: READY}


def test_of_many_replaced_versions_only_the_last_is_kept(stage: Stage) -> None:
    for _ in range(3):
        write(stage.model)
        stage.go_on()
    assert stage.states() == {1: IDLE, 2: IDLE, 3: STANDBY, 4: READY}
    assert stage.crew.held == {("pets", 3), ("pets", 4)}


def test_a_version_is_not_routed_to_before_all_have_it_nor_left_before_it_drained(
    stage: Stage,
) -> None:
    stage.crew.slow = True
    write(stage.model)
    stage.go_on(10)
    assert stage.states() == {1: READY, 2: LOADING}
    assert stage.stable == 1
    stage.crew.finish()
    stage.go_on(WINDOW_S + 2)
    assert stage.states() == {1: DRAINING, 2: READY}
    stage.crew.finish()
    stage.go_on()
    assert stage.states() == {1: IDLE, 2: READY}


def test_a_model_that_comes_later_is_served_too_and_one_is_loaded_at_a_time(stage: Stage) -> None:
    stage.crew.slow = True
    write(stage.folder / "cars")
    write(stage.model)
    stage.go_on(5)
    assert stage.crew.did[2:] == ["load pets/2"]
    stage.crew.finish()
    stage.go_on()
    assert stage.crew.did[2:] == ["load pets/2", "route pets/2", "load cars/1"]
    stage.crew.finish()
    stage.go_on()
    assert stage.crew.routes["cars"].stable == 1


# What does not.


def damage_byte(folder: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[7] ^= 1
    (folder / "model.onnx").write_bytes(data)


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 100)


def lose_a_variant(folder: Path) -> None:
    (folder / "model.int8.onnx").unlink()


def mix_versions(folder: Path) -> None:
    """The manifest of this one, a file of another."""
    damage_byte(folder)
    other = bundles.write(
        folder.parent.parent / "other",
        bundles.read_manifest(folder),
        (folder / "model.onnx").read_bytes(),
        bundles.read(folder.parent / "1").golden,
    )
    shutil.copy(other.folder / "model.onnx", folder / "model.onnx")
    shutil.rmtree(other.folder.parent)


def cut_labels(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert '"dög"' in text
    # Thresholds are for two classes.
    (folder / "manifest.json").write_text(text.replace('"cat",', ""))


def garble(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff{")


def make_unreadable(folder: Path) -> None:
    """No permission is of account for root; that it is no file is."""
    (folder / "golden.npz").unlink()
    (folder / "golden.npz").mkdir()


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "a flipped bit": (damage_byte, BROKEN, "model.onnx: its sha256 is not the manifest's"),
    "a truncated file": (truncate, INCOMPLETE, "model.onnx: 100 bytes, the manifest says 1024"),
    "a missing variant": (lose_a_variant, INCOMPLETE, "model.int8.onnx is missing"),
    "another version's file": (mix_versions, BROKEN, "its sha256 is not the manifest's"),
    "labels that are too few": (cut_labels, BROKEN, "thresholds of 2 classes for 1 labels"),
    "a garbled manifest": (garble, BROKEN, "manifest.json: "),
    "an unreadable file": (make_unreadable, INCOMPLETE, "golden.npz: "),
    "an empty folder": (empty, INCOMPLETE, "manifest.json is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("when", ["at the start", "while it serves"])
def test_what_is_damaged_is_refused_with_the_reason_and_the_old_version_serves_on(
    tmp_path: Path, kind: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    damage, state, reason = DAMAGE[kind]
    stage = Stage(tmp_path, start=when != "at the start")
    bundle = write_rich(stage.model)
    damage(bundle.folder)
    if when == "at the start":
        stage.director.settle()
    stage.go_on(5)
    assert stage.states() == {1: READY, 2: state}
    assert reason in stage.reason(2)
    assert stage.stable == 1
    assert reason in caplog.text
    assert stage.crew.did.count("load pets/2") <= 1, "what has failed is tried again and again"
    numbers = {name: dict(values) for name, values in stage.metrics.snapshot().items()}
    assert numbers["model_broken_versions"]["pets",] == 1
    assert numbers["model_serving_version"]["pets",] == 1
    assert numbers["model_version_state"]["pets", "2", state] == 1
    # Mended, it is taken.
    shutil.rmtree(bundle.folder)
    write_rich(stage.model)
    stage.go_on(3)
    assert stage.stable == 2


def test_one_that_does_not_prove_itself_is_passed_over_for_the_one_before_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, 3, start=False)
    stage.crew.refuse["pets", 3] = Refused("its answers to the golden inputs are off by 0.5")
    stage.director.settle()
    assert stage.crew.did == ["load pets/3", "load pets/2", "route pets/2"]
    assert stage.states() == {1: IDLE, 2: READY, 3: BROKEN}
    assert stage.reason(3) in caplog.text
    stage.go_on(1000)
    assert len(stage.crew.did) == 3, "nothing in its folder has changed"


def test_what_failed_for_a_reason_that_may_pass_is_tried_again_ever_more_seldom(
    stage: Stage,
) -> None:
    stage.crew.refuse["pets", 2] = Refused("engine-0 died while it was loaded", passing=True)
    write(stage.model)
    tried = []
    for _ in range(400):
        before = len(stage.crew.did)
        stage.go_on(1)
        if len(stage.crew.did) > before:
            tried.append(stage.now)
    pauses = [round(after - since) for since, after in pairwise(tried)]
    assert pauses == [5, 10, 20, 40, 80, 160]
    stage.crew.refuse.clear()
    stage.go_on(300)
    assert stage.stable == 2


def test_a_version_that_replaces_another_of_its_number_is_not_taken(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stage.model / "1"
    shutil.rmtree(folder)
    write(stage.model, onnx=b"another" * 20)
    stage.go_on(5)
    assert stage.states() == {1: READY}
    assert "a version never changes, publish a new one" in stage.reason(1)
    assert caplog.text.count("was changed: what was loaded serves on") == 1
    assert len(stage.crew.did) == 2
    write(stage.model)
    stage.go_on()
    assert stage.stable == 2


def test_a_file_that_is_changed_while_its_version_serves_is_noticed(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    write(stage.model)
    stage.go_on(2)
    assert stage.states() == {1: STANDBY, 2: READY}
    file = stage.model / "1" / "model.onnx"
    before = file.read_bytes()
    damage_byte(file.parent)
    stage.go_on(5)
    assert stage.states() == {1: STANDBY, 2: READY}
    assert "a version never changes, publish a new one" in stage.reason(1)
    assert caplog.text.count("was changed: what was loaded serves on") == 1
    # It would not come back after a restart.
    with pytest.raises(ConvoyError):
        stage.director.rollback("pets")
    file.write_bytes(before)
    stage.go_on()
    assert stage.reason(1) == ""
    stage.director.rollback("pets")
    assert stage.stable == 1


def test_a_file_that_goes_while_its_version_serves_is_noticed(stage: Stage) -> None:
    (stage.model / "1" / "model.onnx").unlink()
    stage.go_on()
    assert stage.states() == {1: READY}
    assert "a version never changes, publish a new one" in stage.reason(1)


def test_a_file_that_is_changed_while_its_version_loads_is_noticed(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[Callable[[Loaded | Refused], None]] = []
    monkeypatch.setattr(stage.crew, "load", lambda name, version, gently, done: ends.append(done))
    folder = write(stage.model).folder
    digest = bundles.read(folder).digest
    stage.go_on(2)
    assert stage.states() == {1: READY, 2: LOADING}
    damage_byte(folder)
    stage.go_on(2)
    stage.crew.held.add(("pets", 2))
    for done in ends:
        done(Loaded("cpu", "fp32", "", digest))
    stage.go_on(2)
    assert stage.stable == 2
    assert "a version never changes, publish a new one" in stage.reason(2)


def test_nobody_waits_while_files_of_what_serves_are_read(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be large, and the disk slow."""
    heard = threading.Event()

    def ask() -> None:
        stage.director.in_use()
        heard.set()

    def read(_: Path) -> str:
        threading.Thread(target=ask, daemon=True).start()
        assert heard.wait(TIMEOUT_S)
        return ""

    monkeypatch.setattr(bundles, "sha256", read)
    damage_byte(stage.model / "1")
    stage.go_on()
    assert heard.is_set()


def test_a_folder_that_is_deleted_while_it_serves_goes_on_serving(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    kept = stage.folder.parent / "kept"
    stage.model.rename(kept)
    stage.go_on(5)
    assert stage.stable == 1
    assert stage.states() == {1: READY}
    assert stage.reason(1) == "its folder is gone"
    assert "pets/1 is gone from the disk; it serves on" in caplog.text
    kept.rename(stage.model)
    stage.go_on(2)
    assert stage.reason(1) == ""
    write(stage.model)
    stage.go_on()
    shutil.rmtree(stage.model / "1")
    stage.go_on(WINDOW_S + 2)
    assert stage.states() == {2: READY}
    assert stage.crew.held == {("pets", 2)}


def test_a_disk_that_does_not_answer_for_a_while_changes_nothing(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(model: Path) -> list[int]:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patched:
        patched.setattr(bundles, "versions", stale)
        stage.go_on(10)
        with pytest.raises(UnknownModel):
            stage.director.load("cars")
    assert stage.states() == {1: READY}
    assert stage.reason(1) == ""
    assert caplog.text.count("can't be looked at: [Errno 116] Stale file handle") == 1
    write(stage.model)
    stage.go_on()
    assert stage.stable == 2


def test_a_folder_that_cannot_be_read_is_no_matter_to_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, start=False)
    write(tmp_path / "cars")
    (tmp_path / "secret").mkdir()
    versions, denied = bundles.versions, {"secret"}

    def guarded(model: Path) -> list[int]:
        if model.name in denied:
            raise PermissionError(13, "Permission denied")
        return versions(model)

    monkeypatch.setattr(bundles, "versions", guarded)
    stage.director.settle()
    assert bundles.names(tmp_path) == ["cars", "pets"]
    denied.add("cars")
    write(stage.model)
    stage.go_on(5)
    assert (stage.stable, stage.crew.routes["cars"].stable) == (2, 1)
    assert caplog.text.count("secret can't be looked at: [Errno 13] Permission denied") == 1
    denied.clear()
    write(tmp_path / "cars")
    stage.go_on(2)
    assert stage.crew.routes["cars"].stable == 2


def test_a_version_that_is_deleted_while_it_is_loaded_is_forgotten(stage: Stage) -> None:
    stage.crew.slow = True
    write(stage.model)
    stage.go_on()
    shutil.rmtree(stage.model / "2")
    stage.go_on()
    stage.crew.finish()
    stage.go_on(3)
    assert stage.states() == {1: READY}
    assert stage.stable == 1


def test_a_clock_that_was_set_back_changes_nothing(stage: Stage) -> None:
    folder = write(stage.model).folder
    for path in (*folder.iterdir(), folder, stage.model):
        os.utime(path, (0, 0))
    stage.go_on()
    assert stage.stable == 2
    stage.policy("serve = [1]")
    os.utime(stage.model / "versions.toml", (1, 1))
    stage.go_on()
    assert stage.stable == 1


@pytest.mark.parametrize("file", ["1/manifest.json", "2/manifest.json", "versions.toml"])
def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(stage: Stage, file: str) -> None:
    path = stage.model / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    stage.go_on(5)
    assert stage.stable == 1
    model = stage.crew.states["pets"]
    if not file.startswith("1/"):
        assert "is no regular file" in str(model)


def test_a_manifest_that_is_too_large_is_not_read(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_LARGEST_MANIFEST", 100)
    folder = stage.model / "2"
    folder.mkdir()
    (folder / "manifest.json").write_bytes(b" " * 101)
    stage.go_on(5)
    assert "101 bytes are too many, the limit is 100" in stage.reason(2)


def test_who_holds_the_folder_keeps_orders_waiting_for_a_while_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policies, "_WAIT_S", 0.05)
    stage = Stage(tmp_path, 2)
    with policies.alone(tmp_path), pytest.raises(NotPossible, match="is locked by another"):
        stage.director.promote("pets", 1)
    assert stage.stable == 2
    stage.director.promote("pets", 1)
    assert stage.stable == 1


# Copies that are not complete.


def manifest_first(source: Path, target: Path) -> list[Callable[[], object]]:
    files = sorted(source.iterdir(), key=lambda file: file.name != "manifest.json")
    return [target.mkdir, *(partial(shutil.copy, file, target) for file in files)]


def manifest_last(source: Path, target: Path) -> list[Callable[[], object]]:
    files = sorted(source.iterdir(), key=lambda file: file.name == "manifest.json")
    return [target.mkdir, *(partial(shutil.copy, file, target) for file in files)]


def in_halves(source: Path, target: Path) -> list[Callable[[], object]]:
    """As `cp` goes on."""
    steps: list[Callable[[], object]] = [target.mkdir]
    for file in sorted(source.iterdir()):
        data = file.read_bytes()
        to = target / file.name
        parts = (data[: len(data) // 2], data)
        steps += [partial(to.write_bytes, part) for part in parts]
    return steps


def by_temporary_names(source: Path, target: Path) -> list[Callable[[], object]]:
    """As rsync does."""
    steps: list[Callable[[], object]] = [target.mkdir]
    for file in sorted(source.iterdir()):
        beside = target / f".{file.name}.Xy12Za"
        data = file.read_bytes()
        steps.append(partial(beside.write_bytes, data[:-1]))
        steps.append(partial(beside.write_bytes, data))
        steps.append(partial(beside.rename, target / file.name))
    return steps


def of_full_size_from_the_start(source: Path, target: Path) -> list[Callable[[], object]]:
    """As downloads do that take their room first, the manifest before all others."""
    files = sorted(source.iterdir(), key=lambda file: file.name != "manifest.json")
    steps: list[Callable[[], object]] = [target.mkdir]
    steps += [partial((target / f.name).write_bytes, bytes(f.stat().st_size)) for f in files]
    steps += [partial((target / f.name).write_bytes, f.read_bytes()) for f in files]
    return steps


@pytest.mark.parametrize(
    "copy",
    [
        manifest_first,
        manifest_last,
        in_halves,
        by_temporary_names,
        of_full_size_from_the_start,
    ],
)
@pytest.mark.parametrize("looks", [1, 3])
def test_a_copy_is_taken_when_it_is_complete_and_never_before(
    stage: Stage,
    tmp_path_factory: pytest.TempPathFactory,
    copy: Callable[[Path, Path], list[Callable[[], object]]],
    looks: int,
) -> None:
    source = write_rich(tmp_path_factory.mktemp("elsewhere") / "pets").folder
    steps = copy(source, stage.model / "2")
    for step in steps:
        assert stage.stable == 1
        step()
        stage.go_on(looks * WATCH_S)
        if step is not steps[-1]:
            # Idle where it looks whole, and is waited for until nobody writes to it any more.
            assert stage.states().get(2) in (INCOMPLETE, BROKEN, IDLE)
            assert stage.reason(2) or stage.states()[2] == IDLE
    stage.go_on(2 * WATCH_S)
    assert stage.stable == 2
    assert stage.states() == {1: STANDBY, 2: READY}
    # Only those that look whole are tried.
    tried = stage.crew.did.count("load pets/2")
    assert tried <= (5 if copy is of_full_size_from_the_start else 1)


def test_a_copy_that_was_forgotten_is_said_once(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    (stage.model / "2").mkdir()
    stage.go_on(300)
    assert caplog.text.count("nothing in it has changed for a while") == 1
    assert caplog.text.count("pets/2 is not whole yet") == 1


# Policies.


def test_the_newest_two_are_served(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3, start=False)
    stage.policy("serve = 2")
    stage.director.settle()
    assert stage.states() == {1: IDLE, 2: READY, 3: READY}
    assert stage.stable == 3
    write(stage.model)
    stage.go_on()
    assert stage.states() == {1: IDLE, 2: IDLE, 3: READY, 4: READY}
    stage.crew.refuse["pets", 5] = Refused("NaN")
    write(stage.model)
    stage.go_on()
    assert stage.states() == {1: IDLE, 2: IDLE, 3: READY, 4: READY, 5: BROKEN}


def test_pinned_versions_are_served_whatever_is_published(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3, start=False)
    stage.policy("serve = [1, 2]\n[labels]\nstable = 1\nold = 1\n")
    stage.director.settle()
    write(stage.model)
    stage.go_on(5)
    assert stage.states() == {1: READY, 2: READY, 3: IDLE, 4: IDLE}
    assert dict(stage.crew.routes["pets"].labels) == {"stable": 1, "old": 1}
    (stage.model / "versions.toml").unlink()
    stage.go_on()
    assert stage.stable == 4
    assert stage.states() == {1: STANDBY, 2: IDLE, 3: IDLE, 4: READY}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("serve = ", "versions.toml: "),
        ("serve = 'oldest'", "versions.toml: "),
        ("serve = 0", "versions.toml: "),
        ("serve = [0]", "versions.toml: "),
        ("sevre = 2", "sevre"),
        ("serve = [7]", "names version 7, which is not there"),
        ("[labels]\nstable = 9", "names version 9, which is not there"),
        ("[labels]\n'1' = 1", "'1' can't be a label"),
        ("[canary]\nshare = 2", "versions.toml: "),
        ("[canary]\nshaer = 0.5", "shaer"),
    ],
)
def test_a_policy_that_makes_no_sense_changes_nothing(
    tmp_path: Path, text: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, 2, start=False)
    stage.policy("serve = [1]")
    stage.director.settle()
    did = list(stage.crew.did)
    stage.policy(text)
    stage.go_on(5)
    assert stage.crew.did == did
    assert words in stage.crew.states["pets"].reason
    assert caplog.text.count("nothing is changed") == 1
    stage.policy("serve = [2]")
    stage.go_on()
    assert stage.stable == 2
    assert stage.crew.states["pets"].reason == ""


def test_a_policy_may_be_ahead_of_the_version_that_it_names(stage: Stage) -> None:
    stage.policy("serve = [2]")
    stage.go_on(3)
    assert stage.stable == 1
    write(stage.model)
    stage.go_on(2)
    assert stage.stable == 2
    assert stage.crew.states["pets"].reason == ""


def test_at_the_start_a_policy_holds_as_far_as_it_can(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3, start=False)
    stage.policy("serve = [2, 9]")
    stage.director.settle()
    assert stage.stable == 2
    assert "names version 9" in stage.crew.states["pets"].reason


# Orders.


def test_rolling_back_needs_no_load_and_is_written_down(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 2)
    write(stage.model)
    stage.go_on()
    did = len(stage.crew.did)
    stage.director.rollback("pets")
    assert stage.crew.did[did:] == ["route pets/2"]
    assert stage.states() == {1: IDLE, 2: READY, 3: STANDBY}
    again = Stage(tmp_path, 0)
    assert again.stable == 2, "it does not outlive a restart"
    write(stage.model)
    stage.go_on()
    assert stage.stable == 2, "until another order"
    assert stage.states()[4] == READY
    stage.director.rollback("pets")
    assert stage.stable == 1, "not to what it had gone back from"
    with pytest.raises(NotPossible, match="no version before 1"):
        stage.director.rollback("pets")
    stage.director.promote("pets", 4)
    assert stage.stable == 4


def test_promoting_a_version_that_does_not_prove_itself_leaves_all_as_it_was(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, 2)
    stage.crew.refuse["pets", 1] = Refused("NaN or infinity for a golden input")
    with pytest.raises(NotPossible, match=r"pets/1 can't be served: NaN"):
        stage.director.promote("pets", 1)
    assert stage.stable == 2
    assert not (stage.model / "versions.toml").exists()
    stage.crew.refuse.clear()
    stage.director.promote("pets", 1)
    assert stage.stable == 1
    with pytest.raises(UnknownModel, match="no version 7 of model 'pets'; there is: 1, 2"):
        stage.director.promote("pets", 7)
    with pytest.raises(UnknownModel, match="no model 'cars' here; there is: pets"):
        stage.director.promote("cars", 1)
    with pytest.raises(NotPossible, match="no candidate"):
        stage.director.promote("pets")


def test_pinning_and_letting_go(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 4)
    stage.director.order("pin", "pets", [1, 3])
    assert stage.states() == {1: READY, 2: IDLE, 3: READY, 4: STANDBY}
    assert stage.stable == 3
    assert stage.crew.states["pets"].policy == "1, 3"
    stage.director.order("pin", "pets")
    assert stage.stable == 4
    assert stage.crew.states["pets"].policy == "newest"


def test_a_model_is_unloaded_and_loaded_again(stage: Stage) -> None:
    stage.director.order("unload", "pets")
    assert stage.crew.held == set()
    assert stage.states() == {1: IDLE}
    write(stage.model)
    stage.go_on(3)
    assert stage.crew.held == set()
    stage.director.order("load", "pets")
    assert stage.stable == 2
    write(stage.folder / "cars")
    stage.director.order("load", "cars")
    assert stage.crew.routes["cars"].stable == 1
    stage.crew.refuse["vans", 1] = Refused("NaN")
    write(stage.folder / "vans")
    with pytest.raises(NotPossible, match="model 'vans' can't be served: NaN"):
        stage.director.order("load", "vans")


def test_an_order_holds_where_it_cannot_be_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stage = Stage(tmp_path, 2)

    def read_only(file: Path, policy: policies.Policy) -> None:
        raise ConvoyError(f"{file} can't be written: Read-only file system")

    monkeypatch.setattr(policies, "_write", read_only)
    stage.director.promote("pets", 1)
    stage.go_on(5)
    assert stage.stable == 1
    assert "Read-only file system; what was ordered holds until this service ends" in caplog.text


def test_an_order_waits_for_a_file_that_a_person_has_to_mend(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 2)
    stage.policy("serve = [[")
    with pytest.raises(NotPossible, match=r"versions\.toml: "):
        stage.director.promote("pets", 1)
    assert stage.stable == 2


def test_two_services_on_one_folder_follow_each_others_orders(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3)
    crew = Crew(tmp_path)
    other = stage.another(crew)
    other.settle()
    stage.director.promote("pets", 1)
    stage.now += WATCH_S
    for _ in range(4):
        other.step()
    assert crew.routes["pets"].stable == 1
    other.promote("pets", 2)
    stage.go_on()
    assert stage.stable == 2


def test_orders_that_come_at_once_are_all_carried_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 8)
    stage.director.start()
    failed: list[BaseException] = []

    def promote(version: int) -> None:
        try:
            stage.director.promote("pets", version)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=promote, args=(n,)) for n in (1, 2, 3, 4, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    stage.director.close()
    assert not failed
    assert policies.read(stage.model).stable == stage.stable
    assert stage.stable in (1, 2, 3, 4, 5)


@pytest.mark.parametrize("whole_model", [True, False])
def test_an_order_ends_where_its_version_is_deleted_before_it_is_loaded(
    tmp_path: Path, whole_model: bool
) -> None:
    stage = Stage(tmp_path, 2)
    write(stage.folder / "cars")
    write(stage.folder / "cars")
    stage.policy("serve = []")
    stage.go_on()
    stage.crew.slow = True
    stage.director.start()
    errors: list[BaseException] = []

    def pin() -> None:
        try:
            stage.director.pin("pets", [1, 2])
        except UnknownModel as error:
            errors.append(error)

    # It waits for another model's turn to end.
    write(stage.folder / "cars")
    stage.director._look_now()
    order = threading.Thread(target=pin)
    order.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not stage.director._models["pets"].ordered:
        assert time.monotonic() < deadline
    shutil.rmtree(stage.model if whole_model else stage.model / "1")
    stage.director._look_now()
    stage.crew.slow = False
    stage.crew.finish()
    order.join(TIMEOUT_S)
    assert not order.is_alive()
    stage.director.close()
    assert "is gone from the disk" in str(errors[0])


def test_orders_that_nobody_waits_for_do_not_pile_up(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(life, "_MOST_ORDERS", 1)
    stage.crew.slow = True
    stage.director.start()
    write(stage.model)
    stage.director._look_now()
    order = threading.Thread(target=stage.director.order, args=("promote", "pets", [2]))
    order.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not stage.director._models["pets"].ordered:
        assert time.monotonic() < deadline
    with pytest.raises(Overloaded, match="1 orders are being carried out"):
        stage.director.order("load", "pets")
    stage.crew.slow = False
    stage.crew.finish()
    order.join(TIMEOUT_S)
    stage.director.order("promote", "pets", [1])
    stage.director.close()
    assert stage.stable == 1


def test_an_edit_just_after_an_order_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, 3)
    change = policies.change

    def then_edited(
        model: Path, make: Callable[[policies.Policy], policies.Policy]
    ) -> tuple[policies.Policy, policies.Stamp]:
        changed = change(model, make)
        stage.policy("serve = [1]")
        return changed

    monkeypatch.setattr(policies, "change", then_edited)
    stage.director.promote("pets", 2)
    stage.go_on()
    assert stage.stable == 1


def test_nothing_is_told_of_a_model_that_was_deleted(stage: Stage) -> None:
    write(stage.folder / "cars")
    stage.go_on()
    stage.director.unload("cars")
    shutil.rmtree(stage.folder / "cars")
    stage.go_on(2)
    assert set(stage.crew.states) == {"pets"}
    told = stage.metrics.snapshot()
    gauges = ("model_serving_version", "model_version_state", "model_broken_versions")
    assert {labels[0] for gauge in gauges for labels, _ in told[gauge]} == {"pets"}


# Candidates.


def test_without_a_trial_canary_is_a_label_like_others(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 2, start=False)
    stage.policy("[labels]\ncanary = 1\n")
    stage.director.settle()
    assert stage.crew.routes["pets"][:5] == (2, 0, 0.0, False, (("canary", 1), ("stable", 2)))
    assert stage.states() == {1: READY, 2: READY}


def test_a_new_version_begins_as_a_candidate_and_is_promoted(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start=False)
    stage.policy("[canary]\nshare = 0.25\n")
    stage.director.settle()
    assert stage.stable == 1
    write(stage.model)
    stage.go_on()
    labels = (("canary", 2), ("stable", 1))
    assert stage.crew.routes["pets"][:5] == (1, 2, 0.25, False, labels)
    again = Stage(tmp_path, 0)
    assert again.crew.routes == stage.crew.routes, "after a restart the candidate is stable"
    write(stage.model)
    stage.go_on(3)
    assert stage.crew.routes["pets"].candidate == 2, "one at a time"
    stage.director.promote("pets")
    assert stage.stable == 2
    stage.go_on()
    assert stage.crew.routes["pets"].candidate == 3
    assert policies.read(stage.model).canary == policies.read(tmp_path / "pets").canary


def test_a_candidate_that_is_rejected_never_serves_again(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start=False)
    stage.policy('[canary]\nshare = 0.5\nmode = "shadow"\n')
    stage.director.settle()
    write(stage.model)
    stage.go_on()
    assert stage.crew.routes["pets"][:4] == (1, 2, 0.0, True)
    stage.director.reject("pets", 2, "it disagrees in 30 of 100")
    assert stage.crew.routes["pets"][:4] == (1, 0, 0.0, False)
    stage.go_on(5)
    assert stage.states() == {1: READY, 2: IDLE}
    assert stage.reason(2) == "rejected: it disagrees in 30 of 100"
    assert Stage(tmp_path, 0).crew.routes["pets"][:2] == (1, 0)
    write(stage.model)
    stage.go_on(2)
    assert stage.crew.routes["pets"][:2] == (1, 3)
    stage.director.rollback("pets")
    assert stage.crew.routes["pets"][:2] == (1, 0)


def of_another_size(model: Path) -> bundles.Bundle:
    golden = bundles.Golden(np.zeros((2, 8, 8, 3), np.uint8), GOLDEN.probabilities)
    return bundles.write(model, replace(MANIFEST, pixels=Target(8, 8, 3, "crop")), ONNX, golden)


@pytest.mark.parametrize("text", ["", "[labels]\nstable = 1\ncanary = 2\n"])
def test_a_candidate_for_other_images_gets_none_and_is_rejected(tmp_path: Path, text: str) -> None:
    stage = Stage(tmp_path, start=False)
    stage.policy("[canary]\nshare = 0.25\n")
    stage.director.settle()
    of_another_size(stage.model)
    stage.policy(f"[canary]\nshare = 0.25\n{text}")
    stage.go_on(5)
    assert stage.crew.routes["pets"][:3] == (1, 0, 0.0)
    assert stage.states() == {1: READY, 2: IDLE}
    assert "rejected: takes images of [8, 8, 3], the stable" in stage.reason(2)
    assert Stage(tmp_path, 0).stable == 1, "after a restart it is stable"
    write(stage.model)
    stage.go_on(2)
    assert stage.crew.routes["pets"][:2] == (1, 3)
    stage.director.promote("pets", 2)
    assert stage.crew.routes["pets"][:2] == (2, 0)


@pytest.mark.parametrize("how", ["deleted", "edited"])
def test_a_candidate_that_is_not_on_the_disk_any_more_is_not_promoted(
    tmp_path: Path, how: str
) -> None:
    stage = Stage(tmp_path, start=False)
    stage.policy("[canary]\nshare = 0.25\n")
    stage.director.settle()
    folder = write(stage.model).folder
    stage.go_on()
    assert stage.crew.routes["pets"][:2] == (1, 2)
    shutil.rmtree(folder)
    if how == "edited":
        write(stage.model, onnx=b"another" * 20)
    stage.director._look_at = stage.now
    stage.director._see(stage.director._look() or {}, stage.now)
    words = "its folder is gone" if how == "deleted" else "changed on the disk"
    with pytest.raises(NotPossible, match=words):
        stage.director.promote("pets")
    stage.go_on(3)
    assert stage.crew.routes["pets"][:2] == (1, 0)
    assert policies.read(stage.model).stable == 1
    assert policies.read(stage.model).candidate == 0
    write(stage.model)
    stage.go_on(3)
    assert stage.crew.routes["pets"].candidate == (2 if how == "deleted" else 3)


def test_a_version_that_serves_is_known_though_its_folder_changed(stage: Stage) -> None:
    before = stage.crew.states["pets"].versions
    (stage.model / "1" / "note.txt").write_text("by hand")
    stage.go_on(2)
    (stage.model / "1" / "manifest.json").unlink()
    stage.go_on(2)
    assert stage.crew.states["pets"].versions == before


def test_promoting_the_stable_version_ends_a_trial(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start=False)
    stage.policy("[canary]\nshare = 0.25\n")
    stage.director.settle()
    write(stage.model)
    stage.go_on()
    assert stage.crew.routes["pets"][:2] == (1, 2)
    stage.director.promote("pets", 1)
    stage.go_on(3)
    assert stage.crew.routes["pets"][:2] == (1, 0)
    assert stage.states() == {1: READY, 2: IDLE}


def test_of_pinned_versions_the_highest_answers_and_none_is_tried_out(tmp_path: Path) -> None:
    stage = Stage(tmp_path, start=False)
    stage.policy("[canary]\nshare = 0.25\n")
    stage.director.settle()
    write(stage.model)
    write(stage.model)
    stage.director.pin("pets", [1, 3])
    assert stage.crew.routes["pets"][:2] == (3, 0)


def test_a_rollback_passes_over_what_is_broken(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3)
    stage.director.promote("pets", 2)
    write(stage.model)
    stage.director.promote("pets", 4)
    stage.go_on(WINDOW_S + 2)
    damage_byte(stage.model / "2")
    with pytest.raises(NotPossible, match=r"pets/2 can't be served: .*sha256"):
        stage.director.promote("pets", 2)
    stage.director.rollback("pets")
    assert stage.stable == 3, "the one before it is broken"


# Deaths and ends.


def test_a_version_that_a_new_worker_cannot_load_gives_way_to_one_that_it_can(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path, 2)
    stage.crew.refuse["pets", 2] = Refused("no such file", passing=True)
    stage.director.lost("pets", 2, "engine-1: no such file")
    stage.go_on()
    assert stage.stable == 1
    stage.go_on(2)
    assert stage.crew.held == {("pets", 1)}
    assert stage.states() == {1: READY, 2: BROKEN} or stage.states()[2] == IDLE


def test_the_only_version_serves_on_where_others_have_it(stage: Stage) -> None:
    stage.crew.refuse["pets", 1] = Refused("no such file", passing=True)
    stage.director.lost("pets", 1, "acceptor-1: no such file")
    stage.go_on(20)
    assert stage.stable == 1
    assert stage.states() == {1: BROKEN}
    assert stage.crew.held == {("pets", 1)}
    stage.crew.refuse.clear()
    stage.go_on(60)
    assert stage.states() == {1: READY}


def test_it_ends_in_the_middle_of_a_load_and_of_an_order(stage: Stage) -> None:
    stage.crew.slow = True
    stage.director.start()
    write(stage.model)
    errors: list[BaseException] = []

    def promote() -> None:
        try:
            stage.director.promote("pets", 2)
        except ConvoyError as error:
            errors.append(error)

    order = threading.Thread(target=promote)
    order.start()
    while not stage.crew.waiting:
        assert order.is_alive()
    stage.director.close()
    order.join(TIMEOUT_S)
    assert not order.is_alive()
    assert "the server stops" in str(errors[0])
    stage.crew.finish()
    assert stage.stable == 1
    with pytest.raises(NotReady, match="shutting down"):
        stage.director.rollback("pets")


def test_a_bug_in_a_turn_does_not_end_the_turns(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    looked = threading.Event()
    look, director = stage.director._look, stage.director

    def whole() -> object:
        looked.set()
        return look()

    def broken() -> None:
        monkeypatch.setattr(director, "_look", whole)
        raise ValueError("a bug")

    monkeypatch.setattr(director, "_look", broken)
    stage.now += WATCH_S
    director.start()
    assert looked.wait(TIMEOUT_S)
    director.close()
    assert "bug in the life of versions" in caplog.text


@pytest.mark.parametrize("there_is", ["nothing", "broken versions"])
def test_nothing_that_serves_ends_the_start_with_the_reason(tmp_path: Path, there_is: str) -> None:
    stage = Stage(tmp_path, 0 if there_is == "nothing" else 2, start=False)
    for number in (1, 2):
        stage.crew.refuse["pets", number] = Refused("NaN")
    with pytest.raises(BrokenVersion, match="convoy train" if there_is == "nothing" else "NaN"):
        stage.director.settle()


def test_the_start_ends_where_it_is_told_to(tmp_path: Path) -> None:
    stage = Stage(tmp_path, 3, start=False)
    stage.director.settle(lambda: True)
    assert stage.crew.did == []
