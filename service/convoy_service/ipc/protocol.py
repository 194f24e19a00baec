"""What both sides of a channel agree on.

The way of rows from acceptor processes to engine processes of the same machine (Linux).

An acceptor has one Unix stream socket and one shared memory (an unnamed `memfd`, so nothing is left
behind by a killed process) for each engine. Pixels travel in the shared memory alone; small fixed
records over the socket say where they lie, and the answers take the place of the pixels:

    acceptor -> engine   hello: magic, protocol; with the shared memory as a file descriptor
    engine -> acceptor   welcome: magic, protocol; with the status page as a file descriptor
    acceptor -> engine   submit or cancel: number, deadline, offset, priority, rows, model, kind
    engine -> acceptor   reply: number, run_s, retry_after_s, batch_size, failed_rows, status;
                         or news: the same record, to no request: what it serves has changed

Each submit has exactly one reply, also after a cancel; until then its block is not used again, so
rows can't be mixed. The status page holds what the engine serves, as JSON, and how much there is to
do, which the engine keeps up to date: an acceptor refuses before it copies anything. Each model that
an engine comes to serve has a number that no other gets while the engine lives, so that a request
can't meet another model than it was meant for; one that is gone is answered NotReady.

A pixel is copied once more than in one process: into the shared memory. No side ever waits for the
other to read: what a full socket does not take is kept, and sent when there is room. All times are
on `time.monotonic`'s clock, which the processes of a machine share.
"""

import fcntl
import math
import mmap
import os
import select
import socket
import struct
import threading
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import msgspec

from convoy_service.errors import (
    BACK_OFF,
    Cancelled,
    ConvoyError,
    DeadlineExceeded,
    NotReady,
    Overloaded,
)

PROTOCOL = 3
MAGIC = b"convoy"
HELLO = struct.Struct("<6sH")
WELCOME = struct.Struct("<6sHI")  # ..., where the times begin in the status page
REQUEST = struct.Struct("<QdQqIIH")
REPLY = struct.Struct("<QdddQIIH")
SUBMIT, CANCEL = 0, 1
OK = 0
# The number of a reply that is none: what the status page says of the models has changed.
NEWS = 2**64 - 1
# The status page: the JSON's bytes and checksum, the JSON, and two times for each model that there
# is room for. Only what is written takes memory.
_HEAD = struct.Struct("<II")
TIMES_AT, MOST_MODELS = 1 << 20, 1024
PAGE_BYTES = TIMES_AT + 16 * MOST_MODELS
# The status of a reply is the place in this list, from 1. The texts are those of the acceptor.
_ENDINGS: tuple[tuple[type[ConvoyError], str], ...] = (
    (Overloaded, f"more is waiting than can be done in time: {BACK_OFF}"),
    (DeadlineExceeded, "the deadline could no longer be met"),
    (Cancelled, "the request was cancelled"),
    (NotReady, "the engine is being stopped: retry"),
)
_STATUSES: dict[type[Exception], int] = {kind: n for n, (kind, _) in enumerate(_ENDINGS, 1)}
LAST_STATUS = len(_ENDINGS)
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_RECEIVE_BYTES = 1 << 16


class Malformed(Exception):
    """The other side does not keep to the protocol."""


class ModelInfo(msgspec.Struct, frozen=True):
    """What an engine says of a model that it serves."""

    name: str
    version: int
    row_shape: tuple[int, ...]
    classes: int
    max_batch_size: int
    device: str
    sha256: str

    @property
    def row_bytes(self) -> int:
        """Shared memory for a row: its pixels, and later in their place its answers."""
        return max(math.prod(self.row_shape), 4 * self.classes)


class Offer(msgspec.Struct, frozen=True):
    """A model that an engine serves: the number by which it is asked for, and the place of its times."""

    index: int
    place: int
    info: ModelInfo


def write_offers(page: mmap.mmap, offers: Sequence[Offer]) -> None:
    """Puts them on the status page. Raises ValueError where there is no room."""
    text = msgspec.json.encode(offers)
    if _HEAD.size + len(text) > TIMES_AT:
        raise ValueError("there is no room for the names of so many models")
    page[: _HEAD.size + len(text)] = _HEAD.pack(len(text), zlib.crc32(text)) + text


def read_offers(page: mmap.mmap) -> list[Offer] | None:
    """What the status page says; None while it is being written, after which there is news.

    Raises Malformed.
    """
    length, checksum = _HEAD.unpack_from(page)
    text = page[_HEAD.size : _HEAD.size + length]
    if zlib.crc32(text) != checksum:
        return None
    try:
        return msgspec.json.decode(text, type=list[Offer])
    except msgspec.DecodeError as error:
        raise Malformed(f"its models can't be read: {error}") from error


