"""An engine, and an acceptor, to be killed: `python -m tests.integration.channel_peer ...`."""

import itertools
import queue
import socket
import sys

import numpy as np

from convoy_service.engine.batcher import Answer, Batcher, BatchTimes
from convoy_service.ipc.engine_client import Engines, RemoteBatcher
from convoy_service.ipc.engine_server import EngineServer, Hosted
from tests.numbered import INFO, model, outputs, rows


def engine(listener: str) -> None:
    """Serves at the listening socket with this file descriptor, until it is killed."""
    size = INFO.max_batch_size
    batcher = Batcher(model, INFO.row_shape, size, times=BatchTimes(size), max_wait_s=float("inf"))
    server = EngineServer(socket.socket(fileno=int(listener)), [Hosted(INFO, batcher, inline=True)])
    server.serve()


def acceptor(path: str) -> None:
    """Keeps the engine at `path` busy until it is killed; a line for every 100 right answers."""
    up: queue.Queue[object] = queue.Queue()
    engines = Engines([path], memory_bytes=1 << 16, on_change=lambda *change: up.put(change))
    up.get()
    batcher = RemoteBatcher(engines, INFO, max_wait_s=float("inf"))
    batcher.start()
    answers: queue.Queue[tuple[int, Answer | Exception]] = queue.Queue()
    for first in itertools.count(0, 10):
        batcher.submit(
            rows(*range(first, first + 10)),
            lambda answer, first=first: answers.put((first, answer)),  # type: ignore[misc]
        )
        if first < 200:  # so many are on their way at any time
            continue
        expected, answer = answers.get()
        if not isinstance(answer, Answer):
            sys.exit(f"{expected}: {answer!r}")
        np.testing.assert_array_equal(answer.outputs, outputs(*range(expected, expected + 10)))
        if expected % 1000 == 0:
            print(expected, flush=True)


if __name__ == "__main__":
    {"engine": engine, "acceptor": acceptor}[sys.argv[1]](sys.argv[2])
