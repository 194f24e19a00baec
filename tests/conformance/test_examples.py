"""The programs of docs/clients do what they say."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from convoy_service.artifacts.reader import Golden
from tests.conformance.matrix import Unavailable, node_modules
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, environment, installed
from tests.integration import models as small
from tests.integration.pictures import encode

CLIENTS = REPOSITORY / "docs" / "clients"


@pytest.fixture(scope="module")
def digits() -> Golden:
    return small.digits()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, digits: Golden) -> list[Path]:
    """Files of digits, in the order of their values."""
    folder = tmp_path_factory.mktemp("images")
    files = [folder / f"{number}.png" for number in range(len(digits.pixels))]
    for file, pixels in zip(files, digits.pixels, strict=True):
        file.write_bytes(encode(pixels))
    return files


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> object:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(REPOSITORY / "models" / "digits", folder / "digits")
    with Server("--http-port", "0", models=folder) as server:
        yield server.ready()


def run(*command: str | Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        capture_output=True,
        check=False,
        env=environment(**variables),
        text=True,
        timeout=4 * TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(images: list[Path], digits: Golden) -> list[list[str]]:
    return [
        [str(file), str(number), f"{row[number]:.4f}"]
        for number, (file, row) in enumerate(zip(images, digits.probabilities, strict=True))
    ]


def same(printed: str, images: list[Path], digits: Golden) -> None:
    """Names, labels, and probabilities to four digits, of which the last may be rounded otherwise."""
    seen = [line.split() for line in printed.splitlines()]
    wanted = expected(images, digits)
    assert [each[:2] for each in seen] == [each[:2] for each in wanted]
    for got, right in zip(seen, wanted, strict=True):
        assert abs(float(got[2]) - float(right[2])) < 2e-4, (got, right)


def test_ours(server: Server, images: list[Path], digits: Golden) -> None:
    same(run(sys.executable, CLIENTS / "ours.py", server.target, "digits", *images), images, digits)


@pytest.mark.parametrize("program", ["triton_grpc.py", "triton_http.py"])
def test_tritonclient(server: Server, images: list[Path], digits: Golden, program: str) -> None:
    python = installed(REPOSITORY / "locks" / "peers.txt", "peers") / "python"
    where = server.target if "grpc" in program else f"127.0.0.1:{server.http_port}"
    same(run(python, CLIENTS / program, where, "digits", *images, PYTHONPATH=""), images, digits)


@pytest.mark.deploy
def test_kserve(server: Server, images: list[Path], digits: Golden) -> None:
    python = installed(REPOSITORY / "locks" / "kserve.txt", "kserve") / "python"
    program = CLIENTS / "kserve_grpc.py"
    same(run(python, program, server.target, "digits", *images, PYTHONPATH=""), images, digits)


@pytest.mark.parametrize("program", ["node_proto.cjs", "node_reflection.cjs"])
def test_node(server: Server, images: list[Path], digits: Golden, program: str) -> None:
    try:
        modules = node_modules()
    except Unavailable as reason:
        pytest.skip(str(reason))
    printed = run(
        "node",
        CLIENTS / program,
        server.target,
        "digits",
        *images,
        NODE_PATH=str(modules),
        PROTO=str(REPOSITORY / "protos" / "classifier.proto"),
    )
    same(printed, images, digits)


def test_curl(server: Server, images: list[Path]) -> None:
    if not shutil.which("curl"):
        pytest.skip("there is no curl here")
    printed = run(CLIENTS / "curl.sh", f"127.0.0.1:{server.http_port}", "digits", images[3])
    one, two, said, inferred = map(json.loads, printed.splitlines())
    best, _ = one["results"][0]["labels"]
    assert best["name"] == "3"
    assert [each["labels"][0]["name"] for each in two["results"]] == ["3", "3"]
    assert said["inputs"][0]["name"] == "pixels"
    (text,) = inferred["outputs"][0]["data"]
    assert text.endswith(":3:3")


def test_reflection(server: Server) -> None:
    listed = run(sys.executable, CLIENTS / "reflection.py", server.target).splitlines()
    assert "convoy.v1.ImageClassifier" in listed
    assert "  ModelStreamInfer(stream inference.ModelInferRequest)" in listed
    call = ("inference.GRPCInferenceService/ModelMetadata", '{"name": "digits"}')
    printed = json.loads(run(sys.executable, CLIENTS / "reflection.py", server.target, *call))
    assert printed["inputs"][0]["name"] == "pixels"
