"""Who does which part: Ray Data hands the parts to actors and does again what a dead one had."""

import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from convoy.bulk import job as jobs
from convoy.bulk.job import Job, Part
from convoy.bulk.settings import BulkSettings
from convoy.bulk.work import Done, Worker
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle
from convoy_service.engine.cpu import whole_cores
from convoy_service.errors import BrokenVersion, ConvoyError
from convoy_service.rollout import policy as policies
from convoy_service.settings import default_models

# How often it is told how far it is, where nobody sees a bar.
_TELL_S = 10.0
# Parts in a row that could not be read: then it is not them.
_MOST_TROUBLE = 10
# Ray begins an actor that died anew, and does what it had again, for ever: as a rule it is a machine
# that died. A part that so many die with is the reason itself.
_TRIES = 4
_CONNECT_S = 10.0
# Beside the model nothing large goes through Ray's object store.
_OBJECT_STORE = 128 << 20

Tell = Callable[[int, int], None]


def run(images: str, to: str, settings: BulkSettings) -> int:
    """Classifies the images, or goes on with it; its exit status. Raises ConvoyError."""
    try:
        job = jobs.begun(to)
        if job:
            jobs.check_same(job, images, settings)
        bundle = _read_version(settings, job)
        job = job or jobs.begin(images, to, bundle, settings)
        if missing := job.missing():
            job.forget()
            trouble = _classify(job, bundle, settings, missing)
            if trouble:
                raise ConvoyError(
                    f"{len(job.missing())} of {len(job.parts)} files of answers are missing:\n  "
                    + "\n  ".join(list(dict.fromkeys(trouble))[:_MOST_TROUBLE])
                )
        summary = job.summary() or job.finish()
    except OSError as error:
        raise ConvoyError(str(error)) from error
    print(json.dumps(summary) if settings.as_json else _text(job, summary))
    return 0


def _read_version(settings: BulkSettings, job: Job | None) -> Bundle:
    """The version that is asked for, or that the job was begun with. Raises ConvoyError."""
    models = settings.models or default_models()
    if job:
        bundle = bundles.read(models / job.model / str(job.version))
        if bundle.digest != job.digest:
            raise ConvoyError(
                f"{bundle.folder} is not what {job.to} was begun with: its manifest has another sha256"
            )
        return bundle
    names = bundles.names(models)
    if not settings.model and len(names) != 1:
        raise ConvoyError(f"{models} has {', '.join(names) or 'no model'}: name one with --model")
    bundle = _choose(models / (settings.model or names[0]), settings.version)
    if settings.variant not in ("fp32", *bundle.variants):
        raise ConvoyError(f"{bundle.folder} has no graph in {settings.variant}")
    return bundle


def _choose(folder: Path, version: int) -> Bundle:
    there, policy = bundles.versions(folder), policies.read(folder)
    if version or policy.stable:
        wanted = [version or policy.stable]
    else:
        wanted = sorted(policy.pinned or set(there) - set(policy.skip), reverse=True)
    if not set(wanted) & set(there):
        raise ConvoyError(f"{folder} has no version {version or ''}; it has {there}")
    for number in wanted[:-1]:
        try:
            return bundles.read(folder / str(number))
        except BrokenVersion as error:
            print(f"passed over: {error}", file=sys.stderr)
    return bundles.read(folder / str(wanted[-1]))


class _Actors(NamedTuple):
    """How many there are at most, where the model runs, and what each needs."""

    most: int
    device: str
    cpus: int
    gpus: int


class _Actor:
    """What Ray Data makes in each process."""

    def __init__(self, job: Job, bundle: Any, actors: _Actors, skip_unreadable: bool) -> None:
        self._job, self._refusal = job, ""
        try:
            self._worker = Worker(
                job, ray.get(bundle), actors.device, actors.cpus, skip_unreadable=skip_unreadable
            )
        except ConvoyError as error:  # which Ray would tell with ninety lines of its own
            self._refusal = f"{socket.gethostname()}: {error}"

    def __call__(self, parts: dict[str, Any]) -> dict[str, Any]:
        done = [self._do(self._job.parts[number]) for number in parts["part"]]
        return {name: np.array([getattr(each, name) for each in done]) for name in done[0]._fields}

    def _do(self, part: Part) -> Done:
        if self._refusal:
            return Done(0, 0, self._refusal)
        again = ray.get_runtime_context().was_current_actor_reconstructed
        if again and self._job.take(part) > _TRIES:
            return Done(
                0, 0,
                f"part {part.number}: {_TRIES} processes ended while they were at it: is there an "
                "image in it that kills its decoder, or too little memory?",
            )  # fmt: skip
        return self._worker.do(part)


