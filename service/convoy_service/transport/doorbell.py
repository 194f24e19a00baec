"""Wakes the loop that sleeps in a completion queue of gRPC's core."""

import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from convoy_service.errors import ConvoyError

# How long gRPC may take to hand over the call. It takes a millisecond.
_OPEN_S = 10.0


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame: RFC 9113, section 4.1."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload


# What a client sends to begin a call: the preface, its settings, and the headers of one stream. The
# headers are POST, http, "/" and the authority "self" in HPACK (RFC 7541), and two of gRPC's own.
_BEGIN_CALL = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(kind=4, flags=0, stream=0, payload=b"")
    + _frame(
        kind=1,
        flags=4,  # these are all headers
        stream=1,
        payload=b"\x83\x86\x84\x01\x04self"
        b"\x00\x02te\x08trailers\x00\x0ccontent-type\x10application/grpc",
    )
)


class Doorbell:
    """One call that the process makes to itself, never answers, and keeps.

    gRPC's core puts the tag of a batch without operations into the queue of its call at once, and
    allows this from any thread (`grpc_call_start_batch` in include/grpc/grpc.h). The call's memory
    is valid from `open` to `close`, whatever other threads do meanwhile. docs/decisions/0001-grpcio-core.md
    says why this matters, and what the alternatives cost.
    """

    def __init__(self, core: Any, completion_queue: Any, on_ring: Callable[[], object]) -> None:
        """`core` is `grpc._cython.cygrpc`. The loop's thread calls `on_ring`."""
        self._core, self._queue, self._on_ring = core, completion_queue, on_ring
        # A signal handler may ring on the thread that holds it.
        self._guard = threading.RLock()
        # Both are written under `_guard` only, but for `_heard`. `_rung`: the queue holds a ring.
        self._call: Any = None
        self._rung = False
        self._server: Any = None
        self.closed = False

    def open(self) -> None:
        """Makes the call. The loop's thread calls this, before the queue has other events.

        Raises:
            ConvoyError: the call did not arrive.
        """
        name = f"convoy-{secrets.token_hex(16)}"
        self._server = self._core.Server((), False)
        self._server.register_completion_queue(self._queue)
        if not self._server.add_http2_port(f"unix-abstract:{name}".encode()):
            raise _failed("gRPC can't listen on it")
        self._server.start(backup_queue=False)
        self._server.request_call(self._queue, self._queue, self._never_came)
        with socket.socket(socket.AF_UNIX) as caller:
            try:
                caller.connect(f"\0{name}")
                caller.sendall(_BEGIN_CALL)
            except OSError as error:
                raise _failed(error.strerror or str(error)) from error
            event = self._queue.poll(time.time() + _OPEN_S)
        if event.completion_type == self._core.CompletionType.queue_timeout or not event.success:
            raise _failed("gRPC took no call from it")
        with self._guard:
            self._call = event.call
        # This closes the listener. The server's memory lives on until `destroy`, as the call may
        # refer to it.
        self._server.shutdown(self._queue, self._on_shut)

    def ring(self) -> None:
        """Has the loop call `on_ring`, once for all rings that it has not heard. Does nothing before
        `open` and after `close`. Any thread may call this.
        """
        if self._rung:
            return
        with self._guard:
            if self._call is not None and not self._rung:
                # First this: the loop may hear the ring at once.
                self._rung = True
                try:
                    self._call.start_server_batch((), self._heard)
                except BaseException:
                    self._rung = False
                    raise

    def close(self) -> None:
        """Releases the call. The loop must poll its queue until `closed`, and then call `destroy`."""
        with self._guard:
            self._call = None

    def cancel(self) -> None:
        """Ends calls that a stranger on this machine has made to the doorbell before its listener
        closed. They would hold up the end of its server.
        """
        self._server.cancel_all_calls()

    def destroy(self) -> None:
        assert self.closed, "gRPC still uses the server"
        self._server.destroy()

    def _heard(self, _: object) -> None:
        # What is posted while `on_ring` runs must ring again.
        self._rung = False
        self._on_ring()

    def _never_came(self, _: object) -> None:
        """The event of a call that `open` waited for in vain, where the queue is polled after that."""

    def _on_shut(self, _: object) -> None:
        self.closed = True


def _failed(reason: str) -> ConvoyError:
    return ConvoyError(
        f"the server can't make a call to itself through an abstract unix socket: {reason}; allow "
        "such sockets, or serve with --front public"
    )
