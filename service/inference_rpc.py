"""The Open Inference Protocol, version 2 <-> the core.

https://github.com/kserve/open-inference-protocol. A model's one input takes UINT8 pixels
`[N, H, W, C]` or, under the same name, BYTES: N encoded images of any size. Its one output is FP32
`[N, classes]`. Raw contents are answered with raw contents, typed ones with typed ones.
"""

import functools
import re
import struct
from collections.abc import Callable, Sequence
from importlib import metadata

import numpy as np
from google.protobuf.message import Message

from protos import inference_pb2 as pb
from service.errors import (
    InferenceFailed,
    InvalidImage,
    InvalidRequest,
    NotReady,
    Unsupported,
)
from service.front import Call, Front, Handler
from service.images import Pixels
from service.orders import Order, carry_out
from service.repository import (
    BROKEN,
    DRAINING,
    IDLE,
    INCOMPLETE,
    LOADING,
    READY,
    STANDBY,
    Repository,
    Served,
)

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

# Triton's words for what has become of a version.
_INDEXED = {
    INCOMPLETE: "UNAVAILABLE",
    IDLE: "UNAVAILABLE",
    LOADING: "LOADING",
    READY: "READY",
    STANDBY: "READY",
    DRAINING: "UNLOADING",
    BROKEN: "UNAVAILABLE",
}
_ONE_REPOSITORY = "'repository_name' specification is not supported: there is one repository"

_VERSION = re.compile(r"[0-9]{1,18}")

# Typed values that become Python's at once: nothing else runs meanwhile.
_TYPED_VALUES = 65_536


