"""Drift watching: what it costs for each image, what it sees, and how often it is wrong.

python benchmarks/drift.py cost
python benchmarks/drift.py windows [--cifar10 FOLDER]

`cost` times what the loop's thread does, and what /metrics does. `windows` takes the shipped digits, and
with the folder that `convoy train --data cifar10` takes the shipped cifar10, and images that neither was
trained on. 200 times (50 where something is changed) these are halved by chance: of one half the
profile is made, from the other a window is taken, as it is or changed, and compared. So each profile and
each window is another.
"""

import argparse
import functools
import io
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from convoy_service.artifacts import images
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts import reference_statistics as profile
from convoy_service.engine.onnx_model import Model
from convoy_service.observers.drift_monitor import Observer, Watch, distance
from convoy_service.settings import Settings
from convoy_service.telemetry.counters import Metrics
from convoy_training.data import datasets
from convoy_training.evaluation.scores import answers, sure
from convoy_training.settings import TrainingSettings

MODELS = Path(__file__).resolve().parent.parent / "models"
SHAPES = [(28, 28, 1), (32, 32, 3), (224, 224, 3)]
WINDOW, ALARM = Settings().drift_window, Settings().drift_psi
REPLAYS, CHANGED_REPLAYS = 200, 50

Array = np.ndarray[Any, Any]


# What it costs.


def microseconds(work: Callable[[], object], images_at_once: int = 1) -> str:
    """Of the thread's CPU for each image: the median of 21 rounds, and the least."""
    rounds, took = 200, []
    for _ in range(21):
        began = time.thread_time()
        for _ in range(rounds):
            work()
        took.append((time.thread_time() - began) / rounds / images_at_once * 1e6)
    return f"{sorted(took)[10]:.1f} ({min(took):.1f})"


def answered(shape: tuple[int, ...], count: int, jpeg: bool) -> Any:
    """A request that a version with a profile has answered, ten classes."""
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (100, *shape), np.uint8)
    given = draw.dirichlet(np.full(10, 0.1), 100).astype(np.float32)
    unsure = given.max(axis=1) < 0.5
    made = profile.make(pixels, given, unsure, [64] * 100)
    training = {"profile": {"features": {n: vars(b) for n, b in made.features.items()}, "form": 1}}
    manifest = SimpleNamespace(training=training, labels=list("0123456789"))
    inputs: Any = pixels[:count]
    if jpeg:
        buffer = io.BytesIO()
        photo = draw.integers(0, 256, (375, 500, 3), np.uint8)
        Image.fromarray(photo).save(buffer, "JPEG")
        inputs = [buffer.getvalue()] * count
    return SimpleNamespace(
        served=Version(manifest),
        inputs=inputs,
        pixels=pixels[:count],
        probabilities=given[:count],
        unsure=unsure[:count],
    )


class Version:
    def __init__(self, manifest: Any) -> None:
        self.name, self.version, self.manifest = "model", 1, manifest


def observer(metrics: Metrics, images_per_s: float) -> Observer:
    """A second passes between requests: at a high rate all are looked at, at a low one none."""
    ticks = itertools.count()
    return Observer(metrics, images_per_s, lambda: float(next(ticks)))


def cost() -> None:
    print("microseconds of CPU an image: median of 21 rounds (least)")
    print(
        "| image | looked at, 1 a request | 8 a request | 1 a request, from a JPEG | not looked at |"
    )
    print("|---|---|---|---|---|")
    for shape in SHAPES:
        cells = []
        for count, jpeg, rate in (
            (1, False, 1e9),
            (8, False, 1e9),
            (1, True, 1e9),
            (1, False, 1e-9),
        ):
            told, observe = answered(shape, count, jpeg), observer(Metrics(), rate)
            observe(told)
            cells.append(microseconds(functools.partial(observe, told), count))
        print(f"| {'x'.join(map(str, shape))} | {' | '.join(cells)} |", flush=True)
    metrics = Metrics()
    metrics.serving("model", 1, "", "cpu", "fp32")
    observe, watch = observer(metrics, 1e9), Watch(1, ALARM)
    told = answered((28, 28, 1), 8, False)
    closing, other = [], []
    for _ in range(100):
        other.append(cpu_s(lambda: watch.shown(metrics.snapshot())))
        for _ in range(20):
            observe(told)
        closing.append(cpu_s(lambda: watch.shown(metrics.snapshot())))
    for seconds, when in ((closing, "closes"), (other, "goes on")):
        print(f"/metrics, for a version whose window {when}: {sorted(seconds)[50] * 1e3:.2f} ms")


