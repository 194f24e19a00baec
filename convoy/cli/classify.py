"""`convoy classify`."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from convoy.cli.app import DEFAULT_SERVER, app, fail
from convoy.cli.tls import tls_credentials
from convoy_service.errors import ConvoyError
from convoy_service.settings import IMAGE_SUFFIXES, Labels, Positive

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from convoy.client import Prediction


def _number_or_label(_: object, version: str) -> None:
    if not re.fullmatch(r"\d{1,18}|[a-z_][\w-]*", version, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{version!r} is neither the number of a version nor a label")


@app.command
def classify(
    *paths: Path,
    server: str = DEFAULT_SERVER,
    model: str = "",
    version: Annotated[str, Parameter(validator=_number_or_label)] = "0",
    top_k: Labels = 1,
    timeout_s: Positive = 30.0,
    tls_ca: Path | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Print the labels of images, as a running server sees them.

    Exits with 1 if any image failed; the others are answered.

    Parameters
    ----------
    paths
        Image files, or folders of them.
    server
        HOST:PORT of the server.
    model
        Model to ask; may be left out where the server has one only.
    version
        Version to ask, by its number or a label such as `stable`; 0 means whichever the server chooses.
    top_k
        Labels to print for each image, the most probable first.
    timeout_s
        Deadline of each call, in seconds.
    tls_ca
        PEM file of the authorities that vouch for a server with TLS.
    as_json
        One JSON object a line: path, model, version, labels and unsure, or error.
    """
    from convoy.client import Classifier, ClassifierError

    files = list(_image_files(paths))
    failed = 0
    with Classifier(
        server,
        model=model,
        version=int(version) if version.isdigit() else version,
        timeout_s=timeout_s,
        credentials=tls_credentials(tls_ca),
    ) as classifier:
        try:
            for file, prediction in zip(files, classifier.classify_many(files, top_k), strict=True):
                failed += prediction.error is not None
                print(
                    _as_json(file, prediction) if as_json else _as_text(file, prediction),
                    flush=True,
                )
        except ClassifierError as error:
            fail(f"{error.code}: {error}")
    if failed:
        print(f"{failed} of {len(files)} images failed", file=sys.stderr)
    return 1 if failed else 0


def _image_files(paths: "Iterable[Path]") -> "Iterator[Path]":
    found = False
    for path in paths:
        if path.is_dir():
            inside = sorted(
                f for f in path.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and f.is_file()
            )
            if not inside:
                raise ConvoyError(f"{path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from inside
        else:
            yield path
        found = True
    if not found:
        raise ConvoyError("no images given: name files or folders")


def _as_text(file: Path, prediction: "Prediction") -> str:
    if prediction.error:
        return f"{file}\tERROR {prediction.error}"
    shown = [f"{label.name} {label.probability:.4f}" for label in prediction.labels]
    if prediction.unsure:
        shown[0] += " unsure"
    return f"{file}\t" + "  ".join(shown)


def _as_json(file: Path, prediction: "Prediction") -> str:
    answer: dict[str, Any] = {"path": str(file)}
    if prediction.error:
        answer["error"] = {"code": prediction.error.code, "message": str(prediction.error)}
    else:
        answer["model"], answer["version"] = prediction.model, prediction.version
        answer["labels"] = [
            {"index": label.index, "name": label.name, "probability": label.probability}
            for label in prediction.labels
        ]
        answer["unsure"] = prediction.unsure
    return json.dumps(answer)
