"""The property run of `benchmarks/storm.py`, in small."""

import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TIMEOUT_S, environment


@pytest.mark.parametrize(
    "arguments",
    [
        ["--requests", "3000"],
        ["--requests", "5000", "--acceptors", "2", "--engines", "2", "--kill-every-s", "1"],
    ],
    ids=["one process", "2 and 2"],
)
def test_every_call_ends_and_every_answer_belongs_to_its_request(arguments: list[str]) -> None:
    storm = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "storm.py"), *arguments],
        capture_output=True,
        check=False,
        env=environment(),
        text=True,
        timeout=4 * TIMEOUT_S,
    )
    assert storm.returncode == 0, storm.stdout + storm.stderr
    assert "rows answered wrongly: 0" in storm.stdout
    table = {
        line.split(" | ")[0].strip("| "): int(line.split("|")[-2])
        for line in storm.stdout.splitlines()
        if line.startswith("| ") and "outcome" not in line
    }
    # It was a storm indeed.
    for outcome in ("answered", "in part", "failed", "invalid", "cancelled", "late"):
        assert table[outcome] > 0, storm.stdout
    assert (table["lost"], table["unexplained"]) == (0, 0)
