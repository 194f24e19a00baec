"""The images: built by buildah, run by podman as production would, and held to what the Dockerfile says.

A Debian of the same Python stands in for the public image, which not every machine can fetch; with
PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm it is that one. Images of gigabytes (train, bulk)
are built and run by `make image-test LARGE=1` alone.
"""

import json
import os
import stat
import subprocess
import sys
import sysconfig
import threading
import tomllib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from PIL import Image

from convoy import Classifier
from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Golden
from tests.conftest import REPOSITORY, TIMEOUT_S, environment
from tests.deploy.conftest import DEPLOY, found
from tests.deploy.test_balancing import free_ports
from tests.integration.conftest import classifier_on
from tests.integration.pictures import raw, solid

# A whole build, on a slow machine.
BUILD_S = 1800

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(BUILD_S)]

STAND_IN = "localhost/convoy-stand-in:python3.11-bookworm"
READY = "convoy.v1.ImageClassifier"
PORTS = ("CONVOY_PORT", "CONVOY_HTTP_PORT", "CONVOY_METRICS_PORT")

# As strict as Kubernetes's restricted policy, and then some: nothing can be written anywhere.
LOCKED = ["--read-only", "--read-only-tmpfs=false", "--cap-drop=ALL", "--memory=1g"]
LOCKED += ["--security-opt=no-new-privileges", "--pids-limit=200"]


