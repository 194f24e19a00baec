"""KServe's clients: InferenceGRPCClient and InferenceRESTClient, which know asyncio alone."""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any

import grpc
import httpx  # type: ignore[import-not-found, unused-ignore]
import numpy as np
from kserve import (  # type: ignore[import-not-found, unused-ignore]
    InferenceGRPCClient,
    InferenceRESTClient,
    InferInput,
    InferRequest,
    RESTConfig,
)
from kserve.protocol.grpc import (  # type: ignore[import-not-found, unused-ignore]
    grpc_predict_v2_pb2 as pb,
)
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (  # type: ignore[import-not-found, unused-ignore]
    GRPCInferenceServiceStub,
)
from kserve.protocol.infer_type import (  # type: ignore[import-not-found, unused-ignore]
    RequestedOutput,
)

from tests.conformance.rows import (
    TIMEOUT_S,
    Answer,
    Client,
    NotApplicable,
    Refused,
    Request,
    main,
)


def made_of(request: Request, *, http: bool) -> Any:
    inputs, outputs = [], []
    for tensor in request.inputs:
        each = InferInput(tensor.name, list(tensor.data.shape), tensor.datatype)
        if tensor.region:
            raise NotApplicable("it has no shared memory")
        if tensor.raw:
            each.set_data_from_numpy(tensor.data, binary_data=True)
        elif tensor.datatype == "BYTES" and http:
            each.data = [item.decode() for item in tensor.data.ravel()]
        else:
            each.data = tensor.data.ravel().tolist()
        each.shape = tensor.said
        inputs.append(each)
    for output in request.outputs:
        given: dict[str, Any] = dict(output.parameters)
        if output.region:
            raise NotApplicable("it has no shared memory")
        if output.classes:
            given["classification"] = output.classes
        if http:
            given["binary_data"] = output.raw
        outputs.append(RequestedOutput(output.name, given))
    said: dict[str, Any] = dict(request.parameters)
    if request.priority:
        said["priority"] = request.priority
    if request.timeout_us is not None:
        said["timeout"] = request.timeout_us
    if http and request.version:
        raise NotApplicable("its REST client names no version")
    return InferRequest(
        request.model,
        inputs,
        request_id=request.id or None,
        parameters=said,
        model_version=request.version or None,
        request_outputs=outputs or None,
    )


def answer_of(said: Any) -> Answer:
    outputs = {}
    for output in said.outputs:
        got = output.as_numpy()
        if output.datatype == "BYTES":
            got = np.array(
                [each if isinstance(each, bytes) else str(each).encode() for each in got.flat],
                np.object_,
            ).reshape(got.shape)
        outputs[output.name] = got
    return Answer(
        said.model_name,
        said.model_version or "",
        said.id or "",
        {output.name: output.datatype for output in said.outputs},
        outputs,
    )


class _Asyncio(Client):
    def __init__(self, target: Mapping[str, str]) -> None:
        self.target = target
        self.loop = asyncio.new_event_loop()
        self.client: Any = self.loop.run_until_complete(self.connect())

    async def connect(self) -> Any:
        raise NotImplementedError

    def wait(self, value: Any) -> Any:
        raise NotImplementedError

    def begun(self, request: Request) -> Any:
        raise NotImplementedError

    def infer(self, request: Request) -> Answer:
        answer: Answer = answer_of(self.wait(self.begun(request)))
        return answer

    def cancel(self, request: Request) -> None:
        async def run() -> None:
            task = asyncio.ensure_future(self.begun(request))
            # Until the request is under way, which takes some of the loop's turns.
            await asyncio.sleep(0.05)
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                return
            raise AssertionError("it was answered")

        self.loop.run_until_complete(run())

    def beside_convoy(self, file: bytes) -> tuple[list[float], list[float]]:
        from convoy import Classifier
        from tests.conformance.rows import Tensor

        data = np.array([file], np.object_)
        answer = self.infer(Request("colours", [Tensor("image", data, "BYTES")]))
        with Classifier(self.target["grpc"], model="colours") as classifier:
            labels = classifier.classify(file, top_k=3).labels
        ours = [each.probability for each in sorted(labels, key=lambda label: label.index)]
        # As JSON has it, a number has more digits than a float32.
        return answer.outputs["scores"][0].astype(np.float32).tolist(), ours

    def close(self) -> None:
        self.loop.run_until_complete(self.client.close())
        self.loop.close()


class Grpc(_Asyncio):
    async def connect(self) -> Any:
        return InferenceGRPCClient(self.target["grpc"], timeout=TIMEOUT_S)

    def wait(self, value: Any) -> Any:
        try:
            return self.loop.run_until_complete(value)
        except grpc.RpcError as error:
            raise Refused(str(error.code()), error.details() or "") from None

    def begun(self, request: Request) -> Any:
        return self.client.infer(made_of(request, http=False), timeout=request.deadline_s)

    def live(self) -> bool:
        return bool(self.wait(self.client.is_server_live()))

    def ready(self) -> bool:
        return bool(self.wait(self.client.is_server_ready()))

    def model_ready(self, name: str, version: str = "") -> bool:
        if version:
            raise NotApplicable("it names no version there")
        return bool(self.wait(self.client.is_model_ready(name)))

    # Its own client has no call for these two, but the code generated of its protocol has.

    def load(self, name: str, *, override: bool = False) -> None:
        if override:
            raise NotApplicable("its protocol has no way to")
        answer = self._ordered("RepositoryModelLoad", pb.RepositoryModelLoadRequest, name)
        assert (answer.model_name, answer.isLoaded) == (name, True)

    def unload(self, name: str) -> None:
        answer = self._ordered("RepositoryModelUnload", pb.RepositoryModelUnloadRequest, name)
        assert (answer.model_name, answer.isUnloaded) == (name, True)

    def _ordered(self, call: str, kind: Any, name: str) -> Any:
        with grpc.insecure_channel(self.target["grpc"]) as channel:
            try:
                return getattr(GRPCInferenceServiceStub(channel), call)(
                    kind(model_name=name), timeout=TIMEOUT_S
                )
            except grpc.RpcError as error:
                raise Refused(str(error.code()), error.details() or "") from None


class Rest(_Asyncio):
    http = True

    async def connect(self) -> Any:
        return InferenceRESTClient(RESTConfig(protocol="v2", timeout=TIMEOUT_S))

    @property
    def _url(self) -> str:
        return f"http://{self.target['http']}"

    def wait(self, value: Any) -> Any:
        try:
            return self.loop.run_until_complete(value)
        except httpx.HTTPStatusError as error:
            raise Refused(str(error.response.status_code), str(error)) from None
        except httpx.TimeoutException as error:
            raise Refused("", f"the client gave up: {type(error).__name__}") from None

    def begun(self, request: Request) -> Any:
        asked = made_of(request, http=True)
        if not request.outputs and all(tensor.raw for tensor in request.inputs):
            asked.parameters["binary_data_output"] = True
        return self.client.infer(
            self._url, asked, model_name=request.model, timeout=request.deadline_s
        )

    def live(self) -> bool:
        return bool(self.wait(self.client.is_server_live(self._url)))

    def ready(self) -> bool:
        return bool(self.wait(self.client.is_server_ready(self._url)))

    def model_ready(self, name: str, version: str = "") -> bool:
        if version:
            raise NotApplicable("it names no version there")
        return bool(self.wait(self.client.is_model_ready(self._url, name)))


if __name__ == "__main__":
    # It logs each refusal with a stack.
    logging.disable(logging.CRITICAL)
    main({"kserve gRPC": Grpc, "kserve REST": Rest})
