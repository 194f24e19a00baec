"""What tritonclient makes of a server, as JSON. Runs in an environment of its own: its generated
code and ours define the same protobuf names, so that one process can't have both.
"""

import asyncio
import json
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found, unused-ignore]
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-not-found, unused-ignore]
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import (  # type: ignore[import-not-found, unused-ignore]
    DataType,
    ModelConfig,
)


def tensors(pixels: Any, files: list[bytes]) -> dict[str, Any]:
    """The same images as pixels and as files."""
    as_pixels = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    as_pixels.set_data_from_numpy(pixels)
    as_files = triton.InferInput("pixels", [len(files)], "BYTES")
    as_files.set_data_from_numpy(np.array(files, np.object_))
    return {"UINT8": as_pixels, "BYTES": as_files}


def calls(target: str, folder: Path) -> dict[str, Any]:
    """Every method whose call the server has, on the images of `folder`."""
    pixels = np.load(folder / "pixels.npy")
    files = [file.read_bytes() for file in sorted(folder.glob("*.png"))]
    inputs = tensors(pixels, files)
    output = triton.InferRequestedOutput("probabilities")
    with triton.InferenceServerClient(target) as client:
        answers = {kind: client.infer("digits", [each]) for kind, each in inputs.items()}
        named = client.infer(
            "digits", [inputs["UINT8"]], model_version="1", outputs=[output], request_id="42",
            priority=1, timeout=5_000_000, client_timeout=10, parameters={"mine": "yes"},
        )  # fmt: skip
        try:
            client.infer("nobody's", [inputs["UINT8"]])
        except triton.InferenceServerException as error:
            refusal = {"status": error.status(), "message": error.message()}
        return {
            "live": client.is_server_live(),
            "ready": client.is_server_ready(),
            "model_ready": client.is_model_ready("digits"),
            "version_ready": client.is_model_ready("digits", "1"),
            "server": client.get_server_metadata(as_json=True),
            "model": client.get_model_metadata("digits", as_json=True),
            "probabilities": {
                **{kind: rows(answer) for kind, answer in answers.items()},
                "named": rows(named),
                "async": asynchronous(client, inputs["UINT8"]),
                "aio": asyncio.run(with_asyncio(target, inputs["UINT8"])),
            },
            "id": named.get_response().id,
            "refusal": refusal,
        }


def rows(answer: Any) -> Any:
    return answer.as_numpy("probabilities").tolist()


def asynchronous(client: Any, tensor: Any) -> Any:
    finished: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    client.async_infer("digits", [tensor], lambda result, error: finished.put((result, error)))
    result, error = finished.get(timeout=10)
    assert error is None, error
    return rows(result)


async def with_asyncio(target: str, tensor: Any) -> Any:
    async with triton_aio.InferenceServerClient(target) as client:
        assert await client.is_server_ready()
        assert await client.is_model_ready("digits")
        await client.get_server_metadata()
        await client.get_model_metadata("digits")
        return rows(await client.infer("digits", [tensor]))


def beside_convoy(target: str, folder: Path) -> dict[str, Any]:
    """tritonclient and Convoy's client in one process."""
    from convoy import Classifier

    file = folder / "0.png"
    tensor = tensors(np.zeros((1, 8, 8, 1), np.uint8), [file.read_bytes()])["BYTES"]
    with triton.InferenceServerClient(target) as client, Classifier(target) as classifier:
        prediction = classifier.classify(file, top_k=10)
        labels = sorted(prediction.labels, key=lambda label: label.index)
        return {
            "triton": rows(client.infer("digits", [tensor]))[0],
            "convoy": [label.probability for label in labels],
        }


def control(target: str, _: Path) -> dict[str, Any]:
    """The model repository's calls, on a server that takes orders."""
    with triton.InferenceServerClient(target) as client:

        def index() -> list[list[str]]:
            models = client.get_model_repository_index().models
            return [[each.name, each.version, each.state] for each in models]

        seen: dict[str, Any] = {"extensions": list(client.get_server_metadata().extensions)}
        client.unload_model("digits", unload_dependents=True)
        seen["unloaded"] = [index(), client.is_model_ready("digits")]
        client.load_model("digits")
        seen["loaded"] = [index(), client.is_model_ready("digits")]
        try:
            client.load_model("digits", config="{}", files={"file:1/model.onnx": b"a model"})
        except triton.InferenceServerException as error:
            seen["overridden"] = error.status()
        return seen


def config(path: str, _: Path) -> dict[str, Any]:
    """A config.pbtxt as Triton reads it."""
    parsed = text_format.Parse(Path(path).read_text(), ModelConfig())
    ends = (*parsed.input, *parsed.output)
    return {
        "name": parsed.name,
        "platform": parsed.platform,
        "max_batch_size": parsed.max_batch_size,
        "tensors": [[each.name, DataType.Name(each.data_type), list(each.dims)] for each in ends],
        "label_filename": parsed.output[0].label_filename,
        "dynamic_batching": parsed.HasField("dynamic_batching"),
    }


if __name__ == "__main__":
    what = {
        "calls": calls,
        "beside_convoy": beside_convoy,
        "control": control,
        "config": config,
    }[sys.argv[1]]
    json.dump(what(sys.argv[2], Path(sys.argv[3])), sys.stdout)
