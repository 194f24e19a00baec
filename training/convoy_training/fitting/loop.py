"""The training loop, on one device or many: every step from weights, images and labels to better weights.

What chance decides in an epoch is drawn from the seed and the epoch's number alone. So a run that
was killed goes on exactly, and every machine of several knows what the others do.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from convoy_service.artifacts.files import replacing
from convoy_service.errors import ConvoyError
from convoy_training.data.datasets import Dataset, class_weights
from convoy_training.evaluation.scores import score
from convoy_training.fitting import networks
from convoy_training.settings import TrainingSettings

log = logging.getLogger("convoy.fit")

# Steps are handed to TensorFlow in groups that take about so long: few enough calls to cost nothing,
# enough of them to see how far it is.
_CALL_S, _MOST_STEPS = 0.25, 64
# Several machines have to agree on it.
_STEPS_TOGETHER = 4

# How often a long epoch is put down in the middle.
_CHECKPOINT_S = 120.0

# A part of the checkpoint's name: a run goes on only from a checkpoint that the same loop wrote.
# Raise it with each change to this file or to networks.py that comes to other weights from the same
# settings and data, or that writes other contents to the checkpoint. Comments and names do not count.
LOOP_VERSION = 1

_FILE = "checkpoint.npz"
# Nobody goes on with one that is older.
_ABANDONED_S = 30 * 24 * 3600.0


class TrainingFailed(ConvoyError):
    """Training can't go on; the text says at which step and what to try."""


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
                [
                    tf.Variable(
                        _read(weight),
                        trainable=False,
                        aggregation=tf.VariableAggregation.ONLY_FIRST_REPLICA,
                    )
                    for weight in self.network.weights
                ]
                if settings.average
                else []
            )
        self.exported = (
            self.network
            if self.precision == "float32" and not settings.average and self.replicas == 1
            else networks.build(data, settings)
        )
        self.checkpoint = _Checkpoint(self._folder(start), settings.resume, _chief(strategy))
        self.history: list[Epoch] = []
        self.best: tuple[float, int, list[npt.NDArray[Any]]] | None = None

        @tf.function
        def infer(pixels: tf.Tensor) -> tf.Tensor:
            logits = self.exported(tf.cast(pixels, tf.float32), training=False)
            return tf.nn.softmax(logits)

        self._infer = infer
        self._train = self._make_step()

    def _folder(self, start: list[npt.NDArray[Any]] | None) -> Path:
        """Where checkpoints of a run with these settings, data and first weights lie."""
        elsewhere = {
            "models", "checkpoints", "resume", "tensorboard", "mlflow_uri", "summary", "textfile",
            "retrain", "base", "compare", "variants", "cache", "skip_unreadable", "recipe", "mirror",
            "storage", "significance", "keep_weights",
        }  # fmt: skip
        kept = {
            name: value
            for name, value in asdict(self.settings).items()
            if name not in elsewhere and not name.startswith(("min_", "max_"))
        }
        known = [kept, self.data.train.fingerprint(), self.precision, self.replicas]
        known += [self.data.validation.fingerprint(), keras.__version__, tf.__version__]
        known += [[list(weight.shape) for weight in self.network.weights]]
        known += [LOOP_VERSION]
        digest = hashlib.sha256(json.dumps(known, default=str).encode())
        for weight in start or ():
            digest.update(weight.tobytes())
        if self.settings.weights:
            digest.update(self.settings.weights.read_bytes())
        return self.settings.checkpoints / f"{self.data.name}-{digest.hexdigest()[:12]}"

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
        feeder = _Feeder(self)
        saved = time.monotonic()
        with contextlib.closing(feeder):
            while step < self.steps and not self._stopped():
                epoch, done = divmod(step, self.steps_per_epoch)
                began = time.monotonic()
                arguments, count = feeder.take(step)
                ready = time.monotonic()
                self._train(tf.constant(count), *arguments)
                sums = [_read(each) for each in self._sums]
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
            _chief(self.strategy),
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
            self.exported.set_weights([_read(each) for each in self._averages])
        elif self.exported is not self.network:
            self.exported.set_weights([_read(each) for each in self.network.weights])

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
            [*(_read(v) for v in self._variables()), *sums],
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
        self._agree(found[0]["step"] if found else 0)
        if found is None:
            return 0
        state, arrays, best = found
        for variable, array in zip(variables, arrays, strict=True):
            variable.assign(array)
        self.history = [Epoch(**epoch) for epoch in state["epochs"]]
        if state["best"]:
            self.best = (state["best"][0], state["best"][1], best)
        return int(state["step"])

    def _agree(self, step: int) -> None:
        """Raises TrainingFailed where machines have other images than others, or go on elsewhere: they
        would wait for each other in vain, or train different networks.
        """
        if self.replicas == 1:
            return
        mine = [step, int(self.data.train.fingerprint()[:6], 16)]

        def add() -> tf.Tensor:
            told = tf.constant([*mine, *(number**2 for number in mine)], tf.int64)
            return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, told)

        told = self.strategy.experimental_local_results(self.strategy.run(tf.function(add)))[0]
        sums, squares = np.split(told.numpy(), 2)
        # All are the same where nothing varies.
        if (self.replicas * squares != sums**2).any():
            raise TrainingFailed(
                f"this machine begins at step {step} with {len(self.data.train)} training images, and "
                "others elsewhere, or with other images: give all the same data, and one "
                "--checkpoints that all of them reach"
            )