class InferenceRpc:
    """The handlers of the service `SERVICE`; `ready` says whether the whole server is."""

    def __init__(
        self,
        repository: Repository,
        ready: Callable[[], bool],
        hold: Callable[[Call, int], None],
        order: Order | None = None,
    ) -> None:
        """`hold` counts memory that a call is about to take: `Front.hold`. `order` carries out what
        operators say; None where they may not.
        """
        self._repository, self._ready, self._hold = repository, ready, hold
        self._order = order

    def register(self, front: Front) -> None:
        calls: dict[str, tuple[type[Message], Handler]] = {
            "ServerLive": (pb.ServerLiveRequest, self.server_live),
            "ServerReady": (pb.ServerReadyRequest, self.server_ready),
            "ModelReady": (pb.ModelReadyRequest, self.model_ready),
            "ServerMetadata": (pb.ServerMetadataRequest, self.server_metadata),
            "ModelMetadata": (pb.ModelMetadataRequest, self.model_metadata),
            "RepositoryIndex": (pb.RepositoryIndexRequest, self.repository_index),
            "RepositoryModelLoad": (pb.RepositoryModelLoadRequest, self.repository_model_load),
            "RepositoryModelUnload": (
                pb.RepositoryModelUnloadRequest,
                self.repository_model_unload,
            ),
        }
        for name, (kind, handler) in calls.items():
            front.unary(f"/{SERVICE}/{name}", kind, handler, always=True)
        front.unary(
            f"/{SERVICE}/ModelInfer",
            pb.ModelInferRequest,
            self.model_infer,
            raw_field=pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER,
        )

    async def server_live(self, request: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(
        self, request: pb.ServerReadyRequest, call: Call
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready())

    async def model_ready(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        try:
            served = self._get(request.name, request.version)
        except NotReady:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=served.batcher.ready and self._ready())

    async def server_metadata(
        self, request: pb.ServerMetadataRequest, call: Call
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="convoy",
            version=metadata.version("convoy-serving"),
            extensions=["model_repository"] if self._order else [],
        )

    async def model_metadata(
        self, request: pb.ModelMetadataRequest, call: Call
    ) -> pb.ModelMetadataResponse:
        served = self._get(request.name, request.version)
        call.model = served.name
        manifest, tensor = served.manifest, pb.ModelMetadataResponse.TensorMetadata
        return pb.ModelMetadataResponse(
            name=served.name,
            versions=[str(version) for version in self._repository.versions(served.name)],
            platform="onnxruntime_onnx",
            inputs=[
                tensor(name=manifest.input, datatype="UINT8", shape=[-1, *manifest.pixels.shape])
            ],
            outputs=[
                tensor(name=manifest.output, datatype="FP32", shape=[-1, len(manifest.labels)])
            ],
            properties={
                "encoded_images": f"input {manifest.input!r} also takes datatype BYTES, shape [-1]"
            },
        )

    async def model_infer(self, request: pb.ModelInferRequest, call: Call) -> bytes:
        version = _version(request.model_version)
        with self._repository.take(
            request.model_name, version, functools.partial(_key, request, call)
        ) as served:
            return await self._infer(request, call, served)

    async def _infer(self, request: pb.ModelInferRequest, call: Call, served: Served) -> bytes:
        call.model = served.name
        if request.outputs:
            _check_outputs(request, served)
        if request.parameters:
            priority, receipt = _read_parameters(request, call)
        else:
            priority, receipt = 0, False
        raw = call.raw or request.raw_input_contents
        # Typed pixels become Python's integers on their way: that may take seconds.
        if not raw and any(len(i.contents.uint_contents) > _TYPED_VALUES for i in request.inputs):
            inputs = await served.aside(lambda: _read_input(request, raw, served))
        else:
            inputs = _read_input(request, raw, served)
        decode_s = 0.0
        given = inputs
        if isinstance(inputs, list):
            self._hold(call, len(inputs) * served.image_bytes)
            decoded, decode_s = await served.decode(inputs, call.deadline)
            for number, item in enumerate(decoded):
                if isinstance(item, InvalidImage):
                    raise InvalidImage(f"image {number}: {item}")
            inputs = np.stack([item for item in decoded if not isinstance(item, InvalidImage)])
        answer = await served.run(inputs, call.deadline, priority)
        if answer.failed_rows:
            failed = np.flatnonzero(np.isnan(answer.outputs).any(axis=1)).tolist()
            raise InferenceFailed(f"the model failed on image {', '.join(map(str, failed))}")
        if served.observed:
            outputs = answer.outputs
            served.answered(given, inputs, outputs, served.unsure(outputs))  # type: ignore[arg-type]
        head, rest = b"", pb.ModelInferResponse(id=request.id)
        always = _head(served.name, served.version, served.manifest.output, answer.outputs.shape)
        if raw:
            # Messages that are joined are merged when they are parsed, so what is always the same
            # is serialised once: https://protobuf.dev/programming-guides/encoding/#last-one-wins.
            head = always
            rest.raw_output_contents.append(answer.outputs.astype("<f4", copy=False).tobytes())
        else:
            rest.MergeFromString(always)
            rest.outputs[0].contents.fp32_contents.extend(answer.outputs.ravel().tolist())
        if receipt:
            times = rest.parameters
            times["decode_s"].double_param, times["queue_s"].double_param = decode_s, answer.queue_s
            times["run_s"].double_param = answer.run_s
            times["batch_size"].int64_param = answer.batch_size
        return head + rest.SerializeToString()

    async def repository_index(
        self, request: pb.RepositoryIndexRequest, call: Call
    ) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise Unsupported(_ONE_REPOSITORY)
        response = pb.RepositoryIndexResponse()
        for entry in self._repository.entries():
            for each in entry.state.versions:
                state, reason = _INDEXED[each.state], each.reason
                if each.state == IDLE:
                    reason = reason or f"not asked for, which is: {entry.state.policy}"
                if state == "READY" or not request.ready:
                    response.models.add(
                        name=entry.name, version=str(each.version), state=state, reason=reason
                    )
        return response

    async def repository_model_load(
        self, request: pb.RepositoryModelLoadRequest, call: Call
    ) -> pb.RepositoryModelLoadResponse:
        name = _ordered(request, ())
        await carry_out(self._order, "load", name)
        return pb.RepositoryModelLoadResponse(model_name=name, is_loaded=True)

    async def repository_model_unload(
        self, request: pb.RepositoryModelUnloadRequest, call: Call
    ) -> pb.RepositoryModelUnloadResponse:
        name = _ordered(request, ("unload_dependents",))
        await carry_out(self._order, "unload", name)
        return pb.RepositoryModelUnloadResponse(model_name=name, is_unloaded=True)

    def _get(self, name: str, version: str) -> Served:
        return self._repository.get(name, _version(version))


def _ordered(
    request: pb.RepositoryModelLoadRequest | pb.RepositoryModelUnloadRequest,
    known: Sequence[str],
) -> str:
    """The model that an order is for, in Triton's form or KServe's, and with no parameters but the
    `known` ones.
    """
    name = request.model_name or request.repository_name
    if request.model_name and request.repository_name:
        raise Unsupported(_ONE_REPOSITORY)
    if not name:
        raise InvalidRequest("the request names no model: set `model_name`")
    if unknown := sorted(request.parameters.keys() - set(known)):
        raise InvalidRequest(
            f"parameters are not taken here: {', '.join(unknown)}; what a model is comes from the "
            "models folder alone"
        )
    return name


def _version(version: str) -> int | str:
    """A number, or a label."""
    return int(version or 0) if not version or _VERSION.fullmatch(version) else version


def _key(request: pb.ModelInferRequest, call: Call) -> str | None:
    """Which requests belong together: by metadata, a parameter, or the request's id."""
    key = call.key()
    if key is None and "key" in request.parameters:
        key = request.parameters["key"].string_param
    return key or request.id or None


def _check_outputs(request: pb.ModelInferRequest, served: Served) -> None:
    for output in request.outputs:
        if output.name != served.manifest.output:
            raise InvalidRequest(
                f"no output {output.name!r}: model {served.name!r} has {served.manifest.output!r}"
            )
        if output.parameters:
            raise InvalidRequest(
                f"output parameters are not supported here: {', '.join(sorted(output.parameters))}; "
                "Classify of convoy.v1.ImageClassifier answers with labels"
            )


def _read_parameters(request: pb.ModelInferRequest, call: Call) -> tuple[int, bool]:
    """The priority, and whether a receipt is wanted; limits the call to its `timeout`, in
    microseconds. Others are for other servers.
    """
    timeout, priority = _integer(request, "timeout"), _integer(request, "priority")
    if timeout:
        call.limit(call.arrived + timeout / 1e6)
    receipt = "timings" in request.parameters and request.parameters["timings"].bool_param
    return priority, receipt


def _integer(request: pb.ModelInferRequest, name: str) -> int:
    if name not in request.parameters:
        return 0
    parameter = request.parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind in {"int64_param", "uint64_param"} else -1
    if value < 0:
        raise InvalidRequest(f"parameter {name!r}: expected an integer of at least 0")
    return int(value)


def _read_input(
    request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview], served: Served
) -> Pixels | list[bytes | Pixels]:
    """Pixels uint8 [N, H, W, C], or N encoded images."""
    # Each look at a field costs a good part of a microsecond: none is looked at twice.
    name, shape = served.manifest.input, served.manifest.pixels.shape
    inputs = list(request.inputs)
    if len(inputs) != 1 or inputs[0].name != name:
        names = ", ".join(repr(tensor.name) for tensor in inputs) or "none"
        raise InvalidRequest(f"inputs: {names}; model {served.name!r} takes one, {name!r}")
    tensor, content = inputs[0], raw[0] if raw else None
    if tensor.parameters:
        raise InvalidRequest(
            f"input parameters are not supported here: {', '.join(sorted(tensor.parameters))}; "
            "send the contents in the request"
        )
    if raw and (len(raw) > 1 or tensor.HasField("contents")):
        raise InvalidRequest("raw_input_contents: one entry an input, and then no `contents`")
    given, datatype = tuple(tensor.shape), tensor.datatype
    if datatype == "BYTES":
        if not given or given[0] < 1 or any(n != 1 for n in given[1:]):
            raise InvalidRequest(
                f"input {name!r}: BYTES of shape {list(given)}; expected [N], N at least 1"
            )
        served.check_count(given[0])
        if content is None:
            images: Sequence[bytes] = tensor.contents.bytes_contents
        else:
            images = _read_bytes(content, given[0])
        if len(images) != given[0]:
            raise InvalidRequest(f"input {name!r}: {len(images)} elements for shape {list(given)}")
        return list(images)
    if datatype != "UINT8" or given[1:] != shape or given[0] < 1:
        wrong = f"shape {list(given)}" if datatype == "UINT8" else f"datatype {datatype!r}"
        raise InvalidRequest(
            f"input {name!r}: {wrong}; expected UINT8 [N, {', '.join(map(str, shape))}] or "
            "BYTES [N], N at least 1"
        )
    served.check_count(given[0])
    values = tensor.contents.uint_contents if content is None else content
    count = given[0] * served.image_bytes
    if len(values) != count:
        raise InvalidRequest(
            f"input {name!r}: {len(values)} values, but shape {list(given)} has {count}"
        )
    pixels = _read_typed(name, values) if content is None else content
    return np.frombuffer(pixels, np.uint8).reshape(given)


