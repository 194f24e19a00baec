"""The version folder, which is written once and never changed: read it, verify it, write it.

models/<name>/config.pbtxt, labels.txt    so that Triton serves the very same folder
models/<name>/<version>/                  a positive integer; the highest is the newest
    model.onnx                            uint8 [N, H, W, C] in, float32 [N, classes] out
    model.int8.onnx, model.fp16.onnx      the same in other precisions, where they passed the gate
    golden.npz                            a few real inputs and the answers they must give
    report.html                           what a person reads
    weights.npz                           the trained network's own, to go on training from
    manifest.json                         the rest, and the sha256 of the other files
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from convoy_service.artifacts.files import hold_lock, sync_folder, write_flushed
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.errors import BrokenVersion, ConvoyError

Probabilities = npt.NDArray[np.float32]

MODEL, GOLDEN, MANIFEST = "model.onnx", "golden.npz", "manifest.json"
REPORT, WEIGHTS = "report.html", "weights.npz"
# Weights that graphs have in common, as ONNX's external data.
DATA = "model.onnx.data"
# The precisions that a version may hold, and where.
VARIANTS = {"fp32": MODEL, "int8": "model.int8.onnx", "fp16": "model.fp16.onnx"}
_TEMPORARY, _ABANDONED_S = ".publishing-", 24 * 3600.0
# Of a thousand classes it holds a million numbers.
_LARGEST_MANIFEST = 64 * 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True)
class File:
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Scores:
    """Of the ONNX file itself, on test images that chose nothing."""

    accuracy: float
    correct: int
    images: int
    log_loss: float


@dataclass(frozen=True)
class Parity:
    """The ONNX file under the serving code, against the network that was trained."""

    max_abs_difference: float
    label_agreement: float
    images: int
    batch_sizes: list[int]


@dataclass(frozen=True)
class Variant:
    """A graph of the version in one precision, as it was measured when it was made."""

    scores: Scores
    # Share of the test images to which it gives the float32 graph's label.
    label_agreement: float
    images_per_s: float
    # Over the float32 graph, both at the largest batch on the device named, as `Model.device` is.
    speedup: float
    device: str


@dataclass(frozen=True)
class Thresholds:
    """An answer is unsure where its label's probability is below that class's threshold, or below
    `unsure`. Chosen on validation images; `coverage` is the share of test images that are sure,
    `accuracy` the share of those that are right.
    """

    unsure: Annotated[float, msgspec.Meta(ge=0, le=1)]
    # In the order of the labels.
    per_class: list[Annotated[float, msgspec.Meta(ge=0, le=1)]]
    coverage: float
    accuracy: float

    @cached_property
    def _limits(self) -> npt.NDArray[np.float64]:
        return np.maximum(self.per_class, self.unsure)

    def limits(self, probabilities: Probabilities) -> npt.NDArray[np.float64]:
        """What the label's probability must reach in each of the answers `[N, classes]`, `[N]`."""
        found: npt.NDArray[np.float64] = self._limits[probabilities.argmax(axis=1)]
        return found


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds. `scores` and `parity` are None where nobody measured them."""

    input: str
    output: str
    pixels: Target
    labels: list[str]
    max_batch_size: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    created: str
    files: dict[str, File] = field(default_factory=dict)
    scores: Scores | None = None
    parity: Parity | None = None
    # By their names in VARIANTS, fp32 too; empty where nobody measured them.
    variants: dict[str, Variant] = field(default_factory=dict)
    thresholds: Thresholds | None = None
    # All that was found on the test images: `convoy_training.evaluation.scores.Evaluation`.
    evaluation: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    # The graph takes batches of exactly `max_batch_size`; smaller ones are padded to it.
    fixed_batch: bool = False
    provenance: dict[str, str] = field(default_factory=dict)
    format: int = 1


@dataclass(frozen=True)
class Golden:
    """`pixels` uint8 [k, H, W, C] and the `probabilities` float32 [k, classes] they must give; those
    of the graphs in other precisions by their names in VARIANTS.
    """

    pixels: Pixels
    probabilities: Probabilities
    variants: dict[str, Probabilities] = field(default_factory=dict)


@dataclass(frozen=True)
class Bundle:
    """A version whose files are there and are the ones that its manifest lists."""

    folder: Path
    name: str
    version: int
    manifest: Manifest
    onnx: bytes = field(repr=False)
    golden: Golden = field(repr=False)
    # Those in other precisions, by their names in VARIANTS.
    variants: dict[str, bytes] = field(default_factory=dict, repr=False)
    data: bytes = field(default=b"", repr=False)
    # The sha256 of its manifest, and so of all that it holds.
    digest: str = ""

    @property
    def sha256(self) -> str:
        return self.manifest.files[MODEL].sha256

    def check(self, digest: str) -> None:
        """Raises BrokenVersion where it has other contents than this `digest` says; "" is any."""
        if digest not in ("", self.digest):
            raise BrokenVersion(
                f"{self.folder} was changed: a version never changes, publish a new one"
            )

    def weights(self) -> list[npt.NDArray[Any]]:
        """Those of the trained network, in its order; empty where the version has none.

        Raises BrokenVersion where the file was changed.
        """
        if WEIGHTS not in self.manifest.files:
            return []
        data = _read_verified(self.folder / WEIGHTS, self.manifest.files[WEIGHTS])
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return [arrays[str(number)] for number in range(len(arrays.files))]

    def fastest(self, device: str) -> str:
        """The variant whose speed-up was the highest on a device as this one, a card or a CPU; fp32
        where none was measured there, or none was faster.
        """
        speedups = {
            name: measured.speedup
            for name, measured in self.manifest.variants.items()
            if name in self.variants
            and measured.speedup > 1
            and measured.device.startswith("cpu") == device.startswith("cpu")
        }
        return max(speedups, key=lambda name: speedups[name], default="fp32")


def names(models: Path) -> list[str]:
    """The models in a models folder: each folder in it that has at least one version. One that can't
    be read is none. Raises OSError where `models` can't.
    """
    found = []
    for folder in folders(models):
        with contextlib.suppress(OSError):
            if versions(folder):
                found.append(folder.name)
    return found


def folders(models: Path) -> list[Path]:
    """What may be models in a models folder, by their names in order. Raises OSError."""
    try:
        return sorted(f for f in models.iterdir() if _NAME.fullmatch(f.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def versions(model: Path) -> list[int]:
    """The versions in a model's folder, oldest first, whether they are whole or not. Raises OSError."""
    if not model.is_dir():
        return []
    with os.scandir(model) as entries:
        return sorted(int(e.name) for e in entries if _VERSION.fullmatch(e.name) and e.is_dir())


