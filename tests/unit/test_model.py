"""A loaded version: the contract of its graph, its proof, and that it answers what it is asked."""

import dataclasses
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from convoy_service.artifacts.images import Pixels, Target
from convoy_service.artifacts.reader import Bundle, Golden, Manifest, Scores, Variant
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion, InferenceFailed
from tests.unit.graphs import classifier, graph, logits, softmax, value

U8, F32, F64, I64 = TensorProto.UINT8, TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
SHAPE = (4, 5, 3)


def pixels(count: int, shape: Sequence[int] = SHAPE) -> Pixels:
    return np.random.default_rng(1).integers(0, 256, (count, *shape), np.uint8)


def expected(pixels: Pixels) -> Any:
    return softmax(logits(pixels))


def cpu(onnx: bytes) -> Model:
    return Model(onnx, "cpu", threads=1)


# The contract.


def test_a_model_knows_its_names_its_shape_and_its_device() -> None:
    model = cpu(classifier(names=("image", "scores")))
    assert (model.input, model.output, model.shape) == ("image", "scores", SHAPE)
    assert (model.device, model.fixed_batch) == ("cpu", None)


@pytest.mark.parametrize("count", [1, 2, 3, 17, 64])
def test_run_answers_every_row(count: int) -> None:
    answers = cpu(classifier()).run(pixels(count))
    assert answers.dtype == np.float32
    assert np.allclose(answers, expected(pixels(count)), atol=1e-5)


def test_run_may_be_called_from_several_threads() -> None:
    model, rows = cpu(classifier()), pixels(200)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: model.run(rows[n : n + 3]), range(197)))
    for n, answer in enumerate(answers):
        assert np.allclose(answer, expected(rows[n : n + 3]), atol=1e-5)


def simple(
    inputs: Sequence[tuple[str, int, Sequence[int | str]]],
    outputs: Sequence[tuple[str, int, Sequence[int | str]]],
    *nodes: tuple[str, list[str], list[str], dict[str, Any]],
) -> bytes:
    return graph(
        [helper.make_node(op, i, o, **attributes) for op, i, o, attributes in nodes],
        [value(*one) for one in inputs],
        [value(*one) for one in outputs],
    )


def reduced(kind: int, shape: Sequence[int | str]) -> bytes:
    """The mean over height and width; cast, as no reduction takes bytes."""
    return simple(
        [("pixels", kind, shape)],
        [("means", F32, [shape[0], "C"])],
        ("Cast", ["pixels"], ["floats"], {"to": F32}),
        ("ReduceMean", ["floats"], ["means"], {"axes": [1, 2], "keepdims": 0}),
    )


