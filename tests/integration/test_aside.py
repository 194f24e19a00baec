"""Versions that prove themselves in a process of their own."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convoy_service.artifacts import reader as bundles
from convoy_service.engine import isolated_verifier as aside
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import BrokenVersion
from convoy_service.settings import Settings
from tests.conftest import TIMEOUT_S
from tests.integration.models import (
    COLOURS_BATCH,
    add_colours,
    add_slow,
    add_slow_to_load,
    add_variants,
    flip_a_byte,
)

CPU = Settings(device="cpu")


def children() -> set[int]:
    pid = os.getpid()
    found = set[int]()
    for task in Path(f"/proc/{pid}/task").iterdir():
        found |= {int(each) for each in (task / "children").read_text().split()}
    return found


@pytest.fixture
def others() -> set[int]:
    """Children that were there before, such as servers of a whole session."""
    return children()


def test_it_says_what_has_proved_itself_and_how_long_batches_take(
    tmp_path: Path, others: set[int]
) -> None:
    bundle = add_slow(tmp_path, rounds=20)
    proof = aside.prove(bundle.folder, CPU)
    assert proof
    assert (proof.digest, proof.variant, proof.fallback) == (bundle.digest, "fp32", "")
    assert [size for size, _ in proof.seconds] == [1, 4]
    assert all(0 < seconds < TIMEOUT_S for _, seconds in proof.seconds)
    assert children() <= others


def test_it_refuses_what_any_process_would(tmp_path: Path) -> None:
    bundle = add_colours(tmp_path)
    golden = replace(bundle.golden, probabilities=bundle.golden.probabilities[:, ::-1])
    wrong = bundles.write(tmp_path / "colours", bundle.manifest, bundle.onnx, golden)
    with pytest.raises(BrokenVersion, match="its answers to the golden inputs are off by"):
        aside.prove(wrong.folder, CPU)
    flip_a_byte(bundle.folder / "model.onnx")
    with pytest.raises(BrokenVersion, match="sha256 is not the manifest's"):
        aside.prove(bundle.folder, CPU)
    with pytest.raises(BrokenVersion, match=r"manifest\.json is missing") as refused:
        aside.prove(tmp_path / "colours" / "9", CPU)
    assert refused.value.__cause__ is None
    (tmp_path / "colours" / "9" / "manifest.json").mkdir(parents=True)
    with pytest.raises(BrokenVersion, match="Is a directory") as refused:
        aside.prove(tmp_path / "colours" / "9", CPU)
    assert isinstance(refused.value.__cause__, OSError), "it may be better another time"


def test_it_chooses_the_variant_that_all_then_serve(tmp_path: Path) -> None:
    add_variants(tmp_path, "both")
    add_variants(tmp_path, "off", off=0.05)
    fastest = replace(CPU, variant="fastest")
    both = aside.prove(tmp_path / "both" / "1", fastest)
    off = aside.prove(tmp_path / "off" / "1", fastest)
    assert both
    assert off
    assert (both.variant, both.fallback) == ("int8", "")
    assert off.variant == "fp32"
    assert "serves fp32, not int8" in off.fallback


def test_a_graph_that_takes_its_process_down_is_refused(tmp_path: Path, others: set[int]) -> None:
    bundle = add_slow_to_load(tmp_path)
    outcome: list[BaseException] = []

    def prove() -> None:
        try:
            aside.prove(bundle.folder, CPU)
        except BrokenVersion as error:
            outcome.append(error)

    thread = threading.Thread(target=prove)
    thread.start()
    deadline = time.monotonic() + TIMEOUT_S
    while not (there := children() - others):
        assert time.monotonic() < deadline
    [child] = there
    while os.getpgid(child) != child:
        assert time.monotonic() < deadline, "Ctrl-C in a terminal is not for it"
    # Where cores are shared out among sessions, one of its own would make way for nobody.
    assert os.getsid(child) == os.getsid(0)
    os.kill(child, signal.SIGSEGV)
    thread.join(TIMEOUT_S)
    assert "ended (killed by SIGSEGV)" in str(outcome[0])
    assert isinstance(outcome[0].__cause__, OSError), "it may be better another time"


def test_one_that_does_not_end_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: set[int]
) -> None:
    bundle = add_colours(tmp_path)
    monkeypatch.setattr(aside, "_MAIN", "import time; time.sleep(1000)")
    monkeypatch.setattr(aside, "_LIMIT_S", 0.2)
    with pytest.raises(BrokenVersion, match=r"not proved itself in 0\.2 s") as refused:
        aside.prove(bundle.folder, CPU)
    assert isinstance(refused.value.__cause__, OSError)
    assert children() <= others


def test_what_has_proved_itself_shows_one_answer_where_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = add_colours(tmp_path)
    sizes: list[int] = []
    run = Model.run

    def counted(model: Model, pixels: object) -> object:
        sizes.append(len(pixels))  # type: ignore[arg-type]
        return run(model, pixels)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "run", counted)
    Model.load(bundle, "cpu", proved=True)
    assert sizes == [1]
    wrong = replace(bundle.golden, probabilities=bundle.golden.probabilities + np.float32(0.1))
    with pytest.raises(BrokenVersion, match="off by"):
        Model.load(replace(bundle, golden=wrong), "cpu", proved=True)
    sizes.clear()
    Model.load(bundle, "cpu")
    assert set(sizes) == {1, COLOURS_BATCH}


def test_where_no_core_is_idle_it_is_not_waited_for(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    others: set[int],
) -> None:
    bundle = add_slow_to_load(tmp_path)
    monkeypatch.setattr(aside, "_PATIENCE_S", 0.05)
    # More than there is: as if it got nothing.
    monkeypatch.setattr(aside, "_LEAST_SHARE", 100.0)
    assert aside.prove(bundle.folder, CPU) is None
    assert "others leave it no core" in caplog.text
    assert children() <= others
    # However long it takes, as long as it gets on.
    monkeypatch.setattr(aside, "_LEAST_SHARE", 0.0)
    assert aside.prove(bundle.folder, CPU)


def test_on_a_card_nothing_is_proved_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "expects_card", lambda device: True)
    assert aside.prove(tmp_path, Settings()) is None
