"""Decoded images kept on disk, so that a second run over the same files need not decode them.

An entry is one file: for each image a key (its path, size and times), a digest of what it shows,
and its pixels; then a checksum. A row serves only the very file that it was read from, and only the
code that decoded it.
"""

import contextlib
import errno
import hashlib
import io
import logging
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features

from convoy_service.artifacts import images
from convoy_service.artifacts.files import replacing
from convoy_service.artifacts.images import Pixels, Target

log = logging.getLogger("convoy.data")

Digests = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

KEY, DIGEST = 16, 32  # bytes
# Entries that no run has used for so long go, and beyond this size in all those used longest ago.
UNUSED_S = 30 * 86_400
MOST_BYTES = 20 * 10**9
# Within one tick of its clock a file may change once more, unnoticed; the coarsest tick is FAT's.
SETTLED_NS = 2 * 10**9
_ROWS = 4096


class Cache:
    """What `folder` keeps of some data at `target`; without a folder nothing is kept.

    `source` names the data: its entry is replaced by each `write`. Nothing raises; where the folder
    can't be used, a warning says so.
    """

    def __init__(self, folder: Path | None, source: str, target: Target) -> None:
        self._folder = folder
        self._shape = target.shape
        # Entries of another decoder or target have another prefix, and are never looked at.
        self._prefix = _name(_decoder(), str(target))
        self._own = f"{self._prefix}-{_name(source)}.npy"

    def read(self, files: Sequence[Path]) -> tuple[Pixels, Digests, Mask]:
        """Pixels `[N, H, W, C]` and digests `[N, 32]` of `files`, and which of the rows are filled.

        Where all are, the pixels may be mapped from the disk, and not writable.
        """
        count = len(files)
        found: tuple[Pixels, Digests, Mask] | None = None
        self._keys, self._settled = _keys(files if self._folder else ())
        # Others may hold some of the files too: an older list's, or another split's.
        for path in self._entries():
            try:
                keys, digests, inputs = self._load(path)
            except Exception as error:  # a damaged file makes its readers raise anything
                log.warning("%s is of no use, and images are decoded anew: %s", path, error)
                continue
            if keys is None:
                continue
            if found is None and np.array_equal(keys, self._keys):
                return inputs, digests, np.ones(count, bool)
            found = found or self._empty(count)
            rows = {key.tobytes(): row for row, key in enumerate(keys)}
            there = np.array([rows.get(key.tobytes(), -1) for key in self._keys])
            here = np.flatnonzero((there >= 0) & ~found[2])
            for array, kept in zip(found, (inputs, digests, np.ones(len(keys), bool)), strict=True):
                array[here] = kept[there[here]]
        return found or self._empty(count)

    def write(self, inputs: Pixels, digests: Digests, filled: Mask) -> None:
        """Keeps the rows that are `filled`, of the files that were last read."""
        if self._folder is None:
            return
        chosen = np.flatnonzero(filled & self._settled)
        size = len(chosen) * (KEY + DIGEST + int(np.prod(self._shape)))
        if not 0 < size <= MOST_BYTES:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(self._folder).free < 2 * size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # What a killed run leaves is found by its name, see `_by_use`. An entry that is lost costs
            # time only, so nothing waits for the disk.
            temporary = f"{self._own}.{uuid.uuid4().hex}"
            with replacing(
                self._folder / self._own, mode=0o600, temporary=temporary, durable=False
            ) as file:
                crc = 0
                for rows in (self._keys[chosen], digests[chosen]):
                    # Not right into the file: numpy's error of a full disk does not say so.
                    np.save(buffer := io.BytesIO(), rows)
                    file.write(buffer.getbuffer())
                    crc = zlib.crc32(rows.data, crc)
                shape = (len(chosen), *self._shape)
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
                # In parts, as all of it may be as large as the memory that is left.
                for start in range(0, len(chosen), _ROWS):
                    part = inputs[chosen[start : start + _ROWS]]
                    file.write(part.data)
                    crc = zlib.crc32(part.data, crc)
                file.write(crc.to_bytes(4, "little"))
            _prune(self._folder)
        except OSError as error:
            log.warning("images can't be kept in %s for the next run: %s", self._folder, error)

    def _empty(self, count: int) -> tuple[Pixels, Digests, Mask]:
        digests = np.zeros((count, DIGEST), np.uint8)
        return np.empty((count, *self._shape), np.uint8), digests, np.zeros(count, bool)

    def _entries(self) -> list[Path]:
        """Our own first, then others that may be of use."""
        if self._folder is None:
            return []
        own = self._folder / self._own
        found = [path for path in _by_use(self._folder) if path.suffix == ".npy"]
        others = [path for path in found if path.name.startswith(self._prefix) and path != own]
        return [own] * (own in found) + others

    def _load(self, path: Path) -> tuple[Digests | None, Digests, Pixels]:
        """Keys, digests, and pixels, which stay on disk until they are looked at; without the keys
        where no file that is asked for has one of them. Raises ValueError, OSError and others.
        """
        wanted = {key.tobytes() for key in self._keys}
        with path.open("rb") as file:
            keys = np.load(file)
            if not any(key.tobytes() in wanted for key in keys):
                return None, keys, keys
            digests = np.load(file)
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            inputs = np.memmap(file, dtype, "r", start, shape)
            file.seek(start + inputs.nbytes)
            crc = 0
            for rows in (keys, digests, inputs):
                crc = zlib.crc32(rows.data, crc)
            if crc.to_bytes(4, "little") != file.read() or shape != (len(keys), *self._shape):
                raise ValueError("it is damaged")
        with contextlib.suppress(OSError):  # a folder that is ours to read only
            os.utime(path)  # so that it counts as used
        return keys, digests, np.asarray(inputs)


