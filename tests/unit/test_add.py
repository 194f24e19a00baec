"""Versions from ONNX files that were trained elsewhere: what they take is built in front of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Bundle, Probabilities
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import ConvoyError
from convoy_training.export.import_onnx import add
from convoy_training.settings import AddSettings
from tests.unit.graphs import Floats, classifier, graph, logits, softmax, value

U8, F16, F32, F64 = (
    TensorProto.UINT8,
    TensorProto.FLOAT16,
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
)
NHWC, NCHW = (4, 5, 3), (3, 4, 5)

Publish = Callable[..., Bundle]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Adds a graph as model `m` of a folder."""

    def publish(data: bytes, **settings: Any) -> Bundle:
        (tmp_path / "file.onnx").write_bytes(data)
        settings.setdefault("models", tmp_path / "models")
        return add("m", tmp_path / "file.onnx", AddSettings(**settings))

    return publish


def pixels(count: int = 9, shape: tuple[int, ...] = NHWC) -> Pixels:
    return np.random.default_rng(2).integers(0, 256, (count, *shape), np.uint8)


def served(bundle: Bundle, inputs: Pixels) -> Probabilities:
    """What the version answers after it was loaded and proved as for serving."""
    return Model.load(bundles.read(bundle.folder), "cpu", threads=1).run(inputs)


# What is built in.


def test_a_graph_that_takes_pixels_is_kept_as_it_is(publish: Publish) -> None:
    data = classifier(NHWC, names=("image:0", "output/softmax"))
    bundle = publish(data)
    assert np.allclose(served(bundle, pixels()), softmax(logits(pixels())), atol=1e-5)
    assert onnx.load_from_string(bundle.onnx).graph == onnx.load_from_string(data).graph
    manifest = bundle.manifest
    assert (manifest.input, manifest.output) == ("image:0", "output/softmax")
    assert (manifest.pixels, manifest.max_batch_size) == (Target(*NHWC), 64)
    assert manifest.labels == ["class 0", "class 1", "class 2"]
    assert (manifest.scores, manifest.parity) == (None, None)
    assert manifest.provenance["file"] == "file.onnx"


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_are_turned_in_front(channels: int, publish: Publish) -> None:
    bundle = publish(classifier((channels, 4, 5)), resize="crop", max_batch_size=7)
    assert bundle.manifest.pixels == Target(4, 5, channels, "crop")
    assert bundle.manifest.max_batch_size == 7
    inputs = pixels(shape=(4, 5, channels))
    expected = softmax(logits(inputs.transpose(0, 3, 1, 2)))
    assert np.allclose(served(bundle, inputs), expected, atol=1e-5)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

NORMALISATIONS: dict[str, tuple[dict[str, Any], Callable[[Floats], Floats]]] = {
    "a scale": ({"scale": (1 / 255,)}, lambda x: x / 255),
    "pixels as they are": ({"scale": (1.0,)}, lambda x: x),
    "a scale for each channel": ({"scale": (0.1, 0.02, 0.3)}, lambda x: x * (0.1, 0.02, 0.3)),
    "mean and deviation of pixels over 255": (
        {"mean": IMAGENET[0], "std": IMAGENET[1]},
        lambda x: (x / 255 - IMAGENET[0]) / IMAGENET[1],
    ),
    "mean alone": ({"mean": (0.5,)}, lambda x: x / 255 - 0.5),
    "deviation alone": ({"std": (0.5,)}, lambda x: x / 255 / 0.5),
    "from -1 to 1": ({"scale": (1 / 127.5,), "mean": (1.0,)}, lambda x: x / 127.5 - 1),
    "mean of pixels up to 255": (
        {"scale": (1.0,), "mean": (103.9, 116.8, 123.7)},
        lambda x: x - (103.9, 116.8, 123.7),
    ),
    "all three": (
        {"scale": (0.01,), "mean": (1, 2, 3), "std": (0.5, 2, 4)},
        lambda x: (x * 0.01 - (1, 2, 3)) / (0.5, 2, 4),
    ),
}


