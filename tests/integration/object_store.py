"""An S3 server of moto's, and a way to it that can be slow, silent or spoil what it carries."""

import contextlib
import random
import select
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from obstore.store import S3Store

from tests.conftest import TIMEOUT_S, environment

BUCKET, PREFIX = "bucket", "some/models"
URL = f"s3://{BUCKET}/{PREFIX}"
_KEY, _SECRET, _REGION = "us", "secret", "us-east-1"
_PIECE = 2048


class ObjectStore:
    """The bucket is reached through `port`, or past all trouble through `inside`."""

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = int(listener.getsockname()[1])
        self._way = Way(self._port)
        self.port = self._way.port
        self.start()

    def start(self) -> None:
        """Starts it with an empty bucket."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + TIMEOUT_S
        make = urllib.request.Request(f"http://127.0.0.1:{self._port}/{BUCKET}", method="PUT")
        while True:
            try:
                urllib.request.urlopen(make, timeout=TIMEOUT_S).close()
                return
            except urllib.error.URLError:
                assert self._process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def trouble(self, kind: Literal["", "slow", "silent", "spoilt"]) -> None:
        """What happens to answers on their way, from now on: nothing, or they come at 100 kB/s, not at
        all, or files with some bytes changed.
        """
        self._way.trouble = kind

    @property
    def inside(self) -> Any:
        return S3Store(
            BUCKET,
            prefix=PREFIX,
            client_options={"allow_http": True},
            endpoint=f"http://127.0.0.1:{self._port}",
            access_key_id=_KEY,
            secret_access_key=_SECRET,
            region=_REGION,
        )

    def put(self, path: str, data: bytes) -> None:
        self.inside.put(path, data)

    def variables(self) -> dict[str, str]:
        """What the environment must hold to get there."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": _REGION,
        }

    def add(self, version: Path, number: int = 0) -> None:
        """Uploads a version of a model, in the order of its files' names: so the manifest is neither
        first nor last.
        """
        for file in sorted(version.iterdir()):
            there = f"{version.parent.name}/{number or version.name}/{file.name}"
            self.inside.put(there, file)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._way.close()


class Way:
    """Carries connections to a port of this machine."""

    def __init__(self, to: int) -> None:
        self.trouble = ""
        self._to = to
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._random = random.Random(0)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        with (
            near,
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self._to), TIMEOUT_S) as far,
        ):
            lists = False
            while True:
                for source in select.select([near, far], [], [])[0]:
                    data = source.recv(_PIECE)
                    if not data:
                        return
                    if source is near:
                        lists = b"list-type=" in data.partition(b"\r\n")[0]
                        far.sendall(data)
                    else:
                        near.sendall(self._changed(data, lists))

    def _changed(self, data: bytes, lists: bool) -> bytes:
        while self.trouble == "silent":
            time.sleep(0.05)
        if self.trouble == "slow":
            time.sleep(len(data) / 100_000)
        body = data.find(b"\r\n\r\n") + 4 if data.startswith(b"HTTP/") else 0
        if self.trouble == "spoilt" and not lists and body < len(data):
            place = self._random.randrange(body, len(data))
            data = data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]
        return data

    def close(self) -> None:
        self._listener.close()
