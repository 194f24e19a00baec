"""Images in, labels out: the Python client of convoy.v1.ImageClassifier. Needs grpcio only."""

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import grpc

from convoy_protos import classifier_pb2 as pb
from convoy_protos.classifier_pb2_grpc import ImageClassifierStub

DEFAULT_TARGET = "localhost:8001"

# One call of `classify_many` carries at most this much; so many calls are under way at once.
_CALL_IMAGES = 64
_CALL_BYTES = 8_000_000
_CALLS = 4

_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A call that is larger than this is not tried again; gRPC's own would be 256 KiB.
    ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),
    # gRPC's own would leave calls failing for minutes after a server is back; with these, the
    # retries below reach it.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    (
        "grpc.service_config",
        json.dumps(
            {
                "loadBalancingConfig": [{"round_robin": {}}],
                "methodConfig": [
                    {
                        "name": [{"service": "convoy.v1.ImageClassifier"}],
                        # The server says with RESOURCE_EXHAUSTED how long to wait. gRPC answers
                        # CANCELLED to calls that arrive in the moment that a server stops.
                        "retryPolicy": {
                            "maxAttempts": 4,
                            "initialBackoff": "0.1s",
                            "maxBackoff": "1s",
                            "backoffMultiplier": 2,
                            "retryableStatusCodes": [
                                "UNAVAILABLE",
                                "RESOURCE_EXHAUSTED",
                                "CANCELLED",
                            ],
                        },
                    }
                ],
            }
        ),
    ),
]


class _Array(Protocol):
    @property
    def __array_interface__(self) -> dict[str, Any]: ...
    def tobytes(self) -> bytes: ...


# A path, the bytes of an image file, or uint8 pixels [H, W] or [H, W, 1 | 3 | 4] (numpy, Pillow).
ImageLike = str | os.PathLike[str] | bytes | _Array


