import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

from convoy.bench.http2 import CODES, REFUSED, Answer, Connection, frame
from convoy.bench.run import run
from convoy.bench.settings import BenchSettings
from convoy_protos import classifier_pb2, inference_pb2
from convoy_service.artifacts.reader import Golden
from convoy_service.errors import ConvoyError
from tests.conftest import TIMEOUT_S, Server, convoy
from tests.integration.pictures import encode

SHORT = {"duration_s": 0.4, "warmup_s": 0.05}

Bench = Callable[..., dict[str, Any]]


@pytest.fixture
def bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Does what `convoy bench` does, for a short while; what it has written as JSON, and its words."""

    def found(server: str, **settings: Any) -> dict[str, Any]:
        file = tmp_path / "found.json"
        status = run(BenchSettings(server, json=file, **{**SHORT, **settings}))
        told = capsys.readouterr()
        read: dict[str, Any] = json.loads(file.read_text())
        return {**read, "status": status, "stdout": told.out, "stderr": told.err}

    return found


def test_a_sweep_of_the_closed_loop_is_printed_written_and_drawn(
    shipped: Server, bench: Bench, tmp_path: Path
) -> None:
    picture = tmp_path / "load.png"
    found = bench(
        shipped.target,
        concurrency=(1, 4),
        processes=2,
        images_per_request=3,
        check=True,
        slo_ms=1000,
        plot=picture,
    )
    assert [point["concurrency"] for point in found["points"]] == [1, 4]
    for point in found["points"]:
        assert point["statuses"] == {"OK": point["requests"]}
        assert point["images_per_s"] == pytest.approx(3 * point["throughput"])
        quantiles = list(point["latency_ms"].values())
        assert quantiles[0] > 0
        assert quantiles == sorted(quantiles)
        assert point["wrong_rows"] == 0
    assert found["settings"]["concurrency"] == [1, 4]
    assert "4 in flight" in found["stdout"]
    assert "check: 0 wrong rows" in found["stdout"]
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image))) > 50


def test_the_open_loop_sends_what_was_drawn(shipped: Server, bench: Bench) -> None:
    found = bench(
        shipped.target, rate=(50, 100), arrivals="constant", duration_s=0.4, warmup_s=0.045
    )
    assert [point["requests"] for point in found["points"]] == [20, 40]
    assert [point["statuses"] for point in found["points"]] == [{"OK": 20}, {"OK": 40}]


@pytest.mark.parametrize(
    "settings",
    [
        {"api": "classify", "images_per_request": 2, "concurrency": (4,)},
        {"api": "classify", "stream": True, "connections": 2, "concurrency": (4,)},
        {"api": "infer", "jpeg_size": "50x37", "concurrency": (4,)},
        {"api": "classify", "stream": True, "jpeg_size": "50x37", "rate": (200,)},
    ],
)
def test_every_way_to_ask_is_answered_rightly(
    shipped: Server, bench: Bench, settings: dict[str, Any]
) -> None:
    found = bench(shipped.target, check=True, **settings)
    (point,) = found["points"]
    assert point["statuses"] == {"OK": point["requests"]}
    assert point["requests"] > 0
    assert (point["wrong_rows"], found["status"]) == (0, 0)


def test_files_are_sent_as_they_are(
    shipped: Server, digits: Golden, bench: Bench, tmp_path: Path
) -> None:
    for number, kind in enumerate(("PNG", "JPEG")):
        (tmp_path / f"{number}.{kind.lower()}").write_bytes(encode(digits.pixels[number], kind))
    (point,) = bench(shipped.target, images=tmp_path, concurrency=(1,), check=True)["points"]
    assert point["statuses"] == {"OK": point["requests"]}
    (tmp_path / "2.png").write_text("no image")
    for api in ("infer", "classify"):
        with pytest.raises(ConvoyError, match="image 0: "):
            bench(shipped.target, images=tmp_path, api=api)


def test_the_goodput_is_measured_beyond_capacity(
    shipped: Server, bench: Bench, tmp_path: Path
) -> None:
    picture = tmp_path / "goodput.png"
    found = bench(
        shipped.target, overload=True, slo_ms=500, concurrency=(2,), plot=picture, duration_s=0.25
    )
    capacity, *points = found["points"]
    assert found["capacity"] == capacity["throughput"]
    rates = [point["rate"] / found["capacity"] for point in points]
    assert rates == pytest.approx([0.5, 0.75, 1, 1.5, 2, 3])
    assert all(point["goodput"] <= point["throughput"] for point in points)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_peak_that_no_call_can_reach_is_none(shipped: Server, bench: Bench) -> None:
    found = bench(shipped.target, find_peak=True, slo_ms=0.01, duration_s=0.05, warmup_s=0)
    assert found["peak_rate"] == 0
    assert all(point["goodput"] == 0 for point in found["points"])


def test_refusals_are_counted_by_their_status(slow_server: Server, bench: Bench) -> None:
    # It takes three at once.
    found = bench(slow_server.target, model="digits", concurrency=(64,), duration_s=1)
    (point,) = found["points"]
    assert point["refused"] == point["statuses"].get("RESOURCE_EXHAUSTED", 0) > 0
    assert sum(point["statuses"].values()) == point["requests"]
    assert "RESOURCE_EXHAUSTED: " in found["stderr"]


def test_requests_are_given_up_at_their_deadline(slow_server: Server, bench: Bench) -> None:
    (point,) = bench(
        slow_server.target, model="digits", concurrency=(1,), timeout_ms=0.001, duration_s=0.1
    )["points"]
    # Where the server hears of one in time, it refuses it.
    assert set(point["statuses"]) <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED"}
    assert point["late"] + point["refused"] == point["requests"] > 0
    assert point["late"]
    assert point["latency_ms"] == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": "nobody"}, "there is: digits"),
        ({"model": "nobody", "api": "classify"}, "has digits"),
        ({"jpeg_size": "big"}, "500x375"),
        ({"images": Path("pyproject.toml")}, "INVALID_ARGUMENT"),
        ({"images": Path("protos")}, "no images"),
        ({"rate": (3_000_000,)}, "can't send 3e\\+06/s"),
    ],
)
def test_errors_say_what_to_do(
    shipped: Server, bench: Bench, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConvoyError, match=words):
        bench(shipped.target, **settings)


def test_a_server_that_is_not_there_is_told_in_a_line() -> None:
    result = convoy("bench", "--server", "127.0.0.1:1")
    assert result.returncode == 1
    assert "no server answers at 127.0.0.1:1: start one" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_of_another_kind_is_told(bench: Bench) -> None:
    with serving({}) as (target, _), pytest.raises(ConvoyError, match="has no ModelMetadata"):
        bench(target)


Handlers = dict[str, dict[str, Any]]


@contextmanager
def serving(handlers: Handlers, *options: tuple[str, int]) -> Iterator[tuple[str, grpc.Server]]:
    """A server of grpcio with these methods, by service and name."""
    server = grpc.server(
        ThreadPoolExecutor(8),
        handlers=[
            grpc.method_handlers_generic_handler(service, dict(methods))
            for service, methods in handlers.items()
        ],
        options=[("grpc.max_receive_message_length", -1), *options],
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        server.stop(0).wait()


class Liar:
    """Answers each request with its own pixels as probabilities; and under load, now and then, one
    with the rows of another.
    """

    def __init__(self, lies_every: int) -> None:
        self._lies_every = lies_every
        self._asked = self._lies = 0
        self._lock = threading.Lock()
        self._last = b""
        self.peers: set[str] = set()

    def metadata(self, request: bytes, call: grpc.ServicerContext) -> bytes:
        response = inference_pb2.ModelMetadataResponse(name="liar")
        response.inputs.add(name="pixels", datatype="FP32", shape=[-1, 4])
        return response.SerializeToString()

    def infer(self, data: bytes, call: grpc.ServicerContext) -> bytes:
        request = inference_pb2.ModelInferRequest.FromString(data)
        response = inference_pb2.ModelInferResponse(model_name="liar")
        response.outputs.add(name="rows", datatype="FP32", shape=request.inputs[0].shape)
        with self._lock:
            self.peers.add(call.peer())
            self._asked += 1
            # Each of 64 requests is asked alone first, and one more before the load begins.
            lies = self._lies_every and self._asked > 65 and self._asked % self._lies_every == 0
            (pixels,) = request.raw_input_contents
            response.raw_output_contents.append(self._last if lies else pixels)
            self._last = pixels
        return response.SerializeToString()

    def handlers(self) -> Handlers:
        return {
            "inference.GRPCInferenceService": {
                "ModelMetadata": grpc.unary_unary_rpc_method_handler(self.metadata),
                "ModelInfer": grpc.unary_unary_rpc_method_handler(self.infer),
            }
        }


def test_check_catches_rows_that_are_mixed_up(tmp_path: Path) -> None:
    written = tmp_path / "found.json"
    with serving(Liar(lies_every=5).handlers()) as (target, _):
        result = convoy(
            "bench", "--server", target, "--check", "--concurrency", "4", "--json", written,
            "--images-per-request", "2", "--duration-s", "0.8", "--warmup-s", "0.1",
        )  # fmt: skip
    assert result.returncode == 1, result.stderr
    (point,) = json.loads(written.read_text())["points"]
    assert point["statuses"] == {"OK": point["requests"]}
    assert 0 < point["wrong_rows"] <= point["requests"]
    assert f"check: {point['wrong_rows']} wrong rows" in result.stdout


def test_the_stream_is_matched_by_id_however_answers_overtake(
    bench: Bench,
) -> None:
    def models(request: bytes, call: grpc.ServicerContext) -> bytes:
        response = classifier_pb2.ListModelsResponse()
        response.models.add(name="two", labels=["a", "b"], height=1, width=1, channels=1)
        return response.SerializeToString()

    def answer(request: classifier_pb2.ClassifyRequest) -> classifier_pb2.ClassifyResponse:
        response = classifier_pb2.ClassifyResponse()
        share = request.images[0].pixels.data[0] / 255
        labels = response.results.add().classification.labels
        labels.add(index=1, probability=1 - share)
        labels.add(index=0, probability=share)
        return response

    def stream(requests: Iterator[bytes], call: grpc.ServicerContext) -> Iterator[bytes]:
        held: list[classifier_pb2.ClassifyStreamRequest] = []
        for count, data in enumerate(requests):
            held.append(classifier_pb2.ClassifyStreamRequest.FromString(data))
            if len(held) < 4:
                continue
            for request in reversed(held):
                response = classifier_pb2.ClassifyStreamResponse(id=request.id)
                if count % 20 == 19:
                    response.error.code, response.error.message = 8, "too much"
                else:
                    response.response.CopyFrom(answer(request.request))
                yield response.SerializeToString()
            held.clear()

    handlers: Handlers = {
        "convoy.v1.ImageClassifier": {
            "ListModels": grpc.unary_unary_rpc_method_handler(models),
            "Classify": grpc.unary_unary_rpc_method_handler(
                lambda data, _: answer(
                    classifier_pb2.ClassifyRequest.FromString(data)
                ).SerializeToString()
            ),
            "ClassifyStream": grpc.stream_stream_rpc_method_handler(stream),
        }
    }
    with serving(handlers) as (target, _):
        (point,) = bench(
            target,
            api="classify",
            stream=True,
            check=True,
            concurrency=(8,),
            timeout_ms=1000,
            duration_s=0.5,
        )["points"]
    assert point["wrong_rows"] == 0
    assert point["refused"] > 0
    assert point["statuses"]["OK"] > point["refused"]


# The connection against grpcio's own client, on a server of grpcio.


def settle(connection: Connection, calls: int) -> list[Answer]:
    """Everything that is answered until so many calls have ended."""
    answers: list[Answer] = []
    deadline = time.monotonic() + TIMEOUT_S
    while sum(answer.code is not None for answer in answers) < calls:
        assert time.monotonic() < deadline, answers
        connection.flush()
        select([connection], [connection] if connection.unflushed else [], [], 0.1)
        answers += connection.receive()
    return answers


def echo(request: bytes, call: grpc.ServicerContext) -> bytes:
    return request


def fail(request: bytes, call: grpc.ServicerContext) -> bytes:
    call.abort(list(grpc.StatusCode)[request[0]], f"{request[0]} % naïve ~\\n ✓")
    raise AssertionError


METHODS: Handlers = {
    "test.Service": {
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Remaining": grpc.unary_unary_rpc_method_handler(
            lambda _, call: str(call.time_remaining()).encode()
        ),
        "Stream": grpc.stream_stream_rpc_method_handler(lambda requests, _: requests),
    }
}


def by_grpc(target: str, path: str, messages: Sequence[bytes]) -> list[tuple[str, str, bytes]]:
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(target, options) as channel:
        call: Any = channel.unary_unary(path)
        found = []
        for message in messages:
            try:
                found.append(("OK", "", call(message, timeout=TIMEOUT_S)))
            except grpc.RpcError as error:
                failed: Any = error
                found.append((failed.code().name, failed.details(), b""))
    return found


def by_http2(target: str, path: str, messages: Sequence[bytes]) -> list[tuple[str, str, bytes]]:
    connection = Connection(target, path, timeout_s=TIMEOUT_S, keep=True)
    found: dict[int, tuple[str, str, bytes]] = {}
    refused = list(range(len(messages)))
    while refused:
        for token in refused:
            connection.start(token, frame(messages[token]))
        answers = settle(connection, len(refused))
        refused = [answer.token for answer in answers if answer.code == REFUSED]
        for token, code, details, message in answers:
            if code is not None and code != REFUSED:
                found[token] = (CODES[code], details, message)
    assert connection.usable
    assert connection.idle
    connection.close()
    return [found[token] for token in range(len(messages))]


@pytest.mark.parametrize("options", [(), (("grpc.max_concurrent_streams", 2),)])
@pytest.mark.parametrize(
    ("path", "messages"),
    [
        ("/test.Service/Echo", [b"", b"a", b"b" * 70_000, b"c" * 3_000_000, b"d" * 200_000]),
        ("/test.Service/Fail", [bytes([number]) for number in range(1, 17)]),
        ("/test.Service/Nobody", [b""]),
    ],
)
def test_the_connection_finds_what_grpc_finds(
    path: str, messages: list[bytes], options: tuple[tuple[str, int], ...]
) -> None:
    with serving(METHODS, *options) as (target, _):
        assert by_http2(target, path, messages) == by_grpc(target, path, messages)


def test_the_connection_tells_its_deadline() -> None:
    with serving(METHODS) as (target, _):
        for timeout_s in (20.5, 5000.0):
            connection = Connection(
                target, "/test.Service/Remaining", timeout_s=timeout_s, keep=True
            )
            connection.start(0, frame(b""))
            (answer,) = settle(connection, 1)
            assert timeout_s - 10 < float(answer.message) <= timeout_s
            connection.close()


def test_the_connection_tells_that_it_gave_up_and_goes_on() -> None:
    started, ended, go_on = threading.Event(), threading.Event(), threading.Event()

    def wait(request: bytes, call: grpc.ServicerContext) -> bytes:
        if request:
            call.add_callback(ended.set)
            started.set()
            go_on.wait(TIMEOUT_S)
        return b"done"

    handlers: Handlers = {"test.Service": {"Wait": grpc.unary_unary_rpc_method_handler(wait)}}
    with serving(handlers, ("grpc.max_concurrent_streams", 1)) as (target, _):
        connection = Connection(target, "/test.Service/Wait", keep=True)
        running = connection.start(1, frame(b"wait"))
        waiting = connection.start(2, frame(b"wait"))
        connection.start(3, frame(b""))
        connection.flush()
        assert started.wait(TIMEOUT_S)
        connection.cancel(waiting)
        connection.cancel(running)
        (answer,) = settle(connection, 1)
        assert (answer.token, answer.code, answer.message) == (3, 0, b"done")
        assert ended.wait(TIMEOUT_S)
        go_on.set()
        connection.close()


def test_a_call_of_many_messages_goes_on_until_it_is_ended() -> None:
    with serving(METHODS) as (target, server):
        connection = Connection(target, "/test.Service/Stream", keep=True)
        stream = connection.start(7, half_close=False)
        sent = [b"x" * size for size in (1, 100_000, 0, 2_000_000, 10)]
        for message in sent:
            connection.write(stream, frame(message))
        answers: list[Answer] = []
        while len(answers) < len(sent):
            connection.flush()
            select([connection], [connection] if connection.unflushed else [], [], TIMEOUT_S)
            answers += connection.receive()
        assert [(answer.token, answer.code, answer.message) for answer in answers] == [
            (7, None, message) for message in sent
        ]
        stopped = server.stop(0)
        (end,) = settle(connection, 1)
        assert CODES[end.code or 0] in ("UNAVAILABLE", "CANCELLED")
        assert not connection.usable
        stopped.wait(TIMEOUT_S)
        connection.close()


def test_a_load_outlives_connections_that_the_server_closes(
    bench: Bench,
) -> None:
    options = (("grpc.max_connection_age_ms", 100), ("grpc.max_connection_age_grace_ms", 30_000))
    liar = Liar(lies_every=0)
    with serving(liar.handlers(), *options) as (target, _):
        (point,) = bench(target, concurrency=(2,), duration_s=1.0)["points"]
    # Two are of the first questions.
    assert len(liar.peers) > 3
    # Calls that cross the word to go away are started once more, as gRPC's clients do.
    assert point["statuses"] == {"OK": point["requests"]}
