"""The feedback store: some of what was asked, and all that was answered unsurely, kept in Parquet
files to be labelled and trained on (docs/feedback.md).

No request waits or fails for it: rows are noted on the loop's thread, and a thread writes
them as well as it can. What it can't keep up with is left out, and counted.
"""

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import logging
import math
import os
import random
import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from convoy_service.artifacts import images
from convoy_service.artifacts.files import replacing
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Probabilities
from convoy_service.backoff import Backoff
from convoy_service.duty_cycle import DutyCycle
from convoy_service.errors import ConvoyError
from convoy_service.registry.registry import Answered, Observer
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics

log = logging.getLogger("convoy.feedback")

# A file is written when so many bytes wait for it, or this part of the folder's bound.
_FILE_BYTES, _FILES = 16_000_000, 8
# So many bytes may wait, as files: one that is written, one that gathers.
_HELD_FILES = 2
# What a row takes beside its image and probabilities, roughly.
_ROW_BYTES = 400
# Rows become Arrow's in parts so small, as that holds the interpreter's lock.
_PART_BYTES, _PART_ROWS = 250_000, 500

# How often the writer looks whether there is something for it. Being woken for each request would
# cost the loop's thread more than all else here.
_LOOK_S = 0.1
# It works for this share of one core at most, and rests after so much work.
_WORK_S, _SHARE = 0.01, 0.1
# Where the folder can't be written to, it is tried again so much later, then after twice as long.
_RETRY_S, _LONGEST_RETRY_S = 1.0, 60.0
# What a killed process has left is a file that nothing was written to for so long.
_ABANDONED_S = 3600.0

# Ours, and in the order of time; others in the folder are not counted, and stay.
_NAME = re.compile(r"\d{8}T\d{6}\.\d{6}Z-[A-Za-z0-9_-]+-\d+-\d+\.parquet")
_TEMPORARY = re.compile(rf"\.{_NAME.pattern}\.tmp")

_numbers = itertools.count(1)

