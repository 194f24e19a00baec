"""ONNX in, ONNX out: a graph made lean, and the same in int8 and in float16. Needs no TensorFlow."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import add_pre_process_metadata
from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import DATA
from convoy_service.errors import ConvoyError

Constants = dict[str, npt.NDArray[Any]]

_CALIBRATION_BATCH = 32
# So many neighbours in a row are computed as channels of one place: ONNX Runtime's integer
# convolutions take channels in fours, and one or three cost nearly what many do.
_BLOCK = 4
# Of what an int8 graph's weights are: 7 bits and a sign, see `int8`.
_LARGEST_WEIGHT = 64
# Of weights in a file of their own, in bytes.
_ALIGNMENT = 64
_LARGEST_HALF = float(np.finfo(np.float16).max)


def clean(data: bytes) -> bytes:
    """The same graph with less to do: the same names, the same answers up to rounding.

    What changes the order of axes is done to bytes, ahead of the cast to floats. The scale of pixels
    goes into the weights of the first convolution, what logits are multiplied with (a temperature's
    inverse) into those of the last layer. Max pooling goes behind what keeps the order of values (a
    normalisation of positive scale, ReLU), which the convolution then takes up. ONNX Runtime's basic
    passes, whose results are plain ONNX, do the rest: normalisations and biases into convolutions,
    MatMul and Add to Gemm, constants, what does nothing.

    Raises ConvoyError where ONNX Runtime does not take the graph.
    """
    model = _optimised(onnx.load_model_from_string(data))
    _pixels_first(model)
    _pools_last(model.graph)
    _scale_last(model.graph)
    return bytes(_optimised(model).SerializeToString())


def int8(data: bytes, calibration: Pixels) -> bytes:
    """The graph in integers, from the pixels as they are to the logits, which are floats.

    By ONNX Runtime's static quantisation in plain ONNX: QuantizeLinear and DequantizeLinear around
    each operation, of which ONNX Runtime makes operations on integers. `calibration`: training images
    uint8 `[N, H, W, C]`; the smallest and largest value that they lead to bound what is represented.

    Activations are unsigned and weights signed, which is what ONNX Runtime has fast kernels for on
    x86; each output channel has a scale of its own. Weights have 7 bits: processors without VNNI add
    products in pairs, in 16 bits, where 8 bits would overflow and give other answers.

    Raises ConvoyError where it can't be quantised.
    """
    model = onnx.load_model_from_string(clean(data))
    weighty = [node for node in model.graph.node if node.op_type in {"Conv", "Gemm", "MatMul"}]
    if not weighty:
        raise ConvoyError("the graph has neither convolutions nor fully connected layers")
    last = weighty[-1].output[0]
    entry = _take_bytes(model)
    try:
        model = _quantised(model, calibration, entry, last)
    # ONNX Runtime's quantisation raises anything.
    except Exception as error:
        raise ConvoyError(f"the graph can't be quantised: {error}") from error
    if entry:
        _drop_floats(model.graph, entry)
    if weighty[-1].op_type != "Conv":
        _drop_pair(model.graph, last)
    _tidy(model)
    return bytes(model.SerializeToString())


def fp16(data: bytes) -> bytes:
    """The graph in half precision, for cards: uint8 in and float32 out as before.

    The softmax stays in float32, with the scaling of logits before it, and so does what makes floats
    of pixels where halves would round it. Raises ConvoyError where a weight is beyond half precision.
    Whether what is computed from them is shows with images alone.
    """
    model = onnx.load_model_from_string(data)
    _name_nodes(model.graph)
    _check_range(model.graph)
    head = _head(model)
    exact = head and (head.scale == 1).all() and (head.shift == head.shift.round()).all()
    apart = [node.name for node in head.nodes] if head and not exact else []
    kinds = [node.op_type for node in model.graph.node]
    if "LogSoftmax" in kinds:
        apart += [node.name for node in model.graph.node[kinds.index("LogSoftmax") :]]
    made = convert_float_to_float16(
        model,
        keep_io_types=True,
        op_block_list=[*DEFAULT_OP_BLOCK_LIST, "Softmax"],
        node_block_list=apart,
    )
    _drop_halving(made.graph)
    _tidy(made)
    return bytes(made.SerializeToString())


def rounded(kernel: npt.NDArray[Any], depthwise: bool = False) -> npt.NDArray[np.float32]:
    """A kernel of Keras, `[..., in, out]`, on the grid that `int8` has for it: 129 values for each
    output channel (`depthwise`: of each input channel), evenly from its largest weight's opposite to
    that weight. A normalisation that goes into the kernel stretches the grid with it.
    """
    weights = np.asarray(kernel, np.float64)
    axes = tuple(range(weights.ndim - (2 if depthwise else 1)))
    step = np.abs(weights).max(axis=axes, keepdims=True) / _LARGEST_WEIGHT
    return np.asarray(np.rint(weights / np.where(step, step, 1)) * step, np.float32)


def share(data: bytes, integers: bytes) -> tuple[bytes, bytes, bytes]:
    """The float32 graph, the int8 graph made of it, and the file `bundle.DATA` that holds the weights
    of both, once, as integers; where they are those of a network that is `rounded`. They become
    float32 when the first is loaded, and all is computed in that, to the same answers.

    Raises ConvoyError where they have no weights in common.
    """
    graph, other = onnx.load_model_from_string(data), onnx.load_model_from_string(integers)
    constants = _constants(other.graph)
    together, apart = bytearray(), list[tuple[TensorProto, int]]()
    backs = {n.input[0]: n for n in other.graph.node if n.op_type == "DequantizeLinear"}
    floats = [t for t in graph.graph.initializer if t.data_type == TensorProto.FLOAT]
    for whole in other.graph.initializer:
        back = backs.get(whole.name)
        if not back or whole.data_type != TensorProto.INT8 or len(whole.dims) < 2:
            continue
        numbers, scale = numpy_helper.to_array(whole), constants[back.input[1]]
        if scale.size > 1:
            axis = _attributes(back).get("axis", 1) % numbers.ndim
            scale = np.expand_dims(scale, [n for n in range(numbers.ndim) if n != axis])
        for tensor in [tensor for tensor in floats if list(tensor.dims) == list(whole.dims)]:
            off = np.abs(numpy_helper.to_array(tensor) - numbers * scale).max(initial=0)
            if off < scale.min() / 100:
                _make_of(graph.graph, tensor, numbers, scale)
                apart += [(tensor, len(together)), (whole, len(together))]
                together += numbers.tobytes() + bytes(-numbers.nbytes % _ALIGNMENT)
                floats.remove(tensor)
                break
    for tensor, offset in apart:
        length = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": DATA, "offset": offset, "length": length}.items():
            tensor.external_data.add(key=key, value=str(value))
    if not together:
        raise ConvoyError(
            "the int8 graph has none of the float32 graph's weights: store them in float32"
        )
    return bytes(graph.SerializeToString()), bytes(other.SerializeToString()), bytes(together)


def _make_of(
    graph: GraphProto,
    tensor: TensorProto,
    numbers: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
) -> None:
    """Has a weight be made of integers when the graph is loaded."""
    name = tensor.name
    whole = _free_name(graph, f"{name}_int8")
    tensor.CopyFrom(numpy_helper.from_array(numbers, whole))
    steps, numbered = _add(graph, f"{name}_step", scale), _free_name(graph, f"{name}_steps")
    graph.node.insert(0, helper.make_node("Cast", [whole], [numbered], whole, to=TensorProto.FLOAT))
    graph.node.insert(1, helper.make_node("Mul", [numbered, steps], [name], numbered))


def _optimised(model: ModelProto) -> ModelProto:
    """What ONNX Runtime's basic passes leave of it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        options.optimized_model_filepath = str(file)
        try:
            _tidy(model)
            graph = model.SerializeToString()
            ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        # ONNX Runtime raises classes of its own that share no base but Exception.
        except Exception as error:
            raise ConvoyError(f"ONNX Runtime can't load the graph: {error}") from error
        made = onnx.load(file)
    # It lists every domain that it knows.
    used = {node.domain for node in made.graph.node}
    for entry in [entry for entry in made.opset_import if entry.domain not in used]:
        made.opset_import.remove(entry)
    for value in (*made.graph.input, *made.graph.output):
        batch = value.type.tensor_type.shape.dim[0]
        if not batch.dim_value:
            batch.dim_param = "N"
    return made


