"""Acceptors, engines and their supervisor as processes of their own: answers, deaths, drains."""

import contextlib
import functools
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import onnx.parser
import pytest
from grpc_health.v1 import health_pb2

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle, Golden
from convoy_service.engine.onnx_model import Model
from convoy_training.export.import_onnx import add
from convoy_training.settings import AddSettings
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.integration.conftest import Gate, classifier_on, inference_on, wait_until
from tests.integration.models import (
    COLOURS_BATCH,
    FAST_IMAGE,
    SLOW_BATCH,
    SLOW_IMAGE,
    add_colours,
    add_slow,
    colours_of,
    flip_a_byte,
    slow_of,
)
from tests.integration.pictures import encoded, noise, probabilities, raw, solid
from tests.integration.test_batching import SIZES, random_request
from tests.integration.test_inference_protocol import infer_request, outputs_of, raw_pixels
from tests.integration.test_life import NOT_SERVING, SERVICES, SERVING, check, health_on

TWO_ALONE = ("--acceptors", "2")
ONE_AND_ONE = ("--acceptors", "1", "--engines", "1")
TWO_AND_TWO = ("--acceptors", "2", "--engines", "2")
TOPOLOGIES = {"2 acceptors": TWO_ALONE, "1 and 1": ONE_AND_ONE, "2 and 2": TWO_AND_TWO}

UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
# As slow as a `Gate` makes it.
FAST = pb.ClassifyRequest(model="slow", images=[raw(FAST_IMAGE)])
RED = pb.ClassifyRequest(model="colours", images=[raw(solid("red"))])


# Who is there.


def pid_of(server: Server, name: str) -> int:
    """The process that was the last to become ready under this name."""
    return int(re.findall(rf": {name} is ready \(pid (\d+)\)", server.log)[-1])


def kill(server: Server, name: str) -> Callable[[], None]:
    """Kills a worker; what is returned waits until the next one is ready."""
    ready, died = rf": {name} is ready \(pid", rf": {name} died"
    times = [len(re.findall(line, server.log)) + 1 for line in (ready, died)]
    os.kill(pid_of(server, name), signal.SIGKILL)
    server.wait_for(rf"(?:{died}[\s\S]*?){{{times[1]}}}")

    def replaced() -> None:
        server.wait_for(rf"(?:{ready}[\s\S]*?){{{times[0]}}}")

    return replaced


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(folder: Path) -> list[int]:
    """The processes that were started in this working directory, and still run."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (each / "cwd").readlink() == folder:
                found.append(int(each.name))
    return found


def wait_until_gone(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(pid)
            assert select.select([ended], [], [], TIMEOUT_S)[0], f"{pid} is still there"
            os.close(ended)


def cpu_ticks(pid: int) -> int:
    """Processor time that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# What is asked.


