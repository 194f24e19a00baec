"""The client's half of gRPC over HTTP/2, and no more: what `convoy bench` sends its load with.

On one core it makes several times the calls of grpcio's clients, whose own cost would otherwise be
a large part of what is measured. One thread, nothing waits: the caller selects on a `Connection`,
and calls `receive` and `flush`. No TLS, no compression, no retries.

RFC 9113 (HTTP/2), RFC 7541 (HPACK), https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

import select
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple
from urllib.parse import unquote

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    0, 1, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
_END_STREAM = _ACK = 1
_END_HEADERS, _PADDED, _PRIORITY = 4, 8, 32
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 3, 4, 5
_CANCEL = 8
_LARGEST = 2**31 - 1

_CONNECT_TIMEOUT_S = 5.0
# So many bytes are read before the server is told that it may send as many again.
_CREDIT = 2**24
# Blocks of headers that are remembered with what they say: a server repeats a few.
_KNOWN_BLOCKS = 1024

_FRAME = struct.Struct(">BHBBI")
_U32 = struct.Struct(">I")
_SETTING = struct.Struct(">HI")

_NAMES = (
    "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND",
    "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED",
    "OUT_OF_RANGE", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
)  # fmt: skip
CODES = dict(enumerate(_NAMES))
_CODE = {name: code for code, name in CODES.items()}
OK = _CODE["OK"]
UNAVAILABLE = _CODE["UNAVAILABLE"]
# No gRPC status: the server has not looked at the call, which gRPC's clients then start once more.
REFUSED = -1

# What a stream that the server resets, and an answer that is not gRPC, mean to gRPC's clients.
_OF_RESET = {
    7: REFUSED,
    8: _CODE["CANCELLED"],
    11: _CODE["RESOURCE_EXHAUSTED"],
    12: _CODE["PERMISSION_DENIED"],
}
_OF_HTTP = {
    "400": _CODE["INTERNAL"],
    "401": _CODE["UNAUTHENTICATED"],
    "403": _CODE["PERMISSION_DENIED"],
    "404": _CODE["UNIMPLEMENTED"],
    **dict.fromkeys(("429", "502", "503", "504"), UNAVAILABLE),
}


class ProtocolError(Exception):
    """The server does not speak HTTP/2, or uses what this client has forbidden it."""


class Answer(NamedTuple):
    """The end of a call; or, where `code` is None, one message of a call that goes on."""

    token: int
    """What `start` was given."""
    code: int | None
    """gRPC status code, or REFUSED."""
    details: str = ""
    message: bytes = b""
    """What was answered; empty where the connection does not keep messages."""


@dataclass(slots=True)
class _Call:
    token: int
    window: int
    """Bytes that the server takes of this stream yet."""
    half_closes: bool
    """Whether the client says nothing after what is unsent."""
    unsent: deque[memoryview] = field(default_factory=deque)
    received: bytes = b""
    uncredited: int = 0
    message: bytes = b""
    http_status: str = ""


class Connection:
    """Calls of one method over one TCP connection, all with one deadline.

    A call that may not be sent yet (HTTP/2's flow control, or more streams than the server allows)
    waits here. `usable` turns False when the server takes no more calls, or is gone.
    """

    def __init__(
        self, target: str, path: str, *, timeout_s: float | None = None, keep: bool = False
    ) -> None:
        """`target` is HOST:PORT, `path` /package.Service/Method. `timeout_s` is told to the server as
        each call's deadline; the caller enforces it, with `cancel`. `keep` has answers carry their
        messages. Waits for the server's first words; raises OSError where there are none.
        """
        host, _, port = target.rpartition(":")
        self._socket = socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._request_headers = _request_headers(path, target, timeout_s)
        self._keep = keep
        self._calls: dict[int, _Call] = {}
        self._waiting: dict[int, tuple[int, bytes, bool]] = {}
        # Those that the server's windows hold up, the oldest first.
        self._blocked: dict[int, _Call] = {}
        self._out: list[bytes | memoryview] = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
        self._in = b""
        self._next_stream = 1
        self._window = self._stream_window = 65_535
        self._max_frame, self._max_streams = 16_384, 0
        self._uncredited = 0
        self._block, self._block_ends = b"", 0
        self._known: dict[bytes, dict[str, str]] = {}
        self.usable = True
        # Without a header table each block speaks for itself: equal bytes say the same.
        settings = _SETTING.pack(_HEADER_TABLE_SIZE, 0)
        self._send(_SETTINGS, 0, 0, settings + _SETTING.pack(_INITIAL_WINDOW_SIZE, _LARGEST))
        self._send(_WINDOW_UPDATE, 0, 0, _U32.pack(_LARGEST - 65_535))
        # Only then is known how many calls it takes at once; more would be reset.
        while not self._max_streams:
            self.flush()
            if not select.select([self], [], [], _CONNECT_TIMEOUT_S)[0]:
                self.close()
                raise TimeoutError("who listens there says nothing in HTTP/2")
            self.receive()
            if not self.usable:
                raise ConnectionAbortedError("who listens there does not speak HTTP/2")

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def unflushed(self) -> bool:
        """Whether there is something that the socket did not take yet."""
        return bool(self._out)

    @property
    def idle(self) -> bool:
        """Whether every call has ended."""
        return not self._calls and not self._waiting

    def start(self, token: int, framed: bytes = b"", *, half_close: bool = True) -> int:
        """Begins a call with what `frame` has made, if anything; its stream, for `write`, `cancel`.

        `token` comes back with the answer. Without `half_close` the call takes more messages.
        """
        stream = self._next_stream
        self._next_stream += 2
        if self._next_stream > _LARGEST:
            self.usable = False
        if self._waiting or len(self._calls) >= self._max_streams:
            self._waiting[stream] = (token, framed, half_close)
        else:
            self._begin(stream, token, framed, half_close)
        return stream

    def write(self, stream: int, framed: bytes) -> None:
        """Sends more messages in a call that was started without `half_close`."""
        if stream in self._waiting:
            token, before, half_close = self._waiting[stream]
            self._waiting[stream] = (token, before + framed, half_close)
        elif call := self._calls.get(stream):
            self._write(stream, call, framed)

    def cancel(self, stream: int) -> None:
        """Forgets the call and tells the server. No answer follows."""
        if self._calls.pop(stream, None):
            self._blocked.pop(stream, None)
            self._send(_RST_STREAM, 0, stream, _U32.pack(_CANCEL))
            self._begin_waiting()
        else:
            self._waiting.pop(stream, None)

    def flush(self) -> None:
        """Hands the socket what it takes."""
        if not self._out:
            return
        data = memoryview(b"".join(self._out))
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            # `receive` finds the same, after what the server may have said before.
            sent = len(data)
        self._out = [data[sent:]] if sent < len(data) else []

    def receive(self) -> list[Answer]:
        """What has arrived: to be called when the socket is readable.

        When the connection is gone, every call that had not ended is answered with UNAVAILABLE; or
        with REFUSED where it was not even sent.
        """
        answers: list[Answer] = []
        try:
            data = self._socket.recv(1 << 20)
            if not data:
                raise ConnectionResetError("the server closed the connection")
            self._read(self._in + data if self._in else data, answers)
        except BlockingIOError:
            pass
        except (OSError, ProtocolError, struct.error, IndexError) as error:
            answers += self._fail(0, UNAVAILABLE, f"{type(error).__name__}: {error}")
            self.close()
        return answers

    def close(self) -> None:
        self.usable = False
        self._socket.close()

    def _begin(self, stream: int, token: int, framed: bytes, half_close: bool) -> None:
        call = self._calls[stream] = _Call(token, self._stream_window, half_close)
        self._send(_HEADERS, _END_HEADERS, stream, self._request_headers)
        if framed:
            self._write(stream, call, framed)

    def _write(self, stream: int, call: _Call, framed: bytes) -> None:
        size = len(framed)
        if size <= min(self._max_frame, self._window, call.window) and not self._blocked:
            self._window -= size
            call.window -= size
            self._send(_DATA, _END_STREAM if call.half_closes else 0, stream, framed)
        else:
            call.unsent.append(memoryview(framed))
            self._blocked[stream] = call
            self._pump()

    def _pump(self) -> None:
        """Sends of what is held up as much as the server allows by now."""
        for stream, call in list(self._blocked.items()):
            while call.unsent:
                part = call.unsent[0]
                size = min(len(part), self._max_frame, self._window, call.window)
                if size <= 0:
                    break
                self._window -= size
                call.window -= size
                if size == len(part):
                    call.unsent.popleft()
                else:
                    call.unsent[0] = part[size:]
                ends = call.half_closes and not call.unsent
                self._send(_DATA, _END_STREAM if ends else 0, stream, part[:size])
            if not call.unsent:
                del self._blocked[stream]
            if self._window <= 0:
                return

    def _begin_waiting(self) -> None:
        while self._waiting and len(self._calls) < self._max_streams:
            stream = next(iter(self._waiting))
            self._begin(stream, *self._waiting.pop(stream))

    def _send(self, kind: int, flags: int, stream: int, payload: bytes | memoryview) -> None:
        size = len(payload)
        self._out += (_FRAME.pack(size >> 16, size & 0xFFFF, kind, flags, stream), payload)

    def _read(self, data: bytes, answers: list[Answer]) -> None:
        position, end = 0, len(data)
        while end - position >= 9:
            high, low, kind, flags, stream = _FRAME.unpack_from(data, position)
            start, after = position + 9, position + 9 + (high << 16 | low)
            if after > end:
                break
            position = after
            if kind == _DATA:
                self._uncredited += after - start
                if self._keep and (call := self._calls.get(stream)):
                    call.uncredited += after - start
                    self._messages(call, _body(kind, flags, data[start:after]), answers)
            elif kind in (_HEADERS, _CONTINUATION):
                if kind == _HEADERS:
                    self._block, self._block_ends = b"", flags & _END_STREAM
                self._block += _body(kind, flags, data[start:after])
                if flags & _END_HEADERS:
                    self._response_headers(stream, answers)
            else:
                self._control(kind, flags, stream, data[start:after], answers)
        self._in = data[position:]
        if self._uncredited > _CREDIT:
            self._credit()

    def _messages(self, call: _Call, data: bytes, answers: list[Answer]) -> None:
        data = call.received + data if call.received else data
        position = 0
        while len(data) >= position + 5:
            after = position + 5 + _U32.unpack_from(data, position + 1)[0]
            if len(data) < after:
                break
            if call.half_closes:
                call.message = data[position + 5 : after]
            else:
                answers.append(Answer(call.token, None, "", data[position + 5 : after]))
            position = after
        call.received = data[position:]

    def _response_headers(self, stream: int, answers: list[Answer]) -> None:
        headers = self._known.get(self._block)
        if headers is None:
            headers = decode_headers(self._block)
            if len(self._known) < _KNOWN_BLOCKS:
                self._known[self._block] = headers
        call = self._calls.get(stream)
        if call is None:
            return
        call.http_status = headers.get(":status", call.http_status)
        if self._block_ends:
            status = headers.get("grpc-status", "")
            if status.isdecimal() and int(status) in CODES:
                code, details = int(status), unquote(headers.get("grpc-message", ""))
            else:
                code = _OF_HTTP.get(call.http_status, _CODE["UNKNOWN"])
                details = f"no gRPC status, but HTTP status {call.http_status}"
            answers.append(self._end(stream, code, details))

    def _end(self, stream: int, code: int, details: str) -> Answer:
        call = self._calls.pop(stream)
        if call.unsent or not call.half_closes:
            # The server has answered without hearing the rest.
            self._blocked.pop(stream, None)
            self._send(_RST_STREAM, 0, stream, _U32.pack(_CANCEL))
        if self._waiting:
            self._begin_waiting()
        return Answer(call.token, code, details, call.message)

    def _control(
        self, kind: int, flags: int, stream: int, payload: bytes, answers: list[Answer]
    ) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self._settings(dict(_SETTING.iter_unpack(payload)))
        elif kind == _PING and not flags & _ACK:
            self._send(_PING, _ACK, 0, payload)
        elif kind == _WINDOW_UPDATE:
            (credit,) = _U32.unpack(payload)
            if stream == 0:
                self._window += credit
            elif call := self._calls.get(stream):
                call.window += credit
            if self._blocked:
                self._pump()
        elif kind == _RST_STREAM and stream in self._calls:
            (reason,) = _U32.unpack(payload)
            code = _OF_RESET.get(reason, _CODE["INTERNAL"])
            answers.append(self._end(stream, code, f"the server reset the stream ({reason})"))
        elif kind == _GOAWAY:
            self.usable = False
            last = _U32.unpack_from(payload)[0] & _LARGEST
            answers += self._fail(last, REFUSED, "the server goes away")

    def _settings(self, settings: dict[int, int]) -> None:
        unlimited = self._max_streams or _LARGEST
        self._max_streams = settings.get(_MAX_CONCURRENT_STREAMS, unlimited)
        self._max_frame = settings.get(_MAX_FRAME_SIZE, self._max_frame)
        change = settings.get(_INITIAL_WINDOW_SIZE, self._stream_window) - self._stream_window
        self._stream_window += change
        for call in self._calls.values():
            call.window += change
        self._send(_SETTINGS, _ACK, 0, b"")
        self._pump()
        self._begin_waiting()

    def _credit(self) -> None:
        self._send(_WINDOW_UPDATE, 0, 0, _U32.pack(self._uncredited))
        self._uncredited = 0
        for stream, call in self._calls.items():
            if call.uncredited:
                self._send(_WINDOW_UPDATE, 0, stream, _U32.pack(call.uncredited))
                call.uncredited = 0

    def _fail(self, last: int, code: int, why: str) -> list[Answer]:
        """Ends the calls of later streams than `last`, and those that were not sent."""
        failed = [Answer(call.token, code, why) for s, call in self._calls.items() if s > last]
        failed += [Answer(token, REFUSED, why) for token, _, _ in self._waiting.values()]
        self._calls = {s: call for s, call in self._calls.items() if s <= last}
        self._blocked = {s: call for s, call in self._blocked.items() if s <= last}
        self._waiting = {}
        return failed


def frame(message: bytes) -> bytes:
    """A message as gRPC has it on the wire: not compressed, its length in front."""
    return b"\0" + _U32.pack(len(message)) + message


def _body(kind: int, flags: int, payload: bytes) -> bytes:
    """A frame's payload without its padding and what it says of priority."""
    if flags & _PADDED:
        payload = payload[1 : len(payload) - payload[0]]
    return payload[5:] if kind == _HEADERS and flags & _PRIORITY else payload


def _request_headers(path: str, target: str, timeout_s: float | None) -> bytes:
    headers = {
        ":path": path,
        ":authority": target,
        "te": "trailers",
        "content-type": "application/grpc",
        "user-agent": "convoy-bench",
    }
    if timeout_s is not None:
        # At most eight digits are allowed.
        micros = round(timeout_s * 1e6)
        headers["grpc-timeout"] = f"{micros}u" if micros < 10**8 else f"{round(timeout_s)}S"
    # POST and http are in HPACK's static table; the others travel as literals that nobody remembers.
    return b"\x83\x86" + b"".join(
        b"\0" + _string(name) + _string(value) for name, value in headers.items()
    )


def _string(text: str) -> bytes:
    data = text.encode()
    # A length of 127 and more goes on in further bytes, seven bits in each.
    length, rest = bytearray([min(len(data), 127)]), len(data) - 127
    while rest >= 0:
        length.append(rest & 127 | (128 if rest > 127 else 0))
        rest = (rest >> 7) or -1
    return bytes(length) + data


_STATUSES = dict(enumerate(("200", "204", "206", "304", "400", "404", "500"), start=8))


def decode_headers(block: bytes) -> dict[str, str]:
    """The headers of a block (RFC 7541) whose names matter; the others of the static table are left
    out. Raises ProtocolError, IndexError.
    """
    headers: dict[str, str] = {}
    position = 0
    while position < len(block):
        first = block[position]
        if first & 0x80:
            index, position = _integer(block, position, 7)
            if index > 61:
                raise ProtocolError("the server uses a header table of more than 0 bytes")
            if index in _STATUSES:
                headers[":status"] = _STATUSES[index]
            continue
        if first & 0xE0 == 0x20:
            _, position = _integer(block, position, 5)
            continue
        index, position = _integer(block, position, 6 if first & 0x40 else 4)
        name = ":status" if index in _STATUSES else ""
        if index == 0:
            name, position = _read_string(block, position)
        value, position = _read_string(block, position)
        headers[name] = value
    return headers


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    value = block[position] & (1 << bits) - 1
    position += 1
    if value == (1 << bits) - 1:
        shift = 0
        while True:
            value += (block[position] & 127) << shift
            shift += 7
            position += 1
            if block[position - 1] < 128:
                break
    return value, position


def _read_string(block: bytes, position: int) -> tuple[str, int]:
    coded = block[position] & 128
    length, position = _integer(block, position, 7)
    data = block[position : position + length]
    return _unhuffman(data) if coded else data.decode("ascii", "replace"), position + length


def _huffman_table() -> dict[tuple[int, int], str]:
    # The code of RFC 7541 is canonical: the lengths, in bits, say all. gRPC's headers are printable
    # ASCII, which these are; longer codes are for other bytes.
    symbols = {
        5: "012aceiost", 6: " %-./3456789=A_bdfghlmnpru", 7: ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz",
        8: "&*,;XZ", 10: '!"()?', 11: "'+|", 12: "#>", 13: "\0$@[]~", 14: "^}", 15: "<`{", 19: "\\",
    }  # fmt: skip
    table, code, before = {}, 0, 0
    for length, those in symbols.items():
        code <<= length - before
        before = length
        for symbol in those:
            table[length, code] = symbol
            code += 1
    return table


_HUFFMAN = _huffman_table()


def _unhuffman(data: bytes) -> str:
    text, code, length = [], 0, 0
    for byte in data:
        for bit in range(7, -1, -1):
            code, length = code << 1 | byte >> bit & 1, length + 1
            if symbol := _HUFFMAN.get((length, code)):
                text.append(symbol)
                code = length = 0
    # What is left is padding; or a byte that is no text, which nobody here asks for.
    return "".join(text)
