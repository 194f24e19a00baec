"""What a version holds beside its float32 graph: other precisions, and thresholds of a sure answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from convoy.client import Classifier
from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Thresholds
from convoy_service.engine.onnx_model import Model
from tests.conftest import Server, convoy
from tests.integration.conftest import classifier_on
from tests.integration.models import add_colours, add_variants, digits
from tests.integration.pictures import noise, probabilities, raw

PIXELS = np.concatenate([noise(5, 12, (8, 8, 1)), digits().pixels])


@pytest.fixture(scope="module")
def answers(offline: Model) -> Any:
    return offline.run(PIXELS)


@pytest.fixture(scope="module")
def thresholds(answers: Any) -> Thresholds:
    """So that some answers are sure, and some are not, for both reasons."""
    per_class = [0.0] * 10
    per_class[1] = 0.999999
    return Thresholds(0.5, per_class, 0.9, 0.99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, thresholds: Thresholds) -> Path:
    """`both` proves itself in fp32 and in int8, `off` in fp32 only, `colours` has no other."""
    folder = tmp_path_factory.mktemp("variants")
    add_variants(folder, "both", thresholds)
    add_variants(folder, "off", off=0.05)
    add_colours(folder)
    return folder


@pytest.fixture(scope="module")
def fp32(folder: Path) -> Iterator[Server]:
    with Server(models=folder) as server:
        yield server.ready()


def listed(server: Server) -> dict[str, pb.Model]:
    with server.channel() as channel:
        models = classifier_on(channel).ListModels(pb.ListModelsRequest()).models
    return {model.name: model for model in models}


def answered(server: Server, model: str) -> Any:
    request = pb.ClassifyRequest(model=model, images=map(raw, PIXELS), top_k=10)
    with server.channel() as channel:
        return [probabilities(each) for each in classifier_on(channel).Classify(request).results]


@pytest.mark.parametrize("topology", [(), ("--acceptors", "1", "--engines", "1")])
def test_the_fastest_variant_serves_where_it_proves_itself(
    folder: Path, topology: tuple[str, ...], answers: Any
) -> None:
    int8 = Model((folder / "both" / "1" / "model.int8.onnx").read_bytes(), "cpu")
    assert np.abs(int8.run(PIXELS) - answers).max() > 1e-3, "else nothing is told by the answers"
    with Server("--variant", "fastest", *topology, models=folder) as server:
        models = listed(server.ready())
        assert {name: model.variant for name, model in models.items()} == {
            "both": "int8",
            "off": "fp32",
            "colours": "fp32",
        }
        np.testing.assert_allclose(answered(server, "both"), int8.run(PIXELS), atol=1e-6)
        np.testing.assert_allclose(answered(server, "off"), answers, atol=1e-5)
        metrics = server.metrics()
    assert "serves fp32, not int8: " in models["off"].reason
    assert "off by 0.05 (allowed 0.01)" in models["off"].reason
    assert models["off"].reason in server.log
    assert (models["both"].reason, models["colours"].reason) == ("", "")
    fallbacks = {name: metrics[f'convoy_model_fallback{{model="{name}"}}'] for name in models}
    assert fallbacks == {"both": 0, "off": 1, "colours": 0}
    [info] = [name for name in metrics if "model_info" in name and '"both"' in name]
    assert 'variant="int8"' in info
    assert "both/1 on cpu in int8" in server.log


def test_a_variant_asked_for_by_name_is_refused_where_it_does_not_prove_itself(
    folder: Path,
) -> None:
    with Server("--variant", "int8", models=folder) as server:
        models = listed(server.ready())
    assert models["both"].variant == "int8"
    assert models["off"].state == pb.Model.UNAVAILABLE
    assert "int8 on cpu at batch size" in models["off"].reason
    assert models["colours"].variant == "fp32"
    assert "colours/1 has no variant int8: serves fp32" in server.log


def test_without_a_word_float32_serves(fp32: Server, answers: Any) -> None:
    assert {model.variant for model in listed(fp32).values()} == {"fp32"}
    np.testing.assert_allclose(answered(fp32, "both"), answers, atol=1e-5)


def test_answers_below_a_threshold_are_unsure(
    fp32: Server, answers: Any, thresholds: Thresholds, tmp_path: Path
) -> None:
    best, labels = answers.max(axis=1).astype(float), answers.argmax(axis=1)
    below = best < thresholds.unsure
    own = ~below & (best < np.array(thresholds.per_class)[labels])
    expected = (below | own).tolist()
    assert below.any()
    assert own.any()
    assert not all(expected), "else the test tells nothing"
    models = listed(fp32)
    assert models["both"].unsure_threshold == thresholds.unsure
    assert list(models["both"].class_thresholds) == thresholds.per_class
    assert not models["off"].HasField("unsure_threshold")

    counter = 'convoy_unsure_total{model="both"}'
    fp32.wait_until_in_flight(0)
    before = fp32.metrics()[counter]
    with Classifier(fp32.target, model="both") as classifier:
        for top_k in (1, 3):
            found = list(classifier.classify_many(PIXELS, top_k))
            assert [prediction.unsure for prediction in found] == expected
    fp32.wait_until_in_flight(0)
    assert fp32.metrics()[counter] - before == 2 * sum(expected)
    with Classifier(fp32.target, model="off") as classifier:
        assert not any(prediction.unsure for prediction in classifier.classify_many(PIXELS))
    assert 'convoy_unsure_total{model="off"}' not in fp32.metrics()

    chosen = [expected.index(False), expected.index(True)]
    for number in chosen:
        Image.fromarray(PIXELS[number, :, :, 0]).save(tmp_path / f"{number:02}.png")
    files = [str(tmp_path / f"{number:02}.png") for number in chosen]
    command = ("classify", *files, "--server", fp32.target, "--model", "both", "--top-k", "2")
    sure, unsure = convoy(*command).stdout.splitlines()
    assert "unsure" not in sure
    assert unsure.split("\t")[1].split("  ")[0].endswith(" unsure")
    told = [json.loads(line)["unsure"] for line in convoy(*command, "--json").stdout.splitlines()]
    assert told == [False, True]


def test_a_version_with_variants_is_read_as_it_was_written(folder: Path) -> None:
    bundle = bundles.read(folder / "both" / "1")
    assert set(bundle.variants) == set(bundle.golden.variants) == {"int8"}
