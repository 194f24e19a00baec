"""The networks: float32 `[N, H, W, C]` of pixels 0 to 255 in, logits `[N, classes]` out."""

import importlib
import inspect
from pathlib import Path
from typing import Any

import keras
import numpy as np

from convoy_service.artifacts.images import Pixels
from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset
from convoy_training.settings import TrainingSettings

layers = keras.layers


def build(data: Dataset, settings: TrainingSettings, *, precision: str = "float32") -> keras.Model:
    """The network that `settings` name, its weights drawn anew.

    `precision` is "float32", "bfloat16" or "float16": what convolutions are computed in; weights are
    float32 always, so those of one fit the other. Raises ConvoyError where there is no such network,
    or the images are too small for it.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision if precision == "float32" else f"mixed_{precision}")
    try:
        if settings.network == "basic":
            return _basic(data, settings)
        if settings.network == "strong":
            return _strong(data, settings)
        return _backbone(data, settings)
    finally:
        keras.config.set_dtype_policy(before)


def _basic(data: Dataset, settings: TrainingSettings) -> keras.Model:
    """Convolution, pooling, convolution, pooling, fully connected, output.

    The textbook's chain (LeCun and others, "Gradient-based learning applied to document
    recognition", 1998), with ReLU, max pooling and dropout.
    """
    first, second = _filters(settings, "basic", 2)
    return keras.Sequential(
        [
            layers.Input(data.target.shape),
            _normalisation(data.train.inputs),
            layers.Conv2D(first, settings.kernel_size, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(second, settings.kernel_size, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            # ONNX keeps channels first: flattened in that order, the export needs no transpose.
            layers.Permute((3, 1, 2)),
            layers.Flatten(),
            layers.Dense(settings.dense, activation="relu"),
            layers.Dropout(settings.dropout),
            layers.Dense(len(data.classes), dtype="float32"),
        ],
        name="basic",
    )


def _strong(data: Dataset, settings: TrainingSettings) -> keras.Model:
    """A stem and a stage for each of `filters`: a convolution and a pooling, then two convolutions
    around which a shortcut leads; the mean over all places; output.

    After airbench (Jordan, "94% on CIFAR-10 in 3.29 seconds", arXiv:2404.00498), whose pooling right
    behind the first convolution of a stage keeps what follows cheap, and ResNet (He and others,
    arXiv:1512.03385); ReLU, which costs less on a CPU and in int8 than GELU.
    """
    stages = _filters(settings, "strong")
    smallest = 2 ** len(stages)
    if min(data.target.height, data.target.width) < smallest:
        raise ConvoyError(
            f"images of {data.target.width}x{data.target.height} are too small for {len(stages)} "
            f"stages: set --image-size to {smallest} or more, or give fewer --filters"
        )
    inputs = layers.Input(data.target.shape)
    x = _normalisation(data.train.inputs)(inputs)
    x = _convolution(stages[0] // 2 or 1)(x)
    x = layers.ReLU()(_normalised()(x))
    for filters in stages:
        x = _convolution(filters)(x)
        # Pooling first leaves the normalisation a quarter of the work in training. Without a scale
        # of its own, which could be negative, it keeps the order of values, so in the export the two
        # swap places and it melts into the convolution.
        x = layers.MaxPooling2D()(x)
        x = layers.ReLU()(_normalised()(x))
        y = layers.ReLU()(_normalised()(_convolution(filters)(x)))
        y = _normalised(scale=True)(_convolution(filters)(y))
        x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    if settings.dropout:
        x = layers.Dropout(settings.dropout)(x)
    return keras.Model(inputs, layers.Dense(len(data.classes), dtype="float32")(x), name="strong")


def _convolution(filters: int) -> keras.Layer:
    return layers.Conv2D(filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal")


def _normalised(*, scale: bool = False) -> keras.Layer:
    # Over few steps, as here, the usual memory of 0.99 lags behind.
    return layers.BatchNormalization(momentum=0.9, scale=scale)


def _backbone(data: Dataset, settings: TrainingSettings) -> keras.Model:
    """One of keras.applications without its head, the mean over all places, output."""
    name = settings.network
    make = getattr(keras.applications, name, None)
    if not inspect.isfunction(make):
        known = sorted(n for n, f in vars(keras.applications).items() if inspect.isfunction(f))
        raise ConvoyError(f"no network {name!r}: there is basic, strong, {', '.join(known)}")
    height, width, channels = data.target.shape
    try:
        body = make(include_top=False, weights=None, input_shape=(height, width, 3), pooling="avg")
    except ValueError as error:
        raise ConvoyError(f"{name} with images of {width}x{height}: {error}") from error
    if settings.weights:
        _load(body, settings.weights, make)
    body.trainable = not settings.frozen
    inputs = layers.Input(data.target.shape)
    x = inputs if channels == 3 else layers.Concatenate()([inputs] * 3)
    x = _preprocessing(make)(x)
    # Its normalisations keep their statistics, too, where it is frozen.
    x = body(x, training=False) if settings.frozen else body(x)
    x = layers.Dropout(settings.dropout)(x)
    return keras.Model(
        inputs, layers.Dense(len(data.classes), dtype="float32")(x), name=name.lower()
    )


def _preprocessing(make: Any) -> Any:
    """What the backbone's own module does to pixels before it sees them."""
    return importlib.import_module(make.__module__).preprocess_input