class ClassifierError(Exception):
    """A call or an image that failed. `code` is the gRPC status code's name."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Label:
    """A class: its position in the model's output, its name, its probability (0 to 1)."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What one image was taken for: `labels`, the most probable first; or why it failed. `unsure`
    where the probability is below what the version asks of a sure answer.
    """

    labels: tuple[Label, ...]
    model: str = ""
    version: int = 0
    error: ClassifierError | None = None
    unsure: bool = False

    @property
    def label(self) -> str:
        """The most probable label. Raises ClassifierError where the image failed."""
        return self._first().name

    @property
    def probability(self) -> float:
        """Of the most probable label. Raises ClassifierError where the image failed."""
        return self._first().probability

    def _first(self) -> Label:
        if self.error:
            raise self.error
        return self.labels[0]


class Classifier:
    """A connection to a Convoy server. May be shared by threads; close it, or use `with`.

    >>> with Classifier("localhost:8001") as classifier:
    ...     prediction = classifier.classify("three.png")
    ...     for each in classifier.classify_many(["three.png", "seven.png"], top_k=2):
    ...         print(each.label)
    3
    7
    >>> prediction.label
    '3'
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        model: str = "",
        version: int | str = 0,
        key: str = "",
        timeout_s: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        """`model` may be empty where the server has one only; `version` is a number or a label such as
        "stable", and 0 whichever the server chooses; where it chooses between two by share, all
        requests of one `key` go to the same; `timeout_s` is each call's deadline; `credentials`, such
        as those that `grpc.ssl_channel_credentials` makes, are for a server with TLS. Raises
        ValueError for a version that can't be; so do the calls for such a `top_k`.
        """
        self._asked = _asked(model, version, key)
        self._target, self._timeout_s = target, timeout_s
        if credentials:
            self._channel = grpc.secure_channel(target, credentials, options=_OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._stub = ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]

    def classify(self, image: ImageLike, top_k: int = 1) -> Prediction:
        """The `top_k` most probable labels of one image. Raises ClassifierError."""
        prediction = next(self.classify_many([image], top_k))
        if prediction.error:
            raise prediction.error
        return prediction

    def classify_many(self, images: Iterable[ImageLike], top_k: int = 1) -> Iterator[Prediction]:
        """One prediction for each image, in order, as answers come; a few calls are under way.

        An image that fails has its `error` set. Raises ClassifierError where a whole call fails.
        """
        _check("top_k", top_k, 1, 2**31)
        calls: deque[tuple[_Chunk, Any]] = deque()
        try:
            for chunk in _chunks(images):
                future = None
                if chunk.images:
                    request = chunk.request(self._asked, top_k)
                    future = self._stub.Classify.future(request, timeout=self._timeout_s)
                calls.append((chunk, future))
                if len(calls) == _CALLS:
                    yield from self._finish(*calls.popleft())
            while calls:
                yield from self._finish(*calls.popleft())
        finally:
            for _, future in calls:
                if future:
                    future.cancel()

    def _finish(self, chunk: "_Chunk", future: Any) -> list[Prediction]:
        try:
            return chunk.predictions(future.result() if future else pb.ClassifyResponse())
        except grpc.RpcError as error:
            return chunk.refused(explain(error, self._target))

    def models(self) -> list[pb.Model]:
        """What the server serves: messages convoy.v1.Model. Raises ClassifierError."""
        try:
            response: pb.ListModelsResponse = self._stub.ListModels(
                pb.ListModelsRequest(), timeout=self._timeout_s
            )
        except grpc.RpcError as error:
            raise explain(error, self._target) from error
        return list(response.models)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncClassifier:
    """`Classifier` for asyncio: the same methods, to be awaited.

    >>> async def main():
    ...     async with AsyncClassifier("localhost:8001") as classifier:
    ...         return (await classifier.classify("three.png")).label
    >>> asyncio.run(main())
    '3'
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        model: str = "",
        version: int | str = 0,
        key: str = "",
        timeout_s: float = 30.0,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._asked = _asked(model, version, key)
        self._target, self._timeout_s = target, timeout_s
        if credentials:
            self._channel = grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)
        self._stub = ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]

    async def classify(self, image: ImageLike, top_k: int = 1) -> Prediction:
        """The `top_k` most probable labels of one image. Raises ClassifierError."""
        async for prediction in self.classify_many([image], top_k):
            if prediction.error:
                raise prediction.error
            return prediction
        raise AssertionError("one image has one prediction")

    async def classify_many(
        self, images: Iterable[ImageLike], top_k: int = 1
    ) -> AsyncIterator[Prediction]:
        """One prediction for each image, in order; see `Classifier.classify_many`."""
        _check("top_k", top_k, 1, 2**31)
        calls: deque[asyncio.Task[list[Prediction]]] = deque()
        try:
            for chunk in _chunks(images):
                calls.append(asyncio.create_task(self._call(chunk, top_k)))
                if len(calls) == _CALLS:
                    for prediction in await calls.popleft():
                        yield prediction
            while calls:
                for prediction in await calls.popleft():
                    yield prediction
        finally:
            for call in calls:
                call.cancel()

    async def _call(self, chunk: "_Chunk", top_k: int) -> list[Prediction]:
        if not chunk.images:
            return chunk.predictions(pb.ClassifyResponse())
        try:
            response = await self._stub.Classify(
                chunk.request(self._asked, top_k), timeout=self._timeout_s
            )
        except grpc.RpcError as error:
            return chunk.refused(explain(error, self._target))
        return chunk.predictions(response)

    async def models(self) -> list[pb.Model]:
        """What the server serves; see `Classifier.models`."""
        try:
            response: pb.ListModelsResponse = await self._stub.ListModels(
                pb.ListModelsRequest(), timeout=self._timeout_s
            )
        except grpc.RpcError as error:
            raise explain(error, self._target) from error
        return list(response.models)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()


class _Chunk:
    """Images that travel in one call, and those beside them that could not even be read."""

    def __init__(self) -> None:
        self.images: list[pb.Image] = []
        self.bytes = 0
        self._unreadable: dict[int, ClassifierError] = {}

    def add(self, image: pb.Image | ClassifierError) -> None:
        if isinstance(image, ClassifierError):
            self._unreadable[len(self)] = image
        else:
            self.images.append(image)
            self.bytes += image.ByteSize()

    def __len__(self) -> int:
        return len(self.images) + len(self._unreadable)

    def full(self) -> bool:
        return len(self) >= _CALL_IMAGES or self.bytes >= _CALL_BYTES

    def request(self, asked: pb.ClassifyRequest, top_k: int) -> pb.ClassifyRequest:
        request = pb.ClassifyRequest(images=self.images, top_k=top_k)
        request.MergeFrom(asked)
        return request

    def refused(self, error: ClassifierError) -> list[Prediction]:
        """The predictions where the call failed. Raises `error`, unless the one image that the call
        was made for is to blame: it is too large for any call.
        """
        if len(self) == 1 and error.code == "INVALID_ARGUMENT":
            return [Prediction((), error=error)]
        raise error

    def predictions(self, response: pb.ClassifyResponse) -> list[Prediction]:
        results = iter(response.results)
        made = []
        for position in range(len(self)):
            error = self._unreadable.get(position)
            labels: tuple[Label, ...] = ()
            unsure = False
            if not error:
                result = next(results)
                if result.HasField("error"):
                    code = next(c.name for c in grpc.StatusCode if c.value[0] == result.error.code)
                    error = ClassifierError(code, result.error.message)
                labels = tuple(
                    Label(label.index, label.name, label.probability)
                    for label in result.classification.labels
                )
                unsure = result.classification.unsure
            made.append(Prediction(labels, response.model, response.version, error, unsure))
        return made


def _chunks(images: Iterable[ImageLike]) -> Iterator[_Chunk]:
    chunk = _Chunk()
    for image in images:
        message = _message(image)
        # So large an image travels alone: if the server refuses it, no other is refused with it.
        if len(chunk) and isinstance(message, pb.Image) and message.ByteSize() > _CALL_BYTES:
            yield chunk
            chunk = _Chunk()
        chunk.add(message)
        if chunk.full():
            yield chunk
            chunk = _Chunk()
    if len(chunk):
        yield chunk


def _asked(model: str, version: int | str, key: str) -> pb.ClassifyRequest:
    """What all requests of a client say. Raises ValueError."""
    if isinstance(version, str):
        return pb.ClassifyRequest(model=model, version_label=version, key=key)
    _check("version", version, 0, 2**63)
    return pb.ClassifyRequest(model=model, version=version, key=key)


def _check(name: str, value: int, least: int, limit: int) -> None:
    if not least <= value < limit:
        raise ValueError(f"{name} is {value}: it must be at least {least}, and less than {limit}")


def _message(image: ImageLike) -> pb.Image | ClassifierError:
    """What travels for `image`, or why it can't."""
    if isinstance(image, bytes):
        return pb.Image(encoded=image)
    if isinstance(image, (str, os.PathLike)):
        try:
            return pb.Image(encoded=Path(image).read_bytes())
        except OSError as error:
            return ClassifierError("INVALID_ARGUMENT", str(error))
    interface = image.__array_interface__
    shape = tuple(interface["shape"])
    shape += (1,) * (3 - len(shape))
    # A Pillow image with a palette looks like grey pixels, but its values are colour numbers.
    mode = getattr(image, "mode", "RGB")
    if interface["typestr"] != "|u1" or len(shape) != 3 or mode not in ("L", "RGB", "RGBA"):
        return ClassifierError(
            "INVALID_ARGUMENT",
            "pixels must be uint8 [height, width] or [height, width, channels], "
            f"not {interface['typestr']} {shape} ({mode})",
        )
    height, width, channels = shape
    return pb.Image(
        pixels=pb.Pixels(data=image.tobytes(), height=height, width=width, channels=channels)
    )


def explain(error: Any, target: str) -> ClassifierError:
    """What a user is told of an `error` that a call to `target` raised."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "connect" in details.lower():
        details = f"no server answers at {target}: start one with `convoy serve` ({details})"
    return ClassifierError(code.name, details)
