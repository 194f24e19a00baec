"""What takes the calls: grpcio's public server where that is asked for, and TLS."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2
from tests.certificates import Certificates, make_certificates
from tests.conftest import TIMEOUT_S, Server
from tests.integration import test_inference_protocol as oip
from tests.integration.conftest import Gate, classifier_on, inference_on
from tests.integration.models import FAST_IMAGE, colours_of, slow_of
from tests.integration.pictures import encoded, noise, probabilities, raw
from tests.integration.test_life import SERVING, check

Code = grpc.StatusCode
PIXELS = noise(0, 100, (4, 4, 3))


def test_the_public_server_answers_alike(models: Path) -> None:
    with (
        Server("--front", "public", models=models) as server,
        server.ready().channel() as channel,
    ):
        classify, infer = classifier_on(channel).Classify, inference_on(channel).ModelInfer
        asked = pb.ClassifyRequest(model="colours", images=map(encoded, PIXELS), top_k=3)
        received = [probabilities(result) for result in classify(asked).results]
        np.testing.assert_allclose(received, colours_of(PIXELS), atol=1e-6)

        request = oip.infer_request("colours", "image")
        oip.raw_pixels(request, np.tile(PIXELS, (40, 1, 1, 1)))
        answers = oip.outputs_of(infer(request))
        np.testing.assert_allclose(answers, colours_of(np.tile(PIXELS, (40, 1, 1, 1))), atol=1e-6)

        messages = (
            pb.ClassifyStreamRequest(
                id=str(number),
                request=pb.ClassifyRequest(model="colours", images=[raw(image)], top_k=3),
            )
            for number, image in enumerate(PIXELS)
        )
        stream = classifier_on(channel).ClassifyStream(messages, timeout=TIMEOUT_S)
        streamed = {int(answer.id): probabilities(answer.response.results[0]) for answer in stream}
        ordered = [streamed[number] for number in range(100)]
        np.testing.assert_allclose(ordered, colours_of(PIXELS), atol=1e-6)

        with pytest.raises(grpc.RpcError) as refused:
            classify(pb.ClassifyRequest(model="nobody's"))
        assert refused.value.code() is Code.NOT_FOUND
        assert check(channel, "colours") == SERVING
    assert "Traceback" not in server.log


def handed_over(pid: int) -> int:
    """How often gRPC's own threads of a process had something to do."""
    switches = 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            if (thread / "comm").read_text().strip() == "event_engine":
                status = (thread / "status").read_text()
                switches += int(status.partition("voluntary_ctxt_switches:")[2].split()[0])
    return switches


def test_the_loop_reads_its_sockets_itself(models: Path) -> None:
    with Server(models=models) as server, server.ready().channel() as channel:
        metadata = inference_on(channel).ModelMetadata
        request = inference_pb2.ModelMetadataRequest(name="colours")
        metadata(request)
        before, began = handed_over(server.pid), time.monotonic()
        for _ in range(400):
            metadata(request)
        switches, seconds = handed_over(server.pid) - before, time.monotonic() - began
        # Where they read for it, they are woken several times a call. Timers wake them, too.
        assert switches < 200 + 20 * seconds


def test_the_public_server_keeps_deadlines_and_drains(slow_models: Path, gate: Gate) -> None:
    slow = pb.ClassifyRequest(model="slow", images=[raw(FAST_IMAGE)], top_k=4)
    arguments = ("--front", "public", "--max-in-flight", "2")
    with (
        Server(*arguments, models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        classify = classifier_on(channel).Classify
        calls = [classify.future(slow), classify.future(slow, timeout=0.5)]
        assert calls[1].code() is Code.DEADLINE_EXCEEDED
        server.wait_until_in_flight(1)
        calls[1] = classify.future(slow)
        server.wait_until_in_flight(2)
        refused = classify.future(slow)
        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert "grpc-retry-pushback-ms" in dict(refused.trailing_metadata())
        calls[1].cancel()
        server.send(signal.SIGTERM)
        open_gate()
        assert server.wait() == 0
        (result,) = calls[0].result().results
        np.testing.assert_allclose(
            probabilities(result), slow_of(FAST_IMAGE[np.newaxis])[0], atol=1e-6
        )
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def secure(server: Server, certificates: Certificates, **pair: bytes) -> Iterator[Any]:
    """The calls of a channel that trusts the authority."""
    authority = certificates.authority.certificate.read_bytes()
    credentials = grpc.ssl_channel_credentials(authority, **pair)
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.enable_retries", 0)]
    with grpc.secure_channel(server.target, credentials, options) as channel:
        yield classifier_on(channel).Classify


def test_over_tls_only_clients_whose_authority_is_trusted_are_answered(
    models: Path, certificates: Certificates
) -> None:
    known = certificates.server
    flags = ("--tls-certificate", known.certificate, "--tls-key", known.key)
    request = pb.ClassifyRequest(model="colours", images=[raw(PIXELS[0])], top_k=3)
    with Server(
        *flags, "--tls-client-ca", certificates.authority.certificate, models=models
    ) as server:
        server.ready()
        shown = {
            "private_key": certificates.client.key.read_bytes(),
            "certificate_chain": certificates.client.certificate.read_bytes(),
        }
        with secure(server, certificates, **shown) as classify:
            (result,) = classify(request, timeout=TIMEOUT_S).results
            np.testing.assert_allclose(probabilities(result), colours_of(PIXELS[:1])[0], atol=1e-6)
        with secure(server, certificates) as classify:
            assert classify.future(request, timeout=TIMEOUT_S).code() is Code.UNAVAILABLE
        with server.channel() as channel:
            call = classifier_on(channel).Classify.future(request, timeout=TIMEOUT_S)
            assert call.code() is Code.UNAVAILABLE


def test_half_of_what_tls_needs_is_told(models: Path, certificates: Certificates) -> None:
    authority = certificates.authority.certificate
    with contextlib.closing(Server("--tls-client-ca", authority, models=models)) as server:
        assert server.wait() == 1
        assert "TLS needs both --tls-certificate and --tls-key" in server.log
        assert "Traceback" not in server.log


def test_a_key_that_is_none_is_told(
    models: Path, certificates: Certificates, tmp_path: Path
) -> None:
    key = tmp_path / "key.pem"
    key.write_text("no key")
    tls = ("--tls-certificate", certificates.server.certificate, "--tls-key", key)
    with contextlib.closing(Server(*tls, models=models)) as server:
        assert server.wait() == 1
        assert "--tls-certificate and --tls-key are no PEM files" in server.log
        assert "Traceback" not in server.log
