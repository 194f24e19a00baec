"""The loop on grpcio's core, held against the one on its public server: a real client must not be
able to tell them apart.
"""

import contextlib
import gc
import hashlib
import itertools
import logging
import math
import os
import queue
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any, Self

import grpc
import pytest

from convoy_service.transport import grpc_server as transport
from convoy_service.transport.call import Exchange
from convoy_service.transport.grpc_core import CoreServer
from convoy_service.transport.grpc_public import PublicServer
from convoy_service.transport.loop import Loop
from tests.certificates import Certificates, make_certificates
from tests.conftest import TIMEOUT_S, environment

Code = grpc.StatusCode

# Messages up to here are taken.
LARGEST = 60_000_000

OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", LARGEST),
    ("grpc.max_send_message_length", -1),
]


class Server:
    """A loop that runs on a thread of its own; leaving `with` stops it."""

    def __init__(
        self,
        kind: type[CoreServer | PublicServer],
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self.loop: Loop = kind(OPTIONS)
        self.port = self.loop.bind(address, credentials)
        self.target = f"127.0.0.1:{self.port}"
        self.bug: BaseException | None = None
        self._handlers: dict[str, Callable[[Exchange], None]] = {}
        self.loop.on_call = lambda exchange: self._handlers[exchange.method](exchange)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except RuntimeError as bug:
            self.bug = bug

    def serve(self, handler: Callable[[Exchange], None]) -> str:
        """The path under which `handler` gets calls, on the loop's thread."""
        path = f"/test/{len(self._handlers)}"
        self._handlers[path] = handler
        return path

    def channel(self, *options: tuple[str, int]) -> grpc.Channel:
        """A connection of its own."""
        return grpc.insecure_channel(self.target, [*CHANNEL, *options])

    def stop(self) -> None:
        self.loop.stop()
        self.join()

    def join(self) -> None:
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive(), "it did not stop"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        assert self.bug is None


CHANNEL = [
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]

KINDS = pytest.mark.parametrize("kind", [CoreServer, PublicServer])


@pytest.fixture(scope="module", params=[CoreServer, PublicServer])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(request.param) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: Server) -> Iterator[grpc.Channel]:
    with server.channel() as channel:
        yield channel


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def echo(exchange: Exchange) -> None:
    exchange.accept()
    exchange.read(lambda message: exchange.end(0, message=message))


def unary(channel: grpc.Channel, path: str) -> Any:
    return channel.unary_unary(path)


