"""What callers send wrongly, or strangely, and what they are told.

`make docs` writes the table, as a real server answers it, to docs/bad-input.md.
"""

import shutil
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import Message
from PIL import Image

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.integration.models import COLOURS, add_colours, digits
from tests.integration.pictures import encode, encode_image, noise, raw, solid

# The server's limit here, so that little need be sent to be over it.
MAX_REQUEST_MB = 1

CLASSIFY = "/convoy.v1.ImageClassifier/Classify"
INFER = "/inference.GRPCInferenceService/ModelInfer"

_PNG = encode(noise(0, 1, (40, 40, 3))[0])
_JPEG = encode(noise(0, 1, (40, 40, 3))[0], "JPEG")
_SEVEN = digits().pixels[7]


@dataclass(frozen=True)
class Picture:
    """An image, whatever the call that carries it. Where `status` is OK, `words` is its label."""

    what: str
    data: bytes
    status: str
    words: str
    model: str = "colours"


@dataclass(frozen=True)
class Case:
    """A request's `body`, and what it must be answered."""

    what: str
    call: str
    body: Message | bytes
    status: str
    words: str


def _damaged_png() -> bytes:
    data = bytearray(_PNG)
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def _frames(*colours: str) -> bytes:
    first, *rest = (Image.fromarray(solid(colour, 16, 16)) for colour in colours)
    return encode_image(first, "GIF", save_all=True, append_images=rest, duration=100, loop=0)


def _turned() -> bytes:
    """A digit that lies on its side, with the EXIF orientation that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(np.rot90(_SEVEN), exif=exif)


def _transparent() -> bytes:
    """Red, but transparent but for a corner that is blue: over white that is blue."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[0, 0] = (0, 0, 255, 255)
    return encode(pixels)


