from __future__ import annotations

import pytest

from paraserve_backend.engines.pass_clock import PassClock


class Clock:
    def __init__(self) -> None:
        self.now_s = 50.0

    def __call__(self) -> float:
        return self.now_s


def returned(clock: Clock, passes: PassClock, *, num_tokens: int, seconds: float) -> None:
    number = passes.begin(num_tokens)
    clock.now_s += seconds
    passes.end(number, is_measure=True)


def overdue_after_s(clock: Clock, passes: PassClock) -> float:
    """How long from now until a pass that is under way is overdue, to a hundredth."""
    start_s = clock.now_s
    while not passes.is_overdue:
        clock.now_s += 0.01
        assert clock.now_s < start_s + 1000
    return clock.now_s - start_s


@pytest.mark.parametrize(
    ("returned_s", "num_tokens", "limit_s"),
    [
        ([], 1, 60.0),
        ([0.01], 1, 2.0),
        ([0.5], 1, 4.0),
        ([0.5, 0.1], 1, 4.0),
        ([0.5], 30, 12.0),  # the returned ones have ten tokens each
        ([0.01], 600, 4.8),
    ],
)
def test_a_pass_is_overdue_after_some_times_the_slowest(
    returned_s: list[float], num_tokens: int, limit_s: float
) -> None:
    clock = Clock()
    passes = PassClock(clock)
    for seconds in returned_s:
        returned(clock, passes, num_tokens=10, seconds=seconds)
    passes.begin(num_tokens)
    assert overdue_after_s(clock, passes) == pytest.approx(limit_s, abs=0.02)


def test_a_slow_pass_is_forgotten_in_time() -> None:
    clock = Clock()
    passes = PassClock(clock)
    returned(clock, passes, num_tokens=1, seconds=15.0)
    for _ in range(64):
        returned(clock, passes, num_tokens=1, seconds=0.01)
    passes.begin(1)
    assert overdue_after_s(clock, passes) == pytest.approx(2.0, abs=0.02)


def test_a_pass_that_failed_is_no_measure() -> None:
    clock = Clock()
    passes = PassClock(clock)
    returned(clock, passes, num_tokens=1, seconds=0.01)
    failed = passes.begin(1)
    clock.now_s += 30.0
    assert passes.is_overdue
    passes.end(failed, is_measure=False)
    assert not passes.is_overdue
    passes.begin(1)
    assert overdue_after_s(clock, passes) == pytest.approx(2.0, abs=0.02)


def test_what_a_step_has_to_do_besides_gives_it_time_but_no_new_start() -> None:
    clock = Clock()
    passes = PassClock(clock)
    returned(clock, passes, num_tokens=10, seconds=1.0)
    number = passes.begin(10)
    clock.now_s += 7.0
    passes.enlarge(number, 10)
    assert overdue_after_s(clock, passes) == pytest.approx(9.0, abs=0.02)