class _Head(NamedTuple):
    """How a graph begins: `nodes`, from the first on, make of the bytes in `source`, `[N, H, W, C]`,
    what the first convolution takes: `[N, C, H, W]`, each channel as x * scale + shift.
    """

    source: str
    shape: tuple[int, int, int]
    nodes: list[NodeProto]
    scale: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]
    convolution: NodeProto
    weights: npt.NDArray[np.float64]


def _head(model: ModelProto) -> _Head | None:
    """None where it begins in another way."""
    graph = model.graph
    constants = _constants(graph)
    convolution = next((node for node in graph.node if node.op_type == "Conv"), None)
    if not convolution or convolution.input[1] not in constants:
        return None
    weights = constants[convolution.input[1]].astype(np.float64)
    channels = weights.shape[1]
    makers = {name: node for node in graph.node for name in node.output}
    value, nodes = convolution.input[0], list[NodeProto]()
    scale, shift = np.ones(channels), np.zeros(channels)
    axis, kind = 1, TensorProto.FLOAT
    # Upwards from the convolution.
    while (node := makers.get(value)) and _only_user(graph, value):
        data = [name for name in node.input if name not in constants]
        if not data:
            break
        other = next((constants[name] for name in node.input if name in constants), None)
        factor = _per_channel(other, channels, axis)
        match node.op_type:
            case "Mul" if factor is not None:
                scale = scale * factor
            case "Div" if factor is not None and node.input[0] in data:
                scale = scale / factor
            case "Add" if factor is not None:
                shift = shift + scale * factor
            case "Sub" if factor is not None and node.input[0] in data:
                shift = shift - scale * factor
            case "Cast" if kind == TensorProto.FLOAT:
                kind = TensorProto.UINT8
            case "Transpose" if axis == 1 and _attributes(node)["perm"] == [0, 3, 1, 2]:
                axis = 3
            # With one channel both orders are the same.
            case "Reshape" if axis == 1 and channels == 1 and other is not None and len(other) == 4:
                axis = 3
            case _:
                break
        nodes.insert(0, node)
        value = data[0]
    shape = _bytes_shape(model, value)
    if kind == TensorProto.FLOAT or axis == 1 or len(shape) != 4 or shape[3] != channels:
        return None
    return _Head(value, (shape[1], shape[2], channels), nodes, scale, shift, convolution, weights)


