"""What only a card can show. Run by `make gpu` where there is one; elsewhere all of it is skipped."""

from collections.abc import Iterator

import numpy as np
import onnxruntime as ort
import pytest

from protos import classifier_pb2 as pb
from protos import inference_pb2 as oip
from service import gpu
from service.device import Device, assignment, heavy_on_cpu, open_session
from service.errors import BrokenVersion
from service.model import GOLDEN_TOLERANCE, Model
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server("--device", "cuda", models=REPOSITORY / "models") as server:
        yield server.ready()
    assert "Traceback" not in server.log


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
        np.testing.assert_allclose(card.run(pixels), cpu.run(pixels), atol=GOLDEN_TOLERANCE)


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


def test_a_server_on_the_card_says_so_and_answers(server: Server) -> None:
    model = Model(ONNX.read_bytes(), "cpu")
    with server.channel() as channel:
        [listed] = classifier_on(channel).ListModels(pb.ListModelsRequest()).models
        assert listed.device == "cuda:0"
        for count in (1, 3, 64, 100):
            request: oip.ModelInferRequest = infer_request("digits", "pixels")
            raw_pixels(request, digits(count))
            answers = outputs_of(inference_on(channel).ModelInfer(request))
            np.testing.assert_allclose(answers, model.run(digits(count)), atol=GOLDEN_TOLERANCE)
    metrics = server.metrics()
    assert sum(name.startswith("convoy_gpu_memory_used_bytes") for name in metrics) == gpu.count()
    assert metrics['convoy_model_fallback{model="digits"}'] == 0
