"""The gate, and the way of a trained network through it into the models folder."""

import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from service import bundle as bundles
from service.bundle import Parity, Scores
from service.errors import BrokenVersion, ConvoyError
from service.model import Model
from training.data import Dataset
from training.evaluate import answers, score_answers
from training.settings import TrainingSettings

# On fewer test images than this, all of them right is no reason to wonder.
_HANDFUL = 50

_PACKAGES = (
    "convoy-serving",
    "tensorflow",
    "keras",
    "tf2onnx",
    "onnx",
    "onnxruntime",
    "numpy",
    "pillow",
)


class GateClosed(ConvoyError):
    """The version was not published: `checks` has every check, passed and failed."""

    def __init__(self, checks: "list[Check]") -> None:
        failed = ", ".join(check.name for check in checks if not check.passed)
        super().__init__(f"the gate is closed ({failed}): nothing was published")
        self.checks = checks


@dataclass(frozen=True)
class Check:
    """One condition of the gate, as it is shown to a person.

    What is `suspicious` passes, but should be looked at.
    """

    name: str
    value: str
    wanted: str
    passed: bool
    suspicious: bool = False


@dataclass(frozen=True)
class Serving:
    """The version that a candidate has to live up to: its scores on the candidate's test images, or
    None and the `reason` why it can't be compared.
    """

    version: int
    scores: Scores | None
    reason: str = ""


def serving_version(model: Path, data: Dataset) -> Serving | None:
    """What serves from the folder `model`: the newest version that proves itself; None for nothing.

    It is scored on the same test images, brought to the size that it takes.
    """
    for version in reversed(bundles.versions(model)):
        try:
            bundle = bundles.read(model / str(version))
            loaded = Model.load(bundle, device="cpu")
        except BrokenVersion:
            continue
        labels = bundle.manifest.labels
        if sorted(labels) != sorted(data.classes):
            return Serving(version, None, f"its classes are {', '.join(labels)}")
        order = [labels.index(name) for name in data.classes]
        target = bundle.manifest.pixels
        inputs = data.test.inputs if target == data.target else data.test.at(target)
        given = answers(loaded.run, inputs)
        return Serving(version, score_answers(given[:, order], data.test.labels))
    return None


def gate(
    scores: Scores,
    parity: Parity,
    serving: Serving | None,
    settings: TrainingSettings,
    guessing: float = 0.0,
) -> list[Check]:
    """Every check of the gate, all of them made whatever the first ones say.

    `guessing` is the accuracy of always naming the most frequent class of the test images.

    A comparison with NaN is False, so that a figure that is no number fails its check.
    """
    suspicious = scores.correct == scores.images and scores.images > _HANDFUL
    checks = [
        Check(
            "accuracy",
            f"{scores.accuracy:.4f}",
            f"at least {settings.min_accuracy:.4f}",
            scores.accuracy >= settings.min_accuracy,
        ),
        Check(
            "better than guessing",
            f"{scores.accuracy:.4f}",
            f"over {guessing:.4f}, the share of the most frequent class",
            scores.accuracy > guessing,
        ),
        Check(
            "accuracy is plausible",
            f"{scores.correct} of {scores.images} right",
            "not every one: are test images among the trained, does something give the class away?",
            True,
            suspicious,
        ),
        Check(
            "parity",
            f"{parity.max_abs_difference:.2e}",
            f"at most {settings.max_parity:.2e} off the network's answers",
            parity.max_abs_difference <= settings.max_parity,
        ),
        Check(
            "agreement",
            f"{parity.label_agreement:.4f}",
            f"at least {settings.min_agreement:.4f} of the network's labels",
            parity.label_agreement >= settings.min_agreement,
        ),
    ]
    if serving and not settings.compare:
        checks.append(
            Check(f"compared with version {serving.version}", "no", "--no-compare", True, True)
        )
    elif serving and not serving.scores:
        checks.append(
            Check(
                f"comparable with version {serving.version}",
                f"no: {serving.reason}",
                "the same classes; --no-compare publishes all the same",
                False,
            )
        )
    elif serving and serving.scores:
        floor = serving.scores.accuracy - settings.max_regression
        checks.append(
            Check(
                f"not worse than version {serving.version}",
                f"{scores.accuracy:.4f}",
                f"at least {floor:.4f}, on the same test images",
                # By a hair: the binary fractions of 0.8 - 0.1 are above those of 0.7.
                scores.accuracy >= floor - 1e-9,
            )
        )
    return checks


def provenance() -> dict[str, str]:
    """What made a version: the versions of the packages that had a part in it."""
    made = {"python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            made[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return made
