"""Hands training images to the device, in groups of steps."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorflow as tf

from convoy_training.data.datasets import Dataset
from convoy_training.fitting.augmentation import Drawn, draw
from convoy_training.settings import TrainingSettings

# Steps are handed to TensorFlow in groups that take about so long: few enough calls to cost nothing,
# enough of them to see how far it is.
_CALL_S, _MOST_STEPS = 0.25, 64
# Several machines have to agree on it.
_STEPS_TOGETHER = 4


class Feeder:
    """Groups of steps for the device. A thread makes the next group ready while the device works on one.

    `batch` is the number of images in a step, over all replicas together.
    """

    def __init__(
        self,
        data: Dataset,
        settings: TrainingSettings,
        strategy: tf.distribute.Strategy,
        batch: int,
    ) -> None:
        self._data, self._settings, self._strategy = data, settings, strategy
        self._batch, self._replicas = batch, strategy.num_replicas_in_sync
        self._steps_per_epoch = math.ceil(len(data.train) / batch)
        self._steps = self._steps_per_epoch * settings.epochs
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._next: tuple[int, Any] | None = None
        self._drawn: tuple[int, Drawn] = (-1, Drawn(np.empty(0, np.int64), {}))
        self._count = 1 if self._replicas == 1 else _STEPS_TOGETHER

    def take(self, step: int) -> tuple[tuple[Any, ...], int]:
        """The arguments for the steps from `step` on, and how many these are."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._make, step, self._count))
        arguments, count = self._next[1].result()
        after = step + count
        self._next = (
            (after, self._pool.submit(self._make, after, self._count))
            if after < self._steps
            else None
        )
        return arguments, count

    def took(self, count: int, seconds: float) -> None:
        """Groups grow and shrink by two, as each size may be compiled anew."""
        if self._replicas > 1:
            return
        if seconds < _CALL_S / 2 and count == self._count < _MOST_STEPS:
            self._count *= 2
        elif seconds > _CALL_S * 2 and self._count > 1:
            self._count //= 2

    def _make(self, step: int, count: int) -> tuple[tuple[Any, ...], int]:
        epoch, done = divmod(step, self._steps_per_epoch)
        count = min(count, self._steps_per_epoch - done)
        batch = self._batch
        drawn = self._draw(epoch)
        # The last step is filled up from the epoch's beginning.
        order = np.resize(drawn.order, self._steps_per_epoch * batch)
        chosen = order[done * batch : (done + count) * batch].reshape(count, batch)

        def part(replica: int) -> tuple[Any, ...]:
            share = batch // self._replicas
            own = chosen[:, replica * share : (replica + 1) * share]
            how = {name: each[own] for name, each in drawn.how.items()}
            return self._data.train.inputs[own], self._data.train.labels[own], how

        if self._replicas == 1:
            return _constants(part(0)), count
        distribute = self._strategy.experimental_distribute_values_from_function
        mine = [
            distribute(
                lambda context, name=name: _constants(part(context.replica_id_in_sync_group))[name]
            )
            for name in range(3)
        ]
        return tuple(mine), count

    def _draw(self, epoch: int) -> Drawn:
        if self._drawn[0] != epoch:
            target, count = self._data.target, len(self._data.train)
            side = (target.height, target.width)
            self._drawn = (epoch, draw(self._settings, side, count, epoch))
        return self._drawn[1]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _constants(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tf.nest.map_structure(tf.constant, each) for each in values)
