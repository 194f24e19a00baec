"""`convoy models`: which versions there are and what has become of them, and orders which are to
serve. Of a running server, which is asked and told by gRPC; or of a models folder, which is read, and
whose versions.toml is written: a server that watches the folder does what it says.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from convoy.client import explain
from convoy_protos import classifier_pb2 as pb
from convoy_protos import inference_pb2 as inference
from convoy_protos.classifier_pb2_grpc import ImageClassifierStub, ModelControlStub
from convoy_protos.inference_pb2_grpc import GRPCInferenceServiceStub
from convoy_service.errors import ConvoyError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from convoy_service.rollout.policy import Policy

# A model as this module passes it around and `--json` prints it, its versions the newest first.
Model = dict[str, Any]


class Server:
    """The models of a running server. Its methods raise ConvoyError where it can't be asked, or
    refuses.
    """

    def __init__(
        self, target: str, timeout_s: float, credentials: grpc.ChannelCredentials | None
    ) -> None:
        """`timeout_s` is each call's deadline: an order is answered when it is carried out."""
        self._target, self._timeout_s = target, timeout_s
        if credentials:
            self._channel = grpc.secure_channel(target, credentials)
        else:
            self._channel = grpc.insecure_channel(target)
        # The generated code has no types.
        self._classifier: Any = ImageClassifierStub(self._channel)  # type: ignore[no-untyped-call]
        self._control: Any = ModelControlStub(self._channel)  # type: ignore[no-untyped-call]
        self._repository: Any = GRPCInferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]

    def __str__(self) -> str:
        return self._target

    def models(self) -> list[Model]:
        answer: pb.ListModelsResponse = self._call(
            self._classifier.ListModels, pb.ListModelsRequest()
        )
        return [as_model(message) for message in answer.models]

    def outcome(self, model: Model) -> str:
        """What an order has come to, for a person to read."""
        return _answering(model)

    def promote(self, name: str, version: int) -> None:
        self._call(self._control.Promote, pb.PromoteRequest(model=name, version=version))

    def rollback(self, name: str) -> None:
        self._call(self._control.Rollback, pb.RollbackRequest(model=name))

    def pin(self, name: str, versions: Sequence[int]) -> None:
        self._call(self._control.Pin, pb.PinRequest(model=name, versions=versions))

    def load(self, name: str) -> None:
        self._call(
            self._repository.RepositoryModelLoad,
            inference.RepositoryModelLoadRequest(model_name=name),
        )

    def unload(self, name: str) -> None:
        self._call(
            self._repository.RepositoryModelUnload,
            inference.RepositoryModelUnloadRequest(model_name=name),
        )

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, timeout=self._timeout_s)
        except grpc.RpcError as error:
            explained = explain(error, self._target)
            raise ConvoyError(f"{explained.code}: {explained}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()


class Folder:
    """The models of a folder, as they lie there; what a server makes of them, only that one knows. An
    order is written to the model's versions.toml.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held."""

    def __str__(self) -> str:
        return str(self._folder)

    def models(self) -> list[Model]:
        from convoy_service.artifacts import reader as bundles

        return [self._model(name) for name in bundles.names(self._folder)]

    def outcome(self, model: Model) -> str:
        """What an order has come to, for a person to read."""
        return f"{model['file']} asks for: {model['policy']}; a server of this folder follows"

    def promote(self, name: str, version: int) -> None:
        from convoy_service.rollout import policy as policies

        def promoted(policy: "Policy") -> "Policy":
            number = version or policy.candidate
            if not number:
                raise ConvoyError(
                    f"{name} has no candidate in {policies.FILE}: say which version to promote"
                )
            self._check(name, number)
            return policies.promoted(policy, number)

        policies.change(self._known(name), promoted)

    def rollback(self, name: str) -> None:
        from convoy_service.rollout import policy as policies

        def rolled_back(policy: "Policy") -> "Policy":
            if policy.candidate:
                return policies.rejected(policy, policy.candidate)
            model = self._model(name)
            stable, whole = model["version"], [v["version"] for v in model["versions"] if _whole(v)]
            return policies.rolled_back(policy, stable, policies.before(policy, stable, whole))

        policies.change(self._known(name), rolled_back)

    def pin(self, name: str, versions: Sequence[int]) -> None:
        from convoy_service.rollout import policy as policies

        folder = self._known(name)
        for version in versions:
            self._check(name, version)
        policies.change(folder, lambda policy: policies.pinned(policy, versions))

    def load(self, name: str) -> None:
        from convoy_service.rollout import policy as policies

        policies.change(self._known(name), policies.loaded)

    def unload(self, name: str) -> None:
        from convoy_service.rollout import policy as policies

        policies.change(self._known(name), policies.unloaded)

    def _known(self, name: str) -> Path:
        """The folder of a model. Raises ConvoyError where there is none."""
        from convoy_service.artifacts import reader as bundles

        names = bundles.names(self._folder)
        if name not in names:
            raise _unknown(name, self, names)
        return self._folder / name

    def _check(self, name: str, version: int) -> None:
        """Raises ConvoyError where a version can't be served, as far as its files tell."""
        from convoy_service.artifacts import reader as bundles

        there = bundles.versions(self._folder / name)
        if version not in there:
            listed = ", ".join(map(str, there))
            raise ConvoyError(
                f"no version {version} of model {name!r} in {self}; there is: {listed}"
            )
        bundles.read(self._folder / name / str(version))

    def _model(self, name: str) -> Model:
        from convoy_service.artifacts import reader as bundles
        from convoy_service.rollout import policy as policies
        from convoy_service.rollout.canary import Canary

        folder = self._folder / name
        reason = ""
        try:
            policy = policies.read(folder)
        except ConvoyError as error:
            reason, policy = str(error), policies.Policy()
        versions = [_read(folder / str(number)) for number in reversed(bundles.versions(folder))]
        for version in versions:
            if version["version"] in policy.skip:
                version["reason"] = version["reason"] or "skipped: never taken for the newest"
        whole = [v["version"] for v in versions if _whole(v)]
        if policy.newest:
            served = [number for number in whole if number not in policy.skip]
        else:
            served = [number for number in whole if number in policy.pinned]
        stable = policy.stable or max(served, default=0)
        candidate = policy.candidate if policy.canary else 0
        canary = policy.canary or Canary()
        return {
            "model": name,
            "file": str(folder / policies.FILE),
            "reason": reason,
            "version": stable,
            "policy": str(policy),
            "route": {
                "mode": canary.mode if candidate else "stable",
                "stable": stable,
                "candidate": candidate,
                "share": canary.share if candidate and canary.mode == "canary" else 0.0,
            },
            "version_labels": policy.labels,
            "versions": versions,
        }


def _whole(version: Model) -> bool:
    return bool(version["state"] == "whole")


def _read(folder: Path) -> dict[str, Any]:
    """What lies in the folder of a version."""
    from convoy_service.artifacts import reader as bundles

    version: dict[str, Any] = {"version": int(folder.name)}
    try:
        if not (folder / bundles.MANIFEST).exists():
            missing = [bundles.MANIFEST]
        else:
            files = bundles.read_manifest(folder).files
            missing = sorted(name for name in files if not (folder / name).exists())
        if missing:
            reason = f"{', '.join(missing)} missing: not copied completely"
            return {**version, "state": "incomplete", "reason": reason}
        bundle = bundles.read(folder)
    except ConvoyError as error:
        return {**version, "state": "broken", "reason": str(error)}
    manifest = bundle.manifest
    return {
        **version,
        "state": "whole",
        "reason": "",
        "accuracy": manifest.scores and manifest.scores.accuracy,
        "test_images": manifest.scores and manifest.scores.images,
        "parity": manifest.parity and manifest.parity.max_abs_difference,
        "classes": len(manifest.labels),
        "input": list(manifest.pixels.shape),
        "variants": sorted(manifest.variants),
        "bytes": len(bundle.onnx),
        "created": manifest.created,
        "sha256": bundle.sha256,
    }


def as_model(message: pb.Model) -> Model:
    """What a server says of a model."""
    route = message.route
    return {
        "model": message.name,
        "state": pb.Model.State.Name(message.state).lower(),
        "reason": message.reason,
        "version": message.version,
        "policy": message.policy,
        "route": {
            "mode": pb.Route.Mode.Name(route.mode).lower(),
            "stable": route.stable,
            "candidate": route.candidate,
            "share": route.share,
        },
        "trial": _as_trial(route.trial) if route.HasField("trial") else None,
        "version_labels": dict(message.version_labels),
        "versions": [
            {
                "version": each.version,
                "state": pb.Version.State.Name(each.state).lower(),
                "reason": each.reason,
                "created": each.created,
                "sha256": each.sha256,
                "accuracy": each.accuracy if each.HasField("accuracy") else None,
                "test_images": each.test_images or None,
            }
            for each in reversed(message.version_states)
        ],
        "classes": list(message.labels),
        "input": [message.height, message.width, message.channels],
        "max_batch_size": message.max_batch_size,
        "device": message.device,
        "variant": message.variant,
    }


def _as_trial(message: pb.Trial) -> dict[str, Any]:
    return {
        "why": message.why,
        "limits": [
            {
                "name": each.name,
                "mean": each.mean,
                "limit": each.limit,
                "batches": each.batches,
                "kept": each.kept,
            }
            for each in message.limits
        ],
        "latency_ratio": message.latency_ratio,
        "confidence_shift": message.confidence_shift,
    }


def ls(source: "Server | Folder", as_json: bool) -> int:
    """Prints all versions; the exit status: 1 where one is broken."""
    models = source.models()
    if as_json:
        for model in models:
            for version in model["versions"]:
                print(json.dumps({"model": model["model"], **version}))
    elif models:
        _console().print(_table(models))
    else:
        print(f"no models in {source}: make one with `convoy train` or `convoy models add`")
    states = {version["state"] for model in models for version in model["versions"]}
    return int("broken" in states)


def show(source: "Server | Folder", name: str, as_json: bool) -> int:
    """Prints all that is known of a model; the exit status: 1 where one of its versions is broken."""
    model = _named(source, name)
    if as_json:
        print(json.dumps(model))
    else:
        console = _console()
        console.print(_facts(model))
        console.print(_table([model]))
    return int(any(version["state"] == "broken" for version in model["versions"]))


def _answering(model: Model) -> str:
    """Which version answers, or why none does."""
    if not model["version"]:
        return f"no version answers: {model['reason']}"
    route = model["route"]
    told = f"version {model['version']} answers"
    if route["candidate"]:
        of_them = "copies" if route["mode"] == "shadow" else f"{route['share']:.3g}"
        told += f"; {of_them} of the requests go to {route['candidate']}"
    return told


def _facts(model: Model) -> "Table":
    """What is known of a model as a whole."""
    from rich.table import Table
    from rich.text import Text

    facts = {
        "model": model["model"],
        "answers": _answering(model) if "state" in model else "",
        "asked for": model["policy"],
        "reason": model["reason"],
        "device": f"{model['device']}, {model['variant']}" if model.get("device") else "",
        "input": "x".join(map(str, model.get("input", ()))),
        "classes": _few(model.get("classes", [])),
    }
    if trial := model.get("trial"):
        facts["trial"] = trial["why"]
        for limit in trial["limits"]:
            facts[f"  {limit['name']}"] = (
                f"{limit['mean']:.3g} in {limit['batches']} batches, the limit is "
                f"{limit['limit']:.3g}{': kept' if limit['kept'] else ''}"
            )
        facts["  times"] = f"x{trial['latency_ratio']:.3g} the stable version's"
        facts["  confidence"] = f"{trial['confidence_shift']:+.3g}"
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        if fact:
            table.add_row(name, Text(fact))
    return table


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{len(names)}: {shown}{', ...' if len(names) > 10 else ''}" if names else ""


def summarise(source: "Server | Folder", name: str, as_json: bool) -> int:
    """Prints what a model has come to by an order; the exit status."""
    model = _named(source, name)
    print(json.dumps(model) if as_json else f"{name}: {source.outcome(model)}")
    return 0


def _unknown(name: str, source: "Server | Folder", there: Iterable[str]) -> ConvoyError:
    return ConvoyError(f"no model {name!r} in {source}; there is: {', '.join(there) or 'none'}")


def _named(source: "Server | Folder", name: str) -> Model:
    models = {model["model"]: model for model in source.models()}
    if name not in models:
        raise _unknown(name, source, models)
    return models[name]


_COLOURS = {"ready": "green", "broken": "red", "incomplete": "yellow", "loading": "yellow"}


def _table(models: Sequence[Model]) -> "Table":
    """A row for each version; columns of which nothing is known are left out."""
    from rich.table import Table
    from rich.text import Text

    rows = []
    for model in models:
        for version in model["versions"]:
            accuracy, parity = version.get("accuracy"), version.get("parity")
            state = version["state"]
            rows.append({
                "model": model["model"],
                "version": str(version["version"]),
                "state": Text(state, _COLOURS.get(state, "")),
                "serves": _serves(model, version["version"]),
                "accuracy": "unknown" if accuracy is None else f"{accuracy:.4f} of {version['test_images']}",
                "parity": "" if parity is None else f"{parity:.0e}",
                "classes": str(version.get("classes", "")),
                "input": "x".join(map(str, version.get("input", ()))),
                "size": f"{version['bytes'] / 1e6:.2f} MB" if "bytes" in version else "",
                "created": version.get("created", ""),
                "why": version["reason"],
            })  # fmt: skip
    table = Table()
    columns = [name for name in rows[0] if any(str(row[name]) for row in rows)] if rows else []
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        # As they are: a name from a file may look like rich's markup.
        table.add_row(
            *(Text(cell) if isinstance(cell := row[name], str) else cell for name in columns)
        )
    return table


def _serves(model: Model, version: int) -> str:
    """What requests go to a version."""
    route = model["route"]
    roles = []
    if version == route["stable"]:
        roles.append("stable")
    if version == route["candidate"]:
        roles.append(f"{route['mode']} {route['share']:.3g}")
    # A stable version has the label `stable`, and a candidate `canary`, whether or not they were given.
    given = {"stable": route["stable"], "canary": route["candidate"]}
    for label, labelled in model["version_labels"].items():
        if labelled == version and given.get(label) != version:
            roles.append(label)
    return ", ".join(roles)


def _console() -> "Console":
    from rich.console import Console

    # A pipe has no width to fit into.
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)