PICTURES = [
    Picture("CMYK JPEG", encode_image(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG"), "OK", "red"),
    Picture("PNG of 16 bits a pixel", encode_image(Image.fromarray(_SEVEN[..., 0].astype(np.uint16) * 257)), "OK", "7", "digits"),
    Picture("PNG with a palette", encode_image(Image.fromarray(solid("lime", 16, 16)).quantize(4)), "OK", "green"),
    Picture("PNG with transparency, laid over white", _transparent(), "OK", "blue"),
    Picture("animated GIF, its first frame blue", _frames("blue", "red", "lime"), "OK", "blue"),
    Picture("PNG turned by its EXIF orientation", _turned(), "OK", "7", "digits"),
    Picture("WebP", encode(solid("lime", 40, 40), "WEBP"), "OK", "green"),
    Picture("BMP", encode(solid("red", 40, 40), "BMP"), "OK", "red"),
    Picture("truncated JPEG", _JPEG[: len(_JPEG) // 2], "INVALID_ARGUMENT", "damaged"),
    Picture("truncated PNG", _PNG[: len(_PNG) // 2], "INVALID_ARGUMENT", "damaged"),
    Picture("truncated WebP", encode(solid("red", 40, 40), "WEBP")[:50], "INVALID_ARGUMENT", "damaged"),
    Picture("truncated GIF", _frames("blue")[:-8], "INVALID_ARGUMENT", "damaged"),
    Picture("truncated BMP", encode(solid("red", 40, 40), "BMP")[:500], "INVALID_ARGUMENT", "damaged"),
    Picture("PNG with a flipped byte", _damaged_png(), "INVALID_ARGUMENT", "damaged"),
    Picture("the first 20 bytes of a JPEG", _JPEG[:20], "INVALID_ARGUMENT", "these 20 bytes are no JPEG"),
    Picture("zero bytes", b"", "INVALID_ARGUMENT", "send the bytes of the file itself"),
    Picture("a PDF", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "INVALID_ARGUMENT", "no JPEG, PNG, WebP, BMP or GIF"),
    Picture("a TIFF image", encode(solid("red"), "TIFF"), "INVALID_ARGUMENT", "no JPEG, PNG, WebP, BMP or GIF"),
    Picture("a file's name", b"cat.png", "INVALID_ARGUMENT", "begin with b'cat.png'"),
    Picture("100 megapixels in a PNG of 12 kB", encode_image(Image.new("1", (10_000, 10_000))), "INVALID_ARGUMENT", "100.0 megapixels"),
    Picture("100 megapixels said by the header of a BMP", encode(solid("red"), "BMP")[:18] + struct.pack("<ii", 10_000, 10_000) + encode(solid("red"), "BMP")[26:], "INVALID_ARGUMENT", "the limit is 50"),
]  # fmt: skip


def _classify(
    images: Sequence[pb.Image] = (raw(solid("red")),), model: str = "colours", version: int = 0
) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(model=model, version=version, images=images)


def _pixels(height: int, width: int, channels: int, count: int) -> list[pb.Image]:
    pixels = pb.Pixels(data=bytes(count), height=height, width=width, channels=channels)
    return [pb.Image(pixels=pixels)]


def _infer(
    change: Callable[[oip.ModelInferRequest], object] = lambda request: None,
    contents: bytes | None = bytes(96),
    datatype: str = "UINT8",
    shape: Sequence[int] = (2, 4, 4, 3),
) -> oip.ModelInferRequest:
    """A good request, but for what is said."""
    tensor = oip.ModelInferRequest.InferInputTensor(name="image", datatype=datatype, shape=shape)
    request = oip.ModelInferRequest(model_name="colours", inputs=[tensor])
    if contents is not None:
        request.raw_input_contents.append(contents)
    change(request)
    return request


def _typed(values: Sequence[int], shape: Sequence[int] = (1, 4, 4, 3)) -> oip.ModelInferRequest:
    def change(request: oip.ModelInferRequest) -> None:
        request.inputs[0].contents.uint_contents.extend(values)

    return _infer(change, None, shape=shape)


def _set(path: str, value: object) -> Callable[[oip.ModelInferRequest], None]:
    """Sets a field, such as `inputs.0.name`."""
    *way, last = path.split(".")

    def change(request: oip.ModelInferRequest) -> None:
        at: object = request
        for step in way:
            at = at[int(step)] if step.isdecimal() else getattr(at, step)  # type: ignore[index]
        setattr(at, last, value)

    return change


def _both(request: oip.ModelInferRequest) -> None:
    request.inputs[0].contents.uint_contents.extend([0] * 96)


def _asked(**parameters: oip.InferParameter) -> Callable[[oip.ModelInferRequest], None]:
    """The output is asked for with these."""

    def change(request: oip.ModelInferRequest) -> None:
        output = request.outputs.add(name="scores")
        for name, value in parameters.items():
            output.parameters[name].CopyFrom(value)

    return change


def _region(offset: int) -> dict[str, oip.InferParameter]:
    return {
        "shared_memory_region": oip.InferParameter(string_param="a"),
        "shared_memory_byte_size": oip.InferParameter(int64_param=96),
        "shared_memory_offset": oip.InferParameter(int64_param=offset),
    }


def _oversized(megabytes: float) -> pb.ClassifyRequest:
    return _classify(images=[pb.Image(encoded=bytes(int(megabytes * 1e6)))])


CASES = [
    Case("no images", CLASSIFY, _classify(images=[]), "INVALID_ARGUMENT", "send at least one"),
    Case("image without content", CLASSIFY, _classify(images=[pb.Image()]), "INVALID_ARGUMENT", "neither `encoded` nor `pixels`"),
    Case("pixels, too few bytes", CLASSIFY, _classify(images=_pixels(4, 4, 3, 47)), "INVALID_ARGUMENT", "47 bytes, but"),
    Case("pixels, too many bytes", CLASSIFY, _classify(images=_pixels(4, 4, 3, 49)), "INVALID_ARGUMENT", "4x4x3"),
    Case("pixels of 2 channels", CLASSIFY, _classify(images=_pixels(4, 4, 2, 32)), "INVALID_ARGUMENT", "1, 3 or 4 channels"),
    Case("pixels of no height", CLASSIFY, _classify(images=_pixels(0, 4, 3, 0)), "INVALID_ARGUMENT", "[0, 4, 3]"),
    Case("pixels of no height, and a width without end", CLASSIFY, _classify(images=_pixels(0, 2**32 - 1, 2**32 - 1, 0)), "INVALID_ARGUMENT", "must be at least 1"),
    Case("unknown model", CLASSIFY, _classify(model="nobody's"), "NOT_FOUND", "there is: colours, digits"),
    Case("no model named, where there are two", CLASSIFY, _classify(model=""), "NOT_FOUND", "name one"),
    Case("unknown version", CLASSIFY, _classify(version=7), "NOT_FOUND", "use version 1, or leave it out"),
    Case("garbage in place of a message", CLASSIFY, b"\xff\xff garbage", "INVALID_ARGUMENT", "no convoy.v1.ClassifyRequest"),
    Case("body a little over the limit", CLASSIFY, _oversized(1.2 * MAX_REQUEST_MB), "INVALID_ARGUMENT", "send fewer images a call"),
    Case("body over twice the limit, refused by gRPC unread", CLASSIFY, _oversized(2.2 * MAX_REQUEST_MB), "RESOURCE_EXHAUSTED", "larger than max"),
    Case("unknown model", INFER, _infer(_set("model_name", "nobody's")), "NOT_FOUND", "there is: colours, digits"),
    Case("unknown version", INFER, _infer(_set("model_version", "7")), "NOT_FOUND", "use version 1, or leave it out"),
    Case("version that is no number", INFER, _infer(_set("model_version", "latest")), "NOT_FOUND", "has no version 'latest'"),
    Case("garbage in place of a message", INFER, b"\xff\xff garbage", "INVALID_ARGUMENT", "no inference.ModelInferRequest"),
    Case("body a little over the limit", INFER, _infer(contents=bytes(1_200_000)), "INVALID_ARGUMENT", "send fewer images a call"),
    Case("body over twice the limit, refused by gRPC unread", INFER, _infer(contents=bytes(2_200_000)), "RESOURCE_EXHAUSTED", "larger than max"),
    Case("no inputs", INFER, oip.ModelInferRequest(model_name="colours"), "INVALID_ARGUMENT", "takes one, 'image'"),
    Case("two inputs", INFER, _infer(lambda request: request.inputs.add(name="mask")), "INVALID_ARGUMENT", "'image', 'mask'"),
    Case("wrong name of input", INFER, _infer(_set("inputs.0.name", "input_1")), "INVALID_ARGUMENT", "takes one, 'image'"),
    Case("wrong datatype", INFER, _infer(datatype="FP32"), "INVALID_ARGUMENT", "expected UINT8 [N, 4, 4, 3] or BYTES [N]"),
    Case("datatype left out", INFER, _infer(datatype=""), "INVALID_ARGUMENT", "expected UINT8 [N, 4, 4, 3] or BYTES [N]"),
    Case("wrong shape, channels first", INFER, _infer(shape=[2, 3, 4, 4]), "INVALID_ARGUMENT", "expected UINT8 [N, 4, 4, 3]"),
    Case("shape without the batch axis", INFER, _infer(shape=[4, 4, 3]), "INVALID_ARGUMENT", "expected UINT8 [N, 4, 4, 3]"),
    Case("shape of no images", INFER, _infer(contents=b"", shape=[0, 4, 4, 3]), "INVALID_ARGUMENT", "N at least 1"),
    Case("shape with -1", INFER, _infer(shape=[-1, 4, 4, 3]), "INVALID_ARGUMENT", "N at least 1"),
    Case("raw contents, too few bytes", INFER, _infer(contents=bytes(95)), "INVALID_ARGUMENT", "95 values, but shape [2, 4, 4, 3] has 96"),
    Case("raw contents, too many bytes", INFER, _infer(contents=bytes(97)), "INVALID_ARGUMENT", "97 values, but shape [2, 4, 4, 3] has 96"),
    Case("raw and typed contents", INFER, _infer(_both), "INVALID_ARGUMENT", "then no `contents`"),
    Case("raw contents for two inputs", INFER, _infer(lambda request: request.raw_input_contents.append(b"")), "INVALID_ARGUMENT", "one entry an input"),
    Case("no contents", INFER, _infer(contents=None), "INVALID_ARGUMENT", "0 values, but shape [2, 4, 4, 3] has 96"),
    Case("typed contents, too few values", INFER, _typed([0] * 47), "INVALID_ARGUMENT", "47 values, but shape [1, 4, 4, 3] has 48"),
    Case("typed value over 255", INFER, _typed([256] * 48), "INVALID_ARGUMENT", "256 is no UINT8 value"),
    Case("BYTES, another number than the shape's", INFER, _infer(datatype="BYTES", shape=[2], contents=struct.pack("<I", 3) + b"abc"), "INVALID_ARGUMENT", "1 elements for shape [2]"),
    Case("BYTES that end within an element", INFER, _infer(datatype="BYTES", shape=[1], contents=struct.pack("<I", 9) + b"abc"), "INVALID_ARGUMENT", "says 9 bytes, 3 are left"),
    Case("BYTES that end within a length", INFER, _infer(datatype="BYTES", shape=[1], contents=b"ab"), "INVALID_ARGUMENT", "end within the length"),
    Case("BYTES of a wrong shape", INFER, _infer(datatype="BYTES", shape=[1, 4, 4, 3]), "INVALID_ARGUMENT", "expected [N]"),
    Case("unknown output", INFER, _infer(lambda request: request.outputs.add(name="logits")), "INVALID_ARGUMENT", "has 'scores'"),
    Case("the best 0 classes", INFER, _infer(_asked(classification=oip.InferParameter(int64_param=0))), "INVALID_ARGUMENT", "at least 1"),
    Case("the best classes, how many as a string", INFER, _infer(_asked(classification=oip.InferParameter(string_param="3"))), "INVALID_ARGUMENT", "expected an int64_param"),
    Case("shared memory without a region", INFER, _infer(_asked(shared_memory_byte_size=oip.InferParameter(int64_param=96))), "INVALID_ARGUMENT", "without a 'shared_memory_region'"),
    Case("shared memory without a size", INFER, _infer(_asked(shared_memory_region=oip.InferParameter(string_param="a"))), "INVALID_ARGUMENT", "needs 'shared_memory_byte_size'"),
    Case("shared memory at an offset below 0", INFER, _infer(_asked(**_region(-1))), "INVALID_ARGUMENT", "an integer of at least 0"),
    Case("shared memory, where it is not allowed", INFER, _infer(_asked(**_region(0))), "UNIMPLEMENTED", "--allow-shared-memory"),
]  # fmt: skip


def ask(channel: grpc.Channel, call: str, body: Message | bytes) -> tuple[str, str]:
    """The status and message of a call, or of its first image; where both are OK, its label."""
    data = body if isinstance(body, bytes) else body.SerializeToString()
    send: Any = channel.unary_unary(call)
    try:
        answer = send(data, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    if call == CLASSIFY:
        result = pb.ClassifyResponse.FromString(answer).results[0]
        if result.HasField("error"):
            return status_name(result.error.code), result.error.message
        return "OK", result.classification.labels[0].name
    response = oip.ModelInferResponse.FromString(answer)
    values = np.frombuffer(response.raw_output_contents[0], "<f4")
    return "OK", COLOURS[values.argmax()] if len(values) == 3 else str(values.argmax())


def status_name(code: int) -> str:
    return next(status.name for status in grpc.StatusCode if status.value[0] == code)


def classify_picture(picture: Picture) -> pb.ClassifyRequest:
    return pb.ClassifyRequest(model=picture.model, images=[pb.Image(encoded=picture.data)])


def infer_picture(picture: Picture) -> oip.ModelInferRequest:
    contents = struct.pack("<I", len(picture.data)) + picture.data
    request = _infer(contents=contents, datatype="BYTES", shape=[1])
    if picture.model == "digits":
        request.model_name, request.inputs[0].name = "digits", "pixels"
    return request


def serve(folder: Path) -> Server:
    """The server that the table is about."""
    shutil.copytree(REPOSITORY / "models" / "digits", folder / "digits")
    add_colours(folder)
    return Server("--max-request-mb", str(MAX_REQUEST_MB), models=folder)


def table() -> str:
    """What a real server answers to all of them, in markdown."""
    rows = [("input", "status", "message"), ("---", "---", "---")]
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder)) as server,
        server.ready().channel() as channel,
    ):
        for picture in PICTURES:
            status, message = ask(channel, CLASSIFY, classify_picture(picture))
            rows.append((f"image: {picture.what}", status, _cell(status, message)))
        for case in CASES:
            status, message = ask(channel, case.call, case.body)
            name = case.call.rpartition("/")[2]
            rows.append((f"{name}: {case.what}", status, _cell(status, message)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(status: str, message: str) -> str:
    return f"(answered: {message})" if status == "OK" else message.replace("|", "\\|")
