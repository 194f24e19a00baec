"""The one command. Each subcommand loads what it needs when it is called: `--help` is instant."""

import importlib.util
import json
import os
import re
import signal
import sys
import tomllib
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

from cyclopts import App, Parameter, Token, config

from convoy.bench.settings import BenchSettings
from convoy.bulk.settings import BulkSettings
from service import crashes
from service.errors import ConvoyError
from service.settings import (
    IMAGE_SUFFIXES,
    Count,
    FolderOrUrl,
    Labels,
    ModelsFolder,
    Port,
    Positive,
    Settings,
    Version,
    default_models,
)
from training.settings import RECIPES, AddSettings, TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import grpc
    from cyclopts.argument import ArgumentCollection

    from convoy.client import Prediction
    from convoy.models import Folder, Server

DEFAULT_SERVER = "localhost:8001"
_PREFIX = "CONVOY_"
# Kubernetes sets these for every Service that is called convoy or convoy-something: without this,
# nothing would start beside one. Names that are settings, too, are told by the value.
_SERVICE_LINK = re.compile(
    r"CONVOY_(\w+_)?("
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|PORT=(tcp|udp|sctp)://.*)"
)


def _recipe(root: App, commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
    """Gives `train` what neither a flag nor the environment says: the values of the recipe that is
    named, then those of the version to be replaced, or else those of the recipe for such data.
    """
    if commands != ("train",):
        return
    given = {name: a.tokens[-1].value for a in arguments for name in a.names if a.tokens}

    def take(values: dict[str, Any], source: str) -> None:
        config.Dict(values, use_commands_as_keys=False, source=source)(root, commands, arguments)

    def take_recipe(recipe: str) -> None:
        path = Path(recipe) if recipe.endswith(".toml") else RECIPES / f"{recipe}.toml"
        if not path.is_file():
            known = ", ".join(sorted(f.stem for f in RECIPES.glob("*.toml")))
            raise ConvoyError(f"no recipe {recipe!r}: there is {known}, or give a TOML file")
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConvoyError(f"{path}: {error}") from error
        take(values, str(path))

    if recipe := given.get("--recipe"):
        take_recipe(recipe)
    if base := given.get("--base"):
        folder = Path(base) if Path(base).name not in {"", ".."} else Path(base).resolve()
        for name, value in (("--models", folder.parent), ("--name", folder.name)):
            argument, *_ = arguments.match(name)
            if not argument.tokens:
                # Not from a dictionary: models is a command's name, too, which cyclopts passes over.
                argument.append(Token(keyword=name, value=str(value), source="--base"))
        values, source = _inherited(folder)
        take(values, source)
        if "data" in values:
            return
    if not recipe:
        take_recipe("digits" if given.get("--data", "digits") == "digits" else "folder")


# Settings that a retraining does not take over from the version that it is to replace: where things
# lie, and what is meant for one run.
_NOT_INHERITED = {
    "models", "name", "retrain", "base", "warm_start", "summary", "textfile", "checkpoints", "resume",
    "tensorboard", "mlflow_uri", "compare",
}  # fmt: skip


def _inherited(base: Path) -> tuple[dict[str, Any], str]:
    """The settings of the newest whole version in the model's folder `base`, none where there is none,
    and where they stand.
    """
    from service import bundle as bundles

    for version in reversed(bundles.versions(base)):
        try:
            manifest = bundles.read(base / str(version)).manifest
        except ConvoyError:
            continue  # it does not serve either
        known = {setting.name for setting in fields(TrainingSettings)} - _NOT_INHERITED
        settings = manifest.training.get("settings", {})
        values = {k: v for k, v in settings.items() if k in known and v is not None}
        pixels = manifest.pixels
        size = {
            "image_size": pixels.height,
            "channels": 1 if pixels.channels == 1 else 3,
            "resize": pixels.resize,
        }
        return {**values, **size}, str(base / str(version) / bundles.MANIFEST)
    return {}, str(base)


def _whose_models(_: App, commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
    """Keeps the environment from giving orders: `models` takes from it no name and no version; and of
    a server and a folder, it takes the one that a flag names.
    """
    if commands[:1] != ("models",):
        return
    either = [a for a in arguments if a.tokens and {"--server", "--models"} & set(a.names)]
    said = any(a.tokens[0].source == "cli" for a in either)
    for argument in arguments:
        from_environment = argument.tokens and argument.tokens[0].source == "env"
        if from_environment and (argument.index is not None or (said and argument in either)):
            argument.tokens.clear()


app = App(
    name="convoy",
    help="Train an image classifier, prove its ONNX export, serve it in batches over gRPC.",
    version=lambda: metadata.version("convoy-serving"),
    config=(config.Env(_PREFIX, command=False), _recipe, _whose_models),
    # So that `--mean 0.4 0.5 0.6` is one flag with three numbers.
    default_parameter=Parameter(consume_multiple=True),
)
models_app = App(
    name="models",
    help="Show the versions of models and what has become of them, and say which are to serve.",
)
app.command(models_app)
feedback_app = App(
    name="feedback", help="Have what `convoy serve --feedback` kept labelled, or deleted."
)
app.command(feedback_app)

_Flat = Parameter(name="*", negative_iterable=())


def _number_or_label(_: object, version: str) -> None:
    if not re.fullmatch(r"\d{1,18}|[a-z_][\w-]*", version, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{version!r} is neither the number of a version nor a label")


@app.command
def serve(*, settings: Annotated[Settings, _Flat] = Settings()) -> int:
    """Serve every model of a folder over gRPC, in batches, with metrics over HTTP."""
    _require("onnxruntime", "cpu", "serving (or [gpu] for a machine with CUDA)")
    if isinstance(settings.models, str):
        _require("obstore", "object-store", f"--models {settings.models}")
    if settings.feedback:
        _require("pyarrow", "parquet", "--feedback")
    if settings.otlp_endpoint:
        _require("opentelemetry.exporter.otlp.proto.http", "tracing", "--otlp-endpoint")
    from service.server import serve as run

    return run(settings)


@app.command
def classify(
    *paths: Path,
    server: str = DEFAULT_SERVER,
    model: str = "",
    version: Annotated[str, Parameter(validator=_number_or_label)] = "0",
    top_k: Labels = 1,
    timeout_s: Positive = 30.0,
    tls_ca: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Print the labels of images, as a running server sees them.

    Exits with 1 if any image failed; the others are answered.

    Parameters
    ----------
    paths
        Image files, or folders of them.
    server
        HOST:PORT of the server.
    model
        Model to ask; may be left out where the server has one only.
    version
        Version to ask, by its number or a label such as `stable`; 0 means whichever the server chooses.
    top_k
        Labels to print for each image, the most probable first.
    timeout_s
        Deadline of each call, in seconds.
    tls_ca
        PEM file of the authorities that vouch for a server with TLS.
    as_json
        One JSON object a line: path, model, version, labels and unsure, or error.
    """
    from convoy.client import Classifier, ClassifierError

    files = list(_image_files(paths))
    failed = 0
    with Classifier(
        server,
        model=model,
        version=int(version) if version.isdigit() else version,
        timeout_s=timeout_s,
        credentials=_credentials(tls_ca),
    ) as classifier:
        try:
            for file, prediction in zip(files, classifier.classify_many(files, top_k), strict=True):
                failed += prediction.error is not None
                print(
                    _as_json(file, prediction) if as_json else _as_text(file, prediction),
                    flush=True,
                )
        except ClassifierError as error:
            _fail(f"{error.code}: {error}")
    if failed:
        print(f"{failed} of {len(files)} images failed", file=sys.stderr)
    return 1 if failed else 0


def _credentials(tls_ca: Path | None) -> "grpc.ChannelCredentials | None":
    import grpc

    if tls_ca is None:
        return None
    try:
        return grpc.ssl_channel_credentials(tls_ca.read_bytes())
    except OSError as error:
        raise ConvoyError(f"--tls-ca: {error}") from error


def _image_files(paths: "Iterable[Path]") -> "Iterator[Path]":
    found = False
    for path in paths:
        if path.is_dir():
            inside = sorted(
                f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
            )
            if not inside:
                raise ConvoyError(f"{path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from inside
        else:
            yield path
        found = True
    if not found:
        raise ConvoyError("no images given: name files or folders")


def _as_text(file: Path, prediction: "Prediction") -> str:
    if prediction.error:
        return f"{file}\tERROR {prediction.error}"
    shown = [f"{label.name} {label.probability:.4f}" for label in prediction.labels]
    if prediction.unsure:
        shown[0] += " unsure"
    return f"{file}\t" + "  ".join(shown)


def _as_json(file: Path, prediction: "Prediction") -> str:
    answer: dict[str, Any] = {"path": str(file)}
    if prediction.error:
        answer["error"] = {"code": prediction.error.code, "message": str(prediction.error)}
    else:
        answer["model"], answer["version"] = prediction.model, prediction.version
        answer["labels"] = [
            {"index": label.index, "name": label.name, "probability": label.probability}
            for label in prediction.labels
        ]
        answer["unsure"] = prediction.unsure
    return json.dumps(answer)


@dataclass(frozen=True)
class Whose:
    """Whose models `convoy models` is about."""

    server: str = ""
    """HOST:PORT of a running server: it is asked, and told."""

    models: FolderOrUrl | None = None
    """Folder of models: it is read, and orders are written to it, which a server that serves it
    follows. Default: ./models if there is one, else the models that come with Convoy."""

    timeout_s: Positive = 120.0
    """With --server, the deadline of each call, in seconds: an order is answered when it is carried
    out."""

    tls_ca: Path | None = None
    """PEM file of the authorities that vouch for a server with TLS."""

    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False
    """Print JSON: ls an object a line for each version, the others one object, the model."""


_Whose = Annotated[Whose, _Flat]
_Name = Annotated[str, Parameter(show_env_var=False)]
_Version = Annotated[Version, Parameter(show_env_var=False)]


@models_app.default
def models_ls(*, whose: _Whose = Whose()) -> int:
    """List all versions of all models, newest first, and what has become of them.

    Exits with 1 if one is broken.
    """
    from convoy.models import ls

    with _models(whose) as models:
        return ls(models, whose.as_json)


models_app.command(models_ls, name="ls")


@models_app.command(name="show")
def models_show(name: _Name, /, *, whose: _Whose = Whose()) -> int:
    """Show all there is to know of a model: its versions, their scores, and where requests go.

    Parameters
    ----------
    name
        Name of the model.
    """
    from convoy.models import show

    with _models(whose) as models:
        return show(models, name, whose.as_json)


@models_app.command(name="promote")
def models_promote(name: str, version: _Version = 0, /, *, whose: _Whose = Whose()) -> int:
    """Have a version answer the requests that name none. Ends a canary or shadow.

    Parameters
    ----------
    name
        Name of the model.
    version
        The version; where it is left out, the candidate of the canary or shadow.
    """
    return _order(whose, name, lambda models: models.promote(name, version))


@models_app.command(name="rollback")
def models_rollback(name: _Name, /, *, whose: _Whose = Whose()) -> int:
    """Go back: from a canary or shadow to the stable version, else to the version before it.

    Parameters
    ----------
    name
        Name of the model.
    """
    return _order(whose, name, lambda models: models.rollback(name))


@models_app.command(name="pin")
def models_pin(name: _Name, /, *versions: _Version, whose: _Whose = Whose()) -> int:
    """Serve these versions and no others, whatever is published.

    Parameters
    ----------
    name
        Name of the model.
    versions
        The newest of them answers requests that name none, or the one that is labelled `stable`.
        Without any, the newest version is served again, whichever it is.
    """
    return _order(whose, name, lambda models: models.pin(name, versions))


@models_app.command(name="load")
def models_load(name: _Name, /, *, whose: _Whose = Whose()) -> int:
    """Serve a model that was unloaded, or is new; looks at its folder at once.

    Parameters
    ----------
    name
        Name of the model.
    """
    return _order(whose, name, lambda models: models.load(name))


@models_app.command(name="unload")
def models_unload(name: _Name, /, *, whose: _Whose = Whose()) -> int:
    """Serve a model no longer, until it is loaded again.

    Parameters
    ----------
    name
        Name of the model.
    """
    return _order(whose, name, lambda models: models.unload(name))


def _models(whose: Whose) -> "Folder | Server":
    from convoy.models import Folder, Server

    if not whose.server:
        folder = whose.models or default_models()
        if isinstance(folder, str):
            raise ConvoyError(
                f"--models {folder}: of an object store ask the server that serves it (--server), or "
                "write what it is to serve into versions.toml there (docs/object-store.md)"
            )
        return Folder(folder)
    if whose.models:
        raise ConvoyError(f"--server {whose.server} and --models {whose.models}: give one of them")
    return Server(whose.server, whose.timeout_s, _credentials(whose.tls_ca))


def _order(whose: Whose, name: str, give: "Callable[[Folder | Server], None]") -> int:
    from convoy.models import summarise

    with _models(whose) as models:
        give(models)
        return summarise(models, name, whose.as_json)


@models_app.command
def add(
    name: str, file: Path, /, *, settings: Annotated[AddSettings, _Flat] = AddSettings()
) -> None:
    """Make an ONNX image classifier that was trained elsewhere the next version of a model.

    Parameters
    ----------
    name
        Name of the model.
    file
        ONNX file with one input, pixels [N, H, W, C] or [N, C, H, W], and one output [N, classes].
    """
    _require("onnxruntime", "cpu", "adding models")
    _require("onnx", "onnx", "adding models")
    from training.add import add as run

    print(f"published {run(name, file, settings).folder}")


@models_app.command
def push(folder: Path, url: str, /) -> None:
    """Put a version into an object store, as the next one of its model, from where servers take it.

    One that the store has already is not put there again.

    Parameters
    ----------
    folder
        Folder of the version, models/<name>/<version>; of a model, its newest.
    url
        s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.
    """
    _require("obstore", "object-store", "pushing to an object store")
    from service import bundle as bundles
    from service.store import push as run

    versions = bundles.versions(folder)
    there = folder / str(versions[-1]) if versions else folder
    version, new = run(there, url)
    print(f"{there} is{'' if new else ' already'} version {version} in {url}")


@models_app.command
def pull(url: str, folder: Path = Path("models"), /, *, newest: Count = 1) -> None:
    """Bring the newest versions of each model in an object store into a folder, to look at or to train
    on. Nothing in it is replaced or removed.

    Parameters
    ----------
    url
        s3://bucket/prefix, gs://bucket/prefix or az://container/prefix.
    folder
        Folder of models.
    newest
        How many versions of each model.
    """
    _require("obstore", "object-store", "pulling from an object store")
    from service.store import pull as run

    for version in run(url, folder, newest):
        print(version)


@app.command
def train(*, settings: Annotated[TrainingSettings, _Flat] = TrainingSettings()) -> int:
    """Train on labelled images, export to ONNX, prove the export, pass the gate, publish a version.

    Exits with 1, and publishes nothing, where any of that fails; with --retrain with 3 where nothing
    fails, but what serves is not worse, and with 4 where there is nothing to learn that it has not.
    """
    _require("onnxruntime", "cpu", "training")
    for module in ("tensorflow", "tf2onnx", "sklearn"):
        _require(module, "train", "training")
    if settings.mlflow_uri:
        _require("mlflow", "mlflow", "--mlflow-uri")
    from rich.console import Console

    from training.job import train as run

    return run(settings, Console(soft_wrap=True))


@app.command
def check_data(
    data: str,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Look through labelled images before training: unreadable files, copies, labels, classes, sizes.

    Exits with 1 where something would stop training, or spoil its test.

    Parameters
    ----------
    data
        As for `convoy train`: a folder, or a list.
    as_json
        Print one JSON object, with all images that are concerned.
    """
    from rich.console import Console
    from rich.progress import Progress

    from training.check import check

    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        report = check(
            TrainingSettings(data=data),
            lambda items, doing, total: progress.track(items, total, description=doing),
        )
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        # A pipe has no width to fit into.
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(report.table())
        console.print(report.verdict(), highlight=False)
    return 0 if report.passed else 1


def _require(module: str, extra: str, what: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # one that it would be in
        found = None
    if found is None:
        raise ConvoyError(
            f"{what} needs {module}, which is not installed: pip install 'convoy-serving[{extra}]'"
        )


@app.command
def evaluate(
    *,
    data: str = "digits",
    models: ModelsFolder | None = None,
    name: str = "",
    version: Version = 0,
    variant: Literal["fp32", "int8", "fp16"] = "fp32",
    server: str = "",
    tls_ca: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Score a published version on the test images, in this process and, if asked, over the wire.

    Exits with 1 where the server's accuracy is not exactly that of the file.

    Parameters
    ----------
    data
        As for `convoy train`; where test images are cut off, they are the same that training cut.
    models
        Folder of models. Default: ./models if there is one, else the models that come with Convoy.
    name
        Name of the model. Default: that of the data.
    version
        Version to score; 0 means the newest.
    variant
        Which of its graphs to score: with --server, the one that it serves.
    server
        HOST:PORT of a server of the same version: each image is sent to it as the file it is.
    tls_ca
        PEM file of the authorities that vouch for a server with TLS.
    as_json
        Print one JSON object.
    """
    _require("onnxruntime", "cpu", "evaluating")
    from rich.console import Console

    from convoy.client import Classifier, ClassifierError
    from training.evaluate import score, score_answers, served_answers
    from training.run import load_test

    console = Console(stderr=as_json, soft_wrap=True)
    bundle, model, test = load_test(
        data, models or default_models(), name, version, variant, console
    )
    offline = score(model.run, test)
    found: dict[str, Any] = {"model": bundle.name, "version": bundle.version, "offline": offline}
    if server:
        with Classifier(
            server,
            model=bundle.name,
            version=bundle.version,
            credentials=_credentials(tls_ca),
        ) as classifier:
            try:
                answered = served_answers(classifier, test, len(bundle.manifest.labels))
            except ClassifierError as error:
                _fail(f"{error.code}: {error}")
        found["served"] = score_answers(answered, test.labels)
    if as_json:
        print(json.dumps(found, default=asdict))
    else:
        for where in ("offline", "served"):
            if where in found:
                scores = found[where]
                print(
                    f"{where:8} accuracy {scores.accuracy:.4f} ({scores.correct} of {scores.images}), "
                    f"log loss {scores.log_loss:.4f}"
                )
    return int(server != "" and found["served"].correct != offline.correct)


@app.command
def health(
    *,
    server: str = "",
    port: Port = 8001,
    service: str = "convoy.v1.ImageClassifier",
    timeout_s: Positive = 4.0,
    tls_ca: Path | None = None,
) -> int:
    """Ask a server how it is, as gRPC's health service says it: for probes of containers and machines.

    Exits with 0 where it serves, else with 1.

    Parameters
    ----------
    server
        HOST:PORT of the server. Default: --port on this machine.
    port
        Its gRPC port on this machine: the variable is that of `convoy serve`.
    service
        What to ask about: an API or a model by name, whether it can be asked; "" whether the process
        lives, which it also does while it drains.
    timeout_s
        How long to wait for an answer, in seconds.
    tls_ca
        PEM file of the authorities that vouch for a server with TLS, which is then to be named as its
        certificate names it.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from convoy.client import explain

    target = server or f"localhost:{port}"
    # What is asked on this machine has no business at the environment's proxy.
    options = [] if server else [("grpc.enable_http_proxy", 0)]
    credentials = _credentials(tls_ca)
    if credentials:
        channel = grpc.secure_channel(target, credentials, options)
    else:
        channel = grpc.insecure_channel(target, options)
    request = health_pb2.HealthCheckRequest(service=service)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=timeout_s)
        except grpc.RpcError as error:
            explained = explain(error, target)
            _fail(f"{explained.code}: {explained}")
    print(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    return 0 if answer.status == health_pb2.HealthCheckResponse.SERVING else 1


@app.command
def bulk(
    images: str, to: str, /, *, settings: Annotated[BulkSettings, _Flat] = BulkSettings()
) -> int:
    """Classify stored images, however many, on one machine or a Ray cluster; write Parquet.

    One row for each image, those too that can't be read. A job that was broken off goes on where it
    was when it is run again. Exits with 1 where files of answers are missing in the end.

    Parameters
    ----------
    images
        Folder of images or of Parquet files, or one Parquet file: a path that all machines see, or
        s3://bucket/prefix, gs://bucket/prefix or abfs://container@account.dfs.core.windows.net/prefix.
    to
        Folder for the answers, likewise.
    """
    _require("onnxruntime", "cpu", "classifying (or [gpu] for machines with CUDA)")
    _require("ray", "bulk", "classifying in bulk")
    from convoy.bulk.run import run

    return run(images, to, settings)


@app.command
def bench(*, settings: Annotated[BenchSettings, _Flat] = BenchSettings()) -> int:
    """Put a server under load, and say how many requests a second it answers, and how fast.

    Exits with 1 where --check finds a wrong answer.
    """
    if settings.plot:
        _require("matplotlib", "bench", "--plot")
    from convoy.bench.run import run

    return run(settings)


@feedback_app.command(name="export")
def feedback_export(
    folder: Path,
    to: Path,
    /,
    *,
    model: str = "",
    unsure: Annotated[bool, Parameter(negative=())] = False,
    labels: Path | None = None,
) -> int:
    """Write images that were kept into a folder for each class, as `convoy train --data` takes them.

    Each image once, and none that is anywhere in TO already. The class is what the model answered:
    look through the folders, and move what is wrong, before you train on them. Exits with 1 if a file
    could not be read; the others are exported.

    Parameters
    ----------
    folder
        The folder of `convoy serve --feedback`.
    to
        Folder to write to.
    model
        Only what this model answered; may be left out where there is one only.
    unsure
        Only images that were answered as unsure.
    labels
        CSV with the columns sha256 and label: only the images that it names are exported, to the class
        that it says, those too that are in TO elsewhere.
    """
    _require("pyarrow", "parquet", "reading feedback")
    from service.feedback import export, read_labels

    known = read_labels(labels) if labels else None
    done = export(folder, to, model=model, unsure=unsure, labels=known)
    for problem in done.unreadable:
        print(f"not read: {problem}", file=sys.stderr)
    counts = ", ".join(f"{label} {count}" for label, count in sorted(done.written.items()))
    print(
        f"{sum(done.written.values())} images written to {to}" + (f": {counts}" if counts else "")
    )
    if done.known:
        print(f"{done.known} were there already" + (f", {done.moved} moved" if done.moved else ""))
    return 1 if done.unreadable else 0


@feedback_app.command(name="delete")
def feedback_delete(folder: Path, digest: str, /, *digests: str) -> None:
    """Delete images from what was kept, by the sha256 of their files.

    A running server may still write what it has in memory: wait for its --feedback-rotate-s first.

    Parameters
    ----------
    folder
        The folder of `convoy serve --feedback`.
    digest
        The sha256 of an image, as `sha256sum` prints it.
    digests
        More of them.
    """
    _require("pyarrow", "parquet", "reading feedback")
    from service.feedback import delete

    print(f"{delete(folder, [digest, *digests])} images deleted")


def _check_environment() -> None:
    """Raises ConvoyError for a CONVOY_* variable that is no setting: a typing error, else unnoticed.

    Forgets those that Kubernetes sets.
    """
    known = {
        field.name
        for kind in (Settings, TrainingSettings, AddSettings, BenchSettings, BulkSettings, Whose)
        for field in fields(kind)
    }
    known |= {"server", "model", "version", "top_k", "timeout_s", "tls_ca", "json", "service"}
    for name, value in list(os.environ.items()):
        if _SERVICE_LINK.fullmatch(f"{name}={value}"):
            del os.environ[name]
        elif name.startswith(_PREFIX) and name.removeprefix(_PREFIX).lower() not in known:
            raise ConvoyError(
                f"the environment has {name}, which is no setting: see `convoy serve --help`"
            )


def _fail(message: str) -> NoReturn:
    print(f"convoy: {message}", file=sys.stderr)
    raise SystemExit(1)


def main() -> None:
    """Runs the command line; exits with its status."""
    crashes.enable()
    if os.getpid() == 1:
        # In a container: the kernel keeps signals that nothing handles from its first process.
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
    try:
        _check_environment()
        status = app(result_action="return_value") or 0
        sys.stdout.flush()
        raise SystemExit(status)
    except ConvoyError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    # Who read our output, such as `head`, has enough. Python would flush once more as it ends.
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


if __name__ == "__main__":
    main()
