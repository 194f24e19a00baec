"""What is wrong with labelled images, found before anything is trained on them: `convoy check-data`."""

import hashlib
import io
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image
from rich.table import Table
from rich.text import Text

from convoy_service.artifacts import images
from convoy_service.artifacts.images import Pixels, Target
from convoy_service.errors import InvalidImage
from convoy_training.data import datasets
from convoy_training.data.datasets import IDENTITY, DataError, Dataset, Split, Track, untracked
from convoy_training.data.duplicates import Pair, near
from convoy_training.settings import TrainingSettings

Severity = Literal["error", "warning", "note"]
_SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim"}

# Fewer images of a class say little: to learn from, and to test with.
_FEW, _FEW_TESTS = 20, 10
_UNBALANCED = 5.0
# A picture whose darkest and lightest pixel differ by so little, of 255, shows nothing.
_FLAT = 8

# Saved anew, no more: the mean difference over all pixels, of 255.
_SAME_PIXELS = 4.0
# Under this side every image is like many others.
_SMALL = 16
# An image has so many others like it, on average: then that is how these images are.
_ALIKE = 3.0


@dataclass(frozen=True)
class Example:
    """An image: its `position` in its split (None: it can't be read), its file if it has one."""

    split: str
    position: int | None
    file: Path | None
    remark: str = ""

    def __str__(self) -> str:
        name = str(self.file) if self.file else f"{self.split} {self.position}"
        return f"{name}: {self.remark}" if self.remark else name


