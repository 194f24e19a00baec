"""The loop on whose thread calls are answered."""

import heapq
import itertools
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence

import grpc

from convoy_service.tasks import ignore
from convoy_service.transport.call import Exchange

log = logging.getLogger("convoy.transport")

# How long the loop sleeps where nothing happens. Python runs signal handlers between its sleeps.
NAP_S = 0.2

# How long the last answers may take on their way when the loop stops.
CLOSE_S = 0.2

# Timers that were taken back are cleared away when they are so many more than the others.
_FORGOTTEN = 100

# From here on a deadline is none: gRPC says "never" in seconds since 1970.
NEVER_S = 1e11

Options = Sequence[tuple[str, int]]


class Loop(ABC):
    """Runs calls, timers, and between them whatever work waits."""

    def __init__(self) -> None:
        self.on_call: Callable[[Exchange], None] = ignore
        # Work for this thread: `step` does a piece of it where `waiting`, and may take its time.
        self.waiting: Callable[[], bool] = bool
        self.step: Callable[[], object] = ignore
        self._posted: deque[Callable[[], None]] = deque()
        self._timers: list[tuple[float, int]] = []
        self._due: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()
        self._stopping = False
        # As `threading.get_ident` says.
        self.thread = 0

    def post(self, callback: Callable[[], None]) -> None:
        """Calls `callback` on the loop's thread, soon. Any thread may call this."""
        self._posted.append(callback)
        self._wake()

    def at(self, when: float, callback: Callable[[], None]) -> int:
        """Has `callback` called at `when`, on `time.monotonic`'s clock; give or take 2 ms. What it
        gives is for `forget`.
        """
        timer = next(self._numbers)
        self._due[timer] = callback
        heapq.heappush(self._timers, (when, timer))
        return timer

    def forget(self, timer: int) -> None:
        """Has it not called any more, if it has not been."""
        self._due.pop(timer, None)
        if len(self._timers) > 2 * len(self._due) + _FORGOTTEN:
            self._timers = [each for each in self._timers if each[1] in self._due]
            heapq.heapify(self._timers)

    def stop(self) -> None:
        """Has `run` return as soon as it can. Calls that are not over are cancelled."""
        self._stopping = True

    @abstractmethod
    def bind(self, address: str, credentials: "grpc.ServerCredentials | None") -> int:
        """The port it listens on. Raises RuntimeError where it can't."""

    @abstractmethod
    def run(self) -> None:
        """Takes calls until `stop`."""

    @abstractmethod
    def _wake(self) -> None:
        """Ends the sleep of the loop. Any thread may call this."""

    def _chores(self) -> float:
        """Runs what is due; the seconds until something is again."""
        for _ in range(len(self._posted)):
            self._posted.popleft()()
        while self._timers:
            wait = self._timers[0][0] - time.monotonic()
            if wait > 0:
                return min(wait, NAP_S)
            self._due.pop(heapq.heappop(self._timers)[1], ignore)()
        return NAP_S

    def _while_it_stops(self, event: Callable[[], None]) -> None:
        """A bug must not keep it from stopping, and there may be one more for each call."""
        try:
            event()
        except Exception:
            log.exception("bug while the server stops")
