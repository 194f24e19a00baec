import contextlib
import hashlib
import http.client
import json
import socket
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.integration.conftest import classifier_on, inference_on
from tests.integration.models import COLOURS_BATCH
from tests.integration.pictures import encoded, raw, solid
from tests.integration.test_inference_protocol import infer_request, raw_bytes

IMAGES = [raw(solid("red")), pb.Image(encoded=b"no image"), raw(solid("blue"))]


@pytest.fixture(scope="module")
def counted(models: Path) -> Iterator[Server]:
    """A server that has had exactly the requests below, and the text of its /metrics."""
    with Server(models=models) as server:
        with server.ready().channel() as channel:
            classifier, inference = classifier_on(channel), inference_on(channel)
            for _ in range(3):
                classifier.Classify(pb.ClassifyRequest(model="colours", images=IMAGES))
            stream = [
                pb.ClassifyStreamRequest(request=pb.ClassifyRequest(model=model, images=IMAGES))
                for model in ("colours", "colours", "a stranger's")
            ]
            assert len(list(classifier.ClassifyStream(iter(stream), timeout=TIMEOUT_S))) == 3
            for number in range(20):
                with pytest.raises(grpc.RpcError):
                    classifier.Classify(pb.ClassifyRequest(model=f"made up {number}"))
            with pytest.raises(grpc.RpcError):
                classifier.Classify(pb.ClassifyRequest(model="digits"))
            inference.ServerLive(oip.ServerLiveRequest())
            inference.ModelMetadata(oip.ModelMetadataRequest(name="digits"))
        server.wait_until_in_flight(0)
        yield server


def test_requests_are_counted_by_call_model_and_code(counted: Server) -> None:
    requests = {
        name: value for name, value in counted.metrics().items() if "requests_total" in name
    }
    assert requests == {
        'convoy_requests_total{call="Classify",code="OK",model="colours"}': 3,
        'convoy_requests_total{call="Classify",code="NOT_FOUND",model=""}': 20,
        'convoy_requests_total{call="Classify",code="INVALID_ARGUMENT",model="digits"}': 1,
        'convoy_requests_total{call="ClassifyStream",code="OK",model="colours"}': 2,
        'convoy_requests_total{call="ClassifyStream",code="NOT_FOUND",model=""}': 1,
        'convoy_requests_total{call="ServerLive",code="OK",model=""}': 1,
        'convoy_requests_total{call="ModelMetadata",code="OK",model="digits"}': 1,
    }


def test_a_name_that_a_caller_made_up_appears_nowhere(counted: Server) -> None:
    text = counted.http("/metrics")[1]
    assert "made up" not in text
    assert "stranger" not in text


def test_images_are_counted_by_outcome_and_batches_by_size(counted: Server) -> None:
    metrics = counted.metrics()
    assert metrics['convoy_images_total{model="colours",outcome="ok"}'] == 10
    assert metrics['convoy_images_total{model="colours",outcome="invalid"}'] == 5
    assert metrics['convoy_batch_size_sum{model="colours"}'] == 10
    runs = metrics['convoy_batch_size_count{model="colours"}']
    assert 1 <= runs <= 5
    assert metrics['convoy_batch_seconds_count{model="colours"}'] == runs
    assert metrics["convoy_requests_in_flight"] == 0


def test_every_stage_of_a_request_is_timed(counted: Server) -> None:
    metrics = counted.metrics()
    seconds, counts = (
        {
            stage: metrics[f'convoy_stage_seconds_{part}{{model="colours",stage="{stage}"}}']
            for stage in ("decode", "queue", "run", "whole")
        }
        for part in ("sum", "count")
    )
    assert counts == dict.fromkeys(seconds, 5)
    # One was refused; ModelMetadata is no work.
    assert metrics['convoy_stage_seconds_count{model="digits",stage="whole"}'] == 1
    assert 0 < seconds["decode"] + seconds["queue"] + seconds["run"] <= seconds["whole"] < 50


