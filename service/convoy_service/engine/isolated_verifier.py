"""Proves a version in a process of its own, on idle cores, while others serve.

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

from convoy_service.artifacts import reader as bundles
from convoy_service.crashes import ending
from convoy_service.engine.cpu import usable_cores
from convoy_service.engine.onnx_model import Model
from convoy_service.engine.session import Device, expects_card
from convoy_service.errors import BrokenVersion

if TYPE_CHECKING:
    from convoy_service.settings import Settings

log = logging.getLogger("convoy.aside")

# As workers are started, see `workers`; but idle from the beginning, since imports are a third of it
# all. What is idle gets what others leave, and always makes way for them. At a niceness of 19 it does
# not always: requests waited for 100 ms and more behind a proof.
# https://man7.org/linux/man-pages/man7/sched.7.html (SCHED_IDLE)
_MAIN = (
    "import os; os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0)); "
    "import sys; sys.path[:] = sys.argv[1:]; from convoy_service.engine.isolated_verifier import main; main()"
)
# Where others leave it less than this share of a core, for so long, it can't be done here.
_PATIENCE_S, _LEAST_SHARE = 60.0, 0.05
_PR_SET_PDEATHSIG = 1
# Many times what a large version takes of a twentieth of a core.
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
    """Has the version in `folder` prove itself on one core, while that is idle. None where that can't
    be done: on a card, where no process is to be had, or where others leave it no core.

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
            # A terminal's Ctrl-C is for the service. Not a session of its own: where the kernel shares
            # cores out among sessions (autogroup), it would have half of one, idle or not.
            process_group=0,
        )
    except OSError as error:
        log.warning("no process to prove %s in: %s", folder, error)
        return None
    with process:
        told = _ask(process, msgspec.json.encode(order), folder)
    if told is None:
        log.warning("%s can't be proved aside: others leave it no core", folder)
        return None
    try:
        answer = msgspec.json.decode(told, type=_Answer)
    except msgspec.DecodeError as error:
        raise BrokenVersion(
            f"{folder}: the process in which it was to prove itself ended ({ending(process)})"
        ) from ChildProcessError(str(error))
    if answer.proof is None:
        cause = OSError(answer.refused) if answer.passing else None
        raise BrokenVersion(answer.refused) from cause
    return answer.proof


def _ask(process: "subprocess.Popen[bytes]", order: bytes, folder: Path) -> bytes | None:
    """What it answers; None where it gets too little of a core to come to an end, and is ended.

    Raises BrokenVersion where it has had that, and yet comes to none.
    """
    given: bytes | None = order
    began = time.monotonic()
    while True:
        try:
            return process.communicate(given, min(_PATIENCE_S, _LIMIT_S))[0]
        except subprocess.TimeoutExpired as error:
            given = None  # it has that
            passed_s = time.monotonic() - began
            share = _cpu_s(process.pid) / passed_s
            starved = passed_s >= _PATIENCE_S and share < _LEAST_SHARE
            if not starved and passed_s < _LIMIT_S:
                continue
            process.kill()
            process.communicate()
            if starved:
                return None
            raise BrokenVersion(
                f"{folder}: it has not proved itself in {_LIMIT_S:g} s"
            ) from TimeoutError(str(error))


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """The process: its order comes in on standard input, its answer goes to standard output."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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
    # A quota counts what runs on idle cores, too: then others are stopped for it.
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
        return _Answer(None, str(error), error.passing)
    except Exception as error:
        log.exception("%s can't be proved", order.folder)
        return _Answer(None, str(error) or repr(error), isinstance(error, (OSError, MemoryError)))
    return _Answer(Proof(bundle.digest, model.variant, model.fallback, tuple(seconds)))
