"""What only a card can show. Run by `make gpu` where there is one; elsewhere all of it is skipped."""

import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from convoy_service.artifacts import reader as bundles
from convoy_service.engine import gpu
from convoy_service.engine.onnx_model import COARSE_TOLERANCE, Model
from convoy_service.engine.session import Card, Device, assignment, heavy_on_cpu, open_session
from convoy_service.errors import BrokenVersion
from tests.conftest import REPOSITORY, Server
from tests.integration.conftest import classifier_on, inference_on
from tests.integration.test_inference_protocol import infer_request, outputs_of, raw_pixels

pytestmark = pytest.mark.skipif(
    not gpu.count() or "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="needs an NVIDIA card, its driver, and convoy-serving[gpu]",
)

DIGITS = REPOSITORY / "models" / "digits" / "1"
ONNX = DIGITS / "model.onnx"


def digits(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)


@pytest.fixture(
    scope="module", params=[(), ("--cuda-graphs",), ("--acceptors", "2", "--engines", "1")]
)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    models: Path = tmp_path_factory.mktemp("models")
    shutil.copytree(DIGITS, models / "digits" / "1")
    with Server("--device", "cuda", *request.param, models=models) as server:
        yield server.ready()
    assert "Traceback" not in server.log
    assert "without CUDA graphs" not in server.log


def load(*, graphs: bool = False) -> Model:
    return Model.load(bundles.read(DIGITS), "cuda", card=Card(graphs=graphs))


def test_all_that_is_heavy_runs_on_the_card() -> None:
    opened = open_session(ONNX.read_bytes(), Device("cuda"), 1)
    nodes = assignment(opened.session)
    assert str(opened.device) == "cuda:0"
    assert any(provider == "CUDAExecutionProvider" for provider, _, _ in nodes)
    assert heavy_on_cpu(nodes) == []


def test_a_card_that_is_not_there_is_refused() -> None:
    with pytest.raises(BrokenVersion):
        open_session(ONNX.read_bytes(), Device("cuda", gpu.count()), 1)


@pytest.mark.parametrize("sizes", [(), (1, 2, 4, 8, 16)])
def test_the_card_answers_as_the_cpu_does(sizes: tuple[int, ...]) -> None:
    data = ONNX.read_bytes()
    card, cpu = Model(data, "cuda"), Model(data, "cpu")
    if sizes:
        card.bind(sizes, 10)
    for count in (1, 2, 3, 8, 16, 5):
        pixels = digits(count)
        np.testing.assert_allclose(card.run(pixels), cpu.run(pixels), atol=COARSE_TOLERANCE)


def test_memory_does_not_grow_with_the_mix_of_sizes() -> None:
    nvml = gpu.nvml()
    assert nvml is not None
    card = nvml.nvmlDeviceGetHandleByIndex(0)
    model = Model(ONNX.read_bytes(), "cuda")
    model.bind((1, 2, 4, 8, 16, 32, 64), 10)

    def used(rounds: int) -> int:
        for n in range(rounds):
            model.run(digits(1 << n % 7))
        return int(nvml.nvmlDeviceGetMemoryInfo(card).used)

    warm = used(70)
    assert used(700) <= warm


@pytest.mark.parametrize("graphs", [False, True])
def test_no_size_is_cold_once_it_is_loaded(graphs: bool) -> None:
    model = load(graphs=graphs)

    def seconds(size: int) -> float:
        buffer = model.buffer(size)
        assert buffer is not None
        began = time.perf_counter()
        model.run(buffer)
        return time.perf_counter() - began

    first = {size: seconds(size) for size in model.sizes}
    steady = {size: np.median([seconds(size) for _ in range(50)]) for size in model.sizes}
    # Half a millisecond is this thread's, not the card's.
    assert all(first[size] <= 1.5 * steady[size] + 5e-4 for size in model.sizes), (first, steady)


def test_graphs_answer_as_the_cpu_does_each_size_for_itself() -> None:
    model, cpu = load(graphs=True), Model(ONNX.read_bytes(), "cpu")
    assert model.lanes == 1, "it runs without CUDA graphs: the log says why"
    for _ in range(3):
        for size in (*model.sizes, *reversed(model.sizes), 3):
            pixels = np.random.default_rng(size).integers(0, 256, (size, 8, 8, 1), np.uint8)
            np.testing.assert_allclose(model.run(pixels), cpu.run(pixels), atol=COARSE_TOLERANCE)


def test_pixels_are_in_pinned_memory(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load()
    assert "no pinned memory" not in caplog.text


def test_batches_in_two_lanes_keep_apart() -> None:
    model, cpu = load(), Model(ONNX.read_bytes(), "cpu")

    def run(lane: int) -> None:
        chance = np.random.default_rng(lane)
        for size in chance.choice(model.sizes, 300):
            buffer = model.buffer(int(size), lane)
            assert buffer is not None
            buffer[...] = chance.integers(0, 256, buffer.shape, np.uint8)
            found, expected = model.run(buffer), cpu.run(buffer.copy())
            np.testing.assert_allclose(found, expected, atol=COARSE_TOLERANCE)

    assert model.lanes == 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, range(2)))


def test_half_precision_answers_as_single_does() -> None:
    half = convert_float_to_float16(onnx.load(ONNX), keep_io_types=True).SerializeToString()
    card, cpu = Model(half, "cuda"), Model(ONNX.read_bytes(), "cpu")
    np.testing.assert_allclose(card.run(digits(64)), cpu.run(digits(64)), atol=COARSE_TOLERANCE)


@pytest.mark.skipif(
    "TensorrtExecutionProvider" not in ort.get_available_providers(), reason="needs TensorRT"
)
def test_tensorrt_answers_as_the_cpu_does() -> None:
    try:
        model = Model.load(bundles.read(DIGITS), "tensorrt")
    except BrokenVersion as error:
        if "is not to be had" not in str(error):
            raise
        pytest.skip(f"its libraries are not there: {error}")
    cpu = Model(ONNX.read_bytes(), "cpu")
    for count in (1, 3, 64):
        pixels = digits(count)
        np.testing.assert_allclose(model.run(pixels), cpu.run(pixels), atol=COARSE_TOLERANCE)


def test_a_server_on_the_card_says_so_and_answers(server: Server) -> None:
    model = Model(ONNX.read_bytes(), "cpu")
    with server.channel() as channel:
        [listed] = classifier_on(channel).ListModels(pb.ListModelsRequest()).models
        assert listed.device == "cuda:0"
        for count in (1, 3, 64, 100):
            request: oip.ModelInferRequest = infer_request("digits", "pixels")
            raw_pixels(request, digits(count))
            answers = outputs_of(inference_on(channel).ModelInfer(request))
            np.testing.assert_allclose(answers, model.run(digits(count)), atol=COARSE_TOLERANCE)
    metrics = server.metrics()
    assert sum(name.startswith("convoy_gpu_memory_used_bytes") for name in metrics) == gpu.count()
    assert metrics['convoy_model_fallback{model="digits"}'] == 0