def is_name(text: str) -> bool:
    """Whether this can be the name of a model, or of a file in a version."""
    return _NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether this can be the name of a version's folder."""
    return _VERSION.fullmatch(text) is not None


def check_name(name: str) -> None:
    """Raises ConvoyError where `name` can't be the name of a model."""
    if not _NAME.fullmatch(name):
        raise ConvoyError(
            f"{name!r} can't name a model: use letters, digits, '.', '_' and '-', "
            "at most 128, beginning with a letter or digit"
        )


def read(folder: Path) -> Bundle:
    """The version in `folder`, every file checked against the manifest's sha256.

    Raises BrokenVersion, naming the file and what is wrong with it.
    """
    manifest, digest = read_described(folder)
    data = {name: _read_verified(folder / name, file) for name, file in manifest.files.items()}
    for name in (MODEL, GOLDEN):
        if name not in data:
            raise BrokenVersion(f"{folder / MANIFEST}: does not list {name}")
    try:
        with np.load(io.BytesIO(data[GOLDEN]), allow_pickle=False) as arrays:
            others = {name: arrays[name] for name in VARIANTS if name in arrays}
            golden = Golden(arrays["pixels"], arrays["probabilities"], others)
    # The readers of numpy, zip and zlib each raise their own.
    except Exception as error:
        raise BrokenVersion(f"{folder / GOLDEN}: {error}") from error
    answers = [golden.probabilities, *golden.variants.values()]
    kinds = {(array.dtype.name, array.ndim) for array in answers}
    if (golden.pixels.dtype.name, golden.pixels.ndim) != ("uint8", 4) or kinds != {("float32", 2)}:
        raise BrokenVersion(
            f"{folder / GOLDEN}: expected pixels uint8 [k, H, W, C] and probabilities float32 "
            "[k, classes]"
        )
    variants = {
        name: data[file] for name, file in VARIANTS.items() if file in data and file != MODEL
    }
    for name in variants:
        if name not in golden.variants:
            raise BrokenVersion(f"{folder / GOLDEN}: has no answers of {VARIANTS[name]}")
    version = int(folder.name)
    return Bundle(
        folder, folder.parent.name, version, manifest, data[MODEL], golden, variants,
        data.get(DATA, b""), digest,
    )  # fmt: skip