def _begin(
    graph: GraphProto, head: _Head, layout: list[NodeProto], mean: npt.NDArray[np.float64]
) -> tuple[str, str]:
    """Begins anew: `layout`, bytes in and out, then floats less the mean. Gives the names of both."""
    for node in head.nodes:
        graph.node.remove(node)
    steps = [*layout, helper.make_node("Cast", [""], ["floats"], to=TensorProto.FLOAT)]
    if mean.any():
        constant = mean[0] if (mean == mean[0]).all() else mean.reshape(-1, 1, 1)
        name = _add(graph, "mean", np.asarray(constant, np.float32))
        steps.append(helper.make_node("Sub", ["", name], ["centred"]))
    values = [head.source]
    for step in steps:
        step.input[0] = values[-1]
        step.name = step.output[0] = _free_name(graph, step.output[0])
        graph.node.append(step)
        values.append(step.output[0])
    head.convolution.input[0] = values[-1]
    return values[len(layout)], values[-1]


def _channels_first(graph: GraphProto, head: _Head) -> list[NodeProto]:
    height, width, channels = head.shape
    if channels > 1:
        return [helper.make_node("Transpose", [""], ["channels_first"], perm=[0, 3, 1, 2])]
    # Which moves nothing.
    shape = _add(graph, "shape", np.array([-1, 1, height, width]))
    return [helper.make_node("Reshape", ["", shape], ["channels_first"])]


def _pixels_first(model: ModelProto) -> None:
    """Axes in order while they are bytes, floats, less the mean; the scale goes into the weights."""
    graph, head = model.graph, _head(model)
    if not head or not head.scale.all():
        return
    # The mean stays: a convolution's padding is 0 behind it, which a scale does not change.
    mean = -head.shift / head.scale
    # A whole number that float32 did not quite keep.
    mean = np.where(np.abs(mean - mean.round()) < 1e-4, mean.round(), mean)
    kinds = [node.op_type for node in head.nodes]
    if kinds[1:] == ["Cast", "Sub"][: len(kinds) - 1] and (head.scale == 1).all():
        return
    _weigh(graph, head.convolution, head.weights * head.scale.reshape(-1, 1, 1))
    _begin(graph, head, _channels_first(graph, head), mean)


