"""The calls of the two services, on a server for the whole session."""

import json
import shutil
import subprocess
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
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, environment, installed
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
    programs = installed(LOCK, "peers")

    def run(what: str, subject: str, folder: Path = Path(), **variables: str) -> Any:
        script = Path(__file__).with_name("peer.py")
        result = subprocess.run(
            [programs / "python", "-P", script, what, subject, folder],
            capture_output=True,
            env=environment(**{"PYTHONPATH": "", **variables}),
            text=True,
            timeout=4 * TIMEOUT_S,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run
