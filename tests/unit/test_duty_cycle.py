import threading
import time

import pytest

from convoy_service.duty_cycle import DutyCycle


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("share", "rest"), [(0.1, 9.0), (0.2, 4.0), (0.5, 1.0), (1.0, 0.0)])
def test_the_rest_makes_work_that_share_of_the_time(share: float, rest: float) -> None:
    clock = Clock()
    duty = DutyCycle(share, clock)
    clock.now += 2.0
    assert duty.worked_s() == 2.0
    assert duty.rest_s() == 2.0 * rest


def test_each_piece_of_work_counts_for_itself() -> None:
    clock = Clock()
    duty = DutyCycle(0.1, clock)
    clock.now += 5.0
    duty.begin()
    assert duty.worked_s() == duty.rest_s() == 0.0
    clock.now += 1.0
    assert duty.rest_s() == 9.0


def test_by_default_what_the_thread_computes_is_work_and_what_it_waits_is_not() -> None:
    before = time.thread_time()
    duty = DutyCycle(0.5)
    threading.Event().wait(0.05)
    while duty.worked_s() < 0.005:
        pass
    worked_s = duty.worked_s()
    assert 0.005 <= worked_s <= time.thread_time() - before
    assert duty.rest_s() >= worked_s
