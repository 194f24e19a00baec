"""Drift: seen where it is, within a stated number of images, and not where it is not."""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageFilter
from scipy import stats
from scipy.spatial.distance import jensenshannon

from convoy_service.artifacts import reference_statistics as profile
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Manifest, Probabilities
from convoy_service.artifacts.reference_statistics import Bins, Flags, Profile
from convoy_service.engine.onnx_model import Model
from convoy_service.observers.drift_monitor import (
    Distance,
    Observer,
    Watch,
    distance,
    over_chi_square,
)
from convoy_service.telemetry.counters import Metrics, Snapshot, merge
from convoy_training.data.datasets import Dataset
from convoy_training.evaluation.scores import sure
from tests.integration.models import add_profiled
from tests.unit.versions import MANIFEST

WINDOW, ALARM = 1000, 0.2
# What service/convoy_service/observers/drift_monitor.py states: the chance that a window without drift alarms.
FALSE_ALARMS = 0.001

SHOWN = [
    "drift_images", "drift_window_images", "drift_psi", "drift_js", "drift_p_value", "drift_alarm",
]  # fmt: skip
FEATURES = {"class", "confidence", "unsure", "brightness", "contrast", "sharpness", "size"}


class Digits(NamedTuple):
    """The shipped digits with a profile, and all they were not trained on: `held_out` are the test
    images and the validation images, in this order.
    """

    manifest: Manifest
    data: Dataset
    run: Callable[[Pixels], Probabilities]

    @property
    def held_out(self) -> Pixels:
        return np.concatenate([self.data.test.inputs, self.data.validation.inputs])

    def unsure(self, given: Probabilities) -> Flags:
        assert self.manifest.thresholds
        return np.asarray(~sure(given, self.manifest.thresholds))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    bundle, data = add_profiled(tmp_path_factory.mktemp("models"))
    return Digits(bundle.manifest, data, Model.load(bundle).run)


class Version:
    """Of `convoy_service.registry.registry.Served`, what observers look at."""

    def __init__(self, manifest: Manifest, version: int = 1, name: str = "digits") -> None:
        self.manifest, self.version, self.name = manifest, version, name


class Service:
    """A process that serves. By default it looks at all that comes, eight images of each request;
    with a limit its clock stands still unless it is told.
    """

    def __init__(self, images_per_s: float | None = None) -> None:
        self.metrics, self.now = Metrics(), 0.0
        ticks = itertools.count(1.0)
        self._observe = Observer(
            self.metrics,
            images_per_s or float(WINDOW),
            lambda: self.now if images_per_s else next(ticks),
        )

    def answer(
        self,
        version: Version,
        pixels: Pixels,
        given: Probabilities,
        unsure: Flags | None = None,
        inputs: Sequence[bytes | Pixels] | None = None,
    ) -> None:
        flags = np.zeros(len(pixels), bool) if unsure is None else unsure
        answered: Any = SimpleNamespace(
            served=version,
            inputs=pixels if inputs is None else inputs,
            pixels=pixels,
            probabilities=given,
            unsure=flags,
        )
        self.metrics.serving(version.name, version.version, "", "cpu", "fp32")
        self._observe(answered)

    def answer_each(
        self,
        version: Version,
        pixels: Pixels,
        given: Probabilities,
        unsure: Flags,
        at_once: int = 8,
    ) -> None:
        for start in range(0, len(pixels), at_once):
            rows = slice(start, start + at_once)
            self.answer(version, pixels[rows], given[rows], unsure[rows])

    def counts(self) -> dict[tuple[str, ...], list[int]]:
        return counts_in(self.metrics.snapshot())


def counts_in(snapshot: Snapshot) -> dict[tuple[str, ...], list[int]]:
    return {labels: value[0] for labels, value in snapshot["drift_seen"]}  # type: ignore[index]


def shown(watch: Watch, snapshot: Snapshot, family: str) -> dict[tuple[str, ...], Any]:
    return dict(watch.shown(snapshot)[family])


def figures_of(watch: Watch, service: Service) -> dict[str, list[tuple[tuple[str, ...], Any]]]:
    """The families of drift that are shown."""
    found: Any = watch.shown(service.metrics.snapshot())
    return {name: found[name] for name in SHOWN}


