from collections.abc import Iterator

import grpc
import pytest

from convoy_protos import classifier_pb2 as pb
from tests.conftest import Server
from tests.integration import bad_input
from tests.integration.bad_input import CASES, CLASSIFY, INFER, PICTURES, Case, Picture, ask
from tests.integration.pictures import raw, solid


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with bad_input.serve(tmp_path_factory.mktemp("limited")) as server:
        yield server.ready()
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


@pytest.fixture
def limited_channel(limited: Server) -> Iterator[grpc.Channel]:
    """A channel; after the test, the next good request is answered by the same process."""
    with limited.channel() as channel:
        yield channel
        good = pb.ClassifyRequest(model="colours", images=[raw(solid("blue"))])
        assert ask(channel, CLASSIFY, good) == ("OK", "blue")


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.what)
def test_pictures_are_answered_or_refused_alike_by_both_services(
    limited_channel: grpc.Channel, picture: Picture
) -> None:
    status, message = ask(limited_channel, CLASSIFY, bad_input.classify_picture(picture))
    assert status == picture.status
    assert picture.words in message
    inferred = ask(limited_channel, INFER, bad_input.infer_picture(picture))
    if status == "OK":
        assert inferred == (status, message) == ("OK", picture.words)
    else:
        assert inferred == (status, f"image 0: {message}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.call.split('/')[2]}: {case.what}")
def test_requests_are_refused_with_what_to_do(limited_channel: grpc.Channel, case: Case) -> None:
    status, message = ask(limited_channel, case.call, case.body)
    assert status == case.status
    assert case.words in message
