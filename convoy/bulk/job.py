"""What a job is to do, and what of it is done. Both lie in the folder of the answers, which may be one
of an object store:

<to>/part-000017.parquet    the answers to one part of the images: there as a whole, or not at all
<to>/_job/job.json          what is to be done; there before the first part, and never changed
<to>/_job/images.parquet    the images' paths, where they lie in a folder
<to>/_job/tries/17          how many processes have taken this part on, after one that ended with it
<to>/_job/summary.json      what was found; there when all parts are
"""

import functools
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import pyarrow as pa
from pyarrow import compute, parquet, types
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem

from convoy.bulk.settings import BulkSettings
from convoy_service.artifacts.files import replace_file
from convoy_service.artifacts.reader import Bundle
from convoy_service.errors import ConvoyError
from convoy_service.settings import IMAGE_SUFFIXES

_JOB, _IMAGES, _SUMMARY = "_job/job.json", "_job/images.parquet", "_job/summary.json"
_TRIES = "_job/tries"
_PART = re.compile(r"part-(\d{6,})\.parquet")
# Requests that are under way at once, where a store would take long for one after the other.
_AT_ONCE = 16
# Encoded images of a Parquet file that are in memory at once.
_ROWS = 32
_EXAMPLES = 10

# The settings that decide what the answers are: a job that goes on goes on with these.
_DECISIVE = (
    "variant", "column", "key", "root", "images_per_file", "probabilities", "max_megapixels",
    "max_image_mb",
)  # fmt: skip

# As a row has it: encoded, or where it lies; None where the row has none.
Image = bytes | str | None


class Place(NamedTuple):
    """A folder or file, in a file system of pyarrow's."""

    files: Any
    path: str

    @property
    def local(self) -> bool:
        return isinstance(self.files, LocalFileSystem)

    def __truediv__(self, name: str) -> "Place":
        return Place(self.files, f"{self.path.rstrip('/')}/{name}")

    def read(self) -> bytes | None:
        """What the file holds; None where there is none. Raises OSError."""
        try:
            with self.files.open_input_file(self.path) as file:
                return bytes(file.read())
        except FileNotFoundError:
            return None

    def write(self, data: bytes) -> None:
        """Has the file hold these bytes: whoever reads it finds them all, or what was there before.

        Raises OSError.
        """
        if not self.local:
            with self.files.open_output_stream(
                self.path
            ) as stream:  # it appears when this is closed
                stream.write(data)
            return
        path = Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)


@functools.lru_cache
def _bucket(url: str) -> tuple[Any, str]:
    try:
        if url.endswith("://"):
            raise pa.ArrowInvalid("it names no bucket")
        files, path = FileSystem.from_uri(url)
    except (pa.ArrowException, OSError) as error:
        raise ConvoyError(
            f"{url}: {error}; give a folder, or a URL as s3://, gs:// or abfs://"
        ) from error
    return files, path.strip("/")


def place(url: str) -> Place:
    """Where a path leads, or a URL as s3://bucket/path, in which nothing is an escape: names in a store
    have any characters. Raises ConvoyError.
    """
    scheme, found, rest = url.partition("://")
    if not found or scheme == "file":
        return Place(LocalFileSystem(), str(Path(rest or url).absolute()))
    bucket, _, path = rest.partition("/")
    files, base = _bucket(f"{scheme}://{bucket}")
    return Place(files, "/".join(each for each in (base, path.strip("/")) if each))


@dataclass(frozen=True)
class Table:
    """A Parquet file with so many images, by its path in the job's folder of such files."""

    path: str
    rows: int


class Part(NamedTuple):
    """Images that are answered together: `rows` of a table, from its row `start` on."""

    number: int
    table: Table
    start: int
    rows: int


