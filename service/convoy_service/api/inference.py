"""The Open Inference Protocol, version 2 <-> the core.

https://github.com/kserve/open-inference-protocol, with extensions of Triton's:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/README.html.

A model's one input takes UINT8 pixels `[N, H, W, C]` or, under the same name, BYTES: N encoded images
of any size. Its one output is FP32 `[N, classes]`, or BYTES `[N, k]` where the k best classes are asked
for. Typed contents are answered with typed ones, all others with raw ones.
"""

import functools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
from google.protobuf.message import Message

from convoy_protos import inference_pb2 as pb
from convoy_service.api.control import Order, carry_out
from convoy_service.api.shared_memory import Region, SharedMemory, Span
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import VARIANTS, Probabilities
from convoy_service.engine.session import Device
from convoy_service.errors import (
    ConvoyError,
    InferenceFailed,
    InvalidImage,
    InvalidRequest,
    NotReady,
    UnknownModel,
    Unsupported,
)
from convoy_service.registry.registry import (
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
from convoy_service.rollout import policy
from convoy_service.settings import Settings
from convoy_service.tasks import Shared
from convoy_service.telemetry.counters import Statistics
from convoy_service.transport import protobuf_scan as wire
from convoy_service.transport.dispatcher import Call, Front, Handler

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
_PLATFORM = "onnxruntime_onnx"
_ONE_REPOSITORY = "'repository_name' specification is not supported: there is one repository"

_VERSION = re.compile(r"[0-9]{1,18}")

# Typed values that become Python's at once: nothing else runs meanwhile.
_TYPED_VALUES = 65_536
# Of so many values the best are found, and so many bytes of shared memory copied, while others wait.
_FEW_VALUES = 8192
_FEW_BYTES = 1_000_000
# What a class takes, as Triton writes it, until it is sent.
_CLASS_BYTES = 128

# How a caller asks that an error end a stream, and not be told in it.
_STRICT = ("triton_grpc_error", "true")
# Each request of a stream has one answer, the last one.
_FINAL = pb.ModelInferResponse(
    parameters={"triton_final_response": pb.InferParameter(bool_param=True)}
).SerializeToString()

_NO_SHARED_MEMORY = "shared memory is not used here: start the server with --allow-shared-memory"

_Parameters = Mapping[str, pb.InferParameter]
_Input = pb.ModelInferRequest.InferInputTensor


class InferenceRpc:
    """The handlers of the service `SERVICE`; `ready` says whether the whole server is."""

    def __init__(
        self,
        repository: Repository,
        ready: Callable[[], bool],
        hold: Callable[[Call, int], None],
        settings: Settings,
        statistics: Callable[[], Mapping[tuple[str, str], Statistics]],
        order: Order | None = None,
        memory: SharedMemory | None = None,
    ) -> None:
        """`hold` counts memory that a call is about to take: `Front.hold`. `statistics` tells what each
        model and version has done, on whatever thread. `order` carries out what operators say, `memory`
        is what callers share; None where they may not.
        """
        self._repository, self._ready, self._hold = repository, ready, hold
        self._settings, self._order, self._memory = settings, order, memory
        self._statistics = Shared(statistics)
        # What ServerMetadata tells, in Triton's words: nothing that does not work.
        self.extensions = ["classification", "model_configuration", "schedule_policy", "statistics"]
        self.extensions += ["model_repository"] if order else []
        self.extensions += ["system_shared_memory"] if memory else []

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
            "ModelConfig": (pb.ModelConfigRequest, self.model_config),
            "ModelStatistics": (pb.ModelStatisticsRequest, self.model_statistics),
            "SystemSharedMemoryStatus": (
                pb.SystemSharedMemoryStatusRequest,
                self.system_shared_memory_status,
            ),
            "SystemSharedMemoryRegister": (
                pb.SystemSharedMemoryRegisterRequest,
                self.system_shared_memory_register,
            ),
            "SystemSharedMemoryUnregister": (
                pb.SystemSharedMemoryUnregisterRequest,
                self.system_shared_memory_unregister,
            ),
            "CudaSharedMemoryUnregister": (
                pb.CudaSharedMemoryUnregisterRequest,
                self.cuda_shared_memory_unregister,
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
        # As Triton answers: its clients may count on the order, and give no ids.
        front.stream(
            f"/{SERVICE}/ModelStreamInfer",
            pb.ModelInferRequest,
            self.model_stream_infer,
            refuse_one,
            strict=_STRICT,
            ordered=True,
            raw_field=pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER,
        )

    async def server_live(self, request: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def server_ready(
        self, request: pb.ServerReadyRequest, call: Call
    ) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._ready())

    async def model_ready(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        # As Triton does, whose clients ask until a model is there.
        try:
            served = self._get(request.name, request.version)
        except (NotReady, UnknownModel):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=served.batcher.ready and self._ready())

    async def server_metadata(
        self, request: pb.ServerMetadataRequest, call: Call
    ) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name="convoy",
            version=metadata.version("convoy-serving"),
            extensions=self.extensions,
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
            platform=_PLATFORM,
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
        call.model, call.requests = served.name, served.requests
        best, place = 0, None
        if request.outputs:
            best, place = self._read_outputs(request, served)
        if request.parameters:
            priority, receipt = _read_parameters(request, call)
        else:
            priority, receipt = 0, False
        tensor, content = _the_input(request, call.raw or request.raw_input_contents, served)
        if tensor.parameters and (source := self._span(tensor.name, tensor.parameters)):
            if content is not None or tensor.HasField("contents"):
                raise InvalidRequest(
                    f"input {tensor.name!r}: both in shared memory and in the request"
                )
            content = await self._fetch(source, call, served)
        # Typed pixels become Python's integers on their way: that may take seconds.
        if content is None and len(tensor.contents.uint_contents) > _TYPED_VALUES:
            inputs = await served.aside(lambda: _read_input(tensor, None, served))
        else:
            inputs = _read_input(tensor, content, served)
        if place and place.size < len(inputs) * len(served.manifest.labels) * 4:
            raise InvalidRequest(
                f"output {served.manifest.output!r}: {place.size} bytes of shared memory are too "
                f"little for {len(inputs)} x {len(served.manifest.labels)} values of FP32"
            )
        decode_s = 0.0
        given = inputs
        if isinstance(inputs, list):
            self._hold(call, len(inputs) * served.image_bytes)
            decoded, decode_s = await served.decode(inputs, call.deadline, call.trace)
            for number, item in enumerate(decoded):
                if isinstance(item, InvalidImage):
                    raise InvalidImage(f"image {number}: {item}")
            inputs = np.stack([item for item in decoded if not isinstance(item, InvalidImage)])
        answer = await served.run(inputs, call.deadline, priority, call.trace)
        call.ran(decode_s, answer.queue_s, answer.run_s)
        if answer.failed_rows:
            failed = np.flatnonzero(np.isnan(answer.outputs).any(axis=1)).tolist()
            raise InferenceFailed(f"the model failed on image {', '.join(map(str, failed))}")
        if served.observed:
            outputs = answer.outputs
            served.answered(given, inputs, outputs, served.unsure(outputs))  # type: ignore[arg-type]
        head, rest = b"", pb.ModelInferResponse(id=request.id)
        if best or place:
            typed = content is None
            await self._answer_otherwise(rest, call, served, answer.outputs, best, place, typed)
        elif content is not None:
            # Messages that are joined are merged when they are parsed, so what is always the same
            # is serialised once: https://protobuf.dev/programming-guides/encoding/#last-one-wins.
            head = _head(served.name, served.version, served.manifest.output, answer.outputs.shape)
            rest.raw_output_contents.append(answer.outputs.astype("<f4", copy=False).tobytes())
        else:
            output = _output(rest, served, "FP32", answer.outputs.shape)
            output.contents.fp32_contents.extend(answer.outputs.ravel().tolist())
        if receipt:
            times = rest.parameters
            times["decode_s"].double_param, times["queue_s"].double_param = decode_s, answer.queue_s
            times["run_s"].double_param = answer.run_s
            times["batch_size"].int64_param = answer.batch_size
        return head + rest.SerializeToString()

    async def _answer_otherwise(
        self,
        response: pb.ModelInferResponse,
        call: Call,
        served: Served,
        outputs: Probabilities,
        best: int,
        place: Span | None,
        typed: bool,
    ) -> None:
        """Fills in the answer where the `best` classes are asked for, or it goes to a `place`."""
        if place:
            assert self._memory
            data = outputs.astype("<f4", copy=False).tobytes()
            write = functools.partial(self._memory.write, place, data)
            if len(data) > _FEW_BYTES:
                await served.aside(write)
            else:
                write()
            parameters = _output(response, served, "FP32", outputs.shape).parameters
            parameters["shared_memory_region"].string_param = place.region.name
            parameters["shared_memory_byte_size"].int64_param = len(data)
            if offset := place.offset - place.region.offset:
                parameters["shared_memory_offset"].int64_param = offset
            # Clients count on one for each output.
            response.raw_output_contents.append(b"")
            return
        best = min(best, outputs.shape[1])
        self._hold(call, len(outputs) * best * _CLASS_BYTES)
        find = functools.partial(classified, outputs, served.manifest.labels, best)
        found = await served.aside(find) if outputs.size > _FEW_VALUES else find()
        output = _output(response, served, "BYTES", (len(outputs), best))
        if typed:
            output.contents.bytes_contents.extend(found)
        else:
            elements = (struct.pack("<I", len(each)) + each for each in found)
            response.raw_output_contents.append(b"".join(elements))

    async def _fetch(self, source: Span, call: Call, served: Served) -> memoryview:
        """The contents of an input that lies in shared memory."""
        assert self._memory
        if source.size > self._settings.max_request_mb * 1e6:
            raise InvalidRequest(
                f"{source.size / 1e6:.1f} MB of shared memory, the limit is "
                f"{self._settings.max_request_mb:g}: send fewer images a call"
            )
        self._hold(call, source.size)
        if source.size > _FEW_BYTES:
            return await served.aside(functools.partial(self._memory.read, source))
        return self._memory.read(source)

    def _read_outputs(
        self, request: pb.ModelInferRequest, served: Served
    ) -> tuple[int, Span | None]:
        """How many of the best classes are asked for, 0 for all values; and where these are to be put
        in shared memory, if they are.
        """
        best, place = 0, None
        for output in request.outputs:
            if output.name != served.manifest.output:
                raise InvalidRequest(
                    f"no output {output.name!r}: model {served.name!r} has "
                    f"{served.manifest.output!r}"
                )
            if parameters := output.parameters:
                best, place = _best(parameters), self._span(output.name, parameters)
                if best and place:
                    raise InvalidRequest(
                        f"output {output.name!r}: both `classification` and `shared_memory_region`"
                    )
        return best, place

    def _span(self, name: str, parameters: _Parameters) -> Span | None:
        """Where the tensor `name` lies in shared memory, or is to; None where it does not."""
        place = _place(name, parameters)
        if place is None:
            return None
        if self._memory is None:
            raise Unsupported(_NO_SHARED_MEMORY)
        return self._memory.span(*place)

    async def model_stream_infer(self, request: pb.ModelInferRequest, call: Call) -> bytes:
        answer = await self.model_infer(request, call)
        number = pb.ModelStreamInferResponse.INFER_RESPONSE_FIELD_NUMBER
        return wire.field(number, answer + _FINAL)

    async def model_config(
        self, request: pb.ModelConfigRequest, call: Call
    ) -> pb.ModelConfigResponse:
        served, settings = self._get(request.name, request.version), self._settings
        call.model = served.name
        manifest, device = served.manifest, Device.parse(served.device)
        config = pb.ModelConfig(
            name=served.name,
            platform=_PLATFORM,
            backend="onnxruntime",
            max_batch_size=manifest.max_batch_size,
            default_model_filename=VARIANTS[served.variant],
        )
        config.input.add(
            name=manifest.input,
            data_type=pb.TYPE_UINT8,
            format=pb.ModelInput.FORMAT_NHWC,
            dims=manifest.pixels.shape,
        )
        config.output.add(
            name=manifest.output,
            data_type=pb.TYPE_FP32,
            dims=[len(manifest.labels)],
            label_filename="labels.txt",
        )
        batching = config.dynamic_batching
        # Always of this size, others are filled up to it. Else whatever waits goes.
        if manifest.fixed_batch or settings.deterministic:
            batching.preferred_batch_size.append(manifest.max_batch_size)
        batching.max_queue_delay_microseconds = 0
        waits = batching.default_queue_policy
        waits.timeout_action = pb.ModelQueuePolicy.REJECT
        waits.default_timeout_microseconds = int(settings.max_wait_s * 1e6)
        waits.allow_timeout_override = True
        # Each engine has it, or each acceptor.
        group = config.instance_group.add(
            name=served.name, count=settings.engines or settings.acceptors
        )
        group.kind = pb.ModelInstanceGroup.KIND_CPU
        if device.kind != "cpu":
            group.kind = pb.ModelInstanceGroup.KIND_GPU
            group.gpus.append(device.number or 0)
            config.optimization.cuda.graphs = settings.cuda_graphs and device.kind == "cuda"
        told = {
            "version": str(served.version),
            "variant": served.variant,
            "device": served.device,
            "sha256": served.bundle.sha256,
            "resize": manifest.pixels.resize,
        }
        for key, value in told.items():
            config.parameters[key].string_value = value
        models, versions = self._repository.folder, self._repository.versions(served.name)
        found = await served.aside(functools.partial(version_policy, models, served.name, versions))
        if found is not None:
            config.version_policy.CopyFrom(found)
        return pb.ModelConfigResponse(config=config)

    async def model_statistics(
        self, request: pb.ModelStatisticsRequest, call: Call
    ) -> pb.ModelStatisticsResponse:
        if request.name and request.version:
            served = self._get(request.name, request.version)
            asked = [(served.name, served.version)]
        else:
            asked = self._repository.loaded(request.name)
        call.model = request.name
        found = await self._statistics.get()
        response = pb.ModelStatisticsResponse()
        for name, version in asked:
            of = found.get((name, str(version)), Statistics())
            _describe(of, response.model_stats.add(name=name, version=str(version)))
        return response

    async def system_shared_memory_status(
        self, request: pb.SystemSharedMemoryStatusRequest, call: Call
    ) -> pb.SystemSharedMemoryStatusResponse:
        response = pb.SystemSharedMemoryStatusResponse()
        for each in self._shared().regions(request.name):
            region = response.regions[each.name]
            region.name, region.key = each.name, each.key
            region.offset, region.byte_size = each.offset, each.byte_size
        return response

    async def system_shared_memory_register(
        self, request: pb.SystemSharedMemoryRegisterRequest, call: Call
    ) -> pb.SystemSharedMemoryRegisterResponse:
        self._shared().register(
            Region(request.name, request.key, request.offset, request.byte_size)
        )
        return pb.SystemSharedMemoryRegisterResponse()

    async def system_shared_memory_unregister(
        self, request: pb.SystemSharedMemoryUnregisterRequest, call: Call
    ) -> pb.SystemSharedMemoryUnregisterResponse:
        self._shared().unregister(request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def cuda_shared_memory_unregister(
        self, request: pb.CudaSharedMemoryUnregisterRequest, call: Call
    ) -> pb.CudaSharedMemoryUnregisterResponse:
        # There never is any.
        self._shared()
        return pb.CudaSharedMemoryUnregisterResponse()

    def _shared(self) -> SharedMemory:
        if self._memory is None:
            raise Unsupported(_NO_SHARED_MEMORY)
        return self._memory

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


def _describe(of: Statistics, message: pb.ModelStatistics) -> None:
    message.last_inference = int(1e3 * of.last)
    message.inference_count, message.execution_count = of.inferences, of.executions
    stages = message.inference_stats
    _took(stages.success, of.success, of.success_s)
    _took(stages.fail, of.fail, of.fail_s)
    _took(stages.queue, of.success, of.queue_s)
    _took(stages.compute_input, of.success, of.input_s)
    _took(stages.compute_infer, of.success, of.infer_s)
    _took(stages.compute_output, of.success, of.output_s)
    # Nothing is cached. Clients that read JSON want to be told.
    stages.cache_hit.SetInParent()
    stages.cache_miss.SetInParent()
    for size, runs in of.batches.items():
        batches = message.batch_stats.add(batch_size=size)
        _took(batches.compute_input, runs.executions, runs.input_s)
        _took(batches.compute_infer, runs.executions, runs.infer_s)
        _took(batches.compute_output, runs.executions, runs.output_s)


def _took(duration: pb.StatisticDuration, count: int, seconds: float) -> None:
    duration.count, duration.ns = count, int(1e9 * seconds)


def _version(version: str) -> int | str:
    """A number, or a label."""
    return int(version or 0) if not version or _VERSION.fullmatch(version) else version


def _key(request: pb.ModelInferRequest, call: Call) -> str | None:
    """Which requests belong together: by metadata, a parameter, or the request's id."""
    key = call.key()
    if key is None and "key" in request.parameters:
        key = request.parameters["key"].string_param
    return key or request.id or None


def refuse_one(
    request: pb.ModelInferRequest | None,
    code: grpc.StatusCode,  # noqa: ARG001
    words: str,
) -> pb.ModelStreamInferResponse:
    """The answer to a message of a stream that failed: see `Front.stream`."""
    response = pb.ModelStreamInferResponse(error_message=words)
    # Set, if empty: clients look at it.
    response.infer_response.id = request.id if request else ""
    return response


def classified(outputs: Probabilities, labels: Sequence[str], best: int) -> list[bytes]:
    """The `best` classes of each row of float32 `[N, classes]`, all in one list of N x best: the
    highest value first, equal ones in the order of the classes. By Triton's classification extension:
    `value:index:label`, the value with six decimals.
    """
    order = np.argsort(-outputs, axis=1, kind="stable")[:, :best]
    values = np.take_along_axis(outputs, order, axis=1)
    return [
        f"{value:f}:{index}:{labels[index]}".encode()
        for value, index in zip(values.ravel().tolist(), order.ravel().tolist(), strict=True)
    ]


def _best(parameters: _Parameters) -> int:
    """How many of the best classes are asked for; 0 where none are."""
    if "classification" not in parameters:
        return 0
    parameter = parameters["classification"]
    if parameter.WhichOneof("parameter_choice") != "int64_param" or parameter.int64_param < 1:
        raise InvalidRequest("parameter 'classification': expected an int64_param of at least 1")
    return parameter.int64_param


class _Place(NamedTuple):
    region: str
    offset: int
    size: int


def _place(name: str, parameters: _Parameters) -> _Place | None:
    """What the parameters of the tensor `name` say of shared memory. Others are for other servers."""
    region, size = "shared_memory_region", "shared_memory_byte_size"
    if region not in parameters:
        if size in parameters or "shared_memory_offset" in parameters:
            raise InvalidRequest(f"tensor {name!r}: shared memory without a {region!r}")
        return None
    if parameters[region].WhichOneof("parameter_choice") != "string_param":
        raise InvalidRequest(f"tensor {name!r}: parameter {region!r}: expected a string_param")
    if size not in parameters:
        raise InvalidRequest(f"tensor {name!r}: {region!r} needs {size!r} beside it")
    offset = _integer(parameters, "shared_memory_offset")
    return _Place(parameters[region].string_param, offset, _integer(parameters, size))


def version_policy(models: Path, name: str, served: Sequence[int]) -> pb.ModelVersionPolicy | None:
    """The model's versions.toml in Triton's words, which may name those that are `served`; None where
    it can't be read.
    """
    try:
        found = policy.read(models / name)
    except ConvoyError:
        return None
    if found.newest and not found.labels:
        return pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=found.newest))
    # The newest beside those with labels: of this Triton has no word but which these are.
    versions = served if found.newest else sorted(found.named)
    return pb.ModelVersionPolicy(specific=pb.ModelVersionPolicy.Specific(versions=versions))


def _read_parameters(request: pb.ModelInferRequest, call: Call) -> tuple[int, bool]:
    """The priority, and whether a receipt is wanted; limits the call to its `timeout`, in
    microseconds. Others are for other servers.
    """
    parameters = request.parameters
    timeout, priority = _integer(parameters, "timeout"), _integer(parameters, "priority")
    if timeout:
        call.limit(call.arrived + timeout / 1e6)
    receipt = "timings" in parameters and parameters["timings"].bool_param
    return priority, receipt


def _integer(parameters: _Parameters, name: str) -> int:
    if name not in parameters:
        return 0
    parameter = parameters[name]
    kind = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, kind) if kind in {"int64_param", "uint64_param"} else -1
    if value < 0:
        raise InvalidRequest(f"parameter {name!r}: expected an integer of at least 0")
    return int(value)


