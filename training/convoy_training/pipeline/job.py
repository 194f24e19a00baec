"""`convoy train` as a job: records of what came of it, and with `--retrain` what a scheduler needs: one job
at a time, nothing done twice, exit codes that say what happened.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.files import hold_lock, replace_file
from convoy_service.artifacts.reader import Bundle
from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset, model_name
from convoy_training.pipeline import run as runs
from convoy_training.pipeline.outcome import EXIT, Outcome, Status, write_metrics
from convoy_training.pipeline.run import Hooks
from convoy_training.pipeline.trackers import MLflow, TensorBoard
from convoy_training.release import publish
from convoy_training.release.publish import Findings, NotBetter, Verdict
from convoy_training.settings import Role, TrainingSettings, with_role

if TYPE_CHECKING:
    from convoy_training.fitting.loop import Epoch

log = logging.getLogger("convoy.job")

Run = Callable[[TrainingSettings, Console, Hooks], Bundle | None]

# In the model's folder, where neither Convoy nor Triton takes them for a version.
LOCK, MEMORY = ".retrain.lock", ".retrain.json"

# Settings that have no part in what a version comes to be.
AROUND = with_role(Role.RUN | Role.LABEL)
# Settings that decide the images. The sums of the images tell whether these are the same.
SEEN_IN_DATA = with_role(Role.DATA)
# Settings whose change is no reason to train on the same data again.
NOT_TRAINED = with_role(Role.GATE | Role.START)


class NothingNew(ConvoyError):
    """There is no reason to train; the text says why."""


def train(settings: TrainingSettings, console: Console, run: Run = runs.run) -> int:
    """Runs one training; the exit status, see `EXIT`. What came of it is in `settings.summary` and
    `settings.textfile`, also where this raises.

    Raises what `run` raises, but for NotBetter with `settings.retrain`; ConvoyError where another
    retraining of the same model is running, and where settings contradict each other.
    """
    job = _Job(settings, console)
    try:
        with _terminable():
            return job.work(run)
    except BaseException as error:
        job.failed(error)
        raise
    finally:
        job.record()


def is_chief(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the one of several machines that publishes, as `fitting.devices` will find,
    told before TensorFlow is loaded. Raises ConvoyError.
    """
    text = environment.get("TF_CONFIG")
    if not text:
        return True
    try:
        config = json.loads(text)
        task, cluster = config.get("task", {}), config.get("cluster", {})
        kind, index = task.get("type"), int(task.get("index", 0))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConvoyError(f"TF_CONFIG says nothing that can be read: {error}") from error
    return kind in {None, "chief"} or (kind == "worker" and index == 0 and "chief" not in cluster)


