"""What `convoy bulk` does on each machine, without Ray: tests/deploy/test_bulk.py has that."""

import errno
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pyarrow.fs import LocalFileSystem

from convoy.bulk import job as jobs
from convoy.bulk import work
from convoy.bulk.job import Job
from convoy.bulk.settings import BulkSettings
from convoy.bulk.work import Done, Worker, _ahead
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import ConvoyError
from tests.conftest import REPOSITORY, TIMEOUT_S
from tests.integration.models import (
    COLOURS_BATCH,
    NAN_IMAGE,
    RAISING_IMAGE,
    SLOW_BATCH,
    add_colours,
    add_poison,
    colours_of,
    digits,
    slow_of,
)
from tests.integration.object_store import BUCKET, ObjectStore
from tests.integration.pictures import encode, noise, solid

SMALL = BulkSettings(images_per_file=1)  # which is one batch


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return add_colours(tmp_path_factory.mktemp("models"))


def do(job: Job, bundle: Bundle, **options: Any) -> list[Done]:
    """Does what is missing."""
    worker = Worker(job, bundle, waits_s=(0.0, 0.0), **options)
    return [worker.do(part) for part in job.missing()]


def answers(job: Job) -> list[dict[str, Any]]:
    """All rows, as any reader of Parquet has them."""
    rows: list[dict[str, Any]] = parquet.read_table(job.to).to_pylist()
    return rows


def test_a_folder_of_images_of_all_kinds_has_one_row_for_each(
    tmp_path: Path, colours: Bundle
) -> None:
    folder, to = tmp_path / "in", tmp_path / "out"
    good = {
        "red.png": "red",
        "deep/er/blue.PNG": "blue",
        "deep/a b%20#ü?.jpg": "green",
        **{f"many/{number:02d}.png": COLOUR[number % 3] for number in range(2 * COLOURS_BATCH)},
    }
    for name, colour in good.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(solid(colour), "JPEG" if "jpg" in name else "PNG"))
    (folder / "empty.png").touch()
    (folder / "broken.jpg").write_bytes(encode(solid("red"), "JPEG")[:-200])
    (folder / "large.png").write_bytes(b"\x89PNG" + bytes(2_000_000))
    (folder / "wide.png").write_bytes(encode(np.zeros((2, 600_000, 1), np.uint8)))
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "again").symlink_to(".", target_is_directory=True)
    for left_out in (".hidden.png", "_work/x.png", "words.txt", ".hide/x.png"):
        (folder / left_out).parent.mkdir(exist_ok=True)
        (folder / left_out).write_bytes(encode(solid("red")))

    settings = replace(SMALL, max_megapixels=1.0, max_image_mb=1.0)
    job = jobs.begin(str(folder), str(to), colours, settings)
    (folder / "red.png").rename(folder / "moved")  # after it was seen
    assert not any(done.trouble for done in do(job, colours))

    rows = {row["key"]: row for row in answers(job)}
    bad = {
        "empty.png": "the image is empty",
        "broken.jpg": "the image is damaged",
        "large.png": "the image has 2.0 MB, the limit is 1",
        "wide.png": "the limit is 1: send a smaller one",
        "red.png": "red.png: No such file or directory",
    }
    del good["red.png"]
    assert sorted(rows) == sorted([*good, *bad])
    assert len(answers(job)) == len(rows)
    for name, words in bad.items():
        row = rows[name]
        assert words in row["error"], row
        assert row["label"] is row["probability"] is row["unsure"] is None
    for name, colour in good.items():
        expected = colours_of(solid(colour)[np.newaxis])[0].max()
        assert (rows[name]["label"], rows[name]["error"]) == (colour, None)
        assert rows[name]["probability"] == pytest.approx(expected, abs=0.01)  # of a JPEG
        assert (rows[name]["model"], rows[name]["version"]) == ("colours", 1)

    summary = job.finish()
    assert (summary["count"], summary["errors"]) == (len(rows), len(bad))
    assert sum(summary["labels"].values()) == len(good)
    assert {each["key"] for each in summary["error_examples"]} == set(bad)
    assert job.summary() == summary


COLOUR = ("red", "green", "blue")


