"""The life of versions: which are loaded, which answers, and when one goes.

A `Director` decides, once for all processes of a service; a crew carries out: it loads, routes and
unloads in every process. It looks at the models folder now and then, as network file systems tell
nobody of changes, and never compares the times of files with a clock: what differs has changed.

A version is loaded when its policy wants it (see `policy.Policy`) and every file that its manifest
lists has its size; whoever loads it checks the sha256 of what he has read. What is loaded and proved
may be routed to; what is no longer routed to is kept for a way back, then drained and freed. A
version that fails is passed over for the one before it until something in its folder changes.
"""

import logging
import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, Protocol, TypeVar

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Manifest
from convoy_service.backoff import Backoff
from convoy_service.engine.isolated_verifier import Proof
from convoy_service.errors import (
    BrokenVersion,
    ConvoyError,
    InvalidRequest,
    NotPossible,
    NotReady,
    Overloaded,
    UnknownModel,
)
from convoy_service.registry.registry import (
    BROKEN,
    DRAINING,
    IDLE,
    INCOMPLETE,
    LOADING,
    READY,
    STANDBY,
    UNLOADED,
    Loaded,
    ModelState,
    Repository,
    Route,
    VersionState,
)
from convoy_service.rollout import policy as policies
from convoy_service.rollout.canary import Canary, Counts, Decision, judge
from convoy_service.rollout.policy import Policy
from convoy_service.telemetry.counters import Metrics, Snapshot, canary_counts

log = logging.getLogger("convoy.life")

T = TypeVar("T")

# What failed for a reason that may pass (a process died, a disk did not answer) is tried again after
# a while, each time twice as long, up to the longest.
_RETRY_S, _LONGEST_RETRY_S = 5.0, 300.0

_ON_TRIAL = "on trial: "

_CHANGED = "changed on the disk: a version never changes, publish a new one"

_MOST_ORDERS = 32

# How long the end waits for a turn to be over.
_END_S = 2.0

# How often candidates are judged.
_JUDGE_S = 1.0

# An incomplete version in which nothing changes for so long was forgotten by whoever copied it.
_FORGOTTEN_S = 60.0


class Refused(NamedTuple):
    """A version that was not loaded, and why. `passing`: it may work another time as it is."""

    reason: str
    passing: bool = False

    @classmethod
    def by(cls, error: BrokenVersion) -> "Refused":
        return cls(str(error), error.passing)


class Crew(Protocol):
    """Carries out what the Director decides, in every process. `done` may be called on any thread, and
    from within.
    """

    def load(
        self, name: str, version: int, gently: bool, done: Callable[[Loaded | Refused], None]
    ) -> None:
        """Has the version loaded everywhere, or nowhere. `gently`: others are served meanwhile."""

    def route(self, name: str, route: Route, done: Callable[[], None]) -> None:
        """Has requests for the model go there, those that come after `done` for certain."""

    def unload(self, name: str, version: int, done: Callable[[], None]) -> None:
        """Has the version drained and freed everywhere."""

    def show(self, states: Sequence[ModelState]) -> None:
        """Tells those who ask what is known of all models."""


# Name, change times, size and place of each file in a folder: differs where something has changed.
_Stamp = tuple[tuple[str, int, int, int, int], ...]


@dataclass
class _Version:
    number: int
    on_disk: bool = True
    intact: bool = True  # what lies there, as far as is known, is what was loaded
    stamp: _Stamp | None = None  # before it was looked into
    changed_at: float = -math.inf
    manifest: Manifest | None = None
    digest: str = ""
    state: str = IDLE
    reason: str = ""
    # What the crew has; also while it is broken in some of the processes, and while it drains.
    held: Loaded | None = None
    # The stamp with which it was last loaded; where that failed for a reason that may pass, when to
    # try again, and how long to wait the time after.
    tried: _Stamp | None = None
    retry_at: float = math.inf
    backoff: Backoff = field(default_factory=partial(Backoff, _RETRY_S, _LONGEST_RETRY_S))
    # Until when it is kept for a way back.
    until: float = math.inf
    told_forgotten: bool = False

    @property
    def serves(self) -> bool:
        """Can be routed to."""
        return self.held is not None and self.state in (READY, STANDBY)


class _Trial(NamedTuple):
    """What a candidate is held against, how, and what had been counted when that began."""

    stable: int
    candidate: int
    canary: Canary
    start: Counts


@dataclass
class _Model:
    name: str
    versions: dict[int, _Version] = field(default_factory=dict)
    # None before its file was looked at for the first time.
    policy: Policy | None = None
    policy_stamp: policies.Stamp = ()
    reason: str = ""  # what is wrong with its policy
    route: Route = Route()  # noqa: RUF009 (it never changes)
    routing: int = 0  # how often the crew was told and has not yet said that it is done
    # The stable version before this one, if any.
    previous: int = 0
    # Wanted by an order, whatever the policy says.
    ordered: list[int] = field(default_factory=list)
    trial: _Trial | None = None
    decision: Decision | None = None  # the last one on the trial


class _Look(NamedTuple):
    """What was found of a model on the disk: the stamps of versions, None for those that were not
    looked into, and of its policy. `whole`, of versions that are loaded and have another stamp than
    before: whether their files are what their manifests say.
    """

    versions: dict[int, _Stamp | None]
    policy: policies.Stamp
    whole: Mapping[int, bool] = MappingProxyType({})


