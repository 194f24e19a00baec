"""Clients that others wrote, in an environment of their own."""

import json
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import pytest

from convoy_service.artifacts.reader import Golden
from tests.conftest import REPOSITORY, SOURCES, Server, convoy
from tests.integration.conftest import Peer
from tests.integration.pictures import encode

DIGITS = REPOSITORY / "models" / "digits"


@pytest.fixture
def folder(tmp_path: Path, digits: Golden) -> Path:
    """Digits as files in the order of their names, and the same as pixels."""
    for number, pixels in enumerate(digits.pixels):
        (tmp_path / f"{number}.png").write_bytes(encode(pixels))
    np.save(tmp_path / "pixels.npy", digits.pixels)
    return tmp_path


def test_tritonclient_gets_what_convoy_classify_gets_to_the_bit(
    peer: Peer, shipped: Server, folder: Path, digits: Golden
) -> None:
    seen = peer("calls", shipped.target, folder)
    assert [seen[what] for what in ("live", "ready", "model_ready", "version_ready")] == [True] * 4
    assert seen["server"].items() >= {
        ("name", "convoy"),
        ("version", metadata.version("convoy-serving")),
    }
    assert seen["model"]["name"] == "digits"
    assert seen["model"]["versions"] == ["1"]
    assert seen["model"]["inputs"] == [
        {"name": "pixels", "datatype": "UINT8", "shape": ["-1", "8", "8", "1"]}
    ]
    assert seen["id"] == "42"
    assert seen["refusal"]["status"] == "StatusCode.NOT_FOUND"
    assert "nobody's" in seen["refusal"]["message"]

    printed = convoy("classify", folder, "--json", "--top-k", "10", "--server", shipped.target)
    assert printed.returncode == 0, printed.stderr
    classified = [
        [label["probability"] for label in sorted(answer["labels"], key=lambda each: each["index"])]
        for answer in map(json.loads, printed.stdout.splitlines())
    ]
    assert seen["probabilities"] == dict.fromkeys(
        ["UINT8", "BYTES", "named", "async", "aio"], classified
    )
    np.testing.assert_allclose(classified, digits.probabilities, atol=1e-6)


def test_tritonclient_and_convoy_live_in_one_process(
    peer: Peer, shipped: Server, folder: Path
) -> None:
    seen = peer("beside_convoy", shipped.target, folder, PYTHONPATH=SOURCES)
    assert seen["triton"] == seen["convoy"]
    assert len(seen["convoy"]) == 10


def test_tritonclient_streams_and_reads_classes(
    peer: Peer, shipped: Server, folder: Path, digits: Golden
) -> None:
    seen = peer("stream", shipped.target, folder)
    count = len(digits.pixels)
    expected = [
        [f"{row[index]:f}:{index}:{index}" for index in np.argsort(-row)[:3]]
        for row in digits.probabilities
    ]
    assert "nobody's" in seen["errors"].pop(1)
    assert seen["errors"] == [None] * (count - 1)
    assert seen["ids"] == [str(number) for number in range(count) if number != 1]
    assert seen["final"] == [True] * (count - 1)
    assert [[text.partition(":")[2] for text in each] for each in seen["classes"]] == [
        [text.partition(":")[2] for text in each] for each in expected[:1] + expected[2:]
    ]
    assert seen["strict"] == ["0", "StatusCode.NOT_FOUND"]


def test_triton_reads_the_config_that_is_served_as_the_file(peer: Peer, shipped: Server) -> None:
    served, written = peer("served_config", shipped.target, DIGITS / "config.pbtxt")
    assert served == written


def test_triton_can_read_the_config_and_it_fits_the_graph(peer: Peer) -> None:
    graph = onnx.load(DIGITS / "1" / "model.onnx").graph
    (source,), (sink,) = graph.input, graph.output
    height, width, channels = (each.dim_value for each in source.type.tensor_type.shape.dim[1:])
    classes = len((DIGITS / "labels.txt").read_text().splitlines())
    manifest = json.loads((DIGITS / "1" / "manifest.json").read_text())
    assert source.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert sink.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert peer("config", str(DIGITS / "config.pbtxt")) == {
        "name": "digits",
        "platform": "onnxruntime_onnx",
        "max_batch_size": manifest["max_batch_size"],
        "tensors": [
            [source.name, "TYPE_UINT8", [height, width, channels]],
            [sink.name, "TYPE_FP32", [classes]],
        ],
        "label_filename": "labels.txt",
        "dynamic_batching": True,
    }
