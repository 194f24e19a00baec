"""How a version gets into several workers, and out of them: with pipes to nobody in their place."""

import queue
import time
from collections.abc import Iterator
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from convoy_service.crashes import CrashReport
from convoy_service.engine.cpu import split
from convoy_service.engine.isolated_verifier import Proof
from convoy_service.errors import BrokenVersion
from convoy_service.lifecycle.manager import Refused
from convoy_service.registry.registry import Loaded, ModelState, Route
from convoy_service.server.supervisor import Load, Orders, Supervisor, _Member
from convoy_service.settings import Settings

TIMEOUT_S = 30.0
FP32 = Loaded("cpu", "fp32", "", "digest")
INT8 = Loaded("cpu", "int8", "", "digest")


class Crew:
    """A supervisor, and the other ends of its pipes."""

    def __init__(self, folder: Path, engines: int, acceptors: int) -> None:
        self.supervisor = Supervisor(Settings(models=folder, engines=engines, acceptors=acceptors))
        self.ends: dict[str, Connection] = {}
        self.said: list[Any] = []
        paths = tuple(f"engine-{n}" for n in range(engines))
        for n in range(engines):
            self._add(Orders(f"engine-{n}", Settings(), split(2), listener=3))
        for n in range(acceptors):
            self._add(Orders(f"acceptor-{n}", Settings(), split(2), engines=paths))
        self.supervisor._director.lost = lambda *args: self.said.append(args)  # type: ignore[method-assign]

    def _add(self, orders: Orders) -> None:
        member = _Member(orders)
        self.supervisor._members.append(member)
        self.begin(member)

    def begin(self, member: _Member) -> None:
        member.pipe, self.ends[member.orders.name] = Pipe()
        process: Any = SimpleNamespace(pid=1, wait=lambda: -9, kill=lambda: None, returncode=-9)
        member.process, member.crash = process, CrashReport()
        member.started = 0.0

    def member(self, name: str) -> _Member:
        [found] = [each for each in self.supervisor._members if each.orders.name == name]
        return found

    def turn(self) -> None:
        """As the supervisor does when its bell rings."""
        while self.supervisor._posted:
            self.supervisor._posted.popleft()()

    def asked(self, name: str) -> list[tuple[str, Any]]:
        """What a worker was told since the last time."""
        self.turn()
        messages, end = [], self.ends[name]
        while end.poll():
            messages.append(end.recv())
        return messages

    def answer(self, name: str, kind: str, value: Any) -> None:
        self.ends[name].send((kind, value))
        self.supervisor._hear(self.member(name))

    def die(self, name: str) -> None:
        self.ends.pop(name).close()
        self.supervisor._hear(self.member(name))

    def load(self, version: int = 2) -> None:
        self.supervisor.load("pets", version, False, self.said.append)
        self.turn()

    def loads(self, name: str) -> list[tuple[int, Load]]:
        return [value for kind, value in self.asked(name) if kind == "load"]

    def all_load(self, version: int = 2) -> None:
        self.load(version)
        for name in list(self.ends):
            for number, _ in self.loads(name):
                self.answer(name, "loaded", (number, FP32))
        assert self.said.pop() == FP32


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Crew]:
    crew = Crew(tmp_path, 2, 2)
    # So that those who die are replaced, which here nobody is.
    crew.supervisor._was_ready = True
    yield crew
    for end in crew.ends.values():
        end.close()


def test_engines_load_before_acceptors_and_all_before_it_is_done(crew: Crew) -> None:
    crew.load()
    [(number, load)] = crew.loads("engine-0")
    assert crew.loads("engine-1") == [(number, load)]
    assert load == Load("pets", 2)
    assert crew.asked("acceptor-0") == crew.asked("acceptor-1") == []
    crew.answer("engine-1", "loaded", (number, FP32))
    assert crew.asked("acceptor-0") == []
    crew.answer("engine-0", "loaded", (number, Loaded("cuda:1", "fp32", "", "digest")))
    [(number, load)] = crew.loads("acceptor-0")
    assert (load.digest, load.variant, load.device) == ("digest", "fp32", "cpu")
    assert crew.said == []
    crew.answer("acceptor-0", "loaded", (number, FP32))
    crew.answer("acceptor-1", "loaded", (number, FP32))
    assert crew.said == [FP32]
    assert crew.supervisor._present().loads == (Load("pets", 2, False, "digest", "fp32", "cpu"),)


def test_what_one_cannot_load_all_give_up(crew: Crew) -> None:
    crew.load()
    [(number, _)] = crew.loads("engine-0")
    crew.answer("engine-0", "loaded", (number, FP32))
    crew.answer("engine-1", "loaded", (number, Refused("no memory")))
    assert crew.said == [Refused("no memory")]
    assert crew.asked("engine-0") == [("unload", (0, "pets", 2))]
    crew.answer("engine-0", "unloaded", 0)
    assert crew.supervisor._present().loads == ()


