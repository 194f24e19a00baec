"""Engines and acceptors as processes that are killed in the middle of their work."""

import gc
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from convoy_service.engine.batcher import Answer
from convoy_service.errors import NotReady, Overloaded
from convoy_service.ipc.engine_client import Engines, RemoteBatcher
from convoy_service.ipc.engine_server import listen
from convoy_service.ipc.protocol import ModelInfo
from tests.conftest import TIMEOUT_S, environment
from tests.integration.conftest import wait_until
from tests.numbered import INFO, outputs, rows


@contextmanager
def peer(role: str, argument: str, fds: tuple[int, ...] = ()) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.integration.channel_peer", role, argument]
    with subprocess.Popen(
        command, env=environment(), pass_fds=fds, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Acceptor:
    """Requests of all sizes, and what became of them."""

    def __init__(self, *paths: Path) -> None:
        self.changes: queue.Queue[tuple[str, bool]] = queue.Queue()

        def on_change(path: str, models: tuple[ModelInfo, ...]) -> None:
            self.changes.put((path, models == (INFO,)))

        self.engines = Engines(map(str, paths), memory_bytes=1 << 16, on_change=on_change)
        self.batcher = RemoteBatcher(self.engines, INFO, max_wait_s=float("inf"))
        self.batcher.start()
        self._number = 0

    def close(self) -> None:
        self.engines.close()

    def wait_for(self, *changes: tuple[Path, bool]) -> None:
        heard = [self.changes.get(timeout=TIMEOUT_S) for _ in changes]
        assert sorted(heard) == sorted((str(path), up) for path, up in changes)

    def submit(self, count: int) -> "list[Pending]":
        """As many of `count` requests as there is room for."""
        pending: list[Pending] = []
        for i in range(count):
            size = (1, 2, 7, 1000)[i % 4]
            with suppress(Overloaded):
                pending.append(Pending(self.batcher, range(self._number, self._number + size)))
            self._number += size
        return pending


class Pending:
    def __init__(self, batcher: RemoteBatcher, numbers: range) -> None:
        self._numbers = numbers
        self._outcomes: queue.Queue[Answer | Exception] = queue.Queue()
        batcher.submit(rows(*numbers), self._outcomes.put)

    def answered(self) -> bool:
        """The answer has to be right; False where its engine is gone."""
        outcome = self._outcomes.get(timeout=TIMEOUT_S)
        if isinstance(outcome, NotReady):
            return False
        assert isinstance(outcome, Answer), outcome
        np.testing.assert_array_equal(outcome.outputs, outputs(*self._numbers))
        return True


def held(pid: int) -> tuple[int, int]:
    """What a process holds: open files, and mappings of shared memory."""
    gc.collect()  # what earlier tests have left
    proc = Path("/proc") / str(pid)
    return len(list((proc / "fd").iterdir())), (proc / "maps").read_text().count("memfd:convoy")


def no_more(pid: int, before: tuple[int, int]) -> bool:
    """It holds no more than before: what it has no use for any more it lets go by and by."""
    return all(now <= then for now, then in zip(held(pid), before, strict=True))


def test_a_killed_engine_fails_what_it_had_at_once_and_the_next_takes_its_place(
    tmp_path: Path,
) -> None:
    doomed, other = tmp_path / "doomed", tmp_path / "other"
    with (
        listen(doomed) as doomed_socket,
        listen(other) as other_socket,
        closing(Acceptor(doomed, other)) as acceptor,
        peer("engine", str(other_socket.fileno()), (other_socket.fileno(),)),
    ):
        acceptor.wait_for((other, True))
        before = held(os.getpid())
        for _ in range(3):
            with peer("engine", str(doomed_socket.fileno()), (doomed_socket.fileno(),)) as engine:
                acceptor.wait_for((doomed, True))
                working = acceptor.submit(50)
                os.kill(engine.pid, signal.SIGSTOP)
                stuck = acceptor.submit(50)
                engine.kill()
                acceptor.wait_for((doomed, False))
                results = [pending.answered() for pending in working + stuck]
                assert any(results)
                assert not all(results)
                assert all(pending.answered() for pending in acceptor.submit(50))
        wait_until(lambda: no_more(os.getpid(), before))


def test_a_killed_acceptor_costs_the_others_nothing(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with (
        listen(path) as listener,
        closing(Acceptor(path)) as acceptor,
        peer("engine", str(listener.fileno()), (listener.fileno(),)) as engine,
    ):
        acceptor.wait_for((path, True))
        assert all(pending.answered() for pending in acceptor.submit(50))
        before = held(engine.pid)
        for _ in range(3):
            with peer("acceptor", str(path)) as doomed:
                assert doomed.stdout
                assert doomed.stdout.readline()
                pending = acceptor.submit(50)
                doomed.kill()
                doomed.wait(TIMEOUT_S)
                assert doomed.returncode == -signal.SIGKILL
                assert all(each.answered() for each in pending + acceptor.submit(50))
        wait_until(lambda: no_more(engine.pid, before))
        assert engine.poll() is None


def test_readiness_follows_an_engine_that_comes_after_its_acceptor(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    with closing(Acceptor(path)) as acceptor:
        with pytest.raises(NotReady, match="retry"):
            acceptor.submit(1)
        with (
            listen(path) as listener,
            peer("engine", str(listener.fileno()), (listener.fileno(),)),
        ):
            acceptor.wait_for((path, True))
            assert acceptor.submit(1)[0].answered()
