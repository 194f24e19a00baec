import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.rollout.policy import FILE
from tests.conftest import TIMEOUT_S, Server, convoy
from tests.integration.conftest import classifier_on
from tests.integration.models import add_colours
from tests.integration.object_store import URL, ObjectStore
from tests.integration.pictures import raw, solid

RED = pb.ClassifyRequest(model="colours", images=[raw(solid("red"))])


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version of a model, whose files are uploaded under several numbers."""
    return add_colours(tmp_path_factory.mktemp("colours")).folder


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        yield store


def serve(store: ObjectStore, cache: Path, *arguments: str) -> Server:
    quick = ("--store-watch-s", "0.2", "--watch-s", "0.1")
    where = ("--models", URL, "--models-cache", str(cache))
    return Server(*where, *quick, *arguments, variables=store.variables())


class Load:
    """Asks all the time, `with` it, and knows what was answered by whom."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.versions: list[int] = []
        self.failures: list[str] = []
        self._over = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        with self._server.channel() as channel:
            calls = classifier_on(channel)
            while not self._over.wait(0.005):
                try:
                    answer = calls.Classify(RED, timeout=TIMEOUT_S)
                    assert answer.results[0].classification.labels[0].name == "red"
                    version = answer.version
                except Exception as error:
                    self.failures.append(str(error))
                    continue
                with self._changed:
                    self.versions.append(version)
                    self._changed.notify_all()

    def wait_for(self, version: int) -> None:
        """Until it is the one that answers."""
        with self._changed:
            came = self._changed.wait_for(lambda: self.versions[-1:] == [version], TIMEOUT_S)
        assert came, f"{self.versions[-1:]}, not {version}\n{self._server.log}"

    def wait_for_more(self, answers: int = 20) -> None:
        with self._changed:
            enough = len(self.versions) + answers
            assert self._changed.wait_for(lambda: len(self.versions) >= enough, TIMEOUT_S)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def errors(server: Server, kind: str) -> float:
    return server.metrics()[f'convoy_store_errors_total{{kind="{kind}"}}']


def wait_until_errors(server: Server, kind: str, count: float) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while errors(server, kind) < count:
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)


def test_nobody_notices_what_becomes_of_the_store(
    tmp_path: Path, store: ObjectStore, colours: Path
) -> None:
    store.add(colours, 1)
    with serve(store, tmp_path) as server:
        with Load(server.ready()) as load:
            load.wait_for(1)
            store.add(colours, 2)
            load.wait_for(2)

            store.kill()
            wait_until_errors(server, "store", 2)
            load.wait_for_more()
            store.start()
            for number in (1, 2, 3):
                store.add(colours, number)
            load.wait_for(3)
            server.wait_for("going on with what is in")
            server.wait_for("is there again")

            store.trouble("spoilt")
            store.add(colours, 4)
            wait_until_errors(server, "corrupt", 3)
            load.wait_for_more()
            assert load.versions[-1] == 3
            store.trouble("")
            load.wait_for(4)

            store.trouble("slow")
            store.add(colours, 5)
            load.wait_for(5)
            store.trouble("silent")
            load.wait_for_more()
            store.trouble("")
            store.put(f"colours/{FILE}", b"serve = [3]")
            load.wait_for(3)
        assert load.failures == []
        assert list(dict.fromkeys(load.versions)) == [1, 2, 3, 4, 5]

    # And one that starts goes on from the cache.
    store.kill()
    with serve(store, tmp_path) as server:
        with Load(server.ready()) as load:
            server.wait_for("can't be read")
            load.wait_for(3)
            store.start()
            store.add(colours, 3)
            store.add(colours, 6)
            store.put(f"colours/{FILE}", b"serve = [6]")
            load.wait_for(6)
        assert load.failures == []


def test_several_processes_follow_the_store_as_one(
    tmp_path: Path, store: ObjectStore, colours: Path
) -> None:
    store.add(colours, 1)
    with serve(store, tmp_path, "--acceptors", "2", "--engines", "1") as server:
        with Load(server.ready()) as one, Load(server) as other:
            one.wait_for(1)
            other.wait_for(1)
            store.add(colours, 2)
            one.wait_for(2)
            other.wait_for(2)
            store.kill()
            wait_until_errors(server, "store", 2)
            one.wait_for_more()
            other.wait_for_more()
        assert one.failures == other.failures == []
        assert server.metrics()["convoy_store_fetched_bytes_total"] == 2 * sum(
            file.bytes for file in bundles.read_manifest(colours).files.values()
        )


def test_without_a_store_and_without_a_cache_there_is_nothing_to_serve(
    tmp_path: Path, store: ObjectStore
) -> None:
    store.kill()
    server = serve(store, tmp_path)
    try:
        assert server.wait() == 1
        assert f"{URL} can't be read: " in server.log
        assert "and there is none of it in" in server.log
    finally:
        server.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_is_no_matter_to_what_serves(
    small_disk: Path, tmp_path: Path, store: ObjectStore, colours: Path
) -> None:
    large = shutil.copytree(colours, tmp_path / "colours" / "2")
    size = 600_000
    data = random.Random(0).randbytes(size)
    (large / "report.html").write_bytes(data)
    manifest = bundles.read_manifest(large)
    files = {**manifest.files, "report.html": bundles.describe(data)}
    (large / "manifest.json").write_bytes(msgspec.json.encode(replace(manifest, files=files)))
    store.add(colours, 1)
    ballast = small_disk / "ballast"
    with serve(store, small_disk) as server, Load(server.ready()) as load:
        ballast.write_bytes(bytes(600_000))
        store.add(large)
        wait_until_errors(server, "disk", 2)
        load.wait_for_more()
        assert set(load.versions) == {1}
        server.wait_for(r"no room: 0\.6 MB are wanted")
        ballast.unlink()
        load.wait_for(2)
        assert load.failures == []


def test_an_order_goes_to_the_store_and_to_every_server(
    tmp_path: Path, store: ObjectStore, colours: Path
) -> None:
    store.add(colours, 1)
    store.add(colours, 2)
    control = "--allow-repository-control"
    with (
        serve(store, tmp_path / "a", control) as first,
        serve(store, tmp_path / "b") as second,
        Load(first.ready()) as one,
        Load(second.ready()) as other,
    ):
        one.wait_for(2)
        other.wait_for(2)
        assert convoy("models", "rollback", "colours", "--server", first.target).returncode == 0
        one.wait_for(1)
        other.wait_for(1)
        assert one.failures == other.failures == []
    assert "stable = 1" in bytes(store.inside.get(f"colours/{FILE}").bytes()).decode()


def test_versions_are_pushed_and_pulled_by_hand(
    tmp_path: Path, store: ObjectStore, colours: Path
) -> None:
    def run(*arguments: str | Path) -> str:
        done = convoy("models", *arguments, cwd=tmp_path, **store.variables())
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("push", colours, URL) == f"{colours} is version 1 in {URL}\n"
    assert run("push", colours.parent, URL) == f"{colours} is already version 1 in {URL}\n"
    assert run("pull", URL) == "models/colours/1\n"
    there = {file.name: file.read_bytes() for file in (tmp_path / "models/colours/1").iterdir()}
    assert there == {file.name: file.read_bytes() for file in colours.iterdir()}
