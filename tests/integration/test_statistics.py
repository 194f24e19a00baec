"""ModelStatistics and Triton's metrics: one set of numbers, of the whole service, that add up."""

import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import classifier_on, inference_on
from tests.integration.pictures import encoded, solid
from tests.integration.test_inference_protocol import infer_request, raw_bytes, raw_pixels

CODE = grpc.StatusCode


def statistics(inference: Any, name: str = "", version: str = "") -> list[oip.ModelStatistics]:
    request = oip.ModelStatisticsRequest(name=name, version=version)
    return list(inference.ModelStatistics(request, timeout=TIMEOUT_S).model_stats)


def adds_up(of: oip.ModelStatistics) -> None:
    """What must hold of any version's statistics."""
    stages, batches = of.inference_stats, of.batch_stats
    assert sum(each.batch_size * each.compute_infer.count for each in batches) == of.inference_count
    assert sum(each.compute_infer.count for each in batches) == of.execution_count
    for each in batches:
        assert each.compute_input.count == each.compute_output.count == each.compute_infer.count
        assert each.compute_infer.ns > 0
    times = [stages.queue, stages.compute_input, stages.compute_infer, stages.compute_output]
    assert [each.count for each in times] == [stages.success.count] * 4
    assert sum(each.ns for each in times) <= stages.success.ns
    assert bool(stages.fail.count) == bool(stages.fail.ns)


def as_triton(server: Server) -> dict[str, float]:
    """The samples of /metrics with its names, of digits/1: what is counted, by the rest of the name."""
    # The parser has counters end in _total.
    return {
        name.partition("{")[0].removeprefix("nv_inference_").removesuffix("_total")
        + ("" if "reason" not in name else name.partition('reason="')[2].partition('"')[0]): value
        for name, value in server.metrics().items()
        if name.startswith("nv_inference_") and 'model="digits"' in name and 'version="1"' in name
    }


def is_told_alike(server: Server, of: oip.ModelStatistics) -> None:
    stages, told = of.inference_stats, as_triton(server)
    assert told["request_success"] == stages.success.count
    assert told["count"] == of.inference_count
    assert told["exec_count"] == of.execution_count
    assert told["pending_request_count"] == 0
    failed = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    assert sum(told[f"request_failure{reason}"] for reason in failed) == stages.fail.count
    for name, stage in (
        ("request", stages.success),
        ("queue", stages.queue),
        ("compute_input", stages.compute_input),
        ("compute_infer", stages.compute_infer),
        ("compute_output", stages.compute_output),
    ):
        assert told[f"{name}_duration_us"] == stage.ns // 1000


def test_of_one_process(models: Path) -> None:
    with Server("--metrics-compat", "triton", models=models) as server:
        with server.ready().channel() as channel:
            inference, classifier = inference_on(channel), classifier_on(channel)
            before = statistics(inference)
            assert [(each.name, each.version) for each in before] == [
                ("colours", "1"),
                ("digits", "1"),
            ]
            for each in before:
                adds_up(each)
                assert each.inference_count == each.last_inference == 0
                assert each.inference_stats.HasField("cache_hit")
            names = [*inference.ServerMetadata(oip.ServerMetadataRequest()).extensions]
            assert "statistics" in names

            pixels = np.zeros((3, 8, 8, 1), np.uint8)
            asked = infer_request("digits", "pixels")
            raw_pixels(asked, pixels)
            for count in range(1, 4):
                inference.ModelInfer(asked)
                (of,) = statistics(inference, "digits", "1")
                adds_up(of)
                assert of.inference_stats.queue.count == count, "also of those that did not wait"
                assert of.inference_count == 3 * count
                assert -0.001 <= time.time() - of.last_inference / 1000 <= TIMEOUT_S
            decoded = infer_request("digits", "pixels")
            raw_bytes(decoded, pixels)
            inference.ModelInfer(decoded)
            (of,) = statistics(inference, "digits")
            assert of.inference_stats.compute_input.ns > 0, "decoding"
            # Ours count as well, each message of a stream by itself, and without an image that can't be
            # read.
            images = [encoded(solid("red")), pb.Image(encoded=b"no image")]
            request = pb.ClassifyRequest(model="digits", images=images)
            classifier.Classify(request)
            messages = [pb.ClassifyStreamRequest(request=request)] * 2
            assert len(list(classifier.ClassifyStream(iter(messages)))) == 2
            (of,) = statistics(inference, "digits")
            adds_up(of)
            assert (of.inference_stats.success.count, of.inference_count) == (7, 15)

            # What fails is counted with its reason, where it is known which version it was for.
            asked.inputs[0].shape[1] = 9
            with pytest.raises(grpc.RpcError):
                inference.ModelInfer(asked)
            with pytest.raises(grpc.RpcError):
                classifier.Classify(pb.ClassifyRequest(model="digits"))
            for name, version in (("strangers", ""), ("digits", "7")):
                with pytest.raises(grpc.RpcError) as caught:
                    statistics(inference, name, version)
                assert caught.value.code() is CODE.NOT_FOUND
            (of,) = statistics(inference, "digits")
            adds_up(of)
            assert (of.inference_stats.fail.count, of.inference_stats.success.count) == (2, 7)
        is_told_alike(server, of)
        assert as_triton(server)["request_failureOTHER"] == 2


def test_of_several_processes_whoever_is_asked(models: Path) -> None:
    arguments = ("--metrics-compat", "triton", "--acceptors", "2", "--engines", "1")
    with Server(*arguments, models=models) as server, ExitStack() as stack:
        server.ready()
        # The kernel shares connections out: some to each acceptor.
        channels = [stack.enter_context(server.channel()) for _ in range(8)]
        callers = [inference_on(channel) for channel in channels]
        asked = infer_request("digits", "pixels")
        raw_pixels(asked, np.zeros((2, 8, 8, 1), np.uint8))
        with ThreadPoolExecutor(len(callers)) as pool:
            calls = [pool.submit(each.ModelInfer, asked) for each in callers * 10]
            wait(calls)
        assert not any(call.exception() for call in calls)
        server.wait_until_in_flight(0)
        for inference in callers:
            (of,) = statistics(inference, "digits")
            adds_up(of)
            assert of.inference_stats.success.count == len(calls)
            assert of.inference_count == 2 * len(calls)
            assert of.execution_count <= len(calls)
        is_told_alike(server, of)
        with pytest.raises(grpc.RpcError) as caught:
            statistics(callers[0], "digits", "7")
        assert caught.value.code() is CODE.NOT_FOUND
