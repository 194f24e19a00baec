"""Bytes of an image file, or pixels of any size, to the uint8 pixels that a model takes.

Training decodes with this module too, so what a network learned from and what it is asked
about went through the same code.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError, WebPImagePlugin

from convoy_service.errors import InvalidImage

Pixels = npt.NDArray[np.uint8]
Resize = Literal["stretch", "crop"]
Box = tuple[float, float, float, float]

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
DEFAULT_MAX_MEGAPIXELS = 50.0

# The most that a JPEG or GIF can have. One pixel wide and fifty million high would be within
# `max_megapixels`, and take ten seconds and two gigabytes to resize.
MAX_SIDE = 65_535

# Pillow would load its decoders at the first image, and make that caller wait.
Image.preinit()
assert WebPImagePlugin.WebPImageFile.format in FORMATS

# The limit is ours (`max_megapixels`): it is checked before pixels are decoded, with our own words.
Image.MAX_IMAGE_PIXELS = None

# Pillow warns about odd metadata, which is a caller's affair, on the server's standard error.
warnings.filterwarnings("ignore", module=r"PIL\.")

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Target:
    """What a model takes: `height` and `width` in pixels, 1 (grey) or 3 (RGB) `channels`.

    `resize` says how other sizes get there: `stretch` ignores the aspect ratio and keeps the
    whole picture, `crop` keeps the ratio and the largest centred part.
    """

    height: int
    width: int
    channels: int
    resize: Resize = "stretch"

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.height, self.width, self.channels)


def decode(data: bytes, target: Target, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS) -> Pixels:
    """The pixels of an encoded image, uint8 `[height, width, channels]` of `target`.

    JPEG, PNG, WebP, BMP and GIF; of an animation the first frame. The EXIF orientation is
    applied, transparency is laid over white, 16 bits become the upper 8.

    Raises InvalidImage where the bytes are no such image, are damaged, or hold more than
    `max_megapixels` million pixels.
    """
    with _opened(data, max_megapixels) as image:
        drafted = _reduce(image, target)
        image.load()
        return _fit(image, drafted or (0, 0, *image.size), _orientation(image), target)


def decode_all(
    data: bytes, targets: Sequence[Target], max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> list[Pixels]:
    """What `decode` gives for each of `targets`, decoded anew only where a JPEG is reduced otherwise.

    Raises InvalidImage.
    """
    loaded: dict[tuple[int, int], Image.Image] = {}
    found = []
    for target in targets:
        with _opened(data, max_megapixels) as opened:
            drafted = _reduce(opened, target)
            image = loaded.setdefault(opened.size, opened)
            image.load()
            found.append(_fit(image, drafted or (0, 0, *image.size), _orientation(image), target))
    return found


def probe(
    data: bytes, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> tuple[int, int, Literal[1, 3]]:
    """Height and width in pixels, and channels, of an encoded image; only its header is read.

    Raises InvalidImage.
    """
    with _opened(data, max_megapixels) as image:
        return image.height, image.width, 1 if image.mode in ("1", "L", "LA", "I;16", "I") else 3


def prepare(
    pixels: Pixels, target: Target, max_megapixels: float = DEFAULT_MAX_MEGAPIXELS
) -> Pixels:
    """Decoded pixels, uint8 `[height, width, 1 | 3 | 4]` of any size, brought to `target`.

    Pixels of the right shape are returned as they are. Raises InvalidImage for others that are
    no image, or too large a one.
    """
    if pixels.shape == target.shape:
        return pixels
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise InvalidImage(
            f"pixels of shape {list(pixels.shape)}: expected [height, width, channels] "
            "with 1, 3 or 4 channels"
        )
    _check_size(pixels.shape[1], pixels.shape[0], max_megapixels)
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return _fit(image, (0, 0, *image.size), 1, target)


def _reduce(image: Image.Image, target: Target) -> Box | None:
    """Has a JPEG decoder halve as it decodes, where it can: the box of the picture in the result."""
    # Twice the target is left for the resize to fill; the larger side counts because an orientation
    # may swap the two.
    side = 2 * max(target.height, target.width)
    drafted = image.draft(None, (side, side))
    # So reduced, the last row and column may lie partly outside of the picture.
    return drafted and drafted[1]


@contextlib.contextmanager
def _opened(data: bytes, max_megapixels: float) -> Iterator[Image.Image]:
    if not data:
        raise InvalidImage("the image is empty (0 bytes): send the bytes of the file itself")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, max_megapixels)
            yield image
    except InvalidImage:
        raise
    except UnidentifiedImageError:
        raise InvalidImage(
            f"these {len(data)} bytes are no JPEG, PNG, WebP, BMP or GIF image "
            f"(they begin with {data[:8]!r})"
        ) from None
    # Decoders fail in many ways on damaged bytes (OSError, SyntaxError, ValueError, zlib.error, ...).
    except Exception as error:
        raise InvalidImage(f"the image is damaged: {error}; save it again and retry") from error


def _check_size(width: int, height: int, max_megapixels: float) -> None:
    megapixels = width * height / 1e6
    if megapixels > max_megapixels:
        raise InvalidImage(
            f"the image has {megapixels:.1f} megapixels ({width}x{height}), "
            f"the limit is {max_megapixels:g}: send a smaller one"
        )
    if max(width, height) > MAX_SIDE:
        raise InvalidImage(
            f"the image is {width}x{height}, the limit is {MAX_SIDE} a side: send a smaller one"
        )


def _orientation(image: Image.Image) -> int:
    """As EXIF counts: 1 is upright, from 5 on height and width are swapped."""
    # Not ImageOps.exif_transpose: it also writes the other tags anew, and fails where one is odd.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # Unreadable metadata does not make the picture unreadable.
    except Exception:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _fit(image: Image.Image, picture: Box, orientation: int, target: Target) -> Pixels:
    image = _to_mode(image, "L" if target.channels == 1 else "RGB")
    # The result is turned, as it has fewer pixels than the image.
    size = (target.width, target.height)
    if orientation >= 5:
        size = size[::-1]
    box = _centre(picture, size) if target.resize == "crop" else picture
    image = image.resize(size, Image.Resampling.BILINEAR, box)
    if orientation > 1:
        image = image.transpose(_UPRIGHT[orientation])
    return np.asarray(image, np.uint8).reshape(target.shape)


def _centre(picture: Box, size: tuple[int, int]) -> Box:
    """The largest centred part of `picture` with the proportions of `size`."""
    width = min(picture[2], picture[3] * size[0] / size[1])
    height = min(picture[3], picture[2] * size[1] / size[0])
    left, top = (picture[2] - width) / 2, (picture[3] - height) / 2
    return left, top, left + width, top + height


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips them
        deep = np.asarray(image).astype(np.uint32)
        upper = (deep >> 8).clip(0, 255).astype(np.uint8)
        upper[deep == image.info.get("transparency", -1)] = 255
        image = Image.fromarray(upper)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
