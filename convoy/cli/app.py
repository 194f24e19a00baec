"""The application that the commands register with, and what all of them use."""

import importlib.util
import sys
from importlib import metadata
from typing import NoReturn

from cyclopts import App, Parameter, config

from convoy.cli.environment import PREFIX, without_orders
from convoy.cli.recipes import from_recipe
from convoy_service.errors import ConvoyError

DEFAULT_SERVER = "localhost:8001"


app = App(
    name="convoy",
    help="Train an image classifier, prove its ONNX export, serve it in batches over gRPC.",
    version=lambda: metadata.version("convoy-serving"),
    config=(config.Env(PREFIX, command=False), from_recipe, without_orders),
    # So that `--mean 0.4 0.5 0.6` is one flag with three numbers.
    default_parameter=Parameter(consume_multiple=True),
)


Flat = Parameter(name="*", negative_iterable=())


def require(module: str, extra: str, what: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # one that it would be in
        found = None
    if found is None:
        raise ConvoyError(
            f"{what} needs {module}, which is not installed: pip install 'convoy-serving[{extra}]'"
        )


def fail(message: str) -> NoReturn:
    print(f"convoy: {message}", file=sys.stderr)
    raise SystemExit(1)
