"""What is done to training images: chance decides on NumPy's side, TensorFlow does it to a batch.

Chance depends on the seed and the epoch's number alone, so that every process draws the same.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from convoy_training.settings import TrainingSettings


class Drawn(NamedTuple):
    """The order of images, and for each, in the order of the data, what is done to it."""

    order: npt.NDArray[np.int64]
    how: dict[str, npt.NDArray[np.float32]]


def draw(settings: TrainingSettings, side: tuple[int, int], count: int, epoch: int) -> Drawn:
    """What chance decides about `count` training images in an epoch: the order, and for each image
    what is done to it, see `augment`.
    """
    height, width = side
    random = np.random.default_rng([settings.seed, epoch])
    order = random.permutation(count)
    how: dict[str, npt.NDArray[np.float32]] = {}
    moved = settings.shift or settings.flip or settings.rotate or settings.zoom
    if moved:
        # From a place in the result to the place in the image that is shown there.
        shift = random.uniform(-settings.shift, settings.shift, (count, 2))
        if only_whole(settings):
            most = int(settings.shift)
            shift = random.integers(-most, most, (count, 2), endpoint=True).astype(float)
        angle = np.radians(random.uniform(-settings.rotate, settings.rotate, count))
        scale = 1 + random.uniform(-settings.zoom, settings.zoom, count)
        mirror = np.ones(count)
        if settings.flip:
            first = np.random.default_rng(settings.seed).integers(0, 2, count)
            mirror = np.where((first + epoch) % 2, -1.0, 1.0)
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        left, top = centre_x + shift[:, 0], centre_y + shift[:, 1]
        matrix = np.zeros((count, 8), np.float32)
        # Mirrored, then turned and scaled about the centre, then moved.
        matrix[:, 0], matrix[:, 1] = mirror * cos, -mirror * sin
        matrix[:, 3], matrix[:, 4] = sin, cos
        matrix[:, 2] = centre_x - mirror * (cos * left - sin * top)
        matrix[:, 5] = centre_y - (sin * left + cos * top)
        how["matrix"] = matrix
    if settings.cutout:
        place = random.uniform(0, 1, (count, 2)) * (height, width)
        half = np.full((count, 1), settings.cutout / 2)
        how["cutout"] = np.concatenate([place, half], axis=1).astype(np.float32)
    if settings.colour:
        how["colour"] = random.uniform(1 - settings.colour, 1 + settings.colour, (count, 3)).astype(
            np.float32
        )
    return Drawn(order, how)


def only_whole(settings: TrainingSettings) -> bool:
    """Whether images are only moved by whole pixels, so that none is blurred."""
    return settings.shift == int(settings.shift) and not settings.rotate and not settings.zoom


def augment(
    pixels: tf.Tensor, how: dict[str, tf.Tensor], grey: tf.Tensor, *, whole: bool
) -> tf.Tensor:
    """uint8 `[N, H, W, C]` as float32, changed as `draw` says; `grey` `[C]` fills what is cut out.

    `whole`: images only move by whole pixels.
    """
    images = pixels
    if "matrix" in how:
        images = tf.raw_ops.ImageProjectiveTransformV3(
            # Between whole numbers a uint8 has no values.
            images=images if whole else tf.cast(images, tf.float32),
            transforms=how["matrix"],
            output_shape=tf.shape(images)[1:3],
            fill_value=0.0,
            interpolation="NEAREST" if whole else "BILINEAR",
            fill_mode="REFLECT",
        )
    images = tf.cast(images, tf.float32)
    if "colour" in how:
        brightness, contrast, saturation = (
            how["colour"][:, each, tf.newaxis, tf.newaxis, tf.newaxis] for each in range(3)
        )
        mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)
        images = ((images - mean) * contrast + mean) * brightness
        colourless = tf.reduce_mean(images, axis=3, keepdims=True)
        images = tf.clip_by_value(colourless + (images - colourless) * saturation, 0.0, 255.0)
    if "cutout" in how:
        middle, half = how["cutout"][:, :2], how["cutout"][:, 2:]
        rows = tf.range(tf.shape(images)[1], dtype=tf.float32) + 0.5
        columns = tf.range(tf.shape(images)[2], dtype=tf.float32) + 0.5
        tall = tf.abs(rows - middle[:, :1]) < half
        wide = tf.abs(columns - middle[:, 1:]) < half
        hole = tall[:, :, tf.newaxis] & wide[:, tf.newaxis, :]
        images = tf.where(hole[..., tf.newaxis], grey, images)
    return images
