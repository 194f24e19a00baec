"""Proves a version in a process of its own, at the lowest priority, while others serve.

What serves does not wait for its interpreter's lock or for a core, a graph that takes its process
down takes only this one, and all its memory is free when it ends. On a card a process of its own
would need its own share of the memory there: versions prove themselves where they will run.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from service import bundle as bundles
from service.cpu import usable_cores
from service.device import Device, expects_card
from service.errors import BrokenVersion
from service.model import Model

if TYPE_CHECKING:
    from service.settings import Settings

log = logging.getLogger("convoy.aside")

# As workers are started, see `workers`.
_MAIN = "import sys; sys.path[:] = sys.argv[1:]; from service.aside import main; main()"
# A seventieth of a core where others want all of them, and what they leave; at 10 it is a tenth, by
# which those who wait for a server that is busy for 70% of the time wait half as long again.
# https://man7.org/linux/man-pages/man7/sched.7.html
_NICENESS = 19
_PR_SET_PDEATHSIG = 1
# Many times what a large version takes of a seventieth of a core.
_LIMIT_S = 1800.0


class Proof(NamedTuple):
    """What has proved itself: which contents (`Bundle.digest`), in which variant, and why not in the
    one that was preferred; and the seconds of one core that batches of some sizes take.
    """

    digest: str
    variant: str
    fallback: str
    seconds: tuple[tuple[int, float], ...]


class _Order(msgspec.Struct):
    parent: int
    folder: str
    variant: str
    deterministic: bool
    log_level: str


class _Answer(msgspec.Struct):
    proof: Proof | None
    refused: str = ""
    passing: bool = False


def prove(folder: Path, settings: "Settings") -> Proof | None:
    """Has the version in `folder` prove itself on one core, at a low priority. None where that can't
    be done: on a card, or where no process is to be had.

    Raises BrokenVersion; from an OSError where it may be better another time, as where the process
    dies: it may have been killed for memory, or have begun in the middle of an upgrade of Convoy.
    """
    if expects_card(Device.parse(settings.device)):
        return None
    order = _Order(
        os.getpid(),
        str(folder.absolute()),
        settings.variant,
        settings.deterministic,
        settings.log_level,
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # A terminal's Ctrl-C is for the service.
            start_new_session=True,
        )
    except OSError as error:
        log.warning("no process to prove %s in: %s", folder, error)
        return None
    with process:
        try:
            told, _ = process.communicate(msgspec.json.encode(order), _LIMIT_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise BrokenVersion(
                f"{folder}: it has not proved itself in {_LIMIT_S:g} s"
            ) from TimeoutError(str(error))
    try:
        answer = msgspec.json.decode(told, type=_Answer)
    except msgspec.DecodeError as error:
        raise BrokenVersion(
            f"{folder}: the process in which it was to prove itself ended with status "
            f"{process.returncode}"
        ) from ChildProcessError(str(error))
    if answer.proof is None:
        cause = OSError(answer.refused) if answer.passing else None
        raise BrokenVersion(answer.refused) from cause
    return answer.proof


def main() -> None:
    """The process: its order comes in on standard input, its answer goes to standard output."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(_NICENESS)
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    if os.getppid() != order.parent:  # it has ended before that
        sys.exit(1)
    logging.basicConfig(
        level=order.log_level.upper(),
        format="%(asctime)s %(levelname)-8s aside %(name)s: %(message)s",
        stream=sys.stderr,
    )
    sys.stdout.buffer.write(msgspec.json.encode(_answer(order)))


def _answer(order: _Order) -> _Answer:
    # A quota counts what runs at the lowest priority, too: then others are stopped for it.
    gently = usable_cores() < len(os.sched_getaffinity(0))
    seconds: list[tuple[int, float]] = []
    try:
        bundle = bundles.read(Path(order.folder))
        model = Model.load(
            bundle,
            "cpu",
            1,
            variant=order.variant,
            deterministic=order.deterministic,
            gently=gently,
        )
        # What others do meanwhile is not counted.
        model.measure(
            bundle,
            lambda size, taken: seconds.append((size, taken)),
            gently=gently,
            briefly=True,
            clock=time.thread_time,
        )
    except BrokenVersion as error:
        return _Answer(None, str(error), isinstance(error.__cause__, (OSError, MemoryError)))
    except Exception as error:
        log.exception("%s can't be proved", order.folder)
        return _Answer(None, str(error) or repr(error), isinstance(error, (OSError, MemoryError)))
    return _Answer(Proof(bundle.digest, model.variant, model.fallback, tuple(seconds)))
