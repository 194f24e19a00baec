"""Labelled images: the built-in digits, a folder with one subfolder for each class, or a list file."""

import csv
import hashlib
import importlib.util
import io
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convoy_service.artifacts import images
from convoy_service.artifacts import reader as bundle
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.engine.cpu import whole_cores
from convoy_service.errors import ConvoyError, InvalidImage
from convoy_service.settings import IMAGE_SUFFIXES
from convoy_training.data import cache
from convoy_training.data.cache import Cache
from convoy_training.settings import TrainingSettings

log = logging.getLogger("convoy.data")

Labels = npt.NDArray[np.int64]

# Calls back with an iterable's items, so that a caller can show how far it is.
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

# The size at which images are compared, whatever size they are trained at.
IDENTITY = Target(32, 32, 3)

_PROBED = 256
SPLITS = ("train", "validation", "test")
# Files that a thread takes at once: small ones take less than handing them over one by one does.
_HANDFUL = 8


class DataError(ConvoyError):
    """Data that can't be trained on; the text names the file or folder."""


@dataclass(frozen=True)
class Split:
    """Images and what they show: `inputs` uint8 `[N, H, W, C]`, `labels` `[N]`.

    `files` are where the images came from; None for built-in data.
    """

    inputs: Pixels
    labels: Labels
    files: tuple[Path, ...] | None = None
    # What tells each image from others: the same for copies, whatever size they are decoded to.
    identities: tuple[bytes, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.identities:
            object.__setattr__(self, "identities", tuple(row.tobytes() for row in self.inputs))

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, position: int) -> bytes:
        """The file of one image as it is on disk; of built-in data a PNG."""
        if self.files:
            return self.files[position].read_bytes()
        pixels = self.inputs[position]
        buffer = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def at(self, target: Target) -> Pixels:
        """The images brought to another size than `inputs` have."""
        if self.files:
            return np.stack([images.decode(file.read_bytes(), target) for file in self.files])
        return np.stack([images.prepare(row, target) for row in self.inputs])

    def fingerprint(self) -> str:
        """A sha256 over pixels and labels: the same data has the same."""
        digest = hashlib.sha256(np.ascontiguousarray(self.inputs).data)
        digest.update(np.ascontiguousarray(self.labels).data)
        return digest.hexdigest()

    def only(self, chosen: npt.NDArray[np.bool_]) -> "Split":
        """The images for which `chosen` `[N]` says so, in their order."""
        files = self.files and tuple(compress(self.files, chosen))
        identities = tuple(compress(self.identities, chosen))
        return Split(self.inputs[chosen], self.labels[chosen], files, identities)


@dataclass(frozen=True)
class Dataset:
    """Three splits that share no image, and the names of the classes."""

    name: str
    classes: tuple[str, ...]
    target: Target
    train: Split
    validation: Split
    test: Split


def untracked(items: Iterable[Any], _doing: str, _total: int) -> Iterable[Any]:
    return items


@dataclass(frozen=True)
class Listing:
    """The files of data by split, `(file, label)` each in an order that lasts; none is opened yet.

    `problems` stop training, `notes` say what is left out.
    """

    classes: tuple[str, ...]
    files: Mapping[str, Sequence[tuple[Path, int]]]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(settings: TrainingSettings, track: Track = untracked) -> Dataset:
    """The data that `settings` name, decoded, in splits.

    A test split that is not given is cut by a hash of what each image shows: it stays the same when
    images are added, and copies of an image never end up on both sides. So is a validation split.
    Of a split that is given, copies among the other images are left out of these. Raises DataError.
    """
    name = model_name(settings)
    classes, target, given = _given(settings, track, SPLITS)
    return assemble(name, classes, target, given, settings)


