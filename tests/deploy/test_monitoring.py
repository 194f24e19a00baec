"""deploy/prometheus and deploy/grafana: the rules by promtool's tests; rules and dashboard on a real
Prometheus, that watches a real server to which much happens.
"""

import http.server
import json
import math
import os
import queue
import re
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import pytest
import yaml

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Golden
from convoy_service.engine import gpu
from convoy_service.engine.onnx_model import Model
from convoy_service.telemetry import counters as metrics
from convoy_training.data.datasets import Split
from convoy_training.release.publish import Check, GateClosed
from convoy_training.settings import TrainingSettings
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.deploy.conftest import DEPLOY, found
from tests.deploy.test_balancing import free_ports
from tests.integration import test_canary as canaries
from tests.integration.conftest import classifier_on, inference_on
from tests.integration.models import (
    FAST_IMAGE,
    NAN_IMAGE,
    RAISING_IMAGE,
    add_colours,
    add_poison,
    add_profiled,
)
from tests.integration.object_store import URL, ObjectStore
from tests.integration.pictures import raw, solid
from tests.integration.test_inference_protocol import infer_request, raw_bytes
from tests.unit import test_job as jobs

pytestmark = pytest.mark.deploy

RULES = DEPLOY / "prometheus" / "convoy.rules.yaml"
TESTS = DEPLOY / "prometheus" / "convoy.test.yaml"
CONFIG = DEPLOY / "prometheus" / "prometheus.yml"
BOARD = DEPLOY / "grafana" / "dashboards" / "convoy.json"
RETRAIN = DEPLOY / "retrain"
PACKAGE = "the package prometheus of Debian"
ALERTMANAGER = "the package prometheus-alertmanager of Debian"

