"""`convoy train` through its real door: what it publishes, what it refuses, and why."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from convoy_service.artifacts import reader as bundles
from tests.conftest import Server, convoy

QUICK = ("--epochs", "12", "--min-accuracy", "0.8", "--min-recall", "0")
ANYTHING = ("--min-recall", "0", "--max-calibration-error", "1", "--min-accuracy")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with digits/1, trained for a few epochs."""
    models = tmp_path_factory.mktemp("models")
    done = convoy("train", *QUICK, "--models", models)
    assert done.returncode == 0, done.stderr
    assert "published" in done.stdout
    return models


def shapes(folder: Path, count: int) -> Path:
    """Photographs of three kinds of things, of many sizes and formats; the ground truth is known."""
    random = np.random.default_rng(7)
    for number in range(count):
        for kind in ("disc", "square", "cross"):
            width, height = random.integers(24, 70, 2).tolist()
            image = Image.new("RGB", (width, height), tuple(random.integers(0, 90, 3).tolist()))
            draw = ImageDraw.Draw(image)
            colour = tuple(random.integers(150, 256, 3).tolist())
            box = (width * 0.2, height * 0.2, width * 0.8, height * 0.8)
            if kind == "disc":
                draw.ellipse(box, fill=colour)
            elif kind == "square":
                draw.rectangle(box, fill=colour)
            else:
                draw.line((box[0], box[1], box[2], box[3]), fill=colour, width=5)
                draw.line((box[0], box[3], box[2], box[1]), fill=colour, width=5)
            suffix = ("png", "jpg", "bmp", "webp")[number % 4]
            if number % 8 == 1:
                image = image.convert("CMYK")
            file = folder / kind / f"{number:03d}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            image.save(file)
    return folder


def test_a_version_holds_all_that_proves_it(digits: Path) -> None:
    bundle = bundles.read(digits / "digits" / "1")
    manifest = bundle.manifest
    assert manifest.scores is not None
    assert manifest.scores.accuracy >= 0.8
    assert manifest.parity is not None
    assert manifest.parity.max_abs_difference <= 1e-5
    assert manifest.parity.batch_sizes == [1, 3, 64]
    assert manifest.parity.images == manifest.scores.images + 2
    assert manifest.training["settings"]["epochs"] == 12
    assert len(manifest.training["epochs"]) == 12
    assert sum(part["count"] for part in manifest.training["images"].values()) == 1797
    assert manifest.provenance["tensorflow"]


def test_the_exported_graph_has_no_transpose_and_a_free_batch_axis(digits: Path) -> None:
    import onnx

    graph = onnx.load_model_from_string(bundles.read(digits / "digits" / "1").onnx).graph
    assert "Transpose" not in {node.op_type for node in graph.node}
    pixels = graph.input[0].type.tensor_type
    assert pixels.elem_type == onnx.TensorProto.UINT8
    assert not pixels.shape.dim[0].HasField("dim_value")


def test_the_same_seed_trains_the_same_file(tmp_path: Path) -> None:
    made = set()
    for folder in ("one", "two"):
        done = convoy("train", "--epochs", "3", *ANYTHING, "0", "--models", tmp_path / folder)
        assert done.returncode == 0, done.stdout + done.stderr
        data = (tmp_path / folder / "digits" / "1" / "model.onnx").read_bytes()
        made.add(hashlib.sha256(data).hexdigest())
    assert len(made) == 1


def test_a_worse_candidate_is_not_published(digits: Path) -> None:
    done = convoy("train", "--epochs", "2", *ANYTHING, "0.99", "--models", digits)
    assert done.returncode == 1
    assert "nothing was published" in done.stderr
    # All checks that failed stand in the table, not the first alone.
    assert done.stdout.count("FAILED") == 3
    assert "not worse than version 1" in done.stdout
    assert bundles.versions(digits / "digits") == [1]


def test_a_loss_that_is_no_number_stops_training_and_names_the_step(tmp_path: Path) -> None:
    done = convoy("train", "--learning-rate", "1e30", "--models", tmp_path)
    assert done.returncode == 1
    assert "the loss is nan at step " in done.stderr
    assert "--learning-rate" in done.stderr
    assert not bundles.names(tmp_path)


def test_a_folder_of_mixed_images_is_trained_on_served_and_scored_over_the_wire(
    tmp_path: Path,
) -> None:
    folder, models = shapes(tmp_path / "shapes", 80), tmp_path / "models"
    done = convoy(
        "train", "--data", folder, "--models", models, "--image-size", "24", "--epochs", "15",
        "--network", "strong", "--filters", "16", "32", "--min-accuracy", "0.7",
        "--max-variant-loss", "0.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with Server(models=models).ready() as server:
        done = convoy(
            "evaluate", "--data", folder, "--models", models, "--server", server.target, "--json"
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["served"]["correct"] == found["offline"]["correct"]
        published = bundles.read(models / "shapes" / "1").manifest.scores
        assert published is not None
        assert found["offline"]["correct"] == published.correct
        one = convoy("classify", folder / "disc", "--server", server.target)
        assert one.returncode == 0, one.stderr
        lines = one.stdout.splitlines()
        assert len(lines) == 80
        assert sum("\tdisc " in line for line in lines) > 50
    with Server("--variant", "int8", models=models).ready() as server:
        done = convoy(
            "evaluate", "--data", folder, "--models", models, "--variant", "int8", "--server",
            server.target, "--json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["served"]["accuracy"] >= 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "nowhere"), "nowhere is no folder"),
        (("--data", "digits", "--recipe", "nothing"), "no recipe 'nothing'"),
        (("--name", "../up"), "can't name a model"),
    ],
)
def test_a_wrong_start_is_explained_before_anything_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = convoy("train", *arguments, "--models", tmp_path, cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unreadable_file_stops_training_by_name(tmp_path: Path) -> None:
    folder = shapes(tmp_path / "shapes", 10)
    (folder / "disc" / "003.webp").write_bytes(b"RIFF....WEBPVP8 ")
    done = convoy("train", "--data", folder, "--models", tmp_path / "models")
    assert done.returncode == 1
    assert "003.webp" in done.stderr
    assert "--skip-unreadable" in done.stderr
