"""The report: whole, harmless, small, and about what is there."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Target
from convoy_service.artifacts.reader import Manifest, Parity, Scores, Thresholds, Variant
from convoy_service.engine.onnx_model import Model
from convoy_training.data.checks import Example, Finding
from convoy_training.data.datasets import load
from convoy_training.evaluation.scores import Scaling, choose_thresholds, evaluate, strangers
from convoy_training.release.publish import Check
from convoy_training.report.page import render
from convoy_training.report.record import Layer, Record
from convoy_training.settings import TrainingSettings

_DIGITS = Path(__file__).parents[2] / "models" / "digits" / "1"

SECTIONS = [
    "Verdict", "Training", "Classes", "Certainty", "Mistakes", "Right answers", "Inside the network",
    "Precision and speed", "Data", "Settings", "Provenance",
]  # fmt: skip


def epochs(losses: Sequence[float]) -> list[dict[str, float]]:
    return [
        {
            "epoch": number,
            "loss": loss,
            "accuracy": 0.5,
            "validation_accuracy": 0.25,
            "validation_loss": loss,
            "learning_rate": 0.002,
            "seconds": 1.0,
        }
        for number, loss in enumerate(losses, 1)
    ]


def record(
    labels: Sequence[str] = ("cat", "dog", "frog"), channels: int = 3, side: int = 8, **changed: Any
) -> Record:
    """A record of everything, of answers by chance in which most are right."""
    random = np.random.default_rng(0)
    classes = len(labels)
    truth = np.repeat(np.arange(classes), max(8, 120 // classes))
    logits = random.normal(size=(len(truth), classes))
    logits[np.arange(len(truth)), truth] += 2.5
    probabilities = np.exp(logits)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    given = probabilities.astype(np.float32)
    pixels = random.integers(0, 256, (len(truth), side, side, channels), np.uint8)
    thresholds = choose_thresholds(given, truth, given, truth)
    strange = dict.fromkeys(strangers(pixels), given)
    found = evaluate(
        given, truth, labels, scaling=Scaling(1.5), thresholds=thresholds, strange=strange
    )
    variant = Variant(found.scores, 0.99, 1234.5, 2.0, "cpu")
    count = [len(truth) // classes] * classes
    manifest = Manifest(
        input="pixels",
        output="probabilities",
        pixels=Target(side, side, channels),
        labels=list(labels),
        max_batch_size=64,
        created="2026-01-02T03:04:05+00:00",
        scores=found.scores,
        parity=Parity(1e-7, 1.0, 4, [1, 3, 64]),
        variants={"fp32": variant, "int8": variant},
        thresholds=thresholds,
        training={
            "settings": asdict(TrainingSettings(epochs=7)),
            "images": {
                name: {"count": sum(count), "per_class": count, "sha256": name[:1] * 64}
                for name in ("train", "validation", "test")
            },
            "epochs": epochs([2.0, 1.0, 0.5]),
        },
        provenance={"python": "3.11"},
    )
    layers = [
        Layer("conv", "Conv2D", random.random((side, side, 20), np.float32)),
        Layer("pool", "MaxPooling2D", random.random((side // 2, side // 2, 20), np.float32)),
        Layer("dense", "Dense", random.normal(size=50).astype(np.float32)),
    ]
    pair = (Example("train", 1, Path("/far/away/train/cat/1.jpg")), Example("test", 2, None))
    whole = Record(
        "pets",
        3,
        manifest,
        found,
        [
            Check("accuracy", "0.9", "at least 0.8", True),
            Check("too good", "all", "not all", True, suspicious=True),
        ],
        [Finding("warning", "copies", "1 is in both", "remove one", 1, (pair,))],
        pixels,
        given,
        truth,
        layers,
        5,
        {"fp32": 0.5},
        "two cores",
        61.0,
    )
    return replace(whole, **changed)


def parse(page: str) -> ET.Element:
    """The page as XML, which is stricter than HTML: each element closed, each text escaped."""
    assert page.startswith("<!DOCTYPE html>\n")
    return ET.fromstring(page.removeprefix("<!DOCTYPE html>\n").encode())


def headings(page: str) -> list[str]:
    return ["".join(title.itertext()) for title in parse(page).iter("h2")]


def text_of(page: str) -> str:
    body = parse(page).find("body")
    assert body is not None
    return " ".join("".join(body.itertext()).split())


class Loads(HTMLParser):
    """What a browser would fetch or run, as an HTML parser sees it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "base", "form"):
            self.scripts.append(tag)
        for name, value in attrs:
            if name.startswith("on"):
                self.scripts.append(f"{tag} {name}")
            elif name in ("href", "src", "srcset", "data", "action", "poster", "background"):
                self.addresses.append(value or "")


