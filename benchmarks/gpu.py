"""Convoy on a card: what ONNX Runtime does there by itself, what each option gives, what is left.

python benchmarks/gpu.py [figure ...] [--device cuda] [--networks cnn] [--topologies 8+1] [--photos FOLDER]
                         [--seconds 2] [--stop-after SECONDS] [--json FILE]

service   Convoy over ONNX Runtime alone
options   one network with one set of options: best rate, first runs, memory, two batches at once
feeding   what the CPU does for each image: decoding, by threads and by processes; copying

What matters most comes first: with --stop-after nothing more is begun after that time. Needs no TensorFlow: the networks have random weights (benchmarks/networks.py). With `--device cpu` it
runs without a card, as far as that goes.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import load
import networks
import numpy as np

CACHE = load.ROOT / ".cache" / "gpu"


class Network(NamedTuple):
    make: Callable[[], bytes]
    shape: tuple[int, int, int]
    largest: int


NETWORKS = {
    "cnn": Network(networks.cnn, (28, 28, 1), 256),
    "resnet50": Network(networks.resnet50, (224, 224, 3), 64),
}


class Trial(NamedTuple):
    """What is compared: a network in a precision, CUDA's options, and how it is run."""

    variant: str = "fp32"
    options: dict[str, str] = {}  # noqa: RUF012 (nobody writes to it)
    graphs: bool = False
    memory_mb: float = 0.0
    # In place of the one asked for, where that is a card.
    device: str = ""


_NHWC, _EXHAUSTIVE = {"prefer_nhwc": "1"}, {"cudnn_conv_algo_search": "EXHAUSTIVE"}
TRIALS = {
    "as served (HEURISTIC)": Trial(),
    "fp16": Trial("fp16"),
    "without TF32": Trial(options={"use_tf32": "0"}),
    "prefer_nhwc": Trial(options=_NHWC),
    "fp16, prefer_nhwc": Trial("fp16", _NHWC),
    "EXHAUSTIVE": Trial(options=_EXHAUSTIVE),
    "CUDA graphs": Trial(graphs=True),
    "fp16, CUDA graphs": Trial("fp16", graphs=True),
    "kNextPowerOfTwo": Trial(options={"arena_extend_strategy": "kNextPowerOfTwo"}),
    "fp16, prefer_nhwc, EXHAUSTIVE": Trial("fp16", {**_NHWC, **_EXHAUSTIVE}),
    "at most 2 GB": Trial(memory_mb=2000),
    "TensorRT": Trial(device="tensorrt"),
    "fp16, TensorRT": Trial("fp16", device="tensorrt"),
}

# How Convoy is started. Clients have several connections for each acceptor: the kernel spreads them
# by chance.
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "8+1": ("--acceptors", "8", "--engines", "1"),
    "one": (),
    "4+1": ("--acceptors", "4", "--engines", "1"),
    "graphs": ("--cuda-graphs",),
}
# Rates of single images that are tried, as shares of what a closed loop brings.
_SHARES = (0.3, 0.5, 0.65, 0.8, 0.9, 1.0)
_BOUND_MS = 15.0
# What takes longer than this hangs.
_LONGEST_S = 120.0


def file_of(name: str, variant: str) -> Path:
    return CACHE / (f"{name}.onnx" if variant == "fp32" else f"{name}.{variant}.onnx")


