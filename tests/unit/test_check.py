"""What is wrong with images is found before training: planted copies, wrong labels, odd files. And what
is not wrong is not reported: the pictures are real photographs, with clear skies among them."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from sklearn.datasets import load_sample_images

from convoy.cli.app import app
from convoy_service.artifacts import images
from convoy_service.artifacts.images import Target
from convoy_training.data import datasets
from convoy_training.data.checks import Finding, Report, check, summary
from convoy_training.data.datasets import untracked
from convoy_training.data.duplicates import near
from convoy_training.settings import TrainingSettings

SIDE = 64
SAMPLES = [Image.fromarray(pixels) for pixels in load_sample_images().images]
COPIES = {"copies", "near-copies", "two-labels", "near-two-labels"} | {
    f"{split}-{kind}" for split in ("test", "validation") for kind in ("in-train", "near-train")
}


def crop(number: int, moved: int = 0) -> Image.Image:
    """One of 108 squares that share no pixel: 54 of a Chinese palace with its sky, then 54 of a flower
    with a blurred ground.
    """
    photograph, number = SAMPLES[number // 54], number % 54
    left, top = number % 9 * SIDE + moved, number // 9 * SIDE
    return photograph.crop((left, top, left + SIDE, top + SIDE))


def save(image: Image.Image, file: Path, **how: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **how)
    return file


@pytest.fixture(scope="session")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/<label>, and given/train and given/test with 14 of each label."""
    folder = tmp_path_factory.mktemp("squares")
    for number in range(108):
        label, name = "palace" if number < 54 else "flower", f"{number:03}.png"
        file = save(crop(number), folder / "photos" / label / name)
        copy = folder / "given" / ("train" if number % 54 < 40 else "test") / label / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    return folder


@pytest.fixture
def photos(squares: Path, tmp_path: Path) -> Path:
    return shutil.copytree(squares / "photos", tmp_path / "photos")


@pytest.fixture
def given(squares: Path, tmp_path: Path) -> Path:
    return shutil.copytree(squares / "given", tmp_path / "given")


def look(data: Path) -> Report:
    return check(TrainingSettings(data=str(data)))


def kinds(findings: Iterable[Finding]) -> set[str]:
    return {finding.kind for finding in findings}


def only(findings: Iterable[Finding], kind: str) -> Finding:
    [found] = [finding for finding in findings if finding.kind == kind]
    return found


def files(finding: Finding) -> list[list[str]]:
    return [
        [f"{e.file.parent.name}/{e.file.name}" for e in group if e.file]
        for group in finding.examples
    ]


def test_nothing_is_wrong_with_good_images(given: Path) -> None:
    report = look(given)
    assert report.passed
    assert kinds(report.findings) == {"formats", "sizes", "classes"}
    assert report.counts == {"train": [40, 40], "test": [14, 14]}
    assert report.target == Target(SIDE, SIDE, 3)
    assert report.verdict() == "108 images: 0 errors, 0 warnings"


# Copies.


def saved(quality: int) -> Callable[[int, Path], Path]:
    return lambda number, file: save(crop(number), file.with_suffix(".jpg"), quality=quality)


def resized(side: int) -> Callable[[int, Path], Path]:
    return lambda number, file: save(crop(number).resize((side, side)), file)


def lit(factor: float) -> Callable[[int, Path], Path]:
    return lambda number, file: save(ImageEnhance.Brightness(crop(number)).enhance(factor), file)