def alarms(watch: Watch, service: Service, version: str = "1") -> set[str]:
    found = shown(watch, service.metrics.snapshot(), "drift_alarm")
    return {labels[2] for labels, value in found.items() if value and labels[1] == version}


# What is measured.


def test_brightness_and_contrast_are_the_mean_and_deviation_of_a_small_image() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 15, 20, 3), np.uint8)
    measured = profile.measure(pixels, np.eye(5, dtype=np.float32), np.zeros(5, bool))
    assert measured["brightness"] == pytest.approx(pixels.mean(axis=(1, 2, 3)), rel=1e-5)
    assert measured["contrast"] == pytest.approx(pixels.std(axis=(1, 2, 3)), rel=1e-5)
    assert measured["class"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 7, 3), (7, 1, 1), (500, 300, 3)])
def test_any_size_of_image_can_be_measured(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape), np.uint8)
    for values in profile.measure(pixels, np.eye(2, dtype=np.float32), np.ones(2, bool)).values():
        assert values.shape == (2,)
        assert np.isfinite(values).all()


def test_sharpness_falls_with_blur_and_not_with_light() -> None:
    noise = np.random.default_rng(0).integers(0, 200, (64, 64, 3), np.uint8)
    blurred = [
        np.asarray(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(radius)))
        for radius in (0.5, 1, 2)
    ]
    even = np.full_like(noise, 7)
    pixels = np.stack([noise, noise // 2, noise + 50, *blurred, even])
    found = profile.measure(pixels, np.eye(7, dtype=np.float32), np.zeros(7, bool))["sharpness"]
    # Pixels of noise have nothing to do with their neighbours.
    assert found[:3] == pytest.approx([1, 1, 1], abs=0.05)
    assert found[0] > 1.3 * found[3] > 1.3**2 * found[4] > 1.3**3 * found[5] > 0
    assert found[6] == 0


def test_bins_of_the_looks_hold_a_tenth_each(digits: Digits) -> None:
    found = profile.read(digits.manifest)
    assert found
    assert set(found.features) == FEATURES
    images = len(digits.data.test)
    assert {sum(bins.counts) for bins in found.features.values()} == {images}
    for feature in ("brightness", "contrast", "sharpness"):
        counts = found.features[feature].counts
        assert len(counts) == 10
        assert max(counts) - min(counts) < 0.02 * images


def test_what_training_counted_is_what_the_service_counts(digits: Digits) -> None:
    found = profile.read(digits.manifest)
    assert found
    pixels = digits.data.test.inputs
    given = digits.run(pixels)
    files = [digits.data.test.encoded(position) for position in range(len(pixels))]
    service, version = Service(), Version(digits.manifest)
    for row in range(len(pixels)):
        rows = slice(row, row + 1)
        service.answer(version, pixels[rows], given[rows], digits.unsure(given[rows]), files[rows])
    counted = {labels[3]: counts for labels, counts in service.counts().items()}
    assert counted == {feature: bins.counts for feature, bins in found.features.items()}


def test_the_size_is_that_of_files_and_of_pixels_that_were_resized(digits: Digits) -> None:
    service, version = Service(), Version(digits.manifest)
    pixels = digits.data.test.inputs[:3]
    large = np.zeros((200, 100, 1), np.uint8)
    inputs = [digits.data.test.encoded(0), large, pixels[2]]
    service.answer(version, pixels, digits.run(pixels), inputs=inputs)
    (sizes,) = (counts for labels, counts in service.counts().items() if labels[3] == "size")
    # Of the last, which came in the model's own size, nobody knows.
    assert sizes == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_other_precisions_are_no_drift(digits: Digits) -> None:
    """The certain end of the confidences is coarse enough for answers that are 0.01 off."""
    pixels = digits.data.test.inputs
    given = digits.run(pixels)
    found = profile.make(pixels, given, None, [8] * len(pixels)).features["confidence"]
    off = np.clip(given.max(axis=1) - 0.01, 0, 1)
    there = np.bincount(np.searchsorted(found.edges, off), minlength=len(found.counts))
    assert distance(found.counts, there.tolist()).psi < ALARM / 2


# A profile that is not there.


@pytest.mark.parametrize(
    "training",
    [
        {},
        {"profile": None},
        # As versions have it that were published before.
        {"profile": {"brightness": [0.0, 1.0], "contrast": [0.0, 1.0]}},
        {"profile": {"features": {"class": {"edges": [0], "counts": [1, 1]}}, "form": 2}},
        {"profile": {"features": {"class": {"edges": [0], "counts": [1, 1, 1]}}}},
        {"profile": {"features": {"class": {"edges": [0, 1], "counts": [1, 1, 1]}}}},
        {"profile": {"features": {"class": {"edges": [0], "counts": [0, 0]}}}},
        {"profile": {"features": {"class": {"edges": [0], "counts": [2, -1]}}}},
        {"profile": {"features": {}}},
    ],
)
def test_a_version_without_a_profile_that_fits_is_served_and_not_watched(
    training: dict[str, Any],
) -> None:
    service = Service()
    version = Version(dataclasses.replace(MANIFEST, training=training))
    for _ in range(3):
        service.answer(version, np.zeros((1, 4, 5, 3), np.uint8), np.eye(2, dtype=np.float32)[:1])
    assert service.counts() == {}
    figures = Watch(1, ALARM).shown(service.metrics.snapshot())
    assert not any(values for name, values in figures.items() if name.startswith("drift"))


def test_rows_that_the_model_failed_on_are_not_counted(digits: Digits) -> None:
    service, version = Service(), Version(digits.manifest)
    pixels = digits.data.test.inputs[:3]
    given = digits.run(pixels)
    given[1] = np.nan
    service.answer(version, pixels, given)
    classes = np.bincount(given[[0, 2]].argmax(axis=1), minlength=10).tolist()
    for labels, counts in service.counts().items():
        if labels[3] != "size":
            assert sum(counts) == 2, labels
        if labels[3] == "class":
            assert counts == classes


# How far it is.


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 10, 11, 99, 999])
def test_the_chance_by_chi_square_is_scipys(degrees: int) -> None:
    for value in (0.0, 1e-9, 0.3, 1.0, degrees, 2.0 * degrees, 3.0 * degrees + 40, 5000.0):
        wanted = stats.chi2.sf(value, degrees)
        assert over_chi_square(value, degrees) == pytest.approx(wanted, rel=1e-9, abs=1e-280)


