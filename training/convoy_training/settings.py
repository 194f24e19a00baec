"""The settings of `convoy train`, which recipes (TOML) may set too, and of `convoy models add`."""

from dataclasses import dataclass
from enum import Flag, auto
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import Parameter
from cyclopts.validators import Number

from convoy_service.settings import Count, CountOrAuto, ModelsFolder, Positive

RECIPES = Path(__file__).parent / "recipes"


def _two_poolings_fit(_: object, side: int) -> None:
    if 0 < side < 4:
        raise ValueError("Must be 4 or more, or 0 to have it chosen.")


Batch = Annotated[int, Parameter(validator=Number(gte=1, lte=4096))]
SideOrAuto = Annotated[int, Parameter(validator=(Number(gte=0, lte=4096), _two_poolings_fit))]
Amount = Annotated[float, Parameter(validator=Number(gte=0))]
Share = Annotated[float, Parameter(validator=Number(gte=0, lt=1))]
Floor = Annotated[float, Parameter(validator=Number(gte=0, lte=1))]


class Role(Flag):
    """What a training setting decides. Each field of TrainingSettings declares its roles in its type.

    Checkpoints, manifests and retrainings each disregard some settings. They find these by the roles.
    """

    RUN = auto()
    """Where one run reads, writes and reports, and how it is started. The manifest does not record it."""

    LABEL = auto()
    """A name alone, of a recipe or a model."""

    DATA = auto()
    """Which images there are, and what is done to all of them before training."""

    FIT = auto()
    """The weights that training comes to, or the model that they are for. A run resumes a killed one only
    where these settings are the same."""

    START = auto()
    """The weights that training starts from. Another start is no reason to train on the same data again."""

    EXPORT = auto()
    """What is made of the trained weights and published."""

    GATE = auto()
    """What a version has to prove before it is published."""

    ONCE = auto()
    """For one run: a retraining does not take over the setting from the version that it replaces."""