def one(name: str, device: str, trial: Trial, seconds: float) -> Any:
    """One network with one set of options, in a process of its own: each size's first run, its
    steady one, two batches at once, and memory.
    """
    from convoy_service.engine import gpu
    from convoy_service.engine import session as devices
    from convoy_service.engine.onnx_model import Model

    network = NETWORKS[name]
    devices._CUDA_OPTIONS.update(trial.options)
    nvml = gpu.nvml()

    def used_mb() -> float:
        if nvml is None:
            return 0.0
        return float(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used / 1e6)

    before = used_mb()
    began = time.perf_counter()
    shape = (network.largest, *network.shape)
    card = devices.Card(trial.memory_mb, trial.graphs, trial.variant, "pixels", shape)
    model = Model(file_of(name, trial.variant).read_bytes(), device, card=card)
    loaded_s = time.perf_counter() - began
    sizes = devices.buckets(network.largest)
    rng = np.random.default_rng(0)
    classes = model.run(np.zeros((1, *model.shape), np.uint8)).shape[1]
    model.bind(sizes, classes, lanes=2)
    first, steady = {}, {}
    for size in sizes:
        buffer = model.buffer(size)
        assert buffer is not None
        buffer[...] = rng.integers(0, 256, buffer.shape, np.uint8)
        times = []
        ends = time.perf_counter() + seconds / len(sizes)
        while len(times) < 6 or time.perf_counter() < ends:
            began = time.perf_counter()
            model.run(buffer)
            times.append(time.perf_counter() - began)
        first[size], steady[size] = times[0], float(np.median(times[5:]))

    def rate(lanes: int) -> float:
        """Images/s in the largest batches, so many at once."""
        buffers = [model.buffer(network.largest, lane) for lane in range(lanes)]
        ends = time.perf_counter() + seconds / 2

        def run(buffer: Any) -> int:
            done = 0
            while time.perf_counter() < ends or not done:
                model.run(buffer)
                done += network.largest
            return done

        with ThreadPoolExecutor(lanes) as pool:
            list(pool.map(model.run, buffers))  # the second lane's first run
            began = time.perf_counter()
            ends = began + seconds / 2
            return sum(pool.map(run, buffers)) / (time.perf_counter() - began)

    at_once = {lanes: rate(lanes) for lanes in range(1, model.lanes + 1)}
    warm = used_mb()
    # After that no size may be cold, and no memory may be asked for.
    again = {}
    for size in rng.permutation(np.repeat(sizes, 10)):
        buffer = model.buffer(int(size))
        began = time.perf_counter()
        model.run(buffer)  # type: ignore[arg-type]
        again[int(size)] = max(again.get(int(size), 0.0), time.perf_counter() - began)
    return {
        "device": model.device,
        "load_s": loaded_s,
        "first_ms": {size: 1e3 * each for size, each in first.items()},
        "steady_ms": {size: 1e3 * each for size, each in steady.items()},
        "worst_again": max(again[size] / steady[size] for size in sizes),
        "images_per_s": {size: size / each for size, each in steady.items()},
        "batches_at_once": at_once,
        "memory_mb": warm - before,
        "growth_mb": used_mb() - warm,
    }


