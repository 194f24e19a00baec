"""The settings of `convoy bench`: flag, CONVOY_* variable, default and meaning in one declaration."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from convoy_service.settings import Count, CountOrAuto, Positive, Seconds, Version

_Switch = Annotated[bool, Parameter(negative=())]


@dataclass(frozen=True)
class BenchSettings:
    server: str = "localhost:8001"
    """HOST:PORT of the server; any that speaks the Open Inference Protocol, without TLS."""

    api: Literal["infer", "classify"] = "infer"
    """Calls to make: infer is ModelInfer of the Open Inference Protocol, classify is Convoy's own."""

    model: str = ""
    """Model to ask; may be left out where a Convoy server has one only."""

    version: Version = 0
    """Version to ask; 0 means the one that serves."""

    stream: _Switch = False
    """Send requests as messages of ClassifyStream, one stream a connection, instead of calls of their
    own; with --api classify."""

    images_per_request: Count = 1
    """Images in each request."""

    images: Path | None = None
    """Send image files as they are: one, or those of a folder. Default: random pixels of the model's
    size, not encoded."""

    jpeg_size: str = ""
    """Send JPEGs made at this size instead, such as 500x375 (width, height)."""

    rate: tuple[Positive, ...] = ()
    """Open loop: requests a second, sent whether or not earlier ones are answered; several make a
    sweep. Latency counts from when a request should have been sent."""

    arrivals: Literal["poisson", "constant"] = "poisson"
    """Open loop: time between requests, random as of many independent users, or always the same."""

    concurrency: tuple[Count, ...] = ()
    """Closed loop: requests in flight, each followed by the next as soon as it is answered; several
    make a sweep. Default, without --rate: 1 8 32."""

    duration_s: Positive = 10.0
    """How long each load is measured."""

    warmup_s: Seconds = 1.0
    """How long each load runs before it is measured."""

    timeout_ms: Positive = 30_000.0
    """Deadline of each request, told to the server and kept by the client."""

    slo_ms: Positive | None = None
    """Latency bound: OK answers after it are counted as late."""

    find_peak: _Switch = False
    """Search the highest rate of Poisson arrivals whose p99 is within --slo-ms; requests that fail or
    are refused are beyond it."""

    overload: _Switch = False
    """Measure capacity, then goodput (OK answers within --slo-ms, which is also the deadline) at 0.5,
    0.75, 1, 1.5, 2 and 3 times that rate."""

    check: _Switch = False
    """Ask each request once alone, compare every answer under load with that, and exit with 1 where
    one differs by more than 0.001."""

    processes: CountOrAuto = 0
    """Processes that send; 0 means one for every four usable cores, at least one."""

    connections: CountOrAuto = 0
    """TCP connections, shared out to the processes; 0 means one for each."""

    seed: int = 0
    """Of random pixels and arrivals."""

    json: Path | None = None
    """File to write all results to."""

    plot: Path | None = None
    """PNG file to draw latency against load to, or goodput with --overload."""
