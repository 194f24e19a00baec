"""The server of the storm: `convoy serve` as a person starts it, killed, drained and started again."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

from benchmarks.storming.outages import Outages

# Generous: on a machine that is busy with other work a start takes minutes.
_START_S, _STOP_S = 300.0, 120.0


class NotStarted(Exception):
    """The server did not start; what it said."""


class Server:
    """Its log, its addresses, and which of its processes are up."""

    def __init__(
        self, models: Path, log: Path, acceptors: int, engines: int, front: str, outages: Outages
    ) -> None:
        self.log, self._outages = log, outages
        self._count = {"acceptor": acceptors, "engine": engines}
        self._command = [sys.executable, "-m", "convoy", "serve", "--models", str(models)]
        self._command += ["--host", "127.0.0.1", "--shutdown-delay-s", "0", "--front", front]
        self._command += ["--max-in-flight", "200", "--watch-s", "0.2"]
        self._command += ["--allow-repository-control"]
        self._command += ["--acceptors", str(acceptors), "--engines", str(engines)]
        self.target = self.metrics = self.http = ""
        self.killed = 0
        log.write_text("")
        self._start(("--port", "0", "--metrics-port", "0", "--http-port", "0"))

    def _start(self, ports: tuple[str, ...]) -> None:
        self.process = subprocess.Popen([*self._command, *ports], stderr=subprocess.PIPE, text=True)
        self.up: dict[str, int] = {}
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(_START_S) or self.process.poll() is not None:
            raise NotStarted(f"the server did not start: {self.log.read_text()[-5000:]}")
        self._outages.started()

    def _read(self) -> None:
        assert self.process.stderr
        with self.log.open("a") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()
                if match := re.search(r": (\S+) is ready \(pid (\d+)\)", line):
                    self.up[match[1]] = int(match[2])
                elif match := re.search(
                    r"HTTP on http://(\S+), gRPC on (\S+), metrics on (\S+)", line
                ):
                    self.http, self.target, self.metrics = match.groups()
                    self._ready.set()
        self._ready.set()

    def kill(self, role: str) -> bool:
        """Kills the one with this role that has been up longest, where all of that role are up: the
        others go on.
        """
        up = [name for name in self.up if name.startswith(role)]
        if len(up) < self._count[role]:
            return False
        self._outages.begin()
        try:
            os.kill(self.up.pop(up[0]), signal.SIGKILL)
        except ProcessLookupError:
            return False  # it has died by itself: `stop` finds that in the log
        finally:
            self._outages.end()
        self.killed += 1
        return True

    def restart(self) -> list[str]:
        """Drains the server, and starts it again on its ports; what is wrong with how it ended."""
        self._outages.begin()
        self.process.send_signal(signal.SIGTERM)
        wrong = self._end()
        ports = {
            "--port": self.target, "--http-port": self.http,
            "--metrics-port": self.metrics.removeprefix("http://").partition("/")[0],
        }  # fmt: skip
        self._start(
            tuple(word for flag, at in ports.items() for word in (flag, at.rpartition(":")[2]))
        )
        self._outages.end()
        return wrong

    def _end(self) -> list[str]:
        try:
            status = self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return [f"the server did not end within {_STOP_S:g} s of SIGTERM"]
        finally:
            self._reader.join(10)
        return [f"the server ended with status {status}"] if status else []

    def counted(self) -> dict[str, float]:
        with urllib.request.urlopen(self.metrics, timeout=10) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def stop(self) -> list[str]:
        """What is wrong with its end, and with what it said before."""
        wrong = []
        if self.process.poll() is not None:
            wrong.append("the server had ended before it was told to")
        else:
            late = {
                name: value
                for name, value in self.counted().items()
                if name.startswith("convoy_rows_run_after_deadline_total")
            }
            if any(late.values()):
                wrong.append(f"rows were run after their deadline: {late}")
            deadline = time.monotonic() + 20
            while self.counted().get("convoy_requests_in_flight"):
                if time.monotonic() > deadline:
                    wrong.append("there are still requests in flight")
                    break
                time.sleep(0.1)
            self.process.send_signal(signal.SIGTERM)
        wrong += self._end()
        lines = self.log.read_text().splitlines()
        # Some workers are killed by the supervisor, as they lack a version.
        lacking = sum("can't load" in line for line in lines)
        died = [line for line in lines if " died (" in line or "could not start (" in line]
        if len(died) > self.killed + lacking:
            wrong += [f"{len(died)} workers died, {self.killed} were killed", *died]
        return wrong + [line for line in lines if "CRITICAL" in line]
