"""The calls of the two services, on a server for the whole session."""

import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from convoy_protos.classifier_pb2_grpc import ImageClassifierStub
from convoy_protos.inference_pb2_grpc import GRPCInferenceServiceStub
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Golden
from convoy_service.engine.onnx_model import Model
from tests.conftest import REPOSITORY, SOURCES, TIMEOUT_S, Server, environment, installed
from tests.integration import models as small

LOCK = REPOSITORY / "locks" / "peers.txt"

Peer = Callable[..., Any]


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def classifier_on(channel: grpc.Channel) -> Any:
    """The calls of convoy.v1.ImageClassifier."""
    return ImageClassifierStub(channel)  # type: ignore[no-untyped-call]


def inference_on(channel: grpc.Channel) -> Any:
    """The calls of the Open Inference Protocol."""
    return GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]


class Gate:
    """Holds graphs: in servers that are started with its `variables`, their runs end when a test says so,
    however fast the machine is, and however long the test is kept waiting.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        ours = Path(__file__).parent / "held"
        self.variables = {
            "HELD": str(folder),
            "PYTHONPATH": os.pathsep.join((str(ours), SOURCES)),
            # Which service/convoy_service/__init__.py sets too late: ONNX Runtime is imported before.
            "ORT_DISABLE_TELEMETRY": "1",
            # What is held is taken for slow, and who would come behind it for too late.
            "CONVOY_MAX_WAIT_S": "3600",
        }

    @contextmanager
    def shut(self, *graphs: str) -> Iterator[Callable[[], None]]:
        """Of these graphs no run goes on before it is over, or what is given is called."""
        files = [(self._folder / graph).open("a") for graph in graphs]

        def release() -> None:
            for file in files:
                file.close()

        try:
            for file in files:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield release
        finally:
            release()


@pytest.fixture(scope="session")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Gate:
    return Gate(tmp_path_factory.mktemp("gate"))


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
def slow_server(slow_models: Path, gate: Gate) -> Iterator[Server]:
    """Serves `slow_models`, three requests at once and no more; `gate` holds it."""
    with Server("--max-in-flight", "3", models=slow_models, variables=gate.variables) as server:
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
