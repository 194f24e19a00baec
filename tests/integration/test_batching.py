import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Probabilities
from convoy_service.engine.cpu import whole_cores
from convoy_service.engine.onnx_model import Model
from tests.conftest import TIMEOUT_S, Server
from tests.integration import test_inference_protocol as oip
from tests.integration.conftest import Gate, classifier_on, inference_on
from tests.integration.models import (
    COLOURS_BATCH,
    FAST_IMAGE,
    NAN_IMAGE,
    RAISING_IMAGE,
    SLOW_BATCH,
    add_poison,
    colours_of,
    slow_of,
)
from tests.integration.pictures import encoded, noise, probabilities, raw

Code = grpc.StatusCode

# Up to three times what a batch of `colours` holds.
SIZES = [1, 1, 1, 2, 3, COLOURS_BATCH, 3 * COLOURS_BATCH]


@pytest.fixture(scope="module")
def busy(models: Path, gate: Gate) -> Iterator[Server]:
    """A server of this module's own: it counts what goes through it."""
    with Server(models=models, variables=gate.variables) as server:
        yield server.ready()
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


@dataclass
class Request:
    """A request to one of the services, and what it must be answered."""

    service: str
    message: Any
    expected: Probabilities

    def send(self, channel: grpc.Channel, timeout_s: float = TIMEOUT_S) -> Any:
        if self.service == "ImageClassifier":
            return classifier_on(channel).Classify.future(self.message, timeout=timeout_s)
        return inference_on(channel).ModelInfer.future(self.message, timeout=timeout_s)

    def check(self, future: Any) -> None:
        response = future.result()
        if self.service == "ImageClassifier":
            received = np.array([probabilities(result) for result in response.results])
        else:
            received = oip.outputs_of(response)
        np.testing.assert_allclose(received, self.expected, atol=1e-6)


def random_request(
    chance: random.Random, model: str, tensor: str, pixels: Pixels, expected: Probabilities
) -> Request:
    """A request for these images, of either service and in any form."""
    if chance.random() < 0.5:
        images = map(chance.choice([raw, encoded]), pixels)
        message = pb.ClassifyRequest(model=model, images=images, top_k=10)
        return Request("ImageClassifier", message, expected)
    request = oip.infer_request(model, tensor)
    chance.choice(oip.FILLS)(request, pixels)
    return Request("GRPCInferenceService", request, expected)


def test_concurrent_requests_each_get_the_answers_to_their_own_images(
    busy: Server, offline: Model
) -> None:
    chance = random.Random(0)
    requests = []
    for seed in range(300):
        if chance.random() < 0.5:
            pixels = noise(seed, chance.choice(SIZES), (4, 4, 3))
            expected = colours_of(pixels)
            requests.append(random_request(chance, "colours", "image", pixels, expected))
        else:
            pixels = noise(seed, chance.choice(SIZES), (8, 8, 1))
            expected = offline.run(pixels)
            requests.append(random_request(chance, "digits", "pixels", pixels, expected))
    with busy.channel() as channel:
        futures = [request.send(channel) for request in requests]
        for request, future in zip(requests, futures, strict=True):
            request.check(future)


def test_concurrent_requests_are_gathered_into_batches(busy: Server, gate: Gate) -> None:
    before = busy.metrics()
    pixels = noise(9, 400, (4, 4, 3))
    with busy.channel() as channel:
        classify = classifier_on(channel).Classify
        requests = [pb.ClassifyRequest(model="colours", images=[raw(each)]) for each in pixels]
        with gate.shut("colours"):
            answers = [classify.future(request) for request in requests]
            if whole_cores() > 1:  # else who takes calls runs the batches, too
                busy.wait_until_in_flight(400)
        largest = max(answer.result().timings.batch_size for answer in answers)
    busy.wait_until_in_flight(0)
    after = busy.metrics()
    rows, runs = (
        after[f'convoy_batch_size_{part}{{model="colours"}}']
        - before.get(f'convoy_batch_size_{part}{{model="colours"}}', 0)
        for part in ("sum", "count")
    )
    assert rows == 400
    assert runs < 400
    assert 1 < largest <= COLOURS_BATCH


