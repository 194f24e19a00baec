"""The models that `convoy models` is about: those of a server, or of a folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from convoy.cli.tls import tls_credentials
from convoy_service.errors import ConvoyError
from convoy_service.settings import FolderOrUrl, Positive, default_models

if TYPE_CHECKING:
    from convoy.models import Folder, Server


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


def opened(whose: Whose) -> "Folder | Server":
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
    return Server(whose.server, whose.timeout_s, tls_credentials(whose.tls_ca))
