"""Which loads are tried, and what is printed, written and drawn of them."""

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from convoy.bench import payloads, report
from convoy.bench.load import Fleet, Load
from convoy.bench.report import Point
from convoy.bench.settings import BenchSettings
from convoy_service.engine.cpu import whole_cores
from convoy_service.errors import ConvoyError

_CONCURRENCY = (1, 8, 32)
# Where capacity is looked for, until more in flight brings no more.
_CAPACITY_CONCURRENCY = (8, 32, 128, 512)
_MORE = 1.05
_OVERLOAD = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)

Measure = Callable[[Load], Point]


def run(settings: BenchSettings) -> int:
    """Does what `convoy bench` was told; its exit status. Raises ConvoyError."""
    _check(settings)
    processes = settings.processes or max(1, whole_cores() // 4)
    connections = max(settings.connections, processes)
    work, target, sent = payloads.prepare(settings, connections)
    errors, out = Console(stderr=True, soft_wrap=True), Console(soft_wrap=True)
    out.print(
        f"{sent} -> {settings.server} (client processes: {processes}, connections: {connections})",
        highlight=False,
    )
    if work.truths and (same := payloads.alike(work.truths)):
        _warn(
            errors,
            f"--check can't tell {same} of the images from others by their answers: send more different ones with --images",
        )
    points: list[Point] = []
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
            console=errors,
            transient=True,
            refresh_per_second=2,
        ) as progress,
        Fleet(work, processes) as fleet,
    ):

        def measure(load: Load) -> Point:
            target.wait_until_idle()
            task = progress.add_task(report.name(load), total=load.length_s)
            samples = fleet.run(load, lambda passed: progress.update(task, completed=passed))
            progress.remove_task(task)
            point = report.measure(load, samples, settings.images_per_request, settings.slo_ms)
            points.append(point)
            progress.console.print(report.line(point), highlight=False)
            return point

        found = _loads(settings, measure)
    # A pipe has no width to fit into.
    wide = Console(width=None if sys.stdout.isatty() else 200)
    wide.print(report.table(points, settings.slo_ms))
    for name, value in found.items():
        out.print(f"{name.replace('_', ' ')}: {value:,.1f} requests/s", highlight=False)
    for warning in report.warnings(points):
        _warn(errors, warning)
    if settings.json:
        _write(settings.json, _as_json(settings, sent, points, found))
    if settings.plot:
        from convoy.bench.plot import draw

        draw(settings.plot, sent, points, slo_ms=settings.slo_ms, **found)
    wrong = sum(point.wrong_rows for point in points)
    if settings.check:
        count = sum(point.statuses.get("OK", 0) for point in points)
        out.print(f"check: {wrong} wrong rows in the answers to {count} requests")
    return int(wrong > 0)


def _loads(settings: BenchSettings, measure: Measure) -> dict[str, float]:
    """Tries the loads that are asked for; what is found by them, in requests a second."""
    base = Load(
        arrivals=settings.arrivals,
        duration_s=settings.duration_s,
        warmup_s=settings.warmup_s,
        timeout_s=settings.timeout_ms / 1e3,
        seed=settings.seed,
    )
    if settings.find_peak:
        assert settings.slo_ms is not None
        return {"peak_rate": _peak(base, settings.slo_ms, measure)}
    if settings.overload:
        assert settings.slo_ms is not None
        tried = settings.concurrency or _CAPACITY_CONCURRENCY
        capacity = find_capacity(
            lambda concurrency: measure(replace(base, concurrency=concurrency)).throughput, tried
        )
        if not capacity:
            raise ConvoyError("no request was answered: there is nothing to overload")
        for times in _OVERLOAD:
            measure(replace(base, rate=times * capacity, timeout_s=settings.slo_ms / 1e3))
        return {"capacity": capacity}
    for rate in settings.rate:
        measure(replace(base, rate=rate))
    for concurrency in settings.concurrency or (() if settings.rate else _CONCURRENCY):
        measure(replace(base, concurrency=concurrency))
    return {}


def _peak(base: Load, slo_ms: float, measure: Measure) -> float:
    alone = measure(replace(base, concurrency=1))
    if not alone.throughput:
        raise ConvoyError("no request was answered: there is no peak to be found")

    def meets(rate: float) -> bool:
        # A miss must repeat itself: one hiccup of the machine is not the server's limit.
        load = replace(base, rate=rate, arrivals="poisson", patience_s=slo_ms / 1e3)
        return any(measure(load).p99_of_all_ms <= slo_ms for _ in range(2))

    return find_peak(meets, alone.throughput / 2)


def find_peak(
    meets: Callable[[float], bool], start: float, *, precision: float = 0.05, trials: int = 16
) -> float:
    """The highest rate that `meets` the bound, to `precision` and in at most so many trials; 0 if none
    did. Doubles from `start` until one doesn't (halves until one does), then bisects, geometrically.

    This is the metric of MLPerf Inference's Server scenario: Poisson arrivals, and the 99th percentile
    within a bound.
    """
    low, high, rate = 0.0, float("inf"), start
    for _ in range(trials):
        if meets(rate):
            low = rate
        else:
            high = rate
        if high <= low * (1 + precision):
            break
        rate = low * 2 if high == float("inf") else (low * high) ** 0.5 or high / 2
    return low


def find_capacity(throughput: Callable[[int], float], concurrencies: Iterable[int]) -> float:
    """The most that a closed loop brings, with more and more in flight until that brings no more."""
    most = 0.0
    for concurrency in concurrencies:
        found = throughput(concurrency)
        if found < most * _MORE:
            return max(found, most)
        most = found
    return most


def _check(settings: BenchSettings) -> None:
    """Raises ConvoyError for settings that contradict each other, before anything is sent."""
    if settings.stream and settings.api != "classify":
        raise ConvoyError("--stream sends messages of ClassifyStream: add --api classify")
    if settings.rate and settings.concurrency:
        raise ConvoyError("--rate is an open loop, --concurrency a closed one: give one of them")
    if settings.images and settings.jpeg_size:
        raise ConvoyError("--images sends files, --jpeg-size makes images: give one of them")
    if settings.find_peak and settings.overload:
        raise ConvoyError("--find-peak and --overload choose different loads: give one of them")
    if settings.find_peak and (settings.rate or settings.concurrency):
        raise ConvoyError("--find-peak chooses the rates: leave out --rate and --concurrency")
    if settings.overload and settings.rate:
        raise ConvoyError("--overload chooses the rates: leave out --rate")
    if (settings.find_peak or settings.overload) and settings.slo_ms is None:
        raise ConvoyError("--find-peak and --overload need a bound: add --slo-ms, such as 50")
    for path in (settings.json, settings.plot):
        if path and not path.resolve().parent.is_dir():
            raise ConvoyError(f"{path}: there is no such folder")


def _as_json(
    settings: BenchSettings, sent: str, points: list[Point], found: dict[str, float]
) -> str:
    told = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(settings).items()
    }
    whole: dict[str, Any] = {
        "convoy": metadata.version("convoy-serving"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "sent": sent,
        "settings": told,
        **found,
        "points": [report.as_json(point) for point in points],
    }
    return json.dumps(whole, indent=2) + "\n"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConvoyError(f"{path}: {error}") from error


def _warn(console: Console, message: str) -> None:
    console.print(f"warning: {message}", style="yellow", highlight=False)
