"""Which loads are tried, and what is printed, written and drawn of them."""

import json
import os
import sys
from dataclasses import replace

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from convoy.bench import payloads, report
from convoy.bench.load import Fleet, Load
from convoy.bench.report import Point
from convoy.bench.settings import BenchSettings
from service.errors import ConvoyError

_DEFAULT_CONCURRENCY = (1, 8, 32)


def run(settings: BenchSettings) -> int:
    """Does what `convoy bench` was told; its exit status. Raises ConvoyError."""
    _check(settings)
    processes = settings.processes or max(1, len(os.sched_getaffinity(0)) // 4)
    connections = max(settings.connections, processes)
    work, target, sent = payloads.prepare(settings, connections)
    out = Console(soft_wrap=True)
    out.print(f"{settings.server}: {sent}; {processes} processes, {connections} connections")
    points: list[Point] = []
    base = Load(
        arrivals=settings.arrivals,
        duration_s=settings.duration_s,
        warmup_s=settings.warmup_s,
        timeout_s=settings.timeout_ms / 1e3,
        seed=settings.seed,
    )
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=2,
        ) as progress,
        Fleet(work, processes) as fleet,
    ):

        def measure(load: Load) -> Point:
            target.wait_until_idle()
            name = f"{load.rate:,.6g}/s" if load.rate else f"{load.concurrency} in flight"
            task = progress.add_task(name, total=load.length_s)
            samples = fleet.run(load, lambda passed: progress.update(task, completed=passed))
            progress.remove_task(task)
            point = report.measure(load, samples, settings.images_per_request, settings.slo_ms)
            points.append(point)
            return point

        for rate in settings.rate:
            measure(replace(base, rate=rate))
        for concurrency in settings.concurrency or (() if settings.rate else _DEFAULT_CONCURRENCY):
            measure(replace(base, concurrency=concurrency))
    Console(width=None if sys.stdout.isatty() else 200).print(report.table(points, settings.slo_ms))
    if settings.json:
        found = {"points": [report.as_json(point) for point in points]}
        settings.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _check(settings: BenchSettings) -> None:
    if settings.stream and settings.api != "classify":
        raise ConvoyError("--stream sends messages of ClassifyStream: add --api classify")
    if settings.rate and settings.concurrency:
        raise ConvoyError("--rate is an open loop, --concurrency a closed one: give one of them")
