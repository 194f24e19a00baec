"""The networks: float32 `[N, H, W, C]` of pixels 0 to 255 in, logits `[N, classes]` out."""

import keras
import numpy as np

from training.data import Dataset
from training.settings import TrainingSettings


def basic(data: Dataset, settings: TrainingSettings) -> keras.Model:
    """Convolution, pooling, convolution, pooling, fully connected, output.

    The textbook's chain (LeCun and others, "Gradient-based learning applied to document
    recognition", 1998), with ReLU, max pooling and dropout.
    """
    layers = keras.layers
    height, width, _ = data.target.shape
    mean = data.train.inputs.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = data.train.inputs.std(axis=(0, 1, 2), dtype=np.float64) + 1e-3
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
    layers, seed = keras.layers, settings.seed
    shifts = (settings.shift / height, settings.shift / width)
    chosen = [
        settings.flip and layers.RandomFlip("horizontal", seed=seed),
        settings.shift and layers.RandomTranslation(*shifts, fill_mode="nearest", seed=seed),
        settings.rotate
        and layers.RandomRotation(settings.rotate / 360, fill_mode="nearest", seed=seed),
        settings.zoom and layers.RandomZoom(settings.zoom, fill_mode="nearest", seed=seed),
    ]
    return [layer for layer in chosen if layer]
