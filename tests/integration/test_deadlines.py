"""Deadlines, priorities and limits, where more is asked than can be done in time."""

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from convoy_service.artifacts.images import Pixels
from convoy_service.engine.cpu import whole_cores
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import Gate, classifier_on, inference_on
from tests.integration.models import FAST_IMAGE, add_slow, add_steady, slow_of
from tests.integration.pictures import noise, probabilities, raw
from tests.integration.test_inference_protocol import infer_request, outputs_of, raw_pixels

Code = grpc.StatusCode
RUNS = 'convoy_batch_seconds_count{model="%s"}'

# All in one process, and apart.
TOPOLOGIES = [
    pytest.param([], id="one process"),
    pytest.param(["--acceptors", "2", "--engines", "1"], id="acceptors and an engine"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`slow`, as slow as a `Gate` makes it, and `steady`, some 0.1 s for each batch."""
    folder = tmp_path_factory.mktemp("deadlines")
    add_slow(folder)
    add_steady(folder, rounds=150)
    return folder


@pytest.fixture(scope="module", params=TOPOLOGIES)
def busy(request: pytest.FixtureRequest, models: Path, gate: Gate) -> Iterator[Server]:
    """A server of this module's own, whose metrics are looked at."""
    with Server(*request.param, models=models, variables=gate.variables) as server:
        yield server.ready()
    assert "Traceback" not in server.log


@pytest.fixture
def channel(busy: Server) -> Iterator[grpc.Channel]:
    with busy.channel() as channel:
        yield channel
    busy.wait_until_in_flight(0)
    assert sum_of(busy.metrics(), "convoy_rows_run_after_deadline_total") == 0
    assert busy.metrics()["convoy_held_bytes"] == 0


def sum_of(metrics: dict[str, float], family: str) -> float:
    return sum(value for sample, value in metrics.items() if sample.startswith(family))


def infer(model: str, image: Pixels, copies: int = 1, **parameters: int) -> oip.ModelInferRequest:
    request = infer_request(model, "image")
    for name, value in parameters.items():
        request.parameters[name].int64_param = value
    raw_pixels(request, np.stack([image] * copies))
    return request


def refused(call: Any) -> str:
    """The details of a call that must have been told to come back."""
    assert call.code() is Code.RESOURCE_EXHAUSTED, call.details()
    assert 0 < int(dict(call.trailing_metadata())["grpc-retry-pushback-ms"]) <= 5000
    return str(call.details())


def test_a_deadline_that_cannot_be_kept_is_refused_at_once(
    busy: Server, channel: grpc.Channel
) -> None:
    infer_call = inference_on(channel).ModelInfer
    # Of a device that has just run there is an estimate to rely on.
    infer_call(infer("steady", FAST_IMAGE), timeout=TIMEOUT_S)
    runs = busy.metrics()[RUNS % "steady"]
    # A thousand batches, in three seconds.
    for call in [
        infer_call.future(infer("steady", FAST_IMAGE, 4000), timeout=3),
        infer_call.future(infer("steady", FAST_IMAGE, 4000, timeout=3_000_000)),
    ]:
        assert "back off, then retry" in refused(call)
    assert busy.metrics()[RUNS % "steady"] == runs
    answer = infer_call(infer("steady", FAST_IMAGE, 8, timeout=30_000_000), timeout=TIMEOUT_S)
    np.testing.assert_allclose(outputs_of(answer), slow_of(np.stack([FAST_IMAGE] * 8)), atol=1e-6)


@pytest.mark.skipif(whole_cores() < 2, reason="there calls and batches share a core")
@pytest.mark.parametrize("way", ["the deadline", "the request's timeout"])
def test_the_time_that_is_allowed_ends_the_call_while_the_batch_runs(
    busy: Server, channel: grpc.Channel, gate: Gate, way: str
) -> None:
    infer_call, runs = inference_on(channel).ModelInfer, RUNS % "slow"
    before = busy.metrics().get(runs, 0)
    with gate.shut("slow"):
        # That this one is slow nobody can know.
        if way == "the deadline":
            call = infer_call.future(infer("slow", FAST_IMAGE), timeout=0.5)
        else:
            call = infer_call.future(infer("slow", FAST_IMAGE, timeout=500_000), timeout=TIMEOUT_S)
        assert call.code() is Code.DEADLINE_EXCEEDED
        if way != "the deadline":
            assert call.time_remaining() > 0, "it was not the server who told it"
        # Also there, though the caller knows by himself.
        busy.wait_until_in_flight(0)
        assert busy.metrics().get(runs, 0) == before
    busy.wait_for_metric(runs, before + 1)


@pytest.mark.skipif(whole_cores() < 2, reason="there calls and batches share a core")
def test_the_urgent_overtake_those_who_wait(
    busy: Server, channel: grpc.Channel, gate: Gate
) -> None:
    infer_call = inference_on(channel).ModelInfer
    order: list[str] = []
    ended = threading.Semaphore(0)

    def send(name: str, **parameters: int) -> Any:
        def note(_: object) -> None:
            order.append(name)
            ended.release()

        call = infer_call.future(infer("steady", FAST_IMAGE, **parameters), timeout=TIMEOUT_S)
        call.add_done_callback(note)
        return call

    with gate.shut("steady"):
        calls = [send("usual") for _ in range(20)]
        busy.wait_until_in_flight(20)
        calls.append(send("urgent", priority=1))
        busy.wait_until_in_flight(21)
    for call in calls:
        call.result()
        ended.acquire()
    assert order.index("urgent") < 16


def test_the_urgent_starve_nobody(busy: Server, channel: grpc.Channel) -> None:
    infer_call = inference_on(channel).ModelInfer
    urgent, usual = infer("steady", FAST_IMAGE, priority=1), infer("steady", FAST_IMAGE)
    stopping, pressed = threading.Event(), threading.Semaphore(0)

    def press() -> None:
        while not stopping.is_set():
            infer_call(urgent, timeout=TIMEOUT_S)
            pressed.release()

    # Twice what a batch holds: the next one is always full without anybody else.
    callers = [threading.Thread(target=press) for _ in range(8)]
    for caller in callers:
        caller.start()
    try:
        for _ in callers:
            pressed.acquire()
        answer = infer_call(usual, timeout=TIMEOUT_S)
    finally:
        stopping.set()
        for caller in callers:
            caller.join()
    np.testing.assert_allclose(outputs_of(answer), slow_of(FAST_IMAGE[np.newaxis]), atol=1e-6)


def test_in_a_storm_of_deadlines_and_cancellations_nothing_late_is_run_and_no_answer_is_wrong(
    busy: Server, channel: grpc.Channel
) -> None:
    chance = random.Random(0)
    pixels = noise(0, 240, (2, 2, 1)) // 32 + 2
    infer_call, classify = inference_on(channel).ModelInfer, classifier_on(channel).Classify
    calls: list[tuple[Any, int, int]] = []
    for first in range(0, 240, 2):
        count = chance.choice([1, 2])
        images = pixels[first : first + count]
        timeout = chance.choice([0.02, 0.1, 0.5, 2, TIMEOUT_S])
        if chance.random() < 0.5:
            request = infer_request("steady", "image")
            raw_pixels(request, images)
            calls.append((infer_call.future(request, timeout=timeout), first, count))
        else:
            asked = pb.ClassifyRequest(model="steady", images=map(raw, images), top_k=4)
            calls.append((classify.future(asked, timeout=timeout), first, count))
        if chance.random() < 0.3:
            chance.choice(calls)[0].cancel()
        if first % 20 == 0:
            # So that they do not all come before the first batch has run.
            infer_call.future(infer("steady", FAST_IMAGE)).code()
    expected, answered = slow_of(pixels), 0
    for call, first, count in calls:
        if call.cancelled():
            continue
        code = call.code()
        assert code in {Code.OK, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}, call.details()
        if code is Code.OK:
            answered += 1
            response = call.result()
            if isinstance(response, oip.ModelInferResponse):
                received = outputs_of(response)
            else:
                received = np.array([probabilities(result) for result in response.results])
            np.testing.assert_allclose(received, expected[first : first + count], atol=1e-6)
    assert answered


@pytest.fixture(scope="module")
def impatient(models: Path) -> Iterator[Server]:
    """Lets nobody wait for long."""
    with Server("--max-wait-s", "0.5", models=models) as server:
        yield server.ready()


def test_a_wait_that_is_too_long_is_refused(impatient: Server) -> None:
    with impatient.channel() as channel:
        infer_call = inference_on(channel).ModelInfer
        calls = [infer_call.future(infer("steady", FAST_IMAGE, 4)) for _ in range(300)]
        codes = [call.code() for call in calls]
        assert set(codes) == {Code.OK, Code.RESOURCE_EXHAUSTED}
        for call, code in zip(calls, codes, strict=True):
            if code is Code.RESOURCE_EXHAUSTED:
                assert "back off, then retry" in refused(call)


@pytest.mark.skipif(whole_cores() < 2, reason="there calls and batches share a core")
def test_more_bytes_than_may_be_held_are_refused_until_there_is_room(
    models: Path, gate: Gate
) -> None:
    # An image that can't be read, so that the request is large.
    images = [raw(FAST_IMAGE), pb.Image(encoded=bytes(700_000))]
    large = pb.ClassifyRequest(model="slow", images=images)
    small = pb.ClassifyRequest(model="slow", images=images[:1])
    with (
        Server("--max-held-mb", "1", models=models, variables=gate.variables) as strict,
        strict.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        classify = classifier_on(channel).Classify
        first = classify.future(large)
        while strict.metrics()["convoy_held_bytes"] < 700_000:
            assert not first.done()
        second = classify.future(large)
        assert "MB of requests are worked on" in refused(second)
        third = classify.future(small)
        strict.wait_until_in_flight(2)
        open_gate()
        assert third.result().results[0].HasField("classification")
        assert first.result().results[0].HasField("classification")
        strict.wait_until_in_flight(0)
        assert classify(large).results[0].HasField("classification")


def test_nobody_waits_for_a_caller_who_sends_no_message(
    busy: Server, channel: grpc.Channel
) -> None:
    silent: Any = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
    go_on = threading.Event()

    def nothing() -> Iterator[bytes]:
        go_on.wait()
        yield from ()

    calls = [silent.future(nothing(), timeout=TIMEOUT_S) for _ in range(20)]
    try:
        busy.wait_until_in_flight(20)
        inference_on(channel).ModelInfer(infer("slow", FAST_IMAGE), timeout=TIMEOUT_S)
    finally:
        go_on.set()
    assert {call.code() for call in calls} == {Code.INVALID_ARGUMENT}
