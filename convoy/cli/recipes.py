"""Where `convoy train` takes a setting from that neither a flag nor the environment gives."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App, Token, config

from convoy_service.errors import ConvoyError
from convoy_training.settings import RECIPES, Role, TrainingSettings, with_role

if TYPE_CHECKING:
    from cyclopts.argument import ArgumentCollection


def from_recipe(root: App, commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
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


# Settings that a retraining does not take over from the version that it is to replace.
NOT_INHERITED = with_role(Role.ONCE)


def _inherited(base: Path) -> tuple[dict[str, Any], str]:
    """The settings of the newest whole version in the model's folder `base`, none where there is none,
    and where they stand.
    """
    from convoy_service.artifacts import reader as bundles

    for version in reversed(bundles.versions(base)):
        try:
            manifest = bundles.read(base / str(version)).manifest
        except ConvoyError:
            continue  # it does not serve either
        known = {setting.name for setting in fields(TrainingSettings)} - NOT_INHERITED
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
