import random

import pytest

from convoy_service.backoff import Backoff


def waits(backoff: Backoff, count: int) -> list[float]:
    return [backoff.next_s() for _ in range(count)]


def test_the_first_wait_is_as_given_and_each_is_twice_the_one_before() -> None:
    assert waits(Backoff(0.02, 100.0), 5) == [0.02, 0.04, 0.08, 0.16, 0.32]


def test_no_wait_exceeds_the_longest() -> None:
    assert waits(Backoff(5.0, 12.0), 5) == [5.0, 10.0, 12.0, 12.0, 12.0]
    assert waits(Backoff(60.0, 10.0), 2) == [10.0, 10.0], "nor the first one"
    assert waits(Backoff(float("inf"), 60.0), 3) == [60.0] * 3


def test_without_a_longest_it_grows_on() -> None:
    assert waits(Backoff(60.0), 2000)[-1] == float("inf")
    assert waits(Backoff(60.0), 20)[-1] == 60.0 * 2**19


def test_after_a_reset_it_begins_anew() -> None:
    backoff = Backoff(1.0, 60.0)
    assert backoff.failures == 0
    waits(backoff, 4)
    assert backoff.failures == 4
    backoff.reset()
    assert backoff.failures == 0
    assert waits(backoff, 2) == [1.0, 2.0]


def test_one_wait_may_have_a_bound_of_its_own() -> None:
    backoff = Backoff(0.2)
    assert [backoff.next_s(0.5) for _ in range(4)] == [0.2, 0.4, 0.5, 0.5]
    # It goes on from what was waited last, up or down.
    assert [backoff.next_s(60.0) for _ in range(2)] == [1.0, 2.0]
    assert backoff.next_s(0.5) == 0.5


def test_nothing_is_waited_where_the_first_wait_is_none() -> None:
    assert waits(Backoff(0.0, 60.0), 3) == [0.0] * 3


def test_jitter_takes_up_to_a_half_off_and_the_next_wait_does_not_depend_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for chance, share in ((0.0, 0.5), (0.5, 0.75), (1.0, 1.0)):
        monkeypatch.setattr(random, "uniform", lambda a, b, chance=chance: a + (b - a) * chance)
        drawn = waits(Backoff(1.0, 6.0, jitter=True), 5)
        assert drawn == [share * wait for wait in (1.0, 2.0, 4.0, 6.0, 6.0)]
    monkeypatch.undo()
    for wait, drawn_wait in zip((1.0, 2.0, 4.0), waits(Backoff(1.0, jitter=True), 3), strict=True):
        assert wait / 2 <= drawn_wait <= wait
    assert len(set(waits(Backoff(1.0, 1.0, jitter=True), 10))) > 1
