"""The protocols over HTTP: JSON <-> the messages of the calls that answer it.

The Open Inference Protocol's REST form with Triton's extensions of it (binary data, statistics,
configuration, repository, system shared memory), and `/v1/classify`: image files in, labels out.
https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md,
https://github.com/triton-inference-server/server/tree/main/docs/protocol.
"""

import base64
import binascii
import html
import logging
import re
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
import numpy as np
from google.protobuf.message import Message
from msgspec import Meta, Raw, Struct
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from convoy_protos import classifier_pb2, inference_pb2
from convoy_service.errors import BACK_OFF, InvalidRequest, Unsupported
from convoy_service.settings import Settings
from convoy_service.transport.http_server import HTTP_STATUS, Refused, Reply, Request, Web, refusal
from convoy_service.transport.loop import Loop

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["ImageClassifier"].full_name

# Triton's: of a body that begins with JSON, how long that is.
HEADER_LENGTH = "inference-header-content-length"

# Values that become Python's, or JSON's, at once: nothing else runs meanwhile.
_VALUES, _VALUES_BYTES = 16_384, 65_536

# What the protocols never need more of, however many images come: what JSON of many megabytes could
# else have parsed into millions of objects.
_MAX_FIELDS = 10_000

# What else Triton has.
_UNOFFERED = re.compile(
    r"/v2/((cudasharedmemory|logging|trace)(/.*)?|models/.*/(generate|generate_stream|trace/setting))"
)

_INTEGER = re.compile(r"[0-9]{1,18}")

Scalar = bool | int | float | str
Parameters = dict[str, Scalar]


class _Tensor(Struct):
    name: str
    datatype: str
    shape: Annotated[list[Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]], Meta(max_length=64)]
    parameters: Parameters = {}
    data: Raw = Raw()


class _Asked(Struct):
    name: str
    parameters: Parameters = {}


class _Infer(Struct):
    inputs: list[_Tensor]
    id: str = ""
    parameters: Parameters = {}
    outputs: list[_Asked] = []


class _Index(Struct):
    ready: bool = False


class _Order(Struct):
    parameters: Parameters = {}


class _Region(Struct):
    key: str
    byte_size: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    offset: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0


_PIXELS = msgspec.json.Decoder(list[Annotated[int, Meta(ge=0, le=255)]])
_TEXTS = msgspec.json.Decoder(list[str])


class Route(NamedTuple):
    """`path` has names in braces, which `answer` gets with the request."""

    verb: str
    path: str
    answer: Callable[["Rest", Request, Mapping[str, str]], Awaitable[Reply]]
    summary: str
    takes: str = ""  # these two name schemas of the OpenAPI page
    gives: str = ""


