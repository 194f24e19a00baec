import contextlib
import errno
import itertools
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from obstore.exceptions import GenericError, NotSupportedError, PermissionDeniedError
from obstore.store import MemoryStore

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import GOLDEN, MANIFEST, MODEL
from convoy_service.errors import ConvoyError
from convoy_service.object_store import mirror as stores
from convoy_service.object_store.mirror import Store
from convoy_service.rollout.policy import FILE
from convoy_service.telemetry.counters import Metrics
from tests.unit import versions

URL = "s3://bucket/models"
WAIT_S = 30.0


class Bucket:
    """An object store in memory, of which a test can see and decide what is read."""

    def __init__(self) -> None:
        self.inside = MemoryStore()
        self.reads: list[tuple[str, int]] = []
        self.writes: list[str] = []
        # Called before each read with its path; what it raises is what the reader gets.
        self.on_read: Callable[[str], object] = lambda path: None
        self.on_list: Callable[[], object] = lambda: None
        self.on_write: Callable[[Any], None] = lambda mode: None
        self.change: Callable[[str, bytes], bytes] = lambda path, data: data

    def list(self) -> Any:
        self.on_list()
        return self.inside.list()

    def get(self, path: str, *, options: Any = None) -> Any:
        self.on_read(path)
        got = self.inside.get(path, options=options)
        data = self.change(path, bytes(got.bytes()))
        self.reads.append((path, len(data)))
        return SimpleNamespace(bytes=lambda: data, meta=got.meta)

    def put(self, path: str, file: Any, *, mode: Any = None) -> Any:
        self.on_write(mode)
        self.writes.append(path)
        return self.inside.put(path, file, mode=mode)

    def add(self, version: Path) -> None:
        for file in version.iterdir():
            self.add_file(version, file.name)

    def add_file(self, version: Path, name: str) -> None:
        data = (version / name).read_bytes()
        self.inside.put(f"{version.parent.name}/{version.name}/{name}", data)

    def remove(self, prefix: str) -> None:
        found = [each["path"] for each in self.inside.list().collect()]
        for path in found:
            if path.startswith(prefix):
                self.inside.delete(path)

    def text(self, path: str) -> str:
        return bytes(self.inside.get(path).bytes()).decode()

    def read_of(self, name: str) -> int:
        """How many bytes of files of this name were read."""
        return sum(size for path, size in self.reads if path.endswith(f"/{name}"))


class Mirror:
    """A store on a bucket, with a clock that the test moves."""

    def __init__(self, folder: Path, bucket: Bucket, newest: int = 3) -> None:
        self.now = 1000.0
        self.folder, self.bucket, self.newest = folder, bucket, newest
        self.open()

    def open(self) -> None:
        self.metrics = Metrics()
        self.store = Store(
            URL,
            self.folder,
            self.metrics,
            watch_s=5.0,
            newest=self.newest,
            source=self.bucket,
            piece_bytes=300,
            clock=lambda: self.now,
        )

    def restarted(self) -> "Mirror":
        """By another process, that knows nothing but the folder."""
        self.close()
        self.open()
        return self

    def close(self) -> None:
        self.store.close()

    def look(self) -> None:
        self.store.look()

    def later(self, seconds: float = 400.0) -> None:
        """Looks again when everything that was put off is due."""
        self.now += seconds
        self.look()

    def versions(self, name: str = "pets") -> list[int]:
        """Those that can be served: that all of them are whole is asserted."""
        found = bundles.versions(self.folder / name)
        for version in found:
            bundles.read(self.folder / name / str(version))
        return found

    def count(self, family: str, *labels: str) -> float:
        value = dict(self.metrics.snapshot()[family]).get(labels, 0.0)
        assert isinstance(value, float | int)
        return value

    def policy(self, name: str = "pets") -> Path:
        return self.folder / name / FILE


@pytest.fixture
def bucket() -> Bucket:
    return Bucket()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for number in range(3):
        versions.write(folder / "pets", versions.ONNX + bytes([number]))
    versions.write(folder / "cars")
    return folder


@pytest.fixture
def made(once: Path, tmp_path: Path) -> Path:
    """Where versions are made: `pets` 1 to 3, of different graphs, and `cars` 1."""
    return shutil.copytree(once, tmp_path / "made")


@pytest.fixture
def mirrored(tmp_path: Path, bucket: Bucket) -> Iterator[Callable[..., Mirror]]:
    """Makes mirrors of the bucket."""
    with contextlib.ExitStack() as made:

        def make(name: str = "cache", newest: int = 3) -> Mirror:
            mirror = Mirror(tmp_path / name, bucket, newest)
            made.callback(mirror.close)
            return mirror

        yield make