def decoded(files: list[bytes], seconds: float) -> tuple[int, float]:
    """How many of them were decoded in that time, and the seconds of CPU that took this thread."""
    from convoy_service.artifacts import images

    target, done = images.Target(224, 224, 3), 0
    for data in files:
        images.decode(data, target)
    began, ends = time.thread_time(), time.perf_counter() + seconds
    while time.perf_counter() < ends:
        images.decode(files[done % len(files)], target)
        done += 1
    return done, time.thread_time() - began


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device, self.seconds, self.photos = (
            arguments.device,
            arguments.seconds,
            arguments.photos,
        )
        self.names = arguments.networks or list(NETWORKS)
        self.topologies = arguments.topologies or [
            key for key in TOPOLOGIES if key != "graphs" or self.device != "cpu"
        ]
        self._json, self._ends = arguments.json, time.monotonic() + arguments.stop_after
        self._trials: dict[tuple[str, str], Any] = {}
        self.results: dict[str, Any] = {}

    def _keep(self, name: str, value: Any) -> None:
        """Written at once: what comes after it may not come to its end."""
        self.results[name] = value
        if self._json:
            self._json.write_text(json.dumps(self.results, indent=1))

    def _late(self, what: str) -> bool:
        if late := time.monotonic() > self._ends:
            print(f"{what}: not measured, the time is over", flush=True)
        return late

    def _files(self) -> None:
        """The networks, and versions of them to serve."""
        from convoy_training.export.import_onnx import add
        from convoy_training.settings import AddSettings

        if (CACHE / "models" / "resnet50").exists():
            return
        (CACHE / "models").mkdir(parents=True, exist_ok=True)
        for name, network in NETWORKS.items():
            data = network.make()
            file, half = file_of(name, "fp32"), file_of(name, "fp16")
            file.write_bytes(data)
            half.write_bytes(networks.float16(data))
            for served, source in ((name, file), (f"{name}-fp16", half)):
                settings = AddSettings(models=CACHE / "models", max_batch_size=network.largest)
                add(served, source, settings)

    def _one(self, name: str, trial: Trial) -> Any:
        """What `one` found in a process of its own, or `error`; each trial is made once."""
        key = name, json.dumps(trial)
        if key in self._trials:
            return self._trials[key]
        device = self.device if self.device == "cpu" else trial.device or self.device
        command = [sys.executable, __file__, "one", name, device, key[1], str(self.seconds)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=_LONGEST_S
            )
        except subprocess.TimeoutExpired as error:
            return {"error": str(error)}
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["nothing said"])[-1]}
        found = self._trials[key] = json.loads(done.stdout.splitlines()[-1])
        return found

    def options(self) -> None:
        """The table of provider options."""
        self._files()
        for name in self.names:
            for label, trial in TRIALS.items():
                # A CPU has none of the others.
                if self.device == "cpu" and trial not in (Trial(), Trial("fp16")):
                    continue
                if self._late(f"{name}, {label}"):
                    continue
                found = self._one(name, trial)
                self._keep(f"{name}, {label}", found)
                print(f"{name:9} {label:30} {_line(found)}", flush=True)

    @contextlib.contextmanager
    def _server(self, served: str, *arguments: str) -> Iterator[load.Running]:
        # Only this one: to get all warm takes minutes.
        folder = CACHE / "served" / served
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (folder / served).symlink_to(CACHE / "models" / served)
        command = ["timeout", "--foreground", "-k", "5", str(_LONGEST_S), *load.CONVOY]
        command += ["serve", "--models", str(folder), "--host", "127.0.0.1"]
        command += ["--port", "0", "--metrics-port", "0", "--no-http", "--shutdown-delay-s", "0"]
        command += ["--device", self.device, *arguments]
        server = load.Running(command, r"ready in .* gRPC on \S+:(\d+),", core="")
        try:
            yield server
        finally:
            server.stop()

    def feeding(self) -> None:
        """What the CPU does for each image of 224x224, by core: decoding a JPEG, in threads of one
        process and in processes, as acceptors are; putting the pixels of a batch together.
        """
        from convoy.bench.payloads import random_jpeg

        if self.photos:
            files = [path.read_bytes() for path in sorted(self.photos.glob("*.jp*g"))]
            kind = f"{len(files)} photographs"
        else:
            rng = np.random.default_rng(0)
            files = [random_jpeg(rng, 500, 375) for _ in range(8)]
            kind = "made pictures of 500x375"
        kind += f", {sum(map(len, files)) / len(files) / 1000:.0f} kB on average"
        cores = len(os.sched_getaffinity(0))
        counts = sorted({1, 2, *(1 << n for n in range(2, cores.bit_length())), cores} - {0})
        pools = {"threads": ThreadPoolExecutor, "processes": ProcessPoolExecutor}
        for label, pool in pools.items():
            for count in (count for count in counts if count <= cores):
                with pool(count) as workers:
                    began = time.perf_counter()
                    jobs = [workers.submit(decoded, files, self.seconds) for _ in range(count)]
                    found = [job.result() for job in jobs]
                    seconds = max(self.seconds, 1e-9)
                    wall_s = time.perf_counter() - began
                images, cpu_s = sum(n for n, _ in found), sum(cpu for _, cpu in found)
                found_here = {
                    "files": kind, "images_per_s": images / seconds,
                    "images_per_cpu_s": images / cpu_s, "wall_s": wall_s,
                }  # fmt: skip
                self._keep(f"decoding, {count} {label}", found_here)
                print(
                    f"decoding {kind}: {count} {label}: {images / seconds:6.0f} images/s, "
                    f"{images / cpu_s:6.0f} for a second of CPU",
                    flush=True,
                )
        rows = np.random.default_rng(0).integers(0, 256, (64, 1, 224, 224, 3), np.uint8)
        batch = np.zeros((64, 224, 224, 3), np.uint8)
        done, began, ends = 0, time.thread_time(), time.perf_counter() + self.seconds
        while time.perf_counter() < ends:
            for number, row in enumerate(rows):
                batch[number : number + 1] = row
            done += len(rows)
        rate = done / (time.thread_time() - began)
        self._keep("copying", {"images_per_cpu_s": rate})
        print(f"copying 64 images of 224x224x3 into a batch: {rate:.0f} for a second of CPU")

    def service(self) -> None:
        """The service over ONNX Runtime alone: many images a request, and one, within 15 ms."""
        self._files()
        for key in self.topologies:
            for name, variant in ((n, v) for n in self.names for v in ("fp32", "fp16")):
                served = name if variant == "fp32" else f"{name}-{variant}"
                what = f"service, {served}, {key}"
                if self._late(what):
                    continue
                raw = self._one(name, Trial(variant))
                try:
                    if "error" in raw:
                        raise SystemExit(raw["error"])
                    # One batch after the other, or two at once, whichever is more.
                    best = max(*raw["images_per_s"].values(), *raw["batches_at_once"].values())
                    found = {"raw": best, **self._served(served, TOPOLOGIES[key])}
                except SystemExit as error:
                    found = {"error": str(error)}
                    print(f"{what} failed: {error}", flush=True)
                self._keep(what, found)
                if "error" in found:
                    continue
                many, most, within = (found[n] for n in ("32_images", "1_image", "1_image_15_ms"))
                print(
                    f"{what}: ONNX Runtime alone {best:.0f} images/s; 32 images a request {many:.0f} "
                    f"({many / best:.2f}; >= 0.9), 1 image {most:.0f} ({most / best:.2f}), within "
                    f"{_BOUND_MS:g} ms {within:.0f} ({within / best:.2f}; >= 0.8 for ResNet-50)",
                    flush=True,
                )

    def _served(self, served: str, arguments: tuple[str, ...]) -> dict[str, Any]:
        """Images/s of the service. Raises SystemExit."""
        with self._server(served, *arguments) as server:
            common = ["--model", served, "--connections", "64", "--timeout-ms", "2000"]
            common += ["--duration-s", str(self.seconds), "--warmup-s", "0.5"]
            batches = ("--images-per-request", "32", "--concurrency", "32")
            [many] = load.bench(server, *common, *batches, core="")["points"]
            [most] = load.bench(server, *common, "--concurrency", "256", core="")["points"]
            if not most["throughput"]:
                raise SystemExit(f"no answers: {most['statuses']} {most['details']}")
            rates = [str(share * most["throughput"]) for share in _SHARES]
            bound = ("--rate", *rates, "--slo-ms", str(_BOUND_MS))
            points = load.bench(server, *common, *bound, core="")["points"]
        kept = [
            each
            for each in points
            if each["p99_of_all_ms"] is not None and each["p99_of_all_ms"] <= _BOUND_MS
        ]
        return {
            "32_images": many["images_per_s"],
            "1_image": most["images_per_s"],
            "1_image_15_ms": max((each["images_per_s"] for each in kept), default=0.0),
            "points": [many, most, *points],
        }


