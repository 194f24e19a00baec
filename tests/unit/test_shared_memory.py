"""Regions of POSIX shared memory: what may be named, and what becomes of those that change."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convoy_service.api import shared_memory
from convoy_service.api.shared_memory import Region, SharedMemory
from convoy_service.errors import (
    AlreadyThere,
    ConvoyError,
    InvalidRequest,
    NotPossible,
    UnknownRegion,
)

NAME = f"convoy-test-{os.getpid()}"
OBJECT = Path("/dev/shm") / NAME
CONTENT = bytes(range(256)) * 40


@pytest.fixture
def content() -> Iterator[Path]:
    """A shared memory object."""
    OBJECT.write_bytes(CONTENT)
    yield OBJECT
    OBJECT.unlink(missing_ok=True)


@pytest.fixture
def memory(tmp_path: Path) -> SharedMemory:
    return SharedMemory(tmp_path)


def region(name: str = "a", key: str = f"/{NAME}", offset: int = 100, size: int = 1000) -> Region:
    return Region(name, key, offset, size)


def test_what_one_process_registers_all_have(
    memory: SharedMemory, content: Path, tmp_path: Path
) -> None:
    memory.register(region())
    memory.register(region("\u00fc/..", NAME, 0, len(CONTENT)))
    other = SharedMemory(tmp_path)
    assert other.regions() == [region(), region("\u00fc/..", NAME, 0, len(CONTENT))]
    assert other.regions("a") == [region()]
    assert other.read(other.span("a", 10, 20)) == CONTENT[110:130]
    other.write(other.span("a", 0, 20), b"x" * 10)
    assert content.read_bytes() == CONTENT[:100] + b"x" * 10 + CONTENT[110:]
    with pytest.raises(AlreadyThere, match="'a' is registered already"):
        other.register(region(offset=0))
    other.unregister("a")
    other.unregister("a")
    with pytest.raises(UnknownRegion, match="'a'"):
        memory.span("a", 0, 1)
    with pytest.raises(UnknownRegion, match="'a'"):
        memory.regions("a")
    other.unregister()
    assert memory.regions() == []
    assert content.exists()


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1001), (1000, 1), (2**63, 1), (1, 2**64 - 1), (-1, 1), (0, -1)]
)
def test_no_more_is_reached_than_the_region(
    memory: SharedMemory, content: Path, offset: int, size: int
) -> None:
    memory.register(region())
    with pytest.raises(InvalidRequest, match="region 'a' has 1000"):
        memory.span("a", offset, size)


def link(to: Path) -> None:
    OBJECT.symlink_to(to)


def fifo(_: Path) -> None:
    os.mkfifo(OBJECT)


def directory(_: Path) -> None:
    OBJECT.mkdir()


@pytest.mark.parametrize("make", [link, fifo, directory])
def test_only_shared_memory_is_opened(
    memory: SharedMemory, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    make(secret)
    try:
        with pytest.raises(InvalidRequest, match=NAME):
            memory.register(region())
    finally:
        OBJECT.rmdir() if OBJECT.is_dir() else OBJECT.unlink()


@pytest.mark.parametrize(
    "key", ["", "/", "..", "/.", "/" * 5000 + NAME, f"../shm/{NAME}", f"/../shm/{NAME}", f"x/../{NAME}", f"{NAME}\0", f"{NAME}/"]
)  # fmt: skip
def test_a_key_is_no_path(memory: SharedMemory, content: Path, key: str) -> None:
    with pytest.raises(InvalidRequest, match="no slash but at its beginning"):
        memory.register(region(key=key))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (region(offset=len(CONTENT) - 999), "does not reach to byte"),
        (region(offset=2**64 - 1, size=2**64 - 1), "does not reach to byte"),
        (region(size=0), "a `byte_size` of 0"),
        (region(name=""), "`name` of a region"),
        (region(name="\u00fc" * 128), "`name` of a region"),
        (region(key="x" * 300), "can't be used"),
        (region(key="/nobody's"), "can't be used: No such file"),
    ],
)
def test_what_cannot_be_registered(
    memory: SharedMemory, content: Path, wrong: Region, words: str
) -> None:
    with pytest.raises(InvalidRequest, match=words):
        memory.register(wrong)
    assert memory.regions() == []


def test_an_object_that_was_cut_short_or_removed_is_refused(
    memory: SharedMemory, content: Path
) -> None:
    memory.register(region())
    span = memory.span("a", 0, 1000)
    os.truncate(content, 1099)
    for use in (lambda: memory.read(span), lambda: memory.write(span, b"x")):
        with pytest.raises(InvalidRequest, match="does not reach to byte 1100"):
            use()
    assert content.stat().st_size == 1099, "nothing was made longer"
    assert memory.read(memory.span("a", 0, 999)) == CONTENT[100:1099]
    content.unlink()
    with pytest.raises(InvalidRequest, match="can't be used: No such file"):
        memory.read(span)
    content.write_bytes(CONTENT)
    assert memory.read(span) == CONTENT[100:1100]


def test_an_object_that_is_cut_short_while_it_is_read_is_refused(
    memory: SharedMemory, content: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.register(region())
    read = os.preadv

    def cut_after(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        count = read(descriptor, [buffers[0][:500]], offset)
        os.truncate(content, 0)
        return count

    monkeypatch.setattr(os, "preadv", cut_after)
    with pytest.raises(InvalidRequest, match="does not reach to byte 1100"):
        memory.read(memory.span("a", 0, 1000))


def test_no_more_regions_are_kept_than_anybody_needs(
    memory: SharedMemory, content: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_memory, "_MOST", 3)
    for name in "abc":
        memory.register(region(name))
    with pytest.raises(NotPossible, match="3 regions are registered"):
        memory.register(region("d"))
    memory.unregister("b")
    memory.register(region("d"))


def test_the_folder_of_registrations_goes_with_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with shared_memory.folder(False) as nowhere:
        assert nowhere is None
    with shared_memory.folder(True) as here:
        assert here
        assert here.stat().st_mode & 0o777 == 0o700
        (here / "x").symlink_to("y")
    assert not here.exists()
    monkeypatch.setattr(shared_memory, "_OBJECTS", tmp_path / "nowhere")
    with pytest.raises(ConvoyError, match="--allow-shared-memory"), shared_memory.folder(True):
        pass