# Panels that may be empty on the real Prometheus, and why.
EMPTY = dict.fromkeys(
    ("Cards: busy", "Cards: memory", "Cards: temperature", "Cards: power"),
    "the machine need not have a card",
)
# What must fire there by what happens, ...
FIRING = {
    "ConvoyAvailabilityBudgetBurn",
    "ConvoyOverload",
    "ConvoyInferenceFailing",
    "ConvoyBrokenVersion",
    "ConvoyCanaryRolledBack",
    "ConvoyRetrainFailing",
    "ConvoyDrift",
    "ConvoyStoreVersionWaits",
}
# ... and what must not. Of the others it depends on how fast the machine is.
SILENT = {
    "ConvoyDown",
    "ConvoyTargetDown",
    "ConvoyRestarting",
    "ConvoyFallback",
    "ConvoyModelOld",
    "ConvoyObserverFailing",
    "ConvoyStoreStale",
}


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def rules() -> list[dict[str, Any]]:
    return [rule for group in read(RULES)["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules() if "alert" in rule]


def panels() -> list[dict[str, Any]]:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    return [panel for panel in board["panels"] if panel["type"] != "row"]


# The files by themselves.


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", RULES), ("test", "rules", TESTS), ("check", "config", "--syntax-only", CONFIG)],
    ids=["rules", "their tests", "configuration"],
)  # fmt: skip
def test_promtool_passes(arguments: tuple[str | Path, ...]) -> None:
    command = [found("promtool", PACKAGE), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=8 * TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["alertmanager", "retrain"])
def test_amtool_passes(folder: str) -> None:
    [file] = (DEPLOY / folder).glob("alertmanager.*")
    command: list[str | Path] = [found("amtool", ALERTMANAGER), "check-config", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=8 * TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_in_one_test_and_is_silent_in_another() -> None:
    tested = {
        (test["alertname"], alert and alert["exp_labels"]["severity"])
        for case in read(TESTS)["tests"]
        for test in case.get("alert_rule_test", ())
        for alert in test["exp_alerts"] or [None]
    }
    assert tested == {
        (alert["alert"], severity)
        for alert in alerts()
        for severity in (alert["labels"]["severity"], None)
    }


def test_the_runbook_has_a_section_for_each_alert() -> None:
    text = (REPOSITORY / "docs" / "runbook.md").read_text(encoding="utf-8")
    _, *parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    assert len(sections) == len(parts) / 2
    assert sections.keys() == {alert["alert"] for alert in alerts()}
    for alert in alerts():
        wanted = f"docs/runbook.md#{alert['alert'].lower()}"
        assert alert["annotations"]["runbook_url"] == wanted
    titles = {panel["title"] for panel in panels()}
    for name, section in sections.items():
        bold = set(re.findall(r"\*\*(.+?)\*\*", section))
        assert bold >= {"Means", "Look", "Do"}, name
        # The others are panels.
        assert bold <= {"Means", "Look", "Do"} | titles, name


def test_rules_panels_and_runbook_name_what_there_is(tmp_path: Path) -> None:
    known = {f"convoy_gpu_{name}" for name in gpu._FAMILIES}
    ends = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
    for name, family in metrics._FAMILIES.items():
        known |= {f"convoy_{name}{end}" for end in ends.get(family.kind, ("",))}
    known |= set(
        re.findall(r"^convoy_train_\w+", trained(tmp_path).read_text("utf-8"), re.MULTILINE)
    )
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    named = set()
    for path in (RULES, BOARD, REPOSITORY / "docs" / "runbook.md"):
        text = path.read_text(encoding="utf-8")
        named |= set(re.findall(r"(?<![\w:])convoy_\w+", text))
        assert set(re.findall(r"\b(?:job_\w+|convoy):\w+(?::\w+)?", text)) <= recorded
    assert len(named) > 50
    assert named <= known


# A real Prometheus.


def trained(folder: Path) -> Path:
    """What a job's `--textfile` holds that came through once, and then failed at the gate."""
    file = folder / "pets.prom"
    models = folder / "trained"
    settings = TrainingSettings(
        data="x", name="pets", models=models, base=models / "pets", retrain=True, textfile=file
    )
    assert jobs.train(settings, jobs.Line()) == 0
    closed = jobs.Line(jobs.dataset(1), checks=(Check("accuracy", "0.95", "0.99", passed=False),))
    with pytest.raises(GateClosed):
        jobs.train(settings, closed)
    return file


class Files(http.server.SimpleHTTPRequestHandler):
    """Shows files of metrics, as Prometheus' node exporter does."""

    def do_GET(self) -> None:
        # A scrape may give up first.
        with suppress(BrokenPipeError):
            super().do_GET()

    def guess_type(self, path: object) -> str:
        return "text/plain; version=0.0.4"

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


class Prometheus:
    """Watches `targets` (a path for each) by a copy of our rules that do not wait for long."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        program = found("prometheus", PACKAGE)
        folder.mkdir()
        copied = read(RULES)
        for group in copied["groups"]:
            for rule in group["rules"]:
                if "for" in rule:
                    rule["for"] = "6s"
        (folder / "convoy.rules.yaml").write_text(yaml.safe_dump(copied))
        config = read(CONFIG)
        # Three scrapes that take too long, on a busy machine, are not yet an alert.
        config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(folder / "*.rules.yaml")]
        [ours] = config["scrape_configs"]
        config["scrape_configs"] = [
            {
                "job_name": ours["job_name"] if path == "/metrics" else "node",
                "metrics_path": path,
                "static_configs": [{"targets": [target]}],
            }
            for target, path in targets.items()
        ]
        port, self.alertmanager_port = free_ports(2)
        [manager] = config["alerting"]["alertmanagers"][0]["static_configs"]
        assert manager["targets"] == ["alertmanager:9093"]
        manager["targets"] = [f"127.0.0.1:{self.alertmanager_port}"]
        file = folder / "prometheus.yml"
        file.write_text(yaml.safe_dump(config))
        self._url = f"http://127.0.0.1:{port}"
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={file}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                    "--rules.alert.resend-delay=1s",
                    # That nobody listens to its alerts for most of the time.
                    "--log.level=error",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, path: str, **parameters: object) -> Any:
        """The data of an answer of its API."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return json.load(answer)["data"]

    def values(self, query: str) -> list[float]:
        """What the query gives now, without what is no number."""
        found = [float(each["value"][1]) for each in self.ask("query", query=query)["result"]]
        return [value for value in found if not math.isnan(value)]

    def firing(self) -> set[str]:
        return {
            alert["labels"]["alertname"]
            for alert in self.ask("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def wait_until(self, so: Callable[[], object]) -> None:
        """At the end it is not so, or this returns; nothing is thrown: the caller asserts."""
        deadline = time.monotonic() + 4 * TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self._log.read_text()
            with suppress(urllib.error.URLError):
                if so():
                    return
            time.sleep(0.2)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)


def publish(folder: Path, store: ObjectStore) -> Split:
    """Uploads models of which some have something wrong; the test images of the digits."""
    _, data = add_profiled(folder)
    add_poison(folder)
    # The one is rolled back soon, the other stays on trial.
    planted = {
        "swapped": (canaries.graph(), canaries.graph(swap=128.0), "after = 150"),
        "alike": (canaries.graph(), canaries.graph(), "share = 0.3\nafter = 1_000_000"),
    }
    canaries.publish(folder, planted, "max_error = 0.05\ncompare = 1.0")
    good = add_colours(folder)
    # Version 2 gives other answers than its golden ones, version 3 has not come whole.
    pixels = solid("red")[np.newaxis]
    wrong = Golden(pixels, Model(good.onnx).run(pixels)[:, ::-1].copy())
    broken = bundles.write(folder / "colours", good.manifest, good.onnx, wrong)
    for manifest in folder.glob("*/*/manifest.json"):
        store.add(manifest.parent)
    for policy in folder.glob("*/versions.toml"):
        store.put(f"{policy.parent.name}/versions.toml", policy.read_bytes())
    store.put("colours/3/manifest.json", (broken.folder / "manifest.json").read_bytes())
    return data.test


@contextmanager
def asked(server: Server, digits: Split) -> Iterator[None]:
    """Callers of all kinds, at the same time."""
    over = threading.Event()
    rng = np.random.default_rng(0)
    # Darker than those that the version was judged on.
    dark = Split(digits.inputs // 2, digits.labels)
    rows = cycle(range(len(dark)))
    images = cycle((raw(FAST_IMAGE), raw(NAN_IMAGE), raw(RAISING_IMAGE)))
    infer = infer_request("colours", "image")
    raw_bytes(infer, solid("red")[np.newaxis])

    def drifting(channel: grpc.Channel) -> None:
        one = pb.Image(encoded=dark.encoded(next(rows)))
        request = pb.ClassifyRequest(model="digits", images=[one, pb.Image(encoded=b"no image")])
        classifier_on(channel).Classify(request, timeout=TIMEOUT_S)

    def tried(channel: grpc.Channel) -> None:
        for name in ("swapped", "alike"):
            classifier_on(channel).Classify(canaries.request(name, rng), timeout=TIMEOUT_S)

    def poisoned(channel: grpc.Channel) -> None:
        request = pb.ClassifyRequest(model="poison", images=[next(images)])
        classifier_on(channel).Classify(request, timeout=TIMEOUT_S)

    def many(channel: grpc.Channel) -> None:
        calls = [inference_on(channel).ModelInfer.future(infer, TIMEOUT_S) for _ in range(100)]
        for call in calls:
            call.exception()
        over.wait(0.2)

    def ask(call: Callable[[grpc.Channel], None]) -> None:
        with server.channel() as channel:
            while not over.is_set():
                # Refused, most likely: there are more than may be.
                with suppress(grpc.RpcError):
                    call(channel)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, call) for call in (drifting, tried, poisoned, many)]
        try:
            yield
        finally:
            over.set()
        for each in asking:
            each.result()


@contextmanager
def watched(folder: Path) -> Iterator[Prometheus]:
    """A Prometheus that watches a server which is asked, and what a training job left."""
    found("prometheus", PACKAGE)
    (folder / "models").mkdir()
    file = trained(folder)
    with ExitStack() as held:
        store = held.enter_context(ObjectStore())
        digits = publish(folder / "models", store)
        arguments = (
            "--models", URL, "--models-cache", folder / "cache", "--store-watch-s", "0.5",
            "--watch-s", "0.2", "--engines", "1", "--max-in-flight", "16",
            "--feedback", folder / "feedback", "--feedback-share", "1", "--feedback-rotate-s", "1",
            "--drift-window", "200", "--drift-images-per-s", "1e6",
        )  # fmt: skip
        server = held.enter_context(Server(*arguments, variables=store.variables())).ready()
        shown = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), partial(Files, directory=str(folder))
        )
        held.enter_context(shown)
        serving = threading.Thread(target=shown.serve_forever)
        serving.start()
        held.callback(serving.join)
        held.callback(shown.shutdown)
        targets = {
            f"127.0.0.1:{server.metrics_port}": "/metrics",
            f"127.0.0.1:{shown.server_address[1]}": f"/{file.name}",
        }
        prometheus = held.enter_context(Prometheus(folder / "prometheus", targets))
        held.enter_context(asked(server, digits))
        yield prometheus


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with watched(tmp_path_factory.mktemp("watched")) as prometheus:
        yield prometheus


