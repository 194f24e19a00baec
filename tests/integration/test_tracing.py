"""What a real server tells a collector of its requests: `--otlp-endpoint`."""

import secrets
import time
import urllib.request
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2
from convoy_protos import inference_pb2 as pb
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import classifier_on, inference_on
from tests.integration.pictures import encode, encoded, noise, raw
from tests.integration.test_inference_protocol import infer_request, raw_bytes, raw_pixels
from tests.otlp import Kind, Receiver, Span

INFER = "inference.GRPCInferenceService/ModelInfer"
CLASSIFY = "convoy.v1.ImageClassifier/Classify"
STREAM = "convoy.v1.ImageClassifier/ClassifyStream"
ONE_PROCESS: tuple[str, ...] = ()
SEVERAL = ("--acceptors", "2", "--engines", "1")


class Caller:
    """A span of the caller's, by which it asks."""

    def __init__(self, *, sampled: bool = True) -> None:
        self.trace, self.id = secrets.token_hex(16), secrets.token_hex(8)
        flags = "01" if sampled else "00"
        self.metadata = [
            ("traceparent", f"00-{self.trace}-{self.id}-{flags}"),
            ("tracestate", "ours=1"),
        ]


def ask(image: int, count: int) -> pb.ModelInferRequest:
    """For so many images, encoded or in pixels, with a receipt."""
    request = infer_request("colours", "image")
    (raw_bytes if image % 2 else raw_pixels)(request, noise(image, count, (4, 4, 3)))
    request.parameters["timings"].bool_param = True
    return request


def stages(spans: list[Span], request: Span) -> dict[str, Span]:
    """By their names, the spans within that of a request, one after the other and in its time."""
    found = [span for span in spans if span.parent == request.id]
    assert all(span.trace == request.trace and span.within(request) for span in found)
    assert all(span.kind == Kind.SPAN_KIND_INTERNAL for span in found)
    ordered = sorted(found, key=lambda span: (span.began, span.ended))
    assert all(a.ended <= b.began for a, b in pairwise(ordered))
    return {span.name: span for span in ordered}


