"""`convoy bench`."""

from typing import Annotated

from convoy.bench.settings import BenchSettings
from convoy.cli.app import Flat, app, require


@app.command
def bench(*, settings: Annotated[BenchSettings, Flat] = BenchSettings()) -> int:
    """Put a server under load, and say how many requests a second it answers, and how fast.

    Exits with 1 where --check finds a wrong answer.
    """
    if settings.plot:
        require("matplotlib", "bench", "--plot")
    from convoy.bench.run import run

    return run(settings)
