"""The six calls of the Open Inference Protocol's core, and server reflection."""

import struct
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from convoy_protos import classifier_pb2
from convoy_protos import inference_pb2 as pb
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Probabilities
from convoy_service.engine.onnx_model import Model
from tests.integration.models import colours_of
from tests.integration.pictures import encode, noise, probabilities, raw

Request = pb.ModelInferRequest


def raw_pixels(request: Request, pixels: Pixels) -> None:
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].shape[:] = pixels.shape
    request.raw_input_contents.append(pixels.tobytes())


def typed_pixels(request: Request, pixels: Pixels) -> None:
    request.inputs[0].datatype = "UINT8"
    request.inputs[0].shape[:] = pixels.shape
    request.inputs[0].contents.uint_contents.extend(pixels.ravel().tolist())


def raw_bytes(request: Request, pixels: Pixels) -> None:
    request.inputs[0].datatype = "BYTES"
    request.inputs[0].shape[:] = [len(pixels)]
    elements = [encode(image) for image in pixels]
    request.raw_input_contents.append(
        b"".join(struct.pack("<I", len(element)) + element for element in elements)
    )


def typed_bytes(request: Request, pixels: Pixels) -> None:
    request.inputs[0].datatype = "BYTES"
    # [N, 1] is how some clients shape it.
    request.inputs[0].shape[:] = [len(pixels), 1]
    request.inputs[0].contents.bytes_contents.extend(encode(image) for image in pixels)


FILLS = [raw_pixels, typed_pixels, raw_bytes, typed_bytes]


def infer_request(model: str, tensor: str) -> Request:
    return Request(model_name=model, inputs=[Request.InferInputTensor(name=tensor)])


def outputs_of(response: pb.ModelInferResponse) -> Probabilities:
    (output,) = response.outputs
    assert output.datatype == "FP32"
    if response.raw_output_contents:
        assert not output.HasField("contents")
        values = np.frombuffer(response.raw_output_contents[0], "<f4")
    else:
        values = np.array(output.contents.fp32_contents, np.float32)
    return values.reshape(output.shape)


def test_the_server_is_live_ready_and_says_what_it_is(inference: Any) -> None:
    assert inference.ServerLive(pb.ServerLiveRequest()).live
    assert inference.ServerReady(pb.ServerReadyRequest()).ready
    answer = inference.ServerMetadata(pb.ServerMetadataRequest())
    assert (answer.name, answer.version) == ("convoy", metadata.version("convoy-serving"))
    offered = {"classification", "model_configuration", "schedule_policy"}
    assert offered <= set(answer.extensions)
    assert not {"model_repository", "system_shared_memory"} & set(answer.extensions)


@pytest.mark.parametrize("version", ["", "1"])
def test_a_model_is_ready_and_says_what_it_takes(inference: Any, version: str) -> None:
    assert inference.ModelReady(pb.ModelReadyRequest(name="digits", version=version)).ready
    answer = inference.ModelMetadata(pb.ModelMetadataRequest(name="digits", version=version))
    assert (answer.name, list(answer.versions)) == ("digits", ["1"])
    assert answer.platform == "onnxruntime_onnx"
    (source,), (sink,) = answer.inputs, answer.outputs
    assert (source.name, source.datatype, list(source.shape)) == ("pixels", "UINT8", [-1, 8, 8, 1])
    assert (sink.name, sink.datatype, list(sink.shape)) == ("probabilities", "FP32", [-1, 10])


@pytest.mark.parametrize("fill", FILLS, ids=lambda fill: fill.__name__)
def test_every_form_of_contents_is_answered_as_onnx_runtime_does_here(
    inference: Any, offline: Model, fill: Callable[[Request, Pixels], None]
) -> None:
    pixels = noise(5, 11, (8, 8, 1))
    request = infer_request("digits", "pixels")
    request.id = "number 7"
    fill(request, pixels)
    response = inference.ModelInfer(request)
    assert (response.model_name, response.model_version) == ("digits", "1")
    assert response.id == "number 7"
    assert response.outputs[0].name == "probabilities"
    assert bool(response.raw_output_contents) == bool(request.raw_input_contents)
    np.testing.assert_allclose(outputs_of(response), offline.run(pixels), atol=1e-6)


