"""The service under load, as ratios taken in one run: what Convoy costs over what it is made of.

python benchmarks/load.py [figure ...] [--rounds 3] [--seconds 2] [--json FILE]

The server has one core and the client the other, unless a figure says otherwise. What is compared is
measured in turns, round after round; a figure is the median over the rounds. Needs two cores and the
extra `train`, which makes the two networks (with random weights) at the first run.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache" / "benchmarks"
CONVOY = [sys.executable, "-m", "convoy"]
SERVER, CLIENT = "0", "1"  # cores
BATCHES = (1, 2, 4, 8, 16, 32, 64)


# What is measured, each in a process of its own.


def raw_images_per_s(onnx: str, seconds: float, jpeg: str) -> dict[int, float]:
    """ONNX Runtime in this process with nothing around it, by batch size; with the decoding of JPEGs
    of size `jpeg` where one is given.
    """
    import numpy as np

    from convoy.bench.payloads import random_jpeg
    from convoy_service.artifacts import images
    from convoy_service.engine.onnx_model import Model

    model = Model(Path(onnx).read_bytes(), device="cpu", threads=1)
    rng = np.random.default_rng(0)
    encoded = [random_jpeg(rng, *map(int, jpeg.split("x"))) for _ in range(8)] if jpeg else []
    target = images.Target(*model.shape)
    rates = {}
    sizes = BATCHES if model.shape[0] < 100 else (1, 2, 4, 8)
    for size in sizes:
        pixels = rng.integers(0, 256, (size, *model.shape), dtype=np.uint8)
        for _ in range(2):
            model.run(pixels)
        done, began = 0, time.perf_counter()
        while (spent := time.perf_counter() - began) < seconds / len(sizes):
            if encoded:
                pixels = np.stack(
                    [images.decode(encoded[n % len(encoded)], target) for n in range(size)]
                )
            model.run(pixels)
            done += size
        rates[size] = done / spent
    return rates


def empty_server(kind: str) -> None:
    """A public server of grpcio whose one handler returns what it has at hand."""
    import asyncio

    import grpc

    from convoy_protos import inference_pb2 as pb

    metadata = pb.ModelMetadataResponse(name="cnn", versions=["1"], platform="empty")
    metadata.inputs.add(name="pixels", datatype="UINT8", shape=(-1, 28, 28, 1))
    metadata.outputs.add(name="probabilities", datatype="FP32", shape=(-1, 10))
    answer = pb.ModelInferResponse(model_name="cnn", model_version="1")
    answer.outputs.add(name="probabilities", datatype="FP32", shape=(1, 10))
    answer.raw_output_contents.append(bytes(40))
    answers = {"ModelMetadata": metadata.SerializeToString()}
    other = answer.SerializeToString()

    class Empty(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:
            data = answers.get(details.method.rpartition("/")[2], other)
            if kind == "threaded":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: data)

            async def handle(_request: bytes, _context: Any) -> bytes:
                return data

            return grpc.unary_unary_rpc_method_handler(handle)

    async def serve_aio() -> None:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((Empty(),))
        print(f"port {server.add_insecure_port('127.0.0.1:0')}", file=sys.stderr, flush=True)
        await server.start()
        await server.wait_for_termination()

    if kind == "aio":
        asyncio.run(serve_aio())
    if kind == "uvloop":
        import uvloop  # type: ignore[import-not-found]

        uvloop.run(serve_aio())
    server = grpc.server(futures.ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((Empty(),))
    print(f"port {server.add_insecure_port('127.0.0.1:0')}", file=sys.stderr, flush=True)
    server.start()
    server.wait_for_termination()


# The bench.


class Running:
    """A server as a process, on `core`, or on all where that is empty."""

    def __init__(self, command: list[str], pattern: str, core: str = SERVER) -> None:
        pinned = ["taskset", "-c", core] if core else []
        self.process = subprocess.Popen([*pinned, *command], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if match := re.search(pattern, line):
                self.port = int(match[1])
                # Whatever it has to say later is not kept, and must not fill the pipe.
                threading.Thread(target=self.process.stderr.read, daemon=True).start()
                return
        raise SystemExit("it did not start:\n" + "".join(lines))

    def cpu_s(self) -> float:
        """Processor seconds of it and all its children."""
        return sum(map(_cpu_s, _tree(self.process.pid)))

    def memory_bytes(self) -> int:
        """Resident memory of it and all its children; what they share is counted for each."""
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in _tree(self.process.pid)
        ]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _tree(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in _tree(int(child)))]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def convoy(*arguments: str, core: str = SERVER, program: Sequence[str] = CONVOY) -> Running:
    """The service; `NAME=value` before its arguments are for its environment."""
    command = [*program, "serve", "--models", str(CACHE / "models"), "--host", "127.0.0.1"]
    variables = [each for each in arguments if not each.startswith("-") and "=" in each]
    command += ["--port", "0", "--metrics-port", "0", "--no-http", "--shutdown-delay-s", "0"]
    command += [each for each in arguments if each not in variables]
    return Running(["env", *variables, *command], r"ready in .* gRPC on \S+:(\d+),", core)


def convoy_on_aio() -> Running:
    """The service on grpc.aio, see benchmarks/aio_front.py."""
    return convoy(program=[sys.executable, str(ROOT / "benchmarks" / "aio_front.py")])


def empty(kind: str) -> Running:
    return Running([sys.executable, __file__, "empty-server", kind], r"port (\d+)")


def bench(server: Running, *arguments: str, core: str = CLIENT) -> dict[str, Any]:
    """What `convoy bench` found."""
    with contextlib.ExitStack() as stack:
        import tempfile

        folder = stack.enter_context(tempfile.TemporaryDirectory())
        file = Path(folder) / "bench.json"
        command = ["taskset", "-c", core] if core else []
        command += [*CONVOY, "bench", "--server", f"127.0.0.1:{server.port}", "--json", str(file)]
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stdout}{done.stderr}")
        found: dict[str, Any] = json.loads(file.read_text())
        return found


@dataclasses.dataclass
class Bench:
    rounds: int
    seconds: float
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def load(self, server: Running, *arguments: str, core: str = CLIENT) -> dict[str, Any]:
        """The one point of a closed or open loop."""
        times = ["--duration-s", str(self.seconds), "--warmup-s", "1"]
        point: dict[str, Any] = bench(server, *times, *arguments, core=core)["points"][0]
        if set(point["statuses"]) != {"OK"} and "--rate" not in arguments:
            raise SystemExit(f"not all were answered: {point['statuses']} {point['details']}")
        return point

    def raw(self, name: str, jpeg: str = "") -> dict[int, float]:
        command = ["taskset", "-c", SERVER, sys.executable, __file__, "raw"]
        command += [str(CACHE / f"{name}.onnx"), str(self.seconds), jpeg]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {int(size): rate for size, rate in json.loads(done.stdout).items()}

    @staticmethod
    def best(raws: list[dict[int, float]]) -> list[float]:
        """ONNX Runtime's rate at its best batch size, in each round. The size is the best of all
        rounds: the best of each would be what noise favoured.
        """
        size = max(raws[0], key=lambda size: statistics.median(raw[size] for raw in raws))
        return [raw[size] for raw in raws]

    def report(self, name: str, least: str, ratios: list[float], **details: Any) -> None:
        median = statistics.median(ratios)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:58} {median:6.2f}  ({spread}; {least})  {details}", flush=True)
        self.results.append(
            {"figure": name, "asked": least, "median": median, "rounds": ratios, **details}
        )

    # The figures.

    def batches(self) -> None:
        """Basic CNN, 32 images a request."""
        with _closing(convoy()) as server:
            raws, rates = [], []
            for _ in range(self.rounds):
                raws.append(self.raw("cnn"))
                given = self.load(
                    server, "--model", "cnn", "--images-per-request", "32", "--concurrency", "4"
                )
                rates.append(given["images_per_s"])
        self.report_over_raw("CNN, 32 images a request, over raw", ">= 0.92", rates, raws)

    def report_over_raw(
        self, name: str, least: str, rates: list[float], raws: list[dict[int, float]]
    ) -> None:
        best = self.best(raws)
        ratios = [rate / raw for rate, raw in zip(rates, best, strict=True)]
        seen = [(round(rate, 1), round(raw, 1)) for rate, raw in zip(rates, best, strict=True)]
        self.report(name, least, ratios, images_per_s=seen)

    def singles(self) -> None:
        """Basic CNN, one image a request, unary and by stream; and one at a time."""
        kinds = ("threaded", "aio")
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(_closing(convoy()))
            empties = [stack.enter_context(_closing(empty(kind))) for kind in kinds]
            found: dict[int, list[tuple[float, float]]] = {8: [], 32: []}
            streams: dict[int, list[float]] = {8: [], 32: []}
            alone, raws = [], []
            for _ in range(self.rounds):
                raw = self.raw("cnn")
                raws.append(raw)
                for level in (1, 8, 32):
                    closed = ("--model", "cnn", "--concurrency", str(level))
                    calls = [self.load(each, *closed) for each in empties]
                    given = self.load(server, *closed)
                    rate = given["throughput"]
                    fastest = max(call["throughput"] for call in calls)
                    if level == 1:
                        # The median of an empty call, and of a run.
                        least = min(call["latency_ms"]["p50"] for call in calls) + 1e3 / raw[1]
                        alone.append(given["latency_ms"]["p50"] / least)
                        continue
                    found[level].append((rate, fastest))
                    stream = self.load(server, *closed, "--api", "classify", "--stream")
                    unary = self.load(server, *closed, "--api", "classify")
                    streams[level].append(stream["throughput"] / unary["throughput"])
        best = self.best(raws)
        for level, rates in found.items():
            self.report(
                f"CNN, 1 image a request, {level} in flight, over the harmonic sum", ">= 1.2",
                [r * (1 / e + 1 / b) for (r, e), b in zip(rates, best, strict=True)],
                rate_empty_raw=[
                    (round(r), round(e), round(b)) for (r, e), b in zip(rates, best, strict=True)
                ],
            )  # fmt: skip
            self.report(
                f"the same by stream, {level} in flight, over unary", ">= 1.5", streams[level]
            )
        self.report("CNN, 1 in flight: latency over empty call + run", "<= 1.25", alone)

    def fronts(self) -> None:
        """What takes the calls: empty servers, and the service, one image a request."""
        fronts: dict[str, Callable[[], Running]] = {
            "empty, threaded": lambda: empty("threaded"),
            "empty, aio": lambda: empty("aio"),
            "Convoy, --front public": lambda: convoy("--front", "public"),
            "Convoy, grpc.aio": convoy_on_aio,
            "Convoy, gRPC's threads read": lambda: convoy("GRPC_EXPERIMENTS=event_engine_listener"),
            "Convoy": convoy,
        }
        if importlib.util.find_spec("uvloop"):
            fronts["empty, aio on uvloop"] = lambda: empty("uvloop")
        with contextlib.ExitStack() as stack:
            servers = {
                name: stack.enter_context(_closing(start())) for name, start in fronts.items()
            }
            for level in (1, 8, 32):
                rates: dict[str, list[float]] = {name: [] for name in servers}
                for _ in range(self.rounds):
                    for name, server in servers.items():
                        closed = ("--model", "cnn", "--concurrency", str(level))
                        rates[name].append(self.load(server, *closed)["throughput"])
                for name, each in rates.items():
                    ratios = [a / b for a, b in zip(each, rates["Convoy"], strict=True)]
                    self.report(
                        f"{name}, {level} in flight, over Convoy", "", ratios,
                        calls_per_s=[round(rate) for rate in each],
                    )  # fmt: skip

    def resnet(self) -> None:
        """ResNet-50, one image a request, as pixels and as JPEGs."""
        for name, jpeg, least in (
            ("raw pixels", "", ">= 0.97"),
            ("500x375 JPEGs", "500x375", ">= 0.95"),
        ):
            sent = ["--jpeg-size", jpeg] if jpeg else []
            with _closing(convoy()) as server:
                rates, raws = [], []
                for _ in range(self.rounds):
                    # A batch takes most of a second.
                    seconds, self.seconds = self.seconds, max(self.seconds, 24.0)
                    raws.append(self.raw("resnet", jpeg))
                    given = self.load(server, "--model", "resnet", "--concurrency", "8", *sent)
                    self.seconds = seconds
                    rates.append(given["images_per_s"])
            self.report_over_raw(f"ResNet-50, {name}, over raw", least, rates, raws)

    def goodput(self) -> None:
        """Answers within 50 ms at 2 and 3 times capacity, over the most that was reached."""
        for images in ("32", "1"):
            ratios: dict[float, list[float]] = {2: [], 3: []}
            seen = []
            for _ in range(self.rounds):
                with _closing(convoy()) as server:
                    found = bench(
                        server, "--model", "cnn", "--images-per-request", images, "--overload",
                        "--slo-ms", "50", "--duration-s", str(self.seconds), "--warmup-s", "1",
                    )  # fmt: skip
                points = found["points"][-6:]  # before them, the search for its capacity
                peak = max(point["goodput"] for point in points)
                for times, point in zip((0.5, 0.75, 1, 1.5, 2, 3), points, strict=True):
                    if times in ratios:
                        ratios[times].append(point["goodput"] / peak)
                seen.append([round(point["goodput"]) for point in points])
            for times, values in ratios.items():
                self.report(
                    f"goodput at {times:g} x capacity, {images} images a request, over peak",
                    ">= 0.95", values, seen=seen,
                )  # fmt: skip

    def tail(self) -> None:
        """p99 at 80% of the peak, over the time of a full batch."""
        ratios, seen = [], []
        with _closing(convoy()) as server:
            for _ in range(self.rounds):
                full = 64e3 / self.raw("cnn")[64]
                common = ("--model", "cnn", "--images-per-request", "8")
                peak = self.load(server, *common, "--concurrency", "16")["throughput"]
                point = self.load(server, *common, "--rate", f"{0.8 * peak:.1f}")
                ratios.append(point["latency_ms"]["p99"] / full)
                seen.append((round(point["latency_ms"]["p99"], 2), round(full, 2)))
        self.report("p99 at 80% of peak, over a full batch", "<= 3", ratios, ms=seen)

    def cores(self) -> None:
        """Images a server CPU second: one core; all cores in each topology."""
        topologies: dict[str, tuple[list[str], str]] = {
            "one core": ([], SERVER),
            "one process, all cores": ([], ""),
            "2 all-in-one workers": (["--acceptors", "2"], ""),
            "1 acceptor + 1 engine": (["--acceptors", "1", "--engines", "1"], ""),
            "1 acceptor + 1 engine, one core": (["--acceptors", "1", "--engines", "1"], SERVER),
            "2 acceptors + 1 engine": (["--acceptors", "2", "--engines", "1"], ""),
        }
        for images in ("1", "32"):
            for connections in ("1", "8"):
                efficiency: dict[str, list[float]] = {name: [] for name in topologies}
                rates: dict[str, list[float]] = {name: [] for name in topologies}
                for _ in range(self.rounds):
                    for name, (arguments, core) in topologies.items():
                        with _closing(convoy(*arguments, core=core)) as server:
                            before = server.cpu_s()
                            point = self.load(
                                server, "--model", "cnn", "--images-per-request", images,
                                "--concurrency", "32" if images == "1" else "8",
                                "--connections", connections,
                                core=CLIENT if core else "",
                            )  # fmt: skip
                            spent = server.cpu_s() - before
                        # The warm-up is counted on both sides.
                        answered = point["images_per_s"] * (self.seconds + 1)
                        efficiency[name].append(answered / spent)
                        rates[name].append(point["images_per_s"])
                base = efficiency["one core"]
                for name in topologies:
                    ratio = [one / other for one, other in zip(efficiency[name], base, strict=True)]
                    self.report(
                        f"{name}, {images} images a request, {connections} connections: "
                        "images a CPU second over one core", ">= 0.9", ratio,
                        images_per_s=[round(rate) for rate in rates[name]],
                    )  # fmt: skip

    def soak(self, minutes: float = 20.0) -> None:
        """Memory at 80% load."""
        with _closing(convoy()) as server:
            common = ("--model", "cnn", "--images-per-request", "4")
            peak = self.load(server, *common, "--concurrency", "16")["throughput"]
            samples: list[tuple[float, int]] = []
            stop = threading.Event()

            def sample() -> None:
                began = time.monotonic()
                while not stop.wait(5.0):
                    samples.append((time.monotonic() - began, server.memory_bytes()))

            sampler = threading.Thread(target=sample)
            sampler.start()
            point = bench(
                server, *common, "--rate", f"{0.8 * peak:.1f}", "--duration-s", str(60 * minutes)
            )["points"][0]
            stop.set()
            sampler.join()
        # After the first fifth: buffers grow to their size at first.
        late = samples[len(samples) // 5 :]
        slope, _ = statistics.linear_regression(*zip(*late, strict=True))
        print(
            f"memory after {minutes:g} minutes at {0.8 * peak:.0f} requests/s: "
            f"{late[0][1] / 1e6:.1f} -> {late[-1][1] / 1e6:.1f} MB, slope "
            f"{slope * 3600 / 1e6:+.2f} MB an hour; {point['statuses']}",
            flush=True,
        )
        self.results.append(
            {"figure": "soak", "slope_mb_per_hour": slope * 3600 / 1e6, "samples": samples}
        )


@contextlib.contextmanager
def _closing(server: Running) -> Iterator[Running]:
    try:
        yield server
    finally:
        server.stop()


def make_models() -> None:
    """The basic network for 28x28x1 (conv 32, conv 64, dense 128), and ResNet-50; random weights."""
    if (CACHE / "models" / "resnet").exists():
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / "models").mkdir(exist_ok=True)
    import keras
    import numpy as np

    from convoy_training.data.datasets import Dataset
    from convoy_training.export.import_onnx import add
    from convoy_training.export.to_onnx import serving_function, to_onnx
    from convoy_training.fitting.networks import build
    from convoy_training.settings import AddSettings, TrainingSettings

    keras.utils.set_random_seed(0)

    @dataclasses.dataclass
    class Shape:
        shape: tuple[int, int, int]

    @dataclasses.dataclass
    class Random:
        target: Any
        train: Any
        classes: list[str]

    pixels = np.random.default_rng(0).integers(0, 256, (64, 28, 28, 1), dtype=np.uint8)
    split = type("Split", (), {"inputs": pixels})
    data: Dataset = Random(Shape((28, 28, 1)), split, [str(n) for n in range(10)])  # type: ignore[assignment]
    settings = TrainingSettings(filters=(32, 64), dense=128)
    inputs = keras.Input((224, 224, 3))
    scaled = keras.layers.Rescaling(1 / 127.5, -1)(inputs)
    resnet = keras.applications.ResNet50(weights=None, classifier_activation=None)
    networks: dict[str, Callable[[], keras.Model]] = {
        "cnn": lambda: build(data, settings),
        "resnet": lambda: keras.Model(inputs, resnet(scaled)),
    }
    for name, network in networks.items():
        file = CACHE / f"{name}.onnx"
        file.write_bytes(to_onnx(serving_function(network())))
        size = 64 if name == "cnn" else 8
        add(name, file, AddSettings(models=CACHE / "models", max_batch_size=size))


def command_line(
    description: str, figures: tuple[str, ...], flags: dict[str, dict[str, Any]]
) -> argparse.Namespace:
    """What was asked for: some of `figures`, all that all benchmarks take, and `flags` of its own."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("figures", nargs="*", metavar="figure", help=f"of {', '.join(figures)}")
    for flag, details in flags.items():
        parser.add_argument(flag, **details)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if unknown := set(arguments.figures) - set(figures):
        parser.error(f"no figure {', '.join(unknown)}: there is {', '.join(figures)}")
    return arguments


def main() -> int:
    if sys.argv[1:2] == ["raw"]:
        onnx, seconds, jpeg = sys.argv[2:5]
        print(json.dumps(raw_images_per_s(onnx, float(seconds), jpeg)))
        return 0
    if sys.argv[1:2] == ["empty-server"]:
        empty_server(sys.argv[2])
        return 0
    figures = ("batches", "singles", "fronts", "resnet", "goodput", "tail", "cores", "soak")
    arguments = command_line(__doc__ or "", figures, {"--rounds": {"type": int, "default": 3}})
    make_models()
    made = Bench(arguments.rounds, arguments.seconds)
    # The soak takes its time: it is run where it is asked for.
    for name in arguments.figures or figures[:-1]:
        getattr(made, name)()
        if arguments.json:
            arguments.json.write_text(json.dumps(made.results, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
