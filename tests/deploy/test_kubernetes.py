"""deploy/kubernetes: what kustomize makes of each overlay, held against Kubernetes' own schemas and
against what the service and its commands really take; and deploy/compose.yaml.
"""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoy import client
from convoy.bulk.settings import BulkSettings
from convoy.cli.app import app
from convoy_service.rollout import policy
from convoy_service.settings import Settings
from convoy_service.telemetry import counters as metrics
from convoy_training.pipeline.outcome import EXIT
from convoy_training.settings import TrainingSettings
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, environment
from tests.deploy.conftest import DEPLOY, found
from tests.integration.object_store import URL, ObjectStore

pytestmark = pytest.mark.deploy

KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = sorted(path.parent.name for path in KUBERNETES.glob("overlays/*/kustomization.yaml"))
# What a platform puts together of them.
COMBINED = {
    "gpu with all": (
        "gpu",
        ["autoscale-keda", "monitoring", "shared-models", "canary", "envoy"],
    ),
    "retrain with monitoring": ("retrain", ["monitoring"]),
    "cpu on a store": ("cpu", ["object-store", "autoscale", "monitoring"]),
    "retrain on a store": ("retrain", ["object-store", "monitoring"]),
}
# The oldest release that has all that is used, and the newest that the schemas know.
VERSIONS = "1.30", "1.34"

