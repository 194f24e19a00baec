"""What an operator does meanwhile: new versions, models that come and go, metrics that are scraped."""

import http.client
import itertools
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from benchmarks.storming.grpc_callers import OPTIONS
from benchmarks.storming.outages import Outages
from benchmarks.storming.server import Server
from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from convoy_protos.classifier_pb2_grpc import ImageClassifierStub
from convoy_protos.inference_pb2_grpc import GRPCInferenceServiceStub

_KEPT = 4  # of the newest versions
_TIMEOUT_S = 60.0
_SCRAPE_S = 0.25


class Operator:
    """Switches, loads and scrapes, each on a thread of its own, until `stop`."""

    def __init__(self, server: Server, models: Path, outages: Outages, every_s: float) -> None:
        self._server, self._quick, self._outages = server, models / "quick", outages
        self._every_s = every_s
        self._version = 1
        self._channel = grpc.insecure_channel(server.target, OPTIONS)
        self._classifier: Any = ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]
        self._control: Any = GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(pause_s, *steps), daemon=True)
            for pause_s, steps in (
                (every_s, (self._switch,)),
                (every_s, (self._unload, self._load)),
                (_SCRAPE_S, (self._metrics,)),
            )
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(2 * _TIMEOUT_S)
        self._channel.close()

    def _repeat(self, pause_s: float, *steps: Callable[[], str]) -> None:
        for step in itertools.cycle(steps):
            if self._ended.wait(pause_s + self._outages.calm_s()):
                return
            self._try(step)

    def _try(self, step: Callable[[], str]) -> None:
        began = time.monotonic()
        try:
            self.done[step()] += 1
        except (grpc.RpcError, OSError, http.client.HTTPException, RuntimeError) as error:
            if self._outages.explain(began):
                self.done["failed in an outage"] += 1
            elif len(self.wrong) < 20:
                self.wrong.append(f"operator: {error!r}")

    def _switch(self) -> str:
        """Publishes a version, as training does, and waits until it answers."""
        self._version += 1
        version, beside = self._version, self._quick / f".publishing-{self._version}"
        shutil.copytree(self._quick / str(version - 1), beside)
        beside.rename(self._quick / str(version))
        if version > _KEPT:
            shutil.rmtree(self._quick / str(version - _KEPT))
        deadline = time.monotonic() + _TIMEOUT_S
        while self._serving() != version:
            if time.monotonic() > deadline:
                raise RuntimeError(f"version {version} of quick does not answer")
            if self._ended.wait(0.05):
                return "switch, not waited for"
        return "switch"

    def _serving(self) -> int:
        models = self._classifier.ListModels(pb.ListModelsRequest(), timeout=_TIMEOUT_S).models
        return next((int(model.version) for model in models if model.name == "quick"), 0)

    def _unload(self) -> str:
        request = oip.RepositoryModelUnloadRequest(model_name="moving")
        self._control.RepositoryModelUnload(request, timeout=_TIMEOUT_S)
        return "unload"

    def _load(self) -> str:
        host, _, port = self._server.http.rpartition(":")
        connection = http.client.HTTPConnection(host, int(port), _TIMEOUT_S)
        connection.request("POST", "/v2/repository/models/moving/load")
        response = connection.getresponse()
        body = response.read()
        connection.close()
        if response.status != 200:
            raise RuntimeError(f"load: {response.status} {body!r}")
        return "load"

    def _metrics(self) -> str:
        if "convoy_requests_in_flight" not in self._server.counted():
            raise RuntimeError("/metrics does not say what is in flight")
        return "scrape"
