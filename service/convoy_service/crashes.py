"""Makes a crash tell where it happened: on a fatal signal, each process writes the stacks of its threads."""

import faulthandler
import os
import signal
import subprocess
from contextlib import suppress

# faulthandler writes at most 100 frames of each of 100 threads.
_LARGEST_BYTES = 1_000_000


def enable() -> None:
    """Has this process, and each Python process that it starts, write its stacks to standard error."""
    # Where standard error is closed, or is no file, there is nothing to write to.
    with suppress(ValueError, OSError, RuntimeError, AttributeError):
        faulthandler.enable()
    os.environ.setdefault("PYTHONFAULTHANDLER", "1")


class CrashReport:
    """Takes the stacks of a process that is about to be started, and keeps them when it has died."""

    def __init__(self) -> None:
        """Raises OSError."""
        # A file in memory: a full or read-only disk loses nothing, and nothing is left behind.
        self._file = os.memfd_create("convoy-crash", os.MFD_CLOEXEC)

    @property
    def descriptor(self) -> int:
        """To be passed to the process, which calls `write_to` with it."""
        return self._file

    @staticmethod
    def write_to(descriptor: int) -> None:
        """Has this process write its stacks there."""
        os.set_inheritable(descriptor, False)
        faulthandler.enable(descriptor)

    def read(self) -> str:
        """The stacks; empty where the process wrote none, as after SIGKILL."""
        return os.pread(self._file, _LARGEST_BYTES, 0).decode(errors="replace").strip()

    def close(self) -> None:
        os.close(self._file)


def ending(process: "subprocess.Popen[bytes]") -> str:
    """How a process ended: "status 1", or "killed by SIGSEGV"."""
    status = process.returncode
    if status >= 0:
        return f"status {status}"
    with suppress(ValueError):
        return f"killed by {signal.Signals(-status).name}"
    return f"killed by signal {-status}"
