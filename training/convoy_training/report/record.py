"""What a report shows, as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from convoy_service.artifacts.images import Pixels
from convoy_service.artifacts.reader import Manifest, Probabilities
from convoy_training.data.checks import Finding
from convoy_training.data.datasets import Labels
from convoy_training.evaluation.scores import Evaluation
from convoy_training.release.publish import Check

Activations = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """The output of one layer for one image.

    `activations` has the shape `[H, W, C]` or `[units]`. `kind` is the name of the layer's class in Keras.
    """

    name: str
    kind: str
    activations: Activations


@dataclass(frozen=True)
class Record:
    """Everything that the report shows. The report leaves out a section if the record lacks its data.

    `version` is 0 if nothing was published. The `manifest`'s `training` holds the settings, the images by
    split, and the epochs. The `manifest`'s `files`, if known already, give the sizes and sums of the graphs.
    `pixels` uint8 `[N, H, W, C]` are the test images, and `truth` `[N]` their classes. `probabilities`
    `[N, classes]` are the exported graph's answers to the test images. `layers` holds the output of each
    layer for the test image at the index `shown`, from the first layer to the last but the output.
    `latency_ms` is the time that one image alone takes, by the names in VARIANTS. `seconds` is the time
    that the whole run took.
    """

    name: str
    version: int
    manifest: Manifest
    evaluation: Evaluation | None = None
    checks: Sequence[Check] = ()
    findings: Sequence[Finding] = ()
    pixels: Pixels | None = None
    probabilities: Probabilities | None = None
    truth: Labels | None = None
    layers: Sequence[Layer] = ()
    shown: int = 0
    latency_ms: Mapping[str, float] = field(default_factory=dict)
    machine: str = ""
    seconds: float | None = None
