"""Exports with a fault that training could make, each planted into an honest graph."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]


def swapped_labels(graph: bytes) -> bytes:
    """The first two outputs have changed places."""
    model = onnx.load_model_from_string(graph)
    order = np.arange(_classes(model))
    order[:2] = 1, 0
    _after(model, _sink(model), [("Gather", order, {"axis": 1})])
    return _saved(model)


def bgr(graph: bytes) -> bytes:
    """It takes blue for red, as where training decoded with another library."""
    model = onnx.load_model_from_string(graph)
    _behind(model, _source(model), [("Gather", np.array([2, 1, 0]), {"axis": 3})])
    return _saved(model)


def scaled(factor: float) -> Callable[[bytes], bytes]:
    """Pixels are multiplied with `factor` before the scaling that is right."""

    def plant(graph: bytes) -> bytes:
        model = onnx.load_model_from_string(graph)
        cast, *_ = [node for node in model.graph.node if node.op_type == "Cast"]
        _behind(model, cast.output[0], [("Mul", np.float32(factor), {})])
        return _saved(model)

    return plant


def fixed_batch(graph: bytes) -> bytes:
    """Declared for batches of 16."""
    model = onnx.load_model_from_string(graph)
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 16
    return _saved(model)


def batch_of_64_inside(graph: bytes) -> bytes:
    """Declared for batches of any size, and has one of 64 in the middle."""
    model = onnx.load_model_from_string(graph)
    shape = np.array([64, _classes(model)], np.int64)
    _after(model, _softmax(model).input[0], [("Reshape", shape, {})])
    return _saved(model)


def dead_class(graph: bytes) -> bytes:
    """The last class is never named."""
    model = onnx.load_model_from_string(graph)
    added = np.zeros(_classes(model), np.float32)
    added[-1] = -1000
    _after(model, _softmax(model).input[0], [("Add", added, {})])
    return _saved(model)


def nan_weight(graph: bytes) -> bytes:
    """One of all weights is no number."""
    model = onnx.load_model_from_string(graph)
    tensor = max(_weights(model), key=lambda tensor: int(np.prod(tensor.dims)))
    values = numpy_helper.to_array(tensor).copy()
    values.flat[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return _saved(model)


def truncated(graph: bytes) -> bytes:
    return graph[: len(graph) // 2]


def logits_for_probabilities(graph: bytes) -> bytes:
    """Without its softmax."""
    model = onnx.load_model_from_string(graph)
    softmax = _softmax(model)
    softmax.op_type = "Identity"
    del softmax.attribute[:]
    return _saved(model)


def half(graph: bytes) -> bytes:
    """The last layer's weights and what comes after in float16: honest, where they are in its range."""
    return _half(graph, 1.0)


def half_weights_overflow(graph: bytes) -> bytes:
    """The same, but the last layer's weights are too large for float16, and what follows makes up for
    that: in float32 the same answers.
    """
    return _half(graph, 1e6)


def half_activations_overflow(graph: bytes) -> bytes:
    """Weights are in the range of float16, what they add up to is not."""
    model = onnx.load_model_from_string(graph)
    _after(
        model,
        _softmax(model).input[0],
        [
            ("Cast", None, {"to": TensorProto.FLOAT16}),
            ("Mul", np.float16(6e4), {}),
            ("Mul", np.float16(1 / 6e4), {}),
            ("Cast", None, {"to": TensorProto.FLOAT}),
        ],
    )
    return _saved(model)


def _half(graph: bytes, factor: float) -> bytes:
    model = onnx.load_model_from_string(graph)
    tensors = {tensor.name: tensor for tensor in _weights(model)}
    *_, last = [node for node in model.graph.node if node.op_type in {"MatMul", "Gemm"}]
    sink = last.output[0]
    for name in last.input[1:]:
        tensor = tensors[name]
        with np.errstate(over="ignore"):
            values = (numpy_helper.to_array(tensor) * factor).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    _behind(model, last.input[0], [("Cast", None, {"to": TensorProto.FLOAT16})])
    back = np.float32(1 / factor)
    _after(model, sink, [("Cast", None, {"to": TensorProto.FLOAT}), ("Mul", back, {})])
    return _saved(model)


# Surgery.

# An operation, its constant second input if it has one, and its attributes.
Step = tuple[str, Array | np.generic | None, dict[str, Any]]


def _source(model: onnx.ModelProto) -> str:
    return str(model.graph.input[0].name)


def _sink(model: onnx.ModelProto) -> str:
    return str(model.graph.output[0].name)


def _classes(model: onnx.ModelProto) -> int:
    return int(model.graph.output[0].type.tensor_type.shape.dim[1].dim_value)


def _softmax(model: onnx.ModelProto) -> onnx.NodeProto:
    (softmax,) = [node for node in model.graph.node if node.op_type == "Softmax"]
    return softmax


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    return [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]


def _saved(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString())


def _chain(model: onnx.ModelProto, first: str, last: str, steps: Sequence[Step]) -> None:
    """Nodes that lead from the value `first` to the value `last`; put where they are in order."""
    nodes, current = [], first
    for number, (op, constant, attributes) in enumerate(steps):
        result = last if number == len(steps) - 1 else f"{first}/planted/{number}"
        inputs = [current]
        if constant is not None:
            inputs.append(f"{first}/planted/{number}/constant")
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(constant), inputs[1]))
        nodes.append(helper.make_node(op, inputs, [result], **attributes))
        current = result
    old = list(model.graph.node)
    makers = [place for place, node in enumerate(old) if first in node.output]
    place = makers[0] + 1 if makers else 0
    del model.graph.node[:]
    model.graph.node.extend([*old[:place], *nodes, *old[place:]])


def _behind(model: onnx.ModelProto, value: str, steps: Sequence[Step]) -> None:
    """Those who take `value` take what the steps make of it."""
    for node in model.graph.node:
        for position, name in enumerate(node.input):
            if name == value:
                node.input[position] = f"{value}/planted"
    _chain(model, value, f"{value}/planted", steps)


def _after(model: onnx.ModelProto, value: str, steps: Sequence[Step]) -> None:
    """What makes `value` makes another, of which the steps make `value`."""
    (maker,) = [node for node in model.graph.node if value in node.output]
    maker.output[list(maker.output).index(value)] = f"{value}/honest"
    _chain(model, f"{value}/honest", value, steps)
