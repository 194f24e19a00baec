"""What the sections about the version's origin say: its data, its settings, and its provenance."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from convoy_training.data.checks import Example, Finding
from convoy_training.report.record import Record
from convoy_training.report.wording import duration, file_size, percent, plural
from convoy_training.settings import TrainingSettings

# How many examples a finding shows, and how many images of one example.
_EXAMPLES, _TOGETHER = 5, 4
# A longer table of classes is folded.
_MOST_OPEN = 30
_SEVERITIES = {"error": "bad", "warning": "odd", "note": "info"}


@dataclass(frozen=True)
class FindingItem:
    """What a check of the data found. `mark` is the kind of its badge, which says `severity`.

    `more` says how many examples are left out; "" if none is.
    """

    mark: str
    severity: str
    text: str
    advice: str
    examples: Sequence[str]
    more: str


@dataclass(frozen=True)
class ClassImages:
    """The images of one class: a number for each split, and each number's share of the largest class."""

    name: str
    numbers: Sequence[str]
    shares: Sequence[float]


@dataclass(frozen=True)
class Splits:
    """A table of images by class and split. `folded` is the line that unfolds it; "" if it is open."""

    names: Sequence[str]
    classes: Sequence[ClassImages]
    caption: str
    folded: str


@dataclass(frozen=True)
class Data:
    summary: str
    findings: Sequence[FindingItem]
    splits: Splits | None


def data(record: Record) -> Data | None:
    """Which images the network learned from, and what the checks found among them."""
    order = sorted(record.findings, key=lambda f: list(_SEVERITIES).index(f.severity))
    images: Mapping[str, Any] = record.manifest.training.get("images") or {}
    splits = {name: split for name, split in images.items() if split.get("per_class")}
    if not order and not splits:
        return None
    return Data(
        _data_summary(record, splits) if splits else "",
        [_finding(finding) for finding in order],
        _splits(record.manifest.labels, splits) if splits else None,
    )


def _data_summary(record: Record, splits: Mapping[str, Any]) -> str:
    size = record.manifest.pixels
    images = {name: sum(split["per_class"]) for name, split in splits.items()}
    classes = plural(len(record.manifest.labels), "class", "classes")
    return (
        f"{plural(sum(images.values()), 'image')} of {classes}, brought to "
        f"{size.width} by {size.height} pixels, {'grey' if size.channels == 1 else 'colour'}"
        f"{', cropped' if size.resize == 'crop' else ''}: "
        + ", ".join(f"{n:,} {name}" for name, n in images.items())
        + "."
    )


def _splits(labels: Sequence[str], splits: Mapping[str, Any]) -> Splits:
    counts = np.array([split["per_class"] for split in splits.values()])
    by_class = counts.sum(axis=0)
    largest = by_class.max() or 1
    classes = [
        ClassImages(label, [f"{n:,}" for n in own], [n / largest for n in own])
        for label, own in zip(labels, counts.T, strict=True)
    ]
    caption = (
        "Images by class and split (bars: from dark to light). The largest class has "
        f"{by_class.max() / max(by_class.min(), 1):.3g} times as many as the smallest: classes with few "
        "images are learned worse, and their figures are less certain."
    )
    folded = f"Images by class and split ({len(labels):,} classes)"
    names = [name.capitalize() for name in splits]
    return Splits(names, classes, caption, folded if len(labels) > _MOST_OPEN else "")


def _finding(finding: Finding) -> FindingItem:
    more = len(finding.examples) - _EXAMPLES
    return FindingItem(
        _SEVERITIES[finding.severity],
        finding.severity,
        finding.text,
        finding.advice,
        [_images(group) for group in finding.examples[:_EXAMPLES]],
        f"and {more:,} more" if more > 0 else "",
    )


def _images(group: Sequence[Example]) -> str:
    # Only the split, the class and the file: the report does not tell where the data lay.
    named = [
        replace(one, file=one.file and Path(*one.file.parts[-3:])) for one in group[:_TOGETHER]
    ]
    more = len(group) - len(named)
    return " = ".join(map(str, named)) + (f" and {more:,} more" if more else "")


# Settings and provenance.


@dataclass(frozen=True)
class Setting:
    name: str
    value: str
    default: str


@dataclass(frozen=True)
class Settings:
    changed: Sequence[Setting]
    every: Sequence[Setting]


def settings(record: Record) -> Settings | None:
    """All settings of the run, and those of them that are not the defaults."""
    values: Mapping[str, Any] = record.manifest.training.get("settings") or {}
    if not values:
        return None
    defaults = {name: _as_json(value) for name, value in asdict(TrainingSettings()).items()}
    every = {
        name: Setting(
            name,
            _written(_as_json(value)),
            _written(defaults[name]) if name in defaults else "–",
        )
        for name, value in values.items()
    }
    changed = [
        setting
        for name, setting in every.items()
        if name not in defaults or _as_json(values[name]) != defaults[name]
    ]
    return Settings(changed, list(every.values()))


def _as_json(value: Any) -> Any:
    """`value` as JSON has it, so that a setting compares equal to one that was read back."""
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _written(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "–" if value in (None, "") else str(value)


@dataclass(frozen=True)
class Sum:
    """A sha256 and what it is of. `size` is a file's size; "" for images."""

    name: str
    size: str
    sha256: str


@dataclass(frozen=True)
class Provenance:
    facts: Sequence[tuple[str, str]]
    sums: Sequence[Sum]


def provenance(record: Record) -> Provenance:
    """When, where and with what the version was made."""
    manifest = record.manifest
    facts = [("created", manifest.created)]
    if record.seconds is not None:
        facts.append(("took", duration(record.seconds)))
    if record.machine:
        facts.append(("machine", record.machine))
    values = manifest.training.get("settings") or {}
    if "seed" in values:
        facts.append(("seed", str(values["seed"])))
    if parity := manifest.parity:
        facts.append(
            (
                "export",
                f"at most {parity.max_abs_difference:.1e} off the network's probabilities and the same "
                f"label for {percent(parity.label_agreement, 2)} of {plural(parity.images, 'image')}, "
                f"in batches of {', '.join(map(str, parity.batch_sizes))}",
            )
        )
    packages = [f"{name} {version}" for name, version in manifest.provenance.items()]
    if packages:
        facts.append(("made with", ", ".join(packages)))
    images: Mapping[str, Any] = manifest.training.get("images") or {}
    sums = [
        Sum(f"{name} images", "", split["sha256"])
        for name, split in images.items()
        if split.get("sha256")
    ]
    sums += [Sum(name, file_size(file.bytes), file.sha256) for name, file in manifest.files.items()]
    return Provenance(facts, sums)