def query_of(target: dict[str, Any]) -> str:
    """A panel's query, for all that there is."""
    text = str(target["expr"])
    for name, value in (("$job", ".*"), ("$model", ".*"), ("$__rate_interval", "15s")):
        text = text.replace(name, value)
    assert "$" not in text
    return text


def test_no_panel_is_empty(prometheus: Prometheus) -> None:
    queries = {
        (panel["title"], target["refId"]): query_of(target)
        for panel in panels()
        for target in panel["targets"]
    }
    assert {title for title, _ in queries} > EMPTY.keys()

    def empty() -> set[str]:
        return {
            title
            for (title, _), query in queries.items()
            if title not in EMPTY and not prometheus.values(query)
        }

    prometheus.wait_until(lambda: not empty())
    assert not empty()
    for (title, _), query in queries.items():
        # Those of cards are at least understood.
        assert isinstance(prometheus.values(query), list), title


def test_alerts_fire_by_what_happens(prometheus: Prometheus) -> None:
    prometheus.wait_until(lambda: prometheus.firing() >= FIRING)
    firing = prometheus.firing()
    assert firing >= FIRING
    assert not firing & SILENT


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Hooks)
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()
        self.server.called.put((self.path, payload))

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


class Hooks(http.server.ThreadingHTTPServer):
    """In place of https://github.com/adnanh/webhook: keeps what it is called with."""

    def __init__(self) -> None:
        self.called: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        super().__init__(("127.0.0.1", 0), _Hook)


