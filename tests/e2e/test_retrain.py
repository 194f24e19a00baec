"""`convoy train --retrain` through its real door, as a scheduler runs it, one night after the other."""

import json
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from sklearn.datasets import load_digits

from convoy_service.artifacts import reader as bundles
from tests.conftest import convoy, environment

TIMEOUT_S = 120.0
RECIPE = """
epochs = 10
batch_size = 16
filters = [8, 16]
dense = 32
dropout = 0.2
shift = 0.5
variants = []
"""


def add_digits(folder: Path, first: int, last: int) -> None:
    """These of the built-in digits, as PNG files in a folder for each class."""
    bunch = load_digits()
    for number in range(first, last):
        file = folder / str(bunch.target[number]) / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((bunch.images[number] * 15).astype("uint8")).save(file)


def command(folder: Path, *arguments: str | Path, models: str = "models") -> list[str | Path]:
    return [
        "train", "--retrain", "--base", folder / models / "digits", "--data", folder / "images",
        "--cache", "off", "--checkpoints", folder / "checkpoints",
        "--summary", folder / "summary.json", "--textfile", folder / "digits.prom", *arguments,
    ]  # fmt: skip


def night(folder: Path, *arguments: str | Path, models: str = "models") -> dict[str, Any]:
    """Runs the job; its summary, which is as it ended and as the textfile says."""
    done = convoy(*command(folder, *arguments, models=models))
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert found["exit_code"] == done.returncode, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    (status,) = [
        sample.labels["status"]
        for family in text_string_to_metric_families((folder / "digits.prom").read_text())
        for sample in family.samples
        if sample.name == "convoy_train_last_run_status" and sample.value == 1
    ]
    assert status == found["status"]
    return {**found, "said": done.stdout}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and models/digits/1, which learned from them in one go."""
    folder = tmp_path_factory.mktemp("retrain")
    add_digits(folder / "images", 0, 600)
    (folder / "recipe.toml").write_text(RECIPE)
    first = night(folder, "--recipe", folder / "recipe.toml")
    assert (first["status"], first["exit_code"], first["version"]) == ("published", 0, 1)
    assert first["serving"] is None
    assert "its first training" in first["said"]
    return folder


def test_a_job_that_was_killed_goes_on_to_the_same_version(folder: Path) -> None:
    # Another model, but the same images and settings.
    recipe = "--recipe", folder / "recipe.toml"
    with subprocess.Popen(
        [sys.executable, "-m", "convoy", *command(folder, *recipe, models="others")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not list((folder / "checkpoints").glob("*/checkpoint.npz")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert bundles.versions(folder / "others" / "digits") == []
    again = night(folder, *recipe, models="others")
    assert (again["status"], again["version"]) == ("published", 1)
    assert "where a run was killed" in again["said"]
    assert again["sha256"] == bundles.read(folder / "models" / "digits" / "1").sha256


def test_each_night_does_what_there_is_to_do(folder: Path) -> None:
    model = folder / "models" / "digits"
    same = night(folder)
    assert (same["status"], same["exit_code"]) == ("nothing-new", 4)
    assert same["serving"]["version"] == 1

    worse = ("--epochs", "4")
    tried = night(folder, *worse)
    assert (tried["status"], tried["exit_code"]) == ("not-better", 3)
    assert tried["compared"]["difference"] < 0
    assert night(folder, *worse)["status"] == "nothing-new"
    assert bundles.versions(model) == [1]

    add_digits(folder / "images", 600, 1200)
    logs, runs = folder / "tensorboard", folder / "mlruns"
    # Where the first stopped, with twice the images.
    learned = night(
        folder, "--epochs", "12", "--warm-start", "--tensorboard", logs, "--mlflow-uri", runs
    )
    assert (learned["status"], learned["exit_code"], learned["version"]) == ("published", 0, 2)
    assert learned["data"]["train"]["count"] > 1.5 * same["data"]["train"]["count"]
    assert learned["compared"]["difference"] > 0
    version = bundles.read(model / "2")
    # The recipe of the first night is still in force, as far as nothing else was said.
    used = version.manifest.training["settings"]
    assert (used["epochs"], used["filters"], used["shift"]) == (12, [8, 16], 0.5)
    assert version.manifest.variants.keys() == {"fp32"}
    assert night(folder, "--epochs", "12", "--warm-start")["status"] == "nothing-new"

    (events,) = logs.glob("digits-*/*tfevents*")
    told = [record for record in records(events.read_bytes()) if b"scalars" in record]
    assert sum(b"validation_accuracy" in record for record in told) == 12
    (report,) = runs.glob("*/*/artifacts/report.html")
    assert report.read_bytes() == (version.folder / "report.html").read_bytes()
    losses = (report.parent.parent / "metrics" / "validation_loss").read_text().splitlines()
    assert len(losses) == 12


def records(data: bytes) -> list[bytes]:
    """Those of a file of TFRecords: length, its checksum, the record, its checksum."""
    found = []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(data[12 : 12 + length])
        data = data[16 + length :]
    return found
