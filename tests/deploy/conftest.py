"""Tools of others, which prove what lies in deploy/: each is skipped where it is missing."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, installed

DEPLOY = REPOSITORY / "deploy"
LOCK = REPOSITORY / "locks" / "deploy.txt"


def found(tool: str, where: str) -> str:
    """The program's path; else the test that asks is skipped, with where the tool is to be had."""
    path = shutil.which(tool)
    if not path:
        pytest.skip(f"there is no {tool}: {where}")
    return path


@pytest.fixture(scope="session")
def tools() -> Path:
    """The programs' folder of an environment that is made once for each state of the lock."""
    return installed(LOCK, "deploy")
