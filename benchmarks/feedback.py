"""What the feedback store costs for each image: `python benchmarks/feedback.py`.

Microseconds on the loop's thread (`observe`, which callers wait for), and of CPU on the writer's (which
they don't): of each row kept, and of a request of which nothing is. Requests of one image each, a JPEG of
20 kB, or pixels of a blurred noise.
"""

import io
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from convoy_service.observers.feedback_writer import Feedback
from convoy_service.telemetry.counters import Metrics

CLASSES, IMAGES = 10, 500
SERVED = SimpleNamespace(
    name="m", version=1, manifest=SimpleNamespace(labels=[str(n) for n in range(CLASSES)])
)


def picture(seed: int, side: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    picture(seed, 256).save(buffer, "JPEG", quality=93)
    return buffer.getvalue()


def measure(what: str, inputs: list[Any], unsure: bool) -> None:
    """Prints what each of `inputs` costs; `unsure`: all are kept, else none is."""
    random = np.random.default_rng(0)
    requests = [
        SimpleNamespace(
            served=SERVED,
            inputs=[image],
            probabilities=random.dirichlet(np.ones(CLASSES), 1).astype(np.float32),
            unsure=np.array([unsure]),
        )
        for image in inputs
    ]
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics()
        feedback = Feedback(
            Path(folder), metrics, share=0.0, most_bytes=1_000_000_000, rotate_s=60.0
        )
        began, ours = time.process_time(), time.thread_time()
        for request in requests:
            feedback.observe(request)
        noted = time.thread_time()
        feedback.close(600.0)
        others = time.process_time() - began - (time.thread_time() - ours)
        written = dict(metrics.snapshot()["feedback_images"]).get(("m", "written"), 0)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
    each, kept = 1e6 / len(inputs), f"{written} kept, {size / 1e6:.1f} MB"
    print(f"{what:28} {(noted - ours) * each:8.1f} {others * each:8.0f}   {kept}")


def main() -> None:
    jpegs = [jpeg(seed) for seed in range(IMAGES)]
    print(f"JPEG: {np.mean([len(each) for each in jpegs]) / 1e3:.0f} kB on average")
    print(f"{'us for each image':28} {'loop':>8} {'writer':>8}")
    measure("(first, to warm up)", jpegs, True)
    measure("JPEG, not kept", jpegs, False)
    measure("JPEG, kept", jpegs, True)
    for side in (32, 96, 224):
        count = min(IMAGES, 30_000_000 // (side * side * 3 + 1000))
        pixels = [np.asarray(picture(seed, side)) for seed in range(count)]
        measure(f"pixels {side}x{side}x3, kept", pixels, True)


if __name__ == "__main__":
    main()
