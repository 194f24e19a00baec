"""The devices and machines that a training runs on, and what they have to agree on."""

import contextlib
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset


class TrainingFailed(ConvoyError):
    """Training can't go on; the text says at which step and what to try."""


def prepare(seed: int) -> tf.distribute.Strategy:
    """The devices to train on: all machines that `TF_CONFIG` names, else all cards of this one, else
    the CPU. Makes what follows in this process the same at each run with the same `seed`.
    """
    # First of all: it has to find TensorFlow as it was loaded.
    strategy = _strategy()
    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    return strategy


def _strategy() -> tf.distribute.Strategy:
    if os.environ.get("TF_CONFIG"):
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        # Whatever is wrong with the addresses, TensorFlow raises its own.
        except Exception as error:
            raise TrainingFailed(f"the machines that TF_CONFIG names: {error}") from error
    cards = tf.config.list_physical_devices("GPU")
    return tf.distribute.MirroredStrategy() if len(cards) > 1 else tf.distribute.get_strategy()


def choose_precision(wanted: str) -> str:
    """What `settings.precision` comes to on this machine."""
    if wanted != "auto":
        return wanted
    cards = tf.config.list_physical_devices("GPU")
    if cards:
        capability = tf.config.experimental.get_device_details(cards[0]).get("compute_capability")
        newer, older = (8, 0), (7, 0)
        if not capability or capability < older:
            return "float32"
        return "bfloat16" if capability >= newer else "float16"
    # AMX multiplies in bfloat16; without it, it would be no faster, and coarser.
    with contextlib.suppress(OSError):
        if "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"):
            return "bfloat16"
    return "float32"


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process publishes: of several machines one does."""
    resolver = getattr(strategy, "cluster_resolver", None)
    return (
        resolver is None
        or resolver.task_type in {None, "chief"}
        or (
            resolver.task_type == "worker"
            and resolver.task_id == 0
            and "chief" not in resolver.cluster_spec().jobs
        )
    )


def read(variable: Any) -> npt.NDArray[Any]:
    """The value of a variable of Keras or TensorFlow, which all replicas hold, or share as a sum."""
    inner = getattr(variable, "value", variable)
    value = variable if callable(inner) else inner
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value.read_value().numpy())


def agree(strategy: tf.distribute.Strategy, data: Dataset, step: int) -> None:
    """Asks all machines whether they have the same images and begin at the same `step`.

    Machines that differ would wait for each other in vain, or train different networks. Raises
    TrainingFailed where they differ.
    """
    replicas = strategy.num_replicas_in_sync
    if replicas == 1:
        return
    mine = [step, int(data.train.fingerprint()[:6], 16)]

    def add() -> tf.Tensor:
        told = tf.constant([*mine, *(number**2 for number in mine)], tf.int64)
        return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, told)

    told = strategy.experimental_local_results(strategy.run(tf.function(add)))[0]
    sums, squares = np.split(told.numpy(), 2)
    # All are the same where nothing varies.
    if (replicas * squares != sums**2).any():
        raise TrainingFailed(
            f"this machine begins at step {step} with {len(data.train)} training images, and "
            "others elsewhere, or with other images: give all the same data, and one "
            "--checkpoints that all of them reach"
        )
