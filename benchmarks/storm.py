"""A storm: requests of every kind and fate at once, and whether each gets its own answer.

python benchmarks/storm.py [--requests 200000] [--acceptors 1] [--engines 0] [--kill-every-s 5]

Starts `convoy serve` with models that answer four sums over the bytes of a row, exact in float32, so
that an answer which belongs to another row, or to a mixture, is seen. Real grpc clients in several
processes ask over both APIs, by single calls and by streams, for 1 to 300 rows at a time; they cancel,
set deadlines too short to be kept, send images that can't be read, and rows on which the model fails
or gives NaN. With several server processes, one of them is killed (-9) now and then. What was answered
how is counted; it exits with 1 if a row was answered wrongly, a call ended in a way that its request
does not explain, or a call never ended.
"""

import argparse
import heapq
import io
import itertools
import math
import multiprocessing
import os
import queue
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip

CLASSIFY = "/convoy.v1.ImageClassifier/Classify"
STREAM = "/convoy.v1.ImageClassifier/ClassifyStream"
INFER = "/inference.GRPCInferenceService/ModelInfer"

SHAPE, CLASSES, MAX_BATCH = (4, 4, 3), 4, 16
BYTES = math.prod(SHAPE)
# Sums of whole numbers below 2**24: float32 holds them exactly, in whatever order they are added.
WEIGHTS = np.random.default_rng(0).integers(0, 1000, (BYTES, CLASSES)).astype(np.float32)

# The first byte of a row that the model gives NaN for, or fails on; of others it is below.
NAN, RAISE, LARGEST = 254, 255, 249

# A call that has not ended after so long is lost: no request takes nearly as much.
LOST_S = 60.0

# Who hears UNAVAILABLE waits so long before he asks again.
BACK_OFF_S = 0.05

# Of each client process: calls in flight, and streams beside them.
WINDOW, STREAMS, STREAM_WINDOW, CHANNELS = 64, 2, 32, 4

Code = grpc.StatusCode
Rows = np.ndarray[Any, Any]


# The model.


def make_models(folder: Path) -> None:
    """Publishes `quick`, and `slow`, which takes some milliseconds a batch; both answer the same."""
    import onnx.parser
    from onnx import numpy_helper

    from convoy_service.artifacts import reader as bundles
    from convoy_service.artifacts.images import Target
    from convoy_service.artifacts.reader import Golden, Manifest

    pixels = np.random.default_rng(1).integers(0, LARGEST, (4, *SHAPE), dtype=np.uint8)
    golden = Golden(pixels, answers(pixels))
    initializers = {
        "weights": WEIGHTS,
        "first_byte": np.array([0]),
        "nan_mark": np.float32(NAN),
        "raise_mark": np.float32(RAISE),
        "nan": np.float32(np.nan),
        "none": np.float32(0),
        "one_zero": np.zeros(1, np.float32),
    }
    for name, rounds in (("quick", 0), ("slow", 60)):
        model = onnx.parser.parse_model(_GRAPH.replace("ROUNDS", str(rounds)))
        for key, value in initializers.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), key))
        manifest = Manifest(
            input="pixels",
            output="sums",
            pixels=Target(*SHAPE),
            labels=[str(n) for n in range(CLASSES)],
            max_batch_size=MAX_BATCH,
            created="2026-01-01T00:00:00+00:00",
        )
        bundles.write(folder / name, manifest, model.SerializeToString(), golden)


_GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
storm (uint8[N, 4, 4, 3] pixels) => (float[N, 4] sums) {
  values = Cast <to = 1> (pixels)
  rows = Flatten <axis = 1> (values)
  right = MatMul (rows, weights)
  first = Gather <axis = 1> (rows, first_byte)
  is_nan = Equal (first, nan_mark)
  nan_or_not = Where (is_nan, nan, none)
  largest = ReduceMax <keepdims = 0> (first)
  is_raise = Equal (largest, raise_mark)
  outside = Cast <to = 7> (is_raise)
  zero = Gather <axis = 0> (one_zero, outside)
  rounds = Constant <value_int = ROUNDS> ()
  yes = Constant <value = bool {1}> ()
  square = Constant <value_ints = [128, 128]> ()
  start = ConstantOfShape <value = float[1] {0.01}> (square)
  end = Loop (rounds, yes, start) <body = work (int64 round, bool go_on, float[128, 128] x) => (bool goes_on, float[128, 128] y) {
    goes_on = Identity (go_on)
    squared = MatMul (x, x)
    y = Tanh (squared)
  }>
  mean = ReduceMean <keepdims = 0> (end)
  nothing = Mul (mean, zero)
  either = Add (right, nan_or_not)
  sums = Add (either, nothing)
}
"""


def answers(pixels: Rows) -> Rows:
    """What the model gives, float32 [N, CLASSES], for uint8 [N, *SHAPE]."""
    return pixels.reshape(len(pixels), BYTES).astype(np.float32) @ WEIGHTS


# Requests and what may become of them.


class Request(NamedTuple):
    api: str
    message: bytes
    expected: Rows
    # Rows that have no answer, and why: INVALID_ARGUMENT or INTERNAL.
    failing: dict[int, int]
    timeout_s: float | None
    cancel_after_s: float | None
    # It has a deadline, either the call's or one in the message.
    limited: bool


class Verdict(NamedTuple):
    outcome: str
    wrong_rows: int = 0
    # It ended in a way that the request does not explain.
    unexplained: str = ""


class Storm:
    """Draws requests, and judges what they were answered."""

    def __init__(self, seed: int, kills: bool) -> None:
        self._rng, self._kills = np.random.default_rng(seed), kills

    def chance(self, probability: float) -> bool:
        return bool(self._rng.random() < probability)

    def some_s(self, least: float, most: float) -> float:
        """A time, short ones as likely as long ones."""
        return float(np.exp(self._rng.uniform(np.log(least), np.log(most))))

    def some(self, least: int, most: int) -> int:
        return int(self._rng.integers(least, most + 1))

    def size(self) -> int:
        kind = self._rng.random()
        for share, least, most in ((0.6, 1, 1), (0.8, 2, 4), (0.93, 5, 16), (0.99, 17, 64)):
            if kind < share:
                return self.some(least, most)
        return self.some(65, 300)

    def request(self, api: str) -> Request:
        size = self.size()
        pixels = self._rng.integers(0, LARGEST, (size, *SHAPE), dtype=np.uint8, endpoint=True)
        expected = answers(pixels)
        failing: dict[int, int] = {}
        for mark, probability in ((NAN, 0.01), (RAISE, 0.005)):
            if self.chance(probability):
                row = self.some(0, size - 1)
                pixels[row, 0, 0, 0] = mark
                failing[row] = Code.INTERNAL.value[0]
        broken = self.some(0, size - 1) if self.chance(0.02) else None
        if broken is not None:
            failing[broken] = Code.INVALID_ARGUMENT.value[0]
        model = "slow" if self.chance(0.05) else "quick"
        encode = size <= 8 and self.chance(0.1)
        limit_s = self.some_s(0.001, 0.3) if self.chance(0.05) and api == INFER else None
        if api == INFER:
            message = self._infer(model, pixels, encode, broken, limit_s)
        else:
            message = self._classify(model, pixels, encode, broken)
        timeout_s = self.some_s(0.0005, 0.3) if self.chance(0.12) else None
        cancel_after_s = self.some_s(0.0001, 0.05) if self.chance(0.1) else None
        limited = timeout_s is not None or limit_s is not None
        return Request(api, message, expected, failing, timeout_s, cancel_after_s, limited)

    def _infer(
        self, model: str, pixels: Rows, encode: bool, broken: int | None, limit_s: float | None
    ) -> bytes:
        request = oip.ModelInferRequest(model_name=model)
        tensor = request.inputs.add(name="pixels", datatype="UINT8", shape=pixels.shape)
        if encode or broken is not None:
            tensor.datatype = "BYTES"
            tensor.shape[:] = [len(pixels)]
            images = [b"?" if n == broken else png(image) for n, image in enumerate(pixels)]
            request.raw_input_contents.append(
                b"".join(struct.pack("<I", len(image)) + image for image in images)
            )
        elif self.chance(0.05):
            tensor.contents.uint_contents.extend(pixels.ravel().tolist())
        else:
            request.raw_input_contents.append(pixels.tobytes())
        if limit_s is not None:
            request.parameters["timeout"].int64_param = int(limit_s * 1e6)
        if self.chance(0.1):
            request.parameters["priority"].uint64_param = self.some(0, 4)
        return request.SerializeToString()

    def _classify(self, model: str, pixels: Rows, encode: bool, broken: int | None) -> bytes:
        request = pb.ClassifyRequest(model=model, top_k=CLASSES)
        height, width, channels = SHAPE
        for n, image in enumerate(pixels):
            if n == broken:
                request.images.add(encoded=b"?")
            elif encode and n % 2:
                request.images.add(encoded=png(image))
            else:
                added = request.images.add().pixels
                added.data, added.height = image.tobytes(), height
                added.width, added.channels = width, channels
        return request.SerializeToString()

    def judge(
        self, request: Request, code: int, words: str, answer: Any, cancelled: bool
    ) -> Verdict:
        """`answer` is a ClassifyResponse or the bytes of a ModelInferResponse where `code` is OK."""
        if code == 0:
            if request.api == INFER:
                wrong = _wrong_outputs(request, oip.ModelInferResponse.FromString(answer))
            else:
                wrong = _wrong_results(request, answer)
            return Verdict("in part" if request.failing else "answered", wrong)
        outcome, explained = self._explain(request, code, words, cancelled)
        return Verdict(outcome, 0, "" if explained else f"{outcome}: {words}")

    def _explain(
        self, request: Request, code: int, words: str, cancelled: bool
    ) -> tuple[str, bool]:
        reasons = request.failing.values()
        if code == Code.INVALID_ARGUMENT.value[0]:
            rows = [n for n, why in request.failing.items() if why == code]
            return "invalid", request.api == INFER and words.startswith(f"image {rows[0]}: ")
        if code == Code.INTERNAL.value[0]:
            rows = sorted(n for n, why in request.failing.items() if why == code)
            all_failed = len(request.expected) == len(reasons)
            said = f"the model failed on image {', '.join(map(str, rows))}"
            every = "the model failed on" in words and all_failed
            return "failed", bool(rows) and (every or (request.api == INFER and words == said))
        explained = {
            Code.CANCELLED: ("cancelled", cancelled),
            Code.DEADLINE_EXCEEDED: ("late", request.limited),
            Code.RESOURCE_EXHAUSTED: ("refused", True),
            Code.UNAVAILABLE: ("unavailable", self._kills),
        }
        return explained.get(_code(code), (_code(code).name, False))


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in Code if code.value[0] == number)


def _wrong_outputs(request: Request, response: oip.ModelInferResponse) -> int:
    expected, (output,) = request.expected, response.outputs
    if tuple(output.shape) != expected.shape or request.failing:
        return len(expected)
    if response.raw_output_contents:
        values = np.frombuffer(response.raw_output_contents[0], "<f4")
    else:
        values = np.array(output.contents.fp32_contents, np.float32)
    return int((values.reshape(expected.shape) != expected).any(axis=1).sum())


def _wrong_results(request: Request, response: pb.ClassifyResponse) -> int:
    results, expected = response.results, request.expected
    if len(results) != len(expected):
        return len(expected)
    found, wrong = np.full(expected.shape, np.nan, np.float32), 0
    for n, result in enumerate(results):
        code = request.failing.get(n, 0)
        if code:
            found[n] = expected[n]
            wrong += result.error.code != code
        else:
            for label in result.classification.labels:
                found[n, label.index] = label.probability
    return wrong + int((found != expected).any(axis=1).sum())


def png(pixels: Rows) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# The clients.


class Client:
    """One process: calls in flight, and streams beside them, until so many requests have ended."""

    def __init__(self, target: str, requests: int, seed: int, kills: bool) -> None:
        self._storm = Storm(seed, kills)
        options = [
            ("grpc.enable_retries", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 50),
            # Also how long a connection may take, behind what the server is busy with.
            ("grpc.min_reconnect_backoff_ms", 2000),
            ("grpc.max_reconnect_backoff_ms", 500),
        ]
        self._channels = [grpc.insecure_channel(target, options) for _ in range(CHANNELS)]
        self._left, self._seed, self._kills = itertools.count(1), seed, kills
        self._requests = requests
        # (api, outcome) -> requests, and their rows.
        self.counts: Counter[tuple[str, str]] = Counter()
        self.rows: Counter[str] = Counter()
        self.examples: list[str] = []
        self._lock = threading.Lock()

    def next_one(self) -> bool:
        return next(self._left) <= self._requests

    def count(self, kind: str, request: Request, verdict: Verdict) -> None:
        with self._lock:
            self.counts[kind, verdict.outcome] += 1
            self.rows["all"] += len(request.expected)
            self.rows["wrong"] += verdict.wrong_rows
            if verdict.unexplained:
                self.counts[kind, "unexplained"] += 1
            if (verdict.wrong_rows or verdict.unexplained) and len(self.examples) < 20:
                self.examples.append(
                    f"{kind}: {len(request.expected)} rows, failing {request.failing}, wrong rows "
                    f"{verdict.wrong_rows} {verdict.unexplained}"
                )

    def run(self) -> None:
        streams = [_Stream(self, channel, self._seed * 100 + n, self._kills)
                   for n, channel in enumerate(self._channels[:STREAMS])]  # fmt: skip
        for stream in streams:
            stream.thread.start()
        self._calls()
        for stream in streams:
            stream.join()
        for channel in self._channels:
            channel.close()

    def _calls(self) -> None:
        storm, ended = self._storm, queue.SimpleQueue[_Call]()
        calls: dict[_Call, None] = {}
        cancels: list[tuple[float, int, _Call]] = []
        numbers, more, again_at = itertools.count(), True, 0.0
        methods = {
            (n, api): channel.unary_unary(api)
            for n, channel in enumerate(self._channels)
            for api in (CLASSIFY, INFER)
        }
        while more or calls:
            idle = time.monotonic() < again_at
            while not idle and len(calls) < WINDOW and (more := more and self.next_one()):
                api = INFER if storm.chance(0.5) else CLASSIFY
                request, number = storm.request(api), next(numbers)
                method = methods[number % CHANNELS, api]
                call = _Call(
                    request, time.monotonic(), method.future(request.message, request.timeout_s)
                )
                calls[call] = None
                if request.cancel_after_s is not None:
                    heapq.heappush(cancels, (call.sent + request.cancel_after_s, number, call))
                call.future.add_done_callback(lambda _, call=call: ended.put(call))  # type: ignore[misc]
            until = again_at if idle else time.monotonic() + 1.0
            if cancels:
                until = min(until, cancels[0][0])
            try:
                while True:
                    call = ended.get(timeout=max(0.0, until - time.monotonic()))
                    if call in calls:
                        del calls[call]
                        if self._settle(call) == "unavailable":
                            again_at = time.monotonic() + BACK_OFF_S
                    if ended.empty():
                        break
            except queue.Empty:
                pass
            now = time.monotonic()
            while cancels and cancels[0][0] <= now:
                call = heapq.heappop(cancels)[2]
                call.cancelled = call.future.cancel() or call.cancelled
            for call in list(calls):
                if now < call.sent + LOST_S:
                    break
                del calls[call]
                self.count(_NAMES[call.request.api], call.request, Verdict("lost"))

    def _settle(self, call: "_Call") -> str:
        request, code = call.request, call.future.code().value[0]
        answer: Any = None
        if not code:
            answer = call.future.result()
            if request.api == CLASSIFY:
                answer = pb.ClassifyResponse.FromString(answer)
        verdict = self._storm.judge(
            request, code, call.future.details() or "", answer, call.cancelled
        )
        self.count(_NAMES[request.api], request, verdict)
        return verdict.outcome


_NAMES = {CLASSIFY: "Classify", INFER: "ModelInfer"}


@dataclass(eq=False)
class _Call:
    request: Request
    sent: float
    future: Any
    cancelled: bool = False


class _Stream:
    """Streams, one after another, some cancelled or cut off by a deadline half-way."""

    def __init__(self, client: Client, channel: grpc.Channel, seed: int, kills: bool) -> None:
        self._client, self._storm = client, Storm(seed, kills)
        self._open = channel.stream_stream(
            STREAM,
            request_serializer=pb.ClassifyStreamRequest.SerializeToString,
            response_deserializer=pb.ClassifyStreamResponse.FromString,
        )
        self._owed: dict[str, Request] = {}
        self._moved, self._call = time.monotonic(), None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def join(self) -> None:
        """Waits for the end, and counts what is lost where it never comes."""
        while self.thread.is_alive():
            self.thread.join(1.0)
            if time.monotonic() > self._moved + LOST_S:
                for request in self._owed.values():
                    self._client.count("ClassifyStream", request, Verdict("lost"))
                return

    def _run(self) -> None:
        more = True
        while more:
            more = self._one()

    def _one(self) -> bool:
        """One stream, to its end; whether there is to be another."""
        storm, client, more = self._storm, self._client, True
        timeout_s = storm.some_s(0.002, 1.0) if storm.chance(0.1) else None
        cancel_at = storm.some(0, 100) if storm.chance(0.1) else -1
        messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        call = self._open(iter(messages.get, None), timeout_s)
        owed = self._owed = {}
        sent, wanted, cancelled, code = 0, storm.some(1, 300), False, 0
        try:
            while True:
                while len(owed) < STREAM_WINDOW and sent < wanted and more:
                    if not (more := client.next_one()):
                        break
                    request = storm.request(CLASSIFY)
                    owed[str(sent)] = request
                    parsed = pb.ClassifyRequest.FromString(request.message)
                    messages.put(pb.ClassifyStreamRequest(id=str(sent), request=parsed))
                    sent += 1
                    if sent == cancel_at:
                        cancelled = call.cancel()
                if sent == wanted or not more:
                    messages.put(None)
                answer = next(call)
                self._moved = time.monotonic()
                self._take(owed, answer, timeout_s is not None)
        except StopIteration:
            words = "the stream ended without an answer"
        except grpc.RpcError:
            code, words = call.code().value[0], call.details() or ""
            if call.code() is Code.UNAVAILABLE:
                time.sleep(BACK_OFF_S)
        finally:
            messages.put(None)
        for asked in owed.values():
            request = asked._replace(failing={}, limited=timeout_s is not None)
            if code:
                client.count(
                    "ClassifyStream", request, storm.judge(request, code, words, None, cancelled)
                )
            else:
                client.count("ClassifyStream", request, Verdict("lost"))
        return more

    def _take(
        self, owed: dict[str, Request], answer: pb.ClassifyStreamResponse, limited: bool
    ) -> None:
        request = owed.pop(answer.id, None)
        if request is None:
            raise SystemExit(f"an answer to {answer.id!r}, which nobody asked, or a second one")
        error = answer.error if answer.HasField("error") else None
        code, words = (error.code, error.message) if error else (0, "")
        verdict = self._storm.judge(
            request._replace(limited=limited), code, words, answer.response, False
        )
        self._client.count("ClassifyStream", request, verdict)


def client(pipe: Connection, target: str, requests: int, seed: int, kills: bool) -> None:
    """One client process; tells its counts twice a second and at the end."""
    made = Client(target, requests, seed, kills)
    working = threading.Thread(target=made.run, daemon=True)
    working.start()
    while working.is_alive():
        working.join(0.5)
        pipe.send((Counter(made.counts), Counter(made.rows), made.examples))
    pipe.send(None)


# The server.


class Server:
    """`convoy serve` as a person starts it, its log, and who of its processes is up."""

    def __init__(self, models: Path, log: Path, acceptors: int, engines: int) -> None:
        self.log = log
        self._count = {"acceptor": acceptors, "engine": engines}
        command = [sys.executable, "-m", "convoy", "serve", "--models", str(models)]
        command += ["--host", "127.0.0.1", "--port", "0", "--metrics-port", "0", "--no-http"]
        command += ["--shutdown-delay-s", "0", "--max-in-flight", "200"]
        command += ["--acceptors", str(acceptors), "--engines", str(engines)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.up: dict[str, int] = {}
        self.target = self.metrics = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(60) or not self.target:
            raise SystemExit(f"the server did not start: {log.read_text()}")

    def _read(self) -> None:
        assert self.process.stderr
        with self.log.open("w") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()
                if match := re.search(r": (\S+) is ready \(pid (\d+)\)", line):
                    self.up[match[1]] = int(match[2])
                elif match := re.search(r"gRPC on (\S+), metrics on (\S+)", line):
                    self.target, self.metrics = match[1], match[2]
                    self._ready.set()
        self._ready.set()

    def kill(self, role: str) -> bool:
        """Kills the one with this role that has been up longest, where all of that role are up: the
        others go on.
        """
        up = [name for name in self.up if name.startswith(role)]
        if len(up) < self._count[role]:
            return False
        os.kill(self.up.pop(up[0]), signal.SIGKILL)
        return True

    def counted(self) -> dict[str, float]:
        with urllib.request.urlopen(self.metrics, timeout=10) as response:
            lines = response.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def stop(self) -> list[str]:
        """What is wrong with its end, and with what it said before."""
        wrong = []
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
        self.process.send_signal(signal.SIGTERM)
        if status := self.process.wait(60):
            wrong.append(f"the server ended with status {status}")
        self._reader.join(10)
        wrong += [line for line in self.log.read_text().splitlines() if "CRITICAL" in line]
        return wrong


# The whole.


def storm(arguments: argparse.Namespace, folder: Path) -> int:
    make_models(folder / "models")
    several = arguments.acceptors > 1 or arguments.engines > 0
    roles = itertools.cycle(["acceptor", "engine"] if arguments.engines else ["acceptor"])
    kills = several and arguments.kill_every_s > 0
    log = arguments.log or folder / "server.log"
    server = Server(folder / "models", log, arguments.acceptors, arguments.engines)
    spawn, began = multiprocessing.get_context("spawn"), time.monotonic()
    processes, pipes = [], {}
    for n in range(arguments.processes):
        ours, theirs = spawn.Pipe()
        share = arguments.requests // arguments.processes
        process = spawn.Process(
            target=client, args=(theirs, server.target, share, arguments.seed + n, kills)
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes[ours] = n
    told: dict[int, Any] = {}
    killed: Counter[str] = Counter()
    wrong, running, due, shown = [], dict(pipes), began + arguments.kill_every_s, began
    while running:
        for pipe in wait(list(running), 0.5):
            assert isinstance(pipe, Connection)
            try:
                said = pipe.recv()
            except EOFError:
                wrong.append("a client process has died")
                said = None
            if said is None:
                del running[pipe]
            else:
                told[pipes[pipe]] = said
        now = time.monotonic()
        if kills and now >= due:
            role = next(roles)
            killed[role] += server.kill(role)
            due = now + arguments.kill_every_s
        if now >= shown + 10:
            shown = now
            done = sum(sum(_requests(counts).values()) for counts, _, _ in told.values())
            print(f"{done} requests after {now - began:.0f} s", file=sys.stderr, flush=True)
    took_s = time.monotonic() - began
    for process in processes:
        process.join()
    counts = sum((each[0] for each in told.values()), Counter())
    rows = sum((each[1] for each in told.values()), Counter())
    for example in itertools.chain.from_iterable(each[2] for each in told.values()):
        print(example, file=sys.stderr)
    wrong += server.stop()
    ended = sum(_requests(counts).values())
    if ended != (missing := arguments.requests // arguments.processes * arguments.processes):
        wrong.append(f"{ended} of {missing} requests were counted")
    if wrong_rows := rows["wrong"]:
        wrong.append(f"{wrong_rows} rows were answered wrongly")
    for what in ("lost", "unexplained"):
        if count := sum(value for (_, outcome), value in counts.items() if outcome == what):
            wrong.append(f"{count} requests: {what}")
    print(
        f"acceptors {arguments.acceptors}, engines {arguments.engines}: {ended} requests, "
        f"{rows['all']} rows, in {took_s:.0f} s"
    )
    print("\n".join(_table(counts)))
    if kills:
        print("killed: " + ", ".join(f"{count} x {role}" for role, count in killed.items()))
    print(f"rows answered wrongly: {rows['wrong']}")
    print("\n".join(wrong) or "nothing lost, nothing unexplained")
    return 1 if wrong else 0


def _requests(counts: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    return Counter({key: value for key, value in counts.items() if key[1] != "unexplained"})


def _table(counts: Counter[tuple[str, str]]) -> Iterator[str]:
    kinds = ("Classify", "ModelInfer", "ClassifyStream")
    outcomes = [
        "answered", "in part", "failed", "invalid", "cancelled", "late", "refused", "unavailable",
        "lost", "unexplained",
    ]  # fmt: skip
    outcomes += sorted({outcome for _, outcome in counts} - set(outcomes))
    yield f"| outcome | {' | '.join(kinds)} | all |"
    yield "|---|---|---|---|---|"
    for outcome in outcomes:
        numbers = [counts[kind, outcome] for kind in kinds]
        yield f"| {outcome} | {' | '.join(map(str, numbers))} | {sum(numbers)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--acceptors", type=int, default=1)
    parser.add_argument("--engines", type=int, default=0)
    parser.add_argument("--kill-every-s", type=float, default=5.0, help="0 for never")
    parser.add_argument("--processes", type=int, default=2, help="client processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file for the server's log")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return storm(arguments, Path(folder))


if __name__ == "__main__":
    raise SystemExit(main())