class Traffic:
    """Callers on connections of their own, each of whom asks for another image as soon as he is
    answered; they check what they are answered, and count by status.
    """

    def __init__(self, server: Server, callers: int = 4) -> None:
        self._target = server.target
        self._changed = threading.Condition()
        self._stopped = False
        self.codes: Counter[grpc.StatusCode] = Counter()
        self.wrong: list[Any] = []
        self._channels = [self._channel() for _ in range(callers)]
        self._threads = [
            threading.Thread(target=self._ask, args=(n, channel))
            for n, channel in enumerate(self._channels)
        ]

    def _channel(self) -> grpc.Channel:
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        options += [("grpc.initial_reconnect_backoff_ms", 50)]
        options += [("grpc.min_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 50)]
        return grpc.insecure_channel(self._target, options)

    def _ask(self, caller: int, channel: grpc.Channel) -> None:
        chance = random.Random(caller)
        while not self._stopped:
            pixels = noise(chance.randrange(2**32), chance.choice(SIZES), (4, 4, 3))
            message = pb.ClassifyRequest(model="colours", images=map(raw, pixels), top_k=3)
            code = grpc.StatusCode.OK
            try:
                # A call that finds no connection is not one that the server has lost.
                response = classifier_on(channel).Classify(
                    message, timeout=TIMEOUT_S, wait_for_ready=True
                )
            except grpc.RpcError as error:
                code = error.code()
            except ValueError:  # the channel is closed
                return
            else:
                found = np.array([probabilities(result) for result in response.results])
                if not np.allclose(found, colours_of(pixels), atol=1e-6):
                    self.wrong.append((pixels, found))
            with self._changed:
                if not self._stopped:
                    self.codes[code] += 1
                self._changed.notify_all()

    def wait_for_more(self, answers: int = 50) -> None:
        """Waits until so many more calls have been answered."""
        with self._changed:
            before = self.codes[grpc.StatusCode.OK]
            assert self._changed.wait_for(
                lambda: self.codes[grpc.StatusCode.OK] >= before + answers, TIMEOUT_S
            ), self.codes

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
        for channel in self._channels:
            channel.close()
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        assert not self.wrong, self.wrong[0]


class Counters:
    """Looks at /metrics again and again: what only ever grows must not shrink, nor vanish."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._stopped = False
        self.looks = 0
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        before: dict[str, float] = {}
        while not self._stopped:
            now = self._server.metrics()
            for name, value in before.items():
                grows = name.partition("{")[0].endswith(("_total", "_count", "_sum", "_bucket"))
                if grows and now.get(name, -1.0) < value:
                    self.wrong.append(f"{name}: {value} -> {now.get(name)}")
            before, self.looks = now, self.looks + 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join(TIMEOUT_S)
        assert self.looks > 1
        assert not self.wrong, self.wrong


_WIDE = """
<ir_version: 10, opset_import: ["" : 18]>
wide (float[N, 64, 64, 3] image) => (float[N, 3] scores) {
  axes = Constant <value_ints = [1, 2]> ()
  scores = ReduceMean <keepdims = 0> (image, axes)
}
"""

# Its answer to a black image tells how many rows it ran with; to others, less and less.
_CROWD = """
<ir_version: 10, opset_import: ["" : 18]>
crowd (uint8[N, 2, 2, 1] image) => (float[N, 2] scores) {
  values = Cast <to = 1> (image)
  axes = Constant <value_ints = [1, 2]> ()
  means = ReduceMean <keepdims = 0> (values, axes)
  size = Shape <start = 0, end = 1> (image)
  rows = Cast <to = 1> (size)
  thousand = Constant <value_float = 1000.0> ()
  share = Div (rows, thousand)
  one = Constant <value_float = 1.0> ()
  grey = Add (means, one)
  crowded = Div (share, grey)
  rest = Sub (one, crowded)
  scores = Concat <axis = 1> (crowded, rest)
}
"""
CROWD_BATCH = 8


def add_wide(models: Path) -> None:
    """`colours` for images so large that many of them are more than goes to an engine at once."""
    settings = AddSettings(models=models, scale=(1 / 51,), softmax=True, max_batch_size=64)
    onnx.save(onnx.parser.parse_model(_WIDE), models / "wide.onnx")
    add("wide", models / "wide.onnx", settings)


def add_crowd(models: Path, like: Bundle) -> None:
    """A model whose answers tell the size of the batch, in thousandths."""
    data = onnx.parser.parse_model(_CROWD).SerializeToString()
    # So bright that the size of the batch is below the tolerance of the proof.
    pixels = np.full((1, 2, 2, 1), 255, np.uint8)
    golden = Golden(pixels, Model(data).run(pixels))
    manifest = replace(
        like.manifest,
        output="scores",
        labels=["crowded", "rest"],
        max_batch_size=CROWD_BATCH,
    )
    bundles.write(models / "crowd", manifest, data, golden)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """Four models that have little in common."""
    folder = tmp_path_factory.mktemp("many")
    for name in ("digits", "colours"):
        shutil.copytree(models / name, folder / name)
    add_wide(folder)
    add_slow(folder)
    return folder


@pytest.fixture(scope="module")
def serving(many: Path, gate: Gate) -> Iterator[Callable[..., Server]]:
    """Starts a server for the same models in each topology that is asked for. Nothing goes wrong there."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(*arguments: str) -> Server:
            server = Server(*arguments, models=many, variables=gate.variables)
            stack.callback(lambda: logs.append(server.log))
            return stack.enter_context(server).ready()

        logs: list[str] = []
        yield start
    for log in logs:
        assert "Traceback" not in log
        assert "ERROR" not in log


@pytest.fixture(scope="module")
def mortal(
    tmp_path_factory: pytest.TempPathFactory, slow_models: Path, gate: Gate
) -> Iterator[tuple[Server, Path]]:
    """A server to be killed in part, and its models."""
    folder = tmp_path_factory.mktemp("mortal") / "models"
    shutil.copytree(slow_models, folder)
    add_colours(folder)
    add_colours(folder, "newest")
    (add_colours(folder, "newest").folder / "model.onnx").write_bytes(b"")
    with Server(*ONE_AND_ONE, models=folder, variables=gate.variables) as server:
        yield server.ready(), folder
    assert "Traceback" not in server.log


in_all = pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
Start = Callable[..., Server]


# Answers.


@in_all
def test_answers_are_those_of_one_process(
    serving: Start, topology: tuple[str, ...], offline: Model
) -> None:
    several = serving(*topology)
    chance = random.Random(0)
    requests = []
    for seed in range(200):
        size = chance.choice(SIZES)
        if chance.random() < 0.5:
            pixels = noise(seed, size, (4, 4, 3))
            requests.append(random_request(chance, "colours", "image", pixels, colours_of(pixels)))
        else:
            pixels = noise(seed, size, (8, 8, 1))
            requests.append(random_request(chance, "digits", "pixels", pixels, offline.run(pixels)))
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(several.channel()) for _ in range(4)]
        futures = [request.send(channels[n % 4]) for n, request in enumerate(requests)]
        for request, future in zip(requests, futures, strict=True):
            request.check(future)
        stream = [
            pb.ClassifyStreamRequest(id=str(n), request=request.message)
            for n, request in enumerate(requests)
            if request.service == "ImageClassifier"
        ]
        answers = classifier_on(channels[0]).ClassifyStream(iter(stream), timeout=TIMEOUT_S)
        found = {int(answer.id): answer.response for answer in answers}
    assert len(found) == len(stream)
    for n, response in found.items():
        received = np.array([probabilities(result) for result in response.results])
        np.testing.assert_allclose(received, requests[n].expected, atol=1e-6)


@in_all
def test_thousands_of_images_in_a_request_keep_their_order(
    serving: Start, topology: tuple[str, ...]
) -> None:
    several = serving(*topology)
    # 50 MB in all: engines get them in parts.
    small = noise(1, 4096, (4, 4, 3))
    pixels = small.repeat(16, axis=1).repeat(16, axis=2)
    request = infer_request("wide", "image")
    raw_pixels(request, pixels)
    few = noise(2, 5, (4, 4, 3))
    with several.channel() as channel:
        large = inference_on(channel).ModelInfer.future(request, timeout=TIMEOUT_S)
        meanwhile = classifier_on(channel).Classify(
            pb.ClassifyRequest(model="colours", images=map(encoded, few), top_k=3)
        )
        # Sums of so many pixels are rounded.
        np.testing.assert_allclose(outputs_of(large.result()), colours_of(small), atol=1e-4)
    found = np.array([probabilities(result) for result in meanwhile.results])
    np.testing.assert_allclose(found, colours_of(few), atol=1e-6)


@pytest.mark.parametrize("topology", [ONE_AND_ONE, TWO_AND_TWO], ids=["1 and 1", "2 and 2"])
def test_deadlines_timeouts_and_cancels_end_calls_whose_rows_then_never_run(
    serving: Start, gate: Gate, topology: tuple[str, ...]
) -> None:
    several = serving(*topology)
    rows, outcomes = 'convoy_batch_size_sum{model="slow"}', 'convoy_images_total{model="slow"'
    several.wait_until_in_flight(0)
    before = several.metrics()
    blocker = pb.ClassifyRequest(model="slow", images=[raw(FAST_IMAGE)] * 2 * SLOW_BATCH)
    limited = infer_request("slow", "image")
    raw_pixels(limited, FAST_IMAGE[np.newaxis])
    limited.parameters["timeout"].int64_param = 500_000
    with several.channel() as channel, gate.shut("slow") as open_gate:
        classify, infer = classifier_on(channel).Classify, inference_on(channel).ModelInfer
        # One for each engine.
        blockers = [classify.future(blocker, timeout=TIMEOUT_S) for _ in range(2)]
        several.wait_until_in_flight(2)
        late = [classify.future(FAST, timeout=0.5), infer.future(limited, timeout=TIMEOUT_S)]
        given_up = [classify.future(FAST, timeout=TIMEOUT_S) for _ in range(3)]
        over = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in late:
            assert call.code() in over
        several.wait_until_in_flight(5)
        for call in given_up:
            call.cancel()
        several.wait_until_in_flight(2)
        open_gate()
        for call in blockers:
            assert len(call.result().results) == 2 * SLOW_BATCH
        assert classify(FAST).results[0].HasField("classification")
    several.wait_until_in_flight(0)
    ran = before.get(rows, 0.0) + 4 * SLOW_BATCH + 1
    several.wait_for_metric(rows, ran)
    metrics = several.metrics()
    assert metrics[rows] == ran, "an abandoned image was run"
    assert metrics.get('convoy_rows_run_after_deadline_total{model="slow"}', 0.0) == 0
    counted = [
        metrics.get(each, 0.0) - before.get(each, 0.0)
        for each in (f'{outcomes},outcome="{name}"}}' for name in ("cancelled", "late", "refused"))
    ]
    # Of a deadline that is over while it is sent nobody hears.
    assert sum(counted) in (4, 5)


def test_priorities_go_first(serving: Start, gate: Gate) -> None:
    server = serving(*ONE_AND_ONE)
    with server.channel() as channel:
        infer, order = inference_on(channel).ModelInfer, list[str]()
        blocker = infer_request("slow", "image")
        raw_pixels(blocker, np.repeat(SLOW_IMAGE[np.newaxis], SLOW_BATCH, axis=0))

        def ask(name: str, priority: int) -> Any:
            request = oip.ModelInferRequest()
            request.CopyFrom(blocker)
            request.parameters["priority"].int64_param = priority
            call = infer.future(request, timeout=TIMEOUT_S)
            call.add_done_callback(lambda call: order.append(name))
            return call

        with gate.shut("slow"):
            calls = [ask("running", 0)]
            server.wait_until_in_flight(1)
            for n in range(3):
                calls.append(ask(f"common {n}", 0))
                server.wait_until_in_flight(n + 2)
            calls.append(ask("urgent", 1))
            server.wait_until_in_flight(5)
        for call in calls:
            call.result()
        wait_until(lambda: len(order) == 5)
    assert order.index("urgent") <= 1


def test_deterministic_answers_do_not_depend_on_the_company(tmp_path: Path) -> None:
    add_crowd(tmp_path, add_slow(tmp_path))
    black = np.zeros((1, 2, 2, 1), np.uint8)
    alone, company = infer_request("crowd", "image"), infer_request("crowd", "image")
    raw_pixels(alone, black)
    raw_pixels(company, np.repeat(black, CROWD_BATCH - 1, axis=0))
    found = {}
    for arguments in ((), ("--deterministic",)):
        with (
            Server(*ONE_AND_ONE, *arguments, models=tmp_path) as server,
            server.ready().channel() as channel,
        ):
            infer = inference_on(channel).ModelInfer
            answers = [outputs_of(infer(request)) for request in (alone, company)]
            found[arguments] = {float(row[0]) for answer in answers for row in answer}
    assert found[()] == {np.float32(0.001), np.float32(0.007)}
    assert found["--deterministic",] == {np.float32(0.008)}


def test_one_connection_keeps_all_engines_busy_and_receipts_agree_with_metrics(
    models: Path,
) -> None:
    with (
        Server("--acceptors", "1", "--engines", "2", models=models) as server,
        server.ready().channel() as channel,
    ):
        classify = classifier_on(channel).Classify
        engines = [pid_of(server, f"engine-{n}") for n in range(2)]
        before = {pid: cpu_ticks(pid) for pid in engines}
        receipts = []
        pixels = noise(3, 4096, (4, 4, 3))
        requests = [
            pb.ClassifyRequest(model="colours", images=map(raw, pixels[n : n + n % 20 + 1]))
            for n in range(300)
        ]
        deadline = time.monotonic() + TIMEOUT_S
        while min(cpu_ticks(pid) - before[pid] for pid in engines) < 10:
            assert time.monotonic() < deadline, "an engine idles"
            calls = [classify.future(request, timeout=TIMEOUT_S) for request in requests]
            receipts += [call.result().timings for call in calls]
        server.wait_until_in_flight(0)
        counts = 'convoy_stage_seconds_count{{model="colours",stage="{}"}}'
        for stage in ("decode", "queue", "run"):
            server.wait_for_metric(counts.format(stage), len(receipts))
        metrics = server.metrics()
    for stage in ("decode", "queue", "run"):
        sums = 'convoy_stage_seconds_{}{{model="colours",stage="' + stage + '"}}'
        assert metrics[sums.format("count")] == len(receipts)
        told = sum(getattr(receipt, f"{stage}_s") for receipt in receipts)
        assert metrics[sums.format("sum")] == pytest.approx(told)
    images = len(receipts) // len(requests) * sum(len(each.images) for each in requests)
    assert metrics['convoy_batch_size_sum{model="colours"}'] == images
    assert metrics['convoy_images_total{model="colours",outcome="ok"}'] == images
    assert max(receipt.batch_size for receipt in receipts) <= COLOURS_BATCH


# Deaths.


COUNTED = ("convoy_stage", "convoy_batch", "convoy_images", "convoy_requests")


def counted(server: Server) -> dict[str, float]:
    return {name: n for name, n in server.metrics().items() if name.startswith(COUNTED)}


def test_the_death_of_an_engine_or_an_acceptor_costs_nobody_but_those_it_served(
    models: Path,
) -> None:
    with Server(*TWO_AND_TWO, models=models) as server:
        with Counters(server.ready()), Traffic(server) as traffic:
            for name in ("engine-0", "acceptor-1", "engine-1", "acceptor-0"):
                traffic.wait_for_more()
                replaced = kill(server, name)
                assert server.http("/readyz")[0] == 200
                with server.channel() as channel:
                    # Of the acceptors it may have the one that is about to be found dead.
                    answer = classifier_on(channel).Classify(RED, wait_for_ready=True)
                    assert answer.results[0].HasField("classification")
                    assert check(channel, "colours") == SERVING
                traffic.wait_for_more()
                replaced()
            traffic.wait_for_more(200)
        server.wait_until_in_flight(0)
        # One that is slow to answer has told what it had counted a moment ago.
        wait_until(lambda: counted(server) == counted(server))
        before = server.metrics()
        kill(server, "acceptor-1")
        after = server.metrics()
        for name, value in before.items():
            # To the last bit: a sum that is rounded otherwise may go backwards.
            if name.startswith(COUNTED):
                assert after[name] == value, name
        assert set(traffic.codes) <= {grpc.StatusCode.OK, UNAVAILABLE}
        # Each of four callers had one call at a time, and there were four deaths.
        assert traffic.codes[UNAVAILABLE] <= 16
        for name in ("engine-0", "engine-1", "acceptor-0", "acceptor-1"):
            assert before[f'convoy_process_starts_total{{process="{name}"}}'] == 2
    assert "Traceback" not in server.log


def test_without_an_engine_nothing_is_ready_until_the_next_one_is(
    mortal: tuple[Server, Path], gate: Gate, tmp_path: Path
) -> None:
    server, folder = mortal
    with server.channel() as channel, gate.shut("slow") as open_gate:
        classify, inference = classifier_on(channel).Classify, inference_on(channel)
        names = ["slow", "digits", *SERVICES]
        watches = {
            name: health_on(channel).Watch(health_pb2.HealthCheckRequest(service=name))
            for name in names
        }
        assert {name: next(watch).status for name, watch in watches.items()} == dict.fromkeys(
            names, SERVING
        )
        stuck = [classify.future(FAST, timeout=TIMEOUT_S) for _ in range(5)]
        server.wait_until_in_flight(5)
        # The next one finds no models.
        folder.rename(tmp_path / "elsewhere")
        replaced = kill(server, "engine-0")
        assert [call.code() for call in stuck] == [UNAVAILABLE] * 5
        open_gate()
        assert [next(watches[name]).status for name in names] == [NOT_SERVING] * 4
        assert check(channel, "") == SERVING, "probes must not kill it: it mends itself"
        assert not inference.ServerReady(oip.ServerReadyRequest()).ready
        assert not inference.ModelReady(oip.ModelReadyRequest(name="slow")).ready
        assert inference.ServerLive(oip.ServerLiveRequest()).live
        server.wait_for("acceptor-0 is not ready")
        assert server.http("/readyz")[0] == 503
        with pytest.raises(grpc.RpcError) as refused:
            classify(FAST)
        assert refused.value.code() is UNAVAILABLE
        replaced()
        server.wait_for(r"slow/1 is not served: engine-0: .*manifest\.json is missing")
        (tmp_path / "elsewhere").rename(folder)
        assert [next(watches[name]).status for name in names] == [SERVING] * 4
        server.wait_for(r"acceptor-0 is not ready[\s\S]*acceptor-0 is ready")
        assert server.http("/readyz")[0] == 200
        assert inference.ModelReady(oip.ModelReadyRequest(name="slow")).ready
        assert probabilities_of(classify(FAST, timeout=TIMEOUT_S)) == pytest.approx(
            slow_of(FAST_IMAGE[np.newaxis])[0, :1]
        )


def test_each_time_that_a_worker_dies_soon_the_next_one_waits_longer_and_asleep(
    models: Path,
) -> None:
    with Server(*TWO_ALONE, models=models) as server:
        server.ready()
        waits = []
        for times in (1, 2, 3):
            kill(server, "acceptor-1")()
            died = r"acceptor-1 died \(killed by SIGKILL\): the next one starts in ([\d.]+) s\n"
            found = server.wait_for(rf"(?:{died}[\s\S]*?){{{times}}}")
            waits.append(float(found[1]))
        assert waits == [0.2, 0.4, 0.8]
        before = cpu_ticks(server.pid)
        kill(server, "acceptor-1")()
        assert cpu_ticks(server.pid) - before < 0.3 * os.sysconf("SC_CLK_TCK")


def test_the_stacks_of_a_worker_that_crashes_are_in_the_log(models: Path) -> None:
    with Server(*TWO_ALONE, models=models) as server:
        server.ready()
        os.kill(pid_of(server, "acceptor-1"), signal.SIGSEGV)
        server.wait_for(
            r"acceptor-1 crashed \(killed by SIGSEGV\)\. Its threads were at:\n"
            r"Fatal Python error: Segmentation fault\n[\s\S]*convoy_service/transport/\w+\.py\", line \d+ in "
        )
        server.wait_for(r"acceptor-1 died \(killed by SIGSEGV\): the next one starts in")
        server.wait_for(r"(?:: acceptor-1 is ready[\s\S]*?){2}")


def test_a_worker_that_crashes_while_the_service_stops_makes_that_no_clean_stop(
    models: Path,
) -> None:
    server = Server(*TWO_ALONE, "--shutdown-delay-s", "60", models=models).ready()
    os.kill(server.pid, signal.SIGTERM)
    server.wait_for("not ready; still answering")
    for name in ("acceptor-0", "acceptor-1"):
        os.kill(pid_of(server, name), signal.SIGSEGV)
    server.wait_for(r"acceptor-\d died while the service stopped \(killed by SIGSEGV\)")
    assert server.wait() == 1
    server.close()


def test_one_process_that_crashes_says_where_and_ends_by_its_signal(models: Path) -> None:
    server = Server(models=models).ready()
    os.kill(server.pid, signal.SIGSEGV)
    server.wait_for(
        r"Fatal Python error: Segmentation fault\n[\s\S]*convoy_service/transport/\w+\.py\", line \d+ in "
    )
    assert server.wait() == -signal.SIGSEGV
    server.close()


def probabilities_of(response: pb.ClassifyResponse) -> list[float]:
    return [result.classification.labels[0].probability for result in response.results]


def test_gauges_of_the_dead_are_gone_and_what_they_counted_stays(
    mortal: tuple[Server, Path], gate: Gate
) -> None:
    server, _ = mortal
    with server.channel() as channel, contextlib.ExitStack() as stack:
        classify = classifier_on(channel).Classify
        ok = 'convoy_requests_total{call="Classify",code="OK",model="slow"}'
        before = server.metrics().get(ok, 0.0)
        for _ in range(3):
            classify(FAST)
        server.wait_for_metric(ok, before + 3)
        open_gate = stack.enter_context(gate.shut("slow"))
        call = classify.future(FAST, timeout=TIMEOUT_S)
        server.wait_until_in_flight(1)
        assert server.metrics()["convoy_held_bytes"] > 0
        replaced = kill(server, "acceptor-0")
        assert call.code() is UNAVAILABLE
        metrics = server.metrics()
        assert metrics["convoy_requests_in_flight"] == 0
        assert metrics["convoy_held_bytes"] == 0
        assert metrics[ok] == before + 3
        open_gate()
        replaced()
        classify(FAST, wait_for_ready=True, timeout=TIMEOUT_S)
        server.wait_for_metric(ok, before + 4)


def test_the_death_of_the_supervisor_ends_all_and_frees_the_port(models: Path) -> None:
    with contextlib.closing(Server(*TWO_AND_TWO, models=models)) as server:
        with Traffic(server.ready()) as traffic:
            traffic.wait_for_more()
            workers = children(server.pid)
            assert len(workers) == 4
            os.kill(server.pid, signal.SIGKILL)
            wait_until_gone(workers)
        assert set(traffic.codes) <= {grpc.StatusCode.OK, UNAVAILABLE}
        port = str(server.port)
    with (
        Server(*TWO_ALONE, "--port", port, models=models) as again,
        again.ready().channel() as channel,
    ):
        assert classifier_on(channel).Classify(RED).results[0].HasField("classification")


def test_a_worker_that_cannot_be_started_is_tried_again(mortal: tuple[Server, Path]) -> None:
    server, _ = mortal
    soft, hard = resource.prlimit(server.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (8, hard))
    replaced = kill(server, "acceptor-0")
    server.wait_for(
        r"acceptor-0 can't be started \(.*Too many open files\): the next one starts in"
    )
    resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (soft, hard))
    replaced()


