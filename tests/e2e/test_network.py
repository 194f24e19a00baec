"""What TensorFlow makes of a network: its parts, without a whole training run."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
import tensorflow as tf
from scipy import special

from convoy_service.artifacts.images import Target
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset, Split
from convoy_training.evaluation.scores import Scaling, compare
from convoy_training.export import quantization as variants
from convoy_training.export import to_onnx as export
from convoy_training.fitting import augmentation, devices
from convoy_training.fitting import loop as fit
from convoy_training.fitting import networks as network
from convoy_training.fitting.checkpoint import Checkpoint
from convoy_training.settings import TrainingSettings

BASIC = TrainingSettings(filters=(4, 8), dense=8, precision="float32")
STRONG = TrainingSettings(network="strong", filters=(8, 8), dropout=0.0, precision="float32")


def dataset(count: int = 40, shape: tuple[int, int, int] = (8, 8, 3)) -> Dataset:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (count, *shape), np.uint8)
    inputs[..., 1:] //= 3
    labels = np.arange(count) % 2
    inputs[labels == 1] //= 2
    split = Split(inputs, labels)
    return Dataset("test", ("a", "b"), Target(*shape), split, split, split)


# Networks.


def test_pixels_are_brought_to_a_mean_of_0_and_a_deviation_of_1() -> None:
    data = dataset()
    built = network.build(data, BASIC)
    scaling = next(layer for layer in built.layers if isinstance(layer, keras.layers.Rescaling))
    normalised = data.train.inputs.astype(np.float64) * scaling.scale + scaling.offset
    assert abs(normalised.mean()) < 0.02
    assert 0.7 < normalised.std() < 1.5


@pytest.mark.parametrize("settings", [BASIC, STRONG], ids=["basic", "strong"])
@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("bend", [1.0, 1.6])
def test_what_is_exported_answers_as_the_network_does(
    settings: TrainingSettings, mirror: bool, bend: float
) -> None:
    data = dataset()
    devices.prepare(0)
    built = network.build(data, settings)
    for layer in built.layers:
        # As after training: no normalisation does nothing.
        if isinstance(layer, keras.layers.BatchNormalization):
            random = np.random.default_rng(1)
            layer.set_weights([random.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    serve = export.serving_function(built, Scaling(1.7, bend), mirror=mirror)
    onnx = variants.clean(export.to_onnx(serve))
    model = Model(onnx, "cpu")
    parity = compare(export.predict(serve), model.run, data.test.inputs, 64)
    assert parity.max_abs_difference < 1e-5
    logits = export.logits_function(built, mirror=mirror)(data.test.inputs)
    surprise = -special.log_softmax(logits, axis=1)
    expected = special.softmax(-(surprise**bend) / 1.7, axis=1)
    np.testing.assert_allclose(model.run(data.test.inputs), expected, atol=1e-5)
    if mirror:
        flipped = model.run(data.test.inputs[:, :, ::-1])
        np.testing.assert_allclose(model.run(data.test.inputs), flipped, atol=1e-5)


@pytest.mark.parametrize("settings", [BASIC, STRONG], ids=["basic", "strong"])
def test_a_rounded_network_shares_its_weights_with_its_int8_graph(
    settings: TrainingSettings,
) -> None:
    data = dataset()
    devices.prepare(0)
    built = network.build(data, settings)
    export.round_weights(built)
    serve = export.serving_function(built)
    before = variants.clean(export.to_onnx(serve))
    one, _, shared = variants.share(before, variants.int8(before, data.train.inputs))
    kernels = sum(layer.kernel.numpy().size for layer in built.layers if hasattr(layer, "kernel"))
    # The first convolution's stay as they are.
    assert 0.9 * kernels < len(shared) < kernels + 64 * len(built.layers)
    model = Model(one, "cpu", data=shared)
    parity = compare(export.predict(serve), model.run, data.test.inputs, 64)
    assert parity.max_abs_difference < 1e-5


def test_weights_fit_whatever_is_computed_in() -> None:
    data = dataset()
    for settings in (BASIC, STRONG):
        half = network.build(data, settings, precision="bfloat16")
        full = network.build(data, settings)
        full.set_weights(half.get_weights())
        assert {weight.dtype for weight in half.weights} == {"float32"}
        pixels = data.test.inputs.astype(np.float32)
        np.testing.assert_allclose(
            half(pixels, training=False), full(pixels, training=False), atol=0.2
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (replace(BASIC, filters=(4,)), "give --filters 2 numbers"),
        (replace(STRONG, filters=(4, 4, 4, 4)), "too small for 4 stages"),
        (replace(BASIC, network="resnet"), "there is basic, strong, "),
        (replace(BASIC, network="MobileNetV2"), "MobileNetV2 with images of 8x8"),
    ],
)
def test_what_can_not_be_built_is_said(settings: TrainingSettings, said: str) -> None:
    with pytest.raises(ConvoyError, match=said):
        network.build(dataset(), settings)


# Keras has not yet followed numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
def test_a_backbone_takes_weights_from_a_file_with_or_without_its_head(tmp_path: Path) -> None:
    data = dataset(4, (32, 32, 3))
    settings = TrainingSettings(network="MobileNetV2", frozen=True)
    make = keras.applications.MobileNetV2
    bare = make(include_top=False, weights=None, input_shape=(32, 32, 3), pooling="avg")
    whole = make(weights=None, classes=7)
    bare.save_weights(tmp_path / "bare.weights.h5")
    whole.save_weights(tmp_path / "whole.weights.h5")
    for name, source in (("bare", bare), ("whole", whole)):
        built = network.build(data, replace(settings, weights=tmp_path / f"{name}.weights.h5"))
        (body,) = (layer for layer in built.layers if isinstance(layer, keras.Model))
        kernel = body.get_layer("block_5_expand").get_weights()[0]
        assert np.array_equal(kernel, source.get_layer("block_5_expand").get_weights()[0])
        assert len(built.trainable_variables) == 2
    other = keras.applications.MobileNet(include_top=False, weights=None, input_shape=(32, 32, 3))
    other.save_weights(tmp_path / "other.weights.h5")
    (tmp_path / "broken.weights.h5").write_bytes(b"\x89HDF")
    for name in ("other", "broken", "missing"):
        with pytest.raises(ConvoyError, match=f"--weights .*{name}"):
            network.build(data, replace(settings, weights=tmp_path / f"{name}.weights.h5"))


# What is done to training images.


def drawn(settings: TrainingSettings, pixels: np.ndarray, epoch: int = 0) -> np.ndarray:
    """The images after augmentation."""
    how = augmentation.draw(settings, pixels.shape[1:3], len(pixels), epoch).how
    whole = augmentation.only_whole(settings)
    grey = tf.zeros(pixels.shape[-1])
    return np.asarray(augmentation.augment(tf.constant(pixels), how, grey, whole=whole))


def dot(count: int = 400) -> np.ndarray:
    """One bright pixel off the middle tells how its image was flipped and moved."""
    image = np.zeros((count, 32, 32, 1), np.uint8)
    image[:, 16, 8] = 200
    return image


def test_flips_and_shifts_are_exact_and_drawn_apart() -> None:
    images = drawn(TrainingSettings(flip=True, shift=6), dot())[..., 0]
    rows, columns = images.max(axis=2).argmax(axis=1), images.max(axis=1).argmax(axis=1)
    assert ((images == 0) | (images == 200)).all()
    flipped = columns > 15
    across = np.where(flipped, columns - 23, columns - 8)
    down = rows - 16
    assert 0.4 < flipped.mean() < 0.6
    for moved in (across, down):
        assert set(moved.tolist()) == set(range(-6, 7))
        assert abs(np.corrcoef(flipped, moved)[0, 1]) < 0.2
    assert abs(np.corrcoef(across, down)[0, 1]) < 0.2


def test_flips_alternate_from_epoch_to_epoch() -> None:
    settings = TrainingSettings(flip=True)
    first, second, third = (drawn(settings, dot(50), epoch) for epoch in range(3))
    assert np.array_equal(first[:, :, ::-1], second)
    assert np.array_equal(first, third)


def test_turns_and_scales_are_about_the_centre() -> None:
    matrix = augmentation.draw(TrainingSettings(rotate=30, zoom=0.1), (9, 7), 200, 0).how["matrix"]
    linear = np.stack([matrix[:, 0:2], matrix[:, 3:5]], axis=1)
    centre = np.array([3, 4])
    moved = linear @ centre + matrix[:, [2, 5]]
    np.testing.assert_allclose(moved, np.tile(centre, (200, 1)), atol=1e-5)
    scale = np.sqrt(np.linalg.det(linear))
    assert 0.88 < scale.min() < 0.93
    assert 1.08 < scale.max() < 1.13
    turned = linear / scale[:, np.newaxis, np.newaxis]
    np.testing.assert_allclose(
        turned @ turned.transpose(0, 2, 1), np.tile(np.eye(2), (200, 1, 1)), atol=1e-5
    )
    degrees = np.degrees(np.arcsin(turned[:, 1, 0]))
    assert -30 < degrees.min() < -25
    assert 25 < degrees.max() < 30


def test_what_is_cut_out_is_a_square_of_the_mean() -> None:
    pixels = np.full((200, 16, 16, 3), 90, np.uint8)
    images = drawn(TrainingSettings(cutout=6), pixels)
    holes = (images == 0).all(axis=3).sum(axis=(1, 2))
    assert holes.max() == 36
    assert (holes > 8).all()
    assert ((images == 0) | (images == 90)).all()


def test_colours_vary_about_what_they_are() -> None:
    pixels = np.random.default_rng(0).integers(60, 190, (300, 8, 8, 3), np.uint8)
    images = drawn(TrainingSettings(colour=0.2), pixels)
    means = images.mean(axis=(1, 2, 3)) / pixels.mean(axis=(1, 2, 3))
    assert 0.97 < means.mean() < 1.03
    assert means.min() < 0.85
    assert means.max() > 1.15
    assert images.min() >= 0
    assert images.max() <= 255


# The loop.


def trained(settings: TrainingSettings, folder: Path, data: Dataset, **more: Any) -> fit.Fitted:
    settings = replace(settings, checkpoints=folder)
    return fit.fit(data, settings, devices.prepare(settings.seed), **more)


class Killed(BaseException):
    pass


LOOP = replace(
    BASIC, epochs=4, batch_size=8, flip=True, shift=1, average=0.9, patience=3, class_weights=True
)


@pytest.mark.parametrize(
    "settings",
    [LOOP, replace(LOOP, network="strong", optimizer="sgd", precision="bfloat16", patience=0)],
    ids=["basic", "strong"],
)
def test_a_run_that_is_killed_goes_on_to_the_same_weights(
    settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an epoch's middle too, where it is put down there."""
    monkeypatch.setattr(fit, "_CHECKPOINT_S", 0.0)
    data = dataset()
    whole = trained(settings, tmp_path / "whole", data)
    # A run that is killed while it exports has nothing to train again.
    (kept,) = (tmp_path / "whole").iterdir()
    resumed: list[Any] = []
    ended = trained(settings, tmp_path / "whole", data, on_resume=lambda *at: resumed.append(at))
    assert resumed == [(20, 20)]
    assert ended.epochs == whole.epochs
    for mine, theirs in zip(ended.network.get_weights(), whole.network.get_weights(), strict=True):
        assert np.array_equal(mine, theirs)
    ended.forget()
    assert not kept.exists()

    def die(step: int, steps: int, loss: float, accuracy: float) -> None:
        if step > 8:
            raise Killed

    with pytest.raises(Killed):
        trained(settings, tmp_path / "killed", data, on_step=die)
    resumed.clear()
    again = trained(
        settings, tmp_path / "killed", data, on_resume=lambda *where: resumed.append(where)
    )
    (step, steps) = resumed[0]
    assert 0 < step <= 8 < steps == 20
    for mine, theirs in zip(again.network.get_weights(), whole.network.get_weights(), strict=True):
        assert np.array_equal(mine, theirs)
    figures = [(e.loss, e.accuracy, e.validation_loss) for e in whole.epochs]
    assert [(e.loss, e.accuracy, e.validation_loss) for e in again.epochs] == figures


