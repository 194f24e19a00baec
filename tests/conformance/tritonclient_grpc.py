"""tritonclient over gRPC: blocking, with callbacks, with asyncio, and over a stream."""

import asyncio
import queue
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc as triton  # type: ignore[import-not-found, unused-ignore]
import tritonclient.grpc.aio as triton_aio  # type: ignore[import-not-found, unused-ignore]

from tests.conformance.rows import (
    TIMEOUT_S,
    Answer,
    Client,
    NotApplicable,
    Refused,
    Request,
    main,
    refused,
)


def inputs_of(request: Request) -> list[Any]:
    made = []
    for tensor in request.inputs:
        if not tensor.raw:
            raise NotApplicable("it sends raw contents alone")
        each = triton.InferInput(tensor.name, list(tensor.data.shape), tensor.datatype)
        if tensor.region:
            each.set_shared_memory(*tensor.region)
        else:
            each.set_data_from_numpy(tensor.data)
        made.append(each.set_shape(tensor.said))
    return made


def arguments(request: Request) -> dict[str, Any]:
    outputs = []
    for output in request.outputs:
        if output.parameters:
            raise NotApplicable("it sets an output's parameters itself")
        outputs.append(triton.InferRequestedOutput(output.name, class_count=output.classes))
        if output.region:
            outputs[-1].set_shared_memory(*output.region)
    return {
        "model_name": request.model,
        "inputs": inputs_of(request),
        "model_version": request.version,
        "outputs": outputs or None,
        "request_id": request.id,
        "priority": request.priority,
        "timeout": request.timeout_us,
        "parameters": dict(request.parameters) or None,
    }


def answer_of(result: Any) -> Answer:
    said = result.get_response()
    return Answer(
        said.model_name,
        said.model_version,
        said.id,
        {output.name: output.datatype for output in said.outputs},
        {
            output.name: result.as_numpy(output.name)
            for output in said.outputs
            if "shared_memory_region" not in output.parameters
        },
        {name: each.bool_param for name, each in said.parameters.items()},
    )


def refusal_of(error: Any) -> Refused:
    return Refused(error.status() or "", error.message())


class Sync(Client):
    """`InferenceServerClient`."""

    def __init__(self, target: Mapping[str, str]) -> None:
        self.target = target["grpc"]
        self.client = self.connect()

    def connect(self) -> Any:
        return triton.InferenceServerClient(self.target)

    def wait(self, value: Any) -> Any:
        return value

    def call(self, name: str, *given: Any, **named: Any) -> Any:
        named.setdefault("client_timeout", TIMEOUT_S)
        try:
            return self.wait(getattr(self.client, name)(*given, **named))
        except triton.InferenceServerException as error:
            raise refusal_of(error) from None

    def live(self) -> bool:
        return bool(self.call("is_server_live"))

    def ready(self) -> bool:
        return bool(self.call("is_server_ready"))

    def model_ready(self, name: str, version: str = "") -> bool:
        return bool(self.call("is_model_ready", name, version))

    def server(self) -> Any:
        return self.call("get_server_metadata", as_json=True)

    def model(self, name: str) -> Any:
        return self.call("get_model_metadata", name, as_json=True)

    def config(self, name: str) -> Any:
        return self.call("get_model_config", name, as_json=True)["config"]

    def statistics(self, name: str) -> Any:
        return self.call("get_inference_statistics", name, as_json=True)["model_stats"]

    def index(self) -> Any:
        return self.call("get_model_repository_index", as_json=True)["models"]

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
        said = self.call("get_system_shared_memory_status", as_json=True)
        return list(said.get("regions", {}).values())

    def unregister(self, name: str) -> None:
        self.call("unregister_system_shared_memory", name)

    def unoffered(self) -> Any:
        calls = ("get_cuda_shared_memory_status", "get_trace_settings", "get_log_settings")
        return [partial(self.call, name) for name in calls]

    def infer(self, request: Request) -> Answer:
        return answer_of(
            self.call("infer", **arguments(request), client_timeout=request.deadline_s)
        )

    def cancel(self, request: Request) -> None:
        raise NotApplicable("a call that blocks can't be cancelled")

    def stream(self, requests: Sequence[Request], *, grpc_error: bool = False) -> Any:
        raise NotApplicable("its streams have a column of their own")

    def beside_convoy(self, file: bytes) -> tuple[list[float], list[float]]:
        tensor = triton.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([file], np.object_))
        theirs = self.call("infer", "colours", [tensor]).as_numpy("scores")[0].tolist()
        return theirs, convoy(self.target, file)

    def close(self) -> None:
        self.client.close()


def convoy(target: str, file: bytes) -> list[float]:
    """What Convoy's client, in this process, gets."""
    from convoy import Classifier

    with Classifier(target, model="colours") as classifier:
        labels = classifier.classify(file, top_k=3).labels
    return [label.probability for label in sorted(labels, key=lambda label: label.index)]


