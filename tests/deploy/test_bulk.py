"""`convoy bulk` on a Ray cluster of two nodes, of which one is killed; and its driver before that.
tests/integration/test_bulk.py has what each machine does.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from convoy.bulk import job as jobs
from convoy.bulk.settings import BulkSettings
from convoy.bulk.work import Done
from convoy_service.artifacts import images
from convoy_service.artifacts import reader as bundles
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import ConvoyError
from tests.conftest import REPOSITORY, TIMEOUT_S, convoy, environment
from tests.deploy.conftest import DEPLOY, found
from tests.deploy.test_balancing import free_ports
from tests.integration.models import digits, flip_a_byte
from tests.integration.pictures import encode
from tests.unit.versions import write

ray = pytest.importorskip("ray", reason="there is no Ray: pip install 'convoy-serving[bulk]'")

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(600)]

IMAGES, PER_FILE = 20_000, 256
PARTS = -(-IMAGES // PER_FILE)
BROKEN = (0, 4711, IMAGES - 1)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head with one core, to which nodes can be added."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Whoever runs the tests may have a token in his home, which these need not.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        # Ray's workers have the lowest priority but four: on a busy machine they would not get on.
        patch.setenv("RAY_worker_niceness", "0")
        small = {"num_cpus": 1, "object_store_memory": 100 << 20, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=small)
        try:
            yield cluster
        finally:
            cluster.shutdown()  # type: ignore[no-untyped-call]  # it has no types


def make(folder: Path, count: int = IMAGES) -> list[bytes]:
    """Small images that all differ, of which three are broken; their bytes in the order of the paths."""
    random = np.random.default_rng(0)
    known = digits().pixels.repeat(3, 1).repeat(3, 2).astype(np.int16)
    files = []
    for number in range(count):
        noise = random.integers(-60, 60, known.shape[1:], np.int16)
        pixels = (known[number % len(known)] + noise).clip(0, 255).astype(np.uint8)
        data = encode(pixels, compress_level=1)
        files.append(data[: len(data) // 2] if number in BROKEN else data)
        path = folder / f"{number // 1000:02d}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[-1])
    return files


def parts(to: Path) -> set[Path]:
    return set(to.glob("part-*.parquet"))


def start(folder: Path, to: Path, address: str) -> "subprocess.Popen[str]":
    arguments = ["--models", str(REPOSITORY / "models"), "--model", "digits", "--json"]
    arguments += ["--images-per-file", str(PER_FILE), "--ray-address", address]
    return subprocess.Popen(
        [sys.executable, "-m", "convoy", "bulk", str(folder), str(to), *arguments],
        env=environment(),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def wait(process: "subprocess.Popen[str]", until: Callable[[], bool]) -> None:
    """Until it is so, or the process has ended."""
    deadline = time.monotonic() + 8 * TIMEOUT_S
    while not until():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_image_is_answered_once_though_the_driver_and_a_node_are_killed(
    cluster: Any, tmp_path: Path
) -> None:
    folder, to = tmp_path / "in", tmp_path / "out"
    files = make(folder)
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)

    with start(folder, to, cluster.address) as first:
        wait(first, lambda: len(parts(to)) >= PARTS // 5)
        first.kill()
    kept = {path: path.stat().st_mtime_ns for path in parts(to)}
    assert len(kept) < PARTS

    with start(folder, to, cluster.address) as second:
        wait(second, lambda: len(parts(to)) >= max(PARTS // 2, len(kept) + 1))
        cluster.remove_node(node, allow_graceful=False)
        assert len(parts(to)) < PARTS
        out, log = second.communicate(timeout=8 * TIMEOUT_S)
    assert second.returncode == 0, log
    assert "images are done already" in log
    # What was whole was not done again.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept

    rows = {row["key"]: row for row in parquet.read_table(to).to_pylist()}
    assert parquet.read_table(to).num_rows == IMAGES
    assert list(rows) == [f"{number // 1000:02d}/{number:05d}.png" for number in range(IMAGES)]
    assert tuple(n for n, row in enumerate(rows.values()) if row["error"]) == BROKEN

    bundle = bundles.read(REPOSITORY / "models" / "digits" / "1")
    good = [data for number, data in enumerate(files) if number not in BROKEN]
    pixels = np.stack([images.decode(data, bundle.manifest.pixels) for data in good])
    expected = Model.load(bundle, "cpu").run(pixels)
    answered = [row for row in rows.values() if row["error"] is None]
    labels = [bundle.manifest.labels[index] for index in expected.argmax(axis=1)]
    assert [row["label"] for row in answered] == labels
    given = np.array([row["probability"] for row in answered], np.float32)
    np.testing.assert_allclose(given, expected.max(axis=1), atol=1e-6)

    summary = json.loads(out)
    assert (summary["count"], summary["errors"]) == (IMAGES, len(BROKEN))
    assert summary["labels"] == {label: labels.count(label) for label in sorted(set(labels))}
    assert summary["unsure"] == sum(row["unsure"] for row in answered)
    # Once more: it is done, which needs no Ray.
    flags = ("--models", str(REPOSITORY / "models"), "--images-per-file", str(PER_FILE))
    third = convoy("bulk", folder, to, *flags)
    assert third.stdout.startswith(f"20,000 images, digits version 1: {to}\n"), third.stderr
    assert "\nerrors: 3\n  00/00000.png: the image is damaged" in third.stdout
    other = convoy("bulk", folder, to, *flags, "--probabilities")
    assert other.returncode == 1
    assert "was begun with probabilities False, not True: go on with these" in other.stderr


def test_the_pods_of_a_job_are_a_cluster(tmp_path: Path) -> None:
    """The script of deploy/kubernetes/overlays/bulk, in process namespaces in place of pods."""
    if os.geteuid() != 0:
        pytest.skip("namespaces of processes need root")
    make(tmp_path / "in", count=100)
    script = DEPLOY / "kubernetes" / "overlays" / "bulk" / "bulk.sh"
    [port] = free_ports(1)
    command: list[str | Path] = [
        *(found("unshare", "the package util-linux"), "--pid", "--fork", "--mount-proc"),
        *("--kill-child", "sh", script, tmp_path / "in", tmp_path / "out"),
        *("--models", REPOSITORY / "models", "--model=digits", "--actors=1", "--json"),
    ]
    given = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
        "HEAD": f"127.0.0.1:{port}",
        "IP": "127.0.0.1",
        "OBJECT_STORE": str(100 << 20),
    }
    with ExitStack() as held:
        pods = []
        # All answers are the second's, as the first lends no core.
        for index, cores in (("0", "0"), ("1", "1")):
            log = held.enter_context((tmp_path / index).open("wb"))
            pod = subprocess.Popen(
                command,
                env=environment(**given, INDEX=index, CORES=cores),
                stderr=log,
                stdout=subprocess.PIPE,
                text=True,
            )
            held.enter_context(pod)
            held.callback(pod.kill)
            pods.append(pod)
        out, _ = pods[0].communicate(timeout=8 * TIMEOUT_S)
        assert pods[0].returncode == 0, (tmp_path / "0").read_text()
    assert json.loads(out)["count"] == 100


def test_actors_are_as_many_as_there_is_room_for() -> None:
    from convoy.bulk.run import _Actors, _actors

    cpus = [{"CPU": 4.0}, {"CPU": 3.0}, {"memory": 1.0}]
    cards = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}]
    plain = BulkSettings()
    assert _actors(plain, cpus) == _Actors(7, "cpu", 1, 0)
    assert _actors(replace(plain, cpus=2), cpus) == _Actors(3, "cpu", 2, 0)
    assert _actors(replace(plain, actors=50), cpus) == _Actors(50, "cpu", 1, 0)
    assert _actors(plain, cards) == _Actors(4, "cuda", 4, 1)
    assert _actors(replace(plain, device="tensorrt", cpus=8), cards) == _Actors(3, "tensorrt", 8, 1)
    assert _actors(replace(plain, device="cpu"), cards) == _Actors(88, "cpu", 1, 0)
    with pytest.raises(ConvoyError, match="has 1 cores and a card"):
        _actors(replace(plain, device="cuda"), cpus)
    with pytest.raises(ConvoyError, match="has 9 cores"):
        _actors(replace(plain, cpus=9), cpus)


def test_the_version_is_the_one_that_would_serve(tmp_path: Path) -> None:
    from convoy.bulk.run import _read_version

    def version(policy: str = "", **settings: Any) -> int:
        (tmp_path / "pets" / "versions.toml").write_text(policy)
        return _read_version(replace(BulkSettings(models=tmp_path), **settings), None).version

    for _ in range(4):
        write(tmp_path / "pets")
    flip_a_byte(tmp_path / "pets" / "4" / "model.onnx")
    assert version() == 3  # 4 is broken
    assert version("skip = [3]") == 2
    assert version("serve = [1, 2]") == 2
    assert version("[labels]\nstable = 1") == 1
    assert version("[labels]\nstable = 1", version=2, model="pets") == 2
    for words, asked in (
        ("sha256", {"version": 4}),
        ("has no version 9; it has", {"version": 9}),
        ("has no graph in int8", {"variant": "int8"}),
        ("has no version", {"model": "cars"}),
    ):
        with pytest.raises(ConvoyError, match=words):
            version(**asked)
    write(tmp_path / "cars")
    with pytest.raises(ConvoyError, match="has cars, pets: name one with --model"):
        version()


def test_a_part_that_kills_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from convoy.bulk.run import _Actor, _Actors

    bundle = bundles.read(REPOSITORY / "models" / "digits" / "1")
    parquet.write_table(pa.table({"image": [encode(digits().pixels[0])]}), tmp_path / "in.parquet")
    job = jobs.begin(str(tmp_path / "in.parquet"), str(tmp_path / "out"), bundle, BulkSettings())
    context = SimpleNamespace(was_current_actor_reconstructed=False)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray, "get", lambda reference: reference)

    def ask(version: bundles.Bundle = bundle) -> Done:
        actor = _Actor(job, version, _Actors(1, "cpu", 1, 0), False)
        (done,) = zip(*actor({"part": np.array([0])}).values(), strict=True)
        return Done(*done)

    # Parts of an actor that has not died are not counted.
    assert [ask() for _ in range(9)] == [Done(1, 0)] * 9
    # One that was begun anew may have died with this part in hand, or an earlier one.
    context.was_current_actor_reconstructed = True
    assert [ask() for _ in range(4)] == [Done(1, 0)] * 4
    assert "part 0: 4 processes ended while they were at it" in ask().trouble
    job.forget()
    assert ask() == Done(1, 0)
    # A version that does not prove itself is told as it is.
    golden = replace(bundle.golden, probabilities=np.roll(bundle.golden.probabilities, 1, 1))
    assert "golden inputs are off" in ask(replace(bundle, golden=golden)).trouble
