from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.state.learned import DemandHistory
from tests.support.histories import History


def test_before_a_request_has_ended_nothing_is_known_of_its_duration() -> None:
    history = DemandHistory().after(arrived=2, completed=0, running=0, elapsed_s=1.0, at_s=10.0)
    assert history.arrivals_s == (10.0, 10.0)
    assert history.service_s is None


@given(st.integers(1, 20), st.floats(0.1, 30))
def test_steady_demand_shows_how_long_a_request_runs(running: int, service_s: float) -> None:
    # With n requests running for s seconds each, n / s of them end every second.
    history = DemandHistory()
    for second in range(50):
        history = history.after(
            arrived=1, completed=running, running=running, elapsed_s=service_s, at_s=second
        )
    assert history.service_s == pytest.approx(service_s)


def test_only_the_last_arrivals_are_kept() -> None:
    history = DemandHistory()
    for second in range(100):
        history = history.after(arrived=1, completed=0, running=0, elapsed_s=1.0, at_s=second)
    assert history.arrivals_s == tuple(range(68, 100))


def test_reports_of_gateways_make_it() -> None:
    history = History()
    history.demand(waiting=1, arrived=1)
    history.decides()
    history.becomes_ready("tiny.1")
    history.demand(in_flight=1, arrived=1)
    history.passes(4)
    history.demand(arrived=1)
    state = history.view.deployments["tiny"]
    assert len(state.history.arrivals_s) == 1
    assert state.history.service_s == pytest.approx(4)
