"""What TensorFlow makes of a network: its parts, without a whole training run."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from service.images import Target
from training import export, fit, network
from training.data import Dataset, Split
from training.settings import TrainingSettings

SHAPE = (8, 8, 3)


def dataset(count: int = 6) -> Dataset:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (count, *SHAPE), np.uint8)
    inputs[..., 1] //= 3
    split = Split(inputs, np.arange(count) % 2)
    return Dataset("test", ("a", "b"), Target(*SHAPE), split, split, split)


@pytest.fixture
def built() -> keras.Model:
    fit.prepare(0)
    return network.basic(dataset(), TrainingSettings(filters=(4, 8), dense=8, flip=True, shift=2))


def test_pixels_are_normalised_by_the_moments_of_the_training_images(built: keras.Model) -> None:
    scaling = next(layer for layer in built.layers if isinstance(layer, keras.layers.Rescaling))
    pixels = dataset().train.inputs.astype(np.float64)
    normalised = pixels * scaling.scale + scaling.offset
    assert np.allclose(normalised.mean(axis=(0, 1, 2)), 0, atol=1e-3)
    assert np.allclose(normalised.std(axis=(0, 1, 2)), 1, atol=1e-3)


def test_images_are_changed_in_training_only(built: keras.Model) -> None:
    pixels = dataset().train.inputs.astype(np.float32)
    assert np.array_equal(built(pixels, training=False), built(pixels, training=False))
    assert not np.array_equal(built(pixels, training=True), built(pixels, training=True))


def test_what_is_done_to_an_image_is_drawn_apart() -> None:
    """One bright pixel off the middle tells how its image was flipped and moved."""
    flip, shift = network.augmentation(TrainingSettings(flip=True, shift=6, seed=3), 32, 32)
    image = np.zeros((400, 32, 32, 1), np.float32)
    image[:, 16, 8] = 1
    flipped = flip(image, training=True)
    is_flipped = np.asarray(flipped)[:, 16, 23, 0] == 1
    assert 0.4 < is_flipped.mean() < 0.6
    moved = np.asarray(shift(flipped, training=True))[..., 0]
    centre = (moved.sum(axis=2) * np.arange(32)).sum(axis=1) / moved.sum(axis=(1, 2))
    correlation = np.corrcoef(is_flipped, centre)[0, 1]
    assert abs(correlation) < 0.2


def test_the_largest_batch_is_tried_with_few_images_too(built: keras.Model) -> None:
    serve = export.serving_function(built)
    parity = export.verify(serve, export.to_onnx(serve), dataset().test.inputs, 64)
    assert parity.images == 64
    assert parity.max_abs_difference < 1e-5
    assert parity.label_agreement == 1


def test_an_export_with_other_weights_does_not_pass_for_the_network(built: keras.Model) -> None:
    serve = export.serving_function(built)
    model = onnx.load_model_from_string(export.to_onnx(serve))
    (kernel,) = [w for w in model.graph.initializer if list(w.dims) == [8, 2]]
    weights = numpy_helper.to_array(kernel)
    kernel.CopyFrom(numpy_helper.from_array(weights[:, ::-1].copy(), kernel.name))
    parity = export.verify(serve, model.SerializeToString(), dataset().test.inputs, 8)
    assert parity.max_abs_difference > 1e-2
    assert parity.label_agreement < 1