class Call:
    """A bidirectional call whose messages are sent when the test says so."""

    def __init__(self, channel: grpc.Channel, path: str, timeout: float = TIMEOUT_S) -> None:
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.send = self._messages.put
        begin: Any = channel.stream_stream(path)
        self.answers = begin(iter(self._messages.get, None), timeout=timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.answers.cancel()
        self.send(None)


class Life:
    """What is heard of a call, in its order; each wait ends the test where nothing comes."""

    def __init__(self) -> None:
        self._heard: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.exchange: Exchange

    def follow(self, exchange: Exchange) -> None:
        self.exchange = exchange
        exchange.on_gone = lambda: self.hear("gone")
        exchange.on_closed = lambda: self.hear("closed")
        exchange.accept()
        self.hear("begun")

    def hear(self, what: str) -> None:
        self._heard.put(what)

    def expect(self, *what: str) -> None:
        assert [self._heard.get(timeout=TIMEOUT_S) for _ in what] == list(what)

    def expect_no_more(self) -> None:
        assert self._heard.empty()


def in_turn(server: Server) -> None:
    """Waits until the loop has done what it had to."""
    done = threading.Event()
    server.loop.post(done.set)
    assert done.wait(TIMEOUT_S)


def test_a_message_goes_in_and_comes_out_with_metadata_and_trailers(
    server: Server, channel: grpc.Channel
) -> None:
    seen: dict[str, Any] = {}

    def answer(exchange: Exchange) -> None:
        exchange.accept()
        seen.update(exchange.metadata)
        seen["method"] = exchange.method
        exchange.read(
            lambda message: exchange.end(0, "", (("a", "1"), ("b", "2")), (message or b"")[::-1])
        )

    path = server.serve(answer)
    sent = (("x-name", "value"), ("x-bytes-bin", b"\x00\xff"))
    message, call = unary(channel, path).with_call(b"abc", metadata=sent, timeout=TIMEOUT_S)
    assert message == b"cba"
    assert call.code() is Code.OK
    assert dict(call.trailing_metadata()) == {"a": "1", "b": "2"}
    assert (seen["method"], seen["x-name"], seen["x-bytes-bin"]) == (path, "value", b"\x00\xff")


@pytest.mark.parametrize("message", [b"", b"\x00", bytes(70_000)], ids=["0", "1", "70000"])
def test_an_empty_message_is_no_missing_one(
    server: Server, channel: grpc.Channel, message: bytes
) -> None:
    assert unary(channel, server.serve(echo))(message, timeout=TIMEOUT_S) == message


DETAILS = [
    "",
    "plain",
    "100 % of %20 and %zz",
    "\u00fcml\u00e4ut, \u4e2d\u6587, \U0001f6a2",
    "two\nlines\r\n, a \t and a \0",
    " spaces at both ends ",
    "\u00fc" * 1000,
]


@pytest.mark.parametrize("way", ["refused", "unread", "read", "after an answer"])
def test_a_status_arrives_with_its_words_and_trailers(
    server: Server, channel: grpc.Channel, way: str
) -> None:
    details, code = "", Code.OK
    trailers = (("grpc-retry-pushback-ms", "17"),)

    def answer(exchange: Exchange) -> None:
        def end(_: bytes | None = None) -> None:
            exchange.end(code.value[0], details, trailers)

        if way == "refused":
            exchange.refuse(code.value[0], details, trailers)
            return
        exchange.accept()
        if way == "unread":
            end()
        elif way == "read":
            exchange.read(end)
        else:
            exchange.write(b"answer", False, end)

    ask: Any = channel.unary_stream(server.serve(answer))
    codes = [code for code in Code if code is not Code.OK]
    for code, details in zip(codes, itertools.cycle(DETAILS), strict=False):
        call = ask(b"x", timeout=TIMEOUT_S)
        answers = []
        with pytest.raises(grpc.RpcError):
            answers.extend(call)
        assert (call.code(), call.details()) == (code, details)
        assert dict(call.trailing_metadata()) == dict(trailers)
        assert answers in ([], [b"answer"])


def test_a_call_without_a_message_reads_none(server: Server, channel: grpc.Channel) -> None:
    read: list[bytes | None] = []

    def answer(exchange: Exchange) -> None:
        def received(message: bytes | None) -> None:
            read.append(message)
            exchange.end(Code.INVALID_ARGUMENT.value[0], "no message")

        exchange.accept()
        exchange.read(received)

    ask: Any = channel.stream_unary(server.serve(answer))
    with pytest.raises(grpc.RpcError) as refused:
        ask(iter(()), timeout=TIMEOUT_S)
    assert refused.value.code() is Code.INVALID_ARGUMENT
    assert read == [None]


def ping_pong(exchange: Exchange) -> None:
    """Answers each message with itself, and the end of them with the end."""

    def received(message: bytes | None) -> None:
        if message is None:
            exchange.end(0)
        else:
            exchange.write(message, False, lambda: exchange.read(received))

    exchange.accept()
    exchange.read(received)


def test_a_stream_is_answered_message_by_message_until_the_caller_half_closes(
    server: Server, channel: grpc.Channel
) -> None:
    with Call(channel, server.serve(ping_pong)) as call:
        for number in range(100):
            call.send(b"%d" % number)
            assert next(call.answers) == b"%d" % number
        call.send(None)
        assert list(call.answers) == []
        assert call.answers.code() is Code.OK


def test_thousands_of_messages_keep_their_order_whether_buffered_or_not(
    server: Server, channel: grpc.Channel
) -> None:
    def answer(exchange: Exchange) -> None:
        numbers = iter(range(3000))

        def write() -> None:
            number = next(numbers, None)
            if number is None:
                exchange.end(0)
            else:
                exchange.write(b"%d" % number, number % 10 != 9, write)

        exchange.accept()
        exchange.read(lambda _: write())

    ask: Any = channel.unary_stream(server.serve(answer))
    assert list(ask(b"", timeout=TIMEOUT_S)) == [b"%d" % number for number in range(3000)]


def test_what_is_not_read_stays_with_the_caller(server: Server, channel: grpc.Channel) -> None:
    taken = 0

    def megabytes() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(200):
            taken += 1
            yield bytes(1_000_000)

    def answer(exchange: Exchange) -> None:
        left = 3

        def received(_: bytes | None) -> None:
            nonlocal left
            left -= 1
            if left:
                exchange.read(received)
            else:
                exchange.end(0, message=b"enough")

        exchange.accept()
        exchange.read(received)

    ask: Any = channel.stream_unary(server.serve(answer))
    assert ask(megabytes(), timeout=TIMEOUT_S) == b"enough"
    assert taken < 100


def test_answers_come_as_there_is_something_to_tell_until_the_caller_leaves(
    server: Server, channel: grpc.Channel
) -> None:
    life = Life()

    def answer(exchange: Exchange) -> None:
        life.follow(exchange)
        exchange.read(lambda message: exchange.write(message or b"", False, written))

    written = partial(life.hear, "written")
    watch: Any = channel.unary_stream(server.serve(answer))
    call = watch(b"first", timeout=TIMEOUT_S)
    assert next(call) == b"first"
    life.expect("begun", "written")
    for told in (b"second", b"third"):
        server.loop.post(partial(life.exchange.write, told, False, written))
        assert next(call) == told
        # The caller may have it before the loop hears that it has gone.
        life.expect("written")
    call.cancel()
    life.expect("gone", "closed")
    life.expect_no_more()


@pytest.mark.parametrize("timeout", [None, 7.0])
def test_the_deadline_is_known(
    server: Server, channel: grpc.Channel, timeout: float | None
) -> None:
    deadlines: list[float | None] = []

    def answer(exchange: Exchange) -> None:
        deadlines.append(exchange.deadline)
        echo(exchange)

    unary(channel, server.serve(answer))(b"", timeout=timeout)
    if timeout is None:
        assert deadlines == [None]
    else:
        assert deadlines[0] is not None
        assert timeout - 5 < deadlines[0] - time.monotonic() <= timeout + 0.1


def test_a_deadline_ends_the_call_for_both_sides(server: Server, channel: grpc.Channel) -> None:
    life = Life()
    # So long that it gets there, whatever else keeps this machine.
    call = unary(channel, server.serve(life.follow)).future(b"", timeout=1)
    assert call.code() is Code.DEADLINE_EXCEEDED
    life.expect("begun", "gone", "closed")
    assert life.exchange.gone
    life.expect_no_more()


def test_a_deadline_ends_the_call_for_the_caller_while_the_loop_is_busy(
    server: Server, channel: grpc.Channel
) -> None:
    life, go_on = Life(), threading.Event()

    def busy(exchange: Exchange) -> None:
        life.follow(exchange)
        assert go_on.wait(TIMEOUT_S)

    call = unary(channel, server.serve(busy)).future(b"", timeout=1)
    assert call.code() is Code.DEADLINE_EXCEEDED
    assert not go_on.is_set()
    go_on.set()
    life.expect("begun", "gone", "closed")


@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_a_caller_who_hangs_up_is_noticed(
    server: Server, channel: grpc.Channel, read: bool
) -> None:
    life = Life()

    def answer(exchange: Exchange) -> None:
        life.follow(exchange)
        if read:
            exchange.read(lambda message: life.hear(f"read {message!r}"))

    call = unary(channel, server.serve(answer)).future(b"x", timeout=TIMEOUT_S)
    life.expect("begun", *["read b'x'"] * read)
    call.cancel()
    life.expect("gone", "closed")
    life.expect_no_more()


def test_a_caller_who_hangs_up_between_messages_ends_the_reading_too(
    server: Server, channel: grpc.Channel
) -> None:
    life = Life()

    def answer(exchange: Exchange) -> None:
        def received(message: bytes | None) -> None:
            life.hear(repr(message))
            if message is not None:
                exchange.write(message, False, read_on)

        def read_on() -> None:
            exchange.read(received)
            life.hear("reads on")

        life.follow(exchange)
        exchange.read(received)

    with Call(channel, server.serve(answer)) as call:
        call.send(b"1")
        assert next(call.answers) == b"1"
        life.expect("begun", "b'1'", "reads on")
        call.answers.cancel()
        heard = {life._heard.get(timeout=TIMEOUT_S) for _ in range(2)}
        assert heard == {"None", "gone"}
        life.expect("closed")
    life.expect_no_more()


def test_what_is_sent_to_a_caller_who_has_gone_harms_nobody(
    server: Server, channel: grpc.Channel
) -> None:
    life = Life()
    call = unary(channel, server.serve(life.follow)).future(b"", timeout=TIMEOUT_S)
    life.expect("begun")
    call.cancel()
    life.expect("gone", "closed")
    server.loop.post(lambda: life.exchange.write(b"late", False, lambda: None))
    in_turn(server)
    assert unary(channel, server.serve(echo))(b"still", timeout=TIMEOUT_S) == b"still"


@pytest.mark.parametrize("way", ["answered", "failed"])
def test_a_call_that_ends_well_closes_once_and_nobody_is_gone(
    server: Server, channel: grpc.Channel, way: str
) -> None:
    life = Life()

    def answer(exchange: Exchange) -> None:
        life.follow(exchange)
        code, message = (0, b"x") if way == "answered" else (Code.INTERNAL.value[0], None)
        exchange.read(lambda _: exchange.end(code, message=message))

    for _ in range(50):
        unary(channel, server.serve(answer)).future(b"", timeout=TIMEOUT_S).code()
        life.expect("begun", "closed")
    life.expect_no_more()
    assert not life.exchange.gone


def test_50_megabytes_go_both_ways(server: Server, channel: grpc.Channel) -> None:
    message = os.urandom(50_000_000)
    answer = unary(channel, server.serve(echo))(message, timeout=TIMEOUT_S)
    assert hashlib.sha256(answer).digest() == hashlib.sha256(message).digest()


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
def test_a_message_that_is_too_large_is_refused_and_read_as_none(
    server: Server, channel: grpc.Channel, compression: grpc.Compression | None
) -> None:
    life = Life()

    def answer(exchange: Exchange) -> None:
        life.follow(exchange)
        exchange.read(lambda message: life.hear(repr(message)))

    ask = unary(channel, server.serve(answer))
    call = ask.future(bytes(LARGEST + 1), compression=compression, timeout=TIMEOUT_S)
    assert call.code() is Code.RESOURCE_EXHAUSTED
    life.expect("begun")
    assert {life._heard.get(timeout=TIMEOUT_S) for _ in range(2)} == {"None", "gone"}
    life.expect("closed")


def test_what_the_caller_compressed_is_read_as_it_was(
    server: Server, channel: grpc.Channel
) -> None:
    message = b"again and " * 100_000
    ask = unary(channel, server.serve(echo))
    for compression in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert ask(message, compression=compression, timeout=TIMEOUT_S) == message


def test_every_connection_gets_its_own_answers(server: Server) -> None:
    path = server.serve(echo)
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(server.channel()) for _ in range(30)]
        calls = [
            (b"%d %d" % (number, turn), unary(channel, path))
            for turn in range(20)
            for number, channel in enumerate(channels)
        ]
        futures = [(text, call.future(text, timeout=TIMEOUT_S)) for text, call in calls]
        for text, future in futures:
            assert future.result() == text