def folder(setting: str) -> Path | None:
    """The folder that the setting `cache` means; the default is where the platform keeps such."""
    if setting == "off":
        return None
    if setting != "auto":
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "convoy"


def _name(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _decoder() -> str:
    """What decides the pixels that a file gives. Our part is its very text: a number to be counted
    up by hand would be forgotten.
    """
    libraries = [features.version(name) or "" for name in ("libjpeg_turbo", "zlib", "webp")]
    return " ".join([PIL.__version__, *libraries, Path(images.__file__).read_text("utf-8")])


def _keys(files: Sequence[Path]) -> tuple[Digests, Mask]:
    """A key for each file, and whether it has been left alone for long enough to go by it."""
    keys = np.zeros((len(files), KEY), np.uint8)
    settled = np.zeros(len(files), bool)
    now = time.time_ns()
    for at, file in enumerate(files):
        try:
            status = file.stat()
        except OSError:
            continue  # named when it is read
        # The time of the last change of its status can't be set back, as that of its content can.
        state = (
            f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {os.path.abspath(file)}"  # noqa: PTH100
        )
        digest = hashlib.blake2b(os.fsencode(state), digest_size=KEY)
        keys[at] = np.frombuffer(digest.digest(), np.uint8)
        settled[at] = now - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS
    return keys, settled


def _by_use(folder: Path) -> list[Path]:
    """The entries in `folder`, and what killed runs left, the last used first. By the form of their
    names, as the folder may hold what isn't ours.
    """
    form = f"{'[0-9a-f]' * 16}-{'[0-9a-f]' * 16}.npy*"
    used = []
    for path in folder.glob(form):
        try:
            used.append((path.stat().st_mtime, path))
        except OSError:  # another run has just removed it
            continue
    return [path for _, path in sorted(used, reverse=True)]


def _prune(folder: Path) -> None:
    """Removes what has not been used for long, or is too much."""
    total = 0
    for path in _by_use(folder):
        try:
            status = path.stat()
            total += status.st_size
            if total > MOST_BYTES or time.time() - status.st_mtime > UNUSED_S:
                path.unlink()
        except OSError:
            continue
