"""Versions that come, prove themselves, take over and go, while callers ask."""

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_protos.classifier_pb2_grpc import ModelControlStub
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle, Golden
from convoy_service.engine.onnx_model import Model
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, environment
from tests.integration.conftest import Gate, classifier_on, inference_on, wait_until
from tests.integration.models import SLOW_IMAGE, add_colours, add_slow, colours_of
from tests.integration.pictures import encoded, noise, probabilities, raw
from tests.integration.test_inference_protocol import infer_request, outputs_of, raw_pixels
from tests.integration.test_workers import ONE_AND_ONE, TWO_ALONE, kill

TOPOLOGIES = {"one process": (), "2 acceptors": TWO_ALONE, "1 and 1": ONE_AND_ONE}


def publish(models: Path) -> Bundle:
    """The next version of `colours`, whose labels tell its number."""
    number = max(bundles.versions(models / "colours"), default=0) + 1
    return add_colours(models, labels=tuple(f"{colour}-{number}" for colour in ("r", "g", "b")))


class Crowd:
    """Callers of every kind, each of whom asks as soon as he is answered, and looks at the answer."""

    def __init__(self, server: Server) -> None:
        self._target = server.target
        self._changed = threading.Condition()
        self._stopped = False
        self.codes: Counter[grpc.StatusCode] = Counter()
        self.versions: Counter[int] = Counter()
        self.wrong: list[Any] = []
        kinds = [self._classify, self._files, self._infer, self._stream]
        self._threads = [threading.Thread(target=self._ask, args=(kind,)) for kind in kinds]

    def _ask(self, kind: Callable[[grpc.Channel], None]) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self._target, options) as channel:
            while not self._stopped:
                try:
                    kind(channel)
                except grpc.RpcError as error:
                    self._count(error.code(), 0)
                except BaseException as error:
                    self.wrong.append(error)
                    raise

    def _count(self, code: grpc.StatusCode, version: int) -> None:
        with self._changed:
            self.codes[code] += 1
            if version:
                self.versions[version] += 1
            self._changed.notify_all()

    def _check(self, response: pb.ClassifyResponse, pixels: Any) -> None:
        found = np.array([probabilities(result) for result in response.results])
        np.testing.assert_allclose(found, colours_of(pixels), atol=1e-6)
        for result in response.results:
            for label in result.classification.labels:
                # Those of the version that has answered.
                assert label.name.endswith(f"-{response.version}"), (label, response.version)
        self._count(grpc.StatusCode.OK, response.version)

    def _pixels(self) -> Any:
        return noise(sum(self.codes.values()), 3, (4, 4, 3))

    def _classify(self, channel: grpc.Channel) -> None:
        pixels = self._pixels()
        request = pb.ClassifyRequest(model="colours", images=map(raw, pixels), top_k=3)
        self._check(classifier_on(channel).Classify(request, timeout=TIMEOUT_S), pixels)

    def _files(self, channel: grpc.Channel) -> None:
        pixels = self._pixels()
        request = pb.ClassifyRequest(model="colours", images=map(encoded, pixels), top_k=3)
        self._check(classifier_on(channel).Classify(request, timeout=TIMEOUT_S), pixels)

    def _infer(self, channel: grpc.Channel) -> None:
        pixels = self._pixels()
        request = infer_request("colours", "image")
        raw_pixels(request, pixels)
        response = inference_on(channel).ModelInfer(request, timeout=TIMEOUT_S)
        np.testing.assert_allclose(outputs_of(response), colours_of(pixels), atol=1e-6)
        self._count(grpc.StatusCode.OK, int(response.model_version))

    def _stream(self, channel: grpc.Channel) -> None:
        pixels = [self._pixels() for _ in range(20)]
        requests = (
            pb.ClassifyStreamRequest(
                id=str(n),
                request=pb.ClassifyRequest(model="colours", images=map(raw, each), top_k=3),
            )
            for n, each in enumerate(pixels)
        )
        for answer in classifier_on(channel).ClassifyStream(requests, timeout=TIMEOUT_S):
            self._check(answer.response, pixels[int(answer.id)])

    def wait_for(self, version: int, answers: int = 20) -> None:
        """Waits until a version has given so many more answers."""
        with self._changed:
            before = self.versions[version]
            assert self._changed.wait_for(
                lambda: self.versions[version] >= before + answers or self.wrong, TIMEOUT_S
            ), (self.versions, self.codes)

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        for thread in self._threads:
            thread.join(TIMEOUT_S)
            assert not thread.is_alive()
        assert not self.wrong, self.wrong[0]


def listed(channel: grpc.Channel, name: str = "colours") -> pb.Model:
    models = classifier_on(channel).ListModels(pb.ListModelsRequest()).models
    [found] = [model for model in models if model.name == name]
    assert isinstance(found, pb.Model)
    return found


def states(channel: grpc.Channel) -> dict[int, str]:
    return {
        each.version: pb.Version.State.Name(each.state) for each in listed(channel).version_states
    }