class _Job:
    def __init__(self, settings: TrainingSettings, console: Console) -> None:
        self.settings, self.console = settings, console
        self.outcome = Outcome(model=settings.name or settings.data, started=_now())
        self._began = time.monotonic()
        # Nobody else writes files until it is known.
        self._chief = False
        self._published: Bundle | None = None
        self._tensorboard: TensorBoard | None = None
        self._mlflow: MLflow | None = None
        self._killed = False

    def work(self, run: Run) -> int:
        settings = self.settings
        self._chief = is_chief()
        self.outcome.model = model_name(settings)
        folder = settings.models / self.outcome.model
        _check(settings, folder)
        with contextlib.ExitStack() as held:
            if settings.retrain and self._chief:
                held.enter_context(_only_one(folder))
            hooks = Hooks(self._on_data, self._on_epoch, self._on_judged)
            try:
                self._published = run(settings, self.console, hooks)
            except NothingNew as reason:
                self._end("nothing-new", str(reason))
            except NotBetter as reason:
                self._end("not-better", str(reason))
                self._remember(folder)
            else:
                self._end("published")
        return self.outcome.exit_code

    def _end(self, status: Status, reason: str = "") -> None:
        self.outcome.status, self.outcome.exit_code = status, EXIT[status]
        if reason:
            self.console.print(reason, markup=False, highlight=False)

    def failed(self, error: BaseException) -> None:
        """Notes how a run ended that raises."""
        self.outcome.status, self.outcome.exit_code = "failed", EXIT["failed"]
        self.outcome.error = str(error) or type(error).__name__
        if isinstance(error, KeyboardInterrupt | SystemExit):
            self._killed = True
            self.outcome.exit_code = 128 + signal.SIGINT
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                self.outcome.exit_code = error.code
            self.outcome.error = f"ended from outside, with status {self.outcome.exit_code}"

    # What the run tells.

    def _on_data(self, data: Dataset) -> None:
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        self.outcome.data = {
            name: {"count": len(split), "sha256": split.fingerprint()}
            for name, split in splits.items()
        }
        self._classes = list(data.classes)
        folder = self.settings.models / data.name
        if self.settings.retrain:
            found = publish.newest_proven(folder)
            self._holds_against(found[0] if found else None)
            if found:
                self._look_for_news(found[0], folder)
            elif bundles.versions(folder):
                # Its settings are lost, and what it could do.
                raise ConvoyError(
                    f"no version in {folder} proves itself, to be held against: mend it, or move all "
                    "away for a first training"
                )
            else:
                self.console.print(
                    f"{folder} has no version yet: this is its first training", markup=False
                )
        if not self._chief:
            return
        name = f"{data.name}-{self.outcome.started.replace(':', '')}"
        if self.settings.tensorboard:
            self._tensorboard = TensorBoard(self.settings.tensorboard / name)
        if self.settings.mlflow_uri:
            self._mlflow = MLflow(self.settings.mlflow_uri, data.name, self._parameters())

    def _parameters(self) -> dict[str, Any]:
        """What MLflow shows beside figures: settings, and what was trained on."""
        hidden = AROUND - {"recipe", "retrain", "base"}
        parameters = {k: v for k, v in asdict(self.settings).items() if k not in hidden}
        for name, split in self.outcome.data.items():
            parameters[f"images_{name}"] = split["count"]
            parameters[f"sha256_{name}"] = split["sha256"]
        return parameters

    def _on_epoch(self, epoch: "Epoch") -> None:
        if self._tensorboard:
            self._tensorboard.on_epoch(epoch)
        if self._mlflow:
            self._mlflow.on_epoch(epoch)

    def _on_judged(self, findings: Findings, verdict: Verdict) -> None:
        outcome = self.outcome
        outcome.gate = [asdict(check) for check in verdict.checks]
        # Anew: another run may have published in the meantime.
        found = publish.newest_proven(self.settings.models / outcome.model)
        self._holds_against(found[0] if found else None)
        figures: dict[str, float] = {}
        if evaluation := findings.evaluation:
            outcome.accuracy = {
                "value": evaluation.accuracy,
                "interval": asdict(evaluation.accuracy_interval),
                "correct": evaluation.correct,
                "images": evaluation.images,
            }
            figures |= {
                "test_accuracy": evaluation.accuracy,
                "test_accuracy_low": evaluation.accuracy_interval.low,
                "test_accuracy_high": evaluation.accuracy_interval.high,
                "test_log_loss": evaluation.log_loss,
                "test_macro_f1": evaluation.macro_f1,
                "test_worst_recall": evaluation.worst.recall,
                "calibration_error": evaluation.calibrated.error,
                "calibration_error_unscaled": evaluation.uncalibrated.error,
            }
        for name, variant in findings.variants.items():
            figures |= {
                f"{name}_accuracy": variant.scores.accuracy,
                f"{name}_speedup": variant.speedup,
                f"{name}_images_per_s": variant.images_per_s,
            }
        if compared := verdict.compared:
            outcome.compared = asdict(compared)
            figures["better_than_serving"] = compared.difference
            if outcome.serving and outcome.accuracy:
                right = outcome.accuracy["correct"] - compared.only_candidate
                outcome.serving["accuracy"] = (right + compared.only_serving) / compared.images
        if self._mlflow:
            self._mlflow.figures(figures)

    # What was there before.

    def _holds_against(self, serving: Bundle | None) -> None:
        self.outcome.serving = None
        if serving:
            scores = serving.manifest.scores
            self.outcome.serving = {
                "version": serving.version,
                "sha256": serving.sha256,
                # On the images that it was published with, until it is known on those of today.
                "accuracy": scores.accuracy if scores else None,
            }

    def _look_for_news(self, serving: Bundle, folder: Path) -> None:
        """Raises NothingNew where a training could only come to what was there before."""
        story = serving.manifest.training
        data = {name: split["sha256"] for name, split in self.outcome.data.items()}
        learned = {name: split.get("sha256") for name, split in story.get("images", {}).items()}
        ours, theirs = (
            _trained_with(settings)
            for settings in (asdict(self.settings), story.get("settings", {}))
        )
        if data == learned and self._classes == serving.manifest.labels and ours == theirs:
            raise NothingNew(
                f"nothing new: {serving.folder} was made of these {_total(self.outcome.data)} images "
                "with these settings"
            )
        for tried in _memory(folder):
            if tried.get("try") == self._try():
                raise NothingNew(
                    f"nothing new: what these {_total(self.outcome.data)} images came to with these "
                    f"settings was not better than {serving.folder}, at {tried.get('when')}"
                )

    def _try(self) -> str:
        """A sha256 of what decides how a run ends: data, settings, and what it is held against."""
        serving = self.outcome.serving and self.outcome.serving["sha256"]
        without = AROUND | SEEN_IN_DATA
        settings = {k: v for k, v in asdict(self.settings).items() if k not in without}
        known = [settings, self.outcome.data, self._classes, serving]
        return hashlib.sha256(json.dumps(known, default=str, sort_keys=True).encode()).hexdigest()

    def _remember(self, folder: Path) -> None:
        """That this came to nothing better, so that the next run need not try it again."""
        serving = self.outcome.serving and self.outcome.serving["sha256"]
        entry = {"try": self._try(), "serving": serving, "when": self.outcome.started}
        # What was tried against versions that serve no more can't be tried again.
        kept = [tried for tried in _memory(folder) if tried.get("serving") == serving]
        try:
            replace_file(folder / MEMORY, json.dumps([*kept, entry], indent=2).encode() + b"\n")
        except OSError as error:
            log.warning("%s: %s; the same data will be tried again", folder / MEMORY, error)

    # What is left behind.

    def record(self) -> None:
        """Tells everyone who asked for it what came of the run."""
        outcome, settings = self.outcome, self.settings
        outcome.ended, outcome.seconds = _now(), time.monotonic() - self._began
        if bundle := self._published:
            outcome.version, outcome.folder = bundle.version, str(bundle.folder)
            outcome.sha256 = bundle.sha256
        if self._tensorboard:
            self._tensorboard.close()
        if self._mlflow:
            self._mlflow.end(*self._last_words())
        if not self._chief:
            return
        if settings.summary:
            text = outcome.as_json()
            _written(
                "--summary",
                settings.summary,
                lambda path: replace_file(path, text.encode()),
            )
        if settings.textfile:
            versions = bundles.versions(settings.models / outcome.model)
            version = max(versions, default=None)
            _written(
                "--textfile", settings.textfile, lambda path: write_metrics(path, outcome, version)
            )

    def _last_words(
        self,
    ) -> tuple[Literal["FINISHED", "FAILED", "KILLED"], dict[str, str], list[Path]]:
        tags: dict[str, str] = {"status": self.outcome.status}
        if bundle := self._published:
            tags |= {"version": str(bundle.version), "sha256": bundle.sha256}
            files = [bundle.folder / bundles.MANIFEST]
            if bundles.REPORT in bundle.manifest.files:
                files.append(bundle.folder / bundles.REPORT)
            return "FINISHED", tags, files
        if self.outcome.error:
            # A limit of MLflow's.
            tags["error"] = self.outcome.error[:5000]
        failed = self.outcome.status == "failed"
        return "KILLED" if self._killed else "FAILED" if failed else "FINISHED", tags, []