def test_distances_are_scipys() -> None:
    reference, seen = [500, 300, 1200, 4000], [1000, 2000, 1000, 3000]
    found = distance(reference, seen)
    wanted = stats.chi2_contingency([reference, seen], correction=False)
    assert found.p == pytest.approx(wanted.pvalue)
    assert found.js == pytest.approx(jensenshannon(reference, seen, base=2) ** 2)
    r, s = np.array(reference) / 6000, np.array(seen) / 7000
    biased = float(((s - r) * np.log(s / r)).sum())
    assert found.psi == pytest.approx(biased - 3 * (1 / 6000 + 1 / 7000), rel=0.003)


def test_bins_in_which_hardly_anything_is_expected_are_taken_together() -> None:
    few = distance([500, 500, 1, 0, 2, 1], [480, 520, 0, 2, 1, 1])
    assert few == distance([500, 500, 4], [480, 520, 4])
    assert distance([10, 0, 0], [2000, 0, 0]) == Distance(0.0, 0.0, 1.0)
    # One that holds all of what is seen, and none of what was, is no such bin.
    assert distance([354, 0], [0, 1000]).psi > 10
    assert distance([354, 0], [0, 1000]).p < 1e-200


# No drift.


def drawn(
    draw: np.random.Generator, images: int, side: int = 8
) -> tuple[Pixels, Probabilities, Flags]:
    """Images of one population without end: any two samples differ by chance alone."""
    light, contrast = draw.uniform(60, 200, images), draw.uniform(5, 50, images)
    noise = draw.normal(0, 1, (images, side, side, 1))
    smooth = noise + draw.uniform(0, 2, (images, 1, 1, 1)) * np.roll(noise, 1, axis=2)
    values = light[:, None, None, None] + contrast[:, None, None, None] * smooth
    given = draw.dirichlet(np.full(4, 0.2), images).astype(np.float32)
    return np.clip(values, 0, 255).astype(np.uint8), given, given.max(axis=1) < 0.6