def _read(variable: Any) -> npt.NDArray[Any]:
    """The value of a variable of Keras or TensorFlow, which all replicas hold, or share as a sum."""
    inner = getattr(variable, "value", variable)
    value = variable if callable(inner) else inner
    return np.asarray(value.numpy() if hasattr(value, "numpy") else value.read_value().numpy())


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


def _chief(strategy: tf.distribute.Strategy) -> bool:
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


# Augmentation.


def draw(settings: TrainingSettings, side: tuple[int, int], count: int, epoch: int) -> "Drawn":
    """What chance decides about `count` training images in an epoch: the order, and for each image
    what is done to it, see `augment`.
    """
    height, width = side
    random = np.random.default_rng([settings.seed, epoch])
    order = random.permutation(count)
    how: dict[str, npt.NDArray[np.float32]] = {}
    moved = settings.shift or settings.flip or settings.rotate or settings.zoom
    if moved:
        # From a place in the result to the place in the image that is shown there.
        shift = random.uniform(-settings.shift, settings.shift, (count, 2))
        if only_whole(settings):
            most = int(settings.shift)
            shift = random.integers(-most, most, (count, 2), endpoint=True).astype(float)
        angle = np.radians(random.uniform(-settings.rotate, settings.rotate, count))
        scale = 1 + random.uniform(-settings.zoom, settings.zoom, count)
        mirror = np.ones(count)
        if settings.flip:
            first = np.random.default_rng(settings.seed).integers(0, 2, count)
            mirror = np.where((first + epoch) % 2, -1.0, 1.0)
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        centre_x, centre_y = (width - 1) / 2, (height - 1) / 2
        left, top = centre_x + shift[:, 0], centre_y + shift[:, 1]
        matrix = np.zeros((count, 8), np.float32)
        # Mirrored, then turned and scaled about the centre, then moved.
        matrix[:, 0], matrix[:, 1] = mirror * cos, -mirror * sin
        matrix[:, 3], matrix[:, 4] = sin, cos
        matrix[:, 2] = centre_x - mirror * (cos * left - sin * top)
        matrix[:, 5] = centre_y - (sin * left + cos * top)
        how["matrix"] = matrix
    if settings.cutout:
        place = random.uniform(0, 1, (count, 2)) * (height, width)
        half = np.full((count, 1), settings.cutout / 2)
        how["cutout"] = np.concatenate([place, half], axis=1).astype(np.float32)
    if settings.colour:
        how["colour"] = random.uniform(1 - settings.colour, 1 + settings.colour, (count, 3)).astype(
            np.float32
        )
    return Drawn(order, how)