@pytest.mark.parametrize("kind", NORMALISATIONS)
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_pixels_become_the_floats_that_were_asked_for(
    kind: str, layout: str, publish: Publish
) -> None:
    settings, normalised = NORMALISATIONS[kind]
    inputs = normalised(pixels().astype(np.float64))
    if layout == "nchw":
        inputs = inputs.transpose(0, 3, 1, 2)
    spread = 2 / inputs.std()
    data = classifier(NHWC if layout == "nhwc" else NCHW, kind=F32, spread=spread)
    expected = softmax(logits(inputs, spread=spread))
    assert np.ptp(expected, axis=0).max() > 0.05, "answers that tell inputs apart"
    bundle = publish(data, **settings)
    assert (bundle.manifest.input, bundle.manifest.output) == ("pixels", "probabilities")
    assert bundle.manifest.pixels == Target(*NHWC)
    assert np.allclose(served(bundle, pixels()), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [U8, F32])
def test_a_softmax_may_be_built_in(kind: int, publish: Publish) -> None:
    settings = {} if kind == U8 else {"scale": (1.0,)}
    bundle = publish(classifier(kind=kind, with_softmax=False), softmax=True, **settings)
    assert np.allclose(served(bundle, pixels()), softmax(logits(pixels())), atol=1e-5)


@pytest.mark.parametrize("with_softmax", [True, False])
@pytest.mark.parametrize("shape", [NHWC, NCHW])
def test_half_precision_is_reached_by_way_of_floats(
    with_softmax: bool, shape: tuple[int, int, int], publish: Publish
) -> None:
    data = classifier(shape, kind=F16, with_softmax=with_softmax, spread=2)
    bundle = publish(data, mean=(0.5,), std=(0.25,), softmax=not with_softmax)
    inputs = (pixels() / 255 - 0.5) / 0.25
    expected = logits(inputs if shape == NHWC else inputs.transpose(0, 3, 1, 2), spread=2)
    answers = served(bundle, pixels())
    assert answers.dtype == np.float32
    assert np.allclose(answers, softmax(expected), atol=5e-3)


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("kind", [U8, F32])
def test_a_fixed_batch_is_the_largest(batch: int, kind: int, publish: Publish) -> None:
    settings = {} if kind == U8 else {"scale": (1.0,)}
    bundle = publish(classifier(kind=kind, batch=batch), **settings)
    assert (bundle.manifest.max_batch_size, bundle.manifest.fixed_batch) == (batch, True)
    assert np.allclose(served(bundle, pixels()), softmax(logits(pixels())), atol=1e-5)


@pytest.mark.parametrize("batch", [None, "batch_size", 0])
def test_an_open_batch_axis_may_have_any_name_or_none(
    batch: str | int | None, publish: Publish
) -> None:
    bundle = publish(classifier(kind=F32, batch=batch), scale=(1.0,))
    assert np.allclose(served(bundle, pixels()), softmax(logits(pixels())), atol=1e-5)


@pytest.mark.parametrize("opset", [7, 9, 12, 13, 21])
@pytest.mark.parametrize(
    ("ir_version", "listed_weights"), [(3, True), (8, True), (8, False)], ids=str
)
@pytest.mark.parametrize("kind", [U8, F32])
def test_old_and_new_files_are_taken(
    opset: int, ir_version: int, listed_weights: bool, kind: int, publish: Publish
) -> None:
    data = classifier(
        NCHW,
        kind=kind,
        opset=opset,
        ir_version=ir_version,
        listed_weights=listed_weights,
        with_softmax=False,
    )
    settings = {} if kind == U8 else {"scale": (0.5,), "mean": (1.0, 2.0, 3.0)}
    bundle = publish(data, softmax=True, **settings)
    inputs = pixels() if kind == U8 else pixels() * 0.5 - (1, 2, 3)
    expected = softmax(logits(inputs.transpose(0, 3, 1, 2)))
    assert np.allclose(served(bundle, pixels()), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        (("H", "W", 3), {"image_size": 6}),
        ((6, "W", 3), {"image_size": 6}),
        ((3, "H", "W"), {"image_size": 6}),
        ((6, 6, 3), {"image_size": 99}),
        ((3, 6, 3), {"layout": "nhwc"}),
        ((3, 6, 3), {"layout": "nchw"}),
    ],
)
def test_size_and_layout_are_told_where_the_file_leaves_them_open(
    shape: tuple[int | str, ...], settings: dict[str, Any], publish: Publish
) -> None:
    size = [n if isinstance(n, int) else 6 for n in shape]
    bundle = publish(classifier(shape, size=size), **settings)
    target = bundle.manifest.pixels
    channels_first = shape[2] != 3 or settings.get("layout") == "nchw"
    wanted = (size[1], size[2], size[0]) if channels_first else tuple(size)
    assert target.shape == wanted
    inputs = pixels(shape=target.shape)
    turned = inputs.transpose(0, 3, 1, 2) if channels_first else inputs
    assert np.allclose(served(bundle, inputs), softmax(logits(turned)), atol=1e-5)


