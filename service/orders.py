"""What an operator says over gRPC: which versions are to serve. `life.Director` carries it out."""

from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread

from service.errors import NotAllowed
from service.task import Done, Wait

# Takes a verb (promote, rollback, pin, load or unload), a model and versions of it; returns when that
# is carried out, which may take minutes. Raises ConvoyError, whose text says why it is not.
Order = Callable[[str, str, Sequence[int]], None]


async def carry_out(
    order: Order | None, verb: str, name: str, versions: Sequence[int] = ()
) -> None:
    """Gives the order on a thread of its own, and waits. Raises what it raises, and NotAllowed where
    there is nobody to carry it out.
    """
    if order is None:
        raise NotAllowed(
            "explicit model load / unload is not allowed: start the server with "
            "--allow-repository-control, or write what is to serve into the model's versions.toml "
            "(`convoy models --models FOLDER`)"
        )
    wait: Wait[None] = Wait(lambda done: _Given(partial(order, verb, name, versions), done))
    await wait


class _Given:
    def __init__(self, order: Callable[[], None], done: Done[None]) -> None:
        def run() -> None:
            try:
                order()
            except Exception as error:
                done(error)
            else:
                done(None)

        Thread(target=run, name="order", daemon=True).start()

    def cancel(self) -> None:
        """What is ordered is done, whether the caller waits for it or not."""
