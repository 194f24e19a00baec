"""`convoy models` on a folder, without a server."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from convoy.cli.app import app
from convoy.models import Model, Server, as_model, show
from convoy_protos import classifier_pb2 as pb
from convoy_service.errors import ConvoyError
from convoy_service.rollout import policy as policies
from convoy_service.rollout.policy import Policy
from tests.unit.versions import write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four whole versions of `pets`, and one of `plants`."""
    first = write(tmp_path / "pets").folder
    for copy in ("pets/2", "pets/3", "pets/4", "plants/1"):
        shutil.copytree(first, tmp_path / copy)
    return tmp_path


def models(folder: Path, *arguments: str) -> int:
    status = app(["models", *arguments, "--models", str(folder)], result_action="return_value")
    assert isinstance(status, int)
    return status


def asked(folder: Path) -> Policy:
    return policies.read(folder / "pets")


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    models(folder, *arguments, "--json")
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


def test_promote_names_the_stable_version_and_ends_a_canary(folder: Path) -> None:
    (folder / "pets" / policies.FILE).write_text("[labels]\nstable = 1\ncanary = 4\nold = 2\n")
    assert models(folder, "promote", "pets") == 0
    assert asked(folder) == Policy(labels={"stable": 4, "old": 2})
    assert models(folder, "promote", "pets", "3") == 0
    assert asked(folder) == Policy(labels={"stable": 3, "old": 2})
    with pytest.raises(ConvoyError, match=r"no candidate in versions\.toml: say which"):
        models(folder, "promote", "pets")
    assert asked(folder) == Policy(labels={"stable": 3, "old": 2})


def test_rollback_ends_a_canary_then_goes_back_one_by_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "pets" / policies.FILE).write_text("[labels]\nstable = 3\ncanary = 4\n")
    assert shown(folder, capsys, "rollback", "pets")["version"] == 3
    assert asked(folder) == Policy(skip=[4], labels={"stable": 3})
    assert shown(folder, capsys, "rollback", "pets")["version"] == 2
    assert shown(folder, capsys, "rollback", "pets")["version"] == 1
    assert asked(folder) == Policy(skip=[2, 3, 4], labels={"stable": 1})
    with pytest.raises(ConvoyError, match="no version before 1 to go back to"):
        models(folder, "rollback", "pets")
    # What was rolled back is not taken for the newest again; what comes new is.
    assert shown(folder, capsys, "pin", "pets", "1")["version"] == 1
    assert asked(folder) == Policy(serve=[1], labels={"stable": 1})


def test_rollback_goes_back_to_what_is_whole(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = folder / "pets" / "3" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[::-1])
    assert shown(folder, capsys, "rollback", "pets")["version"] == 2