def assemble(
    name: str,
    classes: tuple[str, ...],
    target: Target,
    given: Mapping[str, Split],
    settings: TrainingSettings,
    say: Callable[[str], object] = log.warning,
) -> Dataset:
    """The splits of what is given; `say` hears of images that are left out. Raises DataError."""
    given = with_test(given, settings)
    test = given["test"]
    train = _without(given["train"], test, "training", "test", say)
    if "validation" in given:
        validation = _without(given["validation"], test, "validation", "test", say)
        train = _without(train, validation, "training", "validation", say)
    else:
        salt = f"validation {settings.split_seed}"
        train, validation = _cut(train, settings.validation_share, salt)
    data = Dataset(name, classes, target, train, validation, test)
    for split, what in ((train, "train on"), (validation, "validate on"), (test, "test with")):
        for missing in sorted(set(range(len(classes))) - set(split.labels.tolist())):
            raise DataError(
                f"class {classes[missing]!r} has no image left to {what}: add images to it"
            )
    return data


def model_name(settings: TrainingSettings) -> str:
    """The name of the model, of the data's folder or list if none is set. Raises ConvoyError."""
    name = settings.name
    if not name:
        path = Path(settings.data).resolve()
        stem = path.stem if _is_list(path) else path.name
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")
        if not name:
            raise DataError(f"{settings.data} makes no name for a model: give one with --name")
    bundle.check_name(name)
    return name


def load_test(settings: TrainingSettings, track: Track = untracked) -> tuple[list[str], Split]:
    """The names of the classes, and the test split alone, as `load` has it."""
    classes, _, given = _given(settings, track, ("test",))
    return list(classes), with_test(given, settings)["test"]


