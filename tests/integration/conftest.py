"""The calls of the two services, on a server for the whole session."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.classifier_pb2_grpc import ImageClassifierStub
from protos.inference_pb2_grpc import GRPCInferenceServiceStub
from service import bundle as bundles
from service.bundle import Golden
from service.model import Model
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, environment
from tests.integration import models as small

LOCK = REPOSITORY / "locks" / "peers.txt"

Peer = Callable[..., Any]


def classifier_on(channel: grpc.Channel) -> Any:
    """The calls of convoy.v1.ImageClassifier."""
    return ImageClassifierStub(channel)  # type: ignore[no-untyped-call]


def inference_on(channel: grpc.Channel) -> Any:
    """The calls of the Open Inference Protocol."""
    return GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture
def classifier(channel: grpc.Channel) -> Any:
    return classifier_on(channel)


@pytest.fixture
def inference(channel: grpc.Channel) -> Any:
    return inference_on(channel)


@pytest.fixture(scope="session")
def digits() -> Golden:
    return small.digits()


@pytest.fixture(scope="session")
def offline() -> Model:
    """The shipped digits, run by ONNX Runtime in this process."""
    return Model.load(bundles.read(REPOSITORY / "models" / "digits" / "1"))


@pytest.fixture(scope="session")
def slow_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped digits, and `slow`."""
    folder = tmp_path_factory.mktemp("slow")
    shutil.copytree(REPOSITORY / "models" / "digits", folder / "digits")
    small.add_slow(folder)
    return folder


@pytest.fixture(scope="session")
def slow_server(slow_models: Path) -> Iterator[Server]:
    """Serves `slow_models`, three requests at once and no more."""
    with Server("--max-in-flight", "3", models=slow_models) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def peer() -> Peer:
    """Runs a function of peer.py in an environment that is made once for each state of the lock."""
    key = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    made = REPOSITORY / ".cache" / f"peers-{key}"
    if not made.exists():
        making = made.with_suffix(f".{os.getpid()}")
        python = making / "bin" / "python"
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "-q", "-p", sys.executable, making], check=True)
        subprocess.run(
            [*uv, "pip", "install", "-q", "-p", python, "--require-hashes", "-r", LOCK], check=True
        )
        try:
            making.rename(made)
        except OSError:  # another run was faster
            shutil.rmtree(making)

    def run(what: str, subject: str, folder: Path = Path(), **variables: str) -> Any:
        script = Path(__file__).with_name("peer.py")
        result = subprocess.run(
            [made / "bin" / "python", "-P", script, what, subject, folder],
            capture_output=True,
            env=environment(**{"PYTHONPATH": "", **variables}),
            text=True,
            timeout=4 * TIMEOUT_S,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run
