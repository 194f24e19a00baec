"""60,000 real JPEG files as a folder: train, publish, serve, score all test files over the wire."""

import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.conftest import Server, convoy

DATA = os.environ.get("CONVOY_TEST_DATA", "")


@pytest.mark.skipif(
    not DATA, reason="takes minutes: set CONVOY_TEST_DATA to a folder that holds cifar10.tar.gz"
)
@pytest.mark.timeout(1800)
def test_the_accuracy_over_the_wire_is_the_offline_one_on_ten_thousand_files(
    tmp_path: Path,
) -> None:
    folder, models = tmp_path / "cifar10", tmp_path / "models"
    with tarfile.open(Path(DATA) / "cifar10.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    done = convoy(
        "train", "--data", folder, "--recipe", "cifar10", "--models", models,
        "--epochs", "1", "--filters", "8", "16", "--min-accuracy", "0.3",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with Server(models=models).ready() as server:
        done = convoy(
            "evaluate", "--data", folder, "--models", models, "--server", server.target, "--json"
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["offline"]["images"] == 10_000
    assert found["served"]["correct"] == found["offline"]["correct"]
