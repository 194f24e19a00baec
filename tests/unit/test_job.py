"""`convoy train` as a job: how it ends, what it leaves behind, and that nothing is done twice."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from convoy.cli.app import app
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Target
from convoy_service.artifacts.reader import Bundle, Golden, Manifest, Scores, Variant
from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset, Split
from convoy_training.evaluation.scores import Evaluation, evaluate, mcnemar
from convoy_training.pipeline import job, trackers
from convoy_training.pipeline.run import Hooks
from convoy_training.pipeline.trackers import MLflow
from convoy_training.release import publish
from convoy_training.release.publish import Check, Findings, GateClosed, Verdict
from convoy_training.settings import RECIPES, TrainingSettings
from tests.conftest import environment
from tests.unit.graphs import classifier, logits, softmax

SHAPE, CLASSES = (4, 5, 3), ("a", "b", "c")
TEST_IMAGES, RIGHT = 40, 36


def split(seed: int, count: int = TEST_IMAGES) -> Split:
    """Images of which `classifier` has 36 in 40 right."""
    inputs = np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)
    labels = logits(inputs).argmax(axis=1)
    labels[RIGHT:] = (labels[RIGHT:] + 1) % 3
    return Split(inputs, labels)


def dataset(seed: int = 0) -> Dataset:
    """Only the training images depend on the seed."""
    return Dataset("pets", CLASSES, Target(*SHAPE), split(seed + 2, 50), split(1), split(0))


@dataclass(frozen=True)
class Epoch:
    """As `convoy_training.fitting.loop` has it, without TensorFlow."""

    epoch: int
    loss: float = 0.5
    accuracy: float = 0.75
    validation_accuracy: float = 0.7
    validation_loss: float = 0.6
    learning_rate: float = 0.001
    seconds: float = 2.0
    waited_s: float = 0.1


@cache
def evaluation(correct: int) -> Evaluation:
    """Of answers that have the first so many right, for the test images of `dataset`."""
    labels = split(0).labels
    given = np.full((TEST_IMAGES, 3), 0.05, np.float32)
    right = np.arange(TEST_IMAGES) < correct
    given[np.arange(TEST_IMAGES), np.where(right, labels, (labels + 1) % 3)] = 0.9
    return evaluate(given, labels, CLASSES)


@dataclass
class Line:
    """Stands for `convoy_training.pipeline.run.run`: all of it but the training, whose result has so many right."""

    data: Dataset = field(default_factory=dataset)
    correct: int = 38
    raises: Callable[[], None] = lambda: None
    chief: bool = True
    checks: tuple[Check, ...] = (Check("accuracy", "0.95", "at least 0.9", passed=True),)
    trained: int = 0

    def __call__(self, settings: TrainingSettings, console: Console, hooks: Hooks) -> Bundle | None:
        hooks.on_data(self.data)
        self.trained += 1
        for epoch in range(1, settings.epochs + 1):
            hooks.on_epoch(Epoch(epoch))  # type: ignore[arg-type]
            self.raises()
        if not self.chief:
            return None
        folder = settings.models / self.data.name
        right = np.arange(TEST_IMAGES) < self.correct
        findings = Findings(
            [],
            {"fp32": 1000},
            evaluation=evaluation(self.correct),
            right=right,
            variants={
                "fp32": Variant(Scores(0.95, 38, 40, 0.2), 1.0, 1000.0, 1.0, "cpu"),
                "int8": Variant(Scores(0.925, 37, 40, 0.2), 0.99, 2000.0, 2.0, "cpu"),
            },
        )
        serving = publish.serving_version(folder, self.data)
        compared = mcnemar(right, serving.right) if serving and serving.right is not None else None
        better = compared is None or compared.difference > 0
        verdict = Verdict(list(self.checks), better, findings.variants, compared)
        hooks.on_judged(findings, verdict)
        verdict.admit(retrain=settings.retrain)
        kept = {k: v for k, v in asdict(settings).items() if not isinstance(v, Path)}
        images = {
            name: {"sha256": part.fingerprint(), "count": len(part)}
            for name, part in (
                ("train", self.data.train), ("validation", self.data.validation), ("test", self.data.test),
            )
        }  # fmt: skip
        return version(folder, {"settings": json.loads(json.dumps(kept)), "images": images})


def version(folder: Path, story: dict[str, Any], report: str = "<h1>pets</h1>") -> Bundle:
    pixels = np.zeros((1, *SHAPE), np.uint8)
    golden = Golden(pixels, softmax(logits(pixels)).astype(np.float32))
    target = Target(*SHAPE, "crop")
    manifest = Manifest("pixels", "probabilities", target, list(CLASSES), 8, "", training=story)
    return bundles.write(folder, manifest, classifier(SHAPE), golden, report=report)


@pytest.fixture
def settings(tmp_path: Path) -> TrainingSettings:
    models = tmp_path / "models"
    return TrainingSettings(
        data="x",
        name="pets",
        models=models,
        epochs=2,
        retrain=True,
        base=models / "pets",
        summary=tmp_path / "out" / "summary.json",
        textfile=tmp_path / "out" / "pets.prom",
    )


def train(settings: TrainingSettings, line: Line) -> int:
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        return job.train(settings, Console(file=nowhere), line)


def summary(settings: TrainingSettings) -> dict[str, Any]:
    assert settings.summary
    found: dict[str, Any] = json.loads(settings.summary.read_text(encoding="utf-8"))
    return found


def metrics(settings: TrainingSettings) -> dict[str, float]:
    """By name, and by what other labels than the model say."""
    assert settings.textfile
    found = {}
    for family in text_string_to_metric_families(settings.textfile.read_text(encoding="utf-8")):
        for sample in family.samples:
            assert sample.labels["model"] == "pets"
            rest = [value for name, value in sample.labels.items() if name != "model"]
            found[" ".join([sample.name.removeprefix("convoy_train_"), *rest])] = sample.value
    return found


# How it ends.


def test_the_first_training_is_published_and_told(settings: TrainingSettings) -> None:
    line = Line()
    began = time.time()
    assert train(settings, line) == 0
    folder = settings.models / "pets" / "1"
    told = summary(settings)
    interval = told["accuracy"]["interval"]
    assert 0 < interval["low"] < 0.95 < interval["high"] < 1
    assert told == {
        "status": "published",
        "exit_code": 0,
        "error": None,
        "model": "pets",
        "version": 1,
        "folder": str(folder),
        "sha256": bundles.read(folder).sha256,
        "accuracy": {"value": 0.95, "interval": interval, "correct": 38, "images": 40},
        "serving": None,
        "compared": None,
        "gate": [asdict(line.checks[0])],
        "data": {
            "train": {"count": 50, "sha256": line.data.train.fingerprint()},
            "validation": {"count": 40, "sha256": line.data.validation.fingerprint()},
            "test": {"count": 40, "sha256": line.data.test.fingerprint()},
        },
        "started": told["started"],
        "ended": told["ended"],
        "seconds": told["seconds"],
    }
    assert 0 < told["seconds"] <= time.time() - began
    shown = metrics(settings)
    assert began <= shown.pop("last_run_timestamp_seconds") <= time.time()
    assert began <= shown.pop("last_success_timestamp_seconds") <= time.time()
    assert shown == {
        "last_run_status published": 1,
        "last_run_status not-better": 0,
        "last_run_status nothing-new": 0,
        "last_run_status failed": 0,
        "last_run_duration_seconds": pytest.approx(told["seconds"]),
        "accuracy_ratio": 0.95,
        "published_version": 1,
        "images train": 50,
        "images validation": 40,
        "images test": 40,
    }


def test_the_same_data_is_trained_on_once(settings: TrainingSettings) -> None:
    line = Line()
    assert [train(settings, line) for _ in range(3)] == [0, 4, 4]
    assert line.trained == 1
    told = summary(settings)
    assert (told["status"], told["exit_code"], told["version"]) == ("nothing-new", 4, None)
    assert told["serving"]["version"] == 1
    assert told["data"]["train"]["count"] == 50
    shown = metrics(settings)
    assert shown["last_run_status nothing-new"] == 1
    assert shown["published_version"] == 1
    assert "accuracy_ratio" not in shown


def test_new_data_is_trained_on(settings: TrainingSettings) -> None:
    assert train(settings, Line()) == 0
    assert train(settings, Line(dataset(1), correct=37)) == 0
    told = summary(settings)
    assert told["version"] == 2
    # Version 1 as the test knows it has 36 of 40, the first ones.
    assert told["serving"]["accuracy"] == 0.9
    assert told["compared"]["only_candidate"] == 1


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"epochs": 3}, 0),
        ({"dropout": 0.25}, 0),
        ({"seed": 1}, 0),
        ({"min_accuracy": 0.1}, 4),
        ({"warm_start": True}, 4),
        ({"data": "elsewhere"}, 4),
        ({"image_size": 4}, 4),
        ({"checkpoints": Path("x")}, 4),
    ],
)
def test_other_settings_are_a_reason_to_train_where_they_decide_what_is_trained(
    settings: TrainingSettings, changes: dict[str, Any], status: int
) -> None:
    assert train(settings, Line()) == 0
    assert train(replace(settings, **changes), Line()) == status


def test_other_names_of_the_classes_are_a_reason_to_train(settings: TrainingSettings) -> None:
    assert train(settings, Line()) == 0
    line = Line(replace(dataset(), classes=("a", "b", "d")))
    assert train(settings, line) == 0
    assert line.trained == 1


def test_what_an_older_convoy_did_not_know_is_as_by_default(settings: TrainingSettings) -> None:
    assert train(settings, Line()) == 0
    story = bundles.read(settings.models / "pets" / "1").manifest.training
    del story["settings"]["mirror"]
    version(settings.models / "pets", story)
    assert train(settings, Line()) == 4
    assert train(replace(settings, mirror=True), Line()) == 0


def test_a_model_from_elsewhere_is_no_reason_not_to_train(settings: TrainingSettings) -> None:
    version(settings.models / "pets", {})
    assert train(settings, Line()) == 0
    assert summary(settings)["serving"]["accuracy"] == 0.9


def test_what_was_not_better_is_not_tried_again(settings: TrainingSettings) -> None:
    assert train(settings, Line()) == 0
    worse = Line(dataset(1), correct=36)
    assert [train(settings, worse) for _ in range(2)] == [3, 4]
    assert worse.trained == 1
    assert bundles.versions(settings.models / "pets") == [1]
    # A gate that asks for less may let it through.
    assert train(replace(settings, max_slowdown=3), worse) == 3
    assert train(settings, Line(dataset(2), correct=36)) == 3
    # All that was tried is remembered, not the last alone.
    assert [train(settings, worse), train(replace(settings, max_slowdown=3), worse)] == [4, 4]


def test_not_better_is_told(settings: TrainingSettings) -> None:
    assert train(settings, Line()) == 0
    assert train(settings, Line(dataset(1), correct=36)) == 3
    told = summary(settings)
    assert (told["status"], told["exit_code"], told["version"]) == ("not-better", 3, None)
    assert told["accuracy"]["correct"] == 36
    assert told["serving"]["version"] == 1
    assert told["compared"]["difference"] == 0
    assert told["error"] is None
    assert metrics(settings)["last_run_status not-better"] == 1


def test_against_another_version_it_is_tried_again(settings: TrainingSettings) -> None:
    folder = settings.models / "pets"
    assert train(settings, Line()) == 0
    worse = Line(dataset(1), correct=36)
    assert train(settings, worse) == 3
    target, pixels = Target(*SHAPE), np.zeros((1, *SHAPE), np.uint8)
    golden = Golden(pixels, softmax(logits(pixels, 3, 0.03)).astype(np.float32))
    manifest = Manifest("pixels", "probabilities", target, list(CLASSES), 8, "")
    bundles.write(folder, manifest, classifier(SHAPE, spread=0.03), golden)
    assert train(settings, worse) == 3
    assert worse.trained == 2
    # Of what was tried against version 1 nothing is kept.
    assert len(json.loads((folder / job.MEMORY).read_text())) == 1


@pytest.mark.parametrize("text", ["", "{", "[3]", "{}", "null"])
def test_a_memory_that_makes_no_sense_is_forgotten(
    settings: TrainingSettings, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert train(settings, Line()) == 0
    memory = settings.models / "pets" / job.MEMORY
    memory.write_text(text)
    assert [train(settings, Line(dataset(1), correct=36)) for _ in range(2)] == [3, 4]
    assert ("is forgotten" in caplog.text) == (text in {"", "{"})


def test_a_closed_gate_is_a_failure_and_tried_again(settings: TrainingSettings) -> None:
    closed = Line(checks=(Check("parity", "0.5", "at most 1e-4", passed=False),))
    for _ in range(2):
        with pytest.raises(GateClosed):
            train(settings, closed)
    assert closed.trained == 2
    told = summary(settings)
    assert (told["status"], told["exit_code"]) == ("failed", 1)
    assert "parity" in told["error"]
    assert told["gate"][0]["name"] == "parity"
    assert told["accuracy"]["correct"] == 38


def test_a_failure_is_told_and_the_last_success_stays(settings: TrainingSettings) -> None:
    assert train(settings, Line()) == 0
    before = metrics(settings)

    def fail() -> None:
        raise ConvoyError("the disk is full: make room")

    for _ in range(2):
        with pytest.raises(ConvoyError, match="the disk is full"):
            train(settings, Line(dataset(1), raises=fail))
        told, shown = summary(settings), metrics(settings)
        assert (told["status"], told["exit_code"]) == ("failed", 1)
        assert told["error"] == "the disk is full: make room"
        assert shown["last_run_status failed"] == 1
        assert shown["last_run_status published"] == 0
        success = "last_success_timestamp_seconds"
        assert shown[success] == before[success] < shown["last_run_timestamp_seconds"]


def test_a_bug_is_told_and_not_hidden(settings: TrainingSettings) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(settings, Line(raises=fail))
    assert summary(settings)["error"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    "text", ["", "no metrics\x00 {", "convoy_train_last_success_timestamp_seconds 3\n"]
)
def test_a_textfile_that_makes_no_sense_is_written_anew(
    settings: TrainingSettings, text: str
) -> None:
    def fail() -> None:
        raise ConvoyError("no")

    assert settings.textfile
    settings.textfile.parent.mkdir()
    settings.textfile.write_text(text)
    with pytest.raises(ConvoyError):
        train(settings, Line(raises=fail))
    assert "last_success_timestamp_seconds" not in metrics(settings)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_job_that_is_ended_tells_so(
    settings: TrainingSettings, number: signal.Signals, status: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    # Where the tests run in the background, a shell may have it ignored.
    kept = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            train(settings, Line(raises=lambda: signal.raise_signal(number)))
    finally:
        signal.signal(signal.SIGINT, kept)
    told = summary(settings)
    assert (told["status"], told["exit_code"]) == ("failed", status)
    assert signal.getsignal(signal.SIGTERM) is before


def test_records_that_can_not_be_written_do_not_hide_how_it_ended(
    settings: TrainingSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    broken = replace(
        settings, summary=tmp_path / "folder", textfile=tmp_path / "file" / "pets.prom"
    )
    assert train(broken, Line()) == 0
    assert bundles.versions(settings.models / "pets") == [1]
    assert "--summary" in caplog.text
    assert "--textfile" in caplog.text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "folder", "models"]


def test_without_retrain_it_is_trained_each_time(settings: TrainingSettings) -> None:
    plain = replace(settings, retrain=False, base=None)
    line = Line(correct=36)
    assert [train(plain, line) for _ in range(2)] == [0, 0]
    assert line.trained == 2
    told = summary(plain)
    assert told["version"] == 2
    assert told["serving"]["version"] == 1
    assert not (settings.models / "pets" / job.LOCK).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "--retrain needs --base"),
        ({"retrain": False}, "is for --retrain"),
        ({"name": "others"}, "are not the same"),
        ({"models": Path("elsewhere")}, "are not the same"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_and_told(
    settings: TrainingSettings, changes: dict[str, Any], message: str
) -> None:
    line = Line()
    with pytest.raises(ConvoyError, match=message):
        train(replace(settings, **changes), line)
    assert line.trained == 0
    assert message in summary(settings)["error"]


def test_the_settings_that_do_not_count_are_settings() -> None:
    known = {each.name for each in fields(TrainingSettings)}
    assert known >= job.AROUND | job.SEEN_IN_DATA | job.NOT_TRAINED


def test_where_no_version_is_whole_nothing_is_published(settings: TrainingSettings) -> None:
    folder = settings.models / "pets"
    assert train(settings, Line()) == 0
    (folder / "1" / "model.onnx").write_bytes(b"")
    line = Line()
    with pytest.raises(ConvoyError, match=r"no version in .* proves itself"):
        train(settings, line)
    assert line.trained == 0


# The settings of what serves.

STORY = {
    "epochs": 7, "filters": [8, 16], "variants": [], "flip": True, "dropout": 0.25, "data": "pets.csv",
    "image_size": 0, "channels": 0, "weights": None, "min_accuracy": 0.5, "compare": False,
    "checkpoints": "elsewhere", "warm_start": True, "name": "other", "gone_since": 3,
}  # fmt: skip


def parsed(*arguments: str | Path) -> TrainingSettings:
    _, bound, _ = app.parse_args(
        ["train", *map(str, arguments)], exit_on_error=False, print_error=False
    )
    settings: TrainingSettings = bound.arguments.get("settings", TrainingSettings())
    return settings


def test_the_settings_of_what_serves_are_taken_over(tmp_path: Path) -> None:
    base = tmp_path / "pets"
    version(base, {"settings": {"epochs": 99}})
    version(base, {"settings": STORY})
    (base / "3").mkdir()  # a broken one is passed over
    assert parsed("--retrain", "--base", base) == TrainingSettings(
        models=tmp_path, name="pets", base=base, retrain=True, epochs=7, filters=(8, 16), variants=(),
        flip=True, dropout=0.25, data="pets.csv", min_accuracy=0.5, image_size=4, channels=3,
        resize="crop",
    )  # fmt: skip


def test_flags_the_environment_and_a_named_recipe_go_before_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, recipe = tmp_path / "pets", tmp_path / "recipe.toml"
    version(base, {"settings": STORY})
    recipe.write_text("dropout = 0.75\nepochs = 2\nbatch_size = 5\n")
    monkeypatch.setenv("CONVOY_FILTERS", "4 8")
    found = parsed(
        "--retrain", "--base", base, "--recipe", recipe, "--epochs", "3", "--no-flip", "--data", "x"
    )
    assert (found.epochs, found.dropout, found.batch_size) == (3, 0.75, 5)
    assert (found.filters, found.flip, found.data) == ((4, 8), False, "x")
    assert (found.variants, found.min_accuracy) == ((), 0.5)
    assert (found.image_size, found.channels) == (4, 3)


@pytest.mark.parametrize(("data", "recipe"), [((), "digits"), (("--data", "x"), "folder")])
def test_a_first_training_is_by_the_recipe_for_its_data(
    data: tuple[str, ...], recipe: str, tmp_path: Path
) -> None:
    found = parsed("--retrain", "--base", tmp_path / "pets", *data)
    assert (found.models, found.name) == (tmp_path, "pets")
    assert asdict(found).items() >= values(recipe).items()


def test_of_a_model_from_elsewhere_the_size_is_taken_over(tmp_path: Path) -> None:
    version(tmp_path / "pets", {})
    found = parsed("--retrain", "--base", tmp_path / "pets", "--data", "x")
    assert (found.image_size, found.channels, found.resize) == (4, 3, "crop")
    assert asdict(found).items() >= values("folder").items()


def values(recipe: str) -> dict[str, Any]:
    text = (RECIPES / f"{recipe}.toml").read_text(encoding="utf-8")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in tomllib.loads(text).items()}


def test_another_name_beside_the_base_is_not_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = parsed("--retrain", "--base", "models/pets", "--name", "dogs")
    with pytest.raises(ConvoyError, match="are not the same"):
        train(found, Line())
    assert train(parsed("--retrain", "--base", "models/pets/", "--data", "x"), Line()) == 0
    monkeypatch.chdir("models/pets")
    assert train(parsed("--retrain", "--base", "."), Line()) == 4


# One at a time.

HOLDER = """
import sys
from pathlib import Path
from convoy_training.pipeline import job
with job._only_one(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_job_ends_at_once_and_a_killed_one_is_no_hindrance(
    settings: TrainingSettings,
) -> None:
    folder = settings.models / "pets"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        line = Line()
        with pytest.raises(ConvoyError, match=f"already, by process {holder.pid} on .* since 2"):
            train(settings, line)
        assert line.trained == 0
        assert "retrained already" in summary(settings)["error"]
        # One that publishes without replacing anything is free to.
        assert train(replace(settings, retrain=False, base=None), line) == 0
        holder.kill()
        holder.wait()
        assert train(settings, Line(dataset(1))) == 0


def test_what_a_job_leaves_in_the_folder_is_no_version_and_no_change_of_the_model(
    settings: TrainingSettings,
) -> None:
    folder = settings.models / "pets"
    assert train(settings, Line()) == 0
    assert train(settings, Line(dataset(1), correct=36)) == 3
    files = {f.name for f in folder.iterdir()}
    assert files == {"1", "config.pbtxt", "labels.txt", job.LOCK, job.MEMORY}
    assert bundles.versions(folder) == [1]
    assert bundles.names(settings.models) == ["pets"]
    before = newest(folder)
    assert train(settings, Line()) == 4
    assert newest(folder) == before


def newest(folder: Path) -> int:
    """By what Triton, where it polls, tells that a model was changed."""
    return max(path.stat().st_mtime_ns for path in (folder, *folder.rglob("*")))


# Several machines.


@pytest.mark.parametrize(
    ("config", "chief"),
    [
        ("", True),
        ("{}", True),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 0}}', True),
        ('{"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": "1"}}', False),
        ('{"cluster": {"chief": ["c:1"], "worker": ["a:1"]}, "task": {"type": "chief", "index": 0}}', True),
        ('{"cluster": {"chief": ["c:1"], "worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}', False),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}', False),
    ],
)  # fmt: skip
def test_one_of_several_machines_is_the_chief(config: str, chief: bool) -> None:
    assert job.is_chief({"TF_CONFIG": config}) == chief


