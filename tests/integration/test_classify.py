import hashlib
from typing import Any

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import images
from convoy_service.artifacts.reader import Golden
from convoy_service.engine.onnx_model import Model
from tests.conftest import REPOSITORY, Server
from tests.integration.conftest import classifier_on
from tests.integration.models import COLOURS, colours_of
from tests.integration.pictures import encode, encoded, noise, probabilities, raw, solid

DIGITS = [str(digit) for digit in range(10)]


def test_one_image_gets_its_label(classifier: Any, digits: Golden) -> None:
    request = pb.ClassifyRequest(model="digits", images=[encoded(digits.pixels[3])])
    response = classifier.Classify(request)
    (label,) = response.results[0].classification.labels
    assert (label.index, label.name) == (3, "3")
    assert label.probability == pytest.approx(digits.probabilities[3, 3], abs=1e-6)
    assert (response.model, response.version) == ("digits", 1)


def test_encoded_and_raw_images_of_all_sizes_mix_in_one_call_and_keep_their_order(
    classifier: Any, digits: Golden, offline: Model
) -> None:
    one, two, three, four = digits.pixels[1:5]
    large = two.repeat(5, axis=0).repeat(3, axis=1)
    colour = four.repeat(3, axis=2)
    sent = [raw(one), encoded(large), encoded(three), raw(large), raw(colour), encoded(one)]
    target = images.Target(8, 8, 1)
    expected = offline.run(
        np.stack([
            one,
            images.decode(encode(large), target),
            three,
            images.prepare(large, target),
            images.prepare(colour, target),
            one,
        ])
    )  # fmt: skip
    request = pb.ClassifyRequest(model="digits", images=sent, top_k=10)
    answers = [probabilities(result) for result in classifier.Classify(request).results]
    np.testing.assert_allclose(answers, expected, atol=1e-6)
    assert expected.argmax(1).tolist() == [1, 2, 3, 2, 4, 1]


@pytest.mark.parametrize(("top_k", "count"), [(0, 1), (1, 1), (2, 2), (10, 10), (2**32 - 1, 10)])
def test_top_k_gives_so_many_labels_best_first(
    classifier: Any, digits: Golden, top_k: int, count: int
) -> None:
    request = pb.ClassifyRequest(model="digits", images=[raw(digits.pixels[5])], top_k=top_k)
    labels = classifier.Classify(request).results[0].classification.labels
    best = digits.probabilities[5].argsort()[::-1][:count]
    assert [label.index for label in labels] == best.tolist()
    assert [label.name for label in labels] == [DIGITS[index] for index in best]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (pb.Image(encoded=b"this is no image"), "no JPEG, PNG, WebP, BMP or GIF"),
        (pb.Image(encoded=b""), "empty"),
        (pb.Image(), "neither"),
        (pb.Image(pixels=pb.Pixels(width=2**32 - 1, channels=2**32 - 1)), "at least 1"),
        (pb.Image(pixels=pb.Pixels(data=b"abc", height=1, width=1, channels=1)), "3 bytes"),
        (pb.Image(pixels=pb.Pixels(data=b"ab", height=1, width=1, channels=2)), "channels"),
    ],
)
def test_an_image_that_cannot_be_read_fails_alone(
    classifier: Any, bad: pb.Image, words: str
) -> None:
    red, green, blue = (encoded(solid(colour, 40, 30)) for colour in ("red", "lime", "blue"))
    images = [bad, red, bad, green, blue, bad]
    response = classifier.Classify(pb.ClassifyRequest(model="colours", images=images))
    names = [
        result.classification.labels[0].name if result.HasField("classification") else "error"
        for result in response.results
    ]
    assert names == ["error", "red", "error", "green", "blue", "error"]
    error = response.results[0].error
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert words in error.message


def test_a_call_of_nothing_but_bad_images_is_answered(classifier: Any) -> None:
    request = pb.ClassifyRequest(model="colours", images=[pb.Image(encoded=b"?")] * 3)
    response = classifier.Classify(request)
    assert [result.WhichOneof("outcome") for result in response.results] == ["error"] * 3
    assert response.timings.batch_size == 0


def test_timings_say_where_the_time_went(classifier: Any) -> None:
    pixels = noise(0, 5, (64, 64, 3))
    request = pb.ClassifyRequest(model="colours", images=[encoded(each) for each in pixels])
    timings = classifier.Classify(request).timings
    parts = [timings.decode_s, timings.queue_s, timings.run_s]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= timings.total_s < 10
    assert timings.batch_size == 5


def test_a_request_larger_than_a_batch_is_split_and_put_together_again(classifier: Any) -> None:
    pixels = noise(1, 100, (4, 4, 3))
    request = pb.ClassifyRequest(model="colours", images=map(raw, pixels), top_k=3)
    response = classifier.Classify(request)
    answers = [probabilities(result) for result in response.results]
    np.testing.assert_allclose(answers, colours_of(pixels), atol=1e-6)
    assert response.timings.batch_size == 8


def test_a_single_model_needs_no_name(shipped: Server, digits: Golden) -> None:
    with shipped.channel() as channel:
        request = pb.ClassifyRequest(images=[raw(digits.pixels[7])])
        response = classifier_on(channel).Classify(request)
    assert response.model == "digits"
    assert response.results[0].classification.labels[0].name == "7"


def test_list_models_says_what_is_served(classifier: Any) -> None:
    colours, digits = classifier.ListModels(pb.ListModelsRequest()).models
    assert (digits.name, digits.state, digits.reason) == ("digits", pb.Model.READY, "")
    assert (digits.version, list(digits.versions)) == (1, [1])
    assert list(digits.labels) == DIGITS
    assert (digits.height, digits.width, digits.channels) == (8, 8, 1)
    assert (digits.max_batch_size, digits.device) == (64, "cpu")
    onnx = (REPOSITORY / "models" / "digits" / "1" / "model.onnx").read_bytes()
    assert digits.sha256 == hashlib.sha256(onnx).hexdigest()
    assert digits.accuracy > 0.9
    assert (colours.name, list(colours.labels)) == ("colours", list(COLOURS))
    assert not colours.HasField("accuracy"), "nobody measured it"
