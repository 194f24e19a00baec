import errno
import hashlib
import io
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from convoy.cli.app import app
from convoy_service.artifacts import images
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.errors import ConvoyError
from convoy_service.observers import feedback_writer as store
from convoy_service.observers.feedback_writer import (
    Exported,
    Feedback,
    delete,
    export,
    read_labels,
    schema,
)
from convoy_service.registry.registry import Answered, Observer, Served
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics
from convoy_training.data import datasets as data
from convoy_training.settings import TrainingSettings
from tests.conftest import TIMEOUT_S

LABELS = ("cat", "dog")
SHAPE = (8, 6, 3)
Row = dict[str, Any]


def served(name: str = "cats", version: int = 3, labels: Sequence[str] = LABELS) -> Served:
    manifest = SimpleNamespace(labels=labels)
    return cast("Served", SimpleNamespace(name=name, version=version, manifest=manifest))


def pictures(count: int, seed: int = 0) -> Pixels:
    """Uint8 `[count, *SHAPE]`, all different."""
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), np.uint8)


def png(pixels: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def answered(
    inputs: Sequence[bytes | Pixels],
    unsure: Sequence[bool] | None = None,
    *,
    dogs: Sequence[bool] = (),
    by: Served | None = None,
) -> Answered:
    """What a version answers to `inputs`: 0.75 for cat, or for dog where `dogs` says so."""
    probabilities = np.tile(np.array([0.75, 0.25], np.float32), (len(inputs), 1))
    for row, dog in enumerate(dogs):
        probabilities[row] = [0.25, 0.75] if dog else [0.75, 0.25]
    flags = np.zeros(len(inputs), bool) if unsure is None else np.array(unsure)
    return Answered(
        by or served(), inputs, np.empty((len(inputs), *SHAPE), np.uint8), probabilities, flags
    )


def rows(folder: Path) -> list[Row]:
    """All that the files in `folder` hold, the oldest first."""
    files = sorted(folder.glob("*.parquet"))
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def outcomes(metrics: Metrics) -> dict[str, float]:
    counted: dict[str, float] = defaultdict(float)
    for (_, outcome), value in metrics.snapshot()["feedback_images"]:
        assert isinstance(value, float | int)
        counted[outcome] += value
    return dict(counted)


def figure(metrics: Metrics, family: str) -> float:
    ((_, value),) = metrics.snapshot()[family]
    assert isinstance(value, float | int)
    return value


def wait_until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def keep(tmp_path: Path, metrics: Metrics) -> Iterator[Callable[..., Feedback]]:
    """What makes a store in `tmp_path / "kept"` that keeps what is unsure."""
    made = []

    def make(**options: Any) -> Feedback:
        wanted = {"share": 0.0, "most_bytes": 100_000_000, "rotate_s": TIMEOUT_S, **options}
        made.append(Feedback(tmp_path / "kept", metrics, **wanted))
        return made[-1]

    yield make
    for feedback in made:
        feedback.close(TIMEOUT_S)


def test_unsure_rows_are_kept_with_image_and_answer(
    keep: Callable[..., Feedback], metrics: Metrics, tmp_path: Path
) -> None:
    shown, feedback = pictures(4), keep()
    jpeg = b"\xff\xd8 as it came"
    before = time.time()
    feedback.observe(
        answered(
            [shown[0], shown[1], jpeg, shown[3]], [False, True, True, False], dogs=[True, True]
        )
    )
    feedback.observe(answered([shown[2]]))
    feedback.close(TIMEOUT_S)

    first, second = rows(tmp_path / "kept")
    assert set(first) == set(schema().names)
    assert np.array_equal(images.decode(first["image"], Target(*SHAPE)), shown[1])
    assert second["image"] == jpeg
    for row, predicted in ((first, "dog"), (second, "cat")):
        assert row["sha256"] == hashlib.sha256(row["image"]).hexdigest()
        assert (row["model"], row["version"], row["predicted"]) == ("cats", 3, predicted)
        assert row["probability"] == 0.75
        assert row["probabilities"] == ([0.25, 0.75] if predicted == "dog" else [0.75, 0.25])
        assert row["unsure"]
        assert before - 1 < row["time"].timestamp() < time.time() + 1
    assert outcomes(metrics) == {"written": 2}
    (file,) = (tmp_path / "kept").iterdir()
    assert figure(metrics, "feedback_bytes") == file.stat().st_size
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_become_png_files_of_the_same_pixels(
    keep: Callable[..., Feedback], tmp_path: Path, channels: int
) -> None:
    shown = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    feedback = keep()
    feedback.observe(answered([shown], [True]))
    feedback.close(TIMEOUT_S)
    (row,) = rows(tmp_path / "kept")
    with Image.open(io.BytesIO(row["image"])) as image:
        assert np.array_equal(np.asarray(image).reshape(shown.shape), shown)


def test_a_share_of_requests_is_kept_whole(
    keep: Callable[..., Feedback], metrics: Metrics, tmp_path: Path
) -> None:
    random.seed(6)
    feedback, requests = keep(share=0.3), 2000
    for number in range(requests):
        feedback.observe(answered([b"%d first" % number, b"%d second" % number]))
    feedback.close(TIMEOUT_S)
    kept = [row["image"].split() for row in rows(tmp_path / "kept")]
    assert [number for number, which in kept if which == b"first"] == [
        number for number, which in kept if which == b"second"
    ]
    # Six standard deviations of what is drawn.
    assert abs(len(kept) / 2 - 0.3 * requests) < 6 * (requests * 0.3 * 0.7) ** 0.5
    assert not any(row["unsure"] for row in rows(tmp_path / "kept"))
    assert outcomes(metrics) == {"written": len(kept)}


def test_an_image_that_the_model_failed_on_is_not_kept(
    keep: Callable[..., Feedback], metrics: Metrics, tmp_path: Path
) -> None:
    feedback, answer = keep(share=1.0), answered([b"good", b"bad"])
    answer.probabilities[1] = np.nan
    feedback.observe(answer)
    feedback.close(TIMEOUT_S)
    assert [row["image"] for row in rows(tmp_path / "kept")] == [b"good"]
    assert outcomes(metrics) == {"written": 1}


def test_pixels_that_are_kept_do_not_keep_the_rest_of_their_request(
    keep: Callable[..., Feedback],
) -> None:
    shown, noted = pictures(100), list[Any]()
    feedback = keep()
    feedback._queue = cast("Any", noted)
    feedback.observe(answered(list(shown), [row == 7 for row in range(100)]))
    (row,) = noted
    assert row.image.base is None
    assert row.probabilities.base is None
    assert np.array_equal(row.image, shown[7])
    noted.clear()


def test_beyond_what_may_wait_images_are_left_out_and_counted(
    keep: Callable[..., Feedback], metrics: Metrics, tmp_path: Path
) -> None:
    writing, go_on = threading.Event(), threading.Event()

    def slowly(path: Path, content: Any) -> None:
        writing.set()
        assert go_on.wait(TIMEOUT_S)
        store._store(path, content)

    # Files of 100 kB, of which two may wait.
    feedback = keep(most_bytes=800_000, store=slowly)
    sent = 0
    while not writing.is_set():
        feedback.observe(answered([os.urandom(10_000)], [True]))
        sent += 1
        time.sleep(0.001)
    for _ in range(50):
        feedback.observe(answered([os.urandom(10_000)], [True]))
        sent += 1
    feedback.observe(answered([os.urandom(200_000)], [True]))
    go_on.set()
    feedback.close(TIMEOUT_S)
    counted = outcomes(metrics)
    assert counted["large"] == 1
    assert counted["busy"] >= 30
    assert counted["written"] + counted["busy"] == sent
    assert len(rows(tmp_path / "kept")) == counted["written"]


def test_a_disk_that_is_full_loses_nothing_until_too_much_waits(
    keep: Callable[..., Feedback],
    metrics: Metrics,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = threading.Event()
    full.set()

    def on_a_full_disk(path: Path, content: Any) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        store._store(path, content)

    caplog.set_level("INFO", "convoy.feedback")
    feedback = keep(most_bytes=800_000, retry_s=0.01, rotate_s=0.01, store=on_a_full_disk)
    sent = 0
    while outcomes(metrics).get("disk", 0) < 5:
        feedback.observe(answered([os.urandom(10_000)], [True]))
        sent += 1
        time.sleep(0.001)
    wait_until(lambda: figure(metrics, "feedback_failures") >= 3)
    assert not rows(tmp_path / "kept")
    dropped = outcomes(metrics)
    full.clear()
    wait_until(lambda: "written" in outcomes(metrics))
    feedback.close(TIMEOUT_S)
    assert outcomes(metrics) == {**dropped, "written": sent - sum(dropped.values())}
    assert len(rows(tmp_path / "kept")) == outcomes(metrics)["written"]
    assert [record.levelname for record in caplog.records] == ["INFO", "ERROR", "INFO"]
    assert "No space left" in caplog.text
    assert caplog.messages[-1].startswith("feedback is kept")


def test_a_folder_that_vanishes_is_made_again_and_one_that_can_not_be_is_waited_for(
    keep: Callable[..., Feedback], metrics: Metrics, tmp_path: Path
) -> None:
    kept, feedback = tmp_path / "kept", keep(rotate_s=0.01, retry_s=0.01)
    wait_until(kept.is_dir)
    kept.rmdir()
    feedback.observe(answered([b"first"], [True]))
    wait_until(lambda: outcomes(metrics) == {"written": 1})
    kept.rename(tmp_path / "away")
    kept.write_text("a file in its place")
    wait_until(lambda: figure(metrics, "feedback_failures") >= 1)
    feedback.observe(answered([b"second"], [True]))
    kept.unlink()
    wait_until(lambda: outcomes(metrics) == {"written": 2})
    assert [row["image"] for row in rows(kept)] == [b"second"]


def test_what_goes_wrong_with_one_request_is_counted_and_costs_no_other(
    keep: Callable[..., Feedback],
    metrics: Metrics,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    feedback = keep()
    of_no_kind = np.zeros((4, 4, 5), np.uint8)
    for image in (b"first", of_no_kind, of_no_kind, b"last"):
        feedback.observe(answered([image], [True]))
    feedback.close(TIMEOUT_S)
    assert [row["image"] for row in rows(tmp_path / "kept")] == [b"first", b"last"]
    assert outcomes(metrics) == {"written": 2, "lost": 2}
    assert len(caplog.records) == 1


def test_closing_does_not_wait_for_a_disk_that_hangs(
    keep: Callable[..., Feedback], caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()

    def hang(path: Path, content: Any) -> None:
        go_on.wait(TIMEOUT_S)

    feedback = keep(store=hang)
    feedback.observe(answered([b"image"], [True]))
    feedback.close(0.05)
    assert "not all written" in caplog.text
    go_on.set()


def test_the_oldest_files_are_deleted_beyond_the_bound_and_nothing_else(
    keep: Callable[..., Feedback],
    metrics: Metrics,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "convoy.feedback")
    kept = tmp_path / "kept"
    kept.mkdir()
    theirs = kept / "labelled.parquet"
    theirs.write_bytes(bytes(1_000_000))
    for number in range(12):
        # Two stores on one folder, as in two processes.
        for one in (keep(most_bytes=400_000), keep(most_bytes=400_000)):
            one.observe(answered([b"%d " % number + os.urandom(30_000)], [True]))
            one.close(TIMEOUT_S)
    ours = [file for file in kept.iterdir() if file != theirs]
    assert 300_000 < sum(file.stat().st_size for file in ours) <= 400_000
    assert theirs.exists()
    theirs.unlink()
    left = [int(row["image"].split()[0]) for row in rows(kept)]
    assert left == sorted(left)
    assert left[-2:] == [11, 11]
    assert left[0] > 4
    assert figure(metrics, "feedback_files_deleted") == 24 - len(left)
    assert figure(metrics, "feedback_failures") == 0
    assert "oldest feedback is deleted" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
from convoy_service.observers import feedback_writer as feedback

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
feedback._store(Path(sys.argv[1]), b"half of a file")
"""


def test_what_a_killed_process_leaves_is_no_file_for_readers_and_goes_in_time(
    keep: Callable[..., Feedback], tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    first = keep()
    first.observe(answered([png(pictures(1)[0])], [True]))
    first.close(TIMEOUT_S)
    (whole,) = kept.iterdir()
    other = whole.with_name(whole.name.replace(str(os.getpid()), "1"))
    killed = subprocess.run([sys.executable, "-c", KILLED, str(other)])
    assert killed.returncode == -signal.SIGKILL
    (left,) = set(kept.iterdir()) - {whole}
    assert left.read_bytes()
    assert export(kept, tmp_path / "out") == Exported({"cat": 1}, 0, 0, [])

    keep().close(TIMEOUT_S)
    assert left.exists()
    old = time.time() - 2 * store._ABANDONED_S
    os.utime(left, (old, old))
    keep().close(TIMEOUT_S)
    assert list(kept.iterdir()) == [whole]


def test_what_is_kept_is_labelled_by_moving_files_and_then_trained_on(
    keep: Callable[..., Feedback], tmp_path: Path
) -> None:
    feedback, shown = keep(), [png(each) for each in pictures(40)]
    feedback.observe(answered(shown, [True] * 40, dogs=[number % 2 == 0 for number in range(40)]))
    feedback.close(TIMEOUT_S)
    kept, out = tmp_path / "kept", tmp_path / "out"
    assert export(kept, out) == Exported({"cat": 20, "dog": 20}, 0, 0, [])

    # The first is a cat that was taken for a dog, and the second a bird.
    wrong, bird = (hashlib.sha256(shown[number]).hexdigest() for number in (0, 1))
    (out / "dog" / f"{wrong}.png").rename(out / "cat" / f"{wrong}.png")
    (out / "bird").mkdir()
    (out / "cat" / f"{bird}.png").rename(out / "bird" / f"{bird}.png")
    # What a person has decided stays, though the next version says otherwise, and more comes.
    more = keep()
    more.observe(answered([shown[0], png(pictures(1, seed=1)[0])], [True] * 2, dogs=[True, True]))
    more.close(TIMEOUT_S)
    assert export(kept, out) == Exported({"dog": 1}, 40, 0, [])
    assert (out / "cat" / f"{wrong}.png").read_bytes() == shown[0]

    (out / "bird" / f"{bird}.png").rename(out / "cat" / f"{bird}.png")
    (out / "bird").rmdir()
    dataset = data.load(TrainingSettings(data=str(out)))
    assert dataset.classes == ("cat", "dog")
    splits = (dataset.train, dataset.validation, dataset.test)
    assert sum(map(len, splits)) == 41
    labels = {
        hashlib.sha256(split.encoded(position)).hexdigest(): dataset.classes[label]
        for split in splits
        for position, label in enumerate(split.labels)
    }
    assert labels[wrong] == labels[bird] == "cat"
    assert Counter(labels.values()) == {"cat": 21, "dog": 20}


def test_labels_that_come_from_elsewhere_decide(
    keep: Callable[..., Feedback], tmp_path: Path
) -> None:
    feedback, shown = keep(), [png(each) for each in pictures(3)]
    feedback.observe(answered(shown, [True] * 3))
    feedback.close(TIMEOUT_S)
    kept, out = tmp_path / "kept", tmp_path / "out"
    first, second, third = (hashlib.sha256(each).hexdigest() for each in shown)
    assert export(kept, out).written == {"cat": 3}
    (out / "cat" / f"{third}.png").unlink()

    truth = tmp_path / "truth.csv"
    truth.write_text(f"sha256,label,by\n{first.upper()},dog,me\n{second},,me\n{third}, n/a,me\n")
    labels = read_labels(truth)
    assert labels == {first: "dog", third: "n/a"}
    assert export(kept, out, labels=labels) == Exported({"n_a": 1}, 1, 1, [])
    assert {str(file.relative_to(out)) for file in out.rglob("*.png")} == {
        f"dog/{first}.png", f"cat/{second}.png", f"n_a/{third}.png",
    }  # fmt: skip

    truth.write_text(f"sha256,label\n{first},dog\n{first},cat\n")
    with pytest.raises(ConvoyError, match=r"line 3: .* has two labels"):
        read_labels(truth)
    truth.write_text("sha256,label\nabc,dog\n")
    with pytest.raises(ConvoyError, match="line 2: 'abc' is no sha256"):
        read_labels(truth)
    truth.write_text("path,label\na.png,dog\n")
    with pytest.raises(ConvoyError, match="needs the columns sha256 and label"):
        read_labels(truth)


def test_export_takes_one_model_and_what_is_unsure_if_asked(
    keep: Callable[..., Feedback], tmp_path: Path
) -> None:
    shown, feedback = [png(each) for each in pictures(4)], keep(share=1.0)
    feedback.observe(answered(shown[:3], [False, True, False]))
    feedback.observe(answered(shown[3:], by=served("birds", 1, ("..", "owl"))))
    feedback.close(TIMEOUT_S)
    kept = tmp_path / "kept"
    with pytest.raises(
        ConvoyError, match="several models: name one with --model; there is birds, "
    ):
        export(kept, tmp_path / "out")
    assert export(kept, tmp_path / "unsure", model="cats", unsure=True).written == {"cat": 1}
    assert export(kept, tmp_path / "birds", model="birds").written == {"_.": 1}
    (image,) = (tmp_path / "birds").rglob("*.png")
    assert image.read_bytes() == shown[3]
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConvoyError, match="has no feedback"):
        export(tmp_path / "empty", tmp_path / "out")


def test_a_damaged_file_is_named_and_the_others_are_exported(
    keep: Callable[..., Feedback], tmp_path: Path
) -> None:
    for each in pictures(2):
        one = keep()
        one.observe(answered([png(each)], [True]))
        one.close(TIMEOUT_S)
    damaged = min((tmp_path / "kept").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-20])
    done = export(tmp_path / "kept", tmp_path / "out")
    assert done.written == {"cat": 1}
    assert [text.partition(":")[0] for text in done.unreadable] == [str(damaged)]
    with pytest.raises(ConvoyError, match="could not be looked into"):
        delete(tmp_path / "kept", ["0" * 64])


def test_an_image_is_deleted_by_its_sha256_from_all_files(
    keep: Callable[..., Feedback], tmp_path: Path
) -> None:
    shown = [png(each) for each in pictures(3)]
    for some in ([shown[0]], [shown[0], shown[1], shown[0], shown[2]], [shown[2]]):
        one = keep(share=1.0)
        one.observe(answered(some))
        one.close(TIMEOUT_S)
    kept = tmp_path / "kept"
    digest = hashlib.sha256(shown[0]).hexdigest()
    assert delete(kept, [digest.upper()]) == 3
    assert [row["image"] for row in rows(kept)] == [shown[1], shown[2], shown[2]]
    assert len(list(kept.iterdir())) == 2
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in kept.iterdir())
    assert not any(shown[0] in file.read_bytes() for file in kept.iterdir())
    assert delete(kept, [digest]) == 0
    with pytest.raises(ConvoyError, match=r"'cat\.png' is no sha256"):
        delete(kept, ["cat.png"])


def test_the_commands_say_what_they_have_done(
    keep: Callable[..., Feedback], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    feedback, shown = keep(share=1.0), [png(each) for each in pictures(4)]
    feedback.observe(answered(shown, [True] * 3 + [False], dogs=[True, False, False, False]))
    feedback.close(TIMEOUT_S)
    kept, out, truth = tmp_path / "kept", tmp_path / "out", tmp_path / "truth.csv"
    digests = [hashlib.sha256(each).hexdigest() for each in shown]
    truth.write_text(f"sha256,label\n{digests[0]},cat\n{digests[3]},cat\n")

    def run(*arguments: object) -> tuple[int, str]:
        status = app(["feedback", *map(str, arguments)], result_action="return_value")
        return status or 0, capsys.readouterr().out

    wanted = f"3 images written to {out}: cat 2, dog 1\n"
    assert run("export", kept, out, "--model", "cats", "--unsure") == (0, wanted)
    wanted = f"1 images written to {out}: cat 1\n1 were there already, 1 moved\n"
    assert run("export", kept, out, "--labels", truth) == (0, wanted)
    assert run("delete", kept, *digests[1:3]) == (0, "2 images deleted\n")
    assert {row["sha256"] for row in rows(kept)} == {digests[0], digests[3]}


def test_without_pyarrow_serving_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "pyarrow" else 1)
    with pytest.raises(ConvoyError, match=r"--feedback needs pyarrow.*convoy-serving\[parquet\]"):
        # There is nothing to serve, either.
        app(
            ["serve", "--feedback", str(tmp_path), "--models", str(tmp_path)],
            result_action="return_value",
        )


def test_nothing_is_kept_unless_asked_for(metrics: Metrics) -> None:
    observers: list[Observer] = []
    before = threading.active_count()
    with store.keeping(Settings(), observers, metrics):
        assert not observers
        assert threading.active_count() == before
