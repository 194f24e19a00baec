"""The protocols keep what they promised: `buf`, as `make check` runs it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

BUF = Path(sys.executable).with_name("buf")
RELEASED = REPOSITORY / "protos" / "released.binpb"


def buf(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUF, *arguments], capture_output=True, check=False, text=True)


@pytest.fixture
def protos(tmp_path: Path) -> Path:
    return Path(
        shutil.copytree(
            REPOSITORY / "protos", tmp_path / "protos", ignore=shutil.ignore_patterns("*.py*")
        )
    )


@pytest.mark.parametrize(
    ("file", "was", "now", "told"),
    [
        ("inference.proto", "rpc ModelReady(", "rpc ModelIsReady(", '"ModelReady"'),
        ("inference.proto", "string id = 3;", "string id = 13;", '"3" with name "id"'),
        ("classifier.proto", "uint32 top_k = 4;", "int32 top_k = 4;", '"uint32" to "int32"'),
    ],
)
def test_what_would_break_callers_does_not_pass(
    protos: Path, file: str, was: str, now: str, told: str
) -> None:
    before = (protos / file).read_text()
    assert was in before
    (protos / file).write_text(before.replace(was, now))
    seen = buf("breaking", protos, "--against", RELEASED)
    assert seen.returncode == 100, seen.stderr
    assert told in seen.stdout


def test_what_is_there_breaks_nobody_and_new_fields_are_welcome(protos: Path) -> None:
    file = protos / "classifier.proto"
    file.write_text(
        file.read_text().replace("  uint32 top_k = 4;", "  uint32 top_k = 4;\n  bool new = 99;")
    )
    seen = buf("breaking", protos, "--against", RELEASED)
    assert (seen.returncode, seen.stdout) == (0, "")
    assert buf("lint", REPOSITORY / "protos").stdout == ""
