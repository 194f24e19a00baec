"""HTTP/REST on a real server: http.client, raw sockets, and curl as docs/http.md says."""

import contextlib
import gzip
import http.client
import json
import queue
import re
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from convoy_service.artifacts.reader import Golden
from tests.certificates import make_certificates
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.integration.conftest import Gate, wait_until
from tests.integration.models import FAST_IMAGE, add_slow, colours_of, slow_of
from tests.integration.pictures import encode, noise

INFER = "/v2/models/digits/infer"
PIXELS = noise(0, 100, (4, 4, 3))


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def told(self) -> Any:
        return json.loads(self.body)


def connect(server: Server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=TIMEOUT_S)


def ask(server: Server, path: str, body: Any = None, *, verb: str = "", **headers: str) -> Answer:
    """`headers` have _ for -; a body that is not bytes is sent as JSON."""
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    with contextlib.closing(connect(server)) as connection:
        connection.request(verb or ("GET" if body is None else "POST"), path, body, given)
        response = connection.getresponse()
        return Answer(response.status, response.headers, response.read())


def tensors(pixels: Any, *, name: str = "pixels", **more: Any) -> dict[str, Any]:
    shape = list(np.shape(pixels))
    tensor = {"name": name, "datatype": "UINT8", "shape": shape, "data": pixels}
    return {"inputs": [tensor], **more}


def binary(head: dict[str, Any], *data: bytes) -> tuple[bytes, dict[str, str]]:
    text = json.dumps(head).encode()
    return b"".join([text, *data]), {"inference_header_content_length": str(len(text))}


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Server]:
    with Server("--http-port", "0", "--max-request-mb", "2", models=models) as server:
        yield server.ready()
    assert "Traceback" not in server.log
    assert "python_multipart" not in server.log  # which warns of each form that is broken


def test_every_path_is_described_and_answers(server: Server) -> None:
    described = ask(server, "/openapi.json").told
    assert described["openapi"] == "3.1.0"
    page = ask(server, "/docs")
    assert page.headers["content-type"].startswith("text/html")
    known = set(described["components"]["schemas"])
    assert set(re.findall(r"#/components/schemas/(\w+)", json.dumps(described))) <= known
    named = {"model": "digits", "version": "1", "region": "none"}
    statuses = {}
    for path, operations in described["paths"].items():
        assert path.encode() in page.body
        for verb, operation in operations.items():
            assert {
                each["name"] for each in operation["parameters"] if each["in"] == "path"
            } == set(re.findall(r"\{(\w+)\}", path))
            answer = ask(server, path.format(**named), b"{}" if verb == "post" else None)
            statuses[path] = answer.status
            if answer.status != 200:
                assert answer.told.keys() == {"error"}
    # What is neither allowed here, nor asked for as it should be.
    refused = {path: status for path, status in statuses.items() if status != 200}
    assert {status for path, status in refused.items() if "shared" in path} == {400, 501}
    assert {status for path, status in refused.items() if "repository" in path} == {403}
    assert {path for path, status in refused.items() if "infer" in path and status == 400} == {
        "/v2/models/{model}/infer",
        "/v2/models/{model}/versions/{version}/infer",
    }
    assert refused["/v1/classify"] == 404  # there are several models


def test_what_is_served_is_told_as_the_protocol_says(server: Server) -> None:
    assert ask(server, "/v2/health/live").told == {"live": True}
    assert ask(server, "/v2/health/ready").told == {"ready": True}
    assert ask(server, "/v2/models/digits/ready").told == {"name": "digits", "ready": True}
    assert ask(server, "/v2/models/digits/versions/9/ready").status in {404, 503}
    told = ask(server, "/v2").told
    assert told["name"] == "convoy"
    assert "binary_tensor_data" in told["extensions"]
    model = ask(server, "/v2/models/digits/versions/1").told
    assert model["inputs"] == [{"name": "pixels", "datatype": "UINT8", "shape": [-1, 8, 8, 1]}]
    config = ask(server, "/v2/models/digits/config").told
    assert config["input"][0]["data_type"] == "TYPE_UINT8"
    assert config["max_batch_size"] == 64
    (statistics,) = ask(server, "/v2/models/digits/stats").told["model_stats"]
    assert type(statistics["inference_stats"]["success"]["count"]) is int
    index = ask(server, "/v2/repository/index", {"ready": True}).told
    assert [each["name"] for each in index] == ["colours", "digits"]
    head = ask(server, "/v2", verb="HEAD")
    assert (head.status, head.body) == (200, b"")


