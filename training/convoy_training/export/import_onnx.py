"""A version from an ONNX file that was trained elsewhere. Needs the package onnx, not TensorFlow."""

import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Bundle, Golden, Manifest, Probabilities
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion, ConvoyError, InferenceFailed
from convoy_training.provenance import provenance
from convoy_training.settings import AddSettings

_PIXEL_TYPES = {TensorProto.UINT8, TensorProto.FLOAT, TensorProto.FLOAT16}
_GOLDEN = 4


def add(name: str, file: Path, settings: AddSettings) -> Bundle:
    """Publishes the ONNX classifier in `file` as the next version of model `name`.

    What turns uint8 `[N, H, W, C]` into what the file takes is built into the graph in front of it,
    under the file's own names of input and output. The golden answers are what it gives now, on
    pixels of noise, black and white; its scores are unknown. Raises ConvoyError.
    """
    bundles.check_name(name)
    model = _read(file)
    source, sink = _single_ends(model, file)
    batch, layout, target = _shape(source, settings, file)
    _lift(model, source, batch, layout, target, settings, file)
    _lower(model, sink)
    pixels = _probe_pixels(target)
    data, loaded, answers = _try(model, file, pixels)
    if settings.softmax:
        if _are_probabilities(answers):
            raise ConvoyError(f"{file} gives probabilities already: leave --softmax out")
        _append(model, sink, "Softmax", axis=1)
        data, loaded, answers = _try(model, file, pixels)
    elif not _are_probabilities(answers):
        raise ConvoyError(
            f"{file} gives no probabilities (a row adds up to {answers[0].sum():.3g}): "
            "if they are logits, add --softmax"
        )
    if answers.shape[1] < 2:
        raise ConvoyError(f"{file} has a single output: a classifier has one for each class")
    if np.ptp(answers, axis=0).max() < 1e-7:
        raise ConvoyError(
            f"{file} gives noise, black and white the same answer: check --scale, --mean and --std"
        )
    manifest = Manifest(
        input=loaded.input,
        output=loaded.output,
        pixels=target,
        labels=_labels(settings.labels, answers.shape[1]),
        max_batch_size=batch or settings.max_batch_size,
        fixed_batch=batch is not None,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        provenance={**provenance(), "file": file.name},
    )
    golden = Golden(pixels, answers)
    # What serving would refuse, such as answers that depend on the others in the batch, stays out.
    loaded.prove(Bundle(file, name, 0, manifest, data, golden))
    folder = settings.models / name
    with bundles.exclusive(folder):
        return bundles.write(folder, manifest, data, golden)


def _read(file: Path) -> onnx.ModelProto:
    try:
        return onnx.load(file)
    except FileNotFoundError as error:
        raise ConvoyError(f"{error.filename or file} is missing") from None
    # Protobuf, the checker and the external data reader each raise their own.
    except Exception as error:
        raise ConvoyError(f"{file} is no ONNX model: {error}") from error


def _single_ends(
    model: onnx.ModelProto, file: Path
) -> tuple[onnx.ValueInfoProto, onnx.ValueInfoProto]:
    # Old exporters list the weights among the inputs.
    weights = {weight.name for weight in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    outputs = list(model.graph.output)
    if len(inputs) != 1 or len(outputs) != 1:
        raise ConvoyError(
            f"{file} has {len(inputs)} inputs and {len(outputs)} outputs: an image classifier has one "
            "of each; export it without the others"
        )
    return inputs[0], outputs[0]


def _shape(
    source: onnx.ValueInfoProto, settings: AddSettings, file: Path
) -> tuple[int | None, Literal["nhwc", "nchw"], Target]:
    """The fixed batch size if there is one, the layout, and the size of images."""
    tensor = source.type.tensor_type
    dims = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None
        for d in tensor.shape.dim
    ]
    if tensor.elem_type not in _PIXEL_TYPES or len(dims) != 4:
        raise ConvoyError(
            f"{file}: input {source.name!r} is {TensorProto.DataType.Name(tensor.elem_type)} {dims}: "
            "expected uint8 or float pixels [N, H, W, C] or [N, C, H, W]"
        )
    layout = settings.layout
    if layout == "auto":
        last, second = dims[3] in (1, 3), dims[1] in (1, 3)
        if last == second:
            raise ConvoyError(f"{file}: input {dims} does not tell its layout: give --layout")
        layout = "nhwc" if last else "nchw"
    channels, height, width = (
        (dims[3], dims[1], dims[2]) if layout == "nhwc" else (dims[1], dims[2], dims[3])
    )
    height, width = height or settings.image_size, width or settings.image_size
    if not height or not width:
        raise ConvoyError(f"{file}: input {dims} leaves height or width open: give --image-size")
    if channels not in (1, 3):
        raise ConvoyError(f"{file}: {channels} channels as {layout}: expected 1 or 3; see --layout")
    return dims[0], layout, Target(height, width, channels, settings.resize)


