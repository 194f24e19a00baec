"""What may be wrong with a version's files, and what becomes of it.

`make docs` writes the table, as a real server tells it, to docs/damage.md.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import classifier_on, wait_until
from tests.integration.models import add_colours, flip_a_byte
from tests.integration.pictures import encode, solid

RED = pb.Image(encoded=encode(solid("red")))


@dataclass(frozen=True)
class Damage:
    """`do` is done to the folder of a good version: before it comes to a server that has the one before
    it, or with `serving` while it serves. It must then be in the `state`, with `words` for a reason.
    """

    what: str
    do: Callable[[Path], object]
    state: str
    words: str
    serving: bool = False

    @property
    def model(self) -> str:
        """A name for the model that it is tried on."""
        return "".join(letter if letter.isalnum() else "-" for letter in self.what)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 100)


def _flip(folder: Path) -> None:
    flip_a_byte(folder / "model.onnx")


def _in_manifest(before: str, after: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "manifest.json"
        text = file.read_text("utf-8")
        assert before in text
        file.write_text(text.replace(before, after), "utf-8")

    return change


def _write_anew(change: Callable[[Bundle], Bundle]) -> Callable[[Path], None]:
    """As a program would that makes versions of its own: all sums are right."""

    def write(folder: Path) -> None:
        new = change(bundles.read(folder))
        with tempfile.TemporaryDirectory(dir=folder.parent) as beside:
            written = bundles.write(
                Path(beside, "new"), new.manifest, new.onnx, new.golden, new.variants
            )
            shutil.rmtree(folder)
            written.folder.rename(folder)

    return write


def _other_answers(bundle: Bundle) -> Bundle:
    answers = np.roll(bundle.golden.probabilities, 1, axis=1)
    return replace(bundle, golden=replace(bundle.golden, probabilities=answers))


def _no_number(bundle: Bundle) -> Bundle:
    answers = bundle.golden.probabilities.copy()
    answers[:, 0] = np.nan
    return replace(bundle, golden=replace(bundle.golden, probabilities=answers))


def _from_other_version(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as beside:
        other = add_colours(Path(beside), scale=1 / 50)
        shutil.copy(other.folder / "model.onnx", folder)


def _with_variant(bundle: Bundle) -> Bundle:
    golden = replace(bundle.golden, variants={"int8": bundle.golden.probabilities})
    return replace(bundle, golden=golden, variants={"int8": bundle.onnx})


def _lose_a_variant(folder: Path) -> None:
    _write_anew(_with_variant)(folder)
    (folder / "model.int8.onnx").unlink()


def _pipe(folder: Path) -> None:
    """Who reads it waits for ever."""
    (folder / "golden.npz").unlink()
    os.mkfifo(folder / "golden.npz")


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _date_back(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        os.utime(path, (0, 0))


DAMAGE = [
    Damage("a file is truncated", _truncate, "incomplete", "model.onnx: 100 bytes, the manifest says"),
    Damage("a bit of the weights is another", _flip, "broken", "model.onnx: its sha256 is not the manifest's"),
    Damage("a file is that of another version", _from_other_version, "broken", "its sha256 is not the manifest's"),
    Damage("a file is missing", lambda folder: (folder / "golden.npz").unlink(), "incomplete", "golden.npz is missing"),
    Damage("the file of a variant is missing", _lose_a_variant, "incomplete", "model.int8.onnx is missing"),
    Damage("a file is a pipe", _pipe, "incomplete", "golden.npz: "),
    Damage("nothing is there yet", _empty, "incomplete", "manifest.json is missing"),
    Damage("the manifest is half written", lambda folder: os.truncate(folder / "manifest.json", 100), "broken", "manifest.json: "),
    Damage("the manifest is of a later Convoy", _in_manifest('"format": 1', '"format": 2'), "broken", "format 2 is newer"),
    Damage("a label is missing", _in_manifest('"green",', ""), "broken", "2 labels"),
    Damage("the golden answers are others", _write_anew(_other_answers), "broken", "off by"),
    Damage("a golden answer is no number", _write_anew(_no_number), "broken", "off by"),
    Damage("the graph is no ONNX", _write_anew(lambda bundle: replace(bundle, onnx=b"no graph")), "broken", "can't load the model"),
    Damage("the clock was set back: all its times are of 1970", _date_back, "ready", ""),
    Damage("a version that serves is changed", _flip, "ready", "changed on the disk", serving=True),
    Damage("a version that serves is deleted", shutil.rmtree, "ready", "its folder is gone", serving=True),
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What the server says of the version that was damaged, and which version then answers."""

    state: str
    reason: str
    answers: int


def outcomes(folder: Path) -> dict[str, Outcome]:
    """What becomes of each damage, by `Damage.model`, on a real server. Raises where a request fails."""
    models, beside = folder / "models", folder / "beside"
    for place in (models, beside):
        place.mkdir()
    for damage in DAMAGE:
        added = [add_colours(models, damage.model)]
        if not damage.serving:
            # Another than the one that serves, so that it is not known already.
            added += [add_colours(beside, damage.model, scale=1 / 40) for _ in range(2)]
            damage.do(added[-1].folder)
    with (
        Server("--watch-s", "0.1", "--device", "cpu", models=models) as server,
        server.ready().channel() as channel,
    ):
        calls = classifier_on(channel)

        def answers(model: str) -> int:
            request = pb.ClassifyRequest(model=model, images=[RED])
            response = calls.Classify(request, timeout=TIMEOUT_S)
            assert not response.results[0].HasField("error")
            return int(response.version)

        def found() -> dict[str, Outcome]:
            listed = calls.ListModels(pb.ListModelsRequest(), timeout=TIMEOUT_S).models
            states = {(m.name, v.version): v for m in listed for v in m.version_states}
            result = {}
            for damage in DAMAGE:
                state = states.get((damage.model, 1 if damage.serving else 2), pb.Version())
                said = state.reason.replace(f"{models}/", "").replace(damage.model, "colours")
                result[damage.model] = Outcome(
                    pb.Version.State.Name(state.state).lower(), said, answers(damage.model)
                )
            return result

        def as_they_should() -> bool:
            now = found()
            return all(
                now[damage.model].state == damage.state and damage.words in now[damage.model].reason
                for damage in DAMAGE
            )

        for damage in DAMAGE:
            version = models / damage.model / "1"
            if damage.serving:
                damage.do(version)
            else:
                (beside / damage.model / "2").rename(version.with_name("2"))
        # Who reads it sees which one is not.
        with suppress(AssertionError):
            wait_until(as_they_should)
        return found()


def table() -> str:
    """What a real server says to all of them, in markdown."""
    rows = [("what is wrong", "state", "reason", "answers"), ("---",) * 4]
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(Path(folder))
    for damage in DAMAGE:
        outcome = found[damage.model]
        itself = damage.serving or outcome.answers == 2
        # How well a file can be compressed is not the same everywhere.
        reason = re.sub(r"golden(.*) says \d+", r"golden\1 says more", outcome.reason)
        answers = "it" if itself else "the version before"
        rows.append((damage.what, f"`{outcome.state}`", reason, answers))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
