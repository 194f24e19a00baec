"""Callers who ask for more than there is, and that nobody else suffers from it."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from convoy_service.artifacts.reader import Golden
from convoy_service.engine.cpu import whole_cores
from tests.conftest import TIMEOUT_S, Server
from tests.integration.bad_input import CLASSIFY, INFER, ask
from tests.integration.conftest import Gate, classifier_on, inference_on
from tests.integration.models import FAST_IMAGE
from tests.integration.pictures import raw


@pytest.fixture(scope="module")
def limited(models: Path) -> Iterator[Server]:
    """A server of this module's own, whose memory is looked at."""
    with Server(models=models) as server:
        yield server.ready()
    assert "Traceback" not in server.log


def field(number: int, data: bytes) -> bytes:
    """A field of a message, as it travels."""
    length, size = b"", len(data)
    while size > 0x7F:
        length += bytes([size & 0x7F | 0x80])
        size >>= 7
    return bytes([number << 3 | 2]) + length + bytes([size]) + data


def tensor(datatype: str, *shape: int) -> bytes:
    return oip.ModelInferRequest.InferInputTensor(
        name="pixels", datatype=datatype, shape=shape
    ).SerializeToString()


def infer(inputs: bytes, raw: bytes | None = None) -> bytes:
    body = field(1, b"digits") + field(5, inputs)
    return body if raw is None else body + field(7, raw)


MANY = 10_000_000
NESTED = [
    ("images", CLASSIFY, field(3, b"") * MANY, "more than 5096 parts"),
    ("images in a small body", CLASSIFY, field(1, b"digits") + field(3, b"") * 5000, "5000 images"),
    ("inputs", INFER, field(5, b"") * MANY, "more than 5096 parts"),
    ("raw contents", INFER, field(7, b"") * MANY, "more than 5096 parts"),
    ("typed BYTES", INFER, infer(tensor("BYTES", 1) + field(5, field(8, b"") * MANY)), "more than 5096 parts"),
    ("raw BYTES", INFER, infer(tensor("BYTES", 4), struct.pack("<I", 0) * MANY), "more than the 4 elements"),
    ("raw BYTES, as the shape says", INFER, infer(tensor("BYTES", MANY), struct.pack("<I", 0) * MANY), f"{MANY} images"),
    ("pixels", INFER, infer(tensor("UINT8", 900_000, 8, 8, 1), bytes(900_000 * 64)), "900000 images"),
    ("typed pixels", INFER, infer(tensor("UINT8", 900_000, 8, 8, 1) + field(5, field(4, bytes(900_000 * 64)))), "900000 images"),
    ("typed values for few pixels", INFER, infer(tensor("UINT8", 1, 8, 8, 1) + field(5, field(4, bytes(57_000_000)))), "57000000 values"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "body", "words"), [row[1:] for row in NESTED], ids=[row[0] for row in NESTED])  # fmt: skip
def test_too_many_of_anything_is_refused_before_it_costs_much(
    limited: Server, call: str, body: bytes, words: str
) -> None:
    with limited.channel() as channel:
        refusing: Any = channel.unary_unary(call)
        with pytest.raises(grpc.RpcError) as refused:
            refusing(body, timeout=TIMEOUT_S / 2)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert words in str(refused.value.details())
        assert inference_on(channel).ServerLive(oip.ServerLiveRequest(), timeout=TIMEOUT_S / 2).live
    assert limited.metrics()["process_resident_memory_bytes"] < 700e6


def test_a_body_that_ends_half_way_is_no_message(limited: Server) -> None:
    with limited.channel() as channel:
        for body in (field(3, bytes(2_000_000))[:-1], b"\x80" * 2_000_000, b"\x1f" * 2_000_000):
            status, message = ask(channel, CLASSIFY, body)
            assert (status, message) == (
                "INVALID_ARGUMENT",
                "the body is no convoy.v1.ClassifyRequest",
            )


def test_thousands_of_calls_at_once_are_answered_or_told_to_come_back(
    limited: Server, digits: Golden
) -> None:
    request = pb.ClassifyRequest(model="digits", images=[raw(digits.pixels[0])])
    with limited.channel() as channel:
        classify = classifier_on(channel).Classify
        calls = [classify.future(request, timeout=4 * TIMEOUT_S) for _ in range(4000)]
        codes = {call.code() for call in calls}
    assert grpc.StatusCode.OK in codes
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


ODD_NAMES = ["x" * 20_000, "\N{LATIN SMALL LETTER U WITH DIAERESIS}" * 20_000]


@pytest.mark.parametrize("name", ODD_NAMES, ids=["ASCII", "not ASCII"])
def test_what_an_error_quotes_of_its_caller_is_cut(limited: Server, name: str) -> None:
    request = pb.ClassifyRequest(model=name, images=[pb.Image()])
    stream = iter([pb.ClassifyStreamRequest(id="1", request=request)])
    with limited.channel() as channel:
        status, message = ask(channel, CLASSIFY, request)
        (refusal,) = classifier_on(channel).ClassifyStream(stream, timeout=TIMEOUT_S)
    assert status == "NOT_FOUND"
    assert message.startswith(f"no model '{name[:100]}")
    assert message.endswith(" ...")
    assert len(message.encode()) < 2100
    assert refusal.error.message == message


def test_a_shape_of_twenty_thousand_axes_is_an_invalid_argument(limited: Server) -> None:
    with limited.channel() as channel:
        body = infer(tensor("UINT8", *[1] * 20_000), bytes(64))
        status, message = ask(channel, INFER, body)
    assert status == "INVALID_ARGUMENT"
    assert "shape [1, 1," in message


@pytest.mark.parametrize("version", ["9" * 5000, "\N{ARABIC-INDIC DIGIT ONE}"])
def test_digits_that_are_no_version_are_not_found(limited: Server, version: str) -> None:
    with limited.channel() as channel:
        request = oip.ModelInferRequest(model_name="digits", model_version=version)
        status, message = ask(channel, INFER, request)
    assert status == "NOT_FOUND"
    assert f"has no version '{version[:100]}" in message


@pytest.mark.skipif(whole_cores() < 2, reason="there calls and batches share a core")
def test_a_stream_is_not_read_on_while_it_holds_many_megabytes(
    slow_models: Path, gate: Gate
) -> None:
    # An image that can't be read, so that the message is large.
    images = [raw(FAST_IMAGE), pb.Image(encoded=bytes(1_000_000))]
    request = pb.ClassifyRequest(model="slow", images=images)
    messages = [pb.ClassifyStreamRequest(id=str(n), request=request) for n in range(24)]
    with (
        Server(models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        call = classifier_on(channel).ClassifyStream(iter(messages), timeout=2 * TIMEOUT_S)
        most, answered = 0.0, 0.0
        while answered < len(messages):
            metrics = server.metrics()
            most = max(most, metrics["convoy_requests_in_flight"])
            if most > 8:
                open_gate()
            ok = 'convoy_requests_total{call="ClassifyStream",code="OK",model="slow"}'
            answered = metrics.get(ok, 0)
        assert {answer.id for answer in call} == {message.id for message in messages}
    assert 8 < most <= 16