@dataclass(frozen=True)
class TrainingSettings:
    recipe: Annotated[str, Role.LABEL] = ""
    """A recipe by name (digits, folder, cifar10, cifar10-strong) or a TOML file; flags go before what it says.
    Default: digits for the built-in digits, folder for a folder."""

    data: Annotated[str, Role.DATA | Role.FIT] = "digits"
    """`digits` (scikit-learn's handwritten digits), a folder with one subfolder for each class (where it
    holds `train` and `test`, these are the splits), or a list: a .csv or .parquet file with the columns
    path and label, and split if it is given."""

    models: Annotated[ModelsFolder, Role.RUN | Role.ONCE] = Path("models")
    """Folder of models to publish into."""

    name: Annotated[str, Role.LABEL | Role.FIT | Role.ONCE] = ""
    """Name of the model. Default: that of the data, with - for what no name can have."""

    seed: Annotated[int, Role.FIT] = 0
    """Decides the first weights, the order of images and what is done to them."""

    split_seed: Annotated[int, Role.DATA | Role.FIT] = 0
    """Decides which images are held out, where the data has no splits of its own. Keep it: a version is
    compared with the next on images that neither has learned from."""

    test_share: Annotated[Share, Role.DATA | Role.FIT] = 0.2
    """Share of the images held out for the test, where the data has no test split of its own."""

    validation_share: Annotated[Share, Role.DATA | Role.FIT] = 0.1
    """Share of the training images that is not trained on but watched."""

    skip_unreadable: Annotated[bool, Role.DATA] = False
    """Leave out files that can't be read as images, in place of stopping."""

    cache: Annotated[str, Role.RUN] = "auto"
    """Folder that keeps decoded images, so that the next run need not decode them; auto takes convoy in
    $XDG_CACHE_HOME or ~/.cache, off keeps none."""

    image_size: Annotated[SideOrAuto, Role.DATA | Role.FIT] = 0
    """Height and width that images are brought to; 0 takes the median side of the data, at most
    128, rounded to a multiple of 8."""

    channels: Annotated[Literal[0, 1, 3], Role.DATA | Role.FIT] = 0
    """1 for grey, 3 for colour; 0 takes grey where every image looked at is grey."""

    resize: Annotated[Literal["stretch", "crop"], Role.DATA | Role.FIT] = "stretch"
    """How images of another shape are brought to size: all of it, or the centre in proportion."""

    network: Annotated[str, Role.FIT] = "basic"
    """basic (convolution, pooling, convolution, pooling, fully connected, output), strong (a compact
    residual network for small images), or a backbone of keras.applications by its name there, such
    as MobileNetV2."""

    filters: Annotated[tuple[Count, ...], Role.FIT] = (32, 64)
    """Filters of the convolutions: two for basic; for strong one for each stage, each of which halves
    the side."""

    kernel_size: Annotated[Count, Role.FIT] = 3
    """Of basic: height and width of the convolutions, in pixels."""

    dense: Annotated[Count, Role.FIT] = 128
    """Of basic: units of the fully connected layer."""

    dropout: Annotated[Share, Role.FIT] = 0.5
    """Share of the last hidden layer's outputs that is dropped in training."""

    weights: Annotated[Path | None, Role.FIT] = None
    """File of weights that a keras.applications backbone starts from (.weights.h5, .h5 or .keras, with
    or without its own head), for transfer learning. Default: it starts from chance."""

    frozen: Annotated[bool, Role.FIT] = False
    """Leave the backbone as its weights are, and train the output layer alone."""

    epochs: Annotated[Count, Role.FIT] = 30
    """Passes over the training images."""

    batch_size: Annotated[Count, Role.FIT] = 64
    """Images in a training step, over all devices and machines together."""

    optimizer: Annotated[Literal["adamw", "sgd"], Role.FIT] = "adamw"
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), or SGD with Nesterov's momentum of 0.9."""

    learning_rate: Annotated[Positive, Role.FIT] = 0.002
    """Peak of the schedule: a linear rise over --warmup, then half a cosine down to 0."""

    warmup: Annotated[Share, Role.FIT] = 0.1
    """Share of the steps in which the learning rate rises."""

    weight_decay: Annotated[Amount, Role.FIT] = 0.01
    """Share by which a step shrinks the kernels, times the learning rate; not those of
    normalisations, nor biases."""

    average: Annotated[Share, Role.FIT] = 0.0
    """Decay of a running mean of the weights, which is what is validated and exported (Polyak and
    Juditsky, 1992); 0 takes the weights themselves."""

    label_smoothing: Annotated[Share, Role.FIT] = 0.0
    """Share of the target's probability that is spread over all classes."""

    class_weights: Annotated[bool, Role.FIT] = False
    """Count images of rare classes more, in inverse proportion to how many there are."""

    shift: Annotated[Amount, Role.FIT] = 0.0
    """Training images are moved by up to so many pixels each way."""

    rotate: Annotated[Amount, Role.FIT] = 0.0
    """Training images are turned by up to so many degrees each way."""

    zoom: Annotated[Share, Role.FIT] = 0.0
    """Training images are scaled by up to this share, up or down."""

    flip: Annotated[bool, Role.FIT] = False
    """Training images are mirrored left to right: chance decides how in the first epoch, and from one
    epoch to the next it alternates (Jordan, arXiv:2404.00498)."""

    cutout: Annotated[Amount, Role.FIT] = 0.0
    """A square of this side, in pixels, is greyed out at a place of chance in training images (DeVries
    and Taylor, arXiv:1708.04552)."""

    colour: Annotated[Share, Role.FIT] = 0.0
    """Brightness, contrast and saturation of training images vary by up to this share."""

    patience: Annotated[CountOrAuto, Role.FIT] = 0
    """End after so many epochs without a better validation loss, with the best epoch's weights; 0
    trains to the end and takes the last ones."""

    precision: Annotated[Literal["auto", "float32", "bfloat16", "float16"], Role.FIT] = "auto"
    """What convolutions are computed in while training; weights and export stay float32. auto takes
    what the device computes fast: bfloat16 with AMX or on recent cards, float16 on older cards."""

    xla: Annotated[Literal["auto", "on", "off"], Role.FIT] = "auto"
    """Compile steps with XLA. auto: on a card only; on a CPU it was slower wherever it was measured."""

    checkpoints: Annotated[Path, Role.RUN | Role.ONCE] = Path(".convoy/checkpoints")
    """Folder of what a killed run needs to go on, removed when it has published, or after 30 days. Of
    several machines all have to see the same one."""

    resume: Annotated[bool, Role.RUN | Role.ONCE] = True
    """Go on where a run with the same settings and data was killed, to the weights that it would have
    come to. --no-resume begins anew."""

    tensorboard: Annotated[Path | None, Role.RUN | Role.ONCE] = None
    """Folder for TensorBoard's logs; none by default."""

    mlflow_uri: Annotated[str, Role.RUN | Role.ONCE] = ""
    """MLflow tracking server, or a folder, that hears of settings, figures and the published version.
    Needs the extra mlflow."""

    max_batch_size: Annotated[Batch, Role.EXPORT] = 64
    """Largest batch that the published version is served in."""

    mirror: Annotated[bool, Role.EXPORT] = False
    """Build into the exported graph that an answer is the mean of those to the image and to its mirror
    image: more accurate where flip makes sense, at twice the work."""

    storage: Annotated[Literal["float32", "int8"], Role.EXPORT] = "float32"
    """What the float32 graph's weights are stored in; they are computed with in float32 all the same.
    int8 rounds the trained network to the weights that its int8 graph has, before anything is
    measured, and both graphs share one file of them: a quarter of what the float32 graph took."""

    keep_weights: Annotated[bool, Role.EXPORT] = True
    """Publish the network's own weights beside the graphs, for --warm-start. As large as the float32
    graph."""

    variants: Annotated[tuple[Literal["int8", "fp16"], ...], Role.EXPORT] = ("int8", "fp16")
    """Graphs in other precisions that are published beside the float32 one, where each passes the gate:
    int8 by static quantisation, fp16 for cards."""

    min_accuracy: Annotated[Floor, Role.GATE] = 0.0
    """Gate: least accuracy on the test images."""

    min_recall: Annotated[Floor, Role.GATE] = 0.0
    """Gate: least share of a class's test images that must be found, in the worst class."""

    max_calibration_error: Annotated[Floor, Role.GATE] = 1.0
    """Gate: largest expected calibration error on the test images, after scaling."""

    max_parity: Annotated[Amount, Role.GATE] = 1e-4
    """Gate: largest difference allowed between the ONNX file's probabilities and the network's."""

    min_agreement: Annotated[Floor, Role.GATE] = 1.0
    """Gate: least share of test images that both give the same label."""

    max_regression: Annotated[Floor, Role.GATE] = 0.01
    """Gate: how much less accurate than the version that serves it may be, on the same images."""

    significance: Annotated[float, Parameter(validator=Number(gt=0, lt=1)), Role.GATE] = 0.05
    """Gate: being worse than the version that serves is held for real, however small, where chance alone
    would show it more seldom than this (McNemar's exact test, one-sided)."""

    max_variant_loss: Annotated[Floor, Role.GATE] = 0.005
    """Gate: how much less accurate than the float32 graph one in another precision may be."""

    max_slowdown: Annotated[float, Parameter(validator=Number(gte=1)), Role.GATE] = 2.0
    """Gate: how many times slower than the version that serves it may be, on the same machine."""

    max_megabytes: Annotated[Positive, Role.GATE] = 500.0
    """Gate: largest size of the version's graphs together, in megabytes (10^6 bytes)."""

    compare: Annotated[bool, Role.GATE | Role.ONCE] = True
    """Gate: compare with the version that serves. --no-compare publishes without, as when the classes
    are meant to be others than before."""

    retrain: Annotated[bool, Role.RUN | Role.ONCE] = False
    """For schedulers: end with 0 where a version was published, 3 where it is not better than what
    serves, 4 where there is nothing new (the same images and settings as what serves was made of, or as
    were tried in vain), 1 for errors."""

    base: Annotated[Path | None, Role.RUN | Role.ONCE] = None
    """With --retrain: folder of the model to be replaced, models/<name>; its settings are taken where
    neither flags nor a recipe say otherwise."""

    warm_start: Annotated[bool, Role.START | Role.FIT | Role.ONCE] = False
    """With --retrain: start from the serving version's weights, not from chance."""

    summary: Annotated[Path | None, Role.RUN | Role.ONCE] = None
    """File that gets what came of the run, as JSON."""

    textfile: Annotated[Path | None, Role.RUN | Role.ONCE] = None
    """File that gets the run's figures for Prometheus' node exporter (textfile collector)."""


