"""Which device a model runs on, and that no other is taken for it. Cards are played by a CPU session."""

import logging
import threading
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from prometheus_client import generate_latest

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Scores, Variant
from convoy_service.engine import session as device
from convoy_service.engine.batcher import Batcher
from convoy_service.engine.cpu import split
from convoy_service.engine.onnx_model import Model
from convoy_service.engine.session import Card, Device, buckets, heavy_on_cpu, open_session
from convoy_service.errors import BrokenVersion
from convoy_service.lifecycle.manager import Alone, Director
from convoy_service.registry.registry import Repository, runs_here
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics, registry
from tests.integration.models import add_colours, add_variants, colours_of
from tests.unit.graphs import classifier

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
REAL = ort.InferenceSession

opened: list["Session"] = []


def number_of(options: Any) -> str:
    return str(options and options.get_run_config_entry("gpu_graph_id"))


class Session:
    """A session on the CPU that says it ran elsewhere."""

    def __init__(self, onnx: bytes, options: Any, providers: list[Any], *, said: str) -> None:
        self._real = REAL(onnx, options, providers=[CPU])
        self.options, self.providers, self._said = options, providers, said
        # Of runs with options: the graph's number, the thread, what was bound.
        self.graphs: list[tuple[str, int, int]] = []
        self.captures = True
        opened.append(self)

    def get_providers(self) -> list[str]:
        return [self._said, CPU]

    def run(self, names: Any, inputs: Any, options: Any = None) -> Any:
        self.graphs.append((number_of(options), threading.get_ident(), 0))
        return self._real.run(names, inputs)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.graphs.append((number_of(options), threading.get_ident(), id(binding)))
        if not self.captures and sum(binding_ == id(binding) for *_, binding_ in self.graphs) == 3:
            raise RuntimeError("operation not permitted when stream is capturing")
        self._real.run_with_iobinding(binding)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`card(said)`: ONNX Runtime offers CUDA, and its sessions say that they run on `said`."""

    def offer(said: str, nodes: list[tuple[str, str, str]] | None = None) -> None:
        opened.clear()
        monkeypatch.setattr(ort, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
        monkeypatch.setattr(
            "convoy_service.engine.onnx_model.card_value",
            lambda device, shape, kind: ort.OrtValue.ortvalue_from_shape_and_type(shape, kind),
        )
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
        Director(tmp_path, Alone(repository), metrics).settle()
    [entry] = repository.entries()
    words = "runs on the CPU, not on CUDA: device cuda:0 is not to be had"
    assert words in caplog.text
    assert words in entry.reason
    assert entry.served is not None
    assert entry.served.device == "cpu"
    told = generate_latest(registry(metrics.snapshot)).decode()
    assert f'convoy_model_fallback{{model="{bundle.name}"}} 1.0' in told
    repository.close()


def test_a_process_takes_the_variant_that_others_decided(tmp_path: Path) -> None:
    add_variants(tmp_path, "both")
    settings, budget, metrics = Settings(variant="fastest"), split(1, 1, 0, 1, 1), Metrics()
    for variant in ("fp32", "int8"):
        make = runs_here(settings, budget, metrics, lambda bug: None)
        repository = Repository(tmp_path, settings, budget, metrics, make)
        assert repository.load("both", 1, variant=variant).variant == variant
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
    opened: Any = open_session(classifier(), Device("cuda", 2), 1, Card(1500))
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


# CUDA graphs.


def graph_options(session: Session) -> list[str | None]:
    return [options.get("enable_cuda_graph") for _, options in session.providers]


def test_each_batch_size_is_one_graph_in_one_place_on_one_thread(card: Any, tmp_path: Path) -> None:
    card(CUDA, [])
    bundle = add_colours(tmp_path)
    model = Model.load(bundle, "cuda", 1, card=Card(graphs=True))
    [session] = opened
    assert graph_options(session) == ["1"]
    assert (model.sizes, model.lanes) == ((1, 2, 4, 8), 1)
    loaded = len(session.graphs)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), np.uint8)
    for size in (1, 2, 4, 8):
        buffer = model.buffer(size)
        assert buffer is not None
        buffer[...] = pixels[:size]
        np.testing.assert_allclose(model.run(buffer), colours_of(pixels[:size]), atol=1e-6)
    np.testing.assert_allclose(model.run(pixels[:3]), colours_of(pixels[:3]), atol=1e-6)
    numbers = [number for number, *_ in session.graphs]
    # Three sizes are not bound: nothing is recorded of what lies elsewhere each time.
    assert numbers[loaded:] == ["1", "2", "4", "8", "-1"]
    assert all(numbers[:loaded].count(size) >= 5 for size in ("1", "2", "4", "8"))
    threads = {thread for number, thread, _ in session.graphs if number != "-1"}
    assert threads.isdisjoint({threading.get_ident()})
    assert len(threads) == 1
    places = {(number, binding) for number, _, binding in session.graphs if number != "-1"}
    assert len(places) == 4


def test_what_cannot_be_recorded_runs_without_graphs(
    card: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(CUDA, [])
    bundle = add_colours(tmp_path)
    made = Session.__init__

    def init(self: Session, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        self.captures = graph_options(self) != ["1"]

    monkeypatch.setattr(Session, "__init__", init)
    model = Model.load(bundle, "cuda", 1, card=Card(graphs=True))
    assert [graph_options(session) for session in opened] == [["1"], *[[None]] * 4]
    assert "colours/1 without CUDA graphs: " in caplog.text
    assert "when stream is capturing" in caplog.text
    assert model.lanes == 2
    assert {number for session in opened[1:] for number, *_ in session.graphs} == {"None"}


def test_without_graphs_a_card_has_its_next_batch_at_hand(card: Any, tmp_path: Path) -> None:
    card(CUDA, [])
    add_colours(tmp_path)
    settings, budget, metrics = Settings(device="cuda"), split(1, 1, 0, 1, 1), Metrics()
    made = runs_here(settings, budget, metrics, lambda bug: None)(
        bundles.read(tmp_path / "colours" / "1")
    )
    assert isinstance(made.batcher, Batcher)
    assert made.batcher.lanes == 2
    answered = threading.Semaphore(0)
    answers: dict[int, Any] = {}
    pixels = np.random.default_rng(0).integers(0, 256, (400, 4, 4, 3), np.uint8)

    def done(n: int, answer: Any) -> None:
        answers[n] = answer
        answered.release()

    warm = [list(session.graphs) for session in opened]
    # Each size has a session, which sees no other.
    assert len(warm) == 4
    made.batcher.start()
    stops = dict(pairwise([0, *np.cumsum([1 + n % 9 for n in range(70)]).tolist()]))
    for number, (start, stop) in enumerate(stops.items()):
        made.batcher.submit(pixels[start:stop], partial(done, start))
        # The first ones run alone, those after them together.
        assert number >= 9 or answered.acquire(timeout=30)
    made.batcher.close()
    for start, stop in stops.items():
        expected = colours_of(pixels[start:stop])
        np.testing.assert_allclose(answers[start].outputs, expected, atol=1e-6)
    # Whatever came, it ran in memory that had been run in before the version was ready.
    for session, before in zip(opened, warm, strict=True):
        ran = {binding for *_, binding in session.graphs[len(before) :]}
        assert ran
        assert ran <= {binding for *_, binding in before}
        assert len({binding for *_, binding in session.graphs}) == 2


def test_deterministic_on_a_card_is_one_size_that_is_warm(card: Any, tmp_path: Path) -> None:
    card(CUDA, [])
    model = Model.load(add_colours(tmp_path), "cuda", 1, deterministic=True)
    assert (model.sizes, model.lanes) == ((8,), 2)
    [session] = opened
    assert len({binding for *_, binding in session.graphs}) == 2


# TensorRT.


def test_tensorrt_keeps_its_engines_for_these_weights_and_this_release(
    card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card(TENSORRT, [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    largest = Card(variant="fp16", input="pixels", largest=(8, 4, 5, 3))
    for added in (0.0, 0.5):
        open_session(classifier(added=added), Device("tensorrt", 1), 1, largest)
    open_session(classifier(), Device("tensorrt"), 1, Card(variant="int8"))
    made = [dict(session.providers)[TENSORRT] for session in opened]
    assert [options["device_id"] for options in made] == ["1", "1", "0"]
    folders = [options["trt_engine_cache_path"] for options in made]
    assert [options["trt_timing_cache_path"] for options in made] == folders
    assert folders[0] == folders[2] != folders[1]
    for folder in folders:
        assert Path(folder).is_dir()
        assert Path(folder).is_relative_to(tmp_path / "convoy" / "tensorrt")
        assert ort.__version__ in folder
    assert made[0]["trt_fp16_enable"] == "1"
    assert made[0]["trt_profile_min_shapes"] == "pixels:1x4x5x3"
    assert made[0]["trt_profile_max_shapes"] == made[0]["trt_profile_opt_shapes"]
    assert made[0]["trt_profile_max_shapes"] == "pixels:8x4x5x3"
    assert made[2]["trt_int8_enable"] == "1"
    assert "trt_fp16_enable" not in made[2]
    assert not any("profile" in name for name in made[2])


def test_without_a_place_for_engines_tensorrt_runs_all_the_same(
    card: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    card(TENSORRT, [])
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    open_session(classifier(), Device("tensorrt"), 1)
    assert not any("cache" in name for name in dict(opened[0].providers)[TENSORRT])
    assert "engines are built anew at each start" in caplog.text
