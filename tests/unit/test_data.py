"""Folders and lists of images to splits: what is held out stays held out, what is wrong is named,
and what is kept on disk is never used for anything else."""

import csv
import hashlib
import importlib.util
import io
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convoy_service.artifacts import images
from convoy_service.artifacts.images import Target
from convoy_service.errors import ConvoyError
from convoy_training.data import cache, datasets
from convoy_training.data.datasets import DataError, Dataset, Split, class_weights, model_name
from convoy_training.settings import TrainingSettings


def noise(name: str, size: tuple[int, int] = (8, 8), channels: int = 3) -> Image.Image:
    """An image that no other `name` has; `size` is height and width."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def add(folder: Path, label: str, numbers: Iterable[int], **kind: Any) -> None:
    (folder / label).mkdir(parents=True, exist_ok=True)
    for number in numbers:
        noise(f"{label} {number}", **kind).save(folder / label / f"{number:03}.png")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    add(folder, "dog", range(30))
    add(folder, "cat", range(50))
    return folder


def load(folder: Path, **settings: Any) -> Dataset:
    return datasets.load(TrainingSettings(**{"data": str(folder), "cache": "off", **settings}))


def names(split: Split) -> set[str]:
    assert split.files is not None
    return {f"{file.parent.name}/{file.name}" for file in split.files}


def rows(split: Split) -> set[bytes]:
    return {row.tobytes() for row in split.inputs}


# Splits.


def test_every_image_is_in_one_split_under_its_folders_label(pets: Path) -> None:
    data = load(pets)
    assert (data.name, data.classes, data.target) == ("pets", ("cat", "dog"), Target(8, 8, 3))
    splits = [data.train, data.validation, data.test]
    assert sum(len(names(split)) for split in splits) == 80
    assert set().union(*map(names, splits)) == {
        f"{file.parent.name}/{file.name}" for file in pets.rglob("*.png")
    }
    for split in splits:
        assert split.files
        for file, label, pixels in zip(split.files, split.labels, split.inputs, strict=True):
            assert data.classes[label] == file.parent.name
            assert np.array_equal(pixels, images.decode(file.read_bytes(), data.target))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_about_the_share_is_held_out(share: float, tmp_path: Path) -> None:
    add(tmp_path, "a", range(150), channels=1)
    add(tmp_path, "b", range(150), channels=1)
    data = load(tmp_path, test_share=share, validation_share=0.2)
    assert abs(len(data.test) / 300 - share) < 0.1
    assert abs(len(data.validation) / (300 - len(data.test)) - 0.2) < 0.1


def test_the_cut_is_a_matter_of_the_split_seed_alone(pets: Path, tmp_path: Path) -> None:
    first = load(pets, seed=0)
    moved = tmp_path / "elsewhere"
    shutil.copytree(pets, moved)
    for number, file in enumerate(sorted(moved.rglob("*.png"))):
        file.rename(file.with_name(f"{'zyx'[number % 3]}{number}.png"))
    again = load(moved, seed=1)
    for split in ("train", "validation", "test"):
        assert rows(getattr(first, split)) == rows(getattr(again, split))
    other = load(pets, split_seed=1)
    assert names(other.test) != names(first.test)
    assert names(other.validation) != names(first.validation)


def test_images_stay_on_their_side_when_others_are_added(pets: Path) -> None:
    before = load(pets)
    add(pets, "cat", range(50, 90))
    add(pets, "dog", range(30, 40))
    add(pets, "ant", range(20))
    after = load(pets)
    for split in ("train", "validation", "test"):
        assert names(getattr(before, split)) <= names(getattr(after, split))
    assert len(after.test) > len(before.test)


def copy_everything(folder: Path) -> None:
    """Each image twice more, under other names and in another format."""
    for file in list(folder.rglob("*.png")):
        shutil.copy(file, file.with_name(f"a {file.name}"))
        with Image.open(file) as image:
            image.save(file.with_suffix(".bmp"))


@pytest.mark.parametrize("share", [0.2, 0.001], ids=["by share", "at least one"])
def test_copies_of_an_image_are_on_one_side(share: float, pets: Path) -> None:
    copy_everything(pets)
    data = load(pets, test_share=share, validation_share=share)
    assert len(data.train) + len(data.validation) + len(data.test) == 240
    for one, other in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert rows(getattr(data, one)).isdisjoint(rows(getattr(data, other)))


def test_an_image_of_two_classes_is_on_one_side(pets: Path) -> None:
    for file in list((pets / "dog").iterdir()):
        shutil.copy(file, pets / "cat" / f"dog {file.name}")
    data = load(pets, test_share=0.001, validation_share=0.001)
    assert rows(data.train).isdisjoint(rows(data.test))
    assert rows(data.train).isdisjoint(rows(data.validation))


def test_each_class_gives_one_image_at_least(pets: Path) -> None:
    data = load(pets, test_share=0.001, validation_share=0.001)
    assert np.bincount(data.test.labels).tolist() == [1, 1]
    assert np.bincount(data.validation.labels).tolist() == [1, 1]


def test_splits_that_are_given_stay_as_they_are(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        add(tmp_path / "train", label, range(20))
        add(tmp_path / "test", label, range(20, 25))
    data = load(tmp_path)
    wanted = {f"{label}/{number:03}.png" for label in ("cat", "dog") for number in range(20, 25)}
    assert names(data.test) == wanted
    assert len(data.train) + len(data.validation) == 40
    assert names(data.train).isdisjoint(names(data.validation))


@pytest.mark.parametrize("given", [True, False])
def test_the_test_split_alone_is_the_one_that_training_has(given: bool, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        add(tmp_path / "train" if given else tmp_path, label, range(30), size=(20, 30))
        if given:
            add(tmp_path / "test", label, range(30, 35), size=(50, 50))
    classes, test = datasets.load_test(TrainingSettings(data=str(tmp_path), cache="off"))
    data = load(tmp_path)
    assert tuple(classes) == data.classes
    assert test.fingerprint() == data.test.fingerprint()


# What images are brought to.


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ([(3, 3)], 8),
        ([(30, 45)], 32),
        ([(27, 90)], 24),
        ([(22, 22), (22, 22), (64, 64)], 24),
        ([(300, 200)], 128),
    ],
)
def test_the_side_is_the_median_rounded_to_8(
    sizes: list[tuple[int, int]], side: int, tmp_path: Path
) -> None:
    for label in ("a", "b"):
        for number in range(12):
            add(tmp_path, label, [number], size=sizes[number % len(sizes)])
    assert load(tmp_path).target == Target(side, side, 3)


def test_size_channels_and_resize_may_be_chosen(pets: Path) -> None:
    data = load(pets, image_size=12, channels=1, resize="crop")
    assert data.target == Target(12, 12, 1, "crop")
    assert data.train.inputs.shape[1:] == (12, 12, 1)


def test_all_grey_images_stay_grey(tmp_path: Path) -> None:
    for label in ("a", "b"):
        add(tmp_path, label, range(20), channels=1)
    assert load(tmp_path).target.channels == 1
    assert load(tmp_path, channels=3).target.channels == 3
    add(tmp_path, "b", [20])
    assert load(tmp_path).target.channels == 3


# What is wrong.


def only(folder: Path, *kept: str) -> None:
    for sub in folder.iterdir():
        if sub.name not in kept:
            shutil.rmtree(sub)


def corrupt(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"corrupt")


def make_splits(folder: Path) -> None:
    shutil.copytree(folder, folder.parent / "copy")
    (folder.parent / "copy").rename(folder / "train")
    only(folder, "train")
    shutil.copytree(folder / "train", folder / "test")


def then(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def all_of_them(folder: Path) -> None:
        for step in steps:
            step(folder)

    return all_of_them


DEFECTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the folder is missing": (shutil.rmtree, "{} is no folder"),
    "the folder is a file": (
        then(shutil.rmtree, lambda f: f.write_text("")),
        "{} is no folder",
    ),
    "no classes": (only, "{} has no subfolders"),
    "a single class": (lambda f: only(f, "cat"), "{} has a single class, 'cat'"),
    "a class folder is empty": (
        lambda f: (f / "empty").mkdir(),
        "{}/empty has no image",
    ),
    "a class folder has no images": (
        lambda f: add_text(f / "texts" / "readme.txt"),
        "{}/texts has no image",
    ),
    "an unreadable file": (
        lambda f: corrupt(f, "cat/007.png"),
        "1 of 80 files can't be read:\n  {}/cat/007.png: .*no JPEG.*--skip-unreadable",
    ),
    "an empty file": (
        lambda f: (f / "cat/007.png").write_bytes(b""),
        "{}/cat/007.png: the image is empty",
    ),
    "a link to nowhere": (
        lambda f: (f / "cat" / "link.png").symlink_to("nowhere.png"),
        "{}/cat/link.png: .*No such file",
    ),
    "several unreadable files": (
        lambda f: corrupt(f, "dog/001.png", "cat/007.png", "cat/008.png"),
        "3 of 80 files .*\n  {}/cat/007.png.*\n  {}/cat/008.png.*\n  {}/dog/001.png",
    ),
    "a class without a readable image": (
        lambda f: corrupt(f, *(f"dog/{number:03}.png" for number in range(30))),
        "class 'dog' has no readable image; 30 of 80",
    ),
    "nothing is readable": (
        lambda f: corrupt(f, *(str(file.relative_to(f)) for file in f.rglob("*.png"))),
        "none of the images looked at can be read, such as {}/cat/000.png",
    ),
    "a class with a single image": (
        lambda f: add(f, "ant", [0]),
        "class 'ant' has no image left to train on",
    ),
    "a test class that is not trained": (
        then(make_splits, lambda f: add(f / "test", "ant", [0])),
        "{}/test/ant is a class that the training images lack",
    ),
    "a trained class that is not tested": (
        then(make_splits, lambda f: shutil.rmtree(f / "test" / "dog")),
        "{}/test/dog has no image",
    ),
}


def add_text(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("text")


@pytest.mark.parametrize("kind", DEFECTS)
def test_what_is_wrong_is_named(kind: str, pets: Path) -> None:
    damage, words = DEFECTS[kind]
    load(pets)
    damage(pets)
    with pytest.raises(DataError, match="(?s)" + words.replace("{}", str(pets))):
        load(pets)


def test_a_single_class_is_noticed_before_any_image_is_read(pets: Path) -> None:
    only(pets, "cat")
    corrupt(pets, "cat/007.png")
    with pytest.raises(DataError, match="single class"):
        load(pets)


def test_unreadable_files_may_be_left_out(pets: Path, caplog: pytest.LogCaptureFixture) -> None:
    corrupt(pets, "cat/007.png", "dog/001.png")
    data = load(pets, skip_unreadable=True)
    kept = names(data.train) | names(data.validation) | names(data.test)
    assert len(kept) == 78
    assert not kept & {"cat/007.png", "dog/001.png"}
    assert f"{pets}/cat/007.png" in caplog.text
    for split in (data.train, data.validation, data.test):
        assert split.files
        for file, pixels in zip(split.files, split.inputs, strict=True):
            assert np.array_equal(pixels, images.decode(file.read_bytes(), data.target))


def test_a_class_left_without_images_is_an_error_all_the_same(pets: Path) -> None:
    corrupt(pets, *(f"dog/{number:03}.png" for number in range(30)))
    with pytest.raises(DataError, match="class 'dog' has no readable image"):
        load(pets, skip_unreadable=True)


def test_what_is_no_image_by_name_is_left_out_and_said(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    add_text(pets / ".hidden" / "a.png")
    (pets / "cat" / ".DS_Store").write_text("")
    (pets / "labels.csv").write_text("")
    load(pets)
    assert caplog.text == ""
    (pets / "cat" / "notes.txt").write_text("")
    assert len(load(pets).classes) == 2
    assert f"1 files are no images by their name and are left out: {pets}/cat/notes.txt" in (
        caplog.text
    )


def test_images_in_folders_of_a_class_folder_are_its_images(pets: Path) -> None:
    (pets / "cat" / "siamese").mkdir()
    (pets / "cat" / "000.png").rename(pets / "cat" / "siamese" / "000.PNG")
    data = load(pets)
    assert len(data.train) + len(data.validation) + len(data.test) == 80


# One split.


def test_an_image_is_encoded_as_its_file_or_as_a_png_of_its_pixels(pets: Path) -> None:
    data = load(pets)
    split = data.test
    assert split.files
    assert split.encoded(3) == split.files[3].read_bytes()
    built_in = Split(split.inputs, split.labels)
    assert np.array_equal(images.decode(built_in.encoded(3), data.target), split.inputs[3])
    grey = Split(split.inputs[..., :1], split.labels)
    assert np.array_equal(images.decode(grey.encoded(3), Target(8, 8, 1)), grey.inputs[3])


def test_a_fingerprint_tells_splits_apart(pets: Path) -> None:
    split = load(pets).test
    assert split.fingerprint() == load(pets).test.fingerprint()
    assert Split(255 - split.inputs, split.labels).fingerprint() != split.fingerprint()
    assert Split(split.inputs, 1 - split.labels).fingerprint() != split.fingerprint()


def test_the_digits_come_with_scikit_learn() -> None:
    data = datasets.load(TrainingSettings())
    assert (data.name, data.target) == ("digits", Target(8, 8, 1))
    assert data.classes == tuple("0123456789")
    assert len(data.train) + len(data.validation) + len(data.test) == 1797
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 255)
    assert rows(data.train).isdisjoint(rows(data.test))


@pytest.mark.parametrize("missing", ["train", "test"])
def test_one_half_of_given_splits_is_not_taken_for_a_class(missing: str, pets: Path) -> None:
    folder = pets.parent / "split"
    shutil.copytree(pets, folder / ("test" if missing == "train" else "train"))
    shutil.copytree(pets, folder / "val")
    with pytest.raises(DataError, match="only one of train/ and test/"):
        load(folder)


def test_the_cut_stays_where_the_size_or_the_channels_change(pets: Path) -> None:
    """Else the next version would be held against this one on images that this one has learned."""
    small, large = load(pets, image_size=8), load(pets, image_size=24, channels=1, resize="crop")
    for split in ("train", "validation", "test"):
        assert names(getattr(small, split)) == names(getattr(large, split))


def test_copies_of_given_test_images_are_not_trained_on(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pets.parent / "split"
    shutil.copytree(pets, folder / "train")
    for kind in ("cat", "dog"):
        (folder / "test" / kind).mkdir(parents=True)
        for file in sorted((pets / kind).iterdir())[:5]:
            shutil.copy(file, folder / "test" / kind / f"copy {file.name}")
    data = load(folder)
    assert len(data.train) + len(data.validation) == 80 - 10
    assert rows(data.test).isdisjoint(rows(data.train) | rows(data.validation))
    assert "10 training images are test images too" in caplog.text


@pytest.mark.parametrize(
    ("folder", "name"), [("my photos", "my-photos"), ("Chats & chiens (2)", "Chats-chiens-2")]
)
def test_a_model_is_named_by_its_folder_as_far_as_names_go(folder: str, name: str) -> None:
    assert model_name(TrainingSettings(data=f"somewhere/{folder}")) == name


@pytest.mark.parametrize(
    ("settings", "words"), [({"data": "/"}, "--name"), ({"name": "a b"}, "can't name a model")]
)
def test_what_makes_no_name_is_said(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConvoyError, match=words):
        model_name(TrainingSettings(**settings))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("side", [20, 70, 300])
def test_decoding_for_several_sizes_gives_what_decoding_for_each_does(kind: str, side: int) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    more = {"exif": exif} if kind in ("JPEG", "WEBP") else {}
    noise("any", (side, side // 2)).save(buffer, kind, **more)
    targets = [Target(128, 128, 3), Target(32, 32, 3), Target(8, 24, 1, "crop")]
    for target, pixels in zip(targets, images.decode_all(buffer.getvalue(), targets), strict=True):
        assert np.array_equal(pixels, images.decode(buffer.getvalue(), target))


def test_images_of_rare_classes_count_more() -> None:
    labels = np.array([0] * 60 + [1] * 30 + [3] * 10)
    weights = class_weights(labels, 4)
    assert weights.dtype == np.float32
    assert weights.shape == (4,)
    assert weights[1] == pytest.approx(2 * weights[0])
    assert weights[3] == pytest.approx(6 * weights[0])
    assert weights[2] == 0
    assert weights[labels].mean() == pytest.approx(1)
    assert class_weights(np.array([0, 1, 1, 0]), 2).tolist() == [1, 1]


# Lists.

Row = dict[str, Any]


def write_csv(
    file: Path, rows: Iterable[Row], delimiter: str = ",", encoding: str = "utf-8"
) -> Path:
    rows = list(rows)
    columns = list(rows[0]) if rows else ["path", "label"]
    with file.open("w", newline="", encoding=encoding) as out:
        writer = csv.DictWriter(out, columns, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return file


def write_parquet(file: Path, rows: Iterable[Row]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    return file


def rows_of(folder: Path, base: Path | None = None) -> list[Row]:
    return [
        {"path": str(file.relative_to(base) if base else file), "label": file.parent.name}
        for file in sorted(folder.rglob("*.png"), reverse=True)
    ]


def same(one: Dataset, other: Dataset) -> bool:
    return all(
        getattr(one, split).fingerprint() == getattr(other, split).fingerprint()
        for split in ("train", "validation", "test")
    )


LISTS: dict[str, Callable[[Path], Path]] = {
    "CSV": lambda pets: write_csv(pets.parent / "zoo.csv", rows_of(pets, pets.parent)),
    "absolute paths": lambda pets: write_csv(pets.parent / "zoo.csv", rows_of(pets)),
    "CSV of a spreadsheet": lambda pets: write_csv(
        pets.parent / "zoo.csv", rows_of(pets, pets.parent), ";", "utf-8-sig"
    ),
    "other columns, in capitals": lambda pets: write_csv(
        pets.parent / "zoo.CSV",
        (
            {"id": "7", "Label": f" {row['label']} ", "PATH": row["path"]}
            for row in rows_of(pets, pets.parent)
        ),
    ),
    "Parquet": lambda pets: write_parquet(pets.parent / "zoo.parquet", rows_of(pets, pets.parent)),
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_a_folders_files_is_the_same_data(kind: str, pets: Path) -> None:
    data = load(LISTS[kind](pets))
    assert (data.name, data.classes) == ("zoo", ("cat", "dog"))
    assert same(data, load(pets))


def test_labels_may_be_numbers(pets: Path) -> None:
    rows = [{**row, "label": 7 if row["label"] == "cat" else 12} for row in rows_of(pets)]
    assert load(write_parquet(pets.parent / "zoo.parquet", rows)).classes == ("12", "7")


@pytest.mark.parametrize("validated", [True, False])
def test_a_list_may_give_the_splits(validated: bool, pets: Path) -> None:
    rows = rows_of(pets)
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 5 == 0 else "train"
        if validated and number % 5 == 1:
            row["split"] = "Validation "
    file = write_csv(pets.parent / "zoo.csv", rows)
    data = load(file)
    given = {row["split"].strip().lower(): set[str]() for row in rows}
    for row in rows:
        given[row["split"].strip().lower()].add("/".join(Path(row["path"]).parts[-2:]))
    assert names(data.test) == given["test"]
    if validated:
        assert names(data.validation) == given["validation"]
        assert names(data.train) == given["train"]
    else:
        assert names(data.train) | names(data.validation) == given["train"]
    _, test = datasets.load_test(TrainingSettings(data=str(file), cache="off"))
    assert test.fingerprint() == data.test.fingerprint()


def test_given_splits_of_a_list_share_no_copies(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "split": "train"} for row in rows_of(pets)]
    for split in ("test", "validation"):
        for kind in ("cat", "dog"):
            # The first two are in all splits, then two are in this one and in training.
            for number in (0, 1, 2 if split == "test" else 3):
                copy = pets / kind / f"{split} {number}.png"
                shutil.copy(pets / kind / f"{number:03}.png", copy)
                rows.append({"path": str(copy), "label": kind, "split": split})
    data = load(write_csv(pets.parent / "zoo.csv", rows))
    assert (len(data.test), len(data.validation), len(data.train)) == (6, 2, 80 - 8)
    assert rows_of_all(data) == 80
    assert "4 validation images are test images too" in caplog.text
    assert "6 training images are test images too" in caplog.text
    assert "2 training images are validation images too" in caplog.text


def rows_of_all(data: Dataset) -> int:
    return len(rows(data.train) | rows(data.validation) | rows(data.test))


WRONG_LISTS: dict[str, tuple[Callable[[list[Row]], object], str]] = {
    "no label column": (
        lambda rows: [row.pop("label") for row in rows],
        "{} has the columns path, split: path and label are needed",
    ),
    "no path column": (
        lambda rows: [row.pop("path") for row in rows],
        "{} has the columns label, split: path and label are needed",
    ),
    "no rows": (lambda rows: rows.clear(), "{} names no images to train on"),
    "nothing to train on": (
        lambda rows: [row.update(split="test") for row in rows],
        "{} names no images to train on",
    ),
    "an empty label": (
        lambda rows: rows[5].update(label=" "),
        r"{}: 1 rows have no label: line 7 \(.*024.png\)",
    ),
    "an empty path": (lambda rows: rows[5].update(path=""), "{}: 1 rows have no path: line 7"),
    "an unknown split": (
        lambda rows: [rows[n].update(split="val") for n in range(5)],
        r"{}: 5 rows have a split that is none of train, validation, test: "
        r"line 2 \('val'\), line 3 \('val'\), line 4 \('val'\) ...$",
    ),
    "two labels": (
        lambda rows: rows.append({**rows[0], "label": "cat"}),
        r"{}: 1 files have two labels: .*dog/029.png \('dog', line 82 'cat'\)",
    ),
    "two splits": (
        lambda rows: rows.append({**rows[0], "split": "test"}),
        r"{}: 1 files are in two splits: .*dog/029.png \(train, line 82 test\)",
    ),
    "a path and the same in other words": (
        lambda rows: rows.append({**rows[0], "path": "pets/cat/../dog/029.png", "label": "cat"}),
        "{}: 1 files have two labels",
    ),
    "missing files": (
        lambda rows: [rows[n].update(path=f"gone/{n}.png") for n in range(4)],
        r"{}: 4 files are missing \(paths begin at .*\): .*gone/0.png, .*gone/1.png, .*2.png ...$",
    ),
    "a path too long for a file": (
        lambda rows: rows[5].update(path="x" * 300 + ".png"),
        "{}: 1 files are missing",
    ),
    "a path with a zero byte": (
        lambda rows: rows[5].update(path="pets/\0.png"),
        "{}: 1 rows have a path with a zero byte: line 7",
    ),
    "a single class": (
        lambda rows: [row.update(label="dog") for row in rows],
        "{} has a single class, 'dog'",
    ),
    "a test class that is not trained": (
        lambda rows: rows[0].update(label="ant", split="test"),
        "{}: 'ant' is a class that the training images lack",
    ),
    "a trained class that is not tested": (
        lambda rows: [rows[n].update(split="test") for n in range(3)],
        "class 'cat' has no image left to test with",
    ),
}


@pytest.mark.parametrize("kind", WRONG_LISTS)
def test_what_is_wrong_with_a_list_is_named(kind: str, pets: Path) -> None:
    damage, words = WRONG_LISTS[kind]
    listed = [{**row, "split": "train"} for row in rows_of(pets, pets.parent)]
    file = write_csv(pets.parent / "zoo.csv", listed)
    load(file)
    damage(listed)
    write_csv(file, listed)
    with pytest.raises(DataError, match=words.replace("{}", str(file))):
        load(file)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("zoo.csv", b"", r"has the columns \(none\)"),
        (
            "zoo.csv",
            "path,label\na.png,caf\u00e9\n".encode("latin-1"),
            "not UTF-8 .*0xe9.*: save it",
        ),
        ("zoo.csv", "path,label\na.png,cat\n".encode("utf-16"), "not UTF-8 .byte 0 is 0xff"),
        ("zoo.csv", b"path,label\n" + b"a" * 200_000 + b",cat\n", "is no CSV"),
        ("zoo.parquet", b"path,label\n", "is no Parquet file"),
        ("zoo.csv", None, "No such file"),
        ("zoo.parquet", None, "No such file"),
    ],
)
def test_what_is_no_list_is_said(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path / name}.*{words}|{words}.*{tmp_path / name}"):
        load(tmp_path / name)


def test_a_row_that_is_short_has_no_label(pets: Path) -> None:
    file = write_csv(pets.parent / "zoo.csv", rows_of(pets))
    file.write_text(file.read_text() + "pets/cat/000.png\n")
    with pytest.raises(DataError, match="1 rows have no label: line 82"):
        load(file)


def test_a_file_that_is_named_twice_counts_once(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(pets)
    data = load(write_csv(pets.parent / "zoo.csv", [*rows, rows[0], rows[0]]))
    assert same(data, load(pets))
    assert "2 files are named twice" in caplog.text


def test_missing_files_of_a_list_may_be_left_out(
    pets: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = rows_of(pets)
    rows[0]["path"] = str(pets / "gone.png")
    data = load(write_csv(pets.parent / "zoo.csv", rows), skip_unreadable=True)
    assert len(data.train) + len(data.validation) + len(data.test) == 79
    assert "gone.png" in caplog.text


def test_parquet_needs_its_extra(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(pets.parent / "zoo.parquet", rows_of(pets))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'convoy-serving\[parquet\]'"):
        load(file)


# What is kept on disk.


class Kept:
    """Loads with a cache, and counts the files that were decoded for it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.decoded = 0
        decode_all = images.decode_all

        def counted(data: bytes, targets: list[Target]) -> list[images.Pixels]:
            self.decoded += 1
            return decode_all(data, targets)

        monkeypatch.setattr(images, "decode_all", counted)
        monkeypatch.setattr(cache, "SETTLED_NS", 0)

    def load(self, data: Path, **settings: Any) -> tuple[Dataset, int]:
        self.decoded = 0
        return load(data, cache=str(self.folder), **settings), self.decoded

    def entries(self) -> list[Path]:
        return sorted(self.folder.iterdir())


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path / "kept" / "here", monkeypatch)