def infos(metrics: dict[str, float]) -> list[str]:
    """The versions that are loaded, as /metrics describes them."""
    return [name for name in metrics if name.startswith("convoy_model_info")]


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES.keys())
def test_versions_come_and_go_under_traffic_and_no_request_fails(
    tmp_path: Path, topology: tuple[str, ...]
) -> None:
    publish(tmp_path)
    arguments = (*topology, "--watch-s", "0.1", "--allow-repository-control")
    with (
        Server(*arguments, models=tmp_path) as server,
        Crowd(server.ready()) as crowd,
        server.channel() as channel,
    ):
        control: Any = ModelControlStub(channel)  # type: ignore[no-untyped-call]
        crowd.wait_for(1)
        for version in (2, 3):
            publish(tmp_path)
            server.wait_for(f"colours: version {version} answers")
            crowd.wait_for(version)
        server.wait_for("colours/1 is unloaded")
        # One that does not prove itself never serves.
        bundle = publish(tmp_path)
        golden = replace(bundle.golden, probabilities=bundle.golden.probabilities[:, ::-1])
        wrong = bundles.write(tmp_path / "colours", bundle.manifest, bundle.onnx, golden)
        assert wrong.version == 5
        server.wait_for(r"colours/5 is not served: .* off by")
        crowd.wait_for(4)
        # What is logged is then told to all processes.
        wait_until(lambda: states(channel).get(5) == "BROKEN")
        found = listed(channel)
        assert (found.version, found.state) == (4, pb.Model.READY)
        assert "its answers to the golden inputs are off by" in found.reason
        # Back at once, and forth again.
        rolled = control.Rollback(pb.RollbackRequest(model="colours"), timeout=TIMEOUT_S)
        assert rolled.model.version == 3
        crowd.wait_for(3)
        control.Promote(pb.PromoteRequest(model="colours", version=4), timeout=TIMEOUT_S)
        crowd.wait_for(4)
        server.wait_for("colours/2 is unloaded")
        expected = {1: "IDLE", 2: "IDLE", 3: "STANDBY", 4: "READY", 5: "BROKEN"}
        wait_until(lambda: states(channel) == expected)
        # Of processes that are busy /metrics tells what they have said before.
        server.wait_for_metric('convoy_model_serving_version{model="colours"}', 4)
        wait_until(lambda: len(infos(server.metrics())) == 2)
        metrics = server.metrics()
    assert set(crowd.codes) == {grpc.StatusCode.OK}
    assert set(crowd.versions) == {1, 2, 3, 4}
    assert metrics['convoy_model_serving_version{model="colours"}'] == 4
    assert metrics['convoy_model_broken_versions{model="colours"}'] == 1
    assert metrics['convoy_model_version_state{model="colours",state="broken",version="5"}'] == 1
    assert metrics['convoy_model_switches_total{model="colours"}'] == 5
    assert "Traceback" not in server.log


def publish_slow(models: Path, name: str) -> Bundle:
    """A version that takes a while to prove itself: it rests between the runs."""
    added = add_slow(models, name, rounds=300)
    pixels = SLOW_IMAGE[np.newaxis]
    golden = Golden(pixels, Model(added.onnx).run(pixels))
    return bundles.write(models / name, added.manifest, added.onnx, golden)


def test_an_engine_that_dies_while_a_version_is_on_its_way_keeps_it_from_nobody(
    tmp_path: Path,
) -> None:
    publish(tmp_path)
    arguments = (*ONE_AND_ONE, "--watch-s", "0.1")
    with Server(*arguments, models=tmp_path) as server:
        server.ready()
        publish_slow(tmp_path, "slow")
        server.wait_for("slow/2 is being loaded")
        kill(server, "engine-0")()
        server.wait_for("slow: version 2 answers")
    assert "Traceback" not in server.log


@pytest.mark.parametrize("topology", [(), ONE_AND_ONE], ids=["one process", "1 and 1"])
def test_sigterm_while_a_version_is_loaded_does_not_wait_for_it(
    tmp_path: Path, gate: Gate, topology: tuple[str, ...]
) -> None:
    publish(tmp_path)
    arguments = (*topology, "--watch-s", "0.1")
    with (
        gate.shut("slow"),
        Server(*arguments, models=tmp_path, variables=gate.variables) as server,
    ):
        server.ready()
        add_slow(tmp_path)
        server.wait_for("slow/1 is being loaded")
        assert server.stop() == 0
    assert "slow/1 is ready" not in server.log
    assert "Traceback" not in server.log
    assert "Aborted" not in server.log


def test_a_short_run_of_the_benchmark_loses_no_request(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    cores = sorted(os.sched_getaffinity(0))
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "switch.py"), "--json", str(results)]
    command += ["--switches", "5", "--every", "1", "--seconds", "2", "--rollbacks", "5"]
    command += ["--model", "digits", "--jpeg", "8x8", "--server-cores", str(cores[0])]
    command += ["--client-cores", str(cores[-1]), "--load", "0.5"]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=8 * TIMEOUT_S
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(results.read_text())
    assert found["requests"] > 100
    assert (found["failed"], found["wrong_rows"]) == (0, 0)
    assert found["rollback_ms_median"] < 100
