"""What became of a load: the figures, the table, the JSON and the picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from convoy.bench.http2 import CODES, OK
from convoy.bench.load import Floats, Load, Samples

QUANTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p99.9": 99.9, "max": 100.0}

# A client that is later than this, and than a tenth of what it measures, spoils the measurement.
_LAG_MS = 1.0
_LAG_SHARE = 0.1
# So much of a core is all of it, on a machine that does other things, too.
_BUSY = 0.95


@dataclass(frozen=True)
class Point:
    """One load and what became of it. Rates are a second of the measured time."""

    rate: float | None
    """Offered requests a second, in the open loop."""
    concurrency: int | None
    """Requests in flight, in the closed loop."""
    requests: int
    """In the open loop those that were due in the measured time, in the closed one those that ended."""
    throughput: float
    """OK answers."""
    images_per_s: float
    """Images of OK answers."""
    goodput: float | None
    """OK answers within the latency bound, counted from when they were due; None without a bound."""
    latency_ms: dict[str, float]
    """Quantiles over OK answers."""
    p99_of_all_ms: float
    """The same over all requests, infinite for those without an OK answer."""
    statuses: dict[str, int]
    """How many had which gRPC status."""
    refused: int
    """Of these, RESOURCE_EXHAUSTED."""
    late: int
    """DEADLINE_EXCEEDED, and OK answers after the bound."""
    lag_p99_ms: float
    """How much later than due the client sent; 0 in the closed loop."""
    client_cpu: float
    """Of the client's busiest process, over one core."""
    wrong_rows: int
    details: dict[str, str]
    """For each status other than OK, the first message."""

    @property
    def client_bound(self) -> bool:
        """Whether it is the client that was measured rather than the server."""
        allowed = max(_LAG_MS, _LAG_SHARE * self.latency_ms.get("p99", 0.0))
        return self.lag_p99_ms > allowed or self.client_cpu > _BUSY


def name(load: Load | Point) -> str:
    """A load in two words."""
    return f"{load.rate:,.6g}/s" if load.rate is not None else f"{load.concurrency} in flight"


def percentile(values: Floats, percent: float) -> float:
    """The smallest value that `percent` of all do not exceed (nearest rank); nan where there is none."""
    if not len(values):
        return math.nan
    rank = max(0, math.ceil(percent / 100 * len(values)) - 1)
    return float(np.partition(values, rank)[rank])


def measure(load: Load, samples: Samples, images: int, slo_ms: float | None) -> Point:
    """The figures of a load whose requests had so many `images`."""
    # Closed: an answer belongs to the time in which it came. Open: a request to that in which it was due.
    moment = samples.answered if load.rate is None else samples.due
    counted = (moment >= load.warmup_s) & (moment < load.length_s)
    code, latency = samples.code[counted], samples.latency[counted] * 1e3
    lag = samples.lag[counted] * 1e3
    ok = code == OK
    within = ok & (latency <= (math.inf if slo_ms is None else slo_ms))
    statuses = {
        CODES[int(value)]: int(count)
        for value, count in zip(*np.unique(code, return_counts=True), strict=True)
    }
    return Point(
        rate=load.rate,
        concurrency=load.concurrency,
        requests=len(code),
        throughput=int(ok.sum()) / load.duration_s,
        images_per_s=int(ok.sum()) * images / load.duration_s,
        goodput=None if slo_ms is None else int(within.sum()) / load.duration_s,
        latency_ms={key: percentile(latency[ok], q) for key, q in QUANTILES.items()}
        if ok.any()
        else {},
        p99_of_all_ms=percentile(np.where(ok, latency, math.inf), 99),
        statuses=statuses,
        refused=statuses.get("RESOURCE_EXHAUSTED", 0),
        late=int((ok & ~within).sum()) + statuses.get("DEADLINE_EXCEEDED", 0),
        lag_p99_ms=percentile(lag, 99) if len(lag) else 0.0,
        client_cpu=samples.cpu,
        wrong_rows=samples.wrong_rows,
        details={CODES[value]: text for value, text in samples.details.items()},
    )


def table(points: Sequence[Point], slo_ms: float | None) -> Table:
    """The points as rows. Latencies are of OK answers."""
    made = Table("load", box=box.SIMPLE_HEAD)
    columns = [
        "OK/s",
        "images/s",
        *(f"{each} ms" for each in QUANTILES),
        "refused",
        "late",
        "lag p99 ms",
        "client CPU",
    ]
    if slo_ms is not None:
        columns.insert(2, f"within {slo_ms:g} ms/s")
    for column in columns:
        made.add_column(column, justify="right")
    made.add_column("statuses")
    for point in points:
        cells = [name(point), f"{point.throughput:,.1f}", f"{point.images_per_s:,.1f}"]
        cells += [] if point.goodput is None else [f"{point.goodput:,.1f}"]
        cells += [
            f"{point.latency_ms[each]:,.2f}" if point.latency_ms else "-" for each in QUANTILES
        ]
        cells += [f"{point.refused:,}", f"{point.late:,}"]
        cells += [
            "-" if point.rate is None else f"{point.lag_p99_ms:.2f}",
            f"{point.client_cpu:.0%}",
            ", ".join(f"{status} {count:,}" for status, count in point.statuses.items()),
        ]
        made.add_row(*cells)
    return made


def as_json(point: Point) -> dict[str, Any]:
    """The point as JSON has it: null where there is no finite number."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(point).items()
    }


def line(point: Point) -> str:
    """What there is to say of a load as soon as it is over."""
    shown = [f"{key} {point.latency_ms[key]:,.2f} ms" for key in ("p50", "p99") if point.latency_ms]
    shown += [f"{count:,} {status}" for status, count in point.statuses.items() if status != "OK"]
    return f"{name(point)}: {', '.join([f'{point.throughput:,.1f} OK/s', *shown])}"


def warnings(points: Sequence[Point]) -> list[str]:
    """What whoever reads the figures must know."""
    found = [
        f"{name(point)}: the client is the bottleneck (p99 of its lag {point.lag_p99_ms:.2f} ms, "
        f"{point.client_cpu:.0%} of a core): give it more --processes, or cores that the server "
        "does not use"
        for point in points
        if point.client_bound
    ]
    details = {status: text for point in points for status, text in point.details.items()}
    return found + [f"{status}: {text}" for status, text in details.items()]
