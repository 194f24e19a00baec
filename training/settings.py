"""The settings of `convoy train`, which recipes (TOML) may set too, and of `convoy models add`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from service.settings import Count, Positive

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
    """A recipe by name (digits, folder, cifar10) or a TOML file; flags go before what it says.
    Default: digits for the built-in digits, folder for a folder."""

    data: str = "digits"
    """`digits` (scikit-learn's handwritten digits), or a folder with one subfolder for each class;
    where it holds `train` and `test`, these are the splits."""

    models: Path = Path("models")
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

    image_size: SideOrAuto = 0
    """Height and width that images are brought to; 0 takes the median side of the data, at most
    128, rounded to a multiple of 8."""

    channels: Literal[0, 1, 3] = 0
    """1 for grey, 3 for colour; 0 takes grey where every image looked at is grey."""

    resize: Literal["stretch", "crop"] = "stretch"
    """How images of another shape are brought to size: all of it, or the centre in proportion."""

    filters: tuple[Count, Count] = (32, 64)
    """Filters of the two convolutions."""

    kernel_size: Count = 3
    """Height and width of the convolutions, in pixels."""

    dense: Count = 128
    """Units of the fully connected layer."""

    dropout: Share = 0.5
    """Share of the fully connected layer's inputs that is dropped in training."""

    epochs: Count = 30
    """Passes over the training images."""

    batch_size: Count = 64
    """Images in a training step."""

    learning_rate: Positive = 0.002
    """Peak of the schedule: a linear rise over the first tenth, then half a cosine down to 0."""

    weight_decay: Amount = 0.01
    """Of AdamW (Loshchilov and Hutter, arXiv:1711.05101)."""

    label_smoothing: Share = 0.0
    """Share of the target's probability that is spread over all classes."""

    shift: Amount = 0.0
    """Training images are moved by up to so many pixels each way."""

    rotate: Amount = 0.0
    """Training images are turned by up to so many degrees each way."""

    zoom: Share = 0.0
    """Training images are scaled by up to this share, up or down."""

    flip: bool = False
    """Training images are mirrored left to right half of the time."""

    max_batch_size: Batch = 64
    """Largest batch that the published version is served in."""

    min_accuracy: Floor = 0.0
    """Gate: least accuracy on the test images."""

    max_parity: Amount = 1e-4
    """Gate: largest difference allowed between the ONNX file's probabilities and the network's."""

    min_agreement: Floor = 1.0
    """Gate: least share of test images that both give the same label."""

    max_regression: Floor = 0.0
    """Gate: how much less accurate than the version that serves it may be, on the same images."""

    compare: bool = True
    """Gate: compare with the version that serves. --no-compare publishes without, as when the classes
    are meant to be others than before."""


@dataclass(frozen=True)
class AddSettings:
    labels: Path | None = None
    """Text file with a class a line, in the order of the outputs. Default: class 0, class 1, ..."""

    models: Path = Path("models")
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
