"""How long to wait between two tries of something that fails."""

import math
import random


class Backoff:
    """Waits for one thing that is tried again and again: each wait is twice the one before.

    The object never sleeps. The caller asks for the next wait after each failure, and resets the object
    after a success. One thread uses it at a time.
    """

    __slots__ = ("_first_s", "_jitter", "_longest_s", "_wait_s", "failures")

    def __init__(
        self, first_s: float, longest_s: float = math.inf, *, jitter: bool = False
    ) -> None:
        """Sets the waits, in seconds.

        Args:
            first_s: the wait after the first failure in a row, unless `longest_s` is shorter.
            longest_s: the wait never exceeds it.
            jitter: takes a random half off each wait, so that clients that failed together do not come
                back together (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015:
                "equal jitter").
        """
        self._first_s, self._longest_s, self._jitter = first_s, longest_s, jitter
        self.reset()

    def reset(self) -> None:
        """Counts no failures: the next wait is the first one."""
        self.failures = 0
        self._wait_s = 0.0

    def next_s(self, longest_s: float | None = None) -> float:
        """Counts a failure and returns the seconds to wait before the next try.

        Args:
            longest_s: bounds this wait in place of the bound that the object was made with.
        """
        wait_s = 2 * self._wait_s if self.failures else self._first_s
        self.failures += 1
        self._wait_s = min(wait_s, self._longest_s if longest_s is None else longest_s)
        return self._wait_s * random.uniform(0.5, 1) if self._jitter else self._wait_s