def run(*command: str | Path, timeout_s: float = BUILD_S, **variables: str) -> str:
    """Its standard output; what it says otherwise is shown where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        cwd=REPOSITORY,
        env=environment(**variables),
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _or_skip(why: str, *command: str | Path) -> None:
    """Runs what depends on nothing of ours: where it fails, there is nothing to be tested here."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=BUILD_S / 2
    )
    if done.returncode != 0:
        pytest.skip(f"{why}: {done.stderr.strip()[-300:]}")


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tells podman what works without systemd, for as long as this module's tests run."""
    if os.geteuid() != 0:
        pytest.skip("building and running images as done here needs root")
    for tool in ("buildah", "podman", "runc", "conmon"):
        found(tool, "apt-get install --no-install-recommends buildah podman runc conmon")
    path = tmp_path_factory.mktemp("podman") / "containers.conf"
    path.write_text(
        '[containers]\ndefault_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]\n[engine]\n'
        'runtime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONTAINERS_CONF", str(path))
        yield


@pytest.fixture(scope="module")
def base(podman: None, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of the build that name the Python image."""
    if image := os.environ.get("PYTHON_IMAGE"):
        return ["--build-arg", f"PYTHON_IMAGE={image}"]
    if subprocess.run(["podman", "image", "exists", STAND_IN]).returncode != 0:
        found("mmdebstrap", "apt-get install mmdebstrap, or name an image in PYTHON_IMAGE")
        archive = tmp_path_factory.mktemp("base") / "base.tar"
        # Without .pyc files, as the public image.
        hook = """
            ln -s /usr/bin/python3.11 "$1/usr/local/bin/python3"
            rm -f "$1/usr/lib/python3.11/EXTERNALLY-MANAGED"
            find "$1/usr/lib" -name __pycache__ -prune -exec rm -r {} +
        """
        packages = "python3.11,python3.11-venv,ca-certificates,netbase,tzdata"
        _or_skip(
            "Debian's packages can't be had",
            *("mmdebstrap", "--variant=minbase", "--mode=root", f"--include={packages}"),
            *("--dpkgopt=force-unsafe-io", f"--customize-hook={hook}", "bookworm", archive),
        )
        run("podman", "import", archive, STAND_IN)
        archive.unlink()
    # Nothing of ours is in it: what fails now is the machine's.
    _or_skip(
        "no container runs here",
        "podman",
        "run",
        "--rm",
        "--network=host",
        *LOCKED,
        STAND_IN,
        "true",
    )
    return ["--pull-never", "--build-arg", f"PYTHON_IMAGE={STAND_IN}"]


def build(target: str, base: list[str]) -> None:
    run(
        *("deploy/image.sh", target, "--isolation", "chroot", *base),
        ENGINE="buildah",
        PYTHON=sys.executable,
    )


@pytest.fixture(scope="module")
def serve(base: list[str]) -> str:
    build("serve", base)
    return "convoy:cpu"


@pytest.fixture(scope="module")
def train(base: list[str]) -> str:
    if not os.environ.get("LARGE"):
        pytest.skip("TensorFlow makes it large: make image-test LARGE=1")
    build("train", base)
    return "convoy:train"


@pytest.fixture(scope="module")
def bulk(base: list[str]) -> str:
    if not os.environ.get("LARGE"):
        pytest.skip("Ray makes it large: make image-test LARGE=1")
    build("bulk", base)
    return "convoy:bulk"


@pytest.fixture(scope="module")
def digits() -> Golden:
    return bundles.read(REPOSITORY / "models" / "digits" / "1").golden


class Container:
    """A running container with the host's network, from its start to its removal."""

    def __init__(self, image: str, *arguments: str, options: tuple[str, ...] = ()) -> None:
        ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.port = ports["CONVOY_PORT"]
        variables = [f"--env={name}={value}" for name, value in ports.items()]
        self.id = run(
            *("podman", "run", "--detach", "--network=host", *LOCKED, *variables, *options),
            *(image, *arguments),
        ).strip()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ready(self) -> Self:
        """Waits until it serves, or has ended."""
        ended = threading.Thread(target=self.wait, daemon=True)
        ended.start()
        channel = grpc.insecure_channel(self.target)
        future = grpc.channel_ready_future(channel)
        while ended.is_alive():
            try:
                future.result(timeout=0.2)
                break
            except grpc.FutureTimeoutError:
                continue
        channel.close()
        assert ended.is_alive(), self.log
        return self

    def wait(self) -> int:
        """Its exit status, when it has ended."""
        return int(run("podman", "wait", self.id, timeout_s=BUILD_S))

    def execute(self, *command: str) -> str:
        return run("podman", "exec", self.id, *command, timeout_s=4 * TIMEOUT_S)

    @property
    def log(self) -> str:
        done = subprocess.run(["podman", "logs", self.id], capture_output=True, text=True)
        return done.stdout + done.stderr

    def stop(self) -> int:
        """As `docker stop -t 60`: SIGTERM, and SIGKILL, status 137, where that does not help."""
        run("podman", "stop", "--time=60", self.id)
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        subprocess.run(
            ["podman", "rm", "--force", "--time=0", "--volumes", self.id], capture_output=True
        )


@pytest.fixture
def root(serve: str) -> Iterator[Path]:
    """The serve image's files."""
    yield Path(run("podman", "image", "mount", serve).strip())
    run("podman", "image", "unmount", serve)


def config(image: str) -> dict[str, Any]:
    (found,) = json.loads(run("podman", "image", "inspect", image))
    described: dict[str, Any] = found["Config"]
    return {**described, "Healthcheck": found.get("Healthcheck")}


def test_the_image_says_how_it_is_run(serve: str) -> None:
    described = config(serve)
    assert described["User"] == "10001:10001"
    assert described["Entrypoint"] == ["convoy"]
    assert described["Cmd"] == ["serve"]
    assert described["Healthcheck"]["Test"] == ["CMD", "convoy", "health"]
    assert set(described["ExposedPorts"]) == {"8000/tcp", "8001/tcp", "8002/tcp"}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    labels = described["Labels"]
    assert labels["org.opencontainers.image.version"] == project["version"]
    assert labels["org.opencontainers.image.licenses"] == project["license"]
    assert len(labels["org.opencontainers.image.revision"]) == 40


def test_the_image_has_what_serving_needs_and_no_more(root: Path) -> None:
    installed, size = Counter[str](), Counter[str]()
    wrong: list[str] = []
    for folder, _, names in os.walk(root):
        inside = "/" + os.path.relpath(folder, root)
        for name in names:
            path = Path(folder) / name
            known = path.lstat()
            part = inside.split("site-packages/")[-1] if "site-packages/" in inside else inside
            size[part.split("/")[0] or "/" + inside.split("/")[1]] += known.st_size
            if not stat.S_ISREG(known.st_mode):
                continue
            if known.st_mode & (stat.S_ISUID | stat.S_ISGID | stat.S_IWOTH):
                wrong.append(f"{inside}/{name} {stat.filemode(known.st_mode)}")
            if known.st_mode & 0o111 and name in {"cc", "gcc", "g++", "clang", "ld", "make", "as"}:
                wrong.append(f"{inside}/{name}")
            if inside.startswith("/opt/convoy") and (known.st_uid or known.st_gid):
                wrong.append(f"{inside}/{name} is not root's")
    site = root / "opt/convoy/lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    installed.update(path.name.split("-")[0] for path in site.glob("*.dist-info"))
    shown = ", ".join(f"{name} {count / 1e6:.0f} MB" for name, count in size.most_common(8))
    print(f"serve: {sum(size.values()) / 1e6:.0f} MB; of these {shown}")
    assert not wrong
    assert {"convoy_serving", "onnxruntime", "obstore"} <= set(installed)
    assert set(installed).isdisjoint({"tensorflow", "keras", "onnx", "pip", "pyarrow", "hatchling"})
    for gone in ("root/.cache", "var/cache/pip", "opt/tools", "src", "dist", "run/secrets"):
        assert not (root / gone).exists()
    # What the service imports is compiled: nobody could write it later.
    sources = [
        *site.glob("convoy_service/*.py"),
        *site.glob("grpc/*.py"),
        *root.glob("usr/**/json/*.py"),
    ]
    assert len({source.parent for source in sources}) == 3
    tag = sys.implementation.cache_tag
    for source in sources:
        compiled = source.parent / "__pycache__" / f"{source.stem}.{tag}.pyc"
        # The second word says that it holds whatever time the source has.
        assert compiled.read_bytes()[4:8] == b"\x01\0\0\0", source


def test_it_serves_without_root_and_without_a_place_to_write(
    serve: str, digits: Golden, tmp_path: Path
) -> None:
    for number, pixels in enumerate(digits.pixels):
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"{number}.png")
    tmp_path.chmod(0o755)
    wanted = [str(label) for label in digits.probabilities.argmax(axis=1)]
    with Container(serve, options=(f"--volume={tmp_path}:/images:ro",)) as container:
        container.ready()
        with Classifier(container.target, model="digits") as classifier:
            models = {model.name for model in classifier.models()}
            images = [np.squeeze(pixels) for pixels in digits.pixels]
            assert [each.label for each in classifier.classify_many(images)] == wanted
        assert models == {"digits", "cifar10"}

        server = ("--server", container.target)
        lines = container.execute("convoy", "classify", "/images", *server, "--model=digits")
        labels = {line.split()[0]: line.split()[1] for line in lines.splitlines()}
        assert labels == {f"/images/{n}.png": label for n, label in enumerate(wanted)}

        run("podman", "healthcheck", "run", container.id)
        status = container.execute("cat", "/proc/1/status", "/proc/1/cmdline")
        assert "Uid:\t10001\t10001\t10001\t10001" in status
        assert "CapBnd:\t0000000000000000" in status
        assert "convoy\0serve" in status
        refused = subprocess.run(
            ["podman", "exec", container.id, "touch", "/x", "/tmp/x", "/cache/x", "/models/x"],
            capture_output=True,
            text=True,
        )
        assert refused.stderr.count("Read-only file system") == 4, refused.stderr
        assert "telemetry" not in container.log
        assert container.stop() == 0, container.log


def test_engines_want_no_more_than_tmp_and_models_can_be_mounted(
    serve: str, models: Path, tmp_path: Path
) -> None:
    for path in (models, *models.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    mounted = f"--volume={models}:/models:ro"
    with Container(serve, "serve", "--engines=1", options=("--tmpfs=/tmp", mounted)) as container:
        container.ready()
        with Classifier(container.target, model="colours") as classifier:
            assert classifier.classify(solid("red")).label == "red"
        assert container.stop() == 0, container.log


def test_the_service_of_compose_runs(serve: str, tools: Path, tmp_path: Path) -> None:
    """deploy/compose.yaml's own, on the host's network: Prometheus and Grafana are others' images."""
    service = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["convoy"]
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    del service["build"], service["ports"]
    service["environment"] |= {name: str(port) for name, port in ports.items()}
    volumes = {volume.partition(":")[0]: None for volume in service["volumes"]}
    project = f"convoy-test-{os.getpid()}"
    file = tmp_path / "compose.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "name": project,
                "services": {"convoy": {**service, "network_mode": "host"}},
                "volumes": volumes,
            }
        )
    )
    compose = (tools / "podman-compose", "--file", file)
    try:
        run(*compose, "up", "--detach")
        target = f"127.0.0.1:{ports['CONVOY_PORT']}"
        with grpc.insecure_channel(target) as channel:
            grpc.channel_ready_future(channel).result(timeout=4 * TIMEOUT_S)
        with Classifier(target) as classifier:
            assert {model.name for model in classifier.models()} == {"digits", "cifar10"}
        # `train` publishes into the one, and nothing else is to be changed.
        check = "test -w /models -a -w /models/digits -a -w /cache -a -w /tmp -a ! -w /opt/convoy"
        run(*compose, "exec", "-T", "convoy", "sh", "-c", check)
        [container] = run(
            *("podman", "ps", "--quiet", "--filter", f"label=io.podman.compose.project={project}")
        ).split()
        run("podman", "stop", "--time=60", container)
        described = json.loads(run("podman", "inspect", container))[0]
        assert described["State"]["ExitCode"] == 0
    finally:
        run(*compose, "down", "--volumes")


