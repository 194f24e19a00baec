"""Which models and versions exist, which one serves, and how images get through it."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from service import bundle as bundles
from service import images
from service.batcher import Answer, Batch, Batcher
from service.bundle import Bundle
from service.cpu import whole_cores
from service.errors import (
    BrokenVersion,
    InferenceFailed,
    InvalidImage,
    InvalidRequest,
    NotReady,
    UnknownModel,
)
from service.images import Pixels
from service.metrics import Metrics
from service.model import Model
from service.settings import Settings

log = logging.getLogger("convoy.repository")


class Served:
    """A version that answers: its model, its batcher, and the pool that decodes for it."""

    def __init__(
        self,
        bundle: Bundle,
        model: Model,
        decoders: ThreadPoolExecutor,
        metrics: Metrics,
        settings: Settings,
        on_bug: Callable[[BaseException], None],
    ) -> None:
        self.bundle, self.model = bundle, model
        self.name, self.version, self.manifest = bundle.name, bundle.version, bundle.manifest
        self._decoders, self._metrics, self._settings = decoders, metrics, settings
        self._batcher = Batcher(
            model.run,
            self.manifest.pixels.shape,
            self.manifest.max_batch_size,
            on_batch=self._record,
            on_bug=on_bug,
            name=f"batcher {self.name}/{self.version}",
        )

    def _record(self, batch: Batch) -> None:
        self._metrics.batch(self.name, batch.rows, batch.run_s, batch.failed)

    def check_count(self, images: int) -> None:
        """Raises InvalidRequest where these are too many for one request."""
        if images > self._settings.max_images:
            raise InvalidRequest(
                f"{images} images in one request, the limit is {self._settings.max_images}: "
                "send several requests, or a stream"
            )

    async def decode(
        self, inputs: Sequence[bytes | Pixels | InvalidImage]
    ) -> tuple[list[Pixels | InvalidImage], float]:
        """Each input as uint8 `[H, W, C]` pixels of the model's size, or why it can't be read; and
        the seconds until the last was done. Encoded images and pixels may be mixed; one that is
        known to be invalid stays so.
        """
        began = time.monotonic()
        loop, target = asyncio.get_running_loop(), self.manifest.pixels

        async def one(item: bytes | Pixels | InvalidImage) -> Pixels | InvalidImage:
            if isinstance(item, InvalidImage):
                return item
            try:
                if isinstance(item, bytes):
                    return await loop.run_in_executor(
                        self._decoders, images.decode, item, target, self._settings.max_megapixels
                    )
                if item.shape == target.shape:
                    return item
                return await loop.run_in_executor(
                    self._decoders, images.prepare, item, target, self._settings.max_megapixels
                )
            except InvalidImage as error:
                return error

        decoded = await asyncio.gather(*map(one, inputs))
        seconds = time.monotonic() - began
        self._metrics.stage(self.name, "decode", seconds)
        invalid = sum(isinstance(item, InvalidImage) for item in decoded)
        self._metrics.images(self.name, "invalid", invalid)
        return decoded, seconds

    async def run(self, pixels: Pixels, deadline: float | None) -> Answer:
        """Probabilities float32 `[N, classes]` of `pixels` uint8 `[N, H, W, C]`, N at least 1.

        `deadline` is on `time.monotonic`'s clock. Raises DeadlineExceeded, InferenceFailed, NotReady.
        """
        outcome = "failed"
        try:
            answer = await asyncio.wrap_future(self._batcher.submit(pixels, deadline))
            if not np.isfinite(answer.outputs).all():
                log.error("%s/%d gave NaN or infinity", self.name, self.version)
                raise InferenceFailed("the model gave no number for one of these images")
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self._metrics.images(self.name, outcome, len(pixels))
        self._metrics.stage(self.name, "queue", answer.queue_s)
        self._metrics.stage(self.name, "run", answer.run_s)
        return answer

    def close(self) -> None:
        """Finishes what waits."""
        self._batcher.close()


@dataclass
class Entry:
    """A model in the folder: what serves, or why nothing does."""

    name: str
    served: Served | None
    reason: str


class Repository:
    """The models of one folder, each served in its newest version that proves itself."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        metrics: Metrics,
        on_bug: Callable[[BaseException], None] = lambda bug: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Loads every model, or those before `stopping`. Raises BrokenVersion where none at all can
        be served.
        """
        self.folder = folder
        self._settings, self._metrics, self._on_bug = settings, metrics, on_bug
        self._decoders = ThreadPoolExecutor(
            settings.decode_threads or whole_cores(), thread_name_prefix="decode"
        )
        self._entries: dict[str, Entry] = {}
        for name in bundles.names(folder):
            if stopping():
                return
            self._entries[name] = self._load(name)
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

    def _load(self, name: str) -> Entry:
        reasons: list[str] = []
        for version in reversed(bundles.versions(self.folder / name)):
            try:
                bundle = bundles.read(self.folder / name / str(version))
                model = Model.load(bundle, self._settings.device, self._settings.run_threads)
                served = Served(
                    bundle,
                    model,
                    self._decoders,
                    self._metrics,
                    self._settings,
                    self._on_bug,
                )
            # Whatever is wrong with one version, the others and the other models can be served.
            except Exception as error:
                unforeseen = None if isinstance(error, BrokenVersion) else error
                log.error("%s/%d is not served: %s", name, version, error, exc_info=unforeseen)
                reasons.append(str(error) or repr(error))
                continue
            self._metrics.serving(name, version, bundle.sha256, model.device)
            self._metrics.broken_versions(name, len(reasons))
            return Entry(name, served, reasons[0] if reasons else "")
        self._metrics.broken_versions(name, len(reasons))
        return Entry(name, None, reasons[0])

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

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def close(self) -> None:
        """Finishes what waits, in every model."""
        for entry in self._entries.values():
            if entry.served:
                entry.served.close()
        self._decoders.shutdown(cancel_futures=True)