def test_everything_is_there_in_order_and_links_lead_somewhere() -> None:
    page = render(record())
    assert headings(page) == SECTIONS
    tree = parse(page)
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(set(ids)) == len(ids)
    within = [a.get("href", "") for a in tree.iter() if a.get("href", "").startswith("#")]
    assert len(within) > 30  # the contents, and every view of the pictures
    assert {address[1:] for address in within} <= set(ids)


def test_asks_for_nothing_and_runs_nothing() -> None:
    page = render(record())
    loads = Loads(page)
    assert not loads.scripts
    assert all(re.match(r"#|data:(image/(png|jpeg);base64,|,$)", a) for a in loads.addresses)
    assert not re.search(r"url\(|@import|https?:", page)
    (policy,) = [m for m in parse(page).iter("meta") if m.get("http-equiv")]
    assert policy.get("content", "").startswith("default-src 'none';")


def test_the_claim_is_that_of_the_answers() -> None:
    whole = record()
    assert whole.evaluation
    found = whole.evaluation
    claim = f"pets version 3 names {found.correct} of {found.images} test images rightly: "
    assert f"{claim}{found.accuracy:.1%} (95% interval" in text_of(render(whole))
    assert "pets names " in text_of(render(replace(whole, version=0)))


def test_nothing_that_users_name_is_taken_for_markup() -> None:
    evil = "<script>alert(1)</script>"
    labels = [evil, '"><img src=x onerror=alert(1)>', "a&b'c", "\x00\x1b[31m\ud800\uffff"]
    whole = record(labels)
    settings = {**whole.manifest.training["settings"], "data": evil, evil: evil}
    training = {**whole.manifest.training, "settings": settings}
    manifest = replace(whole.manifest, training=training, provenance={evil: evil}, created=evil)
    page = render(
        replace(
            whole,
            name=evil,
            manifest=manifest,
            machine=evil,
            checks=[Check(evil, evil, evil, False)],
            findings=[
                Finding("error", "k", evil, evil, 1, ((Example(evil, 1, Path(f"/{evil}")),),))
            ],
            layers=[Layer(evil, evil, np.ones((2, 2, 2), np.float32))],
        )
    )
    assert not Loads(page).scripts
    assert {element.tag for element in parse(page).iter()}.isdisjoint({"script", "img"})
    assert text_of(page).count(evil) > 10
    assert "a&b'c" in text_of(page)
    page.encode()


def test_where_data_lay_is_not_told() -> None:
    page = render(record())
    assert "train/cat/1.jpg = test 2" in text_of(page)
    assert "far" not in page


def test_what_is_not_known_has_no_section() -> None:
    whole = record()
    bare = Record("pets", 1, replace(whole.manifest, training={}, variants={}, scores=None))
    assert headings(render(bare)) == ["Provenance"]
    assert "test images" not in render(bare)
    for left_out, gone in (
        ({"checks": ()}, {"Verdict"}),
        ({"evaluation": None}, {"Classes", "Certainty"}),
        ({"truth": None}, {"Mistakes", "Right answers"}),
        ({"layers": ()}, {"Inside the network"}),
        ({"pixels": None}, {"Mistakes", "Right answers", "Inside the network"}),
    ):
        there = headings(render(replace(whole, **left_out)))
        assert there == [title for title in SECTIONS if title not in gone]


@pytest.mark.parametrize(
    ("checks", "says"),
    [
        ([Check("a", "1", "2", True)], "The gate is open: all 1 check passed."),
        (
            [Check("a", "1", "2", True, suspicious=True)],
            "1 check passed with a figure that is hard",
        ),
        ([Check("a", "1", "2", False)], "The gate is closed: 1 of 1 check failed"),
        ([Check("int8", "1", "2", False, closes=False)], "1 variant left out"),
    ],
)
def test_the_verdict_says_what_the_checks_say(checks: list[Check], says: str) -> None:
    assert says in text_of(render(record(checks=checks)))


def test_what_failed_comes_first() -> None:
    checks = [
        Check("good", "1", "2", True),
        Check("odd", "1", "2", True, suspicious=True),
        Check("int8", "1", "2", False, closes=False),
        Check("bad", "1", "2", False),
    ]
    (table,) = [t for t in parse(render(record(checks=checks))).iter("table")
                if "checks" in t.get("class", "")]  # fmt: skip
    rows = ["".join(row[0].itertext()) for body in table.iter("tbody") for row in body]
    assert rows == ["bad", "int8", "odd", "good"]


def test_the_weakest_class_comes_first() -> None:
    whole = record()
    assert whole.evaluation
    (table,) = [t for t in parse(render(whole)).iter("table") if t.get("class") == "classes"]
    rows = ["".join(row[0].itertext()) for body in table.iter("tbody") for row in body]
    assert rows[0] == whole.evaluation.worst.name
    recalls = {figures.name: figures.recall for figures in whole.evaluation.classes}
    assert [recalls[name] for name in rows] == sorted(recalls.values())