def test_names_that_the_graph_uses_are_not_used_again(publish: Publish) -> None:
    """Here the names that its own steps would have are taken by weights, results and outputs."""
    names = ["x_prepared", "x_0_Cast", "x_1_Mul", "x_1_constant", "x_2_constant"]
    weights = {name: np.full((), number, np.float32) for number, name in enumerate(names, 1)}
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[1, 2], keepdims=0),
        *(
            helper.make_node("Mul", [last, name], [result])
            for last, name, result in zip(
                ["mean", "y_before_Softmax", *"abc"],
                names,
                ["y_before_Softmax", *"abc", "y"],
                strict=True,
            )
        ),
    ]
    data = graph(nodes, [value("x", F32, ["N", *NHWC])], [value("y", F32, ["N", 3])], weights)
    bundle = publish(data, scale=(1 / 25500,), mean=(0.001,), softmax=True)
    expected = softmax(120 * (pixels().mean(axis=(1, 2)) / 25500 - 0.001))
    assert np.allclose(served(bundle, pixels()), expected, atol=1e-5)


def test_the_input_may_be_used_more_than_once(publish: Publish) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "x"], ["squares"]),
        helper.make_node("Sub", ["squares", "x"], ["difference"]),
        helper.make_node("ReduceMean", ["difference"], ["y"], axes=[2, 3], keepdims=0),
    ]
    data = graph(nodes, [value("x", F32, ["N", *NCHW])], [value("y", F32, ["N", 3])])
    bundle = publish(data, scale=(1 / 255,), softmax=True)
    inputs = pixels() / 255
    expected = softmax((inputs * inputs - inputs).mean(axis=(1, 2)))
    assert np.allclose(served(bundle, pixels()), expected, atol=1e-5)


def test_weights_in_a_file_beside_it_are_taken_in(tmp_path: Path, publish: Publish) -> None:
    model = onnx.load_from_string(classifier())
    path = tmp_path / "outside.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    bundle = add("m", path, AddSettings(models=tmp_path / "models"))
    (tmp_path / "weights.bin").unlink()
    assert np.allclose(served(bundle, pixels()), softmax(logits(pixels())), atol=1e-5)
    with pytest.raises(ConvoyError, match=r"weights\.bin"):
        add("m", path, AddSettings(models=tmp_path / "models"))


def test_each_file_is_the_next_version(publish: Publish) -> None:
    assert [publish(classifier()).version for _ in range(3)] == [1, 2, 3]


# Labels.


