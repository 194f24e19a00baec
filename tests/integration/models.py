"""Small models, and what they must answer."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts import reference_statistics as profile
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import (
    Bundle,
    Golden,
    Probabilities,
    Scores,
    Thresholds,
    Variant,
)
from convoy_service.engine.onnx_model import Model
from convoy_training.data import datasets
from convoy_training.data.datasets import Dataset
from convoy_training.evaluation.scores import sure
from convoy_training.export.import_onnx import add
from convoy_training.settings import AddSettings, TrainingSettings
from tests.conftest import REPOSITORY

COLOURS = ("red", "green", "blue")
COLOURS_BATCH = 8

_COLOURS = """
<ir_version: 10, opset_import: ["" : 18]>
colours (float[N, 4, 4, 3] image) => (float[N, 3] scores) {
  axes = Constant <value_ints = [1, 2]> ()
  scores = ReduceMean <keepdims = 0> (image, axes)
}
"""

# Where the largest pixel is 1, it multiplies matrices for a while: 1200 rounds are half a second on
# two cores.
_SLOW = """
<ir_version: 10, opset_import: ["" : 18]>
slow (uint8[N, 2, 2, 1] image) => (float[N, 4] scores) {
  values = Cast <to = 1> (image)
  largest = ReduceMax <keepdims = 0> (values)
  one = Constant <value_float = 1.0> ()
  is_one = Equal (largest, one)
  asked = Cast <to = 7> (is_one)
  many = Constant <value_int = ROUNDS> ()
  rounds = Mul (asked, many)
  yes = Constant <value = bool {1}> ()
  shape = Constant <value_ints = [256, 256]> ()
  start = ConstantOfShape <value = float[1] {0.01}> (shape)
  end = Loop (rounds, yes, start) <body = work (int64 round, bool go_on, float[256, 256] x) => (bool goes_on, float[256, 256] y) {
    goes_on = Identity (go_on)
    squared = MatMul (x, x)
    y = Tanh (squared)
  }>
  mean = ReduceMean <keepdims = 0> (end)
  zero = Constant <value_float = 0.0> ()
  nothing = Mul (mean, zero)
  flat = Flatten <axis = 1> (values)
  scores = Add (flat, nothing)
}
"""
# The same for every image, and much shorter.
_STEADY = _SLOW.replace(
    "asked = Cast <to = 7> (is_one)", "asked = Constant <value_int = 1> ()"
).replace("slow (uint8", "steady (uint8")

# Answers as `slow`, but where the largest pixel is 13 with NaN, and where it is 17 not at all.
_POISON = """
<ir_version: 10, opset_import: ["" : 18]>
poison (uint8[N, 2, 2, 1] image) => (float[N, 4] scores) {
  values = Cast <to = 1> (image)
  axes = Constant <value_ints = [1, 2, 3]> ()
  largest = ReduceMax <keepdims = 0> (values, axes)
  thirteen = Constant <value_float = 13.0> ()
  is_thirteen = Equal (largest, thirteen)
  bad = Cast <to = 1> (is_thirteen)
  below = Neg (bad)
  root = Sqrt (below)
  last = Constant <value_ints = [1]> ()
  column = Unsqueeze (root, last)
  seventeen = Constant <value_float = 17.0> ()
  is_seventeen = Equal (largest, seventeen)
  beyond = Cast <to = 7> (is_seventeen)
  table = Constant <value_floats = [0.0]> ()
  zeros = Gather (table, beyond)
  more = Unsqueeze (zeros, last)
  flat = Flatten <axis = 1> (values)
  some = Add (flat, column)
  scores = Add (some, more)
}
"""
NAN_IMAGE = np.array([[[13], [0]], [[1], [0]]], np.uint8)
RAISING_IMAGE = np.array([[[17], [0]], [[1], [0]]], np.uint8)

FAST_IMAGE = np.array([[[2], [0]], [[0], [0]]], np.uint8)
SLOW_BATCH = 4
SLOW_IMAGE = np.array([[[1], [0]], [[0], [0]]], np.uint8)


def add_colours(
    models: Path,
    name: str = "colours",
    labels: tuple[str, ...] = COLOURS,
    scale: float = 1 / 51,
) -> Bundle:
    """Publishes a model that says of which colour an image has most; `colours_of` says what exactly."""
    settings = AddSettings(
        labels=_write(models / "colours.txt", "\n".join(labels)),
        models=models,
        scale=(scale,),
        softmax=True,
        max_batch_size=COLOURS_BATCH,
    )
    return add(name, _onnx(models / "colours.onnx", _COLOURS), settings)


def colours_of(pixels: Pixels) -> Probabilities:
    """What `colours` must answer to uint8 `[N, H, W, 3]`, worked out without ONNX Runtime."""
    scores = np.exp(pixels.astype(np.float64).mean((1, 2)) / 51)
    return np.asarray(scores / scores.sum(axis=1, keepdims=True), np.float32)


def add_slow(models: Path, name: str = "slow", rounds: int = 1200) -> Bundle:
    """Publishes a model that answers to FAST_IMAGE at once, and to SLOW_IMAGE after half a second;
    `slow_of` says what.
    """
    settings = AddSettings(models=models, softmax=True, max_batch_size=SLOW_BATCH)
    text = _SLOW.replace("ROUNDS", str(rounds))
    return add(name, _onnx(models / "slow.onnx", text), settings)


def add_steady(models: Path, rounds: int, name: str = "steady") -> Bundle:
    """Publishes a model that answers as `slow`, and for each batch multiplies so many matrices."""
    settings = AddSettings(models=models, softmax=True, max_batch_size=SLOW_BATCH)
    text = _STEADY.replace("ROUNDS", str(rounds))
    return add(name, _onnx(models / "steady.onnx", text), settings)


def add_poison(models: Path, name: str = "poison") -> Bundle:
    """Publishes a model that answers as `slow`, but fails on NAN_IMAGE and on RAISING_IMAGE."""
    settings = AddSettings(models=models, softmax=True, max_batch_size=SLOW_BATCH)
    return add(name, _onnx(models / "poison.onnx", _POISON), settings)


def slow_of(pixels: Pixels) -> Probabilities:
    """What `slow`, `steady` and `poison` must answer to uint8 `[N, 2, 2, 1]`."""
    scores = np.exp(pixels.reshape(len(pixels), -1).astype(np.float64))
    return np.asarray(scores / scores.sum(axis=1, keepdims=True), np.float32)


def add_slow_to_load(models: Path, name: str = "slow") -> Bundle:
    """Publishes a model that takes half a second to prove itself."""
    added = add_slow(models, name)
    pixels = SLOW_IMAGE[np.newaxis]
    golden = Golden(pixels, Model(added.onnx).run(pixels))
    return bundles.write(models / name, added.manifest, added.onnx, golden)


def digits() -> Golden:
    """Real handwritten digits, 0 to 7 in this order, and what the shipped model must answer."""
    return bundles.read(REPOSITORY / "models" / "digits" / "1").golden


def add_profiled(models: Path, name: str = "digits") -> tuple[Bundle, Dataset]:
    """Publishes the shipped digits with the profile of their test images; and all the images."""
    shipped = bundles.read(REPOSITORY / "models" / "digits" / "1")
    data = datasets.load(TrainingSettings(data="digits"))
    given, thresholds = Model.load(shipped).run(data.test.inputs), shipped.manifest.thresholds
    assert thresholds
    sizes = [profile.size_of(image) for image in data.test.inputs]
    made = profile.make(data.test.inputs, given, ~sure(given, thresholds), sizes)
    manifest = replace(shipped.manifest, training={"profile": asdict(made)}, variants={})
    return bundles.write(models / name, manifest, shipped.onnx, shipped.golden), data


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, pixels: Pixels) -> None:
        self._left = [{"pixels": pixels}]

    def get_next(self) -> Any:
        return self._left.pop() if self._left else None


def add_variants(
    models: Path, name: str, thresholds: Thresholds | None = None, *, off: float = 0.0
) -> Bundle:
    """Publishes the shipped digits with an int8 graph too, said to be twice as fast on a CPU. Its
    golden answers are `off` by so much from what it gives here.
    """
    shipped = bundles.read(REPOSITORY / "models" / "digits" / "1")
    file = models / f"{name}.int8.onnx"
    quantize_static(shipped.folder / "model.onnx", file, _Calibration(shipped.golden.pixels))
    int8 = file.read_bytes()
    answers = Model(int8, "cpu").run(shipped.golden.pixels) + np.float32(off)
    scores = Scores(1.0, 8, 8, 0.0)
    manifest = replace(
        shipped.manifest,
        variants={"int8": Variant(scores, 1.0, 2000.0, 2.0, "cpu")},
        thresholds=thresholds,
    )
    golden = replace(shipped.golden, variants={"int8": answers})
    return bundles.write(models / name, manifest, shipped.onnx, golden, {"int8": int8})


def flip_a_byte(file: Path) -> None:
    """Damages a file without changing its size."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)


def _onnx(path: Path, text: str) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path