class Rest:
    """Listens for HTTP, and answers through the transport's `loop`."""

    def __init__(self, settings: Settings, loop: Loop) -> None:
        """Raises ConvoyError where the settings for TLS don't fit together."""
        self._max_images = settings.max_images
        # What callers send must not fill the log.
        logging.getLogger("python_multipart").setLevel(logging.ERROR)
        self.web = Web(settings, loop, self.answer)

    async def answer(self, request: Request) -> Reply:
        """Raises Refused, and ConvoyError."""
        verb = "GET" if request.verb == "HEAD" else request.verb
        allowed = []
        for route, pattern in _PATTERNS:
            if match := pattern.fullmatch(request.path):
                if route.verb == verb:
                    request.route = route.path
                    return await route.answer(self, request, match.groupdict())
                allowed.append(route.verb)
        if allowed:
            raise Refused(
                405, f"{request.path} takes {', '.join(allowed)}", ("allow", ", ".join(allowed))
            )
        if _UNOFFERED.fullmatch(request.path):
            raise Unsupported(f"{request.path[:100]} is not offered here")
        raise Refused(404, f"there is nothing at {request.path[:100]}: see /docs")

    async def _ask(self, request: Request, method: str, message: Message) -> bytes:
        return await self.web.call(request, f"/{_INFERENCE}/{method}", lambda _: message)

    async def live(self, request: Request, _: Mapping[str, str]) -> Reply:
        answer = await self._ask(request, "ServerLive", inference_pb2.ServerLiveRequest())
        return _whether("live", inference_pb2.ServerLiveResponse.FromString(answer).live)

    async def ready(self, request: Request, _: Mapping[str, str]) -> Reply:
        answer = await self._ask(request, "ServerReady", inference_pb2.ServerReadyRequest())
        return _whether("ready", inference_pb2.ServerReadyResponse.FromString(answer).ready)

    async def metadata(self, request: Request, _: Mapping[str, str]) -> Reply:
        answer = await self._ask(request, "ServerMetadata", inference_pb2.ServerMetadataRequest())
        told = plain(inference_pb2.ServerMetadataResponse.FromString(answer))
        # Which over gRPC there is no need of.
        told["extensions"].append("binary_tensor_data")
        return _json(told)

    async def model_ready(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.ModelReadyRequest(
            name=path["model"], version=path.get("version", "")
        )
        answer = await self._ask(request, "ModelReady", message)
        ready = inference_pb2.ModelReadyResponse.FromString(answer).ready
        return _whether("ready", ready, name=path["model"])

    async def model_metadata(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.ModelMetadataRequest(
            name=path["model"], version=path.get("version", "")
        )
        answer = await self._ask(request, "ModelMetadata", message)
        return _json(plain(inference_pb2.ModelMetadataResponse.FromString(answer)))

    async def model_config(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.ModelConfigRequest(
            name=path["model"], version=path.get("version", "")
        )
        answer = await self._ask(request, "ModelConfig", message)
        return _json(plain(inference_pb2.ModelConfigResponse.FromString(answer).config))

    async def statistics(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.ModelStatisticsRequest(
            name=path.get("model", ""), version=path.get("version", "")
        )
        answer = await self._ask(request, "ModelStatistics", message)
        return _json(plain(inference_pb2.ModelStatisticsResponse.FromString(answer)))

    async def index(self, request: Request, _: Mapping[str, str]) -> Reply:
        def make(body: bytes) -> Message:
            return inference_pb2.RepositoryIndexRequest(ready=_parsed(_Index, body).ready)

        answer = await self.web.call(request, f"/{_INFERENCE}/RepositoryIndex", make)
        models = inference_pb2.RepositoryIndexResponse.FromString(answer).models
        return _json([plain(each) for each in models])

    async def load(self, request: Request, path: Mapping[str, str]) -> Reply:
        return await self._order(
            request,
            "RepositoryModelLoad",
            inference_pb2.RepositoryModelLoadRequest(model_name=path["model"]),
            inference_pb2.RepositoryModelLoadResponse,
        )

    async def unload(self, request: Request, path: Mapping[str, str]) -> Reply:
        return await self._order(
            request,
            "RepositoryModelUnload",
            inference_pb2.RepositoryModelUnloadRequest(model_name=path["model"]),
            inference_pb2.RepositoryModelUnloadResponse,
        )

    async def _order(
        self,
        request: Request,
        method: str,
        message: inference_pb2.RepositoryModelLoadRequest
        | inference_pb2.RepositoryModelUnloadRequest,
        answered: type[Message],
    ) -> Reply:
        """Gives the order `message`, with the parameters that the body has."""

        def make(body: bytes) -> Message:
            _set_parameters(message.parameters, _parsed(_Order, body).parameters)
            return message

        answer = await self.web.call(request, f"/{_INFERENCE}/{method}", make)
        return _json(plain(answered.FromString(answer)))

    async def memory_status(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.SystemSharedMemoryStatusRequest(name=path.get("region", ""))
        answer = await self._ask(request, "SystemSharedMemoryStatus", message)
        regions = inference_pb2.SystemSharedMemoryStatusResponse.FromString(answer).regions
        return _json([plain(each) for each in regions.values()])

    async def memory_register(self, request: Request, path: Mapping[str, str]) -> Reply:
        def make(body: bytes) -> Message:
            region = _parsed(_Region, body)
            return inference_pb2.SystemSharedMemoryRegisterRequest(
                name=path["region"],
                key=region.key,
                offset=region.offset,
                byte_size=region.byte_size,
            )

        await self.web.call(request, f"/{_INFERENCE}/SystemSharedMemoryRegister", make)
        return _json({})

    async def memory_unregister(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.SystemSharedMemoryUnregisterRequest(name=path.get("region", ""))
        await self._ask(request, "SystemSharedMemoryUnregister", message)
        return _json({})

    async def card_memory_unregister(self, request: Request, path: Mapping[str, str]) -> Reply:
        message = inference_pb2.CudaSharedMemoryUnregisterRequest(name=path.get("region", ""))
        await self._ask(request, "CudaSharedMemoryUnregister", message)
        return _json({})

    async def infer(self, request: Request, path: Mapping[str, str]) -> Reply:
        asked = _Outputs()

        def make(body: bytes) -> Message:
            return self._infer_request(request, path, body, asked)

        answer = await self.web.call(request, f"/{_INFERENCE}/ModelInfer", make)
        reply = await self.web.aside(len(answer), lambda: _infer_reply(answer, asked))
        return reply._replace(packs=True)

    def _infer_request(
        self, request: Request, path: Mapping[str, str], body: bytes, asked: "_Outputs"
    ) -> Message:
        """Raises InvalidRequest."""
        data: memoryview | None = None
        if (length := request.headers.get(HEADER_LENGTH)) is not None:
            if not _INTEGER.fullmatch(length) or int(length) > len(body):
                raise InvalidRequest(
                    f"header Inference-Header-Content-Length: {length[:20]!r}; the body has "
                    f"{len(body)} bytes, the length is of the JSON that it begins with"
                )
            data, body = memoryview(body)[int(length) :], body[: int(length)]
        given = _parsed(_Infer, body)
        asked.default = _taken(given.parameters, "binary_data_output", bool, asked.default)
        message = inference_pb2.ModelInferRequest(
            model_name=path["model"],
            model_version=path.get("version", ""),
            id=_text(given.id, "id"),
        )
        _set_parameters(message.parameters, given.parameters)
        at = 0
        for tensor in given.inputs:
            size = _taken(tensor.parameters, "binary_data_size", int, None)
            coding = _taken(tensor.parameters, "content_type", str, "")
            entry = message.inputs.add(
                name=_text(tensor.name, "name"),
                datatype=_text(tensor.datatype, "datatype"),
                shape=tensor.shape,
            )
            _set_parameters(entry.parameters, tensor.parameters)
            if size is not None:
                if bytes(tensor.data):
                    raise InvalidRequest(f"input {tensor.name!r}: both data and binary_data_size")
                if data is None or not 0 <= size <= len(data) - at:
                    raise InvalidRequest(
                        f"input {tensor.name!r}: binary_data_size is {size}, but "
                        f"{len(data) - at if data is not None else 0} bytes follow the JSON, whose "
                        "length is to be in the header Inference-Header-Content-Length"
                    )
                message.raw_input_contents.append(bytes(data[at : at + size]))
                at += size
            elif "shared_memory_region" in tensor.parameters:
                if bytes(tensor.data) not in (b"", b"null"):
                    raise InvalidRequest(
                        f"input {tensor.name!r}: both data and shared_memory_region"
                    )
            else:
                message.raw_input_contents.append(self._contents(tensor, coding))
        if data is not None and at != len(data):
            raise InvalidRequest(f"{len(data) - at} bytes follow the inputs' binary data")
        for output in given.outputs:
            binary = _taken(output.parameters, "binary_data", bool, None)
            asked.binary[output.name] = binary
            wanted = message.outputs.add(name=_text(output.name, "name"))
            _set_parameters(wanted.parameters, output.parameters)
        return message

    def _contents(self, tensor: _Tensor, coding: str) -> bytes:
        """As raw contents. What else there is but pixels and images, the call itself refuses."""
        data = bytes(tensor.data)
        if not data.startswith(b"["):
            raise InvalidRequest(f"input {tensor.name!r}: `data` is to be a list")
        if tensor.datatype == "UINT8":
            return b"".join(_pixels(tensor.name, data))
        if tensor.datatype != "BYTES":
            return b""
        if data.count(b'"') > 2 * self._max_images:
            raise InvalidRequest(f"input {tensor.name!r}: more than {self._max_images} elements")
        try:
            texts = _TEXTS.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"input {tensor.name!r}, data: {error}") from None
        elements = (_element(tensor.name, each, coding) for each in texts)
        return b"".join(struct.pack("<I", len(each)) + each for each in elements)

    async def classify(self, request: Request, _: Mapping[str, str]) -> Reply:
        single = False

        def make(body: bytes) -> Message:
            nonlocal single
            message = _classify_request(request.query)
            kind = request.headers.get("content-type", "")
            essence = kind.partition(";")[0].strip().lower()
            if essence == "multipart/form-data":
                for image in _files(kind, body, self._max_images):
                    message.images.add(encoded=image)
            # The last is what curl says where it is told nothing.
            elif essence.startswith("image/") or essence in {
                "", "application/octet-stream", "application/x-www-form-urlencoded",
            }:  # fmt: skip
                if not body:
                    raise InvalidRequest("the body is empty: send an image")
                single = True
                message.images.add(encoded=body)
            else:
                raise Refused(
                    415,
                    f"content-type {essence[:50]!r}: send an image as the body, or several as "
                    "multipart/form-data",
                )
            return message

        answer = await self.web.call(request, f"/{_CLASSIFIER}/Classify", make)
        return await self.web.aside(len(answer), lambda: _classify_reply(answer, single))

    async def openapi(self, request: Request, _: Mapping[str, str]) -> Reply:
        return _json(description())

    async def page(self, request: Request, _: Mapping[str, str]) -> Reply:
        return Reply(200, page().encode(), "text/html; charset=utf-8")


class _Outputs:
    """Which outputs are wanted as binary data, by their names, and those of whom that is not said."""

    def __init__(self) -> None:
        self.default = False
        self.binary: dict[str, bool | None] = {}

    def __contains__(self, name: str) -> bool:
        binary = self.binary.get(name)
        return self.default if binary is None else binary


def plain(message: Message) -> dict[str, Any]:
    """What JSON takes, with all fields but messages and choices that are not set. Integers stay such."""
    told: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        entry = field.message_type
        if entry and entry.GetOptions().map_entry:
            inner = entry.fields_by_name["value"].message_type
            told[field.name] = {k: plain(each) if inner else each for k, each in value.items()}
        elif field.is_repeated:
            told[field.name] = [_plain(field, each) for each in value]
        elif not field.has_presence or message.HasField(field.name):
            told[field.name] = _plain(field, value)
    return told


def _plain(field: Any, value: Any) -> Any:
    if field.message_type:
        return plain(value)
    return field.enum_type.values_by_number[value].name if field.enum_type else value


def _json(told: Any, status: int = 200) -> Reply:
    return Reply(status, msgspec.json.encode(told))


def _whether(what: str, holds: bool, **told: str) -> Reply:
    """A status that load balancers understand, too."""
    return _json({**told, what: holds}, 200 if holds else 503)


def _parsed(kind: type[Any], body: bytes) -> Any:
    """Raises InvalidRequest."""
    if body.count(b":") > _MAX_FIELDS:
        raise InvalidRequest(f"the JSON has more than {_MAX_FIELDS} fields")
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body: JSON that deep is not read") from None


def _text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:  # half of a pair of surrogates
        raise InvalidRequest(f"{name!r} is no Unicode text") from None
    return value


def _taken(parameters: Parameters, name: str, kind: type[Any], default: Any) -> Any:
    """A parameter that is HTTP's own, which the call does not get."""
    value = parameters.pop(name, default)
    if value is not default and type(value) is not kind:
        raise InvalidRequest(f"parameter {name!r}: expected {kind.__name__}")
    return value


def _set_parameters(parameters: Any, given: Parameters) -> None:
    for name, value in given.items():
        entry = parameters[_text(name, "parameters")]
        if isinstance(value, bool):
            entry.bool_param = value
        elif isinstance(value, str):
            entry.string_param = _text(value, name)
        elif isinstance(value, float):
            entry.double_param = value
        elif -(2**63) <= value < 2**63:
            entry.int64_param = value
        else:
            raise InvalidRequest(f"parameter {name!r}: no 64-bit integer")


def _pixels(name: str, data: bytes) -> Iterator[bytes]:
    """Of a list of values, or of lists of them, however deep: only their order counts."""
    at, end = 0, len(data)
    while at < end:
        to = end if end - at <= _VALUES_BYTES else data.find(b",", at + _VALUES_BYTES)
        to = end if to < 0 else to
        part = data[at:to].translate(None, b"[] \t\r\n")
        try:
            yield bytes(_PIXELS.decode(b"[%b]" % part))
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise InvalidRequest(
                f"input {name!r}: the data of UINT8 are integers from 0 to 255"
            ) from None
        at = to + 1


def _element(name: str, text: str, coding: str) -> bytes:
    if coding != "base64":
        return _text(text, name).encode()
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest(f"input {name!r}: no base64: {error}") from None


def _infer_reply(answer: bytes, asked: _Outputs) -> Reply:
    response = inference_pb2.ModelInferResponse.FromString(answer)
    told: dict[str, Any] = {
        "model_name": response.model_name,
        "model_version": response.model_version,
    }
    if response.id:
        told["id"] = response.id
    if response.parameters:
        told["parameters"] = _parameters(response.parameters)
    told["outputs"] = []
    binary = []
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        entry: dict[str, Any] = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        parameters = _parameters(output.parameters)
        if "shared_memory_region" in parameters:
            # There it is. Of outputs that have parameters perf_analyzer takes the size of their binary
            # data, which this has not; Triton's have none then.
            parameters = {}
        elif output.name in asked:
            parameters["binary_data_size"] = len(raw)
            binary.append(raw)
        elif output.datatype == "BYTES":
            entry["data"] = [str(each, "utf-8", "replace") for each in _elements(raw)]
        else:
            entry["data"] = Raw(_numbers(raw))
        if parameters:
            entry["parameters"] = parameters
        told["outputs"].append(entry)
    head = msgspec.json.encode(told)
    if not binary:
        return Reply(200, head)
    return Reply(
        200,
        b"".join([head, *binary]),
        "application/octet-stream",
        (("inference-header-content-length", str(len(head))),),
    )


def _parameters(parameters: Any) -> Parameters:
    return {
        name: getattr(each, each.WhichOneof("parameter_choice"))
        for name, each in parameters.items()
    }


def _elements(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        yield raw[at + 4 : at + 4 + length]
        at += 4 + length


def _numbers(raw: bytes) -> bytes:
    """FP32 as a list in JSON; each is exactly the double that it is."""
    values = np.frombuffer(raw, "<f4")
    parts = (
        msgspec.json.encode(values[at : at + _VALUES].tolist())[1:-1]
        for at in range(0, len(values), _VALUES)
    )
    return b"[" + b",".join(parts) + b"]"


def _classify_request(query: Mapping[str, str]) -> classifier_pb2.ClassifyRequest:
    if unknown := sorted(query.keys() - {"model", "version", "top_k"}):
        raise InvalidRequest(
            f"no parameter {unknown[0][:50]!r}: there are model, version and top_k"
        )
    message = classifier_pb2.ClassifyRequest(model=_text(query.get("model", ""), "model"))
    version = query.get("version", "")
    if _INTEGER.fullmatch(version):
        message.version = int(version)
    else:
        message.version_label = _text(version, "version")
    top_k = query.get("top_k", "1")
    if not _INTEGER.fullmatch(top_k) or not 1 <= int(top_k) < 2**31:
        raise InvalidRequest(f"top_k: {top_k[:20]!r}; expected an integer of at least 1")
    message.top_k = int(top_k)
    return message


def _classify_reply(answer: bytes, single: bool) -> Reply:
    response = classifier_pb2.ClassifyResponse.FromString(answer)
    results: list[dict[str, Any]] = []
    for each in response.results:
        if each.HasField("error"):
            error = each.error
            if single:
                return refusal(HTTP_STATUS.get(error.code, 500), error.message)
            results.append({"error": error.message})
        else:
            results.append(plain(each.classification))
    return _json(
        {
            "model": response.model,
            "version": response.version,
            "results": results,
            "timings": plain(response.timings),
        }
    )


def _files(kind: str, body: bytes, most: int) -> list[bytes]:
    """The files of a form, in their order. Raises InvalidRequest."""
    boundary = parse_options_header(kind)[1].get(b"boundary")
    if not boundary:
        raise InvalidRequest("content-type: multipart/form-data without a boundary")
    files: list[bytes] = []
    pieces: list[bytes] = []
    field, value = bytearray(), bytearray()
    headers: dict[bytes, bytes] = {}
    ended = False

    def begin() -> None:
        pieces.clear()
        headers.clear()
        if len(files) == most:
            raise InvalidRequest(f"more than {most} images: send several requests")

    def header_end() -> None:
        headers[bytes(field).lower()] = bytes(value)
        field.clear()
        value.clear()

    def part_end() -> None:
        _, options = parse_options_header(headers.get(b"content-disposition", b""))
        if b"filename" not in options:
            name = str(options.get(b"name", b""), "utf-8", "replace")[:50]
            raise InvalidRequest(
                f"form field {name!r} is no file: with curl, -F image=@file; parameters belong into "
                "the query"
            )
        files.append(b"".join(pieces))

    def end() -> None:
        nonlocal ended
        ended = True

    callbacks: MultipartCallbacks = {
        "on_part_begin": begin,
        "on_part_data": lambda data, start, stop: pieces.append(data[start:stop]),
        "on_part_end": part_end,
        "on_header_field": lambda data, start, stop: field.extend(data[start:stop]),
        "on_header_value": lambda data, start, stop: value.extend(data[start:stop]),
        "on_header_end": header_end,
        "on_end": end,
    }
    try:
        MultipartParser(boundary, callbacks).write(body)
    except FormParserError as error:
        raise InvalidRequest(f"the form: {error}") from None
    if not ended:
        raise InvalidRequest("the form does not end with its boundary")
    return files


def _routes() -> Iterator[Route]:
    yield Route(
        "POST",
        "/v1/classify",
        Rest.classify,
        "Labels of an image, or of several",
        "images",
        "labels",
    )
    yield Route("GET", "/v2/health/live", Rest.live, "Whether the process lives", "", "whether")
    yield Route(
        "GET", "/v2/health/ready", Rest.ready, "Whether requests should be sent here", "", "whether"
    )
    yield Route("GET", "/v2", Rest.metadata, "Name, version and extensions of the server")
    yield Route("GET", "/v2/models/stats", Rest.statistics, "What each version has done")
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        yield Route("GET", model, Rest.model_metadata, "Inputs and outputs of a model")
        yield Route(
            "GET", f"{model}/ready", Rest.model_ready, "Whether a model answers", "", "whether"
        )
        yield Route("GET", f"{model}/config", Rest.model_config, "How a model is served")
        yield Route("GET", f"{model}/stats", Rest.statistics, "What a model has done")
        yield Route(
            "POST", f"{model}/infer", Rest.infer, "Outputs for inputs", "tensors", "tensors"
        )
    repository = "/v2/repository"
    yield Route("POST", f"{repository}/index", Rest.index, "Which versions there are", "index")
    yield Route(
        "POST", f"{repository}/models/{{model}}/load", Rest.load, "Load a model", "parameters"
    )
    yield Route(
        "POST", f"{repository}/models/{{model}}/unload", Rest.unload, "Unload a model", "parameters"
    )
    for memory in ("/v2/systemsharedmemory", "/v2/systemsharedmemory/region/{region}"):
        yield Route("GET", f"{memory}/status", Rest.memory_status, "Registered shared memory")
        yield Route("POST", f"{memory}/unregister", Rest.memory_unregister, "Forget shared memory")
    yield Route(
        "POST", f"{memory}/register", Rest.memory_register, "Register shared memory", "region"
    )
    for memory in ("/v2/cudasharedmemory", "/v2/cudasharedmemory/region/{region}"):
        yield Route("POST", f"{memory}/unregister", Rest.card_memory_unregister, "Does nothing")
    yield Route("GET", "/openapi.json", Rest.openapi, "This description, as OpenAPI")
    yield Route("GET", "/docs", Rest.page, "This description, for people", "", "page")


def _pattern(path: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(path)))


ROUTES = tuple(_routes())
_PATTERNS = [(route, _pattern(route.path)) for route in ROUTES]


def _object(properties: Mapping[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_TEXT, _NUMBER, _WHOLE, _FLAG = ({"type": t} for t in ("string", "number", "integer", "boolean"))
_FILE = {"type": "string", "format": "binary"}
_ANYTHING = {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}
_TENSOR = _object(
    {
        "name": _TEXT,
        "datatype": {"type": "string", "enum": ["UINT8", "BYTES", "FP32"]},
        "shape": _list(_WHOLE),
        "data": {"type": "array", "items": {}},
        "parameters": _ANYTHING,
    },
    "name",
    "datatype",
    "shape",
)
_LABEL = _object({"index": _WHOLE, "name": _TEXT, "probability": _NUMBER})
_SCHEMAS: dict[str, Any] = {
    "error": _object({"error": _TEXT}, "error"),
    "whether": {"type": "object", "additionalProperties": {"type": ["boolean", "string"]}},
    "index": _object({"ready": _FLAG}),
    "parameters": _object({"parameters": _ANYTHING}),
    "region": _object({"key": _TEXT, "offset": _WHOLE, "byte_size": _WHOLE}, "key", "byte_size"),
    "request": _object(
        {
            "id": _TEXT,
            "parameters": _ANYTHING,
            "inputs": _list(_TENSOR),
            "outputs": _list(_object({"name": _TEXT, "parameters": _ANYTHING}, "name")),
        },
        "inputs",
    ),
    "answer": _object(
        {
            "model_name": _TEXT,
            "model_version": _TEXT,
            "id": _TEXT,
            "parameters": _ANYTHING,
            "outputs": _list(_TENSOR),
        },
        "model_name",
        "outputs",
    ),
    "labels": _object(
        {
            "model": _TEXT,
            "version": _WHOLE,
            "results": _list(
                {
                    "oneOf": [
                        _object({"labels": _list(_LABEL), "unsure": _FLAG}, "labels"),
                        _object({"error": _TEXT}, "error"),
                    ]
                }
            ),
            "timings": _ANYTHING,
        },
        "model",
        "version",
        "results",
    ),
}
_FORM = _object({"image": _list(_FILE)}, "image")
_HEADERS = {
    HEADER_LENGTH: (_WHOLE, "Length of the JSON, where binary data follow it"),
    "grpc-timeout": (_TEXT, "By when the answer is of use, as gRPC writes it: 500m, 2S"),
    "x-convoy-key": (_TEXT, "Requests of one key go to the same version"),
}
_QUERY = {
    "model": (_TEXT, "May be left out where there is one"),
    "version": (_TEXT, "A number, or a label such as stable"),
    "top_k": ({"type": "integer", "minimum": 1, "default": 1}, "How many labels an image"),
}
_REFUSALS = {
    "400": "The request is wrong: the text says what to change",
    "403": "This server takes no orders: --allow-repository-control",
    "404": "No such model, version or path",
    "408": "The body did not come",
    "413": "The body is too large",
    "415": "A body of a kind that is not taken",
    "429": f"Too much is waiting: {BACK_OFF}",
    "500": "A fault of the service; its log says more",
    "501": "Not offered here",
    "503": "Starting, draining, or without a working version: retry elsewhere",
    "504": "The time that the request allowed is over",
}


def _schema(name: str) -> dict[str, Any]:
    return {"schema": {"$ref": f"#/components/schemas/{name}"}}


def _bodies(name: str, answer: bool) -> dict[str, Any]:
    """What goes in, or comes out, by its content type."""
    if name == "images":
        binary = {"schema": _FILE}
        return {
            "image/*": binary,
            "application/octet-stream": binary,
            "multipart/form-data": {"schema": _FORM},
        }
    if name == "tensors":
        return {
            "application/json": _schema("answer" if answer else "request"),
            "application/octet-stream": {"schema": _FILE},
        }
    if name == "page":
        return {"text/html": {"schema": _TEXT}}
    return {"application/json": _schema(name) if name else {"schema": {}}}


def description() -> dict[str, Any]:
    """OpenAPI 3.1, made of `ROUTES`."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        given = [
            {"name": name, "in": "path", "required": True, "schema": _TEXT}
            for name in re.findall(r"\{(\w+)\}", route.path)
        ]
        places: dict[str, Mapping[str, Any]] = {
            "header": _HEADERS if route.path.endswith(("/infer", "/classify")) else {},
            "query": _QUERY if route.answer is Rest.classify else {},
        }
        for place, parameters in places.items():
            for name, (schema, words) in parameters.items():
                if name != HEADER_LENGTH or route.answer is Rest.infer:
                    given.append(
                        {"name": name, "in": place, "schema": schema, "description": words}
                    )
        operation: dict[str, Any] = {
            "summary": route.summary,
            "operationId": re.sub(r"\W+", "_", f"{route.verb.lower()}{route.path}").rstrip("_"),
            "parameters": given,
            "responses": {
                "200": {"description": "OK", "content": _bodies(route.gives, answer=True)},
                "default": {"description": "See the statuses", "content": _bodies("error", True)},
            },
        }
        if route.takes:
            operation["requestBody"] = {
                "required": route.takes not in {"index", "parameters"},
                "content": _bodies(route.takes, answer=False),
            }
        paths.setdefault(route.path, {})[route.verb.lower()] = operation
    statuses = "; ".join(f"{status}: {words}" for status, words in _REFUSALS.items())
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Convoy",
            "version": metadata.version("convoy-serving"),
            "description": "Image classification: the Open Inference Protocol's REST form, and "
            f"/v1/classify. What is refused has a JSON body with `error`. {statuses}.",
        },
        "paths": paths,
        "components": {"schemas": _SCHEMAS},
    }


def page() -> str:
    """The same for people, without scripts."""
    rows = "".join(
        f"<tr><td>{route.verb}<td><code>{html.escape(route.path)}</code><td>{route.summary}"
        for route in ROUTES
    )
    statuses = "".join(f"<tr><td>{status}<td>{words}" for status, words in _REFUSALS.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Convoy</title>"
        "<style>body{font:16px sans-serif;margin:2em}td{padding:.2em 1em .2em 0}</style>"
        "<h1>Convoy over HTTP</h1>"
        "<pre>curl --data-binary @image.png 'http://HOST:8000/v1/classify?top_k=3'\n"
        "curl -F image=@a.png -F image=@b.jpg http://HOST:8000/v1/classify</pre>"
        f"<table>{rows}</table><h2>Statuses of what is refused</h2><table>{statuses}</table>"
        "<p>All of it: <a href=/openapi.json>openapi.json</a></html>"
    )