@dataclass(frozen=True)
class Finding:
    """What was found. Errors stop training or spoil its test, notes are for information.

    `count` images are concerned; each group of `examples` belongs together.
    """

    severity: Severity
    kind: str
    text: str
    advice: str = ""
    count: int = 0
    examples: tuple[tuple[Example, ...], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Report:
    """All that was found, the gravest first; `counts` are the images of each class, by split."""

    data: str
    classes: tuple[str, ...]
    counts: Mapping[str, Sequence[int]]
    target: Target | None
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.severity == "error" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """What `json.dumps` takes."""
        return {
            "data": self.data,
            "passed": self.passed,
            "classes": list(self.classes),
            "images": {split: list(counts) for split, counts in self.counts.items()},
            "input": self.target and list(self.target.shape),
            "findings": [
                {
                    "severity": finding.severity,
                    "kind": finding.kind,
                    "text": finding.text,
                    "advice": finding.advice,
                    "count": finding.count,
                    "examples": [
                        [
                            {
                                "split": example.split,
                                "position": example.position,
                                "file": example.file and str(example.file),
                                "remark": example.remark,
                            }
                            for example in group
                        ]
                        for group in finding.examples
                    ],
                }
                for finding in self.findings
            ],
        }

    def verdict(self) -> str:
        """In one line."""
        told = ", ".join(
            f"{count} {severity}{'' if count == 1 else 's'}"
            for severity in ("error", "warning")
            for count in [sum(finding.severity == severity for finding in self.findings)]
        )
        return f"{sum(map(sum, self.counts.values()))} images: {told}"

    def table(self, shown: int = 3) -> Table:
        """For a terminal, with so many examples of each finding."""
        table = Table("", "found", "what to do", show_lines=True)
        table.columns[0].no_wrap = True
        for finding in self.findings:
            # Not markup: names of files may have brackets.
            text = Text(finding.text)
            for group in finding.examples[:shown]:
                more = f" and {len(group) - 4} more" if len(group) > 4 else ""
                text.append("\n" + " = ".join(map(str, group[:4])) + more, "dim")
            if len(finding.examples) > shown:
                text.append(f"\n... {len(finding.examples)} in all: --json lists them", "dim")
            severity = Text(finding.severity, _STYLES[finding.severity])
            table.add_row(severity, text, Text(finding.advice))
        return table


def summary(dataset: Dataset, track: Track = untracked) -> list[Finding]:
    """What is wrong with data that are loaded: errors and warnings, the gravest first.

    Seconds for 60,000 images: near-duplicates are looked for between held-out and training images
    only, and no file is read.
    """
    splits = {"test": dataset.test, "validation": dataset.validation, "train": dataset.train}
    found = _pictures(splits, dataset.classes, dataset.target, track, within=False)
    return [finding for finding in _sorted(found) if finding.severity != "note"]


def check(settings: TrainingSettings, track: Track = untracked) -> Report:
    """Looks through all files of the data that `settings` name.

    Where no test is given, it is cut as training cuts it. Raises DataError where there are no data.
    """
    if datasets.is_built_in(settings):
        data = datasets.load(settings)
        splits = {"test": data.test, "validation": data.validation, "train": data.train}
        found = _pictures(splits, data.classes, data.target, track, within=True)
        return _report(settings, data.classes, splits, data.target, found)
    # What a list names and isn't there is, for now, a file that can't be read.
    listing = datasets.list_files(replace(settings, skip_unreadable=True))
    found = [
        Finding("error", "listing", text, "mend it: training stops") for text in listing.problems
    ]
    found += [Finding("warning", "left-out", text) for text in listing.notes]
    given: dict[str, Split] = {}
    files: list[_File] = []
    for name, listed in listing.files.items():
        looked_at, given[name] = _look(name, listed, track)
        files += looked_at
    found += _unreadable(files)
    files = [file for file in files if not file.error]
    training = [file.path for file in files if file.split == "train"]
    if not training:
        return _report(settings, listing.classes, given, None, found)
    target = datasets.choose_target(training, settings)
    found += _files(files, listing.classes, target)
    given = datasets.with_test(given, settings)
    splits = {name: given[name] for name in ("test", "validation", "train") if name in given}
    found += _pictures(splits, listing.classes, target, track, within=True)
    try:
        # Those that are left out are copies, which are found above.
        datasets.assemble("", listing.classes, IDENTITY, given, settings, say=lambda text: None)
    except DataError as error:
        found.append(Finding("error", "no-images", str(error), "add images to it: training stops"))
    return _report(settings, listing.classes, splits, target, found)


def _report(
    settings: TrainingSettings,
    classes: tuple[str, ...],
    splits: Mapping[str, Split],
    target: Target | None,
    found: Iterable[Finding],
) -> Report:
    counts = {
        name: np.bincount(splits[name].labels, minlength=len(classes)).tolist()
        for name in datasets.SPLITS
        if name in splits
    }
    return Report(settings.data, classes, counts, target, tuple(_sorted(found)))


def _sorted(found: Iterable[Finding]) -> list[Finding]:
    return sorted(found, key=lambda finding: _SEVERITIES.index(finding.severity))


# What files are.


@dataclass(frozen=True)
class _File:
    split: str
    path: Path
    label: int
    error: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    turned: bool = False
    animated: bool = False
    transparent: bool = False

    @property
    def grey(self) -> bool:
        return self.mode.startswith(("1", "L", "I"))

    def example(self, remark: str = "") -> tuple[Example]:
        return (Example(self.split, None, self.path, remark or self.error),)


def _look(name: str, listed: Sequence[tuple[Path, int]], track: Track) -> tuple[list[_File], Split]:
    """What each file is, and those that can be read as a split, at the size of `IDENTITY`."""
    inputs = np.zeros((len(listed), *IDENTITY.shape), np.uint8)
    files: list[_File] = [_File(name, path, label) for path, label in listed]

    def look(position: int) -> None:
        file = files[position]
        try:
            data = file.path.read_bytes()
            inputs[position] = images.decode(data, IDENTITY)
            files[position] = _describe(file, data)
        except (InvalidImage, OSError) as error:
            files[position] = replace(file, error=str(error) or type(error).__name__)

    datasets.in_threads(look, range(len(files)), track, f"looking at {name} images")
    readable = np.array([not file.error for file in files], bool)
    split = Split(
        inputs,
        np.array([file.label for file in files], np.int64),
        tuple(file.path for file in files),
        tuple(hashlib.sha256(pixels.data).digest() for pixels in inputs),
    )
    return files, split.only(readable)


def _describe(file: _File, data: bytes) -> _File:
    with Image.open(io.BytesIO(data), formats=images.FORMATS) as image:
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # odd metadata make no picture unreadable
            orientation = 1
        on_its_side = orientation in (5, 6, 7, 8)
        width, height = image.size[::-1] if on_its_side else image.size
        return replace(
            file,
            format=str(image.format),
            mode=image.mode,
            width=width,
            height=height,
            turned=orientation in range(2, 9),
            animated=bool(getattr(image, "is_animated", False)),
            transparent=image.has_transparency_data,
        )


def _unreadable(files: Sequence[_File]) -> Iterable[Finding]:
    wrong = [file for file in files if file.error]
    if wrong:
        yield Finding(
            "error",
            "unreadable",
            f"{len(wrong)} of {len(files)} files can't be read",
            "mend or remove them, or train with --skip-unreadable",
            len(wrong),
            tuple(file.example() for file in wrong),
        )


def _files(files: Sequence[_File], classes: Sequence[str], target: Target) -> Iterable[Finding]:
    """What is odd about files that can be read, and what they are like."""

    def told(
        severity: Severity,
        kind: str,
        chosen: Sequence[_File],
        text: str,
        advice: str = "",
        remark: str = "",
    ) -> Iterable[Finding]:
        if chosen:
            examples = tuple(file.example(remark.format(file=file)) for file in chosen)
            yield Finding(severity, kind, f"{len(chosen)} {text}", advice, len(chosen), examples)

    sides = np.array([(file.width, file.height) for file in files])
    size = "{file.width}x{file.height}"
    brought = f"{target.width}x{target.height}"
    half = min(target.height, target.width) / 2
    yield from told(
        "warning",
        "small",
        [file for file in files if min(file.width, file.height) < half],
        f"images have less than half the {brought} pixels a side that they are brought to",
        "enlarged they are a blur: replace them, or take a smaller --image-size",
        size,
    )
    aspects = np.log2(sides[:, 0] / sides[:, 1])
    usual = float(np.median(aspects))
    yield from told(
        "warning",
        "odd-shape",
        [file for file, aspect in zip(files, aspects, strict=True) if abs(aspect - usual) > 1],
        f"images are more than twice as long or as wide as most (width by height {2**usual:.2f})",
        "--resize stretch squeezes them, crop cuts off their ends: cut out what matters",
        size,
    )
    yield from told(
        "warning",
        "cmyk",
        [file for file in files if file.mode == "CMYK"],
        "images are in CMYK, for print: their colours come out otherwise than in others",
        "save them as RGB, with a program that knows their colour profile",
    )
    yield from told(
        "warning",
        "animated",
        [file for file in files if file.animated],
        "images are animated: their first frame counts alone",
        "save the frames that matter as images",
    )
    yield from _telltales(files, classes)
    yield from told(
        "note",
        "transparent",
        [file for file in files if file.transparent],
        "images have transparent parts, which are laid over white",
    )
    yield from told(
        "note",
        "deep",
        [file for file in files if file.mode.startswith("I")],
        "images have 16 bits a pixel, of which the upper 8 count",
    )
    yield from told(
        "note",
        "turned",
        [file for file in files if file.turned],
        "images are turned as their EXIF orientation says, in training and in serving",
    )
    kinds = Counter(f"{file.format} {'grey' if file.grey else 'colour'}" for file in files)
    yield Finding(
        "note",
        "formats",
        "files: " + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
        count=len(files),
    )
    (low, middle, high) = np.percentile(sides, [0, 50, 100], axis=0).astype(int)
    several = len(np.unique(sides, axis=0))
    span = f", {several} sizes from {low[0]} to {high[0]} wide and {low[1]} to {high[1]} high"
    yield Finding(
        "note",
        "sizes",
        f"sizes: {middle[0]}x{middle[1]}{span if several > 1 else ' all of them'}; brought to "
        f"{brought} {'grey' if target.channels == 1 else 'RGB'}",
        count=len(files),
    )


def _telltales(files: Sequence[_File], classes: Sequence[str]) -> Iterable[Finding]:
    """Classes that can be told by what the files are, not by what they show."""
    labels = np.array([file.label for file in files])
    properties = {
        "format": [file.format for file in files],
        "colour": ["grey" if file.grey else "in colour" for file in files],
        "size": [f"{file.width}x{file.height}" for file in files],
    }
    for what, values in properties.items():
        kinds = np.array(values)
        for label, name in enumerate(classes):
            inside, outside = kinds[labels == label], kinds[labels != label]
            if len(inside) < 10 or not len(outside):
                continue
            value, times = Counter(inside.tolist()).most_common(1)[0]
            if times >= 0.95 * len(inside) and (outside == value).mean() <= 0.05:
                yield Finding(
                    "warning",
                    "telltale",
                    f"{times} of {len(inside)} images of {name!r} are {value}, and of the others "
                    f"{(outside == value).mean():.0%}",
                    f"a network may learn the {what} in place of what is shown: bring all classes "
                    "to the same",
                    times,
                )


# What images show.


def _pictures(
    splits: Mapping[str, Split],
    classes: Sequence[str],
    target: Target,
    track: Track,
    within: bool,
) -> Iterable[Finding]:
    """What is wrong with pixels and labels. `splits` begin with what is held out; near-duplicates
    are looked for among training images only if `within`.
    """
    yield from _balance(splits, classes)
    yield from _copies(splits, classes, target, track, within)
    flat = [
        (Example(name, int(position), split.files[position] if split.files else None),)
        for name, split in splits.items()
        for position in np.flatnonzero(np.ptp(split.inputs, axis=(1, 2)).max(axis=1) <= _FLAT)
    ]
    if flat:
        yield Finding(
            "warning",
            "constant",
            f"{len(flat)} images are a single colour",
            "remove them, if they show nothing",
            len(flat),
            tuple(flat),
        )


def _balance(splits: Mapping[str, Split], classes: Sequence[str]) -> Iterable[Finding]:
    labels = [split.labels for name, split in splits.items() if name != "test"]
    trained = np.bincount(np.concatenate(labels), minlength=len(classes))
    tested = np.bincount(splits["test"].labels, minlength=len(classes))
    for kind, counts, few, text, advice in (
        (
            "tiny",
            trained,
            _FEW,
            "train and validate with",
            "add images: so few are soon learned by heart",
        ),
        ("untested", tested, _FEW_TESTS, "test with", "add images: their recall is mostly chance"),
    ):
        wrong = np.flatnonzero(counts < few)
        if len(wrong):
            named = [f"{classes[label]} ({counts[label]})" for label in wrong[:5]]
            yield Finding(
                "warning",
                kind,
                f"{len(wrong)} of {len(classes)} classes have fewer than {few} images to {text}: "
                f"{', '.join(named)}{' ...' if len(wrong) > 5 else ''}",
                advice,
                int(counts[wrong].sum()),
            )
    low, high = int(trained.argmin()), int(trained.argmax())
    ratio = trained[high] / max(1, trained[low])
    if ratio >= _UNBALANCED:
        yield Finding(
            "warning",
            "unbalanced",
            f"{classes[high]} has {ratio:.1f} times as many images as {classes[low]} "
            f"({trained[high]} and {trained[low]})",
            "train with --class-weights, and look at the recall of each class, not at accuracy alone",
            int(trained.sum()),
        )
    yield Finding(
        "note",
        "classes",
        f"{len(classes)} classes of {trained.min()} to {trained.max()} images to train and validate "
        f"with, and {tested.min()} to {tested.max()} to test with",
        count=int(trained.sum() + tested.sum()),
    )


def _copies(
    splits: Mapping[str, Split],
    classes: Sequence[str],
    target: Target,
    track: Track,
    within: bool,
) -> Iterable[Finding]:
    every = [
        _example(split, name, at) for name, split in splits.items() for at in range(len(split))
    ]
    names = np.array([example.split for example in every])
    labels = np.concatenate([split.labels for split in splits.values()])
    identities = [identity for split in splits.values() for identity in split.identities]
    # For each image the first that is the same; only that one takes part in the search.
    first: dict[bytes, int] = {}
    same = np.array([first.setdefault(identity, at) for at, identity in enumerate(identities)])
    unique = np.unique(same)
    asked = len(unique) if within else int(np.searchsorted(unique, (names != "train").sum()))

    def small(at: int, channels: int) -> Pixels:
        pixels = splits[every[at].split].inputs[every[at].position]
        return images.prepare(pixels, replace(IDENTITY, channels=channels))

    pairs: list[Pair] = []
    if min(target.height, target.width) >= _SMALL:
        found = near(lambda number: small(unique[number], 1), len(unique), asked, track)
        pairs = [Pair(unique[one], unique[other], mirrored) for one, other, mirrored in found]
    alike = (2 if within else 1) * len(pairs) >= _ALIKE * asked > 0
    for pair in pairs if not alike else ():
        apart = np.abs(small(pair.one, 3).astype(int) - small(pair.other, 3)).mean()
        if apart <= _SAME_PIXELS and not pair.mirrored:
            one, other = sorted(same[[pair.one, pair.other]])
            same[same == other] = one
    groups: dict[int, list[int]] = defaultdict(list)
    for at, picture in enumerate(same.tolist()):
        groups[picture].append(at)
    likenesses = [pair for pair in pairs if same[pair.one] != same[pair.other]]
    copied = [group for group in groups.values() if len(group) > 1]

    def finding(
        severity: Severity,
        kind: str,
        text: str,
        advice: str,
        count: int,
        chosen: Sequence[Sequence[int]],
        labelled: bool = False,
    ) -> Iterable[Finding]:
        if chosen:
            remark = [classes[label] if labelled else "" for label in labels]
            yield Finding(
                severity,
                kind,
                text,
                advice,
                count,
                tuple(
                    tuple(replace(every[at], remark=remark[at]) for at in group) for group in chosen
                ),
            )

    mixed = [group for group in copied if len({*labels[group]}) > 1]
    yield from finding(
        "error",
        "two-labels",
        f"{len(mixed)} pictures stand under two labels",
        "one of them is wrong: remove it",
        sum(map(len, mixed)),
        mixed,
        labelled=True,
    )
    mixed = [
        [pair.one, pair.other] for pair in likenesses if labels[pair.one] != labels[pair.other]
    ]
    yield from finding(
        "note" if alike else "warning",
        "near-two-labels",
        f"{len(mixed)} pairs of images are nearly the same, under two labels",
        "look at them: is one label wrong?",
        len({at for pair in mixed for at in pair}),
        mixed,
        labelled=True,
    )
    for held in splits:
        if held == "train":
            continue
        total = len(splits[held])
        shared = [group for group in copied if {held, "train"} <= {*names[group]}]
        leaked = {at for group in shared for at in group if names[at] == held}
        yield from finding(
            "error" if held == "test" else "warning",
            f"{held}-in-train",
            f"{len(leaked)} of {total} {held} images are training images too, as they are or saved anew",
            "remove them from one side, as what was learned by heart is no test; training leaves out "
            "exact copies by itself",
            len(leaked),
            shared,
        )
        # For each image that is held out the first training image that it is like.
        like: dict[int, tuple[int, bool]] = {}
        for pair in likenesses:
            for here, there in ((pair.one, pair.other), (pair.other, pair.one)):
                trained = [at for at in groups[same[there]] if names[at] == "train"]
                for at in groups[same[here]]:
                    if trained and names[at] == held and at not in leaked:
                        like.setdefault(at, (trained[0], pair.mirrored))
        mirrored = sum(flipped for _, flipped in like.values())
        yield from finding(
            "warning",
            f"{held}-near-train",
            f"{len(like)} of {total} {held} images are nearly the same as a training image"
            + (f", {mirrored} of them mirrored" if mirrored else ""),
            "frames of one film or burst belong on one side: say so in a list, with a column split; "
            "simple drawings, such as digits, are that alike by nature"
            if alike
            else "look at them, and remove copies from one side, as what was learned by heart is no test",
            len(like),
            [[at, trained_at] for at, (trained_at, _) in like.items()],
        )
    for name in splits:
        repeated = [
            members
            for group in copied
            if len(members := [at for at in group if names[at] == name]) > 1
        ]
        surplus = sum(len(members) - 1 for members in repeated)
        yield from finding(
            "note",
            "copies",
            f"{surplus} {name} images are copies of others there, as they are or saved anew",
            "remove them, or they count more than others",
            surplus,
            repeated,
        )
        if within:
            inside = [
                [p.one, p.other] for p in likenesses if names[p.one] == names[p.other] == name
            ]
            count = len({at for pair in inside for at in pair})
            yield from finding(
                "note",
                "near-copies",
                f"{count} {name} images are nearly the same as another there",
                "",
                count,
                inside,
            )


def _example(split: Split, name: str, position: int) -> Example:
    return Example(name, position, split.files[position] if split.files else None)
