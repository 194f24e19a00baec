"""Held against protobuf's own parser, on random messages and random damage."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from convoy_protos import classifier_pb2, inference_pb2
from convoy_service.errors import InvalidRequest
from convoy_service.transport import protobuf_scan as wire

Request = inference_pb2.ModelInferRequest
RAW = Request.RAW_INPUT_CONTENTS_FIELD_NUMBER


def infer_request(chance: random.Random) -> Request:
    request = Request(model_name="m" * chance.randrange(200), id=chance.choice(["", "\u00fc"]))
    request.parameters["timeout"].int64_param = chance.choice([0, -1, 2**62])
    for _ in range(chance.randrange(3)):
        shape = [chance.choice([-1, 0, 1, 300, 2**40]) for _ in range(chance.randrange(5))]
        tensor = request.inputs.add(name="pixels", datatype="UINT8", shape=shape)
        tensor.contents.uint_contents.extend(chance.choices(range(300), k=chance.randrange(9)))
        tensor.contents.bytes_contents.extend([b"x"] * chance.randrange(9))
        tensor.contents.fp32_contents.extend([0.5] * chance.randrange(3))
    for _ in range(chance.choice([0, 1, 1, 5])):
        request.raw_input_contents.append(chance.randbytes(chance.choice([0, 1, 127, 128, 70_000])))
    return request


def classify_request(chance: random.Random) -> Message:
    request = classifier_pb2.ClassifyRequest(model="m", version=chance.choice([0, 2**63]))
    for _ in range(chance.randrange(9)):
        if chance.random() < 0.5:
            request.images.add(encoded=chance.randbytes(chance.randrange(300)))
        else:
            request.images.add().pixels.data = chance.randbytes(chance.randrange(300))
    return request


def in_pieces(chance: random.Random, message: Any) -> bytes:
    """The message serialised as others might: as several that are merged, with unknown fields, and
    lists that are not packed.
    """
    unknown = [
        b"",
        b"\x98\x06\x05",
        b"\xa1\x06" + bytes(8),
        b"\xaa\x06\x02hi",
        b"\xb5\x06" + bytes(4),
    ]
    pieces = [message.SerializeToString(), b"", b""]
    if isinstance(message, Request) and message.inputs:
        pieces[1] = Request(raw_input_contents=[b"late"]).SerializeToString()
        # One tensor: its name, and `shape: 5` as a value by itself.
        pieces[2] = b"\x2a\x05\x0a\x01p\x18\x05"
    chance.shuffle(pieces)
    return b"".join(piece + chance.choice(unknown) for piece in pieces)


def damaged(chance: random.Random, data: bytes) -> bytes:
    """With a few bytes changed, left out or put in, or cut off."""
    body = bytearray(data)
    for _ in range(chance.randrange(1, 4)):
        if not body:
            break
        # Near the ends there is more than contents.
        at = chance.choice([chance.randrange(len(body)), chance.randrange(min(50, len(body)))])
        match chance.randrange(4):
            case 0:
                body[at] = chance.choice([0, 0x7F, 0x80, 0xFF, chance.randrange(256)])
            case 1:
                del body[at : at + chance.randrange(1, 12)]
            case 2:
                body[at:at] = chance.randbytes(chance.randrange(1, 12))
            case 3:
                del body[at:]
    return bytes(body)


def parsed(kind: type[Message], data: bytes) -> Any:
    """As protobuf parses it, None where it does not."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def split_and_parsed(data: bytes) -> Any:
    """The same, by way of `wire.split`."""
    try:
        rest, raw = wire.split(data, RAW)
        request = Request.FromString(rest)
    except DecodeError:
        return None
    assert not request.raw_input_contents
    request.raw_input_contents.extend(map(bytes, raw))
    return request


def test_what_is_split_is_what_protobuf_reads() -> None:
    chance = random.Random(0)
    for _ in range(500):
        data = in_pieces(chance, infer_request(chance))
        expected = parsed(Request, data)
        assert expected is not None
        assert split_and_parsed(data) == expected


def has_groups(message: Message) -> bool:
    """Proto3 has none, and we take none; protobuf's parser keeps them as unknown fields."""
    group = 3
    fields: Any = UnknownFieldSet(message)
    return any(field.wire_type == group for field in fields)


