import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from convoy.bench import http2, report
from convoy.bench.load import Load, Samples, merge, wrong_rows
from convoy.bench.run import find_capacity, find_peak, run
from convoy.bench.settings import BenchSettings
from convoy_service.errors import ConvoyError

OK, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED = 0, 4, 8


def test_poisson_arrivals_come_at_the_rate_and_know_nothing_of_each_other() -> None:
    load = Load(rate=1000, duration_s=99, warmup_s=1, seed=1)
    due = load.schedule()
    gaps = np.diff(due)
    assert len(due) == pytest.approx(100_000, rel=0.02)
    assert due[-1] < 100
    # Of exponential gaps the standard deviation is the mean, and neighbours are not correlated.
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.03)
    assert abs(np.corrcoef(gaps[:-1], gaps[1:])[0, 1]) < 0.02
    assert (load.schedule() == due).all()
    assert len(Load(rate=1000, duration_s=1, seed=2).schedule()) != len(due)


def test_constant_arrivals_keep_their_distance() -> None:
    due = Load(rate=40, duration_s=1, warmup_s=0.5, arrivals="constant").schedule()
    assert len(due) == 60
    assert np.diff(due) == pytest.approx(1 / 40)


def test_percentiles_are_values_that_occurred() -> None:
    values = np.array([5.0, 1.0, 4.0, 2.0, 3.0])
    assert [report.percentile(values, q) for q in (0, 20, 50, 99, 100)] == [1, 1, 3, 5, 5]
    hundred = np.append(np.ones(99), math.inf)
    assert report.percentile(hundred, 99) == 1
    assert report.percentile(np.append(hundred, math.inf), 99) == math.inf
    assert math.isnan(report.percentile(np.array([]), 50))


def samples(
    due: list[float], latency: list[float], code: list[int], lag: float = 0.0, wrong: int = 0
) -> Samples:
    at = np.array(due)
    return Samples(
        due=at,
        sent=at + lag,
        answered=at + np.array(latency),
        code=np.array(code, np.uint8),
        wrong_rows=wrong,
        cpu=lag,
        details={each: f"why {each}" for each in code if each != OK},
    )


def test_goodput_is_what_is_answered_well_and_in_time() -> None:
    load = Load(rate=5, duration_s=2, warmup_s=1)
    # Before the measured time, OK, OK but late, refused, too late for the server, after it.
    point = report.measure(
        load,
        samples(
            [0.9, 1.0, 1.5, 2.0, 2.9, 3.0],
            [0.01, 0.02, 0.06, 0.001, 0.05, 0.01],
            [OK, OK, OK, RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED, OK],
            lag=0.004,
        ),
        images=8,
        slo_ms=50,
    )
    assert point.statuses == {"OK": 2, "DEADLINE_EXCEEDED": 1, "RESOURCE_EXHAUSTED": 1}
    assert (point.requests, point.refused, point.late) == (4, 1, 2)
    assert (point.throughput, point.images_per_s, point.goodput) == (1, 8, 0.5)
    assert point.latency_ms["p50"] == pytest.approx(20)
    assert point.latency_ms["max"] == pytest.approx(60)
    assert point.p99_of_all_ms == math.inf
    assert point.lag_p99_ms == pytest.approx(4)
    assert report.as_json(point)["p99_of_all_ms"] is None
    assert sorted(report.warnings([point])) == [
        "DEADLINE_EXCEEDED: why 4",
        "RESOURCE_EXHAUSTED: why 8",
    ]


def test_a_closed_loop_counts_what_ended_in_the_measured_time() -> None:
    load = Load(concurrency=1, duration_s=1, warmup_s=1)
    point = report.measure(
        load, samples([0.0, 0.9, 1.9], [0.9, 0.2, 0.2], [OK, OK, OK]), images=1, slo_ms=None
    )
    assert (point.requests, point.throughput, point.goodput) == (1, 1, None)
    assert point.latency_ms["max"] == pytest.approx(200)


def test_a_late_client_is_told_from_a_slow_server() -> None:
    load = Load(rate=1, duration_s=1, warmup_s=0)
    late = report.measure(load, samples([0.0], [0.009], [OK], lag=0.008), 1, None)
    slow = report.measure(load, samples([0.0], [0.9], [OK], lag=0.008), 1, None)
    assert any("client is the bottleneck" in warning for warning in report.warnings([late]))
    assert report.warnings([slow]) == []