def die_early(epoch: fit.Epoch) -> None:
    if epoch.epoch == 2:
        raise Killed


def test_a_run_with_other_settings_or_images_begins_anew(tmp_path: Path) -> None:
    resumed: list[Any] = []
    data, others = dataset(), dataset(48)
    for settings, images in (
        (LOOP, data),
        (replace(LOOP, learning_rate=0.01), data),
        (LOOP, others),
        # By which the best epoch is told.
        (LOOP, replace(data, validation=others.validation)),
    ):
        with pytest.raises(Killed):
            trained(
                settings,
                tmp_path,
                images,
                on_epoch=die_early,
                on_resume=lambda *at: resumed.append(at),
            )
    assert not resumed
    assert len(list(tmp_path.iterdir())) == 4


# Cut off; the version that its zip needs; the flag of encryption.
@pytest.mark.parametrize("damage", [slice(100, None), slice(4, 5), slice(6, 7)])
def test_a_damaged_checkpoint_is_said_and_trained_anew(
    damage: slice, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    checkpoint = Checkpoint(folder, True, True)
    checkpoint.save({"step": 1}, [np.arange(3)], [])
    assert checkpoint.load() is not None
    file = folder / "checkpoint.npz"
    content = file.read_bytes()
    # The last of the entries in the directory, by which all are found.
    entry = content.index(b"PK\x01\x02")
    damaged = bytearray(content)
    if damage.stop is None:
        del damaged[damage]
    else:
        damaged[entry + damage.start + 2] = 99
        damaged[damage.start] = 99
    file.write_bytes(damaged)
    assert checkpoint.load() is None
    assert "training begins anew" in caplog.text
    assert [each.name for each in folder.iterdir()] == ["checkpoint.npz"]


def test_of_two_runs_that_are_the_same_one_may_end_before_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    first, second = (Checkpoint(folder, True, True) for _ in range(2))
    first.save({"step": 1}, [np.arange(3)], [])
    write = np.savez

    def end(*arguments: Any, **arrays: Any) -> None:
        monkeypatch.setattr(np, "savez", write)
        first.remove()
        write(*arguments, **arrays)

    monkeypatch.setattr(np, "savez", end)
    second.save({"step": 2}, [np.arange(3)], [])
    found = second.load()
    assert found
    assert found[0] == {"step": 2}


def test_checkpoints_that_nobody_goes_on_with_are_removed_after_a_month(tmp_path: Path) -> None:
    for name, days in (("old", 31), ("young", 29)):
        file = tmp_path / name / "checkpoint.npz"
        file.parent.mkdir()
        file.write_bytes(b"")
        then = time.time() - days * 24 * 3600
        os.utime(file, (then, then))
    trained(replace(LOOP, epochs=1), tmp_path, dataset()).forget()
    assert [folder.name for folder in tmp_path.iterdir()] == ["young"]


def test_the_best_epoch_is_taken_where_no_later_one_is_better(tmp_path: Path) -> None:
    """Labels that mean nothing: validation gets worse while training gets better."""
    random = np.random.default_rng(3)
    data = dataset(60)
    noise = Split(random.integers(0, 256, (60, 8, 8, 3), np.uint8), random.integers(0, 2, 60))
    data = replace(data, train=noise)
    settings = replace(LOOP, epochs=30, patience=2, dropout=0.0, learning_rate=0.02, average=0.0)
    fitted = trained(settings, tmp_path, data)
    losses = [epoch.validation_loss for epoch in fitted.epochs]
    assert len(losses) == fitted.best_epoch + 2 < 30
    assert min(losses) == losses[fitted.best_epoch - 1]
    logits = export.logits_function(fitted.network)(data.validation.inputs)
    loss = tf.nn.sparse_softmax_cross_entropy_with_logits(data.validation.labels, logits)
    assert float(tf.reduce_mean(loss)) == pytest.approx(min(losses), rel=1e-4)


def test_a_loss_that_is_no_number_ends_it_with_advice(tmp_path: Path) -> None:
    with pytest.raises(devices.TrainingFailed, match="try a lower --learning-rate than 1e"):
        trained(replace(LOOP, learning_rate=1e30, optimizer="sgd"), tmp_path, dataset())


def test_weights_to_start_from_have_to_fit(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match="of another network"):
        trained(LOOP, tmp_path, dataset(), start=[np.zeros(3)])


def test_a_network_with_a_count_among_its_weights_is_averaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As EfficientNet has one, in the layer that takes away the mean."""

    def build(data: Dataset, *_: Any, **__: Any) -> keras.Model:
        scaling = keras.layers.Normalization()
        parts = [keras.layers.Input(data.target.shape), scaling, keras.layers.Flatten()]
        built = keras.Sequential([*parts, keras.layers.Dense(2)])
        scaling.count.assign(7)
        return built

    monkeypatch.setattr(network, "build", build)
    fitted = trained(replace(LOOP, epochs=1), tmp_path, dataset(8))
    (count,) = (weight for weight in fitted.network.weights if weight.dtype != "float32")
    assert int(count.value) == 7
