"""What is counted of each version: the same numbers as Triton's statistics, and under its names."""

import subprocess
from itertools import product
from shutil import which

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from convoy_service.telemetry.counters import (
    REASONS,
    Metrics,
    Runs,
    Statistics,
    merge,
    registry,
    statistics,
    written,
)

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"

# Triton's, but for what it has and we do not: caches, summaries, memory.
FAMILIES = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
}


def busy() -> Metrics:
    """Of a process that has answered two requests of pets/3, and failed as many as there are codes."""
    metrics = Metrics()
    metrics.serving("pets", 3, "abc", "cpu", "fp32", lambda: 4)
    requests, batches = metrics.requests_to("pets", 3), metrics.batches_of("pets", 3)
    requests.succeeded(1.0, 0.25, 0.125, 0.5, 0.0625)
    requests.succeeded(2.0, 0.5, 0.25, 1.0, 0.125)
    for code in ("RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED", "INTERNAL", "NOT_FOUND"):
        requests.failed(code, 0.5)
    batches.ran(8, 0.5, 1.0, 0.25)
    batches.ran(2, 0.125, 0.5, 0.0625)
    batches.ran(8, 0.5, 1.0, 0.25)
    return metrics


def test_the_numbers_of_a_version_add_up() -> None:
    metrics = busy()
    metrics.requests_to("pets", 4)
    found = statistics(metrics.snapshot())
    assert found.keys() == {("pets", "3"), ("pets", "4")}
    of = found["pets", "3"]
    assert of[:7] == (2, 3.0, 0.75, 0.375, 1.5, 0.1875, 2.5)
    assert of.failures == {"REJECTED": 2, "CANCELED": 1, "BACKEND": 1, "OTHER": 1}
    assert of.fail == 5
    assert of.batches == {2: Runs(1, 0.125, 0.5, 0.0625), 8: Runs(2, 1.0, 2.0, 0.5)}
    assert list(of.batches) == [2, 8]
    assert (of.inferences, of.executions, of.waiting) == (18, 3, 4)
    assert of.last > 1.6e9
    assert found["pets", "4"] == Statistics(failures=dict.fromkeys(REASONS, 0))


def test_those_of_several_processes_are_added_and_the_dead_count() -> None:
    one, other, dead = (busy().snapshot() for _ in range(3))
    other["version_last_batch"] = [(("pets", "3"), 1e12)]
    dead["version_last_batch"] = [(("pets", "3"), 2e12)]
    alone = statistics(one)["pets", "3"]
    of = statistics(merge([one, other], [dead]))["pets", "3"]
    assert of[:7] == tuple(3 * number for number in alone[:7])
    assert of.failures == {reason: 3 * count for reason, count in alone.failures.items()}
    assert of.batches == {2: Runs(3, 0.375, 1.5, 0.1875), 8: Runs(6, 3.0, 6.0, 1.5)}
    assert (of.inferences, of.executions) == (54, 9)
    # What waited for the dead waits no more.
    assert (of.waiting, of.last) == (8, 2e12)


def test_a_version_that_is_unloaded_has_nobody_waiting_and_keeps_its_counts() -> None:
    metrics = busy()
    metrics.not_serving("pets", 3, "abc", "cpu", "fp32")
    of = statistics(metrics.snapshot())["pets", "3"]
    assert (of.waiting, of.success, of.executions) == (0, 2, 3)
    assert metrics.requests_to("pets", 3).success == 2, "and goes on where it was"


@pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["text", "OpenMetrics"])
def test_boards_that_were_made_for_triton_find_its_names(accept: str) -> None:
    body, kind = written(registry(busy().snapshot, triton=True), accept)
    parse = openmetrics_families if "openmetrics" in kind else text_string_to_metric_families
    families = {
        family.name: family
        for family in parse(body.decode())
        if family.name.startswith("nv_inference")
    }
    assert families.keys() == FAMILIES
    failures = families["nv_inference_request_failure"].samples
    assert {sample.labels["reason"]: sample.value for sample in failures} == {
        "REJECTED": 2,
        "CANCELED": 1,
        "BACKEND": 1,
        "OTHER": 1,
    }
    told = {}
    for name in FAMILIES - {"nv_inference_request_failure"}:
        (sample,) = families[name].samples
        # The parser of the text format, as it does with Triton's, has counters end in _total.
        assert sample.name.removesuffix("_total") == name
        assert sample.labels == {"model": "pets", "version": "3"}
        told[name.removeprefix("nv_inference_")] = sample.value
    assert told == {
        "request_success": 2,
        "count": 18,
        "exec_count": 3,
        "request_duration_us": 3_000_000,
        "queue_duration_us": 375_000,
        "compute_input_duration_us": 750_000,
        "compute_infer_duration_us": 1_500_000,
        "compute_output_duration_us": 187_500,
        "pending_request_count": 4,
    }
    # As Triton has it, where the format allows that: agents pass over what has no type.
    counter = "unknown" if "openmetrics" in kind else "counter"
    for name in FAMILIES:
        is_gauge = name == "nv_inference_pending_request_count"
        assert f"# TYPE {name} {'gauge' if is_gauge else counter}\n".encode() in body


def test_without_being_asked_for_they_are_not_there() -> None:
    for triton, accept in product([False, True], ["", OPENMETRICS]):
        body, _ = written(registry(busy().snapshot, triton=triton), accept)
        assert (b"nv_inference" in body) is triton
        assert b'convoy_requests_waiting{model="pets",version="3"} 4.0\n' in body
        assert b"version_requests" not in body


@pytest.mark.skipif(not which("promtool"), reason="promtool is not installed")
def test_prometheus_takes_them() -> None:
    body, _ = written(registry(busy().snapshot, triton=True), "")
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=body, capture_output=True, timeout=60
    )
    # It finds fault with Triton's names, not with how they are written.
    assert checked.returncode in {0, 3}, checked.stderr