def cpu_s(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


# What it sees.


def filtered(pixels: Array, radius: float) -> Array:
    blur = ImageFilter.GaussianBlur(radius)
    grey = pixels.shape[-1] == 1
    rows = [Image.fromarray(row[..., 0] if grey else row).filter(blur) for row in pixels]
    return np.stack([np.asarray(row).reshape(pixels.shape[1:]) for row in rows])


def noisy(pixels: Array) -> Array:
    noise = np.random.default_rng(0).normal(0, 10, pixels.shape)
    return np.clip(pixels + noise, 0, 255).astype(np.uint8)


def same(pixels: Array) -> Array:
    return pixels


# What is done to the pixels; the share of class 3 where it is made another.
CHANGES: dict[str, tuple[Callable[[Array], Array], float | None]] = {
    "none": (same, None),
    "blur, radius 0.5": (lambda pixels: filtered(pixels, 0.5), None),
    "blur, radius 1": (lambda pixels: filtered(pixels, 1), None),
    "0.9 of the light": (lambda pixels: (pixels * 0.9).astype(np.uint8), None),
    "0.8 of the light": (lambda pixels: (pixels * 0.8).astype(np.uint8), None),
    "noise of 10 levels": (noisy, None),
    "red for blue": (lambda pixels: pixels[..., ::-1], None),
    "one class 20% in place of 10": (same, 0.2),
    "one class 30%": (same, 0.3),
    "one class 40%": (same, 0.4),
}


def held_out(name: str, folder: str) -> tuple[bundles.Bundle, Array, Array]:
    """A shipped version, and pixels and labels of images that it was not trained on."""
    bundle = bundles.read(MODELS / name / "1")
    if name == "digits":
        data = datasets.load(TrainingSettings(data="digits"))
        parts = data.test, data.validation
        return (
            bundle,
            np.concatenate([part.inputs for part in parts]),
            np.concatenate([part.labels for part in parts]),
        )
    files = sorted(Path(folder, "test").glob("*/*"))
    labels = np.array([bundle.manifest.labels.index(file.parent.name) for file in files])
    return (
        bundle,
        np.stack([images.decode(file.read_bytes(), bundle.manifest.pixels) for file in files]),
        labels,
    )


def windows(name: str, folder: str) -> None:
    bundle, pixels, labels = held_out(name, folder)
    run, thresholds = Model.load(bundle).run, bundle.manifest.thresholds
    assert thresholds
    before = answers(run, pixels)
    half = len(pixels) // 2
    size = min(WINDOW, half)
    print(f"\n{name}: {half} images in the profile, {size} in a window")
    print("| change | PSI of the feature that changed most, median | windows that alarm |")
    print("|---|---|---|")
    for change, (alter, share) in CHANGES.items():
        if change == "red for blue" and pixels.shape[-1] == 1:
            continue
        draw, changed = np.random.default_rng(0), alter(pixels)
        after = before if alter is same else answers(run, changed)
        replays = REPLAYS if change == "none" else CHANGED_REPLAYS
        found: list[dict[str, tuple[float, float]]] = []
        for _ in range(replays):
            order = draw.permutation(len(pixels))
            ours, theirs = order[:half], order[half:]
            chosen = theirs[:size]
            if share is not None:
                rare = labels[theirs] == 3
                chances = np.where(rare, share / rare.sum(), (1 - share) / (~rare).sum())
                chosen = draw.choice(theirs, size, p=chances)
            made = profile.make(
                pixels[ours], before[ours], ~sure(before[ours], thresholds), [32] * half
            )
            seen = profile.measure(changed[chosen], after[chosen], ~sure(after[chosen], thresholds))
            found.append({})
            for feature, values in seen.items():
                bins = made.features[feature]
                where = np.searchsorted(bins.edges, values)
                counts = np.bincount(where, minlength=len(bins.counts)).tolist()
                away = distance(bins.counts, counts)
                found[-1][feature] = away.psi, away.p
        medians = {
            feature: float(np.median([each[feature][0] for each in found])) for feature in found[0]
        }
        most = max(medians, key=lambda feature: medians[feature])
        alarms = sum(
            any(psi >= ALARM and p < 0.001 / len(made.features) for psi, p in each.values())
            for each in found
        )
        shown = f"{most} {medians[most]:.2f}"
        if change == "none":
            p = np.array([p for each in found for _, p in each.values()])
            highest = max(psi for each in found for psi, _ in each.values())
            shown = f"0; the highest of all {highest:.3f}; p below 0.05 in {(p < 0.05).mean():.3f}"
        print(f"| {change} | {shown} | {alarms} of {replays} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["cost", "windows"])
    parser.add_argument("--cifar10", default="", help="folder with test/<class>/*.jpg")
    options = parser.parse_args()
    if options.part == "cost":
        cost()
        return
    windows("digits", "")
    if options.cifar10:
        windows("cifar10", options.cifar10)


if __name__ == "__main__":
    main()
