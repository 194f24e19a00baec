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
    mean = data.train.inputs.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = data.train.inputs.std(axis=(0, 1, 2), dtype=np.float64) + 1e-3
    first, second = settings.filters
    return keras.Sequential(
        [
            layers.Input(data.target.shape),
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