@pytest.mark.parametrize("nested", [True, False])
def test_pixels_in_json_are_answered_in_json(server: Server, digits: Golden, nested: bool) -> None:
    body = tensors(digits.pixels.tolist(), id="seven")
    if not nested:
        body["inputs"][0]["data"] = digits.pixels.ravel().tolist()
    told = ask(server, INFER, body).told
    assert (told["model_name"], told["model_version"], told["id"]) == ("digits", "1", "seven")
    (output,) = told["outputs"]
    assert (output["datatype"], output["shape"]) == ("FP32", [8, 10])
    values = np.reshape(output["data"], (8, 10))
    np.testing.assert_allclose(values, digits.probabilities, atol=1e-4)


def test_binary_data_go_in_and_come_out_where_they_are_wanted(
    server: Server, digits: Golden
) -> None:
    pixels = digits.pixels.tobytes()
    head = tensors(digits.pixels.tolist())
    del head["inputs"][0]["data"]
    head["inputs"][0]["parameters"] = {"binary_data_size": len(pixels)}
    wanted = {"name": "probabilities", "parameters": {"binary_data": True}}
    for more in ({"parameters": {"binary_data_output": True}}, {"outputs": [wanted]}):
        body, headers = binary({**head, **more}, pixels)
        answer = ask(server, INFER, body, **headers)
        length = int(answer.headers["inference-header-content-length"])
        assert answer.headers["content-type"] == "application/octet-stream"
        (output,) = json.loads(answer.body[:length])["outputs"]
        values = answer.body[length:]
        assert output["parameters"] == {"binary_data_size": len(values)}
        got = np.frombuffer(values, "<f4").reshape(8, 10)
        np.testing.assert_allclose(got, digits.probabilities, atol=1e-4)
        # The same bits as the JSON of the same model.
        (told,) = ask(server, INFER, tensors(digits.pixels.tolist())).told["outputs"]
        np.testing.assert_array_equal(np.float32(told["data"]), got.ravel())
    # Asked for otherwise by name.
    wanted["parameters"] = {"binary_data": False}
    body, headers = binary(
        {**head, "outputs": [wanted], "parameters": {"binary_data_output": True}}, pixels
    )
    assert len(ask(server, INFER, body, **headers).told["outputs"][0]["data"]) == 80


def test_encoded_images_come_as_binary_data_or_base64_and_classes_as_strings(
    server: Server,
) -> None:
    images = [encode(each) for each in PIXELS[:2]]
    raw = b"".join(struct.pack("<I", len(each)) + each for each in images)
    tensor: dict[str, Any] = {"name": "pixels", "datatype": "BYTES", "shape": [2]}
    outputs = [{"name": "probabilities", "parameters": {"classification": 1}}]
    body, headers = binary(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "outputs": outputs,
        },
        raw,
    )
    texts = {
        **tensor,
        "data": [b64encode(each).decode() for each in images],
        "parameters": {"content_type": "base64"},
    }
    path = "/v2/models/colours/infer"
    names = ask(server, "/v2/models/colours").told
    tensor["name"] = texts["name"] = names["inputs"][0]["name"]
    outputs[0]["name"] = names["outputs"][0]["name"]
    body, headers = binary(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "outputs": outputs,
        },
        raw,
    )
    first = ask(server, path, body, **headers).told["outputs"]
    second = ask(server, path, {"inputs": [texts], "outputs": outputs}).told["outputs"]
    assert first == second
    assert (first[0]["datatype"], first[0]["shape"]) == ("BYTES", [2, 1])
    for text, expected in zip(first[0]["data"], colours_of(PIXELS[:2]), strict=True):
        value, index, label = text.split(":")
        assert (int(index), label) == (expected.argmax(), ("red", "green", "blue")[int(index)])
        assert float(value) == pytest.approx(expected.max(), abs=1e-4)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_both_ways_may_be_compressed(server: Server, digits: Golden, coding: str) -> None:
    pack, unpack = (gzip.compress, gzip.decompress) if coding == "gzip" else (zlib.compress, zlib.decompress)  # fmt: skip
    body = pack(json.dumps(tensors(digits.pixels.tolist())).encode())
    asked = {"content_encoding": coding, "accept_encoding": f"br, {coding};q=0.5"}
    answer = ask(server, INFER, body, **asked)
    assert answer.headers["content-encoding"] == coding
    assert json.loads(unpack(answer.body))["outputs"][0]["shape"] == [8, 10]
    # Short answers are left as they are.
    assert "content-encoding" not in ask(server, "/v2/health/live", **asked).headers


