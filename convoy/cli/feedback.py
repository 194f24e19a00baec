"""`convoy feedback` and its commands."""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from convoy.cli.app import app, require

feedback_app = App(
    name="feedback", help="Have what `convoy serve --feedback` kept labelled, or deleted."
)
app.command(feedback_app)


@feedback_app.command(name="export")
def feedback_export(
    folder: Path,
    to: Path,
    /,
    *,
    model: str = "",
    unsure: Annotated[bool, Parameter(negative=())] = False,
    labels: Path | None = None,
) -> int:
    """Write images that were kept into a folder for each class, as `convoy train --data` takes them.

    Each image once, and none that is anywhere in TO already. The class is what the model answered:
    look through the folders, and move what is wrong, before you train on them. Exits with 1 if a file
    could not be read; the others are exported.

    Parameters
    ----------
    folder
        The folder of `convoy serve --feedback`.
    to
        Folder to write to.
    model
        Only what this model answered; may be left out where there is one only.
    unsure
        Only images that were answered as unsure.
    labels
        CSV with the columns sha256 and label: only the images that it names are exported, to the class
        that it says, those too that are in TO elsewhere.
    """
    require("pyarrow", "parquet", "reading feedback")
    from convoy_service.observers.feedback_writer import export, read_labels

    known = read_labels(labels) if labels else None
    done = export(folder, to, model=model, unsure=unsure, labels=known)
    for problem in done.unreadable:
        print(f"not read: {problem}", file=sys.stderr)
    counts = ", ".join(f"{label} {count}" for label, count in sorted(done.written.items()))
    print(
        f"{sum(done.written.values())} images written to {to}" + (f": {counts}" if counts else "")
    )
    if done.known:
        print(f"{done.known} were there already" + (f", {done.moved} moved" if done.moved else ""))
    return 1 if done.unreadable else 0


@feedback_app.command(name="delete")
def feedback_delete(folder: Path, digest: str, /, *digests: str) -> None:
    """Delete images from what was kept, by the sha256 of their files.

    A running server may still write what it has in memory: wait for its --feedback-rotate-s first.

    Parameters
    ----------
    folder
        The folder of `convoy serve --feedback`.
    digest
        The sha256 of an image, as `sha256sum` prints it.
    digests
        More of them.
    """
    require("pyarrow", "parquet", "reading feedback")
    from convoy_service.observers.feedback_writer import delete

    print(f"{delete(folder, [digest, *digests])} images deleted")