def _lift(
    model: onnx.ModelProto,
    source: onnx.ValueInfoProto,
    batch: int | None,
    layout: str,
    target: Target,
    settings: AddSettings,
    file: Path,
) -> None:
    """Makes the graph take uint8 [N, H, W, C] under the name that its input has."""
    kind = source.type.tensor_type.elem_type
    normalised = bool(settings.scale or settings.mean or settings.std)
    if kind == TensorProto.UINT8 and normalised:
        raise ConvoyError(
            f"{file} takes uint8 pixels: --scale, --mean and --std are for float models"
        )
    if kind != TensorProto.UINT8 and not normalised:
        raise ConvoyError(
            f"{file} takes floats: say how pixels become floats, such as --scale {1 / 255:.8f}, with "
            "--mean and --std if it was trained with them (for pixels as they are, --scale 1)"
        )
    graph, name = model.graph, source.name
    taken = _names(graph)
    steps: list[tuple[str, dict[str, Any], np.ndarray | None]] = []
    if layout == "nchw":
        # On bytes, before the cast, it moves a quarter of the data.
        steps.append(("Transpose", {"perm": [0, 3, 1, 2]}, None))
    if kind != TensorProto.UINT8:
        # In float32 also for a float16 model: 255 squared is beyond half precision.
        steps.append(("Cast", {"to": TensorProto.FLOAT}, None))
        scale = settings.scale or (1 / 255,)
        mean, std = settings.mean or (0.0,), settings.std or (1.0,)
        factor = [_channels(v, target.channels, what) for v, what in
                  ((scale, "--scale"), (mean, "--mean"), (std, "--std"))]  # fmt: skip
        if not factor[2].all():
            raise ConvoyError("--std has a 0: pixels are divided by it")
        along = (-1, 1, 1) if layout == "nchw" else (-1,)
        steps.append(("Mul", {}, (factor[0] / factor[2]).reshape(along)))
        if settings.mean:
            steps.append(("Sub", {}, (factor[1] / factor[2]).reshape(along)))
        if kind == TensorProto.FLOAT16:
            steps.append(("Cast", {"to": TensorProto.FLOAT16}, None))
    if steps:
        inner = _free_name(f"{name}_prepared", taken)
        for node in graph.node:
            for position, value in enumerate(node.input):
                if value == name:
                    node.input[position] = inner
        nodes, current = [], name
        for number, (op, attributes, constant) in enumerate(steps):
            last = number == len(steps) - 1
            result = inner if last else _free_name(f"{name}_{number}_{op}", taken)
            inputs = [current]
            if constant is not None:
                # No initializer: up to IR version 3 these must be among the inputs.
                inputs.append(_free_name(f"{name}_{number}_constant", taken))
                tensor = numpy_helper.from_array(constant.astype(np.float32))
                nodes.append(helper.make_node("Constant", [], inputs[1:], value=tensor))
            nodes.append(helper.make_node(op, inputs, [result], **attributes))
            current = result
        old = list(graph.node)
        del graph.node[:]
        graph.node.extend([*nodes, *old])
    shape = [batch or "N", target.height, target.width, target.channels]
    source.CopyFrom(helper.make_tensor_value_info(name, TensorProto.UINT8, shape))


def _channels(values: tuple[float, ...], channels: int, flag: str) -> np.ndarray:
    if len(values) not in (1, channels):
        raise ConvoyError(f"{flag}: {len(values)} numbers for {channels} channels")
    return np.resize(np.array(values, np.float64), channels)


def _names(graph: onnx.GraphProto) -> set[str]:
    names = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    return names | {output for node in graph.node for output in node.output}


def _free_name(wanted: str, taken: set[str]) -> str:
    while wanted in taken:
        wanted += "_"
    taken.add(wanted)
    return wanted


def _lower(model: onnx.ModelProto, sink: onnx.ValueInfoProto) -> None:
    """Makes the graph give float32 under the name that its output has."""
    if sink.type.tensor_type.elem_type != TensorProto.FLOAT:
        _append(model, sink, "Cast", to=TensorProto.FLOAT)
        sink.type.tensor_type.elem_type = TensorProto.FLOAT


def _append(model: onnx.ModelProto, sink: onnx.ValueInfoProto, op: str, **attributes: Any) -> None:
    """Puts one more operation behind the graph, under the name that its output has."""
    graph = model.graph
    inner = _free_name(f"{sink.name}_before_{op}", _names(graph))
    for node in graph.node:
        for values in (node.input, node.output):
            for position, value in enumerate(values):
                if value == sink.name:
                    values[position] = inner
    graph.node.append(helper.make_node(op, [inner], [sink.name], **attributes))


def _try(model: onnx.ModelProto, file: Path, pixels: Pixels) -> tuple[bytes, Model, Probabilities]:
    """The graph's bytes, loaded, and its answers to `pixels`."""
    data = _check(model, file)
    loaded = _load(data, file)
    try:
        answers = loaded.run(pixels)
    except InferenceFailed as error:
        raise ConvoyError(f"{file}: a first run failed: {error}") from error
    if not np.isfinite(answers).all():
        raise ConvoyError(f"{file} gives NaN or infinity: check --scale, --mean and --std")
    return data, loaded, answers


def _are_probabilities(answers: Probabilities) -> bool:
    return bool((answers >= 0).all() and np.allclose(answers.sum(axis=1), 1, atol=1e-2))


def _check(model: onnx.ModelProto, file: Path) -> bytes:
    try:
        onnx.checker.check_model(model)
        return bytes(model.SerializeToString())
    except Exception as error:
        raise ConvoyError(f"{file}: {error}") from error


def _load(data: bytes, file: Path) -> Model:
    try:
        return Model(data, device="cpu")
    except BrokenVersion as error:
        raise ConvoyError(f"{file}: {error}") from error


def _probe_pixels(target: Target) -> Pixels:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (_GOLDEN, *target.shape), np.uint8)
    pixels[0], pixels[1] = 0, 255
    return pixels


def _labels(file: Path | None, classes: int) -> list[str]:
    if file is None:
        return [f"class {number}" for number in range(classes)]
    try:
        labels = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConvoyError(f"{file}: {error}") from error
    while labels and not labels[-1].strip():
        labels.pop()
    if len(labels) != classes:
        raise ConvoyError(f"{file} has {len(labels)} labels, the model {classes} classes")
    if not all(label.strip() for label in labels):
        raise ConvoyError(f"{file} has an empty line between its labels")
    return [label.strip() for label in labels]