def test_answers_are_those_of_the_model_whatever_the_part(tmp_path: Path) -> None:
    bundle = bundles.read(REPOSITORY / "models" / "digits" / "1")
    pixels = digits().pixels
    pixels = np.concatenate([pixels, *(np.roll(pixels, shift, 1) for shift in range(1, 8))])
    table = pa.table({"image": [encode(each) for each in pixels], "n": range(len(pixels))})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=5)
    job = jobs.begin(
        str(tmp_path / "in.parquet"), str(tmp_path / "out"), bundle,
        replace(SMALL, probabilities=True, key="n"),
    )  # fmt: skip
    do(job, bundle)
    rows = answers(job)
    assert [row["key"] for row in rows] == [str(number) for number in range(len(pixels))]
    expected = Model.load(bundle, "cpu").run(pixels)
    given = np.array([row["probabilities"] for row in rows], np.float32)
    np.testing.assert_allclose(given, expected, atol=1e-6)
    best = expected.argmax(axis=1)
    assert [row["label"] for row in rows] == [bundle.manifest.labels[index] for index in best]
    thresholds = bundle.manifest.thresholds
    assert thresholds
    limits = np.maximum(thresholds.per_class, thresholds.unsure)[best]
    unsure = given.max(axis=1) < limits
    assert [row["unsure"] for row in rows] == unsure.tolist()
    assert 0 < unsure.sum() < len(rows)
    assert job.finish()["unsure"] == unsure.sum()
    # Not a bit depends on how many go together.
    alone = replace(job, to=str(tmp_path / "alone"), rows_per_part=7)
    (tmp_path / "alone").mkdir()
    do(alone, bundle)
    assert answers(alone) == rows


@pytest.mark.parametrize("group", [1, 3, 100])
def test_parts_of_tables_begin_anywhere(tmp_path: Path, colours: Bundle, group: int) -> None:
    tables = {"b.parquet": 19, "a/c.parquet": 8, "z.parquet": 0, "a/d.parquet": 1}
    expected = []
    for name, rows in sorted(tables.items()):
        colour = [COLOUR[number % 3] for number in range(rows)]
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        column = pa.array([encode(solid(each)) for each in colour], pa.large_binary())
        table = pa.table({"image": column})
        parquet.write_table(table, tmp_path / "in" / name, row_group_size=group)
        expected += [(f"{name}#{number}", each) for number, each in enumerate(colour)]
    job = jobs.begin(str(tmp_path / "in"), str(tmp_path / "out"), colours, SMALL)
    assert [part.rows for part in job.parts] == [8, 1, 8, 8, 3]
    do(job, colours)
    assert [(row["key"], row["label"]) for row in answers(job)] == expected


def test_columns_may_have_paths_or_both(tmp_path: Path, colours: Bundle) -> None:
    red, blue = tmp_path / "in" / "red.png", tmp_path / "blue.png"
    red.parent.mkdir()
    red.write_bytes(encode(solid("red")))
    blue.write_bytes(encode(solid("blue")))
    paths = ["red.png", str(blue), f"file://{blue}", "../blue.png", "none.png", None, "", "a\0b"]
    paths += ["red.png/x", "x" * 300, "ftp://host/x.png", str(tmp_path), "red.png"]
    both = [{"bytes": blue.read_bytes(), "path": "x.png"}, {"bytes": None, "path": "red.png"}, None]
    for name, column in (("paths", pa.array(paths)), ("both", pa.array(both))):
        parquet.write_table(
            pa.table({name: column, "id": range(len(column))}), red.parent / f"{name}.parquet"
        )
        settings = replace(SMALL, column=name, key="id")
        job = jobs.begin(
            str(red.parent / f"{name}.parquet"), str(tmp_path / name), colours, settings
        )
        assert not any(done.trouble for done in do(job, colours))
        rows = answers(job)
        assert [row["key"] for row in rows] == [str(number) for number in range(len(column))]
        labels = [row["label"] for row in rows]
        if name == "both":
            assert labels == ["blue", "red", None]
        else:
            assert labels == ["red", "blue", "blue", "blue", *[None] * 8, "red"]
        assert all((row["label"] is None) != (row["error"] is None) for row in rows)
    # Paths relative to elsewhere, and a table whose column `path` has both names and images.
    parquet.write_table(pa.table({"path": ["blue.png"]}), red.parent / "p.parquet")
    settings = replace(SMALL, root=str(tmp_path))
    job = jobs.begin(str(red.parent / "p.parquet"), str(tmp_path / "p"), colours, settings)
    do(job, colours)
    assert [(row["key"], row["label"]) for row in answers(job)] == [("blue.png", "blue")]


def test_an_image_that_the_model_fails_on_fails_alone(tmp_path: Path) -> None:
    bundle = add_poison(tmp_path)
    good = [image for image in noise(0, 2 * SLOW_BATCH, (2, 2, 1)) if image.max() not in (13, 17)]
    pixels = [*good[:2], NAN_IMAGE, RAISING_IMAGE, *good[2:], RAISING_IMAGE]
    parquet.write_table(
        pa.table({"image": [encode(each) for each in pixels]}), tmp_path / "in.parquet"
    )
    job = jobs.begin(str(tmp_path / "in.parquet"), str(tmp_path / "out"), bundle, SMALL)
    do(job, bundle)
    rows = answers(job)
    failed = [number for number, row in enumerate(rows) if row["error"]]
    assert failed == [2, 3, len(pixels) - 1]
    assert {row["error"] for row in rows} == {None, "the model failed on this image"}
    expected = slow_of(np.array(good)).max(axis=1)
    given = [row["probability"] for row in rows if row["error"] is None]
    np.testing.assert_allclose(given, expected, rtol=1e-5)


