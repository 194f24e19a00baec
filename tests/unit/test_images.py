"""Bytes of image files, good and bad, to pixels."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convoy_service.artifacts import images
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.errors import InvalidImage

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def encode(image: Image.Image | Pixels, format: str, **options: Any) -> bytes:
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(height: int, width: int, channels: int = 3) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)


def exact(pixels: Pixels) -> Target:
    height, width, channels = pixels.shape
    return Target(height, width, channels)


def overwrite(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    """A PNG of what Pillow does not write; `rows` with their filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(data[:4], data[4:])
        for data in (b"IHDR" + header, *extra, b"IDAT" + zlib.compress(rows), b"IEND")
    )


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def claiming(format: str, width: int, height: int) -> bytes:
    """A small file of `format` whose header says that it is `width` by `height`."""
    data = encode(noise(16, 20), format, **({"lossless": True} if format == "WEBP" else {}))
    match format:
        case "PNG":
            data = overwrite(data, 16, struct.pack(">II", width, height))
            return overwrite(data, 29, struct.pack(">I", zlib.crc32(data[12:29])))
        case "GIF":
            return overwrite(data, 6, struct.pack("<HH", width, height))
        case "BMP":
            return overwrite(data, 18, struct.pack("<ii", width, height))
        case "JPEG":
            return overwrite(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))
        case "WEBP":
            at = data.index(b"VP8L") + 9
            bits = int.from_bytes(data[at : at + 4], "little") >> 28 << 28
            bits |= (width - 1) | (height - 1) << 14
            return overwrite(data, at, bits.to_bytes(4, "little"))
    raise AssertionError(format)


# What is decoded.


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_formats_give_their_pixels(format: str, channels: int) -> None:
    pixels = noise(9, 13, channels)
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(images.decode(encode(pixels, format, **options), exact(pixels)), pixels)


def test_gif_gives_its_pixels() -> None:
    pixels = noise(9, 13, 1)  # grey fits its palette
    assert np.array_equal(images.decode(encode(pixels, "GIF"), exact(pixels)), pixels)


def test_jpeg_gives_nearly_its_pixels() -> None:
    ramp = np.linspace(0, 255, 32, dtype=np.uint8)
    pixels = np.broadcast_to(ramp[:, None, None], (32, 32, 3))
    given = images.decode(encode(pixels, "JPEG", quality=95), exact(pixels))
    assert np.abs(given.astype(int) - pixels).max() <= 4


def test_cmyk_jpeg_gives_its_colours() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    given = images.decode(encode(cmyk, "JPEG"), Target(8, 8, 3))
    assert np.abs(given.astype(int) - RED).max() <= 4


def test_16_bit_grey_keeps_its_upper_8_bits() -> None:
    deep = np.array([[0, 0x00FF, 0x1234, 0x8000, 0xFFFF]], np.uint16)
    given = images.decode(encode(Image.fromarray(deep), "PNG"), Target(1, 5, 1))
    assert given.ravel().tolist() == [0, 0, 0x12, 0x80, 0xFF]


def test_16_bit_rgb_keeps_its_upper_8_bits() -> None:
    data = png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x00FF, 0x1234, 0xFFFF))
    assert images.decode(data, Target(1, 1, 3)).ravel().tolist() == [0, 0x12, 0xFF]


def test_bilevel_becomes_black_and_white() -> None:
    data = encode(Image.fromarray(np.array([[False, True]])), "PNG")
    assert images.decode(data, Target(1, 2, 1)).ravel().tolist() == [0, 255]


def palette() -> Image.Image:
    """A red and a green pixel."""
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    return image


