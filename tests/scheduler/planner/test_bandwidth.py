from __future__ import annotations

import math
from collections.abc import Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.planner.bandwidth import (
    BandwidthClaim,
    Flow,
    LinkForecast,
    fair_rates,
    offered_rate,
)

_LINKS = ("store", "a", "b", "c")
_FLOWS = st.lists(
    st.builds(
        Flow,
        links=st.sets(st.sampled_from(_LINKS), min_size=1, max_size=2).map(
            lambda links: tuple(sorted(links))
        ),
        rank=st.sampled_from([0, 0, -1]),
    ),
    max_size=8,
)
_CAPACITIES = st.fixed_dictionaries({link: st.floats(1, 100) for link in _LINKS})


@given(_FLOWS, _CAPACITIES)
def test_no_link_carries_more_than_it_can(
    flows: list[Flow], capacities: dict[Hashable, float]
) -> None:
    rates = fair_rates(flows, capacities)
    for link, capacity in capacities.items():
        used = sum(rate for flow, rate in zip(flows, rates, strict=True) if link in flow.links)
        assert used <= capacity * (1 + 1e-9)


@given(_FLOWS, _CAPACITIES)
def test_every_flow_has_a_full_link_where_none_of_its_rank_gets_more(
    flows: list[Flow], capacities: dict[Hashable, float]
) -> None:
    """What max-min fairness means: no flow can get more but from one that has no more than it."""
    rates = fair_rates(flows, capacities)
    for flow, rate in zip(flows, rates, strict=True):
        assert any(
            _is_full(link, flows, rates, capacities)
            and all(
                rate >= other_rate - 1e-6
                for other, other_rate in zip(flows, rates, strict=True)
                if link in other.links and other.rank <= flow.rank
            )
            for link in flow.links
        )


def _is_full(
    link: Hashable, flows: list[Flow], rates: tuple[float, ...], capacities: dict[Hashable, float]
) -> bool:
    used = sum(rate for flow, rate in zip(flows, rates, strict=True) if link in flow.links)
    return used >= capacities[link] - 1e-6


def test_a_background_flow_gets_what_the_others_leave() -> None:
    flows = [Flow(links=("a",)), Flow(links=("a",), rank=-1), Flow(links=("b",), rank=-1)]
    assert fair_rates(flows, {"a": 10.0, "b": 4.0}) == (10.0, 0.0, 4.0)


def test_a_flow_over_no_limited_link_is_not_limited() -> None:
    assert fair_rates([Flow(links=("elsewhere",))], {"a": 1.0}) == (math.inf,)


def test_a_new_fetch_gets_an_even_share() -> None:
    assert offered_rate(8.0, [BandwidthClaim(remaining_bytes=100)], 0.0) == 4.0


def test_a_fetch_that_would_make_a_running_one_late_gets_nothing() -> None:
    claim = BandwidthClaim(remaining_bytes=80, deadline_s=15.0)
    assert offered_rate(8.0, [claim], 0.0) == 0.0
    assert offered_rate(8.0, [BandwidthClaim(remaining_bytes=80, deadline_s=20.0)], 0.0) == 4.0


def test_a_fetch_that_is_late_anyway_blocks_nobody() -> None:
    assert offered_rate(8.0, [BandwidthClaim(remaining_bytes=80, deadline_s=5.0)], 0.0) == 4.0


_SIZES = st.lists(st.floats(1, 1e4), max_size=5)


@given(_SIZES, st.floats(0.1, 1e4), st.floats(1, 100), st.floats(0, 2))
def test_bytes_by_a_time_and_time_for_bytes_are_inverse(
    sizes: list[float], size: float, capacity: float, work: float
) -> None:
    forecast = LinkForecast(capacity, [BandwidthClaim(remaining_bytes=it) for it in sizes])
    seconds = forecast.seconds_for(size) + size * work
    assert forecast.bytes_in(seconds, work) == pytest.approx(size, rel=1e-6)


@given(_SIZES, st.floats(1, 1e4))
def test_a_forecast_ends_with_all_bytes_of_all_fetches_moved(
    sizes: list[float], size: float
) -> None:
    """The link is never idle before the new fetch has ended."""
    seconds = LinkForecast(10.0, [BandwidthClaim(remaining_bytes=it) for it in sizes]).seconds_for(
        size
    )
    moved = size + sum(min(it, size) for it in sizes)
    assert seconds == pytest.approx(moved / 10.0)


def test_the_source_can_be_the_limit() -> None:
    assert LinkForecast(10.0, (), limit=4.0).seconds_for(8.0) == 2.0