def test_a_second_run_decodes_nothing(pets: Path, kept: Kept) -> None:
    first, decoded = kept.load(pets)
    assert decoded == 80
    second, decoded = kept.load(pets)
    assert decoded == 0
    assert same(first, second)
    for split in ("train", "validation", "test"):
        one, other = getattr(first, split), getattr(second, split)
        assert (one.files, one.identities) == (other.files, other.identities)
    assert same(second, load(pets))


def test_the_pixels_of_a_given_test_stay_on_the_disk(pets: Path, kept: Kept) -> None:
    folder = pets.parent / "split"
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            add(folder / split, kind, range(20) if split == "train" else range(20, 30))
    kept.load(folder)
    data, decoded = kept.load(folder)
    assert decoded == 0
    assert not data.test.inputs.flags.writeable
    assert same(data, load(folder))


def change(file: Path, keep_times: bool) -> None:
    """Other pixels in as many bytes."""
    before = file.stat()
    noise(f"not {file}").save(file)
    assert file.stat().st_size == before.st_size
    if keep_times:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_changed_file_is_decoded_anew(keep_times: bool, pets: Path, kept: Kept) -> None:
    for kind in ("cat", "dog"):
        for file in (pets / kind).iterdir():
            Image.open(file).save(file.with_suffix(".bmp"))
            file.unlink()
    kept.load(pets)
    change(pets / "cat" / "007.bmp", keep_times)
    data, decoded = kept.load(pets)
    assert decoded == 1
    assert same(data, load(pets))
    assert kept.load(pets)[1] == 0


