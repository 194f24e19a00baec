"""One call, as handlers and transports see it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from convoy_service.tasks import ignore

Trailers = Sequence[tuple[str, str]]


class Http(NamedTuple):
    """The request that a call was made of: its method, its path, that with the parameters' names, the
    scheme, when it `arrived`, and with which status each of gRPC's is answered.
    """

    verb: str
    path: str
    route: str
    scheme: str
    arrived: float
    statuses: Mapping[str, int]


class Exchange(ABC):
    """One call: messages in, messages and a status out.

    `method` is its path, `deadline` on `time.monotonic`'s clock. `gone` is true, and `on_gone` is
    called, once nobody waits for an answer: the caller hung up, or the deadline passed. `on_closed`
    is called when all is over, however it ended.
    """

    __slots__ = ("_due", "deadline", "gone", "metadata", "method", "on_closed", "on_gone")

    # The HTTP request that this call was made from; None for gRPC calls.
    http: Http | None = None

    def __init__(self, method: str, deadline: float | None, metadata: Any) -> None:
        self.method, self.deadline, self.metadata = method, deadline, metadata
        self.gone = False
        self.on_gone: Callable[[], None] = ignore
        self.on_closed: Callable[[], None] = ignore
        self._due = 0  # what was begun and is not over

    def _done(self) -> None:
        self._due -= 1
        if not self._due:
            on_closed = self.on_closed
            # What these hold, holds this: without them it goes as soon as gRPC lets go of it.
            self.on_gone = self.on_closed = ignore
            on_closed()

    @abstractmethod
    def accept(self) -> None:
        """Once, before anything else, for a call that is not refused."""

    @abstractmethod
    def refuse(self, code: int, details: str, trailers: Trailers = ()) -> None:
        """Ends a call at once, unread: what costs least."""

    @abstractmethod
    def read(self, then: Callable[[bytes | None], None]) -> None:
        """Asks for the next message; None where there is none any more."""

    @abstractmethod
    def write(self, message: bytes, more: bool, then: Callable[[], None]) -> None:
        """Sends one of several answers, the next only after `then`. `more`: it follows at once."""

    @abstractmethod
    def end(
        self,
        code: int,
        details: str = "",
        trailers: Trailers = (),
        message: bytes | None = None,
    ) -> None:
        """Sends the status, after the one and only answer where a `message` is given."""
