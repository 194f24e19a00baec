"""What the sections with pictures show: mistakes, right answers, and one image inside the network."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convoy_service.artifacts.reader import Probabilities
from convoy_training.report import charts
from convoy_training.report.charts import Chart
from convoy_training.report.pictures import (
    SpriteSheet,
    View,
    fitted_map,
    maps_per_layer,
    scaled,
)
from convoy_training.report.record import Activations, Layer, Record
from convoy_training.report.wording import chance, plural

_MISTAKES, _RIGHT_ANSWERS, _TOP, _OUTPUTS = 18, 12, 3, 10


@dataclass(frozen=True)
class Answer:
    """A class and its probability, with the width of its bar in percent. `right` makes it stand out."""

    name: str
    width: str
    chance: str
    right: bool


@dataclass(frozen=True)
class Mistake:
    view: View
    answer: str
    chance: str
    truth: str


@dataclass(frozen=True)
class Mistakes:
    summary: str
    tiles: Sequence[Mistake]


def mistakes(record: Record, pictures: SpriteSheet) -> Mistakes | None:
    """The mistakes that the network was most certain of."""
    pixels, given, truth = record.pixels, record.probabilities, record.truth
    if pixels is None or given is None or truth is None:
        return None
    named, confidence = given.argmax(axis=1), given.max(axis=1)
    wrong = np.flatnonzero(named != truth)
    if not len(wrong):
        return Mistakes(f"None: all {plural(len(named), 'test image')} are named rightly.", [])
    summary = (
        f"{plural(len(wrong), 'mistake')} in {plural(len(named), 'test image')}; here are those "
        "that the network was most certain of. Among them are often images with a wrong label, "
        "or that show two things."
    )
    labels = record.manifest.labels
    tiles = []
    for at in wrong[np.argsort(-confidence[wrong], kind="stable")][:_MISTAKES]:
        answer, shown = labels[named[at]], labels[truth[at]]
        view = pictures.add(pixels[at], f"{shown}, taken for {answer}")
        tiles.append(Mistake(view, answer, chance(float(confidence[at])), shown))
    return Mistakes(summary, tiles)


@dataclass(frozen=True)
class RightAnswer:
    view: View
    answers: Sequence[Answer]


@dataclass(frozen=True)
class RightAnswers:
    summary: str
    tiles: Sequence[RightAnswer]


def right_answers(record: Record, pictures: SpriteSheet) -> RightAnswers | None:
    """The first right answers of each class, with the most probable classes."""
    pixels, given, truth = record.pixels, record.probabilities, record.truth
    if pixels is None or given is None or truth is None:
        return None
    right = np.flatnonzero(given.argmax(axis=1) == truth)
    if not len(right):
        return None
    # The first image of each class, then the second: every class is there, and nobody picks images.
    by_class = right[np.argsort(truth[right], kind="stable")]
    ordered = truth[by_class]
    rank = np.arange(len(ordered)) - np.searchsorted(ordered, ordered)
    labels = record.manifest.labels
    tiles = [
        RightAnswer(
            pictures.add(pixels[at], labels[truth[at]]),
            _answers(labels, given[at], _TOP, int(truth[at])),
        )
        for at in by_class[np.argsort(rank, kind="stable")][:_RIGHT_ANSWERS]
    ]
    return RightAnswers(
        "The first test images of each class that were named rightly, with the three most probable "
        "classes: how certain is the network where all is well, and what comes second?",
        tiles,
    )


def _answers(
    labels: Sequence[str], given: Probabilities, most: int, right: int | None
) -> list[Answer]:
    """The `most` most probable classes of one image."""
    return [
        Answer(labels[i], f"{100 * float(given[i]):.1f}", chance(float(given[i])), i == right)
        for i in np.argsort(-given, kind="stable")[:most]
    ]


@dataclass(frozen=True)
class Step:
    """What one layer makes of the image: as maps, as a chart of its units, or as answers."""

    title: str
    size: str
    text: str
    maps: Sequence[View] = ()
    units: Chart | None = None
    answers: Sequence[Answer] = ()


@dataclass(frozen=True)
class Inside:
    summary: str
    steps: Sequence[Step]


def inside(record: Record, pictures: SpriteSheet, maps: SpriteSheet) -> Inside | None:
    """One test image on its way through the network, layer by layer."""
    if not record.layers or record.pixels is None:
        return None
    steps = [_pixels(record.pixels[record.shown], pictures)]
    most = maps_per_layer([layer for layer in record.layers if layer.activations.ndim == 3])
    told: dict[str, int] = {}
    for layer in record.layers:
        title, *stories = _story(layer)
        # How many layers with this title there were before.
        before = told[title] = told.get(title, -1) + 1
        text = stories[before] if before < len(stories) else ""
        steps.append(_layer(layer, title, text, most, maps))
    if record.probabilities is not None:
        steps.append(_output(record, record.probabilities[record.shown]))
    return Inside(
        "One test image on its way through the network. Bright is active; in each layer all maps "
        "have one scale.",
        steps,
    )


def _pixels(image: Activations, pictures: SpriteSheet) -> Step:
    what = f"a picture of {image.shape[1]} by {image.shape[0]} pixels"
    tiles = [pictures.add(image, "the image")]
    if image.shape[-1] == 3:
        what += " in red, green and blue"
        # Each channel as grey in three channels, because all pictures of a sprite have one mode.
        tiles += [
            pictures.add(image[..., [channel] * 3], name)
            for channel, name in enumerate(("red", "green", "blue"))
        ]
    size = " × ".join(map(str, image.shape))
    return Step("Pixels", size, f"What goes in: {what}.", maps=tiles)


def _layer(layer: Layer, title: str, text: str, most: int, maps: SpriteSheet) -> Step:
    values = np.nan_to_num(np.asarray(layer.activations, np.float32))
    size = f"{layer.name}, {' × '.join(map(str, values.shape))}"
    if values.ndim != 3:
        text += f" {int((values > 0).sum()):,} of {values.size:,} are above 0."
        return Step(title, size, text, units=charts.units(values.ravel(), layer.name))
    energy = np.abs(values).mean(axis=(0, 1))
    order = np.argsort(-energy, kind="stable")[:most]
    bright = scaled(values)
    tiles = [maps.add(fitted_map(bright[..., i]), f"{layer.name}, map {i}") for i in order]
    if len(order) < values.shape[-1]:
        text += f" The {len(order)} most active of {values.shape[-1]} are shown."
    return Step(title, size, text, maps=tiles)


def _output(record: Record, given: Probabilities) -> Step:
    labels = record.manifest.labels
    right = None if record.truth is None else int(record.truth[record.shown])
    text = "Softmax makes of the last figures a probability for each class."
    if right is not None:
        named = int(given.argmax())
        text += f" The image shows {labels[right]}"
        text += "." if named == right else f"; it was taken for {labels[named]}."
    if len(given) > _OUTPUTS:
        text += f" The {_OUTPUTS} most probable of {len(given):,} classes are shown."
    answers = _answers(labels, given, _OUTPUTS, right)
    return Step("Output", f"{len(given):,} classes", text, answers=answers)


def _story(layer: Layer) -> tuple[str, ...]:
    """A title, what the first such layer does, and what the second one does if that differs."""
    kind, spatial = layer.kind.lower(), layer.activations.ndim == 3
    if "conv" in kind and spatial:
        return (
            "Convolution",
            f"Each of {layer.activations.shape[-1]} filters slides over what comes in, and is bright "
            "where it finds its pattern: an edge, a spot, a colour.",
            "These filters look at all maps before them: they find patterns of patterns.",
        )
    if "pool" in kind and spatial:
        stays = "the strongest stays" if "max" in kind else "the mean stays"
        return (
            "Pooling",
            f"Of neighbouring places {stays}: the maps get smaller, and what was found matters more "
            "than exactly where.",
        )
    if "pool" in kind:
        return "Mean over all places", "What was found counts, no longer where."
    if "dense" in kind:
        return "Fully connected", "Every unit weighs all that comes in: it finds combinations."
    if kind == "add":
        return "Sum", "What convolutions made is added to what they were given."
    if "relu" in kind or "activation" in kind:
        return "Activation", "What is below 0 becomes 0: only what was found goes on."
    if "normalization" in kind:
        return "Normalisation", "Every map is brought to the range that the next layer expects."
    return (re.sub(r"(?<=[a-z])(?=[A-Z])", " ", layer.kind),)