def _pools_last(graph: GraphProto) -> None:
    """Convolution, pooling, what keeps the order of values -> convolution, that, pooling. The same to
    the last bit: the largest stays the largest.
    """
    constants = _constants(graph)
    convolved = {node.output[0] for node in graph.node if node.op_type == "Conv"}
    for pool in [node for node in graph.node if node.op_type == "MaxPool"]:
        source, between = pool.input[0], pool.output[0]
        if source not in convolved or len(pool.output) > 1 or not _only_user(graph, source):
            continue
        moved: list[NodeProto] = []
        value = between
        while (user := _only_user(graph, value)) and _keeps_order(user, value, constants):
            moved.append(user)
            value = user.output[0]
        if moved:
            moved[0].input[list(moved[0].input).index(between)] = source
            moved[-1].output[0], pool.input[0], pool.output[0] = between, between, value


def _keeps_order(node: NodeProto, value: str, constants: Constants) -> bool:
    """Whether what it gives rises with what it takes, in each channel by itself."""
    if node.op_type in {"Relu", "Clip"}:
        return node.input[0] == value
    if node.op_type == "BatchNormalization":
        scale = constants.get(node.input[1])
        return len(node.output) == 1 and scale is not None and bool((scale > 0).all())
    other = constants.get(next((name for name in node.input if name != value), ""))
    if node.op_type not in {"Mul", "Add"} or other is None:
        return False
    everywhere = other.size == 1 or (other.ndim >= 3 and other.shape[-2:] == (1, 1))
    return everywhere and (node.op_type == "Add" or bool((other > 0).all()))


def _scale_last(graph: GraphProto) -> None:
    """Fully connected, times one number -> fully connected with other weights."""
    constants = _constants(graph)
    makers = {name: node for node in graph.node for name in node.output}
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        for source, by in (node.input, reversed(node.input)):
            layer, factor = makers.get(source), constants.get(by)
            if (
                not layer
                or layer.op_type != "Gemm"
                or not _only_user(graph, source)
                or factor is None
                or factor.size != 1
                or any(name not in constants for name in layer.input[1:])
            ):
                continue
            for place, name in enumerate(layer.input[1:], 1):
                layer.input[place] = _add(graph, "weights", constants[name] * factor.item())
            layer.output[0] = node.output[0]
            graph.node.remove(node)
            break


class _Entry(NamedTuple):
    """Values of a graph: where pixels, their axes in order, are `bytes` still, and where they are
    `floats` less `zero`.
    """

    bytes: str
    floats: str
    zero: int