def test_damage_is_found_by_split_or_left_to_protobuf_and_never_read_otherwise() -> None:
    chance = random.Random(0)
    read = refused = 0
    for _ in range(6000):
        data = damaged(chance, in_pieces(chance, infer_request(chance)))
        expected, received = parsed(Request, data), split_and_parsed(data)
        if expected is not None and received is None:
            assert has_groups(expected)
        else:
            assert received == expected
        read += expected is not None
        refused += received is None
    assert read > 500
    assert refused > 500


def test_nothing_is_copied_of_what_is_split_off() -> None:
    data = Request(model_name="m", raw_input_contents=[b"abc", b"", b"defg"]).SerializeToString()
    rest, raw = wire.split(data, RAW)
    assert rest == Request(model_name="m").SerializeToString()
    assert [bytes(each) for each in raw] == [b"abc", b"", b"defg"]
    assert all(each.obj is data for each in raw)


MESSAGES: list[tuple[Callable[[random.Random], Message], type[Message]]] = [
    (infer_request, Request),
    (classify_request, classifier_pb2.ClassifyRequest),
]


@pytest.mark.parametrize(("make", "kind"), MESSAGES, ids=["ModelInfer", "Classify"])
def test_damage_is_no_reason_to_refuse_what_protobuf_reads(
    make: Callable[[random.Random], Message], kind: type[Message]
) -> None:
    chance = random.Random(1)
    refused = 0
    for _ in range(4000):
        data = damaged(chance, in_pieces(chance, make(chance)))
        try:
            wire.check_parts(kind, data, 10**9)
        except DecodeError:
            assert parsed(kind, data) is None
            refused += 1
    assert refused > 200


def tensor(**contents: Any) -> Request:
    tensors = [Request.InferInputTensor(contents=inference_pb2.InferTensorContents(**contents))]
    return Request(inputs=tensors)


# The fields of the message, and those of messages in it that hold lists.
PARTS = [
    (Request(), 0),
    (Request(model_name="m", id="i"), 2),
    (Request(raw_input_contents=[b""] * 50), 50),
    (tensor(bytes_contents=[b""] * 50), 1 + 1 + 50),
    (tensor(uint_contents=range(50)), 1 + 1 + 1),
    (Request(inputs=[Request.InferInputTensor(shape=range(50))] * 3), 3 * (1 + 1)),
    (classifier_pb2.ClassifyRequest(images=[classifier_pb2.Image(encoded=b"x")] * 50), 50),
    (
        classifier_pb2.ClassifyStreamRequest(
            id="1",
            request=classifier_pb2.ClassifyRequest(images=[classifier_pb2.Image()] * 50),
        ),
        1 + 1 + 50,
    ),
]


@pytest.mark.parametrize(("message", "parts"), PARTS)
def test_parts_are_counted_where_there_may_be_many(message: Message, parts: int) -> None:
    data, kind = message.SerializeToString(), type(message)
    wire.check_parts(kind, data, parts)
    if parts:
        with pytest.raises(InvalidRequest, match=f"more than {parts - 1} parts"):
            wire.check_parts(kind, data, parts - 1)


BROKEN = [
    b"\x3a",  # a field without its length
    b"\x3a\x05abcd",  # or shorter than that
    b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",  # or as long as nothing is
    b"\x08",  # a varint that does not come
    b"\x08" + b"\x80" * 10 + b"\x01",  # and one without end
    b"\x09" + bytes(7),
    b"\x0d" + bytes(3),
    b"\x0e",  # kinds of fields that there are not
    b"\x0f",
    b"\x80",
]


@pytest.mark.parametrize("data", BROKEN, ids=repr)
def test_what_ends_half_way_is_no_message(data: bytes) -> None:
    assert parsed(Request, data) is None
    with pytest.raises(DecodeError):
        wire.split(data, RAW)
    with pytest.raises(DecodeError):
        wire.check_parts(Request, data, 100)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 70_000])
def test_a_field_that_is_written_is_what_protobuf_reads(size: int) -> None:
    raw = bytes(size)
    message = Request.FromString(wire.field(RAW, raw) + wire.field(1, b"m"))
    assert message == Request(model_name="m", raw_input_contents=[raw])
