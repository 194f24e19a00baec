"""What every client is asked to do: the rows of the matrix, whatever the client and its wire.

Runs in the environments of the clients, of which it needs NumPy alone. A client is a `Client`, which
says what it has no way to do with `NotApplicable`.
"""

import io
import json
import re
import struct
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import shared_memory
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not applicable"
Array: TypeAlias = "np.ndarray[Any, Any]"

# Generous: it only decides how long what hangs takes to fail.
TIMEOUT_S = 60.0

# What tests/conformance/servers.py serves.
COLOURS = ("red", "green", "blue")
COLOURS_BATCH = 8
LARGE_SHAPE = (1000, 1000, 3)
SLOW = np.array([[[[1], [0]], [[0], [0]]]], np.uint8)

# https://github.com/triton-inference-server/server, http_server.cc; below them what Triton has not.
HTTP = {
    "INVALID_ARGUMENT": ("400",),
    "ALREADY_EXISTS": ("400", "409"),
    "NOT_FOUND": ("404",),
    "UNIMPLEMENTED": ("404", "501"),
    "INTERNAL": ("500",),
    "UNAVAILABLE": ("503",),
    "PERMISSION_DENIED": ("403",),
    "RESOURCE_EXHAUSTED": ("429",),
    "DEADLINE_EXCEEDED": ("504",),
    "TOO_LARGE": ("413",),
}


class NotApplicable(Exception):
    """The client has no such call, or no way to send that; says why."""


class Refused(Exception):
    """The server's answer, as the client tells it: gRPC's status or HTTP's; none in a stream."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status or 'an error in a stream'}: {message}")
        self.status, self.message = status.removeprefix("StatusCode."), message


class Region(NamedTuple):
    """A part of a registered region of shared memory."""

    name: str
    size: int
    offset: int = 0


@dataclass(frozen=True)
class Tensor:
    """`data` as NumPy has it (BYTES: an array of bytes objects), sent raw or typed; `shape` is what
    the request says, where that is not the data's.
    """

    name: str
    data: Array
    datatype: str = "UINT8"
    shape: tuple[int, ...] | None = None
    raw: bool = True
    region: Region | None = None

    @property
    def said(self) -> list[int]:
        return list(self.data.shape if self.shape is None else self.shape)


@dataclass(frozen=True)
class Output:
    name: str
    classes: int = 0
    region: Region | None = None
    raw: bool = True
    parameters: Mapping[str, bool | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    model: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Output] = ()
    version: str = ""
    id: str = ""
    priority: int = 0
    timeout_us: int | None = None
    parameters: Mapping[str, bool | int | str] = field(default_factory=dict)
    deadline_s: float = TIMEOUT_S
    final_response: bool = False


@dataclass
class Answer:
    model: str
    version: str
    id: str
    datatypes: dict[str, str]
    outputs: dict[str, Array]
    parameters: dict[str, Any] = field(default_factory=dict)


def _missing(what: str) -> Any:
    def absent(self: "Client", *arguments: Any, **named: Any) -> Any:
        raise NotApplicable(self.lacks or f"it has no call for {what}")

    return absent


class Client:
    """One client, connected to one server. What a subclass does not define, the client has not."""

    # Why most calls are missing.
    lacks: ClassVar[str] = ""
    http: ClassVar[bool] = False

    live = _missing("liveness")
    ready = _missing("readiness")
    model_ready = _missing("a model's readiness")
    server = _missing("the server's metadata")
    model = _missing("a model's metadata")
    config = _missing("a model's configuration")
    statistics = _missing("statistics")
    index = _missing("the repository's index")
    load = _missing("loading models")
    unload = _missing("unloading models")
    register = _missing("shared memory")
    regions = _missing("shared memory")
    unregister = _missing("shared memory")
    unoffered = _missing("traces, logs and CUDA's shared memory")
    infer = _missing("inference")
    cancel = _missing("cancellation")
    stream = _missing("streams")

    def beside_convoy(self, file: bytes) -> tuple[list[float], list[float]]:
        """The scores of an image file by this client, and by Convoy's in the same process."""
        raise NotApplicable("it does not run in a process of Python")

    def load_test(self) -> None:
        raise NotApplicable("it is no load generator")

    def close(self) -> None:
        """Ends its connections."""


