"""Certificates for TLS, made with openssl."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Pair:
    """PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Certificates:
    """An authority, and what it signed: a server, which is `localhost`, and a client. The stranger is
    its own authority.
    """

    authority: Pair
    server: Pair
    client: Pair
    stranger: Pair


def make_certificates(folder: Path) -> Certificates:
    """Valid for a day. Skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")

    def make(name: str, *options: str | Path) -> Pair:
        pair = Pair(folder / f"{name}.pem", folder / f"{name}.key")
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-nodes", "-days", "1", "-subj", f"/CN={name}"),
                *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
                *("-out", pair.certificate, "-keyout", pair.key, *options),
            ],
            check=True,
            capture_output=True,
        )
        return pair

    authority = make("authority")
    signed = ("-CA", authority.certificate, "-CAkey", authority.key)
    return Certificates(
        authority,
        make("server", *signed, "-addext", "subjectAltName=DNS:localhost"),
        make("client", *signed),
        make("stranger"),
    )
