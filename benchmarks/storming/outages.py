"""When the server was stopped or lost a process on purpose, as every process of the storm sees it."""

import time
from multiprocessing.context import SpawnContext

# How long callers may notice an outage after its end: they hear of the new server late.
_SLACK_S = 5.0

# Callers over gRPC leave a server that has just started to those over HTTP, and later do so again and
# again. A server that is never idle hides the races of a loop that is woken from its sleep.
_FRESH_S, _ASKING_S, _RESTING_S = 4.0, 4.0, 1.5


class Outages:
    """The last outage, and the last start of the server, in memory that all processes share. Times are of `time.monotonic`, which is one
    clock for the whole machine.
    """

    def __init__(self, context: SpawnContext) -> None:
        self._times = context.Array("d", [0.0, 0.0, 0.0, float("inf")])

    def begin(self) -> None:
        with self._times.get_lock():
            self._times[0], self._times[1] = time.monotonic(), float("inf")

    def end(self) -> None:
        with self._times.get_lock():
            self._times[1] = time.monotonic() + _SLACK_S

    def started(self) -> None:
        with self._times.get_lock():
            self._times[2] = time.monotonic()

    def end_at(self, when: float) -> None:
        """No request is begun after that."""
        self._times[3] = when

    def over(self) -> bool:
        return time.monotonic() >= self._times[3]

    def calm_s(self) -> float:
        """For how long callers over gRPC rest now; 0 where they ask."""
        with self._times.get_lock():
            age_s = time.monotonic() - self._times[2] - _FRESH_S
        if age_s < 0:
            return -age_s
        passed_s = age_s % (_ASKING_S + _RESTING_S)
        return _ASKING_S + _RESTING_S - passed_s if passed_s > _ASKING_S else 0.0

    def explain(self, sent: float) -> bool:
        """Whether a request that was sent then, and has failed by now, met an outage."""
        with self._times.get_lock():
            began, ended = self._times[0], self._times[1]
        return began > 0 and sent <= ended