@pytest.mark.parametrize("config", ["{", "3", '{"task": {"index": "x"}}', '{"task": 3}'])
def test_a_cluster_that_can_not_be_read_is_refused(config: str) -> None:
    with pytest.raises(ConvoyError, match="TF_CONFIG"):
        job.is_chief({"TF_CONFIG": config})


def test_the_others_train_along_and_leave_the_rest_to_the_chief(
    settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings.models / "pets"
    assert train(replace(settings, summary=None, textfile=None), Line()) == 0
    (folder / job.LOCK).unlink()
    cluster = {"worker": ["a:1", "b:1"]}
    monkeypatch.setenv(
        "TF_CONFIG", json.dumps({"cluster": cluster, "task": {"type": "worker", "index": 1}})
    )
    with job._only_one(folder):
        assert train(settings, Line(dataset(1), chief=False)) == 0
        # That there is nothing to do, they find by themselves.
        assert train(settings, Line()) == 4
    assert settings.summary
    assert not settings.summary.parent.exists()


# Who follows it.


@pytest.fixture
def following(settings: TrainingSettings, tmp_path: Path) -> TrainingSettings:
    return replace(settings, mlflow_uri=str(tmp_path / "mlruns"), summary=None, textfile=None)


def runs_in(uri: str) -> list[Any]:
    """The runs of the model in MLflow's folder, oldest first."""
    client = trackers._client(Path(uri).as_uri())
    experiment = client.get_experiment_by_name("pets")
    return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])  # type: ignore[no-any-return]