def roles(settings: type[Any]) -> dict[str, Role]:
    """The roles of each field of the dataclass `settings`, by name.

    Raises TypeError for a field whose type declares no role, or more than one annotation with roles.
    """
    declared = {}
    for name, hint in get_type_hints(settings, include_extras=True).items():
        found = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Role)]
        if len(found) != 1:
            raise TypeError(
                f"{settings.__name__}.{name} declares {len(found)} roles: write its type as "
                "Annotated[..., Role.A | Role.B]"
            )
        declared[name] = found[0]
    return declared


_ROLES = roles(TrainingSettings)


def with_role(wanted: Role) -> frozenset[str]:
    """The names of the training settings that have at least one of the `wanted` roles."""
    return frozenset(name for name, declared in _ROLES.items() if declared & wanted)


@dataclass(frozen=True)
class AddSettings:
    labels: Path | None = None
    """Text file with a class a line, in the order of the outputs. Default: class 0, class 1, ..."""

    models: ModelsFolder = Path("models")
    """Folder of models to add to."""

    scale: tuple[float, ...] = ()
    """Float models: pixels (0 to 255) are multiplied by this; one number, or one a channel. With
    --mean and --std only, 1/255, as is usual."""

    mean: tuple[float, ...] = ()
    """Float models: then this is taken away; one number, or one a channel."""

    std: tuple[float, ...] = ()
    """Float models: then it is divided by this; one number, or one a channel."""

    layout: Literal["auto", "nhwc", "nchw"] = "auto"
    """Order of the model's input axes; auto tells by where the 1 or 3 channels are."""

    softmax: bool = False
    """The model gives logits: build the softmax in."""

    image_size: SideOrAuto = 0
    """Height and width, where the file leaves them open."""

    resize: Literal["stretch", "crop"] = "stretch"
    """How images of another shape are brought to size."""

    max_batch_size: Batch = 64
    """Largest batch that it is served in, where the file leaves the batch axis open."""
