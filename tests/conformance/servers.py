"""What the clients are let loose on: real servers, and the models that they serve."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnx.parser

from convoy_training.export.import_onnx import add
from convoy_training.settings import AddSettings
from tests.conftest import REPOSITORY, Server
from tests.integration.models import add_colours, add_slow

HTTP = ("--http-port", "0")
OPEN = ("--allow-repository-control", "--allow-shared-memory")

# As `colours`, of images so large that 21 of them are 63 MB.
_LARGE = """
<ir_version: 10, opset_import: ["" : 18]>
large (float[N, 1000, 1000, 3] image) => (float[N, 3] scores) {
  axes = Constant <value_ints = [1, 2]> ()
  scores = ReduceMean <keepdims = 0> (image, axes)
}
"""


def add_models(folder: Path, *, slow: bool) -> None:
    """`digits` and `colours`; with `slow` also what takes long: `slow` and `large`."""
    shutil.copytree(REPOSITORY / "models" / "digits", folder / "digits")
    add_colours(folder)
    if slow:
        add_slow(folder)
        file = folder / "large.onnx"
        onnx.save(onnx.parser.parse_model(_LARGE), file)
        add(
            "large",
            file,
            AddSettings(models=folder, scale=(1 / 51,), softmax=True, max_batch_size=4),
        )


def place_of(server: Server) -> dict[str, str]:
    """How the clients' programs reach it."""
    return {
        "grpc": server.target,
        "http": f"127.0.0.1:{server.http_port}",
        "metrics": f"http://127.0.0.1:{server.metrics_port}/metrics",
    }


@contextmanager
def serving(models: Path) -> Iterator[dict[str, dict[str, str]]]:
    """Two servers: one as it is by default, one that takes orders and shared memory."""
    with Server(*HTTP, models=models) as closed, Server(*HTTP, *OPEN, models=models) as opened:
        yield {"closed": place_of(closed.ready()), "opened": place_of(opened.ready())}
