"""Charts as SVG. Lengths are in units of about one CSS pixel on a telephone."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from convoy_training.evaluation.scores import Calibration, Interval
from convoy_training.report import pictures
from convoy_training.report.record import Activations
from convoy_training.report.wording import short

_WIDTH = 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 8, 36

# A confusion matrix of more classes has no numbers, and its shades are a picture.
_MOST_NUMBERED = 20
_BLUE, _ORANGE = (11, 97, 164), (196, 78, 8)
_SHADES = 12

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A line of a chart. `colour` is "a" or "b". Each point with a number that is not finite is a gap."""

    name: str
    colour: str
    points: Points

    def finite(self) -> Points:
        return [(x, y) for x, y in self.points if math.isfinite(x) and math.isfinite(y)]


@dataclass(frozen=True)
class Chart:
    """A chart, and the names and colours of its lines if there are several."""

    svg: Markup
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Figure:
    """A chart with its title and its caption. `chart` is None if no number to draw is finite."""

    title: str
    chart: Chart | None
    caption: str


@dataclass(frozen=True)
class _Frame:
    """Where a chart of lines draws a value: from the values at its edges to places in it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    height: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (_WIDTH - _LEFT - _RIGHT),
            _TOP + (self.y_high - y) / (self.y_high - self.y_low) * (self.height - _TOP - _BOTTOM),
        )


def lines(
    series: Sequence[Series],
    x_title: str,
    *,
    percent: bool = False,
    shares: bool = False,
    height: int = 220,
    mark: tuple[float, float] | None = None,
) -> Chart | None:
    """A chart of lines; None if no point is finite.

    `percent` says that y is a share of 1, `shares` that x is one. `mark` is a point to draw a ring around.
    """
    every = [point for line in series for point in line.finite()]
    if not every:
        return None
    if mark:
        every.append(mark)
    xs, ys = [x for x, _ in every], [y for _, y in every]
    x_ticks = _ticks(min(xs), max(xs), 6, whole=not shares)
    y_ticks = _ticks(min(*ys, 0.99), 1, 5) if percent else _ticks(min(ys), max(ys), 5)
    x_low, x_high = (x_ticks[0], x_ticks[-1]) if shares else (min(xs), max(xs))
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    frame = _Frame(x_low, x_high, y_ticks[0], y_ticks[-1], height)
    marks = [
        *_grid(frame, y_ticks, percent=percent),
        *_x_axis(frame, x_ticks, x_title, shares=shares),
        *(shape for line in series for shape in _line(frame, line)),
    ]
    if mark:
        x, y = frame.at(*mark)
        marks.append(_shape("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="5", c="ring"))
    names = ", ".join(line.name for line in series)
    legend = [(line.name, line.colour) for line in series] if len(series) > 1 else []
    return Chart(_svg(_WIDTH, height, marks, f"{names} by {x_title}"), legend)


def _grid(frame: _Frame, ticks: Sequence[float], *, percent: bool) -> Iterable[Markup]:
    for tick in ticks:
        y = frame.at(frame.x_low, tick)[1]
        yield _shape("path", d=f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}", c="g")
        yield _text(_LEFT - 6, y + 4, _tick_label(tick, ticks, percent=percent), "e")


def _x_axis(frame: _Frame, ticks: Sequence[float], title: str, *, shares: bool) -> Iterable[Markup]:
    for tick in ticks:
        if frame.x_low <= tick <= frame.x_high:
            x = frame.at(tick, frame.y_low)[0]
            label = _tick_label(tick, ticks, percent=shares)
            yield _text(x, frame.height - _BOTTOM + 16, label, "m")
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, frame.height - 4, title, "m")


def _line(frame: _Frame, line: Series) -> Iterable[Markup]:
    path, pen = [], "M"
    for x, y in line.points:
        if math.isfinite(x) and math.isfinite(y):
            path.append(pen + "{:.1f} {:.1f}".format(*frame.at(x, y)))
            pen = "L"
        else:
            pen = "M"
    yield _shape("path", d="".join(path), c=f"l {line.colour}")
    finite = line.finite()
    if len(finite) == 1:
        x, y = frame.at(*finite[0])
        yield _shape("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", c=f"f {line.colour}")


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """About `most` round numbers at most. The first and the last enclose `low` and `high`."""
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _tick_label(value: float, ticks: Sequence[float], *, percent: bool) -> str:
    """`value` with as many decimals as tell the ticks apart."""
    scale, unit = (100, "%") if percent else (1, "")
    value, step = value * scale, (ticks[1] - ticks[0]) * scale
    if step < 1e-5 or abs(value) >= 1e6:
        return (f"{value:.1e}" if value else "0") + unit
    return f"{value:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}{unit}"


def reliability(calibration: Calibration, colour: str) -> Chart:
    """The share of right answers by the probability given. A larger dot stands for more images."""
    height = 300
    across, down = _WIDTH - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    marks = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = _LEFT + tick * across, _TOP + (1 - tick) * down
        marks.append(_shape("path", d=f"M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}", c="g"))
        marks.append(_text(_LEFT - 6, y + 4, f"{tick:.0%}", "e"))
        marks.append(_text(x, height - _BOTTOM + 16, f"{tick:.0%}", "m" if tick < 1 else "e"))
    marks.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, height - 4, "probability given", "m"))
    diagonal = f"M{_LEFT} {_TOP + down}L{_WIDTH - _RIGHT} {_TOP}"
    marks.append(_shape("path", d=diagonal, c="diagonal"))
    images = sum(part.images for part in calibration.bins) or 1
    for part in calibration.bins:
        x = _LEFT + part.confidence * across
        y, true = _TOP + (1 - part.accuracy) * down, _TOP + (1 - part.confidence) * down
        radius = 2.5 + 11 * math.sqrt(part.images / images)
        marks.append(_shape("path", d=f"M{x:.1f} {true:.1f}V{y:.1f}", c=f"gap {colour}"))
        marks.append(
            _shape("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", c=f"dot {colour}")
        )
    label = "share of right answers by the probability they were given"
    return Chart(_svg(_WIDTH, height, marks, label))


def confusion(counts: "npt.NDArray[np.int64]", names: Sequence[str]) -> Chart:
    """A confusion matrix: a row for each true class, a column for each answer.

    Cells show numbers only if they are large enough.
    """
    classes = len(names)
    margin = min(92, 12 + 6.2 * max(len(short(name)) for name in names))
    numbers = classes <= _MOST_NUMBERED
    cell = max(24.0, min(56.0, 290 / classes)) if numbers else 340 / classes
    side = cell * classes
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The shade is not in proportion to the share, so that rare confusions stay visible.
    levels = np.where(counts > 0, np.ceil(shares**0.6 * _SHADES), 0).astype(int)
    if numbers:
        marks = [*_shaded_cells(levels, margin, cell), *_cell_counts(counts, levels, margin, cell)]
    else:
        place = {"x": margin, "y": margin, "width": side, "height": side}
        written = {name: f"{length:.4g}" for name, length in place.items()}
        marks = [_shape("image", href=_shades_picture(levels), **written)]
    outline = f"M{margin:.4g} {margin:.4g}h{side:.4g}v{side:.4g}h-{side:.4g}z"
    marks.append(_shape("path", d=outline, c="box"))
    # If names are taller than cells, only every so many classes show their name.
    for i in range(0, classes, math.ceil(11 / cell)):
        middle = margin + (i + 0.5) * cell + 4
        marks.append(_text(margin - 5, middle, short(names[i]), "e"))
        marks.append(_text(middle, margin - 5, short(names[i]), "", turned=True))
    size = margin + side + 1
    return Chart(_svg(size, size, marks, "confusion matrix", most=size * 1.25))


def _shaded_cells(levels: "npt.NDArray[np.int64]", margin: float, cell: float) -> Iterable[Markup]:
    right = np.eye(len(levels), dtype=bool)
    for hue, chosen in (("a", right), ("b", ~right)):
        for level in np.unique(levels[chosen & (levels > 0)]):
            path = "".join(
                f"M{margin + j * cell:.4g} {margin + i * cell:.4g}"
                f"h{cell:.4g}v{cell:.4g}h-{cell:.4g}z"
                for i, j in np.argwhere(chosen & (levels == level))
            )
            yield _shape("path", d=path, c=f"c {hue}", fill_opacity=f"{_opacity(level):.2f}")


def _cell_counts(
    counts: "npt.NDArray[np.int64]", levels: "npt.NDArray[np.int64]", margin: float, cell: float
) -> Iterable[Markup]:
    for i, j in np.argwhere(counts > 0):
        x, y = margin + (j + 0.5) * cell, margin + (i + 0.5) * cell + 4
        yield _text(x, y, f"{counts[i, j]}", "m w" if levels[i, j] > 0.55 * _SHADES else "m d")


def _shades_picture(levels: "npt.NDArray[np.int64]") -> str:
    """A confusion matrix as PNG. Index 0 is empty; then follow the shades of right, and of wrong."""
    right = np.eye(len(levels), dtype=bool)
    index = np.where(right, levels, np.where(levels > 0, levels + _SHADES, 0)).astype(np.uint8)
    colours = [_ORANGE, *[_BLUE] * _SHADES, *[_ORANGE] * _SHADES]
    shades = [0, *[round(255 * _opacity(n)) for n in range(1, _SHADES + 1)] * 2]
    return pictures.palette(index, np.array(colours, np.uint8), bytes(shades))


def _opacity(level: int) -> float:
    # Even the weakest shade has to be visible.
    return 0.05 + 0.95 * level / _SHADES


def units(values: Activations, name: str) -> Chart:
    """A bar for each unit of a layer whose output has no places. `values` has the shape `[units]`."""
    height = 70
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    scale = height / ((high - low) or 1)
    zero = high * scale
    step = _WIDTH / len(values)
    path = "".join(
        f"M{(i + 0.5) * step:.1f} {zero:.1f}v{-float(value) * scale:.1f}"
        for i, value in enumerate(values)
        if abs(value) * scale >= 0.05
    )
    marks = [_shape("path", d=f"M0 {zero:.1f}H{_WIDTH}", c="g")]
    if path:
        marks.append(_shape("path", d=path, c="units a", stroke_width=f"{step * 0.7:.2f}"))
    return Chart(_svg(_WIDTH, height, marks, f"activity of the units of {name}", most=640))


def whisker(value: float, interval: Interval) -> Markup:
    """A share of 1 with its interval, for a cell of a table."""
    low, high, middle = (f"{250 * share:.0f}" for share in (interval.low, interval.high, value))
    marks = [
        _shape("path", d="M0 8H250", c="g"),
        _shape("path", d=f"M{low} 8H{high}", c="gap a"),
        _shape("circle", cx=middle, cy="8", r="4", c="f a"),
    ]
    attributes = _attributes(viewBox="-5 0 260 16", c="whisker", aria_hidden="true")
    return Markup("<svg{}>{}</svg>").format(attributes, Markup("").join(marks))


# SVG elements. `Markup` escapes every value that is not markup already.


def _attributes(c: str | None = None, **attributes: str | None) -> Markup:
    """Attributes of an element; `c` is the class. An underscore in a name stands for a hyphen."""
    named = {"class": c or None, **{key.replace("_", "-"): v for key, v in attributes.items()}}
    written = [
        Markup(' {}="{}"').format(key, value) for key, value in named.items() if value is not None
    ]
    return Markup("").join(written)


def _shape(name: str, /, c: str | None = None, **attributes: str) -> Markup:
    return Markup("<{}{}/>").format(name, _attributes(c, **attributes))


def _svg(
    width: float, height: float, marks: Sequence[Markup], label: str, most: float | None = None
) -> Markup:
    attributes = _attributes(
        "chart",
        viewBox=f"0 0 {width:.4g} {height:.4g}",
        role="img",
        aria_label=label,
        style=f"max-width:{most:.0f}px" if most else None,
    )
    return Markup("<svg{}>{}</svg>").format(attributes, Markup("").join(marks))


def _text(x: float, y: float, text: str, c: str, *, turned: bool = False) -> Markup:
    if turned:
        attributes = _attributes(c, transform=f"translate({x:.1f} {y:.1f})rotate(-90)")
    else:
        attributes = _attributes(c, x=f"{x:.1f}", y=f"{y:.1f}")
    return Markup("<text{}>{}</text>").format(attributes, text)