def _line(found: dict[str, Any]) -> str:
    """What `one` found, in one line."""
    if "error" in found:
        return f"failed: {found['error'][:150]}"
    rates = {int(size): rate for size, rate in found["images_per_s"].items()}
    best = max(rates, key=lambda size: rates[size])
    together = list(found["batches_at_once"].values())
    return (
        f"{found['device']:7} best {rates[best]:9.0f} images/s at {best:3}, at 1 {rates[1]:7.0f}, two "
        f"batches at once {together[-1] / together[0]:4.2f} x one, first run "
        f"{max(found['first_ms'].values()):7.0f} ms at most, later {found['worst_again']:4.2f} x "
        f"steady at most, {found['memory_mb']:6.0f} MB, then {found['growth_mb']:+.0f}"
    )


def main() -> int:
    if sys.argv[1:2] == ["one"]:
        name, device, trial, seconds = sys.argv[2:6]
        print(json.dumps(one(name, device, Trial(*json.loads(trial)), float(seconds))))
        return 0
    figures = ("service", "options", "feeding")
    arguments = load.command_line(
        __doc__ or "",
        figures,
        {
            "--device": {"default": "cuda"},
            "--networks": {"nargs": "*", "choices": list(NETWORKS)},
            "--topologies": {"nargs": "*", "choices": list(TOPOLOGIES)},
            "--stop-after": {"type": float, "default": math.inf, "metavar": "SECONDS"},
            "--photos": {"type": Path, "help": "folder of JPEG files to decode"},
        },
    )
    made = Bench(arguments)
    for name in arguments.figures or figures:
        getattr(made, name)()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