class Async(Client):
    """`async_infer`, whose answers come to a callback."""

    lacks = "that call has no other form than the first column's"
    # What inference in a form of its own is to be told of.
    wait, call, statistics = Sync.wait, Sync.call, Sync.statistics
    register, regions, unregister = Sync.register, Sync.regions, Sync.unregister
    stream = Sync.stream

    def __init__(self, target: Mapping[str, str]) -> None:
        self.client = triton.InferenceServerClient(target["grpc"])

    def beside_convoy(self, file: bytes) -> tuple[list[float], list[float]]:
        raise NotApplicable(self.lacks)

    def _begin(self, request: Request) -> tuple[Any, "queue.SimpleQueue[Any]"]:
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        context = self.client.async_infer(
            **arguments(request),
            callback=lambda result, error: finished.put((result, error)),
            client_timeout=request.deadline_s,
        )
        return context, finished

    def infer(self, request: Request) -> Answer:
        return _finish(self._begin(request)[1])

    def cancel(self, request: Request) -> None:
        context, finished = self._begin(request)
        context.cancel()
        with refused(self, "CANCELLED"):
            _finish(finished)

    def close(self) -> None:
        self.client.close()


def _finish(finished: "queue.SimpleQueue[Any]") -> Answer:
    result, error = finished.get(timeout=2 * TIMEOUT_S)
    if error is not None:
        raise refusal_of(error)
    return answer_of(result)


class Aio(Sync):
    """`tritonclient.grpc.aio`."""

    def connect(self) -> Any:
        self.loop = asyncio.new_event_loop()

        async def made() -> Any:
            return triton_aio.InferenceServerClient(self.target)

        return self.loop.run_until_complete(made())

    def wait(self, value: Any) -> Any:
        return self.loop.run_until_complete(value)

    def cancel(self, request: Request) -> None:
        async def run() -> None:
            task = asyncio.create_task(self.client.infer(**arguments(request)))
            # The loop's next turns begin the call, and leave it waiting.
            for _ in range(10):
                await asyncio.sleep(0)
            task.cancel()
            with refused(self, "CANCELLED"):
                try:
                    await task
                except asyncio.CancelledError:
                    raise Refused("CANCELLED", "the task was") from None
                except triton.InferenceServerException as error:
                    raise refusal_of(error) from None

        self.loop.run_until_complete(run())

    def stream(self, requests: Sequence[Request], *, grpc_error: bool = False) -> Any:
        async def run() -> list[Any]:
            got: list[Any] = []
            going = asyncio.Event()

            async def asked() -> Any:
                for request in requests:
                    given = arguments(request)
                    if request.final_response:
                        raise NotApplicable("it does not send that")
                    yield given
                # The stream stays open until all is answered, as a user's would.
                await going.wait()

            answers = self.client.stream_infer(
                asked(),
                stream_timeout=TIMEOUT_S,
                headers={"triton_grpc_error": "true"} if grpc_error else None,
            )
            try:
                async for result, error in answers:
                    got.append(refusal_of(error) if error else answer_of(result))
                    if len(got) == len(requests):
                        going.set()
            except triton.InferenceServerException as error:
                got.append(refusal_of(error))
            except Exception as error:
                # The iterator hands on grpcio's own.
                got.append(Refused(str(error.code()), error.details()))  # type: ignore[attr-defined]
            return got

        if any(request.final_response for request in requests):
            raise NotApplicable("it has no way to ask for that")
        return self.loop.run_until_complete(run())

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


class Stream(Client):
    """`start_stream` and `async_stream_infer`."""

    lacks = Async.lacks
    wait, call, statistics = Sync.wait, Sync.call, Sync.statistics
    register, regions, unregister = Sync.register, Sync.regions, Sync.unregister
    beside_convoy = Async.beside_convoy

    def __init__(self, target: Mapping[str, str]) -> None:
        self.client = triton.InferenceServerClient(target["grpc"])

    def stream(
        self,
        requests: Sequence[Request],
        *,
        grpc_error: bool = False,
        deadline_s: float = TIMEOUT_S,
    ) -> Any:
        given = [arguments(request) for request in requests]
        got: list[Any] = []
        done = threading.Event()

        def take(result: Any, error: Any) -> None:
            got.append(refusal_of(error) if error else answer_of(result))
            # A status is the stream's last word.
            if len(got) == len(requests) or (error and error.status()):
                done.set()

        self.client.start_stream(
            take,
            stream_timeout=deadline_s,
            headers={"triton_grpc_error": "true"} if grpc_error else None,
        )
        try:
            for each, request in zip(given, requests, strict=True):
                self.client.async_stream_infer(
                    **each, enable_empty_final_response=request.final_response
                )
            assert done.wait(2 * TIMEOUT_S), f"{len(got)} of {len(requests)} answers came"
        finally:
            self.client.stop_stream(cancel_requests=not done.is_set())
        return got

    def infer(self, request: Request) -> Answer:
        (answer,) = self.stream([request], deadline_s=request.deadline_s)
        if isinstance(answer, Refused):
            raise answer
        assert isinstance(answer, Answer)
        return answer

    def cancel(self, request: Request) -> None:
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.client.start_stream(lambda result, error: finished.put((result, error)))
        self.client.async_stream_infer(**arguments(request))
        self.client.stop_stream(cancel_requests=True)
        with refused(self, "CANCELLED"):
            _finish(finished)

    def close(self) -> None:
        self.client.close()


if __name__ == "__main__":
    main(
        {
            "tritonclient gRPC": Sync,
            "tritonclient gRPC async": Async,
            "tritonclient gRPC aio": Aio,
            "tritonclient gRPC stream": Stream,
        }
    )
