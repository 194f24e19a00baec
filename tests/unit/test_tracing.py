"""What becomes of requests that are traced: which are, and what their spans say."""

import time
from collections.abc import Iterator

import numpy as np
import pytest

from convoy_service.engine.batcher import Answer
from convoy_service.telemetry import tracing
from convoy_service.telemetry.counters import Metrics
from convoy_service.telemetry.tracing import Trace, Tracing
from tests.conftest import TIMEOUT_S
from tests.otlp import Receiver, Span

PATH = "/inference.GRPCInferenceService/ModelInfer"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = ("traceparent", f"00-{TRACE}-{PARENT}-01")
OUTPUTS = np.zeros((1, 2), np.float32)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def counted(metrics: Metrics) -> dict[str, float]:
    return {labels[0]: value for labels, value in metrics.snapshot()["traces"]}  # type: ignore[misc]


def begun(traces: Tracing, *headers: tuple[str, str | bytes]) -> Trace | None:
    return traces.rpc(PATH, headers, time.monotonic())


def certain(trace: Trace | None) -> Trace:
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("sampler", "argument", "sampled", "unsampled", "alone"),
    [
        ("parentbased_always_on", "", True, False, True),
        ("parentbased_traceidratio", "0", True, False, False),
        ("parentbased_traceidratio", "1", True, False, True),
        ("always_off", "", False, False, False),
        ("always_on", "", True, True, True),
    ],
)
def test_callers_decide_what_is_sampled_or_the_sampler_that_is_set(
    monkeypatch: pytest.MonkeyPatch,
    receiver: Receiver,
    metrics: Metrics,
    sampler: str,
    argument: str,
    sampled: bool,
    unsampled: bool,
    alone: bool,
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", sampler)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    traces = Tracing(receiver.url, metrics)
    assert (begun(traces, ("te", "trailers"), SAMPLED) is not None) == sampled
    flagged = ("traceparent", f"00-{TRACE}-{PARENT}-00")
    assert (begun(traces, flagged) is not None) == unsampled
    # The last two are no parents, of which the rules of W3C say that they count as none.
    for headers in [
        (),
        (("traceparent", "00-nonsense"),),
        (("traceparent", f"00-{'0' * 32}-{PARENT}-01"),),
    ]:
        assert (begun(traces, *headers) is not None) == alone
    traces.close(TIMEOUT_S)


def test_a_share_of_those_who_come_without_a_trace_is_sampled(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, metrics: Metrics
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.25")
    traces = Tracing(receiver.url, metrics)
    # Six deviations wide.
    assert 500 - 116 < sum(begun(traces) is not None for _ in range(2000)) < 500 + 116
    traces.close(TIMEOUT_S)


def finished(traces: Tracing, answer: Answer | None, *, code: str = "OK") -> Trace:
    trace = certain(begun(traces, SAMPLED))
    trace.queues("cats", 3, 2)
    if answer:
        trace.answered(answer)
    trace.end(code, "cats")
    return trace


def test_a_batch_is_told_of_once_with_its_own_times_and_all_its_requests(
    receiver: Receiver, metrics: Metrics
) -> None:
    traces = Tracing(receiver.url, metrics)
    ran = [
        # Whole in the batch 7, in two of which it was the last, and alone in the batch 8.
        Answer(OUTPUTS, 1e-9, 2e-9, 4, batch=7, batch_s=2e-9),
        Answer(OUTPUTS, 1e-9, 5e-9, 8, batch=7, batch_s=2e-9),
        Answer(OUTPUTS, 1e-9, 5e-9, 8, batch=8, batch_s=2e-9),
    ]
    for answer in ran:
        finished(traces, answer)
    traces.close(TIMEOUT_S)
    spans = receiver.wait_for(lambda spans: len(spans) == 3 * 3 + 2)
    requests = [span.id for span in spans if span.parent == PARENT]
    batches = {span.attributes["convoy.batch.id"]: span for span in spans if span.name == "batch"}
    assert sorted(batches) == [f"{7:016x}", f"{8:016x}"]
    both, alone = batches[f"{7:016x}"], batches[f"{8:016x}"]
    assert both.links == ((TRACE, requests[0]), (TRACE, requests[1]))
    assert alone.links == ((TRACE, requests[2]),)
    assert both.attributes["convoy.batch.size"] == 4
    # Nobody knows it who ran in no other.
    assert "convoy.batch.size" not in alone.attributes
    links = [span.links for span in spans if span.name == "run"]
    assert links == [((each.trace, each.id),) for each in (both, both, alone)]
    assert counted(metrics) == {"exported": 3, "dropped": 0, "failed": 0}


@pytest.mark.parametrize(
    ("code", "failed"),
    [("DEADLINE_EXCEEDED", True), ("INTERNAL", True), ("CANCELLED", False)],
)
def test_what_was_cut_short_ends_with_its_request(
    receiver: Receiver, metrics: Metrics, code: str, failed: bool
) -> None:
    traces = Tracing(receiver.url, metrics)
    finished(traces, None, code=code)
    traces.close(TIMEOUT_S)
    queue, request = receiver.wait_for(lambda spans: len(spans) == 2)
    assert (queue.name, queue.parent, queue.ended) == ("queue", request.id, request.ended)
    assert (queue.failed, request.failed) == (failed, failed)
    assert request.attributes.get("error.type") == (code if failed else None)
    assert request.attributes["rpc.response.status_code"] == code


def test_of_http_only_the_servers_errors_are_errors(receiver: Receiver, metrics: Metrics) -> None:
    traces = Tracing(receiver.url, metrics)
    statuses = {"NOT_FOUND": 404, "UNAVAILABLE": 503}
    for code in statuses:
        route = "/v2/models/{model}/infer"
        trace = traces.http(
            "POST", "/v2/models/a/infer", route, "http", time.monotonic(), statuses, [SAMPLED]
        )
        certain(trace).end(code, "")
    traces.close(TIMEOUT_S)
    told: list[Span] = receiver.wait_for(lambda spans: len(spans) == 2)
    assert {span.name for span in told} == {"POST /v2/models/{model}/infer"}
    assert [span.attributes["http.response.status_code"] for span in told] == [404, 503]
    assert [span.failed for span in told] == [False, True]


def test_what_nobody_keeps_up_with_is_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, metrics: Metrics
) -> None:
    monkeypatch.setattr(tracing, "_LOOK_S", TIMEOUT_S)
    monkeypatch.setattr(tracing, "_MOST_WAITING", 5)
    traces = Tracing(receiver.url, metrics)
    for _ in range(8):
        finished(traces, None)
    assert counted(metrics)["dropped"] == 3
    traces.close(TIMEOUT_S)
    assert counted(metrics) == {"exported": 5, "dropped": 3, "failed": 0}


def test_where_nobody_takes_them_closing_tries_once(
    monkeypatch: pytest.MonkeyPatch, receiver: Receiver, metrics: Metrics
) -> None:
    monkeypatch.setattr(tracing, "_LOOK_S", TIMEOUT_S)
    receiver.status = 400
    traces = Tracing(receiver.url, metrics)
    for _ in range(3 * tracing._PART):
        finished(traces, None)
    traces.close(TIMEOUT_S)
    assert receiver.asked == 1
    assert counted(metrics) == {"exported": 0, "dropped": 0, "failed": 3 * tracing._PART}
