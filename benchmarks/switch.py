"""What callers notice of a new version: failures, latency, memory, and how fast a way back is.

python benchmarks/switch.py [--switches 200] [--every 2] [--load 0.7] [--model cifar10] [--json FILE]
                            [--server "--acceptors 1 --engines 1"] [--server-cores 0] [--client-cores 1]

Four kinds of clients ask at once, in open loops, together at a share of what the server can take:
tensors of one image, tensors of eight, files, and files in streams. Blocks with switches (a version
is published every few seconds, as `convoy train` does, by one rename) and blocks without follow each
other. Every answer is compared with what the same request was answered alone. Needs two cores.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import queue
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.load import CONVOY, ROOT, Running
from convoy.bench.load import Fleet, Load, Samples, merge
from convoy.bench.payloads import prepare
from convoy.bench.settings import BenchSettings
from convoy_protos import classifier_pb2 as pb
from convoy_protos.classifier_pb2_grpc import ImageClassifierStub, ModelControlStub

# Of the requests together, in the closed loop that finds what the server can take.
CONCURRENCY = 32
TIMEOUT_S = 60.0
KEPT = 4  # of the newest versions


def clients(server: str, model: str, jpeg: str) -> list[BenchSettings]:
    base = BenchSettings(server=server, model=model, check=True)
    files = dataclasses.replace(base, api="classify", jpeg_size=jpeg)
    return [
        base,
        dataclasses.replace(base, images_per_request=8),
        files,
        dataclasses.replace(files, stream=True),
    ]


class Clients:
    """All kinds of clients, each in a process of its own."""

    def __init__(self, kinds: list[BenchSettings], stack: contextlib.ExitStack) -> None:
        self._fleets = [
            stack.enter_context(Fleet(prepare(settings, connections=2)[0], processes=1))
            for settings in kinds
        ]
        self._pool = concurrent.futures.ThreadPoolExecutor(len(self._fleets))

    def run(self, loads: list[Load]) -> tuple[list[Samples], float]:
        """What became of the loads, and when they began on the clock of `time.perf_counter`."""
        begun: list[float] = []

        def tick(passed: float) -> None:
            if not begun and passed > 0:
                begun.append(time.perf_counter() - passed)

        running = [
            self._pool.submit(fleet.run, load, tick)
            for fleet, load in zip(self._fleets, loads, strict=True)
        ]
        samples = [each.result() for each in running]
        return samples, begun[0] if begun else time.perf_counter()

    def capacity(self, seconds: float) -> list[float]:
        """Requests a second of each kind, when they share what there is."""
        load = Load(concurrency=CONCURRENCY // len(self._fleets), duration_s=seconds, warmup_s=1.0)
        samples, _ = self.run([load] * len(self._fleets))
        return [float(np.sum(each.answered > load.warmup_s)) / seconds for each in samples]


class Server(Running):
    """The service, and what it says. Who asked it again and again whether a version answers would be
    part of what is measured.
    """

    def __init__(self, command: list[str], cores: str) -> None:
        read, write = os.pipe()
        self._said = queue.SimpleQueue[str]()
        self._log = os.fdopen(read)
        threading.Thread(target=self._read, daemon=True).start()
        self.process = subprocess.Popen(["taskset", "-c", cores, *command], stderr=write)
        os.close(write)
        self.port = int(self.wait_for(r"ready in .* gRPC on \S+:(\d+),")[1])

    def _read(self) -> None:
        for line in self._log:
            self._said.put(line)
        self._said.put("")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The next line that it says which holds this."""
        while line := self._said.get(timeout=TIMEOUT_S):
            if match := re.search(pattern, line):
                return match
        raise SystemExit(f"it ended, and did not say {pattern!r}")


class Publisher:
    """Publishes a version every few seconds, and hears when it answers."""

    def __init__(self, models: Path, name: str, channel: grpc.Channel, server: Server) -> None:
        self._folder, self._name, self._server = models / name, name, server
        self._classifier: Any = ImageClassifierStub(channel)  # type: ignore[no-untyped-call]
        self._control: Any = ModelControlStub(channel)  # type: ignore[no-untyped-call]
        self._source = self._folder / "1"
        self.version = 1
        # From the rename until the version answers, when that was, and the memory then.
        self.switches: list[tuple[float, float]] = []
        self.memory: list[int] = []

    def serving(self) -> int:
        [model] = self._classifier.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models
        return int(model.version)

    def publish(self) -> None:
        self.version += 1
        beside = self._folder / f".publishing-{self.version}"
        shutil.copytree(self._source, beside)
        beside.rename(self._folder / str(self.version))
        began = time.perf_counter()
        self._server.wait_for(f"version {self.version} answers")
        self.switches.append((began, time.perf_counter()))
        if self.version > KEPT + 1:
            shutil.rmtree(self._folder / str(self.version - KEPT))

    def go_on(self, times: int, every_s: float) -> None:
        due = time.perf_counter()
        for _ in range(times):
            due += every_s
            time.sleep(max(0.0, due - time.perf_counter()))
            self.publish()
            self.memory.append(self._server.memory_bytes())

    def roll_back(self) -> tuple[float, float]:
        """Seconds of a call to go back, and until an answer of the version before is there; goes
        forth again.
        """
        before, now = self.version - 1, self.version
        began = time.perf_counter()
        self._control.Rollback(pb.RollbackRequest(model=self._name), timeout=TIMEOUT_S)
        ordered = time.perf_counter()
        if self.serving() != before:
            raise SystemExit(f"version {self.serving()} serves after a way back to {before}")
        answered = time.perf_counter()
        self._control.Promote(pb.PromoteRequest(model=self._name, version=now), timeout=TIMEOUT_S)
        return ordered - began, answered - began


