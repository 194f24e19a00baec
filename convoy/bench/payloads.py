"""The requests that a load is made of, serialised before it begins, and how answers are read."""

import io
import itertools
import re
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convoy.bench.load import Rows, Work
from convoy.bench.settings import BenchSettings
from convoy_protos import classifier_pb2, inference_pb2
from convoy_service.errors import ConvoyError
from convoy_service.settings import IMAGE_SUFFIXES

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_CLASSIFIER = classifier_pb2.DESCRIPTOR.services_by_name["ImageClassifier"].full_name

# Different requests, sent in turn: enough that no cache answers, and few enough to be held.
_REQUESTS = 64
_LEAST_REQUESTS = 8
_BYTES = 64_000_000
_FILES = 1024

_TYPES: dict[str, Any] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32,
    "UINT64": np.uint64, "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64,
    "FP16": np.float16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip

# Whoever is asked alone may have to finish something else before.
_ASK_TIMEOUT_S = 60.0

_Image = bytes | NDArray[Any]


@dataclass(frozen=True)
class Target:
    """A server, and a request that it has answered."""

    server: str
    path: str
    request: bytes

    def wait_until_idle(self) -> None:
        """Waits until the server answers again; after a load, it may still be at what is left of it.

        Raises ConvoyError if it doesn't, for a minute.
        """
        deadline = time.monotonic() + _ASK_TIMEOUT_S
        with _channel(self.server) as channel:
            while True:
                try:
                    _call(channel, self.path)(self.request, timeout=_ASK_TIMEOUT_S)
                    return
                except grpc.RpcError as error:
                    if time.monotonic() > deadline:
                        raise _explain(error, self.server, "after a load") from error
                    time.sleep(0.1)


def prepare(settings: BenchSettings, connections: int) -> tuple[Work, Target, str]:
    """Asks the server what it takes, and makes requests of that. The first is asked once, alone; and
    all are, where answers are to be checked, or files might be no images.

    Returns also what is sent, in words. Raises ConvoyError where there is no server, or none that
    answers these.
    """
    if not re.fullmatch(r"(\[[0-9a-fA-F:.%\w]+\]|[^\[\]:/]+):\d+", settings.server):
        raise ConvoyError(f"--server {settings.server!r}: give HOST:PORT")
    with _channel(settings.server) as channel:
        kind = _Classify if settings.api == "classify" else _Infer
        api = kind(settings, channel)
        images = list(itertools.islice(_images(settings, api), _FILES))
        requests = _requests(api, images, settings)
        ask = _call(channel, f"/{api.service}/{api.method}")
        rows = []
        for request in requests if settings.check or settings.images else requests[:1]:
            try:
                answer = ask(request, timeout=_ASK_TIMEOUT_S)
                rows.append(api.read(answer))
            except grpc.RpcError as error:
                raise _explain(error, settings.server, f"{api.method}") from error
            except ValueError as error:
                raise ConvoyError(
                    f"{settings.server} answers {api.method} with: {error}"
                ) from error
    method, payloads = api.method, requests
    if settings.stream:
        method, payloads = "ClassifyStream", [_Classify.in_stream(each) for each in requests]
    work = Work(
        target=settings.server,
        path=f"/{api.service}/{method}",
        payloads=payloads,
        stream=settings.stream,
        connections=connections,
        truths=rows if settings.check else None,
        read=(_Classify.read_in_stream if settings.stream else api.read)
        if settings.check
        else None,
    )
    sent = f"{method} of {api.model}, {settings.images_per_request} x {api.describe(images[0])}"
    return work, Target(settings.server, f"/{api.service}/{api.method}", requests[0]), sent


def alike(truths: Sequence[Rows]) -> int:
    """How many rows can't be told from another one: mixing those up would not be noticed."""
    rows = np.concatenate(list(truths))
    return len(rows) - len(np.unique(np.round(rows, 2), axis=0))