class Director:
    """Decides which versions of the models in a folder are loaded, and which of them answers whom.

    `step` does what is due; `start` has a thread do so. Everything else may be called from any
    thread.
    """

    def __init__(
        self,
        folder: Path,
        crew: Crew,
        metrics: Metrics,
        *,
        watch_s: float = 1.0,
        rollback_window_s: float = 300.0,
        snapshot: Callable[[], Snapshot] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Looks at the folder every `watch_s`, 0: only at the beginning and for orders. A version
        that was replaced is kept for `rollback_window_s`. `snapshot`: what all processes counted, by
        which candidates are judged; without, they are not.
        """
        self.folder = folder
        self._crew, self._metrics, self._clock = crew, metrics, clock
        self._watch_s, self._window_s = watch_s, rollback_window_s
        self._models: dict[str, _Model] = {}
        self._states: tuple[ModelState, ...] = ()
        # Guards all of this; whoever changes something tells.
        self._changed = threading.Condition(threading.RLock())
        self._heard: deque[Callable[[], None]] = deque()
        self._look_at = -math.inf
        self._unreadable: set[Path] = set()  # at the last look
        self._snapshot, self._judge_at = snapshot, math.inf
        self._loading: tuple[str, int] | None = None
        self._orders = 0  # that are being carried out
        self._begun = False  # everything that was there at the beginning has been judged
        self._closing = False
        self._thread: threading.Thread | None = None

    # Its turns.

    def step(self) -> float:
        """Looks, decides, and has done what is due; the seconds until something is again."""
        now = self._clock()
        if now >= self._look_at:
            looks = self._look()
            with self._changed:
                if looks is not None:
                    self._see(looks, now)
                self._look_at = now + self._watch_s if self._watch_s else math.inf
        if self._snapshot and now >= self._judge_at:
            counted = self._snapshot()
            with self._changed:
                self._judge(counted)
                self._judge_at = now + _JUDGE_S
        with self._changed:
            self._decide()
            if self._heard:  # from a crew that does things at once
                return 0.0
            on_trial = self._snapshot is not None and any(
                model.route.candidate or model.trial for model in self._models.values()
            )
            if not on_trial:
                self._judge_at = math.inf
            elif self._judge_at == math.inf:
                self._judge_at = now
            due = [self._look_at, self._judge_at]
            for model in self._models.values():
                due += [v.until for v in model.versions.values() if v.state == STANDBY]
                # What is overdue waits for a load to end, or is not wanted.
                due += [v.retry_at for v in model.versions.values() if v.retry_at > now]
            return max(0.0, min(due) - self._clock())

    def settle(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Takes its first turns, until everything that is there has been judged, or `stopping`.

        Raises BrokenVersion where nothing at all can be served.
        """
        while not stopping():
            self.step()
            with self._changed:
                if self._settled():
                    break
                if not self._heard:
                    self._changed.wait(0.1)  # `stopping` may be a signal
        else:
            return
        with self._changed:
            self._begun = True
            if not self._models:
                raise BrokenVersion(
                    f"no models in {self.folder}: train one with `convoy train --models "
                    f"{self.folder}`, or add one with `convoy models add NAME file.onnx --models "
                    f"{self.folder}`"
                )
            asked = [m for m in self._models.values() if not (m.policy and m.policy.nothing)]
            if asked and not any(model.route.stable for model in asked):
                reasons = "; ".join(_why_not(model) for model in asked)
                raise BrokenVersion(f"no model in {self.folder} can be served: {reasons}")
        self._warn_of_strangers()

    def start(self) -> None:
        """Goes on on a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self._work, name="director", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Decides nothing any more. What the crew is at is left to it, and so is a disk that does not
        answer.
        """
        self._closing = True
        if self._changed.acquire(timeout=_END_S):
            self._changed.notify_all()
            self._changed.release()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(_END_S)

    def _work(self) -> None:
        while True:
            try:
                pause_s = self.step()
            # Versions that serve must not be lost for a bug in who looks for others.
            except Exception:
                log.exception("bug in the life of versions")
                pause_s = max(1.0, self._watch_s)
            with self._changed:
                if not self._closing and not self._heard:
                    self._changed.wait(min(pause_s, threading.TIMEOUT_MAX))
                if self._closing:
                    return

    def _hear(self, change: Callable[[], None]) -> None:
        """From the crew, on any thread: taken in the next turn."""
        self._heard.append(change)
        with self._changed:
            self._changed.notify_all()

    # What is known.

    def states(self) -> tuple[ModelState, ...]:
        return self._states

    def in_use(self) -> set[tuple[str, int]]:
        """Models and versions whose folders are needed: they are loaded, or about to be."""
        with self._changed:
            return {
                (model.name, version.number)
                for model in self._models.values()
                for version in model.versions.values()
                if version.held or version.state == LOADING
            }

    def serving(self) -> str:
        """What answers, for a person to read."""
        with self._changed:
            held = {
                f"{model.name}/{model.route.stable}": model.versions[model.route.stable].held
                for model in self._models.values()
                if model.route.stable
            }
        return ", ".join(
            f"{name} on {loaded.device}"
            + (f" in {loaded.variant}" if loaded.variant != "fp32" else "")
            for name, loaded in held.items()
            if loaded
        )

    # Orders.

    def order(self, verb: str, name: str, versions: Sequence[int] = ()) -> None:
        """Carries out what an operator says: see `orders.Order`. Raises Overloaded where too many of
        them wait: each has a thread, whether or not its caller waits for it.
        """
        with self._changed:
            if self._orders >= _MOST_ORDERS:
                raise Overloaded(f"{self._orders} orders are being carried out: wait for them", 1.0)
            self._orders += 1
        try:
            self._carry_out(verb, name, versions)
        finally:
            with self._changed:
                self._orders -= 1

    def _carry_out(self, verb: str, name: str, versions: Sequence[int]) -> None:
        if verb == "promote":
            self.promote(name, versions[0] if versions else 0)
        elif verb == "pin":
            self.pin(name, versions)
        elif verb in ("rollback", "load", "unload"):
            {"rollback": self.rollback, "load": self.load, "unload": self.unload}[verb](name)
        else:
            raise InvalidRequest(f"no order {verb!r}: promote, rollback, pin, load or unload")

    def promote(self, name: str, version: int = 0, reason: str = "by order") -> None:
        """Has a version (0: the candidate) answer the requests that name none, until another order;
        returns when it does. Where it can't be loaded, all stays as it was, and ConvoyError says why.
        """
        with self._changed:
            model = self._known(name)
            number = version or (model.policy or Policy()).candidate
            if not number:
                raise NotPossible(f"model {name!r} has no candidate: say which version to promote")
            with self._up(model, number):
                log.info("%s/%d is promoted: %s", name, number, reason)
                self._change(model, lambda policy: policies.promoted(policy, number))

    def rollback(self, name: str, reason: str = "by order") -> None:
        """Goes back: from a candidate to the stable version, else to the version before it, which then
        answers until another order. Raises ConvoyError where there is none that works.
        """
        with self._changed:
            model = self._known(name)
            policy, stable = model.policy or Policy(), model.route.stable
            if policy.candidate:
                self.reject(name, policy.candidate, reason)
                return
            usable = [
                number
                for number, version in model.versions.items()
                if version.intact and version.state not in (BROKEN, INCOMPLETE)
            ]
            before = policies.before(policy, stable, usable, model.previous)
            with self._up(model, before):
                log.info("%s goes back from %d to %d: %s", name, stable, before, reason)
                self._change(model, lambda policy: policies.rolled_back(policy, stable, before))

    def reject(self, name: str, version: int, reason: str) -> None:
        """The version is no candidate any more, nor will it be again."""
        with self._changed:
            model = self._known(name)
            log.warning("%s/%d is rejected: %s", name, version, reason)
            self._change(model, lambda policy: policies.rejected(policy, version))
            if found := model.versions.get(version):
                found.reason = f"rejected: {reason}"

    def pin(self, name: str, versions: Sequence[int]) -> None:
        """Serves these versions and no others, whatever is published; none of them: again the newest.
        Where one can't be loaded, all stays as it was, and ConvoyError says why.
        """
        with self._changed:
            model = self._known(name)
            with self._up(model, *sorted(set(versions), reverse=True)):
                pinned = ", ".join(map(str, versions)) or "none"
                log.info("%s is pinned to %s: by order", name, pinned)
                self._change(model, lambda policy: policies.pinned(policy, versions))
            self._wait_for(lambda: self._closing or self._settled_for(model))

    def load(self, name: str) -> None:
        """Serves the model where it was unloaded, looks at its folder now, and tries once more what
        failed. Returns when it is served, or raises ConvoyError.
        """
        self._look_now()
        with self._changed:
            model = self._known(name)
            for version in model.versions.values():
                version.retry_at = self._clock() if version.state == BROKEN else math.inf
            self._change(model, policies.loaded)
            self._wait_for(lambda: self._closing or self._settled_for(model))
            if not model.route.stable:
                raise NotPossible(f"model {name!r} can't be served: {_why_not(model)}")

    def unload(self, name: str) -> None:
        """Serves no version of the model until it is loaded again; returns when its memory is free."""
        with self._changed:
            model = self._known(name)
            log.info("%s is unloaded: by order", name)
            self._change(model, policies.unloaded)
            self._wait_for(
                lambda: self._closing or not any(v.held for v in model.versions.values())
            )

    def lost(self, name: str, version: int, reason: str) -> None:
        """From the crew: a process that was started anew can't load what the others have."""
        self._hear(partial(self._lose, name, version, reason))

    def _known(self, name: str) -> _Model:
        if self._closing:
            raise NotReady("this server is shutting down: ask another")
        if not name and len(self._models) == 1:
            name = next(iter(self._models))
        if name not in self._models:
            there = ", ".join(self._models) or "none"
            raise UnknownModel(f"no model {name!r} here; there is: {there}")
        return self._models[name]

    @contextmanager
    def _up(self, model: _Model, *numbers: int) -> Iterator[None]:
        """Has versions loaded, whatever the policy says, for as long as it is `with` them: they can be
        routed to, or ConvoyError says why not. The lock is held, but not while it waits.
        """
        if not model.versions.keys() >= set(numbers):
            self._look_now()
        for number in numbers:
            if number not in model.versions:
                there = ", ".join(map(str, sorted(model.versions))) or "none"
                raise UnknownModel(
                    f"no version {number} of model {model.name!r}; there is: {there}"
                )
        model.ordered += numbers
        try:
            for number in numbers:
                self._bring_up(model, number)
            yield
        finally:
            for number in numbers:
                model.ordered.remove(number)

    def _bring_up(self, model: _Model, number: int) -> None:
        # It may be deleted while others are loaded.
        version = model.versions.get(number, _Version(number))
        if version.state == BROKEN:
            version.retry_at = self._clock()
        self._decide()
        self._wait_for(
            lambda: (
                self._closing
                or version.serves
                or version.state in (BROKEN, INCOMPLETE)
                or model.versions.get(number) is not version
            )
        )
        if model.versions.get(number) is not version:
            raise UnknownModel(f"version {number} of model {model.name!r} is gone from the disk")
        # What is written down must also hold after a restart.
        if not (version.serves and version.intact):
            raise NotPossible(
                f"{model.name}/{version.number} can't be served: "
                f"{version.reason or 'the server stops'}"
            )

    def _change(self, model: _Model, make: Callable[[Policy], Policy]) -> None:
        """Makes another policy of the model's, in its file too, and does what follows from it."""
        folder = self.folder / model.name
        try:
            policies.read(folder)
        except ConvoyError as error:
            raise NotPossible(f"{error}; mend it, or remove it") from error
        try:
            model.policy, model.policy_stamp = policies.change(folder, make)
        except NotPossible:  # just now
            raise
        except ConvoyError as error:
            log.warning("%s; what was ordered holds until this service ends", error)
            model.policy = make(model.policy or Policy())
        model.reason = ""
        self._decide()
        self._wait_for(lambda: self._closing or not model.routing)

    def _wait_for(self, true: Callable[[], bool]) -> None:
        """Waits; what the crew says meanwhile is heard. The lock is held, but not while it waits."""
        while not true():
            if not self._heard:
                self._changed.wait(1.0)
            self._decide()

    # What is on the disk.

    def _look_now(self) -> None:
        looks = self._look()
        with self._changed:
            if looks is not None:
                self._see(looks, self._clock())
            self._decide()

    def _look(self) -> dict[str, _Look | None] | None:
        """What is on the disk; None where that can't be told just now, of one model or of all. Takes
        no lock while it reads.
        """
        with self._changed:
            # Old versions that nobody asks for are not looked into.
            idle = {
                (model.name, number)
                for model in self._models.values()
                for number, version in model.versions.items()
                if version.state == IDLE and version.stamp is not None
            }
            loaded = {
                (model.name, number): version.stamp
                for model in self._models.values()
                for number, version in model.versions.items()
                if version.held
            }
        folders = self._try_to_read(self.folder, bundles.folders)
        if folders is None:
            return None
        looks: dict[str, _Look | None] = {}
        for folder in folders:
            name, numbers = folder.name, self._try_to_read(folder, bundles.versions)
            if numbers is None:
                looks[name] = None
            elif numbers:
                stamps = {
                    number: None if (name, number) in idle else _stamp(folder / str(number))
                    for number in numbers
                }
                whole = {
                    number: _whole(folder / str(number), stamp)
                    for number, stamp in stamps.items()
                    if stamp and stamp != loaded.get((name, number), stamp)
                }
                looks[name] = _Look(stamps, policies.stamp(folder), whole)
        return looks

    def _try_to_read(self, folder: Path, read: Callable[[Path], list[T]]) -> list[T] | None:
        """What is read there; None where it can't be, which is said once."""
        try:
            found = read(folder)
        # One that was there a moment ago, or must not be read, or a disk that does not answer.
        except OSError as error:
            if folder not in self._unreadable:
                log.warning("%s can't be looked at: %s", folder, error)
            self._unreadable.add(folder)
            return None
        self._unreadable.discard(folder)
        return found

    def _see(self, looks: dict[str, _Look | None], now: float) -> None:
        for name, look in looks.items():
            if look is None:
                continue
            model = self._models.setdefault(name, _Model(name))
            for number, stamp in look.versions.items():
                version = model.versions.setdefault(number, _Version(number))
                if not version.on_disk:
                    version.on_disk, version.intact, version.stamp = True, True, None
                if stamp is not None:
                    self._inspect(model, version, stamp, look.whole.get(number), now)
        for model in list(self._models.values()):
            look = looks.get(model.name, _Look({}, ()))
            if look is None:
                continue
            there = look.versions
            for number, version in list(model.versions.items()):
                if number in there:
                    continue
                if version.on_disk and version.held:
                    log.warning("%s/%d is gone from the disk; it serves on", model.name, number)
                    version.reason = "its folder is gone"
                version.on_disk = version.intact = False
                if not version.held and version.state != LOADING:
                    del model.versions[number]
            if not model.versions:
                self._metrics.forget(model.name)
                del self._models[model.name]
            elif model.name in looks:
                self._read_policy(model, look.policy)

    def _inspect(
        self, model: _Model, version: _Version, stamp: _Stamp, whole: bool | None, now: float
    ) -> None:
        """What a version's folder holds. May read its manifest; `whole`: see `_Look`."""
        folder = self.folder / model.name / str(version.number)
        if stamp == version.stamp:
            self._remind(model, version, now)
            if version.state == BROKEN and version.tried not in (None, stamp):
                version.state = IDLE  # it changed while it was loaded
            if version.state != INCOMPLETE or version.manifest:
                return
            # Its manifest was there but could not be read, and nobody writes to it any more.
        elif version.held and whole is None:
            return  # it was loaded meanwhile: the next look is at its files, too
        else:
            # What is there at the beginning is judged as it is.
            version.changed_at = now if self._begun else -math.inf
            version.stamp, version.told_forgotten = stamp, False
            if not version.held:
                version.manifest = None
        reason = ""
        passing = False
        try:
            manifest, digest = bundles.read_described(folder)
        except Exception as error:
            if not isinstance(error, BrokenVersion):
                log.exception("%s can't be read", folder)
            reason, passing = str(error) or repr(error), isinstance(error.__cause__, OSError)
            manifest, digest = None, ""
        if version.held:
            if digest == version.held.digest and whole:
                version.manifest, version.digest = manifest, digest
                version.reason, version.intact = version.held.fallback, True
            elif digest:
                log.error("%s was changed: what was loaded serves on", folder)
                version.reason, version.intact = _CHANGED, False
            return
        version.manifest, version.digest = manifest, digest
        if version.state == LOADING:
            return
        missing = _missing(manifest, stamp) if manifest else reason
        if not missing:
            if version.state in (INCOMPLETE, BROKEN):
                version.state, version.reason, version.retry_at = IDLE, "", math.inf
            return
        if manifest is None and version.changed_at < now and _has_manifest(stamp):
            if version.state != BROKEN or version.reason != missing:
                self._refuse(model, version, Refused(missing, passing))
            return
        if version.state != INCOMPLETE:
            log.info("%s/%d is not whole yet: %s", model.name, version.number, missing)
        version.state, version.reason = INCOMPLETE, missing

    def _remind(self, model: _Model, version: _Version, now: float) -> None:
        forgotten = version.state == INCOMPLETE and now - version.changed_at >= _FORGOTTEN_S
        if forgotten and not version.told_forgotten:
            version.told_forgotten = True
            log.warning(
                "%s/%d is not whole, and nothing in it has changed for a while: %s",
                model.name, version.number, version.reason,
            )  # fmt: skip

    def _read_policy(self, model: _Model, stamp: policies.Stamp) -> None:
        if model.policy is not None and stamp == model.policy_stamp and not model.reason:
            return
        reason, file = "", self.folder / model.name / policies.FILE
        try:
            policy = policies.read(file.parent)
        except ConvoyError as error:
            reason, policy = str(error), model.policy or Policy()
        else:
            missing = sorted(policy.named - model.versions.keys())
            if missing:
                names = ", ".join(map(str, missing))
                reason = f"{file} names version {names}, which is not there"
                # At the beginning there is nothing that it could leave as it is.
                policy = model.policy or policies.without(policy, missing)
        if reason and reason != model.reason:
            log.error("%s: nothing is changed", reason)
        elif not reason and model.policy is not None and policy != model.policy:
            log.info("%s: %s now says %s", model.name, policies.FILE, policy)
        model.policy, model.policy_stamp, model.reason = policy, stamp, reason

    def _warn_of_strangers(self) -> None:
        # Links too: one that leads nowhere is no folder.
        ignored = sorted(
            each.name
            for each in self.folder.iterdir()
            if (each.is_dir() or each.is_symlink())
            and each.name not in self._models
            and not each.name.startswith(".")
        )
        if ignored:
            log.warning(
                "not taken for models: %s; a model is a folder with a folder for each version in it "
                "(1, 2, ...), named by letters, digits, '.', '_' and '-'",
                ", ".join(map(repr, ignored)),
            )

    # What to do. The lock is held.

    def _decide(self) -> None:
        while self._heard:
            self._heard.popleft()()
        if not self._closing:
            now = self._clock()
            for model in self._models.values():
                for version in model.versions.values():
                    if version.state == BROKEN and version.retry_at <= now and not version.held:
                        version.state, version.tried, version.retry_at = IDLE, None, math.inf
                self._plan(model, now)
            if self._loading is None:
                self._load_next(now)
            self._show()
        self._changed.notify_all()

    def _plan(self, model: _Model, now: float) -> None:
        policy = model.policy or Policy()
        base = self._base(model, policy)
        stable = self._stable(model, policy, base)
        candidate = self._candidate(model, policy, base, stable)
        if candidate and (why := _unfit(model.versions[stable], model.versions[candidate])):
            self._give_up(model, model.versions[candidate], why)
            self._plan(model, now)
            return
        self._route(model, policy, stable, candidate)
        keep = {*base, *policy.named, *model.ordered, stable, candidate}
        for version in model.versions.values():
            if version.held is None or version.state in (DRAINING, LOADING):
                continue
            if version.number in keep:
                if version.state == STANDBY:
                    version.state, version.until = READY, math.inf
                continue
            back = version.number == model.previous and self._window_s > 0 and stable
            if version.state == READY and back:
                version.state, version.until = STANDBY, now + self._window_s
            elif version.state != STANDBY or not back or now >= version.until:
                self._unload(model, version)

    def _judge(self, counted: Snapshot) -> None:
        """Promotes candidates, or rolls them back, by what was counted of them since they are."""
        for model in list(self._models.values()):
            stable, candidate, canary = (
                model.route.stable,
                model.route.candidate,
                model.route.canary,
            )
            if not candidate or canary is None:
                if model.trial:
                    self._metrics.judged(model.name, 0, None)
                    self._note(model, model.trial.candidate, "")
                model.trial = model.decision = None
                continue
            counts = canary_counts(counted, model.name, stable, candidate)
            if model.trial is None or model.trial[:3] != (stable, candidate, canary):
                model.trial = _Trial(stable, candidate, canary, counts)
            decision = judge(canary, counts.since(model.trial.start))
            model.decision = decision
            self._metrics.judged(model.name, candidate, decision)
            self._note(model, candidate, decision.why)
            if decision.verdict == "go on":
                continue
            carry_out = self.promote if decision.verdict == "promote" else self.reject
            try:
                carry_out(model.name, candidate, str(decision))
                self._metrics.decided(model.name, decision.verdict)
            except ConvoyError as error:
                log.error("%s/%d stays on trial: %s", model.name, candidate, error)

    def _note(self, model: _Model, number: int, words: str) -> None:
        """Says how a trial goes, unless there is something else to say of the version."""
        version = model.versions.get(number)
        if version and (not version.reason or version.reason.startswith(_ON_TRIAL)):
            version.reason = words and _ON_TRIAL + words

    def _base(self, model: _Model, policy: Policy) -> list[int]:
        """The versions that are served by what the policy says, the newest first."""
        if not policy.newest:
            return sorted((n for n in policy.pinned if n in model.versions), reverse=True)
        usable = [
            number
            for number, version in sorted(model.versions.items(), reverse=True)
            if number not in policy.skip
            and version.state not in (BROKEN, INCOMPLETE)
            and (version.on_disk or number == model.route.stable)
        ]
        return usable[: policy.newest]

    def _stable(self, model: _Model, policy: Policy, base: list[int]) -> int:
        """The version that answers requests which name none; 0 for none."""
        if policy.nothing:
            return 0
        versions, now = model.versions, model.route.stable
        stays = (
            now in versions and versions[now].held is not None and versions[now].state != DRAINING
        )
        if policy.stable:
            if policy.stable in versions and versions[policy.stable].serves:
                return policy.stable
        elif not (policy.canary and stays and _newer(policy, base, now)):
            for number in base:
                if versions[number].serves:
                    return number
        if stays:
            return now
        serving = [n for n in (*base, *policy.named) if n in versions and versions[n].serves]
        return max(serving, default=0)

    def _candidate(self, model: _Model, policy: Policy, base: list[int], stable: int) -> int:
        """The version that is to show that it is better; 0 for none."""
        if policy.canary is None:
            return 0
        number = policy.candidate
        # What is loaded for an order will be what that says.
        if not number and _newer(policy, base, stable) and base[0] not in model.ordered:
            number = base[0]
        if not stable or number == stable or number not in model.versions:
            return 0
        return number if model.versions[number].serves else 0

    def _route(self, model: _Model, policy: Policy, stable: int, candidate: int) -> None:
        labels = {**policy.labels, policies.STABLE: stable}
        if policy.canary:
            labels[policies.CANARY] = candidate
        canary = policy.canary if candidate else None
        shadow = canary is not None and canary.mode == "shadow"
        route = Route(
            stable,
            candidate,
            canary.share if canary and not shadow else 0.0,
            shadow,
            tuple(sorted((name, number) for name, number in labels.items() if number)),
            canary,
        )
        before, model.route = model.route, route
        if route == before:
            return
        if before.stable and before.stable != stable:
            model.previous = before.stable
            self._metrics.switched(model.name)
        if before.candidate != candidate and candidate:
            log.info(
                "%s/%d is a candidate: it gets %s of the requests, and is compared",
                model.name, candidate, f"{route.share:.3g}",
            )  # fmt: skip
        model.routing += 1
        routed = partial(self._routed, model, before, route)
        self._crew.route(model.name, route, lambda: self._hear(routed))
        # After a restart it would else be the newest, and so stable.
        if candidate and not policy.candidate:
            self._rewrite(model, lambda policy: policies.tried(policy, stable, candidate))

    def _routed(self, model: _Model, before: Route, route: Route) -> None:
        model.routing -= 1
        if route.stable != before.stable:
            log.info(
                "%s: version %d answers, before it %d", model.name, route.stable, before.stable
            )

    def _give_up(self, model: _Model, candidate: _Version, why: str) -> None:
        """It is no candidate. One that is gone from the disk is not told from what may come there."""
        log.warning("%s/%d is no candidate: %s", model.name, candidate.number, why)
        if candidate.on_disk:
            self._rewrite(model, lambda policy: policies.rejected(policy, candidate.number))
            candidate.reason = f"rejected: {why}"
        else:
            self._rewrite(model, policies.untried)

    def _rewrite(self, model: _Model, make: Callable[[Policy], Policy]) -> None:
        """Writes down what was decided, if that is possible."""
        try:
            model.policy, model.policy_stamp = policies.change(self.folder / model.name, make)
        except ConvoyError as error:
            log.warning("%s; it holds until this service ends", error)
            model.policy = make(model.policy or Policy())

    def _load_next(self, now: float) -> None:
        for model in self._models.values():
            for number in self._wanted(model):
                version = model.versions[number]
                if self._loadable(version, now):
                    self._load(model, version)
                    return

    def _wanted(self, model: _Model) -> list[int]:
        """In the order in which they are loaded."""
        policy = model.policy or Policy()
        wanted = [*model.ordered, policy.stable, *self._base(model, policy), policy.candidate]
        wanted += sorted(policy.named, reverse=True)
        # What answers now may be broken in some of the processes.
        wanted.append(model.route.stable)
        return [number for number in dict.fromkeys(wanted) if number in model.versions]

    def _loadable(self, version: _Version, now: float) -> bool:
        if version.state == BROKEN:
            return now >= version.retry_at
        # One that has failed is not tried again while somebody is writing to it.
        settled = version.tried is None or version.changed_at < now
        return version.state == IDLE and version.on_disk and settled

    def _load(self, model: _Model, version: _Version) -> None:
        self._loading = (model.name, version.number)
        version.state, version.tried, version.retry_at = LOADING, version.stamp, math.inf
        if self._begun:
            log.info("%s/%d is being loaded", model.name, version.number)
        self._show()
        done = partial(self._loaded, model.name, version)
        self._crew.load(
            model.name,
            version.number,
            self._begun,
            lambda outcome: self._hear(lambda: done(outcome)),
        )

    def _loaded(self, name: str, version: _Version, outcome: Loaded | Refused) -> None:
        self._loading = None
        model = self._models[name]
        if isinstance(outcome, Refused):
            self._refuse(model, version, outcome)
            return
        version.held, version.state, version.reason = outcome, READY, outcome.fallback
        version.backoff.reset()
        if version.stamp != version.tried:
            version.stamp = None  # its files may have been changed since they were read
        if version.digest and version.digest != outcome.digest:
            version.reason, version.intact = _CHANGED, False
        if self._begun:
            log.info("%s/%d is ready on %s", name, version.number, outcome.device)

    def _lose(self, name: str, number: int, reason: str) -> None:
        model = self._models.get(name)
        version = model and model.versions.get(number)
        if model and version and version.serves:
            self._refuse(model, version, Refused(reason, passing=True))

    def _refuse(self, model: _Model, version: _Version, why: Refused) -> None:
        log.error("%s/%d is not served: %s", model.name, version.number, why.reason)
        version.state, version.reason = BROKEN, why.reason
        version.retry_at = math.inf
        if why.passing:
            version.retry_at = self._clock() + version.backoff.next_s()

    def _unload(self, model: _Model, version: _Version) -> None:
        log.info("%s/%d is being drained", model.name, version.number)
        version.state, version.until = DRAINING, math.inf
        gone = partial(self._unloaded, model.name, version)
        self._crew.unload(model.name, version.number, lambda: self._hear(gone))

    def _unloaded(self, name: str, version: _Version) -> None:
        log.info("%s/%d is unloaded", name, version.number)
        version.held = None
        version.state = IDLE
        if version.retry_at < math.inf:
            version.state = BROKEN
        elif not version.reason.startswith("rejected"):
            version.reason = ""
        # It is looked into anew: something may have changed meanwhile.
        version.stamp, version.tried, version.intact = None, None, True
        if not version.on_disk:
            model = self._models[name]
            del model.versions[version.number]

    def _settled(self) -> bool:
        now = self._clock()
        return (
            self._look_at > -math.inf
            and self._loading is None
            and not self._heard
            and not any(model.routing for model in self._models.values())
            and not any(
                self._loadable(model.versions[number], now)
                for model in self._models.values()
                for number in self._wanted(model)
            )
        )

    def _settled_for(self, model: _Model) -> bool:
        now = self._clock()
        return not any(
            model.versions[number].state == LOADING or self._loadable(model.versions[number], now)
            for number in self._wanted(model)
        )

    def _show(self) -> None:
        states = tuple(_shown(model) for model in self._models.values())
        for model, state in zip(self._models.values(), states, strict=True):
            stable = model.route.stable
            self._metrics.versions(
                model.name,
                stable,
                [(each.version, each.state) for each in state.versions],
                next((each.created for each in state.versions if each.version == stable), ""),
            )
            bad = [v for v in state.versions if v.state in (BROKEN, INCOMPLETE)]
            self._metrics.broken_versions(model.name, sum(each.version > stable for each in bad))
        if states != self._states:
            self._states = states
            self._crew.show(states)


def _shown(model: _Model) -> ModelState:
    versions = []
    for number in sorted(model.versions):
        version = model.versions[number]
        manifest = version.manifest
        known = manifest.files.get(bundles.MODEL) if manifest else None
        scores = manifest.scores if manifest else None
        versions.append(
            VersionState(
                number,
                version.state,
                version.reason,
                manifest.created if manifest else "",
                known.sha256 if known else "",
                scores.accuracy if scores else None,
                scores.images if scores else 0,
            )
        )
    policy = model.policy or Policy()
    reason = model.reason or (UNLOADED if policy.nothing else "")
    trial = model.decision if model.route.candidate else None
    return ModelState(model.name, tuple(versions), str(policy), reason, trial)


def _newer(policy: Policy, base: list[int], stable: int) -> bool:
    """A newer version than the stable one is there; where some are pinned, that is as it should be."""
    return bool(policy.newest and base and base[0] > stable)


def _whole(folder: Path, stamp: _Stamp) -> bool:
    """Whether the version's files are what its manifest says, as far as the disk answers. Reads all
    of them.
    """
    try:
        manifest = bundles.read_manifest(folder)
        return not _missing(manifest, stamp) and all(
            bundles.sha256(folder / name) == file.sha256 for name, file in manifest.files.items()
        )
    except OSError:
        return True
    except BrokenVersion as error:
        return isinstance(error.__cause__, OSError)


def _unfit(stable: _Version, candidate: _Version) -> str:
    """Why it can't be a candidate; empty where it can."""
    if not candidate.intact:
        return candidate.reason
    shapes = [list(each.manifest.pixels.shape) for each in (stable, candidate) if each.manifest]
    if len(shapes) == 2 and shapes[0] != shapes[1]:
        return (
            f"takes images of {shapes[1]}, the stable version {shapes[0]}: they can't be compared; "
            "promote it by hand, or publish another"
        )
    return ""


def _why_not(model: _Model) -> str:
    newest = sorted(model.versions, reverse=True)
    reasons = [model.reason, *(model.versions[number].reason for number in newest)]
    return next(filter(None, reasons), f"no version of {model.name} works")


def _stamp(folder: Path) -> _Stamp:
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except OSError:  # a link that leads nowhere, or it is gone by now
                    found.append((entry.name, 0, 0, -1, 0))
                    continue
                times = (stat.st_mtime_ns, stat.st_ctime_ns)
                found.append((entry.name, *times, stat.st_size, stat.st_ino))
    except OSError as error:
        found.append(("", error.errno or -1, 0, 0, 0))
    return tuple(sorted(found))


def _has_manifest(stamp: _Stamp) -> bool:
    return any(name == bundles.MANIFEST for name, *_ in stamp)


def _missing(manifest: Manifest, stamp: _Stamp) -> str:
    """What of the files that the manifest lists is not there, or not of its size; empty where all
    is.
    """
    sizes = {name: size for name, _, _, size, _ in stamp}
    wrong = []
    for name, file in sorted(manifest.files.items()):
        if name not in sizes:
            wrong.append(f"{name} is missing")
        elif sizes[name] != file.bytes:
            wrong.append(f"{name}: {sizes[name]} bytes, the manifest says {file.bytes}")
    return ", ".join(wrong)


class Alone:
    """The crew where one process does everything: its Repository, and a thread that loads."""

    def __init__(
        self,
        repository: Repository,
        prove: Callable[[str, int], Proof | None] = lambda name, version: None,
    ) -> None:
        """`prove`: has a version prove itself in another process, while this one serves; None where
        that can't be done. Raises BrokenVersion.
        """
        self._repository, self._prove = repository, prove
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._busy = False
        self._unloading: list[threading.Thread] = []

    def start(self) -> None:
        """From now on versions are loaded on a thread; before, on the thread that asks for it."""
        self._thread = threading.Thread(target=self._load_all, name="loader", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """A thread is at what nothing can interrupt, such as loading a version."""
        unloading = any(thread.is_alive() for thread in self._unloading)
        return self._busy or unloading or not self._work.empty() or self._repository.busy

    def load(
        self,
        name: str,
        version: int,
        gently: bool,
        done: Callable[[Loaded | Refused], None],
        *,
        digest: str = "",
        variant: str = "",
        proof: Proof | None = None,
    ) -> None:
        def work() -> None:
            outcome: Loaded | Refused
            try:
                proved = proof or (self._prove(name, version) if gently else None)
                outcome = self._repository.load(
                    name, version, digest=digest, variant=variant, gently=gently, proof=proved
                )
            except BrokenVersion as error:
                outcome = Refused.by(error)
            done(outcome)

        self.then(work)

    def then(self, work: Callable[[], None]) -> None:
        """Does this when all that it was told before has been loaded."""
        if self._thread:
            self._work.put(work)
        else:
            work()

    def route(self, name: str, route: Route, done: Callable[[], None]) -> None:
        self._repository.route(name, route)
        done()

    def unload(self, name: str, version: int, done: Callable[[], None]) -> None:
        def work() -> None:
            self._repository.unload(name, version)
            done()

        # One that drains must not keep others waiting.
        thread = threading.Thread(target=work, name=f"unload {name}/{version}", daemon=True)
        self._unloading = [each for each in self._unloading if each.is_alive()] + [thread]
        self.then(thread.start)

    def show(self, states: Sequence[ModelState]) -> None:
        self._repository.show(states)

    def _load_all(self) -> None:
        while True:
            work = self._work.get()
            self._busy = True
            try:
                work()
            # The next version must not wait for ever.
            except Exception:
                log.exception("bug in the loader")
            self._busy = False


def leave(status: int, busy: bool) -> None:
    """Ends the process at once where a thread is still at what nothing can interrupt: Python's own end
    would find it in ONNX Runtime, and abort.
    """
    if busy:
        logging.shutdown()
        os._exit(status)