def test_mlflow_has_settings_figures_and_the_published_version(
    following: TrainingSettings, tmp_path: Path
) -> None:
    assert train(following, Line()) == 0
    assert train(following, Line()) == 4
    (run,) = runs_in(following.mlflow_uri)
    assert run.info.status == "FINISHED"
    bundle = bundles.read(following.models / "pets" / "1")
    assert (
        run.data.tags.items()
        >= {"status": "published", "version": "1", "sha256": bundle.sha256}.items()
    )
    assert run.data.params["epochs"] == "2"
    assert run.data.params["images_train"] == "50"
    assert "mlflow_uri" not in run.data.params
    assert run.data.metrics.items() >= {
        "loss": 0.5, "validation_accuracy": 0.7, "test_accuracy": 0.95, "int8_accuracy": 0.925,
        "int8_speedup": 2.0,
    }.items()  # fmt: skip
    assert run.data.metrics["test_accuracy_low"] < 0.95 < run.data.metrics["test_accuracy_high"]
    assert run.data.metrics["calibration_error"] > 0
    client = trackers._client(Path(following.mlflow_uri).as_uri())
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.5)]
    for name in ("manifest.json", "report.html"):
        file = client.download_artifacts(run.info.run_id, name, str(tmp_path))
        assert Path(file).read_bytes() == (bundle.folder / name).read_bytes()


