import contextlib
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as oip
from convoy_service.artifacts.reader import Golden
from convoy_service.engine import gpu
from tests.conftest import REPOSITORY, TIMEOUT_S, Server
from tests.integration.conftest import Gate, classifier_on, inference_on
from tests.integration.models import FAST_IMAGE, add_colours, add_slow, add_steady, flip_a_byte
from tests.integration.pictures import raw, solid

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ["convoy.v1.ImageClassifier", "inference.GRPCInferenceService"]

# As slow as a `Gate` makes it.
HELD = pb.ClassifyRequest(model="slow", images=[raw(FAST_IMAGE)])
RED = pb.ClassifyRequest(model="colours", images=[raw(solid("red"))])


def health_on(channel: grpc.Channel) -> Any:
    return health_pb2_grpc.HealthStub(channel)


def check(channel: grpc.Channel, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = health_on(channel).Check(request).status
    return status


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as listener:
            listener.bind(("::1", 0))
    except OSError:
        return False
    return True


def refused_at(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), TIMEOUT_S).close()
    except ConnectionRefusedError:
        return True
    except ConnectionError:  # closed while it was accepting
        pass
    return False


def test_nothing_is_ready_before_every_model_has_proved_itself(tmp_path: Path, gate: Gate) -> None:
    add_slow(tmp_path)
    port, metrics_port = free_port(), free_port()
    arguments = ("--port", str(port), "--metrics-port", str(metrics_port))
    with (
        gate.shut("slow") as open_gate,
        Server(*arguments, models=tmp_path, variables=gate.variables) as server,
    ):
        server.metrics_port = metrics_port
        server.wait_until_http()
        assert server.http("/healthz") == (200, "ok\n")
        assert server.http("/readyz") == (503, "not ready\n")
        assert refused_at(port)
        assert "ready in" not in server.log
        open_gate()
        server.ready()
        assert server.http("/readyz") == (200, "ok\n")
        with server.channel() as channel:
            assert inference_on(channel).ServerReady(oip.ServerReadyRequest()).ready
            assert [check(channel, name) for name in ["", "slow", *SERVICES]] == [SERVING] * 4


def test_sigterm_while_models_load_ends_it_before_it_is_ready_and_waits_for_one_at_most(
    tmp_path: Path, gate: Gate
) -> None:
    add_slow(tmp_path, "first")
    add_steady(tmp_path, 1, "second")
    metrics_port = free_port()
    arguments = ("--metrics-port", str(metrics_port), "--shutdown-delay-s", "600")
    with (
        gate.shut("steady"),
        gate.shut("slow") as open_first,
        Server(*arguments, models=tmp_path, variables=gate.variables) as server,
    ):
        server.metrics_port = metrics_port
        server.wait_until_http()
        server.send(signal.SIGTERM)
        open_first()
        assert server.wait() == 0
        assert "ready in" not in server.log


def test_sigterm_withdraws_readiness_and_goes_on_answering_until_the_delay_is_over(
    tmp_path: Path,
) -> None:
    add_colours(tmp_path)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(
            contextlib.closing(Server("--shutdown-delay-s", "600", models=tmp_path))
        )
        channel = stack.enter_context(server.ready().channel())
        server.send(signal.SIGTERM)
        server.wait_for("not ready; still answering")
        assert server.http("/readyz") == (503, "not ready\n")
        assert server.http("/healthz") == (200, "ok\n")
        assert not inference_on(channel).ServerReady(oip.ServerReadyRequest()).ready
        assert not inference_on(channel).ModelReady(oip.ModelReadyRequest(name="colours")).ready
        assert [check(channel, name) for name in ["colours", *SERVICES]] == [NOT_SERVING] * 3
        assert check(channel, "") == SERVING, "the process itself lives: probes must not kill it"
        with server.channel() as another:
            assert classifier_on(another).Classify(RED).results[0].HasField("classification")
        assert "draining" not in server.log


def test_sigint_skips_the_delay(tmp_path: Path) -> None:
    add_colours(tmp_path)
    with Server("--shutdown-delay-s", "600", models=tmp_path) as server:
        assert server.ready().stop(signal.SIGINT) == 0