def _the_input(
    request: pb.ModelInferRequest, raw: Sequence[bytes | memoryview], served: Served
) -> tuple[_Input, bytes | memoryview | None]:
    """The one input, and its raw content, if it has that."""
    # Each look at a field costs a good part of a microsecond: none is looked at twice.
    inputs, name = list(request.inputs), served.manifest.input
    if len(inputs) != 1 or inputs[0].name != name:
        names = ", ".join(repr(tensor.name) for tensor in inputs) or "none"
        raise InvalidRequest(f"inputs: {names}; model {served.name!r} takes one, {name!r}")
    if not raw:
        return inputs[0], None
    if len(raw) > 1 or inputs[0].HasField("contents"):
        raise InvalidRequest("raw_input_contents: one entry an input, and then no `contents`")
    return inputs[0], raw[0]


def _read_input(
    tensor: _Input, content: bytes | memoryview | None, served: Served
) -> Pixels | list[bytes | Pixels]:
    """Pixels uint8 [N, H, W, C], or N encoded images, of raw `content` or the tensor's typed ones."""
    name, shape = served.manifest.input, served.manifest.pixels.shape
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


def _output(
    response: pb.ModelInferResponse, served: Served, datatype: str, shape: tuple[int, ...]
) -> pb.ModelInferResponse.InferOutputTensor:
    """The output of the answer, to be filled in; with it, who answers."""
    response.model_name, response.model_version = served.name, str(served.version)
    return response.outputs.add(name=served.manifest.output, datatype=datatype, shape=shape)