@dataclass(frozen=True)
class Place:
    """The clients of one column: of a server as it is by default, and of one with
    `--allow-repository-control --allow-shared-memory`; and where the first tells its metrics.
    """

    closed: Client
    opened: Client
    metrics: str


class Row(NamedTuple):
    name: str
    says: str
    check: Callable[[Place], None]
    slow: bool


ROWS: list[Row] = []


def row(says: str, *, slow: bool = False) -> Callable[[Callable[[Place], None]], None]:
    def add(check: Callable[[Place], None]) -> None:
        ROWS.append(Row(check.__name__, says, check, slow))

    return add


def noise(count: int, shape: tuple[int, ...] = (4, 4, 3)) -> Array:
    """Images that all differ. No byte is over 127, so that a BMP file of them is valid UTF-8."""
    random = np.random.default_rng(count)
    base = random.integers(0, 96, (count, 1, 1, shape[-1]))
    return (base + random.integers(0, 32, (count, *shape))).astype(np.uint8)


def bmp(pixels: Array) -> bytes:
    """An image file of RGB pixels `[4, 4, 3]`."""
    height, width, _ = pixels.shape
    body = pixels[::-1, :, ::-1].tobytes()
    return (
        struct.pack(
            "<2sIHHIIiiHHIIiiII",
            b"BM", 54 + len(body), 0, 0, 54, 40, width, height, 1, 24, 0, len(body), 0, 0, 0, 0,
        )
        + body
    )  # fmt: skip


def files(pixels: Array) -> Array:
    found = np.empty(len(pixels), np.object_)
    found[:] = [bmp(image) for image in pixels]
    return found


def expected(pixels: Array) -> Array:
    """What `colours` must answer."""
    scores = np.exp(pixels.astype(np.float64).mean((1, 2)) / 51)
    return np.asarray(scores / scores.sum(axis=1, keepdims=True), np.float32)


def colours(pixels: Array, **said: Any) -> Request:
    return Request("colours", [Tensor("image", pixels)], **said)


def same(answer: Answer, pixels: Array, within: float = 1e-5) -> None:
    assert answer.datatypes == {"scores": "FP32"}, answer.datatypes
    got = answer.outputs["scores"]
    assert got.shape == (len(pixels), 3), f"the answer has shape {got.shape}"
    wrong = np.abs(got.astype(np.float64) - expected(pixels)).max()
    assert wrong < within, f"the answer is off by {wrong}"


@contextmanager
def refused(client: Client, *statuses: str) -> Iterator[list[Refused]]:
    """What is in it must be refused with one of gRPC's statuses, or HTTP's number for it."""
    told: list[Refused] = []
    try:
        yield told
    except Refused as error:
        told.append(error)
    wanted = statuses
    if client.http:
        wanted = tuple(code for status in statuses for code in HTTP[status])
    expected = " or ".join(wanted)
    assert told, f"it was not refused: expected {expected}"
    # An error in a stream has words alone, and so has a client that gave up.
    assert not told[0].status or told[0].status in wanted, f"{told[0]}; expected {expected}"
    assert told[0].message, "the error says nothing"


@row("Server live, server ready")
def health(place: Place) -> None:
    assert place.closed.live() is True
    assert place.closed.ready() is True


@row("Server metadata: name, version, and only extensions that work there")
def server_metadata(place: Place) -> None:
    closed, opened = place.closed.server(), place.opened.server()
    assert closed["name"] == "convoy"
    assert closed["version"]
    always = {"classification", "model_configuration", "statistics"}
    more = {"model_repository", "system_shared_memory"}
    assert always <= set(closed["extensions"]), closed["extensions"]
    assert not more & set(closed["extensions"]), closed["extensions"]
    assert always | more <= set(opened["extensions"]), opened["extensions"]
    nowhere = {"cuda_shared_memory", "sequence", "trace", "logging"}
    assert not nowhere & {*closed["extensions"], *opened["extensions"]}


@row("Model ready, by name")
def model_ready(place: Place) -> None:
    assert place.closed.model_ready("colours") is True


@row("Model ready, by name and version")
def version_ready(place: Place) -> None:
    assert place.closed.model_ready("colours", "1") is True