@pytest.mark.parametrize("processes", [ONE_PROCESS, SEVERAL], ids=["one process", "several"])
def test_requests_and_the_batches_they_ran_in_are_spans_of_their_callers_traces(
    models: Path, processes: tuple[str, ...]
) -> None:
    variables = {"OTEL_RESOURCE_ATTRIBUTES": "deployment.environment.name=tests"}
    with (
        Receiver() as receiver,
        Server(
            "--otlp-endpoint",
            receiver.url,
            "--http-port",
            "0",
            *processes,
            models=models,
            variables=variables,
        ) as server,
    ):
        server.ready()
        before = time.time_ns()
        receipts: dict[str, tuple[Caller, int, pb.ModelInferResponse]] = {}
        # Connections are what acceptors share.
        channels = [server.channel() for _ in range(6)]
        for _ in range(3):
            pending = []
            for number in range(30):
                caller = Caller(sampled=number % 3 > 0)
                calls, count = inference_on(channels[number % 6]), 1 + number % 3
                metadata = caller.metadata
                answer = calls.ModelInfer.future(
                    ask(number, count), metadata=metadata, timeout=TIMEOUT_S
                )
                pending.append((caller, number, count, answer))
            for caller, number, count, answer in pending:
                response = answer.result()
                if number % 3:
                    receipts[caller.trace] = caller, count, response
        stream, broken, unknown, silent, web = (Caller() for _ in range(5))
        inference, classifier = inference_on(channels[0]), classifier_on(channels[0])
        # Of nobody's trace: one of its own.
        images = [raw(image) for image in noise(1, 2, (8, 8, 1))]
        classifier.Classify(classifier_pb2.ClassifyRequest(model="digits", images=images))
        message = classifier_pb2.ClassifyRequest(
            model="colours", images=[encoded(noise(2, 1, (4, 4, 3))[0])]
        )
        messages = [classifier_pb2.ClassifyStreamRequest(request=message) for _ in range(2)]
        assert len(list(classifier.ClassifyStream(iter(messages), metadata=stream.metadata))) == 2
        request = infer_request("colours", "image")
        request.inputs[0].datatype = "BYTES"
        request.inputs[0].shape[:] = [1]
        request.inputs[0].contents.bytes_contents.append(b"no image")
        with pytest.raises(grpc.RpcError, match="INVALID_ARGUMENT"):
            inference.ModelInfer(request, metadata=broken.metadata)
        with pytest.raises(grpc.RpcError, match="NOT_FOUND"):
            inference.ModelInfer(pb.ModelInferRequest(model_name="?"), metadata=unknown.metadata)
        # What asks for no work is not traced, whoever asks.
        assert inference.ServerReady(pb.ServerReadyRequest(), metadata=silent.metadata).ready
        request_http = urllib.request.Request(
            f"http://127.0.0.1:{server.http_port}/v1/classify?model=colours",
            encode(noise(3, 1, (4, 4, 3))[0]),
            {"Content-Type": "image/png", **dict(web.metadata)},
        )
        with urllib.request.urlopen(request_http, timeout=TIMEOUT_S) as response:
            assert response.status == 200
        after, expected = time.time_ns(), len(receipts) + 6

        def all_there(spans: list[Span]) -> bool:
            served = [span for span in spans if span.kind == Kind.SPAN_KIND_SERVER]
            told = {(span.trace, span.id) for span in spans if span.name == "batch"}
            return len(served) >= expected and all(
                set(span.links) <= told for span in spans if span.name == "run"
            )

        spans = receiver.wait_for(all_there)
        for channel in channels:
            channel.close()
    assert len({span.id for span in spans}) == len(spans)
    served = {span.id: span for span in spans if span.kind == Kind.SPAN_KIND_SERVER}
    assert len(served) == expected
    assert silent.trace not in {span.trace for span in spans}
    of_trace: defaultdict[str, list[Span]] = defaultdict(list)
    for span in served.values():
        of_trace[span.trace].append(span)
        assert before <= span.began <= span.ended <= after
        if span.trace != web.trace:
            assert span.attributes["rpc.system.name"] == "grpc"
            assert span.attributes["rpc.method"] == span.name
        assert span.resource["service.name"] == "convoy"
        assert span.resource["deployment.environment.name"] == "tests"

    ran: defaultdict[tuple[str, str], list[Span]] = defaultdict(list)
    for trace, (caller, count, response) in receipts.items():
        (span,) = of_trace.pop(trace)
        assert (span.name, span.parent, span.state) == (INFER, caller.id, "ours=1")
        assert span.attributes["rpc.response.status_code"] == "OK"
        assert span.attributes["convoy.model.name"] == "colours"
        assert span.attributes["convoy.model.version"] == 1
        assert span.attributes["convoy.images"] == count
        assert not span.failed
        within, times = stages(spans, span), response.parameters
        decoded = ["decode"] if times["decode_s"].double_param else []
        assert list(within) == [*decoded, "queue", "run"]
        run, queue = within["run"], within["queue"]
        assert run.attributes["convoy.batch.size"] == times["batch_size"].int64_param
        # Nanoseconds of the clock are 256 apart where they are floats.
        for stage, name in (run, "run_s"), (queue, "queue_s"):
            took_s = times[name].double_param
            assert stage.ended - stage.began == pytest.approx(1e9 * took_s, abs=2000)
        (link,) = run.links
        ran[link].append(span)

    batches = {(span.trace, span.id): span for span in spans if span.name == "batch"}
    assert sum(len(batch.links) for batch in batches.values()) == len(receipts) + 4
    for ids, requests in ran.items():
        batch = batches[ids]
        assert not batch.parent
        assert Counter(batch.links) == Counter((span.trace, span.id) for span in requests)
        assert batch.attributes["convoy.model.name"] == "colours"
        rows = 0
        for span in requests:
            run = stages(spans, span)["run"]
            assert abs(run.ended - batch.ended) < 1e9
            spare = (run.ended - run.began) - (batch.ended - batch.began)
            if abs(spare) < 2000:
                rows += span.attributes["convoy.images"]
                size = run.attributes["convoy.batch.size"]
                assert batch.attributes["convoy.batch.size"] == size
            else:  # it ran in several, of which this was the last
                assert spare > 0
        assert batch.attributes.get("convoy.batch.size", rows) >= rows
    assert max(map(len, ran.values())) > 1
    # A batch in which requests of several acceptors ran is told of by each of them.
    instances = Counter(
        (batch.attributes["convoy.batch.id"], batch.resource["service.instance.id"])
        for batch in batches.values()
    )
    assert set(instances.values()) == {1}

    assert {span.name for span in of_trace[stream.trace]} == {STREAM}
    assert [span.parent for span in of_trace.pop(stream.trace)] == [stream.id] * 2
    (span,) = of_trace.pop(broken.trace)
    assert list(stages(spans, span)) == ["decode"]
    assert span.attributes["rpc.response.status_code"] == "INVALID_ARGUMENT"
    # Whose fault is the caller's.
    assert not span.failed
    (span,) = of_trace.pop(unknown.trace)
    assert span.attributes["rpc.response.status_code"] == "NOT_FOUND"
    assert not stages(spans, span)
    (span,) = of_trace.pop(web.trace)
    assert (span.name, span.parent) == ("POST /v1/classify", web.id)
    assert span.attributes["http.response.status_code"] == 200
    assert list(stages(spans, span)) == ["decode", "queue", "run"]
    ((span,),) = of_trace.values()
    assert (span.name, span.parent) == (CLASSIFY, "")
    assert list(stages(spans, span)) == ["queue", "run"]


def test_a_collector_that_is_away_slow_or_wrong_costs_traces_and_nothing_else(
    models: Path,
) -> None:
    traces = 'convoy_traces_total{{outcome="{}"}}'.format
    with (
        Receiver() as receiver,
        Server("--otlp-endpoint", f"{receiver.url}/v1/traces", models=models) as server,
    ):
        server.ready()
        with server.channel() as channel:
            calls = inference_on(channel)

            def infer() -> None:
                answer = calls.ModelInfer(ask(1, 1), timeout=TIMEOUT_S)
                assert np.frombuffer(answer.raw_output_contents[0], "<f4").shape == (3,)

            receiver.status = 400
            infer()
            server.wait_for_metric(traces("failed"), 1)
            infer()
            server.wait_for_metric(traces("failed"), 2)
            assert server.log.count("takes no traces") == 1
            assert "code: 400" in server.log
            receiver.status = 200
            infer()
            server.wait_for_metric(traces("exported"), 1)
            server.wait_for("takes traces again")
            # It takes requests, and does not answer.
            receiver.open.clear()
            infer()
            receiver.wait_until_asked()
            for _ in range(20):
                infer()
        asked = time.monotonic()
        assert server.stop() == 0, server.log
        # Of the 20 s for draining, for what is still to be sent.
        assert time.monotonic() - asked < 15
        assert "traces were not all sent" in server.log
