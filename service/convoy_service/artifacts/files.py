"""Writes files that readers see whole or not at all, and locks files and folders between processes."""

import contextlib
import fcntl
import math
import os
import stat
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

# How often a lock that another process holds is tried again.
_TRY_LOCK_S = 0.01


@contextlib.contextmanager
def replacing(
    path: Path, *, mode: int | None = None, temporary: str = "", durable: bool = True
) -> Iterator[IO[bytes]]:
    """Opens a new file that takes the place of `path`, by one rename, when the body ends.

    Readers see the old file or the new one, whole, also where several processes write it. Where the body
    raises or the disk refuses, the old file stays and the new one is removed. A killed process leaves
    the old file, and the new one under its temporary name.

    Args:
        path: the file to replace, whether it is there or not.
        mode: the permissions of the new file, from its first byte on; None gives it the usual ones.
        temporary: the name beside `path` that the file has meanwhile; by default a random hidden one.
        durable: has the disk confirm the content before the rename, so that it survives a power cut.

    Raises:
        OSError: the disk refuses.
    """
    beside = path.with_name(temporary or f".{path.name}-{uuid.uuid4().hex}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        descriptor = os.open(beside, flags, 0o666 if mode is None else mode)
        with os.fdopen(descriptor, "wb") as file:
            # The umask may have taken permissions away. Some file systems allow no other change.
            if mode is not None and mode & ~stat.S_IMODE(os.fstat(descriptor).st_mode):
                os.fchmod(descriptor, mode)
            yield file
            if durable:
                flush_file(file)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def replace_file(path: Path, data: bytes, mode: int | None = None) -> None:
    """Replaces `path` by a file with these bytes; see `replacing`. Raises OSError."""
    with replacing(path, mode=mode) as file:
        file.write(data)


def write_flushed(path: Path, data: bytes) -> None:
    """Writes these bytes in place and has the disk confirm them. For files that no reader looks at yet.

    Raises OSError.
    """
    with path.open("wb") as file:
        file.write(data)
        flush_file(file)


def flush_file(file: IO[bytes]) -> None:
    """Has the disk confirm what was written to the file. Raises OSError."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Has the disk confirm the names in the folder, so that renames survive a power cut. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hold_lock(descriptor: int, wait_s: float = math.inf) -> bool:
    """Holds an open file or folder against other processes that call this.

    The lock ends when the descriptor is closed, and so with the process, even where it is killed.

    Args:
        descriptor: of the open file or folder.
        wait_s: how long to wait while another process holds it; 0 tries once.

    Returns:
        False where another process held it all the time.

    Raises:
        OSError: the file system has no locks.
    """
    if wait_s == math.inf:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    until = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= until:
                return False
        time.sleep(_TRY_LOCK_S)