@row("Model metadata: tensors with the batch axis as -1")
def model_metadata(place: Place) -> None:
    said = place.closed.model("colours")
    assert (said["name"], said["versions"]) == ("colours", ["1"])
    assert said["platform"] == "onnxruntime_onnx"
    (source,), (sink,) = said["inputs"], said["outputs"]
    assert (source["name"], source["datatype"]) == ("image", "UINT8")
    assert list(map(int, source["shape"])) == [-1, 4, 4, 3]
    assert (sink["name"], sink["datatype"]) == ("scores", "FP32")
    assert list(map(int, sink["shape"])) == [-1, 3]


@row("Model configuration: max_batch_size, dims without the batch axis, dynamic batching")
def configuration(place: Place) -> None:
    said = place.closed.config("colours")
    assert said["name"] == "colours"
    assert int(said["max_batch_size"]) == COLOURS_BATCH
    (source,), (sink,) = said["input"], said["output"]
    assert (source["name"], source["data_type"]) == ("image", "TYPE_UINT8")
    assert list(map(int, source["dims"])) == [4, 4, 3]
    assert (sink["name"], sink["data_type"], list(map(int, sink["dims"]))) == (
        "scores",
        "TYPE_FP32",
        [3],
    )
    assert said.get("dynamic_batching") is not None
    assert "sequence_batching" not in said
    assert "ensemble_scheduling" not in said


@row("Repository index")
def repository_index(place: Place) -> None:
    seen = {(each["name"], str(each["version"]), each["state"]) for each in place.closed.index()}
    assert ("colours", "1", "READY") in seen, seen


@row("UINT8 in, FP32 out, raw (HTTP: binary data)")
def uint8_raw(place: Place) -> None:
    pixels = noise(5)
    same(place.closed.infer(colours(pixels)), pixels)


@row("UINT8 in, FP32 out, typed contents (HTTP: JSON)")
def uint8_typed(place: Place) -> None:
    pixels = noise(5)
    asked = colours(pixels, outputs=[Output("scores", raw=False)])
    same(place.closed.infer(replace(asked, inputs=[Tensor("image", pixels, raw=False)])), pixels)


@row("BYTES in (image files), raw")
def bytes_raw(place: Place) -> None:
    pixels = noise(3)
    same(place.closed.infer(Request("colours", [Tensor("image", files(pixels), "BYTES")])), pixels)


@row("BYTES in, typed contents (HTTP: JSON)")
def bytes_typed(place: Place) -> None:
    pixels = noise(3)
    tensor = Tensor("image", files(pixels), "BYTES", raw=False)
    same(place.closed.infer(Request("colours", [tensor])), pixels)


@row("BYTES of shape [N, 1]")
def bytes_column(place: Place) -> None:
    pixels = noise(3)
    tensor = Tensor("image", files(pixels).reshape(3, 1), "BYTES")
    same(place.closed.infer(Request("colours", [tensor])), pixels)


_OTHERS: dict[str, Any] = {
    "BOOL": np.bool_, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64, "INT8": np.int8,
    "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16, "FP32": np.float32,
    "FP64": np.float64,
}  # fmt: skip


@row("The datatypes that no model here takes: refused")
def other_datatypes(place: Place) -> None:
    for name, kind in _OTHERS.items():
        tensor = Tensor("image", np.zeros((1, 4, 4, 3), kind), name)
        with refused(place.closed, "INVALID_ARGUMENT"):
            place.closed.infer(Request("colours", [tensor]))


@row("A batch of one")
def one(place: Place) -> None:
    pixels = noise(1)
    same(place.closed.infer(colours(pixels)), pixels)


