"""Convoy on a card: what ONNX Runtime does there by itself, what each option gives, what is left.

python benchmarks/gpu.py [figure ...] [--device cuda] [--seconds 2] [--json FILE]

Needs no TensorFlow: the networks have random weights (benchmarks/networks.py). With `--device cpu` it
runs without a card, as far as that goes.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import load
import networks
import numpy as np

CACHE = load.ROOT / ".cache" / "gpu"
NETWORKS = {"cnn": networks.cnn, "resnet50": networks.resnet50}
LARGEST = {"cnn": 256, "resnet50": 64}

# What is compared: a name, the variant of the network, and the provider's options.
OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "as served (HEURISTIC)": ("", {}),
    "EXHAUSTIVE": ("", {"cudnn_conv_algo_search": "EXHAUSTIVE"}),
    "kNextPowerOfTwo": ("", {"arena_extend_strategy": "kNextPowerOfTwo"}),
    "without TF32": ("", {"use_tf32": "0"}),
    "prefer_nhwc": ("", {"prefer_nhwc": "1"}),
    "fp16": (".fp16", {}),
    "fp16, prefer_nhwc": (".fp16", {"prefer_nhwc": "1"}),
    "fp16, prefer_nhwc, EXHAUSTIVE": (
        ".fp16", {"prefer_nhwc": "1", "cudnn_conv_algo_search": "EXHAUSTIVE"},
    ),
}  # fmt: skip


def one(file: str, device: str, largest: int, options: dict[str, str], seconds: float) -> Any:
    """One network with one set of options, in a process of its own: each size's first run, its
    steady one, and memory.
    """
    from service import device as devices
    from service import gpu
    from service.model import Model

    devices._CUDA_OPTIONS.update(options)
    nvml = gpu.nvml()

    def used_mb() -> float:
        if nvml is None:
            return 0.0
        return float(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used / 1e6)

    before = used_mb()
    began = time.perf_counter()
    model = Model(Path(file).read_bytes(), device)
    loaded_s = time.perf_counter() - began
    sizes = devices.buckets(largest)
    rng = np.random.default_rng(0)
    classes = model.run(np.zeros((1, *model.shape), np.uint8)).shape[1]
    model.bind(sizes, classes)
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
        "memory_mb": warm - before,
        "growth_mb": used_mb() - warm,
    }


class Bench:
    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.results: dict[str, Any] = {}
        self._files()

    def _files(self) -> None:
        """The networks, and versions of them to serve."""
        from training.add import add
        from training.settings import AddSettings

        if (CACHE / "models" / "resnet50").exists():
            return
        (CACHE / "models").mkdir(parents=True, exist_ok=True)
        for name, make in NETWORKS.items():
            data = make()
            file = CACHE / f"{name}.onnx"
            file.write_bytes(data)
            half = CACHE / f"{name}.fp16.onnx"
            half.write_bytes(networks.float16(data))
            for served, source in ((name, file), (f"{name}-fp16", half)):
                settings = AddSettings(models=CACHE / "models", max_batch_size=LARGEST[name])
                add(served, source, settings)

    def _one(self, name: str, variant: str, options: dict[str, str]) -> Any:
        command = [sys.executable, __file__, "one", str(CACHE / f"{name}{variant}.onnx")]
        command += [self.device, str(LARGEST[name]), json.dumps(options), str(self.seconds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"error": (done.stderr.strip().splitlines() or ["nothing said"])[-1]}
        return json.loads(done.stdout.splitlines()[-1])

    def options(self) -> None:
        """The table of provider options."""
        for name in NETWORKS:
            for label, (variant, options) in OPTIONS.items():
                found = self._one(name, variant, options)
                self.results[f"{name}, {label}"] = found
                if "error" in found:
                    print(f"{name:9} {label:30} failed: {found['error'][:90]}", flush=True)
                    continue
                rates = {int(size): rate for size, rate in found["images_per_s"].items()}
                best = max(rates, key=lambda size: rates[size])
                first = max(found["first_ms"].values())
                print(
                    f"{name:9} {label:30} {found['device']:7} best {rates[best]:9.0f} images/s at "
                    f"{best:3}, at 1 {rates[1]:7.0f}, first run {first:7.0f} ms at most, later "
                    f"{found['worst_again']:4.2f} x steady at most, {found['memory_mb']:6.0f} MB, "
                    f"then {found['growth_mb']:+.0f}",
                    flush=True,
                )

    @contextlib.contextmanager
    def _server(self, *arguments: str) -> Iterator[load.Running]:
        command = [*load.CONVOY, "serve", "--models", str(CACHE / "models"), "--host", "127.0.0.1"]
        command += ["--port", "0", "--metrics-port", "0", "--shutdown-delay-s", "0"]
        command += ["--device", self.device, *arguments]
        server = load.Running(command, r"ready in .* gRPC on \S+:(\d+),", core="")
        try:
            yield server
        finally:
            server.stop()

    def service(self) -> None:
        """The service over ONNX Runtime alone: many images a request, and one, within 15 ms."""
        topologies = {
            "one process": (),
            "4 acceptors, 1 engine": ("--acceptors", "4", "--engines", "1"),
            "8 acceptors, 1 engine": ("--acceptors", "8", "--engines", "1"),
        }
        for name, variant in ((n, v) for n in NETWORKS for v in ("", ".fp16")):
            served = name + variant.replace(".", "-")
            raw = self._one(name, variant, {})
            best = max(raw["images_per_s"].values())
            print(f"{served}: ONNX Runtime alone {best:.0f} images/s", flush=True)
            for label, arguments in topologies.items():
                with self._server(*arguments) as server:
                    times = ("--duration-s", str(self.seconds), "--warmup-s", "1")
                    common = ("--model", served, "--connections", "8", *times)
                    many = load.bench(
                        server,
                        *common,
                        "--images-per-request",
                        "32",
                        "--concurrency",
                        "32",
                        core="",
                    )["points"][0]
                    peak = load.bench(server, *common, "--find-peak", "--slo-ms", "15", core="")
                within = max(
                    (
                        point["images_per_s"]
                        for point in peak["points"]
                        if point["latency_ms"].get("p99", 1e9) <= 15
                    ),
                    default=0.0,
                )
                self.results[f"service, {served}, {label}"] = {
                    "raw": best, "32_images": many["images_per_s"], "1_image_15_ms": within,
                }  # fmt: skip
                print(
                    f"  {label:22} 32 images a request {many['images_per_s']:9.0f} "
                    f"({many['images_per_s'] / best:.2f}; >= 0.9), 1 image at p99 <= 15 ms "
                    f"{within:9.0f} ({within / best:.2f}; >= 0.8 for ResNet-50)",
                    flush=True,
                )


def main() -> int:
    if sys.argv[1:2] == ["one"]:
        file, device, largest, options, seconds = sys.argv[2:7]
        print(json.dumps(one(file, device, int(largest), json.loads(options), float(seconds))))
        return 0
    figures = ("options", "service")
    arguments = load.command_line(__doc__ or "", figures, "--device", default="cuda")
    made = Bench(arguments.device, arguments.seconds)
    for name in arguments.figures or figures:
        getattr(made, name)()
        if arguments.json:
            arguments.json.write_text(json.dumps(made.results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
