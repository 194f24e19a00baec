"""One training run: load, build, fit, calibrate, export, examine, judge, publish. Shows how far it is."""

import contextlib
import datetime
import importlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# TensorFlow greets, and notes that a machine has no GPU, on standard error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle, Manifest
from convoy_service.engine.cpu import whole_cores
from convoy_service.engine.onnx_model import Model
from convoy_service.errors import ConvoyError
from convoy_training.data import checks as check
from convoy_training.data import datasets
from convoy_training.data.datasets import Dataset, Split
from convoy_training.evaluation.scores import answers, fit_scaling
from convoy_training.release import publish
from convoy_training.release.publish import Candidate, Check, Findings, Verdict
from convoy_training.settings import Role, TrainingSettings, with_role

if TYPE_CHECKING:
    from convoy_training.fitting.loop import Epoch, Fitted

# Settings that are no part of how a version was trained, so that its manifest does not record them.
NOT_RECORDED = with_role(Role.RUN)

# Training images by which int8 graphs are scaled.
_CALIBRATION = 512


@dataclass(frozen=True)
class Hooks:
    """Who else wants to hear of a run, and may end it by raising."""

    on_data: Callable[[Dataset], None] = lambda data: None
    on_epoch: "Callable[[Epoch], None]" = lambda epoch: None
    on_judged: Callable[[Findings, Verdict], None] = lambda findings, verdict: None


def run(settings: TrainingSettings, console: Console, hooks: Hooks = Hooks()) -> Bundle | None:
    """Trains, proves and publishes; the new version. None on those of several machines that leave the
    publishing to the first.

    Raises DataError, TrainingFailed, GateClosed, or ConvoyError where the disk refuses.
    """
    began, started = datetime.datetime.now(datetime.UTC), time.monotonic()
    data, noted = _load(settings, console)
    hooks.on_data(data)
    with console.status("loading TensorFlow"), _quiet_stderr():
        for module in ("convoy_training.export.to_onnx", "convoy_training.fitting.loop"):
            importlib.import_module(module)
    from convoy_training.fitting import devices
    from convoy_training.fitting import networks as network

    strategy = devices.prepare(settings.seed)
    start = _start(settings, data.name) if settings.warm_start else None
    fitted = _fit(data, settings, strategy, start, console, hooks)
    if not fitted.chief:
        console.print("trained; the first machine exports and publishes")
        return None

    with console.status("exporting to ONNX"):
        candidate = _export(fitted.network, data, settings, console)
    with console.status("proving the export"):
        findings = publish.examine(candidate, data, settings)
    folder = settings.models / data.name
    # From the look at what serves to the rename: of two runs, the later is held against the earlier.
    with bundles.exclusive(folder):
        with console.status("comparing with what serves"):
            serving = publish.serving_version(folder, data)
            verdict = publish.judge(findings, data, serving, settings)
        _tell(findings, verdict, console)
        hooks.on_judged(findings, verdict)
        try:
            verdict.admit(retrain=settings.retrain)
        except publish.GateClosed:
            fitted.forget()
            raise
        described = publish.manifest(
            candidate,
            findings,
            verdict,
            data,
            settings,
            created=began.isoformat(timespec="seconds"),
            training=_story(data, settings, fitted, network.flops(fitted.network)),
        )
        seconds = time.monotonic() - started
        page = _page(candidate, described, findings, verdict, data, fitted, noted, folder, seconds)
        weights = fitted.network.get_weights() if settings.keep_weights else []
        bundle = publish.publish(
            folder, candidate, findings, verdict, described, data.test, page, weights
        )
    fitted.forget()
    console.print(
        f"published {bundle.folder}; what a person reads: {bundle.folder / bundles.REPORT}",
        markup=False,
    )
    return bundle


def _load(settings: TrainingSettings, console: Console) -> tuple[Dataset, list[check.Finding]]:
    """The images, and what a look through them finds."""
    with _progress(console) as progress:
        data = datasets.load(settings, _tracker(progress))
    console.print(_describe(data))
    noted = check.summary(data)
    for finding in noted:
        console.print(f"[yellow]{finding.severity}[/]: {escape(finding.text)}", highlight=False)
    return data, noted