_SUFFIXES = {"PNG": ".png", "WEBP": ".webp", "BMP": ".bmp", "GIF": ".gif"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Noted(NamedTuple):
    """A row to be kept: the `image` as it came, its `probabilities` float32 `[classes]`, and what it
    takes of memory. Not the version itself: one that is given up must be free to go.
    """

    time: float
    model: str
    version: int
    labels: Sequence[str]
    image: bytes | Pixels
    probabilities: Probabilities
    unsure: bool
    bytes: int


class Feedback:
    """Keeps rows in `folder`; `observe` is one of `Repository.observers`."""

    def __init__(
        self,
        folder: Path,
        metrics: Metrics,
        *,
        share: float,
        most_bytes: int,
        rotate_s: float,
        retry_s: float = _RETRY_S,
        store: Callable[[Path, Any], None] | None = None,
    ) -> None:
        """Of all requests `share` is kept, and every unsure row. The folder may hold `most_bytes`;
        beyond, the oldest files are deleted. A row waits for `rotate_s` at most until it is written.
        `store` writes bytes to a path, all or nothing, or raises OSError.
        """
        import pyarrow.parquet  # noqa: F401 (now, and not while requests wait)

        self.folder = folder
        self._metrics, self._share, self._most_bytes = metrics, share, most_bytes
        self._rotate_s, self._store = rotate_s, store or _store
        self._file_bytes = min(_FILE_BYTES, most_bytes // _FILES)
        # Bytes that were noted, and that are done with: each number has one thread that adds to it.
        self._noted_bytes = self._done_bytes = 0
        self._queue: deque[_Noted] = deque()
        self._closing = threading.Event()
        self._host = re.sub(r"[^A-Za-z0-9_-]", "-", socket.gethostname()) or "host"
        # The writer's own.
        self._rows: list[dict[str, Any]] = []
        self._parts: list[Any] = []
        self._part_bytes = self._waiting_bytes = 0
        self._waiting: Counter[str] = Counter()
        self._due = time.monotonic() + rotate_s
        self._failing_since: float | None = None
        self._backoff = Backoff(retry_s, _LONGEST_RETRY_S)
        self._has_deleted = self._has_erred = False
        log.info(
            "keeps feedback in %s, up to %g MB: of requests a share of %g, and all that is unsure",
            folder, most_bytes / 1e6, share,
        )  # fmt: skip
        metrics.feedback_deleted(0)
        metrics.feedback_failed(0)
        with contextlib.suppress(OSError):  # the writer says what is wrong
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_mode & 0o077:
                log.warning("others than the owner of %s may look into it: chmod 700", folder)
        self._thread = threading.Thread(target=self._run, name="feedback", daemon=True)
        self._thread.start()

    def observe(self, answered: Answered) -> None:
        """Notes the rows that are to be kept, on the loop's thread; never waits."""
        flags = answered.unsure.tolist()
        whole = random.random() < self._share
        if not whole and True not in flags:
            return
        served, probabilities, now = answered.served, answered.probabilities, time.time()
        name, version, labels = served.name, served.version, served.manifest.labels
        # Rows may be views of a whole request's, of which one alone would keep all.
        partly = not whole and False in flags
        row_bytes = _ROW_BYTES + probabilities.nbytes // len(flags)
        room = _HELD_FILES * self._file_bytes - (self._noted_bytes - self._done_bytes)
        large = left_out = 0
        for row, unsure in enumerate(flags):
            if not (whole or unsure):
                continue
            image = answered.inputs[row]
            size = row_bytes + (len(image) if isinstance(image, bytes) else image.nbytes)
            if size > self._file_bytes:
                large += 1
            elif size > room:
                left_out += 1
            else:
                if partly and not isinstance(image, bytes):
                    image = image.copy()
                answer = probabilities[row].copy()
                self._queue.append(_Noted(now, name, version, labels, image, answer, unsure, size))
                room -= size
                self._noted_bytes += size
        self._metrics.feedback(name, "large", large)
        reason = "busy" if self._failing_since is None else "disk"
        self._metrics.feedback(name, reason, left_out)

    def close(self, timeout_s: float = 3.0) -> None:
        """Writes what waits, if that can be done in time."""
        self._closing.set()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.warning("feedback was not all written to %s in %g s", self.folder, timeout_s)

    # All below is done on the writer's thread.

    def _run(self) -> None:
        self._guarded(self._look)
        rest_s, duty = _LOOK_S, DutyCycle(_SHARE)
        while not self._closing.wait(rest_s):
            duty.begin()
            while self._queue and duty.worked_s() < _WORK_S:
                self._guarded(self._take)
            full = self._waiting_bytes >= self._file_bytes and self._failing_since is None
            if full or time.monotonic() >= self._due:
                self._guarded(self._write)
            rest_s = max(_LOOK_S, duty.rest_s())
        while self._queue:
            self._guarded(self._take)
        self._guarded(self._write)
        self._lose()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        # A bug here costs what waits, and nothing else.
        except Exception:
            self._erred()
            self._lose()

    def _take(self) -> None:
        """Makes a row of the table of the oldest that waits."""
        noted = self._queue.popleft()
        try:
            row = _row(noted)
        except Exception:
            self._erred()
            self._done_bytes += noted.bytes
            self._metrics.feedback(noted.model, "lost", 1)
            return
        if row is None:
            self._done_bytes += noted.bytes
            return
        self._rows.append(row)
        self._waiting[noted.model] += 1
        self._waiting_bytes += noted.bytes
        self._part_bytes += noted.bytes
        if self._part_bytes >= _PART_BYTES or len(self._rows) >= _PART_ROWS:
            self._end_part()

    def _erred(self) -> None:
        if not self._has_erred:
            self._has_erred = True
            log.exception("feedback was lost by a mistake of ours; more of it is only counted")

    def _lose(self) -> None:
        for model, rows in self._waiting.items():
            self._metrics.feedback(model, "lost", rows)
        self._forget()

    def _end_part(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._parts.append(pa.RecordBatch.from_pylist(self._rows, schema()))
            self._rows, self._part_bytes = [], 0

    def _write(self) -> None:
        """Writes a file of what waits, if anything does, and keeps the folder within its bound."""
        self._end_part()
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self._parts:
                data = _parquet(self._parts)
                self._keep_bound(len(data))
                stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%fZ")
                name = f"{stamp}-{self._host}-{os.getpid()}-{next(_numbers)}.parquet"
                self._store(self.folder / name, data)
                for model, rows in self._waiting.items():
                    self._metrics.feedback(model, "written", rows)
                self._forget()
            self._look()
        except OSError as error:
            self._failed(error)

    def _look(self) -> None:
        """Keeps the folder within its bound, and tells its size."""
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            self._metrics.feedback_bytes(self._keep_bound(0))
        except OSError as error:
            self._failed(error)
            return
        if self._failing_since is not None:
            log.info("feedback is kept in %s again", self.folder)
            self._failing_since = None
            self._backoff.reset()
        self._due = time.monotonic() + self._rotate_s

    def _failed(self, error: OSError) -> None:
        self._metrics.feedback_failed(1)
        if self._failing_since is None:
            self._failing_since = time.monotonic()
            log.error(
                "feedback can't be kept in %s, and will be left out when much waits: %s; requests are "
                "answered all the same, and it is tried again",
                self.folder, error.strerror or error,
            )  # fmt: skip
        self._due = time.monotonic() + self._backoff.next_s()

    def _forget(self) -> None:
        self._done_bytes += self._waiting_bytes
        self._rows, self._parts, self._part_bytes, self._waiting_bytes = [], [], 0, 0
        self._waiting.clear()

    def _keep_bound(self, more: int) -> int:
        """Makes room for `more` bytes; how many the folder has then. Other processes may do the same
        at the same time: all delete the same files, and each counts those that it has deleted.
        """
        ours: list[tuple[str, int]] = []
        total = more
        with os.scandir(self.folder) as entries:
            for entry in entries:
                temporary = _TEMPORARY.fullmatch(entry.name)
                if not (temporary or _NAME.fullmatch(entry.name)):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not temporary:
                        ours.append((entry.name, status.st_size))
                    elif time.time() - status.st_mtime > _ABANDONED_S:
                        (self.folder / entry.name).unlink()
                        continue
                    total += status.st_size
        for name, size in sorted(ours):
            if total <= self._most_bytes:
                break
            total -= size
            with contextlib.suppress(FileNotFoundError):
                (self.folder / name).unlink()
                self._metrics.feedback_deleted(1)
                if not self._has_deleted:
                    self._has_deleted = True
                    log.info(
                        "%s has the %g MB that it may have: the oldest feedback is deleted",
                        self.folder, self._most_bytes / 1e6,
                    )  # fmt: skip
        return total - more


@contextlib.contextmanager
def keeping(settings: Settings, observers: list[Observer], metrics: Metrics) -> Iterator[None]:
    """Has what `settings` ask for kept, while the body serves."""
    if settings.feedback is None:
        yield
        return
    feedback = Feedback(
        settings.feedback,
        metrics,
        share=settings.feedback_share,
        most_bytes=int(settings.feedback_mb * 1e6),
        rotate_s=settings.feedback_rotate_s,
    )
    observers.append(feedback.observe)
    try:
        yield
    finally:
        feedback.close()


@functools.cache
def schema() -> Any:
    """The columns of the files, as pyarrow has them. Nothing in them says who asked."""
    import pyarrow as pa

    return pa.schema([
        ("time", pa.timestamp("us", "UTC")),
        ("model", pa.string()),
        ("version", pa.int64()),
        ("sha256", pa.string()),  # of `image`
        ("image", pa.binary()),  # the file as it came; of pixels a PNG
        ("predicted", pa.string()),
        ("probability", pa.float32()),
        ("probabilities", pa.list_(pa.float32())),
        ("unsure", pa.bool_()),
    ])  # fmt: skip


def _parquet(parts: Sequence[Any]) -> Any:
    """A Parquet file of these record batches, in memory."""
    import pyarrow as pa
    from pyarrow import parquet

    sink = pa.BufferOutputStream()
    table = pa.Table.from_batches(parts, schema())
    parquet.write_table(
        table,
        sink,
        # Images are compressed, and all differ.
        compression={path: "NONE" if path == "image" else "ZSTD" for path in _paths(table.schema)},
        use_dictionary=["model", "version", "predicted"],
        write_statistics=["time", "model", "version", "sha256", "predicted", "unsure"],
    )
    return sink.getvalue()


def _paths(columns: Any) -> list[str]:
    return ["probabilities.list.element" if n == "probabilities" else n for n in columns.names]


def _row(noted: _Noted) -> dict[str, Any] | None:
    """A row of the table; None where the model failed on the image, which has no answer then."""
    best = int(noted.probabilities.argmax())  # NaN where there is one
    if not math.isfinite(noted.probabilities[best]):
        return None
    data = noted.image if isinstance(noted.image, bytes) else _png(noted.image)
    return {
        "time": round(noted.time * 1e6),
        "model": noted.model,
        "version": noted.version,
        "sha256": hashlib.sha256(data).hexdigest(),
        "image": data,
        "predicted": noted.labels[best],
        "probability": noted.probabilities[best],
        "probabilities": noted.probabilities,
        "unsure": noted.unsure,
    }


def _png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    # A third larger than what takes three times as long.
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _store(path: Path, data: Any, *, durable: bool = True) -> None:
    """Writes the file at `path`, for its owner alone: whole, or not at all. Raises OSError."""
    temporary = f".{path.name}.tmp"  # see _TEMPORARY
    with replacing(path, mode=0o600, temporary=temporary, durable=durable) as file:
        file.write(data)


# What people do with it.


class Exported(NamedTuple):
    """Images written by class; how many were there before, of which some were `moved` to the class
    that they were said to have; and files that could not be read.
    """

    written: Mapping[str, int]
    known: int
    moved: int
    unreadable: Sequence[str]


def export(
    folder: Path,
    to: Path,
    *,
    model: str = "",
    unsure: bool = False,
    labels: Mapping[str, str] | None = None,
) -> Exported:
    """Writes kept images to `to/<class>/<sha256>.<suffix>`, each once; `convoy train` takes `to`.

    The class is what `labels` say of the sha256, and then only those are written; without `labels`
    it is the newest answer of the model, for people to put right by moving files. What is anywhere
    in `to` already stays as it is, unless `labels` say otherwise. `unsure`: only such rows. Raises
    ConvoyError.
    """
    written: Counter[str] = Counter()
    unreadable: list[str] = []
    known = moved = 0
    models: set[str] = set()
    columns = ["model", "image", "sha256", "predicted", "unsure"]
    try:
        to.mkdir(mode=0o700, parents=True, exist_ok=True)
        there = {path.stem: path for path in to.rglob("*") if _SHA256.fullmatch(path.stem)}
        seen: set[str] = set()
        for row in _rows(_files(folder)[::-1], columns, unreadable):
            digest = row["sha256"]
            if model not in ("", row["model"]) or (unsure and not row["unsure"]) or digest in seen:
                continue
            label = row["predicted"] if labels is None else labels.get(digest)
            if label is None:
                continue
            models.add(row["model"])
            if len(models) > 1:
                raise ConvoyError(
                    f"{folder} has feedback of several models: name one with --model; "
                    f"there is {', '.join(sorted(models))}, for example"
                )
            seen.add(digest)
            place = to / _folder_name(label)
            if (before := there.get(digest)) is not None:
                known += 1
                if labels is not None and before.parent != place:
                    place.mkdir(mode=0o700, exist_ok=True)
                    before.rename(place / before.name)
                    moved += 1
                continue
            place.mkdir(mode=0o700, exist_ok=True)
            _store(place / f"{digest}{_suffix(row['image'])}", row["image"], durable=False)
            written[place.name] += 1
    except OSError as error:
        raise ConvoyError(f"the images could not be written to {to}: {error}") from error
    return Exported(written, known, moved, unreadable)


def delete(folder: Path, digests: Collection[str]) -> int:
    """Deletes the images with these sha256 from all files in `folder`; how many rows that were.

    Rows that a running service has not yet written are not among them. Raises ConvoyError, also
    where a file could not be looked into.
    """
    import pyarrow as pa
    from pyarrow import compute

    wanted = {digest.strip().lower() for digest in digests}
    for digest in wanted:
        if not _SHA256.fullmatch(digest):
            raise ConvoyError(f"{digest!r} is no sha256: it has 64 hexadecimal digits")
    deleted = 0
    for path in _files(folder):
        try:
            rows = _read(path, ["sha256"])["sha256"]
            keep = compute.invert(compute.is_in(rows, pa.array(sorted(wanted), pa.string())))
            gone = len(rows) - compute.sum(keep).as_py()
            if not gone:
                continue
            if gone == len(rows):
                path.unlink()
            else:
                _store(path, _parquet(_read(path).filter(keep).to_batches()))
            deleted += gone
        except FileNotFoundError:  # deleted meanwhile, as the oldest
            continue
        except (OSError, pa.ArrowException) as error:
            raise ConvoyError(
                f"{path} could not be looked into, and {deleted} rows were deleted before: {error}"
            ) from error
    return deleted


def read_labels(path: Path) -> dict[str, str]:
    """Labels by sha256 from a CSV with the columns sha256 and label. Raises ConvoyError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not {"sha256", "label"} <= set(reader.fieldnames or ()):
                raise ConvoyError(f"{path} needs the columns sha256 and label")
            labels: dict[str, str] = {}
            for row in reader:
                digest, label = (row["sha256"] or "").strip().lower(), (row["label"] or "").strip()
                if not _SHA256.fullmatch(digest):
                    raise ConvoyError(f"{path} line {reader.line_num}: {digest!r} is no sha256")
                if label and labels.setdefault(digest, label) != label:
                    raise ConvoyError(f"{path} line {reader.line_num}: {digest} has two labels")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConvoyError(f"{path} can't be read: {error}") from error
    return labels


def _files(folder: Path) -> list[Path]:
    """Whole files, the oldest first. Raises ConvoyError."""
    try:
        found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    except OSError as error:
        raise ConvoyError(f"{folder}: {error.strerror or error}") from error
    if not found:
        raise ConvoyError(
            f"{folder} has no feedback: `convoy serve --feedback {folder}` keeps some"
        )
    return found


def _rows(
    paths: Sequence[Path], columns: Sequence[str], unreadable: list[str]
) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    for path in paths:
        try:
            with ParquetFile(path) as file:
                for batch in file.iter_batches(64, columns=list(columns)):
                    yield from batch.to_pylist()
        except FileNotFoundError:  # deleted meanwhile, as the oldest
            continue
        except (OSError, pa.ArrowException) as error:
            unreadable.append(f"{path}: {error}")


def _read(path: Path, columns: list[str] | None = None) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read(columns)


def _folder_name(label: str) -> str:
    """A label as a folder that `convoy train` takes for a class."""
    name = re.sub(r"[/\0]", "_", " ".join(label.split()))
    return re.sub(r"^\.", "_", name) or "_"


def _suffix(data: bytes) -> str:
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        return _SUFFIXES.get(image.format or "", ".jpg")