def class_weights(labels: Labels, classes: int) -> npt.NDArray[np.float32]:
    """What an image of each class counts, float32 `[classes]`: in inverse proportion to how many
    there are, and 1 on average over `labels`. A class without images counts 0.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = len(labels) / (present.sum() * np.maximum(counts, 1))
    return np.where(present, weights, 0).astype(np.float32)


def is_built_in(settings: TrainingSettings) -> bool:
    """Whether the data are the digits that come with scikit-learn."""
    return settings.data == "digits" and not Path(settings.data).exists()


def list_files(settings: TrainingSettings) -> Listing:
    """The files of a folder or a list. Raises DataError where they make no data at all."""
    path = Path(settings.data)
    return _list_rows(path, settings) if _is_list(path) else _list_folder(path)


def choose_target(files: Sequence[Path], settings: TrainingSettings) -> Target:
    """The size that images are brought to. Raises DataError where none can be read."""
    size, channels = settings.image_size, int(settings.channels)
    if not size or not channels:
        step = max(1, len(files) // _PROBED)
        seen = []
        for file in files[::step]:
            try:
                seen.append(images.probe(file.read_bytes()))
            except (InvalidImage, OSError):
                continue  # named when all files are read
        if not seen:
            raise DataError(f"none of the images looked at can be read, such as {files[0]}")
        if not size:
            side = float(np.median([min(height, width) for height, width, _ in seen]))
            size = int(np.clip(round(side / 8) * 8, 8, 128))
        channels = channels or max(c for _, _, c in seen)
    return Target(size, size, channels, settings.resize)


def with_test(given: Mapping[str, Split], settings: TrainingSettings) -> dict[str, Split]:
    """What is given, with a test split cut off the training images where there is none."""
    if "test" in given:
        return dict(given)
    train, test = _cut(given["train"], settings.test_share, f"test {settings.split_seed}")
    return {**given, "train": train, "test": test}


def in_threads(
    work: Callable[[int], object], positions: Sequence[int], track: Track, doing: str
) -> None:
    """Calls `work` with each of `positions`, on all cores."""

    def some(handful: Sequence[int]) -> Sequence[int]:
        for position in handful:
            work(position)
        return handful

    starts = range(0, len(positions), _HANDFUL)
    pool = ThreadPoolExecutor(whole_cores())
    try:
        done = pool.map(some, (positions[start : start + _HANDFUL] for start in starts))
        for _ in track(chain.from_iterable(done), doing, len(positions)):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


def _cut(split: Split, share: float, salt: str) -> tuple[Split, Split]:
    """The rest, and about `share` of each class."""
    salted = (hashlib.sha256(salt.encode() + content).digest() for content in split.identities)
    hashes = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in salted])
    chosen = hashes < share
    for label in np.unique(split.labels):
        members = split.labels == label
        # A small class may miss its share by chance; it gives its first one all the same, with all
        # copies of it.
        if not chosen[members].any():
            chosen |= hashes == hashes[members].min()
    return split.only(~chosen), split.only(chosen)


def _without(
    split: Split, other: Split, name: str, others: str, say: Callable[[str], object]
) -> Split:
    """The images of `split` that `other` has no copy of."""
    known = set(other.identities)
    fresh = np.array([identity not in known for identity in split.identities], bool)
    if fresh.all():
        return split
    first = split.files and split.files[int(fresh.argmin())]
    say(
        f"{(~fresh).sum()} {name} images are {others} images too, such as {first}: "
        f"they are left out of {name}"
    )
    return split.only(fresh)


_Given = tuple[tuple[str, ...], Target, dict[str, Split]]


def _given(settings: TrainingSettings, track: Track, wanted: Sequence[str]) -> _Given:
    """Classes, size and splits of the data; of splits that include a test only those `wanted`."""
    if is_built_in(settings):
        return _digits(settings)
    listing = list_files(settings)
    for note in listing.notes:
        log.warning(note)
    if listing.problems:
        raise DataError("\n".join(listing.problems))
    target = choose_target([file for file, _ in listing.files["train"]], settings)
    given = {}
    for name, files in listing.files.items():
        if name in wanted or "test" not in listing.files:
            source = f"{Path(settings.data).absolute()} {name}"
            kept = Cache(cache.folder(settings.cache), source, target)
            doing = f"reading {name} images"
            given[name] = _read(files, listing.classes, target, kept, settings, track, doing)
    return listing.classes, target, given


def _digits(settings: TrainingSettings) -> _Given:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise DataError(
            "the built-in digits come with scikit-learn: pip install 'convoy-serving[train]', "
            "or give a folder of images with --data"
        ) from None
    bunch = load_digits()
    inputs = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    classes = tuple(str(digit) for digit in bunch.target_names)
    split = Split(inputs, bunch.target.astype(np.int64))
    size = settings.image_size or 8
    target = Target(size, size, int(settings.channels) or 1, settings.resize)
    return classes, target, {"train": replace(split, inputs=split.at(target))}


def _list_folder(folder: Path) -> Listing:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder: --data takes one with a subfolder for each class, or a list "
            "(.csv or .parquet)"
        )
    notes: list[str] = []
    parts = {"train": folder / "train", "test": folder / "test"}
    present = [part.is_dir() and any(map(_is_class, part.iterdir())) for part in parts.values()]
    if any(present) and not all(present):
        raise DataError(
            f"{folder} has classes in only one of train/ and test/: give both, "
            "or have the test cut off with --data naming the folder of classes itself"
        )
    if all(present):
        notes += [
            f"{other} is neither train nor test and is left out: name its images in a list, "
            "with a column split, to have them used"
            for other in sorted(filter(_is_class, folder.iterdir()))
            if other not in parts.values()
        ]
    else:
        parts = {"train": folder}
    classes = tuple(sorted(f.name for f in parts["train"].iterdir() if _is_class(f)))
    if not classes:
        raise DataError(f"{parts['train']} has no subfolders: put each class's images into one")
    problems = []
    if len(classes) == 1:
        problems.append(
            f"{parts['train']} has a single class, {classes[0]!r}: two at least are needed"
        )
    files: dict[str, list[tuple[Path, int]]] = {}
    for name, part in parts.items():
        problems += [
            f"{other} is a class that the training images lack"
            for other in sorted(filter(_is_class, part.iterdir()))
            if other.name not in classes
        ]
        ignored: list[Path] = []
        files[name] = []
        for label, kind in enumerate(classes):
            found = _walk(part / kind, notes)
            chosen = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES]
            ignored += [file for file in found if file.suffix.lower() not in IMAGE_SUFFIXES]
            if not chosen:
                problems.append(
                    f"{part / kind} has no image (by name: {', '.join(sorted(IMAGE_SUFFIXES))}): "
                    "add some or remove the folder"
                )
            files[name] += [(file, label) for file in chosen]
        if ignored:
            notes.append(
                f"{len(ignored)} files are no images by their name and are left out: "
                f"{_some(ignored)}"
            )
    return Listing(classes, files, tuple(problems), tuple(notes))


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _walk(folder: Path, notes: list[str]) -> list[Path]:
    """All files inside `folder` but hidden ones, sorted as paths are. Raises DataError."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):  # a class that one of two splits lacks
            raise DataError(str(error)) from error

    found = []
    for inside, subfolders, names in os.walk(folder, onerror=refuse):
        notes += [
            f"{link} is a link to a folder inside of a class: it is left out"
            for link in (Path(inside, name) for name in sorted(subfolders))
            if link.is_symlink()
        ]
        found += [f"{inside}/{name}" for name in names if not name.startswith(".")]
    # The order of paths, at a fraction of what comparing them takes.
    return [Path(file) for file in sorted(found, key=lambda file: file.split("/"))]


