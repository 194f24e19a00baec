"""Who else follows a training: TensorBoard's event files, and an MLflow server or folder."""

import importlib.util
import logging
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from convoy_service.backoff import Backoff
from convoy_service.errors import ConvoyError

if TYPE_CHECKING:
    from convoy_training.fitting.loop import Epoch

log = logging.getLogger("convoy.trackers")

# Where MLflow does not answer it is asked again so much later, then after twice as long, and so on; and
# once more at the end.
_AGAIN_S = 60.0
# An unreachable server costs so much at most, each time: seconds for a request, and retries.
_TIMEOUT_S, _RETRIES = 10, 1
# What MLflow takes in one request.
_MOST_METRICS, _MOST_PARAMETERS = 1000, 100


class TensorBoard:
    """Figures of each epoch as scalars, in event files of a run in `folder`.

    TensorFlow writes these by itself: TensorBoard is needed to look at them only.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None
        self._broken = False

    def on_epoch(self, epoch: "Epoch") -> None:
        if self._broken:
            return
        # Loaded by now, as there was an epoch.
        import tensorflow as tf

        # As tf.summary.scalar describes its own, which asks for TensorBoard to be installed.
        scalar = tf.compat.v1.SummaryMetadata()
        scalar.plugin_data.plugin_name = "scalars"
        scalar.data_class = 1  # DATA_CLASS_SCALAR
        try:
            if self._writer is None:
                self._writer = tf.summary.create_file_writer(str(self.folder))
            with self._writer.as_default():
                for name, value in _figures(epoch).items():
                    tf.summary.write(name, tf.constant(value, tf.float32), epoch.epoch, scalar)
            # Before the next epoch, of which nobody knows how long it takes.
            self._writer.flush()
        # No reason to lose a training.
        except tf.errors.OpError as error:
            self._broken = True
            reason = error.message.rpartition("}} ")[2].partition(" [Op:")[0]
            log.warning("--tensorboard %s: %s; it is written no more", self.folder, reason)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class MLflow:
    """One run of the experiment that is called as the model.

    Never in the way of the training: where the server does not answer, what it should have heard is
    kept for later, and a warning says so.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        parameters: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ConvoyError where MLflow is not installed."""
        if importlib.util.find_spec("mlflow") is None:
            raise ConvoyError(
                "--mlflow-uri needs mlflow, which is not installed: pip install 'convoy-serving[mlflow]'"
            )
        if "://" not in uri and uri.partition(":")[0] not in {"databricks", "file"}:
            uri = Path(uri).absolute().as_uri()
        self.uri = uri
        # Without a password.
        self._shown = re.sub(r"//[^/@]*@", "//", uri)
        self._experiment, self._clock = experiment, clock
        self._started = _now_ms()
        self._client: Any = None
        self._run = ""
        self._parameters = {name: str(value) for name, value in parameters.items()}
        self._tags: dict[str, str] = {}
        self._metrics: list[tuple[str, float, int, int]] = []
        self._files: list[Path] = []
        self._status: Literal["FINISHED", "FAILED", "KILLED"] | None = None
        self._again, self._backoff = 0.0, Backoff(_AGAIN_S)
        self._send()

    def on_epoch(self, epoch: "Epoch") -> None:
        self.figures(_figures(epoch), epoch.epoch)

    def figures(self, figures: Mapping[str, float], step: int = 0) -> None:
        now = _now_ms()
        self._metrics += [(name, value, now, step) for name, value in figures.items()]
        self._send()

    def end(
        self,
        status: Literal["FINISHED", "FAILED", "KILLED"],
        tags: Mapping[str, str],
        files: list[Path],
    ) -> None:
        """Ends the run; `files` become its artifacts."""
        self._status, self._tags, self._files = status, dict(tags), files
        self._again = 0.0
        self._send()

    def _send(self) -> None:
        """All that the server has not heard yet."""
        if self._clock() < self._again:
            return
        try:
            # MLflow warns of its own affairs, which are none of the user's.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._send_all()
        # Whatever is wrong with the server, the network, or the libraries in between.
        except Exception as error:
            self._again = self._clock() + self._backoff.next_s()
            log.warning(
                "MLflow at %s: %s; %s",
                self._shown,
                str(error).partition("\n")[0].replace(self.uri, self._shown),
                "it lacks this run, or its end" if self._status else "training goes on",
            )

    def _send_all(self) -> None:
        if self._client is None:
            self._client = _client(self.uri)
        client = self._client
        if not self._run:
            found = client.get_experiment_by_name(self._experiment)
            experiment = (
                found.experiment_id if found else client.create_experiment(self._experiment)
            )
            name = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started / 1e3))
            run = client.create_run(experiment, start_time=self._started, run_name=name)
            self._run = run.info.run_id
        from mlflow.entities import Metric, Param, RunTag

        # Each is forgotten when it has arrived.
        while self._parameters:
            some = dict(list(self._parameters.items())[:_MOST_PARAMETERS])
            client.log_batch(self._run, params=[Param(*each) for each in some.items()])
            for each in some:
                del self._parameters[each]
        while self._metrics:
            client.log_batch(
                self._run, metrics=[Metric(*each) for each in self._metrics[:_MOST_METRICS]]
            )
            del self._metrics[:_MOST_METRICS]
        if self._status is None:
            return
        client.log_batch(self._run, tags=[RunTag(*each) for each in self._tags.items()])
        failed = None
        for file in self._files:
            try:
                client.log_artifact(self._run, str(file))
            # They go another way, to a store of their own: the run shall end for all that.
            except Exception as error:
                failed = error
        client.set_terminated(self._run, self._status)
        if failed:
            raise failed


def _figures(epoch: "Epoch") -> dict[str, float]:
    """By the names that the manifest has."""
    return {name: float(value) for name, value in asdict(epoch).items() if name != "epoch"}


def _now_ms() -> int:
    return int(time.time() * 1e3)


def _client(uri: str) -> Any:
    # Before it is loaded. What the user's environment says goes first, but it asks nobody whether
    # it may tell its makers of its use.
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", str(_RETRIES))
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    if uri.startswith("file:"):
        # A folder was asked for, which MLflow 3 still serves, where one insists.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow import MlflowClient

    return MlflowClient(uri)