@pytest.mark.parametrize("classes", [2, 20, 21, 100, 120])
@pytest.mark.parametrize("channels", [1, 3])
def test_few_and_many_classes_in_grey_and_colour(classes: int, channels: int) -> None:
    names = [f"class {number}" for number in range(classes)]
    whole = record(names, channels)
    page = render(whole)
    assert headings(page) == SECTIONS
    assert len(page.encode()) < 200_000
    (matrix,) = [
        s for s in parse(page).iter("svg") if s.get("aria-label") == "confusion matrix"
    ]  # fmt: skip
    assert whole.evaluation
    numbers = np.array(whole.evaluation.confusion)
    written = [t.text for t in matrix.iter("text") if (t.text or "").isdecimal()]
    # With few classes every number that is not 0 is written, with many none, and shades are a picture.
    assert sorted(map(int, map(str, written))) == (
        sorted(numbers[numbers > 0].tolist()) if classes <= 20 else []
    )
    assert len(list(matrix.iter("image"))) == (classes > 20)


@pytest.mark.parametrize(
    "losses", [[math.nan], [1.0, math.nan, 0.5], [math.inf, 1.0], [0.0, 0.0], [1e30, 1e-30], [3]]
)
def test_figures_that_are_no_numbers_leave_gaps(losses: list[float]) -> None:
    whole = record()
    training = {**whole.manifest.training, "epochs": epochs(losses)}
    page = render(replace(whole, manifest=replace(whole.manifest, training=training)))
    drawn = [path.get("d", "") for path in parse(page).iter("path")]
    assert not [path for path in drawn if "nan" in path or "inf" in path]
    assert ("There is no finite figure" in page) == (not any(map(math.isfinite, losses)))


def test_epochs_may_lack_figures() -> None:
    whole = record()
    training = {**whole.manifest.training, "epochs": [{"loss": 1.0}, {"loss": None}]}
    page = render(replace(whole, manifest=replace(whole.manifest, training=training)))
    assert "At the end no number" in text_of(page)
    assert "Learning rate" not in page


def test_a_perfect_classifier_has_no_mistakes_to_show() -> None:
    whole = record()
    assert whole.truth is not None
    given = np.eye(3, dtype=np.float32)[whole.truth]
    found = evaluate(given, whole.truth, whole.manifest.labels)
    text = text_of(render(replace(whole, probabilities=given, evaluation=found)))
    assert "None: all 120 test images are named rightly." in text
    assert "Before scaling" not in text


def test_shares_are_all_or_nothing_only_where_they_are() -> None:
    whole = record()
    near = replace(whole.manifest, scores=Scores(0.99999, 99_999, 100_000, 0.1))
    text = text_of(render(replace(whole, manifest=near, evaluation=None)))
    assert "99,999 of 100,000 test images rightly: 99.999%." in text
    assert whole.manifest.thresholds
    none = replace(whole.manifest, thresholds=Thresholds(1.0, [1.0] * 3, 0.0, 0.0))
    assert "That leaves 0% of the images" in text_of(render(replace(whole, manifest=none)))


def test_settings_that_were_changed_come_first() -> None:
    tables = [t for t in parse(render(record())).iter("table") if t.get("class") == "settings"]
    changed, every = (
        [["".join(cell.itertext()) for cell in row] for body in table.iter("tbody") for row in body]
        for table in tables
    )
    assert changed == [["epochs", "7", str(TrainingSettings.epochs)]]
    assert len(every) == len(asdict(TrainingSettings()))


@pytest.mark.parametrize(("side", "depth", "most"), [(32, 3, 150_000), (128, 8, 300_000)])
def test_the_page_stays_small_with_many_layers(side: int, depth: int, most: int) -> None:
    # Of noise, which is the worst that there is to compress.
    random = np.random.default_rng(0)
    layers = [
        Layer(f"{kind}{number}", kind, random.random((size, size, 64), np.float32))
        for number in range(depth)
        for kind, size in (("Conv2D", side >> number), ("MaxPooling2D", side >> number + 1))
        if size
    ]
    page = render(record([f"class {number}" for number in range(10)], side=side, layers=layers))
    assert len(page.encode()) < most


def test_the_report_of_the_digits_is_small() -> None:
    data = load(TrainingSettings())
    bundle = bundles.read(_DIGITS)
    given = Model.load(bundle, device="cpu").run(data.test.inputs)
    found = evaluate(given, data.test.labels, data.classes)
    page = render(
        Record(
            "digits",
            1,
            bundle.manifest,
            found,
            [Check(**check) for check in bundle.manifest.training["gate"]],
            pixels=data.test.inputs,
            probabilities=given,
            truth=data.test.labels,
        )
    )
    assert f"names {found.correct} of {found.images} test images rightly" in text_of(page)
    assert len(page.encode()) < 60_000