def test_two_hundred_windows_without_drift_alarm_within_the_stated_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A window in one request: the test would else take ten times as long.
    monkeypatch.setattr("convoy_service.observers.drift_monitor._AT_ONCE", WINDOW)
    draw = np.random.default_rng(0)
    pixels, given, unsure = drawn(draw, 5000)
    made = profile.make(pixels, given, unsure, [8] * len(pixels))
    manifest = dataclasses.replace(
        MANIFEST, labels=list("abcd"), training={"profile": dataclasses.asdict(made)}
    )
    service, version, watch = Service(), Version(manifest), Watch(WINDOW, ALARM)
    alarmed, psi, p = 0, [], []
    for _ in range(200):
        service.answer(version, *drawn(draw, WINDOW))
        figures = figures_of(watch, service)
        assert [value for _, value in figures["drift_window_images"]] == [WINDOW]
        alarmed += any(value for _, value in figures["drift_alarm"])
        psi += [value for _, value in figures["drift_psi"]]
        p += [value for _, value in figures["drift_p_value"]]
    # 3 or more have a chance of 0.001 where the rate is what it is said to be.
    assert alarmed <= 2
    assert len(p) == 200 * 6  # the sizes are those of the model
    # What is taken off is what chance gives: the mean would be 9 (1/1000 + 1/5000) = 0.011.
    assert np.mean(psi) < 0.004
    assert max(psi) < ALARM / 2
    # The test by itself is true, too.
    assert 0.035 < np.mean(np.array(p) < 0.05) < 0.065


def test_what_few_images_differ_by_is_no_alarm() -> None:
    """Of 80 images in a profile and 80 in a window, chance alone makes large figures."""
    draw = np.random.default_rng(0)
    large = alarmed = 0
    for _ in range(200):
        pixels, given, unsure = drawn(draw, 80)
        made = profile.make(pixels, given, unsure, [8] * len(pixels))
        manifest = dataclasses.replace(
            MANIFEST, labels=list("abcd"), training={"profile": dataclasses.asdict(made)}
        )
        service, watch = Service(), Watch(80, ALARM)
        service.answer_each(Version(manifest), *drawn(draw, 80))
        figures = figures_of(watch, service)
        large += any(value >= ALARM for _, value in figures["drift_psi"])
        alarmed += any(value for _, value in figures["drift_alarm"])
    assert large >= 10
    assert alarmed <= 2


def test_held_out_digits_alarm_against_held_out_digits_within_the_stated_rate(
    digits: Digits,
) -> None:
    """200 times those that were not trained on are halved: one half is the profile, one is served."""
    pixels, draw = digits.held_out, np.random.default_rng(0)
    given = digits.run(pixels)
    unsure = digits.unsure(given)
    half, alarmed, p = len(pixels) // 2, 0, []
    for _ in range(200):
        order = draw.permutation(len(pixels))
        ours, theirs = order[:half], order[half : 2 * half]
        made = profile.make(pixels[ours], given[ours], unsure[ours], [8] * half)
        manifest = dataclasses.replace(
            digits.manifest, training={"profile": dataclasses.asdict(made)}
        )
        service, watch = Service(), Watch(half, ALARM)
        service.answer_each(Version(manifest), pixels[theirs], given[theirs], unsure[theirs])
        figures = figures_of(watch, service)
        alarmed += any(value for _, value in figures["drift_alarm"])
        p += [value for _, value in figures["drift_p_value"]]
    assert alarmed <= 2
    assert np.mean(np.array(p) < 0.05) < 0.09


# Drift.


def filtered(pixels: Pixels, radius: float) -> Pixels:
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(row[..., 0]).filter(blur)) for row in pixels])[
        ..., np.newaxis
    ]


def unchanged(pixels: Pixels) -> Pixels:
    return pixels