CONTRACT = {
    "float pixels": (reduced(F32, ["N", 4, 4, 3]), "input 'pixels' is tensor.float.*models add"),
    "int64 pixels": (reduced(I64, ["N", 4, 4, 3]), "input 'pixels' is tensor.int64"),
    "two channels": (reduced(U8, ["N", 4, 4, 2]), r"\['N', 4, 4, 2\]: expected uint8 \[N, H, W"),
    "channels first": (reduced(U8, ["N", 3, 4, 4]), r"\['N', 3, 4, 4\]"),
    "open height": (reduced(U8, ["N", "H", 4, 3]), r"\['N', 'H', 4, 3\]"),
    "open channels": (reduced(U8, ["N", 4, 4, "C"]), r"\['N', 4, 4, 'C'\]"),
    "no batch axis": (
        simple(
            [("pixels", U8, [4, 4, 3])],
            [("means", F32, [4, 3])],
            ("Cast", ["pixels"], ["floats"], {"to": F32}),
            ("ReduceMean", ["floats"], ["means"], {"axes": [1], "keepdims": 0}),
        ),
        r"\[4, 4, 3\]: expected uint8",
    ),
    "two inputs": (
        simple(
            [("a", U8, ["N", 4, 4, 3]), ("b", U8, ["N", 4, 4, 3])],
            [("means", F32, ["N", 3])],
            ("Cast", ["a"], ["x"], {"to": F32}),
            ("Cast", ["b"], ["y"], {"to": F32}),
            ("Add", ["x", "y"], ["z"], {}),
            ("ReduceMean", ["z"], ["means"], {"axes": [1, 2], "keepdims": 0}),
        ),
        "2 inputs and 1 outputs: expected 1 and 1",
    ),
    "two outputs": (
        simple(
            [("a", U8, ["N", 4, 4, 3])],
            [("means", F32, ["N", 3]), ("x", F32, ["N", 4, 4, 3])],
            ("Cast", ["a"], ["x"], {"to": F32}),
            ("ReduceMean", ["x"], ["means"], {"axes": [1, 2], "keepdims": 0}),
        ),
        "1 inputs and 2 outputs",
    ),
    "an answer of doubles": (
        simple(
            [("a", U8, ["N", 4, 4, 3])],
            [("means", F64, ["N", 3])],
            ("Cast", ["a"], ["x"], {"to": F64}),
            ("ReduceMean", ["x"], ["means"], {"axes": [1, 2], "keepdims": 0}),
        ),
        "output 'means' is tensor.double.*expected float",
    ),
    "an answer with height and width": (
        simple(
            [("a", U8, ["N", 4, 4, 3])],
            [("means", F32, ["N", 1, 1, 3])],
            ("Cast", ["a"], ["x"], {"to": F32}),
            ("ReduceMean", ["x"], ["means"], {"axes": [1, 2]}),
        ),
        r"output 'means' is tensor.float. \['N', 1, 1, 3\]: expected float \[N, classes\]",
    ),
    "nothing": (b"", "can't load the model"),
    "a text": (b"this is no model", "can't load the model"),
    "a truncated file": (classifier()[:200], "can't load the model"),
    "an unknown operation": (
        simple(
            [("a", U8, ["N", 4, 4, 3])],
            [("b", F32, ["N", 3])],
            ("Divinate", ["a"], ["b"], {}),
        ),
        "can't load the model.*Divinate",
    ),
}


@pytest.mark.parametrize("kind", CONTRACT)
def test_what_is_no_image_classifier_is_refused_with_a_reason(kind: str) -> None:
    onnx, words = CONTRACT[kind]
    with pytest.raises(BrokenVersion, match=f"(?s){words}"):
        cpu(onnx)


@pytest.mark.skipif(
    "CUDAExecutionProvider" in ort.get_available_providers(), reason="this ONNX Runtime has CUDA"
)
def test_a_device_that_is_not_there_is_not_replaced_by_another() -> None:
    with pytest.raises(BrokenVersion, match="device cuda is not to be had"):
        Model(classifier(), "cuda")


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 5, 4, 3), np.uint8),
        np.zeros((1, *SHAPE), np.float32),
        np.zeros(SHAPE, np.uint8),
    ],
    ids=["shape", "type", "rank"],
)
def test_a_run_that_the_runtime_refuses_has_failed(wrong: Any) -> None:
    with pytest.raises(InferenceFailed):
        cpu(classifier()).run(wrong)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9])
def test_a_fixed_batch_is_filled_up_and_the_rest_cut_off(batch: int, count: int) -> None:
    model = cpu(classifier(batch=batch))
    assert model.fixed_batch == batch
    answers = model.run(pixels(count))
    assert answers.shape == (count, 3)
    assert np.allclose(answers, expected(pixels(count)), atol=1e-5)


def bound(*sizes: int) -> Model:
    model = cpu(classifier())
    model.bind(sizes, 3)
    return model


