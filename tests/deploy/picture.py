"""Draws what a real Prometheus answers to the dashboard's queries, panel by panel, in the dashboard's own
layout, since Grafana is not at hand:

    python -m tests.deploy.picture docs/dashboard.png

The server is that of test_monitoring, after five minutes: so, many a thing is wrong with it.
"""

import io
import json
import re
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter
from PIL import Image

from tests.deploy.test_monitoring import BOARD, EMPTY, Prometheus, query_of, watched

SECONDS, STEPS = 300, 150
COLUMN_IN, ROW_IN = 0.75, 0.36
GREY = "#5a5a5a"
SUFFIX = {"bytes": "B", "Bps": "B/s", "reqps": "/s", "ops": "/s", "watt": "W"}


def legend(target: dict[str, Any], labels: dict[str, str]) -> str:
    form = str(target["legendFormat"])
    if form == "__auto":
        return ", ".join(value for name, value in labels.items() if name != "__name__")
    return re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), form)


def duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms" if seconds else "0"


def scale(unit: str) -> Any:
    if unit == "percentunit":
        return PercentFormatter(1.0, decimals=None)
    if unit == "s":
        return FuncFormatter(lambda value, _: duration(value))
    if unit in SUFFIX:
        return EngFormatter(SUFFIX[unit], sep=" ")
    return FuncFormatter(lambda value, _: f"{value:g}")


def series(prometheus: Prometheus, target: dict[str, Any]) -> list[tuple[dict[str, str], Any]]:
    """Labels, and an array of times and values."""
    now = time.time()
    found = prometheus.ask(
        "query_range", query=query_of(target), start=now - SECONDS, end=now, step=SECONDS / STEPS
    )["result"]
    return [(each["metric"], np.array(each["values"], float).T) for each in found]


def timeseries(axes: Axes, panel: dict[str, Any], prometheus: Prometheus) -> None:
    custom = panel["fieldConfig"]["defaults"]["custom"]
    lines = [
        (legend(target, labels), values)
        for target in panel["targets"]
        for labels, values in series(prometheus, target)
    ]
    lines = [(name, values) for name, values in lines if np.isfinite(values[1]).any()]
    if not lines:
        why = f"no data: {EMPTY[panel['title']]}"
        axes.text(0.5, 0.5, why, color=GREY, ha="center", transform=axes.transAxes)
        return
    start = min(values[0][0] for _, values in lines)
    if "stacking" in custom:
        times = np.unique(np.concatenate([values[0] for _, values in lines]))
        rows = [np.interp(times, values[0], values[1], left=0, right=0) for _, values in lines]
        axes.stackplot(times - start, np.nan_to_num(rows), labels=[n for n, _ in lines], alpha=0.7)
    else:
        for name, (times, values) in lines:
            axes.plot(times - start, values, label=name, linewidth=1.1)
    if "scaleDistribution" in custom:
        axes.set_yscale("symlog", linthresh=1)
        axes.set_ylim(0, 2000)
    elif min(np.nanmin(values[1]) for _, values in lines) >= 0:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(scale(panel["fieldConfig"]["defaults"]["unit"]))
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=3 if len(lines) > 6 else 2, fontsize=5.5,
                frameon=False, borderaxespad=0, labelspacing=0.2, columnspacing=0.8, handlelength=1)  # fmt: skip


def heatmap(axes: Axes, panel: dict[str, Any], prometheus: Prometheus) -> None:
    [target] = panel["targets"]
    found = sorted(series(prometheus, target), key=lambda each: float(each[0]["le"]))
    times = found[-1][1][0]
    below = np.array([np.interp(times, *values) for _, values in found])
    counts = np.diff(below, axis=0, prepend=0)
    seen = np.flatnonzero(counts.sum(axis=1) > 1e-9)
    rows = slice(seen.min(), seen.max() + 1)
    axes.pcolormesh(times - times[0], np.arange(len(found))[rows], counts[rows], cmap="Oranges")
    names = [labels["le"] for labels, _ in found]
    axes.set_yticks(np.arange(len(found))[rows], names[rows], fontsize=5)


def stat(axes: Axes, panel: dict[str, Any], prometheus: Prometheus) -> None:
    [target] = panel["targets"]
    [value] = prometheus.values(query_of(target))
    unit = panel["fieldConfig"]["defaults"]["unit"]
    text = f"{value:.2%}" if unit == "percentunit" else scale(unit)(value)
    if number := re.match(r"\d+\.\d+", text):
        text = f"{float(number[0]):.3g}" + text[number.end() :]
    axes.text(0.5, 0.45, text, fontsize=20, color="#2a7d2a", ha="center", va="center",
              transform=axes.transAxes)  # fmt: skip
    axes.set_axis_off()


def table(axes: Axes, panel: dict[str, Any], prometheus: Prometheus) -> None:
    [target] = panel["targets"]
    found = prometheus.ask("query", query=query_of(target))["result"]
    columns = sorted({name for each in found for name in each["metric"]})
    axes.set_axis_off()
    rows = [
        [each["metric"].get(name, "")[:28] for name in columns] + [f"{float(each['value'][1]):g}"]
        for each in found
    ]
    made = axes.table(sorted(rows), colLabels=[*columns, "Value"], loc="upper left", edges="horizontal",
                      cellLoc="left", colLoc="left")  # fmt: skip
    made.auto_set_font_size(False)
    made.set_fontsize(6)
    made.auto_set_column_width(range(len(columns) + 1))
    for cell in made.get_celld().values():
        cell.set_height(1 / max(9, len(rows) + 1))
        cell.set_linewidth(0.3)


DRAW = {"timeseries": timeseries, "heatmap": heatmap, "stat": stat, "table": table}


def draw(prometheus: Prometheus, file: Path) -> None:
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    mpl.rcParams.update({"font.size": 6.5, "axes.edgecolor": "#c8c8c8", "axes.linewidth": 0.6})
    figure = plt.figure(figsize=(24 * COLUMN_IN, height * ROW_IN))
    for panel in panels:
        x, y, w, h = (panel["gridPos"][name] for name in "xywh")
        if panel["type"] == "row":
            figure.text(0.008, 1 - (y + 0.75) / height, panel["title"], fontsize=11, weight="bold")
            continue
        below = 2.4 if panel["type"] == "timeseries" else 0.6
        bounds = (
            (x + 0.9) / 24,
            1 - (y + h - below) / height,
            (w - 1.2) / 24,
            (h - below - 0.9) / height,
        )
        axes = figure.add_axes(bounds)
        axes.set_title("\n".join(textwrap.wrap(panel["title"], 60)), fontsize=8, loc="left", pad=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=2, colors=GREY)
        axes.grid(color="#ececec", linewidth=0.5)
        axes.set_axisbelow(True)
        DRAW[panel["type"]](axes, panel, prometheus)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75)
    # A tenth of the bytes, and to the eye the same.
    Image.open(drawn).convert("RGB").quantize(128).save(file, optimize=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, watched(Path(folder)) as prometheus:
        time.sleep(SECONDS)
        draw(prometheus, Path(sys.argv[1]))
