"""The credentials that `--tls-ca` names."""

from pathlib import Path
from typing import TYPE_CHECKING

from convoy_service.errors import ConvoyError

if TYPE_CHECKING:
    import grpc


def tls_credentials(tls_ca: Path | None) -> "grpc.ChannelCredentials | None":
    import grpc

    if tls_ca is None:
        return None
    try:
        return grpc.ssl_channel_credentials(tls_ca.read_bytes())
    except OSError as error:
        raise ConvoyError(f"--tls-ca: {error}") from error