def _is_list(path: Path) -> bool:
    return path.suffix.lower() in (".csv", ".parquet") and not path.is_dir()


def _list_rows(path: Path, settings: TrainingSettings) -> Listing:
    """The files that a list names, in the order that a folder of them would have."""
    columns, rows = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    if not {"path", "label"} <= set(columns):
        raise DataError(
            f"{path} has the columns {', '.join(columns) or '(none)'}: path and label are needed, "
            "and split where the splits are given"
        )
    wrong: dict[str, list[str]] = defaultdict(list)
    seen: dict[str, tuple[str, str]] = {}
    named: list[tuple[Path, str, str]] = []
    for where, row in rows:
        # A label is a line in the file of labels.
        label = " ".join(row["label"].split())
        split = row["split"].strip().lower() if "split" in columns else "train"
        if not row["path"].strip():
            wrong["rows have no path"].append(where)
            continue
        if "\0" in row["path"]:
            wrong["rows have a path with a zero byte"].append(where)
            continue
        if not label:
            wrong["rows have no label"].append(f"{where} ({row['path']})")
            continue
        if split not in SPLITS:
            wrong[f"rows have a split that is none of {', '.join(SPLITS)}"].append(
                f"{where} ({row['split']!r})"
            )
            continue
        file = path.parent / row["path"]
        before = seen.setdefault(os.path.normpath(file), (label, split))
        if before[0] != label:
            wrong["files have two labels"].append(f"{file} ({before[0]!r}, {where} {label!r})")
        elif before[1] != split:
            wrong["files are in two splits"].append(f"{file} ({before[1]}, {where} {split})")
        elif len(named) < len(seen):
            named.append((file, label, split))
        else:
            wrong["files are named twice"].append(f"{file} ({where})")
    # Not Path.exists: it raises where a name is too long, or a folder closed to us.
    missing = [file for file, _, _ in named if not os.path.exists(file)]  # noqa: PTH110
    if missing and not settings.skip_unreadable:
        wrong[f"files are missing (paths begin at {path.parent.absolute()})"] += map(str, missing)
    told = {what: f"{path}: {len(found)} {what}: {_some(found)}" for what, found in wrong.items()}
    notes = [f"{told.pop(what)}: they count once" for what in list(told) if "twice" in what]
    problems = list(told.values())
    classes = tuple(sorted({label for _, label, split in named if split == "train"}))
    if not classes:
        problems.append(f"{path} names no images to train on")
    elif len(classes) == 1:
        problems.append(f"{path} has a single class, {classes[0]!r}: two at least are needed")
    problems += [
        f"{path}: {label!r} is a class that the training images lack"
        for label in sorted({label for _, label, _ in named} - set(classes))
    ]
    named.sort(key=lambda row: (row[1], str(row[0]).split("/")))
    files = {
        name: [
            (file, classes.index(label))
            for file, label, split in named
            if split == name and label in classes
        ]
        for name in SPLITS
        if name in {split for _, _, split in named}
    }
    return Listing(classes, files, tuple(problems), tuple(notes))