@pytest.mark.parametrize(
    ("correct", "raises", "status", "tag"),
    [
        (36, None, "FINISHED", "not-better"),
        (38, ConvoyError("no"), "FAILED", "failed"),
        (38, KeyboardInterrupt(), "KILLED", "failed"),
    ],
)
def test_mlflow_knows_how_a_run_ended(
    following: TrainingSettings,
    correct: int,
    raises: BaseException | None,
    status: str,
    tag: str,
) -> None:
    def end() -> None:
        if raises:
            raise raises

    assert train(replace(following, mlflow_uri=""), Line()) == 0
    line = Line(dataset(1), correct=correct, raises=end)
    if raises:
        with pytest.raises(type(raises)):
            train(following, line)
    else:
        assert train(following, line) == 3
    (run,) = runs_in(following.mlflow_uri)
    assert run.info.status == status
    assert run.data.tags["status"] == tag
    assert "version" not in run.data.tags


def test_a_server_that_does_not_answer_loses_no_training(
    following: TrainingSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    # Where nothing listens.
    unreachable = replace(following, mlflow_uri="http://me:secret@127.0.0.1:9")
    assert train(unreachable, Line()) == 0
    assert "training goes on" in caplog.text
    assert "it lacks this run" in caplog.text
    assert "secret" not in caplog.text
    # At the start and at the end, but not after each epoch.
    assert len(caplog.records) == 2


def test_what_mlflow_did_not_hear_is_told_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, now, down = trackers._client, 0.0, True

    def sometimes(uri: str) -> Any:
        if down:
            raise ConnectionError("refused")
        return client(uri)

    monkeypatch.setattr(trackers, "_client", sometimes)
    uri = str(tmp_path / "mlruns")
    mlflow = MLflow(uri, "pets", {"epochs": 9}, clock=lambda: now)
    mlflow.figures({"loss": 3}, 1)
    down = False
    mlflow.figures({"loss": 2}, 2)
    assert not (tmp_path / "mlruns").exists()
    now = 61
    mlflow.figures({"loss": 1}, 3)
    monkeypatch.undo()
    (run,) = runs_in(uri)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"epochs": "9"}
    history = client(Path(uri).as_uri()).get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3), (2, 2), (3, 1)]


def test_a_file_that_mlflow_can_not_take_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri = str(tmp_path / "mlruns")
    mlflow = MLflow(uri, "pets", {})
    mlflow.end("FINISHED", {"status": "published"}, [tmp_path / "gone.html"])
    assert "gone.html" in caplog.text
    (run,) = runs_in(uri)
    assert run.info.status == "FINISHED"
