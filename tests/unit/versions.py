"""A version to write: light to import, as processes of their own write it too."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.images import Target
from convoy_service.artifacts.reader import (
    Bundle,
    Golden,
    Manifest,
    Parity,
    Scores,
    Thresholds,
    Variant,
)

# Whether it is a graph matters to nobody before it is loaded.
ONNX = bytes(range(256)) * 4
GOLDEN = Golden(
    np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3),
    np.array([[0.25, 0.75], [1, 0]], np.float32),
)
MANIFEST = Manifest(
    input="pixels",
    output="probabilities",
    pixels=Target(4, 5, 3, "crop"),
    labels=["cat", "dög"],
    max_batch_size=16,
    created="2026-01-02T03:04:05+00:00",
    scores=Scores(0.5, 1, 2, 0.7),
    parity=Parity(1e-7, 1.0, 4, [1, 3, 16]),
    training={"settings": {"seed": 0}, "epochs": [{"loss": 0.5}]},
    provenance={"python": "3.11"},
)


# With all that a version may hold beside these.
INT8, REPORT = ONNX[::-1], "<h1>pets</h1>"
RICH_GOLDEN = Golden(GOLDEN.pixels, GOLDEN.probabilities, {"int8": GOLDEN.probabilities[::-1]})


def write_rich(model: Path) -> Bundle:
    manifest = replace(
        MANIFEST,
        variants={"int8": Variant(Scores(0.5, 1, 2, 0.8), 1.0, 2000.0, 2.0, "cpu")},
        thresholds=Thresholds(0.6, [0.5, 0.7], 0.9, 0.95),
        evaluation={"macro_f1": 0.5},
    )
    return bundles.write(model, manifest, ONNX, RICH_GOLDEN, {"int8": INT8}, REPORT)


def write(model: Path, onnx: bytes = ONNX) -> Bundle:
    return bundles.write(model, MANIFEST, onnx, GOLDEN)