def test_a_drift_that_fires_starts_the_retrain_job(prometheus: Prometheus, tmp_path: Path) -> None:
    config = read(RETRAIN / "alertmanager.yaml")
    [route] = config["route"]["routes"]
    route["group_wait"] = "1s"
    [_, receiver] = config["receivers"]
    [webhook] = receiver["webhook_configs"]
    asked = urllib.parse.urlsplit(webhook["url"])
    file = tmp_path / "alertmanager.yml"
    with ExitStack() as held:
        hooks = held.enter_context(Hooks())
        held.callback(hooks.shutdown)
        threading.Thread(target=hooks.serve_forever, daemon=True).start()
        webhook["url"] = f"http://127.0.0.1:{hooks.server_address[1]}{asked.path}"
        file.write_text(yaml.safe_dump(config))
        command = [
            found("prometheus-alertmanager", ALERTMANAGER),
            f"--config.file={file}",
            f"--storage.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{prometheus.alertmanager_port}",
            "--cluster.listen-address=",
        ]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        held.callback(process.wait, TIMEOUT_S)
        held.callback(process.terminate)
        path, payload = hooks.called.get(timeout=4 * TIMEOUT_S)
    # What webhook makes of that, by hooks.yaml.
    [hook] = read(RETRAIN / "hooks.yaml")
    assert asked.port == 9000
    assert path == f"/hooks/{hook['id']}"
    rule = hook["trigger-rule"]["match"]
    assert payload[rule["parameter"]["name"]] == rule["value"]
    [argument] = hook["pass-arguments-to-command"]
    model: Any = payload
    for name in argument["name"].split("."):
        model = model[name]
    assert model == "digits"
    assert {alert["labels"]["alertname"] for alert in payload["alerts"]} == {"ConvoyDrift"}

    program = tmp_path / "convoy"
    program.write_text('#!/bin/sh\necho "$@"\n', encoding="ascii")
    program.chmod(0o755)

    def retrain(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", RETRAIN / Path(hook["execute-command"]).name, name],
            capture_output=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            text=True,
            timeout=TIMEOUT_S,
        )

    assert retrain(model).stdout.startswith("train --retrain --base models/digits ")
    # It comes from outside.
    assert retrain("../x; id").returncode == 2
