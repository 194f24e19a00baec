"""tritonclient over HTTP: blocking, and with asyncio."""

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import tritonclient.http as triton  # type: ignore[import-not-found, unused-ignore]
import tritonclient.http.aio as triton_aio  # type: ignore[import-not-found, unused-ignore]

from tests.conformance.rows import TIMEOUT_S, Answer, Client, NotApplicable, Refused, Request, main


def arguments(request: Request) -> dict[str, Any]:
    inputs, outputs = [], []
    for tensor in request.inputs:
        each = triton.InferInput(tensor.name, list(tensor.data.shape), tensor.datatype)
        if tensor.region:
            each.set_shared_memory(*tensor.region)
        elif tensor.datatype == "FP16" and not tensor.raw:
            raise NotApplicable("JSON has no FP16")
        else:
            each.set_data_from_numpy(tensor.data, binary_data=tensor.raw)
        inputs.append(each.set_shape(tensor.said))
    for output in request.outputs:
        if output.parameters:
            raise NotApplicable("it sets an output's parameters itself")
        outputs.append(
            triton.InferRequestedOutput(
                output.name, binary_data=output.raw, class_count=output.classes
            )
        )
        if output.region:
            outputs[-1].set_shared_memory(*output.region)
    return {
        "model_name": request.model,
        "inputs": inputs,
        "model_version": request.version,
        "outputs": outputs or None,
        "request_id": request.id,
        "priority": request.priority,
        "timeout": request.timeout_us,
        "parameters": dict(request.parameters) or None,
    }


def answer_of(result: Any, request: Request) -> Answer:
    said = result.get_response()
    outputs = {}
    # What is in shared memory the answer does not tell.
    elsewhere = {output.name for output in request.outputs if output.region}
    for output in said["outputs"]:
        if output["name"] not in elsewhere:
            got = result.as_numpy(output["name"])
            if output["datatype"] == "BYTES":
                got = np.array(
                    [each if isinstance(each, bytes) else str(each).encode() for each in got.flat],
                    np.object_,
                ).reshape(got.shape)
            outputs[output["name"]] = got
    return Answer(
        said["model_name"],
        said.get("model_version", ""),
        said.get("id", ""),
        {output["name"]: output["datatype"] for output in said["outputs"]},
        outputs,
        said.get("parameters", {}),
    )


class Sync(Client):
    """`InferenceServerClient`."""

    http = True

    def __init__(self, target: Mapping[str, str]) -> None:
        self.target, self.grpc = target["http"], target["grpc"]
        self.client = self.connect(TIMEOUT_S)

    def connect(self, timeout_s: float) -> Any:
        return triton.InferenceServerClient(self.target, network_timeout=timeout_s)

    def wait(self, value: Any) -> Any:
        return value

    def call(self, name: str, *given: Any, **named: Any) -> Any:
        try:
            return self.wait(getattr(self.client, name)(*given, **named))
        except triton.InferenceServerException as error:
            raise Refused(error.status() or "", error.message()) from None

    def live(self) -> bool:
        return bool(self.call("is_server_live"))

    def ready(self) -> bool:
        return bool(self.call("is_server_ready"))

    def model_ready(self, name: str, version: str = "") -> bool:
        return bool(self.call("is_model_ready", name, version))

    def server(self) -> Any:
        return self.call("get_server_metadata")

    def model(self, name: str) -> Any:
        return self.call("get_model_metadata", name)

    def config(self, name: str) -> Any:
        return self.call("get_model_config", name)

    def statistics(self, name: str) -> Any:
        return self.call("get_inference_statistics", name)["model_stats"]

    def index(self) -> Any:
        return self.call("get_model_repository_index")

    def load(self, name: str, *, override: bool = False) -> None:
        more: dict[str, Any] = {}
        if override:
            more = {"config": "{}", "files": {"file:1/model.onnx": b"a model"}}
        self.call("load_model", name, **more)

    def unload(self, name: str) -> None:
        self.call("unload_model", name)

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        self.call("register_system_shared_memory", name, key, size, offset=offset)

    def regions(self) -> Any:
        return self.call("get_system_shared_memory_status")

    def unregister(self, name: str) -> None:
        self.call("unregister_system_shared_memory", name)

    def unoffered(self) -> Any:
        calls = ("get_cuda_shared_memory_status", "get_trace_settings", "get_log_settings")
        return [partial(self.call, name) for name in calls]

    def infer(self, request: Request) -> Answer:
        given = arguments(request)
        if request.deadline_s == TIMEOUT_S:
            return answer_of(self.call("infer", **given), request)
        # The bound is the connection's.
        impatient = self.connect(request.deadline_s)
        try:
            return answer_of(impatient.infer(**given), request)
        except triton.InferenceServerException as error:
            raise Refused(error.status() or "", error.message()) from None
        except TimeoutError as error:
            raise Refused("", f"the client gave up: {error}") from None
        finally:
            impatient.close()

    def cancel(self, request: Request) -> None:
        raise NotApplicable("a call that blocks can't be cancelled")

    def beside_convoy(self, file: bytes) -> tuple[list[float], list[float]]:
        from convoy import Classifier

        tensor = triton.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([file], np.object_))
        theirs = self.call("infer", "colours", [tensor]).as_numpy("scores")[0].tolist()
        with Classifier(self.grpc, model="colours") as classifier:
            labels = classifier.classify(file, top_k=3).labels
        ours = [each.probability for each in sorted(labels, key=lambda label: label.index)]
        return theirs, ours

    def close(self) -> None:
        self.client.close()


class Aio(Sync):
    """`tritonclient.http.aio`."""

    def connect(self, timeout_s: float) -> Any:
        self.loop = asyncio.new_event_loop()

        async def made() -> Any:
            return triton_aio.InferenceServerClient(self.target, conn_timeout=timeout_s)

        return self.loop.run_until_complete(made())

    def wait(self, value: Any) -> Any:
        return self.loop.run_until_complete(value)

    def infer(self, request: Request) -> Answer:
        async def run() -> Any:
            return await asyncio.wait_for(
                self.client.infer(**arguments(request)), request.deadline_s
            )

        try:
            return answer_of(self.wait(run()), request)
        except triton.InferenceServerException as error:
            raise Refused(error.status() or "", error.message()) from None
        except TimeoutError:
            raise Refused("", "the client gave up") from None

    def cancel(self, request: Request) -> None:
        async def run() -> None:
            task = asyncio.create_task(self.client.infer(**arguments(request)))
            # Until the request is under way, which takes some of the loop's turns.
            await asyncio.sleep(0.05)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                return
            raise AssertionError("it was answered")

        self.wait(run())

    def close(self) -> None:
        self.wait(self.client.close())
        self.loop.close()


if __name__ == "__main__":
    main({"tritonclient HTTP": Sync, "tritonclient HTTP aio": Aio})