def test_only_what_is_new_is_decoded(pets: Path, kept: Kept) -> None:
    kept.load(pets)
    add(pets, "cat", range(50, 60))
    (pets / "dog" / "003.png").unlink()
    (pets / "dog" / "004.png").rename(pets / "dog" / "renamed.png")
    data, decoded = kept.load(pets)
    assert decoded == 10 + 1
    assert same(data, load(pets))
    assert kept.load(pets)[1] == 0
    assert len(kept.entries()) == 1


def test_another_list_of_the_same_files_finds_them(pets: Path, kept: Kept) -> None:
    kept.load(write_csv(pets.parent / "may.csv", rows_of(pets)))
    add(pets, "cat", range(50, 55))
    data, decoded = kept.load(write_csv(pets.parent / "june.csv", rows_of(pets)))
    assert decoded == 5
    assert same(data, load(pets))


def test_what_was_decoded_otherwise_is_not_used(
    pets: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.load(pets)
    assert kept.load(pets, image_size=16)[1] == 80
    assert kept.load(pets, channels=1)[1] == 80
    assert kept.load(pets, resize="crop")[1] == 80
    assert kept.load(pets)[1] == 0
    monkeypatch.setattr("PIL.__version__", "1.0")
    assert kept.load(pets)[1] == 80


def test_a_file_that_may_still_change_is_not_kept(
    pets: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "SETTLED_NS", 3600 * 10**9)
    kept.load(pets)
    assert kept.load(pets)[1] == 80
    assert not kept.folder.exists()


def test_an_unreadable_file_is_tried_again(pets: Path, kept: Kept) -> None:
    file = pets / "cat" / "007.png"
    content = file.read_bytes()
    file.write_bytes(b"corrupt")
    for decoded in (80, 1):
        with pytest.raises(DataError, match="1 of 80"):
            kept.load(pets)
        assert kept.decoded == decoded
    file.write_bytes(content)
    data, decoded = kept.load(pets)
    assert decoded == 1
    assert same(data, load(pets))


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut off": lambda content: content[:-5],
    "longer": lambda content: content + b"0000",
    "other pixels": lambda content: content[:-10] + b"\0" + content[-9:],
    "other identities": lambda content: content.replace(content[1600:1610], b"0123456789"),
    "no array": lambda content: b"0" * len(content),
    "another shape": lambda content: content.replace(b"(80, 8, 8, 3)", b"(80, 8, 4, 6)"),
    "a huge shape": lambda content: content.replace(b"(80, 16)", b"(9**9, )"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_entries_are_made_anew(
    kind: str, pets: Path, kept: Kept, caplog: pytest.LogCaptureFixture
) -> None:
    kept.load(pets)
    [entry] = kept.entries()
    content = entry.read_bytes()
    assert DAMAGES[kind](content) != content
    entry.write_bytes(DAMAGES[kind](content))
    data, decoded = kept.load(pets)
    assert decoded == 80
    assert same(data, load(pets))
    assert f"{entry} is of no use" in caplog.text
    assert kept.load(pets)[1] == 0


def full_disk(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "kind", ["a file in its place", "no room", "no room half-way", "no rename"]
)
def test_without_a_place_to_keep_images_training_goes_on(
    kind: str,
    pets: Path,
    kept: Kept,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kind == "a file in its place":
        kept.folder.parent.write_text("")
    elif kind == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    elif kind == "no room half-way":
        monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full_disk)
    else:
        monkeypatch.setattr(Path, "replace", full_disk)
    data, decoded = kept.load(pets)
    assert decoded == 80
    assert same(data, load(pets))
    assert f"images can't be kept in {kept.folder}" in caplog.text
    if kept.folder.is_dir():
        assert kept.entries() == []


def test_what_was_used_longest_ago_goes_first(
    pets: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.folder.mkdir(parents=True)
    (kept.folder / "notes.npy").write_text("not ours" * 10_000)
    kept.load(pets, image_size=8)
    [_, eight] = sorted(kept.entries(), key=lambda path: path.name == "notes.npy", reverse=True)
    kept.load(pets, image_size=12)
    [twelve] = set(kept.entries()) - {eight, kept.folder / "notes.npy"}
    left = kept.folder / f"{twelve.name}.killed"
    left.write_bytes(b"")
    for age, path in enumerate((twelve, eight, left), 1):
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 1000 * age))
    assert kept.load(pets, image_size=8)[1] == 0  # and so it is used last
    monkeypatch.setattr(cache, "MOST_BYTES", 80 * (16 * 16 + 8 * 8 + 100) * 3)
    kept.load(pets, image_size=16)
    assert twelve not in kept.entries()
    assert {eight, kept.folder / "notes.npy"} <= set(kept.entries())
    assert left not in kept.entries()
    monkeypatch.setattr(cache, "UNUSED_S", 3000)
    os.utime(eight, (0, 0))
    kept.load(pets, image_size=20)
    assert eight not in kept.entries()
    assert len(kept.entries()) == 2


def test_more_than_may_be_kept_is_not_begun(
    pets: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST_BYTES", 1000)
    kept.load(pets)
    assert not kept.folder.exists()


def test_where_images_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/there")
    assert cache.folder("auto") == Path("/there/convoy")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache.folder("auto") == Path("/home/somebody/.cache/convoy")
    assert cache.folder("here") == Path("here")
    assert cache.folder("off") is None