def test_a_thousand_calls_at_once_each_get_their_own_answer(
    server: Server, channel: grpc.Channel
) -> None:
    def later(exchange: Exchange) -> None:
        def received(message: bytes | None) -> None:
            server.loop.at(time.monotonic() + 0.05, lambda: exchange.end(0, message=message))

        exchange.accept()
        exchange.read(received)

    ask = unary(channel, server.serve(later))
    calls = [ask.future(b"%d" % number, timeout=TIMEOUT_S) for number in range(1000)]
    assert [call.result() for call in calls] == [b"%d" % number for number in range(1000)]


def test_calls_that_send_no_message_keep_neither_others_nor_the_work_waiting(
    server: Server, channel: grpc.Channel
) -> None:
    silent, life = server.serve(ping_pong), Life()
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(Call(channel, silent))
        assert unary(channel, server.serve(echo))(b"x", timeout=TIMEOUT_S) == b"x"
        stack.callback(server.loop.post, lambda: setattr(server.loop, "waiting", bool))
        work = iter(range(10))

        def step() -> None:
            if next(work, None) is None:
                server.loop.waiting = bool
                life.hear("worked")

        def begin() -> None:
            server.loop.step, server.loop.waiting = step, lambda: True

        server.loop.post(begin)
        life.expect("worked")


