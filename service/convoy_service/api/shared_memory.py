"""System shared memory: inputs and outputs that lie in memory of the machine that both sides are on.

Triton's extension:
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_shared_memory.md.
A caller gives a part of a POSIX shared memory object a name, and requests refer to that.

What is registered stands in a folder that all processes of a server have, since connections that are
one client's may go to several. Objects are opened at each use, so that nothing is held open for those
who never come back, and are read and written by `preadv` and `pwrite`, not mapped: their makers can cut
them short at any time, and whoever then touches what was mapped is killed (SIGBUS). What was read is a
copy: nobody changes pixels that were checked.
"""

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from convoy_service.errors import (
    AlreadyThere,
    ConvoyError,
    InvalidRequest,
    NotPossible,
    UnknownRegion,
)

# Where POSIX shared memory objects are on Linux: https://man7.org/linux/man-pages/man7/shm_overview.7.html.
_OBJECTS = Path("/dev/shm")  # noqa: S108 (no file of ours)
# As the C library's shm_open takes them; but with so many slashes that a registration has room for them.
_KEY = re.compile(r"/{0,255}(?!\.{1,2}\Z)([^/\0]+)")
_LONGEST_NAME = 255

# Regions that may be registered at once. What leaves its own behind must not fill a disk.
_MOST = 1024


class Region(msgspec.Struct, frozen=True):
    """A part of the object `key`, in bytes, that is registered under a name."""

    name: str
    key: str
    offset: int
    byte_size: int


_decode = msgspec.json.Decoder(Region).decode


class Span(NamedTuple):
    """A part of a region: where it begins in the object, and how long it is, in bytes."""

    region: Region
    offset: int
    size: int


@contextmanager
def folder(allowed: bool) -> Iterator[Path | None]:
    """A folder for the registrations of one server; None where callers may not register any. Raises
    ConvoyError where the machine has no shared memory.
    """
    if not allowed:
        yield None
        return
    try:
        # Not in /tmp, where what lies long is cleared away.
        made = tempfile.TemporaryDirectory(prefix="convoy-", dir=_OBJECTS)
    except OSError as error:
        raise ConvoyError(f"--allow-shared-memory: {_OBJECTS}: {error.strerror}") from error
    with made as path:
        yield Path(path)


class SharedMemory:
    """The regions that are registered in `folder`, which several processes may have in common. All
    its methods may be called on any thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def register(self, region: Region) -> None:
        """Raises InvalidRequest where there is no such memory, AlreadyThere where the name is taken,
        NotPossible where too many are.
        """
        if not 1 <= len(region.name.encode()) <= _LONGEST_NAME:
            raise InvalidRequest(f"`name` of a region: expected 1 to {_LONGEST_NAME} bytes")
        if not region.byte_size:
            raise InvalidRequest(f"region {region.name!r}: a `byte_size` of 0")
        with _opened(Span(region, region.offset, region.byte_size), os.O_RDONLY):
            pass
        if sum(1 for _ in self._folder.iterdir()) >= _MOST:
            raise NotPossible(f"{_MOST} regions are registered here: unregister some")
        # A link, as it is there or not, at once and with all that it says. (pathlib would mend what it
        # takes for a path.)
        link = self._link(region.name).encode()
        try:
            os.symlink(msgspec.json.encode(region), link)  # noqa: PTH211
        except FileExistsError:
            raise AlreadyThere(
                f"a region {region.name!r} is registered already: unregister it first, or take "
                "another name"
            ) from None

    def unregister(self, name: str = "") -> None:
        """One, or all; requests that are on it are finished. One that is not there is no error."""
        for link in [Path(self._link(name))] if name else list(self._folder.iterdir()):
            link.unlink(missing_ok=True)

    def regions(self, name: str = "") -> list[Region]:
        """The one of this name, or all. Raises UnknownRegion."""
        if name:
            return [self._region(name)]
        found = (_read(str(link)) for link in self._folder.iterdir())
        return sorted((each for each in found if each), key=lambda region: region.name)

    def span(self, name: str, offset: int, size: int) -> Span:
        """`size` bytes of a region, beginning at `offset` in it. Raises UnknownRegion, or InvalidRequest
        where it has not so many.
        """
        region = self._region(name)
        if offset < 0 or size < 0 or offset + size > region.byte_size:
            raise InvalidRequest(
                f"{size} bytes at offset {offset}: region {name!r} has {region.byte_size}"
            )
        return Span(region, region.offset + offset, size)

    def read(self, span: Span) -> memoryview:
        """What it holds now. Raises InvalidRequest where the object has gone, or is shorter by now."""
        data = memoryview(np.empty(span.size, np.uint8))  # type: ignore[arg-type]
        with _opened(span, os.O_RDONLY) as descriptor:
            done = 0
            while done < span.size:
                read = os.preadv(descriptor, [data[done:]], span.offset + done)
                if not read:
                    raise _too_short(span)
                done += read
        return data

    def write(self, span: Span, data: bytes) -> None:
        """Puts `data`, no more than the span holds, at its beginning. Raises InvalidRequest as `read`."""
        assert len(data) <= span.size
        with _opened(span, os.O_WRONLY) as descriptor:
            done, view = 0, memoryview(data)
            while done < len(data):
                try:
                    done += os.pwrite(descriptor, view[done:], span.offset + done)
                except OSError as error:
                    raise _unusable(span.region, error) from error

    def _link(self, name: str) -> str:
        # Requests come by here, and joining a Path takes longer than reading the link.
        return f"{self._folder}/{hashlib.sha256(name.encode()).hexdigest()}"

    def _region(self, name: str) -> Region:
        region = _read(self._link(name))
        if region is None:
            raise UnknownRegion(f"no shared memory region {name!r} is registered here")
        return region


def _read(link: str) -> Region | None:
    try:
        return _decode(os.readlink(link.encode()))  # noqa: PTH115
    except FileNotFoundError:
        return None


@contextmanager
def _opened(span: Span, flags: int) -> Iterator[int]:
    """The descriptor of the span's object, which has all of it as it is opened."""
    region = span.region
    key = _KEY.fullmatch(region.key)
    if key is None:
        raise InvalidRequest(
            f"`key` {region.key!r}: expected the name of a shared memory object, with no slash but "
            "at its beginning"
        )
    try:
        # As shm_open does it: a link could lead anywhere.
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(f"{_OBJECTS}/{key[1]}", flags)
    except OSError as error:
        raise _unusable(region, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"`key` {region.key!r} is no shared memory object")
        if span.offset + span.size > status.st_size:
            raise _too_short(span)
        yield descriptor
    finally:
        os.close(descriptor)


def _unusable(region: Region, error: OSError) -> InvalidRequest:
    return InvalidRequest(
        f"region {region.name!r}: the shared memory object {region.key!r} can't be used: "
        f"{error.strerror}; it must be in the server's {_OBJECTS}, and its user must be allowed to"
    )


def _too_short(span: Span) -> InvalidRequest:
    return InvalidRequest(
        f"region {span.region.name!r}: the shared memory object {span.region.key!r} does not reach to "
        f"byte {span.offset + span.size}"
    )