@pytest.mark.parametrize("text", ["a\nb c\nd\n", "a\r\nb c\r\nd", " a\nb c \nd\n\n\n"])
def test_labels_are_the_lines_of_a_file(text: str, tmp_path: Path, publish: Publish) -> None:
    (tmp_path / "labels.txt").write_bytes(text.encode())
    bundle = publish(classifier(), labels=tmp_path / "labels.txt")
    assert bundle.manifest.labels == ["a", "b c", "d"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\nb\n", "labels.txt has 2 labels, the model 3 classes"),
        (b"a\nb\nc\nd\n", "labels.txt has 4 labels, the model 3 classes"),
        (b"", "labels.txt has 0 labels"),
        (b"a\n\xff\nc\n", "labels.txt: .*utf-8"),
        (None, "labels.txt.*No such file|No such file.*labels.txt"),
    ],
    ids=["too few", "too many", "empty", "not UTF-8", "missing"],
)
def test_labels_that_do_not_fit_are_refused(
    content: bytes | None, words: str, tmp_path: Path, publish: Publish
) -> None:
    if content is not None:
        (tmp_path / "labels.txt").write_bytes(content)
    with pytest.raises(ConvoyError, match=words):
        publish(classifier(), labels=tmp_path / "labels.txt")
    assert not (tmp_path / "models").exists()


def test_the_mark_that_some_editors_begin_a_file_with_is_no_part_of_a_label(
    tmp_path: Path, publish: Publish
) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfcat\ndog\nant\n")
    bundle = publish(classifier(), labels=tmp_path / "labels.txt")
    assert bundle.manifest.labels == ["cat", "dog", "ant"]


# What is refused.


def two_inputs() -> bytes:
    nodes = [
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("ReduceMean", ["c"], ["y"], axes=[1, 2], keepdims=0),
    ]
    inputs = [value("a", F32, ["N", *NHWC]), value("b", F32, ["N", *NHWC])]
    return graph(nodes, inputs, [value("y", F32, ["N", 3])])


def two_outputs() -> bytes:
    nodes = [
        helper.make_node("ReduceMean", ["a"], ["y"], axes=[1, 2], keepdims=0),
        helper.make_node("Neg", ["y"], ["z"]),
    ]
    outputs = [value("y", F32, ["N", 3]), value("z", F32, ["N", 3])]
    return graph(nodes, [value("a", F32, ["N", *NHWC])], outputs)


