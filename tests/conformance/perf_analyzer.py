"""perf_analyzer, NVIDIA's load generator: a run in each of its ways, by what the server counted."""

import csv
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conformance.rows import FAILED, NOT_APPLICABLE, PASSED, TIMEOUT_S

_NOT_ASKED = "it does not ask for that"
_RUN = [
    "-m", "colours", "-b", "2", "--concurrency-range", "6",
    # One window of two seconds, however steady it was; it looks at three, and takes what it has.
    "--measurement-interval", "2000", "--stability-percentage", "999", "--max-trials", "3",
]  # fmt: skip
# The options of each column, the server that it needs, and what it asks for inference with.
COLUMNS: dict[str, tuple[list[str], str, str]] = {
    "perf_analyzer gRPC": (["-i", "grpc", "--sync"], "closed", "ModelInfer"),
    "perf_analyzer gRPC async": (["-i", "grpc", "--async"], "closed", "ModelInfer"),
    "perf_analyzer gRPC stream": (
        ["-i", "grpc", "--async", "--streaming"],
        "closed",
        "ModelStreamInfer",
    ),
    "perf_analyzer gRPC shared memory": (
        ["-i", "grpc", "--async", "--shared-memory", "system", "--output-shared-memory-size", "64"],
        "opened",
        "ModelInfer",
    ),
    "perf_analyzer HTTP": (["-i", "http", "--sync"], "closed", "ModelInfer"),
    "perf_analyzer HTTP async": (["-i", "http", "--async"], "closed", "ModelInfer"),
    "perf_analyzer HTTP JSON": (
        ["-i", "http", "--sync", "--input-tensor-format", "json", "--output-tensor-format", "json"],
        "closed",
        "ModelInfer",
    ),
    "perf_analyzer HTTP shared memory": (
        ["-i", "http", "--sync", "--shared-memory", "system", "--output-shared-memory-size", "64"],
        "opened",
        "ModelInfer",
    ),
}


def counted(metrics: str) -> dict[tuple[str, str], float]:
    """How many calls the server has answered, by the call and its status."""
    with urllib.request.urlopen(metrics, timeout=TIMEOUT_S) as page:
        text = page.read().decode()
    found: dict[tuple[str, str], float] = {}
    for line in re.finditer(r"^convoy_requests_total\{(.*)\} (\S+)$", text, re.MULTILINE):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line[1]))
        key = labels["call"], labels["code"]
        found[key] = found.get(key, 0) + float(line[2])
    return found


def run(program: str, column: str, place: Mapping[str, Any]) -> dict[str, list[str]]:
    options, needs, infers = COLUMNS[column]
    server = place[needs]
    before = counted(server["metrics"])
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.csv")
        url = server["grpc" if "grpc" in options else "http"]
        done = subprocess.run(
            [program, *_RUN, *options, "-u", url, "-f", report],
            capture_output=True,
            check=False,
            env={**os.environ, "TRITON_CLIENT_GRPC_CHANNEL_MAX_SHARE_COUNT": "1"},
            text=True,
            timeout=5 * TIMEOUT_S,
        )
        told = done.stdout + done.stderr
        rows = list(csv.DictReader(report.open())) if report.exists() else []
    grown = {
        key: value - before.get(key, 0.0)
        for key, value in counted(server["metrics"]).items()
        if value != before.get(key)
    }
    sys.stderr.write(f"{column}: exit status {done.returncode}\n{told}\n{grown}\n{rows}\n")
    answered = grown.get((infers, "OK"), 0)
    failures = {key: value for key, value in grown.items() if key[1] not in {"OK", "CANCELLED"}}

    def outcome(*calls: str) -> list[str]:
        if done.returncode:
            return [FAILED, " ".join(told.split())[-300:]]
        if failures:
            return [FAILED, f"the server refused: {failures}"]
        missing = [call for call in calls if not grown.get((call, "OK"))]
        return [FAILED, f"never asked for {missing}: {grown}"] if missing else [PASSED, ""]

    def load() -> list[str]:
        seen = outcome(infers)
        if seen[0] == PASSED and not (rows and float(rows[0]["Inferences/Second"]) > 0):
            return [FAILED, f"it measured nothing: {rows}"]
        return seen

    def statistics() -> list[str]:
        seen = outcome("ModelStatistics")
        if seen[0] == PASSED and not float(rows[0].get("Server Compute Infer") or 0) > 0:
            return [FAILED, f"it has no times of the server: {rows}"]
        return seen

    cells = {
        "server_metadata": outcome("ServerMetadata"),
        "model_metadata": outcome("ModelMetadata"),
        "configuration": outcome("ModelConfig"),
        "statistics": statistics(),
        "load_test": load(),
    }
    if infers == "ModelStreamInfer":
        # A stream is one call, with however many requests.
        cells["stream"] = outcome(infers)
    elif needs == "opened":
        cells["shared"] = outcome("SystemSharedMemoryRegister", infers)
    else:
        cells["uint8_typed" if "json" in options else "uint8_raw"] = outcome(infers)
        if answered < 6:
            cells["load_test"] = [FAILED, f"only {answered} requests came"]
    return {name: cells.get(name, [NOT_APPLICABLE, _NOT_ASKED]) for name in place["rows"]}


if __name__ == "__main__":
    given = json.load(sys.stdin)
    seen = {name: run(sys.argv[1], name, given) for name in COLUMNS if name in given["columns"]}
    json.dump(seen, sys.stdout)
