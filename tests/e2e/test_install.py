"""A user's installation: the wheel and the locked packages for serving, without TensorFlow."""

import signal
import subprocess
import sys
import venv
from pathlib import Path

import pytest

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