def class_numbers() -> bytes:
    nodes = [
        helper.make_node("ReduceMean", ["a"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("ArgMax", ["means"], ["y"], axis=1, keepdims=0),
    ]
    number = value("y", TensorProto.INT64, ["N"])
    return graph(nodes, [value("a", F32, ["N", *NHWC])], [number])


def feature_map() -> bytes:
    nodes = [helper.make_node("Relu", ["a"], ["y"])]
    return graph(nodes, [value("a", F32, ["N", *NHWC])], [value("y", F32, ["N", *NHWC])])


def single_rows_only() -> bytes:
    """Says that it takes any batch, and takes one row."""
    nodes = [
        helper.make_node("Reshape", ["a", "shape"], ["one"]),
        helper.make_node("ReduceMean", ["one"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Softmax", ["means"], ["y"], axis=1),
    ]
    constants = {"shape": np.array([1, *NHWC])}
    return graph(nodes, [value("a", F32, ["N", *NHWC])], [value("y", F32, ["M", 3])], constants)


def neighbours_matter() -> bytes:
    """Takes from each answer what is common to the batch."""
    nodes = [
        helper.make_node("ReduceMean", ["a"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("ReduceMean", ["means"], ["common"], axes=[0]),
        helper.make_node("Sub", ["means", "common"], ["rest"]),
        helper.make_node("Softmax", ["rest"], ["y"], axis=1),
    ]
    return graph(nodes, [value("a", F32, ["N", *NHWC])], [value("y", F32, ["N", 3])])


def infinities() -> bytes:
    nodes = [
        helper.make_node("ReduceMean", ["a"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Mul", ["means", "signs"], ["y"]),
    ]
    constants = {"signs": np.array([np.inf, -np.inf, 1], np.float32)}
    return graph(nodes, [value("a", F32, ["N", *NHWC])], [value("y", F32, ["N", 3])], constants)


SCALED = {"scale": (1 / 255,)}
REFUSED: dict[str, tuple[bytes, dict[str, Any], str]] = {
    "floats without a word on how": (classifier(kind=F32), {}, "takes floats: say how .*--scale"),
    "half floats without a word on how": (classifier(kind=F16), {}, "takes floats: say how"),
    "bytes that would be scaled": (classifier(), SCALED, "takes uint8 pixels: --scale, --mean"),
    "a mean of bytes": (classifier(), {"mean": (0.5,)}, "takes uint8 pixels"),
    "a mean for other channels": (
        classifier(kind=F32),
        {"mean": (0.5, 0.5)},
        "--mean: 2 numbers for 3 channels",
    ),
    "a deviation of 0": (classifier(kind=F32), {"std": (1, 0, 1)}, "--std has a 0"),
    "channels nowhere": (classifier((4, 5, 2)), {}, "does not tell its layout: give --layout"),
    "channels at both ends": (classifier((3, 5, 3)), {}, "does not tell its layout"),
    "other channels": (
        classifier((4, 5, 2)),
        {"layout": "nhwc"},
        "2 channels as nhwc: expected 1 or 3; see --layout",
    ),
    "the other layout": (classifier(NHWC), {"layout": "nchw"}, "4 channels as nchw"),
    "an open size": (
        classifier(("H", "W", 3), size=NHWC),
        {},
        "leaves height or width open: give --image-size",
    ),
    "a flat input": (classifier((60,)), {}, r"\[None, 60\]: expected uint8 or float pixels"),
    "doubles": (classifier(kind=F64), SCALED, "is DOUBLE .*: expected uint8 or float pixels"),
    "two inputs": (two_inputs(), SCALED, "has 2 inputs and 1 outputs"),
    "two outputs": (two_outputs(), SCALED, "has 1 inputs and 2 outputs"),
    "logits": (classifier(with_softmax=False), {}, "no probabilities .*add --softmax"),
    "a softmax twice": (
        classifier(),
        {"softmax": True},
        "gives probabilities already: leave --softmax out",
    ),
    "a single class": (classifier(classes=1), {}, "has a single output"),
    "a scale of 0": (classifier(kind=F32), {"scale": (0.0,)}, "the same answer: check --scale"),
    "sums above 1": (classifier(added=0.1), {}, r"adds up to 1\.3"),
    "NaN": (classifier(added=np.nan), {}, "gives NaN or infinity"),
    "infinities of both signs": (infinities(), SCALED, "gives NaN or infinity"),
    "class numbers": (class_numbers(), SCALED, r"output 'y' .*expected float \[N, classes\]"),
    "a feature map": (feature_map(), SCALED, r"expected float \[N, classes\]"),
    "a batch axis that is not free": (single_rows_only(), SCALED, "a first run failed"),
    "answers that hang on the batch": (neighbours_matter(), SCALED, "at batch size 1: .*off by"),
    "an unknown operation": (
        graph(
            [helper.make_node("Divinate", ["a"], ["y"])],
            [value("a", U8, ["N", *NHWC])],
            [value("y", F32, ["N", 3])],
        ),
        {},
        "Divinate",
    ),
    "a text": (b"this is no model", {}, "is no ONNX model"),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(99), {}, "is no ONNX model"),
    "nothing": (b"", {}, "has 0 inputs and 0 outputs"),
    "half a file": (classifier()[:150], {}, "is no ONNX model"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_can_not_be_served_is_refused_with_a_reason(
    kind: str, publish: Publish, tmp_path: Path
) -> None:
    data, settings, words = REFUSED[kind]
    with pytest.raises(ConvoyError, match=f"(?s){words}") as caught:
        publish(data, **settings)
    assert str(tmp_path / "file.onnx") in str(caught.value) or words.startswith("--")
    assert not (tmp_path / "models").exists()


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match=r"none\.onnx is missing"):
        add("m", tmp_path / "none.onnx", AddSettings(models=tmp_path / "models"))
    with pytest.raises(ConvoyError, match="is no ONNX model"):
        add("m", tmp_path, AddSettings(models=tmp_path / "models"))


def test_a_name_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(ConvoyError, match="can't name a model"):
        add("../m", tmp_path / "none.onnx", AddSettings(models=tmp_path / "models"))
