"""The front with nothing below it: calls and their messages come and go as the test says."""

import gc
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from convoy_protos import inference_pb2 as pb
from convoy_service import errors
from convoy_service.tasks import Wait
from convoy_service.telemetry.counters import Metrics
from convoy_service.transport import dispatcher as front
from convoy_service.transport.call import Exchange, Trailers
from convoy_service.transport.dispatcher import Call, Front
from convoy_service.transport.loop import Loop

Code = grpc.StatusCode
Ask, Answer = pb.ModelReadyRequest, pb.ModelMetadataResponse


class Line(Loop):
    """A loop that runs when it is told to."""

    def bind(self, address: str, credentials: "grpc.ServerCredentials | None") -> int:
        return 0

    def run(self) -> None:
        while self._posted or (self._timers and self._timers[0][0] <= time.monotonic()):
            self._chores()

    def _wake(self) -> None:
        pass


class Caller(Exchange):
    """One call, seen from its other end."""

    def __init__(self, loop: Line, method: str, deadline: float | None, metadata: Any = ()) -> None:
        super().__init__(method, deadline, metadata)
        self._loop = loop
        self._reads: list[Callable[[bytes | None], None]] = []
        self._writes: list[Callable[[], None]] = []
        self._is_closed = False
        self.accepted = False
        self.answers: list[bytes] = []
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailers: dict[str, str] = {}

    def accept(self) -> None:
        self.accepted = True

    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        assert not self.accepted
        self.end(code, details, trailers)

    def read(self, then: Callable[[bytes | None], None]) -> None:
        assert not self._reads, "one message at a time"
        self._reads.append(then)

    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        assert not self._writes, "one message at a time"
        assert self.code is None
        self.answers.append(message)
        self._writes.append(then)

    def end(
        self, code: int, details: str = "", trailers: Trailers = (), message: bytes | None = None
    ) -> None:
        assert self.code is None, "a call ends once"
        self.code = next(each for each in Code if each.value[0] == code)
        self.details, self.trailers = details, dict(trailers)
        if message is not None:
            self.answers.append(message)
        self._loop.post(self._close)

    def _close(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            on_closed, self.on_gone, self.on_closed = self.on_closed, id, id  # type: ignore[assignment]
            on_closed()

    # What the caller does.

    @property
    def wanted(self) -> bool:
        """Whether the server asks for a message."""
        return bool(self._reads)

    def send(self, message: Message | bytes | None) -> "Caller":
        data = message.SerializeToString() if isinstance(message, Message) else message
        self._reads.pop()(data)
        self._loop.run()
        return self

    def take(self) -> Any:
        """The answer that is being written."""
        self._writes.pop()()
        self._loop.run()
        return Answer.FromString(self.answers.pop(0))

    def hang_up(self) -> None:
        """In gRPC's order."""
        if self._reads:
            self._reads.pop()(None)
        self.gone = True
        self.on_gone()
        if self._writes:
            self._writes.pop()()
        self._close()
        self._loop.run()


class Work:
    """What a handler waits for."""

    def __init__(self, house: "House", name: str) -> None:
        self._house, self._name = house, name

    def start(self, done: Callable[[Any], None]) -> "Work":
        self._house.at_work[self._name] = done
        return self

    def cancel(self) -> None:
        self._house.cancelled.append(self._name)
        self._house.finish(self._name, errors.Cancelled("cancelled"))


class House:
    """A front whose handler answers with the name it was asked with, when the test says so."""

    def __init__(self, **limits: Any) -> None:
        self.loop, self.metrics = Line(), Metrics()
        some: dict[str, Any] = {
            "max_request_bytes": 1000,
            "max_in_flight": 100,
            "max_held_bytes": 10_000,
            "max_parts": 50,
        }
        self.front = Front(self.loop, self.metrics, **some | limits)
        self.front.unary("/some/Work", Ask, self._work)
        self.front.unary("/some/Probe", Ask, self._work, always=True)
        self.front.stream("/some/Stream", Ask, self._work, self._refused)
        self.front.stream("/some/Strict", Ask, self._work)
        self.front.stream(
            "/some/Ordered", Ask, self._work, self._refused, strict=("errors", "end"), ordered=True
        )
        self.front.watch("/some/Watch", Ask, self._watch)
        self.calls: dict[str, Call] = {}
        self.at_work: dict[str, Callable[[Any], None]] = {}
        self.cancelled: list[str] = []
        self.watchers: list[Callable[[Message], None]] = []

    async def _work(self, request: Any, call: Call) -> Message:
        call.model = "m"
        self.calls[request.name] = call
        return Answer(name=await Wait[str](Work(self, request.name).start))

    def _refused(self, request: Any, code: grpc.StatusCode, words: str) -> Message:
        return Answer(name=request.name if request else "", platform=f"{code.name}: {words}")

    def _watch(self, request: Any, send: Callable[[Message], None]) -> Callable[[], None]:
        self.watchers.append(send)
        send(Answer(name="first"))
        return lambda: self.watchers.remove(send)

    def call(
        self, method: str = "Work", deadline: float | None = None, metadata: Any = ()
    ) -> Caller:
        caller = Caller(self.loop, f"/some/{method}", deadline, metadata)
        self.loop.on_call(caller)
        return caller

    def ask(self, name: str, method: str = "Work", deadline: float | None = None) -> Caller:
        """A call that has sent its message."""
        return self.call(method, deadline).send(Ask(name=name))

    def finish(self, name: str, outcome: Any = None) -> None:
        self.at_work.pop(name)(name if outcome is None else outcome)
        self.loop.run()

    @property
    def in_flight(self) -> tuple[int, int]:
        """Requests, and their bytes."""
        return self.metrics.in_flight(), self.metrics.held_bytes()

    def counted(self) -> dict[tuple[str, ...], Any]:
        return dict(self.metrics.snapshot()["requests"])


@pytest.fixture
def house() -> House:
    return House()


def test_a_request_is_answered_and_counted(house: House) -> None:
    caller = house.ask("a")
    assert house.in_flight == (1, len(Ask(name="a").SerializeToString()))
    house.finish("a")
    assert caller.code is Code.OK
    assert caller.answers == [Answer(name="a").SerializeToString()]
    assert house.in_flight == (0, 0)
    assert house.counted() == {("Work", "m", "OK"): 1}


def test_how_requests_end_is_counted_of_the_version_that_had_them(house: House) -> None:
    requests = house.metrics.requests_to("m", 1)

    def begin(name: str, method: str = "Work") -> Caller:
        caller = house.ask(name, method)
        house.calls[name].requests = requests
        return caller

    begin("a")
    began = time.monotonic()
    house.calls["a"].ran(0.5, 0.25, 0.125)
    time.sleep(0.001)
    house.finish("a")
    assert requests.success == 1
    assert (requests.input_s, requests.queue_s, requests.infer_s) == (0.5, 0.25, 0.125)
    assert 0.001 <= requests.output_s <= time.monotonic() - began
    assert requests.output_s <= requests.success_s
    begin("b", "Stream")
    house.finish("b")
    assert requests.success == 2, "nothing of it could be read: it is answered all the same"
    for number, error in enumerate(
        [
            errors.InvalidRequest("x"),
            errors.Overloaded("x"),
            errors.DeadlineExceeded("x"),
            errors.InferenceFailed("x"),
        ]
    ):
        method = ("Work", "Stream")[number % 2]
        begin(f"{number}", method)
        house.finish(f"{number}", error)
    begin("gone").hang_up()
    assert requests.failures == {"REJECTED": 2, "CANCELED": 1, "BACKEND": 1, "OTHER": 1}
    assert requests.success == 2
    assert requests.fail_s > 0


def test_an_unknown_method_is_told_so_in_few_words(house: House) -> None:
    caller = house.call("x" * 10_000)
    assert caller.code is Code.UNIMPLEMENTED
    assert caller.details.startswith("no method /some/xxx")
    assert len(caller.details) < 2100
    assert not caller.accepted


ERRORS = [
    (errors.InvalidRequest("fix it"), Code.INVALID_ARGUMENT, {}),
    (errors.InvalidImage("fix it"), Code.INVALID_ARGUMENT, {}),
    (errors.UnknownModel("none"), Code.NOT_FOUND, {}),
    (errors.NotReady("later"), Code.UNAVAILABLE, {}),
    (errors.DeadlineExceeded("late"), Code.DEADLINE_EXCEEDED, {}),
    (errors.InferenceFailed("failed"), Code.INTERNAL, {}),
    (
        errors.Overloaded("much", 1.2344),
        Code.RESOURCE_EXHAUSTED,
        {"grpc-retry-pushback-ms": "1234"},
    ),
    (errors.Overloaded("much", 0.0), Code.RESOURCE_EXHAUSTED, {"grpc-retry-pushback-ms": "100"}),
    (errors.Overloaded("much", 1e-5), Code.RESOURCE_EXHAUSTED, {"grpc-retry-pushback-ms": "10"}),
    (errors.Overloaded("much", 1e5), Code.RESOURCE_EXHAUSTED, {"grpc-retry-pushback-ms": "5000"}),
]


@pytest.mark.parametrize(("error", "code", "trailers"), ERRORS, ids=repr)
def test_what_a_handler_raises_becomes_a_status(
    house: House, error: errors.ConvoyError, code: grpc.StatusCode, trailers: dict[str, str]
) -> None:
    caller = house.ask("a")
    house.finish("a", error)
    assert (caller.code, caller.details, caller.trailers) == (code, str(error), trailers)
    assert house.counted() == {("Work", "m", code.name): 1}


@pytest.mark.parametrize("method", ["Work", "Stream", "Strict"])
def test_a_bug_is_logged_and_told_in_fixed_words(
    house: House, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caller = house.ask("a", method)
    with caplog.at_level(logging.ERROR):
        house.finish("a", ValueError("secret"))
    assert "ValueError: secret" in caplog.text
    told = caller.take().platform if method == "Stream" else caller.details
    assert "internal error" in told
    assert "secret" not in told


def test_words_that_are_too_long_are_cut_where_a_character_ends(house: House) -> None:
    caller = house.ask("a")
    house.finish("a", errors.UnknownModel("x" + "\u00fc" * 5000))
    assert caller.details == "x" + "\u00fc" * 999 + " ..."


# Admission


def test_more_requests_than_are_allowed_are_refused_unread_until_one_ends() -> None:
    house = House(max_in_flight=2)
    house.ask("a")
    house.call()
    refused = house.call()
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert "2 requests are in flight" in refused.details
    assert int(refused.trailers["grpc-retry-pushback-ms"]) > 0
    assert not refused.accepted
    house.finish("a")
    assert house.call().code is None
    assert house.counted() == {
        ("Work", "", "RESOURCE_EXHAUSTED"): 1,
        ("Work", "m", "OK"): 1,
    }


def test_what_is_always_answered_takes_nobodys_place() -> None:
    house = House(max_in_flight=1, max_held_bytes=1)
    probes = [house.ask(name, "Probe") for name in "abc"]
    caller = house.ask("w")
    for name in "abcw":
        house.finish(name)
    assert {each.code for each in [*probes, caller]} == {Code.OK}


def test_more_bytes_than_are_allowed_are_refused_unless_there_is_nothing_else() -> None:
    house = House(max_held_bytes=100)
    lone = house.ask("a" * 200)
    assert lone.code is None, "it fits when nothing else is worked on"
    refused = house.call()
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert not refused.accepted
    house.finish("a" * 200)
    first = house.ask("b" * 50)
    second = house.ask("c" * 60)
    assert second.code is Code.RESOURCE_EXHAUSTED, "its size is only known when it is read"
    third = house.ask("d" * 40)
    assert (first.code, third.code) == (None, None)
    with pytest.raises(errors.Overloaded):
        house.front.hold(house.calls["d" * 40], 50)
    house.front.hold(house.calls["d" * 40], 5)
    house.finish("b" * 50)
    house.finish("d" * 40)
    assert house.in_flight == (0, 0)


def test_what_cannot_be_done_in_time_is_refused_unread() -> None:
    deadlines: list[float | None] = []

    def check(deadline: float | None) -> None:
        deadlines.append(deadline)
        no_time(deadline)

    house = House(check=check)
    deadline = time.monotonic() + 60
    refused = house.call(deadline=deadline)
    assert (refused.code, refused.details) == (Code.RESOURCE_EXHAUSTED, "no time")
    assert refused.trailers == {"grpc-retry-pushback-ms": "2000"}
    assert not refused.accepted
    assert deadlines == [deadline]
    assert house.call("Probe").code is None


def test_what_is_read_after_its_deadline_is_refused_unread() -> None:
    house = House()
    refused = house.call(deadline=time.monotonic())
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert "grpc-retry-pushback-ms" in refused.trailers
    assert not refused.accepted
    assert house.call(deadline=time.monotonic() + 60).accepted


def send_what_is_too_large(house: House) -> Caller:
    return house.ask("a" * 1001)


def send_no_message(house: House) -> Caller:
    return house.call().send(None)


def send_garbage(house: House) -> Caller:
    return house.call().send(b"\xff garbage")


def be_answered(house: House) -> Caller:
    caller = house.ask("a")
    house.finish("a")
    return caller


def raise_an_error(house: House) -> Caller:
    caller = house.ask("a")
    house.finish("a", errors.UnknownModel("none"))
    return caller


def hang_up_before_the_message(house: House) -> Caller:
    caller = house.call()
    caller.hang_up()
    return caller


def hang_up_while_it_runs(house: House) -> Caller:
    caller = house.ask("a")
    caller.hang_up()
    return caller


def run_out_of_time(house: House) -> Caller:
    deadline = time.monotonic() + 0.5
    caller = house.ask("a", deadline=deadline)
    while time.monotonic() < deadline:
        time.sleep(0.01)
    caller.hang_up()
    return caller


def be_refused(house: House) -> Caller:
    house.front.draining = True
    return house.call()


def be_refused_for_lack_of_time(house: House) -> Caller:
    house.front._check = no_time
    return house.call()


def no_time(deadline: float | None) -> None:
    raise errors.Overloaded("no time", 2.0)


WAYS = [
    (be_answered, Code.OK, "OK"),
    (be_refused, Code.UNAVAILABLE, "UNAVAILABLE"),
    (be_refused_for_lack_of_time, Code.RESOURCE_EXHAUSTED, "RESOURCE_EXHAUSTED"),
    (raise_an_error, Code.NOT_FOUND, "NOT_FOUND"),
    (send_what_is_too_large, Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    (send_no_message, Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    (send_garbage, Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    # For all that can be told, it is one that sends none.
    (hang_up_before_the_message, Code.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    (hang_up_while_it_runs, None, "CANCELLED"),
    (run_out_of_time, None, "DEADLINE_EXCEEDED"),
]


@pytest.mark.parametrize(("way", "code", "counted"), WAYS, ids=lambda each: getattr(each, "__name__", None))  # fmt: skip
def test_however_a_call_ends_it_is_counted_and_nothing_of_it_is_left(
    house: House, way: Callable[[House], Caller], code: grpc.StatusCode | None, counted: str
) -> None:
    gc.collect()
    gc.disable()
    try:
        caller = way(house)
        assert caller.code is code
        assert house.in_flight == (0, 0)
        assert [key[2] for key in house.counted()] == [counted]
        assert house.at_work == {}
        house.calls.clear()
        del caller
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, (Exchange, Call, Message))]
        assert left == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


# Deadlines and callers who leave


def test_a_caller_who_leaves_ends_the_work(house: House) -> None:
    house.ask("a")
    other = house.ask("b")
    house.ask("c").hang_up()
    assert house.cancelled == ["c"]
    house.finish("b")
    assert other.code is Code.OK


def test_the_time_that_a_request_allows_ends_it_and_the_work(house: House) -> None:
    caller = house.ask("a", deadline=time.monotonic() + 100)
    call = house.calls["a"]
    call.limit(call.arrived - 1)
    house.loop.run()
    assert caller.code is Code.DEADLINE_EXCEEDED
    assert house.cancelled == ["a"]
    assert house.counted() == {("Work", "m", "DEADLINE_EXCEEDED"): 1}
    assert call.deadline == call.arrived - 1


def test_the_earlier_of_two_deadlines_counts_and_no_timer_outlives_its_call(house: House) -> None:
    soon, late = time.monotonic() + 100, time.monotonic() + 200
    house.ask("a", deadline=soon)
    house.calls["a"].limit(late)
    assert house.calls["a"].deadline == soon
    assert house.loop._due == {}
    for number in range(10_000):
        caller = house.ask("a", deadline=late)
        house.calls["a"].limit(soon + number / 1000)
        assert house.loop._due
        house.finish("a")
        assert caller.code is Code.OK
    assert house.loop._due == {}
    assert len(house.loop._timers) < 1000


# Large requests


@pytest.mark.parametrize("size", [100, 100_000])
def test_what_is_large_is_handed_over_beside_the_message(size: int) -> None:
    house = House(max_request_bytes=1_000_000, max_held_bytes=1_000_000)
    seen: list[Any] = []

    async def infer(request: Any, call: Call) -> Message:
        seen.append((request.model_name, *map(bytes, call.raw or request.raw_input_contents)))
        assert bool(call.raw) == (size > 64_000)
        return Answer()

    raw = pb.ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
    house.front.unary("/some/Infer", pb.ModelInferRequest, infer, raw_field=raw)
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[b"x" * size, b"y"])
    assert house.call("Infer").send(request).code is Code.OK
    assert seen == [("m", b"x" * size, b"y")]


def test_a_large_body_of_many_parts_is_refused_before_it_is_parsed() -> None:
    house = House(max_request_bytes=10_000_000, max_held_bytes=10_000_000, max_parts=51)
    body = Ask(name="a" * 1_100_000).SerializeToString()
    ask = house.call().send(body + Ask(version="1").SerializeToString() * 50)
    assert ask.code is None
    refused = house.call().send(body + Ask(version="1").SerializeToString() * 51)
    assert refused.code is Code.INVALID_ARGUMENT
    assert "more than 51 parts" in refused.details


# Streams


def test_answers_of_a_stream_come_in_the_order_of_finishing(house: House) -> None:
    caller = house.call("Stream")
    for name in "abc":
        caller.send(Ask(name=name))
    for name in "cab":
        house.finish(name)
    assert [caller.take().name for _ in "abc"] == ["c", "a", "b"]
    caller.send(None)
    assert caller.code is Code.OK
    assert house.in_flight == (0, 0)


def test_a_stream_that_is_half_closed_ends_when_all_is_answered_and_taken(house: House) -> None:
    caller = house.call("Stream")
    caller.send(Ask(name="a")).send(Ask(name="b")).send(None)
    house.finish("a")
    house.finish("b")
    assert caller.take().name == "a"
    assert caller.code is None
    assert caller.take().name == "b"
    assert caller.code is Code.OK


def test_a_message_that_fails_is_answered_and_the_stream_goes_on() -> None:
    house = House(max_in_flight=2)
    caller = house.call("Stream")
    caller.send(b"\xff garbage")
    assert caller.take().platform.startswith("INVALID_ARGUMENT: the body is no ")
    caller.send(Ask(name="a"))
    house.finish("a", errors.UnknownModel("none"))
    assert caller.take() == Answer(name="a", platform="NOT_FOUND: none")
    house.ask("b")
    house.ask("c")
    caller.send(Ask(name="d"))
    refused = caller.take()
    assert refused.name == "d", "so that its sender knows"
    assert refused.platform.startswith("RESOURCE_EXHAUSTED: ")
    caller.send(Ask(name="e" * 1001))
    refused = caller.take()
    assert refused.name == "e" * 1001
    assert refused.platform.startswith("RESOURCE_EXHAUSTED: ")
    house.finish("b")
    caller.send(Ask(name="f" * 1001))
    assert caller.take().platform.startswith("INVALID_ARGUMENT: the request has ")
    assert caller.code is None
    assert house.metrics.in_flight() == 1


def test_without_an_answer_for_it_a_message_that_fails_ends_the_stream(house: House) -> None:
    caller = house.call("Strict")
    caller.send(Ask(name="a")).send(Ask(name="b"))
    house.finish("a", errors.UnknownModel("none"))
    assert (caller.code, caller.details) == (Code.NOT_FOUND, "none")
    assert house.cancelled == ["b"]
    assert caller.answers == []
    assert house.in_flight == (0, 0)


def test_answers_of_an_ordered_stream_wait_for_those_before_them(house: House) -> None:
    caller = house.call("Ordered")
    for name in "abcd":
        caller.send(Ask(name=name))
    house.finish("c", errors.InvalidRequest("bad"))
    house.finish("b")
    assert caller.answers == []
    house.finish("a")
    told = [caller.take() for _ in "abc"]
    assert [each.name for each in told] == ["a", "b", "c"]
    assert told[2].platform == "INVALID_ARGUMENT: bad"
    house.finish("d")
    assert caller.take().name == "d"
    caller.send(None)
    assert caller.code is Code.OK
    assert house.in_flight == (0, 0)


def test_a_caller_may_ask_that_an_error_end_the_stream_after_the_answers_before_it(
    house: House,
) -> None:
    caller = house.call("Ordered", metadata=(("some", "thing"), ("errors", "end")))
    for name in "abcd":
        caller.send(Ask(name=name))
    house.finish("b", errors.Overloaded("much"))
    house.finish("c")
    assert caller.answers == []
    house.finish("a")
    assert caller.take().name == "a"
    assert (caller.code, caller.details) == (Code.RESOURCE_EXHAUSTED, "much")
    assert "grpc-retry-pushback-ms" in caller.trailers
    assert house.cancelled == ["d"]
    assert house.in_flight == (0, 0)


def test_a_stream_is_not_read_on_while_it_owes_many_answers(house: House) -> None:
    caller, sent = house.call("Stream"), 0
    while caller.wanted:
        caller.send(Ask(name=str(sent)))
        sent += 1
    assert sent == front._STREAM_WINDOW > house.front._max_in_flight
    for name in list(house.at_work):
        house.finish(name)
    assert not caller.wanted, "they are not taken yet"
    caller.take()
    assert caller.wanted


def test_a_stream_is_not_read_on_while_it_holds_many_bytes() -> None:
    house = House(max_request_bytes=10_000_000, max_held_bytes=100_000_000)
    caller, sent = house.call("Stream"), 0
    while caller.wanted:
        caller.send(Ask(name=str(sent), version="x" * 1_000_000))
        sent += 1
    assert sent * 1_000_000 >= front._STREAM_WINDOW_BYTES > (sent - 1) * 1_000_000
    # An answer that is as large takes the place of its message.
    house.finish("0", "y" * 1_000_000)
    assert not caller.wanted
    caller.take()
    assert caller.wanted


def test_a_caller_who_leaves_a_stream_ends_the_work_for_it(house: House) -> None:
    caller, other = house.call("Stream"), house.ask("d")
    caller.send(Ask(name="a")).send(Ask(name="b")).send(Ask(name="c"))
    house.finish("a")
    caller.hang_up()
    assert sorted(house.cancelled) == ["b", "c"]
    house.finish("d")
    assert other.code is Code.OK
    assert house.in_flight == (0, 0)
    assert house.counted() == {
        ("Stream", "m", "OK"): 1,
        ("Stream", "m", "CANCELLED"): 2,
        ("Work", "m", "OK"): 1,
    }


@pytest.mark.parametrize("ending", ["answered", "left"])
def test_a_stream_leaves_nothing_to_the_garbage_collector(house: House, ending: str) -> None:
    gc.collect()
    gc.disable()
    try:
        caller = house.call("Stream")
        caller.send(Ask(name="a")).send(Ask(name="b")).send(b"\xff garbage")
        house.front._check = no_time
        caller.send(Ask(name="c"))
        house.finish("a")
        if ending == "left":
            caller.hang_up()
        else:
            house.finish("b", errors.UnknownModel("none"))
            for _ in range(4):
                caller.take()
            caller.send(None)
        house.calls.clear()
        del caller
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, (Exchange, Call, Message))]
        assert left == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


# Draining


def drain(house: House) -> list[str]:
    """Begins to drain; holds a word when that is over."""
    over: list[str] = []
    house.front.drain(lambda: over.append("over"))
    house.loop.run()
    return over


def test_with_nothing_in_flight_the_drain_is_over_at_once(house: House) -> None:
    assert drain(house) == ["over"]


def test_a_drain_waits_for_what_is_in_flight_and_refuses_the_rest(house: House) -> None:
    caller, probe, silent = house.ask("a"), house.ask("b", "Probe"), house.call()
    over = drain(house)
    for method in ("Work", "Stream"):
        refused = house.call(method)
        assert refused.code is Code.UNAVAILABLE, method
        assert "shutting down" in refused.details
    # What asks for no work is still answered: a probe must not take it for dead.
    late = house.ask("d", "Probe")
    house.finish("d")
    assert late.code is Code.OK
    house.finish("a")
    house.finish("b")
    assert (caller.code, probe.code, over) == (Code.OK, Code.OK, [])
    silent.send(Ask(name="c"))
    house.finish("c")
    assert (silent.code, over) == (Code.OK, ["over"])


def test_streams_end_with_the_drain_when_what_was_read_is_answered(house: House) -> None:
    idle, busy = house.call("Stream"), house.call("Stream")
    busy.send(Ask(name="a"))
    over = drain(house)
    assert (idle.code, busy.code, over) == (Code.UNAVAILABLE, None, [])
    house.finish("a")
    assert busy.take().name == "a"
    assert (busy.code, over) == (Code.UNAVAILABLE, ["over"])
    assert "shutting down" in busy.details


def test_watches_do_not_hold_the_drain_up_and_hear_all_before_they_end(house: House) -> None:
    caller = house.ask("w", "Watch")
    (tell,) = house.watchers
    over = drain(house)
    assert over == ["over"]
    assert caller.code is None
    tell(Answer(name="second"))
    tell(Answer(name="third"))
    assert house.front.close() == 0
    assert house.watchers == []
    assert [caller.take().name for _ in range(3)] == ["first", "second", "third"]
    assert caller.code is Code.UNAVAILABLE


def test_closing_says_how_many_are_cut_off(house: House) -> None:
    for name in "abc":
        house.ask(name)
    house.ask("w", "Watch")
    drain(house)
    house.finish("a")
    assert house.front.close() == 2


def test_a_watcher_who_leaves_hears_no_more(house: House) -> None:
    caller, other = house.ask("w", "Watch"), house.ask("v", "Watch")
    caller.hang_up()
    (tell,) = house.watchers
    tell(Answer(name="second"))
    assert caller.answers == [Answer(name="first").SerializeToString()]
    assert [other.take().name for _ in range(2)] == ["first", "second"]
    house.front.close()
    other.hang_up()


@pytest.mark.parametrize("body", [None, b"\xff garbage"])
def test_a_watch_without_a_request_is_refused(house: House, body: bytes | None) -> None:
    caller = house.call("Watch").send(body)
    assert caller.code is Code.INVALID_ARGUMENT
    assert house.watchers == []
    assert drain(house) == ["over"]
