"""Node with @grpc/grpc-js, by way of node.cjs."""

import base64
import json
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.conformance.rows import (
    TIMEOUT_S,
    Answer,
    Array,
    Client,
    Refused,
    Region,
    Request,
    Tensor,
    main,
    refused,
)

_HERE = Path(__file__).resolve().parent
_PROTO = _HERE.parent.parent / "protos" / "inference.proto"
_FIELDS = {
    "BOOL": "bool_contents", "INT64": "int64_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}  # fmt: skip
# What is larger goes by a file.
_IN_LINE = 1_000_000


def _parameters(given: Mapping[str, bool | int | str]) -> dict[str, Any]:
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param"}
    return {name: {kinds[type(value)]: value} for name, value in given.items()}


def _region(region: Region) -> dict[str, Any]:
    return _parameters(
        {
            "shared_memory_region": region.name,
            "shared_memory_byte_size": region.size,
            "shared_memory_offset": region.offset,
        }
    )


class Node(Client):
    def __init__(self, target: Mapping[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            ["node", _HERE / "node.cjs", target["grpc"], _PROTO],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **asked: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "node has died"
        return json.loads(line)

    def call(
        self, method: str, request: Any = None, deadline_s: float = TIMEOUT_S, **more: Any
    ) -> Any:
        said = self.ask(
            method=method, request=request or {}, deadline_ms=round(1000 * deadline_s), **more
        )
        if "status" in said:
            raise Refused(said["status"], said["message"])
        return said["answer"]

    def live(self) -> Any:
        return self.call("ServerLive")["live"]

    def ready(self) -> Any:
        return self.call("ServerReady")["ready"]

    def model_ready(self, name: str, version: str = "") -> Any:
        # proto3's false is not on the wire.
        return self.call("ModelReady", {"name": name, "version": version}).get("ready", False)

    def server(self) -> Any:
        return {"extensions": [], **self.call("ServerMetadata")}

    def model(self, name: str) -> Any:
        return self.call("ModelMetadata", {"name": name})

    def config(self, name: str) -> Any:
        return self.call("ModelConfig", {"name": name})["config"]

    def statistics(self, name: str) -> Any:
        return self.call("ModelStatistics", {"name": name})["model_stats"]

    def index(self) -> Any:
        return self.call("RepositoryIndex")["models"]

    def load(self, name: str, *, override: bool = False) -> None:
        more = {"parameters": {"config": {"string_param": "{}"}}} if override else {}
        self.call("RepositoryModelLoad", {"model_name": name, **more})

    def unload(self, name: str) -> None:
        self.call("RepositoryModelUnload", {"model_name": name})

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        self.call(
            "SystemSharedMemoryRegister",
            {"name": name, "key": key, "offset": offset, "byte_size": size},
        )

    def regions(self) -> Any:
        return list(self.call("SystemSharedMemoryStatus").get("regions", {}).values())

    def unregister(self, name: str) -> None:
        self.call("SystemSharedMemoryUnregister", {"name": name})

    def infer(self, request: Request) -> Answer:
        return _answer_of(self.call("ModelInfer", self._message(request), request.deadline_s))

    def cancel(self, request: Request) -> None:
        with refused(self, "CANCELLED"):
            self.call("ModelInfer", self._message(request), cancel_ms=50)

    def stream(self, requests: Sequence[Request], *, grpc_error: bool = False) -> Any:
        said = self.ask(
            requests=[self._message(request) for request in requests],
            metadata={"triton_grpc_error": "true"} if grpc_error else {},
            deadline_ms=round(1000 * TIMEOUT_S),
        )
        got: list[Any] = []
        for each in said["answers"]:
            if "status" in each:
                got.append(Refused(each["status"], each["message"]))
            elif each.get("error_message"):
                got.append(Refused("", each["error_message"]))
            else:
                got.append(_answer_of(each["infer_response"]))
        return got

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.wait(TIMEOUT_S)
        self.process.stdout.close()
        self.folder.cleanup()

    def _bytes(self, data: bytes) -> dict[str, str]:
        if len(data) < _IN_LINE:
            return {"$bytes": base64.b64encode(data).decode()}
        file = Path(self.folder.name, "bytes")
        file.write_bytes(data)
        return {"$file": str(file)}

    def _message(self, request: Request) -> dict[str, Any]:
        said: dict[str, Any] = {"model_name": request.model, "model_version": request.version}
        said["id"] = request.id
        parameters: dict[str, bool | int | str] = dict(request.parameters)
        if request.priority:
            parameters["priority"] = request.priority
        if request.timeout_us is not None:
            parameters["timeout"] = request.timeout_us
        if request.final_response:
            parameters["triton_enable_empty_final_response"] = True
        said["parameters"] = _parameters(parameters)
        said["inputs"] = []
        for tensor in request.inputs:
            each: dict[str, Any] = {
                "name": tensor.name, "datatype": tensor.datatype, "shape": tensor.said,
            }  # fmt: skip
            if tensor.region:
                each["parameters"] = _region(tensor.region)
            elif tensor.raw:
                said.setdefault("raw_input_contents", []).append(self._bytes(_raw(tensor)))
            else:
                values: list[Any] = tensor.data.ravel().tolist()
                if tensor.datatype == "BYTES":
                    values = [self._bytes(value) for value in values]
                each["contents"] = {_FIELDS[tensor.datatype]: values}
            said["inputs"].append(each)
        said["outputs"] = []
        for output in request.outputs:
            given = _parameters(output.parameters)
            if output.classes:
                given |= _parameters({"classification": output.classes})
            if output.region:
                given |= _region(output.region)
            said["outputs"].append({"name": output.name, "parameters": given})
        return said


def _raw(tensor: Tensor) -> bytes:
    if tensor.datatype != "BYTES":
        return tensor.data.tobytes()
    return b"".join(struct.pack("<I", len(each)) + each for each in tensor.data.ravel())


def _buffer(said: Any) -> bytes:
    return bytes(said["data"])


def _split(raw: bytes) -> list[bytes]:
    found = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        found.append(raw[4 : 4 + size])
        raw = raw[4 + size :]
    return found


def _answer_of(said: Any) -> Answer:
    raw = [_buffer(each) for each in said.get("raw_output_contents", [])]
    outputs: dict[str, Array] = {}
    for number, output in enumerate(said["outputs"]):
        if "shared_memory_region" in output.get("parameters", {}):
            continue
        shape = [int(each) for each in output["shape"]]
        contents = output.get("contents") or {}
        if output["datatype"] == "BYTES":
            items = (
                _split(raw[number])
                if raw
                else [_buffer(each) for each in contents.get("bytes_contents", [])]
            )
            outputs[output["name"]] = np.array(items, np.object_).reshape(shape)
        elif raw:
            outputs[output["name"]] = np.frombuffer(raw[number], "<f4").reshape(shape)
        else:
            outputs[output["name"]] = np.array(contents["fp32_contents"], np.float32).reshape(shape)
    return Answer(
        said["model_name"],
        said["model_version"],
        said.get("id", ""),
        {output["name"]: output["datatype"] for output in said["outputs"]},
        outputs,
        {name: each.get("bool_param") for name, each in said.get("parameters", {}).items()},
    )


if __name__ == "__main__":
    main({"Node": Node})
