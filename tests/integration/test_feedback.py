"""What a real server keeps of what it is asked: `--feedback`."""

import resource
from collections import Counter
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Thresholds
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import classifier_on, inference_on
from tests.integration.models import COLOURS, add_colours, colours_of
from tests.integration.pictures import encode, encoded, noise, raw
from tests.integration.test_inference_protocol import infer_request, raw_bytes, raw_pixels

UNSURE = 0.6


@pytest.fixture(scope="module")
def unsure_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`colours`, which is unsure of what it gives less than `UNSURE`."""
    models = tmp_path_factory.mktemp("unsure")
    first = add_colours(models)
    manifest = replace(first.manifest, thresholds=Thresholds(UNSURE, [0.0] * 3, 0.9, 0.9))
    bundles.write(models / "colours", manifest, first.onnx, first.golden)
    return models


def pictures(seed: int, count: int) -> tuple[Pixels, list[bool]]:
    """Images, and of which of them `colours` is unsure; of none nearly."""
    shown = noise(seed, 2 * count, (4, 4, 3))
    best = colours_of(shown).max(axis=1)
    chosen = (abs(best - UNSURE) > 0.01).nonzero()[0][:count]
    return shown[chosen], (best[chosen] < UNSURE).tolist()


def ask(server: Server, shown: Pixels, *, by: int) -> None:
    """Sends the images so or so, each way to one more API or form, and looks at every answer."""
    with server.channel() as channel:
        classifier, inference = classifier_on(channel), inference_on(channel)
        if by < 2:
            images = [(encoded if by else raw)(image) for image in shown]
            request = pb.ClassifyRequest(model="colours", images=images)
            results = classifier.Classify(request, timeout=TIMEOUT_S).results
            names = [result.classification.labels[0].name for result in results]
        else:
            tensors = infer_request("colours", "image")
            (raw_pixels if by == 2 else raw_bytes)(tensors, shown)
            answer = inference.ModelInfer(tensors, timeout=TIMEOUT_S).raw_output_contents[0]
            names = [
                COLOURS[best] for best in np.frombuffer(answer, "<f4").reshape(-1, 3).argmax(1)
            ]
    assert names == [COLOURS[best] for best in colours_of(shown).argmax(axis=1)]


def test_every_unsure_image_is_kept_though_the_disk_is_full_for_a_while(
    unsure_models: Path, tmp_path: Path
) -> None:
    feedback, written = (
        tmp_path / "feedback",
        'convoy_feedback_images_total{model="colours",outcome="written"}',
    )
    flags = "--feedback", feedback, "--feedback-share", "0", "--feedback-rotate-s", "0.2"
    expected: Counter[tuple[bytes, str]] = Counter()
    with Server(*flags, models=unsure_models) as server:
        server.ready()
        for by in range(4):
            if by == 2:
                server.wait_for_metric(written, expected.total())
                _, most = resource.prlimit(server.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (100, most))
            shown, unsure = pictures(by, 40)
            assert 5 < sum(unsure) < 35
            ask(server, shown, by=by)
            for image, label, flag in zip(shown, colours_of(shown).argmax(1), unsure, strict=True):
                expected[image.tobytes(), COLOURS[label]] += flag
            if by == 3:
                server.wait_for("feedback can't be kept in .*File too large")
                assert server.metrics()["convoy_feedback_failures_total"] >= 1
                resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (most, most))
                server.wait_for_metric(written, expected.total())
                size = sum(file.stat().st_size for file in feedback.glob("*.parquet"))
                # It is counted first, and looked at then.
                server.wait_for_metric("convoy_feedback_bytes", size)
    assert server.log.count("feedback can't be kept") == 1

    kept: Counter[tuple[bytes, str]] = Counter()
    for file in feedback.iterdir():
        for row in parquet.read_table(file).to_pylist():
            with Image.open(BytesIO(row["image"])) as image:
                kept[np.asarray(image).tobytes(), row["predicted"]] += 1
            assert (row["model"], row["version"], row["unsure"]) == ("colours", 2, True)
    assert kept == +expected


def test_workers_keep_what_they_are_asked_in_one_folder(
    unsure_models: Path, tmp_path: Path
) -> None:
    feedback = tmp_path / "feedback"
    flags = "--feedback", feedback, "--feedback-share", "1", "--feedback-rotate-s", "0.1"
    shown = noise(7, 64, (4, 4, 3))
    with Server(*flags, "--acceptors", "2", models=unsure_models) as server:
        server.ready()
        # Each time another connection, so that both acceptors get some.
        for start in range(0, 64, 2):
            ask(server, shown[start : start + 2], by=1)
        server.wait_for_metric(
            'convoy_feedback_images_total{model="colours",outcome="written"}', 64
        )
    names = {file.name.rpartition("-")[0] for file in feedback.iterdir()}
    assert len({name.rpartition("-")[2] for name in names}) == 2, names
    kept = [row for file in feedback.iterdir() for row in parquet.read_table(file).to_pylist()]
    assert sorted(row["image"] for row in kept) == sorted(map(encode, shown))
