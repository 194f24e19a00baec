"""Two servers behind each of the ways to spread the calls of one connection, as docs/deploy.md has them,
while both are restarted in turn, and while one is killed.
"""

import json
import os
import random
import re
import signal
import socket
import socketserver
import statistics
import struct
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import pytest
import yaml

from convoy import Classifier
from convoy_protos import classifier_pb2 as pb
from tests.conftest import TIMEOUT_S, Server
from tests.deploy.conftest import DEPLOY, found
from tests.integration.conftest import classifier_on
from tests.integration.models import FAST_IMAGE, add_steady

pytestmark = pytest.mark.deploy

# A call takes some milliseconds of the device: one that has lasted so long hangs on a server that was
# stopped.
STUCK_S = 2.0
# Of one connection. Envoy throws a coin where both are free: with so many, 0.2 is five deviations away.
CALLS = 600
# How long it may take, on a busy machine, until callers hear that a connection is gone.
HEARD_S = 0.5

ROUND_ROBIN = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    add_steady(folder, rounds=10)
    return folder


def free_ports(count: int) -> list[int]:
    """Ports that nobody has. Not of those that the kernel gives to connections, which could take one
    while its server is restarted, nor of those that Ray's workers take, 10002 to 19999.
    """
    text = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii")
    below = int(text.split()[0])
    ports: set[int] = set()
    with ExitStack() as held:
        while len(ports) < count:
            port = random.randrange(20_000, below)
            with suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                ports.add(port)
    return sorted(ports)


class Balancer(Protocol):
    """What stands between callers and the servers on `ports`. `target`: what callers connect to."""

    target: str

    def __init__(self, ports: list[int], folder: Path, tools: Path) -> None: ...
    def leave_out(self, port: int | None) -> None:
        """What an operator does before a server is stopped, and (None) when it is back."""

    def close(self) -> None: ...


class Client:
    """The client itself, which is told all addresses, as by a headless Service."""

    def __init__(self, ports: list[int], folder: Path, tools: Path) -> None:
        self.target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def leave_out(self, port: int | None) -> None:
        """It finds out by itself."""

    def close(self) -> None: ...


class Nginx:
    """deploy/nginx/nginx.conf, with other addresses and places."""

    def __init__(self, ports: list[int], folder: Path, tools: Path) -> None:
        self._program = found("nginx", "the package nginx-light of Debian")
        self._ports, self._file = ports, folder / "nginx.conf"
        self._port, self._http_port = free_ports(2)
        self.target = f"127.0.0.1:{self._port}"
        self._write(None)
        command = [self._program, "-p", str(folder), "-c", str(self._file), "-g", "daemon off;"]
        self._log = (folder / "nginx.log").open("wb")
        self._process = subprocess.Popen(command, stderr=self._log)
        wait_until_it_listens(self._port, self._process)

    def _write(self, down: int | None) -> None:
        servers = "".join(
            f"server 127.0.0.1:{port} max_fails=1 fail_timeout=1s{' down' * (port == down)};\n"
            for port in self._ports
        )
        text = (DEPLOY / "nginx" / "nginx.conf").read_text(encoding="utf-8")
        text, replaced = re.subn(r"( +server [\d.]+:8001 .*;\n)+", servers, text)
        assert replaced == 1
        folder = self._file.parent
        for before, after in (
            ("listen 8000", f"listen 127.0.0.1:{self._http_port}"),
            ("listen 8001", f"listen 127.0.0.1:{self._port}"),
            ("pid /run/nginx.pid", f"pid {folder}/nginx.pid"),
            ("worker_processes auto", "worker_processes 1"),
            ("access_log off;", "access_log off;" + _temporary(folder)),
        ):
            assert text.count(before) == 1
            text = text.replace(before, after)
        self._file.write_text(text, encoding="utf-8")

    def leave_out(self, port: int | None) -> None:
        before = self._workers()
        self._write(port)
        self._process.send_signal(signal.SIGHUP)
        # Until another has taken over, and the one before has done what it had.
        wait_until(lambda: not self._workers() & before and bool(self._workers()))

    def _workers(self) -> set[str]:
        children = f"/proc/{self._process.pid}/task/{self._process.pid}/children"
        return set(Path(children).read_text(encoding="ascii").split())

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)
        self._log.close()


def _temporary(folder: Path) -> str:
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    return "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)


class Envoy:
    """The Envoy of deploy/kubernetes, with other addresses."""

    def __init__(self, ports: list[int], folder: Path, tools: Path) -> None:
        [port] = free_ports(1)
        self.target = f"127.0.0.1:{port}"
        text = (DEPLOY / "kubernetes" / "components" / "envoy" / "envoy.yaml").read_text("utf-8")
        config = yaml.safe_load(text)
        resources = config["static_resources"]
        resources["listeners"][0]["address"] = _address(port)
        [endpoints] = resources["clusters"][0]["load_assignment"]["endpoints"]
        assert endpoints["lb_endpoints"][0]["endpoint"] == _endpoint(8001, "convoy-headless")
        endpoints["lb_endpoints"] = [{"endpoint": _endpoint(port)} for port in ports]
        file = folder / "envoy.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        self._log = (folder / "envoy.log").open("wb")
        self._process = subprocess.Popen(
            [tools / "envoy", "-c", file, "--disable-hot-restart", "--concurrency", "1"],
            stderr=self._log,
        )
        wait_until_it_listens(port, self._process)

    def leave_out(self, port: int | None) -> None:
        """It sees by its health checks."""

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)
        self._log.close()