def _load(body: keras.Model, file: Path, make: Any) -> None:
    """Gives the backbone the weights of a file, with or without a head of its own."""
    before = [np.array(weight) for weight in body.get_weights()]
    try:
        if file.suffix == ".keras":
            _take(body, keras.models.load_model(file))
        elif file.name.endswith(".weights.h5"):
            try:
                body.load_weights(file)
            # Of the whole network, head and all.
            except ValueError:
                whole = make(weights=None, classes=_classes(file))
                whole.load_weights(file)
                _take(body, whole)
        else:
            body.load_weights(file, by_name=True, skip_mismatch=True)
    # h5py, zip and Keras each raise their own.
    except Exception as error:
        raise ConvoyError(f"--weights {file}: {error}") from error
    after = body.get_weights()
    kept = sum(old.size for old, new in zip(before, after, strict=True) if np.array_equal(old, new))
    total = sum(old.size for old in before)
    # Zeros and ones of normalisations may be what they were.
    if kept > total / 10:
        raise ConvoyError(
            f"--weights {file} has values for {total - kept:,} of {body.name}'s {total:,} weights "
            "only: is it of this network?"
        )


def _take(body: keras.Model, whole: keras.Model) -> None:
    named = {layer.name: layer for layer in whole.layers}
    for layer in body.layers:
        if layer.weights and layer.name in named:
            layer.set_weights(named[layer.name].get_weights())


def _classes(file: Path) -> int:
    """How many classes the head in a file of weights has."""
    import h5py

    heads: list[int] = []

    def look(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim == 2:
            heads.append(int(item.shape[1]))

    with h5py.File(file) as opened:
        opened.visititems(look)
    if not heads:
        raise ConvoyError("it has no head, and does not fit the network without one")
    return heads[-1]


def _filters(settings: TrainingSettings, name: str, count: int = 0) -> tuple[int, ...]:
    filters = settings.filters
    if count and len(filters) != count:
        raise ConvoyError(f"{name} has {count} convolutions: give --filters {count} numbers")
    return filters


def flops(network: keras.Model) -> int:
    """Floating-point operations that one image takes through the network's convolutions and fully
    connected layers, a multiplication and an addition counted as two. A training step takes three
    times as many: forward, and back to weights and to activations.
    """
    total = 0
    for layer in network._flatten_layers():
        kernel = getattr(layer, "kernel", None)
        if isinstance(layer, layers.DepthwiseConv2D) or kernel is None:
            continue
        places = np.prod(layer.output.shape[1:-1]) if len(layer.output.shape) > 2 else 1
        total += int(2 * np.prod(kernel.shape) * places)
    return total


def seen(network: keras.Model, pixels: Pixels) -> list[tuple[str, str, np.ndarray]]:
    """What the layers that a textbook draws make of one image, uint8 `[H, W, C]`: name, kind, and
    activations `[H, W, C]` or `[units]`, in their order, without the output.
    """
    normalised = any(isinstance(layer, layers.BatchNormalization) for layer in network.layers)

    def drawn(layer: keras.Layer) -> bool:
        """What is before its normalisation and its ReLU tells nothing yet."""
        if isinstance(layer, (layers.Conv2D, layers.MaxPooling2D)):
            return not normalised
        return isinstance(layer, (layers.ReLU, layers.GlobalAveragePooling2D, layers.Dense))

    chosen = [layer for layer in network.layers[:-1] if drawn(layer)]
    if not chosen:
        return []
    inner = keras.Model(network.inputs[0], [layer.output for layer in chosen])
    given = inner(pixels[np.newaxis].astype(np.float32), training=False)
    # What a convolution found shows behind its ReLU.
    return [
        (
            layer.name,
            "Conv2D" if isinstance(layer, layers.ReLU) else type(layer).__name__,
            np.asarray(each)[0],
        )
        for layer, each in zip(chosen, given if len(chosen) > 1 else [given], strict=True)
    ]


def _normalisation(images: Pixels) -> keras.Layer:
    """Brings pixels to a mean of about 0 and a deviation of about 1.

    By one whole number for all channels: so an int8 graph takes the pixels as they are.
    """
    mean, deviation = moments(images)
    centre, spread = round(float(mean.mean())), float(deviation.mean())
    return layers.Rescaling(1 / spread, -centre / spread)


def moments(images: Pixels) -> tuple[np.ndarray, np.ndarray]:
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
