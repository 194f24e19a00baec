"""Bounds the share of a core that background work takes from the requests that are served meanwhile."""

import time
from collections.abc import Callable


class DutyCycle:
    """Measures a piece of work, and says how long to rest after it.

    A thread that rests so long after each piece works for `share` of the time. The object never sleeps:
    the caller waits in whatever way ends early when the process stops.
    """

    __slots__ = ("_began", "_clock", "_rest")

    def __init__(self, share: float, clock: Callable[[], float] = time.thread_time) -> None:
        """Begins the first piece of work.

        Args:
            share: of the time that is spent at work, above 0 and at most 1.
            clock: measures the work, in seconds. The default counts what this thread computes, so the
                object belongs to one thread.
        """
        self._rest, self._clock = 1 / share - 1, clock
        self._began = clock()

    def begin(self) -> None:
        """Begins the next piece of work."""
        self._began = self._clock()

    def worked_s(self) -> float:
        """Returns the seconds of work since this piece began."""
        return self._clock() - self._began

    def rest_s(self) -> float:
        """Returns the seconds to rest for the work since this piece began."""
        return self._rest * self.worked_s()
