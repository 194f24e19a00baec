"""What `convoy bulk` costs over the model alone, in one run: images a second, and as a ratio.

python benchmarks/bulk.py [--runs 3]

Two kinds of images: small PNGs for the shipped digits (decoding is nearly all there is to do), and
JPEGs of 500x375 for the shipped cifar10. Each round does the same images in turn by the model alone (from pixels, in
batches of the largest size), by a plain loop (read, decode, run) in one thread, and by `convoy bulk`
with one actor of one core on a Ray that it starts for itself. Of the latter counts what is written
between its first file of answers and its last, so not how long Ray takes to start, which is shown
beside it. All have the same priority. Then the most memory that a worker takes, for few images and
for many.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from convoy.bulk import job as jobs
from convoy.bulk.settings import BulkSettings
from convoy.bulk.work import Worker
from convoy_service.artifacts import images
from convoy_service.artifacts import reader as bundles
from convoy_service.artifacts.reader import Bundle
from convoy_service.engine.onnx_model import Model

MODELS = Path(__file__).resolve().parent.parent / "models"
KINDS = {"digits": (20_000, (28, 28), "PNG"), "cifar10": (1_500, (500, 375), "JPEG")}


def make(folder: Path, count: int, size: tuple[int, int], kind: str) -> None:
    """Images that all differ, smooth as photographs are."""
    random = np.random.default_rng(0)
    channels = 1 if kind == "PNG" else 3
    folder.mkdir()
    for number in range(count):
        coarse = random.integers(0, 256, (8, 8, channels), np.uint8)
        image = Image.fromarray(coarse[..., 0] if channels == 1 else coarse)
        image.resize(size, Image.Resampling.BICUBIC).save(
            folder / f"{number:06d}.{kind.lower()}", kind
        )


def alone(bundle: Bundle, folder: Path) -> tuple[float, float]:
    """Images a second of the model, and of the plain loop."""
    model = Model.load(bundle, "cpu", 1)
    size, target = bundle.manifest.max_batch_size, bundle.manifest.pixels
    pixels, model_s = [], 0.0
    began = time.perf_counter()
    files = sorted(folder.iterdir())
    for start in range(0, len(files), size):
        batch = np.stack(
            [images.decode(file.read_bytes(), target) for file in files[start : start + size]]
        )
        model.run(batch)
        pixels.append(batch)
    loop_s = time.perf_counter() - began
    began = time.perf_counter()
    for batch in pixels:
        model.run(batch)
    model_s = time.perf_counter() - began
    return len(files) / model_s, len(files) / loop_s


def bulk(name: str, folder: Path, per_file: int) -> tuple[float, float]:
    """Images a second of `convoy bulk`, and the seconds before and after them."""
    with tempfile.TemporaryDirectory() as to:
        began = time.time()
        command = [sys.executable, "-m", "convoy", "bulk", str(folder), f"{to}/out"]
        command += ["--models", str(MODELS), "--model", name, "--actors", "1", "--device", "cpu"]
        command += ["--images-per-file", str(per_file)]
        # Ray would run its workers at a lower priority.
        environment = {**os.environ, "RAY_worker_niceness": "0"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        whole_s = time.time() - began
        written = sorted(file.stat().st_mtime for file in Path(to, "out").glob("part-*"))
    count = len(list(folder.iterdir()))
    rate = (count - count / len(written)) / (written[-1] - written[0])
    return rate, whole_s - count / rate


def memory(name: str, folder: Path, count: int) -> int:
    """Megabytes of a worker's process at most, for the images so often."""
    code = "import sys; from benchmarks.bulk import work; work(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(folder), str(count)],
        cwd=MODELS.parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return int(done.stdout)


def work(name: str, folder: str, count: str) -> None:
    bundle = bundles.read(MODELS / name / "1")
    with tempfile.TemporaryDirectory() as to:
        job = jobs.begin(folder, to, bundle, BulkSettings())
        worker = Worker(job, bundle)
        for number in range(int(count)):
            worker.do(job.parts[number % len(job.parts)])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    for name, (count, size, kind) in KINDS.items():
        bundle = bundles.read(MODELS / name / "1")
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made, "in")
            make(folder, count, size, kind)
            rounds = []
            for _ in range(arguments.runs):
                model, loop = alone(bundle, folder)
                rate, around_s = bulk(name, folder, count // 20)
                rounds.append((model, loop, rate, around_s))
                print(
                    f"{name}: model {model:.0f}/s, loop {loop:.0f}/s, bulk {rate:.0f}/s",
                    file=sys.stderr,
                )
            found = {
                "images": f"{count} {kind} of {size[0]}x{size[1]}",
                "model": median(each[0] for each in rounds),
                "loop": median(each[1] for each in rounds),
                "bulk": median(each[2] for each in rounds),
                "bulk_over_model": median(each[2] / each[0] for each in rounds),
                "bulk_over_loop": median(each[2] / each[1] for each in rounds),
                "around_s": median(each[3] for each in rounds),
                "worker_mb": {parts: memory(name, folder, parts) for parts in (1, 4)},
            }
        print(json.dumps({name: found}))


if __name__ == "__main__":
    main()