def test_a_version_published_while_workers_start_anew_reaches_all(
    mortal: tuple[Server, Path],
) -> None:
    server, folder = mortal
    replaced = [kill(server, name) for name in ("engine-0", "acceptor-0")]
    assert add_colours(folder, labels=("rot", "gruen", "blau")).version == 2
    for wait in replaced:
        wait()
    server.wait_for("colours: version 2 answers")
    with server.channel() as channel:
        answer = classifier_on(channel).Classify(RED, wait_for_ready=True, timeout=TIMEOUT_S)
        assert answer.version == 2
        assert answer.results[0].classification.labels[0].name == "rot"
        models = classifier_on(channel).ListModels(pb.ListModelsRequest()).models
        versions = {model.name: (model.version, list(model.versions)) for model in models}
        assert versions["colours"] == (2, [1, 2])
    for name in ("engine-0", "acceptor-0"):
        kill(server, name)()
    with server.channel() as channel:
        answer = classifier_on(channel).Classify(RED, wait_for_ready=True, timeout=TIMEOUT_S)
        assert answer.version == 2
    metrics = server.metrics()
    assert metrics['convoy_model_broken_versions{model="newest"}'] == 1
    assert metrics['convoy_model_serving_version{model="colours"}'] == 2


# Drains.


def test_sigterm_under_load_answers_all_that_was_taken(models: Path, tmp_path: Path) -> None:
    with Server(*TWO_AND_TWO, "--shutdown-delay-s", "4", models=models, cwd=tmp_path) as server:
        with Traffic(server.ready()) as traffic:
            traffic.wait_for_more()
            server.send(signal.SIGTERM)
            server.wait_for("not ready; still answering")
            assert server.http("/readyz")[0] == 503
            assert server.http("/healthz")[0] == 200
            traffic.wait_for_more()
            assert server.wait() == 0
            # gRPC itself cancels what comes after the door is closed and before the caller sees it.
            refused = {UNAVAILABLE, grpc.StatusCode.CANCELLED}
            assert set(traffic.codes) <= {grpc.StatusCode.OK} | refused
        assert alive(tmp_path) == []
    assert "Traceback" not in server.log
    assert "WARNING" not in server.log


