"""curl: the REST form of the protocol as its text has it, byte for byte."""

import json
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from tests.conformance.rows import (
    TIMEOUT_S,
    Answer,
    Array,
    Client,
    Refused,
    Request,
    Tensor,
    main,
    refused,
)

# What curl exits with when its time is up.
_TIMED_OUT = 28


def _raw(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return tensor.data.tobytes()
    return b"".join(struct.pack("<I", len(each)) + each for each in tensor.data.ravel())


def body_of(request: Request) -> tuple[dict[str, str], bytes]:
    """The headers and body of an inference request."""
    said: dict[str, Any] = {"inputs": []}
    if request.id:
        said["id"] = request.id
    parameters: dict[str, Any] = dict(request.parameters)
    if request.priority:
        parameters["priority"] = request.priority
    if request.timeout_us is not None:
        parameters["timeout"] = request.timeout_us
    rest = b""
    for tensor in request.inputs:
        each: dict[str, Any] = {
            "name": tensor.name,
            "shape": tensor.said,
            "datatype": tensor.datatype,
        }
        if tensor.region:
            each["parameters"] = {
                "shared_memory_region": tensor.region.name,
                "shared_memory_byte_size": tensor.region.size,
                "shared_memory_offset": tensor.region.offset,
            }
        elif tensor.raw:
            data = _raw(tensor)
            each["parameters"] = {"binary_data_size": len(data)}
            rest += data
        elif tensor.datatype == "BYTES":
            each["data"] = [item.decode() for item in tensor.data.ravel()]
        else:
            each["data"] = tensor.data.tolist()
        said["inputs"].append(each)
    for output in request.outputs:
        given: dict[str, Any] = {"binary_data": output.raw, **output.parameters}
        if output.classes:
            given["classification"] = output.classes
        if output.region:
            given = {
                "shared_memory_region": output.region.name,
                "shared_memory_byte_size": output.region.size,
                "shared_memory_offset": output.region.offset,
            }
        said.setdefault("outputs", []).append({"name": output.name, "parameters": given})
    if parameters:
        said["parameters"] = parameters
    head = json.dumps(said).encode()
    headers = {"Content-Type": "application/json"}
    if rest:
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(head)),
        }
    return headers, head + rest


def _read(output: Mapping[str, Any], raw: bytes) -> Array:
    shape = output["shape"]
    if "data" in output:
        if output["datatype"] == "BYTES":
            texts = np.array(output["data"], np.object_).ravel()
            return np.array([text.encode() for text in texts], np.object_).reshape(shape)
        return np.array(output["data"], np.float32).reshape(shape)
    if output["datatype"] != "BYTES":
        return np.frombuffer(raw, "<f4").reshape(shape)
    found = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return np.array(found, np.object_).reshape(shape)


class Curl(Client):
    http = True

    def __init__(self, target: Mapping[str, str]) -> None:
        self.url = f"http://{target['http']}/v2"

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> tuple[bytes, dict[str, str]]:
        """A GET, or with a body a POST: the answer's body, and its headers by lower-case names."""
        with tempfile.TemporaryDirectory() as folder:
            kept = Path(folder, "headers")
            command = ["curl", "--silent", "--show-error", "--max-time", str(timeout_s)]
            command += ["--dump-header", str(kept), self.url + path]
            for name, value in (headers or {}).items():
                command += ["--header", f"{name}: {value}"]
            if body is not None:
                # Without `Expect:`, large bodies would wait a second for a permission first.
                command += ["--data-binary", "@-", "--header", "Expect:"]
            done = subprocess.run(command, input=body or b"", capture_output=True, check=False)
            if done.returncode == _TIMED_OUT:
                raise Refused("", "the client gave up")
            assert done.returncode == 0, done.stderr.decode()
            first, *rest = kept.read_text("latin-1").strip().splitlines()
        found = dict(line.lower().split(": ", 1) for line in rest if ": " in line)
        status = first.split()[1]
        if status != "200":
            assert found["content-type"].startswith("application/json"), found
            raise Refused(status, json.loads(done.stdout).get("error", ""))
        return done.stdout, found

    def said(self, path: str, body: Any = None) -> Any:
        given = None if body is None else json.dumps(body).encode()
        answer, _ = self.ask(path, given)
        return json.loads(answer) if answer else None

    def live(self) -> bool:
        self.ask("/health/live")
        return True

    def ready(self) -> bool:
        self.ask("/health/ready")
        return True

    def model_ready(self, name: str, version: str = "") -> bool:
        try:
            self.ask(f"/models/{name}{f'/versions/{version}' if version else ''}/ready")
        except Refused:
            return False
        return True

    def server(self) -> Any:
        return self.said("")

    def model(self, name: str) -> Any:
        return self.said(f"/models/{name}")

    def config(self, name: str) -> Any:
        return self.said(f"/models/{name}/config")

    def statistics(self, name: str) -> Any:
        return self.said(f"/models/{name}/stats")["model_stats"]

    def index(self) -> Any:
        return self.said("/repository/index", {})

    def load(self, name: str, *, override: bool = False) -> None:
        more = {"parameters": {"config": "{}"}} if override else {}
        self.said(f"/repository/models/{name}/load", more)

    def unload(self, name: str) -> None:
        self.said(f"/repository/models/{name}/unload", {})

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        self.said(
            f"/systemsharedmemory/region/{name}/register",
            {"key": key, "offset": offset, "byte_size": size},
        )

    def regions(self) -> Any:
        return self.said("/systemsharedmemory/status")

    def unregister(self, name: str) -> None:
        self.said(f"/systemsharedmemory/region/{name}/unregister", {})

    def unoffered(self) -> Any:
        paths = ("/cudasharedmemory/status", "/trace/setting", "/logging")
        return [partial(self.said, path) for path in paths]

    def infer(self, request: Request) -> Answer:
        headers, body = body_of(request)
        version = f"/versions/{request.version}" if request.version else ""
        data, found = self.ask(
            f"/models/{quote(request.model)}{version}/infer",
            body,
            headers,
            timeout_s=request.deadline_s,
        )
        size = int(found.get("inference-header-content-length", len(data)))
        said, raw, outputs = json.loads(data[:size]), data[size:], {}
        # What is in shared memory the answer does not tell.
        elsewhere = {output.name for output in request.outputs if output.region}
        for output in said["outputs"]:
            given = output.get("parameters", {})
            if output["name"] in elsewhere:
                continue
            taken = given.get("binary_data_size", 0)
            outputs[output["name"]], raw = _read(output, raw[:taken]), raw[taken:]
        assert not raw, f"{len(raw)} bytes are left"
        return Answer(
            said["model_name"],
            said["model_version"],
            said.get("id", ""),
            {output["name"]: output["datatype"] for output in said["outputs"]},
            outputs,
            said.get("parameters", {}),
        )

    def cancel(self, request: Request) -> None:
        # To hang up is all that HTTP has.
        headers, body = body_of(request)
        with refused(self) as told:
            self.ask(f"/models/{request.model}/infer", body, headers, timeout_s=0.1)
        assert not told[0].status, told[0]


if __name__ == "__main__":
    main({"curl": Curl})