def _read_typed(name: str, values: Sequence[int]) -> bytes:
    pixels = bytearray()
    for start in range(0, len(values), _TYPED_VALUES):
        part = values[start : start + _TYPED_VALUES]
        if max(part) > 255:
            raise InvalidRequest(f"input {name!r}: {max(part)} is no UINT8 value")
        pixels += bytes(part)
    return bytes(pixels)


def _read_bytes(raw: bytes | memoryview, count: int) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    while position < len(raw):
        if len(elements) == count:
            raise InvalidRequest(f"raw BYTES: more than the {count} elements of the shape")
        if position + 4 > len(raw):
            raise InvalidRequest(f"raw BYTES end within the length of element {len(elements)}")
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4
        if position + length > len(raw):
            raise InvalidRequest(
                f"raw BYTES: element {len(elements)} says {length} bytes, {len(raw) - position} are left"
            )
        elements.append(bytes(raw[position : position + length]))
        position += length
    return elements


@functools.lru_cache(maxsize=1024)
def _head(name: str, version: int, output: str, shape: tuple[int, int]) -> bytes:
    """What all answers of this shape have in common, serialised."""
    response = pb.ModelInferResponse(model_name=name, model_version=str(version))
    response.outputs.add(name=output, datatype="FP32", shape=shape)
    return response.SerializeToString()
