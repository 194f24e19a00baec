"""Small pictures inside the page, as data URLs.

The report joins all pictures of one kind to one image, a sprite. Each picture on the page is a view of
a part of its sprite.
"""

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from convoy_service.artifacts.images import Pixels
from convoy_training.report.record import Activations, Layer

# The longest side in pixels: of pictures, and of maps. The budget counts the pixels of all maps together.
_SIDE, _MAP, _MAP_BUDGET = 64, 32, 40_000
_PER_ROW = 16
_COLOURS = 32
_VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 74, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (109, 205, 89), (180, 222, 44), (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """A picture on the page: the part `box` of the sprite `name`. `label` describes the picture."""

    sprite: str
    box: str
    label: str


@dataclass(frozen=True)
class Sprite:
    """The image that views show parts of. `address` is a data URL; sizes are in pixels."""

    name: str
    address: str
    width: int
    height: int


class SpriteSheet:
    """Collects pictures for one sprite. Pictures of different heights get separate rows."""

    def __init__(self, name: str, encode: Callable[[Any], str]) -> None:
        self._name, self._encode = name, encode
        self._rows: list[list[npt.NDArray[Any]]] = []
        self._size = (0, 0)
        self._top = 0

    def add(self, tile: "npt.NDArray[Any]", label: str) -> View:
        """Adds a picture: pixels uint8 `[H, W, C]`, or a map float32 `[H, W]` of values from 0 to 1."""
        tile = _fitted_picture(tile) if tile.dtype == np.uint8 else tile
        height, width = tile.shape[:2]
        # JPEG works in squares of 8 pixels. Two pictures must not share a square.
        down, across = (-(-side // 8) * 8 for side in (height, width))
        if self._size != (down, across) or len(self._rows[-1]) == _PER_ROW:
            self._top += self._size[0]
            self._size = (down, across)
            self._rows.append([])
        padding = ((0, down - height), (0, across - width), *[(0, 0)] * (tile.ndim - 2))
        x = len(self._rows[-1]) * across
        self._rows[-1].append(np.pad(tile, padding, "edge"))
        return View(self._name, f"{x} {self._top} {width} {height}", label)

    def sprite(self) -> Sprite | None:
        """The sprite of all pictures added so far; None if there are none."""
        if not self._rows:
            return None
        rows = [np.concatenate(row, axis=1) for row in self._rows]
        width = max(row.shape[1] for row in rows)
        whole = np.concatenate(
            [
                np.pad(row, ((0, 0), (0, width - row.shape[1]), *[(0, 0)] * (row.ndim - 2)))
                for row in rows
            ]
        )
        return Sprite(self._name, self._encode(whole), whole.shape[1], whole.shape[0])


def photograph(pixels: Pixels) -> str:
    """PNG or JPEG, whichever is smaller. Drawings stay exact; photographs lose little."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=85, subsampling=0, optimize=True)
    if len(png.getvalue()) <= len(jpeg.getvalue()):
        return _data_url("image/png", png.getvalue())
    return _data_url("image/jpeg", jpeg.getvalue())


def heat(values: Activations) -> str:
    """PNG with few colours, from dark to bright: those of viridis, by Smith and van der Walt."""
    index = np.round(values * (_COLOURS - 1)).astype(np.uint8)
    at = np.linspace(0, len(_VIRIDIS) - 1, _COLOURS)
    channels = [
        np.interp(at, range(len(_VIRIDIS)), channel) for channel in zip(*_VIRIDIS, strict=True)
    ]
    return palette(index, np.stack(channels, axis=1).round().astype(np.uint8), b"")


def palette(
    index: "npt.NDArray[np.uint8]", colours: "npt.NDArray[np.uint8]", opacity: bytes
) -> str:
    """PNG of a palette. `index` `[H, W]` points into `colours` `[K, 3]` and `opacity` (K bytes, or none)."""
    image = Image.fromarray(index)
    image.putpalette(colours.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, **({"transparency": opacity} if opacity else {}))
    return _data_url("image/png", buffer.getvalue())


def _data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _fitted_picture(pixels: Pixels) -> Pixels:
    """At most _SIDE pixels a side, so that the page stays small."""
    height, width = pixels.shape[:2]
    if max(height, width) <= _SIDE:
        return pixels
    factor = _SIDE / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    grey = pixels.shape[-1] == 1
    small = np.asarray(Image.fromarray(pixels[..., 0] if grey else pixels).resize(size))
    return small[..., np.newaxis] if grey else small


def scaled(values: Activations) -> Activations:
    """Activations scaled to 0 to 1. The few largest values are cut, because they would darken the rest."""
    low = min(0.0, float(values.min()))
    high = float(np.quantile(values, 0.995)) if values.size > 400 else float(values.max())
    high = high if high > low else float(values.max())
    between: Activations = np.clip((values - low) / ((high - low) or 1), 0, 1)
    return between


def fitted_map(values: Activations) -> Activations:
    """One map `[H, W]`, at most _MAP pixels a side."""
    height, width = values.shape
    if max(height, width) <= _MAP:
        return values
    factor = _MAP / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = Image.fromarray(np.ascontiguousarray(values)).resize(size, Image.Resampling.BOX)
    small: Activations = np.clip(np.asarray(image), 0, 1)
    return small


def maps_per_layer(layers: Sequence[Layer]) -> int:
    """How many maps of each layer the page shows: fewer if there are many layers."""
    area = sum(math.prod(min(side, _MAP) for side in la.activations.shape[:2]) for la in layers)
    return next((n for n in (16, 12) if n * area <= _MAP_BUDGET), 8)
