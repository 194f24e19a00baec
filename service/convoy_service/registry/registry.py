"""Which versions of which models this process has loaded, which of them answers whom, and how images
get through them.
"""

import ctypes
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from convoy_service.artifacts import images
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Bundle, Probabilities
from convoy_service.engine.batcher import Answer, Batch, Batcher, BatchTimes
from convoy_service.engine.cpu import Budget
from convoy_service.engine.isolated_verifier import Proof
from convoy_service.engine.onnx_model import Model
from convoy_service.engine.session import Card
from convoy_service.errors import (
    BACK_OFF,
    BrokenVersion,
    Cancelled,
    ConvoyError,
    DeadlineExceeded,
    InvalidImage,
    InvalidRequest,
    NotReady,
    Overloaded,
    UnknownModel,
)
from convoy_service.ipc.engine_client import RemoteBatcher
from convoy_service.registry.shadow_runner import Trials, Version
from convoy_service.rollout.canary import Canary, Decision, position
from convoy_service.settings import Settings
from convoy_service.tasks import Done, Wait, elsewhere, ignore
from convoy_service.telemetry.counters import Metrics

if TYPE_CHECKING:
    from convoy_service.telemetry.tracing import Trace  # needs OpenTelemetry

_DECODE_JOBS = 32

T = TypeVar("T")

log = logging.getLogger("convoy.repository")


class Answered(NamedTuple):
    """Images that a version has answered: for each row its encoded bytes or pixels as they came,
    the `pixels` uint8 `[N, H, W, C]` that it ran on, its `probabilities` float32 `[N, classes]` (NaN
    in rows that it failed on), and whether these are `unsure`, bool `[N]`.
    """

    served: "Served"
    inputs: Sequence[bytes | Pixels]
    pixels: Pixels
    probabilities: Probabilities
    unsure: npt.NDArray[np.bool_]


# Hears of what was answered, on the thread that callers wait for: it must be cheap, or hand on to a
# bounded queue and drop what that does not take.
Observer = Callable[[Answered], None]


