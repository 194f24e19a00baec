"""The pictures of `convoy bench`. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from convoy.bench.report import Point
from convoy_service.errors import ConvoyError

_LINES = {"p50": "#56b4e9", "p90": "#0072b2", "p99": "#d55e00", "p99.9": "#cc79a7"}
_NUMBERS = FuncFormatter(lambda value, _: f"{value:,.6g}")
_GOOD, _OTHER, _BOUND = "#009e73", "#d55e00", "#444444"


def draw(
    path: Path,
    sent: str,
    points: Sequence[Point],
    *,
    slo_ms: float | None = None,
    capacity: float | None = None,
    peak_rate: float | None = None,
) -> None:
    """Writes a PNG: goodput against load where `capacity` is given (requests a second), else latency.

    Raises ConvoyError where it can't be written.
    """
    with mpl.rc_context(
        {"axes.grid": True, "grid.alpha": 0.3, "font.size": 10, "axes.axisbelow": True}
    ):
        figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        if capacity is None:
            _latency(axes, points, slo_ms, peak_rate)
        else:
            _goodput(axes, points, slo_ms, capacity)
        axes.set_title(sent, fontsize=10, loc="left")
        axes.legend(frameon=False)
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise ConvoyError(f"{path}: {error}") from error


def _latency(
    axes: Axes, points: Sequence[Point], slo_ms: float | None, peak_rate: float | None
) -> None:
    # Where a rate was tried again, the last time counts.
    opened = {point.rate: point for point in points if point.rate is not None and point.latency_ms}
    shown = [opened[rate] for rate in sorted(opened)] or [p for p in points if p.latency_ms]
    load = [point.throughput if point.rate is None else point.rate for point in shown]
    for name, colour in _LINES.items():
        latency = [point.latency_ms[name] for point in shown]
        axes.plot(load, latency, "o-", color=colour, label=name, markersize=4, linewidth=1.5)
    if slo_ms is not None:
        axes.axhline(
            slo_ms, color=_BOUND, linestyle="--", linewidth=1, label=f"bound {slo_ms:g} ms"
        )
    if peak_rate:
        axes.axvline(
            peak_rate, color=_GOOD, linestyle=":", linewidth=1.5, label=f"peak {peak_rate:,.0f}/s"
        )
    if opened:
        axes.set_xlabel("offered load (requests/s)")
        if load and max(load) > 20 * min(load):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_xlabel("throughput (OK answers/s), with the requests in flight")
        for point, x in zip(shown, load, strict=True):
            axes.annotate(
                f"{point.concurrency}",
                (x, point.latency_ms["p50"]),
                textcoords="offset points",
                xytext=(0, -14),
                ha="center",
                fontsize=8,
                color=_BOUND,
            )
    axes.margins(x=0.06, y=0.12)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.minorticks_off()
    axes.set_ylabel("latency of OK answers (ms)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_NUMBERS)


def _goodput(axes: Axes, points: Sequence[Point], slo_ms: float | None, capacity: float) -> None:
    opened = [point for point in points if point.rate is not None]
    load = [(point.rate or 0) / capacity for point in opened]
    axes.plot(
        [0, 1, max(load)],
        [0, capacity, capacity],
        color=_BOUND,
        linestyle="--",
        linewidth=1,
        label=f"the offered load, up to capacity ({capacity:,.0f}/s)",
    )
    axes.plot(
        load, [p.throughput for p in opened], "s-", color=_OTHER, markersize=4, label="OK answers"
    )
    axes.plot(
        load,
        [p.goodput or 0 for p in opened],
        "o-",
        color=_GOOD,
        markersize=5,
        linewidth=2,
        label=f"goodput: OK within {slo_ms:g} ms",
    )
    axes.set_xlabel("offered load (multiples of capacity)")
    axes.set_ylabel("answers/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(_NUMBERS)