TRANSPARENT = {
    "RGBA": (
        encode(Image.fromarray(np.array([[[*RED, 255], [*RED, 0]]], np.uint8)), "PNG"),
        [RED, WHITE],
    ),
    "half transparent RGBA": (
        encode(Image.fromarray(np.array([[[*RED, 255], [*RED, 127]]], np.uint8)), "PNG"),
        [RED, (255, 128, 128)],
    ),
    "RGBA WebP": (
        encode(
            Image.fromarray(np.array([[[*RED, 255], [*RED, 0]]], np.uint8)),
            "WEBP",
            lossless=True,
        ),
        [RED, WHITE],
    ),
    "grey with alpha": (
        encode(Image.fromarray(np.array([[[7, 255], [7, 0]]], np.uint8), "LA"), "PNG"),
        [(7, 7, 7), WHITE],
    ),
    "palette": (encode(palette(), "PNG"), [RED, GREEN]),
    "palette with one transparent colour": (
        encode(palette(), "PNG", transparency=1),
        [RED, WHITE],
    ),
    "palette with an alpha for each colour": (
        encode(palette(), "PNG", transparency=b"\x00\xff"),
        [WHITE, GREEN],
    ),
    "palette GIF with a transparent colour": (
        encode(palette(), "GIF", transparency=1),
        [RED, WHITE],
    ),
    "RGB with a transparent colour": (
        encode(Image.fromarray(np.array([[RED, GREEN]], np.uint8)), "PNG", transparency=GREEN),
        [RED, WHITE],
    ),
    "16-bit grey with a transparent value": (
        png(2, 1, 16, 0, b"\0" + struct.pack(">2H", 0x1200, 0x1234), b"tRNS\x12\x34"),
        [(18, 18, 18), WHITE],
    ),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_laid_over_white(kind: str) -> None:
    data, expected = TRANSPARENT[kind]
    assert images.decode(data, Target(1, 2, 3))[0].tolist() == [list(c) for c in expected]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_taken(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, WHITE)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert (images.decode(data, Target(4, 4, 3)) == RED).all()


def test_an_animation_that_breaks_after_its_first_frame_is_read() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (images.decode(data[:-4], Target(4, 4, 3)) == RED).all()


def test_grey_becomes_rgb() -> None:
    pixels = noise(4, 4, 1)
    given = images.decode(encode(pixels, "PNG"), Target(4, 4, 3))
    assert np.array_equal(given, np.repeat(pixels, 3, axis=2))


def test_rgb_becomes_grey_by_luma() -> None:
    pixels = noise(4, 4)
    given = images.decode(encode(pixels, "PNG"), Target(4, 4, 1))
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(given[..., 0] - luma).max() <= 1


# EXIF.


def upright() -> Pixels:
    """Black but for a red corner at the top left and a green one at the top right."""
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :16], pixels[:16, -16:] = RED, GREEN
    return pixels


def stored(pixels: Pixels, orientation: int) -> Pixels:
    """How a camera stores what is `pixels` when shown in `orientation`, by EXIF's definition."""
    down, right = pixels[::-1], pixels[:, ::-1]
    return {
        1: pixels,
        2: right,
        3: down[:, ::-1],
        4: down,
        5: pixels.transpose(1, 0, 2),
        6: right.transpose(1, 0, 2),
        7: down[:, ::-1].transpose(1, 0, 2),
        8: down.transpose(1, 0, 2),
    }[orientation]


