"""The training profile: what the images that a version was judged on look like, as counts in bins.

Training makes it from the test images and the exported graph's answers, and the manifest keeps it. The
service measures what it answers by the same function, so the two can't drift apart by themselves;
`convoy_service.observers.drift_monitor` compares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from convoy_service.artifacts import images
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Manifest, Probabilities

Flags = npt.NDArray[np.bool_]
Values = npt.NDArray[Any]

# Of what `measure` measures: a profile of another form is not compared with, its numbers mean
# something else.
_FORM = 1

# Of an image with more rows, so many (to twice as many) are looked at, evenly spread, and their
# neighbours below.
_ROWS = 16

# Measured at once, for the memory's sake.
_CHUNK = 256

# Bins that are the same in all profiles. The certain end is coarse: a graph in another precision, or on
# another device, may be 0.01 off there, which is no drift. Sizes go by octaves.
_CONFIDENCES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Of anything else, each bin has a tenth of the images.
_SHARES = np.arange(1, 10) / 10


@dataclass(frozen=True)
class Bins:
    """`counts[i]` values were over `edges[i - 1]`, up to `edges[i]`; the outer bins have no end."""

    edges: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Profile:
    """By feature, see `measure` and `size_of`."""

    features: dict[str, Bins]
    form: int = _FORM


def measure(pixels: Pixels, probabilities: Probabilities, unsure: Flags) -> dict[str, Values]:
    """Each feature `[N]` of uint8 pixels `[N, H, W, C]`, answers to them `[N, classes]`, and which of
    these are unsure `[N]`:

    - class: the one that is named; confidence: its probability; unsure: 1 or 0;
    - brightness: the mean of the pixels, and contrast: their standard deviation, both 0 to 255;
    - sharpness: the mean squared difference of neighbours over twice the variance, which is 1 less
      their correlation; 0 for an even image. The energy of the gradient, a measure of focus (Subbarao
      and others, 1993; Pertuz and others, 2013), made independent of contrast.
    """
    return {
        "class": probabilities.argmax(axis=1),
        "confidence": probabilities.max(axis=1),
        "unsure": unsure.astype(np.int64),
        **_looks(pixels),
    }


def _looks(pixels: Pixels) -> dict[str, Values]:
    count, step = len(pixels), max(1, pixels.shape[1] // _ROWS)
    rows, below = pixels[:, ::step].astype(np.float32), pixels[:, 1::step]
    across = (rows[:, :, 1:] - rows[:, :, :-1]).reshape(count, -1)
    # The last row may have none below.
    down = (below - rows[:, : below.shape[1]]).reshape(count, -1)
    flat = rows.reshape(count, -1)
    brightness = flat.mean(axis=1)
    flat -= brightness[:, np.newaxis]
    variance = _mean_square(flat)
    # The variance of an even image is 0; one level in one pixel makes far more than is added.
    sharpness = (_mean_square(across) + _mean_square(down)) / (4 * variance + 1e-6)
    return {"brightness": brightness, "contrast": np.sqrt(variance), "sharpness": sharpness}


def _mean_square(values: npt.NDArray[np.float32]) -> Values:
    """`[N]` of `[N, K]`; 0 where K is."""
    squares: npt.NDArray[np.float32] = np.einsum("ij,ij->i", values, values)
    return squares / np.float32(max(1, values.shape[1]))


def size_of(image: bytes | Pixels) -> int:
    """The shorter side, in pixels, of an image as it came, of which only the header is read.

    Raises InvalidImage.
    """
    if isinstance(image, bytes):
        return min(images.probe(image, math.inf)[:2])
    height, width = image.shape[:2]
    return int(min(height, width))


def make(
    pixels: Pixels, probabilities: Probabilities, unsure: Flags | None, sizes: Sequence[int]
) -> Profile:
    """Of images that a version was judged on, see `measure`; `unsure` is None where it has no
    thresholds. `sizes` are the shorter sides of the images as they came.
    """
    flags = np.zeros(len(pixels), bool) if unsure is None else unsure
    parts = [
        measure(pixels[rows], probabilities[rows], flags[rows])
        for rows in (slice(start, start + _CHUNK) for start in range(0, len(pixels), _CHUNK))
    ]
    measured = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    measured["size"] = np.asarray(sizes)
    if unsure is None:
        del measured["unsure"]
    fixed: dict[str, Sequence[float]] = {
        "class": range(probabilities.shape[1] - 1),
        "confidence": _CONFIDENCES,
        "unsure": (0,),
        "size": _SIZES,
    }
    return Profile({name: _sort(values, fixed.get(name)) for name, values in measured.items()})


def _sort(values: Values, edges: Sequence[float] | None) -> Bins:
    if edges is None:
        # Rounded, for people to read; equal ones would make bins that hold nothing.
        edges = sorted({float(f"{edge:.4g}") for edge in np.quantile(values, _SHARES)})
    where = np.searchsorted(np.asarray(edges, np.float64), values, side="left")
    return Bins(list(edges), np.bincount(where, minlength=len(edges) + 1).tolist())


def read(manifest: Manifest) -> Profile | None:
    """The profile in a manifest; None where there is none, or one of another form."""
    try:
        found = msgspec.convert(manifest.training.get("profile"), Profile)
    except msgspec.ValidationError:
        return None
    whole = all(
        len(bins.counts) == len(bins.edges) + 1 and sum(bins.counts) > 0 and min(bins.counts) >= 0
        for bins in found.features.values()
    )
    classes = found.features.get("class", Bins([], [])).counts
    return found if found.form == _FORM and whole and len(classes) == len(manifest.labels) else None