def test_health_fails_where_nothing_serves(serve: str) -> None:
    with Container(serve, "600", options=("--entrypoint=sleep",)) as container:
        done = subprocess.run(
            ["podman", "healthcheck", "run", container.id], capture_output=True, text=True
        )
        assert done.returncode == 1


class Traffic:
    """Calls without retries, one after the other on several threads, as a balancer would send them: to
    the first server until its readiness is withdrawn, from then on to the second.
    """

    def __init__(self, first: Container, second: Container, request: pb.ClassifyRequest) -> None:
        options = [("grpc.enable_retries", 0)]
        self._channels = [grpc.insecure_channel(each.target, options) for each in (first, second)]
        self._request = request
        self._withdrawn, self._over = threading.Event(), threading.Event()
        self._changed = threading.Condition()
        self.answered = [0, 0]
        self.failed: list[str] = []
        self._threads = ThreadPoolExecutor(9)
        self._threads.submit(self._watch)
        self._senders = [self._threads.submit(self._send) for _ in range(8)]

    def _watch(self) -> None:
        asked = health_pb2.HealthCheckRequest(service=READY)
        try:
            for told in health_pb2_grpc.HealthStub(self._channels[0]).Watch(asked):
                if told.status != health_pb2.HealthCheckResponse.SERVING:
                    self._withdrawn.set()
        except grpc.RpcError:
            self._withdrawn.set()

    def _send(self) -> None:
        stubs = [classifier_on(channel) for channel in self._channels]
        while not self._over.is_set():
            which = int(self._withdrawn.is_set())
            try:
                stubs[which].Classify(self._request, timeout=TIMEOUT_S)
                failure = ""
            except grpc.RpcError as error:
                failure = f"{which}: {error}"
            with self._changed:
                if failure:
                    self.failed.append(failure)
                else:
                    self.answered[which] += 1
                self._changed.notify_all()

    def wait_for(self, which: int, answers: int) -> None:
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.answered[which] >= answers or self.failed, 2 * TIMEOUT_S
            ), self.answered

    def close(self) -> None:
        self._over.set()
        for sender in self._senders:
            sender.result()
        for channel in self._channels:
            channel.close()
        self._threads.shutdown()