def exif(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF with the entries (tag, type, count, value of 4 bytes)."""
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(8)


ORIENTATION_6 = (0x0112, 3, 1, b"\6\0\0\0")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied(orientation: int, format: str) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(stored(upright(), orientation), format, exif=tags, **options)
    given = images.decode(data, exact(upright()))
    assert np.abs(given[4:12, 4:12].astype(int) - RED).max() <= 4
    assert np.abs(given[4:12, -12:-4].astype(int) - GREEN).max() <= 4
    assert given[20:].max() <= 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("target", [Target(9, 20, 3), Target(20, 9, 3, "crop"), Target(6, 6, 3)])
def test_an_image_is_turned_before_it_is_brought_to_size(orientation: int, target: Target) -> None:
    tags = Image.Exif()
    tags[0x0112] = orientation
    given = images.decode(encode(stored(upright(), orientation), "PNG", exif=tags), target)
    wanted = images.prepare(upright(), target)
    assert np.abs(given.astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    "odd",
    [
        (0x010F, 11, 1, b"\xff\xff\xff\xff"),  # a maker's name that is a float
        (0x0100, 9, 1, b"\xff\xff\xff\xff"),  # a width of -1
        (0x0111, 2, 4, b"abc\0"),  # an offset that is a text
    ],
    ids=["float", "negative", "text"],
)
def test_orientation_is_applied_whatever_the_other_tags_are(
    odd: tuple[int, int, int, bytes],
) -> None:
    data = encode(stored(upright(), 6), "JPEG", exif=exif(ORIENTATION_6, odd))
    given = images.decode(data, exact(upright()))
    assert np.abs(given[4:12, 4:12].astype(int) - RED).max() <= 4


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_is_none_changes_nothing(orientation: int) -> None:
    pixels = noise(4, 6)
    tags = Image.Exif()
    tags[0x0112] = orientation
    given = images.decode(encode(pixels, "PNG", exif=tags), exact(pixels))
    assert np.array_equal(given, pixels)


def test_unreadable_exif_does_not_make_the_image_unreadable() -> None:
    data = encode(upright(), "JPEG", exif=b"Exif\0\0this is no TIFF header")
    assert images.decode(data, exact(upright())).shape == upright().shape


# Size.


def test_stretch_keeps_the_whole_picture() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :10], pixels[:, 20:] = RED, GREEN
    given = images.decode(encode(pixels, "PNG"), Target(10, 9, 3, "stretch"))
    assert given[5, 0].tolist() == list(RED)
    assert given[5, -1].tolist() == list(GREEN)


def test_crop_keeps_the_proportions_of_the_centre() -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, :10], pixels[:, 20:] = RED, GREEN
    pixels[:, 10:20] = WHITE
    given = images.decode(encode(pixels, "PNG"), Target(5, 5, 3, "crop"))
    assert (given[:, 1:-1] == WHITE).all()


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (2, 65535), (65535, 2), (7, 9)])
def test_any_size_is_brought_to_the_target(size: tuple[int, int], resize: images.Resize) -> None:
    data = encode(np.full((*size, 3), 77, np.uint8), "PNG")
    given = images.decode(data, Target(12, 20, 3, resize))
    assert given.shape == (12, 20, 3)
    assert (given == 77).all()


@pytest.mark.parametrize("format", images.FORMATS)
def test_one_pixel_is_an_image(format: str) -> None:
    data = encode(np.full((1, 1, 3), 255, np.uint8), format)
    assert (images.decode(data, Target(8, 8, 1)) == 255).all()


@pytest.mark.parametrize("size", [(480, 640), (641, 479), (2048, 96)])
def test_a_jpeg_decoded_at_reduced_scale_is_close_to_the_full_one(size: tuple[int, int]) -> None:
    coarse = Image.fromarray(noise(12, 12)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    data = encode(coarse, "JPEG", quality=90)
    target = Target(32, 32, 3)
    with Image.open(io.BytesIO(data)) as image:
        full = images.prepare(np.asarray(image.convert("RGB")), target)
    difference = np.abs(images.decode(data, target).astype(int) - full)
    assert difference.mean() < 1
    assert difference.max() <= 12


def test_probe_reads_size_and_channels_from_the_header() -> None:
    assert images.probe(encode(noise(4, 6), "PNG")) == (4, 6, 3)
    assert images.probe(encode(noise(4, 6, 1), "JPEG")) == (4, 6, 1)
    assert images.probe(encode(Image.new("I;16", (6, 4)), "PNG")) == (4, 6, 1)
    with pytest.raises(InvalidImage, match="empty"):
        images.probe(b"")


# What is refused.


@pytest.mark.parametrize("format", images.FORMATS)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
def test_a_truncated_image_is_refused(format: str, share: float) -> None:
    data = encode(noise(32, 32), format)
    with pytest.raises(InvalidImage, match=r"damaged|are no JPEG, PNG, WebP, BMP or GIF"):
        images.decode(data[: int(len(data) * share)], Target(8, 8, 3))


def corrupt_png() -> bytes:
    data = encode(noise(32, 32), "PNG")
    return overwrite(data, len(data) // 2, b"corrupt")


def corrupt_jpeg() -> bytes:
    data = encode(noise(32, 32), "JPEG")
    return overwrite(data, data.index(b"\xff\xc0") + 9, b"\x07")  # colour components


REFUSED = {
    "zero bytes": (b"", "empty"),
    "text": (b"not an image at all", "begin with b'not an i'"),
    "PDF": (b"%PDF-1.7\n" + bytes(64), "are no JPEG, PNG, WebP, BMP or GIF"),
    "TIFF": (encode(noise(4, 4), "TIFF"), "are no JPEG, PNG, WebP, BMP or GIF"),
    "PPM": (encode(noise(4, 4), "PPM"), "are no JPEG, PNG, WebP, BMP or GIF"),
    "EPS": (encode(noise(4, 4), "EPS"), "are no JPEG, PNG, WebP, BMP or GIF"),
    "zeros": (bytes(1000), "are no JPEG, PNG, WebP, BMP or GIF"),
    "JPEG marker only": (b"\xff\xd8\xff", "damaged|are no JPEG"),
    "PNG signature only": (b"\x89PNG\r\n\x1a\n", "damaged|are no JPEG"),
    "corrupt PNG": (corrupt_png(), "damaged"),
    "corrupt JPEG": (corrupt_jpeg(), "damaged|are no JPEG"),
    "PNG of no pixels": (claiming("PNG", 0, 4), "damaged|are no JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_with_a_reason(kind: str) -> None:
    data, words = REFUSED[kind]
    with pytest.raises(InvalidImage, match=words):
        images.decode(data, Target(8, 8, 3))


@pytest.mark.parametrize("format", images.FORMATS)
def test_too_many_pixels_are_refused(format: str) -> None:
    with pytest.raises(InvalidImage, match=r"100\.0 megapixels \(10001x10000\), the limit is 50"):
        images.decode(claiming(format, 10001, 10000), Target(8, 8, 3))


def test_a_gif_frame_larger_than_its_screen_counts() -> None:
    data = encode(noise(16, 20), "GIF")
    frame = data.index(b",\0\0\0\0")
    data = overwrite(data, frame + 5, struct.pack("<HH", 10001, 10000))
    with pytest.raises(InvalidImage, match="megapixels"):
        images.decode(data, Target(8, 8, 3))


def test_the_limit_of_pixels_is_the_callers() -> None:
    data = encode(noise(100, 100), "PNG")
    assert images.decode(data, Target(8, 8, 3), max_megapixels=0.01).shape == (8, 8, 3)
    with pytest.raises(InvalidImage, match=r"limit is 0\.005"):
        images.decode(data, Target(8, 8, 3), max_megapixels=0.005)


@pytest.mark.parametrize("size", [(1, 65536), (65536, 1)])
def test_a_side_too_long_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(InvalidImage, match="the limit is 65535 a side"):
        images.decode(encode(np.zeros((*size, 1), np.uint8), "PNG"), Target(8, 8, 1))


_PEAK = """
import resource, sys
from pathlib import Path
from convoy_service.artifacts import images

small, *bombs = map(Path, sys.argv[1:])
images.decode(small.read_bytes(), images.Target(8, 8, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for bomb in bombs:
    try:
        images.decode(bomb.read_bytes(), images.Target(8, 8, 3))
    except images.InvalidImage:
        continue
    sys.exit(f"{bomb} was decoded")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_refusing_a_bomb_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(encode(noise(8, 8), "PNG"))
    # This one is whole: decoded, it would take 100 MB at one byte a pixel.
    (tmp_path / "whole.png").write_bytes(encode(Image.new("1", (10001, 10000)), "PNG"))
    for format in images.FORMATS:
        (tmp_path / format).write_bytes(claiming(format, 10001, 10000))
    bombs = [tmp_path / name for name in ("small", "whole.png", *images.FORMATS)]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, *bombs], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20_000, "kB"


_FUZZ = """
import random, sys
from pathlib import Path
from convoy_service.artifacts import images
from convoy_service.artifacts.images import Target

for file in map(Path, sys.argv[1:]):
    whole, chance = file.read_bytes(), random.Random(file.name)
    for case in range(150):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8, 64))):
            data[chance.randrange(len(data))] = chance.randrange(256)
        if case % 3 == 0:
            del data[chance.randrange(len(data)):]
        target = chance.choice((Target(8, 8, 1), Target(24, 16, 3), Target(9, 9, 3, "crop")))
        try:
            pixels = images.decode(bytes(data), target, max_megapixels=1)
        except images.InvalidImage as error:
            assert str(error)
            continue
        except BaseException as error:
            raise AssertionError(f"{file.name}, case {case}") from error
        assert (pixels.shape, pixels.dtype) == (target.shape, "uint8"), f"{file.name}, case {case}"
"""


def test_damaged_files_give_pixels_or_a_refusal_and_a_silent_log(tmp_path: Path) -> None:
    """In a process of its own, as in a server: warnings are printed there, not raised."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F] = 6, "a camera"
    frames = [Image.fromarray(noise(20, 24)) for _ in range(2)]
    rgba, animated = Image.fromarray(noise(20, 24, 4)), {"save_all": True}
    files = {
        "jpeg": encode(noise(20, 24), "JPEG", exif=tags),
        "progressive": encode(noise(20, 24), "JPEG", progressive=True),
        "cmyk": encode(Image.new("CMYK", (24, 20), (9, 99, 199, 9)), "JPEG"),
        "png": encode(noise(20, 24), "PNG", exif=tags),
        "palette": encode(frames[0].convert("P"), "PNG", transparency=1),
        "16-bit": encode(Image.fromarray(noise(20, 24)[..., 0].astype(np.uint16) << 4), "PNG"),
        "apng": encode(frames[0], "PNG", append_images=frames[1:], **animated),
        "webp": encode(rgba, "WEBP", exif=tags),
        "lossless": encode(rgba, "WEBP", lossless=True),
        "webp-animation": encode(frames[0], "WEBP", append_images=frames[1:], **animated),
        "bmp": encode(noise(20, 24), "BMP"),
        "bmp-palette": encode(frames[0].convert("P"), "BMP"),
        "gif": encode(frames[0], "GIF", append_images=frames[1:], **animated),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _FUZZ, *(tmp_path / name for name in files)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


# Pixels that are decoded already.


def test_pixels_of_the_right_shape_stay_as_they_are() -> None:
    pixels = noise(8, 6)
    assert images.prepare(pixels, exact(pixels)) is pixels


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("target", [Target(8, 6, 1), Target(5, 7, 3), Target(8, 8, 3, "crop")])
def test_pixels_are_prepared_as_a_file_of_them_is(channels: int, target: Target) -> None:
    pixels = noise(10, 12, channels)
    given = images.prepare(pixels, target)
    assert np.array_equal(given, images.decode(encode(pixels, "PNG"), target))


def test_pixels_need_not_be_contiguous() -> None:
    pixels = noise(10, 12)[::2, ::-1]
    target = Target(4, 4, 3)
    assert np.array_equal(
        images.prepare(pixels, target), images.prepare(np.ascontiguousarray(pixels), target)
    )


@pytest.mark.parametrize(
    "shape", [(4,), (4, 4), (4, 4, 2), (4, 4, 5), (0, 4, 3), (4, 0, 3), (4, 4, 0), (1, 4, 4, 3)]
)
def test_pixels_that_are_no_image_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidImage, match=r"expected \[height, width, channels\]"):
        images.prepare(np.zeros(shape, np.uint8), Target(8, 8, 3))


def test_too_many_pixels_are_refused_before_they_are_touched() -> None:
    huge = np.broadcast_to(np.zeros(3, np.uint8), (10_000, 10_001, 3))
    with pytest.raises(InvalidImage, match="megapixels"):
        images.prepare(huge, Target(8, 8, 3))
