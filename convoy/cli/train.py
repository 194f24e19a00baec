"""`convoy train`."""

from typing import Annotated

from convoy.cli.app import Flat, app, require
from convoy_training.settings import TrainingSettings


@app.command
def train(*, settings: Annotated[TrainingSettings, Flat] = TrainingSettings()) -> int:
    """Train on labelled images, export to ONNX, prove the export, pass the gate, publish a version.

    Exits with 1, and publishes nothing, where any of that fails; with --retrain with 3 where nothing
    fails, but what serves is not worse, and with 4 where there is nothing to learn that it has not.
    """
    require("onnxruntime", "cpu", "training")
    for module in ("tensorflow", "tf2onnx", "sklearn", "jinja2"):
        require(module, "train", "training")
    if settings.mlflow_uri:
        require("mlflow", "mlflow", "--mlflow-uri")
    from rich.console import Console

    from convoy_training.pipeline.job import train as run

    return run(settings, Console(soft_wrap=True))
