"""What tests of several folders share: the real server, as a process of its own."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

REPOSITORY = Path(__file__).resolve().parent.parent
# The source roots: each holds one of the packages that an installed Convoy provides.
SOURCES = os.pathsep.join(str(REPOSITORY / root) for root in (".", "service", "training", "protos"))

# Generous: it only decides how long a test that hangs takes to fail.
TIMEOUT_S = 120.0


def environment(**variables: str) -> dict[str, str]:
    """The environment without the CONVOY_* settings of whoever runs the tests, and `variables`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CONVOY_")}
    ours = {"PYTHONPATH": SOURCES, "COLUMNS": "200", "CONVOY_CACHE": "off"}
    return {**kept, **ours, **variables}


def installed(lock: Path, name: str) -> Path:
    """The programs' folder of an environment that is made once for each state of the lock."""
    key = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:16]
    made = REPOSITORY / ".cache" / f"{name}-{key}"
    if not made.exists():
        making = made.with_suffix(f".{os.getpid()}")
        python, uv = making / "bin" / "python", [sys.executable, "-m", "uv"]
        subprocess.run(
            [*uv, "venv", "-q", "--relocatable", "-p", sys.executable, making], check=True
        )
        subprocess.run(
            [*uv, "pip", "install", "-q", "-p", python, "--require-hashes", "-r", lock], check=True
        )
        try:
            making.rename(made)
        except OSError:  # another run was faster
            shutil.rmtree(making)
    return made / "bin"


def convoy(
    *arguments: str | Path, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs the command `convoy` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "convoy", *map(str, arguments)],
        capture_output=True,
        check=False,
        cwd=cwd,
        env=environment(**variables),
        text=True,
        timeout=4 * TIMEOUT_S,
    )


class Server:
    """`convoy serve` on free ports, from its start until `stop`; `with` asserts exit status 0."""

    def __init__(
        self,
        *arguments: str | Path,
        models: Path | None = None,
        cwd: Path | None = None,
        python: tuple[str, ...] = (),
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Later `arguments` win over the helper's own; `python` are options of the interpreter;
        `variables` are added to the environment.
        """
        command = [sys.executable, *python, "-m", "convoy", "serve"]
        command += [] if models is None else ["--models", str(models)]
        command += _defaults(
            arguments, host="127.0.0.1", port="0", metrics_port="0", shutdown_delay_s="0"
        )
        command += [] if "--http-port" in arguments else ["--no-http"]
        self._process = subprocess.Popen(
            [*command, *map(str, arguments)],
            cwd=cwd,
            env=environment(**variables),
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.port = self.metrics_port = self.http_port = 0
        self._lines: list[str] = []
        self._ended = self._told = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with self._changed:
                self._lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def log(self) -> str:
        """Everything written to standard error so far."""
        with self._changed:
            return "".join(self._lines)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Waits until the log holds `pattern`, and returns the match."""

        def found() -> re.Match[str] | None:
            return re.search(pattern, "".join(self._lines))

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, TIMEOUT_S)
            match = found()
        assert match, f"{pattern!r} is not in the log:\n{self.log}"
        return match

    def ready(self) -> Self:
        """Waits until it says that it is ready, and learns its ports."""
        ports = self.wait_for(
            r"ready in .*; (?:HTTP on https?://\S+:(\d+), )?gRPC on \S+:(\d+), "
            r"metrics on http://\S+:(\d+)/"
        )
        self.http_port, self.port, self.metrics_port = (int(port or 0) for port in ports.groups())
        return self

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def channel(self) -> grpc.Channel:
        # Without a retry policy, and with a connection of its own.
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        options += [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        return grpc.insecure_channel(self.target, options)

    def http(self, path: str, **headers: str) -> tuple[int, str]:
        """The status and body of a GET."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.metrics_port}{path}", headers=headers
        )
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics, as `name{label="value",...}` with the labels in order."""
        samples = {}
        for family in text_string_to_metric_families(self.http("/metrics")[1]):
            for sample in family.samples:
                labels = ",".join(
                    f'{name}="{sample.labels[name]}"' for name in sorted(sample.labels)
                )
                samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return samples

    def wait_for_metric(self, sample: str, value: float) -> None:
        """Waits until the sample of /metrics has this value."""
        deadline = time.monotonic() + TIMEOUT_S
        while (now := self.metrics().get(sample, 0.0)) != value:
            assert time.monotonic() < deadline, f"{sample} is {now}, not {value}"
            time.sleep(0.01)  # who asks all the time keeps it from what is waited for

    def wait_until_http(self) -> None:
        """Waits until the metrics port answers, which it does before models are loaded."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.http("/healthz")
            except urllib.error.URLError:
                assert self._process.poll() is None, self.log
                assert time.monotonic() < deadline, self.log
            else:
                return

    def wait_until_in_flight(self, requests: int) -> None:
        self.wait_for_metric("convoy_requests_in_flight", requests)

    def send(self, number: signal.Signals) -> None:
        self._told = True
        self._process.send_signal(number)

    def wait(self, timeout_s: float = TIMEOUT_S) -> int:
        """Waits for the process to end; its exit status. Raises subprocess.TimeoutExpired."""
        status = self._process.wait(timeout_s)
        self._reader.join(TIMEOUT_S)
        return status

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal and waits; the exit status."""
        self.send(number)
        return self.wait()

    def close(self) -> None:
        """Ends the process whatever state it is in."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        assert self._process.stderr
        self._process.stderr.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                status = self.wait() if self._told else self.stop()
                assert status == 0, self.log
        finally:
            self.close()


def _defaults(arguments: tuple[str | Path, ...], **values: str) -> list[str]:
    flags = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    return [part for flag in flags.items() if flag[0] not in arguments for part in flag]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped digits, and `colours`, whose answers can be worked out by hand."""
    from tests.integration.models import add_colours

    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(REPOSITORY / "models" / "digits", folder / "digits")
    add_colours(folder)
    return folder


@pytest.fixture(scope="session")
def server(models: Path) -> Iterator[Server]:
    """Serves `models`, for the whole session."""
    with Server(models=models) as server:
        yield server.ready()


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves what `convoy serve` serves where nothing is said: `./models`, here with digits alone, so
    that callers need not name it.
    """
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(REPOSITORY / "models" / "digits", folder / "models" / "digits")
    with Server(cwd=folder) as server:
        yield server.ready()


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with server.channel() as channel:
        yield channel