@pytest.mark.skipif(whole_cores() < 2, reason="there calls and batches share a core")
def test_callers_who_cancel_or_run_late_disturb_nobody(slow_models: Path, gate: Gate) -> None:
    chance = random.Random(0)
    requests = []
    for seed in range(150):
        # From 1 to three times what a batch of `slow` holds, with no SLOW_IMAGE among them.
        pixels = noise(seed, chance.randint(1, 3 * SLOW_BATCH), (2, 2, 1)) // 32 + 2
        requests.append(random_request(chance, "slow", "image", pixels, slow_of(pixels)))
    blocker = pb.ClassifyRequest(model="slow", images=[raw(FAST_IMAGE)] * SLOW_BATCH)
    with (
        Server(models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        # While the device works on this, all others wait.
        blocking = classifier_on(channel).Classify.future(blocker)
        server.wait_until_in_flight(1)
        late = [request.send(channel, chance.uniform(0, 1)) for request in requests[:50]]
        waiting = [(request, request.send(channel)) for request in requests[50:]]
        # Those that could not be answered in time are told so before it is over.
        for future in late:
            assert future.code() in {Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED}
        server.wait_until_in_flight(101)
        chance.shuffle(waiting)
        for _, future in waiting[:40]:
            future.cancel()
        server.wait_until_in_flight(61)
        open_gate()
        assert len(blocking.result().results) == SLOW_BATCH
        for request, future in waiting[40:]:
            request.check(future)

        requests[0].check(requests[0].send(channel))
        server.wait_until_in_flight(0)
        answered = [request for request, _ in waiting[40:]] + requests[:1]
        rows = SLOW_BATCH + sum(len(request.expected) for request in answered)
        metrics = server.metrics()
        assert metrics['convoy_batch_size_sum{model="slow"}'] == rows, "an abandoned image was run"
        assert metrics['convoy_images_total{model="slow",outcome="ok"}'] == rows
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves `poison`."""
    folder = tmp_path_factory.mktemp("poison")
    add_poison(folder)
    with Server(models=folder) as server:
        yield server.ready()
    assert "bug" not in server.log


POISON = [NAN_IMAGE, RAISING_IMAGE]


def good_images(seed: int, count: int) -> Pixels:
    """Images that `poison` answers."""
    return noise(seed, count, (2, 2, 1)) // 32 + 2


def test_images_that_the_model_fails_on_fail_alone(poisoned: Server) -> None:
    good = good_images(0, 9)
    images = [*good[:3], POISON[0], *good[3:6], POISON[1], *good[6:]]
    request = pb.ClassifyRequest(images=map(raw, images), top_k=4)
    with poisoned.channel() as channel:
        results = list(classifier_on(channel).Classify(request, timeout=TIMEOUT_S).results)
    for bad in (results.pop(7), results.pop(3)):
        assert bad.error.code == Code.INTERNAL.value[0]
        assert "failed on this image" in bad.error.message
    received = np.array([probabilities(result) for result in results])
    np.testing.assert_allclose(received, slow_of(good), atol=1e-6)


def test_requests_that_the_model_fails_on_leave_their_neighbours_alone(poisoned: Server) -> None:
    before = poisoned.metrics()
    good = good_images(1, 200)
    with poisoned.channel() as channel:
        infer = inference_on(channel).ModelInfer
        calls = []
        for number, image in enumerate(good):
            pixels = np.stack([image, POISON[number // 10 % 2]] if number % 10 == 0 else [image])
            request = oip.infer_request("poison", "image")
            oip.raw_pixels(request, pixels)
            calls.append(infer.future(request, timeout=TIMEOUT_S))
        for number, call in enumerate(calls):
            if number % 10 == 0:
                assert call.code() is Code.INTERNAL
                assert call.details() == "the model failed on image 1"
            else:
                expected = slow_of(good[number : number + 1])
                np.testing.assert_allclose(oip.outputs_of(call.result()), expected, atol=1e-6)
    after = poisoned.metrics()
    failed = 'convoy_images_total{model="poison",outcome="failed"}'
    assert after[failed] - before.get(failed, 0) == 20
    assert "failed on a batch of" in poisoned.log, "no bad image met others"


def test_deterministic_answers_are_the_same_bits_alone_and_under_load(
    models: Path, gate: Gate
) -> None:
    pixels = noise(10, 300, (8, 8, 1))
    with (
        Server("--deterministic", models=models, variables=gate.variables) as server,
        server.ready().channel() as channel,
    ):
        infer, requests = inference_on(channel).ModelInfer, []
        for image in pixels:
            request = oip.infer_request("digits", "pixels")
            oip.raw_pixels(request, image[np.newaxis])
            requests.append(request)
        alone = [infer(request).raw_output_contents[0] for request in requests[:20]]
        with gate.shut("tf2onnx"):
            calls = [infer.future(request) for request in requests * 2]
            if whole_cores() > 1:
                server.wait_until_in_flight(600)
        among = [call.result().raw_output_contents[0] for call in calls]
        server.wait_until_in_flight(0)
        metrics = server.metrics()
        largest = metrics['convoy_batch_size_sum{model="digits"}']
        runs = metrics['convoy_batch_size_count{model="digits"}']
    assert among[:20] == among[300:320] == alone
    assert runs < largest, "each ran alone"
