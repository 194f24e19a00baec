"""Candidates on a real server: what is alike is promoted, what is planted is rolled back."""

import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx.parser
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Golden
from convoy_service.engine.onnx_model import Model
from convoy_service.rollout.canary import position
from convoy_training.export.import_onnx import add
from convoy_training.settings import AddSettings
from tests.conftest import Server
from tests.integration.conftest import classifier_on

# The class is the row of the image that is the brightest. It multiplies matrices in ROUNDS, which
# takes most of its time where these are many; answers another class to images whose first pixel is
# below SWAP, and NaN where the class is NAN.
_GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
rows (uint8[N, 4, 4, 1] image) => (float[N, 4] shares) {
  values = Cast <to = 1> (image)
  axes = Constant <value_ints = [2, 3]> ()
  means = ReduceMean <keepdims = 0> (values, axes)

  shape = Constant <value_ints = [128, 128]> ()
  start = ConstantOfShape <value = float[1] {0.01}> (shape)
  rounds = Constant <value_int = ROUNDS> ()
  yes = Constant <value = bool {1}> ()
  end = Loop (rounds, yes, start) <body = work (int64 round, bool go_on, float[128, 128] x) => (bool goes_on, float[128, 128] y) {
    goes_on = Identity (go_on)
    squared = MatMul (x, x)
    y = Tanh (squared)
  }>
  mean = ReduceMean <keepdims = 0> (end)
  zero = Constant <value_float = 0.0> ()
  nothing = Mul (mean, zero)

  flat = Flatten <axis = 1> (values)
  first = Constant <value_ints = [0]> ()
  pixel = Gather <axis = 1> (flat, first)
  swap = Constant <value_float = SWAP> ()
  is_low = Less (pixel, swap)
  two = Constant <value_float = 2.0> ()
  one = Constant <value_float = 1.0> ()
  low = Cast <to = 1> (is_low)
  twice = Mul (low, two)
  sign = Sub (one, twice)
  turned = Mul (means, sign)

  best = ArgMax <axis = 1, keepdims = 1> (means)
  bad_class = Constant <value_int = NAN> ()
  is_bad = Equal (best, bad_class)
  bad = Cast <to = 1> (is_bad)
  below = Neg (bad)
  root = Sqrt (below)

  some = Add (turned, nothing)
  all = Add (some, root)
  tenth = Constant <value_float = 0.1> ()
  scores = Mul (all, tenth)
  shares = Softmax <axis = 1> (scores)
}
"""


def graph(rounds: int = 1, swap: float = 0.0, nan: int = -1) -> bytes:
    text = _GRAPH.replace("ROUNDS", str(rounds)).replace("SWAP", f"{swap:.1f}")
    return bytes(onnx.parser.parse_model(text.replace("NAN", str(nan))).SerializeToString())


# The stable version and the candidate, and how that is tried.
PLANTED = {
    "alike": (graph(), graph(), 'mode = "canary"\nshare = 0.3'),
    "slower": (graph(rounds=40), graph(rounds=80), 'mode = "shadow"\nmax_latency_ratio = 1.1'),
    "swapped": (graph(), graph(swap=25.6), 'mode = "canary"'),
    "nan": (graph(), graph(nan=2), 'mode = "shadow"'),
}
# After how many compared batches it is rolled back, at the most. That one is slower shows later where
# others disturb the clock.
WITHIN = {"slower": 400, "swapped": 1000, "nan": 200}
# A test has no time: it compares as much as it can.
LIMITS = "after = 150\nmax_error = 0.05\ncompare = 1.0"


def publish(folder: Path, planted: dict[str, tuple[bytes, bytes, str]], limits: str) -> None:
    """Each of the models in two versions, of which the second is a candidate."""
    file = folder / "rows.onnx"
    file.write_bytes(graph())
    bundle = add("rows", file, AddSettings(models=folder, max_batch_size=8))
    # Golden inputs of two classes, so that what fails in another is not found by the proof.
    pixels = np.zeros((2, 4, 4, 1), np.uint8)
    pixels[0, 0], pixels[1, 1] = 255, 255
    pixels[:, 0, 0] = 200
    golden = Golden(pixels, Model(graph()).run(pixels))
    for name, (stable, candidate, table) in planted.items():
        for onnx_file in (stable, candidate):
            bundles.write(folder / name, bundle.manifest, onnx_file, golden)
        policy = f"[labels]\nstable = 1\ncanary = 2\n[canary]\n{table}\n{limits}\n"
        (folder / name / "versions.toml").write_text(policy)
    shutil.rmtree(folder / "rows")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("canaries")
    publish(folder, PLANTED, LIMITS)
    return folder


def request(name: str, rng: np.random.Generator, key: str = "") -> pb.ClassifyRequest:
    data = rng.integers(0, 256, 16, np.uint8).tobytes()
    pixels = pb.Pixels(height=4, width=4, channels=1, data=data)
    return pb.ClassifyRequest(model=name, key=key, images=[pb.Image(pixels=pixels)])


@contextmanager
def load(server: Server) -> Iterator[None]:
    """Callers who ask one model after the other; none of them may be refused."""
    over = threading.Event()

    def call(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with server.channel() as channel:
            classify = classifier_on(channel).Classify
            while not over.is_set():
                for name in PLANTED:
                    classify(request(name, rng), timeout=30)

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(call, seed) for seed in range(4)]
        try:
            yield
        finally:
            over.set()
        for each in calls:
            each.result()


@pytest.mark.parametrize("processes", [(), ("--engines", "2")], ids=["alone", "two engines"])
def test_candidates_are_judged(published: Path, tmp_path: Path, processes: tuple[str, ...]) -> None:
    models = shutil.copytree(published, tmp_path / "models")
    with Server(*processes, models=models) as server:
        server.ready()
        with server.channel() as channel:
            classify = classifier_on(channel).Classify
            rng = np.random.default_rng(0)

            def version(name: str, key: str = "") -> int:
                return int(classify(request(name, rng, key), timeout=30).version)

            # A caller stays on one side, which everyone can tell beforehand.
            keys = [f"user-{n}" for n in range(30)]
            sides = {key: 2 if position(key, "alike/2") < 0.3 else 1 for key in keys}
            assert set(sides.values()) == {1, 2}
            for key in keys * 2:
                assert version("alike", key) == sides[key]
            assert [version("nan") for _ in range(30)] == [1] * 30

            with load(server):
                promoted = server.wait_for(r"alike/2 is promoted: (promote: .*)")
                rejected = {
                    name: server.wait_for(rf"{name}/2 is rejected: (roll back: .*)")
                    for name in WITHIN
                }
            assert {name: version(name) for name in PLANTED} == {
                "alike": 2, "slower": 1, "swapped": 1, "nan": 1,
            }  # fmt: skip
        assert "within all limits" in promoted[1]
        for name, limit in (
            ("slower", "latency"),
            ("swapped", "disagreement"),
            ("nan", "failures"),
        ):
            assert f"over the limit: {limit}" in rejected[name][1]
            batches = re.search(rf"; {limit} [^;]*, (\d+) batches\)", rejected[name][1])
            assert batches
            assert int(batches[1]) <= WITHIN[name]
        metrics = server.metrics()
        assert metrics['convoy_canary_decisions_total{model="alike",verdict="promote"}'] == 1
        for name in WITHIN:
            assert (
                metrics[f'convoy_canary_decisions_total{{model="{name}",verdict="roll back"}}'] == 1
            )
    # It holds for the next server too, and for others that share the folder.
    assert "stable = 2" in (models / "alike" / "versions.toml").read_text()
    for name in WITHIN:
        policy = (models / name / "versions.toml").read_text()
        assert "stable = 1" in policy
        assert "skip = [2]" in policy
