"""Labelled images: the built-in digits, or a folder with one subfolder for each class."""

import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from service import bundle, images
from service.cpu import whole_cores
from service.errors import ConvoyError, InvalidImage
from service.images import Pixels, Target
from service.settings import IMAGE_SUFFIXES
from training.settings import TrainingSettings

log = logging.getLogger("convoy.data")

Labels = npt.NDArray[np.int64]

# Calls back with an iterable's items, so that a caller can show how far it is.
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]

_PROBED = 256
# The size at which images are compared, whatever size they are trained at.
_IDENTITY = Target(32, 32, 3)


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
        digest = hashlib.sha256(self.inputs.tobytes())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def _only(self, chosen: npt.NDArray[np.bool_]) -> "Split":
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


def _untracked(items: Iterable[Any], _doing: str, _total: int) -> Iterable[Any]:
    return items


def load(settings: TrainingSettings, track: Track = _untracked) -> Dataset:
    """The data that `settings` name, decoded, in splits.

    A test split that is not given is cut by a hash of what each image shows: it stays the same when
    images are added, and copies of an image never end up on both sides. Of a test split that is
    given, copies among the training images are left out of these. Raises DataError.
    """
    name = model_name(settings)
    classes, target, given = _given(settings, track, ("train", "test"))
    given = _with_test(given, settings)
    train, test = given["train"], given["test"]
    known = set(test.identities)
    fresh = np.array([identity not in known for identity in train.identities], bool)
    if not fresh.all():
        first = train.files and train.files[int(fresh.argmin())]
        log.warning(
            "%d training images are test images too, such as %s: they are not trained on",
            int((~fresh).sum()),
            first,
        )
        train = train._only(fresh)
    train, validation = _cut(train, settings.validation_share, f"validation {settings.split_seed}")
    data = Dataset(name, classes, target, train, validation, test)
    for split, what in ((train, "train on"), (validation, "validate on"), (test, "test with")):
        for missing in sorted(set(range(len(classes))) - set(split.labels.tolist())):
            raise DataError(
                f"class {classes[missing]!r} has no image left to {what}: add images to it"
            )
    return data


def model_name(settings: TrainingSettings) -> str:
    """The name of the model, of the data's folder if none is set. Raises ConvoyError."""
    name = settings.name
    if not name:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(settings.data).resolve().name).strip("-._")
        if not name:
            raise DataError(f"{settings.data} makes no name for a model: give one with --name")
    bundle.check_name(name)
    return name


def load_test(settings: TrainingSettings, track: Track = _untracked) -> tuple[list[str], Split]:
    """The names of the classes, and the test split alone, as `load` has it."""
    classes, _, given = _given(settings, track, ("test",))
    return list(classes), _with_test(given, settings)["test"]


def _with_test(given: dict[str, Split], settings: TrainingSettings) -> dict[str, Split]:
    """What is given, with a test split cut off the training images where there is none."""
    if "test" in given:
        return given
    train, test = _cut(given["train"], settings.test_share, f"test {settings.split_seed}")
    return {"train": train, "test": test}


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
    return split._only(~chosen), split._only(chosen)


_Given = tuple[tuple[str, ...], Target, dict[str, Split]]


def _given(settings: TrainingSettings, track: Track, wanted: Sequence[str]) -> _Given:
    """Classes, size and splits of the data, those of `wanted` that they come with."""
    folder = Path(settings.data)
    if settings.data == "digits" and not folder.exists():
        return _digits(settings)
    return _folder(folder, settings, track, wanted)


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


def _folder(
    folder: Path, settings: TrainingSettings, track: Track, wanted: Sequence[str]
) -> _Given:
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder: --data takes one with a subfolder for each class")
    parts = {"train": folder / "train", "test": folder / "test"}
    present = [part.is_dir() and any(map(_is_class, part.iterdir())) for part in parts.values()]
    if any(present) and not all(present):
        raise DataError(
            f"{folder} has classes in only one of train/ and test/: give both, "
            "or have the test cut off with --data naming the folder of classes itself"
        )
    if not any(present):
        parts = {"train": folder}
    classes = tuple(sorted(f.name for f in parts["train"].iterdir() if _is_class(f)))
    if not classes:
        raise DataError(f"{parts['train']} has no subfolders: put each class's images into one")
    if len(classes) == 1:
        raise DataError(
            f"{parts['train']} has a single class, {classes[0]!r}: two at least are needed"
        )
    found = {name: _list(part, classes) for name, part in parts.items()}
    target = _choose_target([file for file, _ in found["train"]], settings)
    given = {
        name: _read(files, target, settings.skip_unreadable, track, f"reading {name} images")
        for name, files in found.items()
        if name in wanted or len(found) == 1
    }
    return classes, target, given


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _list(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    unknown = sorted({f.name for f in folder.iterdir() if _is_class(f)} - set(classes))
    if unknown:
        raise DataError(f"{folder / unknown[0]} is a class that the training images lack")
    found, ignored = [], []
    for link in (f for f in folder.rglob("*") if f.is_symlink() and f.is_dir()):
        if link.parent != folder:
            log.warning("%s is a link to a folder inside of a class: it is left out", link)
    for label, name in enumerate(classes):
        files = sorted(f for f in (folder / name).rglob("*") if not f.is_dir() and f.name[0] != ".")
        chosen = [f for f in files if f.suffix.lower() in IMAGE_SUFFIXES]
        ignored += [f for f in files if f.suffix.lower() not in IMAGE_SUFFIXES]
        if not chosen:
            raise DataError(
                f"{folder / name} has no image (by name: {', '.join(sorted(IMAGE_SUFFIXES))}): "
                "add some or remove the folder"
            )
        found += [(file, label) for file in chosen]
    if ignored:
        log.warning(
            "%d files are no images by their name and are left out: %s ...",
            len(ignored),
            ignored[0],
        )
    return found


def _choose_target(files: Sequence[Path], settings: TrainingSettings) -> Target:
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


def _read(
    files: Sequence[tuple[Path, int]], target: Target, skip: bool, track: Track, doing: str
) -> Split:
    inputs = np.empty((len(files), *target.shape), np.uint8)
    identities = [b""] * len(files)
    errors: dict[int, str] = {}

    def read(position: int) -> None:
        file = files[position][0]
        try:
            data = file.read_bytes()
            inputs[position] = images.decode(data, target)
            identities[position] = hashlib.sha256(images.decode(data, _IDENTITY).tobytes()).digest()
        except (InvalidImage, OSError) as error:
            errors[position] = f"{file}: {error}"

    with ThreadPoolExecutor(whole_cores()) as pool:
        for _ in track(pool.map(read, range(len(files))), doing, len(files)):
            pass
    labels = np.array([label for _, label in files], np.int64)
    split = Split(inputs, labels, tuple(file for file, _ in files), tuple(identities))
    if not errors:
        return split
    listed = "\n  ".join(errors[position] for position in sorted(errors)[:10])
    text = f"{len(errors)} of {len(files)} files can't be read:\n  {listed}"
    readable = np.ones(len(files), bool)
    readable[list(errors)] = False
    for file, label in files:
        if not readable[labels == label].any():
            raise DataError(f"{file.parent} has no readable image; {text}")
    if not skip:
        raise DataError(f"{text}\nmend or remove them, or leave them out with --skip-unreadable")
    log.warning("%s\nthey are left out", text)
    return split._only(readable)
