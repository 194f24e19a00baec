"""How the report writes numbers and names."""

import math
from typing import Any

from convoy_training.evaluation.scores import Interval


def number(value: Any, default: float = math.nan) -> float:
    """`value` as a float, or `default` if `value` is no number."""
    return float(value) if isinstance(value, int | float) else default


def percent(share: float, decimals: int = 1) -> str:
    """A share of 1 in percent. Only 1 is written as 100%, and only 0 as 0%."""
    if not math.isfinite(share):
        return "no number"
    for digits in range(decimals, 6):
        text = f"{share:.{digits}%}"
        if float(text[:-1]) not in (0, 100) or share in (0, 1):
            break
    return text if share not in (0, 1) else f"{share:.0%}"


def chance(share: float) -> str:
    """A probability in percent, where the digits beside 0 and 1 do not matter."""
    if 0 < share < 0.001:
        return "<0.1%"
    return ">99.9%" if 0.999 < share < 1 else percent(share)


def percent_range(interval: Interval) -> str:
    return f"{percent(interval.low)[:-1]} to {percent(interval.high)[:-1]}"


def count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plural(items: int, one: str, many: str = "") -> str:
    """A number of items with their name. `many` is the name's plural, by default `one` with an s."""
    return f"{items:,} {one if items == 1 else many or f'{one}s'}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def file_size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.3g} kB"


def short(name: str, most: int = 14) -> str:
    """At most `most` characters of `name`. Long names keep both ends, because names often share one end."""
    return name if len(name) <= most else f"{name[: most // 2]}…{name[1 - most + most // 2 :]}"