def _address(port: int, host: str = "127.0.0.1") -> dict[str, Any]:
    return {"socket_address": {"address": host, "port_value": port}}


def _endpoint(port: int, host: str = "127.0.0.1") -> dict[str, Any]:
    return {"address": _address(port, host)}


def wait_until(so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_until_it_listens(port: int, process: subprocess.Popen[bytes]) -> None:
    def listens() -> bool:
        assert process.poll() is None, "it has ended: see its log"
        with closing(socket.socket()) as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(listens)


class Load:
    """So many calls at a time over one channel, from the beginning to the end of `with`."""

    def __init__(self, call: Callable[[], object], callers: int) -> None:
        self._call = call
        self._ended = threading.Event()
        self.answered = 0
        # When each began, and how it ended.
        self.failures: list[tuple[float, str]] = []
        self._began: dict[int, float] = {}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(callers)]

    def _run(self, number: int) -> None:
        while not self._ended.is_set():
            self._began[number] = began = time.monotonic()
            try:
                self._call()
            except Exception as error:
                code = error.code  # type: ignore[attr-defined]
                said = code if isinstance(code, str) else f"{code().name}: {error.details()}"  # type: ignore[attr-defined]
                with self._lock:
                    self.failures.append((began, said))
                # Who tries again at once keeps the core from those who find out why.
                self._ended.wait(0.02)
            else:
                with self._lock:
                    self.answered += 1

    @property
    def stuck(self) -> int:
        """Calls that hang."""
        before = time.monotonic() - STUCK_S
        return sum(began < before for began in list(self._began.values()))

    def __str__(self) -> str:
        codes = Counter(words.partition(":")[0] for _, words in self.failures)
        return f"{self.answered} answered, {len(self.failures)} failed {dict(codes) or ''}"

    def go_on(self, calls: int = 40) -> None:
        """Returns when so many more were answered."""
        enough = self.answered + calls
        wait_until(lambda: self.answered >= enough)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S)


def answered_by(server: Server, host: str = "127.0.0.1") -> float:
    """How many calls, by the server's own count."""
    with urllib.request.urlopen(
        f"http://{host}:{server.metrics_port}/metrics", timeout=TIMEOUT_S
    ) as response:
        text = response.read().decode()
    found = re.search(
        r'^convoy_requests_total{call="Classify",code="OK",.*} (\S+)$', text, re.MULTILINE
    )
    return float(found[1]) if found else 0.0


def pixels(image: Any) -> pb.Image:
    height, width, channels = image.shape
    return pb.Image(
        pixels=pb.Pixels(data=image.tobytes(), height=height, width=width, channels=channels)
    )


REQUEST = pb.ClassifyRequest(model="steady", images=[pixels(FAST_IMAGE)])
# No image, but that is found out by the server.
LARGE_REQUEST = pb.ClassifyRequest(model="steady", images=[pb.Image(encoded=bytes(20_000_000))])