def test_sigterm_under_load_fails_no_request(serve: str, digits: Golden) -> None:
    request = pb.ClassifyRequest(model="digits", images=[raw(digits.pixels[0])])
    with Container(serve) as old, Container(serve) as new:
        old.ready()
        new.ready()
        with closing(Traffic(old, new, request)) as traffic:
            traffic.wait_for(0, 200)
            assert old.stop() == 0, old.log
            traffic.wait_for(1, 200)
        assert traffic.failed == []
        print(f"answered before and after: {traffic.answered}")
        assert "stopped" in old.log


def test_training_publishes_where_models_are_mounted(train: str, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    os.chown(models, 10001, 10001)
    tmp_path.chmod(0o755)
    options = ("--tmpfs=/tmp", "--volume=/cache", f"--volume={models}:/models", "--memory=4g")
    with Container(train, "train", "--data=digits", options=options) as container:
        assert container.wait() == 0, container.log
    assert (models / "digits" / "1" / "manifest.json").is_file()
    assert config(train)["Cmd"] == ["train"]


def test_stored_images_are_classified_as_kubernetes_has_it(
    bulk: str, digits: Golden, tmp_path: Path
) -> None:
    """What a pod of overlay bulk runs, with what it may write to."""
    images, answers = tmp_path / "images", tmp_path / "answers"
    images.mkdir()
    answers.mkdir()
    for number, pixels in enumerate(digits.pixels):
        Image.fromarray(pixels[..., 0]).save(images / f"{number}.png")
    os.chown(answers, 10001, 10001)
    tmp_path.chmod(0o755)
    [port] = free_ports(1)
    script = REPOSITORY / "deploy" / "kubernetes" / "overlays" / "bulk" / "bulk.sh"
    given = {"INDEX": "0", "IP": "127.0.0.1", "HEAD": f"127.0.0.1:{port}", "HOME": "/tmp"}
    options = (
        *(f"--env={name}={value}" for name, value in given.items()),
        *(f"--volume={images}:/data:ro", f"--volume={answers}:/answers"),
        *("--tmpfs=/tmp", "--shm-size=300m", "--memory=4g", "--pids-limit=4000"),
        *(f"--volume={script}:/bulk/bulk.sh:ro", "--entrypoint=sh"),
    )
    words = ("/bulk/bulk.sh", "/data", "/answers", "--model=digits", "--models=/models")
    with Container(bulk, *words, options=options) as container:
        assert container.wait() == 0, container.log
    summary = json.loads((answers / "_job" / "summary.json").read_text())
    assert (summary["count"], summary["errors"]) == (len(digits.pixels), 0)


def test_the_gpu_image_builds_up_to_its_packages(base: list[str]) -> None:
    """With the stand-in for CUDA's image: Python from the distribution, and Convoy for it."""
    build("app-gpu", [*base, *("--build-arg", base[-1].replace("PYTHON", "CUDA"))])