def _classify(job: Job, bundle: Bundle, settings: BulkSettings, parts: list[Part]) -> list[str]:
    """Does these parts, but those that are returned, each with what is the matter with it."""
    trouble: list[str] = []
    in_a_row = 0
    # Ray tells on standard output what has died, where the summary belongs.
    with (
        redirect_stdout(sys.stderr),
        _cluster(settings, bundle) as here,
        _progress(job, parts) as tell,
    ):
        actors = _actors(settings, here)
        context = DataContext.get_current()
        context.enable_progress_bars = False
        answers = ray.data.from_items(
            [{"part": part.number} for part in parts], override_num_blocks=len(parts)
        ).map_batches(
            _Actor,
            batch_size=None,
            compute=ActorPoolStrategy(min_size=1, max_size=actors.most, initial_size=actors.most),
            fn_constructor_args=(job, ray.put(bundle), actors, settings.skip_unreadable),
            num_cpus=actors.cpus,
            num_gpus=actors.gpus,
        )
        for row in answers.iter_rows():
            tell(row["rows"], row["errors"])
            in_a_row = in_a_row + 1 if row["trouble"] else 0
            if row["trouble"]:
                trouble.append(row["trouble"])
            if in_a_row == _MOST_TROUBLE:
                break
    return trouble


@contextmanager
def _cluster(settings: BulkSettings, bundle: Bundle) -> Iterator[list[dict[str, float]]]:
    """What each machine of the Ray cluster has, by Ray's names. Raises ConvoyError."""
    # Ray would else tell its makers of each cluster that is started.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = settings.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    ours: dict[str, Any] = {}
    if address == "local":
        graphs = sum(file.bytes for file in bundle.manifest.files.values())
        ours = {"num_cpus": whole_cores(), "include_dashboard": False}
        ours["object_store_memory"] = _OBJECT_STORE + 2 * graphs
    host, _, port = address.rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), _CONNECT_S).close()
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **ours)
    except (OSError, ValueError) as error:
        raise ConvoyError(f"no Ray cluster at {address}: {error}") from error
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        nodes = ray.nodes()  # type: ignore[no-untyped-call]  # it has no types
        yield [node["Resources"] for node in nodes if node["Alive"]]
    finally:
        ray.shutdown()


def _actors(settings: BulkSettings, machines: list[dict[str, float]]) -> _Actors:
    """Raises ConvoyError where no machine can have one."""
    cards = [machine for machine in machines if machine.get("GPU", 0) >= 1]
    device, cpus = settings.device, settings.cpus
    if device == "auto":
        device = "cuda" if cards else "cpu"
    if device == "cpu":
        cpus = cpus or 1
        room = sum(int(machine.get("CPU", 0) // cpus) for machine in machines)
    else:
        cpus = cpus or max(
            1, min((int(each.get("CPU", 0) // each["GPU"]) for each in cards), default=1)
        )
        room = sum(int(min(each.get("CPU", 0) // cpus, each["GPU"])) for each in cards)
    count = settings.actors or room
    if not count:
        raise ConvoyError(
            f"no machine of the Ray cluster has {cpus} cores"
            + ("" if device == "cpu" else " and a card")
            + "; where it grows when it is asked to, say how many --actors it is to have room for"
        )
    return _Actors(count, device, cpus, int(device != "cpu"))


@contextmanager
def _progress(job: Job, parts: list[Part]) -> Iterator[Tell]:
    """A bar for people, a line now and then for logs."""
    left, errors = sum(part.rows for part in parts), 0
    done = before = job.total - left
    # Of what was done when: the rate does not count how long Ray and its actors take to start.
    first: tuple[float, int] | None = None
    told = -math.inf
    console = Console(stderr=True)
    if before:
        print(f"{before:,} of {job.total:,} images are done already", file=sys.stderr)
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    ) as bar:  # fmt: skip
        task = bar.add_task("starting", total=left)

        def tell(rows: int, failed: int) -> None:
            nonlocal done, errors, first, told
            done, errors, now = done + rows, errors + failed, time.monotonic()
            first = first or (now, done)
            words = f"{done:,} of {job.total:,} images"
            if now > first[0]:
                words += f", {(done - first[1]) / (now - first[0]):,.0f}/s"
            if errors:
                words += f", {errors:,} with errors"
            bar.update(task, description=words, completed=done - before)
            if not console.is_terminal and (now - told > _TELL_S or done == job.total):
                told = now
                print(words, file=sys.stderr, flush=True)

        yield tell


def _text(job: Job, summary: dict[str, Any]) -> str:
    """The summary as a person reads it."""
    most = max(summary["labels"].values(), default=0)
    lines = [
        f"{summary['count']:,} images, {job.model} version {job.version}: {job.to}",
        *(f"  {count:{len(f'{most:,}')},} {label}" for label, count in summary["labels"].items()),
        f"unsure: {summary['unsure']:,}",
        f"errors: {summary['errors']:,}",
        *(f"  {each['key']}: {each['error']}" for each in summary["error_examples"]),
    ]
    return "\n".join(lines)
