"""Graphs made lean, in int8 and in float16: what is in them, and that they answer as before."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import NodeProto, TensorProto, helper

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Probabilities
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion, ConvoyError
from convoy_training.data import datasets
from convoy_training.evaluation.scores import score
from convoy_training.export.quantization import clean, fp16, int8, rounded, share
from convoy_training.settings import TrainingSettings
from tests.conftest import REPOSITORY
from tests.unit.graphs import classifier, graph, value

IMAGENET = (123.675, 116.28, 103.53)


class _Network:
    """Nodes one after the other, as tf2onnx writes a residual network of Keras'."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.last = "pixels"

    def add(self, kind: str, *others: str | np.ndarray, **attributes: Any) -> str:
        names = []
        for other in others:
            name = other if isinstance(other, str) else f"constant_{len(self.constants)}"
            if not isinstance(other, str):
                self.constants[name] = other
            names.append(name)
        made = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.last, *names], [made], **attributes))
        self.last = made
        return made

    def convolution(self, inputs: int, outputs: int, stride: int = 1) -> str:
        weights = self.rng.normal(0, (2 / (9 * inputs)) ** 0.5, (outputs, inputs, 3, 3))
        bias = self.rng.normal(0, 0.1, outputs)
        # What Keras' "same" comes to, where the stride goes into the side.
        pads = [1, 1, 1, 1] if stride == 1 else [0, 0, 1, 1]
        return self.add("Conv", floats(weights), floats(bias), pads=pads, strides=[stride] * 2)

    def normalisation(self, channels: int, *, lowest: float = 0.5) -> None:
        scale = np.linspace(lowest, 1.5, channels)
        self.add("Mul", floats(scale.reshape(1, -1, 1, 1)))
        self.add("Add", floats(self.rng.normal(0, 0.1, (1, channels, 1, 1))))


def floats(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def exported(
    shape: tuple[int, int, int] = (8, 8, 3),
    *,
    mean: float | Sequence[float] = 120,
    stride: int = 1,
    mirror: bool = False,
    lowest: float = 0.5,
    loudness: float = 0.2,
    temperature: float = 1.0,
    bend: float = 1.0,
) -> bytes:
    """Stem; convolution, pooling, normalisation, ReLU; a residual block; mean, dense, softmax."""
    height, width, channels = shape
    made = _Network()
    if mirror:
        made.add("Gather", np.arange(width)[::-1].copy(), axis=2)
        made.nodes.append(helper.make_node("Concat", ["pixels", made.last], ["both"], axis=0))
        made.last = "both"
    made.add("Cast", to=TensorProto.FLOAT)
    made.add("Mul", floats(1 / 60))
    made.add("Add", floats(-np.asarray(mean) / 60))
    if channels == 1:
        made.add("Reshape", np.array([-1, 1, height, width]))
    else:
        made.add("Transpose", perm=[0, 3, 1, 2])
    made.convolution(channels, 16, stride)
    made.add("Relu")
    made.convolution(16, 16)
    made.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    made.normalisation(16, lowest=lowest)
    shortcut = made.add("Relu")
    made.convolution(16, 16)
    made.add("Relu")
    made.convolution(16, 16)
    made.add("Add", shortcut)
    made.add("Relu")
    made.add("GlobalAveragePool")
    made.add("Squeeze", np.array([2, 3]))
    made.add("MatMul", floats(made.rng.normal(0, loudness, (16, 5))))
    made.add("Add", floats(made.rng.normal(0, 0.1, 5)))
    if temperature != 1:
        made.add("Mul", floats(1 / temperature))
    if mirror:
        made.nodes.append(helper.make_node("Split", [made.last], ["one", "other"], axis=0))
        made.last = "one"
        made.add("Add", "other")
        made.add("Mul", floats(0.5))
    if bend != 1:
        made.add("LogSoftmax")
        made.add("Neg")
        made.add("Relu")
        made.add("Pow", floats(bend))
        made.add("Neg")
    made.add("Identity")
    made.nodes.append(helper.make_node("Softmax", [made.last], ["probabilities"], axis=1))
    inputs = [value("pixels", TensorProto.UINT8, ["unk__7", *shape])]
    outputs = [value("probabilities", TensorProto.FLOAT, ["unk__8", 5])]
    return graph(made.nodes, inputs, outputs, made.constants)


def images(shape: tuple[int, int, int] = (8, 8, 3), count: int = 32) -> Pixels:
    """Noise of all kinds of brightness and contrast; the first two are black and white."""
    rng = np.random.default_rng(1)
    centre, spread = rng.uniform(0, 255, (count, 1, 1, 1)), rng.uniform(0, 90, (count, 1, 1, 1))
    made = rng.normal(centre, spread, (count, *shape)).clip(0, 255).astype(np.uint8)
    made[0], made[1] = 0, 255
    return made


def answers(data: bytes, pixels: Pixels) -> Probabilities:
    return Model(data, device="cpu").run(pixels)


def kinds(data: bytes) -> list[str]:
    model = onnx.load_model_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain for entry in model.opset_import} == {""}
    assert {node.domain for node in model.graph.node} == {""}
    return [node.op_type for node in model.graph.node]