def _fit(
    data: Dataset,
    settings: TrainingSettings,
    strategy: Any,
    start: list[Any] | None,
    console: Console,
    hooks: Hooks,
) -> "Fitted":
    from convoy_training.fitting import loop as fit

    with _progress(console) as progress:
        bar = progress.add_task("training", total=None)
        began, first = time.monotonic(), 0

        def on_resume(step: int, steps: int) -> None:
            nonlocal first
            first = step
            progress.console.print(f"going on at step {step} of {steps}, where a run was killed")

        def on_step(step: int, steps: int, loss: float, accuracy: float) -> None:
            rate = (step - first) * settings.batch_size / (time.monotonic() - began)
            progress.update(
                bar,
                completed=step,
                total=steps,
                description=f"loss {loss:.3f}  accuracy {accuracy:.3f}  {rate:,.0f} images/s",
            )

        def on_epoch(epoch: fit.Epoch) -> None:
            progress.console.print(
                f"epoch {epoch.epoch:3d}/{settings.epochs}  loss {epoch.loss:.4f}  "
                f"accuracy {epoch.accuracy:.4f}  validation {epoch.validation_accuracy:.4f}  "
                f"{len(data.train) / epoch.seconds:,.0f} images/s",
                highlight=False,
            )
            hooks.on_epoch(epoch)

        fitted = fit.fit(data, settings, strategy, start, on_step, on_epoch, on_resume)
    if fitted.best_epoch < len(fitted.epochs):
        console.print(
            f"no better validation loss after epoch {fitted.best_epoch}: its weights are taken"
        )
    return fitted


def _start(settings: TrainingSettings, name: str) -> list[Any] | None:
    """The weights of the version that serves, to go on from; None where nothing serves yet."""
    found = publish.newest_proven(settings.models / name)
    if found is None:
        return None
    bundle, _ = found
    weights = bundle.weights()
    if not weights:
        raise ConvoyError(
            f"{bundle.folder} holds no weights to start from: it was published with "
            "--no-keep-weights; start from chance with --no-warm-start"
        )
    return weights


def _export(network: Any, data: Dataset, settings: TrainingSettings, console: Console) -> Candidate:
    """Fits the calibration to the validation images, and converts the network to ONNX."""
    from convoy_training.export import to_onnx as export

    if settings.storage == "int8":
        export.round_weights(network)
    logits = export.logits_function(network, mirror=settings.mirror)
    scaling = fit_scaling(answers(logits, data.validation.inputs), data.validation.labels)
    serve = export.serving_function(network, scaling, mirror=settings.mirror)
    graphs, shared = _graphs(export.to_onnx(serve), data, settings, console)
    return Candidate(graphs, data.classes, export.predict(serve), scaling, shared)


def _graphs(
    onnx: bytes, data: Dataset, settings: TrainingSettings, console: Console
) -> tuple[dict[str, bytes], bytes]:
    """The graph in every precision asked for that it can be made in, and what they have in common."""
    from convoy_training.export import quantization as variants

    cleaned = variants.clean(onnx)
    graphs = {"fp32": cleaned}
    chosen = np.random.default_rng(settings.seed).permutation(len(data.train))[:_CALIBRATION]
    make: dict[str, Callable[[], bytes]] = {
        "int8": lambda: variants.int8(cleaned, data.train.inputs[np.sort(chosen)]),
        "fp16": lambda: variants.fp16(cleaned),
    }
    for name in settings.variants:
        try:
            graphs[name] = make[name]()
        except ConvoyError as error:
            console.print(f"[yellow]no {name} graph[/]: {escape(str(error))}", highlight=False)
    shared = b""
    if settings.storage == "int8" and "int8" in graphs:
        graphs["fp32"], graphs["int8"], shared = variants.share(graphs["fp32"], graphs["int8"])
    return graphs, shared


