import asyncio
import contextlib
import doctest
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from PIL import Image

import convoy.client
from convoy import AsyncClassifier, Classifier, ClassifierError, Prediction
from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts.reader import Golden
from tests.conftest import Server
from tests.integration.models import COLOURS, colours_of
from tests.integration.pictures import encode, noise, solid


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: Golden) -> None:
    """three.png and seven.png in the current folder."""
    for name, digit in (("three", 3), ("seven", 7)):
        (tmp_path / f"{name}.png").write_bytes(encode(digits.pixels[digit]))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("documented", [Classifier, AsyncClassifier])
def test_the_documented_examples_hold(pictures: None, shipped: Server, documented: type) -> None:
    text = (documented.__doc__ or "").replace("localhost:8001", shipped.target)
    names = {**vars(convoy.client)}
    test = doctest.DocTestParser().get_doctest(text, names, documented.__name__, None, None)
    said: list[str] = []
    results = doctest.DocTestRunner().run(test, out=said.append)
    assert results.attempted > 0
    assert results.failed == 0, "".join(said)


Many = Callable[..., list[Prediction]]


def many(target: str, images: Any, top_k: int = 1, **options: Any) -> list[Prediction]:
    with Classifier(target, **options) as classifier:
        return list(classifier.classify_many(images, top_k))


def async_many(target: str, images: Any, top_k: int = 1, **options: Any) -> list[Prediction]:
    async def collect() -> list[Prediction]:
        async with AsyncClassifier(target, **options) as classifier:
            return [each async for each in classifier.classify_many(images, top_k)]

    return asyncio.run(collect())


def one(target: str, image: Any, **options: Any) -> Prediction:
    with Classifier(target, **options) as classifier:
        return classifier.classify(image)


def async_one(target: str, image: Any, **options: Any) -> Prediction:
    async def classify() -> Prediction:
        async with AsyncClassifier(target, **options) as classifier:
            return await classifier.classify(image)

    return asyncio.run(classify())


both_many = pytest.mark.parametrize("classify_many", [many, async_many])
both_one = pytest.mark.parametrize("classify", [one, async_one])


@both_many
def test_every_kind_of_image_is_taken(server: Server, tmp_path: Path, classify_many: Many) -> None:
    path = tmp_path / "lime.png"
    path.write_bytes(encode(solid("lime", 30, 20)))
    transparent = np.dstack([solid("red"), np.full((4, 4), 255, np.uint8)])
    images = [
        str(path),
        path,
        path.read_bytes(),
        solid("blue"),
        np.asfortranarray(solid("blue", 7, 5)),
        transparent,
        Image.fromarray(solid("red", 9, 9)),
        np.full((8, 8), 7, np.uint8),
        np.full((8, 8, 1), 7, np.uint8),
    ]
    predictions = classify_many(server.target, images, 3, model="colours")
    assert [each.error for each in predictions] == [None] * len(images)
    names = [each.label for each in predictions[:7]]
    assert names == ["green"] * 3 + ["blue"] * 2 + ["red"] * 2
    assert all(each.probability > 0.9 for each in predictions[:7])
    # Grey has as much of each colour.
    for grey in predictions[7:]:
        assert grey.probability == pytest.approx(1 / 3, abs=1e-6)
    assert predictions[0].model == "colours"
    assert predictions[0].version == 1
    assert {label.name for label in predictions[0].labels} == set(COLOURS)


@both_many
def test_images_that_cannot_be_sent_or_read_fail_alone(
    server: Server, tmp_path: Path, classify_many: Many
) -> None:
    missing = tmp_path / "missing.png"
    images = [
        solid("red"),
        missing,
        np.zeros((4, 4, 3), np.float32),
        np.zeros((2, 4, 4, 3), np.uint8),
        Image.fromarray(solid("red")).quantize(4),
        b"no image",
        solid("blue"),
    ]
    first, *failed, last = classify_many(server.target, images, model="colours")
    assert (first.label, last.label) == ("red", "blue")
    words = [str(missing), "pixels must be uint8", "pixels must be uint8", "(P)", "no JPEG"]
    for prediction, each in zip(failed, words, strict=True):
        assert isinstance(prediction.error, ClassifierError)
        assert prediction.error.code == "INVALID_ARGUMENT"
        assert each in str(prediction.error)
        with pytest.raises(ClassifierError):
            _ = prediction.label


@both_many
def test_nothing_but_unreadable_paths_needs_no_server(classify_many: Many, tmp_path: Path) -> None:
    (prediction,) = classify_many("127.0.0.1:1", [tmp_path / "missing.png"])
    assert "missing.png" in str(prediction.error)


