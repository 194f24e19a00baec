"""Rows from one process to another: every caller gets its own, whatever happens on either side."""

import fcntl
import math
import os
import queue
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from convoy_service.engine.batcher import Answer, Batcher, BatchTimes, Outputs, Rows
from convoy_service.errors import Cancelled, DeadlineExceeded, InferenceFailed, NotReady, Overloaded
from convoy_service.ipc.engine_client import Engines, RemoteBatcher
from convoy_service.ipc.engine_server import EngineServer, Hosted, listen
from convoy_service.ipc.protocol import ModelInfo
from tests.numbered import INFO, POISON, model, numbers, outputs, rows

# Only decides how long a test that hangs takes to fail.
TIMEOUT_S = 30.0
ROW = INFO.row_bytes
HELLO = struct.pack("<6sH", b"convoy", 3)
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Device:
    """A `model` that runs only when it may, and tells what it ran."""

    def __init__(self) -> None:
        self.ran: list[int] = []
        self._entered = threading.Semaphore(0)
        self._open = threading.Event()

    def __call__(self, pixels: Rows) -> Outputs:
        self.ran += numbers(pixels)
        self._entered.release()
        assert self._open.wait(TIMEOUT_S)
        return model(pixels)

    def wait_until_busy(self) -> None:
        assert self._entered.acquire(timeout=TIMEOUT_S)

    def open(self) -> None:
        self._open.set()


@contextmanager
def engine(
    path: Path,
    run: Callable[[Rows], Outputs] = model,
    *,
    inline: bool = True,
    max_wait_s: float = math.inf,
    row_s: float = 0.0,
) -> Iterator[EngineServer]:
    """An engine at `path`, on a thread of this process; `row_s` is what it believes a row takes."""
    times = BatchTimes(INFO.max_batch_size)
    if row_s:
        times.record(INFO.max_batch_size, row_s * INFO.max_batch_size)
    batcher = Batcher(run, INFO.row_shape, INFO.max_batch_size, times=times, max_wait_s=max_wait_s)
    if not inline:
        batcher.start()
    server = EngineServer(listen(path), [Hosted(INFO, batcher, inline)])
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(TIMEOUT_S)
        batcher.close()
    assert not thread.is_alive()


class Acceptor:
    """The other side: connected to the engines at `paths`, and hears when they come and go."""

    def __init__(
        self,
        *paths: Path,
        memory_bytes: int = 1 << 20,
        max_wait_s: float = math.inf,
        send: bool = True,
    ) -> None:
        self.changes: queue.Queue[tuple[str, tuple[ModelInfo, ...]]] = queue.Queue()
        self.bugs: list[BaseException] = []
        self.engines = Engines(
            map(str, paths),
            memory_bytes=memory_bytes,
            on_change=lambda path, models: self.changes.put((path, models)),
            on_bug=self.bugs.append,
        )
        self.batcher = RemoteBatcher(self.engines, INFO, max_wait_s=max_wait_s)
        if send:
            self.batcher.start()

    def __enter__(self) -> "Acceptor":
        return self

    def __exit__(self, *_: object) -> None:
        self.engines.close()
        assert not self.bugs

    def wait_for(self, *changes: tuple[Path, bool]) -> "Acceptor":
        """Until the engines at these paths have come (True) or gone (False), in any order."""
        heard = [self.changes.get(timeout=TIMEOUT_S) for _ in changes]
        assert sorted(heard) == sorted((str(path), (INFO,) if up else ()) for path, up in changes)
        return self

    def submit(self, *numbers: int, deadline: float | None = None, priority: int = 0) -> "Pending":
        pending = Pending(numbers)
        pending.cancel = self.batcher.submit(
            rows(*numbers), pending.outcomes.put, deadline=deadline, priority=priority
        ).cancel
        return pending