def test_labels_of_a_file_and_of_several_of_which_one_is_broken(server: Server) -> None:
    images = [encode(each) for each in PIXELS[:2]]
    path = "/v1/classify?model=colours"
    for kind in ("image/png", "application/octet-stream", "application/x-www-form-urlencoded"):
        told = ask(server, f"{path}&version=1&top_k=2", images[0], content_type=kind).told
        ((result,), expected) = told["results"], colours_of(PIXELS[:1])[0]
        best, second = result["labels"]
        assert (told["model"], told["version"]) == ("colours", 1)
        assert (best["index"], second["index"]) == tuple(np.argsort(-expected)[:2])
        assert best["probability"] == pytest.approx(expected.max(), abs=1e-6)

    def part(name: str, content: bytes) -> bytes:
        disposition = f'Content-Disposition: form-data; name="image"; filename="{name}"'
        return b"--xyz\r\n%b\r\n\r\n%b\r\n" % (disposition.encode(), content)

    kind = "multipart/form-data; boundary=xyz"
    form = b"".join(
        [part("a", images[0]), part("b", b"broken"), part("c", images[1]), b"--xyz--\r\n"]
    )
    first, broken, last = ask(server, path, form, content_type=kind).told["results"]
    assert "these 6 bytes are no JPEG" in broken["error"]
    for result, expected in (
        (first, colours_of(PIXELS[:1])[0]),
        (last, colours_of(PIXELS[1:2])[0]),
    ):
        assert result["labels"][0]["index"] == expected.argmax()

    for body, words in (
        (form[:-20], "does not end"),
        (b"--xyz--\r\n", "no images"),
        (part("a", b"").replace(b'; filename="a"', b"") + b"--xyz--\r\n", "is no file"),
        ((part("", b"") * 5000) + b"--xyz--\r\n", "more than 4096 images"),
        (b"--xyz\r\n" + b"a" * 100_000, "form"),
        (b"nothing of the kind", "form"),
    ):
        answer = ask(server, path, body, content_type=kind)
        assert answer.status == 400, words
        assert words in answer.told["error"]
    assert ask(server, path, form, content_type="multipart/form-data").status == 400


GOOD = tensors(np.zeros((1, 8, 8, 1), int).tolist())


def with_input(**changes: Any) -> dict[str, Any]:
    return {"inputs": [{**GOOD["inputs"][0], **changes}]}