class Served:
    """A version that answers: its batcher, and the pool that decodes for it.

    `with repository.take(...) as served` keeps it until the request is over.
    """

    def __init__(
        self,
        bundle: Bundle,
        made: "Made",
        decoders: ThreadPoolExecutor,
        metrics: Metrics,
        settings: Settings,
        observers: "Sequence[Observer]" = (),
    ) -> None:
        self.bundle, self.device, self.variant = bundle, made.device, made.variant
        self.fallback = made.fallback
        self.batcher, self._free = made.batcher, made.free
        # Requests that are on it. Only the thread of those changes the number.
        self._users = 0
        self._leaving = False
        self._unused = threading.Event()
        self._observers, self._failed_observers = observers, set[Observer]()
        self.name, self.version, self.manifest = bundle.name, bundle.version, bundle.manifest
        if self.manifest.thresholds:
            metrics.unsure(self.name, 0)
        self._decoders, self._metrics, self._settings = decoders, metrics, settings
        metrics.observer_failed(self.name, 0)
        self.image_bytes = math.prod(self.manifest.pixels.shape)
        self._decode_s = metrics.stage(self.name, "decode")
        self._queue_s = metrics.stage(self.name, "queue")
        self._run_s = metrics.stage(self.name, "run")
        # For whoever knows how they end.
        self.requests = metrics.requests_to(self.name, self.version)

    def check_count(self, images: int) -> None:
        """Raises InvalidRequest where these are too many for one request."""
        if images > self._settings.max_images:
            raise InvalidRequest(
                f"{images} images in one request, the limit is {self._settings.max_images}: "
                "send several requests, or a stream"
            )

    async def decode(
        self,
        inputs: Sequence[bytes | Pixels | InvalidImage],
        deadline: float | None,
        trace: "Trace | None" = None,
    ) -> tuple[list[Pixels | InvalidImage], float]:
        """Each input as uint8 `[H, W, C]` pixels of the model's size, or why it can't be read; and
        the seconds until the last was done. Encoded images and pixels may be mixed; one that is
        known to be invalid stays so.

        Raises Overloaded, before it decodes any, where they could not be answered in time.
        """
        began, shape = time.monotonic(), self.manifest.pixels.shape
        decoded: list[Pixels | InvalidImage]
        if all(isinstance(item, np.ndarray) and item.shape == shape for item in inputs):
            decoded = list(inputs)  # type: ignore[arg-type]
        else:
            if trace is not None:
                trace.decodes(self.name, self.version, len(inputs))
            self._check_time(len(inputs), deadline)
            decode = partial(_decode, self.manifest.pixels, self._settings.max_megapixels)
            decoded = await Wait(
                lambda done: _Decoding(inputs, decode, self._decoders, deadline, done)
            )
            if trace is not None:
                trace.decoded()
        seconds = time.monotonic() - began
        self._decode_s.observe(seconds)
        invalid = sum(isinstance(item, InvalidImage) for item in decoded)
        self._metrics.images(self.name, "invalid", invalid)
        return decoded, seconds

    def unsure(self, probabilities: Probabilities) -> npt.NDArray[np.bool_]:
        """Which of the answers float32 `[N, classes]` are unsure, `[N]`; NaN is no answer."""
        thresholds = self.manifest.thresholds
        if thresholds is None:
            return np.zeros(len(probabilities), np.bool_)
        # Not `not >=`: that is True for NaN.
        found: npt.NDArray[np.bool_] = probabilities.max(axis=1) < thresholds.limits(probabilities)
        return found

    def count_unsure(self, images: int) -> None:
        """So many were answered as unsure."""
        self._metrics.unsure(self.name, images)

    @property
    def observed(self) -> bool:
        """Whether anyone wants to hear of `answered`."""
        return bool(self._observers)

    def answered(
        self,
        inputs: Sequence[bytes | Pixels],
        pixels: Pixels,
        probabilities: Probabilities,
        unsure: npt.NDArray[np.bool_],
    ) -> None:
        """Tells the observers what was answered: see `Answered`."""
        told = Answered(self, inputs, pixels, probabilities, unsure)
        for observer in self._observers:
            try:
                observer(told)
            # The caller has his answer, whatever becomes of those who look on.
            except Exception:
                self._metrics.observer_failed(self.name)
                if observer not in self._failed_observers:
                    self._failed_observers.add(observer)
                    log.exception("an observer failed; it is not logged again")

    async def aside(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done on the pool: what would keep other calls waiting."""
        return await elsewhere(work, self._decoders.submit)

    def _check_time(self, images: int, deadline: float | None) -> None:
        wait_s = self.batcher.wait_s(images)
        left_s = math.inf if deadline is None else deadline - time.monotonic()
        if wait_s > left_s:
            self._metrics.images(self.name, "refused", images)
            raise Overloaded(
                f"this would take about {wait_s:.2g} s, the deadline leaves {left_s:.2g} s: "
                f"{BACK_OFF}",
                wait_s - left_s,
            )

    async def run(
        self,
        pixels: Pixels,
        deadline: float | None,
        priority: int = 0,
        trace: "Trace | None" = None,
    ) -> Answer:
        """Probabilities float32 `[N, classes]` of `pixels` uint8 `[N, H, W, C]`, N at least 1; NaN
        in the rows that the model failed on.

        `deadline` is on `time.monotonic`'s clock. Raises Overloaded, DeadlineExceeded, Cancelled,
        InferenceFailed, NotReady.
        """
        submit, metrics, name = self.batcher.submit, self._metrics, self.name
        if trace is not None:
            trace.queues(name, self.version, len(pixels))
        try:
            answer: Answer = await Wait(
                lambda done: submit(pixels, done, deadline=deadline, priority=priority)
            )
        except Exception as error:
            outcome = _OUTCOMES.get(type(error), "failed")
            # gRPC itself cancels a call when its deadline passes.
            if outcome == "cancelled" and deadline is not None and deadline <= time.monotonic():
                outcome = "late"
            metrics.images(name, outcome, len(pixels))
            raise
        if trace is not None:
            trace.answered(answer)
        failed = answer.failed_rows
        metrics.images(name, "ok", len(pixels) - failed)
        if failed:
            metrics.images(name, "failed", failed)
        self._queue_s.observe(answer.queue_s)
        self._run_s.observe(answer.run_s)
        return answer

    # Its end.

    def enter(self) -> bool:
        """Keeps it for a request; False where it is too late."""
        self._users += 1
        if not self._leaving:
            return True
        self.__exit__()
        return False

    def __enter__(self) -> "Served":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        value: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        self._users -= 1
        if self._leaving and not self._users:
            self._unused.set()

    def drain(self) -> None:
        """Takes no more requests, and returns when those that it has are over."""
        self._leaving = True
        # A request that came before sees to it that this ends; one that comes now has seen it.
        if self._users:
            self._unused.wait()

    def close(self) -> None:
        """Finishes what waits, and lets go of the model."""
        self.batcher.close()
        self._free()


_OUTCOMES: dict[type[Exception], str] = {
    Overloaded: "refused",
    DeadlineExceeded: "late",
    Cancelled: "cancelled",
}


def _decode(
    target: images.Target, max_megapixels: float, item: bytes | Pixels | InvalidImage
) -> Pixels | InvalidImage:
    try:
        if isinstance(item, bytes):
            return images.decode(item, target, max_megapixels)
        if isinstance(item, InvalidImage):
            return item
        return images.prepare(item, target, max_megapixels)
    except InvalidImage as error:
        return error


class _Decoding:
    """The images of one request on their way through the pool, a few jobs of neighbours each."""

    def __init__(
        self,
        inputs: Sequence[bytes | Pixels | InvalidImage],
        decode: Callable[[bytes | Pixels | InvalidImage], Pixels | InvalidImage],
        pool: ThreadPoolExecutor,
        deadline: float | None,
        done: Done[list[Pixels | InvalidImage]],
    ) -> None:
        self._inputs, self._decode, self._done = inputs, decode, done
        self._deadline = math.inf if deadline is None else deadline
        self._decoded: list[Any] = [None] * len(inputs)
        self._lock = threading.Lock()
        self._error: Exception | None = None
        # Images of a request are decoded side by side; more jobs than these would only cost.
        size = -(-len(inputs) // _DECODE_JOBS)
        starts = range(0, len(inputs), size)
        self._jobs = len(starts)
        for start in starts:
            pool.submit(self._work, start, start + size)

    def cancel(self) -> None:
        """Those that are not begun are left out; `done` hears Cancelled when the others are over."""
        self._error = Cancelled("the caller hung up")

    def _work(self, start: int, stop: int) -> None:
        try:
            for number in range(start, min(stop, len(self._inputs))):
                if self._error is None and time.monotonic() >= self._deadline:
                    self._error = DeadlineExceeded("the deadline passed while images were decoded")
                if self._error is not None:
                    break
                self._decoded[number] = self._decode(self._inputs[number])
        # A bug is the request's, not the pool's, which would keep it to itself.
        except Exception as error:
            self._error = error
        with self._lock:
            self._jobs -= 1
            last = not self._jobs
        if last:
            self._done(self._error or self._decoded)


class Made(NamedTuple):
    """The batcher of a version, the device that its batches run on, in which variant, and why, where
    that is not what was preferred. `free` lets go of its memory, when the batcher is closed.
    """

    device: str
    variant: str
    batcher: Batcher | RemoteBatcher
    fallback: str = ""
    free: Callable[[], None] = lambda: None


class Make(Protocol):
    def __call__(
        self,
        bundle: Bundle,
        variant: str = "",
        gently: bool = False,
        proof: Proof | None = None,
    ) -> Made:
        """A batcher for the version, when it has proved itself. `variant`: which graph, where others
        have decided that; `gently`: others are served meanwhile; `proof`: of another process on this
        machine. Raises BrokenVersion.
        """


def runs_here(
    settings: Settings,
    budget: Budget,
    metrics: Metrics,
    on_bug: Callable[[BaseException], None],
    trials: Trials | None = None,
) -> Make:
    """What makes a batcher with a model in this process, which has proved itself and knows how long
    its batches take. `trials` get to see the batches.
    """
    trials = trials or Trials(settings, metrics)

    def make(
        bundle: Bundle, variant: str = "", gently: bool = False, proof: Proof | None = None
    ) -> Made:
        name, version, size = bundle.name, bundle.version, bundle.manifest.max_batch_size
        wanted = variant or settings.variant
        model = Model.load(
            bundle,
            settings.device,
            budget.run_threads,
            variant=wanted,
            card=Card(settings.gpu_memory_mb, settings.cuda_graphs),
            deterministic=settings.deterministic,
            gently=gently,
            proved=proof is not None,
        )
        if proof:
            model.fallback = model.fallback or proof.fallback
        if model.fallback:
            log.warning("%s/%d %s", name, bundle.version, model.fallback)
        if wanted not in ("fastest", model.variant):
            log.warning(
                "%s/%d has no variant %s: serves %s",
                name, bundle.version, wanted, model.variant,
            )  # fmt: skip
        times = BatchTimes(size)
        if proof:
            # Shared out evenly, at best. Every run mends it.
            for rows, seconds in proof.seconds:
                times.record(rows, seconds / budget.run_threads)
        else:
            model.measure(bundle, times.record, gently=gently)

        ran, counting = metrics.batches_of(name, version).ran, threading.Lock()

        def record(batch: Batch) -> None:
            with counting:  # the threads of several lanes
                metrics.batch(name, batch.rows, batch.run_s, batch.failed, batch.late_rows)
                if not batch.failed:
                    ran(batch.rows, batch.gather_s, batch.run_s, batch.split_s)
            trials.ran(name, version, batch)

        batcher = Batcher(
            model.run,
            bundle.manifest.pixels.shape,
            size,
            times=times,
            max_wait_s=settings.max_wait_s,
            sizes=model.sizes,
            buffer=model.buffer,
            lanes=model.lanes,
            on_batch=record,
            on_rows=lambda rows: trials.offer(name, version, rows),
            on_bug=on_bug,
            name=f"batcher {name}/{bundle.version}",
        )
        return Made(model.device, model.variant, batcher, model.fallback, model.close)

    return make


class Loaded(NamedTuple):
    """A version that a process has loaded: on which device, in which variant, why not otherwise, and
    which contents these were (`Bundle.digest`).
    """

    device: str
    variant: str
    fallback: str
    digest: str


class Route(NamedTuple):
    """Which version answers requests that name none: `stable`, 0 for none; but a `share` of them
    `candidate`. It is compared with the stable one as `canary` says; with `shadow`, only that.
    `labels` are names for versions.
    """

    stable: int = 0
    candidate: int = 0
    share: float = 0.0
    shadow: bool = False
    labels: tuple[tuple[str, int], ...] = ()
    canary: Canary | None = None


class VersionState(NamedTuple):
    """What has become of a version, and why; and what its manifest says."""

    version: int
    state: str
    reason: str = ""
    created: str = ""
    sha256: str = ""
    accuracy: float | None = None
    test_images: int = 0


class ModelState(NamedTuple):
    """What the Director knows of a model: `versions`, oldest first; its `policy`, for a person to
    read; what is wrong as a whole; and how the trial of its candidate stands.
    """

    name: str
    versions: tuple[VersionState, ...] = ()
    policy: str = ""
    reason: str = ""
    trial: Decision | None = None


# States of a version.
INCOMPLETE = "incomplete"  # not whole yet
IDLE = "idle"  # whole, and not asked for
LOADING = "loading"  # read, loaded, proved and warmed
READY = "ready"  # can be asked
STANDBY = "standby"  # was replaced, and is kept warm for a way back
DRAINING = "draining"  # finishes the requests that it has
BROKEN = "broken"  # refused

# Of a model none of whose versions is asked for.
UNLOADED = "unloaded: its versions.toml asks for none"


class Entry(NamedTuple):
    """A model: the version that answers those who name none, or why nothing does, or why a newer one
    does not; its route, and what is known of each version.
    """

    name: str
    served: Served | None
    reason: str
    route: Route
    state: ModelState


class _Model(NamedTuple):
    """Never changed, only replaced: requests look at it while it is."""

    route: Route
    versions: Mapping[int, Served]
    labels: Mapping[str, int]
    stable: Served | None
    candidate: Served | None
    split: float  # below it, a request goes to the candidate


_NOTHING = _Model(Route(), {}, {}, None, None, 0.0)


def _model(route: Route, versions: Mapping[int, Served]) -> _Model:
    candidate = versions.get(route.candidate)
    split = route.share if candidate else 0.0
    return _Model(route, versions, dict(route.labels), versions.get(route.stable), candidate, split)


class Repository:
    """The versions that this process has loaded, and which of them answers whom. What it loads, routes
    and unloads is decided elsewhere: see `life.Director`.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        budget: Budget,
        metrics: Metrics,
        make: Make,
        trials: Trials | None = None,
    ) -> None:
        """`trials`: where the batches run in this process."""
        self.folder = folder
        # Called for whatever is answered: see `Served.answered`.
        self.observers: list[Observer] = []
        self._settings, self._metrics, self._make = settings, metrics, make
        self._trials = trials
        self._decoders = ThreadPoolExecutor(budget.decode_threads, thread_name_prefix="decode")
        self._models: dict[str, _Model] = {}
        self._states: dict[str, ModelState] = {}
        self._changing = threading.Lock()
        self._start: Callable[[Served], None] = ignore
        self._stop: Callable[[Served], None] = ignore
        self._changed: Callable[[], None] = ignore

    def attach(
        self,
        start: Callable[[Served], None],
        stop: Callable[[Served], None],
        changed: Callable[[], None],
    ) -> None:
        """From now on each version that is loaded, and those that are already, is handed to `start`
        before it can be asked, and to `stop` when nobody asks it any more; `changed` hears that
        something has changed. They are called on the threads that load and unload.
        """
        with self._changing:
            for model in self._models.values():
                for served in model.versions.values():
                    start(served)
            self._start, self._stop, self._changed = start, stop, changed

    # The Director's verbs.

    def load(
        self,
        name: str,
        version: int,
        *,
        digest: str = "",
        variant: str = "",
        gently: bool = False,
        proof: Proof | None = None,
    ) -> Loaded:
        """Loads a version aside, has it prove itself, and warms it: then it can be asked by its
        number. One that is loaded stays as it is.

        `digest`: only these contents; `variant`: which graph, where others have decided that;
        `gently`: in a small share of the CPU; `proof`: it has proved itself in another process of
        this machine. Raises BrokenVersion.
        """
        if proof:
            digest, variant = digest or proof.digest, variant or proof.variant
        known = self._models.get(name, _NOTHING).versions.get(version)
        if known and variant in ("", known.variant):
            return _loaded(known, digest)
        if known:
            self.unload(name, version)
        try:
            bundle = bundles.read(self.folder / name / str(version))
            bundle.check(digest)
            made = self._make(bundle, variant, gently, proof)
        except BrokenVersion:
            raise
        # Whatever is wrong with one version, the others and the other models can be served.
        except Exception as error:
            log.exception("%s/%d can't be loaded", name, version)
            raise BrokenVersion(str(error) or repr(error)) from error
        lean = bundles.without_graphs(bundle)
        served = Served(lean, made, self._decoders, self._metrics, self._settings, self.observers)
        with self._changing:
            try:
                self._start(served)
            except ValueError as error:
                served.close()
                raise BrokenVersion(str(error)) from error
            model = self._models.get(name, _NOTHING)
            self._set(name, model.route, {**model.versions, version: served})
        self._metrics.serving(
            name, version, bundle.sha256, made.device, made.variant, made.batcher.queued
        )
        self._tell_fallback(name)
        self._changed()
        return _loaded(served, digest)

    def route(self, name: str, route: Route) -> None:
        """From now on requests for the model go there."""
        with self._changing:
            self._set(name, route, self._models.get(name, _NOTHING).versions)
        self._tell_fallback(name)
        self._changed()

    def _tell_fallback(self, name: str) -> None:
        if served := self._models[name].stable:
            self._metrics.fallback(name, bool(served.fallback))

    def unload(self, name: str, version: int) -> None:
        """Gives up a version: returns when the requests that are on it are over, and its memory is
        free.
        """
        with self._changing:
            model = self._models.get(name, _NOTHING)
            served = model.versions.get(version)
            if served is None:
                return
            left = {number: each for number, each in model.versions.items() if number != version}
            self._set(name, model.route, left)
        self._changed()
        served.drain()
        self._stop(served)
        served.close()
        self._metrics.not_serving(
            name, version, served.bundle.sha256, served.device, served.variant
        )
        del served
        _trim()

    def _set(self, name: str, route: Route, versions: Mapping[int, Served]) -> None:
        """The lock is held."""
        model = _model(route, versions)
        self._models = {**self._models, name: model}
        if self._trials:
            arms = [
                Version(served.bundle, served.variant, served.device) if served else None
                for served in (model.stable, model.candidate)
            ]
            self._trials.set(name, arms[0], arms[1], route.canary or Canary())

    def show(self, states: Sequence[ModelState]) -> None:
        """What is known of all models, for those who ask."""
        with self._changing:
            self._states = {state.name: state for state in states}
            for name in [n for n, m in self._models.items() if not m.versions]:
                if name not in self._states:
                    self._models = {n: m for n, m in self._models.items() if n != name}
                    self._metrics.forget(name)
        self._changed()

    # What requests ask.

    def get(
        self, name: str, version: int | str = 0, key: Callable[[], str | None] | None = None
    ) -> Served:
        """What answers for model `name` (empty: the only one there is) in this `version`, a number or
        a label; without one (0 or empty) by the model's route. While that has a candidate, requests
        of one `key` always get the same one of both; without a key chance decides.

        Raises UnknownModel, or NotReady where the model has no version that works.
        """
        model = self._models.get(name)
        if model is None or not model.versions:
            name, model = self._find(name)
        if version:
            return self._named(name, model, version)
        if model.candidate and model.split:
            known = key() if key else None
            if position(known, f"{name}/{model.route.candidate}") < model.split:
                return model.candidate
        if model.stable is None:
            raise self._not_ready(name)
        return model.stable

    def take(
        self, name: str, version: int | str = 0, key: Callable[[], str | None] | None = None
    ) -> Served:
        """As `get`; `with` it, for as long as the request is on it: so long it stays."""
        while True:
            served = self.get(name, version, key)
            if served.enter():
                return served

    def candidate(self, name: str) -> Served | None:
        """The version that gets a share of the requests, or a copy of some."""
        return self._models.get(name, _NOTHING).candidate

    def _find(self, name: str) -> tuple[str, _Model]:
        """A model by its name, or the only one there is."""
        names = list(self._states or self._models)
        if not name and len(names) == 1:
            name = names[0]
        if name not in names and not self._models.get(name, _NOTHING).versions:
            missing = f"no model {name!r} here" if name else "several models are served: name one"
            raise UnknownModel(f"{missing}; there is: {', '.join(names)}")
        return name, self._models.get(name, _NOTHING)

    def _named(self, name: str, model: _Model, version: int | str) -> Served:
        number = version if isinstance(version, int) else model.labels.get(version, 0)
        if not number:
            known = ", ".join(sorted(model.labels)) or "none"
            raise UnknownModel(f"model {name!r} has no version {version!r}; its labels: {known}")
        served = model.versions.get(number)
        if served is not None:
            return served
        if not model.versions:
            raise self._not_ready(name)
        there = ", ".join(map(str, sorted(model.versions)))
        raise UnknownModel(
            f"version {number} of model {name!r} is not served: use version {there}, or leave it out"
        )

    def versions(self, name: str) -> list[int]:
        """Those of a model that can be asked, oldest first."""
        return sorted(self._models.get(name, _NOTHING).versions)

    def loaded(self, name: str = "") -> list[tuple[str, int]]:
        """The versions of model `name`, or of all models, that can be asked. Raises UnknownModel."""
        names = [self._find(name)[0]] if name else sorted(self._models)
        return [(each, version) for each in names for version in self.versions(each)]

    def _not_ready(self, name: str) -> NotReady:
        if self._states.get(name, ModelState(name)).reason == UNLOADED:
            return NotReady(f"model {name!r} is {UNLOADED}")
        return NotReady(f"model {name!r} has no version that works; the server's log says why")

    def check(self, deadline: float | None) -> None:
        """Raises Overloaded where no model can take on a single image more by then."""
        refusal: Overloaded | None = None
        for model in self._models.values():
            if model.stable is not None:
                try:
                    model.stable.batcher.check(deadline)
                except Overloaded as error:
                    refusal = error
                    continue
                # Whatever else is wrong is for those to hear who ask for this model.
                except ConvoyError:
                    pass
                return
        if refusal is not None:
            raise refusal

    def entries(self) -> list[Entry]:
        """All models, those that nothing serves too."""
        models, states = self._models, self._states
        entries = []
        for name in dict.fromkeys((*states, *models)):
            model, state = models.get(name, _NOTHING), states.get(name, ModelState(name))
            stable = model.stable.version if model.stable else 0
            broken = [
                each.reason
                for each in reversed(state.versions)
                if each.version > stable and each.state in (BROKEN, INCOMPLETE)
            ]
            reasons = [state.reason, *broken[:1], model.stable.fallback if model.stable else ""]
            reason = "; ".join(filter(None, reasons))
            if not model.stable:
                reason = reason or "no version of it works"
            entries.append(Entry(name, model.stable, reason, model.route, state))
        return entries

    @property
    def busy(self) -> bool:
        """A thread is at what can't be interrupted, though it was told to end."""
        return self._trials is not None and self._trials.busy

    def close(self) -> None:
        """Finishes what waits, in every version."""
        if self._trials:
            self._trials.close()
        for model in self._models.values():
            for served in model.versions.values():
                served.close()
        self._decoders.shutdown(cancel_futures=True)


def _loaded(served: Served, digest: str) -> Loaded:
    served.bundle.check(digest)
    return Loaded(served.device, served.variant, served.fallback, served.bundle.digest)


def _trim() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
