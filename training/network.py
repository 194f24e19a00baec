"""The networks: float32 `[N, H, W, C]` of pixels 0 to 255 in, logits `[N, classes]` out."""

import keras
import numpy as np

from service.images import Pixels
from training.data import Dataset
from training.settings import TrainingSettings


def basic(data: Dataset, settings: TrainingSettings) -> keras.Model:
    """Convolution, pooling, convolution, pooling, fully connected, output.

    The textbook's chain (LeCun and others, "Gradient-based learning applied to document
    recognition", 1998), with ReLU, max pooling and dropout.
    """
    layers = keras.layers
    height, width, _ = data.target.shape
    mean, deviation = _moments(data.train.inputs)
    first, second = settings.filters
    return keras.Sequential(
        [
            layers.Input(data.target.shape),
            *augmentation(settings, height, width),
            layers.Rescaling((1 / deviation).tolist(), (-mean / deviation).tolist()),
            layers.Conv2D(first, settings.kernel_size, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(second, settings.kernel_size, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            # ONNX keeps channels first: flattened in that order, the export needs no transpose.
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(settings.dense, activation="relu"),
            layers.Dropout(settings.dropout),
            layers.Dense(len(data.classes)),
        ],
        name="basic",
    )


def augmentation(settings: TrainingSettings, height: int, width: int) -> list[keras.Layer]:
    """What is done to training images on the fly. Elsewhere these layers pass images through."""
    layers = keras.layers
    shifts = (settings.shift / height, settings.shift / width)
    # A seed for each: with the same one, what is flipped would always be moved the same way.
    flip, shift, rotate, zoom = range(4 * settings.seed, 4 * settings.seed + 4)
    chosen = [
        settings.flip and layers.RandomFlip("horizontal", seed=flip),
        settings.shift and layers.RandomTranslation(*shifts, fill_mode="nearest", seed=shift),
        settings.rotate
        and layers.RandomRotation(settings.rotate / 360, fill_mode="nearest", seed=rotate),
        settings.zoom and layers.RandomZoom(settings.zoom, fill_mode="nearest", seed=zoom),
    ]
    return [layer for layer in chosen if layer]


def _moments(images: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel of uint8 `[N, H, W, C]`."""
    # From how often each value occurs: floats of all pixels would take eight times their memory.
    values = np.arange(256)
    counts = np.stack([_histogram(images, channel) for channel in range(images.shape[-1])])
    weights = counts / counts.sum(axis=1, keepdims=True)
    mean = weights @ values
    return mean, np.sqrt(weights @ values**2 - mean**2) + 1e-3


def _histogram(images: Pixels, channel: int) -> np.ndarray:
    counts = np.zeros(256, np.int64)
    for start in range(0, len(images), 256):
        counts += np.bincount(images[start : start + 256, ..., channel].ravel(), minlength=256)
    return counts
