"""Two machines that train together, as two processes: one result, the same as one machine's."""

import contextlib
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import REPOSITORY, environment

TIMEOUT_S = 240.0


def start(
    folder: Path, name: str, *arguments: str, kept: str = "kept", **variables: str
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.e2e.worker", folder / f"{name}.npz", folder / kept]
    return subprocess.Popen(
        [*map(str, command), *arguments],
        cwd=REPOSITORY,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def two(folder: Path, *dies: str, kept: str = "kept") -> list[subprocess.Popen[str]]:
    """Both workers of a cluster; the second one dies after an epoch if asked to, and looks for
    checkpoints in the folder `kept`.
    """
    with contextlib.ExitStack() as held:
        ports = []
        for _ in range(2):
            taken = held.enter_context(socket.socket())
            taken.bind(("127.0.0.1", 0))
            ports.append(taken.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    return [
        start(
            folder,
            f"worker{index}",
            *(dies if index else ()),
            kept=kept if index else "kept",
            TF_CONFIG=json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
        )
        for index in range(2)
    ]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, said


def weights(folder: Path, name: str) -> list[np.ndarray]:
    with np.load(folder / f"{name}.npz") as arrays:
        return [arrays[key] for key in sorted(arrays)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """The weights that one machine comes to with the whole batch."""
    folder = tmp_path_factory.mktemp("alone")
    status, said = ended(start(folder, "alone"))
    assert status == 0, said
    assert "chief True, replicas 1" in said
    return weights(folder, "alone")


def test_two_machines_come_to_the_weights_of_one_though_one_dies_in_between(
    alone: list[np.ndarray], tmp_path: Path
) -> None:
    (status, said), (killed, _) = [ended(worker) for worker in two(tmp_path, "2")]
    assert killed == -9
    assert status == 1, said
    assert "another machine of this training is gone" in said
    assert "start all of them again" in said

    results = [ended(worker) for worker in two(tmp_path)]
    assert [status for status, _ in results] == [0, 0], results
    assert all("resumed at step" in said for _, said in results)
    assert "chief True, replicas 2" in results[0][1]
    assert "chief False, replicas 2" in results[1][1]
    first, second = weights(tmp_path, "worker0"), weights(tmp_path, "worker1")
    for mine, theirs, whole in zip(first, second, alone, strict=True):
        assert np.array_equal(mine, theirs)
        np.testing.assert_allclose(mine, whole, atol=1e-5)

    # The checkpoint of the end is still there, but out of the second one's reach.
    results = [ended(worker) for worker in two(tmp_path, kept="elsewhere")]
    assert [status for status, _ in results] == [1, 1], results
    # One may notice first that the other has ended.
    assert any("one --checkpoints that all of them reach" in said for _, said in results)
