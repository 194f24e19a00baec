"""A user's installation: the wheel and the locked packages for serving, without TensorFlow."""

import json
import re
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import REPOSITORY, environment


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with locks/cpu.txt and Convoy's wheel in it."""
    folder = tmp_path_factory.mktemp("installed")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, REPOSITORY], check=True
    )
    venv.create(folder / "venv")
    target = [*pip, "--python", folder / "venv" / "bin" / "python", "install"]
    locked = REPOSITORY / "locks" / "cpu.txt"
    subprocess.run([*target, "--require-hashes", "-r", locked], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*target, "--no-deps", wheel], check=True)
    return folder / "venv" / "bin"


def _environment() -> dict[str, str]:
    # The checkout must not be importable: what is tested is what was installed.
    return {k: v for k, v in environment().items() if k != "PYTHONPATH"}


def test_serving_needs_no_training_and_serves_the_shipped_model(
    installed: Path, tmp_path: Path
) -> None:
    packages = {path.name for path in installed.parent.glob("lib/python*/site-packages/*")}
    assert "onnxruntime" in packages
    assert packages.isdisjoint({"tensorflow", "keras", "onnx", "sklearn"})
    # ONNX Runtime keeps its telemetry there; it has none where it sees a CI.
    home = tmp_path / "home"
    home.mkdir()
    variables = {k: v for k, v in _environment().items() if k not in {"CI", "XDG_CACHE_HOME"}}
    with subprocess.Popen(
        [installed / "convoy", "serve", "--port", "0", "--metrics-port", "0", "--http-port", "0"],
        cwd=tmp_path,
        env={**variables, "HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        line = next((each for each in process.stderr if "ready in" in each), "")
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=30)
    assert "digits/1 on cpu" in line, rest
    assert "cifar10/1 on cpu" in line
    assert process.returncode == 0
    assert not list(home.iterdir())


# Packages that projects have beside their use of Convoy.
THEIRS = ("protos", "service", "training", "models", "tests", "benchmarks", "deploy", "docs")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project's folder, whose packages cannot be imported."""
    for name in THEIRS:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError(f'not ours: {__name__}')\n")
    return tmp_path


def test_only_names_that_begin_with_convoy_are_installed(installed: Path) -> None:
    (record,) = installed.parent.glob("lib/python*/site-packages/convoy_serving-*.dist-info/RECORD")
    # The command is ../../../bin/convoy.
    tops = {line.partition("/")[0] for line in record.read_text("utf-8").splitlines()}
    packages = {"convoy", "convoy_protos", "convoy_service", "convoy_training"}
    assert tops - {"..", record.parent.name} == packages


def test_server_command_and_client_work_beside_a_projects_own_packages(
    installed: Path, project: Path
) -> None:
    command: list[str | Path] = [installed / "python", "-m", "convoy"]
    topology = ("--acceptors", "1", "--engines", "1")
    ports = ("--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--http-port", "0")
    with subprocess.Popen(
        [*command, "serve", *topology, *ports, "--shutdown-delay-s", "0"],
        cwd=project,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if "ready in" in line:
                break
        try:
            port = re.search(r"gRPC on \S*?:(\d+)", "".join(lines))
            assert port, "".join(lines)
            target = f"127.0.0.1:{port[1]}"
            _uses_the_client(installed, project, target)
            health = subprocess.run(
                [*command, "health", "--server", target],
                cwd=project,
                env=_environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert (health.returncode, health.stdout) == (0, "SERVING\n"), health.stderr
        finally:
            process.send_signal(signal.SIGINT)
            _, rest = process.communicate(timeout=30)
    assert process.returncode == 0, rest


def _uses_the_client(installed: Path, project: Path, target: str) -> None:
    program = """
import json, sys
from convoy import Classifier
with Classifier(sys.argv[1], model="digits") as classifier:
    print(json.dumps(classifier.classify(sys.argv[2]).labels[0].name))
assert not {"protos", "service", "training"} & sys.modules.keys()
"""
    image = project / "white.png"
    Image.new("L", (8, 8), 255).save(image)
    # With -c as with -m, the working directory comes first among the folders to import from.
    seen = subprocess.run(
        [installed / "python", "-c", program, target, image],
        cwd=project,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert seen.returncode == 0, seen.stderr
    assert json.loads(seen.stdout) in set("0123456789")


def test_training_works_beside_a_projects_own_packages(installed: Path, project: Path) -> None:
    # TensorFlow is large: it is taken from the environment of the tests, where only a .pth file leads to
    # the checkout, and such files count in no folder of PYTHONPATH.
    variables = {**_environment(), "PYTHONPATH": sysconfig.get_path("purelib")}
    quick = ("--epochs", "12", "--min-accuracy", "0.8", "--min-recall", "0")
    done = subprocess.run(
        [installed / "python", "-m", "convoy", "train", *quick],
        cwd=project,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (project / "models" / "digits" / "1" / "manifest.json").is_file()


def test_training_says_what_to_install(installed: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [installed / "convoy", "train"],
        cwd=tmp_path,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "pip install 'convoy-serving[train]'" in done.stderr


def test_the_demo_runs_to_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "examples/demo.py"],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done in" in done.stdout