def test_pin_takes_several_and_none_of_them_frees(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shown(folder, capsys, "pin", "pets", "3", "1")
    assert asked(folder) == Policy(serve=[1, 3])
    assert (model["policy"], model["version"]) == ("1, 3", 3)
    model = shown(folder, capsys, "pin", "pets")
    assert asked(folder) == Policy()
    assert (model["policy"], model["version"]) == ("newest", 4)


def test_unload_serves_none_and_load_again_the_newest(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shown(folder, capsys, "unload", "pets")
    assert (model["policy"], model["version"]) == ("none", 0)
    assert shown(folder, capsys, "load", "pets")["version"] == 4
    write(folder / "pets")
    assert shown(folder, capsys, "show", "pets")["version"] == 5


@pytest.mark.parametrize("order", ["promote", "pin"])
def test_a_version_that_is_not_there_or_not_whole_is_refused(folder: Path, order: str) -> None:
    before = asked(folder)
    with pytest.raises(ConvoyError, match=r"no version 9 of model 'pets'.*there is: 1, 2, 3, 4"):
        models(folder, order, "pets", "9")
    (folder / "pets" / "4" / "golden.npz").unlink()
    with pytest.raises(ConvoyError, match=r"4/golden\.npz"):
        models(folder, order, "pets", "4")
    assert asked(folder) == before


@pytest.mark.parametrize("order", ["show", "promote", "rollback", "pin", "load", "unload"])
def test_a_model_that_is_not_there_is_refused(folder: Path, order: str) -> None:
    with pytest.raises(ConvoyError, match=r"no model 'rocks' in .*; there is: pets, plants"):
        models(folder, order, "rocks")
    assert not (folder / "rocks").exists()


def test_a_policy_that_cannot_be_read_is_reported_and_not_written_over(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "pets" / policies.FILE
    file.write_text('serve = "latest"\n')
    assert str(file) in shown(folder, capsys, "show", "pets")["reason"]
    with pytest.raises(ConvoyError, match=r"versions\.toml"):
        models(folder, "pin", "pets", "2")
    assert file.read_text() == 'serve = "latest"\n'


def test_ls_tells_what_is_broken_from_what_is_on_its_way(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "pets" / "4" / "manifest.json").unlink()
    (folder / "pets" / "3" / "model.onnx").unlink()
    (folder / "pets" / policies.FILE).write_text("skip = [2]\n")
    assert models(folder, "ls", "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["model"], row["version"], row["state"]) for row in rows] == [
        ("pets", 4, "incomplete"),
        ("pets", 3, "incomplete"),
        ("pets", 2, "whole"),
        ("pets", 1, "whole"),
        ("plants", 1, "whole"),
    ]
    reasons = ["manifest.json missing", "model.onnx missing", "skipped", "", ""]
    for row, reason in zip(rows, reasons, strict=True):
        assert reason in row["reason"]
        assert bool(reason) == bool(row["reason"])
    (folder / "pets" / "2" / "golden.npz").write_bytes(b"")
    assert models(folder, "ls") == 1
    table = capsys.readouterr().out
    assert "broken" in table
    assert "0 bytes, the manifest says" in table


def test_show_says_how_the_trial_of_a_candidate_stands(capsys: pytest.CaptureFixture[str]) -> None:
    limits = [
        pb.Limit(name="failures", mean=0.001, limit=0.01, batches=70, kept=True),
        pb.Limit(name="disagreement", mean=0.25, limit=0.5, batches=70),
    ]
    trial = pb.Trial(why="70 of 1000 requests", limits=limits, latency_ratio=1.25)
    message = pb.Model(
        name="pets",
        state=pb.Model.READY,
        version=3,
        route=pb.Route(mode=pb.Route.CANARY, stable=3, candidate=4, share=0.2, trial=trial),
        version_labels={"stable": 3, "canary": 4, "old": 3},
        version_states=[
            pb.Version(version=3, state=pb.Version.READY, accuracy=0.5, test_images=10),
            pb.Version(version=4, state=pb.Version.READY, reason="on trial"),
        ],
    )

    class Told(Server):
        def models(self) -> list[Model]:
            return [as_model(message)]

    with Told("localhost:1", 1.0, None) as server:
        assert show(server, "pets", as_json=True) == 0
        model = json.loads(capsys.readouterr().out)
        assert [version["version"] for version in model["versions"]] == [4, 3]
        assert [version["accuracy"] for version in model["versions"]] == [None, 0.5]
        assert model["trial"]["limits"][1] == {
            "name": "disagreement", "mean": 0.25, "limit": 0.5, "batches": 70, "kept": False,
        }  # fmt: skip
        assert show(server, "pets", as_json=False) == 0
    words = capsys.readouterr().out
    assert "version 3 answers; 0.2 of the requests go to 4" in words
    assert "70 of 1000 requests" in words
    assert "0.001 in 70 batches, the limit is 0.01: kept" in words
    assert "x1.25 the stable version's" in words
    table = [line.split("│") for line in words.splitlines() if line.startswith("│ pets")]
    assert [row[4].strip() for row in table] == ["canary 0.2", "stable, old"]


def test_show_prints_what_looks_like_markup_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # a longer path would be folded
    folder = Path("[red]models[/]")
    write(folder / "pets")
    (folder / "pets" / "1" / "golden.npz").write_bytes(b"")
    assert models(folder, "show", "pets") == 1
    assert "[red]models[/]/pets/1/golden.npz" in capsys.readouterr().out


def test_environment_gives_no_orders(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONVOY_VERSION", "2")
    monkeypatch.setenv("CONVOY_NAME", "plants")
    monkeypatch.setenv("CONVOY_SERVER", "localhost:1")
    with pytest.raises(ConvoyError, match="no candidate"):
        models(folder, "promote", "pets")
    assert asked(folder) == Policy()


def test_a_server_and_a_folder_are_too_much(folder: Path) -> None:
    with pytest.raises(ConvoyError, match="give one of them"):
        models(folder, "ls", "--server", "localhost:1")