@pytest.mark.parametrize("kind", [Client, Nginx, Envoy])
def test_the_calls_of_one_connection_spread_and_none_fails_while_servers_come_and_go(
    kind: type[Balancer],
    models: Path,
    tmp_path: Path,
    tools: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ports = free_ports(2)
    # Longer than Envoy's health checks are apart, and than one takes on a busy machine.
    delay = "--shutdown-delay-s", "4" if kind is Envoy else "0.3"

    def start(port: int) -> Server:
        server = Server("--port", str(port), *delay, models=models)
        held.callback(server.close)
        return server.ready()

    with ExitStack() as held:
        servers = [start(port) for port in ports]
        balancer = kind(ports, tmp_path, tools)
        held.callback(balancer.close)
        # Of other libraries: it balances, but its calls are not done again.
        channel = held.enter_context(
            grpc.insecure_channel(balancer.target, [("grpc.service_config", ROUND_ROBIN)])
        )
        bare = classifier_on(channel)
        classifier = held.enter_context(Classifier(balancer.target, model="steady"))
        said = [kind.__name__]

        def loads(callers: int = 4) -> tuple[Load, Load]:
            """Without retries, and with them."""
            return (
                Load(lambda: bare.Classify(REQUEST, timeout=TIMEOUT_S), callers),
                Load(lambda: classifier.classify(FAST_IMAGE), callers),
            )

        # One connection, one call after the other.
        bare.Classify(REQUEST, timeout=TIMEOUT_S, wait_for_ready=True)
        wait_until(lambda: _reaches_both(bare, servers))
        before = [answered_by(server) for server in servers]
        for _ in range(CALLS):
            bare.Classify(REQUEST, timeout=TIMEOUT_S)
        calls = [answered_by(each) - had for each, had in zip(servers, before, strict=True)]
        variation = statistics.pstdev(calls) / statistics.mean(calls)
        said.append(f"calls {calls}, coefficient of variation {variation:.3f}")
        assert sum(calls) == CALLS
        assert variation < 0.2

        # More than proxies buffer.
        large = bare.Classify(LARGE_REQUEST, timeout=TIMEOUT_S)
        assert large.results[0].error.message

        # Who balances for all leaves out a server that is going in time; a client by itself needs its
        # retries.
        plain, retrying = loads()
        with retrying, nullcontext() if kind is Client else plain:
            for number, port in enumerate(ports):
                balancer.leave_out(port)
                assert servers[number].stop() == 0
                retrying.go_on()
                servers[number] = start(port)
                balancer.leave_out(None)
                wait_until(lambda number=number: answered_by(servers[number]) > 0)  # type: ignore[misc]
        said.append(f"both restarted: with retries {retrying}; without {plain}")
        assert not retrying.failures
        assert not plain.failures
        assert kind is Client or plain.answered

        # Who goes by how many calls are under way gives a server that has stopped half of them: with so
        # many callers both loads have some there.
        plain, retrying = loads(callers=12)
        with plain, retrying:
            plain.go_on()
            retrying.go_on()
            # What it has at this moment it will not answer.
            os.kill(servers[0].pid, signal.SIGSTOP)
            wait_until(lambda: plain.stuck > 0 and retrying.stuck > 0)
            os.kill(servers[0].pid, signal.SIGKILL)
            servers[0].wait()
            killed = time.monotonic()
            plain.go_on()
            retrying.go_on()
        said.append(f"one killed with calls of both: with retries {retrying}; without {plain}")
        if plain.failures:
            said.append(
                f"the last of these began {max(plain.failures)[0] - killed:+.3f} s from its end"
            )
        assert not retrying.failures
        assert all(began < killed + HEARD_S for began, _ in plain.failures)
        # Envoy does them again itself.
        assert bool(plain.failures) == (kind is not Envoy)
        assert servers[1].stop() == 0
        with capsys.disabled():
            print("", *said, sep="\n  ")


def _reaches_both(bare: Any, servers: list[Server]) -> bool:
    """Whether all are connected to, after one more call."""
    bare.Classify(REQUEST, timeout=TIMEOUT_S)
    return all(answered_by(server) > 0 for server in servers)


class Names(socketserver.ThreadingUDPServer):
    """A DNS server, which knows one name: that of a headless Service whose pods are `addresses`."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        super().__init__(("127.0.0.1", 0), _Query)
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @property
    def target(self) -> str:
        return f"dns://127.0.0.1:{self.server_address[1]}/convoy-headless.test"


class _Query(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        query, reply_to = self.request
        assert isinstance(self.server, Names)
        end = query.index(b"\0", 12) + 5  # behind the name: its type and class
        [kind] = struct.unpack(">H", query[end - 4 : end - 2])
        found = self.server.addresses if kind == 1 else []
        answers = b"".join(
            struct.pack(">HHHIH", 0xC00C, 1, 1, 0, 4) + socket.inet_aton(each) for each in found
        )
        header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(found), 0, 0)
        reply_to.sendto(header + query[12:end] + answers, self.client_address)


@pytest.fixture
def names() -> Iterator[Names]:
    with Names("127.0.0.1") as names:
        yield names


@pytest.mark.parametrize("age", ["0", "1"])
def test_a_server_that_comes_later_is_found_where_connections_have_an_age(
    age: str, models: Path, names: Names
) -> None:
    with ExitStack() as held:
        first = held.enter_context(_serve("127.0.0.1", 0, age, models))
        second = held.enter_context(_serve("127.0.0.2", first.port, age, models))
        options = [
            ("grpc.service_config", ROUND_ROBIN),
            # Else half a minute.
            ("grpc.dns_min_time_between_resolutions_ms", 100),
        ]
        channel = held.enter_context(grpc.insecure_channel(f"{names.target}:{first.port}", options))
        states: list[grpc.ChannelConnectivity] = []
        channel.subscribe(states.append)
        bare = classifier_on(channel)
        bare.Classify(REQUEST, timeout=TIMEOUT_S)
        names.addresses.append("127.0.0.2")
        load = held.enter_context(Load(lambda: bare.Classify(REQUEST, timeout=TIMEOUT_S), 4))
        if age == "0":
            # The trap: nobody looks for new ones as long as the old ones answer.
            load.go_on(100)
            started = time.monotonic()
            wait_until(lambda: time.monotonic() - started > 1.5)
            assert answered_by(second, "127.0.0.2") == 0
        else:
            wait_until(lambda: answered_by(second, "127.0.0.2") > 40)
        held.pop_all().close()
    assert load.answered > 40
    assert not load.failures


def _serve(host: str, port: int, age: str, models: Path) -> Server:
    arguments = "--host", host, "--port", str(port), "--max-connection-age-s", age
    return Server(*arguments, models=models).ready()