def kinds_run(data: bytes, folder: Path) -> Counter[str]:
    """What ONNX Runtime makes of the graph on this processor."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "run.onnx")
    ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "run.onnx").graph.node)


REST = [
    "Conv", "Relu", "MaxPool", "Conv", "Relu", "Conv", "Add", "Relu", "GlobalAveragePool", "Squeeze",
    "Gemm",
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "shape", "expected"),
    [
        ({}, (8, 8, 3), ["Transpose", "Cast", "Sub", "Conv", "Relu", *REST, "Softmax"]),
        ({"mean": 0, "temperature": 0.7}, (8, 8, 3), ["Transpose", "Cast", "Conv", "Relu", *REST, "Softmax"]),
        ({"mean": IMAGENET}, (6, 10, 3), ["Transpose", "Cast", "Sub", "Conv", "Relu", *REST, "Softmax"]),
        ({}, (8, 8, 1), ["Reshape", "Cast", "Sub", "Conv", "Relu", *REST, "Softmax"]),
        (
            {"mirror": True},
            (8, 8, 3),
            [
                *("Gather", "Concat", "Transpose", "Cast", "Sub", "Conv", "Relu", *REST),
                *("Split", "Add", "Mul", "Softmax"),
            ],
        ),
    ],
)  # fmt: skip
def test_a_clean_graph_has_nothing_to_spare_and_answers_as_before(
    given: dict[str, Any], shape: tuple[int, int, int], expected: list[str]
) -> None:
    before = exported(shape, **given)
    after = clean(before)
    assert kinds(after) == expected
    pixels = images(shape)
    was = answers(before, pixels)
    assert np.ptp(was, axis=0).max() > 0.1  # or nothing would show
    assert np.abs(answers(after, pixels) - was).max() < 3e-6
    ends = onnx.load_model_from_string(after).graph
    assert [value.name for value in (*ends.input, *ends.output)] == ["pixels", "probabilities"]
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in (*ends.input, *ends.output)] == [
        "N"
    ] * 2
    assert clean(after) == after


def test_the_mean_is_the_whole_number_that_it_was() -> None:
    constants = onnx.load_model_from_string(clean(exported())).graph.initializer
    means = [onnx.numpy_helper.to_array(each) for each in constants if each.name == "mean"]
    assert means == [np.float32(120)]


def test_pooling_stays_ahead_of_what_could_turn_the_order_of_values() -> None:
    before = exported(lowest=-0.5)
    after = clean(before)
    assert kinds(after)[6:9] == ["MaxPool", "Mul", "Add"]
    pixels = images()
    assert np.abs(answers(after, pixels) - answers(before, pixels)).max() < 3e-6


def test_what_is_no_graph_is_told() -> None:
    broken = graph(
        [helper.make_node("Conv", ["pixels", "nothing"], ["probabilities"])],
        [value("pixels", TensorProto.UINT8, ["N", 4, 4, 3])],
        [value("probabilities", TensorProto.FLOAT, ["N", 3])],
    )
    with pytest.raises(ConvoyError, match="ONNX Runtime can't load the graph"):
        clean(broken)


@pytest.mark.parametrize(
    ("given", "shape"),
    [
        ({}, (8, 8, 3)),
        ({}, (8, 8, 1)),
        ({"stride": 2}, (16, 16, 3)),
        ({"mean": IMAGENET}, (8, 12, 3)),
        ({}, (6, 6, 3)),  # does not come out even in blocks
        ({"mean": -10}, (8, 8, 3)),  # no pixel is that
        ({"mirror": True}, (8, 8, 3)),
    ],
)
def test_an_int8_graph_is_of_integers_and_answers_nearly_as_before(
    given: dict[str, Any], shape: tuple[int, int, int], tmp_path: Path
) -> None:
    before, pixels = exported(shape, **given), images(shape, 64)
    made = int8(before, pixels)
    kinds(made)
    run = kinds_run(made, tmp_path)
    assert run["QLinearConv"] == 4
    assert run["QLinearAdd"] == 1
    assert run["QGemm"] == 1
    assert not {"Conv", "Gemm", "MatMul", "Relu", "DequantizeLinear"} & set(run)
    # Pixels are taken as they are, but for those less a mean that is no byte.
    assert run["QuantizeLinear"] == run["Cast"] == (given.get("mean") == -10)
    # The order of axes changes where there is one place left, if at all.
    assert run["Transpose"] <= (2 if shape[2] == 1 or shape[1] % 4 else 1)
    was, now = answers(before, pixels), answers(made, pixels)
    assert np.ptp(was, axis=0).max() > 0.2
    assert np.abs(now - was).max() < 0.04
    # In integers there is no rounding that depends on the others in the batch.
    assert (answers(made, pixels[5:6]) == now[5:6]).all()
    assert (answers(made, pixels[:3]) == now[:3]).all()


def test_weights_have_seven_bits() -> None:
    made = onnx.load_model_from_string(int8(exported(), images()))
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in made.graph.initializer
        if tensor.data_type == TensorProto.INT8 and len(tensor.dims) > 1
    ]
    assert len(weights) == 5
    assert all(np.abs(each.astype(int)).max() <= 64 for each in weights)


def test_networks_without_convolutions_are_quantised_too() -> None:
    before, pixels = classifier((4, 5, 3)), images((4, 5, 3))
    made = int8(before, pixels)
    assert np.abs(answers(made, pixels) - answers(before, pixels)).max() < 0.02


def test_what_has_no_weights_can_not_be_quantised() -> None:
    mean = helper.make_node("ReduceMean", ["floats"], ["means"], axes=[1, 2], keepdims=0)
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        mean,
        helper.make_node("Softmax", ["means"], ["probabilities"]),
    ]
    made = graph(
        nodes,
        [value("pixels", TensorProto.UINT8, ["N", 4, 4, 3])],
        [value("probabilities", TensorProto.FLOAT, ["N", 3])],
    )
    with pytest.raises(ConvoyError, match="neither convolutions nor fully connected"):
        int8(made, images((4, 4, 3)))


@pytest.mark.parametrize("bend", [1.0, 1.6])
@pytest.mark.parametrize("mean", [120, IMAGENET])
def test_float16_is_within_and_float32_at_both_ends(mean: Any, bend: float) -> None:
    before, pixels = clean(exported(mean=mean, bend=bend)), images()
    made = fp16(before)
    # Where it is exact, the mean is taken away in halves.
    begins = ["Transpose", "Cast", "Sub", *(["Cast"] if mean == IMAGENET else []), "Conv"]
    assert kinds(made)[: len(begins)] == begins
    end = ["LogSoftmax", "Neg", "Relu", "Pow", "Neg"] if bend != 1 else []
    assert kinds(made)[-len(end) - 2 :] == ["Cast", *end, "Softmax"]
    stored = onnx.load_model_from_string(made).graph.initializer
    large = [each.data_type for each in stored if len(each.dims) > 1 and each.name != "mean"]
    assert large == [TensorProto.FLOAT16] * 5
    was = answers(before, pixels)
    assert 0 < np.abs(answers(made, pixels) - was).max() < 5e-3


def rounded_graph() -> bytes:
    model = onnx.load_model_from_string(clean(exported()))
    for tensor in model.graph.initializer:
        if len(tensor.dims) > 1 and tensor.data_type == TensorProto.FLOAT:
            weights = onnx.numpy_helper.to_array(tensor)
            # Keras has the outputs last, and so has what a fully connected layer becomes.
            last = np.moveaxis(weights, 0, -1) if weights.ndim == 4 else weights
            made = rounded(last)
            made = np.moveaxis(made, -1, 0) if weights.ndim == 4 else made
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(made), tensor.name))
    return bytes(model.SerializeToString())


def test_graphs_of_rounded_weights_share_them_and_answer_as_before(tmp_path: Path) -> None:
    before, pixels = rounded_graph(), images()
    integers = int8(before, pixels)
    one, other, data = share(before, integers)
    # All but those of the first convolution, which int8 has in an order of its own.
    shared = 16 * 16 * 9 * 3 + 16 * 5
    assert shared <= len(data) < shared + 5 * 64
    assert len(before) - len(one) > 2.5 * shared
    model = Model(one, "cpu", data=data)
    assert np.abs(model.run(pixels) - answers(before, pixels)).max() < 1e-5
    assert (Model(other, "cpu", data=data).run(pixels) == answers(integers, pixels)).all()


def test_a_graph_without_its_weights_is_no_model() -> None:
    before, pixels = rounded_graph(), images()
    one, _, _ = share(before, int8(before, pixels))
    with pytest.raises(BrokenVersion):
        Model(one, "cpu")


def test_graphs_of_other_weights_share_nothing() -> None:
    before, pixels = clean(exported()), images()
    with pytest.raises(ConvoyError, match="none of the float32 graph's weights"):
        share(before, int8(before, pixels))


def test_each_output_has_its_own_grid() -> None:
    kernel = np.random.default_rng(0).normal(0, [[[[1, 100, 0]]]], (3, 3, 4, 3))
    made = rounded(kernel)
    steps = np.abs(kernel).max(axis=(0, 1, 2)) / 64
    assert (made[..., 2] == 0).all()
    for output in range(2):
        numbers = made[..., output] / steps[output]
        assert np.abs(numbers - numbers.round()).max() < 1e-4
        assert np.abs(made - kernel)[..., output].max() <= steps[output] / 2 * 1.001
    assert len(np.unique(rounded(kernel, depthwise=True)[..., 0, 0])) == 9


@pytest.mark.parametrize("loudness", [1e6, float("nan")])
def test_weights_beyond_halves_are_told_and_not_cut(loudness: float) -> None:
    with pytest.raises(ConvoyError, match=r"constant_\d+ holds .*, and float16 ends at 65504: "):
        fp16(exported(loudness=loudness))


def test_the_shipped_digits_are_as_accurate_in_every_precision() -> None:
    digits = datasets.load(TrainingSettings())
    shipped = bundles.read(REPOSITORY / "models" / "digits" / "1").onnx
    was = score(Model(shipped, device="cpu").run, digits.test)
    assert was.accuracy > 0.98
    cleaned = clean(shipped)
    graphs = [
        cleaned,
        int8(cleaned, digits.train.inputs[:256]),
        fp16(cleaned),
    ]
    for made in graphs:
        now = score(Model(made, device="cpu").run, digits.test)
        assert abs(now.accuracy - was.accuracy) <= 0.005
