"""Triton's extensions of the Open Inference Protocol: configuration, classes, streams, shared memory."""

import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoy_protos import inference_pb2 as pb
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Golden
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.integration.conftest import Peer, inference_on
from tests.integration.models import (
    COLOURS,
    COLOURS_BATCH,
    FAST_IMAGE,
    SLOW_IMAGE,
    add_colours,
    colours_of,
)
from tests.integration.pictures import noise
from tests.integration.test_inference_protocol import (
    FILLS,
    Request,
    infer_request,
    outputs_of,
    raw_bytes,
    raw_pixels,
    typed_pixels,
)

Code = grpc.StatusCode


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details() or ""


def test_the_configuration_says_how_the_model_is_served(inference: Any) -> None:
    config = inference.ModelConfig(pb.ModelConfigRequest(name="colours", version="1")).config
    (source,), (sink,), (group,) = config.input, config.output, config.instance_group
    assert (config.name, config.platform, config.backend) == (
        "colours", "onnxruntime_onnx", "onnxruntime",
    )  # fmt: skip
    assert config.max_batch_size == COLOURS_BATCH
    assert (source.name, source.data_type, list(source.dims)) == ("image", pb.TYPE_UINT8, [4, 4, 3])
    assert source.format == pb.ModelInput.FORMAT_NHWC
    assert (sink.name, sink.data_type, list(sink.dims)) == ("scores", pb.TYPE_FP32, [3])
    assert sink.label_filename == "labels.txt"
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert config.dynamic_batching.max_queue_delay_microseconds == 0
    assert config.dynamic_batching.default_queue_policy.default_timeout_microseconds == 10_000_000
    assert config.version_policy.latest.num_versions == 1
    assert (group.kind, group.count) == (pb.ModelInstanceGroup.KIND_CPU, 1)
    assert config.default_model_filename == "model.onnx"
    told = {key: value.string_value for key, value in config.parameters.items()}
    assert {"version": "1", "variant": "fp32", "device": "cpu"}.items() <= told.items()


# The best classes.


def classes_asked(request: Request, count: int) -> None:
    request.outputs.add(name="scores").parameters["classification"].int64_param = count


def elements_of(response: pb.ModelInferResponse) -> list[bytes]:
    (output,) = response.outputs
    if not response.raw_output_contents:
        return list(output.contents.bytes_contents)
    (rest,), elements = response.raw_output_contents, []
    while rest:
        (length,) = struct.unpack_from("<I", rest)
        elements.append(rest[4 : 4 + length])
        rest = rest[4 + length :]
    return elements


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill.__name__)
@pytest.mark.parametrize("asked", [1, 2, 99])
def test_the_best_classes_of_each_image(
    inference: Any, fill: Callable[[Request, Pixels], None], asked: int
) -> None:
    pixels = noise(3, 12, (4, 4, 3))
    request = infer_request("colours", "image")
    fill(request, pixels)
    values = outputs_of(inference.ModelInfer(request))
    classes_asked(request, asked)
    response = inference.ModelInfer(request)
    (output,) = response.outputs
    count = min(asked, len(COLOURS))
    assert (output.name, output.datatype, list(output.shape)) == ("scores", "BYTES", [12, count])
    assert bool(response.raw_output_contents) == bool(request.raw_input_contents)
    expected = [
        f"{row[index]:f}:{index}:{COLOURS[index]}".encode()
        for row in values
        for index in np.argsort(-row, kind="stable")[:count]
    ]
    assert elements_of(response) == expected


def test_classes_of_many_images(inference: Any) -> None:
    pixels = noise(4, 4000, (4, 4, 3))
    request = infer_request("colours", "image")
    raw_pixels(request, pixels)
    classes_asked(request, 1)
    best = [int(each.split(b":")[1]) for each in elements_of(inference.ModelInfer(request))]
    assert best == colours_of(pixels).argmax(axis=1).tolist()


# Streams.


def messages(pixels: Pixels, wrong: int = -1) -> Iterator[Request]:
    for number, image in enumerate(pixels):
        request = infer_request("colours" if number != wrong else "nobody's", "image")
        request.id = str(number)
        fill = raw_pixels if number % 2 else typed_pixels
        fill(request, image[np.newaxis])
        yield request


def test_a_stream_answers_in_order_and_survives_errors(inference: Any) -> None:
    pixels = noise(5, 600, (4, 4, 3))
    answers = list(inference.ModelStreamInfer(messages(pixels, wrong=7), timeout=TIMEOUT_S))
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(600)]
    failed = answers.pop(7)
    assert 'no model "nobody\'s"' in failed.error_message
    assert failed.infer_response == pb.ModelInferResponse(id="7")
    assert not any(answer.error_message for answer in answers)
    assert all(
        answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers
    )
    received = [outputs_of(answer.infer_response)[0] for answer in answers]
    np.testing.assert_allclose(received, np.delete(colours_of(pixels), 7, axis=0), atol=1e-6)