def p99_ms(samples: list[Samples], warmup_s: float) -> float:
    whole = merge(samples)
    return float(np.quantile(whole.latency[whole.due >= warmup_s], 0.99) * 1e3)


def slope(values: list[int]) -> tuple[float, float]:
    """Bytes a switch, by least squares over the last three quarters; and half its 95% interval."""
    part = np.array(values[len(values) // 4 :], float)
    steps = np.arange(len(part))
    if len(part) < 4:
        return 0.0, float("inf")
    (gain, start), residuals = np.polyfit(steps, part, 1), None
    residuals = part - (gain * steps + start)
    spread = np.sqrt(np.sum(residuals**2) / (len(part) - 2) / np.sum((steps - steps.mean()) ** 2))
    return float(gain), float(1.96 * spread)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    models = folder / "models"
    shutil.copytree(ROOT / "models" / options.model / "1", models / options.model / "1")
    command = [*CONVOY, "serve", "--models", str(models), "--host", "127.0.0.1", "--port", "0"]
    command += ["--metrics-port", "0", "--no-http", "--shutdown-delay-s", "0"]
    command += ["--watch-s", str(options.watch)]
    command += ["--allow-repository-control", *options.server.split()]
    server = Server(command, options.server_cores)
    target = f"127.0.0.1:{server.port}"
    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        channel = stack.enter_context(grpc.insecure_channel(target))
        crowd = Clients(clients(target, options.model, options.jpeg), stack)
        capacity = crowd.capacity(options.seconds)
        rates = [options.load * each for each in capacity]
        print(f"capacity {sum(capacity):,.0f} requests/s; sent {sum(rates):,.0f}", flush=True)
        publisher = Publisher(models, options.model, channel, server)
        failed: dict[str, int] = {}
        calm: list[Samples] = []
        busy: list[Samples] = []
        at_switches: list[float] = []
        ratios: list[float] = []
        wrong = requests = left = 0
        left = options.switches
        while left:
            times = min(left, options.block)
            left -= times
            length_s = max(options.seconds, times * options.every + 1.0)
            loads = [Load(rate=rate, duration_s=length_s, timeout_s=10.0) for rate in rates]
            quiet, _ = crowd.run(loads)
            thread = threading.Thread(target=publisher.go_on, args=(times, options.every))
            thread.start()
            stirred, begun = crowd.run(loads)
            thread.join()
            calm += quiet
            busy += stirred
            whole = merge(stirred)
            for began, ended in publisher.switches[-times:]:
                near = (whole.due >= began - begun) & (whole.due <= ended - begun + 0.5)
                at_switches += whole.latency[near].tolist()
            for each in (*quiet, *stirred):
                requests += len(each.code)
                wrong += each.wrong_rows
                for code, words in each.details.items():
                    count = int(np.sum(each.code == code))
                    failed[f"{code}: {words}"] = failed.get(f"{code}: {words}", 0) + count
            ratios.append(p99_ms(stirred, 1.0) / p99_ms(quiet, 1.0))
            print(
                f"{options.switches - left} switches: p99 {p99_ms(stirred, 1.0):.1f} ms, "
                f"without {p99_ms(quiet, 1.0):.1f} ms, {sum(failed.values())} failed, "
                f"{publisher.memory[-1] / 1e6:.0f} MB",
                flush=True,
            )
        publisher.publish()
        backs = [publisher.roll_back() for _ in range(options.rollbacks)]
    gain, interval = slope(publisher.memory)
    durations = [ended - began for began, ended in publisher.switches]
    return {
        "switches": options.switches,
        "requests": requests,
        "failed": sum(failed.values()),
        "why": failed,
        "wrong_rows": wrong,
        "requests_per_s": sum(rates),
        "p99_ms_without": p99_ms(calm, 1.0),
        "p99_ms_with": p99_ms(busy, 1.0),
        "p99_ratio_median_of_blocks": statistics.median(ratios),
        "p99_ms_within_half_a_second_of_a_switch": float(np.quantile(at_switches, 0.99) * 1e3),
        "switch_s_median": statistics.median(durations),
        "switch_s_longest": max(durations),
        "memory_mb_first": publisher.memory[0] / 1e6,
        "memory_mb_last": publisher.memory[-1] / 1e6,
        "memory_kb_per_switch": gain / 1e3,
        "memory_kb_per_switch_interval": interval / 1e3,
        "rollback_ms_median": statistics.median(order for order, _ in backs) * 1e3,
        "rollback_ms_longest": max(order for order, _ in backs) * 1e3,
        "rollback_answered_ms_longest": max(answer for _, answer in backs) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--every", type=float, default=2.0, help="seconds from one to the next")
    parser.add_argument("--block", type=int, default=20, help="switches at a time")
    parser.add_argument("--load", type=float, default=0.7, help="of the capacity")
    parser.add_argument("--seconds", type=float, default=10.0, help="to find the capacity")
    parser.add_argument("--rollbacks", type=int, default=20)
    parser.add_argument("--watch", type=float, default=0.2, help="--watch-s of the server")
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--jpeg", default="32x32", help="size of the files that are sent")
    parser.add_argument("--server", default="", help="more arguments of `convoy serve`")
    parser.add_argument("--server-cores", default="0")
    parser.add_argument("--client-cores", default="1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.sched_setaffinity(0, {int(core) for core in options.client_cores.split(",")})
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    for name, value in found.items():
        print(f"{name:45} {value if not isinstance(value, float) else round(value, 3)}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if found["failed"] or found["wrong_rows"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
