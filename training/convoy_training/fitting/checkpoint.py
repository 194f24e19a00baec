"""What a killed run needs to go on, in one file in a folder that its settings and data name."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from convoy_service.artifacts.files import replacing
from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset
from convoy_training.settings import Role, TrainingSettings, with_role

log = logging.getLogger("convoy.fit")

# A part of the checkpoint's name: a run goes on only from a checkpoint that the same loop wrote.
# Raise it with each change to this package that comes to other weights from the same settings and data,
# or that writes other contents to the checkpoint. Comments and names do not count.
LOOP_VERSION = 1

# Settings that are a part of the checkpoint's name: a run with other values begins anew.
DECIDES_CHECKPOINT = with_role(Role.FIT)

_FILE = "checkpoint.npz"
# Nobody goes on with one that is older.
_ABANDONED_S = 30 * 24 * 3600.0


def checkpoint_folder(
    data: Dataset,
    settings: TrainingSettings,
    network: keras.Model,
    precision: str,
    replicas: int,
    start: list[npt.NDArray[Any]] | None,
) -> Path:
    """The folder for checkpoints of runs with these settings, data, devices and first weights."""
    kept = {name: value for name, value in asdict(settings).items() if name in DECIDES_CHECKPOINT}
    known = [kept, data.train.fingerprint(), precision, replicas]
    known += [data.validation.fingerprint(), keras.__version__, tf.__version__]
    known += [[list(weight.shape) for weight in network.weights]]
    known += [LOOP_VERSION]
    digest = hashlib.sha256(json.dumps(known, default=str).encode())
    for weight in start or ():
        digest.update(weight.tobytes())
    if settings.weights:
        digest.update(settings.weights.read_bytes())
    return settings.checkpoints / f"{data.name}-{digest.hexdigest()[:12]}"


class Checkpoint:
    """A folder in which a run is put down, and from which one with the same settings goes on."""

    def __init__(self, folder: Path, resume: bool, writes: bool) -> None:
        self._folder, self._resume, self._writes = folder, resume, writes
        if writes:
            for left in folder.parent.glob(f"*/{_FILE}"):
                with contextlib.suppress(OSError):
                    if time.time() - left.stat().st_mtime > _ABANDONED_S:
                        shutil.rmtree(left.parent, ignore_errors=True)

    def save(
        self,
        state: dict[str, Any],
        arrays: list[npt.NDArray[Any]],
        best: list[npt.NDArray[Any]],
    ) -> None:
        """Raises ConvoyError where the disk refuses; what was saved before stays."""
        if not self._writes:
            return
        # One file, so that a kill leaves the one before or this one, never parts of both.
        named = {f"v{n}": array for n, array in enumerate(arrays)}
        named.update({f"b{n}": array for n, array in enumerate(best)})
        try:
            try:
                self._write(state, named)
            except FileNotFoundError:
                # Another run of the same has ended, and removed the folder.
                self._write(state, named)
        except OSError as error:
            raise ConvoyError(
                f"the checkpoint could not be written to {self._folder}: {error.strerror or error}; "
                "make room and start again: it goes on from the one before"
            ) from error

    def _write(self, state: dict[str, Any], named: dict[str, npt.NDArray[Any]]) -> None:
        # Each run its own: of two that are the same, either's checkpoint does for both.
        temporary = f".{os.getpid()}.{_FILE}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._folder / _FILE, temporary=temporary) as file:
            np.savez(file, allow_pickle=False, state=np.array(json.dumps(state)), **named)

    def load(
        self,
    ) -> tuple[dict[str, Any], list[npt.NDArray[Any]], list[npt.NDArray[Any]]] | None:
        """What was saved last; None where there is nothing, or nothing that can be read."""
        if not self._resume:
            return None
        try:
            # Opened here: where np.load raises, it leaves the file open.
            with (
                (self._folder / _FILE).open("rb") as file,
                np.load(file, allow_pickle=False) as found,
            ):
                state = json.loads(str(found["state"]))
                return state, list(_numbered(found, "v")), list(_numbered(found, "b"))
        except FileNotFoundError:
            return None
        # A damaged file makes the readers of zip and numpy raise anything.
        except Exception as error:
            log.warning(
                "%s is of no use, and training begins anew: %s", self._folder / _FILE, error
            )
            return None

    def remove(self) -> None:
        if self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)


def _numbered(found: Any, prefix: str) -> Iterator[npt.NDArray[Any]]:
    number = 0
    while f"{prefix}{number}" in found:
        yield found[f"{prefix}{number}"]
        number += 1