ERRORS: list[tuple[str, str, Any, dict[str, str], int, str]] = [
    ("no such path", "/v2/nothing", None, {}, 404, "/docs"),
    ("not offered", "/v2/models/digits/generate", {}, {}, 501, "not offered"),
    ("memory of a card", "/v2/cudasharedmemory/region/x/register", {}, {}, 501, "not offered"),
    ("another verb", INFER, None, {}, 405, "POST"),
    ("no such model", "/v2/models/none/infer", GOOD, {}, 404, "no model 'none'"),
    ("no such version", "/v2/models/digits/versions/9/infer", GOOD, {}, 404, "9"),
    ("no such label", "/v1/classify?model=digits&version=none", b"x", {}, 404, "none"),
    ("not JSON", INFER, b"{", {}, 400, "truncated"),
    ("no UTF-8", INFER, b'{"id": "\xff"}', {}, 400, "the body"),
    ("half a pair", INFER, b'{"id": "\\ud800", "inputs": []}', {}, 400, ""),
    ("deep", INFER, b"[" * 100_000, {}, 400, "the body"),
    ("many fields", INFER, b'{"a":1,' * 20_000, {}, 400, "more than 10000 fields"),
    ("no inputs", INFER, {}, {}, 400, "inputs"),
    ("two inputs", INFER, {"inputs": GOOD["inputs"] * 2}, {}, 400, "takes one"),
    ("another input", INFER, with_input(name="x"), {}, 400, "'x'"),
    ("another type", INFER, with_input(datatype="FP32"), {}, 400, "FP32"),
    ("another shape", INFER, with_input(shape=[1, 9, 8, 1]), {}, 400, "[1, 9, 8, 1]"),
    ("a shape beyond", INFER, with_input(shape=[2**64]), {}, 400, "shape"),
    ("many axes", INFER, with_input(shape=[1] * 1000), {}, 400, "shape"),
    ("too few values", INFER, with_input(data=[1]), {}, 400, "values"),
    ("a value beyond", INFER, with_input(data=[256] * 64), {}, 400, "0 to 255"),
    ("a fraction", INFER, with_input(data=[0.5] * 64), {}, 400, "0 to 255"),
    ("strings", INFER, with_input(data=["1"] * 64), {}, 400, "0 to 255"),
    ("no data", INFER, {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1]}]}, {}, 400, "`data`"),
    ("no image", INFER, with_input(datatype="BYTES", shape=[1], data=["x"]), {}, 400, "no JPEG"),
    ("no base64", INFER, with_input(datatype="BYTES", shape=[1], data=["?"], parameters={"content_type": "base64"}), {}, 400, "base64"),
    ("another output", INFER, {**GOOD, "outputs": [{"name": "x"}]}, {}, 400, "'x'"),
    ("a size without data", INFER, with_input(data=None, parameters={"binary_data_size": 64}), {}, 400, "binary_data_size"),
    ("a negative timeout", INFER, {**GOOD, "parameters": {"timeout": -1}}, {}, 400, "timeout"),
    ("a parameter beyond", INFER, {**GOOD, "parameters": {"key": 2**70}}, {}, 400, "key"),
    ("a length beyond", INFER, GOOD, {"inference_header_content_length": "99999"}, 400, "99999"),
    ("data that nobody has", INFER, json.dumps(GOOD).encode() + b"more", {"inference_header_content_length": str(len(json.dumps(GOOD)))}, 400, "4 bytes follow"),
    ("shared memory", INFER, with_input(data=None, parameters={"shared_memory_region": "x", "shared_memory_byte_size": 64}), {}, 501, "--allow-shared-memory"),
    ("data and shared memory", INFER, with_input(parameters={"shared_memory_region": "x", "shared_memory_byte_size": 64}), {}, 400, "both data and shared_memory_region"),
    ("lists of images", INFER, with_input(datatype="BYTES", shape=[1], data=[["x"]]), {}, 400, "data: Expected `str`"),
    ("an order", "/v2/repository/models/digits/unload", {}, {}, 403, "--allow-repository-control"),
    ("a time that is none", INFER, GOOD, {"grpc_timeout": "soon"}, 400, "500m"),
    ("no time", INFER, GOOD, {"grpc_timeout": "1n"}, 504, "time"),
    ("no image at all", "/v1/classify?model=digits", b"", {}, 400, "empty"),
    ("a broken image", "/v1/classify?model=digits", b"GIF89a", {"content_type": "image/gif"}, 400, "image"),
    ("JSON for an image", "/v1/classify?model=digits", {}, {"content_type": "application/json"}, 415, "multipart"),
    ("another parameter", "/v1/classify?topk=3", b"x", {}, 400, "'topk'"),
    ("no label asked for", "/v1/classify?top_k=0", b"x", {}, 400, "top_k"),
    ("another coding", INFER, GOOD, {"content_encoding": "br"}, 415, "gzip"),
    ("not packed", INFER, GOOD, {"content_encoding": "gzip"}, 400, "decompressed"),
    ("half a pack", INFER, gzip.compress(b"{}")[:-4], {"content_encoding": "gzip"}, 400, "end"),
    ("a bomb", INFER, gzip.compress(bytes(3_000_000)), {"content_encoding": "gzip"}, 413, "the limit is 2"),
    ("too large", INFER, bytes(2_000_001), {}, 413, "the limit is 2"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "headers", "status", "words"), [row[1:] for row in ERRORS], ids=[row[0] for row in ERRORS])  # fmt: skip
