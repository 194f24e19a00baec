"""What it costs to wake gRPC's loop from another thread: an HTTP call, and a server that rests.

python benchmarks/wakeups.py [candidate ...] [--rounds 3] [--seconds 3] [--json FILE]

Each HTTP call wakes the loop twice at most: when its message comes, and when its answer is ready on a
thread of the pool. Every candidate runs `convoy serve` with models/digits on one core; one caller on
the other core asks for /v2/models/digits/ready on one connection. The server's CPU time is read from
/proc. Candidates are measured in turns; a figure is the median over the rounds. Needs two cores.

The candidates are ways to wake the loop of `CoreServer` in convoy_service.transport.grpc_core,
whose own is `doorbell`.
"""

import http.client
import json
import os
import socket
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.load import CLIENT, ROOT, Running, command_line


def _candidates() -> dict[str, Any]:
    from convoy_service.transport import doorbell, grpc_core, grpc_public, loop

    class ThrowAway(grpc_core.CoreServer):
        """A server that never listened is shut down for each wake-up. The lock is held until
        `shutdown` has returned, so that the loop can't destroy the server before.
        """

        _guard = threading.Lock()
        _rung = False

        def _wake(self) -> None:
            if self._rung or not self.thread:
                return
            with self._guard:
                if self._stopping:
                    return
                self._rung = True
                bell = self.core.Server((), False)
                bell.register_completion_queue(self._queue)
                bell.start(backup_queue=False)
                bell.shutdown(self._queue, lambda _: self._on_rung(bell))

        def _on_rung(self, bell: Any) -> None:
            with self._guard:
                bell.destroy()
            self._rung = False
            self._chores()

    class Polling(grpc_core.CoreServer):
        """The loop looks each millisecond while something was posted within the last second, and
        every 20 ms otherwise.
        """

        _busy_until = 0.0

        def _wake(self) -> None:
            self._busy_until = time.monotonic() + 1.0

        def _chores(self) -> float:
            nap_s = super()._chores()
            return min(nap_s, 0.001 if time.monotonic() < self._busy_until else 0.02)

    class Message(grpc_core.CoreServer):
        """A message on a connection of the process to itself, which the loop always waits for. The
        socket is written by the thread that posts.
        """

        def __init__(self, options: loop.Options) -> None:
            super().__init__(options)
            self._caller, self._rung, self._guard = (
                socket.socket(socket.AF_UNIX),
                False,
                threading.Lock(),
            )
            self._name = f"convoy-bench-{os.getpid()}"
            self._server.add_http2_port(f"unix-abstract:{self._name}".encode())
            self._line: Any = None

        def run(self) -> None:
            self.thread = threading.get_ident()
            self._doorbell.open()
            self._server.start(backup_queue=False)
            self._server.request_call(self._queue, self._queue, self._on_line)
            self._caller.connect(f"\0{self._name}")
            self._caller.sendall(doorbell._BEGIN_CALL)
            while self._line is None:
                event = self._queue.poll(time.time() + 5)
                event.tag(event)
            for _ in range(grpc_core._ASKED):
                self._ask()
            try:
                self._take_events()
            finally:
                self._close()

        def _on_line(self, event: Any) -> None:
            self._line = event.call
            self._listen()

        def _listen(self) -> None:
            self._line.start_server_batch((self.core.ReceiveMessageOperation(0),), self._on_message)

        def _on_message(self, event: Any) -> None:
            if event.batch_operations[0].message() is None:
                return
            self._rung = False
            self._listen()
            self._chores()

        def _wake(self) -> None:
            if self._rung or self._line is None:
                return
            with self._guard:
                if not self._rung:
                    self._rung = True
                    self._caller.sendall(doorbell._frame(0, 0, 1, b"\0\0\0\0\0"))

    return {
        "doorbell": grpc_core.CoreServer,
        "throw-away": ThrowAway,
        "polling": Polling,
        "message": Message,
        "public": grpc_public.PublicServer,
    }


NAMES = ("doorbell", "throw-away", "polling", "message", "public")


def serve(name: str) -> None:
    """The server's process."""
    import convoy.__main__ as command
    from convoy_service.transport import grpc_server as transport

    made = _candidates()[name]
    transport.server = lambda options, public=False: made(options)
    models = ROOT / "models"
    sys.argv = ["convoy", "serve", "--models", str(models), "--host", "127.0.0.1", "--port", "0"]
    sys.argv += ["--metrics-port", "0", "--http-port", "0", "--shutdown-delay-s", "0"]
    command.main()


def measure(name: str, seconds: float) -> dict[str, float]:
    server = Running([sys.executable, __file__, "serve", name], r"HTTP on http://\S+:(\d+),")
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        latencies: list[float] = []

        def ask() -> None:
            began = time.perf_counter()
            connection.request("GET", "/v2/models/digits/ready")
            response = connection.getresponse()
            response.read()
            assert response.status == 200
            latencies.append(time.perf_counter() - began)

        for _ in range(300):
            ask()
        latencies.clear()
        began, spent = time.perf_counter(), server.cpu_s()
        while time.perf_counter() < began + seconds:
            ask()
        calls_s, call_cpu_s = len(latencies) / seconds, server.cpu_s() - spent
        time.sleep(1.5)
        spent = server.cpu_s()
        time.sleep(2 * seconds)
        idle = (server.cpu_s() - spent) / (2 * seconds)
        connection.close()
    finally:
        server.stop()
    return {
        "calls_per_s": calls_s,
        "cpu_us_per_call": 1e6 * call_cpu_s / len(latencies),
        "p50_us": 1e6 * statistics.median(latencies),
        "idle_cpu_percent": 100 * idle,
    }


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2])
        return
    assert __doc__
    options = command_line(__doc__, NAMES, {"--rounds": {"type": int, "default": 3}})
    os.sched_setaffinity(0, {int(CLIENT)})
    names = options.figures or NAMES
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            found[name].append(measure(name, options.seconds))
            print(name, found[name][-1], file=sys.stderr, flush=True)
    table = {
        name: {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        for name, rounds in found.items()
    }
    print(
        "| candidate | calls/s | CPU us a call | median us | idle, % of a core |\n|---|---|---|---|---|"
    )
    for name, row in table.items():
        print(
            f"| {name} | {row['calls_per_s']:.0f} | {row['cpu_us_per_call']:.0f} "
            f"| {row['p50_us']:.0f} | {row['idle_cpu_percent']:.2f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