def test_requests_in_flight_finish_and_new_ones_are_refused(slow_models: Path, gate: Gate) -> None:
    with (
        Server(models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        answer = classifier_on(channel).Classify.future(HELD, timeout=TIMEOUT_S)
        server.wait_until_in_flight(1)
        server.send(signal.SIGTERM)
        server.wait_for("draining")
        with server.channel() as late, pytest.raises(grpc.RpcError) as refused:
            classifier_on(late).Classify(HELD, timeout=TIMEOUT_S)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        open_gate()
        assert answer.result().results[0].HasField("classification")
        assert server.wait() == 0


def test_the_drain_ends_after_its_grace(slow_models: Path, gate: Gate) -> None:
    grace = ("--drain-grace-s", "0.1")
    with (
        Server(*grace, models=slow_models, variables=gate.variables) as server,
        server.ready().channel() as channel,
        gate.shut("slow") as open_gate,
    ):
        answer = classifier_on(channel).Classify.future(HELD, timeout=TIMEOUT_S)
        server.wait_until_in_flight(1)
        server.send(signal.SIGTERM)
        assert answer.code() is grpc.StatusCode.UNAVAILABLE
        open_gate()  # it ends when the batch does, which nobody waits for any more
        assert server.wait() == 0
        assert "1 calls were cut off after 0.1 s" in server.log


def test_a_second_signal_ends_it_at_once(slow_models: Path, gate: Gate) -> None:
    with (
        contextlib.closing(Server(models=slow_models, variables=gate.variables)) as server,
        server.ready().channel() as channel,
        gate.shut("slow"),
    ):
        answer = classifier_on(channel).Classify.future(HELD, timeout=TIMEOUT_S)
        server.wait_until_in_flight(1)
        server.send(signal.SIGTERM)
        server.wait_for("draining")
        assert server.stop() == 128 + signal.SIGTERM
        assert answer.code() is grpc.StatusCode.UNAVAILABLE
        assert "second signal: stopping at once" in server.log


def test_health_watch_sees_the_end_and_does_not_delay_it(tmp_path: Path) -> None:
    add_colours(tmp_path)
    with (
        # A delay, too, that comes to its end.
        Server("--shutdown-delay-s", "0.1", "--drain-grace-s", "600", models=tmp_path) as server,
        server.ready().channel() as channel,
    ):
        watched = {
            name: health_on(channel).Watch(health_pb2.HealthCheckRequest(service=name))
            for name in ["colours", "", *SERVICES]
        }
        assert {name: next(watch).status for name, watch in watched.items()} == dict.fromkeys(
            watched, SERVING
        )
        assert server.stop() == 0
        assert next(watched["colours"]).status == NOT_SERVING
        assert [next(watched[name]).status for name in SERVICES] == [NOT_SERVING] * 2
        with pytest.raises(grpc.RpcError):
            next(watched[""])
    assert "Traceback" not in server.log


def test_health_of_an_unknown_model_is_not_found(channel: grpc.Channel) -> None:
    assert [check(channel, name) for name in ["digits", "colours"]] == [SERVING] * 2
    with pytest.raises(grpc.RpcError) as refused:
        check(channel, "nobody's")
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("flag", ["--port", "--metrics-port"])
def test_a_port_that_is_taken_ends_it_with_what_to_do(server: Server, flag: str) -> None:
    taken = server.port if flag == "--port" else server.metrics_port
    with contextlib.closing(Server(flag, str(taken))) as second:
        assert second.wait() == 1
        assert f"port {taken} of 127.0.0.1: " in second.log
        assert flag in second.log
        assert "Traceback" not in second.log


def test_a_host_that_is_not_here_is_told_with_the_reason() -> None:
    with contextlib.closing(Server("--host", "nohost.invalid")) as server:
        assert server.wait() == 1
        assert "of nohost.invalid: " in server.log
        assert "name" in server.log.lower()
        assert "taken" not in server.log
        assert "Traceback" not in server.log


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_is_listened_on(tmp_path: Path) -> None:
    add_colours(tmp_path)
    with Server("--host", "::1", models=tmp_path) as server:
        server.ready()
        with grpc.insecure_channel(f"[::1]:{server.port}") as channel:
            assert classifier_on(channel).Classify(RED).model == "colours"
        with urlopen(f"http://[::1]:{server.metrics_port}/healthz", timeout=TIMEOUT_S) as response:
            assert response.read() == b"ok\n"


@pytest.mark.parametrize("there_is", ["an empty folder", "nothing", "a file"])
def test_no_models_ends_it_with_what_to_do(tmp_path: Path, there_is: str) -> None:
    folder = tmp_path / "models"
    if there_is == "an empty folder":
        folder.mkdir()
    elif there_is == "a file":
        folder.touch()
    with contextlib.closing(Server(models=folder)) as server:
        assert server.wait() == 1
        assert f"no models in {folder}" in server.log
        assert "convoy train" in server.log
        assert "convoy models add" in server.log
        assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serves `good`; `newest`, whose version 2 is damaged; and has `broken`, damaged altogether."""
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("good", "newest", "newest", "broken"):
        bundle = add_colours(folder, name)
    flip_a_byte(bundle.folder / "model.onnx")
    flip_a_byte(folder / "newest" / "2" / "model.onnx")
    with Server(models=folder) as server:
        yield server.ready()


def test_a_broken_model_is_unavailable_beside_a_good_one(damaged: Server) -> None:
    with damaged.channel() as channel:
        calls = classifier_on(channel)
        listed = {model.name: model for model in calls.ListModels(pb.ListModelsRequest()).models}
        assert listed["good"].state == pb.Model.READY
        assert listed["broken"].state == pb.Model.UNAVAILABLE
        assert (listed["broken"].version, list(listed["broken"].versions)) == (0, [1])
        assert "model.onnx: its sha256 is not the manifest's" in listed["broken"].reason
        assert check(channel, "good") == SERVING
        assert check(channel, "broken") == NOT_SERVING
        ready = inference_on(channel).ModelReady
        assert ready(oip.ModelReadyRequest(name="good")).ready
        assert not ready(oip.ModelReadyRequest(name="broken")).ready
        images = RED.images
        assert calls.Classify(pb.ClassifyRequest(model="good", images=images)).model == "good"
        with pytest.raises(grpc.RpcError) as refused:
            calls.Classify(pb.ClassifyRequest(model="broken", images=images))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "no version that works" in str(refused.value.details())


def test_a_broken_newest_version_leaves_the_older_one_serving(damaged: Server) -> None:
    with damaged.channel() as channel:
        calls = classifier_on(channel)
        listed = {model.name: model for model in calls.ListModels(pb.ListModelsRequest()).models}
        newest = listed["newest"]
        assert (newest.state, newest.version, list(newest.versions)) == (pb.Model.READY, 1, [1, 2])
        assert "sha256" in newest.reason
        images = RED.images
        assert calls.Classify(pb.ClassifyRequest(model="newest", images=images)).version == 1
    assert "newest/2 is not served" in damaged.log
    assert damaged.metrics()['convoy_model_broken_versions{model="newest"}'] == 1


def test_an_unforeseen_error_in_one_version_stops_no_other(tmp_path: Path) -> None:
    add_colours(tmp_path, "good")
    manifest = add_colours(tmp_path, "odd").folder / "manifest.json"
    # Deeper than the reader can go.
    deep = '{"training": ' + '{"a": ' * 100_000 + "0" + "}" * 100_000 + ","
    manifest.write_text(manifest.read_text().replace("{", deep, 1))
    with Server(models=tmp_path) as server, server.ready().channel() as channel:
        good, odd = classifier_on(channel).ListModels(pb.ListModelsRequest()).models
        assert (good.state, odd.state) == (pb.Model.READY, pb.Model.UNAVAILABLE)
        assert "recursion" in odd.reason
        assert "odd/1 is not served" in server.log
        assert "RecursionError" in server.log, "without a stack nobody can mend it"


@pytest.mark.skipif(gpu.count() > 0, reason="this machine has a card")
@pytest.mark.parametrize(
    ("device", "arguments"),
    [
        ("cuda", ()),
        ("cuda:1", ("--cuda-graphs", "--variant", "fastest")),
        ("tensorrt", ()),
        ("cuda", ("--acceptors", "1", "--engines", "1")),
    ],
)
def test_a_card_that_is_not_there_ends_it_with_the_reason(
    models: Path, device: str, arguments: tuple[str, ...]
) -> None:
    with contextlib.closing(Server("--device", device, *arguments, models=models)) as server:
        assert server.wait() == 1
        assert f"device {device}" in server.log
        assert "is not to be had" in server.log
        assert "Traceback" not in server.log


def test_what_is_no_model_is_named_once(tmp_path: Path) -> None:
    good = add_colours(tmp_path, "good").folder.parent
    shutil.copytree(good, tmp_path / "my model")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    with Server(models=tmp_path) as server:
        server.ready()
    assert server.log.count("not taken for models: 'empty', 'gone', 'my model';") == 1


def test_a_folder_of_nothing_but_broken_models_ends_it_with_the_reason(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "models" / "digits", tmp_path / "digits")
    flip_a_byte(tmp_path / "digits" / "1" / "model.onnx")
    with contextlib.closing(Server(models=tmp_path)) as server:
        assert server.wait() == 1
        assert f"no model in {tmp_path} can be served" in server.log
        assert "sha256" in server.log


def test_a_burst_beyond_max_in_flight_is_told_to_come_back_and_nothing_is_lost(
    slow_server: Server, gate: Gate, digits: Golden
) -> None:
    with slow_server.channel() as channel, gate.shut("slow") as open_gate:
        classify = classifier_on(channel).Classify
        slow = [classify.future(HELD, timeout=TIMEOUT_S) for _ in range(3)]
        slow_server.wait_until_in_flight(3)
        burst = [classify.future(HELD, timeout=TIMEOUT_S) for _ in range(20)]
        for each in burst:
            assert each.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "back off" in str(each.details())
            pushback = dict(each.trailing_metadata())["grpc-retry-pushback-ms"]
            assert 0 < int(pushback) <= 10_000
        open_gate()
        assert all(each.result().results[0].HasField("classification") for each in slow)
        slow_server.wait_until_in_flight(0)
        request = pb.ClassifyRequest(model="digits", images=[raw(digits.pixels[6])])
        assert classify(request).results[0].classification.labels[0].name == "6"
    slow_server.wait_until_in_flight(0)
