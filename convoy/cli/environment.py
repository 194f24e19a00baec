"""The CONVOY_* variables: which there are, and which a command takes."""

import os
import re
from dataclasses import fields
from typing import TYPE_CHECKING

from cyclopts import App

from convoy.bench.settings import BenchSettings
from convoy.bulk.settings import BulkSettings
from convoy.cli.target import Whose
from convoy_service.errors import ConvoyError
from convoy_service.settings import Settings
from convoy_training.settings import AddSettings, TrainingSettings

if TYPE_CHECKING:
    from cyclopts.argument import ArgumentCollection


PREFIX = "CONVOY_"
# Kubernetes sets these for every Service that is called convoy or convoy-something: without this,
# nothing would start beside one. Names that are settings, too, are told by the value.
_SERVICE_LINK = re.compile(
    r"CONVOY_(\w+_)?("
    r"(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)=.*"
    r"|PORT=(tcp|udp|sctp)://.*)"
)


def without_orders(_: App, commands: tuple[str, ...], arguments: "ArgumentCollection") -> None:
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


def check_environment() -> None:
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
        elif name.startswith(PREFIX) and name.removeprefix(PREFIX).lower() not in known:
            raise ConvoyError(
                f"the environment has {name}, which is no setting: see `convoy serve --help`"
            )