def test_merging_keeps_every_request() -> None:
    one = samples([0.0, 1.0], [0.1, 0.2], [OK, DEADLINE_EXCEEDED], lag=0.1, wrong=1)
    two = samples([0.5], [0.3], [RESOURCE_EXHAUSTED], lag=0.2, wrong=2)
    both = merge([one, two])
    assert sorted(both.latency) == pytest.approx([0.1, 0.2, 0.3])
    assert sorted(both.lag) == pytest.approx([0.1, 0.1, 0.2])
    assert both.code.tolist() == [OK, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED]
    assert (both.wrong_rows, both.cpu) == (3, 0.2)
    assert set(both.details) == {DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED}


def counted(meets: Callable[[float], bool]) -> tuple[Callable[[float], bool], list[float]]:
    tried: list[float] = []

    def count(rate: float) -> bool:
        tried.append(rate)
        return meets(rate)

    return count, tried


@pytest.mark.parametrize("start", [1.0, 70.0, 999.0, 1001.0, 50_000.0])
def test_the_peak_is_found_from_below_and_from_above(start: float) -> None:
    meets, tried = counted(lambda rate: rate <= 1000)
    peak = find_peak(meets, start)
    assert 1000 / 1.05 <= peak <= 1000
    assert peak in tried
    assert len(tried) <= 16


@pytest.mark.parametrize("answer", [True, False])
def test_the_search_for_the_peak_ends(answer: bool) -> None:
    meets, tried = counted(lambda _: answer)
    peak = find_peak(meets, 100)
    assert len(tried) == 16
    assert peak == (max(tried) if answer else 0)


def test_capacity_is_looked_for_until_more_in_flight_brings_no_more() -> None:
    brings = {8: 100.0, 32: 200.0, 128: 204.0, 512: 900.0}
    assert find_capacity(brings.__getitem__, brings) == 204
    assert find_capacity(lambda _: 0.0, brings) == 0
    assert find_capacity({1: 10.0, 2: 5.0}.__getitem__, [1, 2]) == 10


def test_rows_that_differ_are_counted() -> None:
    truth = np.array([[0.1, 0.9], [0.5, 0.5], [1.0, 0.0]], np.float32)

    def read(message: bytes) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
        if not message:
            raise ValueError
        return np.frombuffer(message, np.float32).reshape(-1, 2)

    assert wrong_rows(read, (truth + 5e-4).tobytes(), truth) == 0
    assert wrong_rows(read, truth[[1, 0, 2]].tobytes(), truth) == 2
    assert wrong_rows(read, (truth * np.float32(math.nan)).tobytes(), truth) == 3
    assert wrong_rows(read, truth[:2].tobytes(), truth) == 3
    assert wrong_rows(read, b"", truth) == 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (BenchSettings(stream=True), "--api classify"),
        (BenchSettings(rate=(1,), concurrency=(1,)), "give one of them"),
        (BenchSettings(images=Path(), jpeg_size="1x1"), "give one of them"),
        (BenchSettings(find_peak=True, overload=True, slo_ms=1), "give one of them"),
        (BenchSettings(find_peak=True), "--slo-ms"),
        (BenchSettings(overload=True), "--slo-ms"),
        (BenchSettings(find_peak=True, slo_ms=1, rate=(1,)), "leave out --rate"),
        (BenchSettings(overload=True, slo_ms=1, rate=(1,)), "leave out --rate"),
        (BenchSettings(json=Path("nowhere/at.json")), "no such folder"),
        (BenchSettings(server="localhost"), "HOST:PORT"),
    ],
)
def test_contradictions_are_told_before_anything_is_sent(
    settings: BenchSettings, words: str
) -> None:
    with pytest.raises(ConvoyError, match=words):
        run(settings)


# RFC 7541, appendix C.
@pytest.mark.parametrize(
    ("block", "headers"),
    [
        ("880f1010" + b"application/grpc".hex(), {":status": "200", "": "application/grpc"}),
        ("2088", {":status": "200"}),
        ("48826402", {":status": "302"}),
        ("5885aec3771a4b", {"": "private"}),
        ("6196d07abe941054d444a8200595040b8166e082a62d1bff", {"": "Mon, 21 Oct 2013 20:13:21 GMT"}),
        ("000b" + b"grpc-status".hex() + "0134", {"grpc-status": "4"}),
        ("1004" + b"name".hex() + "7f01" + "61" * 128, {"name": "a" * 128}),
    ],
)
def test_headers_are_read_however_they_are_coded(block: str, headers: dict[str, str]) -> None:
    assert http2.decode_headers(bytes.fromhex(block)) == headers


def test_a_header_table_that_was_forbidden_is_noticed() -> None:
    with pytest.raises(http2.ProtocolError):
        http2.decode_headers(b"\xbe")