def test_a_fast_answer_of_a_stream_waits_for_the_slow_one_before_it(slow_server: Server) -> None:
    answered = threading.Event()

    def requests() -> Iterator[Request]:
        for name, image in (("slow", SLOW_IMAGE), ("wrong", FAST_IMAGE[:1]), ("fast", FAST_IMAGE)):
            request = infer_request("slow", "image")
            request.id = name
            raw_pixels(request, image[np.newaxis])
            yield request
        # Answers are sent on, whether more is to come or not.
        answered.wait(TIMEOUT_S)

    with slow_server.channel() as channel:
        call = inference_on(channel).ModelStreamInfer(requests(), timeout=TIMEOUT_S)
        told = [next(call).infer_response.id for _ in range(3)]
        answered.set()
        assert told == ["slow", "wrong", "fast"]
        assert next(call, None) is None


def test_an_error_ends_a_stream_whose_caller_asks_for_that(inference: Any) -> None:
    pixels = noise(6, 20, (4, 4, 3))
    call = inference.ModelStreamInfer(
        messages(pixels, wrong=3), timeout=TIMEOUT_S, metadata=[("triton_grpc_error", "true")]
    )
    assert [next(call).infer_response.id for _ in range(3)] == ["0", "1", "2"]
    code, words = refused(lambda: next(call))
    assert code is Code.NOT_FOUND
    assert "nobody's" in words


# Shared memory.

OBJECT = Path("/dev/shm") / f"convoy-extensions-{os.getpid()}"


