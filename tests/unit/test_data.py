"""Folders of images to splits: what is held out stays held out, and what is wrong is named."""

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service import images
from service.errors import ConvoyError
from service.images import Target
from training import data as datasets
from training.data import DataError, Dataset, Split, model_name
from training.settings import TrainingSettings


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
    return datasets.load(TrainingSettings(data=str(folder), **settings))


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
    classes, test = datasets.load_test(TrainingSettings(data=str(tmp_path)))
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
        "{}/dog has no readable image; 30 of 80",
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
    with pytest.raises(DataError, match="dog has no readable image"):
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
