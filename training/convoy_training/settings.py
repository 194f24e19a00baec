"""The settings of `convoy train`, which recipes (TOML) may set too, and of `convoy models add`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

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


@dataclass(frozen=True)
class TrainingSettings:
    recipe: str = ""
    """A recipe by name (digits, folder, cifar10, cifar10-strong) or a TOML file; flags go before what it says.
    Default: digits for the built-in digits, folder for a folder."""

    data: str = "digits"
    """`digits` (scikit-learn's handwritten digits), a folder with one subfolder for each class (where it
    holds `train` and `test`, these are the splits), or a list: a .csv or .parquet file with the columns
    path and label, and split if it is given."""

    models: ModelsFolder = Path("models")
    """Folder of models to publish into."""

    name: str = ""
    """Name of the model. Default: that of the data, with - for what no name can have."""

    seed: int = 0
    """Decides the first weights, the order of images and what is done to them."""

    split_seed: int = 0
    """Decides which images are held out, where the data has no splits of its own. Keep it: a version is
    compared with the next on images that neither has learned from."""

    test_share: Share = 0.2
    """Share of the images held out for the test, where the data has no test split of its own."""

    validation_share: Share = 0.1
    """Share of the training images that is not trained on but watched."""

    skip_unreadable: bool = False
    """Leave out files that can't be read as images, in place of stopping."""

    cache: str = "auto"
    """Folder that keeps decoded images, so that the next run need not decode them; auto takes convoy in
    $XDG_CACHE_HOME or ~/.cache, off keeps none."""

    image_size: SideOrAuto = 0
    """Height and width that images are brought to; 0 takes the median side of the data, at most
    128, rounded to a multiple of 8."""

    channels: Literal[0, 1, 3] = 0
    """1 for grey, 3 for colour; 0 takes grey where every image looked at is grey."""

    resize: Literal["stretch", "crop"] = "stretch"
    """How images of another shape are brought to size: all of it, or the centre in proportion."""

    network: str = "basic"
    """basic (convolution, pooling, convolution, pooling, fully connected, output), strong (a compact
    residual network for small images), or a backbone of keras.applications by its name there, such
    as MobileNetV2."""

    filters: tuple[Count, ...] = (32, 64)
    """Filters of the convolutions: two for basic; for strong one for each stage, each of which halves
    the side."""

    kernel_size: Count = 3
    """Of basic: height and width of the convolutions, in pixels."""

    dense: Count = 128
    """Of basic: units of the fully connected layer."""

    dropout: Share = 0.5
    """Share of the last hidden layer's outputs that is dropped in training."""

    weights: Path | None = None
    """File of weights that a keras.applications backbone starts from (.weights.h5, .h5 or .keras, with
    or without its own head), for transfer learning. Default: it starts from chance."""

    frozen: bool = False
    """Leave the backbone as its weights are, and train the output layer alone."""

    epochs: Count = 30
    """Passes over the training images."""

    batch_size: Count = 64
    """Images in a training step, over all devices and machines together."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW (Loshchilov and Hutter, arXiv:1711.05101), or SGD with Nesterov's momentum of 0.9."""

    learning_rate: Positive = 0.002
    """Peak of the schedule: a linear rise over --warmup, then half a cosine down to 0."""

    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises."""

    weight_decay: Amount = 0.01
    """Share by which a step shrinks the kernels, times the learning rate; not those of
    normalisations, nor biases."""

    average: Share = 0.0
    """Decay of a running mean of the weights, which is what is validated and exported (Polyak and
    Juditsky, 1992); 0 takes the weights themselves."""

    label_smoothing: Share = 0.0
    """Share of the target's probability that is spread over all classes."""

    class_weights: bool = False
    """Count images of rare classes more, in inverse proportion to how many there are."""

    shift: Amount = 0.0
    """Training images are moved by up to so many pixels each way."""

    rotate: Amount = 0.0
    """Training images are turned by up to so many degrees each way."""

    zoom: Share = 0.0
    """Training images are scaled by up to this share, up or down."""

    flip: bool = False
    """Training images are mirrored left to right: chance decides how in the first epoch, and from one
    epoch to the next it alternates (Jordan, arXiv:2404.00498)."""

    cutout: Amount = 0.0
    """A square of this side, in pixels, is greyed out at a place of chance in training images (DeVries
    and Taylor, arXiv:1708.04552)."""

    colour: Share = 0.0
    """Brightness, contrast and saturation of training images vary by up to this share."""

    patience: CountOrAuto = 0
    """End after so many epochs without a better validation loss, with the best epoch's weights; 0
    trains to the end and takes the last ones."""

    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What convolutions are computed in while training; weights and export stay float32. auto takes
    what the device computes fast: bfloat16 with AMX or on recent cards, float16 on older cards."""

    xla: Literal["auto", "on", "off"] = "auto"
    """Compile steps with XLA. auto: on a card only; on a CPU it was slower wherever it was measured."""

    checkpoints: Path = Path(".convoy/checkpoints")
    """Folder of what a killed run needs to go on, removed when it has published, or after 30 days. Of
    several machines all have to see the same one."""

    resume: bool = True
    """Go on where a run with the same settings and data was killed, to the weights that it would have
    come to. --no-resume begins anew."""

    tensorboard: Path | None = None
    """Folder for TensorBoard's logs; none by default."""

    mlflow_uri: str = ""
    """MLflow tracking server, or a folder, that hears of settings, figures and the published version.
    Needs the extra mlflow."""

    max_batch_size: Batch = 64
    """Largest batch that the published version is served in."""

    mirror: bool = False
    """Build into the exported graph that an answer is the mean of those to the image and to its mirror
    image: more accurate where flip makes sense, at twice the work."""

    storage: Literal["float32", "int8"] = "float32"
    """What the float32 graph's weights are stored in; they are computed with in float32 all the same.
    int8 rounds the trained network to the weights that its int8 graph has, before anything is
    measured, and both graphs share one file of them: a quarter of what the float32 graph took."""

    keep_weights: bool = True
    """Publish the network's own weights beside the graphs, for --warm-start. As large as the float32
    graph."""

    variants: tuple[Literal["int8", "fp16"], ...] = ("int8", "fp16")
    """Graphs in other precisions that are published beside the float32 one, where each passes the gate:
    int8 by static quantisation, fp16 for cards."""

    min_accuracy: Floor = 0.0
    """Gate: least accuracy on the test images."""

    min_recall: Floor = 0.0
    """Gate: least share of a class's test images that must be found, in the worst class."""

    max_calibration_error: Floor = 1.0
    """Gate: largest expected calibration error on the test images, after scaling."""

    max_parity: Amount = 1e-4
    """Gate: largest difference allowed between the ONNX file's probabilities and the network's."""

    min_agreement: Floor = 1.0
    """Gate: least share of test images that both give the same label."""

    max_regression: Floor = 0.01
    """Gate: how much less accurate than the version that serves it may be, on the same images."""

    significance: Annotated[float, Parameter(validator=Number(gt=0, lt=1))] = 0.05
    """Gate: being worse than the version that serves is held for real, however small, where chance alone
    would show it more seldom than this (McNemar's exact test, one-sided)."""

    max_variant_loss: Floor = 0.005
    """Gate: how much less accurate than the float32 graph one in another precision may be."""

    max_slowdown: Annotated[float, Parameter(validator=Number(gte=1))] = 2.0
    """Gate: how many times slower than the version that serves it may be, on the same machine."""

    max_megabytes: Positive = 500.0
    """Gate: largest size of the version's graphs together, in megabytes (10^6 bytes)."""

    compare: bool = True
    """Gate: compare with the version that serves. --no-compare publishes without, as when the classes
    are meant to be others than before."""

    retrain: bool = False
    """For schedulers: end with 0 where a version was published, 3 where it is not better than what
    serves, 4 where there is nothing new (the same images and settings as what serves was made of, or as
    were tried in vain), 1 for errors."""

    base: Path | None = None
    """With --retrain: folder of the model to be replaced, models/<name>; its settings are taken where
    neither flags nor a recipe say otherwise."""

    warm_start: bool = False
    """With --retrain: start from the serving version's weights, not from chance."""

    summary: Path | None = None
    """File that gets what came of the run, as JSON."""

    textfile: Path | None = None
    """File that gets the run's figures for Prometheus' node exporter (textfile collector)."""


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
