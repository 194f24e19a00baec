"""`convoy models` and its commands."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from convoy.cli.app import Flat, app, require
from convoy.cli.target import Whose, opened
from convoy_service.settings import Count, Version
from convoy_training.settings import AddSettings

if TYPE_CHECKING:
    from collections.abc import Callable

    from convoy.models import Folder, Server


models_app = App(
    name="models",
    help="Show the versions of models and what has become of them, and say which are to serve.",
)
app.command(models_app)


_Whose = Annotated[Whose, Flat]
_Name = Annotated[str, Parameter(show_env_var=False)]
_Version = Annotated[Version, Parameter(show_env_var=False)]


@models_app.default
def models_ls(*, whose: _Whose = Whose()) -> int:
    """List all versions of all models, newest first, and what has become of them.

    Exits with 1 if one is broken.
    """
    from convoy.models import ls

    with opened(whose) as models:
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

    with opened(whose) as models:
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


def _order(whose: Whose, name: str, give: "Callable[[Folder | Server], None]") -> int:
    from convoy.models import summarise

    with opened(whose) as models:
        give(models)
        return summarise(models, name, whose.as_json)


@models_app.command
def add(
    name: str, file: Path, /, *, settings: Annotated[AddSettings, Flat] = AddSettings()
) -> None:
    """Make an ONNX image classifier that was trained elsewhere the next version of a model.

    Parameters
    ----------
    name
        Name of the model.
    file
        ONNX file with one input, pixels [N, H, W, C] or [N, C, H, W], and one output [N, classes].
    """
    require("onnxruntime", "cpu", "adding models")
    require("onnx", "onnx", "adding models")
    from convoy_training.export.import_onnx import add as run

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
    require("obstore", "object-store", "pushing to an object store")
    from convoy_service.artifacts import reader as bundles
    from convoy_service.object_store.mirror import push as run

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
    require("obstore", "object-store", "pulling from an object store")
    from convoy_service.object_store.mirror import pull as run

    for version in run(url, folder, newest):
        print(version)
