import queue
import signal
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Golden
from convoy_service.engine.cpu import whole_cores
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import Gate, classifier_on
from tests.integration.models import COLOURS, FAST_IMAGE, SLOW_IMAGE, add_colours, colours_of
from tests.integration.pictures import encoded, noise, probabilities, raw, solid


class Stream:
    """One call of ClassifyStream whose messages are sent when the test says so."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._messages: queue.SimpleQueue[pb.ClassifyStreamRequest | None] = queue.SimpleQueue()
        self.call = classifier_on(channel).ClassifyStream(
            iter(self._messages.get, None), timeout=TIMEOUT_S
        )

    def send(self, id: str, image: Pixels, model: str, top_k: int = 10) -> None:
        request = pb.ClassifyRequest(model=model, images=[raw(image)], top_k=top_k)
        self._messages.put(pb.ClassifyStreamRequest(id=id, request=request))

    def half_close(self) -> None:
        self._messages.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.call.cancel()
        self.half_close()


def test_hundreds_of_messages_each_get_their_own_answer(channel: grpc.Channel) -> None:
    pixels = noise(2, 1000, (4, 4, 3))
    with Stream(channel) as stream:
        for number, image in enumerate(pixels):
            stream.send(str(number), image, "colours")
        stream.half_close()
        answers = {int(answer.id): answer.response for answer in stream.call}
    assert sorted(answers) == list(range(1000))
    received = [probabilities(answers[number].results[0]) for number in range(1000)]
    np.testing.assert_allclose(received, colours_of(pixels), atol=1e-6)


@pytest.mark.skipif(whole_cores() < 2, reason="there calls and batches share a core")
def test_answers_overtake_a_slow_one(slow_server: Server, gate: Gate, digits: Golden) -> None:
    with (
        slow_server.channel() as channel,
        Stream(channel) as stream,
        gate.shut("slow") as open_gate,
    ):
        stream.send("slow", FAST_IMAGE, "slow")
        stream.send("fast", digits.pixels[0], "digits")
        stream.half_close()
        assert next(stream.call).id == "fast"
        open_gate()
        assert [answer.id for answer in stream.call] == ["slow"]


def test_a_message_that_fails_is_answered_and_the_stream_goes_on(channel: grpc.Channel) -> None:
    image = noise(3, 1, (4, 4, 3))[0]
    with Stream(channel) as stream:
        stream.send("lost", image, "nobody's")
        lost = next(stream.call)
        stream.send("found", image, "colours")
        found = next(stream.call)
        stream.half_close()
        assert list(stream.call) == []
        assert stream.call.code() is grpc.StatusCode.OK
    assert (lost.id, lost.error.code) == ("lost", grpc.StatusCode.NOT_FOUND.value[0])
    assert "nobody's" in lost.error.message
    assert (found.id, found.HasField("response")) == ("found", True)


def test_a_body_that_is_no_message_is_refused_and_the_stream_goes_on(channel: grpc.Channel) -> None:
    good = pb.ClassifyStreamRequest(
        id="good",
        request=pb.ClassifyRequest(model="colours", images=[encoded(noise(4, 1, (4, 4, 3))[0])]),
    )
    call: Any = channel.stream_stream(
        "/convoy.v1.ImageClassifier/ClassifyStream",
        response_deserializer=pb.ClassifyStreamResponse.FromString,
    )
    answers = list(call(iter([b"\xff garbage", good.SerializeToString()]), timeout=TIMEOUT_S))
    outcomes = {answer.id: answer for answer in answers}
    assert outcomes[""].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert outcomes["good"].HasField("response")


def test_an_empty_stream_ends_well(channel: grpc.Channel) -> None:
    with Stream(channel) as stream:
        stream.half_close()
        assert list(stream.call) == []


def test_a_caller_who_hangs_up_leaves_the_server_healthy(slow_models: Path) -> None:
    with Server(models=slow_models) as server:
        server.ready()
        for _ in range(3):
            with server.channel() as channel, Stream(channel) as stream:
                for number in range(400):
                    stream.send(str(number), FAST_IMAGE, "slow")
                stream.send("never", SLOW_IMAGE, "slow")
                next(stream.call)
                stream.call.cancel()
        with server.channel() as channel, Stream(channel) as stream:
            stream.send("still", FAST_IMAGE, "slow")
            assert next(stream.call).id == "still"
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


def test_sigterm_answers_what_was_read_and_ends_the_stream(
    slow_models: Path, gate: Gate, digits: Golden
) -> None:
    grace = ("--drain-grace-s", "600")
    with (
        Server(*grace, models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        Stream(channel) as stream,
        gate.shut("slow") as open_gate,
    ):
        stream.send("first", digits.pixels[0], "digits")
        assert next(stream.call).id == "first"
        stream.send("slow", FAST_IMAGE, "slow")
        server.wait_until_in_flight(1)
        server.send(signal.SIGTERM)
        open_gate()
        assert server.wait() == 0
        assert next(stream.call).id == "slow"
        with pytest.raises(grpc.RpcError):
            next(stream.call)
        assert stream.call.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in stream.call.details()


def test_sigterm_waits_until_the_caller_has_taken_the_answers(tmp_path: Path) -> None:
    # 12 MB of answers: more than the transport takes for a caller who does not read them.
    count = 200
    add_colours(tmp_path, labels=tuple(colour * 5000 for colour in COLOURS))
    with (
        Server(models=tmp_path) as server,
        server.ready().channel() as channel,
        Stream(channel) as stream,
    ):
        for number in range(count):
            stream.send(str(number), solid("red"), "colours")
        answered = 'convoy_requests_total{call="ClassifyStream",code="OK",model="colours"}'
        server.wait_for_metric(answered, count)
        server.send(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(0.5)
        answers: list[str] = []
        with pytest.raises(grpc.RpcError):
            answers.extend(answer.id for answer in stream.call)
        assert sorted(map(int, answers)) == list(range(count))
        assert stream.call.code() is grpc.StatusCode.UNAVAILABLE


def test_a_caller_who_does_not_read_and_gives_up_leaves_no_trace(tmp_path: Path) -> None:
    add_colours(tmp_path, labels=tuple(colour * 5000 for colour in COLOURS))
    with Server(models=tmp_path) as server:
        with server.ready().channel() as channel, Stream(channel) as stream:
            for number in range(250):
                stream.send(str(number), solid("red"), "colours")
            answered = 'convoy_requests_total{call="ClassifyStream",code="OK",model="colours"}'
            server.wait_for_metric(answered, 250)
        with server.channel() as channel, Stream(channel) as stream:
            stream.send("still", solid("red"), "colours", top_k=1)
            assert next(stream.call).id == "still"
    assert "Traceback" not in server.log