def test_batches_of_bound_sizes_run_in_memory_that_stays() -> None:
    model = bound(1, 4)
    assert model.sizes == (1, 4)
    assert model.buffer(2) is None
    kept: list[Any] = []
    for seed in range(3):
        buffer = model.buffer(4)
        assert buffer is not None
        assert buffer is model.buffer(4)
        buffer[...] = np.random.default_rng(seed).integers(0, 256, buffer.shape, np.uint8)
        kept.append((buffer.copy(), model.run(buffer)))
    # An answer stays what it was when the next batch has run.
    for rows, answers in kept:
        assert np.allclose(answers, expected(rows), atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_other_arrays_and_other_sizes_run_as_well(count: int) -> None:
    answers = bound(1, 4).run(pixels(count))
    assert np.allclose(answers, expected(pixels(count)), atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [np.zeros((4, 5, 4, 3), np.uint8), np.zeros((4, *SHAPE), np.int8)]
)
def test_what_does_not_fit_bound_memory_has_failed(wrong: Any) -> None:
    with pytest.raises(InferenceFailed):
        bound(4).run(wrong)


def test_lanes_have_memory_of_their_own() -> None:
    model = cpu(classifier())
    model.bind((1, 4), 3, lanes=2)
    assert model.lanes == 2
    given = [np.full((4, *SHAPE), value, np.uint8) for value in (10, 200)]
    buffers = [model.buffer(4, lane) for lane in (0, 1)]
    for buffer, rows in zip(buffers, given, strict=True):
        assert buffer is not None
        buffer[...] = rows
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            answers = pool.map(model.run, buffers)
            for rows, answer in zip(given, answers, strict=True):
                assert np.allclose(answer, expected(rows), atol=1e-5)


def test_to_be_warm_each_size_has_run_in_all_lanes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = cpu(classifier())
    model.bind((1, 4), 3, lanes=2)
    run, together = model.run, threading.Barrier(2)

    def meet(pixels: Pixels) -> Any:
        together.wait(30)
        seen.append((len(pixels), id(pixels)))
        return run(pixels)

    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(model, "run", meet)
    model.warm()
    times = Counter(seen)
    assert set(times) == {
        (size, id(model.buffer(size, lane))) for size in (1, 4) for lane in (0, 1)
    }
    assert min(times.values()) >= 4


def test_a_fixed_batch_runs_in_place_where_it_is_bound() -> None:
    model = cpu(classifier(batch=4))
    model.bind((4,), 3, lanes=2)
    for lane in (0, 1):
        buffer = model.buffer(4, lane)
        assert buffer is not None
        buffer[...] = pixels(4) + np.uint8(lane)
    for lane in (1, 0):
        answer = model.run(model.buffer(4, lane))  # type: ignore[arg-type]
        assert np.allclose(answer, expected(pixels(4) + np.uint8(lane)), atol=1e-5)
    assert np.allclose(model.run(pixels(6)), expected(pixels(6)), atol=1e-5)


def test_every_bound_size_is_warm_before_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convoy_service.engine.onnx_model._MEASURE_S", 0.0)
    bundle, model = version(), bound(1, 2, 4, 8)
    seen: list[int] = []
    model.measure(bundle, lambda size, seconds: seen.append(size))
    assert sorted(set(seen)) == [1, 2, 4, 8]


# The proof.


def version(onnx: bytes = b"", golden: Golden | None = None, **changes: Any) -> Bundle:
    """A version of `classifier` that proves itself, but for what is changed."""
    manifest = Manifest(
        input="pixels",
        output="probabilities",
        pixels=Target(*SHAPE),
        labels=["a", "b", "c"],
        max_batch_size=8,
        created="",
    )
    golden = golden or Golden(pixels(3), expected(pixels(3)).astype(np.float32))
    manifest = dataclasses.replace(manifest, **changes)
    return Bundle(Path("models/m/7"), "m", 7, manifest, onnx or classifier(), golden)


@pytest.mark.parametrize("batch", ["N", 8])
@pytest.mark.parametrize("size", [1, 8])
def test_a_version_that_answers_as_recorded_is_loaded(batch: int | str, size: int) -> None:
    max_batch_size = batch if isinstance(batch, int) else size
    fixed = isinstance(batch, int)
    bundle = version(classifier(batch=batch), max_batch_size=max_batch_size, fixed_batch=fixed)
    model = Model.load(bundle, "cpu", threads=1)
    assert np.allclose(model.run(pixels(2)), expected(pixels(2)), atol=1e-5)


def first_row_only() -> bytes:
    """Answers batches of any size with one row."""
    return graph(
        [
            helper.make_node("Cast", ["pixels"], ["floats"], to=F32),
            helper.make_node("ReduceMean", ["floats"], ["mean"], axes=[0, 1, 2], keepdims=0),
            helper.make_node("Reshape", ["mean", "shape"], ["row"]),
            helper.make_node("Softmax", ["row"], ["probabilities"], axis=1),
        ],
        [value("pixels", U8, ["N", *SHAPE])],
        [value("probabilities", F32, ["M", 3])],
        {"shape": np.array([1, 3])},
    )


def single_rows_only() -> bytes:
    """Says that it takes any batch, and fails on more than one row."""
    return graph(
        [
            helper.make_node("Cast", ["pixels"], ["floats"], to=F32),
            helper.make_node("Reshape", ["floats", "shape"], ["one"]),
            helper.make_node("ReduceMean", ["one"], ["mean"], axes=[1, 2], keepdims=0),
            helper.make_node("Softmax", ["mean"], ["probabilities"], axis=1),
        ],
        [value("pixels", U8, ["N", *SHAPE])],
        [value("probabilities", F32, ["M", 3])],
        {"shape": np.array([1, *SHAPE])},
    )


def means(pixels: Pixels) -> Any:
    return softmax(pixels.mean(axis=(1, 2))).astype(np.float32)


def shifted(difference: float) -> Golden:
    """Right but for `difference` in every answer."""
    return Golden(pixels(3), (expected(pixels(3)) + difference).astype(np.float32))


def answering(answer: float) -> Golden:
    return Golden(pixels(3), np.full((3, 3), answer, np.float32))


BLACK = np.zeros((1, *SHAPE), np.uint8)

UNPROVEN = {
    "another input name": (version(input="image"), "the manifest says .*'image'"),
    "another output name": (version(output="scores"), "the manifest says .*'scores'"),
    "another size": (version(pixels=Target(5, 4, 3)), r"the manifest says .*\(5, 4, 3\)"),
    "another batch size": (version(classifier(batch=4)), "batch axis is 4, the manifest says free"),
    "a golden answer is another": (version(golden=shifted(0.3)), r"are off by 0\.3 "),
    "another graph": (version(classifier(added=0.01)), r"are off by 0\.01 "),
    "it answers NaN": (version(classifier(added=np.nan)), "NaN or infinity"),
    "NaN was recorded, too": (
        version(classifier(added=np.nan), answering(np.nan)),
        "NaN or infinity",
    ),
    "NaN was recorded only": (version(golden=answering(np.nan)), "are off by nan"),
    "infinity was recorded, too": (
        version(classifier(added=np.inf), answering(np.inf)),
        "NaN or infinity",
    ),
    "too many labels": (version(labels=["a", "b", "c", "d"]), "3 inputs and 4 labels"),
    "too few labels": (version(labels=["a", "b"]), "3 inputs and 2 labels"),
    "more classes than recorded": (
        version(classifier(classes=4)),
        r"answers of shape \[\d, 4\] for \d inputs and 3 labels",
    ),
    "no golden inputs": (
        version(golden=Golden(BLACK[:0], np.zeros((0, 3), np.float32))),
        "0 inputs",
    ),
    "fewer golden answers than inputs": (
        version(golden=Golden(pixels(3), answering(0.3).probabilities[:2])),
        r"golden answers of shape \[2, 3\] for 3 inputs",
    ),
    "golden inputs of another size": (
        version(golden=Golden(pixels(3, (5, 4, 3)), answering(0.3).probabilities)),
        "a golden input fails",
    ),
    "one answer for a whole batch": (
        version(first_row_only(), Golden(BLACK, means(BLACK))),
        r"answers of shape \[1, 3\] for 8 inputs",
    ),
    "it fails at the largest batch": (
        version(single_rows_only(), Golden(BLACK, means(BLACK))),
        "a golden input fails",
    ),
}


@pytest.mark.parametrize("kind", UNPROVEN)
def test_a_version_that_does_not_prove_itself_is_refused_with_a_reason(kind: str) -> None:
    bundle, words = UNPROVEN[kind]
    with pytest.raises(BrokenVersion, match=words) as caught:
        Model.load(bundle, "cpu", threads=1)
    assert "models/m/7" in str(caught.value)


# Variants.


def answers_of(onnx: bytes) -> Any:
    return cpu(onnx).run(pixels(3))


SMALLER, SMALL = classifier(added=0.05), classifier(added=0.02)


def with_variants(off: float = 0.0, **speedups: float) -> Bundle:
    """int8 gives 0.05 more than fp32, fp16 0.02; as golden answers say, but for `off`."""
    golden = Golden(
        pixels(3),
        expected(pixels(3)).astype(np.float32),
        {"int8": answers_of(SMALLER) + np.float32(off), "fp16": answers_of(SMALL)},
    )
    measured = {
        name: Variant(Scores(1.0, 3, 3, 0.0), 1.0, 1000.0, speedup, "cpu")
        for name, speedup in speedups.items()
    }
    bundle = version(golden=golden, variants=measured)
    return dataclasses.replace(bundle, variants={"int8": SMALLER, "fp16": SMALL})


@pytest.mark.parametrize(
    ("asked", "loaded", "added"),
    [
        ("fp32", "fp32", 0),
        ("int8", "int8", 0.05),
        ("fp16", "fp16", 0.02),
        ("fastest", "fp16", 0.02),
    ],
)
def test_a_version_is_loaded_in_the_variant_asked_for(
    asked: str, loaded: str, added: float
) -> None:
    bundle = with_variants(int8=1.1, fp16=1.5)
    model = Model.load(bundle, "cpu", threads=1, variant=asked)
    assert (model.variant, model.fallback) == (loaded, "")
    assert np.allclose(model.run(pixels(2)), expected(pixels(2)) + added, atol=1e-5)


def test_a_variant_that_a_version_does_not_have_is_fp32() -> None:
    assert Model.load(version(), "cpu", threads=1, variant="int8").variant == "fp32"
    assert Model.load(version(), "cpu", threads=1, variant="fastest").variant == "fp32"


def test_the_fastest_that_does_not_prove_itself_is_replaced_and_another_refused() -> None:
    bundle = with_variants(off=0.03, int8=2.0)
    model = Model.load(bundle, "cpu", threads=1, variant="fastest")
    assert model.variant == "fp32"
    assert "serves fp32, not int8: models/m/7: int8 on cpu" in model.fallback
    assert "off by 0.03 (allowed 0.01)" in model.fallback
    with pytest.raises(BrokenVersion, match=r"int8 on cpu .* off by 0\.03"):
        Model.load(bundle, "cpu", threads=1, variant="int8")


def test_an_int8_step_between_processors_is_no_reason_to_refuse() -> None:
    assert Model.load(with_variants(off=0.005), "cpu", threads=1, variant="int8").variant == "int8"


def test_a_variant_of_another_shape_is_refused() -> None:
    bundle = dataclasses.replace(with_variants(), variants={"int8": classifier((5, 4, 3))})
    with pytest.raises(BrokenVersion, match="the manifest says"):
        Model.load(bundle, "cpu", threads=1, variant="int8")


def test_where_not_even_fp32_proves_itself_the_version_is_refused() -> None:
    bundle = dataclasses.replace(with_variants(off=0.03, int8=2.0), onnx=classifier(added=0.1))
    with pytest.raises(BrokenVersion, match="fp32 on cpu"):
        Model.load(bundle, "cpu", threads=1, variant="fastest")


def test_rounding_between_machines_is_no_reason_to_refuse() -> None:
    assert Model.load(version(golden=shifted(5e-4)), "cpu", threads=1).device == "cpu"