def test_where_one_falls_back_to_another_variant_all_do(crew: Crew) -> None:
    crew.load()
    [(number, _)] = crew.loads("engine-0")
    crew.loads("engine-1")
    crew.answer("engine-0", "loaded", (number, INT8))
    crew.answer("engine-1", "loaded", (number, FP32._replace(fallback="no int8 here")))
    [(number, load)] = crew.loads("engine-0")
    assert load.variant == "fp32"
    assert crew.loads("engine-1") == []
    crew.answer("engine-0", "loaded", (number, FP32))
    [(_, load)] = crew.loads("acceptor-0")
    assert load.variant == "fp32"


def test_contents_that_differ_are_refused_for_now(crew: Crew) -> None:
    crew.load()
    [(number, _)] = crew.loads("engine-0")
    crew.answer("engine-0", "loaded", (number, FP32))
    crew.answer("engine-1", "loaded", (number, FP32._replace(digest="another")))
    [refused] = crew.said
    assert refused.passing
    assert "was changed while it was loaded" in refused.reason


def test_a_worker_that_dies_while_it_loads_refuses_for_now(crew: Crew) -> None:
    crew.load()
    [(number, _)] = crew.loads("engine-0")
    crew.answer("engine-0", "loaded", (number, FP32))
    crew.die("engine-1")
    assert crew.said == [Refused("engine-1 died while it was loaded", passing=True)]
    assert crew.asked("engine-0") == [("unload", (0, "pets", 2))]


