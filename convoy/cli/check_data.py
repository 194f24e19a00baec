"""`convoy check-data`."""

import json
import sys
from typing import Annotated

from cyclopts import Parameter

from convoy.cli.app import app
from convoy_training.settings import TrainingSettings


@app.command
def check_data(
    data: str,
    /,
    *,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Look through labelled images before training: unreadable files, copies, labels, classes, sizes.

    Exits with 1 where something would stop training, or spoil its test.

    Parameters
    ----------
    data
        As for `convoy train`: a folder, or a list.
    as_json
        Print one JSON object, with all images that are concerned.
    """
    from rich.console import Console
    from rich.progress import Progress

    from convoy_training.data.checks import check

    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as progress:
        report = check(
            TrainingSettings(data=data),
            lambda items, doing, total: progress.track(items, total, description=doing),
        )
    if as_json:
        print(json.dumps(report.as_json()))
    else:
        # A pipe has no width to fit into.
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(report.table())
        console.print(report.verdict(), highlight=False)
    return 0 if report.passed else 1
