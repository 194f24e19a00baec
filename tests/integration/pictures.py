"""Images as callers send them, and answers as they read them."""

import io
from typing import Any

import numpy as np
from PIL import Image

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Probabilities


def encode(pixels: Pixels, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file with these pixels, `[H, W, 1 | 3 | 4]`."""
    return encode_image(
        Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), kind, **options
    )


def encode_image(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def solid(colour: str | tuple[int, ...], height: int = 4, width: int = 4) -> Pixels:
    """An image of a single colour, uint8 `[height, width, 3]`."""
    return np.asarray(Image.new("RGB", (width, height), colour))


def noise(seed: int, count: int, shape: tuple[int, int, int]) -> Pixels:
    """Images that all differ, uint8 `[count, *shape]`, each of a random base colour."""
    random = np.random.default_rng(seed)
    base = random.integers(0, 206, (count, 1, 1, shape[2]))
    return (base + random.integers(0, 50, (count, *shape))).astype(np.uint8)


def encoded(pixels: Pixels) -> pb.Image:
    return pb.Image(encoded=encode(pixels))


def raw(pixels: Pixels) -> pb.Image:
    height, width, channels = pixels.shape
    data = pixels.tobytes()
    return pb.Image(pixels=pb.Pixels(data=data, height=height, width=width, channels=channels))


def probabilities(result: pb.ImageResult) -> Probabilities:
    """Of every class in their order, from an answer with `top_k` as large as that."""
    labels = sorted(result.classification.labels, key=lambda label: label.index)
    assert labels, result
    assert [label.index for label in labels] == list(range(len(labels)))
    return np.array([label.probability for label in labels], np.float32)
