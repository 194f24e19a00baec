"""The training loop, on one device or many: every step from weights, images and labels to better weights.

What chance decides in an epoch is drawn from the seed and the epoch's number alone. So a run that
was killed goes on exactly, and every machine of several knows what the others do.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset, class_weights
from convoy_training.evaluation.scores import score
from convoy_training.fitting import networks
from convoy_training.fitting.augmentation import augment, only_whole
from convoy_training.fitting.checkpoint import Checkpoint, checkpoint_folder
from convoy_training.fitting.devices import (
    TrainingFailed,
    agree,
    choose_precision,
    is_chief,
    read,
)
from convoy_training.fitting.feeder import Feeder
from convoy_training.settings import TrainingSettings

# How often a long epoch is put down in the middle.
_CHECKPOINT_S = 120.0


@dataclass(frozen=True)
class Epoch:
    """Figures of one pass over the training images, whose loss and accuracy are those during it.

    `seconds` without the validation; in `waited_s` of them the device had no images to work on.
    """

    epoch: int
    loss: float
    accuracy: float
    validation_accuracy: float
    validation_loss: float
    learning_rate: float
    seconds: float
    waited_s: float


class Fitted(NamedTuple):
    """The network with the weights to export, in float32, and how it came to them."""

    network: keras.Model
    epochs: list[Epoch]
    # The epoch whose weights these are.
    best_epoch: int
    # What convolutions were computed in.
    precision: str
    replicas: int
    # Whether this process publishes: of several machines one does.
    chief: bool
    # Removes the checkpoint, by which a run that is killed before goes on right here.
    forget: Callable[[], None]


def fit(
    data: Dataset,
    settings: TrainingSettings,
    strategy: tf.distribute.Strategy | None = None,
    start: list[npt.NDArray[Any]] | None = None,
    on_step: Callable[[int, int, float, float], None] = lambda step, steps, loss, accuracy: None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
    on_resume: Callable[[int, int], None] = lambda step, steps: None,
) -> Fitted:
    """Trains the network that `settings` name, from chance or from the weights `start`.

    `on_step` hears after every group of steps of the step, of how many, and of loss and accuracy so
    far in this epoch. Call `prepare` before, and two runs on one machine are the same, also where
    one was killed in between. Raises TrainingFailed where the loss is no number any more, where another
    machine is gone, or where machines have different images or checkpoints.
    """
    run = _Run(data, settings, strategy or tf.distribute.get_strategy(), start)
    try:
        return run.train(on_step, on_epoch, on_resume)
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.InternalError) as error:
        raise TrainingFailed(
            f"another machine of this training is gone ({error.message.splitlines()[0]}): start all "
            "of them again, and they go on from the last checkpoint"
        ) from error


class _Run:
    """One training: its network, its optimiser, and all that a checkpoint holds."""

    def __init__(
        self,
        data: Dataset,
        settings: TrainingSettings,
        strategy: tf.distribute.Strategy,
        start: list[npt.NDArray[Any]] | None,
    ) -> None:
        self.data, self.settings, self.strategy = data, settings, strategy
        self.precision = choose_precision(settings.precision)
        self.replicas = strategy.num_replicas_in_sync
        # No more than there are images, and as many for each replica.
        batch = min(settings.batch_size, len(data.train))
        self.batch = max(self.replicas, batch - batch % self.replicas)
        self.steps_per_epoch = math.ceil(len(data.train) / self.batch)
        self.steps = self.steps_per_epoch * settings.epochs
        with strategy.scope():
            self.network = networks.build(data, settings, precision=self.precision)
            if start is not None:
                _set(self.network, start)
            self.schedule = _schedule(settings, self.steps)
            self.optimizer = _optimizer(settings, self.schedule, self.precision)
            self.optimizer.build(self.network.trainable_variables)
            # Loss and right answers since they were last read.
            self._sums = [
                tf.Variable(
                    0.0,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.SUM,
                )
                for _ in range(2)
            ]
            self._averages = (
                [_mean_of(weight) for weight in self.network.weights] if settings.average else []
            )
        self.exported = (
            self.network
            if self.precision == "float32" and not settings.average and self.replicas == 1
            else networks.build(data, settings)
        )
        folder = checkpoint_folder(
            data, settings, self.network, self.precision, self.replicas, start
        )
        self.checkpoint = Checkpoint(folder, settings.resume, is_chief(strategy))
        self.history: list[Epoch] = []
        self.best: tuple[float, int, list[npt.NDArray[Any]]] | None = None

        @tf.function
        def infer(pixels: tf.Tensor) -> tf.Tensor:
            logits = self.exported(tf.cast(pixels, tf.float32), training=False)
            return tf.nn.softmax(logits)

        self._infer = infer
        self._train = self._make_step()

    # The steps, as TensorFlow runs them.

    def _make_step(self) -> Callable[..., Any]:
        settings, network, optimizer = self.settings, self.network, self.optimizer
        classes, batch = len(self.data.classes), self.batch
        weights = tf.constant(
            class_weights(self.data.train.labels, classes)
            if settings.class_weights
            else np.ones(classes, np.float32)
        )
        grey = tf.constant(networks.moments(self.data.train.inputs)[0], tf.float32)
        average = self._average if settings.average else lambda: None

        def one(pixels: tf.Tensor, truth: tf.Tensor, drawn: dict[str, tf.Tensor]) -> None:
            pixels = augment(pixels, drawn, grey, whole=only_whole(settings))
            targets = tf.one_hot(truth, classes)
            targets += settings.label_smoothing * (1 / classes - targets)
            with tf.GradientTape() as tape:
                logits = network(pixels, training=True)
                each = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
                # A share of the whole batch, whose other shares are with other replicas.
                loss = tf.reduce_sum(each * tf.gather(weights, truth)) / batch
                scaled = optimizer.scale_loss(loss) if self.precision == "float16" else loss
            gradients = tape.gradient(scaled, network.trainable_variables)
            # Adds up those of all replicas itself.
            optimizer.apply(gradients, network.trainable_variables)
            average()
            right = tf.argmax(logits, 1) == truth
            self._sums[0].assign_add(loss)
            self._sums[1].assign_add(tf.reduce_sum(tf.cast(right, tf.float32)) / batch)

        compiled = settings.xla == "on" or (
            settings.xla == "auto" and bool(tf.config.list_physical_devices("GPU"))
        )

        def single(step: tf.Tensor, pixels: Any, truth: Any, drawn: Any) -> None:
            one(pixels[step], truth[step], {name: each[step] for name, each in drawn.items()})

        @tf.function(jit_compile=compiled, reduce_retracing=not compiled)
        def several(count: tf.Tensor, *arguments: Any) -> None:
            for step in tf.range(count):
                single(step, *arguments)

        # Replicas wait for each other in every step, which TensorFlow allows outside of loops only.
        @tf.function
        def together(count: tf.Tensor, *arguments: Any) -> None:
            for step in tf.range(count):
                self.strategy.run(single, args=(step, *arguments))

        chosen: Callable[..., Any] = several if self.replicas == 1 else together
        return chosen

    def _average(self) -> None:
        # Less at the start, when there is little to remember.
        step = tf.cast(self.optimizer.iterations, tf.float32)
        decay = tf.minimum(self.settings.average, (1 + step) / (10 + step))
        for mean, weight in zip(self._averages, self.network.weights, strict=True):
            # A backbone may have counts among its weights.
            if not mean.dtype.is_floating:
                mean.assign(weight.value)
                continue
            mean.assign(mean * decay + tf.cast(weight.value, mean.dtype) * (1 - decay))

    # The loop.

    def train(
        self,
        on_step: Callable[[int, int, float, float], None],
        on_epoch: Callable[[Epoch], None],
        on_resume: Callable[[int, int], None],
    ) -> Fitted:
        step, seconds, waited = self._restore(), 0.0, 0.0
        if step:
            on_resume(step, self.steps)
        feeder = Feeder(self.data, self.settings, self.strategy, self.batch)
        saved = time.monotonic()
        with contextlib.closing(feeder):
            while step < self.steps and not self._stopped():
                epoch, done = divmod(step, self.steps_per_epoch)
                began = time.monotonic()
                arguments, count = feeder.take(step)
                ready = time.monotonic()
                self._train(tf.constant(count), *arguments)
                sums = [read(each) for each in self._sums]
                loss, right = (float(each) / (done + count) for each in sums)
                now = time.monotonic()
                seconds, waited = seconds + now - began, waited + ready - began
                feeder.took(count, now - ready)
                step += count
                if not math.isfinite(loss):
                    raise TrainingFailed(
                        f"the loss is {loss} at step {step} of {self.steps} (epoch {epoch + 1}): "
                        f"try a lower --learning-rate than {self.settings.learning_rate:g}"
                    )
                on_step(step, self.steps, loss, right)
                if step % self.steps_per_epoch == 0:
                    on_epoch(self._end_epoch(epoch + 1, loss, right, seconds, waited))
                    sums, seconds, waited = [np.zeros_like(each) for each in sums], 0.0, 0.0
                elif time.monotonic() - saved < _CHECKPOINT_S:
                    continue
                self._save(step, sums)
                saved = time.monotonic()
        if self.settings.patience and self.best:
            self.exported.set_weights(self.best[2])
        else:
            self._take_weights()
        best = self.best[1] if self.settings.patience and self.best else len(self.history)
        return Fitted(
            self.exported,
            self.history,
            best,
            self.precision,
            self.replicas,
            is_chief(self.strategy),
            self.checkpoint.remove,
        )

    def _stopped(self) -> bool:
        patience = self.settings.patience
        return bool(patience and self.best and len(self.history) - self.best[1] >= patience)

    def _end_epoch(
        self, number: int, loss: float, right: float, seconds: float, waited: float
    ) -> Epoch:
        self._take_weights()
        found = score(lambda pixels: self._infer(tf.constant(pixels)).numpy(), self.data.validation)
        rate = float(self.schedule(number * self.steps_per_epoch))
        epoch = Epoch(number, loss, right, found.accuracy, found.log_loss, rate, seconds, waited)
        self.history.append(epoch)
        for each in self._sums:
            each.assign(0.0)
        if self.settings.patience and (self.best is None or found.log_loss < self.best[0]):
            self.best = (found.log_loss, number, self.exported.get_weights())
        return epoch

    def _take_weights(self) -> None:
        """Puts what is to be exported into the network that is."""
        if self._averages:
            self.exported.set_weights([read(each) for each in self._averages])
        elif self.exported is not self.network:
            self.exported.set_weights([read(each) for each in self.network.weights])

    # What survives a kill.

    def _variables(self) -> list[Any]:
        """All that the rest of the training depends on but `_sums`; those of chance in layers among
        them.
        """
        return [*self.network.variables, *self.optimizer.variables, *self._averages]

    def _save(self, step: int, sums: list[npt.NDArray[Any]]) -> None:
        # The sums as they were read: reading them asks all machines, and each saves by its own clock.
        best = self.best
        state = {
            "step": step,
            "epochs": [asdict(epoch) for epoch in self.history],
            "best": best and [best[0], best[1]],
        }
        self.checkpoint.save(
            state,
            [*(read(v) for v in self._variables()), *sums],
            best[2] if best else [],
        )

    def _restore(self) -> int:
        """The step after the last that a killed run put down; 0 where there is none."""
        found = self.checkpoint.load()
        variables = [*self._variables(), *self._sums]
        if found is not None:
            state, arrays, best = found
            whole = [v.shape for v in variables] == [array.shape for array in arrays]
            if not whole or len(best) != (len(self.exported.weights) if state["best"] else 0):
                found = None
        # Before anything is assigned, in which machines take part together.
        agree(self.strategy, self.data, found[0]["step"] if found else 0)
        if found is None:
            return 0
        state, arrays, best = found
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        self.history = [Epoch(**epoch) for epoch in state["epochs"]]
        if state["best"]:
            self.best = (state["best"][0], state["best"][1], best)
        return int(state["step"])


def _mean_of(weight: Any) -> tf.Variable:
    """The running mean of `weight`, which begins with its value."""
    return tf.Variable(
        read(weight),
        trainable=False,
        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
    )


def _schedule(settings: TrainingSettings, steps: int) -> Any:
    warmup = max(1, int(steps * settings.warmup))
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=settings.learning_rate, warmup_steps=warmup
    )


def _optimizer(settings: TrainingSettings, schedule: Any, precision: str) -> Any:
    if settings.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(schedule, weight_decay=settings.weight_decay)
        if settings.weight_decay:
            optimizer.exclude_from_weight_decay(var_names=["bias", "beta", "gamma"])
    else:
        # Offsets too: by its high rate those of a normalisation would grow until bfloat16 has no
        # digits left for what they are added to.
        optimizer = keras.optimizers.SGD(
            schedule, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    return keras.optimizers.LossScaleOptimizer(optimizer) if precision == "float16" else optimizer


def _set(network: keras.Model, weights: list[npt.NDArray[Any]]) -> None:
    try:
        network.set_weights(weights)
    except ValueError as error:
        raise ConvoyError(
            f"the weights to start from are of another network: {error}; start from chance with "
            "--no-warm-start"
        ) from error