def test_typed_pixels_of_many_images_keep_their_order(inference: Any) -> None:
    pixels = noise(9, 4000, (4, 4, 3))
    request = infer_request("colours", "image")
    typed_pixels(request, pixels)
    np.testing.assert_allclose(
        outputs_of(inference.ModelInfer(request)), colours_of(pixels), atol=1e-6
    )


def test_answers_equal_those_of_classify(inference: Any, classifier: Any) -> None:
    pixels = noise(6, 7, (8, 8, 1))
    request = infer_request("digits", "pixels")
    raw_pixels(request, pixels)
    asked = classifier_pb2.ClassifyRequest(model="digits", images=map(raw, pixels), top_k=10)
    classified = [probabilities(result) for result in classifier.Classify(asked).results]
    np.testing.assert_array_equal(outputs_of(inference.ModelInfer(request)), classified)


@pytest.mark.parametrize("fill", [raw_pixels, typed_bytes], ids=lambda fill: fill.__name__)
def test_a_request_larger_than_a_batch_is_split_and_put_together_again(
    inference: Any, fill: Callable[[Request, Pixels], None]
) -> None:
    pixels = noise(7, 50, (4, 4, 3))
    request = infer_request("colours", "image")
    fill(request, pixels)
    response = inference.ModelInfer(request)
    np.testing.assert_allclose(outputs_of(response), colours_of(pixels), atol=1e-6)


def test_encoded_images_are_resized(inference: Any) -> None:
    large = np.full((1, 60, 90, 3), (10, 200, 30), np.uint8)
    request = infer_request("colours", "image")
    raw_bytes(request, large)
    answer = outputs_of(inference.ModelInfer(request))
    np.testing.assert_allclose(answer, colours_of(large), atol=1e-6)


def test_outputs_and_parameters_that_clients_send_are_accepted(inference: Any) -> None:
    pixels = noise(8, 2, (4, 4, 3))
    request = infer_request("colours", "image")
    request.model_version = "1"
    request.outputs.add(name="scores")
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    request.parameters["priority"].uint64_param = 1
    request.parameters["timeout"].int64_param = 1_000_000
    raw_pixels(request, pixels)
    answer = outputs_of(inference.ModelInfer(request))
    np.testing.assert_allclose(answer, colours_of(pixels), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "request_"),
    [
        ("ModelMetadata", pb.ModelMetadataRequest(name="nobody's")),
        ("ModelMetadata", pb.ModelMetadataRequest(name="digits", version="latest")),
        ("ModelConfig", pb.ModelConfigRequest(name="nobody's")),
        ("ModelConfig", pb.ModelConfigRequest(name="digits", version="9")),
    ],
)
def test_an_unknown_model_or_version_is_not_found(inference: Any, call: str, request_: Any) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        getattr(inference, call)(request_)
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(("name", "version"), [("nobody's", ""), ("digits", "9"), ("digits", "x")])
def test_an_unknown_model_or_version_is_not_ready(inference: Any, name: str, version: str) -> None:
    assert not inference.ModelReady(pb.ModelReadyRequest(name=name, version=version)).ready


def test_reflection_lists_and_describes_the_services(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {
        "convoy.v1.ImageClassifier",
        "convoy.v1.ModelControl",
        "inference.GRPCInferenceService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    pool = DescriptorPool(database)
    assert calls_of(pool, "convoy.v1.ImageClassifier") == [
        "Classify", "ClassifyStream", "ListModels",
    ]  # fmt: skip
    assert calls_of(pool, "inference.GRPCInferenceService") == [
        "ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer",
        "ModelStreamInfer", "ModelConfig", "ModelStatistics",
        "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload",
        "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister",
        "CudaSharedMemoryUnregister",
    ]  # fmt: skip
    assert calls_of(pool, "convoy.v1.ModelControl") == ["Promote", "Rollback", "Pin"]


def calls_of(pool: DescriptorPool, service: str) -> Sequence[str]:
    return [method.name for method in pool.FindServiceByName(service).methods]