@pytest.mark.parametrize(
    ("change", "shares", "alarming"),
    [
        (lambda pixels: filtered(pixels, 0.5), None, {"sharpness"}),
        (lambda pixels: (pixels * 0.8).astype(np.uint8), None, {"brightness", "contrast"}),
        # Every third image a 3, that was every tenth.
        (unchanged, [2 / 27] * 3 + [1 / 3] + [2 / 27] * 6, {"class"}),
    ],
    ids=["blur", "darker", "prior"],
)
def test_drift_alarms_within_two_windows_of_requests(
    change: Callable[[Pixels], Pixels],
    shares: list[float] | None,
    alarming: set[str],
    digits: Digits,
) -> None:
    draw, split = np.random.default_rng(0), digits.data.validation
    service, version, watch = Service(), Version(digits.manifest), Watch(WINDOW, ALARM)

    def serve(requests: int, pixels: Pixels, chances: Any = None) -> None:
        chosen = draw.choice(len(pixels), requests, p=chances)
        given = digits.run(pixels[chosen])
        service.answer_each(version, pixels[chosen], given, digits.unsure(given), at_once=1)

    # It begins in the middle of a window.
    serve(WINDOW + WINDOW // 2, split.inputs)
    assert alarms(watch, service) == set()
    chances = None
    if shares:
        chances = np.array(shares)[split.labels] / np.bincount(split.labels)[split.labels]
    for _ in range(2):
        serve(WINDOW, change(split.inputs), chances)
        found = alarms(watch, service)
    assert alarming <= found
    # And ends: the window after the last that had some.
    for _ in range(2):
        serve(WINDOW, split.inputs)
        found = alarms(watch, service)
    assert found == set()


def test_an_alarm_is_logged_with_its_numbers_once(
    digits: Digits, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "convoy.drift")
    service, version, watch = Service(), Version(digits.manifest), Watch(100, ALARM)
    pixels = digits.held_out
    given = digits.run(pixels)
    unsure = digits.unsure(given)
    for changed in (pixels, pixels // 2, pixels // 2, pixels):
        service.answer_each(version, changed, given, unsure)
        watch.shown(service.metrics.snapshot())
    began, ended = [record.getMessage() for record in caplog.records]
    assert began.startswith("digits/1 drifts: brightness (PSI ")
    assert "contrast (PSI " in began
    assert began.endswith(f"in {len(pixels)} images")
    assert ended.startswith("digits/1 drifts no more: brightness (PSI 0")


# Over processes.


def test_counts_of_several_processes_add_up_to_those_of_one(digits: Digits) -> None:
    one, several = Service(), [Service() for _ in range(3)]
    # Each process has an object of its own for a version.
    version, versions = Version(digits.manifest), [Version(digits.manifest) for _ in range(3)]
    alone, together = Watch(WINDOW, ALARM), Watch(WINDOW, ALARM)
    pixels = np.concatenate([digits.held_out, digits.held_out // 2, digits.held_out])
    given = digits.run(pixels)
    unsure, turns = digits.unsure(given), itertools.cycle(range(3))
    dead: Snapshot = {}
    for start in range(0, len(pixels), 5):
        rows, turn = slice(start, start + 5), next(turns)
        for service, served in ((one, version), (several[turn], versions[turn])):
            service.answer(served, pixels[rows], given[rows], unsure[rows])
        if start == 750:  # one dies, and begins anew
            dead, several[1] = several[1].metrics.snapshot(), Service()
            versions[1] = Version(digits.manifest)
        counted = one.metrics.snapshot()
        merged = merge([service.metrics.snapshot() for service in several], [dead])
        assert counts_in(counted) == counts_in(merged)
        ours, theirs = alone.shown(counted), together.shown(merged)
        for name in SHOWN:
            assert dict(ours[name]) == dict(theirs[name])
    assert any(value for _, value in ours["drift_alarm"])


def test_the_profile_of_the_dead_does_not_hide_that_of_the_living(digits: Digits) -> None:
    """Should a version's folder have become another one under the same number."""
    pixels = digits.held_out[:50]
    given = digits.run(pixels)
    made = profile.make(pixels, given, None, [8] * len(pixels))
    other = dataclasses.replace(digits.manifest, training={"profile": dataclasses.asdict(made)})
    dead, living = Service(), Service()
    dead.answer(Version(other), pixels[:5], given[:5])
    living.answer(Version(digits.manifest), pixels[:3], given[:3])
    merged = merge([living.metrics.snapshot()], [dead.metrics.snapshot()])
    assert shown(Watch(1, ALARM), merged, "drift_images") == {("digits", "1"): 3}


def test_versions_have_windows_of_their_own_and_are_forgotten(digits: Digits) -> None:
    service, watch = Service(), Watch(400, ALARM)
    old, new = Version(digits.manifest, 1), Version(digits.manifest, 2)
    pixels = digits.held_out
    given = digits.run(pixels)
    unsure = digits.unsure(given)
    service.answer_each(old, pixels // 2, given, unsure)
    service.answer_each(new, pixels, given, unsure)
    assert {"brightness", "contrast"} <= alarms(watch, service, "1")
    assert alarms(watch, service, "2") == set()
    del old
    service.answer(Version(digits.manifest, 3), pixels[:1], given[:1])
    images = shown(watch, service.metrics.snapshot(), "drift_images")
    assert images == {("digits", "2"): len(pixels), ("digits", "3"): 1}
    assert {labels[1] for labels in service.counts()} == {"2", "3"}
    # And may come back.
    service.answer_each(Version(digits.manifest, 1), pixels, given, unsure)
    assert alarms(watch, service, "1") == set()
    del new


def test_a_version_that_is_unloaded_is_shown_no_more(digits: Digits) -> None:
    service, watch = Service(), Watch(400, ALARM)
    pixels = digits.held_out // 2
    given = digits.run(pixels)
    service.answer_each(Version(digits.manifest), pixels, given, digits.unsure(given))
    assert alarms(watch, service)
    service.metrics.not_serving("digits", 1, "", "cpu", "fp32")
    assert not any(figures_of(watch, service).values())


def test_counts_that_fall_begin_a_window_anew(digits: Digits) -> None:
    """As those of a process do that let go of a version and took it up again."""
    watch, pixels = Watch(400, ALARM), digits.held_out
    given = digits.run(pixels)
    unsure = digits.unsure(given)
    for rows, images in ((511, 511), (300, 511), (450, 450)):
        service = Service()
        service.answer_each(Version(digits.manifest), pixels[:rows], given[:rows], unsure[:rows])
        figures = shown(watch, service.metrics.snapshot(), "drift_window_images")
        assert list(figures.values()) == [images]


# What it costs.


def test_no_more_images_are_looked_at_than_allowed(digits: Digits) -> None:
    service, version = Service(images_per_s=10), Version(digits.manifest)
    pixels = np.repeat(digits.held_out[:1], 100, axis=0)
    given = digits.run(pixels)

    def seen() -> int:
        return sum(next(iter(service.counts().values())))

    service.answer(version, pixels[:1], given[:1])
    assert seen() == 1
    for number in range(1000):
        service.now = 0.001 * (number + 1)
        service.answer(version, pixels[:1], given[:1])
    assert 10 <= seen() <= 11
    before = seen()
    # Idleness is not saved up for longer than a second.
    service.now = 1000.0
    for _ in range(100):
        service.answer(version, pixels, given)
    assert seen() == before + 10
    # And a request is not looked at for long.
    generous = Service()
    generous.answer(version, pixels, given)
    assert sum(next(iter(generous.counts().values()))) == 8


def test_one_image_in_long_is_looked_at_where_less_than_one_a_second_is_allowed(
    digits: Digits,
) -> None:
    service, version = Service(images_per_s=0.1), Version(digits.manifest)
    pixels = digits.held_out[:1]
    given = digits.run(pixels)
    for number in range(101):
        service.now = float(number)
        service.answer(version, pixels, given)
    assert 10 <= sum(next(iter(service.counts().values()))) <= 11


def test_the_images_of_a_request_are_chosen_all_over_it() -> None:
    looked: set[int] = set()
    classes = 100
    made = Profile({"class": Bins([float(c) for c in range(classes - 1)], [1] * classes)})
    manifest = dataclasses.replace(
        MANIFEST,
        labels=[str(c) for c in range(classes)],
        training={"profile": dataclasses.asdict(made)},
    )
    pixels, given = np.zeros((classes, 4, 5, 3), np.uint8), np.eye(classes, dtype=np.float32)
    for _ in range(300):
        service = Service()
        service.answer(Version(manifest), pixels, given)
        (counts,) = service.counts().values()
        rows = [row for row, count in enumerate(counts) if count]
        assert len(rows) == 8
        assert rows[-1] - rows[0] > classes / 2
        looked |= set(rows)
    assert len(looked) > 0.95 * classes