_Rows = tuple[Sequence[str], Iterable[tuple[str, dict[str, str]]]]


def _csv(path: Path) -> _Rows:
    """Names of the columns, and where each row stands with what it says. Raises DataError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(str(error)) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}): "
            "save it as CSV in UTF-8"
        ) from error
    # What spreadsheets write where a comma is the decimal point.
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True
        )
        columns = [name.strip().lower() for name in next(reader, [])]
        rows = [(f"line {reader.line_num}", row) for row in reader if row]
    except csv.Error as error:
        raise DataError(f"{path} is no CSV: {error}") from error
    return columns, (
        (where, dict(zip(columns, [*row, *[""] * len(columns)], strict=False)))
        for where, row in rows
    )


def _parquet(path: Path) -> _Rows:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(
            f"reading {path} needs pyarrow, which is not installed: "
            "pip install 'convoy-serving[parquet]'"
        )
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            names = {name.lower(): name for name in file.schema_arrow.names}
            wanted = [name for name in ("path", "label", "split") if name in names]
            table = file.read([names[name] for name in wanted])
    except (ArrowException, OSError) as error:
        raise DataError(f"{path} is no Parquet file that can be read: {error}") from error
    rows = zip(*(table[names[name]].to_pylist() for name in wanted), strict=True)
    return list(names), (
        (
            f"row {number}",
            {
                name: "" if cell is None else str(cell)
                for name, cell in zip(wanted, row, strict=True)
            },
        )
        for number, row in enumerate(rows, 1)
    )


def _some(items: Sequence[object]) -> str:
    return ", ".join(map(str, items[:3])) + (" ..." if len(items) > 3 else "")


def _read(
    files: Sequence[tuple[Path, int]],
    classes: Sequence[str],
    target: Target,
    kept: Cache,
    settings: TrainingSettings,
    track: Track,
    doing: str,
) -> Split:
    paths = tuple(file for file, _ in files)
    inputs, digests, readable = kept.read(paths)
    errors: dict[int, str] = {}

    def read(position: int) -> None:
        try:
            data = paths[position].read_bytes()
            if target == IDENTITY:
                inputs[position] = shown = images.decode(data, target)
            else:
                inputs[position], shown = images.decode_all(data, (target, IDENTITY))
            digests[position] = np.frombuffer(hashlib.sha256(shown.data).digest(), np.uint8)
            readable[position] = True
        except (InvalidImage, OSError) as error:
            errors[position] = f"{paths[position]}: {error}"

    unknown = np.flatnonzero(~readable).tolist()
    in_threads(read, unknown, track, doing)
    if len(errors) < len(unknown):
        kept.write(inputs, digests, readable)
    labels = np.array([label for _, label in files], np.int64)
    split = Split(inputs, labels, paths, tuple(digest.tobytes() for digest in digests))
    if not errors:
        return split
    listed = "\n  ".join(errors[position] for position in sorted(errors)[:10])
    text = f"{len(errors)} of {len(files)} files can't be read:\n  {listed}"
    for label in np.unique(labels):
        if not readable[labels == label].any():
            raise DataError(f"class {classes[label]!r} has no readable image; {text}")
    if not settings.skip_unreadable:
        raise DataError(f"{text}\nmend or remove them, or leave them out with --skip-unreadable")
    log.warning("%s\nthey are left out", text)
    return split.only(readable)
