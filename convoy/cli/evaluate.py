"""`convoy evaluate`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from convoy.cli.app import app, fail, require
from convoy.cli.tls import tls_credentials
from convoy_service.settings import ModelsFolder, Version, default_models

if TYPE_CHECKING:
    from convoy.client import Classifier
    from convoy_service.artifacts.reader import Probabilities
    from convoy_training.data.datasets import Split


@app.command
def evaluate(
    *,
    data: str = "digits",
    models: ModelsFolder | None = None,
    name: str = "",
    version: Version = 0,
    variant: Literal["fp32", "int8", "fp16"] = "fp32",
    server: str = "",
    tls_ca: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Score a published version on the test images, in this process and, if asked, over the wire.

    Exits with 1 where the server's accuracy is not exactly that of the file.

    Parameters
    ----------
    data
        As for `convoy train`; where test images are cut off, they are the same that training cut.
    models
        Folder of models. Default: ./models if there is one, else the models that come with Convoy.
    name
        Name of the model. Default: that of the data.
    version
        Version to score; 0 means the newest.
    variant
        Which of its graphs to score: with --server, the one that it serves.
    server
        HOST:PORT of a server of the same version: each image is sent to it as the file it is.
    tls_ca
        PEM file of the authorities that vouch for a server with TLS.
    as_json
        Print one JSON object.
    """
    require("onnxruntime", "cpu", "evaluating")
    from rich.console import Console

    from convoy.client import Classifier, ClassifierError
    from convoy_training.evaluation.scores import score, score_answers
    from convoy_training.pipeline.run import load_test

    console = Console(stderr=as_json, soft_wrap=True)
    bundle, model, test = load_test(
        data, models or default_models(), name, version, variant, console
    )
    offline = score(model.run, test)
    found: dict[str, Any] = {"model": bundle.name, "version": bundle.version, "offline": offline}
    if server:
        with Classifier(
            server,
            model=bundle.name,
            version=bundle.version,
            credentials=tls_credentials(tls_ca),
        ) as classifier:
            try:
                answered = _served_answers(classifier, test, len(bundle.manifest.labels))
            except ClassifierError as error:
                fail(f"{error.code}: {error}")
        found["served"] = score_answers(answered, test.labels)
    if as_json:
        print(json.dumps(found, default=asdict))
    else:
        for where in ("offline", "served"):
            if where in found:
                scores = found[where]
                print(
                    f"{where:8} accuracy {scores.accuracy:.4f} ({scores.correct} of {scores.images}), "
                    f"log loss {scores.log_loss:.4f}"
                )
    return int(server != "" and found["served"].correct != offline.correct)


def _served_answers(classifier: "Classifier", split: "Split", classes: int) -> "Probabilities":
    """What a running server says about the files of `split`, in their order, `[N, classes]`.

    Raises ClassifierError, also where a single image fails.
    """
    import numpy as np

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