class Pending:
    """A submitted request."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self.numbers = numbers
        self.outcomes: queue.Queue[Answer | Exception] = queue.Queue()
        self.cancel: Callable[[], object] = lambda: None

    def outcome(self) -> Answer | Exception:
        return self.outcomes.get(timeout=TIMEOUT_S)

    def answer(self) -> Answer:
        """The answer, which has to be right."""
        outcome = self.outcome()
        assert isinstance(outcome, Answer), outcome
        np.testing.assert_array_equal(outcome.outputs, outputs(*self.numbers))
        assert outcome.outputs.dtype == np.float32
        return outcome


class Bare:
    """An acceptor by hand. `with` connects it, and reads the welcome."""

    MEMORY = 16 * ROW

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        self.socket.connect(str(path))

    def __enter__(self) -> "Bare":
        self.greet(HELLO, SEALS, self.MEMORY)
        _, fds, _, _ = socket.recv_fds(self.socket, 12, 1)
        for fd in fds:
            os.close(fd)
        return self

    def greet(self, hello: bytes, seals: int, size: int) -> None:
        memory = os.memfd_create("bare", os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, size)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
        socket.send_fds(self.socket, [hello], [memory])
        os.close(memory)

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def submit(
        self,
        number: int,
        *,
        offset: int = 0,
        rows: int = 1,
        model: int = 0,
        kind: int = 0,
        deadline: float = float("inf"),
    ) -> None:
        self.socket.sendall(struct.pack("<QdQqIIH", number, deadline, offset, 0, rows, model, kind))

    def replies(self, count: int) -> list[tuple[int, int]]:
        reply = struct.Struct("<QdddQIIH")
        with self.socket.makefile("rb") as stream:
            data = stream.read(count * reply.size)
        return [(number, status) for number, *_, status in reply.iter_unpack(data)]

    def is_cut_off(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def soon() -> float:
    return time.monotonic() + TIMEOUT_S


inline_or_not = pytest.mark.parametrize("inline", [True, False], ids=["inline", "thread"])


@inline_or_not
def test_answers_belong_to_their_rows_through_cancels_deadlines_failures_and_a_full_memory(
    tmp_path: Path, inline: bool
) -> None:
    rng, paths = random.Random(3), [tmp_path / "a", tmp_path / "b"]
    memory_bytes = 100 * ROW
    submitted: list[Pending] = []
    refused: Counter[type] = Counter()
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(engine(path, inline=inline))
        acceptor = stack.enter_context(Acceptor(*paths, memory_bytes=memory_bytes))
        acceptor.wait_for(*((path, True) for path in paths))
        for first in range(1000, 401_000, 200):
            size = rng.choice([1, 1, 1, 2, 3, 5, 8, 200])
            numbers = list(range(first, first + size))
            if rng.random() < 0.02:
                numbers[rng.randrange(size)] = POISON
            deadline = rng.choice([None, None, soon(), time.monotonic() + rng.random() / 500])
            try:
                pending = acceptor.submit(
                    *numbers, deadline=deadline, priority=rng.choice((0, 1, 2, 1 << 64))
                )
            except (DeadlineExceeded, Overloaded) as error:
                refused[type(error)] += 1
                # Until there may be room again.
                for pending in submitted:
                    if pending.outcomes.empty():
                        pending.outcomes.put(pending.outcome())
                        break
                continue
            submitted.append(pending)
            if rng.random() < 0.1:
                pending.cancel()
        ended: Counter[type] = Counter()
        for pending in submitted:
            outcome = pending.outcome()
            ended[type(outcome)] += 1
            if isinstance(outcome, Answer):
                good = [n != POISON for n in pending.numbers]
                wanted = outputs(*pending.numbers)
                wanted[np.logical_not(good)] = np.nan
                np.testing.assert_array_equal(outcome.outputs, wanted)
                assert outcome.failed_rows == good.count(False)
        acceptor.batcher.close()
        assert all(pending.outcomes.empty() for pending in submitted)  # told once
    assert refused[Overloaded]
    assert ended[Answer] > len(submitted) / 2
    assert ended[Cancelled]
    assert ended[DeadlineExceeded]
    assert ended[InferenceFailed]
    assert set(ended) <= {Answer, Cancelled, DeadlineExceeded, InferenceFailed, Overloaded}


def test_a_full_memory_refuses_and_is_whole_again_when_all_is_answered(tmp_path: Path) -> None:
    device = Device()
    with (
        engine(tmp_path / "e", device),
        Acceptor(tmp_path / "e", memory_bytes=20 * 256) as acceptor,
    ):
        acceptor.wait_for((tmp_path / "e", True))

        def fill() -> list[Pending]:
            pending: list[Pending] = []
            with suppress(Overloaded):
                while True:
                    pending.append(acceptor.submit(len(pending)))
            return pending

        first = fill()
        assert len(first) == 20 * 256 // ROW
        for cancelled in first[1::2]:
            cancelled.cancel()
            assert isinstance(cancelled.outcome(), Cancelled)
        device.open()
        for pending in first[::2]:
            pending.answer()
        acceptor.submit(7).answer()  # behind the last of the cancelled ones
        assert len(fill()) >= len(first)


def test_a_request_larger_than_the_memory_is_answered_whole(tmp_path: Path) -> None:
    with engine(tmp_path / "e"), Acceptor(tmp_path / "e", memory_bytes=32 * ROW) as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        answer = acceptor.submit(*range(1000, 2001)).answer()
        assert answer.batch_size == INFO.max_batch_size


def test_of_a_request_in_pieces_only_the_guilty_rows_fail(tmp_path: Path) -> None:
    with engine(tmp_path / "e"), Acceptor(tmp_path / "e", memory_bytes=32 * ROW) as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        answer = acceptor.submit(*[POISON] * 50, *range(50)).outcome()
        assert isinstance(answer, Answer)
        assert answer.failed_rows == 50
        assert np.isnan(answer.outputs[:50]).all()
        np.testing.assert_array_equal(answer.outputs[50:], outputs(*range(50)))
        assert isinstance(acceptor.submit(*[POISON] * 100).outcome(), InferenceFailed)


def test_a_memory_without_room_for_an_image_is_refused_at_the_start(tmp_path: Path) -> None:
    engines = Engines([str(tmp_path / "e")], memory_bytes=ROW - 1)
    with closing(engines), pytest.raises(ValueError, match="give it more"):
        RemoteBatcher(engines, INFO, max_wait_s=1.0)


def test_a_cancelled_request_hears_it_at_once_and_does_not_run(tmp_path: Path) -> None:
    device = Device()
    with engine(tmp_path / "e", device), Acceptor(tmp_path / "e") as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        first = acceptor.submit(1)
        device.wait_until_busy()
        unwanted = acceptor.submit(2, 3)
        unwanted.cancel()
        assert isinstance(unwanted.outcomes.get_nowait(), Cancelled)
        unwanted.cancel()
        device.open()
        first.answer()
        first.cancel()
        acceptor.submit(4).answer()
        assert device.ran == [1, 4]
        assert unwanted.outcomes.empty()


def test_what_cannot_be_in_time_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    device = Device()
    with (
        engine(tmp_path / "e", device, row_s=10.0),
        Acceptor(tmp_path / "e", max_wait_s=100.0) as acceptor,
    ):
        acceptor.wait_for((tmp_path / "e", True))
        with pytest.raises(DeadlineExceeded):
            acceptor.submit(0, deadline=time.monotonic())
        first = acceptor.submit(1)
        device.wait_until_busy()
        assert acceptor.batcher.wait_s(4) > 10.0
        with pytest.raises(Overloaded, match="back off") as refusal:
            acceptor.submit(2, deadline=time.monotonic() + 5.0)
        assert 1.0 < refusal.value.retry_after_s < 100.0
        others: list[Pending] = []
        with suppress(Overloaded):
            while len(others) < 100:
                others.append(acceptor.submit(3))
        # 10 rows take 100 s; the last of their batches has room for 4.
        assert 8 < len(others) < 20
        device.open()
        for pending in [first, *others]:
            pending.answer()
        assert len(device.ran) == 1 + len(others)


def test_what_the_engine_refuses_comes_back_as_its_error(tmp_path: Path) -> None:
    device = Device()
    with (
        engine(tmp_path / "e", device, max_wait_s=0.0, row_s=10.0),
        Acceptor(tmp_path / "e") as acceptor,
    ):
        acceptor.wait_for((tmp_path / "e", True))
        first = acceptor.submit(1)
        device.wait_until_busy()
        # Of the highest priority: only the engine can tell what is before it.
        others = [acceptor.submit(2, 3, 4, 5, priority=1) for _ in range(2)]
        deadline = time.monotonic() + 0.5
        late = acceptor.submit(6, priority=1, deadline=deadline)
        while time.monotonic() < deadline:
            time.sleep(0.01)
        device.open()
        first.answer()
        others[0].answer()
        refusal = others[1].outcome()
        assert isinstance(refusal, Overloaded)
        assert refusal.retry_after_s > 1.0
        assert isinstance(late.outcome(), DeadlineExceeded | Overloaded)


def test_the_engine_with_less_to_do_gets_the_next(tmp_path: Path) -> None:
    devices = Device(), Device()
    with (
        engine(tmp_path / "a", devices[0], row_s=10.0),
        engine(tmp_path / "b", devices[1], row_s=10.0),
        Acceptor(tmp_path / "a", tmp_path / "b") as acceptor,
    ):
        acceptor.wait_for((tmp_path / "a", True), (tmp_path / "b", True))
        pending = [acceptor.submit(1), acceptor.submit(2)]
        for device in devices:
            device.wait_until_busy()
            device.open()
        for each in pending:
            each.answer()


def test_without_start_requests_gather_until_run_next(tmp_path: Path) -> None:
    device = Device()
    device.open()
    with engine(tmp_path / "e", device), Acceptor(tmp_path / "e", send=False) as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        assert not acceptor.batcher.run_next()
        pending = [acceptor.submit(n) for n in range(4)]
        assert acceptor.batcher.waiting
        assert acceptor.batcher.run_next()
        assert not acceptor.batcher.run_next()
        assert [each.answer().batch_size for each in pending] == [4] * 4


def test_closing_a_batcher_finishes_what_waits(tmp_path: Path) -> None:
    with engine(tmp_path / "e"), Acceptor(tmp_path / "e", send=False) as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        pending = acceptor.submit(*range(20))
        acceptor.batcher.close()
        pending.answer()
        with pytest.raises(NotReady):
            acceptor.submit(1)


@inline_or_not
def test_an_engine_that_stops_answers_first_and_the_next_at_its_path_is_used(
    tmp_path: Path, inline: bool
) -> None:
    device, path, ready = Device(), tmp_path / "e", []
    with Acceptor(path) as acceptor:
        ready.append(acceptor.batcher.ready)
        with pytest.raises(NotReady):
            acceptor.submit(1)
        with engine(path, device, inline=inline) as server:
            acceptor.wait_for((path, True))
            ready.append(acceptor.batcher.ready)
            pending = acceptor.submit(1)
            device.wait_until_busy()
            server.close()
            device.open()
            pending.answer()
        acceptor.wait_for((path, False))
        ready.append(acceptor.batcher.ready)
        with pytest.raises(NotReady):
            acceptor.batcher.wait_s()
        with engine(path):
            acceptor.wait_for((path, True))
            acceptor.submit(2).answer()
    assert ready == [False, True, False]


def test_a_listener_that_outlives_its_engine_keeps_the_connections_for_the_next(
    tmp_path: Path,
) -> None:
    path = tmp_path / "e"
    with listen(path) as listener, Acceptor(path) as acceptor:
        for number in range(3):
            batcher = Batcher(model, INFO.row_shape, 4, times=BatchTimes(4), max_wait_s=math.inf)
            server = EngineServer(listener.dup(), [Hosted(INFO, batcher, inline=True)])
            thread = threading.Thread(target=server.serve)
            thread.start()
            acceptor.wait_for((path, True))
            acceptor.submit(number).answer()
            server.close()
            thread.join(TIMEOUT_S)
            acceptor.wait_for((path, False))


def test_an_acceptor_never_waits_for_an_engine_to_read(tmp_path: Path) -> None:
    """Far more records than a socket holds."""
    device = Device()
    with engine(tmp_path / "e", device), Acceptor(tmp_path / "e") as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        first = acceptor.submit(1)
        device.wait_until_busy()
        pending = [acceptor.submit(n) for n in range(3000)]
        for unwanted in pending[::3]:
            unwanted.cancel()
        device.open()
        first.answer()
        for n, each in enumerate(pending):
            if n % 3:
                each.answer()
        assert all(isinstance(each.outcome(), Cancelled) for each in pending[::3])


def test_an_engine_never_waits_for_an_acceptor_to_read(tmp_path: Path) -> None:
    count = 10_000
    with engine(tmp_path / "e"), Acceptor(tmp_path / "e") as acceptor, Bare(tmp_path / "e") as bare:
        acceptor.wait_for((tmp_path / "e", True))
        for number in range(count):
            bare.submit(number)
        acceptor.submit(1).answer()
        assert sorted(bare.replies(count)) == [(n, 0) for n in range(count)]


malformed: dict[str, Callable[["Bare"], None]] = {
    "no rows": lambda bare: bare.submit(1, rows=0),
    "rows beyond the memory": lambda bare: bare.submit(1, rows=17),
    "an offset beyond the memory": lambda bare: bare.submit(1, offset=Bare.MEMORY),
    "an offset that wraps": lambda bare: bare.submit(1, offset=2**64 - ROW),
    "an unknown model": lambda bare: bare.submit(1, model=1),
    "an unknown kind": lambda bare: bare.submit(1, kind=2),
    "a deadline that is no number": lambda bare: bare.submit(1, deadline=float("nan")),
    "a number that is in use": lambda bare: bare.submit(0),
}


@pytest.mark.parametrize("send", malformed.values(), ids=malformed)
def test_what_breaks_the_protocol_ends_its_own_connection(
    tmp_path: Path, send: Callable[["Bare"], None], caplog: pytest.LogCaptureFixture
) -> None:
    device = Device()
    with engine(tmp_path / "e", device, inline=False), Acceptor(tmp_path / "e") as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        with Bare(tmp_path / "e") as bare:
            first = acceptor.submit(1)
            device.wait_until_busy()
            bare.submit(0)
            send(bare)
            if bare.is_cut_off():
                assert "cut off" in caplog.text
            device.open()
            first.answer()
            acceptor.submit(2).answer()
        assert device.ran == [1, 2]


greetings: dict[str, tuple[bytes, int, int]] = {
    "another protocol": (struct.pack("<6sH", b"convoy", 99), SEALS, 4096),
    "another language": (b"GET / HT", SEALS, 4096),
    "too short": (b"convoy", SEALS, 4096),
    "a memory that may shrink": (HELLO, fcntl.F_SEAL_GROW, 4096),
    "an empty memory": (HELLO, SEALS, 0),
}


def test_no_bytes_end_the_engine(tmp_path: Path) -> None:
    rng = random.Random(5)
    with engine(tmp_path / "e"), Acceptor(tmp_path / "e") as acceptor:
        acceptor.wait_for((tmp_path / "e", True))
        for _ in range(100):
            with Bare(tmp_path / "e") as bare:
                for number in range(rng.randrange(20)):
                    bare.submit(number, offset=rng.randrange(10 * ROW), rows=rng.randrange(1, 4))
                bare.socket.sendall(rng.randbytes(rng.randrange(200)))
        acceptor.submit(1).answer()


@pytest.mark.parametrize("greeting", greetings.values(), ids=greetings)
def test_a_wrong_greeting_is_cut_off(
    tmp_path: Path, greeting: tuple[bytes, int, int], caplog: pytest.LogCaptureFixture
) -> None:
    with engine(tmp_path / "e"):
        bare = Bare(tmp_path / "e")
        bare.greet(*greeting)
        assert bare.is_cut_off()
        bare.socket.close()
        assert "cut off" in caplog.text
        bare = Bare(tmp_path / "e")
        bare.socket.sendall(HELLO)  # and no memory
        assert bare.is_cut_off()
        bare.socket.close()
        with Acceptor(tmp_path / "e") as acceptor:
            acceptor.wait_for((tmp_path / "e", True)).submit(1).answer()


# Models that come and go.


def versioned(number: int) -> ModelInfo:
    return ModelInfo("digits", number, INFO.row_shape, INFO.classes, 4, "CPU", f"sha{number}")


def telling(number: int) -> Callable[[Rows], Outputs]:
    """A model whose answers tell which version gave them."""
    return lambda pixels: model(pixels) + told_by(number)


def told_by(version: int) -> Outputs:
    return np.array([version, 0], np.float32)


@inline_or_not
def test_models_come_and_go_while_rows_are_on_their_way_and_nobody_gets_anothers(
    tmp_path: Path, inline: bool
) -> None:
    path, size = tmp_path / "e", INFO.max_batch_size
    server = EngineServer(listen(path))
    thread = threading.Thread(target=server.serve)
    thread.start()
    changes: queue.Queue[int] = queue.Queue()
    engines = Engines([str(path)], on_change=lambda path, models: changes.put(len(models)))
    outcomes: queue.Queue[tuple[int, int, Answer | Exception]] = queue.Queue()
    submitted, waiting = 0, set[int]()
    try:
        assert changes.get(timeout=TIMEOUT_S) == 0
        before: tuple[Batcher, RemoteBatcher] | None = None
        for version in range(1, 40):
            batcher = Batcher(
                telling(version), INFO.row_shape, size, times=BatchTimes(size), max_wait_s=math.inf
            )
            if not inline:
                batcher.start()
            info = versioned(version)
            server.host(Hosted(info, batcher, inline))
            assert engines.wait_for("digits", version, TIMEOUT_S)
            remote = RemoteBatcher(engines, info, max_wait_s=math.inf)
            remote.start()
            for _ in range(20):
                number, submitted = submitted, submitted + 1
                waiting.add(number)
                remote.submit(
                    rows(number, number + 1),
                    lambda outcome, number=number, version=version: outcomes.put(  # type: ignore[misc]
                        (number, version, outcome)
                    ),
                )
            if before:
                # First of the acceptor, then of the engine.
                before[1].close()
                server.drop(before[0])
                before[0].close()
            before = batcher, remote
        while waiting:
            number, version, outcome = outcomes.get(timeout=TIMEOUT_S)
            waiting.remove(number)
            assert isinstance(outcome, Answer), outcome
            expected = outputs(number, number + 1) + told_by(version)
            np.testing.assert_array_equal(outcome.outputs, expected)
        # One that is gone is refused, and whoever still asks for it keeps his connection.
        assert before
        server.drop(before[0])
        while changes.get(timeout=TIMEOUT_S):
            pass
        with pytest.raises(NotReady, match="no engine"):
            before[1].submit(rows(1), lambda outcome: None)
        before[0].close()
        with Bare(path) as bare:
            bare.submit(7, model=0)
            assert bare.replies(1) == [(7, 4)]
            bare.submit(8, model=39)
            assert bare.is_cut_off(), "no model ever had this number"
    finally:
        server.close()
        thread.join(TIMEOUT_S)
        engines.close()
    assert not thread.is_alive()
    # Nobody serves any more, and nobody waits for that.
    server.host(Hosted(INFO, batcher, inline))


def test_an_engine_has_room_for_so_many_versions_and_no_more(tmp_path: Path) -> None:
    size = INFO.max_batch_size
    batcher = Batcher(model, INFO.row_shape, size, times=BatchTimes(size), max_wait_s=math.inf)
    hosted = [Hosted(versioned(n), batcher, inline=False) for n in range(1025)]
    with listen(tmp_path / "e") as listener:
        EngineServer(listener, hosted[:1024])
        with pytest.raises(ValueError, match="1024 versions at most"):
            EngineServer(listener, hosted)