class _Infer:
    """ModelInfer of the Open Inference Protocol, with raw contents."""

    service, method = _INFERENCE, "ModelInfer"

    def __init__(self, settings: BenchSettings, channel: grpc.Channel) -> None:
        self._name, self._version = settings.model, str(settings.version or "")
        asked = inference_pb2.ModelMetadataRequest(name=self._name, version=self._version)
        try:
            found: Any = channel.unary_unary(
                f"/{_INFERENCE}/ModelMetadata",
                inference_pb2.ModelMetadataRequest.SerializeToString,
                inference_pb2.ModelMetadataResponse.FromString,
            )(asked, timeout=_ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _explain(error, settings.server, "ModelMetadata") from error
        self.model = found.name or self._name
        if len(found.inputs) != 1:
            names = ", ".join(tensor.name for tensor in found.inputs) or "none"
            raise ConvoyError(f"{self.model} has the inputs {names}: one is needed, for images")
        self._input, self._datatype = found.inputs[0].name, found.inputs[0].datatype
        self._shape = tuple(found.inputs[0].shape)

    def pixels(self) -> tuple[tuple[int, ...], str]:
        """Shape and datatype of one image."""
        batch, *shape = self._shape or (0,)
        if batch != -1 or min(shape, default=-1) < 1 or self._datatype not in _TYPES:
            raise ConvoyError(
                f"{self.model} takes {self._datatype} {list(self._shape)}, of which no pixels can be "
                "made: needed are a free first axis, for the images, and no other one that is free; "
                "or send image files (--images) or --jpeg-size, if it takes those"
            )
        return tuple(shape), self._datatype

    def request(self, images: Sequence[_Image]) -> bytes:
        request = inference_pb2.ModelInferRequest(
            model_name=self._name, model_version=self._version
        )
        if isinstance(images[0], bytes):
            # Some want [N, 1]; Convoy takes images under the name of its pixels.
            trailing = self._shape[1:] if self._datatype == "BYTES" else ()
            request.inputs.add(name=self._input, datatype="BYTES", shape=[len(images), *trailing])
            raw = b"".join(struct.pack("<I", len(image)) + bytes(image) for image in images)
        else:
            pixels = np.stack([np.asarray(image) for image in images])
            request.inputs.add(name=self._input, datatype=self._datatype, shape=pixels.shape)
            raw = pixels.tobytes()
        request.raw_input_contents.append(raw)
        return request.SerializeToString()

    @staticmethod
    def describe(image: _Image) -> str:
        if isinstance(image, bytes):
            return f"an encoded image ({len(image) / 1000:.1f} kB)"
        return f"{'x'.join(map(str, image.shape))} {image.dtype}"

    @staticmethod
    def read(message: bytes) -> Rows:
        """The first output, a row an image. Raises ValueError."""
        try:
            response = inference_pb2.ModelInferResponse.FromString(message)
            output = response.outputs[0]
            if response.raw_output_contents:
                kind = np.dtype(_TYPES[output.datatype]).newbyteorder("<")
                values = np.frombuffer(response.raw_output_contents[0], kind)
            else:
                values = np.array(output.contents.fp32_contents)
            return values.astype(np.float32).reshape(output.shape[0], -1)
        # Whatever an answer holds that should not be there.
        except Exception as error:
            raise ValueError(f"no tensor ({type(error).__name__}: {error})") from error


class _Classify:
    """Classify of Convoy's own API."""

    service, method = _CLASSIFIER, "Classify"
    describe = staticmethod(_Infer.describe)

    def __init__(self, settings: BenchSettings, channel: grpc.Channel) -> None:
        try:
            found: Any = channel.unary_unary(
                f"/{_CLASSIFIER}/ListModels",
                classifier_pb2.ListModelsRequest.SerializeToString,
                classifier_pb2.ListModelsResponse.FromString,
            )(classifier_pb2.ListModelsRequest(), timeout=_ASK_TIMEOUT_S)
        except grpc.RpcError as error:
            raise _explain(error, settings.server, "ListModels") from error
        models = {model.name: model for model in found.models}
        name = settings.model or (next(iter(models)) if len(models) == 1 else "")
        if name not in models:
            wrong = f"no model {name!r}" if name else "--model is needed"
            raise ConvoyError(f"{wrong}: {settings.server} has {', '.join(sorted(models))}")
        self._model, self.model = models[name], name
        self._version = settings.version
        # To check an answer is to check all of it.
        self._top_k = len(self._model.labels) if settings.check else 1

    def pixels(self) -> tuple[tuple[int, ...], str]:
        return (self._model.height, self._model.width, self._model.channels), "UINT8"

    def request(self, images: Sequence[_Image]) -> bytes:
        return classifier_pb2.ClassifyRequest(
            model=self.model,
            version=self._version,
            images=[self._image(image) for image in images],
            top_k=self._top_k,
        ).SerializeToString()

    @staticmethod
    def _image(image: _Image) -> classifier_pb2.Image:
        if isinstance(image, bytes):
            return classifier_pb2.Image(encoded=image)
        height, width, channels = image.shape
        return classifier_pb2.Image(
            pixels=classifier_pb2.Pixels(
                data=image.tobytes(), height=height, width=width, channels=channels
            )
        )

    @staticmethod
    def in_stream(request: bytes) -> bytes:
        """The request as a ClassifyStreamRequest without an id."""
        message = classifier_pb2.ClassifyStreamRequest()
        message.request.ParseFromString(request)
        return message.SerializeToString()

    @staticmethod
    def read(message: bytes) -> Rows:
        """The probabilities of an answer that has them all, a row an image. Raises ValueError."""
        return _probabilities(classifier_pb2.ClassifyResponse.FromString(message))

    @staticmethod
    def read_in_stream(message: bytes) -> Rows:
        return _probabilities(classifier_pb2.ClassifyStreamResponse.FromString(message).response)


def _probabilities(response: classifier_pb2.ClassifyResponse) -> Rows:
    for number, result in enumerate(response.results):
        if result.HasField("error"):
            raise ValueError(f"image {number}: {result.error.message}")
    labels = [result.classification.labels for result in response.results]
    width = 1 + max((label.index for each in labels for label in each), default=0)
    rows = np.zeros((len(labels), width), np.float32)
    for row, each in zip(rows, labels, strict=True):
        for label in each:
            row[label.index] = label.probability
    return rows


def _requests(
    api: _Infer | _Classify, images: Sequence[_Image], settings: BenchSettings
) -> list[bytes]:
    each = settings.images_per_request
    count = -(-len(images) // each) if settings.images else _REQUESTS
    turn = itertools.cycle(images)
    made: list[bytes] = []
    size = 0
    while len(made) < count and (size < _BYTES or len(made) < _LEAST_REQUESTS):
        made.append(api.request(list(itertools.islice(turn, each))))
        size += len(made[-1])
    return made


def _images(settings: BenchSettings, api: _Infer | _Classify) -> Iterator[_Image]:
    """What is sent, each different."""
    if settings.images:
        yield from (file.read_bytes() for file in _files(settings.images))
        return
    random = np.random.default_rng(settings.seed)
    if settings.jpeg_size:
        size = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", settings.jpeg_size)
        if not size:
            raise ConvoyError(
                f"--jpeg-size {settings.jpeg_size!r}: give width and height, such as 500x375"
            )
        for _ in range(_REQUESTS):
            yield random_jpeg(random, int(size[1]), int(size[2]))
        return
    shape, datatype = api.pixels()
    kind = np.dtype(_TYPES[datatype])
    size_of_all = int(np.prod(shape)) * kind.itemsize * settings.images_per_request
    for _ in range(
        max(_LEAST_REQUESTS, min(_REQUESTS, _BYTES // size_of_all)) * settings.images_per_request
    ):
        if kind.kind == "f":
            yield random.random(shape).astype(kind)
        else:
            yield random.integers(
                0, 2 if kind.kind == "b" else 128 if kind == np.int8 else 256, shape
            ).astype(kind)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file())
    if not files:
        raise ConvoyError(f"--images {path}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def random_jpeg(random: np.random.Generator, width: int, height: int) -> bytes:
    """A picture with shapes of every size, as photographs have: noise would take far longer to decode."""
    pixels = np.zeros((height, width, 3))
    for cells, share in ((4, 0.35), (16, 0.3), (64, 0.2), (256, 0.15)):
        noise = random.integers(0, 256, (cells, cells, 3), np.uint8)
        pixels += share * np.asarray(
            Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        )
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=92)
    return file.getvalue()


def _call(channel: grpc.Channel, path: str) -> Any:
    """A method that takes and gives bytes."""
    return channel.unary_unary(path)


def _channel(server: str) -> grpc.Channel:
    return grpc.insecure_channel(
        server,
        [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
    )


def _explain(error: Any, server: str, what: str) -> ConvoyError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        return ConvoyError(
            f"no server answers at {server}: start one with `convoy serve` ({details})"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return ConvoyError(
            f"the server at {server} has no {what}: --api infer needs the Open Inference Protocol, "
            f"--api classify a Convoy server ({details})"
        )
    hint = "; is --model right?" if code is grpc.StatusCode.NOT_FOUND else ""
    return ConvoyError(f"{server} answers {what} with {code.name}: {details}{hint}")
