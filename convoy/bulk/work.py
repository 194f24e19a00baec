"""How one part of a job is done: its images read, decoded, run, and the answers written. It knows
nothing of Ray.
"""

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from itertools import islice
from threading import Semaphore
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from convoy.bulk.job import Image, Job, Part, Place, place
from convoy_service.artifacts import images
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Bundle, Probabilities
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import ConvoyError, InferenceFailed, InvalidImage

# Files that are waited for at once: a store takes its time for each.
_READERS = 16
# Images that a thread takes on together: handing over costs as much as decoding a tiny one.
_GROUP = 16
# Before a file is tried again, where it is not the file that is at fault.
_WAITS_S = (0.5, 2.0, 5.0)
# Where it is: the next time will be no other.
_FOR_GOOD = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EINVAL,
    errno.ENAMETOOLONG, errno.ENXIO,
}  # fmt: skip

T = TypeVar("T")
R = TypeVar("R")


class _Unread(InvalidImage):
    """There are no bytes that could be decoded."""


class _Trouble(ConvoyError):
    """Images can't be had now, which is not their fault."""


class Done(NamedTuple):
    """How many rows were written, how many of them with errors; or what `trouble` there was, so that
    none were.
    """

    rows: int
    errors: int
    trouble: str = ""


class _Batch(NamedTuple):
    keys: list[str]
    # Of the model's largest batch, whatever there is; zeros where there is no image.
    pixels: Pixels
    errors: list[InvalidImage | None]