SAME: dict[str, Callable[[int, Path], Path]] = {
    "the same bytes": lambda number, file: save(crop(number), file),
    "the same pixels": lambda number, file: save(crop(number), file.with_suffix(".bmp")),
    "JPEG": saved(90),
    "twice as large": resized(2 * SIDE),
    "smaller": resized(SIDE * 3 // 4),
}
LIKE: dict[str, Callable[[int, Path], Path]] = {
    "poor JPEG": saved(8),
    "darker": lit(0.8),
    "lighter": lit(1.15),
    "less contrast": lambda number, file: save(
        ImageEnhance.Contrast(crop(number)).enhance(0.6), file
    ),
    "grey": lambda number, file: save(crop(number).convert("L"), file),
    "moved": lambda number, file: save(crop(number, moved=2), file),
    "mirrored": lambda number, file: save(
        crop(number).transpose(Image.Transpose.FLIP_LEFT_RIGHT), file
    ),
}
# Those with some detail: a palace, its trees, the flower.
PLANTED = (21, 28, 39, 76, 84, 85)


@pytest.mark.parametrize("kind", SAME)
def test_a_picture_in_train_and_test_is_an_error(kind: str, given: Path) -> None:
    wanted = []
    for number in PLANTED:
        label = "palace" if number < 54 else "flower"
        copy = SAME[kind](number, given / "test" / label / f"copy {number}.png")
        wanted.append([f"{label}/{copy.name}", f"{label}/{number:03}.png"])
    report = look(given)
    assert not report.passed
    found = only(report.findings, "test-in-train")
    assert (found.severity, found.count) == ("error", len(PLANTED))
    assert sorted(files(found)) == sorted(wanted)
    assert kinds(report.findings) & COPIES == {"test-in-train"}


@pytest.mark.parametrize("kind", LIKE)
def test_nearly_the_same_picture_in_train_and_test_is_a_warning(kind: str, given: Path) -> None:
    wanted = []
    for number in PLANTED:
        label = "palace" if number < 54 else "flower"
        copy = LIKE[kind](number, given / "test" / label / f"copy {number}.png")
        wanted.append([f"{label}/{copy.name}", f"{label}/{number:03}.png"])
    report = look(given)
    assert report.passed
    found = only(report.findings, "test-near-train")
    assert (found.severity, found.count) == ("warning", len(PLANTED))
    assert sorted(files(found)) == sorted(wanted)
    assert ("mirrored" in found.text) == (kind == "mirrored")
    assert kinds(report.findings) & COPIES == {"test-near-train"}
    # Training says the same of what it has loaded.
    dataset = datasets.load(TrainingSettings(data=str(given), cache="off"))
    told = summary(dataset)
    assert {"test-near-train"} <= kinds(told)
    for group in only(told, "test-near-train").examples:
        for example in group:
            where = getattr(dataset, example.split)
            assert where.files[example.position] == example.file


def test_much_smaller_copies_are_found(given: Path) -> None:
    for number in PLANTED:
        label = "palace" if number < 54 else "flower"
        resized(SIDE // 3)(number, given / "test" / label / f"copy {number}.png")
    found = [f for f in look(given).findings if f.kind in ("test-in-train", "test-near-train")]
    assert sum(finding.count for finding in found) == len(PLANTED)


@pytest.mark.parametrize(
    ("plant", "severity", "kind"),
    [
        (SAME["the same bytes"], "error", "two-labels"),
        (SAME["JPEG"], "error", "two-labels"),
        (LIKE["darker"], "warning", "near-two-labels"),
        (LIKE["mirrored"], "warning", "near-two-labels"),
    ],
)
def test_a_picture_under_two_labels_is_named_with_both(
    plant: Callable[[int, Path], Path], severity: str, kind: str, photos: Path
) -> None:
    copy = plant(39, photos / "flower" / "wrong.png")
    report = look(photos)
    assert report.passed == (severity == "warning")
    found = only(report.findings, kind)
    assert found.severity == severity
    [group] = found.examples
    assert {(str(example.file), example.remark) for example in group} == {
        (str(photos / "palace" / "039.png"), "palace"),
        (str(copy), "flower"),
    }


def test_copies_of_one_split_are_noted(photos: Path) -> None:
    for number in (21, 39):
        for name in ("once.png", "twice.png"):
            shutil.copy(
                photos / "palace" / f"{number:03}.png", photos / "palace" / f"{number} {name}"
            )
    report = look(photos)
    assert report.passed
    found = [finding for finding in report.findings if finding.kind == "copies"]
    assert {finding.severity for finding in found} == {"note"}
    assert sum(finding.count for finding in found) == 4
    assert sorted(map(len, (group for finding in found for group in finding.examples))) == [3, 3]


def test_exact_copies_of_test_images_are_left_out_so_training_says_nothing(given: Path) -> None:
    shutil.copy(given / "train" / "palace" / "039.png", given / "test" / "palace" / "copy.png")
    assert "test-in-train" in kinds(look(given).findings)
    dataset = datasets.load(TrainingSettings(data=str(given), cache="off"))
    assert not kinds(summary(dataset)) & COPIES


def test_images_that_are_alike_by_nature_are_no_errors(tmp_path: Path) -> None:
    """Strokes, as in handwritten digits."""
    chance = np.random.default_rng(0)
    for number in range(120):
        image = Image.new("L", (112, 112))
        lean, width = chance.normal(8, 6), int(chance.integers(10, 16))
        for label, stroke in (
            ("one", [(56 + lean, 16), (56 - lean, 96)]),
            ("seven", [(26, 20), (80 + lean, 20), (50 - lean, 96)]),
        ):
            drawn = image.copy()
            ImageDraw.Draw(drawn).line(stroke, fill=255, width=width)
            save(drawn.resize((28, 28)), tmp_path / label / f"{number}.png")
    report = look(tmp_path)
    assert "alike by nature" in only(report.findings, "test-near-train").advice
    assert "test-in-train" not in kinds(report.findings)
    assert report.passed
    assert {f.severity for f in report.findings if "copies" in f.kind or "labels" in f.kind} == {
        "note"
    }


def test_flat_pictures_are_no_copies_of_one_another() -> None:
    chance = np.random.default_rng(0)
    slope = np.linspace(120, 200, 32)
    skies = [
        (slope[:, None] + chance.normal(0, noise, (32, 32)))[..., None].clip(0, 255)
        for noise in (0.5, 1, 2, 4, 8)
        for _ in range(40)
    ]
    assert near(lambda number: skies[number].astype(np.uint8), 200, 200, untracked) == []


def test_pictures_that_share_their_lights_and_shades_alone_are_no_copies() -> None:
    """Of the same hash, as before one backdrop: what is in front decides."""
    chance = np.random.default_rng(0)
    backdrop = chance.uniform(60, 190, (5, 5)).astype(np.float32)
    smooth = np.asarray(Image.fromarray(backdrop).resize((32, 32), Image.Resampling.BICUBIC))
    pictures = [
        (smooth + chance.choice([-12, 12], (32, 32)))[..., None].clip(0, 255).astype(np.uint8)
        for _ in range(30)
    ]
    pictures.append(pictures[3] // 2 + 40)
    pairs = near(lambda number: pictures[number], 31, 31, untracked)
    assert pairs == [(3, 30, False)]


def test_the_first_of_a_pair_is_among_those_asked_about() -> None:
    def small(number: int) -> images.Pixels:
        pixels = np.asarray(crop(PLANTED[number % 6]).convert("RGB"))
        return images.prepare(pixels, Target(32, 32, 1))

    pairs = near(small, 18, 6, untracked)
    assert [pair[:2] for pair in pairs] == [(n, n + k) for n in range(6) for k in (6, 12)]
    assert not any(pair.mirrored for pair in pairs)


# Classes, files, and what is no data.


def keep(folder: Path, count: int) -> None:
    for file in sorted(folder.iterdir())[count:]:
        file.unlink()


def change(folder: Path, count: int, how: Callable[[Image.Image, Path], object]) -> object:
    changed = sorted(folder.iterdir())[:count]
    for file in changed:
        with Image.open(file) as image:
            image.load()
        how(image, file)
    return changed


def as_cmyk(image: Image.Image, file: Path) -> None:
    image.convert("CMYK").save(file.with_suffix(".jpg"))
    file.unlink()


def as_animation(image: Image.Image, file: Path) -> None:
    image.save(file.with_suffix(".gif"), save_all=True, append_images=[image.rotate(90)])
    file.unlink()


def lying(image: Image.Image, file: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(file, exif=exif)


def deep(image: Image.Image, file: Path) -> None:
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8).save(file)


def see_through(image: Image.Image, file: Path) -> None:
    image.putalpha(128)
    image.save(file)


def remove_palaces(folder: Path) -> None:
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "palace")


PLANTS: dict[str, tuple[Callable[[Path], object], str, str, str]] = {
    "few images": (lambda f: keep(f / "train" / "palace", 15), "warning", "tiny", r"palace \(15\)"),
    "few to test with": (
        lambda f: keep(f / "test" / "palace", 9),
        "warning",
        "untested",
        r"palace \(9\)",
    ),
    "many more of one class": (
        lambda f: keep(f / "train" / "palace", 5),
        "warning",
        "unbalanced",
        r"flower has 8.0 times as many images as palace \(40 and 5\)",
    ),
    "a black image": (
        lambda f: save(Image.new("RGB", (SIDE, SIDE)), f / "train" / "palace" / "black.png"),
        "warning",
        "constant",
        "^1 images are a single colour",
    ),
    "small images": (
        lambda f: change(f / "train" / "palace", 3, lambda i, file: i.resize((31, 60)).save(file)),
        "warning",
        "small",
        "^3 images have less than half the 64x64",
    ),
    "long images": (
        lambda f: change(f / "train" / "palace", 3, lambda i, file: i.resize((64, 140)).save(file)),
        "warning",
        "odd-shape",
        "^3 images are more than twice",
    ),
    "CMYK": (lambda f: change(f / "train" / "palace", 3, as_cmyk), "warning", "cmyk", "^3 images"),
    "animations": (
        lambda f: change(f / "train" / "palace", 3, as_animation),
        "warning",
        "animated",
        "^3 ",
    ),
    "transparency": (
        lambda f: change(f / "train" / "palace", 3, see_through),
        "note",
        "transparent",
        "^3 ",
    ),
    "16 bits": (
        lambda f: change(f / "train" / "palace", 3, deep),
        "note",
        "deep",
        "^3 images have 16 bits",
    ),
    "on its side": (
        lambda f: change(f / "train" / "palace", 3, lying),
        "note",
        "turned",
        "^3 images",
    ),
    "one class is grey": (
        lambda f: [
            change(f / split / "palace", 54, lambda i, file: i.convert("L").save(file))
            for split in ("train", "test")
        ],
        "warning",
        "telltale",
        "^54 of 54 images of 'palace' are grey, and of the others 0%",
    ),
    "no image by name": (
        lambda f: (f / "train" / "palace" / "notes.txt").write_text(""),
        "warning",
        "left-out",
        "^1 files are no images by their name.*notes.txt",
    ),
    "a class without images": (
        lambda f: (f / "train" / "ruin").mkdir(),
        "error",
        "listing",
        "ruin has no image",
    ),
    "a class with one image": (
        lambda f: [
            save(crop(28, moved=30), f / "train" / "ruin" / "1.png"),
            save(crop(39, moved=30), f / "test" / "ruin" / "2.png"),
        ],
        "error",
        "no-images",
        "class 'ruin' has no image left to train on",
    ),
    "a single class": (
        remove_palaces,
        "error",
        "listing",
        "has a single class, 'flower'",
    ),
    "an unreadable file": (
        lambda f: (f / "train" / "palace" / "000.png").write_bytes(b"no image"),
        "error",
        "unreadable",
        "^1 of 108 files can't be read",
    ),
    "nothing readable": (
        lambda f: [file.write_bytes(b"no image") for file in f.rglob("*.png")],
        "error",
        "unreadable",
        "^108 of 108 files can't be read",
    ),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_what_is_planted_is_found(plant: str, given: Path) -> None:
    damage, severity, kind, words = PLANTS[plant]
    assert kind not in kinds(look(given).findings)
    damage(given)
    report = look(given)
    found = [finding for finding in report.findings if finding.kind == kind]
    assert {finding.severity for finding in found} == {severity}
    assert any(re.search(words, finding.text) for finding in found), found
    assert report.passed == (severity != "error")


def test_each_unreadable_file_has_its_reason(given: Path) -> None:
    palace = given / "train" / "palace"
    whole = save(crop(21), palace / "cut.jpg").read_bytes()
    (palace / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (palace / "empty.png").write_bytes(b"")
    (palace / "gone.png").symlink_to("nowhere.png")
    report = look(given)
    assert sum(map(sum, report.counts.values())) == 108
    [[cut], [empty], [gone]] = only(report.findings, "unreadable").examples
    for example, name, reason in (
        (cut, "cut.jpg", "truncated"),
        (empty, "empty.png", "the image is empty"),
        (gone, "gone.png", "No such file"),
    ):
        assert (example.file, example.position) == (palace / name, None)
        assert reason in example.remark


def test_a_list_is_looked_through_like_a_folder(given: Path) -> None:
    rows = ["path,label,split"]
    for split in ("train", "test"):
        rows += [f"{f},{f.parent.name},{split}" for f in (given / split).rglob("*.png")]
    rows += [f"{given}/gone.png,palace,train", rows[1].replace(",train", ",test")]
    file = given / "list.csv"
    file.write_text("\n".join(rows))
    report = look(file)
    assert report.counts == {"train": [40, 40], "test": [14, 14]}
    assert "1 files are in two splits" in only(report.findings, "listing").text
    assert "No such file" in str(only(report.findings, "unreadable").examples[0][0])


def test_a_list_that_names_nothing_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("path,label\n")
    report = look(tmp_path / "list.csv")
    assert not report.passed
    assert "names no images to train on" in only(report.findings, "listing").text


def test_the_digits_are_fine() -> None:
    report = check(TrainingSettings())
    assert report.passed
    assert kinds(report.findings) == {"classes"}
    assert summary(datasets.load(TrainingSettings())) == []


# The command.


def run(*arguments: str | Path) -> int:
    return int(app(["check-data", *map(str, arguments)], result_action="return_value"))


def test_the_command_ends_with_1_where_there_are_errors(
    given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(given) == 0
    assert capsys.readouterr().out.endswith("108 images: 0 errors, 0 warnings\n")
    shutil.copy(given / "train" / "palace" / "039.png", given / "test" / "palace" / "[red]a.png")
    assert run(given) == 1
    printed = capsys.readouterr()
    assert "[red]a.png" in printed.out.replace("\n", "")
    assert printed.out.endswith("109 images: 1 error, 0 warnings\n")
    assert printed.err == ""


def test_json_has_every_example(given: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(20, 30):
        copy = given / "test" / "palace" / f"{number}.png"
        shutil.copy(given / "train" / "palace" / f"0{number}.png", copy)
    assert run(given, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["passed"], told["classes"]) == (False, ["flower", "palace"])
    assert told["images"] == {"train": [40, 40], "test": [14, 24]}
    [found] = [finding for finding in told["findings"] if finding["kind"] == "test-in-train"]
    assert (found["severity"], found["count"], len(found["examples"])) == ("error", 10, 10)
    for group in found["examples"]:
        assert {example["split"] for example in group} == {"test", "train"}
        assert all(Path(example["file"]).exists() for example in group)


def test_the_gravest_comes_first(given: Path) -> None:
    shutil.copy(given / "train" / "palace" / "039.png", given / "test" / "palace" / "copy.png")
    (given / "train" / "palace" / "notes.txt").write_text("")
    severities = [finding.severity for finding in look(given).findings]
    assert list(dict.fromkeys(severities)) == ["error", "warning", "note"]