def _story(
    data: Dataset, settings: TrainingSettings, fitted: "Fitted", flops: int
) -> dict[str, Any]:
    """How it was trained: what the manifest keeps of it."""
    return {
        "settings": {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(settings).items()
            if name not in NOT_RECORDED
        },
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
        "epochs": [asdict(epoch) for epoch in fitted.epochs],
        "best_epoch": fitted.best_epoch,
        "precision": fitted.precision,
        "replicas": fitted.replicas,
        "parameters": fitted.network.count_params(),
        "flops_per_image": flops,
        "flops": 3 * flops * len(data.train) * len(fitted.epochs),
        "machine": machine(),
    }  # fmt: skip


def machine() -> str:
    """The processor, or the cards, that this runs on."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {whole_cores()} cores"


def _page(
    candidate: Candidate,
    described: Manifest,
    findings: Findings,
    verdict: Verdict,
    data: Dataset,
    fitted: "Fitted",
    noted: list[check.Finding],
    folder: Path,
    seconds: float,
) -> str:
    from convoy_training.fitting import networks as network
    from convoy_training.report.page import render
    from convoy_training.report.record import Layer, Record

    given = findings.probabilities
    assert given is not None
    # One that is right, and plainly so: the story is of how it sees, not of how it errs.
    shown = int(np.argmax(np.where(given.argmax(1) == data.test.labels, given.max(1), 0)))
    one = [(model.run, data.test.inputs[:1]) for model in findings.models.values()]
    alone = publish.time_side_by_side(one)
    files = {
        bundles.VARIANTS[name]: bundles.describe(candidate.graphs[name])
        for name in verdict.variants
    }
    return render(
        Record(
            name=data.name,
            version=max(bundles.versions(folder), default=0) + 1,
            manifest=replace(described, files=files),
            evaluation=findings.evaluation,
            checks=verdict.checks,
            findings=noted,
            pixels=data.test.inputs,
            probabilities=given,
            truth=data.test.labels,
            layers=[
                Layer(*layer) for layer in network.seen(fitted.network, data.test.inputs[shown])
            ],
            shown=shown,
            latency_ms={
                name: 1e3 / rate for name, rate in zip(findings.models, alone, strict=True)
            },
            machine=machine(),
            seconds=seconds,
        )
    )


def _tell(findings: Findings, verdict: Verdict, console: Console) -> None:
    """What came of it, as a person reads it."""
    if findings.parity:
        parity = findings.parity
        console.print(
            f"ONNX {findings.megabytes('fp32'):.2f} MB; against the network on {parity.images} images "
            f"at batch sizes {parity.batch_sizes}: largest difference {parity.max_abs_difference:.1e}, "
            f"label agreement {parity.label_agreement:.4f}",
            highlight=False,
        )
    if findings.evaluation:
        found = findings.evaluation
        console.print(
            f"test accuracy {found.accuracy:.4f} ({found.correct} of {found.images}), of the ONNX file; "
            f"calibration error {found.uncalibrated.error:.4f}, with temperature "
            f"{found.temperature:.3f} and bend {found.bend:.3f} {found.calibrated.error:.4f}",
            highlight=False,
        )
    for name, variant in findings.variants.items():
        console.print(
            f"{name:5} accuracy {variant.scores.accuracy:.4f}, {variant.images_per_s:,.0f} images/s, "
            f"{variant.speedup:.2f} times fp32's, {findings.megabytes(name):.2f} MB",
            highlight=False,
        )
    console.print(gate_table(verdict.checks))


def load_test(
    data: str, models: Path, name: str, version: int, variant: str, console: Console
) -> tuple[Bundle, Model, Split]:
    """A published version (0: the newest), loaded in one precision, and the test images of `data`, cut
    as its training cut them. Raises BrokenVersion or DataError.
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
    return bundle, Model.load(bundle, device="cpu", variant=variant), test


def gate_table(checks: list[Check]) -> Table:
    """The gate as a person reads it."""
    table = Table("gate", "value", "wanted", "")
    table.columns[0].no_wrap = table.columns[3].no_wrap = True
    for each in checks:
        verdict = "[green]passed[/]" if each.passed else "[red]FAILED[/]"
        if each.suspicious:
            verdict = "[yellow]SUSPICIOUS[/]"
        elif not each.passed and not each.closes:
            verdict = "[yellow]LEFT OUT[/]"
        # Names of classes may have brackets.
        table.add_row(each.name, escape(each.value), escape(each.wanted), verdict)
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