def test_work_is_done_though_calls_keep_coming(server: Server, channel: grpc.Channel) -> None:
    life, path = Life(), server.serve(echo)
    ask, stopping = unary(channel, path), threading.Event()
    thread = threading.Thread(
        target=lambda: [
            [call.result() for call in [ask.future(b"") for _ in range(20)]]
            for _ in iter(stopping.is_set, True)
        ]
    )
    thread.start()

    def step() -> None:
        server.loop.waiting = bool
        life.hear("worked")

    def begin() -> None:
        server.loop.step, server.loop.waiting = step, lambda: True

    for _ in range(10):
        server.loop.post(begin)
        life.expect("worked")
    stopping.set()
    thread.join()


def test_other_threads_answer_at_once_though_nothing_else_happens(
    server: Server, channel: grpc.Channel
) -> None:
    def aside(exchange: Exchange) -> None:
        def received(message: bytes | None) -> None:
            def work() -> None:
                server.loop.post(lambda: exchange.end(0, message=message))

            threading.Thread(target=work).start()

        exchange.accept()
        exchange.read(received)

    ask = unary(channel, server.serve(aside))
    began = time.monotonic()
    for _ in range(300):
        assert ask(b"x", timeout=TIMEOUT_S) == b"x"
    # If each were only found when the loop wakes by itself, these would take 30 s.
    assert time.monotonic() - began < 15