def _check(settings: TrainingSettings, folder: Path) -> None:
    """Raises ConvoyError where the settings of a retraining contradict each other."""
    base = settings.base
    if settings.retrain and base is None:
        raise ConvoyError(
            "--retrain needs --base, the folder of the model to be replaced: models/<name>"
        )
    if base is None:
        return
    if not settings.retrain:
        raise ConvoyError(f"--base {base} is for --retrain: give that too, or leave both out")
    if folder.resolve() != base.resolve():
        raise ConvoyError(
            f"--base {base} and {folder}, which --models and --name tell, are not the same: --base "
            "alone says which model it is"
        )


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the model in `folder`, made if need be, against other retrainings, while it lasts; that of a
    process that was killed is free at once. Raises ConvoyError where another holds it.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConvoyError(f"{path} can't be made: {error.strerror}") from error
    try:
        try:
            alone = hold_lock(file, 0)
        except OSError as error:
            raise ConvoyError(f"{path} can't be locked: {error.strerror}") from error
        if not alone:
            raise ConvoyError(
                f"{folder} is being retrained already, by {os.read(file, 500).decode(errors='replace')}: "
                "wait for its end"
            )
        holder = f"process {os.getpid()} on {socket.gethostname()} since {_now()}".encode()
        os.pwrite(file, holder, 0)
        os.ftruncate(file, len(holder))
        # Triton, where it polls, would take a newer file for a changed model, and load it again.
        with contextlib.suppress(PermissionError):
            os.utime(file, (0, 0))
        yield
    finally:
        os.close(file)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Has SIGTERM, by which schedulers end jobs, raise SystemExit, so that what came of it is told."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _trained_with(settings: Mapping[str, Any]) -> str:
    """Those that decide what is trained, comparable; those of an older Convoy, which has fewer, too."""
    defaults = {
        setting.name: setting.default
        for setting in fields(TrainingSettings)
        if setting.default is not MISSING
        and setting.name not in AROUND | SEEN_IN_DATA | NOT_TRAINED
    }
    known = {name: settings.get(name, default) for name, default in defaults.items()}
    return json.dumps(known, default=str, sort_keys=True)


def _memory(folder: Path) -> list[dict[str, Any]]:
    """What was tried before in vain; nothing where that is not known."""
    try:
        found = json.loads((folder / MEMORY).read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("%s: %s; what was tried before is forgotten", folder / MEMORY, error)
        return []
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _total(data: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(split["count"] for split in data.values())


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _written(setting: str, path: Path, write: Callable[[Path], None]) -> None:
    """A record that can't be written is no reason to lose what it would have said."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except OSError as error:
        log.warning("%s %s: %s; it was not written", setting, path, error.strerror or error)
