"""The storm of `benchmarks/storm.py`, in small, over each way to arrange processes."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY, TIMEOUT_S, environment

TOPOLOGIES = {
    "one process": ["--seconds", "12", "--drain-every-s", "7"],
    "two acceptors": ["--seconds", "8", "--acceptors", "2", "--kill-every-s", "3"],
    "2 and 2": ["--seconds", "10", "--acceptors", "2", "--engines", "2", "--kill-every-s", "2"],
    "public front": ["--seconds", "8", "--front", "public"],
}


@pytest.mark.parametrize("arguments", TOPOLOGIES.values(), ids=TOPOLOGIES)
def test_every_call_at_every_door_ends_with_its_own_answer(arguments: list[str]) -> None:
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
    rows = [line.strip("| ").split(" | ") for line in storm.stdout.splitlines() if line[:1] == "|"]
    doors, table = rows[0][1:], {row[0]: list(map(int, row[1:])) for row in rows[2:]}
    # It was a storm indeed.
    for outcome in ("answered", "cancelled", "late"):
        assert table[outcome][-1] > 0, storm.stdout
    answered = dict(zip(doors, table["answered"], strict=True))
    assert all(answered.values()), storm.stdout
    assert (table["lost"][-1], table["unexplained"][-1]) == (0, 0)
    assert re.search(r"operator: .*scrape", storm.stdout)
