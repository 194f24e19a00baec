"""Drift through a server: what clients send is what /metrics tells, of all its processes."""

import contextlib
import itertools
from pathlib import Path

import pytest

from convoy_protos import classifier_pb2 as pb
from convoy_training.data.datasets import Split
from tests.conftest import TIMEOUT_S, Server
from tests.integration.conftest import classifier_on
from tests.integration.models import add_profiled

WINDOW = 300


@pytest.fixture(scope="module")
def profiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Split]:
    """A models folder with the digits, and images that they were not trained on."""
    folder = tmp_path_factory.mktemp("profiled")
    return folder, add_profiled(folder)[1].test


def send(server: Server, split: Split, darker: int = 1) -> None:
    """Each image as a PNG in a request of its own, over several connections, more than a window."""
    sent = Split(split.inputs // darker, split.labels)
    with contextlib.ExitStack() as open_:
        channels = [open_.enter_context(server.channel()) for _ in range(4)]
        calls = [
            classifier.Classify.future(
                pb.ClassifyRequest(images=[pb.Image(encoded=sent.encoded(row))]), timeout=TIMEOUT_S
            )
            for row, classifier in zip(
                range(len(sent)), itertools.cycle(map(classifier_on, channels)), strict=False
            )
        ]
        for call in calls:
            assert call.result().results[0].WhichOneof("outcome") == "classification"


@pytest.mark.parametrize("processes", [(), ("--acceptors", "2")], ids=["one", "two"])
def test_darker_images_make_the_alarm_rise(
    processes: tuple[str, ...], profiled: tuple[Path, Split]
) -> None:
    folder, split = profiled
    flags = ("--drift-images-per-s", "1e6", "--drift-window", str(WINDOW))
    of = 'model="digits",version="1"'
    alarm = f'convoy_drift_alarm{{feature="brightness",{of}}}'
    with Server(*flags, *processes, models=folder).ready() as server:
        assert alarm not in server.metrics(), "before anything is answered"
        send(server, split)
        server.wait_for_metric(f"convoy_drift_images_total{{{of}}}", len(split))
        metrics = server.metrics()
        assert metrics[f"convoy_drift_window_images{{{of}}}"] >= WINDOW
        assert {value for name, value in metrics.items() if "drift_alarm" in name} == {0}
        send(server, split, darker=2)
        server.wait_for_metric(alarm, 1)
        metrics = server.metrics()
        assert metrics[f'convoy_drift_psi{{feature="brightness",{of}}}'] > 1
        assert metrics[f'convoy_drift_p_value{{feature="brightness",{of}}}'] < 1e-10
        assert metrics[f'convoy_drift_alarm{{feature="size",{of}}}'] == 0
        server.wait_for(r"digits/1 drifts: .*brightness \(PSI ")