@pytest.fixture
def mirror(mirrored: Callable[..., Mirror]) -> Mirror:
    return mirrored()


def pets(made: Path, version: int) -> Path:
    return made / "pets" / str(version)


def test_versions_come_as_they_are_and_nothing_else_does(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    bucket.add(made / "cars" / "1")
    for path in ("README.md", "pets/config.pbtxt", "pets/1/deep/file", "pets/01/x", ".git/1/x"):
        bucket.inside.put(path, b"x")
    bucket.inside.put("pets/1/not-in-the-manifest", b"x")
    mirror.look()
    assert sorted(f.name for f in mirror.folder.iterdir()) == [".store", "cars", "pets"]
    assert [f.name for f in (mirror.folder / "pets").iterdir()] == ["1"]
    there = {f.name: f.read_bytes() for f in (mirror.folder / "pets" / "1").iterdir()}
    assert there == {f.name: f.read_bytes() for f in pets(made, 1).iterdir()}
    assert mirror.versions("cars") == [1]
    assert mirror.count("store_last_sync_timestamp_seconds") > 1e9
    assert not list(mirror.folder.glob(".store/incoming/*/*"))


def test_what_is_there_is_not_fetched_again(mirror: Mirror, bucket: Bucket, made: Path) -> None:
    bucket.add(pets(made, 1))
    bucket.inside.put(f"pets/{FILE}", b"serve = 1\n")
    mirror.look()
    fetched = sum(f.stat().st_size for f in pets(made, 1).iterdir() if f.name != MANIFEST)
    assert mirror.count("store_fetched_bytes") == fetched
    bucket.reads.clear()
    mirror.later()
    assert bucket.reads == []
    # Uploaded once more, as it was.
    bucket.add(pets(made, 1))
    mirror.later()
    assert bucket.read_of(MODEL) == 0
    mirror.restarted().look()
    assert mirror.versions() == [1]
    assert bucket.read_of(MODEL) == 0
    assert mirror.count("store_fetched_bytes") == 0


@pytest.mark.parametrize(
    ("order", "missing"),
    [
        ((MODEL, GOLDEN, MANIFEST), (MANIFEST, MANIFEST)),
        ((MANIFEST, MODEL, GOLDEN), (MODEL, GOLDEN)),
        ((GOLDEN, MANIFEST, MODEL), (MANIFEST, MODEL)),
    ],
)
def test_an_incomplete_version_waits_and_says_for_what(
    mirror: Mirror,
    bucket: Bucket,
    made: Path,
    order: tuple[str, ...],
    missing: tuple[str, ...],
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.reads.clear()
    for name, absent in zip(order, missing, strict=False):
        bucket.add_file(pets(made, 2), name)
        mirror.look()
        assert mirror.versions() == [1]
        assert mirror.store.waiting() == {("pets", 2): f"{absent} is not there yet"}
        assert mirror.count("store_waiting_versions") == 1
    # Where nothing has changed, it is not looked at again.
    read = len(bucket.reads)
    mirror.later()
    assert len(bucket.reads) == read
    assert bucket.read_of(MODEL) == 0
    bucket.add_file(pets(made, 2), order[-1])
    mirror.look()
    assert mirror.versions() == [1, 2]
    assert mirror.store.waiting() == {}
    assert mirror.count("store_waiting_versions") == 0
    assert mirror.count("store_errors", "corrupt") == 0


def test_a_file_that_is_still_short_is_waited_for(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    data = (pets(made, 1) / MODEL).read_bytes()
    bucket.inside.put(f"pets/1/{MODEL}", data[:100])
    mirror.look()
    assert mirror.versions() == []
    assert mirror.store.waiting() == {
        ("pets", 1): f"{MODEL} has 100 of {len(data)} bytes",
    }
    bucket.inside.put(f"pets/1/{MODEL}", data)
    mirror.look()
    assert mirror.versions() == [1]


def test_no_version_is_ever_half_there(mirror: Mirror, bucket: Bucket, made: Path) -> None:
    seen = []

    def look_at_folder(path: str) -> None:
        seen.append(mirror.versions())

    bucket.on_read = look_at_folder
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.add(pets(made, 2))
    mirror.look()
    assert len(seen) > 10
    assert sorted(map(len, seen)) == [0] * seen.count([]) + [1] * seen.count([1])
    assert mirror.versions() == [1, 2]


def test_the_newest_come_first_of_every_model_and_no_more_than_are_wanted(
    mirrored: Callable[..., Mirror], bucket: Bucket, made: Path
) -> None:
    mirror = mirrored(newest=2)
    for number in (1, 2, 3):
        bucket.add(pets(made, number))
    bucket.add(made / "cars" / "1")
    mirror.look()
    assert mirror.versions() == [2, 3]
    read = [path.rpartition("/")[0] for path, _ in bucket.reads if path.endswith(MODEL)]
    assert list(dict.fromkeys(read)) == ["cars/1", "pets/3", "pets/2"]


def test_versions_that_the_policy_names_are_brought_and_kept(
    mirrored: Callable[..., Mirror], bucket: Bucket, made: Path
) -> None:
    mirror = mirrored(newest=1)
    for number in (1, 2, 3):
        bucket.add(pets(made, number))
    mirror.look()
    assert mirror.versions() == [3]
    for text, there in {
        "serve = [1]": [1, 3],
        "serve = 2": [2, 3],
        "[labels]\nstable = 1\ncanary = 3": [1, 2, 3],
        "skip = [3]": [2, 3],
        'serve = "newest"': [3],
        "serve = ": [3],
        "": [3],
    }.items():
        bucket.inside.put(f"pets/{FILE}", text.encode())
        mirror.look()
        assert mirror.policy().read_text() == text
        # With canary = 3 the newest of those that are not named is brought, too.
        assert mirror.versions() == there, text


def test_wrong_bytes_are_never_taken_and_mended_ones_at_once(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.add(pets(made, 2))
    bucket.inside.put(f"pets/2/{MODEL}", bytes(len((pets(made, 2) / MODEL).read_bytes())))
    mirror.look()
    assert mirror.versions() == [1]
    assert mirror.count("store_errors", "corrupt") == 1
    assert "its sha256 is not the manifest's" in mirror.store.waiting()["pets", 2]
    bucket.reads.clear()
    mirror.now += 1  # not yet
    mirror.look()
    assert bucket.reads == []
    assert mirror.count("store_errors", "corrupt") == 1
    before = mirror.count("store_last_sync_timestamp_seconds")
    mirror.later()
    assert mirror.count("store_errors", "corrupt") == 2
    assert mirror.count("store_last_sync_timestamp_seconds") == before
    bucket.add_file(pets(made, 2), MODEL)
    mirror.now += 1
    mirror.look()
    assert mirror.versions() == [1, 2]
    assert mirror.store.waiting() == {}
    assert mirror.count("store_last_sync_timestamp_seconds") > before


def test_what_stays_wrong_is_tried_less_and_less_often(
    mirror: Mirror, bucket: Bucket, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.add(pets(made, 1))
    bucket.inside.put(f"pets/1/{MODEL}", bytes((pets(made, 1) / MODEL).stat().st_size))
    for _ in range(8):
        mirror.later()
    waits = [float(wait) for wait in re.findall(r"the next try is in (\d+) s", caplog.text)]
    bounds = [5, 10, 20, 40, 80, 160, 300, 300]
    assert all(0.5 * b - 1 <= wait <= b for wait, b in zip(waits, bounds, strict=True)), waits
    # Not all at the same time as others.
    assert any(wait < b - 1 for wait, b in zip(waits, bounds, strict=True)), waits


@pytest.mark.parametrize("name", [MODEL, GOLDEN, MANIFEST])
def test_bytes_that_are_spoilt_on_the_way_are_fetched_again(
    mirror: Mirror, bucket: Bucket, made: Path, name: str
) -> None:
    spoilt = itertools.count()

    def spoil(path: str, data: bytes) -> bytes:
        if path.endswith(name) and next(spoilt) == 1:
            return data[:50] + bytes([data[50] ^ 1]) + data[51:]
        return data

    bucket.change = spoil
    bucket.add(pets(made, 1))
    mirror.look()
    assert mirror.versions() == []
    assert mirror.count("store_errors", "corrupt") == 1
    mirror.later(6.0)
    assert mirror.versions() == [1]
    assert mirror.store.waiting() == {}


def test_a_manifest_that_is_none_is_refused(mirror: Mirror, bucket: Bucket, made: Path) -> None:
    bucket.add(pets(made, 1))
    for text in ("{", "[]", '{"files": {"../x": {"sha256": "", "bytes": 0}}}'):
        bucket.inside.put(f"pets/1/{MANIFEST}", text.encode())
        mirror.look()
        assert mirror.versions() == []
        assert MANIFEST in mirror.store.waiting()["pets", 1]
    assert mirror.count("store_errors", "corrupt") == 3


def test_a_manifest_that_leads_out_of_its_folder_is_refused(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    text = bucket.text(f"pets/1/{MANIFEST}").replace(f'"{MODEL}"', '"../../escaped"')
    bucket.inside.put(f"pets/1/{MANIFEST}", text.encode())
    mirror.look()
    assert "which is no file of a version" in mirror.store.waiting()["pets", 1]
    assert not list(mirror.folder.rglob("escaped"))


def test_what_was_broken_off_is_gone_on_with(mirror: Mirror, bucket: Bucket, made: Path) -> None:
    size = (pets(made, 1) / MODEL).stat().st_size
    bucket.add(pets(made, 1))

    def break_off(path: str) -> None:
        if path.endswith(MODEL) and bucket.read_of(MODEL) >= 600:
            raise GenericError("the line is dead")

    bucket.on_read = break_off
    with pytest.raises(GenericError):
        mirror.look()
    assert mirror.versions() == []
    bucket.on_read = lambda path: None
    mirror.look()
    assert mirror.versions() == [1]
    assert (
        bucket.read_of(MODEL)
        == size
        == mirror.count("store_fetched_bytes") - bucket.read_of(GOLDEN)
    )


def test_what_was_left_of_other_bytes_does_no_harm(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    left = mirror.folder / ".store" / "incoming" / "pets" / "1"
    left.mkdir(parents=True)
    (left / MODEL).write_bytes(b"of another time")
    (left / GOLDEN).write_bytes(bytes(100_000))
    (left / "strange").write_bytes(b"x")
    mirror.look()
    for _ in range(2):
        mirror.later()
    assert mirror.versions() == [1]
    assert not (mirror.folder / "pets" / "1" / "strange").exists()


def test_a_version_that_is_replaced_in_the_store_is_replaced_here(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    shutil.rmtree(pets(made, 1))
    shutil.copytree(pets(made, 3), pets(made, 1))
    bucket.add(pets(made, 1))
    mirror.look()
    assert mirror.versions() == [1]
    assert (mirror.folder / "pets" / "1" / MODEL).read_bytes()[-1] == 2


def test_a_version_that_serves_is_not_replaced(mirror: Mirror, bucket: Bucket, made: Path) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    mirror.store.in_use = lambda: {("pets", 1)}
    shutil.rmtree(pets(made, 1))
    shutil.copytree(pets(made, 3), pets(made, 1))
    bucket.add(pets(made, 1))
    mirror.look()
    assert (mirror.folder / "pets" / "1" / MODEL).read_bytes()[-1] == 0
    assert "publish a new one" in mirror.store.waiting()["pets", 1]
    assert mirror.count("store_errors", "changed") == 1
    mirror.store.in_use = frozenset
    mirror.later()
    assert (mirror.folder / "pets" / "1" / MODEL).read_bytes()[-1] == 2


def test_a_version_that_changes_while_it_is_fetched_is_begun_anew(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    other = versions.write(made / "other" / "pets", b"x" + versions.ONNX[::-1]).folder
    changed = False

    def replace(path: str) -> None:
        nonlocal changed
        mirror.now += 6
        if path.endswith(MODEL) and bucket.read_of(MODEL) >= 300 and not changed:
            changed = True
            bucket.add(other)

    bucket.on_read = replace
    mirror.look()
    assert mirror.versions() == []
    mirror.look()
    assert mirror.versions() == [1]
    assert (mirror.folder / "pets" / "1" / MODEL).read_bytes() == b"x" + versions.ONNX[::-1]
    assert mirror.count("store_errors", "corrupt") == 0


@pytest.mark.parametrize("restarted", [False, True])
def test_what_is_damaged_or_lost_here_is_fetched_again(
    mirror: Mirror, bucket: Bucket, made: Path, restarted: bool
) -> None:
    bucket.add(pets(made, 1))
    bucket.add(pets(made, 2))
    bucket.inside.put(f"pets/{FILE}", b"serve = 1")
    mirror.look()
    graph = mirror.folder / "pets" / "1" / MODEL
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    shutil.rmtree(mirror.folder / "pets" / "2")
    mirror.policy().unlink()
    if restarted:
        mirror.restarted()
    mirror.look()
    assert mirror.versions() == [1, 2]
    assert mirror.policy().read_text() == "serve = 1"
    assert bucket.text(f"pets/{FILE}") == "serve = 1"


def test_what_is_gone_from_the_store_goes_when_nothing_serves_it(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    for number in (1, 2, 3):
        bucket.add(pets(made, number))
    bucket.add(made / "cars" / "1")
    bucket.inside.put(f"cars/{FILE}", b"serve = 1")
    mirror.look()
    mirror.store.in_use = lambda: {("pets", 3), ("cars", 1)}
    for prefix in ("pets/2/", "pets/3/", "cars/"):
        bucket.remove(prefix)
    mirror.look()
    assert (mirror.versions(), mirror.versions("cars")) == ([1, 3], [1])
    mirror.store.in_use = frozenset
    mirror.look()
    assert mirror.versions() == [1]
    assert not (mirror.folder / "cars").exists()
    # And comes back.
    bucket.add(made / "cars" / "1")
    mirror.look()
    assert mirror.versions("cars") == [1]
    assert not mirror.policy("cars").exists()


def test_an_old_version_stays_until_its_successor_is_there(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.remove("pets/1/")
    bucket.add(pets(made, 2))
    bucket.inside.put(f"pets/2/{MODEL}", b"x")
    mirror.look()
    assert mirror.versions() == [1]
    bucket.add_file(pets(made, 2), MODEL)
    mirror.look()
    assert mirror.versions() == [2]


def test_an_empty_store_is_taken_for_a_mistake(mirror: Mirror, bucket: Bucket, made: Path) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.remove("")
    with pytest.raises(ConvoyError, match="it has no models: those in the cache are kept"):
        mirror.look()
    assert mirror.versions() == [1]


def test_a_full_disk_is_counted_cleaned_up_after_and_tried_again(
    mirror: Mirror, bucket: Bucket, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.add(pets(made, 2))
    usage = shutil.disk_usage(mirror.folder)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        mirror.look()
    assert mirror.versions() == [1]
    assert mirror.count("store_errors", "disk") == 1
    assert "no room" in mirror.store.waiting()["pets", 2]
    assert bucket.read_of(MODEL) == (pets(made, 1) / MODEL).stat().st_size

    def fill(path: str) -> None:
        if path.endswith(MODEL) and bucket.read_of(MODEL) > 1500:
            raise OSError(errno.ENOSPC, "No space left on device")

    bucket.on_read = fill
    mirror.later()
    assert mirror.count("store_errors", "disk") == 2
    assert not list(mirror.folder.glob(".store/incoming/*/*"))
    bucket.on_read = lambda path: None
    mirror.later()
    assert mirror.versions() == [1, 2]


def test_one_version_without_permission_does_not_hold_up_others(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    bucket.add(pets(made, 2))
    bucket.add(made / "cars" / "1")

    def deny(path: str) -> None:
        if path.startswith("pets/2/") and path.endswith(MODEL):
            raise PermissionDeniedError("403")

    bucket.on_read = deny
    mirror.look()
    assert (mirror.versions(), mirror.versions("cars")) == ([1], [1])
    assert mirror.count("store_errors", "denied") == 1


# Policies.


def test_a_policy_that_is_edited_here_goes_to_the_store_and_the_other_way(
    mirrored: Callable[..., Mirror], mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    other = mirrored("other")
    bucket.add(pets(made, 1))
    mirror.look()
    other.look()
    for turn, (editor, reader) in enumerate([(mirror, other), (other, mirror)] * 2):
        text = f"serve = {turn + 1}"
        editor.policy().write_text(text)
        editor.look()
        assert bucket.text(f"pets/{FILE}") == text
        reader.look()
        assert reader.policy().read_text() == text
    writes = len(bucket.writes)
    mirror.look()
    other.look()
    assert len(bucket.writes) == writes == 4
    bucket.inside.delete(f"pets/{FILE}")
    mirror.look()
    assert not mirror.policy().exists()


def test_of_two_edits_at_once_the_stores_counts(
    mirror: Mirror, bucket: Bucket, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()

    def someone_else(mode: Any) -> None:
        bucket.inside.put(f"pets/{FILE}", someone_elses)

    someone_elses = b"serve = [1]"
    # Between our look and our write.
    bucket.on_write = someone_else
    mirror.policy().write_text("serve = 2")
    mirror.look()
    assert bucket.text(f"pets/{FILE}") == "serve = [1]"
    bucket.on_write = lambda mode: None
    mirror.look()
    assert mirror.policy().read_text() == "serve = [1]"
    assert "was changed here and in s3://bucket/models: the store's counts" in caplog.text
    # And the same where there is one already.
    someone_elses = b"serve = [1, 1]"
    bucket.on_write = someone_else
    mirror.policy().write_text("serve = 3")
    mirror.look()
    mirror.look()
    assert mirror.policy().read_text() == bucket.text(f"pets/{FILE}") == "serve = [1, 1]"
    # And before we ask what it is that we replace.
    bucket.on_write = lambda mode: None
    bucket.on_read = lambda path: bucket.inside.put(f"pets/{FILE}", b"serve = [1, 1, 1]")
    mirror.policy().write_text("serve = 4")
    mirror.look()
    assert bucket.text(f"pets/{FILE}") == "serve = [1, 1, 1]"


def test_an_order_given_while_the_stores_policy_is_read_is_not_lost_unsaid(
    mirror: Mirror, bucket: Bucket, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.inside.put(f"pets/{FILE}", b"serve = [1]")
    bucket.on_read = lambda path: path.endswith(FILE) and mirror.policy().write_text("serve = 2")
    mirror.look()
    assert mirror.policy().read_text() == "serve = 2"
    bucket.on_read = lambda path: None
    mirror.look()
    assert mirror.policy().read_text() == bucket.text(f"pets/{FILE}") == "serve = [1]"
    assert "was changed here and in s3://bucket/models" in caplog.text


def test_an_order_given_while_the_store_is_away_goes_there_when_it_is_back(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    bucket.inside.put(f"pets/{FILE}", b"serve = 1")
    mirror.look()

    def away() -> None:
        raise GenericError("no route to host")

    bucket.on_list = away
    mirror.policy().write_text("serve = 2")
    with pytest.raises(GenericError):
        mirror.look()
    with pytest.raises(GenericError):
        mirror.restarted().look()
    assert mirror.policy().read_text() == "serve = 2"
    bucket.on_list = lambda: None
    mirror.look()
    assert bucket.text(f"pets/{FILE}") == "serve = 2"


def test_an_order_that_may_not_be_written_is_tried_again_by_and_by(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()

    def deny(mode: Any) -> None:
        raise PermissionDeniedError("403")

    bucket.on_write = deny
    mirror.policy().write_text("serve = 2")
    mirror.look()
    mirror.now += 1
    mirror.look()
    assert mirror.count("store_errors", "denied") == 1
    assert mirror.policy().read_text() == "serve = 2"
    mirror.later()
    assert mirror.count("store_errors", "denied") == 2
    bucket.on_write = lambda mode: None
    mirror.later()
    assert bucket.text(f"pets/{FILE}") == "serve = 2"


def test_a_store_without_conditions_is_written_to_all_the_same(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    def no_conditions(mode: Any) -> None:
        if mode != "overwrite":
            raise NotSupportedError("501")

    bucket.on_write = no_conditions
    bucket.add(pets(made, 1))
    mirror.look()
    for text in ("serve = 1", "serve = 2"):
        mirror.policy().write_text(text)
        mirror.look()
        assert bucket.text(f"pets/{FILE}") == text


def test_a_policy_that_can_not_be_written_keeps_no_version_waiting(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()

    def fail(mode: Any) -> None:
        raise GenericError("no such thing here")

    bucket.on_write = fail
    mirror.policy().write_text("serve = 2")
    bucket.add(pets(made, 2))
    before = mirror.count("store_last_sync_timestamp_seconds")
    mirror.look()
    assert mirror.versions() == [1, 2]
    assert mirror.count("store_errors", "store") == 1
    assert mirror.count("store_last_sync_timestamp_seconds") == before
    # A model that is gone is nobody's failure any more.
    bucket.add(made / "cars" / "1")
    bucket.remove("pets/")
    mirror.look()
    mirror.look()
    assert mirror.count("store_last_sync_timestamp_seconds") > before


def test_a_policy_does_not_wait_for_a_large_version(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    bucket.add(pets(made, 2))
    seen = []

    def on_read(path: str) -> None:
        mirror.now += 3
        if path.endswith(MODEL):
            bucket.inside.put(f"pets/{FILE}", b"serve = [1]")
            seen.append(mirror.policy().exists())

    bucket.on_read = on_read
    mirror.look()
    assert seen[0] is False
    assert seen[-1] is True
    assert mirror.versions() == [1, 2]


# The thread.


def threaded(folder: Path, bucket: Bucket) -> tuple[Store, Metrics]:
    metrics = Metrics()
    store = Store(URL, folder, metrics, watch_s=0.01, newest=3, source=bucket, piece_bytes=300)
    return store, metrics


def wait_until(event: threading.Event) -> None:
    assert event.wait(WAIT_S)


def test_a_start_waits_for_a_version_of_each_model_and_no_more(
    tmp_path: Path, bucket: Bucket, made: Path
) -> None:
    for number in (1, 2, 3):
        bucket.add(pets(made, number))
    bucket.add(made / "cars" / "1")
    go_on, held = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        if path.startswith("pets/2/"):
            held.set()
            wait_until(go_on)

    bucket.on_read = hold
    store, _ = threaded(tmp_path / "cache", bucket)
    try:
        store.start()
        wait_until(held)
        assert bundles.versions(store.folder / "pets") == [3]
        assert bundles.versions(store.folder / "cars") == [1]
    finally:
        go_on.set()
        store.close()


def test_an_end_does_not_wait_for_a_large_version(
    tmp_path: Path, bucket: Bucket, made: Path
) -> None:
    bucket.add(made / "cars" / "1")
    bucket.add(pets(made, 1))
    go_on, held = threading.Event(), threading.Event()

    def hold(path: str) -> None:
        if path == f"pets/1/{MODEL}":
            held.set()
            wait_until(go_on)

    bucket.on_read = hold
    store, _ = threaded(tmp_path / "cache", bucket)
    threading.Thread(target=store.start, daemon=True).start()
    wait_until(held)
    closing = threading.Thread(target=store.close)
    closing.start()
    wait_until(store._closed)
    go_on.set()
    closing.join(WAIT_S)
    assert len([path for path, _ in bucket.reads if path == f"pets/1/{MODEL}"]) == 1
    assert bundles.names(store.folder) == ["cars"]


def test_a_start_without_store_and_without_cache_is_refused(tmp_path: Path, bucket: Bucket) -> None:
    def away() -> None:
        raise GenericError("Generic S3 error: at http://host/bucket?X-Amz-Signature=secret\nDebug")

    bucket.on_list = away
    store, metrics = threaded(tmp_path / "cache", bucket)
    with pytest.raises(
        ConvoyError, match="s3://bucket/models can't be read: Generic S3"
    ) as refused:
        store.start()
    store.close()
    assert "secret" not in str(refused.value)
    assert "Debug" not in str(refused.value)
    assert dict(metrics.snapshot()["store_errors"])["store",] >= 1  # type: ignore[operator]


def test_a_start_on_an_empty_store_is_refused(tmp_path: Path, bucket: Bucket, made: Path) -> None:
    store, _ = threaded(tmp_path / "cache", bucket)
    with pytest.raises(ConvoyError, match="has no model: it is empty"):
        store.start()
    store.close()
    bucket.add_file(pets(made, 1), MODEL)
    store, _ = threaded(tmp_path / "cache2", bucket)
    with pytest.raises(ConvoyError, match=r"pets/1: manifest\.json is not there yet"):
        store.start()
    store.close()


def test_the_thread_goes_on_from_the_cache_and_notices_that_the_store_is_back(
    tmp_path: Path, bucket: Bucket, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bucket.add(pets(made, 1))
    store, _ = threaded(tmp_path / "cache", bucket)
    store.start()
    store.close()
    away, asked, back = True, threading.Event(), threading.Event()

    class Panic(BaseException):
        pass

    def on_list() -> None:
        if away:
            asked.set()
            raise Panic("a bug in a library")

    def on_read(path: str) -> None:
        if path.startswith("pets/2/"):
            back.set()

    bucket.on_list, bucket.on_read = on_list, on_read
    store, _ = threaded(tmp_path / "cache", bucket)
    store.start()
    wait_until(asked)
    assert bundles.versions(store.folder / "pets") == [1]
    assert "going on with what is in" in caplog.text
    bucket.add(pets(made, 2))
    away = False
    wait_until(back)
    store.close()


def test_a_start_does_not_wait_long_for_a_store_that_is_silent(
    tmp_path: Path, bucket: Bucket, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = threading.Event()
    bucket.on_list = lambda: wait_until(go_on)
    shutil.copytree(made, tmp_path / "cache")
    seconds = itertools.count(0.0, 4.0)
    store = Store(
        URL,
        tmp_path / "cache",
        Metrics(),
        watch_s=0.01,
        newest=3,
        source=bucket,
        clock=lambda: next(seconds),
    )
    store.start()
    assert "has not answered in 10 s: going on with what is in" in caplog.text
    go_on.set()
    store.close()


def test_of_two_processes_on_one_cache_one_keeps_it_up_to_date(
    mirrored: Callable[..., Mirror], mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    bucket.add(pets(made, 1))
    mirror.look()
    second = mirrored()
    bucket.add(pets(made, 2))
    bucket.reads.clear()
    second.look()
    assert bucket.reads == []
    mirror.store.close()
    second.look()
    assert second.versions() == [1, 2]


# By hand.


def test_a_version_is_pushed_under_the_next_number_manifest_last(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    assert stores.push(pets(made, 2), URL, bucket) == (1, True)
    assert bucket.writes[-1] == f"pets/1/{MANIFEST}"
    # Someone is at work on 2.
    bucket.inside.put("pets/2/claimed", b"")
    assert stores.push(pets(made, 3), URL, bucket) == (3, True)
    mirror.look()
    assert mirror.versions() == [1, 3]
    assert (mirror.folder / "pets" / "3" / MODEL).read_bytes()[-1] == 2
    assert "claimed" not in {f.name for f in (mirror.folder / "pets" / "3").iterdir()}
    # What is there is not pushed again.
    writes = len(bucket.writes)
    assert stores.push(pets(made, 2), URL, bucket) == (1, False)
    assert stores.push(mirror.folder / "pets" / "3", URL, bucket) == (3, False)
    assert len(bucket.writes) == writes


def test_of_two_who_push_at_once_each_has_a_number(bucket: Bucket, made: Path) -> None:
    other_first = iter([True])

    def other(mode: Any) -> None:
        if next(other_first, False):
            assert stores.push(pets(made, 1), URL, bucket) == (1, True)

    bucket.on_write = other
    assert stores.push(pets(made, 2), URL, bucket) == (2, True)


def test_what_is_damaged_is_not_pushed(bucket: Bucket, made: Path) -> None:
    (pets(made, 1) / MODEL).write_bytes(b"x")
    with pytest.raises(ConvoyError, match=MODEL):
        stores.push(pets(made, 1), URL, bucket)
    assert bucket.writes == []


def test_a_push_that_fails_leaves_nothing_that_is_a_version(
    mirror: Mirror, bucket: Bucket, made: Path
) -> None:
    def fail(mode: Any) -> None:
        if len(bucket.writes) == 2:
            raise GenericError("the line is dead")

    bucket.on_write = fail
    with pytest.raises(ConvoyError, match="could not be put into s3://bucket/models"):
        stores.push(pets(made, 1), URL, bucket)
    mirror.look()
    assert mirror.versions() == []


def test_the_newest_are_pulled_beside_what_is_there(
    tmp_path: Path, bucket: Bucket, made: Path
) -> None:
    for number in (1, 2, 3):
        bucket.add(pets(made, number))
    bucket.add(made / "cars" / "1")
    folder = tmp_path / "here"
    versions.write(folder / "mine")
    shutil.copytree(pets(made, 1), folder / "pets" / "1")
    wanted = [folder / "cars" / "1", folder / "pets" / "3"]
    assert stores.pull(URL, folder, source=bucket) == wanted
    assert stores.pull(URL, folder, source=bucket) == wanted
    assert sorted(str(f.relative_to(folder)) for f in folder.glob("*/*/")) == [
        "cars/1", "mine/1", "pets/1", "pets/3",
    ]  # fmt: skip
    assert [f.name for f in folder.glob(".*")] == []
    assert bundles.read(folder / "pets" / "3").onnx[-1] == 2
    assert bucket.writes == []


def test_a_pull_replaces_nothing(tmp_path: Path, bucket: Bucket, made: Path) -> None:
    bucket.add(pets(made, 1))
    folder = tmp_path / "here"
    shutil.copytree(pets(made, 2), folder / "pets" / "1")
    with pytest.raises(ConvoyError, match="pets/1: it is another one in the store"):
        stores.pull(URL, folder, source=bucket)
    assert bundles.read(folder / "pets" / "1").onnx[-1] == 1
    bucket.on_list = lambda: bucket.inside.get("nothing")
    with pytest.raises(ConvoyError, match="can't be read"):
        stores.pull(URL, folder, source=bucket)


def test_each_url_has_a_cache_of_its_own(tmp_path: Path) -> None:
    folders = {
        stores.cache_folder(url, tmp_path)
        for url in ("s3://a/b", "s3://a-b", "gs://a/b", "s3://a/b/c", "s3://" + "x" * 300)
    }
    assert len(folders) == 5
    assert all(folder.parent == tmp_path and len(folder.name) < 100 for folder in folders)
    assert stores.cache_folder("s3://a/b", tmp_path).name.startswith("s3-a-b-")


def test_a_url_that_is_none_is_refused() -> None:
    with pytest.raises(ConvoyError, match="ftp://x/y"):
        stores.open_source("ftp://x/y")