@pytest.fixture(scope="module")
def sharing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two processes that take calls, both with memory that callers share."""
    models = tmp_path_factory.mktemp("sharing")
    add_colours(models)
    shutil.copytree(REPOSITORY / "models" / "digits", models / "digits")
    arguments = ("--allow-shared-memory", "--acceptors", "2", "--max-request-mb", "2")
    with Server(*arguments, models=models) as server:
        yield server.ready()
        assert not [each for each in Path("/dev/shm").glob("convoy-*/*") if each.is_symlink()]


@pytest.fixture
def clients(sharing: Server) -> Iterator[list[Any]]:
    """On connections of their own, so that both processes have some."""
    with ExitStack() as stack:
        clients = [inference_on(stack.enter_context(sharing.channel())) for _ in range(8)]
        yield clients
        clients[0].SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest())
        OBJECT.unlink(missing_ok=True)


def register(client: Any, name: str, offset: int, size: int, key: str = OBJECT.name) -> None:
    client.SystemSharedMemoryRegister(
        pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=size)
    )


def place(tensor: Any, region: str, size: int, offset: int = 0) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def shared_request(pixels: Pixels, offset: int = 0) -> Request:
    """Pixels in region `in`, answers into `out`."""
    request = infer_request("colours", "image")
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].shape[:] = pixels.shape
    place(request.inputs[0], "in", pixels.nbytes, offset)
    place(request.outputs.add(name="scores"), "out", len(pixels) * 12)
    return request


def test_memory_is_shared_with_all_processes(clients: list[Any]) -> None:
    pixels = noise(7, 9, (4, 4, 3))
    OBJECT.write_bytes(bytes(500) + pixels.tobytes() + bytes(9 * 12))
    register(clients[0], "in", 100, 400 + pixels.nbytes)
    register(clients[1], "out", 500 + pixels.nbytes, 9 * 12)
    assert (
        "system_shared_memory" in clients[0].ServerMetadata(pb.ServerMetadataRequest()).extensions
    )
    for client in clients:
        status = client.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())
        assert {
            name: (each.name, each.key, each.offset, each.byte_size)
            for name, each in status.regions.items()
        } == {
            "in": ("in", OBJECT.name, 100, 400 + pixels.nbytes),
            "out": ("out", OBJECT.name, 500 + pixels.nbytes, 9 * 12),
        }
        with OBJECT.open("r+b") as file:
            file.seek(500 + pixels.nbytes)
            file.write(bytes(9 * 12))
        response = client.ModelInfer(shared_request(pixels, 400))
        (output,) = response.outputs
        assert (output.name, output.datatype, list(output.shape)) == ("scores", "FP32", [9, 3])
        assert output.parameters["shared_memory_region"].string_param == "out"
        assert list(response.raw_output_contents) == [b""]
        values = np.frombuffer(OBJECT.read_bytes(), "<f4", offset=500 + pixels.nbytes)
        np.testing.assert_allclose(values.reshape(9, 3), colours_of(pixels), atol=1e-6)
    by_value = shared_request(pixels, 400)
    del by_value.outputs[:]
    received = outputs_of(clients[0].ModelInfer(by_value))
    np.testing.assert_allclose(received, colours_of(pixels), atol=1e-6)


def test_many_images_and_files_in_shared_memory(clients: list[Any]) -> None:
    pixels, pictures = noise(8, 42_000, (4, 4, 3)), noise(9, 5, (4, 4, 3))
    files = infer_request("colours", "image")
    raw_bytes(files, pictures)
    content = files.raw_input_contents.pop()
    OBJECT.write_bytes(pixels.tobytes() + content)
    register(clients[0], "in", 0, pixels.nbytes + len(content))
    place(files.inputs[0], "in", len(content), pixels.nbytes)
    received = outputs_of(clients[0].ModelInfer(files))
    np.testing.assert_allclose(received, colours_of(pictures), atol=1e-6)
    many = shared_request(pixels[:4000])
    del many.outputs[:]
    received = outputs_of(clients[0].ModelInfer(many))
    np.testing.assert_allclose(received, colours_of(pixels[:4000]), atol=1e-6)
    place(many.inputs[0], "in", 2_000_001)
    code, words = refused(lambda: clients[0].ModelInfer(many))
    assert (code, words) == (
        Code.INVALID_ARGUMENT,
        "2.0 MB of shared memory, the limit is 2: send fewer images a call",
    )


def test_what_does_not_fit_shared_memory_is_refused(clients: list[Any]) -> None:
    client, pixels = clients[0], noise(7, 9, (4, 4, 3))
    OBJECT.write_bytes(pixels.tobytes() + bytes(9 * 12))
    register(client, "in", 0, pixels.nbytes)
    register(client, "out", pixels.nbytes, 9 * 12)
    assert refused(lambda: register(client, "in", 0, 1))[0] is Code.ALREADY_EXISTS
    for key in ("../../etc/passwd", "/nobody's", "a/b"):
        assert refused(lambda key=key: register(client, "x", 0, 1, key))[0] is Code.INVALID_ARGUMENT  # type: ignore[misc]
    unknown = pb.SystemSharedMemoryStatusRequest(name="x")
    assert refused(lambda: client.SystemSharedMemoryStatus(unknown))[0] is Code.NOT_FOUND

    def status(change: Callable[[Request], object]) -> tuple[grpc.StatusCode, str]:
        request = shared_request(pixels)
        change(request)
        return refused(lambda: client.ModelInfer(request))

    def told(code: grpc.StatusCode, words: str, change: Callable[[Request], object]) -> None:
        got = status(change)
        assert got[0] is code, got
        assert words in got[1]

    bad = Code.INVALID_ARGUMENT
    told(Code.NOT_FOUND, "'x'", lambda r: place(r.inputs[0], "x", 1))
    told(bad, "region 'in' has 432", lambda r: place(r.inputs[0], "in", pixels.nbytes, 1))
    told(bad, "region 'in' has 432", lambda r: place(r.inputs[0], "in", 2**63 - 1, 2**63 - 1))
    told(bad, "431 values, but shape [9, 4, 4, 3] has 432", lambda r: place(r.inputs[0], "in", 431))
    told(bad, "both in shared memory", lambda r: r.raw_input_contents.append(pixels.tobytes()))
    told(bad, "both in shared memory", lambda r: r.inputs[0].contents.uint_contents.append(1))
    told(
        bad, "107 bytes of shared memory are too little", lambda r: place(r.outputs[0], "out", 107)
    )
    told(
        bad,
        "both `classification` and",
        lambda r: (
            r.outputs[0].parameters["classification"].MergeFrom(pb.InferParameter(int64_param=1))
        ),
    )
    os.truncate(OBJECT, pixels.nbytes - 1)
    told(bad, "does not reach to byte 432", lambda r: r.outputs.pop())
    assert client.ServerLive(pb.ServerLiveRequest()).live


def test_tritonclient_shares_memory(
    peer: Peer, sharing: Server, tmp_path: Path, digits: Golden
) -> None:
    np.save(tmp_path / "pixels.npy", digits.pixels)
    seen = peer("shared", sharing.target, tmp_path)
    np.testing.assert_allclose(seen["shared"], digits.probabilities, atol=1e-6)
    assert seen["shared"] == seen["by_value"]
    assert seen["regions"] == ["back", "there"]
    assert seen["refusal"] == "StatusCode.NOT_FOUND"
    assert seen["left"] == 0


def test_nothing_is_shared_unless_that_is_allowed(inference: Any) -> None:
    for call in (
        lambda: register(inference, "in", 0, 1),
        lambda: inference.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest()),
        lambda: inference.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest()),
        lambda: inference.ModelInfer(shared_request(noise(7, 9, (4, 4, 3)))),
    ):
        code, words = refused(call)
        assert code is Code.UNIMPLEMENTED
        assert "--allow-shared-memory" in words