def test_what_is_refused_says_why_as_json(
    server: Server, path: str, body: Any, headers: dict[str, str], status: int, words: str
) -> None:
    answer = ask(server, path, body, **headers)
    assert (answer.status, answer.told.keys()) == (status, {"error"}), answer.body
    assert words in answer.told["error"]


def raw_answer(server: Server, request: bytes) -> bytes:
    """What comes until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as connection:
        connection.sendall(request)
        got = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(65_536):
                got += piece
        return got


def test_bodies_and_heads_without_end_are_not_held(server: Server) -> None:
    before = server.metrics()["process_resident_memory_bytes"]
    start = b"POST /v1/classify HTTP/1.1\r\nHost: x\r\n"
    # Said to be too large, it is refused before it comes.
    with contextlib.closing(connect(server)) as connection:
        connection.putrequest("POST", INFER)
        connection.putheader("Content-Length", str(10**12))
        connection.endheaders()
        assert connection.getresponse().status == 413
    # In pieces of which nobody says how many.
    piece = b"10000\r\n" + bytes(65_536) + b"\r\n"
    answer = raw_answer(server, start + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + piece * 40 + b"0\r\n\r\n")  # fmt: skip
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert raw_answer(server, b"GET / HTTP/1.1\r\n" + b"x: " + b"y" * 1_000_000) == b""
    answer = raw_answer(server, b"nothing of the kind\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {
        "error": "Invalid HTTP request received."
    }
    assert ask(server, "/v2/health/live").status == 200
    assert server.metrics()["process_resident_memory_bytes"] < before + 30e6


def test_what_a_body_is_unpacked_is_counted_with_all_that_come(models: Path) -> None:
    flags = ("--http-port", "0", "--max-request-mb", "3", "--max-held-mb", "3")
    with Server(*flags, models=models) as server:
        server.ready()
        bomb = gzip.compress(bytes(2_900_000))
        assert ask(server, INFER, bomb, content_encoding="gzip").status == 400  # no JSON
        with socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nContent-Length: 2000000\r\n\r\n")
            connection.sendall(bytes(1_000_000))
            connection.setblocking(False)

            def refused() -> bool:
                """One of the two is, whichever came later."""
                if ask(server, INFER, bomb, content_encoding="gzip").status == 429:
                    return True
                with contextlib.suppress(BlockingIOError):
                    assert connection.recv(65_536).startswith(b"HTTP/1.1 429 ")
                    return True
                return False

            wait_until(refused)
        wait_until(lambda: ask(server, INFER, bomb, content_encoding="gzip").status == 400)


def test_of_many_requests_at_once_only_so_many_are_held(server: Server) -> None:
    # Read no faster than they are answered, all are.
    post = b"POST /nothing HTTP/1.1\r\nContent-Length: 5000\r\n%b\r\n" + bytes(5000)
    whole = raw_answer(server, post % b"" * 999 + post % b"Connection: close\r\n")
    assert whole.count(b"HTTP/1.1 404 ") == 1000
    # Of these all would be, too, but they come in one piece.
    get = b"GET /v2/health/live HTTP/1.1\r\n%b\r\n"
    with contextlib.suppress(ConnectionResetError):
        answers = raw_answer(server, get % b"" * 999 + get % b"Connection: close\r\n")
        assert answers.count(b"HTTP/1.1 200 ") < 1000
    assert ask(server, "/v2/health/live").status == 200


@pytest.mark.parametrize("length", [b"Content-Length: 34", b"Transfer-Encoding: chunked"])
def test_a_body_is_never_taken_for_the_next_request(server: Server, length: bytes) -> None:
    head = f"POST {INFER} HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n".encode()
    address = ("127.0.0.1", server.http_port)
    with socket.create_connection(address, TIMEOUT_S) as connection:
        connection.sendall(head + length + b"\r\n\r\n")
        got = connection.recv(65_536)
        with contextlib.suppress(OSError):  # it is closed
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\n\r\n")
            while piece := connection.recv(65_536):
                got += piece
    assert got.count(b"HTTP/1.1 ") == 1
    assert got.startswith(b"HTTP/1.1 400 ")
    assert "without the header Upgrade" in json.loads(got.partition(b"\r\n\r\n")[2])["error"]
    # Without a body there is nothing to mistake.
    asked = b"GET /v2/health/live HTTP/1.1\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
    assert raw_answer(server, asked).startswith(b"HTTP/1.1 200 ")


def test_whoever_breaks_off_leaves_nothing_behind(server: Server, digits: Golden) -> None:
    body = json.dumps(tensors(digits.pixels.tolist())).encode()
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for sent in (head[:20], head, head + body[:100], head + body):
        with socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as connection:
            connection.sendall(sent)
    server.wait_until_in_flight(0)
    server.wait_for_metric("convoy_held_bytes", 0)
    # Two requests on one connection, the second before the first is answered.
    with socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as connection:
        closing = head.replace(b"Host: x", b"Host: x\r\nConnection: close")
        connection.sendall(head + body + closing + body)
        got = b""
        while piece := connection.recv(65_536):
            got += piece
    assert got.count(b"HTTP/1.1 200 OK") == 2


def test_what_is_done_over_http_is_counted(server: Server, digits: Golden) -> None:
    before = server.metrics()
    assert ask(server, INFER, tensors(digits.pixels.tolist())).status == 200
    assert ask(server, INFER, b"{").status == 400
    after = server.metrics()
    changed = {k: v - before.get(k, 0) for k, v in after.items() if "requests_total" in k}
    assert sum(v for k, v in changed.items() if "ModelInfer" in k and '"OK"' in k) == 1
    assert sum(v for k, v in changed.items() if "ModelInfer" in k and "INVALID" in k) == 1


def hold(server: Server) -> http.client.HTTPConnection:
    """A request that a `Gate` holds."""
    connection = connect(server)
    body = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 1]}]}
    body["inputs"][0]["data"] = FAST_IMAGE.ravel().tolist()
    connection.request("POST", "/v2/models/slow/infer", json.dumps(body))
    return connection


def test_callers_with_a_new_connection_for_each_request_are_all_answered() -> None:
    """Each wakes a loop that sleeps: with wake-ups whose memory was freed too early, one process
    died after 130 to 1,300 requests of three callers.
    """
    statuses: queue.SimpleQueue[int] = queue.SimpleQueue()

    def ask(port: int) -> None:
        for _ in range(700):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
            connection.request("GET", "/v2/models/digits/config")
            response = connection.getresponse()
            response.read()
            connection.close()
            statuses.put(response.status)

    with Server("--http-port", "0", models=REPOSITORY / "models") as server:
        server.ready()
        threads = [threading.Thread(target=ask, args=(server.http_port,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [statuses.get(timeout=0) for _ in range(2100)] == [200] * 2100


def test_admission_hanging_up_deadlines_and_draining(tmp_path: Path, gate: Gate) -> None:
    add_slow(tmp_path)
    flags = ("--http-port", "0", "--max-in-flight", "2", "--shutdown-delay-s", "0")
    with Server(*flags, models=tmp_path, variables=gate.variables) as server:
        server.ready()
        image = encode(FAST_IMAGE)
        with gate.shut("slow") as release:
            first, second = hold(server), hold(server)
            server.wait_until_in_flight(2)
            refused = ask(server, "/v1/classify", image)
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            assert "2 requests are in flight" in refused.told["error"]
            # What asks for no work is answered all the same.
            assert ask(server, "/v2/health/ready").told == {"ready": True}
            second.close()
            server.wait_until_in_flight(1)
            late = ask(server, "/v1/classify", image, grpc_timeout="300m")
            assert late.status in {429, 504}
            timeout = {"timeout": 300_000}
            body = {"inputs": [{"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 1], "data": [0] * 4}]}  # fmt: skip
            late = ask(server, "/v2/models/slow/infer", {**body, "parameters": timeout})
            assert late.status in {429, 504}
            server.send(signal.SIGTERM)
            server.wait_for("draining")
            release()
            with contextlib.closing(first):
                response = first.getresponse()
                values = json.loads(response.read())["outputs"][0]["data"]
            assert response.status == 200
            np.testing.assert_allclose(values, slow_of(FAST_IMAGE[np.newaxis]).ravel(), atol=1e-6)
        assert server.wait() == 0
    assert "Traceback" not in server.log


def test_who_is_answered_by_a_server_that_is_to_stop_is_sent_elsewhere(models: Path) -> None:
    flags = ("--http-port", "0", "--shutdown-delay-s", "3600")
    with contextlib.closing(Server(*flags, models=models)) as server:
        server.ready()
        with contextlib.closing(connect(server)) as connection:
            for close in (None, "close"):
                connection.request("GET", "/v2/health/live")
                response = connection.getresponse()
                assert response.read() == b'{"live":true}'
                assert response.headers["connection"] == close
                if not close:
                    server.send(signal.SIGTERM)
                    server.wait_for("still answering")


def test_several_acceptors_share_the_port(models: Path, digits: Golden) -> None:
    flags = ("--http-port", "0", "--acceptors", "2", "--engines", "1")
    with Server(*flags, models=models) as server:
        server.ready()
        body = tensors(digits.pixels.tolist())
        for _ in range(8):  # connections
            (output,) = ask(server, INFER, body).told["outputs"]
            values = np.reshape(output["data"], (8, 10))
            np.testing.assert_allclose(values, digits.probabilities, atol=1e-4)
        for more in ((), ("--acceptors", "2")):
            with Server("--http-port", str(server.http_port), *more, models=models) as other:
                other._told = True
                other.wait_for(f"port {server.http_port} .*--http-port")
                assert other.wait() == 1
                other._process.returncode = 0  # which `with` asserts


def test_tls_holds_for_http_too(models: Path, tmp_path: Path) -> None:
    made = make_certificates(tmp_path)
    flags = ("--tls-certificate", made.server.certificate, "--tls-key", made.server.key)
    with Server(
        *flags, "--tls-client-ca", made.authority.certificate, "--http-port", "0", models=models
    ) as server:
        server.ready()
        assert f"HTTP on https://127.0.0.1:{server.http_port}" in server.log
        known = ssl.create_default_context(cafile=made.authority.certificate)
        known.load_cert_chain(made.client.certificate, made.client.key)
        unknown = ssl.create_default_context(cafile=made.authority.certificate)

        def live(context: ssl.SSLContext) -> bytes:
            with (
                socket.create_connection(("127.0.0.1", server.http_port), TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as connection,
            ):
                connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nConnection: close\r\n\r\n")
                return connection.recv(10_000)

        assert live(known).startswith(b"HTTP/1.1 200 OK")
        # As TLS 1.3 has it, the client is done before the server has said no.
        answer = b""
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            answer = live(unknown)
        assert answer == b""


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_what_the_page_says_of_curl_works(server: Server, digits: Golden, tmp_path: Path) -> None:
    text = (REPOSITORY / "docs" / "http.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```\n+(?:```json\n(.*?)```)?", text, re.DOTALL)
    assert len(blocks) >= 5
    for number, name in ((3, "three.png"), (5, "five.png")):
        (tmp_path / name).write_bytes(encode(digits.pixels[number]))
    (tmp_path / "pixels.bin").write_bytes(digits.pixels[3].tobytes())
    for script, expected in blocks:
        here = script.replace("localhost:8000", f"127.0.0.1:{server.http_port}")
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", here],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        if expected:
            told, meant = json.loads(done.stdout), json.loads(expected)
            told.pop("timings", None)
            meant.pop("timings", None)
            assert _rounded(told) == _rounded(meant)


def _rounded(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _rounded(value) for name, value in told.items()}
    if isinstance(told, list):
        return [_rounded(value) for value in told]
    return round(told, 3) if isinstance(told, float) else told