@row("No batch axis: refused")
def no_batch(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(colours(noise(1)[0]))


@row("More images than max_batch_size: split, and put together again")
def many(place: Place) -> None:
    pixels = noise(3 * COLOURS_BATCH + 1)
    same(place.closed.infer(colours(pixels)), pixels)


@row("By version number; the answer says which")
def by_version(place: Place) -> None:
    pixels = noise(2)
    answer = place.closed.infer(colours(pixels, version="1"))
    same(answer, pixels)
    assert (answer.model, answer.version) == ("colours", "1")


@row("The id comes back")
def echo(place: Place) -> None:
    assert place.closed.infer(colours(noise(1), id="number 7")).id == "number 7"


@row("No outputs named: all")
def no_outputs(place: Place) -> None:
    assert list(place.closed.infer(colours(noise(1))).outputs) == ["scores"]


@row("An output named")
def named_output(place: Place) -> None:
    pixels = noise(2)
    same(place.closed.infer(colours(pixels, outputs=[Output("scores")])), pixels)


@row("An unknown output: refused")
def unknown_output(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(colours(noise(1), outputs=[Output("nobody's")]))


@row("priority, timeout, and a parameter of the caller's own")
def parameters(place: Place) -> None:
    pixels = noise(2)
    said = {"priority": 1, "timeout_us": 30_000_000, "parameters": {"mine": "yes"}}
    same(place.closed.infer(colours(pixels, **said)), pixels)


_CLASS = re.compile(rb"(\d+\.\d{6}):(\d+):(.+)")


def _classes(answer: Answer, pixels: Array, classes: int) -> None:
    got, scores = answer.outputs["scores"], expected(pixels)
    assert answer.datatypes["scores"] == "BYTES", answer.datatypes
    assert got.shape == (len(pixels), classes), got.shape
    for line, right in zip(got, scores, strict=True):
        order = np.argsort(-right)[:classes]
        for text, index in zip(line, order, strict=True):
            found = _CLASS.fullmatch(text)
            assert found, text
            assert abs(float(found[1]) - right[index]) < 2e-6, (text, right)
            assert (int(found[2]), found[3].decode()) == (index, COLOURS[index]), text


@row("Classification: `value:index:label`, the best first")
def classification(place: Place) -> None:
    pixels = noise(3)
    _classes(place.closed.infer(colours(pixels, outputs=[Output("scores", classes=2)])), pixels, 2)


@row("Classification of more classes than there are: all")
def classification_all(place: Place) -> None:
    pixels = noise(3)
    _classes(place.closed.infer(colours(pixels, outputs=[Output("scores", classes=99)])), pixels, 3)


@row("Classification, typed contents (HTTP: JSON)")
def classification_typed(place: Place) -> None:
    pixels = noise(3)
    asked = Request(
        "colours",
        [Tensor("image", pixels, raw=False)],
        outputs=[Output("scores", classes=2, raw=False)],
    )
    _classes(place.closed.infer(asked), pixels, 2)


@row("Classification that is no integer: refused")
def classification_wrong(place: Place) -> None:
    output = Output("scores", parameters={"classification": "two"})
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(colours(noise(1), outputs=[output]))


@row("An unknown model: NOT_FOUND (404)")
def unknown_model(place: Place) -> None:
    with refused(place.closed, "NOT_FOUND") as told:
        place.closed.infer(Request("nobody", [Tensor("image", noise(1))]))
    assert "nobody" in told[0].message, told[0].message


@row("An unknown version: NOT_FOUND (404)")
def unknown_version(place: Place) -> None:
    with refused(place.closed, "NOT_FOUND"):
        place.closed.infer(colours(noise(1), version="9"))


@row("An unknown input: refused")
def unknown_input(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(Request("colours", [Tensor("nobody's", noise(1))]))


@row("Two inputs where there is one: refused")
def two_inputs(place: Place) -> None:
    tensor = Tensor("image", noise(1))
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(Request("colours", [tensor, tensor]))


@row("A wrong shape: refused, with the right one")
def wrong_shape(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT") as told:
        place.closed.infer(colours(noise(1, (5, 5, 3))))
    assert "4, 4, 3" in told[0].message, told[0].message


@row("Fewer bytes than the shape says: refused")
def too_few(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(Request("colours", [Tensor("image", noise(1), shape=(2, 4, 4, 3))]))


@row("More bytes than the shape says: refused")
def too_many(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(Request("colours", [Tensor("image", noise(2), shape=(1, 4, 4, 3))]))


@row("Fewer BYTES elements than the shape says: refused")
def too_few_elements(place: Place) -> None:
    tensor = Tensor("image", files(noise(1)), "BYTES", shape=(2,))
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(Request("colours", [tensor]))


@row("An input of no images: refused")
def empty(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(colours(np.zeros((0, 4, 4, 3), np.uint8)))


@row("No inputs: refused")
def no_inputs(place: Place) -> None:
    with refused(place.closed, "INVALID_ARGUMENT"):
        place.closed.infer(Request("colours", []))


def _large(count: int) -> tuple[Request, Array]:
    pixels = np.broadcast_to(noise(count, (1, 1, 3)), (count, *LARGE_SHAPE))
    return Request("large", [Tensor("image", np.ascontiguousarray(pixels))]), pixels[:, :1, :1]


@row("A message of 63 MB (--max-request-mb is 64)", slow=True)
def large(place: Place) -> None:
    asked, pixels = _large(21)
    # The graph adds up a million float32.
    same(place.closed.infer(asked), pixels, within=5e-3)


@row("A message of 66 MB: refused, and the connection goes on", slow=True)
def too_large(place: Place) -> None:
    statuses = ("INVALID_ARGUMENT", "TOO_LARGE") if place.closed.http else ("INVALID_ARGUMENT",)
    with refused(place.closed, *statuses):
        place.closed.infer(_large(22)[0])
    one_more = noise(2)
    same(place.closed.infer(colours(one_more)), one_more)


def _slow(**said: Any) -> Request:
    return Request("slow", [Tensor("image", SLOW)], **said)


def _all_done(place: Place) -> None:
    """Waits until nothing is in flight: what nobody waits for has left the server."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        with urllib.request.urlopen(place.metrics, timeout=TIMEOUT_S) as page:
            text = page.read().decode()
        if re.search(r"^convoy_requests_in_flight(\{.*\})? 0(\.0)?$", text, re.MULTILINE):
            return
        assert time.monotonic() < deadline, "a request stays in flight"


# What can't be done in time may be refused at once.
_LATE = ("DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED")


@row("The client's deadline passes", slow=True)
def deadline(place: Place) -> None:
    with refused(place.closed, *_LATE):
        place.closed.infer(_slow(deadline_s=0.05))
    _all_done(place)


@row(
    "The parameter `timeout` passes: DEADLINE_EXCEEDED (504), or RESOURCE_EXHAUSTED (429) at once",
    slow=True,
)
def timeout(place: Place) -> None:
    with refused(place.closed, *_LATE):
        place.closed.infer(_slow(timeout_us=50_000))
    _all_done(place)


@row("The client cancels; the next request is answered", slow=True)
def cancellation(place: Place) -> None:
    place.closed.cancel(_slow())
    _all_done(place)
    pixels = noise(4)
    same(place.closed.infer(colours(pixels)), pixels)


@row("A stream: every request answered once, by its id")
def stream(place: Place) -> None:
    sizes = [1, 5, 2, 9, 3]
    answers = place.closed.stream([colours(noise(n), id=str(n)) for n in sizes])
    assert sorted(each.id for each in answers) == sorted(map(str, sizes)), answers
    for each in answers:
        same(each, noise(int(each.id)))


@row("A stream's bad request: `error_message`, and the stream goes on")
def stream_error(place: Place) -> None:
    bad = Request("nobody", [Tensor("image", noise(1))], id="bad")
    answers = place.closed.stream([colours(noise(2), id="2"), bad, colours(noise(3), id="3")])
    (error,) = (each for each in answers if isinstance(each, Refused))
    assert not error.status, error
    assert "nobody" in error.message
    good = {each.id: each for each in answers if isinstance(each, Answer)}
    assert sorted(good) == ["2", "3"]
    for number, each in good.items():
        same(each, noise(int(number)))


@row("The same with `triton_grpc_error: true`: a status, which ends the stream")
def stream_status(place: Place) -> None:
    bad = Request("nobody", [Tensor("image", noise(1))], id="bad")
    answers = place.closed.stream([colours(noise(2), id="2"), bad], grpc_error=True)
    last = answers[-1]
    assert isinstance(last, Refused), last
    assert last.status == "NOT_FOUND", last
    assert all(isinstance(each, Answer) for each in answers[:-1])
    again = place.closed.stream([colours(noise(2), id="2")])
    same(again[0], noise(2))


@row("A stream with `triton_enable_empty_final_response`: one answer, marked as the last")
def stream_final(place: Place) -> None:
    (answer,) = place.closed.stream([colours(noise(2), id="2", final_response=True)])
    same(answer, noise(2))
    assert answer.parameters.get("triton_final_response") is True, answer.parameters


@row("Repository control: unload, load")
def control(place: Place) -> None:
    place.opened.unload("digits")
    assert place.opened.model_ready("digits") is False
    place.opened.load("digits")
    assert place.opened.model_ready("digits") is True


@row("Repository control: a model's own config or files: refused")
def control_overridden(place: Place) -> None:
    with refused(place.opened, "INVALID_ARGUMENT"):
        place.opened.load("digits", override=True)


@row("Repository control of an unknown model: refused")
def control_unknown(place: Place) -> None:
    with refused(place.opened, "NOT_FOUND", "INVALID_ARGUMENT"):
        place.opened.load("nobody")


@row("Repository control where it is off: PERMISSION_DENIED (403)")
def control_off(place: Place) -> None:
    with refused(place.closed, "PERMISSION_DENIED"):
        place.closed.load("digits")
    with refused(place.closed, "PERMISSION_DENIED"):
        place.closed.unload("digits")


@contextmanager
def _shared(size: int) -> Iterator[tuple[str, memoryview]]:
    """A new object of shared memory: the key by which a server opens it, and its bytes."""
    memory = shared_memory.SharedMemory(create=True, size=size)
    assert memory.buf is not None
    try:
        yield f"/{memory.name}", memory.buf
    finally:
        memory.close()
        memory.unlink()


@row("System shared memory: register, input and output in it, status, unregister")
def shared(place: Place) -> None:
    pixels = noise(3)
    with _shared(4096) as (key, memory):
        memory[256 : 256 + pixels.nbytes] = pixels.tobytes()
        place.opened.register("here", key, 128, 2048)
        try:
            (status,) = place.opened.regions()
            assert (status["name"], status["key"]) == ("here", key)
            assert (int(status["offset"]), int(status["byte_size"])) == (128, 2048)
            source = Tensor("image", pixels, region=Region("here", pixels.nbytes, 128))
            answer = place.opened.infer(
                Request(
                    "colours", [source], outputs=[Output("scores", region=Region("here", 36, 1024))]
                )
            )
            assert answer.datatypes == {"scores": "FP32"}
            # A copy, so that nothing refers to the memory when it is closed.
            got = np.frombuffer(bytes(memory[1152 : 1152 + 36]), "<f4").reshape(3, 3)
            np.testing.assert_allclose(got, expected(pixels), atol=1e-5)
            # Into the message from the memory, and the other way round.
            same(place.opened.infer(Request("colours", [source])), pixels)
            place.opened.infer(
                colours(pixels[::-1].copy(), outputs=[Output("scores", region=Region("here", 36))])
            )
            got = np.frombuffer(bytes(memory[128 : 128 + 36]), "<f4").reshape(3, 3)
            np.testing.assert_allclose(got, expected(pixels[::-1]), atol=1e-5)
        finally:
            place.opened.unregister("here")
        assert not place.opened.regions()


@row("Shared memory that is not registered, or too small: refused")
def shared_wrong(place: Place) -> None:
    pixels = noise(3)

    def asked(region: Region) -> Request:
        return Request("colours", [Tensor("image", pixels, region=region)])

    with refused(place.opened, "INVALID_ARGUMENT", "NOT_FOUND"):
        place.opened.infer(asked(Region("nowhere", pixels.nbytes)))
    with refused(place.opened, "INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL"):
        place.opened.register("here", "/nobody-made-this", 0, 64)
    with _shared(4096) as (key, _):
        with refused(place.opened, "INVALID_ARGUMENT"):
            place.opened.register("here", key, 0, 1 << 20)
        place.opened.register("here", key, 0, 128)
        try:
            for region in (
                Region("here", pixels.nbytes, 120),
                Region("here", 4),
                Region("here", 1 << 40),
            ):
                with refused(place.opened, "INVALID_ARGUMENT"):
                    place.opened.infer(asked(region))
            with refused(place.opened, "INVALID_ARGUMENT"):
                place.opened.infer(
                    colours(pixels, outputs=[Output("scores", region=Region("here", 8))])
                )
        finally:
            place.opened.unregister("here")


@row("Shared memory where it is off: UNIMPLEMENTED (501)")
def shared_off(place: Place) -> None:
    with _shared(64) as (key, _), refused(place.closed, "UNIMPLEMENTED"):
        place.closed.register("here", key, 0, 64)


@row("CUDA shared memory, trace and log settings: UNIMPLEMENTED (404 or 501)")
def unoffered(place: Place) -> None:
    for call in place.closed.unoffered():
        with refused(place.closed, "UNIMPLEMENTED"):
            call()


def _numbers(client: Client) -> dict[str, int]:
    (said,) = client.statistics("colours")
    stats = said.get("inference_stats", {})

    def count(name: str, key: str = "count") -> int:
        return int(stats.get(name, {}).get(key, 0))

    batches = said.get("batch_stats", [])
    stages = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
    return {
        "images": int(said.get("inference_count", 0)),
        "batches": int(said.get("execution_count", 0)),
        "images by batch size": sum(
            int(each["batch_size"]) * int(each["compute_infer"]["count"]) for each in batches
        ),
        "batches by batch size": sum(int(each["compute_infer"]["count"]) for each in batches),
        "last": int(said.get("last_inference", 0)),
        **{name: count(name) for name in stages},
        **{f"{name} ns": count(name, "ns") for name in stages},
    }


@row("Statistics add up with what was sent")
def statistics(place: Place) -> None:
    client = place.closed
    before, sizes = _numbers(client), [1, 3, 8, 2]
    for size in sizes:
        client.infer(colours(noise(size)))
    after = _numbers(client)
    grown = {name: after[name] - before[name] for name in after}
    requests, images = len(sizes), sum(sizes)
    assert grown["images"] == grown["images by batch size"] == images, grown
    assert grown["batches"] == grown["batches by batch size"] == requests, grown
    for stage in ("success", "queue", "compute_input", "compute_infer", "compute_output"):
        assert grown[stage] == requests, (stage, grown)
    assert grown["fail"] == 0, grown
    parts = sum(
        grown[f"{name} ns"]
        for name in ("queue", "compute_input", "compute_infer", "compute_output")
    )
    assert 0 < grown["compute_infer ns"] <= parts <= 1.05 * grown["success ns"], grown
    assert abs(after["last"] / 1000 - time.time()) < TIMEOUT_S, after["last"]
    with refused(client, "INVALID_ARGUMENT"):
        client.infer(colours(noise(1, (5, 5, 3))))
    assert _numbers(client)["fail"] - after["fail"] == 1


@row("Two seconds of load, six requests at a time: none fails")
def load_test(place: Place) -> None:
    place.closed.load_test()


@row("In one process with Convoy's own client")
def beside_convoy(place: Place) -> None:
    pixels = noise(1)
    theirs, ours = place.closed.beside_convoy(files(pixels)[0])
    np.testing.assert_allclose(theirs, expected(pixels)[0], atol=1e-5)
    assert ours == theirs


def run_all(
    columns: Mapping[str, Callable[[Mapping[str, str]], Client]], place: Mapping[str, Any]
) -> dict[str, dict[str, list[str]]]:
    """`{column: {row: [outcome, reason]}}` of the rows that `place["rows"]` names."""
    seen: dict[str, dict[str, list[str]]] = {}
    for name, connect in columns.items():
        if name not in place["columns"]:
            continue
        clients = [connect(place["closed"]), connect(place["opened"])]
        here = Place(clients[0], clients[1], metrics=place["closed"]["metrics"])
        seen[name] = {each.name: _try(each, here) for each in ROWS if each.name in place["rows"]}
        for client in clients:
            client.close()
    return seen


def _try(each: Row, place: Place) -> list[str]:
    try:
        each.check(place)
    except NotApplicable as reason:
        return [NOT_APPLICABLE, str(reason)]
    except Exception as error:
        # For whoever mends it; the cell has the last words alone.
        traceback.print_exc()
        words = " ".join(str(error).split()) or type(error).__name__
        return [FAILED, words[:300]]
    return [PASSED, ""]


def main(columns: Mapping[str, Callable[[Mapping[str, str]], Client]]) -> None:
    """A client's program: the place as JSON on standard input, the cells as JSON on standard output,
    of which nothing else has a part.
    """
    place = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, io.TextIOWrapper(sys.stderr.buffer, write_through=True)
    json.dump(run_all(columns, place), out)