def test_what_is_posted_for_no_call_is_done_at_once(server: Server) -> None:
    began = time.monotonic()
    for _ in range(100):
        in_turn(server)
    # If each were only found when the loop wakes by itself, these would take 10 s.
    assert time.monotonic() - began < 5


def test_what_many_threads_post_is_done_by_the_loop_in_the_order_of_each(
    server: Server, channel: grpc.Channel
) -> None:
    life = Life()
    seen: list[tuple[int, int, int]] = []
    with Call(channel, server.serve(life.follow)):
        life.expect("begun")

        def note(number: int, turn: int) -> None:
            seen.append((number, turn, threading.get_ident()))

        def work(number: int) -> None:
            for turn in range(500):
                server.loop.post(partial(note, number, turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        in_turn(server)
    for number in range(8):
        assert [turn for of, turn, _ in seen if of == number] == list(range(500))
    assert {thread for _, _, thread in seen} == {server.loop.thread}


def test_timers_end_in_their_order_and_not_before(server: Server) -> None:
    fired: list[tuple[str, float]] = []
    done = threading.Event()

    def note(name: str) -> None:
        fired.append((name, time.monotonic()))

    def later(when: float) -> None:
        server.loop.at(when, done.set)

    def begin() -> None:
        loop = server.loop
        loop.at(now + 0.05, lambda: note("third"))
        loop.at(now + 0.02, lambda: note("second"))
        loop.at(now - 1.0, lambda: note("first"))
        taken_back = loop.at(now + 0.01, lambda: note("never"))
        loop.at(now + 0.03, lambda: later(now + 0.06))
        loop.forget(taken_back)
        loop.forget(taken_back)

    now = time.monotonic()
    server.loop.post(begin)
    assert done.wait(TIMEOUT_S)
    assert [name for name, _ in fired] == ["first", "second", "third"]
    assert [at - now >= due for (_, at), due in zip(fired, (0, 0.02, 0.05), strict=True)]
    assert all(at - now < 5 for _, at in fired)


def test_timers_that_were_taken_back_take_no_room(server: Server) -> None:
    loop, done = server.loop, threading.Event()

    def begin() -> None:
        kept = [loop.at(time.monotonic() + 3600, lambda: None) for _ in range(10)]
        for _ in range(10_000):
            loop.forget(loop.at(time.monotonic() + 3600, lambda: None))
        assert len(loop._timers) < 1000
        for timer in kept:
            loop.forget(timer)
        done.set()

    loop.post(begin)
    assert done.wait(TIMEOUT_S)


def test_a_call_leaves_nothing_to_the_garbage_collector(
    server: Server, channel: grpc.Channel
) -> None:
    life = Life()

    def answer(exchange: Exchange) -> None:
        life.follow(exchange)
        exchange.read(lambda message: exchange.end(0, message=message))

    ask = unary(channel, server.serve(answer))
    gc.collect()
    gc.disable()
    try:
        for _ in range(20):
            ask(b"x", timeout=TIMEOUT_S)
            life.expect("begun", "closed")
        in_turn(server)
        del life.exchange
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, Exchange)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


def test_thousands_of_calls_leave_no_memory_and_no_descriptors_behind(server: Server) -> None:
    def refuse(exchange: Exchange) -> None:
        exchange.refuse(Code.RESOURCE_EXHAUSTED.value[0], "no", (("a", "b"),))

    paths = [server.serve(echo), server.serve(refuse), server.serve(ping_pong)]

    def thousand_calls() -> None:
        with server.channel() as channel:
            for _ in range(10):
                calls = [
                    unary(channel, paths[number % 5 == 0]).future(bytes(1000))
                    for number in range(100)
                ]
                left = [unary(channel, paths[2]).future(bytes(1000)) for _ in range(5)]
                for call in calls:
                    call.code()
                for call in left:
                    call.cancel()
        in_turn(server)

    def used() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(list(Path("/proc/self/fd").iterdir())), pages * resource.getpagesize()

    # The public server's threads take some each, and it is slow.
    warm_up, turns = (2, 8) if isinstance(server.loop, CoreServer) else (1, 2)
    for _ in range(warm_up):
        thousand_calls()
    descriptors, memory = used()
    for _ in range(turns):
        thousand_calls()
    descriptors_after, memory_after = used()
    assert descriptors_after <= descriptors + 5
    # A call that is not let go of keeps several thousand bytes.
    assert memory_after - memory < 5e6 + turns * 1000 * 1500


@KINDS
def test_stopping_cuts_off_what_is_not_over(
    kind: type[CoreServer | PublicServer],
) -> None:
    life = Life()
    with Server(kind) as server, server.channel() as channel:
        path = server.serve(life.follow)
        call = unary(channel, path).future(b"", timeout=TIMEOUT_S)
        with Call(channel, path) as stream, Call(channel, server.serve(ping_pong)) as idle:
            life.expect("begun", "begun")
            idle.send(b"x")
            assert next(idle.answers) == b"x"
            began = time.monotonic()
            server.stop()
            assert time.monotonic() - began < 5
            assert call.code() is Code.UNAVAILABLE
            assert stream.answers.code() is Code.UNAVAILABLE
            assert idle.answers.code() is Code.UNAVAILABLE
        assert sorted(life._heard.get(timeout=0) for _ in range(4)) == ["closed"] * 2 + ["gone"] * 2
        # Work for them may end later still, on other threads.
        server.loop.post(lambda: None)


@KINDS
def test_what_was_answered_before_stopping_arrives(
    kind: type[CoreServer | PublicServer],
) -> None:
    answers = [b"%d" % number for number in range(20)]
    with Server(kind) as server, server.channel() as channel:

        def answer(exchange: Exchange) -> None:
            left = iter(answers)

            def write() -> None:
                message = next(left, None)
                if message is None:
                    exchange.end(Code.UNAVAILABLE.value[0], "bye")
                    server.loop.stop()
                else:
                    exchange.write(message, False, write)

            exchange.accept()
            write()

        watch: Any = channel.unary_stream(server.serve(answer))
        call = watch(b"", timeout=TIMEOUT_S)
        received = []
        with pytest.raises(grpc.RpcError):
            received.extend(call)
        assert received == answers
        assert call.details() == "bye"


@KINDS
def test_calls_that_come_while_it_stops_are_answered_or_refused(
    kind: type[CoreServer | PublicServer],
) -> None:
    life, go_on = Life(), threading.Event()

    def busy(exchange: Exchange) -> None:
        life.hear("busy")
        assert go_on.wait(TIMEOUT_S)
        echo(exchange)

    with Server(kind) as server, server.channel() as channel:
        ask, path = unary(channel, server.serve(busy)), server.serve(echo)
        calls = [ask.future(b"x", timeout=TIMEOUT_S)]
        life.expect("busy")
        calls += [unary(channel, path).future(b"x", timeout=TIMEOUT_S) for _ in range(30)]
        server.loop.stop()
        go_on.set()
        server.join()
        codes = {call.code() for call in calls}
    # Those that core had not handed over when it was shut down, it cancels.
    assert codes <= {Code.OK, Code.UNAVAILABLE, Code.CANCELLED}


@KINDS
def test_a_bug_ends_it_with_the_error_and_callers_are_told(
    kind: type[CoreServer | PublicServer],
) -> None:
    def buggy(exchange: Exchange) -> None:
        exchange.accept()
        raise RuntimeError("bug")

    server = Server(kind)
    with server.channel() as channel:
        call = unary(channel, server.serve(buggy)).future(b"", timeout=TIMEOUT_S)
        server.join()
        assert repr(server.bug) == "RuntimeError('bug')"
        assert call.code() is Code.UNAVAILABLE


@KINDS
def test_a_bug_while_it_stops_is_logged_and_stops_nothing(
    kind: type[CoreServer | PublicServer], caplog: pytest.LogCaptureFixture
) -> None:
    life = Life()

    def buggy() -> None:
        raise RuntimeError("bug")

    def answer(exchange: Exchange) -> None:
        life.follow(exchange)
        exchange.on_gone = buggy

    with Server(kind) as server, server.channel() as channel:
        calls = [unary(channel, server.serve(answer)).future(b"") for _ in range(3)]
        life.expect(*["begun"] * 3)
        with caplog.at_level(logging.ERROR):
            server.stop()
        assert {call.code() for call in calls} == {Code.UNAVAILABLE}
    assert caplog.text.count("RuntimeError: bug") == 3


def test_two_messages_at_once_are_a_bug_that_is_told() -> None:
    def hasty(exchange: Exchange) -> None:
        exchange.accept()
        exchange.write(bytes(10_000_000), False, lambda: None)
        exchange.write(b"2", False, lambda: None)

    server = Server(CoreServer)
    with server.channel() as channel:
        call = unary(channel, server.serve(hasty)).future(b"", timeout=TIMEOUT_S)
        server.join()
        assert call.code() is Code.UNAVAILABLE
    assert "before the last one had gone" in str(server.bug)


@KINDS
def test_a_port_that_is_taken_is_told(kind: type[CoreServer | PublicServer]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(RuntimeError):
        kind(OPTIONS).bind(f"127.0.0.1:{taken.getsockname()[1]}", None)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@KINDS
@pytest.mark.parametrize("address", ["[::1]:0", "unix:{folder}/socket"])
def test_other_addresses_are_listened_on(
    kind: type[CoreServer | PublicServer], address: str, tmp_path: Path
) -> None:
    if "::1" in address and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    address = address.format(folder=tmp_path)
    with Server(kind, address) as server:
        target = address if address.startswith("unix:") else f"[::1]:{server.port}"
        with grpc.insecure_channel(target, CHANNEL) as channel:
            assert unary(channel, server.serve(echo))(b"x", timeout=TIMEOUT_S) == b"x"


@KINDS
def test_tls_encrypts_and_asks_clients_who_they_are(
    kind: type[CoreServer | PublicServer], certificates: Certificates
) -> None:
    known, authority = certificates.server, certificates.authority.certificate.read_bytes()
    pairs = [(known.key.read_bytes(), known.certificate.read_bytes())]
    ways: list[tuple[bool, dict[str, bytes], Code]] = []
    for name, mutual, code in [
        (None, False, Code.OK),
        (None, True, Code.UNAVAILABLE),
        ("stranger", True, Code.UNAVAILABLE),
        ("client", True, Code.OK),
    ]:
        pair = getattr(certificates, name) if name else None
        shown = (
            {
                "private_key": pair.key.read_bytes(),
                "certificate_chain": pair.certificate.read_bytes(),
            }
            if pair
            else {}
        )
        ways.append((mutual, shown, code))
    for mutual, group in itertools.groupby(ways, lambda way: way[0]):
        credentials = grpc.ssl_server_credentials(pairs, authority if mutual else None, mutual)
        with Server(kind, "127.0.0.1:0", credentials) as server:
            path = server.serve(echo)
            for _, shown, code in group:
                secure = grpc.ssl_channel_credentials(authority, **shown)
                options = [*CHANNEL, ("grpc.ssl_target_name_override", "localhost")]
                with grpc.secure_channel(server.target, secure, options) as channel:
                    call = unary(channel, path).future(bytes(100_000), timeout=TIMEOUT_S)
                    assert call.code() is code
            with server.channel() as channel:
                call = unary(channel, path).future(b"", timeout=TIMEOUT_S)
                assert call.code() is Code.UNAVAILABLE, "not encrypted"


SCRIPT = """
import os, signal, sys, threading
import grpc
from convoy_service.transport.grpc_core import CoreServer
from convoy_service.transport.grpc_public import PublicServer

loop = {kind}([])
target = f"127.0.0.1:{{loop.bind('127.0.0.1:0', None)}}"
begun, calls = threading.Semaphore(0), []

def answer(exchange):
    exchange.accept()
    calls.append(exchange)
    begun.release()

def call():
    channel = grpc.insecure_channel(target)
    unary = channel.unary_unary("/a").future(b"")
    stream = channel.stream_stream("/b")(iter(threading.Event().wait, None))
    begun.acquire()
    begun.acquire()
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, lambda *_: loop.stop())
loop.on_call = answer
threading.Thread(target=call, daemon=True).start()
loop.run()
for late in calls:
    loop.post(lambda: print(late))
print("stopped")
"""


@KINDS
def test_a_signal_stops_it_and_the_process_ends_without_a_word(
    kind: type[CoreServer | PublicServer],
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(kind=kind.__name__)],
        capture_output=True,
        env=environment(),
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "stopped\n", "")


@pytest.mark.parametrize(
    ("version", "words"),
    [("1.80.0", "1.81"), ("1.86.0", "1.86"), ("2.0.0", "1.86"), (grpc.__version__, "")],
)
def test_a_grpcio_that_was_not_tried_gets_the_public_server_and_a_warning(
    version: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(grpc, "__version__", version)
    made = transport.server(OPTIONS)
    assert type(made) is (PublicServer if words else CoreServer)
    assert words in caplog.text
    assert bool(words) == ("was not tried" in caplog.text)


def test_a_grpcio_that_is_not_as_expected_gets_the_public_server_and_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def changed(options: object) -> None:
        raise AttributeError("no attribute 'register_completion_queue'")

    monkeypatch.setattr(transport, "CoreServer", changed)
    assert type(transport.server(OPTIONS)) is PublicServer
    assert "not as expected" in caplog.text


def test_the_public_server_can_be_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    assert type(transport.server(OPTIONS, public=True)) is PublicServer
    assert caplog.text == ""


def test_a_deadline_counts_from_when_the_loop_left_the_sockets_alone() -> None:
    loop = CoreServer(OPTIONS)
    loop.stop()  # it does not ask for another call then
    calls: list[Exchange] = []
    loop.on_call = calls.append
    now = time.monotonic()
    for away_s, deadline in ((0.0, time.time() + 10), (3.0, time.time() + 10), (3.0, math.inf)):
        loop._away_s = away_s
        details = SimpleNamespace(method=b"/test/0", deadline=deadline)
        loop._on_call(
            SimpleNamespace(success=True, call=None, call_details=details, invocation_metadata=())
        )
    at_once, late, unlimited = [call.deadline for call in calls]
    assert at_once == pytest.approx(now + 10, abs=0.1)
    assert late == pytest.approx(now + 7, abs=0.1)
    assert unlimited is None


def test_calls_that_came_during_a_batch_are_taken_for_as_old_as_it_was_long() -> None:
    with Server(CoreServer) as server, contextlib.ExitStack() as stack:
        left: queue.SimpleQueue[float] = queue.SimpleQueue()
        running, sent = threading.Event(), threading.Event()
        wanted, batch_s = [True], 1.0

        def step() -> None:
            wanted.clear()
            running.set()
            sent.wait(TIMEOUT_S)
            ends = time.monotonic() + batch_s
            while time.monotonic() < ends:
                pass

        def note(exchange: Exchange) -> None:
            assert exchange.deadline is not None
            left.put(exchange.deadline - time.monotonic())
            exchange.refuse(Code.UNAVAILABLE.value[0], "noted")

        path = server.serve(note)
        # Of connections that are there already, several calls each.
        calls: list[Any] = [
            stack.enter_context(server.channel()).unary_unary(path) for _ in range(5)
        ]

        def left_of(call: Any) -> float:
            with pytest.raises(grpc.RpcError):
                call(b"", timeout=10)
            return left.get()

        # What is on its way for long is old too: the youngest of many is not.
        for call in calls:
            assert max(left_of(call) for _ in range(20)) == pytest.approx(10, abs=0.2)
        server.loop.step = step
        server.loop.waiting = lambda: bool(wanted)
        assert running.wait(TIMEOUT_S)
        futures = [call.future(b"", timeout=10) for call in calls for _ in range(4)]
        sent.set()
        for future in futures:
            assert future.code() is Code.UNAVAILABLE
        for _ in futures:
            assert left.get() < 10 - batch_s
        # When that has been taken in, calls are as young as ever.
        assert max(left_of(calls[0]) for _ in range(100)) == pytest.approx(10, abs=0.2)


def test_a_call_that_is_kept_longer_than_its_loop_does_nothing_more() -> None:
    """gRPC would end the process where an operation is started for a queue that is closed."""
    kept: list[Exchange] = []
    with Server(CoreServer) as server, server.channel() as channel:

        def keep(exchange: Exchange) -> None:
            kept.append(exchange)

        call = unary(channel, server.serve(keep)).future(b"", timeout=TIMEOUT_S)
        while not kept:
            in_turn(server)
        server.stop()
        assert call.code() is Code.UNAVAILABLE
        kept[0].end(0, message=b"late")