Manifest = dict[str, Any]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Manifest]]:
    """What kustomize makes of each overlay, and of overlays with more components."""
    kubectl = found("kubectl", "Kubernetes' client, the package kubernetes-client of Debian 13")
    told = subprocess.run(
        [kubectl, "version", "--client", "--output=json"], capture_output=True, check=True
    )
    minor = re.match(r"\d+", json.loads(told.stdout)["clientVersion"]["minor"])
    # The first with kustomize 5.
    if not minor or int(minor[0]) < 27:
        pytest.skip("kubectl is too old: 1.27 or later is needed")

    def build(folder: Path) -> list[Manifest]:
        done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # Such as of deprecated fields.
        assert not done.stderr
        return list(yaml.safe_load_all(done.stdout))

    made = {name: build(KUBERNETES / "overlays" / name) for name in OVERLAYS}
    for name, (overlay, components) in COMBINED.items():
        folder = tmp_path_factory.mktemp("combined").resolve()

        def beside(*parts: str, folder: Path = folder) -> str:
            return os.path.relpath(KUBERNETES.joinpath(*parts), folder)

        kustomization = {
            "resources": [beside("overlays", overlay)],
            "components": [beside("components", each) for each in components],
        }
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf-8")
        made[name] = build(folder)
    # The example, and what it becomes for somebody who also retrains.
    for name, text in (
        ("docs/deploy.md", example("yaml")),
        (
            "docs/deploy.md, retrain",
            re.sub(r"overlays/cpu|\n.*shared-models", retrained, example("yaml")),
        ),
    ):
        folder = tmp_path_factory.mktemp("documented").resolve()
        documented = text.replace("../deploy", os.path.relpath(DEPLOY, folder))
        (folder / "kustomization.yaml").write_text(documented, "utf-8")
        made[name] = build(folder)
    # Of that, a pod of the next release beside it.
    beside_it, both = (tmp_path_factory.mktemp("next").resolve() for _ in range(2))
    canary_release: Manifest = {
        "resources": [os.path.relpath(folder, beside_it)],
        "components": [os.path.relpath(KUBERNETES / "components" / "canary-release", beside_it)],
        "images": [{"name": "registry.example/convoy", "newTag": "next"}],
    }
    (beside_it / "kustomization.yaml").write_text(yaml.safe_dump(canary_release), "utf-8")
    [canary] = [m for m in build(beside_it) if m["kind"] != "ConfigMap"]
    assert canary["metadata"]["name"] == "convoy-canary"
    kustomization = {"resources": [os.path.relpath(each, both) for each in (folder, beside_it)]}
    (both / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf-8")
    made["docs/deploy.md, next"] = build(both)
    return made


def retrained(found: re.Match[str]) -> str:
    return "" if "shared-models" in found[0] else "overlays/retrain"


def example(language: str) -> str:
    """The one block of code in this language of docs/deploy.md."""
    text = (REPOSITORY / "docs" / "deploy.md").read_text("utf-8")
    [block] = re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return str(block)


def test_the_documented_service_config_is_that_of_our_client() -> None:
    assert json.loads(example("json")) == json.loads(
        str(dict(client._OPTIONS)["grpc.service_config"])
    )


def test_the_documented_images_stay_what_they_are_for(built: dict[str, list[Manifest]]) -> None:
    def ours(name: str) -> set[str]:
        return {
            container["image"]
            for _, spec in pods({name: built[name]})
            for container in containers(spec)
            if "convoy" in container["image"]
        }

    for overlay, documented in (("cpu", "docs/deploy.md"), ("retrain", "docs/deploy.md, retrain")):
        assert ours(documented) == {f"registry.example/{image}" for image in ours(overlay)}
    assert ours("docs/deploy.md, next") - ours(documented) == {"registry.example/convoy:next"}


def every(built: dict[str, list[Manifest]], *kinds: str) -> Iterator[tuple[str, Manifest]]:
    """All manifests, or those of these kinds, with what they are called in messages."""
    for name, manifests in built.items():
        for each in manifests:
            if not kinds or each["kind"] in kinds:
                yield f"{name}: {each['kind']} {each['metadata']['name']}", each


def pod(manifest: Manifest) -> Manifest | None:
    """The specification of its pods; None where it has none."""
    spec: Manifest = manifest.get("spec", {})
    if manifest["kind"] == "ServingRuntime":
        return spec
    if manifest["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    found: Manifest | None = spec.get("template", {}).get("spec")
    return found


def pods(built: dict[str, list[Manifest]]) -> Iterator[tuple[str, Manifest]]:
    for what, manifest in every(built):
        if spec := pod(manifest):
            yield what, spec


def containers(spec: Manifest) -> list[Manifest]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def variables(container: Manifest, manifests: list[Manifest]) -> dict[str, str]:
    """The environment that a container gets, without what is only known in the cluster."""
    named = {m["metadata"]["name"]: m for m in manifests if m["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            found |= named[source["configMapRef"]["name"]]["data"]
    return found | {e["name"]: e["value"] for e in container.get("env", []) if "value" in e}


def check_schemas(tools: Path, version: str, manifests: list[Manifest]) -> dict[str, Any]:
    here = Path(__file__).parent
    done = subprocess.run(
        [tools / "python", "-P", here / "schemas.py", version, here / "crds"],
        input=yaml.safe_dump_all(manifests),
        capture_output=True,
        env=environment(PYTHONPATH=""),
        text=True,
        timeout=4 * TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("version", VERSIONS)
def test_every_manifest_keeps_to_the_schemas(
    version: str, built: dict[str, list[Manifest]], tools: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifests = [each for _, each in every(built)]
    result = check_schemas(tools, version, manifests)
    assert not result["wrong"]
    with capsys.disabled():
        print(f"\n  {version}: {result['checked']} manifests")
    assert not result["unknown"], "put their CustomResourceDefinitions into tests/deploy/crds"


def test_the_check_finds_what_is_wrong(built: dict[str, list[Manifest]], tools: Path) -> None:
    deployment = copy.deepcopy(next(each for _, each in every(built, "Deployment")))
    deployment["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    assert "readinesProbe" in check_schemas(tools, VERSIONS[0], [deployment])["wrong"][0]
    scaled = copy.deepcopy(next(each for _, each in every(built, "ScaledObject")))
    scaled["spec"]["triggers"][0]["metricTyp"] = "Value"
    assert "metricTyp" in check_schemas(tools, VERSIONS[0], [scaled])["wrong"][0]


def test_lint_of_manifests(built: dict[str, list[Manifest]], tools: Path, tmp_path: Path) -> None:
    for name, manifests in built.items():
        file = tmp_path / f"{re.sub(r'[^a-z]', '-', name)}.yaml"
        file.write_text(yaml.safe_dump_all(manifests), "utf-8")
    # Namespaces, registries (and so digests) are whose cluster it is; tags that do not change need no
    # pull; the credentials of object stores are variables, as their makers' libraries have it.
    done = subprocess.run(
        [tools / "checkov", "--skip-download", "--framework", "kubernetes", "--output", "json",
         "--skip-check", "CKV_K8S_21,CKV_K8S_43,CKV_K8S_15,CKV_K8S_35", "--directory", tmp_path],
        capture_output=True,
        env=environment(PYTHONPATH=""),
        text=True,
        timeout=8 * TIMEOUT_S,
    )  # fmt: skip
    told = json.loads(done.stdout)
    wrong = [f"{c['check_id']} {c['check_name']}: {c['resource']} in {c['file_path']}"
             for c in told["results"]["failed_checks"]]  # fmt: skip
    assert not wrong
    assert not told["summary"]["parsing_errors"]
    assert done.returncode == 0, done.stderr
    # Of each manifest some.
    assert told["summary"]["passed"] > sum(map(len, built.values()))


def test_lint_of_the_dockerfile(tools: Path) -> None:
    done = subprocess.run(
        [tools / "hadolint", REPOSITORY / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_manifests_name_is_there(built: dict[str, list[Manifest]]) -> None:
    for overlay, manifests in built.items():
        there = {(m["kind"], m["metadata"]["name"]) for m in manifests}
        assert len(there) == len(manifests)
        wanted: set[tuple[str, str]] = set()
        labels = []
        for manifest in manifests:
            spec = manifest.get("spec", {})
            if target := spec.get("scaleTargetRef"):
                wanted.add((target.get("kind", "Deployment"), target["name"]))
                # Who scales says how many there are.
                [scaled] = [
                    m
                    for m in manifests
                    if m["kind"] == "Deployment" and m["metadata"]["name"] == target["name"]
                ]
                assert "replicas" not in scaled["spec"]
            body = pod(manifest)
            if body is None or manifest["kind"] == "ServingRuntime":
                continue
            outer = spec["jobTemplate"]["spec"] if manifest["kind"] == "CronJob" else spec
            template = outer["template"]["metadata"]["labels"]
            if manifest["kind"] == "Job":
                template = template | {"batch.kubernetes.io/job-name": manifest["metadata"]["name"]}
            labels.append(template)
            if "serviceAccountName" in body:
                wanted.add(("ServiceAccount", body["serviceAccountName"]))
            mounted = {m["name"] for c in containers(body) for m in c.get("volumeMounts", [])}
            assert mounted == {volume["name"] for volume in body.get("volumes", [])}
            for volume in body.get("volumes", []):
                if "configMap" in volume:
                    wanted.add(("ConfigMap", volume["configMap"]["name"]))
                if "persistentVolumeClaim" in volume:
                    wanted.add(
                        ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
                    )
            for container in containers(body):
                wanted |= {
                    ("ConfigMap", source["configMapRef"]["name"])
                    for source in container.get("envFrom", [])
                    if "configMapRef" in source
                }
        assert wanted <= there, overlay
        for kind, path in SELECTORS.items():
            for manifest in (m for m in manifests if m["kind"] == kind):
                selector = manifest["spec"]
                for part in path:
                    selector = selector[part]
                # A policy for what may train is there before something trains.
                if manifest["metadata"]["name"] != "convoy-training":
                    assert any(selector.items() <= each.items() for each in labels), manifest


SELECTORS = {
    "Service": ("selector",),
    "PodDisruptionBudget": ("selector", "matchLabels"),
    "NetworkPolicy": ("podSelector", "matchLabels"),
    "PodMonitor": ("selector", "matchLabels"),
}


def test_ports_go_by_names_that_containers_give(built: dict[str, list[Manifest]]) -> None:
    for manifests in built.values():
        ports = {
            port["name"]
            for manifest in manifests
            for container in (pod(manifest) or {"containers": []})["containers"]
            for port in container.get("ports", [])
        }
        asked = {
            endpoint["port"]
            for _, monitor in every({"": manifests}, "PodMonitor")
            for endpoint in monitor["spec"]["podMetricsEndpoints"]
        } | {
            port["targetPort"]
            for _, service in every({"": manifests}, "Service")
            for port in service["spec"]["ports"]
            if "targetPort" in port
        }
        assert asked <= ports


@pytest.mark.parametrize("kind", ["serve", "train", "bulk"])
def test_commands_and_variables_are_what_the_command_line_takes(
    kind: str, built: dict[str, list[Manifest]], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {f"CONVOY_{field.name.upper()}" for field in fields(Settings)}
    seen = 0
    for overlay, manifests in built.items():
        for what, spec in pods({overlay: manifests}):
            for container in spec["containers"]:
                words = [*container.get("command", []), *container.get("args", [])]
                if words[:2] == ["sh", "/retrain/retrain.sh"]:
                    words[:2] = ["convoy", "train", "--retrain"]
                if words[:2] == ["sh", "/bulk/bulk.sh"]:
                    words[:2] = ["convoy", "bulk"]
                if words[:2] != ["convoy", kind]:
                    continue
                seen += 1
                given = variables(container, manifests)
                ours = {name for name in given if name.startswith("CONVOY_")}
                assert ours <= known, what
                with monkeypatch.context() as patched:
                    for name in os.environ:
                        if name.startswith("CONVOY_"):
                            patched.delenv(name)
                    for name, value in given.items():
                        patched.setenv(name, value)
                    _, bound, _ = app.parse_args(words[1:], exit_on_error=False, print_error=False)
                [settings] = [
                    each
                    for each in bound.arguments.values()
                    if isinstance(each, Settings | TrainingSettings | BulkSettings)
                ]
                if isinstance(settings, Settings):
                    _check_served(what, settings, spec)
                elif isinstance(settings, BulkSettings):
                    assert settings.models == Path("/models"), what
                    assert bound.arguments["to"].startswith("/training/"), what
                    [job] = [m["spec"] for m in manifests if m["kind"] == "Job"]
                    cores = int(container["resources"]["limits"]["cpu"])
                    assert settings.actors == job["completions"] * cores, what
                else:
                    # Nothing else outlasts the pod, and the root file system can't be written to.
                    store = any(each["name"] == "STORE" for each in container["env"])
                    assert settings.models == Path("/training/models" if store else "/models"), what
                    assert settings.checkpoints.is_relative_to("/training"), what
    assert seen


def _check_served(what: str, settings: Settings, spec: Manifest) -> None:
    """What the pod's specification has to have, for these settings."""
    grace_s = spec.get("terminationGracePeriodSeconds", 30)
    assert grace_s > settings.shutdown_delay_s + settings.drain_grace_s + 2, what
    # Endpoints and proxies take a few seconds, so a delay there must be.
    assert settings.shutdown_delay_s >= 5, what
    assert settings.max_connection_age_s > 0, what
    [container] = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports in (
        {"http": settings.http_port, "grpc": settings.port, "metrics": settings.metrics_port},
        {"h2c": settings.port},
    ), what
    card = "nvidia.com/gpu" in container["resources"]["limits"]
    assert settings.device == ("cuda" if card else "cpu"), what
    assert container["image"] == ("convoy:gpu" if card else container["image"]), what
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    if isinstance(settings.models, str):
        assert settings.models_cache
        assert any(settings.models_cache.is_relative_to(mount) for mount in mounts), what
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    for probe in probes.values():
        assert probe["grpc"]["port"] == settings.port, what
    names = {name: probe["grpc"]["service"] for name, probe in probes.items()}
    assert names == PROBES, what
    # A process that is slow to start is not taken for dead: ten minutes.
    assert probes["startup"]["failureThreshold"] * probes["startup"]["periodSeconds"] >= 600, what


OUR_TAGS = {"cpu", "gpu", "train", "bulk", "next"}
PROBES = {
    "startup": "convoy.v1.ImageClassifier",
    "readiness": "convoy.v1.ImageClassifier",
    "liveness": "",
}


def test_probes_ask_for_what_the_service_says(models: Path) -> None:
    def serving(name: str) -> bool:
        request = health_pb2.HealthCheckRequest(service=PROBES[name])
        response = health.Check(request, timeout=TIMEOUT_S)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    with (
        closing(Server("--shutdown-delay-s", "60", models=models)) as server,
        server.ready().channel() as channel,
    ):
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert all(serving(name) for name in PROBES)
        server.send(signal.SIGTERM)
        deadline = time.monotonic() + TIMEOUT_S
        while serving("readiness"):
            assert time.monotonic() < deadline
        assert serving("liveness")


def test_pods_keep_to_the_restricted_pod_security_standard(
    built: dict[str, list[Manifest]],
) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/, and more."""
    for what, spec in pods(built):
        whole = spec.get("securityContext", {})
        runtime = "supportedModelFormats" in spec  # KServe makes a pod of it
        assert runtime or spec["automountServiceAccountToken"] is False, what
        assert runtime or spec["enableServiceLinks"] is False, what
        for name in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
            assert not spec.get(name), what
        allowed = {"configMap", "emptyDir", "persistentVolumeClaim"}
        for volume in spec.get("volumes", []):
            assert volume.keys() - {"name"} <= allowed, what
            assert volume.get("emptyDir", {"sizeLimit": 1}).get("sizeLimit"), what
        for container in containers(spec):
            own = whole | container["securityContext"]
            assert own["runAsNonRoot"] is True, what
            assert own["runAsUser"] == 10001, what
            assert own["seccompProfile"] == {"type": "RuntimeDefault"}, what
            assert own["allowPrivilegeEscalation"] is False, what
            assert own["readOnlyRootFilesystem"] is True, what
            assert own["capabilities"] == {"drop": ["ALL"]}, what
            assert not any("hostPort" in port for port in container.get("ports", [])), what
            limits, requests = (container["resources"][which] for which in ("limits", "requests"))
            assert {"cpu", "memory"} <= limits.keys() & requests.keys(), what
            # Threads are counted from the limit, and memory that is not there kills.
            assert all(limits[name] == requests[name] for name in ("cpu", "memory")), what
            name, _, tag = container["image"].partition(":")
            assert "/" in name or tag in OUR_TAGS, what
            assert tag not in {"", "latest"}, what


def test_envoy_has_as_many_threads_as_cores(built: dict[str, list[Manifest]]) -> None:
    for what, spec in pods({"envoy": built["envoy"]}):
        [container] = spec["containers"]
        if container["name"] == "envoy":
            at = container["args"].index("--concurrency") + 1
            assert container["args"][at] == container["resources"]["limits"]["cpu"], what
            return
    raise AssertionError("no Envoy")


def test_a_pod_without_a_card_that_works_serves_nothing(built: dict[str, list[Manifest]]) -> None:
    [(_, deployment)] = every({"gpu": built["gpu"]}, "Deployment")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    given = variables(container, built["gpu"])
    assert given["CONVOY_DEVICE"] == "cuda"
    # As it is here.
    words = [
        sys.executable,
        "-m",
        "convoy",
        *container["args"],
        "--models",
        "models",
        "--port",
        "0",
    ]
    done = subprocess.run(
        [*words, "--metrics-port", "0", "--models-cache", "cache"],
        capture_output=True,
        cwd=REPOSITORY,
        env=environment(**given, CUDA_VISIBLE_DEVICES=""),
        text=True,
        timeout=4 * TIMEOUT_S,
    )
    assert done.returncode == 1, done.stderr
    assert "ready in" not in done.stderr
    assert "cuda" in done.stderr


@pytest.mark.parametrize("overlay", ["train-distributed", "bulk"])
def test_machines_that_work_together_find_each_other(
    overlay: str, built: dict[str, list[Manifest]]
) -> None:
    manifests = built[overlay]
    [(_, job)] = every({"": manifests}, "Job")
    [(_, service)] = every({"": manifests}, "Service")
    spec, name = job["spec"], job["metadata"]["name"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] > 1
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]
    [container] = spec["template"]["spec"]["containers"]
    names = [each["name"] for each in container["env"]]
    given = variables(container, manifests)
    domain = service["metadata"]["name"]
    if overlay == "bulk":
        assert "INDEX" in names
        assert given["HEAD"] == f"{name}-0.{domain}:{service['spec']['ports'][0]['port']}"
        return
    # Kubernetes puts in what stands before.
    assert names.index("INDEX") < names.index("TF_CONFIG")
    text = given["TF_CONFIG"]
    [port] = [each["containerPort"] for each in container["ports"]]
    for index in range(spec["completions"]):
        config = json.loads(text.replace("$(INDEX)", str(index)))
        assert config["task"] == {"type": "worker", "index": index}
        # As the Job controller names its pods.
        workers = [f"{name}-{each}.{domain}:{port}" for each in range(spec["completions"])]
        assert config["cluster"] == {"worker": workers}


@pytest.mark.parametrize(("status", "ends"), [(0, 0), (3, 0), (4, 0), (1, 1), (137, 137)])
def test_a_job_fails_only_where_the_retraining_did(
    status: int, ends: int, retrain: Callable[[str], subprocess.Popen[str]]
) -> None:
    with retrain(f'echo "$@"; exit {status}') as job:
        said, _ = job.communicate(timeout=TIMEOUT_S)
    assert said == "train --retrain --base=/models/digits\n"
    assert job.returncode == ends
    assert (ends == 0) == (status in {EXIT["published"], EXIT["not-better"], EXIT["nothing-new"]})


def test_a_job_that_is_told_to_stop_tells_the_training(
    retrain: Callable[[str], subprocess.Popen[str]],
) -> None:
    with retrain(
        "trap 'sleep 0.2; echo told; exit 143' TERM; echo on; while :; do sleep 0.05; done"
    ) as job:
        assert job.stdout
        assert job.stdout.readline() == "on\n"
        job.terminate()
        assert job.stdout.readline() == "told\n"
        assert job.wait(TIMEOUT_S) == 143


def test_a_job_brings_models_of_a_store_and_puts_there_what_it_made(tmp_path: Path) -> None:
    base, program = tmp_path / "models" / "digits", tmp_path / "convoy"
    # A version that differs from the one before.
    trained = (
        f'[ "$1" = models ] && exec {sys.executable} -m convoy "$@"\n'
        f"ls {base}; cd {base}; cp -r 1 2; cd 2; rm report.html\n"
        f"exec {sys.executable} - <<'END'\n"
        "import json, pathlib\n"
        "path = pathlib.Path('manifest.json')\n"
        "told = json.loads(path.read_text())\n"
        "del told['files']['report.html']\n"
        "path.write_text(json.dumps(told))\n"
        "END"
    )
    real = trained.partition("\n")[0]
    job: list[str | Path] = [
        "sh",
        KUBERNETES / "overlays" / "retrain" / "retrain.sh",
        f"--base={base}",
    ]
    with ObjectStore() as store:
        given = store.variables()

        def there() -> set[str]:
            found = [each["path"] for batch in store.inside.list() for each in batch]
            return {path.split("/")[1] for path in found if path.endswith("manifest.json")}

        def run(convoy: str) -> subprocess.CompletedProcess[str]:
            program.write_text(f"#!/bin/sh\n{convoy}\n", encoding="ascii")
            program.chmod(0o755)
            path = f"{tmp_path}:{os.environ['PATH']}"
            return subprocess.run(
                job,
                capture_output=True,
                cwd=REPOSITORY,
                env=environment(**given, STORE=URL, PATH=path),
                text=True,
                timeout=4 * TIMEOUT_S,
            )

        store.add(REPOSITORY / "models" / "digits" / "1")
        done = run(trained)
        assert done.returncode == 0, done.stderr
        assert "1\n" in done.stdout
        assert there() == {"1", "2"}
        # Once.
        done = run(f"{real}\nexit 4")
        assert done.returncode == 0, done.stderr
        assert there() == {"1", "2"}
        # Nothing is trained where it is not known what it is to be better than.
        store.kill()
        done = run(f"{real}\nexit 0")
        assert done.returncode == 75, done.stderr


@pytest.fixture
def retrain(tmp_path: Path) -> Callable[[str], subprocess.Popen[str]]:
    """Runs the CronJob's script with a `convoy` that does what is said."""

    def run(convoy: str) -> subprocess.Popen[str]:
        program = tmp_path / "convoy"
        program.write_text(f"#!/bin/sh\n{convoy}\n", encoding="ascii")
        program.chmod(0o755)
        return subprocess.Popen(
            ["sh", KUBERNETES / "overlays" / "retrain" / "retrain.sh", "--base=/models/digits"],
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            text=True,
        )

    return run


@pytest.mark.parametrize("links", [True, False])
def test_a_volume_begins_with_the_models_of_the_image_and_keeps_what_it_has(
    links: bool, tmp_path: Path
) -> None:
    volume, policies = tmp_path / "volume", KUBERNETES / "components" / "canary"
    volume.mkdir()

    def seed(models: Path) -> None:
        script = KUBERNETES / "components" / "shared-models" / "seed.sh"
        subprocess.run(
            ["sh", script, models, policies, volume],
            check=True,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOSTNAME": "pod"},
            timeout=TIMEOUT_S,
        )

    if not links:
        (tmp_path / "ln").write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
        (tmp_path / "ln").chmod(0o755)
    seed(REPOSITORY / "models")
    assert sorted(path.name for path in volume.iterdir()) == ["cifar10", "digits"]
    made = (REPOSITORY / "models").rglob("*")
    assert all(
        (volume / path.relative_to(REPOSITORY / "models")).read_bytes() == path.read_bytes()
        for path in made
        if path.is_file()
    )
    canary = policy.read(volume / "digits")
    assert canary.canary
    assert canary.canary.share == 0.1
    assert policy.read(volume / "cifar10") == policy.Policy()
    # Others have changed both since.
    (volume / "digits" / "versions.toml").write_text("serve = [1]\n", encoding="ascii")
    other = tmp_path / "other"
    (other / "digits" / "1").mkdir(parents=True)
    (other / "letters" / "1").mkdir(parents=True)
    seed(other)
    assert sorted(path.name for path in volume.iterdir()) == ["cifar10", "digits", "letters"]
    assert policy.read(volume / "digits").pinned == [1]
    assert (volume / "digits" / "1" / "manifest.json").exists()


def test_autoscalers_ask_for_metrics_that_there_are(built: dict[str, list[Manifest]]) -> None:
    queries = [
        trigger["metadata"]["query"]
        for _, scaled in every(built, "ScaledObject")
        for trigger in scaled["spec"]["triggers"]
    ]
    assert queries
    for query in queries:
        for name in re.findall(r"convoy_\w+", query):
            family = re.sub(r"^convoy_|_(sum|count|bucket)$", "", name)
            assert metrics._FAMILIES[family].kind == "histogram"


def test_a_prometheus_without_the_operator_finds_who_has_metrics(
    built: dict[str, list[Manifest]],
) -> None:
    for what, manifest in every(built, "Deployment", "ServingRuntime"):
        if manifest["metadata"]["name"] == "convoy-envoy":
            continue
        spec = manifest["spec"]
        told = spec if "annotations" in spec else spec["template"]["metadata"]
        assert told["annotations"]["prometheus.io/scrape"] == "true", what
        [container] = (pod(manifest) or {})["containers"]
        ports = {port["name"]: str(port["containerPort"]) for port in container["ports"]}
        port = ports.get("metrics", str(Settings.metrics_port))
        assert told["annotations"]["prometheus.io/port"] == port, what


def test_the_operator_gets_the_rules_of_prometheus(built: dict[str, list[Manifest]]) -> None:
    [(_, rule)] = every({"": built["monitoring"]}, "PrometheusRule")
    groups = [
        group
        for file in sorted((DEPLOY / "prometheus").glob("*.rules.yaml"))
        for group in yaml.safe_load(file.read_text("utf-8"))["groups"]
    ]
    assert groups
    assert rule["spec"]["groups"] == groups
    [dashboard] = [
        each
        for _, each in every({"": built["monitoring"]}, "ConfigMap")
        if each["metadata"]["labels"].get("grafana_dashboard") == "1"
    ]
    [text] = dashboard["data"].values()
    assert json.loads(text)["panels"]


def test_compose_names_what_is_there() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text("utf-8"))
    card = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text("utf-8"))
    services = compose["services"]
    targets = {
        service["build"]["target"]
        for each in (compose, card)
        for service in each["services"].values()
        if "build" in service
    }
    stages = re.findall(
        r"^FROM .* AS (\S+)$", (REPOSITORY / "Dockerfile").read_text("utf-8"), re.MULTILINE
    )
    assert targets == {"serve", "serve-gpu", "train"}
    assert targets <= set(stages)
    ports = {f"{port}:{port}" for port in (Settings.http_port, Settings.port)}
    assert set(services["convoy"]["ports"]) == ports
    known = {f"CONVOY_{field.name.upper()}" for field in fields(Settings)}
    given = services["convoy"]["environment"] | card["services"]["convoy"]["environment"]
    assert given.keys() <= known
    grace_s = float(given["CONVOY_SHUTDOWN_DELAY_S"]) + float(given["CONVOY_DRAIN_GRACE_S"])
    assert float(services["convoy"]["stop_grace_period"].removesuffix("s")) > grace_s + 2
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        for volume in service["volumes"]:
            source, _, _ = volume.partition(":")
            assert (DEPLOY / source).exists() if "/" in source else source in compose["volumes"], (
                name
            )
    # What Prometheus and Grafana read points to the services by name.
    prometheus = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    [scrape] = prometheus["scrape_configs"]
    [names] = scrape["dns_sd_configs"]
    assert names["names"] == ["convoy"]
    assert names["port"] == Settings.metrics_port
    [manager] = prometheus["alerting"]["alertmanagers"][0]["static_configs"]
    [(name, _, port)] = [target.partition(":") for target in manager["targets"]]
    assert services[name]["ports"] == [f"127.0.0.1:{port}:{port}"]
    [flag] = [each for each in services[name]["command"] if "--config.file" in each]
    [mounted] = [v.split(":") for v in services[name]["volumes"] if v.startswith("./")]
    assert (DEPLOY / mounted[0] / Path(flag.partition("=")[2]).relative_to(mounted[1])).exists()
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text("utf-8"))
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "convoy.yaml").read_text("utf-8"))[
        "providers"
    ]
    [mounted] = [v.split(":") for v in services["grafana"]["volumes"] if "dashboards" in v]
    assert provider["options"]["path"] == mounted[1]
    assert (DEPLOY / mounted[0] / "convoy.json").exists()
