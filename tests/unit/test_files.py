import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from convoy_service.artifacts.files import hold_lock, replace_file, replacing, write_flushed

TIMEOUT_S = 30


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def run(code: str, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


# Writing.


def test_a_file_is_made_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_file(path, b"first")
    assert path.read_bytes() == b"first"
    with path.open("rb") as reader:
        replace_file(path, b"second")
        assert reader.read() == b"first", "who has it open reads on"
    assert path.read_bytes() == b"second"
    assert list(tmp_path.iterdir()) == [path]


def test_until_the_end_the_old_file_is_there_and_the_new_one_has_the_name_asked_for(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with replacing(path, temporary=".file.tmp") as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        assert sorted(tmp_path.iterdir()) == [tmp_path / ".file.tmp", path]
    assert path.read_bytes() == b"new"
    with replacing(path) as file:
        (hidden,) = set(tmp_path.iterdir()) - {path}
        assert hidden.name.startswith(".file-")


def test_of_several_writers_at_once_one_is_the_last_and_no_two_are_mixed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    contents = [bytes([number]) * 100_000 for number in range(8)]
    threads = [threading.Thread(target=replace_file, args=(path, data)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_permissions_are_the_usual_ones_or_those_asked_for_whatever_the_umask(
    umask: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        replace_file(tmp_path / "usual", b"")
        replace_file(tmp_path / "all-read", b"", 0o644)
        with replacing(tmp_path / "private", mode=0o600, temporary="meanwhile"):
            assert mode(tmp_path / "meanwhile") == 0o600, "from the beginning"
    finally:
        os.umask(before)
    assert mode(tmp_path / "usual") == 0o666 & ~umask
    assert mode(tmp_path / "all-read") == 0o644
    assert mode(tmp_path / "private") == 0o600


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit])
def test_where_the_body_raises_nothing_has_changed(
    kind: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise kind

    with pytest.raises(kind):
        write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_says_so_and_loses_nothing(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left on device"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


_LIMITED = """
import resource, sys
from pathlib import Path
from convoy_service.artifacts.files import replace_file

resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    replace_file(Path(sys.argv[1]), bytes(5000))
except OSError as error:
    print(error.strerror)
"""


def test_a_write_that_the_system_refuses_says_so_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert run(_LIMITED, path).stdout == "File too large\n"
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


_KILLED = """
import os, signal, sys
from pathlib import Path
from convoy_service.artifacts.files import replace_file

os.{call} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
replace_file(Path(sys.argv[1]), b"new")
"""


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_that_is_killed_leaves_the_old_file_or_none(call: str, tmp_path: Path) -> None:
    for before in (None, b"old"):
        path = tmp_path / "file"
        if before:
            path.write_bytes(before)
        assert run(_KILLED.format(call=call), path).returncode == -signal.SIGKILL
        assert (path.read_bytes() if path.exists() else None) == before


def test_what_must_last_is_on_the_disk_before_readers_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, calls = tmp_path / "file", list[str]()
    fsync, replace = os.fsync, os.replace

    def note(call: str) -> None:
        calls.append(f"{call}, {'seen' if path.exists() else 'not seen'}")

    def fsyncs(descriptor: int) -> None:
        note("fsync")
        assert os.fstat(descriptor).st_size == 4, "all of it"
        fsync(descriptor)

    def replaces(*places: Path) -> None:
        note("replace")
        replace(*places)

    monkeypatch.setattr(os, "fsync", fsyncs)
    monkeypatch.setattr(os, "replace", replaces)
    with replacing(path, durable=False) as file:
        file.write(b"data")
    assert calls == ["replace, not seen"]
    path.unlink()
    calls.clear()
    replace_file(path, b"data")
    assert calls == ["fsync, not seen", "replace, not seen"]
    path.unlink()
    calls.clear()
    write_flushed(path, b"data")
    assert calls == ["fsync, seen"]


# Locks.

_HOLDER = """
import os, sys
from convoy_service.artifacts.files import hold_lock

assert hold_lock(os.open(sys.argv[1], os.O_RDONLY), 0)
print("held", flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_lock_keeps_other_processes_out_until_its_holder_is_gone(
    kind: str, tmp_path: Path
) -> None:
    place = tmp_path / kind
    if kind == "file":
        place.touch()
    else:
        place.mkdir()
    command = [sys.executable, "-c", _HOLDER, str(place)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == "held\n"
        descriptor = os.open(place, os.O_RDONLY)
        try:
            assert not hold_lock(descriptor, 0)
            assert not hold_lock(descriptor, 0.05), "nor when it waits"
            killer = threading.Timer(0.1, holder.kill)
            killer.start()
            assert hold_lock(descriptor, TIMEOUT_S)
            killer.join()
        finally:
            os.close(descriptor)


def test_a_lock_is_waited_for_and_ends_with_its_descriptor(tmp_path: Path) -> None:
    held, waiting = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
    assert hold_lock(held)
    assert hold_lock(held, 0), "its holder has it"
    taken: list[bool] = []
    waiter = threading.Thread(target=lambda: taken.append(hold_lock(waiting)))
    waiter.start()
    waiter.join(0.05)
    assert waiter.is_alive()
    os.close(held)
    waiter.join(TIMEOUT_S)
    assert taken == [True]
    os.close(waiting)


def test_what_can_not_be_locked_is_an_error() -> None:
    source, sink = os.pipe()
    os.close(source)
    os.close(sink)
    for wait_s in (0, 0.05, float("inf")):
        with pytest.raises(OSError, match="Bad file descriptor"):
            hold_lock(sink, wait_s)