class Drawn(NamedTuple):
    """The order of images, and for each, in the order of the data, what is done to it."""

    order: npt.NDArray[np.int64]
    how: dict[str, npt.NDArray[np.float32]]


def only_whole(settings: TrainingSettings) -> bool:
    """Whether images are only moved by whole pixels, so that none is blurred."""
    return settings.shift == int(settings.shift) and not settings.rotate and not settings.zoom


def augment(
    pixels: tf.Tensor, how: dict[str, tf.Tensor], grey: tf.Tensor, *, whole: bool
) -> tf.Tensor:
    """uint8 `[N, H, W, C]` as float32, changed as `draw` says; `grey` `[C]` fills what is cut out.

    `whole`: images only move by whole pixels.
    """
    images = pixels
    if "matrix" in how:
        images = tf.raw_ops.ImageProjectiveTransformV3(
            # Between whole numbers a uint8 has no values.
            images=images if whole else tf.cast(images, tf.float32),
            transforms=how["matrix"],
            output_shape=tf.shape(images)[1:3],
            fill_value=0.0,
            interpolation="NEAREST" if whole else "BILINEAR",
            fill_mode="REFLECT",
        )
    images = tf.cast(images, tf.float32)
    if "colour" in how:
        brightness, contrast, saturation = (
            how["colour"][:, each, tf.newaxis, tf.newaxis, tf.newaxis] for each in range(3)
        )
        mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)
        images = ((images - mean) * contrast + mean) * brightness
        colourless = tf.reduce_mean(images, axis=3, keepdims=True)
        images = tf.clip_by_value(colourless + (images - colourless) * saturation, 0.0, 255.0)
    if "cutout" in how:
        middle, half = how["cutout"][:, :2], how["cutout"][:, 2:]
        rows = tf.range(tf.shape(images)[1], dtype=tf.float32) + 0.5
        columns = tf.range(tf.shape(images)[2], dtype=tf.float32) + 0.5
        tall = tf.abs(rows - middle[:, :1]) < half
        wide = tf.abs(columns - middle[:, 1:]) < half
        hole = tall[:, :, tf.newaxis] & wide[:, tf.newaxis, :]
        images = tf.where(hole[..., tf.newaxis], grey, images)
    return images


