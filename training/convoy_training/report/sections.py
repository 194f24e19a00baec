"""What the header and the sections say, as plain data for the template.

Here are the header and the sections about the run: the verdict, the training, and the variants. `quality`,
`gallery` and `origins` hold the other sections. A section is None if the record has nothing for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from convoy_service.artifacts.reader import VARIANTS
from convoy_training.evaluation.scores import Interval
from convoy_training.release.publish import Check
from convoy_training.report import charts
from convoy_training.report.charts import Chart, Figure, Series
from convoy_training.report.record import Record
from convoy_training.report.wording import (
    count,
    duration,
    file_size,
    number,
    percent,
    percent_range,
    plural,
    short,
)

# The header.


@dataclass(frozen=True)
class Claim:
    """The sentence under the title: the text before the accuracy, the accuracy, and the text after it."""

    text: str
    accuracy: str
    interval: str


@dataclass(frozen=True)
class Tile:
    """A figure of the header, with its name and a note."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Header:
    """The top of the page. `colour` is "good" or "bad" by the gate's verdict, "" without a verdict."""

    title: str
    claim: Claim | None
    tiles: Sequence[Tile]
    colour: str


def header(record: Record) -> Header:
    colour = ("bad" if _closing(record) else "good") if record.checks else ""
    return Header(_title(record), _claim(record), _tiles(record), colour)


def _title(record: Record) -> str:
    return f"{record.name} version {record.version}" if record.version else record.name


def _claim(record: Record) -> Claim | None:
    evaluation, scores = record.evaluation, record.manifest.scores
    interval: Interval | None = None
    if evaluation:
        correct, images, accuracy = evaluation.correct, evaluation.images, evaluation.accuracy
        interval = evaluation.accuracy_interval
    elif scores:
        correct, images, accuracy = scores.correct, scores.images, scores.accuracy
    else:
        return None
    return Claim(
        f"{_title(record)} names {correct:,} of {images:,} test images rightly: ",
        percent(accuracy),
        f" (95% interval {percent_range(interval)})." if interval else ".",
    )


def _tiles(record: Record) -> list[Tile]:
    """The figures that a reader needs first."""
    manifest, evaluation = record.manifest, record.evaluation
    tiles = []
    if record.checks:
        passed = sum(check.passed for check in record.checks)
        odd = sum(check.suspicious for check in record.checks)
        note = f"{passed} of {plural(len(record.checks), 'check')}"
        note += f", {odd} to look at" if odd else ""
        tiles.append(Tile("Gate", "Failed" if _closing(record) else "Passed", note))
    if evaluation:
        worst, calibrated = evaluation.worst, evaluation.calibrated
        note = f"up to {percent(calibrated.by_chance)} is chance"
        tiles.append(
            Tile("Weakest class", percent(worst.recall), f"recall, of {short(worst.name)}")
        )
        tiles.append(Tile("Calibration error", percent(calibrated.error), note))
    if thresholds := manifest.thresholds:
        note = f"right, in {percent(thresholds.coverage)} of images"
        tiles.append(Tile("Where it is sure", percent(thresholds.accuracy), note))
    if manifest.variants:
        name, best = max(manifest.variants.items(), key=lambda item: item[1].images_per_s)
        note = f"images/s as {name}, {best.device}"
        tiles.append(Tile("Throughput", count(best.images_per_s), note))
    return tiles


# The gate's verdict.


@dataclass(frozen=True)
class CheckRow:
    """A check of the gate. `mark` is the kind of its badge, which says `result`."""

    name: str
    mark: str
    result: str
    value: str
    wanted: str


@dataclass(frozen=True)
class Verdict:
    summary: str
    checks: Sequence[CheckRow]


def verdict(record: Record) -> Verdict | None:
    """Whether the gate lets the version pass. The checks that failed come first."""
    if not record.checks:
        return None
    order = sorted(
        record.checks, key=lambda check: (check.passed, not check.closes, not check.suspicious)
    )
    rows = [CheckRow(check.name, *_result(check), check.value, check.wanted) for check in order]
    return Verdict(_verdict_summary(record), rows)


def _closing(record: Record) -> int:
    """How many checks failed that keep a version from being published."""
    return sum(check.closes and not check.passed for check in record.checks)


def _result(check: Check) -> tuple[str, str]:
    """The kind of the badge, and its text."""
    if not check.passed:
        return ("bad", "failed") if check.closes else ("odd", "left out")
    return ("odd", "suspicious") if check.suspicious else ("good", "passed")