def test_latency_buckets_resolve_half_a_millisecond_to_ten_seconds(counted: Server) -> None:
    bounds = sorted(
        float(sample.labels["le"])
        for family in text_string_to_metric_families(counted.http("/metrics")[1])
        for sample in family.samples
        if sample.name == "convoy_stage_seconds_bucket"
        and sample.labels["model"] == "colours"
        and sample.labels["stage"] == "run"
    )
    assert bounds[0] <= 0.0005
    assert bounds[-2:] == [10, float("inf")]
    assert all(higher <= 2.5 * lower for lower, higher in pairwise(bounds[:-1]))


def test_models_are_described(counted: Server) -> None:
    folder = REPOSITORY / "models" / "digits" / "1"
    sha256 = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    created = datetime.fromisoformat(json.loads((folder / "manifest.json").read_bytes())["created"])
    of = f'device="cpu",model="digits",sha256="{sha256}",variant="fp32",version="1"'
    assert counted.metrics()[f"convoy_model_info{{{of}}}"] == 1
    assert counted.metrics()['convoy_model_broken_versions{model="digits"}'] == 0
    made = counted.metrics()['convoy_model_created_timestamp_seconds{model="digits"}']
    assert made == created.timestamp()


def test_both_formats_parse_and_keep_to_the_naming_rules(counted: Server) -> None:
    status, text = counted.http("/metrics")
    assert status == 200
    families = {family.name: family for family in text_string_to_metric_families(text)}
    ours = {name for name in families if name.startswith("convoy_")}
    assert len(ours) >= 9
    for name in ours:
        assert families[name].documentation.endswith("."), name
        assert families[name].type != "unknown", name
    # The strict format: counters end in _total, no series twice, buckets in order.
    openmetrics = counted.http("/metrics", Accept="application/openmetrics-text")[1]
    strict = openmetrics_families(openmetrics)  # type: ignore[no-untyped-call]
    assert {family.name for family in strict} >= ours
    assert "process_resident_memory_bytes" in families


def test_head_is_get_without_the_body(counted: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", counted.metrics_port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("HEAD", "/healthz")
        response = connection.getresponse()
        assert (response.status, response.headers["Content-Length"]) == (200, "3")
        assert response.read() == b""


def test_a_caller_who_stops_half_way_is_hung_up_on(counted: Server) -> None:
    with socket.create_connection(("127.0.0.1", counted.metrics_port), TIMEOUT_S) as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHo")
        assert connection.recv(1) == b""


def test_an_unknown_path_says_which_there_are(counted: Server) -> None:
    status, text = counted.http("/metric")
    assert status == 404
    assert "/metrics" in text


def test_receipts_of_both_services_add_up_to_the_histograms(models: Path) -> None:
    names, receipts = ("decode", "queue", "run"), []
    with Server(models=models) as server, server.ready().channel() as channel:
        classify, infer = classifier_on(channel).Classify, inference_on(channel).ModelInfer
        asked = pb.ClassifyRequest(model="colours", images=[encoded(solid("red"))] * 3)
        wanted = infer_request("colours", "image")
        wanted.parameters["timings"].bool_param = True
        raw_bytes(wanted, np.stack([solid("red")] * 20))
        calls = [(classify.future(asked), infer.future(wanted)) for _ in range(20)]
        for classified, inferred in calls:
            timings = classified.result().timings
            receipts.append([timings.decode_s, timings.queue_s, timings.run_s])
            assert sum(receipts[-1]) <= timings.total_s
            assert 3 <= timings.batch_size <= COLOURS_BATCH
            told = inferred.result().parameters
            receipts.append([told[f"{name}_s"].double_param for name in names])
            assert told["batch_size"].int64_param == COLOURS_BATCH
        server.wait_until_in_flight(0)
        metrics = server.metrics()
        del wanted.parameters["timings"]
        assert not infer(wanted).parameters, "nobody asked"
    for number, name in enumerate(names):
        total = metrics[f'convoy_stage_seconds_sum{{model="colours",stage="{name}"}}']
        assert sum(receipt[number] for receipt in receipts) == pytest.approx(total)
        assert metrics[f'convoy_stage_seconds_count{{model="colours",stage="{name}"}}'] == 40
