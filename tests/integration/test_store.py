import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from protos import classifier_pb2 as pb
from tests.conftest import TIMEOUT_S, Server
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
    return Server(
        *("--models", URL, "--models-cache", cache, *quick, *arguments),
        variables=store.variables(),
    )


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


@pytest.mark.parametrize("processes", [(), ("--acceptors", "2", "--engines", "1")])
def test_nobody_notices_what_becomes_of_the_store(
    tmp_path: Path, store: ObjectStore, colours: Path, processes: tuple[str, ...]
) -> None:
    store.add(colours, 1)
    with serve(store, tmp_path, *processes) as server:
        with Load(server.ready()) as load:
            load.wait_for(1)
            store.add(colours, 2)
            load.wait_for(2)

            store.kill()
            server.wait_for("can't be read: .*; going on with what is in")
            wait_until_errors(server, "store", 2)
            load.wait_for_more()
            store.start()
            for number in (1, 2, 3):
                store.add(colours, number)
            load.wait_for(3)
            assert "is there again" in server.log

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
            load.wait_for_more(200)
            store.trouble("")
        assert load.failures == []
        assert load.versions == sorted(load.versions)