def status_of(error: Exception) -> int:
    """The status that stands for `error` in a reply; OK for one that is answered with NaN."""
    return _STATUSES.get(type(error), OK)


def error_of(status: int, retry_after_s: float) -> ConvoyError:
    """The error that a reply's status stands for."""
    kind, text = _ENDINGS[status - 1]
    return Overloaded(text, retry_after_s) if kind is Overloaded else kind(text)


def check_protocol(magic: bytes, protocol: int) -> None:
    if (magic, protocol) != (MAGIC, PROTOCOL):
        raise Malformed(
            f"it speaks protocol {protocol}, this process {PROTOCOL}: restart all processes"
        )


def shared_memory(size: int) -> int:
    """A file descriptor of `size` bytes of memory, all zero; they take no room until written to."""
    fd = os.memfd_create("convoy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def receive_memory(
    sock: socket.socket, message: struct.Struct, access: int = mmap.ACCESS_WRITE
) -> tuple[tuple[Any, ...], mmap.mmap]:
    """The fields of a connection's first message, and the shared memory that comes with it.

    Raises BlockingIOError where it is still to come, Malformed, and OSError at the other's end.
    """
    data, fds, _, _ = socket.recv_fds(sock, message.size, 1, socket.MSG_CMSG_CLOEXEC)
    try:
        if not data:
            raise ConnectionResetError("the other side has gone")
        if len(data) != message.size or not fds or not os.fstat(fds[0]).st_size:
            raise Malformed("it did not begin with a greeting and its memory")
        # To read memory that has shrunk meanwhile would kill this process.
        if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise Malformed("its shared memory is not sealed")
        return message.unpack(data), mmap.mmap(fds[0], 0, access=access)
    finally:
        for fd in fds:
            os.close(fd)


def bell(owner: object) -> int:
    """An eventfd to wake a poller with. It lives as long as its owner: other threads may ring after
    the poller's end.
    """
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    weakref.finalize(owner, os.close, fd)
    return fd


class Wire:
    """Fixed records over a non-blocking stream socket; sending never waits for the reader.

    `put` and `flush` may be called from any thread. What a full socket does not take goes when its
    poller finds room and calls `go_on`.
    """

    def __init__(self, sock: socket.socket, poller: select.epoll, incoming: struct.Struct) -> None:
        self._socket, self._poller, self._incoming = sock, poller, incoming
        self._received = memoryview(bytearray(_RECEIVE_BYTES))
        self._left = 0  # bytes of an incomplete record at the beginning of what was received
        self._lock = threading.Lock()  # of who sends
        self._records: list[bytes] = []
        self._unsent = b""  # from the middle of a record, perhaps
        self._full = False
        poller.register(sock, select.EPOLLIN)

    def receive(self) -> list[tuple[Any, ...]]:
        """The records that have arrived. Raises OSError at the other side's end."""
        try:
            count = self._socket.recv_into(self._received[self._left :])
        except BlockingIOError:
            return []
        if not count:
            raise ConnectionResetError("the other side has gone")
        end = self._left + count
        self._left = end % self._incoming.size
        whole = end - self._left
        records = list(self._incoming.iter_unpack(self._received[:whole]))
        self._received[: self._left] = self._received[whole:end]
        return records

    @property
    def empty(self) -> bool:
        """All is sent."""
        return not self._records and not self._unsent

    def put(self, record: bytes) -> None:
        """Takes a record for the next `flush`."""
        self._records.append(record)

    def flush(self) -> None:
        """Sends all in one go, unless the socket is full."""
        if self._records and not self._full:
            with self._lock:
                self._send()

    def go_on(self) -> None:
        """There is room again."""
        with self._lock:
            self._full = False
            self._poller.modify(self._socket, select.EPOLLIN)
            self._send()

    def _send(self) -> None:
        # Others append meanwhile; this is the only one who takes away.
        count = len(self._records)
        data = self._unsent + b"".join(self._records[:count])
        del self._records[:count]
        try:
            self._unsent = data[self._socket.send(data) :]
        except BlockingIOError:
            self._unsent = data
        # Nobody is left to read it; who polls the socket will see that.
        except OSError:
            self._unsent = b""
        if self._unsent:
            self._full = True
            self._poller.modify(self._socket, select.EPOLLIN | select.EPOLLOUT)

    def close(self) -> None:
        with self._lock:
            self._records.clear()
            self._unsent = b""
            self._full = True  # for ever
            self._socket.close()  # which ends the poller's interest
