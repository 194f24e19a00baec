import json
import signal
import socket
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_service.artifacts.reader import Golden
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, convoy, environment
from tests.integration.conftest import classifier_on
from tests.integration.models import add_colours, flip_a_byte
from tests.integration.pictures import encode, raw, solid


@pytest.fixture
def pictures(tmp_path: Path, digits: Golden) -> Path:
    """A folder with digits in several formats, in subfolders too, and a file that is no image."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, digit in (("0.png", 0), ("1.BMP", 1), ("more/2.webp", 2)):
        kind = Path(name).suffix[1:].upper()
        options = {"lossless": True} if kind == "WEBP" else {}
        (folder / name).write_bytes(encode(digits.pixels[digit], kind, **options))
    (folder / "notes.txt").write_text("not asked about")
    (folder / "folder.png").mkdir()
    return folder


def test_classify_prints_a_label_for_each_file(shipped: Server, pictures: Path) -> None:
    files = [pictures / "1.BMP", pictures / "0.png"]
    result = convoy("classify", *files, "--server", shipped.target)
    assert (result.returncode, result.stderr) == (0, "")
    first, second = (line.split() for line in result.stdout.splitlines())
    assert first[:2] == [str(files[0]), "1"]
    assert second[:2] == [str(files[1]), "0"]
    assert 0.5 < float(first[2]) <= 1


def test_classify_takes_folders_and_prints_json(shipped: Server, pictures: Path) -> None:
    result = convoy("classify", pictures, "--json", "--top-k", "3", "--server", shipped.target)
    assert (result.returncode, result.stderr) == (0, "")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer["path"] for answer in answers] == [
        str(pictures / name) for name in ("0.png", "1.BMP", "more/2.webp")
    ]
    assert [answer["labels"][0]["name"] for answer in answers] == ["0", "1", "2"]
    assert [(answer["model"], answer["version"]) for answer in answers] == [("digits", 1)] * 3
    for answer in answers:
        probabilities = [label["probability"] for label in answer["labels"]]
        assert len(probabilities) == 3
        assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_classify_fails_if_an_image_did_but_answers_the_others(
    shipped: Server, pictures: Path, as_json: bool
) -> None:
    files = [pictures / "0.png", pictures / "notes.txt", pictures / "gone.png", pictures / "1.BMP"]
    flags = ["--json"] if as_json else []
    result = convoy("classify", *files, *flags, "--server", shipped.target)
    assert result.returncode == 1
    assert "2 of 4 images failed" in result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4
    if as_json:
        answers = [json.loads(line) for line in lines]
        assert [answers[0]["labels"][0]["name"], answers[3]["labels"][0]["name"]] == ["0", "1"]
        assert [answers[n]["error"]["code"] for n in (1, 2)] == ["INVALID_ARGUMENT"] * 2
        assert "gone.png" in answers[2]["error"]["message"]
    else:
        assert [line.split()[1] for line in lines] == ["0", "ERROR", "ERROR", "1"]


def test_classify_ends_quietly_where_nobody_reads_on(shipped: Server, pictures: Path) -> None:
    command = [sys.executable, "-m", "convoy", "classify", str(pictures)]
    command += ["--server", shipped.target]
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == ""
        assert process.wait(TIMEOUT_S) == 128 + signal.SIGPIPE


def test_classify_names_the_model_where_there_are_several(server: Server, pictures: Path) -> None:
    arguments = ["classify", str(pictures / "0.png"), "--server", server.target]
    assert convoy(*arguments, "--model", "digits").stdout.split()[1] == "0"
    assert convoy(*arguments, CONVOY_MODEL="digits").stdout.split()[1] == "0"
    unnamed = convoy(*arguments)
    assert unnamed.returncode == 1
    assert "name one; there is: colours, digits" in unnamed.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["classify"], "no images given"),
        (["classify", "."], "has no images"),
        (["classify", "a.png", "--top", "3"], "--top"),
        (["classify", "a.png", "--top-k", "many"], "many"),
        (["classify", "a.png", "--top-k", "-1"], "--top-k"),
        (["classify", "a.png", "--top-k", str(10**23)], "--top-k"),
        (["classify", "a.png", "--version", "-1"], "--version"),
        (["classify", "a.png", "--version", str(10**23)], "--version"),
        (["classify", "a.png", "--timeout-s", "-1"], "--timeout-s"),
        (["evaluate", "--version", "-1"], "--version"),
        (["serve", "--device", "tpu"], "cuda"),
        (["train", "--recipe", "nobody's"], "digits"),
        (["make-coffee"], "make-coffee"),
    ],
)
def test_a_mistake_is_told_in_a_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = convoy(*arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert words in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_classify_without_a_server_says_how_to_start_one(pictures: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{held.getsockname()[1]}"
        result = convoy("classify", pictures, "--server", target)
    assert result.returncode == 1
    assert f"no server answers at {target}: start one with `convoy serve`" in result.stderr
    assert "Traceback" not in result.stderr


def test_health_says_how_a_server_is(server: Server) -> None:
    patient = ("--timeout-s", str(TIMEOUT_S))
    asked = [convoy("health", *patient, CONVOY_PORT=str(server.port))]
    asked += [
        convoy("health", *patient, "--server", server.target, "--service", service)
        for service in ("", "digits", "cats")
    ]
    assert [each.returncode for each in asked] == [0, 0, 0, 1]
    assert [each.stdout for each in asked] == ["SERVING\n"] * 3 + [""]
    assert "NOT_FOUND" in asked[3].stderr
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        nobody = convoy("health", "--port", port, "--timeout-s", "0.5")
    assert nobody.returncode == 1
    assert nobody.stderr.startswith("convoy: DEADLINE_EXCEEDED")


def test_models_lists_versions_with_their_scores(models: Path) -> None:
    result = convoy("models", "--models", models)
    assert (result.returncode, result.stderr) == (0, "")
    (colours,) = (line for line in result.stdout.splitlines() if "colours" in line)
    (digits,) = (line for line in result.stdout.splitlines() if "digits" in line)
    assert "unknown" in colours
    assert "4x4x3" in colours
    assert "0.9" in digits

    listed = convoy("models", "--models", models, "--json")
    colours_row, digits_row = (json.loads(line) for line in listed.stdout.splitlines())
    assert (colours_row["model"], colours_row["version"]) == ("colours", 1)
    assert colours_row["accuracy"] is None
    assert digits_row["accuracy"] > 0.9
    assert digits_row["parity"] <= 1e-5
    assert digits_row["input"] == [8, 8, 1]


def test_models_lists_what_is_shipped_and_what_the_folder_here_holds(
    tmp_path: Path, models: Path
) -> None:
    shipped = convoy("models", "--json", cwd=tmp_path)
    assert [json.loads(line)["model"] for line in shipped.stdout.splitlines()] == [
        "cifar10", "digits",
    ]  # fmt: skip
    (tmp_path / "models").symlink_to(models)
    here = convoy("models", "--json", cwd=tmp_path)
    assert [json.loads(line)["model"] for line in here.stdout.splitlines()] == ["colours", "digits"]


def test_models_says_which_version_is_broken(tmp_path: Path) -> None:
    add_colours(tmp_path)
    flip_a_byte(add_colours(tmp_path).folder / "model.onnx")
    listed = convoy("models", "--models", tmp_path, "--json")
    assert listed.returncode == 1
    newest, older = (json.loads(line) for line in listed.stdout.splitlines())
    assert (newest["version"], newest["state"]) == (2, "broken")
    assert "sha256" in newest["reason"]
    assert (older["version"], older["state"]) == (1, "whole")
    table = convoy("models", "--models", tmp_path)
    assert table.returncode == 1
    assert "broken" in table.stdout


@pytest.mark.parametrize("command", ["", "serve", "classify", "models", "models add", "train"])
def test_help_explains_every_flag(command: str) -> None:
    result = convoy(*command.split(), "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "Usage" in result.stdout
    if command == "serve":
        assert "CONVOY_METRICS_PORT" in result.stdout


def test_the_installed_script_is_the_same_command() -> None:
    script = Path(sysconfig.get_path("scripts")) / "convoy"
    version = subprocess.check_output([script, "--version"], env=environment(), text=True)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert version.strip() == project["version"]


def test_a_variable_that_is_no_setting_is_an_error() -> None:
    result = convoy("models", CONVOY_MAX_BATCH_DELAY="3")
    assert result.returncode == 1
    assert "CONVOY_MAX_BATCH_DELAY, which is no setting" in result.stderr


def test_variables_that_kubernetes_sets_are_no_settings(tmp_path: Path) -> None:
    # For Services that are called convoy, convoy-metrics and convoy-2.
    links = {
        "CONVOY_SERVICE_HOST": "10.0.0.1",
        "CONVOY_SERVICE_PORT": "8001",
        "CONVOY_SERVICE_PORT_GRPC": "8001",
        "CONVOY_PORT": "tcp://10.0.0.1:8001",
        "CONVOY_PORT_8001_TCP": "tcp://10.0.0.1:8001",
        "CONVOY_PORT_8001_TCP_ADDR": "10.0.0.1",
        "CONVOY_PORT_8001_TCP_PORT": "8001",
        "CONVOY_PORT_8001_TCP_PROTO": "tcp",
        "CONVOY_METRICS_SERVICE_HOST": "10.0.0.2",
        "CONVOY_METRICS_PORT": "tcp://10.0.0.2:8002",
        "CONVOY_METRICS_PORT_8002_TCP_ADDR": "10.0.0.2",
        "CONVOY_2_PORT": "tcp://10.0.0.3:8001",
    }
    assert convoy("--help", cwd=tmp_path, **links).returncode == 0
    arguments = ["serve", "--models", str(tmp_path), "--metrics-port", "0"]
    served = convoy(*arguments, cwd=tmp_path, **links)
    assert f"no models in {tmp_path}" in served.stderr
    wrong = convoy("serve", cwd=tmp_path, **{**links, "CONVOY_PORT": "nine"})
    assert wrong.returncode != 0
    assert "nine" in wrong.stdout + wrong.stderr


def test_a_variable_sets_what_no_flag_does(models: Path, tmp_path: Path) -> None:
    listed = convoy("models", "--json", cwd=tmp_path, CONVOY_MODELS=str(models))
    assert len(listed.stdout.splitlines()) == 2
    flag = convoy("models", "--json", "--models", tmp_path, cwd=tmp_path, CONVOY_MODELS=str(models))
    assert flag.stdout == ""


HEAVY = {"tensorflow", "keras", "tf2onnx", "onnx", "sklearn", "scipy", "matplotlib"}


def imported(log: str) -> set[str]:
    """The top-level modules in what `-X importtime` writes."""
    rows = (line.split("|") for line in log.splitlines() if line.startswith("import time:"))
    return {row[-1].strip().partition(".")[0] for row in rows}


def test_serving_imports_nothing_of_training() -> None:
    with Server(python=("-X", "importtime")) as server:
        with server.ready().channel() as channel:
            request = pb.ClassifyRequest(model="cifar10", images=[raw(solid("red"))])
            assert classifier_on(channel).Classify(request).model == "cifar10"
        server.stop()
        modules = imported(server.log)
    assert "onnxruntime" in modules
    # Nor what only tracing needs, which is off.
    assert not modules & (HEAVY | {"opentelemetry"})


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["serve", "--help"]])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "convoy", *command],
        capture_output=True,
        env=environment(),
        text=True,
    )
    modules = imported(result.stderr)
    assert "cyclopts" in modules
    assert not modules & (HEAVY | {"onnxruntime", "numpy", "grpc", "PIL"})
