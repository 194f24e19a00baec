"""How fast the training loop is beside Keras' own, and what a recipe costs.

python benchmarks/loop.py loop [--rounds 3] [--seconds 20]

`loop`: images a second of `convoy_training.fitting.loop` over those of Keras' `fit` with the same network, optimiser
and augmentation (flips and shifts, by Keras' own layers in a tf.data pipeline), both in float32; and of
ours in what it takes by itself on this machine. Rounds of both alternate. The images are noise, which
takes as long as any.
"""

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from convoy_service.artifacts.images import Target
from convoy_training.data.datasets import Dataset, Split
from convoy_training.settings import TrainingSettings

IMAGES, SIDE = 5120, 32
COMMON = TrainingSettings(
    epochs=1_000_000, flip=True, shift=4, optimizer="sgd", learning_rate=0.01, resume=False
)
NETWORKS = {
    "basic": replace(COMMON, filters=(32, 64), dense=256, batch_size=128),
    "strong": replace(
        COMMON, network="strong", filters=(64, 112, 128), dropout=0.0, batch_size=256
    ),
}


def dataset() -> Dataset:
    random = np.random.default_rng(0)
    inputs = random.integers(0, 256, (IMAGES, SIDE, SIDE, 3), np.uint8)
    split = Split(inputs, random.integers(0, 10, IMAGES))
    few = Split(inputs[:64], split.labels[:64])
    return Dataset("noise", tuple("abcdefghij"), Target(SIDE, SIDE, 3), split, few, few)


class _Enough(Exception):
    pass


def ours(settings: TrainingSettings, seconds: float) -> float:
    """Images a second from the second epoch on."""
    from convoy_training.fitting import devices
    from convoy_training.fitting import loop as fit

    rates: list[tuple[float, float]] = []

    def on_epoch(epoch: fit.Epoch) -> None:
        if epoch.epoch > 1:
            rates.append((epoch.seconds, epoch.waited_s))
        if sum(s for s, _ in rates) > seconds:
            raise _Enough

    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, checkpoints=Path(folder))
        with contextlib.suppress(_Enough):
            fit.fit(dataset(), settings, devices.prepare(0), on_epoch=on_epoch)
    took = sum(s for s, _ in rates)
    print(f"waited {sum(w for _, w in rates) / took:.4f}", file=sys.stderr)
    return IMAGES * len(rates) / took


def keras_fit(settings: TrainingSettings, seconds: float) -> float:
    """The same with `Model.fit`."""
    import keras
    import tensorflow as tf

    from convoy_training.fitting import networks as network

    data = dataset()
    keras.utils.set_random_seed(0)
    model = network.build(data, settings)
    layers = keras.layers
    change = keras.Sequential(
        [
            layers.RandomFlip("horizontal"),
            layers.RandomTranslation(
                settings.shift / SIDE, settings.shift / SIDE, interpolation="nearest"
            ),
        ]
    )
    pipeline = (
        tf.data.Dataset.from_tensor_slices((data.train.inputs, data.train.labels))
        .shuffle(IMAGES)
        .batch(settings.batch_size, drop_remainder=True)
        .map(
            lambda x, y: (change(tf.cast(x, tf.float32), training=True), y),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
        .prefetch(tf.data.AUTOTUNE)
    )
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True, weight_decay=0.01),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(pipeline, epochs=1, verbose=0)
    epochs, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        model.fit(pipeline, epochs=1, verbose=0)
        epochs += 1
    return IMAGES * epochs / (time.perf_counter() - began)


def loop(rounds: int, seconds: float) -> None:
    for name in NETWORKS:
        kinds = ("keras float32", "ours float32", "ours auto")
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind in kinds:
                done = subprocess.run(
                    [sys.executable, __file__, "one", name, kind, str(seconds)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                found[kind].append(float(done.stdout.splitlines()[-1]))
                print(f"{name:7} {kind:14} {found[kind][-1]:8.0f} images/s", flush=True)
        base = found["keras float32"]
        for kind in kinds[1:]:
            ratios = [mine / theirs for mine, theirs in zip(found[kind], base, strict=True)]
            print(
                f"{name:7} {kind} over Keras' fit: {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )


def main() -> int:
    if sys.argv[1:2] == ["one"]:
        name, kind, seconds = sys.argv[2:5]
        settings = NETWORKS[name]
        if kind == "keras float32":
            print(keras_fit(settings, float(seconds)))
        else:
            print(ours(replace(settings, precision=kind.split()[1]), float(seconds)))
        return 0
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("figure", choices=["loop"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20)
    arguments = parser.parse_args()
    loop(arguments.rounds, arguments.seconds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
