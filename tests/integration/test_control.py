"""What an operator orders, by `convoy models` and by the Open Inference Protocol's calls, in the forms
that Triton's and KServe's clients send.
"""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from convoy import Classifier
from convoy.cli.app import app
from convoy.models import Folder
from convoy_protos import classifier_pb2
from convoy_protos import inference_pb2 as pb
from convoy_service.errors import ConvoyError
from convoy_service.rollout import policy as policies
from convoy_service.rollout.policy import Policy
from tests.conftest import REPOSITORY, TIMEOUT_S, Server, convoy
from tests.integration.conftest import Peer, classifier_on, inference_on, wait_until
from tests.integration.models import flip_a_byte
from tests.integration.pictures import raw, solid

DIGITS = REPOSITORY / "models" / "digits"

Index = list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three versions of `digits`, the newest of them broken."""
    folder = tmp_path_factory.mktemp("controlled")
    shutil.copytree(DIGITS, folder / "digits")
    for version in (2, 3):
        shutil.copytree(DIGITS / "1", folder / "digits" / str(version))
    flip_a_byte(folder / "digits" / "3" / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def controlled(folder: Path) -> Iterator[Server]:
    arguments = ("--allow-repository-control", "--rollback-window-s", "0")
    with Server(*arguments, models=folder) as server:
        yield server.ready()


@pytest.fixture
def calls(controlled: Server) -> Iterator[grpc.Channel]:
    with controlled.channel() as channel:
        yield channel


def index(channel: grpc.Channel, ready: bool = False) -> Index:
    answer = inference_on(channel).RepositoryIndex(pb.RepositoryIndexRequest(ready=ready))
    return [(each.version, each.state, each.reason) for each in answer.models]


def states(channel: grpc.Channel) -> dict[str, str]:
    return {version: state for version, state, _ in index(channel)}


def answers(channel: grpc.Channel, version: int | str = 0) -> int:
    """The version that a request gets which asks for this one."""
    request = classifier_pb2.ClassifyRequest(images=[raw(solid("black"))])
    if isinstance(version, str):
        request.version_label = version
    else:
        request.version = version
    answer: int = classifier_on(channel).Classify(request, timeout=TIMEOUT_S).version
    return answer


def refused(call: Any, request: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as info:
        call(request, timeout=TIMEOUT_S)
    error: Any = info.value
    return error.code().name, error.details()


def models(server: Server, *arguments: str) -> Any:
    """What `convoy models` prints as JSON; in this process, as starting one takes longer than that.

    Raises ConvoyError for what it would say before it exits with 1.
    """
    words = ["models", *arguments, "--json", "--server", server.target]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert app(words, result_action="return_value") == 0
    return json.loads(printed.getvalue())


def test_the_index_says_of_each_version_what_has_become_of_it_and_why(
    controlled: Server, calls: grpc.Channel
) -> None:
    one, two, three = index(calls)
    assert one[:2] == ("1", "UNAVAILABLE")
    assert "newest" in one[2]
    assert two == ("2", "READY", "")
    assert three[:2] == ("3", "UNAVAILABLE")
    assert "sha256" in three[2]
    assert index(calls, ready=True) == [two]
    named = pb.RepositoryIndexRequest(repository_name="mine")
    code, words = refused(inference_on(calls).RepositoryIndex, named)
    assert (code, "not supported" in words) == ("UNIMPLEMENTED", True)

    shown = convoy("models", "show", "digits", "--server", controlled.target)
    assert shown.returncode == 1  # one is broken
    assert "version 2 answers" in shown.stdout
    table = [line.split("│") for line in shown.stdout.splitlines() if "digits │" in line]
    assert [[cell.strip() for cell in row[2:5]] for row in table] == [
        ["3", "broken", ""],
        ["2", "ready", "stable"],
        ["1", "idle", ""],
    ]
    assert "sha256" in table[0][-2]
    assert "0.9" in table[1][5]


def test_what_an_operator_orders_is_done_and_written_down(
    controlled: Server, calls: grpc.Channel, folder: Path
) -> None:
    model = models(controlled, "pin", "digits", "1", "2")
    assert (model["version"], answers(calls, 1), answers(calls)) == (2, 1, 2)
    assert states(calls) == {"1": "READY", "2": "READY", "3": "UNAVAILABLE"}
    assert policies.read(folder / "digits") == Policy(serve=[1, 2])

    model = models(controlled, "promote", "digits", "1")
    assert (model["route"]["stable"], answers(calls), answers(calls, "stable")) == (1, 1, 1)
    with pytest.raises(grpc.RpcError, match="no version 'mine'; its labels: stable"):
        answers(calls, "mine")
    asked = inference_on(calls).ModelMetadata
    metadata = asked(pb.ModelMetadataRequest(name="digits", version="stable"))
    assert metadata.versions == ["1", "2"]
    for version in ("", "1", "2", "stable"):
        ready = inference_on(calls).ModelReady(pb.ModelReadyRequest(name="digits", version=version))
        assert ready.ready
    assert refused(asked, pb.ModelMetadataRequest(name="digits", version="3"))[0] == "NOT_FOUND"
    with Classifier(controlled.target, version="stable", key="me") as classifier:
        assert classifier.classify(solid("black")).version == 1
    broken = convoy("models", "promote", "digits", "3", "--server", controlled.target)
    assert broken.returncode == 1
    assert "sha256" in broken.stderr
    assert answers(calls) == 1

    assert models(controlled, "promote", "digits", "2")["version"] == 2
    assert models(controlled, "rollback", "digits")["version"] == 1
    assert answers(calls) == 1
    assert policies.read(folder / "digits").stable == 1

    assert models(controlled, "unload", "digits")["state"] == "unavailable"
    assert set(states(calls).values()) == {"UNAVAILABLE"}
    request = classifier_pb2.ClassifyRequest(images=[raw(solid("black"))])
    code, words = refused(classifier_on(calls).Classify, request)
    assert (code, "is unloaded" in words) == ("UNAVAILABLE", True)
    # What was rolled back is not the newest to it, until the operator says so.
    assert models(controlled, "load", "digits")["version"] == 1
    model = models(controlled, "pin", "digits")
    assert (model["policy"], model["version"], answers(calls)) == ("newest", 2, 2)

    def is_gone() -> bool:
        """It may be asked for a moment longer than it is ordered."""
        try:
            answers(calls, 1)
        except grpc.RpcError as error:
            return "version 1 of model 'digits' is not served" in str(error)
        return False

    wait_until(is_gone)


def test_an_edit_of_the_folder_is_an_order_too(
    controlled: Server, calls: grpc.Channel, folder: Path
) -> None:
    Folder(folder).promote("digits", 1)
    controlled.wait_for_metric('convoy_model_serving_version{model="digits"}', 1)
    assert answers(calls) == 1
    Folder(folder).pin("digits", [])
    controlled.wait_for_metric('convoy_model_serving_version{model="digits"}', 2)


# The bytes that these clients send: the model's name in field 1 or 2.
@pytest.mark.parametrize("named", [b"\x12\x06digits", b"\x0a\x06digits"], ids=["triton", "kserve"])
def test_load_and_unload_understand_triton_and_kserve(calls: grpc.Channel, named: bytes) -> None:
    path = "/inference.GRPCInferenceService/RepositoryModel"
    unload: Any = calls.unary_unary(f"{path}Unload")
    load: Any = calls.unary_unary(f"{path}Load")
    unloaded = unload(named, timeout=TIMEOUT_S)
    assert set(states(calls).values()) == {"UNAVAILABLE"}
    loaded = load(named, timeout=TIMEOUT_S)
    assert states(calls)["2"] == "READY"
    # KServe's answer: the name in field 1, `true` in field 2. Triton's is empty, and skips both.
    assert {unloaded, loaded} == {b"\x0a\x06digits\x10\x01"}


def test_tritonclient_loads_and_unloads(controlled: Server, peer: Peer) -> None:
    seen = peer("control", controlled.target)
    rest = [["digits", "1", "UNAVAILABLE"], ["digits", "3", "UNAVAILABLE"]]
    assert seen == {
        "extensions": True,
        "unloaded": [[rest[0], ["digits", "2", "UNAVAILABLE"], rest[1]], False],
        "loaded": [[rest[0], ["digits", "2", "READY"], rest[1]], True],
        "overridden": "StatusCode.INVALID_ARGUMENT",
    }


def test_load_takes_no_files_and_no_configuration(calls: grpc.Channel) -> None:
    load, unload = (
        inference_on(calls).RepositoryModelLoad,
        inference_on(calls).RepositoryModelUnload,
    )
    request = pb.RepositoryModelLoadRequest(model_name="digits")
    request.parameters["config"].string_param = "{}"
    request.parameters["file:1/model.onnx"].bytes_param = b"a model"
    code, words = refused(load, request)
    assert (code, "config, file:1/model.onnx" in words) == ("INVALID_ARGUMENT", True)
    assert refused(load, pb.RepositoryModelLoadRequest())[0] == "INVALID_ARGUMENT"
    both = pb.RepositoryModelLoadRequest(repository_name="mine", model_name="digits")
    assert refused(load, both)[0] == "UNIMPLEMENTED"
    assert refused(load, pb.RepositoryModelLoadRequest(model_name="nobody's"))[0] == "NOT_FOUND"
    unloading = pb.RepositoryModelUnloadRequest(model_name="nobody's")
    unloading.parameters["unload_dependents"].bool_param = True
    assert refused(unload, unloading)[0] == "NOT_FOUND"
    assert states(calls)["2"] == "READY"


def test_an_order_holds_in_every_process_when_it_is_answered(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "models")
    (copy / "digits" / policies.FILE).unlink(missing_ok=True)
    arguments = ("--allow-repository-control", "--acceptors", "2", "--engines", "1")
    with Server(*arguments, models=copy) as server, contextlib.ExitStack() as stack:
        server.ready()
        # The kernel gives each connection to one of the two acceptors.
        channels = [stack.enter_context(server.channel()) for _ in range(8)]
        for version, *order in (
            (1, "promote", "digits", "1"),
            (2, "promote", "digits", "2"),
            (1, "rollback", "digits"),
            (2, "pin", "digits"),
        ):
            assert models(server, *order)["version"] == version
            assert [answers(channel) for channel in channels] == [version] * len(channels)
        models(server, "unload", "digits")
        for channel in channels:
            with pytest.raises(grpc.RpcError, match="is unloaded"):
                answers(channel)
        with pytest.raises(ConvoyError, match=r"FAILED_PRECONDITION.*sha256"):
            models(server, "promote", "digits", "3")
        assert models(server, "load", "digits")["version"] == 2


def test_nobody_gives_orders_where_the_operator_did_not_allow_it(shipped: Server) -> None:
    with shipped.channel() as channel:
        before = index(channel)
        for call, request in (
            ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="digits")),
            ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="digits")),
        ):
            code, words = refused(getattr(inference_on(channel), call), request)
            assert (code, "--allow-repository-control" in words) == ("PERMISSION_DENIED", True)
        for order in (["promote", "digits", "1"], ["pin", "digits", "1"], ["unload", "digits"]):
            with pytest.raises(ConvoyError, match=r"PERMISSION_DENIED.*--allow-repository-control"):
                models(shipped, *order)
        told = convoy("models", "rollback", "digits", "--server", shipped.target)
        assert told.returncode == 1
        assert "PERMISSION_DENIED" in told.stderr
        assert index(channel) == before == [("1", "READY", "")]
