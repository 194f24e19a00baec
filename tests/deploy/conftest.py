"""Tools of others, which prove what lies in deploy/: each is skipped where it is missing."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

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
    key = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    made = REPOSITORY / ".cache" / f"deploy-{key}"
    if not made.exists():
        making = made.with_suffix(f".{os.getpid()}")
        uv = [sys.executable, "-m", "uv"]
        install = [*uv, "pip", "install", "-q", "-p", str(making / "bin" / "python")]
        subprocess.run(
            [*uv, "venv", "-q", "--relocatable", "-p", sys.executable, str(making)], check=True
        )
        subprocess.run([*install, "--require-hashes", "-r", str(LOCK)], check=True)
        try:
            making.rename(made)
        except OSError:  # another run was faster
            shutil.rmtree(making)
    return made / "bin"
