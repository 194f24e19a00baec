"""How good a classifier is: one function for the network, the ONNX file and the running server."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from service.bundle import Probabilities, Scores
from service.images import Pixels
from training.data import Labels, Split

if TYPE_CHECKING:
    from convoy.client import Classifier

# Enough rows to keep the device busy, few enough for any memory.
_CHUNK = 256


def score(predict: Callable[[Pixels], Probabilities], split: Split) -> Scores:
    """Scores of `predict`, a function from uint8 `[N, H, W, C]` to probabilities `[N, classes]`."""
    return score_answers(answers(predict, split.inputs), split.labels)


def answers(predict: Callable[[Pixels], Probabilities], inputs: Pixels) -> Probabilities:
    """What `predict` says about `inputs`, asked for in chunks."""
    chunks = [predict(inputs[start : start + _CHUNK]) for start in range(0, len(inputs), _CHUNK)]
    return np.concatenate(chunks)


def served_answers(classifier: "Classifier", split: Split, classes: int) -> Probabilities:
    """What a running server says about the files of `split`, in their order, `[N, classes]`.

    Raises ClassifierError, also where a single image fails.
    """
    probabilities = np.zeros((len(split), classes), np.float32)
    encoded = (split.encoded(position) for position in range(len(split)))
    for row, prediction in zip(
        probabilities, classifier.classify_many(encoded, classes), strict=True
    ):
        if prediction.error:
            raise prediction.error
        for label in prediction.labels:
            row[label.index] = label.probability
    return probabilities


def score_answers(probabilities: Probabilities, labels: Labels) -> Scores:
    """Scores of answers that are there already: `probabilities` `[N, classes]`, `labels` `[N]`."""
    correct = int((probabilities.argmax(axis=1) == labels).sum())
    # Clipped as a probability of 0 for what came true would make any mean infinite.
    given = np.clip(probabilities[np.arange(len(labels)), labels].astype(np.float64), 1e-7, 1)
    return Scores(correct / len(labels), correct, len(labels), float(-np.log(given).mean()))