def test_who_takes_the_place_of_one_that_had_it_is_asked_again(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew.load()
    [(number, _)] = crew.loads("engine-0")
    crew.loads("engine-1")
    crew.answer("engine-0", "loaded", (number, FP32))
    crew.die("engine-0")
    assert crew.said == []
    ours, theirs = Pipe()
    process: Any = SimpleNamespace(pid=2, wait=lambda: 0, kill=lambda: None, returncode=0)
    monkeypatch.setattr(
        "convoy_service.server.supervisor._spawn", lambda orders: (process, ours, CrashReport())
    )
    crew.ends["engine-0"] = theirs
    crew.supervisor._start(crew.member("engine-0"), 0.0)
    (kind, orders), *rest = crew.asked("engine-0")
    assert (kind, orders.present.loads) == ("orders", ())
    assert [kind for kind, _ in rest] == ["load"]
    crew.answer("engine-1", "loaded", (number, FP32))
    assert crew.asked("acceptor-0") == [], "the new one has not answered"
    crew.answer("engine-0", "loaded", (number, FP32))
    assert [kind for kind, _ in crew.asked("acceptor-0")] == ["load"]


def test_one_that_is_born_has_what_is_decided(crew: Crew) -> None:
    crew.all_load()
    crew.supervisor.route("pets", Route(2), lambda: None)
    crew.supervisor.show([ModelState("pets")])
    crew.turn()
    present = crew.supervisor._present()
    assert [load.version for load in present.loads] == [2]
    assert present.routes == (("pets", Route(2)),)
    assert present.states == (ModelState("pets"),)
    crew.answer("engine-0", "lost", ("pets", 2, "no such file"))
    assert crew.said == [("pets", 2, "engine-0: no such file")]


def test_one_that_cannot_load_what_others_have_leaves_the_calls_to_them(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew.all_load()
    crew.supervisor._open = True
    killed: list[str] = []
    for name in ("engine-0", "acceptor-0"):
        member = crew.member(name)
        monkeypatch.setattr(member.process, "kill", partial(killed.append, name))
    crew.answer("engine-1", "ready", True)
    crew.answer("engine-0", "lost", ("pets", 2, "no such file"))
    assert killed == ["engine-0"]
    assert crew.said == [], "the version is given up"
    # Engines are no help to a lone acceptor.
    crew.answer("acceptor-0", "lost", ("pets", 2, "no such file"))
    assert killed == ["engine-0"]
    assert crew.said == [("pets", 2, "acceptor-0: no such file")]
    assert ("open", None) in crew.asked("acceptor-0")
    # It keeps no other version from the others.
    crew.said.clear()
    crew.load(3)
    [(number, _)] = crew.loads("engine-1")
    crew.die("engine-0")
    assert not crew.supervisor._failed, "it was killed on purpose"
    crew.answer("engine-1", "loaded", (number, FP32))
    for name in ("acceptor-0", "acceptor-1"):
        crew.answer(name, "loaded", (number, FP32))
    assert crew.said == [FP32]
    # Ever more seldom.
    member, pauses = crew.member("engine-0"), []
    member.backoff.reset()
    for _ in range(13):
        member.lacks = True
        crew.supervisor._put_off(member, member.started + 100.0, "died")
        pauses.append(member.start_at - member.started - 100.0)
    assert pauses[0] == pytest.approx(0.2)
    assert pauses[-1] == 60.0
    crew.supervisor._put_off(member, member.started + 1.0, "died")
    assert member.start_at == member.started + 11.0


def test_an_order_is_answered_to_who_gave_it_and_not_to_the_next(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: queue.SimpleQueue[str] = queue.SimpleQueue()
    go_on: queue.SimpleQueue[None] = queue.SimpleQueue()

    def order(verb: str, name: str, versions: tuple[int, ...]) -> None:
        given.put(name)
        go_on.get(timeout=TIMEOUT_S)

    monkeypatch.setattr(crew.supervisor._director, "order", order)
    crew.answer("acceptor-0", "ask", ("order", 0, "rollback", "pets", ()))
    crew.answer("acceptor-1", "ask", ("order", 0, "rollback", "pets", ()))
    assert [given.get(timeout=TIMEOUT_S) for _ in range(2)] == ["pets"] * 2
    crew.die("acceptor-0")
    crew.begin(crew.member("acceptor-0"))
    for _ in range(2):
        go_on.put(None)
    deadline = time.monotonic() + TIMEOUT_S
    while len(crew.supervisor._posted) < 2:
        assert time.monotonic() < deadline
    assert crew.asked("acceptor-1") == [("answer", (0, None))]
    assert crew.asked("acceptor-0") == []


def test_a_route_is_done_when_all_have_it(crew: Crew) -> None:
    done: list[int] = []
    crew.supervisor.route("pets", Route(2), lambda: done.append(1))
    [(kind, (number, name, route))] = crew.asked("acceptor-0")
    assert (kind, name, route) == ("route", "pets", Route(2))
    for worker in ("engine-0", "acceptor-0", "engine-1"):
        crew.answer(worker, "routed", number)
    assert not done
    crew.die("acceptor-1")
    assert done == [1]


def test_a_version_leaves_acceptors_before_engines(crew: Crew) -> None:
    crew.all_load()
    done: list[int] = []
    crew.supervisor.unload("pets", 2, lambda: done.append(1))
    [(kind, (number, name, version))] = crew.asked("acceptor-0")
    assert (kind, name, version) == ("unload", "pets", 2)
    assert crew.supervisor._present().loads == (), "one that is born now must not load it"
    crew.answer("acceptor-0", "unloaded", number)
    assert crew.asked("engine-0") == crew.asked("engine-1") == []
    crew.die("acceptor-1")
    assert [kind for kind, _ in crew.asked("engine-0")] == ["unload"]
    crew.answer("engine-0", "unloaded", number)
    assert not done
    crew.answer("engine-1", "unloaded", number)
    assert done == [1]


def test_a_version_that_serves_is_not_given_up_where_a_new_worker_cannot_load_it(
    crew: Crew,
) -> None:
    crew.all_load()
    crew.load()
    [(number, _)] = crew.loads("engine-0")
    crew.answer("engine-0", "loaded", (number, Refused("no such file")))
    crew.answer("engine-1", "loaded", (number, FP32))
    assert crew.said == [Refused("no such file")]
    assert crew.asked("engine-1") == [("load", (number, Load("pets", 2)))]


def test_without_engines_acceptors_do_it_all_and_must_be_there(tmp_path: Path) -> None:
    crew = Crew(tmp_path, 0, 2)
    crew.supervisor._was_ready = True
    crew.load()
    [(number, _)] = crew.loads("acceptor-0")
    crew.answer("acceptor-0", "loaded", (number, FP32))
    crew.die("acceptor-0")
    assert crew.said == []
    crew.answer("acceptor-1", "loaded", (number, FP32))
    assert crew.said == [FP32]
    crew.die("acceptor-1")
    crew.load(3)
    assert crew.said == [FP32], "nobody has shown that it works"


def test_what_is_loaded_while_others_serve_proves_itself_first(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof = Proof("digest", "int8", "", ((1, 0.001), (16, 0.01)))
    proving: queue.SimpleQueue[Any] = queue.SimpleQueue()
    asked: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def prove(folder: Path, settings: Settings) -> Proof:
        asked.put(folder)
        outcome = proving.get()
        if isinstance(outcome, Exception):
            raise outcome
        assert isinstance(outcome, Proof)
        return outcome

    monkeypatch.setattr("convoy_service.engine.isolated_verifier.prove", prove)
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()
    crew.supervisor.load("pets", 2, True, said.put)
    assert asked.get(timeout=TIMEOUT_S) == crew.supervisor._director.folder / "pets" / "2"
    assert crew.asked("engine-0") == []
    proving.put(BrokenVersion("NaN"))
    assert said.get(timeout=TIMEOUT_S) == Refused("NaN")
    crew.supervisor.load("pets", 2, True, said.put)
    proving.put(proof)
    assert asked.get(timeout=TIMEOUT_S)
    while not crew.supervisor._posted:
        pass
    [(_, load)] = crew.loads("engine-0")
    assert load == Load("pets", 2, gently=True, proof=proof)