@pytest.mark.parametrize(
    # Without engines, an acceptor that runs a batch takes no calls meanwhile.
    ("topology", "in_flight"),
    [(TWO_ALONE, 1), (ONE_AND_ONE, 3)],
    ids=["2 acceptors", "1 and 1"],
)
def test_calls_in_flight_are_answered_after_ctrl_c(
    slow_models: Path, gate: Gate, topology: tuple[str, ...], in_flight: int
) -> None:
    arguments = (*topology, "--shutdown-delay-s", "600")
    with (
        Server(*arguments, models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        classify = classifier_on(channel).Classify
        calls = [classify.future(FAST, timeout=TIMEOUT_S) for _ in range(in_flight)]
        server.wait_until_in_flight(in_flight)
        # As a terminal does: to everyone at once.
        for pid in children(server.pid):
            os.kill(pid, signal.SIGINT)
        server.send(signal.SIGINT)
        open_gate()
        for call in calls:
            assert call.result().results[0].HasField("classification")
        assert server.wait() == 0
    assert "Traceback" not in server.log


def test_ctrl_c_while_workers_start_ends_them_quietly(tmp_path: Path, gate: Gate) -> None:
    models, folder = tmp_path / "models", tmp_path / "here"
    models.mkdir()
    folder.mkdir()
    add_slow(models)
    with (
        gate.shut("slow"),
        Server(*TWO_ALONE, models=models, cwd=folder, variables=gate.variables) as server,
    ):
        wait_until(lambda: len(children(server.pid)) == 2)
        for pid in children(server.pid):
            # It imports what it needs.
            wait_until(lambda pid=pid: cpu_ticks(pid) >= 0.1 * os.sysconf("SC_CLK_TCK"))  # type: ignore[misc]
            os.kill(pid, signal.SIGINT)
        server.send(signal.SIGINT)
        assert server.wait() == 0
        assert alive(folder) == []
    assert "Traceback" not in server.log
    assert "is ready" not in server.log


def test_a_second_signal_ends_all_at_once(slow_models: Path, gate: Gate, tmp_path: Path) -> None:
    made = Server(*ONE_AND_ONE, models=slow_models, cwd=tmp_path, variables=gate.variables)
    with contextlib.closing(made) as server:
        with server.ready().channel() as channel, gate.shut("slow"):
            call = classifier_on(channel).Classify.future(FAST, timeout=TIMEOUT_S)
            server.wait_until_in_flight(1)
            workers = children(server.pid)
            server.send(signal.SIGTERM)
            server.wait_for("draining")
            assert server.stop() == 128 + signal.SIGTERM
            assert call.code() is UNAVAILABLE
        wait_until_gone(workers)
        assert alive(tmp_path) == []


def test_the_drain_ends_after_its_grace(slow_models: Path, gate: Gate) -> None:
    arguments = (*ONE_AND_ONE, "--drain-grace-s", "0.1")
    with (
        Server(*arguments, models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        call = classifier_on(channel).Classify.future(FAST, timeout=TIMEOUT_S)
        server.wait_until_in_flight(1)
        server.send(signal.SIGTERM)
        assert call.code() is UNAVAILABLE
        open_gate()
        assert server.wait() == 0
        assert "1 calls were cut off after 0.1 s" in server.log


# Starts.


def fails_to_start(folder: Path, *arguments: str, models: Path | None = None) -> str:
    """The log of a server that ends before it is ready."""
    with contextlib.closing(Server(*arguments, models=models, cwd=folder)) as server:
        assert server.wait() == 1
        assert "convoy.server: ready" not in server.log
        assert "Traceback" not in server.log
        assert alive(folder) == []
        return server.log


@pytest.mark.parametrize("topology", [TWO_ALONE, TWO_AND_TWO], ids=["2 acceptors", "2 and 2"])
def test_a_broken_model_ends_it_with_the_reason(tmp_path: Path, topology: tuple[str, ...]) -> None:
    models, folder = tmp_path / "models", tmp_path / "here"
    folder.mkdir()
    shutil.copytree(REPOSITORY / "models" / "digits", models / "digits")
    flip_a_byte(models / "digits" / "1" / "model.onnx")
    log = fails_to_start(folder, *topology, models=models)
    assert "can be served" in log
    assert "sha256" in log


def test_a_port_that_another_process_listens_on_is_told(tmp_path: Path, models: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        log = fails_to_start(tmp_path, *TWO_AND_TWO, "--port", str(port), models=models)
    assert f"port {port} of 127.0.0.1: " in log
    assert "--port" in log


def test_a_port_that_another_convoy_shares_among_its_own_is_told(
    serving: Start, tmp_path: Path, models: Path
) -> None:
    several = serving(*TWO_ALONE)
    for arguments in ((), TWO_ALONE):
        log = fails_to_start(tmp_path, *arguments, "--port", str(several.port), models=models)
        assert f"port {several.port} of 127.0.0.1: " in log
    log = fails_to_start(
        tmp_path, *TWO_ALONE, "--metrics-port", str(several.metrics_port), models=models
    )
    assert "--metrics-port" in log


def test_a_folder_named_like_one_of_ours_is_not_imported_from(tmp_path: Path, models: Path) -> None:
    for name in ("service", "logging", "grpc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not this one')")
    with Server(*ONE_AND_ONE, models=models, cwd=tmp_path, python=("-P",)) as server:
        server.ready()


def test_the_supervisor_sleeps_while_models_load(tmp_path: Path, gate: Gate) -> None:
    add_slow(tmp_path)
    with (
        gate.shut("slow"),
        Server(*ONE_AND_ONE, models=tmp_path, variables=gate.variables) as server,
    ):
        wait_until(lambda: bool(children(server.pid)))
        before, ends = cpu_ticks(server.pid), time.monotonic() + 1.0
        wait_until(lambda: time.monotonic() > ends)
        assert cpu_ticks(server.pid) - before < 0.2 * os.sysconf("SC_CLK_TCK")
        assert "engine-0 is ready" not in server.log
