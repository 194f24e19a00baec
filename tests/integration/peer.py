"""What tritonclient makes of a server, as JSON. Runs in an environment of its own: its generated
code and ours define the same protobuf names, so that one process can't have both.
"""

import asyncio
import json
import os
import queue
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found, unused-ignore]
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-not-found, unused-ignore]
import tritonclient.utils.shared_memory as shm  # type: ignore[import-not-found, unused-ignore]
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

        extensions = client.get_server_metadata().extensions
        seen: dict[str, Any] = {"extensions": "model_repository" in extensions}
        client.unload_model("digits", unload_dependents=True)
        seen["unloaded"] = [index(), client.is_model_ready("digits")]
        client.load_model("digits")
        seen["loaded"] = [index(), client.is_model_ready("digits")]
        try:
            client.load_model("digits", config="{}", files={"file:1/model.onnx": b"a model"})
        except triton.InferenceServerException as error:
            seen["overridden"] = error.status()
        return seen


def shared(target: str, folder: Path) -> dict[str, Any]:
    """The images of `folder` in shared memory, and their answers; and what is asked about it."""
    pixels = np.load(folder / "pixels.npy")
    there, back = f"convoy-there-{os.getpid()}", f"/convoy-back-{os.getpid()}"
    classes = 4 * 10 * len(pixels)
    source = shm.create_shared_memory_region("there", there, 64 + pixels.nbytes)
    sink = shm.create_shared_memory_region("back", back, classes)
    tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    tensor.set_shared_memory("there", pixels.nbytes, offset=64)
    output = triton.InferRequestedOutput("probabilities")
    output.set_shared_memory("back", classes)
    try:
        with triton.InferenceServerClient(target) as client:
            # So they begin.
            client.unregister_system_shared_memory()
            client.unregister_cuda_shared_memory()
            shm.set_shared_memory_region(source, [pixels], offset=64)
            client.register_system_shared_memory("there", there, 64 + pixels.nbytes)
            client.register_system_shared_memory("back", back, classes)
            status = client.get_system_shared_memory_status(as_json=True)
            answer = client.infer("digits", [tensor], outputs=[output])
            told = answer.get_output("probabilities")
            filled = shm.get_contents_as_numpy(sink, np.float32, list(told.shape)).tolist()
            by_value = rows(client.infer("digits", [tensor]))
            client.unregister_system_shared_memory("there")
            try:
                client.infer("digits", [tensor])
            except triton.InferenceServerException as error:
                refusal = error.status()
            client.unregister_system_shared_memory()
            return {
                "regions": sorted(status["regions"]),
                "shared": filled,
                "by_value": by_value,
                "refusal": refusal,
                "left": len(client.get_system_shared_memory_status().regions),
            }
    finally:
        shm.destroy_shared_memory_region(source)
        shm.destroy_shared_memory_region(sink)


def stream(target: str, folder: Path) -> dict[str, Any]:
    """Each image of `folder` in a message of one stream, between them one that is wrong; and the same
    by which an error ends the stream.
    """
    pixels = np.load(folder / "pixels.npy")
    finished: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()

    def send(client: Any, name: str, number: int) -> None:
        tensor = triton.InferInput("pixels", [1, *pixels.shape[1:]], "UINT8")
        tensor.set_data_from_numpy(pixels[number : number + 1])
        output = triton.InferRequestedOutput("probabilities", class_count=3)
        client.async_stream_infer(
            name, [tensor], outputs=[output], request_id=str(number),
            enable_empty_final_response=True,
        )  # fmt: skip

    with triton.InferenceServerClient(target) as client:
        client.start_stream(lambda result, error: finished.put((result, error)))
        for number in range(len(pixels)):
            send(client, "digits" if number != 1 else "nobody's", number)
        results = [finished.get(timeout=30) for _ in pixels]
        client.stop_stream()
        seen: dict[str, Any] = {
            "errors": [error and error.message() for _, error in results],
            "ids": [result.get_response().id for result, _ in results if result],
            "final": [
                result.get_response().parameters["triton_final_response"].bool_param
                for result, _ in results
                if result
            ],
            "classes": [
                [text.decode() for text in result.as_numpy("probabilities")[0]]
                for result, _ in results
                if result
            ],
        }
        client.start_stream(
            lambda result, error: finished.put((result, error)),
            headers={"triton_grpc_error": "true"},
        )
        send(client, "digits", 0)
        send(client, "nobody's", 1)
        (first, _), (_, error) = finished.get(timeout=30), finished.get(timeout=30)
        client.stop_stream()
        return {**seen, "strict": [first.get_response().id, error.status()]}


def served_config(target: str, path: Path) -> list[list[Any]]:
    """What ModelConfig says, beside the config.pbtxt of the model."""
    with triton.InferenceServerClient(target) as client:
        told = client.get_model_config("digits").config
    written = text_format.Parse(path.read_text(), ModelConfig())
    return [
        [
            each.name, each.platform, each.max_batch_size, each.WhichOneof("scheduling_choice"),
            *([end.name, end.data_type, list(end.dims)] for end in (*each.input, *each.output)),
            each.output[0].label_filename,
        ]
        for each in (told, written)
    ]  # fmt: skip


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
        "shared": shared,
        "stream": stream,
        "served_config": served_config,
    }[sys.argv[1]]
    json.dump(what(sys.argv[2], Path(sys.argv[3])), sys.stdout)
