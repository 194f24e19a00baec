"""Small ONNX graphs, made by hand, whose answers numpy can work out."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Floats = npt.NDArray[np.float64]


def weights(shape: Sequence[int], classes: int = 3, spread: float = 0.02) -> Floats:
    """What `classifier` multiplies with; different at every position, so that their order shows."""
    scale = spread / np.sqrt(np.prod(shape))
    return np.random.default_rng(0).normal(0, scale, (int(np.prod(shape)), classes))


def logits(inputs: npt.NDArray[np.generic], classes: int = 3, spread: float = 0.02) -> Floats:
    """What `classifier` without softmax answers to `inputs` as it takes them, in any layout."""
    flat = inputs.reshape(len(inputs), -1).astype(np.float64)
    answers: Floats = flat @ weights(inputs.shape[1:], classes, spread)
    return answers


def softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def classifier(
    shape: Sequence[int | str] = (4, 5, 3),
    *,
    kind: int = TensorProto.UINT8,
    batch: int | str | None = "N",
    classes: int = 3,
    spread: float = 0.02,
    with_softmax: bool = True,
    added: float = 0.0,
    opset: int = 17,
    ir_version: int = 8,
    listed_weights: bool = False,
    names: tuple[str, str] = ("pixels", "probabilities"),
    size: Sequence[int] | None = None,
) -> bytes:
    """Flatten, fully connected, softmax; `added` to every answer. `spread` is that of the weights.

    `size` stands in for a `shape` that is left open; `listed_weights` are among the inputs, too, as
    old exporters have them.
    """
    floats = TensorProto.FLOAT16 if kind == TensorProto.FLOAT16 else TensorProto.FLOAT
    source, sink = names
    constants = {"weights": weights(size or [int(n) for n in shape], classes, spread)}
    nodes, last = [], source
    if kind == TensorProto.UINT8:
        nodes.append(helper.make_node("Cast", [last], ["floats"], to=floats))
        last = "floats"
    nodes.append(helper.make_node("Flatten", [last], ["flat"], axis=1))
    nodes.append(helper.make_node("MatMul", ["flat", "weights"], ["logits"]))
    last = "logits"
    if with_softmax:
        nodes.append(helper.make_node("Softmax", [last], ["shares"], axis=1))
        last = "shares"
    constants["added"] = np.array(added)
    nodes.append(helper.make_node("Add", [last, "added"], [sink]))
    precision = np.float16 if floats == TensorProto.FLOAT16 else np.float32
    stored = {name: value.astype(precision) for name, value in constants.items()}
    inputs = [value(source, kind, [batch, *shape])]
    if listed_weights:
        inputs += [value(name, floats, array.shape) for name, array in stored.items()]
    outputs = [value(sink, floats, [batch, classes])]
    return graph(nodes, inputs, outputs, stored, opset=opset, ir_version=ir_version)


def value(name: str, kind: int, shape: Sequence[int | str | None]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, list(shape))


def graph(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    constants: Mapping[str, npt.NDArray[np.generic]] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
) -> bytes:
    """The file of a graph; the names in order, nothing checked."""
    stored = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    made = helper.make_model(
        helper.make_graph(nodes, "test", inputs, outputs, stored),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=ir_version,
    )
    return bytes(made.SerializeToString())