@dataclass(frozen=True)
class Job:
    """What `job.json` holds."""

    # What was given, as absolute paths or URLs.
    images: str
    to: str
    # Where the tables lie, and where paths in them lead from.
    folder: str
    root: str
    tables: list[Table]
    # The columns of the images and of their names: without the latter, a row's name is its file and
    # number.
    column: str
    key: str
    # The column has the images themselves, not their paths alone.
    encoded: bool
    rows_per_part: int
    model: str
    version: int
    # The sha256 of the version's manifest.
    digest: str
    # Those that decide, as they were given.
    settings: dict[str, Any]
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = 1

    @functools.cached_property
    def parts(self) -> list[Part]:
        pieces = [
            (table, start, min(self.rows_per_part, table.rows - start))
            for table in self.tables
            for start in range(0, table.rows, self.rows_per_part)
        ]
        return [Part(number, *piece) for number, piece in enumerate(pieces)]

    @property
    def total(self) -> int:
        return sum(table.rows for table in self.tables)

    def place(self, part: Part) -> Place:
        """Where the answers to it are, or belong."""
        return place(self.to) / f"part-{part.number:06d}.parquet"

    def missing(self) -> list[Part]:
        """The parts that are not there yet. Raises OSError."""
        to = place(self.to)
        listed = to.files.get_file_info(FileSelector(to.path))
        done = {int(match[1]) for file in listed if (match := _PART.fullmatch(file.base_name))}
        return [part for part in self.parts if part.number not in done]

    def take(self, part: Part) -> int:
        """Counts how often this was called for the part since `forget`. Raises OSError."""
        file = place(self.to) / _TRIES / str(part.number)
        tries = int(file.read() or 0) + 1
        file.write(b"%d" % tries)
        return tries

    def forget(self) -> None:
        """What `take` counted. Raises OSError."""
        tries = place(self.to) / _TRIES
        if tries.files.get_file_info(tries.path).type == FileType.Directory:
            tries.files.delete_dir(tries.path)

    def rows(self, part: Part) -> Iterator[tuple[str, Image]]:
        """The name and image of each row. Raises OSError, ConvoyError where the table has changed."""
        with _open(place(self.folder) / part.table.path) as table:
            if table.metadata.num_rows != part.table.rows:
                raise ConvoyError(
                    f"{part.table.path} has {table.metadata.num_rows} rows, and had {part.table.rows} "
                    "when the job began: put the old one back, or begin a new job"
                )
            groups: list[int] = []
            first = skipped = 0
            for number in range(table.num_row_groups):
                rows = table.metadata.row_group(number).num_rows
                if part.start < first + rows and first < part.start + part.rows:
                    if not groups:
                        skipped = part.start - first
                    groups.append(number)
                first += rows
            number, end = part.start, part.start + part.rows
            columns = [self.column] + ([self.key] if self.key not in ("", self.column) else [])
            for batch in table.iter_batches(_ROWS, groups, columns):
                if skipped >= len(batch):
                    skipped -= len(batch)
                    continue
                for row in batch.slice(skipped, end - number).to_pylist():
                    image = row[self.column]
                    if isinstance(image, dict):  # as Hugging Face's datasets have them
                        image = image.get("bytes") or image.get("path")
                    name = row[self.key] if self.key else None
                    yield f"{part.table.path}#{number}" if name is None else str(name), image
                    number += 1
                skipped = 0
                if number == end:
                    return

    # The end.

    def summary(self) -> dict[str, Any] | None:
        """What was found, if the job is over. Raises OSError."""
        written = (place(self.to) / _SUMMARY).read()
        return None if written is None else msgspec.json.decode(written, type=dict[str, Any])

    def finish(self) -> dict[str, Any]:
        """Reads what was written, holds it against what was to be done, and sums it up.

        Raises OSError, ConvoyError where a part is not what it should be.
        """
        labels: Counter[str] = Counter()
        unsure = errors = 0
        examples: list[dict[str, str]] = []
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for part, answers in zip(self.parts, pool.map(self._read, self.parts), strict=True):
                if len(answers) != part.rows:
                    raise ConvoyError(
                        f"{self.place(part).path} has {len(answers)} rows for {part.rows} images: "
                        "delete it, and run the job again"
                    )
                for each in compute.value_counts(answers["label"].drop_null()).to_pylist():
                    labels[each["values"]] += each["counts"]
                unsure += compute.sum(answers["unsure"]).as_py() or 0
                failed = answers.filter(answers["error"].is_valid())
                errors += len(failed)
                examples += failed.slice(0, _EXAMPLES - len(examples)).to_pylist()
        summary = {
            "images": self.images,
            "model": self.model,
            "version": self.version,
            "digest": self.digest,
            "variant": self.settings["variant"],
            "count": self.total,
            "labels": dict(sorted(labels.items())),
            "unsure": unsure,
            "errors": errors,
            "error_examples": [
                {name: each[name] for name in ("key", "error")} for each in examples
            ],
            "files": len(self.parts),
            "started": self.created,
            "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        to = place(self.to)
        if to.local:
            for left in Path(to.path).glob(".part-*"):  # of those who were killed while they wrote
                left.unlink(missing_ok=True)
        (to / _SUMMARY).write(msgspec.json.format(msgspec.json.encode(summary)) + b"\n")
        return summary

    def _read(self, part: Part) -> Any:
        where = self.place(part)
        try:
            with _open(where) as answers:
                return answers.read(["key", "label", "unsure", "error"])
        except pa.ArrowException as error:
            raise ConvoyError(
                f"{where.path} can't be read: {error}; delete it, and run the job again"
            ) from error


def begun(to: str) -> Job | None:
    """The job whose answers belong there, if one was begun. Raises OSError, ConvoyError."""
    file = place(to) / _JOB
    written = file.read()
    if written is None:
        return None
    try:
        job = msgspec.json.decode(written, type=Job)
    except msgspec.MsgspecError as error:
        raise ConvoyError(f"{file.path}: {error}") from error
    if job.format != 1:
        raise ConvoyError(f"{file.path}: format {job.format} is newer than this Convoy: update it")
    return job


def check_same(job: Job, images: str, settings: BulkSettings) -> None:
    """Raises ConvoyError where this is not what the job was begun with."""
    asked = {name: getattr(settings, name) for name in _DECISIVE}
    asked |= {"images": _absolute(images), "model": settings.model, "version": settings.version}
    begun_with = {**job.settings, "images": job.images, "model": job.model, "version": job.version}
    if not settings.model:
        del asked["model"]
    if not settings.version:
        del asked["version"]
    if others := [
        f"{name} {begun_with[name]!r}, not {value!r}"
        for name, value in asked.items()
        if begun_with[name] != value
    ]:
        raise ConvoyError(
            f"{job.to} has a job that was begun with {'; '.join(others)}: go on with these, or give "
            "another folder for the answers"
        )


def begin(images: str, to: str, bundle: Bundle, settings: BulkSettings) -> Job:
    """Finds out what is to be done, and writes it down. Raises OSError, ConvoyError."""
    images, to = _absolute(images), _absolute(to)
    if f"{to}/".startswith(f"{images}/"):
        raise ConvoyError(f"{to} is inside of {images}: give another folder for the answers")
    source = place(images)
    found = source.files.get_file_info(source.path)
    if found.type == FileType.NotFound and source.local:
        raise ConvoyError(f"{images} is not there")
    if found.type == FileType.File:
        folder, _, name = images.rpartition("/")
        names = [name]
    else:
        folder, names = images, sorted(_walk(source))
    files = [name for name in names if Path(name).suffix.lower() == ".parquet"]
    pictures = len(names) - len(files)
    if not names or (files and pictures) or (found.type == FileType.File and not files):
        raise ConvoyError(
            f"{images} has {pictures} images ({', '.join(sorted(IMAGE_SUFFIXES))}) and {len(files)} "
            "Parquet files: one or the other is needed; name a Parquet file or a folder"
        )
    batch = bundle.manifest.max_batch_size
    size = -(-settings.images_per_file // batch) * batch
    if pictures:
        root, folder, column, key, encoded = images, to, "path", "path", False
        tables = [Table(_IMAGES, len(names))]
        listing = pa.BufferOutputStream()
        parquet.write_table(
            pa.table({"path": names}), listing, row_group_size=size, compression="zstd"
        )
        (place(to) / _IMAGES).write(bytes(listing.getvalue()))
    else:
        root = _absolute(settings.root) if settings.root else folder
        tables, column, key, encoded = _look_into(folder, files, settings)
    job = Job(
        images, to, folder, root, tables, column, key, encoded, size, bundle.name, bundle.version,
        bundle.digest, {name: getattr(settings, name) for name in _DECISIVE},
    )  # fmt: skip
    (place(to) / _JOB).write(msgspec.json.format(msgspec.json.encode(job)) + b"\n")
    return job


def _absolute(url: str) -> str:
    return url.rstrip("/") if "://" in url else str(Path(url).absolute())


def _walk(folder: Place) -> Iterator[str]:
    """The paths in it of all files that are images or Parquet by their names. What is hidden, or marked
    with _ as Spark and others do with what is no data, is left out, and links to folders.
    """
    paths: Iterable[str]
    if folder.local:
        paths = _walk_local(folder.path)
    else:
        selector = FileSelector(folder.path, allow_not_found=True, recursive=True)
        listed = folder.files.get_file_info(selector)
        paths = (file.path for file in listed if file.type == FileType.File)
    for path in paths:
        name = path[len(folder.path) :].lstrip("/")
        wanted = Path(name).suffix.lower() in IMAGE_SUFFIXES | {".parquet"}
        if wanted and not any(each.startswith((".", "_")) for each in name.split("/")):
            yield name


def _walk_local(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk_local(entry.path)
            elif entry.is_file():
                yield entry.path


def _look_into(
    folder: str, names: list[str], settings: BulkSettings
) -> tuple[list[Table], str, str, bool]:
    """The tables, their columns with images and with the images' names, and whether the former has the
    images themselves. Raises ConvoyError.
    """

    def look(name: str) -> tuple[int, Any]:
        try:
            with _open(place(folder) / name) as table:
                return table.metadata.num_rows, table.schema_arrow
        except pa.ArrowException as error:
            raise ConvoyError(f"{name} is no Parquet file that can be read: {error}") from error

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        looked = list(pool.map(look, names))
    first = looked[0][1].names
    column = settings.column or ("image" if "image" in first else "path")
    key = settings.key or ("path" if "path" in first else "")
    holds = set()
    for name, (_, schema) in zip(names, looked, strict=True):
        holds.add(_holds(schema, column))
        if None in holds or not {key} - {""} <= set(schema.names):
            raise ConvoyError(
                f"{name} has the columns {', '.join(f'{each.name} ({each.type})' for each in schema)}: "
                f"wanted {column!r} with encoded images (binary) or paths (string)"
                + (f", and {key!r}" if key else "")
                + "; name others with --column and --key"
            )
    tables = [Table(name, rows) for name, (rows, _) in zip(names, looked, strict=True)]
    if not sum(table.rows for table in tables):
        raise ConvoyError(f"there is no row in {', '.join(names[:3])}")
    return tables, column, key, "images" in holds


def _holds(schema: Any, column: str) -> Literal["images", "paths"] | None:
    """What the column has; None where neither, or where there is no such column."""
    if column not in schema.names:
        return None
    kind = schema.field(column).type
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_struct(kind):
        return "images" if {"bytes", "path"} <= {each.name for each in kind} else None
    if any(check(kind) for check in (types.is_binary, types.is_large_binary, types.is_binary_view)):
        return "images"
    if any(check(kind) for check in (types.is_string, types.is_large_string, types.is_string_view)):
        return "paths"
    return None


def _open(where: Place) -> Any:
    """A Parquet file, of which no more is in memory than what is being read."""
    source = where.files.open_input_file(where.path)
    return parquet.ParquetFile(source, pre_buffer=False, buffer_size=1 << 20)