@both_many
def test_hundreds_of_images_come_back_in_order(server: Server, classify_many: Many) -> None:
    pixels = noise(10, 700, (4, 4, 3))
    predictions = classify_many(server.target, iter(pixels), 3, model="colours")
    received = [
        [label.probability for label in sorted(each.labels, key=lambda label: label.index)]
        for each in predictions
    ]
    np.testing.assert_allclose(received, colours_of(pixels), atol=1e-6)


@both_many
def test_no_images_have_no_answers(server: Server, classify_many: Many) -> None:
    assert classify_many(server.target, [], model="colours") == []


@both_one
def test_one_image_that_fails_raises(server: Server, classify: Callable[..., Prediction]) -> None:
    with pytest.raises(ClassifierError, match="no JPEG, PNG") as failed:
        classify(server.target, b"no image", model="colours")
    assert failed.value.code == "INVALID_ARGUMENT"


@both_one
def test_a_call_that_fails_raises(server: Server, classify: Callable[..., Prediction]) -> None:
    with pytest.raises(ClassifierError, match="there is: colours, digits") as failed:
        classify(server.target, solid("red"), model="nobody's")
    assert failed.value.code == "NOT_FOUND"


@both_one
def test_no_server_says_how_to_start_one(classify: Callable[..., Prediction]) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(ClassifierError, match="`convoy serve`") as failed:
            classify(target, b"")
    assert failed.value.code == "UNAVAILABLE"
    assert target in str(failed.value)


def models_of(target: str) -> list[str]:
    with Classifier(target) as classifier:
        return [model.name for model in classifier.models()]


def async_models_of(target: str) -> list[str]:
    async def collect() -> list[str]:
        async with AsyncClassifier(target) as classifier:
            return [model.name for model in await classifier.models()]

    return asyncio.run(collect())


@pytest.mark.parametrize("list_models", [models_of, async_models_of])
def test_models_are_listed(server: Server, list_models: Callable[[str], list[str]]) -> None:
    assert list_models(server.target) == ["colours", "digits"]
    with pytest.raises(ClassifierError, match="`convoy serve`"):
        list_models("127.0.0.1:1")


def test_a_server_that_comes_back_is_reached_at_once(models: Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(Server(models=models)).ready()
        classifier = stack.enter_context(Classifier(first.target, model="colours"))
        assert classifier.classify(solid("red")).label == "red"
        assert first.stop() == 0
        for _ in range(3):
            with pytest.raises(ClassifierError, match="no server answers"):
                classifier.classify(solid("red"))
        second = stack.enter_context(Server("--port", str(first.port), models=models))
        second.ready()
        assert classifier.classify(solid("lime")).label == "green"


class Flaky(grpc.GenericRpcHandler):
    """Refuses the first calls, and answers the next."""

    def __init__(self, code: grpc.StatusCode, refusals: int) -> None:
        self._code, self._refusals = code, refusals

    def service(self, details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, request: bytes, context: Any) -> bytes:
        if self._refusals:
            self._refusals -= 1
            context.abort(self._code, "not now")
        label = pb.Label(name="fine")
        results = [pb.ImageResult(classification=pb.Classification(labels=[label]))]
        return pb.ClassifyResponse(results=results).SerializeToString()


@contextlib.contextmanager
def flaky(code: grpc.StatusCode, refusals: int) -> Iterator[str]:
    with futures.ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, handlers=[Flaky(code, refusals)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}"
        server.stop(None).wait()


@both_one
@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "CANCELLED"])
@pytest.mark.parametrize("size", [0, 3_000_000])
def test_a_refused_call_is_tried_again(
    code: str, classify: Callable[..., Prediction], size: int
) -> None:
    with flaky(grpc.StatusCode[code], refusals=2) as target:
        assert classify(target, bytes(size)).label == "fine"


@both_one
@pytest.mark.parametrize("version", [-1, 10**23])
def test_a_version_that_cannot_be_is_a_value_error(
    classify: Callable[..., Prediction], version: int
) -> None:
    with pytest.raises(ValueError, match=f"version is {version}"):
        classify("127.0.0.1:1", b"", version=version)


@both_many
@pytest.mark.parametrize("top_k", [-1, 0, 2**31])
def test_a_top_k_that_cannot_be_is_a_value_error(classify_many: Many, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k is {top_k}"):
        classify_many("127.0.0.1:1", [b""], top_k)


@both_one
@pytest.mark.parametrize(("code", "refusals"), [("UNAVAILABLE", 100), ("INVALID_ARGUMENT", 1)])
def test_it_is_not_tried_forever_nor_where_that_cannot_help(
    code: str, refusals: int, classify: Callable[..., Prediction]
) -> None:
    with (
        flaky(grpc.StatusCode[code], refusals) as target,
        pytest.raises(ClassifierError, match="not now") as failed,
    ):
        classify(target, b"")
    assert failed.value.code == code