def without_graphs(bundle: Bundle) -> Bundle:
    """The same without what only serves to load it."""
    none = Golden(bundle.golden.pixels[:0], bundle.golden.probabilities[:0])
    return dataclasses.replace(bundle, onnx=b"", golden=none, variants={}, data=b"")


def describe(data: bytes) -> File:
    """What a manifest says of a file."""
    return File(hashlib.sha256(data).hexdigest(), len(data))


def read_manifest(folder: Path) -> Manifest:
    """What `manifest.json` in `folder` says. Raises BrokenVersion; checks no other file."""
    return read_described(folder)[0]


def read_described(folder: Path) -> tuple[Manifest, str]:
    """The manifest in `folder`, and its sha256. Raises BrokenVersion; checks no other file."""
    written = _read_file(folder / MANIFEST, _LARGEST_MANIFEST)
    return _decode_manifest(folder / MANIFEST, written), hashlib.sha256(written).hexdigest()


def contents(path: Path, limit: int = 0) -> bytes:
    """Of a regular file, of at most `limit` bytes. Raises OSError."""
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit and size > limit:
            raise OSError(errno.EFBIG, f"{size} bytes are too many, the limit is {limit}")
        return file.read(limit or -1)


def sha256(path: Path) -> str:
    """Of a regular file, which may be larger than memory. Raises OSError."""
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader]:
    """A regular file: whatever else may lie there would keep its reader waiting. Raises OSError."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "is no regular file")
        yield file


def _read_file(path: Path, limit: int) -> bytes:
    try:
        return contents(path, limit)
    except FileNotFoundError:
        raise BrokenVersion(
            f"{path} is missing: the folder is not copied completely, or is no version"
        ) from None
    except OSError as error:
        raise BrokenVersion(f"{path}: {error.strerror}") from error


def _decode_manifest(path: Path, written: bytes) -> Manifest:
    try:
        manifest = msgspec.json.decode(written, type=Manifest)
    except (UnicodeDecodeError, msgspec.MsgspecError) as error:
        raise BrokenVersion(f"{path}: {error}") from error
    if manifest.format != 1:
        raise BrokenVersion(
            f"{path}: format {manifest.format} is newer than this Convoy: update it"
        )
    for name in manifest.files:
        if not _NAME.fullmatch(name) or name == MANIFEST:
            raise BrokenVersion(f"{path}: lists {name!r}, which is no file of a version")
    own = manifest.thresholds and len(manifest.thresholds.per_class)
    if own is not None and own != len(manifest.labels):
        raise BrokenVersion(
            f"{path}: thresholds of {own} classes for {len(manifest.labels)} labels"
        )
    return manifest


def _read_verified(path: Path, file: File) -> bytes:
    try:
        data = contents(path)
    except OSError as error:
        raise BrokenVersion(f"{path}: {error.strerror}") from error
    if len(data) != file.bytes:
        raise BrokenVersion(f"{path}: {len(data)} bytes, the manifest says {file.bytes}")
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise BrokenVersion(f"{path}: its sha256 is not the manifest's: the file was changed")
    return data


def write(
    model: Path,
    manifest: Manifest,
    onnx: bytes,
    golden: Golden,
    variants: Mapping[str, bytes] = MappingProxyType({}),
    report: str = "",
    weights: Sequence[npt.NDArray[Any]] = (),
    data: bytes = b"",
) -> Bundle:
    """Makes the next version in the folder `model` and returns it, read back and verified.

    `variants`: graphs in other precisions by their names in VARIANTS, with answers in `golden`.
    `weights`: the trained network's own, for `Bundle.weights`. `data`: what graphs have in DATA.

    The files are made in a temporary folder beside it, the manifest last, and appear by one
    rename: a reader sees the whole version or none, a kill or a full disk leaves nothing but a
    hidden folder, and of two writers at once each gets a number of its own.

    Raises ConvoyError where the disk refuses.
    """
    check_name(model.name)
    if unproven := variants.keys() - golden.variants.keys():
        raise ValueError(f"no golden answers of {', '.join(sorted(unproven))}")
    archive = io.BytesIO()
    answers = {"probabilities": golden.probabilities, **golden.variants}
    np.savez_compressed(archive, allow_pickle=False, pixels=golden.pixels, **answers)
    files = {MODEL: onnx, GOLDEN: archive.getvalue()}
    files.update((VARIANTS[name], graph) for name, graph in variants.items())
    if data:
        files[DATA] = data
    if report:
        files[REPORT] = report.encode()
    if weights:
        archive = io.BytesIO()
        named = {str(number): array for number, array in enumerate(weights)}
        np.savez_compressed(archive, allow_pickle=False, **named)
        files[WEIGHTS] = archive.getvalue()
    listed = {name: describe(file) for name, file in files.items()}
    manifest = dataclasses.replace(manifest, files=listed)
    files[MANIFEST] = msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"
    beside = {
        "labels.txt": "".join(f"{label}\n" for label in manifest.labels),
        "config.pbtxt": triton_config(model.name, manifest),
    }
    try:
        model.mkdir(parents=True, exist_ok=True)
        with _temporary_folder(model) as temporary:
            version = temporary / "version"
            version.mkdir()
            for name, file in files.items():
                write_flushed(version / name, file)
            sync_folder(version)
            # Before the version appears, so that a disk that is full by now publishes nothing.
            for name, text in beside.items():
                write_flushed(temporary / name, text.encode())
            folder = _rename_to_next(version, model)
            for name in beside:
                (temporary / name).replace(model / name)
        sync_folder(model)
    except OSError as error:
        raise ConvoyError(
            f"the new version could not be written to {model}: {error.strerror or error}; "
            "nothing was published"
        ) from error
    return read(folder)


@contextlib.contextmanager
def exclusive(model: Path) -> Iterator[None]:
    """Holds the folder `model` against other publishers, made if need be: a look at what serves, the
    verdict and the rename belong together. Waits for who holds it; a killed holder lets go.
    """
    check_name(model.name)
    try:
        model.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(model, os.O_RDONLY)
    except OSError as error:
        raise ConvoyError(f"{model} can't be published to: {error.strerror}") from error
    try:
        hold_lock(descriptor)
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            model.rmdir()  # where it was made for nothing


def triton_config(name: str, manifest: Manifest) -> str:
    """`config.pbtxt` for Triton's ONNX Runtime backend, in protobuf's text format."""
    # Triton's batching needs a free batch axis; to a fixed one it passes requests as they are.
    batch = [manifest.max_batch_size] if manifest.fixed_batch else []
    pixels, classes = [*batch, *manifest.pixels.shape], [*batch, len(manifest.labels)]
    # The names of tensors come from a file: they may hold quotes.
    source, sink = (json.dumps(n, ensure_ascii=False) for n in (manifest.input, manifest.output))
    return f"""\
name: "{name}"
platform: "onnxruntime_onnx"
max_batch_size: {0 if batch else manifest.max_batch_size}
input [ {{ name: {source} data_type: TYPE_UINT8 dims: {pixels} }} ]
output [
  {{
    name: {sink}
    data_type: TYPE_FP32
    dims: {classes}
    label_filename: "labels.txt"
  }}
]
{"" if batch else "dynamic_batching { }"}
"""


@contextlib.contextmanager
def _temporary_folder(model: Path) -> Iterator[Path]:
    # Hidden and not a number: neither we nor Triton take it for a version.
    for left in model.glob(f"{_TEMPORARY}*"):
        # By a writer that was killed; one that is at work is younger, and may be done by now.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=model))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _rename_to_next(temporary: Path, model: Path) -> Path:
    while True:
        folder = model / str(max(versions(model), default=0) + 1)
        if not _VERSION.fullmatch(folder.name):
            raise ConvoyError(f"{folder} would be too high a version: remove the one before it")
        try:
            return temporary.rename(folder)
        except OSError:
            # Another writer took this number; anything else is an error.
            if not folder.is_dir():
                raise