def _verdict_summary(record: Record) -> str:
    checks, closing = record.checks, _closing(record)
    left = sum(not check.passed for check in checks) - closing
    odd = sum(check.passed and check.suspicious for check in checks)
    text = f"The gate is open: all {plural(len(checks), 'check')} passed."
    if closing:
        text = (
            f"The gate is closed: {closing} of {plural(len(checks), 'check')} failed, so this version was "
            "not published."
        )
    elif left:
        text = f"The gate is open: {len(checks) - left} of {plural(len(checks), 'check')} passed."
    if left and not closing:
        text += (
            " A check of a variant that fails keeps that variant out, and the version goes without it: "
            f"{plural(left, 'variant')} left out."
        )
    if odd:
        text += (
            f" {plural(odd, 'check')} passed with a figure that is hard to believe: look at it before "
            "you rely on it."
        )
    return text


# Training.


@dataclass(frozen=True)
class Training:
    summary: str
    figures: Sequence[Figure]


def training(record: Record) -> Training | None:
    """How loss, accuracy and learning rate went from epoch to epoch."""
    epochs = record.manifest.training.get("epochs") or []
    if not epochs:
        return None

    def curve(key: str) -> list[tuple[float, float]]:
        return [
            (number(epoch.get("epoch"), position), number(epoch.get(key)))
            for position, epoch in enumerate(epochs, 1)
        ]

    def chart(key: str, **options: Any) -> Chart | None:
        both = [
            Series("training", "a", curve(key)),
            Series("validation", "b", curve(f"validation_{key}")),
        ]
        return charts.lines(both, "epoch", **options)

    figures = [
        Figure("Loss", chart("loss"), _loss_caption(epochs[-1])),
        Figure("Accuracy", chart("accuracy", percent=True), _accuracy_caption(epochs[-1])),
    ]
    rates = Series("learning rate", "a", curve("learning_rate"))
    if rates.finite():
        rate_chart = charts.lines([rates], "epoch", height=150)
        figures.append(
            Figure("Learning rate", rate_chart, "How large the steps were at each epoch.")
        )
    return Training(_training_summary(record, epochs), figures)


def _at_end(epoch: Mapping[str, Any], key: str, form: str) -> str:
    value = number(epoch.get(key))
    return format(value, form) if np.isfinite(value) else "no number"


def _loss_caption(last: Mapping[str, Any]) -> str:
    return (
        f"Training and validation should fall together. At the end {_at_end(last, 'loss', '.3f')} and "
        f"{_at_end(last, 'validation_loss', '.3f')}; where validation rises while training falls, the "
        "network learns by heart."
    )


def _accuracy_caption(last: Mapping[str, Any]) -> str:
    return (
        f"At the end {_at_end(last, 'accuracy', '.1%')} of the training images and "
        f"{_at_end(last, 'validation_accuracy', '.1%')} of the validation images. Training images are "
        "altered and units dropped meanwhile, so their curve may lie below."
    )


def _training_summary(record: Record, epochs: Sequence[Mapping[str, Any]]) -> str:
    seconds = [number(epoch.get("seconds")) for epoch in epochs]
    spent = sum(value for value in seconds if np.isfinite(value))
    images = record.manifest.training.get("images", {}).get("train", {}).get("count")
    text = plural(len(epochs), "epoch")
    if images:
        text += f" over {plural(images, 'image')}"
    if spent:
        text += f", {duration(spent)}"
        if images:
            text += f" ({count(images * len(epochs) / spent)} images/s)"
    return f"{text}."


# Precision and speed.


@dataclass(frozen=True)
class Variants:
    """The graphs by precision: the heads of a table's columns, and a name and cells for each row."""

    heads: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str]]]
    caption: str


def variants(record: Record) -> Variants | None:
    """How accurate and how fast the graph of each precision is."""
    manifest, latency_ms = record.manifest, record.latency_ms
    if not manifest.variants and not latency_ms:
        return None
    heads = ["Variant", "Accuracy", "Same label", "Images/s", "Speed-up"]
    heads += ["One image"] if latency_ms else []
    heads += ["Size"] if manifest.files else []
    devices = sorted({measured.device for measured in manifest.variants.values()})
    caption = ""
    if devices:
        caption = (
            "Accuracy and same label (how often it says what fp32 says) are of the whole test split; "
            f"images/s at the largest batch, {manifest.max_batch_size}, on {' and '.join(devices)}; "
            "speed-up is over fp32. "
        )
    if latency_ms:
        caption += "One image is the time that a batch of one takes."
    names = [name for name in VARIANTS if name in manifest.variants or name in latency_ms]
    return Variants(heads, [(name, _variant_cells(record, name)) for name in names], caption)


def _variant_cells(record: Record, name: str) -> list[str]:
    manifest = record.manifest
    cells = ["–", "–", "–", "–"]
    if measured := manifest.variants.get(name):
        cells = [
            percent(measured.scores.accuracy, 2),
            percent(measured.label_agreement, 2),
            count(measured.images_per_s),
            f"{measured.speedup:.2f}×",
        ]
    if record.latency_ms:
        taken = record.latency_ms.get(name)
        cells.append("–" if taken is None else f"{taken:.3g} ms")
    if manifest.files:
        file = manifest.files.get(VARIANTS[name])
        cells.append(file_size(file.bytes) if file else "–")
    return cells
