"""The training loop: every step from weights, images and labels to better weights."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from service.errors import ConvoyError
from training.data import Dataset
from training.evaluate import score
from training.settings import TrainingSettings


class TrainingFailed(ConvoyError):
    """Training can't go on; the text says at which step and what to try."""


@dataclass(frozen=True)
class Epoch:
    """Figures of one pass over the training images; `seconds` without the validation."""

    epoch: int
    loss: float
    accuracy: float
    validation_accuracy: float
    validation_loss: float
    seconds: float


def prepare(seed: int) -> None:
    """Makes what follows in this process the same at each run with the same `seed`."""
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()


def fit(
    network: keras.Model,
    data: Dataset,
    settings: TrainingSettings,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Trains `network` in place and returns what each epoch came to.

    AdamW under a cosine with warm-up. Call `prepare` before the network is built, and two runs on
    one machine are the same. Raises TrainingFailed where the loss is no number any more.
    """
    images, labels = data.train.inputs, data.train.labels
    steps_per_epoch = math.ceil(len(labels) / settings.batch_size)
    steps = steps_per_epoch * settings.epochs
    warmup = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=settings.learning_rate, warmup_steps=warmup
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=settings.weight_decay)
    loss_of = keras.losses.CategoricalCrossentropy(
        from_logits=True, label_smoothing=settings.label_smoothing
    )
    optimizer.build(network.trainable_variables)
    classes = len(data.classes)

    @tf.function(reduce_retracing=True)
    def train_step(pixels: tf.Tensor, truth: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            logits = network(tf.cast(pixels, tf.float32), training=True)
            loss = loss_of(tf.one_hot(truth, classes), logits)
        gradients = tape.gradient(loss, network.trainable_variables)
        optimizer.apply(gradients, network.trainable_variables)
        hits = tf.reduce_sum(tf.cast(tf.argmax(logits, 1) == truth, tf.int32))
        return loss, hits

    @tf.function(reduce_retracing=True)
    def infer(pixels: tf.Tensor) -> tf.Tensor:
        return tf.nn.softmax(network(tf.cast(pixels, tf.float32), training=False))

    random = np.random.default_rng(settings.seed)
    history: list[Epoch] = []
    step = 0
    for number in range(1, settings.epochs + 1):
        began, total, hits = time.monotonic(), 0.0, 0
        order = random.permutation(len(labels))
        for start in range(0, len(order), settings.batch_size):
            chosen = order[start : start + settings.batch_size]
            loss, right = train_step(tf.constant(images[chosen]), tf.constant(labels[chosen]))
            step += 1
            value = float(loss)
            if not math.isfinite(value):
                raise TrainingFailed(
                    f"the loss is {value} at step {step} of {steps} (epoch {number}): "
                    f"try a lower --learning-rate than {settings.learning_rate:g}"
                )
            total += value * len(chosen)
            hits += int(right)
            on_step(step, steps, value)
        seconds = time.monotonic() - began
        validation = score(lambda pixels: infer(tf.constant(pixels)).numpy(), data.validation)
        epoch = Epoch(
            number,
            total / len(labels),
            hits / len(labels),
            validation.accuracy,
            validation.log_loss,
            seconds,
        )
        history.append(epoch)
        on_epoch(epoch)
    return history
