"""Which device a model runs on, and that no other is taken for it. Cards are played by a CPU session."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest
from prometheus_client import generate_latest

from service import device
from service.bundle import Scores, Variant
from service.cpu import split
from service.device import Device, buckets, heavy_on_cpu, open_session
from service.errors import BrokenVersion
from service.metrics import Metrics, registry
from service.model import Model
from service.repository import Repository, runs_here
from service.settings import Settings
from tests.integration.models import add_colours
from tests.unit.graphs import classifier

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
REAL = ort.InferenceSession


class Session:
    """A session on the CPU that says it ran elsewhere."""

    def __init__(self, onnx: bytes, options: Any, providers: list[Any], *, said: str) -> None:
        self._real = REAL(onnx, options, providers=[CPU])
        self.options, self.providers, self._said = options, providers, said

    def get_providers(self) -> list[str]:
        return [self._said, CPU]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`card(said)`: ONNX Runtime offers CUDA, and its sessions say that they run on `said`."""

    def offer(said: str, nodes: list[tuple[str, str, str]] | None = None) -> None:
        monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
        monkeypatch.setattr(ort, "preload_dlls", lambda: print("no libcudart"))
        monkeypatch.setattr(
            ort,
            "InferenceSession",
            lambda onnx, options, providers: (
                Session(onnx, options, providers, said=said)
                if providers != [CPU]
                else REAL(onnx, options, providers=providers)
            ),
        )
        if nodes is not None:
            monkeypatch.setattr(device, "assignment", lambda session: nodes)

    return offer


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("auto", Device("auto")),
        ("cpu", Device("cpu")),
        ("cuda", Device("cuda")),
        ("cuda:0", Device("cuda", 0)),
        ("tensorrt:3", Device("tensorrt", 3)),
    ],
)
def test_devices_are_read_as_they_are_written(text: str, parsed: Device) -> None:
    assert Device.parse(text) == parsed
    assert str(parsed) == text


def test_batch_sizes_on_a_card_are_few_and_end_with_the_largest() -> None:
    assert buckets(1) == (1,)
    assert buckets(8) == (1, 2, 4, 8)
    assert buckets(48) == (1, 2, 4, 8, 16, 32, 48)


def test_without_cuda_auto_is_the_cpu_and_nothing_is_missed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    opened = open_session(classifier(), Device("auto"), 1)
    assert (str(opened.device), opened.fallback) == ("cpu", "")
    for kind in ("cuda", "tensorrt"):
        with pytest.raises(BrokenVersion, match=rf"device {kind} is not to be had.*\[gpu\]"):
            open_session(classifier(), Device(kind), 1)


def test_cuda_that_turns_out_to_be_a_cpu_is_refused(card: Any) -> None:
    card(CPU)
    with pytest.raises(BrokenVersion, match=f"cuda:1 is not to be had: ONNX Runtime took {CPU}"):
        open_session(classifier(), Device("cuda", 1), 1)


def test_auto_falls_back_loudly(
    card: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    card(CPU)
    bundle = add_colours(tmp_path)
    settings, budget, metrics = Settings(), split(1, 1, 0, 1, 1), Metrics()
    make = runs_here(settings, budget, metrics, lambda bug: None)
    with caplog.at_level(logging.WARNING):
        repository = Repository(tmp_path, settings, budget, metrics, make)
    [entry] = repository.entries()
    words = "runs on the CPU, not on CUDA: device cuda:0 is not to be had"
    assert words in caplog.text
    assert words in entry.reason
    assert entry.served is not None
    assert entry.served.device == "cpu"
    told = generate_latest(registry(metrics.snapshot)).decode()
    assert f'convoy_model_fallback{{model="{bundle.name}"}} 1.0' in told
    repository.close()


def test_auto_that_falls_back_takes_the_fastest_variant_of_the_cpu(
    card: Any, tmp_path: Path
) -> None:
    card(CPU)
    bundle = add_colours(tmp_path)
    graphs, answers = {"int8": bundle.onnx, "fp16": bundle.onnx}, bundle.golden.probabilities
    scores = Scores(1.0, 1, 1, 0.0)
    measured = {
        "int8": Variant(scores, 1.0, 1.0, 2.0, "cpu"),
        "fp16": Variant(scores, 1.0, 1.0, 2.0, "cuda:0"),
    }
    bundle = replace(
        bundle,
        variants=graphs,
        manifest=replace(bundle.manifest, variants=measured),
        golden=replace(bundle.golden, variants=dict.fromkeys(graphs, answers)),
    )
    model = Model.load(bundle, "auto", 1, variant="fastest")
    assert (model.device, model.variant) == ("cpu", "int8")
    card(CUDA, [])
    model = Model.load(bundle, "auto", 1, variant="fastest")
    assert (model.device, model.variant) == ("cuda:0", "fp16")


def test_a_card_gets_its_options(card: Any, capsys: pytest.CaptureFixture[str]) -> None:
    card(CUDA, [])
    opened: Any = open_session(classifier(), Device("cuda", 2), 1, memory_mb=1500)
    assert str(opened.device) == "cuda:2"
    [(provider, options)] = opened.session.providers
    assert provider == CUDA
    assert (options["device_id"], options["gpu_mem_limit"]) == ("2", "1500000000")
    assert options["arena_extend_strategy"] == "kSameAsRequested"
    assert capsys.readouterr().out == ""


def test_heavy_nodes_on_the_cpu_are_listed(card: Any) -> None:
    card(CUDA)  # and its real nodes are all on the CPU
    with pytest.raises(BrokenVersion, match=r"these would run on the CPU: MatMul '\w*'"):
        open_session(classifier(), Device("cuda"), 1)


def test_shapes_may_be_worked_out_on_the_cpu() -> None:
    nodes = [
        (CPU, "Shape", "a"),
        (CPU, "Gather", "b"),
        (CUDA, "Conv", "c"),
        (CPU, "FusedConv", "d"),
    ]
    assert heavy_on_cpu(nodes) == ["FusedConv 'd'"]
