"""Which models and versions exist, which one serves, and how images get through it."""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from service import bundle as bundles
from service import images
from service.batcher import Answer, Batch, Batcher, BatchTimes
from service.bundle import Bundle
from service.channel import RemoteBatcher
from service.cpu import Budget
from service.device import Card
from service.errors import (
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
from service.images import Pixels
from service.metrics import Metrics
from service.model import Model
from service.settings import Settings
from service.task import Done, Wait

_DECODE_JOBS = 32

T = TypeVar("T")

log = logging.getLogger("convoy.repository")


class Served:
    """A version that answers: its batcher, and the pool that decodes for it."""

    def __init__(
        self,
        bundle: Bundle,
        made: "Made",
        decoders: ThreadPoolExecutor,
        metrics: Metrics,
        settings: Settings,
    ) -> None:
        self.bundle, self.device, self.variant = bundle, made.device, made.variant
        self.batcher = made.batcher
        self.name, self.version, self.manifest = bundle.name, bundle.version, bundle.manifest
        # For each class what its probability must be, or the answer is unsure; None where nothing is.
        self.thresholds: list[float] | None = None
        if thresholds := self.manifest.thresholds:
            self.thresholds = [max(thresholds.unsure, own) for own in thresholds.per_class]
            metrics.unsure(self.name, 0)
        self._decoders, self._metrics, self._settings = decoders, metrics, settings
        self.image_bytes = math.prod(self.manifest.pixels.shape)
        self._decode_s = metrics.stage(self.name, "decode")
        self._queue_s = metrics.stage(self.name, "queue")
        self._run_s = metrics.stage(self.name, "run")

    def check_count(self, images: int) -> None:
        """Raises InvalidRequest where these are too many for one request."""
        if images > self._settings.max_images:
            raise InvalidRequest(
                f"{images} images in one request, the limit is {self._settings.max_images}: "
                "send several requests, or a stream"
            )

    async def decode(
        self, inputs: Sequence[bytes | Pixels | InvalidImage], deadline: float | None
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
            self._check_time(len(inputs), deadline)
            decode = partial(_decode, self.manifest.pixels, self._settings.max_megapixels)
            decoded = await Wait(
                lambda done: _Decoding(inputs, decode, self._decoders, deadline, done)
            )
        seconds = time.monotonic() - began
        self._decode_s.observe(seconds)
        invalid = sum(isinstance(item, InvalidImage) for item in decoded)
        self._metrics.images(self.name, "invalid", invalid)
        return decoded, seconds

    def count_unsure(self, images: int) -> None:
        """So many were answered as unsure."""
        self._metrics.unsure(self.name, images)

    async def aside(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises, done on the pool: what would keep other calls waiting."""
        result: T = await Wait(lambda done: _Aside(work, self._decoders, done))
        return result

    def _check_time(self, images: int, deadline: float | None) -> None:
        wait_s = self.batcher.wait_s(images)
        left_s = math.inf if deadline is None else deadline - time.monotonic()
        if wait_s > left_s:
            self._metrics.images(self.name, "refused", images)
            raise Overloaded(
                f"this would take about {wait_s:.2g} s, the deadline leaves {left_s:.2g} s: "
                "back off, then retry",
                wait_s - left_s,
            )

    async def run(self, pixels: Pixels, deadline: float | None, priority: int = 0) -> Answer:
        """Probabilities float32 `[N, classes]` of `pixels` uint8 `[N, H, W, C]`, N at least 1; NaN
        in the rows that the model failed on.

        `deadline` is on `time.monotonic`'s clock. Raises Overloaded, DeadlineExceeded, Cancelled,
        InferenceFailed, NotReady.
        """
        submit, metrics, name = self.batcher.submit, self._metrics, self.name
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
        failed = answer.failed_rows
        metrics.images(name, "ok", len(pixels) - failed)
        if failed:
            metrics.images(name, "failed", failed)
        self._queue_s.observe(answer.queue_s)
        self._run_s.observe(answer.run_s)
        return answer

    def close(self) -> None:
        """Finishes what waits."""
        self.batcher.close()


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


class _Aside:
    def __init__(self, work: Callable[[], T], pool: ThreadPoolExecutor, done: Done[T]) -> None:
        def run() -> None:
            try:
                done(work())
            except Exception as error:
                done(error)

        pool.submit(run)

    def cancel(self) -> None:
        """It is not waited for in vain: what is begun is finished."""


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


@dataclass
class Entry:
    """A model in the folder: what serves, or why nothing does."""

    name: str
    served: Served | None
    reason: str
    # Newer versions that did not prove themselves.
    broken: int


def runs_here(
    settings: Settings,
    budget: Budget,
    metrics: Metrics,
    on_bug: Callable[[BaseException], None],
    pins: "Mapping[str, Pin] | None" = None,
) -> "Make":
    """What makes a batcher with a model in this process, which has proved itself and knows how long
    its batches take. `pins`: what other processes decided, whose variants are taken.
    """

    def make(bundle: Bundle) -> Made:
        name, size = bundle.name, bundle.manifest.max_batch_size
        pin = (pins or {}).get(name)
        wanted = pin.variant if pin and pin.variant else settings.variant
        model = Model.load(
            bundle,
            settings.device,
            budget.run_threads,
            variant=wanted,
            card=Card(settings.gpu_memory_mb, settings.cuda_graphs),
            deterministic=settings.deterministic,
        )
        if model.fallback:
            log.warning("%s/%d %s", name, bundle.version, model.fallback)
        if wanted not in ("fastest", model.variant):
            log.warning(
                "%s/%d has no variant %s: serves %s",
                name, bundle.version, wanted, model.variant,
            )  # fmt: skip
        times = BatchTimes(size)
        model.measure(bundle, times.record)

        def record(batch: Batch) -> None:
            metrics.batch(name, batch.rows, batch.run_s, batch.failed, batch.late_rows)

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
            on_bug=on_bug,
            name=f"batcher {name}/{bundle.version}",
        )
        return Made(model.device, model.variant, batcher, model.fallback)

    return make


class Made(NamedTuple):
    """The batcher of a version, the device that its batches run on, in which variant, and why, where
    that is not what was preferred.
    """

    device: str
    variant: str
    batcher: Batcher | RemoteBatcher
    fallback: str = ""


class Pin(NamedTuple):
    """The version of a model that serves, 0 for none, on which device, in which variant; what is
    wrong, and with how many newer versions.
    """

    version: int
    device: str
    variant: str
    reason: str
    broken: int

    @property
    def decided(self) -> tuple[int, str]:
        """What is the same in all processes; each may have a card of its own."""
        return self.version, self.variant


def serving(pins: Mapping[str, Pin]) -> str:
    """What serves, for a person to read."""
    return ", ".join(
        f"{name}/{pin.version} on {pin.device}"
        + (f" in {pin.variant}" if pin.variant != "fp32" else "")
        for name, pin in pins.items()
        if pin.version
    )


# Raises BrokenVersion.
Make = Callable[[Bundle], Made]


class Repository:
    """The models of one folder, each served in its newest version that proves itself."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        budget: Budget,
        metrics: Metrics,
        make: Make,
        *,
        pins: "Mapping[str, Pin] | None" = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Loads every model, or those before `stopping`. `pins`: models and their versions, where
        that has been decided. Raises BrokenVersion where none at all can be served.
        """
        self.folder = folder
        self._settings, self._metrics, self._make = settings, metrics, make
        self._decoders = ThreadPoolExecutor(budget.decode_threads, thread_name_prefix="decode")
        self._entries: dict[str, Entry] = {}
        for name in bundles.names(folder) if pins is None else pins:
            if stopping():
                return
            if pins is None:
                entry = self._load(name, bundles.versions(folder / name)[::-1])
            else:
                pin = pins[name]
                entry = self._load(name, [pin.version] if pin.version else [])
                entry = replace(
                    entry, reason=pin.reason or entry.reason, broken=pin.broken + entry.broken
                )
            self._entries[name] = entry
            metrics.broken_versions(name, entry.broken)
        if not self._entries:
            raise BrokenVersion(
                f"no models in {folder}: train one with `convoy train --models {folder}`, "
                f"or add one with `convoy models add NAME file.onnx --models {folder}`"
            )
        if not any(entry.served for entry in self._entries.values()):
            reasons = "; ".join(entry.reason for entry in self._entries.values())
            raise BrokenVersion(f"no model in {folder} can be served: {reasons}")
        # Links too: one that leads nowhere is no folder.
        ignored = sorted(
            each.name
            for each in folder.iterdir()
            if (each.is_dir() or each.is_symlink())
            and each.name not in self._entries
            and not each.name.startswith(".")
        )
        if ignored:
            log.warning(
                "not taken for models: %s; a model is a folder with a folder for each version in it "
                "(1, 2, ...), named by letters, digits, '.', '_' and '-'",
                ", ".join(map(repr, ignored)),
            )

    def _load(self, name: str, versions: Sequence[int]) -> Entry:
        reasons: list[str] = []
        for version in versions:
            try:
                bundle = bundles.read(self.folder / name / str(version))
                made = self._make(bundle)
            # Whatever is wrong with one version, the others and the other models can be served.
            except Exception as error:
                unforeseen = None if isinstance(error, BrokenVersion) else error
                log.error("%s/%d is not served: %s", name, version, error, exc_info=unforeseen)
                reasons.append(str(error) or repr(error))
                continue
            served = Served(bundle, made, self._decoders, self._metrics, self._settings)
            self._metrics.serving(name, version, bundle.sha256, made.device, made.variant)
            self._metrics.fallback(name, bool(made.fallback))
            reason = "; ".join(filter(None, (*reasons[:1], made.fallback)))
            return Entry(name, served, reason, len(reasons))
        reason = reasons[0] if reasons else "no version of it works"
        return Entry(name, None, reason, len(reasons))

    def get(self, name: str, version: int = 0) -> Served:
        """What answers for model `name` (empty: the only one there is), `version` (0: any).

        Raises UnknownModel, or NotReady where the model has no version that works.
        """
        if not name and len(self._entries) == 1:
            name = next(iter(self._entries))
        entry = self._entries.get(name)
        if entry is None:
            missing = f"no model {name!r} here" if name else "several models are served: name one"
            raise UnknownModel(f"{missing}; there is: {', '.join(self._entries)}")
        if entry.served is None:
            raise NotReady(f"model {name!r} has no version that works; the server's log says why")
        if version not in (0, entry.served.version):
            raise UnknownModel(
                f"version {version} of model {name!r} is not served: "
                f"use version {entry.served.version}, or leave it out"
            )
        return entry.served

    def check(self, deadline: float | None) -> None:
        """Raises Overloaded where no model can take on a single image more by then."""
        refusal: Overloaded | None = None
        for entry in self._entries.values():
            if entry.served is not None:
                try:
                    entry.served.batcher.check(deadline)
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
        return list(self._entries.values())

    def pins(self) -> "dict[str, Pin]":
        """What was decided here, for other processes to do the same."""
        return {
            name: Pin(
                entry.served.version,
                entry.served.device,
                entry.served.variant,
                entry.reason,
                entry.broken,
            )
            if entry.served
            else Pin(0, "", "", entry.reason, entry.broken)
            for name, entry in self._entries.items()
        }

    def close(self) -> None:
        """Finishes what waits, in every model."""
        for entry in self._entries.values():
            if entry.served:
                entry.served.close()
        self._decoders.shutdown(cancel_futures=True)
