"""The Open Inference Protocol's answers, byte by byte."""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from convoy_service.api.inference import classified, version_policy
from convoy_service.artifacts.reader import Probabilities


def printed_by_c(value: float) -> str:
    buffer = ctypes.create_string_buffer(400)
    ctypes.CDLL(None).snprintf(buffer, len(buffer), b"%f", ctypes.c_double(value))
    return buffer.value.decode()


def awkward(rows: int, classes: int) -> Probabilities:
    """Values of all magnitudes, and halves of what is printed last."""
    chance = np.random.default_rng(1)
    outputs = (10.0 ** chance.uniform(-40, 8, (rows, classes))).astype(np.float32)
    outputs[0, :8] = [1, 0, 0.5, 0.0000005, 1.5e-6, 0.9999995, 0.99999994, 1e-45]
    return outputs


@pytest.mark.parametrize("best", [1, 3, 12])
def test_classes_are_written_as_triton_writes_them(best: int) -> None:
    outputs = awkward(50, 12)
    labels = [f"caf\u00e9 : {number}" for number in range(12)]
    expected = []
    for row in outputs:
        ranks = sorted(range(12), key=lambda index, row=row: -row[index])[:best]  # type: ignore[misc]
        expected += [f"{printed_by_c(row[rank])}:{rank}:{labels[rank]}".encode() for rank in ranks]
    assert classified(outputs, labels, best) == expected


def test_equal_classes_keep_their_order() -> None:
    outputs = np.array([[0.25, 0.5, 0.25, 0.5]], np.float32)
    assert classified(outputs, list("abcd"), 4) == [
        b"0.500000:1:b", b"0.500000:3:d", b"0.250000:0:a", b"0.250000:2:c",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "latest { num_versions: 1 }"),
        ("serve = 3", "latest { num_versions: 3 }"),
        ("serve = [5, 2]", "specific { versions: 2 versions: 5 }"),
        ("serve = [5]\n[labels]\nold = 1", "specific { versions: 1 versions: 5 }"),
        ("serve = []", "specific { }"),
        ("[labels]\nstable = 4", "specific { versions: 4 versions: 7 }"),
        ("serve = 'all'", None),
    ],
)
def test_which_versions_are_served_in_tritons_words(
    tmp_path: Path, text: str, expected: str | None
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "versions.toml").write_text(text)
    found = version_policy(tmp_path, "m", [4, 7])
    assert (found and text_format.MessageToString(found, as_one_line=True).strip()) == expected
