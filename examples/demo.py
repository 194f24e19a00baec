"""The whole line on real images: train, prove, publish, serve, classify, compare. `make demo`.

Everything goes through the doors that users have: the command `convoy`, its Python client, and the
Open Inference Protocol. Exits with 1 where any step fails, or where the accuracy over the wire is
not exactly the one that was published.
"""

import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from convoy import Classifier, Prediction
from convoy_protos import inference_pb2, inference_pb2_grpc
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle
from convoy_training.data import datasets as data
from convoy_training.data.datasets import Split
from convoy_training.settings import TrainingSettings

FOLDER = Path("runs/demo")
CONVOY = [sys.executable, "-m", "convoy"]

console = Console()


def main() -> int:
    began = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    models, images = FOLDER / "models", FOLDER / "images"

    console.rule("train, export, prove, publish")
    subprocess.run([*CONVOY, "train", "--data", "digits", "--models", models], check=True)
    bundle = bundles.read(models / "digits" / "1")
    published = bundle.manifest.scores
    assert published is not None

    console.rule("serve")
    test = data.load(TrainingSettings(data="digits")).test
    files = write_images(test, images)
    with server(models) as (address, metrics):
        console.rule(f"classify {len(files)} PNG files, by convoy.v1.ImageClassifier")
        with Classifier(address) as classifier:
            predictions = list(classifier.classify_many(files, top_k=2))
        by_file = sum(
            prediction.label == bundle.manifest.labels[truth]
            for prediction, truth in zip(predictions, test.labels, strict=True)
        )
        console.print(gallery(test, predictions, bundle))

        console.rule("classify raw tensors, by the Open Inference Protocol")
        probabilities = infer(address, test, bundle)
        by_tensor = int((probabilities.argmax(axis=1) == test.labels).sum())

        table = Table("the same test images", "right", "accuracy")
        for how, right in (
            ("the published file, offline", published.correct),
            ("PNG files over gRPC", by_file),
            ("raw tensors over gRPC", by_tensor),
        ):
            table.add_row(how, f"{right} of {len(test)}", f"{right / len(test):.4f}")
        console.print(table)
        show_metrics(metrics)

    if not published.correct == by_file == by_tensor:
        console.print("[red]the accuracy over the wire is not the published one")
        return 1
    console.print(
        f"[green]done[/] in {time.monotonic() - began:.0f} s; what was made is in {FOLDER}/"
    )
    return 0


def write_images(test: Split, folder: Path) -> list[Path]:
    folder.mkdir(parents=True)
    files = []
    for position, label in enumerate(test.labels):
        files.append(folder / f"{position:03d}-is-{label}.png")
        files[-1].write_bytes(test.encoded(position))
    return files


@contextmanager
def server(models: Path) -> Iterator[tuple[str, str]]:
    """A running `convoy serve` on free ports: its gRPC address and the URL of its metrics."""
    command = [*CONVOY, "serve", "--models", models, "--host", "127.0.0.1"]
    command += ["--port", "0", "--metrics-port", "0", "--no-http", "--shutdown-delay-s", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                console.print(line.rstrip(), highlight=False, soft_wrap=True)
                if ready := re.search(r"gRPC on (\S+), metrics on (\S+)", line):
                    break
            else:
                raise SystemExit("the server did not start")
            yield ready[1], ready[2]
            process.send_signal(signal.SIGTERM)
            for line in process.stderr:
                console.print(line.rstrip(), highlight=False, soft_wrap=True)
            if status := process.wait():
                raise SystemExit(f"the server ended with status {status}")
        finally:
            process.kill()


def infer(address: str, test: Split, bundle: Bundle) -> bundles.Probabilities:
    """Probabilities `[N, classes]`, in requests of 32 images."""
    manifest, answers = bundle.manifest, []
    with grpc.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        for start in range(0, len(test), 32):
            pixels = test.inputs[start : start + 32]
            tensor = inference_pb2.ModelInferRequest.InferInputTensor(
                name=manifest.input, datatype="UINT8", shape=pixels.shape
            )
            response = stub.ModelInfer(
                inference_pb2.ModelInferRequest(
                    model_name=bundle.name, inputs=[tensor], raw_input_contents=[pixels.tobytes()]
                ),
                timeout=30,
            )
            answer = np.frombuffer(response.raw_output_contents[0], np.float32)
            answers.append(answer.reshape(len(pixels), len(manifest.labels)))
    return np.concatenate(answers)


def gallery(test: Split, predictions: list[Prediction], bundle: Bundle) -> Table:
    """A few pictures and what they were taken for; first those that were taken wrongly."""
    wrong = [
        p.label != bundle.manifest.labels[t] for p, t in zip(predictions, test.labels, strict=True)
    ]
    chosen = sorted(range(len(test)), key=lambda position: not wrong[position])[:5]
    table = Table(*(f"this is a {bundle.manifest.labels[test.labels[n]]}" for n in chosen))
    table.add_row(*(picture(test.inputs[n]) for n in chosen))
    table.add_row(*("\n".join(f"{x.name}  {x.probability:.4f}" for x in predictions[n].labels) for n in chosen))  # fmt: skip
    return table


def picture(pixels: data.Pixels) -> Text:
    shades = np.array(list(" ░▒▓█"))
    rows = shades[pixels[..., 0].astype(int) * (len(shades) - 1) // 255]
    return Text("\n".join("".join(np.repeat(row, 2)) for row in rows))


def show_metrics(url: str) -> None:
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    values = dict(re.findall(r"^(convoy_\S+(?: \S+)*?) (\S+)$", text, re.MULTILINE))
    table = Table("metric", "value")
    for name, value in values.items():
        if re.match(
            r"convoy_(requests_total|images_total|batch_size_(sum|count)|.*_seconds_(sum|count))",
            name,
        ):
            table.add_row(name, f"{float(value):g}")
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