def _take_bytes(model: ModelProto) -> _Entry | None:
    """Has the first convolution take pixels less a whole number, so that the pixels themselves are its
    quantised input. None where the graph does not begin with a mean between black and white.
    """
    graph, head = model.graph, _head(model)
    if not head or (head.scale != 1).any():
        return None
    zero = round(float(-head.shift.mean()))
    if not 0 <= zero <= 255:
        return None
    convolution, constants = head.convolution, _constants(graph)
    # What the whole number is off is in the bias; but not where the convolution sees its padding.
    bias = np.zeros(len(head.weights))
    if len(convolution.input) > 2:
        bias = constants[convolution.input[2]].astype(np.float64)
    bias = bias + head.weights.sum(axis=(2, 3)) @ (zero + head.shift)
    weights, layout = head.weights, _channels_first(graph, head)
    if in_blocks := _in_blocks(graph, head):
        weights, layout = in_blocks
        bias = np.tile(bias, len(weights) // len(bias))
    _weigh(graph, convolution, weights, bias)
    return _Entry(*_begin(graph, head, layout, np.full(head.shape[2], zero, np.float64)), zero)


def _in_blocks(
    graph: GraphProto, head: _Head
) -> tuple[npt.NDArray[np.float64], list[NodeProto]] | None:
    """Has the first convolution take neighbours in a row as channels of one place, `[N, H, W/4, 4C]`,
    and give theirs likewise: the same sums, though some products are with 0. In memory that is how
    they lie anyway, so ONNX Runtime moves nothing.

    Its weights then, and what leads to it; None where that does not come out even.
    """
    said = _attributes(head.convolution)
    height, width, channels = head.shape
    outputs, _, rows, columns = head.weights.shape
    top, left, bottom, right = said.get("pads", (0,) * 4)
    down, across = said.get("strides", (1, 1))
    if (
        said.get("auto_pad", b"NOTSET") != b"NOTSET"
        or any(step != 1 for step in said.get("dilations", ()))
        or not channels % _BLOCK
        or width % _BLOCK
        or _BLOCK % across
        or (width + left + right - columns) // across + 1 != width // across
    ):
        return None
    # A block of outputs sees these blocks of pixels, counted from its own.
    together = _BLOCK // across
    first, last = -left // _BLOCK, (across * (together - 1) + columns - 1 - left) // _BLOCK
    weights = np.zeros((together, outputs, _BLOCK, channels, rows, last - first + 1))
    for output in range(together):
        for column in range(columns):
            block, place = divmod(across * output + column - left, _BLOCK)
            weights[output, :, place, :, :, block - first] = head.weights[..., column]
    kept = [
        a for a in head.convolution.attribute if a.name not in {"pads", "strides", "kernel_shape"}
    ]
    del head.convolution.attribute[:]
    head.convolution.attribute.extend(
        [
            *kept,
            helper.make_attribute("pads", [top, -first, bottom, last]),
            helper.make_attribute("strides", [down, 1]),
        ]
    )
    # Behind the activation, so that it still is next to the convolution.
    end = head.convolution
    while (user := _only_user(graph, end.output[0])) and user.op_type in {"Relu", "Clip"}:
        end = user
    given, end.output[0] = end.output[0], _free_name(graph, "in_blocks")
    height_given = (height + top + bottom - rows) // down + 1
    shape = _add(graph, "shape", np.array([-1, height_given, width // across, outputs]))
    apart, whole = _free_name(graph, "blocks_last"), _free_name(graph, "channels_last")
    graph.node.extend(
        [
            helper.make_node("Transpose", [end.output[0]], [apart], apart, perm=[0, 2, 3, 1]),
            helper.make_node("Reshape", [apart, shape], [whole], whole),
            helper.make_node("Transpose", [whole], [given], f"{whole}_back", perm=[0, 3, 1, 2]),
        ]
    )
    shape = _add(graph, "shape", np.array([-1, height, width // _BLOCK, _BLOCK * channels]))
    layout = [
        helper.make_node("Reshape", ["", shape], ["blocks"]),
        helper.make_node("Transpose", [""], ["channels_first"], perm=[0, 3, 1, 2]),
    ]
    merged = (together * outputs, _BLOCK * channels, rows, last - first + 1)
    return weights.reshape(merged), layout


class _Images(CalibrationDataReader):  # type: ignore[misc]  # ships no types
    def __init__(self, source: str, images: Pixels) -> None:
        starts = range(0, len(images), _CALIBRATION_BATCH)
        self._batches = ({source: images[n : n + _CALIBRATION_BATCH]} for n in starts)

    def get_next(self) -> dict[str, Pixels] | None:
        return next(self._batches, None)


def _quantised(
    model: ModelProto, calibration: Pixels, entry: _Entry | None, last: str
) -> ModelProto:
    """`model` with pairs of QuantizeLinear and DequantizeLinear; what comes before `entry` and behind
    `last` stays as it is.
    """
    _tidy(model)
    _name_nodes(model.graph)
    names = [node.name for node in model.graph.node]
    places = {value: n for n, node in enumerate(model.graph.node) for value in node.output}
    apart = names[places[last] + 1 :]
    overrides: dict[str, Any] = {}
    if entry:
        apart += names[: places[entry.floats] + 1]
        overrides[entry.floats] = [
            {
                "quant_type": QuantType.QUInt8,
                "scale": np.array(1, np.float32),
                "zero_point": np.array(entry.zero, np.uint8),
            }
        ]
    # Or it says on the log that this would be well done first, which `clean` did.
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        source, sink = Path(folder) / "floats.onnx", Path(folder) / "integers.onnx"
        onnx.save(model, source)
        quantize_static(
            source,
            sink,
            _Images(model.graph.input[0].name, calibration),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            op_types_to_quantize=sorted({*QDQRegistry, *QLinearOpsRegistry}),
            nodes_to_exclude=apart,
            extra_options={"TensorQuantOverrides": overrides},
        )
        made = onnx.load(sink)
    del made.metadata_props[:]
    return made


def _drop_floats(graph: GraphProto, entry: _Entry) -> None:
    """Bytes, floats less the mean, bytes -> bytes: the numbers are the same."""
    makers = {name: node for node in graph.node for name in node.output}
    (quantise,) = (node for node in graph.node if entry.floats in node.input)
    for node in graph.node:
        if node.input and node.input[0] == quantise.output[0]:
            node.input[0] = entry.bytes
    graph.node.remove(quantise)
    value = entry.floats
    while value != entry.bytes:
        graph.node.remove(makers[value])
        value = makers[value].input[0]


def _drop_pair(graph: GraphProto, value: str) -> None:
    """Leaves `value` as it is, where it was quantised and brought back."""
    for quantise in [
        n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] == value
    ]:
        back = _only_user(graph, quantise.output[0])
        if not back:
            continue
        for node in graph.node:
            for place, name in enumerate(node.input):
                if name == back.output[0]:
                    node.input[place] = value
        graph.node.remove(quantise)
        graph.node.remove(back)


def _drop_halving(graph: GraphProto) -> None:
    """float32 -> float16 -> float32, as between a softmax and the output, is rounding for nothing."""
    makers = {name: node for node in graph.node for name in node.output}
    for up in [node for node in graph.node if node.op_type == "Cast"]:
        down = makers.get(up.input[0])
        if (
            _attributes(up)["to"] == TensorProto.FLOAT
            and down
            and down.op_type == "Cast"
            and _attributes(down)["to"] == TensorProto.FLOAT16
            and _only_user(graph, down.output[0])
        ):
            makers[down.input[0]].output[0] = up.output[0]
            graph.node.remove(down)
            graph.node.remove(up)


def _check_range(graph: GraphProto) -> None:
    """Raises ConvoyError where a constant is beyond half precision."""
    for name, values in _constants(graph).items():
        if values.dtype != np.float32 or not values.size:
            continue
        largest = float(np.abs(values).max())
        # Not `largest > ...`: that is False for NaN.
        if not largest <= _LARGEST_HALF:
            raise ConvoyError(
                f"{name} holds {largest:.3g}, and float16 ends at {_LARGEST_HALF:.0f}: "
                "leave float16 out"
            )


def _weigh(
    graph: GraphProto,
    node: NodeProto,
    weights: npt.NDArray[np.float64],
    bias: npt.NDArray[np.float64] | None = None,
) -> None:
    """Gives a convolution other weights, and another bias where there is one."""
    node.input[1] = _add(graph, "weights", weights.astype(np.float32))
    if bias is not None:
        del node.input[2:]
        node.input.append(_add(graph, "bias", bias.astype(np.float32)))


def _per_channel(
    constant: npt.NDArray[Any] | None, channels: int, axis: int
) -> npt.NDArray[np.float64] | None:
    """A constant that meets `[N, ...]` of four axes, as one number a channel; None where it is none."""
    if constant is None or constant.ndim > 4 or constant.dtype != np.float32:
        return None
    full = constant.reshape((1,) * (4 - constant.ndim) + constant.shape)
    if full.size != 1 and (full.size != channels or full.shape[axis] != channels):
        return None
    return np.resize(full.astype(np.float64), channels)


def _constants(graph: GraphProto) -> Constants:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _only_user(graph: GraphProto, value: str) -> NodeProto | None:
    """The node that takes `value`, where nothing else does."""
    users = [node for node in graph.node if value in node.input]
    given = any(output.name == value for output in graph.output)
    return users[0] if len(users) == 1 and not given else None


def _bytes_shape(model: ModelProto, value: str) -> list[int]:
    """The shape of a uint8 value, 0 for a free axis; empty where it is none."""
    known = onnx.shape_inference.infer_shapes(model).graph
    for info in (*known.input, *known.value_info):
        tensor = info.type.tensor_type
        if info.name == value and tensor.elem_type == TensorProto.UINT8:
            return [axis.dim_value for axis in tensor.shape.dim]
    return []


def _add(graph: GraphProto, name: str, values: npt.NDArray[Any]) -> str:
    """Adds a constant, and gives the name that it got."""
    name = _free_name(graph, name)
    graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def _free_name(graph: GraphProto, wanted: str) -> str:
    taken = {value.name for value in graph.input} | set(_constants(graph))
    taken.update(name for node in graph.node for name in (node.name, *node.output))
    while wanted in taken:
        wanted += "_"
    return wanted


def _tidy(model: ModelProto) -> None:
    """Nodes in the order that they can be run in; no constants that none of them takes."""
    edited = ONNXModel(model)
    edited.clean_initializers()
    edited.topological_sort()
    del model.graph.value_info[:]


def _name_nodes(graph: GraphProto) -> None:
    """Gives each node a name of its own, by which it can be told to be left alone."""
    for number, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{number}"
