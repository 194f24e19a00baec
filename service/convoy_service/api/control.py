"""What an operator says over gRPC: which versions are to serve. `life.Director` carries it out."""

from collections.abc import Callable, Sequence
from functools import partial
from threading import Thread

from convoy_service.errors import NotAllowed
from convoy_service.tasks import elsewhere

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
    await elsewhere(
        partial(order, verb, name, versions),
        lambda run: Thread(target=run, name="order", daemon=True).start(),
    )
