"""One training run: load, build, fit, export, verify, score, gate, publish. Shows how far it is."""

import contextlib
import datetime
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

# TensorFlow greets, and notes that a machine has no GPU, on standard error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from service import bundle as bundles
from service.bundle import Bundle, Golden, Manifest
from service.errors import ConvoyError
from service.model import Model
from training import data as datasets
from training.data import Dataset, Split
from training.evaluate import score
from training.publish import Check, GateClosed, gate, provenance, serving_version
from training.settings import TrainingSettings

_GOLDEN = 8


def run(settings: TrainingSettings, console: Console) -> Bundle:
    """Trains, proves and publishes; the new version.

    Raises DataError, TrainingFailed, GateClosed, or ConvoyError where the disk refuses.
    """
    began = datetime.datetime.now(datetime.UTC)
    with _progress(console) as progress:
        data = datasets.load(settings, _tracker(progress))
    console.print(_describe(data))
    with console.status("loading TensorFlow"), _quiet_stderr():
        from training import export, fit, network

    fit.prepare(settings.seed)
    built = network.basic(data, settings)
    console.print(f"network {built.name}: {built.count_params():,} parameters")
    with _progress(console) as progress:
        bar = progress.add_task("training", total=None)

        def on_step(step: int, steps: int, loss: float) -> None:
            progress.update(
                bar, completed=step, total=steps, description=f"training, loss {loss:.3f}"
            )

        def on_epoch(epoch: fit.Epoch) -> None:
            progress.console.print(
                f"epoch {epoch.epoch:3d}/{settings.epochs}  loss {epoch.loss:.4f}  "
                f"accuracy {epoch.accuracy:.4f}  validation {epoch.validation_accuracy:.4f}  "
                f"{len(data.train) / epoch.seconds:,.0f} images/s",
                highlight=False,
            )

        history = fit.fit(built, data, settings, on_step, on_epoch)

    with console.status("exporting to ONNX"):
        serve = export.serving_function(built)
        onnx = export.to_onnx(serve)
    with console.status("proving the export"):
        parity = export.verify(serve, onnx, data.test.inputs, settings.max_batch_size)
        model = Model(onnx, device="cpu")
        scores = score(model.run, data.test)
    console.print(
        f"ONNX {len(onnx) / 1e6:.2f} MB; against the network on {parity.images} images at batch sizes "
        f"{parity.batch_sizes}: largest difference {parity.max_abs_difference:.1e}, "
        f"label agreement {parity.label_agreement:.4f}",
        highlight=False,
    )
    console.print(
        f"test accuracy {scores.accuracy:.4f} ({scores.correct} of {scores.images}), of the ONNX file",
        highlight=False,
    )
    pixels = choose_golden(data.test)
    golden = Golden(pixels, model.run(pixels))
    manifest = Manifest(
        input=model.input,
        output=model.output,
        pixels=data.target,
        labels=list(data.classes),
        max_batch_size=settings.max_batch_size,
        created=began.isoformat(timespec="seconds"),
        scores=scores,
        parity=parity,
        training={
            # All but where it was published, which is no part of how it was trained.
            "settings": {k: v for k, v in asdict(settings).items() if k != "models"},
            "images": {
                name: {
                    "count": len(split),
                    "per_class": np.bincount(split.labels, minlength=len(data.classes)).tolist(),
                    "sha256": split.fingerprint(),
                }
                for name, split in (
                    ("train", data.train), ("validation", data.validation), ("test", data.test),
                )
            },
            "epochs": [asdict(epoch) for epoch in history],
        },
        provenance=provenance(),
    )  # fmt: skip
    folder = settings.models / data.name
    # From the look at what serves to the rename: of two runs, the later is held against the earlier.
    with bundles.exclusive(folder):
        serving = serving_version(folder, data)
        guessing = float(np.bincount(data.test.labels).max() / len(data.test))
        checks = gate(scores, parity, serving, settings, guessing)
        console.print(gate_table(checks))
        if not all(check.passed for check in checks):
            raise GateClosed(checks)
        manifest = replace(
            manifest, training={**manifest.training, "gate": list(map(asdict, checks))}
        )
        model.prove(Bundle(folder, data.name, 0, manifest, onnx, golden))
        bundle = bundles.write(folder, manifest, onnx, golden)
    console.print(f"published {bundle.folder}")
    return bundle


def load_test(
    data: str, models: Path, name: str, version: int, console: Console
) -> tuple[Bundle, Model, Split]:
    """A published version (0: the newest) and the test images of `data`, cut as its training cut
    them. Raises BrokenVersion or DataError.
    """
    folder = models / datasets.model_name(TrainingSettings(data=data, name=name))
    available = bundles.versions(folder)
    if not available or version not in (0, *available):
        raise ConvoyError(f"{folder} has no version {version or 'at all'}; it has {available}")
    bundle = bundles.read(folder / str(version or available[-1]))
    pixels = bundle.manifest.pixels
    # Of a version made by another Convoy, the settings that this one knows.
    known = {field.name for field in fields(TrainingSettings)}
    made_with = bundle.manifest.training.get("settings", {})
    settings = replace(
        TrainingSettings(**{name: made_with[name] for name in known & made_with.keys()}),
        data=data,
        image_size=pixels.height,
        channels=1 if pixels.channels == 1 else 3,
        resize=pixels.resize,
    )
    with _progress(console) as progress:
        classes, test = datasets.load_test(settings, _tracker(progress))
    if classes != bundle.manifest.labels:
        raise datasets.DataError(
            f"the classes of {data} are {', '.join(classes)}; "
            f"those of {folder}: {', '.join(bundle.manifest.labels)}"
        )
    return bundle, Model.load(bundle, device="cpu"), test


def choose_golden(split: Split) -> Any:
    """A few test images, of as many classes as possible."""
    _, first = np.unique(split.labels, return_index=True)
    rest = np.setdiff1d(np.arange(len(split)), first)
    return split.inputs[np.concatenate([first, rest])[:_GOLDEN]]


def gate_table(checks: list[Check]) -> Table:
    """The gate as a person reads it."""
    table = Table("gate", "value", "wanted", "")
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for check in checks:
        verdict = "[green]passed[/]" if check.passed else "[red]FAILED[/]"
        if check.suspicious:
            verdict = "[yellow]SUSPICIOUS[/]"
        table.add_row(check.name, check.value, check.wanted, verdict)
    return table


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Holds back what TensorFlow's C++ says while it loads, before its log level is in force: on a
    machine without a GPU, several times, that there is no GPU. Shown where loading fails.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            yield
        except BaseException:
            said.seek(0)
            os.write(kept, said.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _describe(data: Dataset) -> str:
    colour = "grey" if data.target.channels == 1 else "RGB"
    return (
        f"{data.name}: {len(data.classes)} classes, {len(data.train)} images to train on, "
        f"{len(data.validation)} to validate, {len(data.test)} to test; "
        f"{data.target.width}x{data.target.height} {colour}"
    )


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _tracker(progress: Progress) -> datasets.Track:
    def track(items: Iterable[Any], doing: str, total: int) -> Iterable[Any]:
        return progress.track(items, total=total, description=doing)

    return track