class Worker:
    """One model, and the threads that read and decode for it."""

    def __init__(
        self,
        job: Job,
        bundle: Bundle,
        device: str = "cpu",
        cores: int = 1,
        *,
        skip_unreadable: bool = False,
        waits_s: tuple[float, ...] = _WAITS_S,
    ) -> None:
        """Raises BrokenVersion where the version does not prove itself here."""
        self._job, self._manifest, self._skip = job, bundle.manifest, skip_unreadable
        # In one size: an answer then does not depend on what else is in the batch.
        self._model = Model.load(
            bundle, device, cores, variant=job.settings["variant"], deterministic=True
        )
        self._root, self._waits_s = place(job.root), waits_s
        self._largest = int(job.settings["max_image_mb"] * 1e6)
        self._threads = cores if job.encoded else max(_READERS, cores)
        self._pool = ThreadPoolExecutor(self._threads)
        # A decoded image may take a hundred times the memory of its file.
        self._decoding = Semaphore(cores)
        self._runner = ThreadPoolExecutor(1)

    def do(self, part: Part) -> Done:
        """Answers a part of the job, and writes the answers in one step."""
        keys: list[str] = []
        errors: list[InvalidImage | None] = []
        answers: list[Probabilities] = []
        try:
            # While the model runs one batch, the next is put together.
            for batch, answer in _ahead(self._runner, self._run, self._batches(part), 2):
                keys += batch.keys
                errors += batch.errors
                answers.append(answer)
            if not self._skip and all(isinstance(error, _Unread) for error in errors):
                raise _Trouble(f"none of its {len(errors)} images can be read: {errors[0]}")
            table = self._table(keys, np.concatenate(answers), errors)
            self._job.place(part).write(table)
        except (ConvoyError, OSError, pa.ArrowException) as error:
            return Done(0, 0, f"part {part.number}: {error}")
        return Done(part.rows, sum(error is not None for error in errors))

    def _batches(self, part: Part) -> Iterator[_Batch]:
        size, shape = self._manifest.max_batch_size, self._manifest.pixels.shape
        batch = _Batch([], np.zeros((size, *shape), np.uint8), [])
        rows = self._job.rows(part)
        groups = iter(lambda: list(islice(rows, _GROUP)), [])
        for group in _ahead(self._pool, self._decode, groups, 2 * self._threads):
            for key, pixels in group:
                if len(batch.keys) == size:
                    yield batch
                    batch = _Batch([], np.zeros((size, *shape), np.uint8), [])
                if isinstance(pixels, InvalidImage):
                    batch.errors.append(pixels)
                else:
                    batch.errors.append(None)
                    batch.pixels[len(batch.keys)] = pixels
                batch.keys.append(key)
        yield batch

    def _decode(self, group: list[tuple[str, Image]]) -> list[tuple[str, Pixels | InvalidImage]]:
        return [(key, self._pixels(image)) for key, image in group]

    def _pixels(self, image: Image) -> Pixels | InvalidImage:
        """Raises _Trouble."""
        target, most = self._manifest.pixels, self._job.settings["max_megapixels"]
        try:
            data = self._read(image) if isinstance(image, str) else image
            if data is None:
                raise _Unread("there is no image in this row")
            self._check_size(len(data))
            with self._decoding:
                return images.decode(data, target, most)
        except InvalidImage as error:
            return error

    def _check_size(self, size: int) -> None:
        if size > self._largest:
            raise InvalidImage(
                f"the image has {size / 1e6:.1f} MB, the limit is {self._largest / 1e6:g} "
                "(--max-image-mb)"
            )

    def _read(self, path: str) -> bytes:
        """What the file holds, which `path` names as seen from the root. Raises InvalidImage, _Trouble."""
        outside = path.startswith("/") or "://" in path
        for wait_s in (*self._waits_s, None):
            try:
                return self._read_once(place(path) if outside else self._root / path)
            except (ValueError, ConvoyError) as error:  # no path at all
                if isinstance(error, InvalidImage):
                    raise
                raise _Unread(f"{path!r}: {error}") from None
            except OSError as error:
                words = f"{path}: {error.strerror or error}"
                if error.errno in _FOR_GOOD or (wait_s is None and self._skip):
                    raise _Unread(words) from None
                if wait_s is None:
                    raise _Trouble(
                        f"{words}; run the job again when it can be read, or with --skip-unreadable"
                    ) from None
                time.sleep(wait_s)
        raise AssertionError

    def _read_once(self, where: Place) -> bytes:
        if where.local:  # Python tells what is wrong by number, pyarrow does not always
            with FileIO(where.path) as file:  # `Path.open` takes four times as long
                size = os.fstat(file.fileno()).st_size
                self._check_size(size)
                return file.read(size)
        with where.files.open_input_file(where.path) as file:
            self._check_size(file.size())
            return bytes(file.read())

    def _run(self, batch: _Batch) -> tuple[_Batch, Probabilities]:
        """The batch, with errors of rows that the model fails on, and its answers.

        Raises InferenceFailed where it fails on all.
        """
        pixels, rows = batch.pixels, range(len(batch.keys))
        try:
            answers = self._model.run(pixels)
        except InferenceFailed:
            # Which row is it? As in the service, that one fails alone.
            answers = np.full((len(pixels), len(self._manifest.labels)), np.nan, np.float32)
            for row in rows:
                alone = np.zeros_like(pixels)
                alone[0] = pixels[row]
                with contextlib.suppress(InferenceFailed):
                    answers[row] = self._model.run(alone)[0]
            if np.isnan(answers).all():
                raise
        good = np.asarray(np.isfinite(answers).all(axis=1))
        for row in rows:
            if not good[row] and batch.errors[row] is None:
                batch.errors[row] = InvalidImage("the model failed on this image")
        return batch, answers[: len(rows)]

    def _table(
        self, keys: list[str], answers: Probabilities, errors: list[InvalidImage | None]
    ) -> bytes:
        """The file of a part's answers."""
        failed = np.array([error is not None for error in errors])
        best = answers.argmax(axis=1)
        probability = answers.max(axis=1)
        unsure = np.zeros(len(keys), bool)
        if thresholds := self._manifest.thresholds:
            unsure = probability < thresholds.limits(answers)
        columns = {
            "key": pa.array(keys, pa.string()),
            "label": pa.DictionaryArray.from_arrays(
                pa.array(best.astype(np.int32), mask=failed), self._manifest.labels
            ),
            "probability": pa.array(probability, mask=failed),
            "unsure": pa.array(unsure, mask=failed),
            "error": pa.array([error and str(error) for error in errors], pa.string()),
            "model": pa.DictionaryArray.from_arrays(
                np.zeros(len(keys), np.int32), [self._job.model]
            ),
            "version": pa.array(np.full(len(keys), self._job.version)),
        }
        if self._job.settings["probabilities"]:
            rows = zip(answers, failed, strict=True)
            columns["probabilities"] = pa.array(
                [None if bad else row for row, bad in rows], pa.list_(pa.float32())
            )
        stream = pa.BufferOutputStream()
        parquet.write_table(pa.table(columns), stream, compression="zstd")
        return bytes(stream.getvalue())


def _ahead(
    pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], most: int
) -> Iterator[R]:
    """What `work` gives for each item, in their order; so many are begun before they are asked for."""
    begun: deque[Future[R]] = deque()
    for item in items:
        begun.append(pool.submit(work, item))
        if len(begun) == most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()