class _Feeder:
    """Groups of steps for the device, the next one made ready while it works on one."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._next: tuple[int, Any] | None = None
        self._drawn: tuple[int, Drawn] = (-1, Drawn(np.empty(0, np.int64), {}))
        self._count = 1 if run.replicas == 1 else _STEPS_TOGETHER

    def take(self, step: int) -> tuple[tuple[Any, ...], int]:
        """The arguments for the steps from `step` on, and how many these are."""
        if self._next is None or self._next[0] != step:
            self._next = (step, self._pool.submit(self._make, step, self._count))
        arguments, count = self._next[1].result()
        after = step + count
        self._next = (
            (after, self._pool.submit(self._make, after, self._count))
            if after < self._run.steps
            else None
        )
        return arguments, count

    def took(self, count: int, seconds: float) -> None:
        """Groups grow and shrink by two, as each size may be compiled anew."""
        if self._run.replicas > 1:
            return
        if seconds < _CALL_S / 2 and count == self._count < _MOST_STEPS:
            self._count *= 2
        elif seconds > _CALL_S * 2 and self._count > 1:
            self._count //= 2

    def _make(self, step: int, count: int) -> tuple[tuple[Any, ...], int]:
        run = self._run
        epoch, done = divmod(step, run.steps_per_epoch)
        count = min(count, run.steps_per_epoch - done)
        drawn = self._draw(epoch)
        # The last step is filled up from the epoch's beginning.
        order = np.resize(drawn.order, run.steps_per_epoch * run.batch)
        chosen = order[done * run.batch : (done + count) * run.batch].reshape(count, run.batch)

        def part(replica: int) -> tuple[Any, ...]:
            share = run.batch // run.replicas
            own = chosen[:, replica * share : (replica + 1) * share]
            how = {name: each[own] for name, each in drawn.how.items()}
            return run.data.train.inputs[own], run.data.train.labels[own], how

        if run.replicas == 1:
            return _constants(part(0)), count
        distribute = run.strategy.experimental_distribute_values_from_function
        mine = [
            distribute(
                lambda context, name=name: _constants(part(context.replica_id_in_sync_group))[name]
            )
            for name in range(3)
        ]
        return tuple(mine), count

    def _draw(self, epoch: int) -> Drawn:
        if self._drawn[0] != epoch:
            data = self._run.data
            side = (data.target.height, data.target.width)
            self._drawn = (epoch, draw(self._run.settings, side, len(data.train), epoch))
        return self._drawn[1]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def _constants(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tf.nest.map_structure(tf.constant, each) for each in values)


# Checkpoints.


class _Checkpoint:
    """A folder in which a run is put down, and from which one with the same settings goes on."""

    def __init__(self, folder: Path, resume: bool, writes: bool) -> None:
        self._folder, self._resume, self._writes = folder, resume, writes
        if writes:
            for left in folder.parent.glob(f"*/{_FILE}"):
                with contextlib.suppress(OSError):
                    if time.time() - left.stat().st_mtime > _ABANDONED_S:
                        shutil.rmtree(left.parent, ignore_errors=True)

    def save(
        self,
        state: dict[str, Any],
        arrays: list[npt.NDArray[Any]],
        best: list[npt.NDArray[Any]],
    ) -> None:
        """Raises ConvoyError where the disk refuses; what was saved before stays."""
        if not self._writes:
            return
        # One file, so that a kill leaves the one before or this one, never parts of both.
        named = {f"v{n}": array for n, array in enumerate(arrays)}
        named.update({f"b{n}": array for n, array in enumerate(best)})
        try:
            try:
                self._write(state, named)
            except FileNotFoundError:
                # Another run of the same has ended, and removed the folder.
                self._write(state, named)
        except OSError as error:
            raise ConvoyError(
                f"the checkpoint could not be written to {self._folder}: {error.strerror or error}; "
                "make room and start again: it goes on from the one before"
            ) from error

    def _write(self, state: dict[str, Any], named: dict[str, npt.NDArray[Any]]) -> None:
        # Each run its own: of two that are the same, either's checkpoint does for both.
        temporary = f".{os.getpid()}.{_FILE}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self._folder / _FILE, temporary=temporary) as file:
            np.savez(file, allow_pickle=False, state=np.array(json.dumps(state)), **named)

    def load(
        self,
    ) -> tuple[dict[str, Any], list[npt.NDArray[Any]], list[npt.NDArray[Any]]] | None:
        """What was saved last; None where there is nothing, or nothing that can be read."""
        if not self._resume:
            return None
        try:
            # Opened here: where np.load raises, it leaves the file open.
            with (
                (self._folder / _FILE).open("rb") as file,
                np.load(file, allow_pickle=False) as found,
            ):
                state = json.loads(str(found["state"]))
                return state, list(_numbered(found, "v")), list(_numbered(found, "b"))
        except FileNotFoundError:
            return None
        # A damaged file makes the readers of zip and numpy raise anything.
        except Exception as error:
            log.warning(
                "%s is of no use, and training begins anew: %s", self._folder / _FILE, error
            )
            return None

    def remove(self) -> None:
        if self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)


def _numbered(found: Any, prefix: str) -> Iterator[npt.NDArray[Any]]:
    number = 0
    while f"{prefix}{number}" in found:
        yield found[f"{prefix}{number}"]
        number += 1