class Disk:
    """Reads as `FileIO` does, and has trouble with some files so many times."""

    def __init__(self, trouble: dict[str, int]) -> None:
        self.trouble = trouble

    def __call__(self, path: str) -> Any:
        name = Path(path).name
        if self.trouble.get(name, 0):
            self.trouble[name] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return Path(path).open("rb")


def test_trouble_with_a_disk_leaves_the_part_for_the_next_run(
    tmp_path: Path, colours: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(3 * COLOURS_BATCH):
        (folder / f"{number:02d}.png").write_bytes(encode(solid("red")))
    job = jobs.begin(str(folder), str(tmp_path / "out"), colours, SMALL)
    # Three tries each; the first passes at the third.
    monkeypatch.setattr(work, "FileIO", Disk({"01.png": 2, "09.png": 99}))
    first, second, third = do(job, colours)
    assert first == third == Done(COLOURS_BATCH, 0)
    assert "09.png: Input/output error; run the job again" in second.trouble
    assert [part.number for part in job.missing()] == [1]
    with pytest.raises(FileNotFoundError, match="part-000001"):
        job.finish()
    assert do(job, colours, skip_unreadable=True) == [Done(COLOURS_BATCH, 1)]
    assert [row["error"] for row in answers(job) if row["error"]] == ["09.png: Input/output error"]
    assert job.finish()["errors"] == 1
    monkeypatch.setattr(work, "FileIO", Disk({}))
    # Where all are missing it is not they: a folder that is not mounted.
    folder.rename(tmp_path / "elsewhere")
    other = replace(job, to=str(tmp_path / "other"))
    (tmp_path / "other").mkdir()
    assert ["none of its 8 images can be read" in done.trouble for done in do(other, colours)] == [
        True, True, True,
    ]  # fmt: skip
    assert not list((tmp_path / "other").glob("*.parquet"))


def test_a_job_goes_on_as_it_was_begun(tmp_path: Path, colours: Bundle) -> None:
    folder, to = tmp_path / "in", str(tmp_path / "out")
    folder.mkdir()
    for number in range(2 * COLOURS_BATCH):
        (folder / f"{number}.png").write_bytes(encode(solid("red")))
    assert jobs.begun(to) is None
    job = jobs.begin(str(folder), to, colours, SMALL)
    assert jobs.begun(to) == job
    Worker(job, colours).do(job.parts[0])
    (folder / "new.png").write_bytes(encode(solid("red")))  # not seen any more
    again = jobs.begun(to)
    assert again
    assert [part.number for part in again.missing()] == [1]
    jobs.check_same(again, str(folder), SMALL)
    jobs.check_same(again, str(folder), replace(SMALL, model="colours", version=1, actors=3))
    for other in (
        replace(SMALL, model="digits"),
        replace(SMALL, version=2),
        replace(SMALL, probabilities=True),
        replace(SMALL, images_per_file=9),
    ):
        with pytest.raises(ConvoyError, match="was begun with"):
            jobs.check_same(again, str(folder), other)
    with pytest.raises(ConvoyError, match=r"images '.*/in', not '.*/elsewhere'"):
        jobs.check_same(again, str(tmp_path / "elsewhere"), SMALL)
    do(again, colours)
    assert again.finish()["count"] == 2 * COLOURS_BATCH
    part = Path(again.place(again.parts[1]).path)
    left = part.with_name(f".{part.name}-host-1")
    for damage in (lambda data: data[:-50], lambda _: b""):
        left.touch()
        whole = part.read_bytes()
        part.write_bytes(damage(whole))
        with pytest.raises(ConvoyError, match=r"part-000001\.parquet can't be read"):
            again.finish()
        part.write_bytes(whole)
    part.write_bytes(Path(again.place(again.parts[0]).path).read_bytes())
    assert again.finish()["labels"] == {"red": 16}
    assert not left.exists()
    parquet.write_table(parquet.read_table(part).slice(1), part)
    with pytest.raises(ConvoyError, match="has 7 rows for 8 images"):
        again.finish()
    parquet.write_table(pa.table({"path": ["x"]}), to + "/_job/images.parquet")
    with pytest.raises(ConvoyError, match="has 1 rows, and had 16"):
        list(again.rows(again.parts[0]))


def test_tries_are_counted_for_each_part(tmp_path: Path, colours: Bundle) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.png").touch()
    job = jobs.begin(str(tmp_path / "in"), str(tmp_path / "out"), colours, SMALL)
    (part,) = job.parts
    job.forget()
    assert [job.take(part), job.take(part), job.take(part._replace(number=1))] == [1, 2, 1]
    job.forget()
    assert job.take(part) == 1


def test_what_is_no_job_is_refused(tmp_path: Path, colours: Bundle) -> None:
    def refused(words: str, images: str, to: str = "out", **settings: Any) -> None:
        asked = replace(SMALL, **settings)
        with pytest.raises(ConvoyError, match=words):
            jobs.begin(str(tmp_path / images), str(tmp_path / to), colours, asked)
        assert jobs.begun(str(tmp_path / to)) is None

    for name in ("empty", "images", "mixed", "tables"):
        (tmp_path / name).mkdir()
    for name in ("images", "mixed"):
        (tmp_path / name / "x.png").touch()
    for name in ("mixed", "tables"):
        parquet.write_table(pa.table({"id": [1], "path": ["x"]}), tmp_path / name / "t.parquet")
    parquet.write_table(pa.table({"path": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "no.parquet").write_bytes(b"no")
    refused("is not there", "nowhere")
    refused("has 0 images .* and 0 Parquet files", "empty")
    refused("has 1 images .* and 1 Parquet files", "mixed")
    refused("has 1 images .* and 0 Parquet files", "images/x.png")
    refused("is inside of", "images", "images/out")
    refused("is inside of", "images", "images")
    refused("wanted 'image' with", "tables", column="image")
    refused("id \\(int64\\), path \\(string\\): wanted 'id'", "tables", column="id")
    refused("and 'name'", "tables", key="name")
    refused("there is no row", "none.parquet")
    refused("no.parquet is no Parquet file", "no.parquet")
    for url in ("http://host/x", "s3:///x"):
        with pytest.raises(ConvoyError, match=f"{url[:5]}.*give a folder, or a URL"):
            jobs.place(url)
    where = jobs.place(f"file://{tmp_path}/a b")
    assert (where.local, where.path) == (True, f"{tmp_path}/a b")
    assert isinstance(where.files, LocalFileSystem)


def test_no_more_is_begun_than_was_said() -> None:
    begun: list[int] = []
    go = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            begun.append(number)
            yield number

    def wait(number: int) -> int:
        assert go.wait(TIMEOUT_S)
        return number

    with ThreadPoolExecutor(2) as pool:
        doing = _ahead(pool, wait, items(), 5)
        threading.Timer(0.1, go.set).start()
        assert next(doing) == 0
        assert len(begun) == 5
        assert next(doing) == 1
        assert len(begun) == 6
        assert list(doing) == list(range(2, 100))


def test_an_object_store_is_read_and_written(
    tmp_path: Path, colours: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ObjectStore() as store:
        for name, value in store.variables().items():
            monkeypatch.setenv(name, value)
        names = [f"in/{number % 3}/a b%20{number}#?.png" for number in range(2 * COLOURS_BATCH)]
        for number, name in enumerate(names):
            store.put(name, encode(solid(COLOUR[number % 3])))
        store.put("in/words.txt", b"no image")
        base = f"s3://{BUCKET}/some/models"
        job = jobs.begin(f"{base}/in", f"{base}/out", colours, SMALL)
        assert [done.trouble for done in do(job, colours)] == ["", ""]
        assert jobs.begun(f"{base}/out") == job
        assert job.missing() == []
        assert job.finish()["labels"] == {"blue": 5, "green": 5, "red": 6}
        where = jobs.place(f"{base}/out")
        rows = parquet.read_table(where.path, filesystem=where.files).to_pylist()
        assert sorted((row["key"], row["label"]) for row in rows) == sorted(
            (name.removeprefix("in/"), COLOUR[number % 3]) for number, name in enumerate(names)
        )
        # A table here with URLs of images there, of which one is gone.
        urls = [f"{base}/{name}" for name in names[:3]] + [f"{base}/in/gone.png"]
        parquet.write_table(pa.table({"path": urls}), tmp_path / "in.parquet")
        job = jobs.begin(str(tmp_path / "in.parquet"), str(tmp_path / "out"), colours, SMALL)
        assert do(job, colours) == [Done(4, 1)]
        assert [row["label"] for row in answers(job)] == [*COLOUR, None]
        assert "gone.png" in answers(job)[3]["error"]
        with pytest.raises(ConvoyError, match="has 0 images"):
            jobs.begin(f"{base}/nowhere", str(tmp_path / "other"), colours, SMALL)
        # Without the store nothing is taken for an answer.
        store.kill()
        job = replace(job, to=str(tmp_path / "late"))
        (tmp_path / "late").mkdir()
        (done,) = (Worker(job, colours, waits_s=()).do(job.parts[0]),)
        assert "run the job again" in done.trouble
        assert not list((tmp_path / "late").iterdir())
