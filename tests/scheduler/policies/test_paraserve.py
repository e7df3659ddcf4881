from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.planner.decisions import Decision, DropSlot, Start, Stop, WarmSlot
from paraserve_scheduler.planner.fleet import Fleet, Objectives, ReplicaPhase
from paraserve_scheduler.planner.fleet_changes import with_start
from paraserve_scheduler.policies.autoscaling import (
    AutoscalingConfig,
    arrival_rate,
    replicas_to_start,
)
from paraserve_scheduler.policies.keep_alive import (
    LEAST_LIFE_S,
    MOST_LIFE_S,
    evictions,
    idle_by_gpu,
    rate_of,
    time_to_live_s,
)
from paraserve_scheduler.policies.paraserve import decide
from paraserve_scheduler.policies.registry import POLICIES, find_policy
from tests.support.fleets import (
    GB,
    NOW_S,
    make_fleet,
    make_gpu,
    make_kind,
    make_load,
    make_method,
    make_need,
    make_node,
)

SCALING = AutoscalingConfig()


def _starts(decisions: tuple[Decision, ...]) -> list[Start]:
    return [it for it in decisions if isinstance(it, Start)]


def _stops(decisions: tuple[Decision, ...]) -> list[str]:
    return [it.replica for it in decisions if isinstance(it, Stop)]


# ---- what every policy must keep to ----


@st.composite
def _fleets(draw: st.DrawFn) -> Fleet:
    kinds = [make_kind(make_method(slot_runtime_s=0.3, slot_bytes=GB // 2)), make_kind()]
    nodes = [
        make_node(
            f"n{index}",
            gbit=draw(st.sampled_from([16, 64])),
            kind=kinds[draw(st.integers(0, 1))],
            gpus=tuple(
                make_gpu(i, size_gb=size, free_gb=draw(st.sampled_from([0, size // 2, size])))
                for i, size in enumerate(draw(st.lists(st.sampled_from([22, 32]), min_size=1)))
            ),
        )
        for index in range(draw(st.integers(1, 4)))
    ]
    needs = tuple(
        make_need(f"d{index}", waiting=waiting, oldest_s=NOW_S - 1 if waiting else None)
        for index, waiting in enumerate(draw(st.lists(st.integers(0, 30), max_size=4)))
    )
    return make_fleet(*nodes, needs=needs)


@pytest.mark.parametrize("name", sorted(POLICIES))
@settings(deadline=None, max_examples=40)
@given(fleet=_fleets())
def test_no_policy_oversubscribes_a_gpu(name: str, fleet: Fleet) -> None:
    decisions = find_policy(name).decide(fleet, NOW_S)
    for start in _starts(decisions):
        fleet = with_start(fleet, start)
        assert all(gpu.free_bytes >= 0 for node in fleet.nodes for gpu in node.gpus)
        layers = [layer for stage in start.stages for layer in range(stage.start, stage.end)]
        assert layers == list(range(32))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_starts_a_waiting_model_on_an_empty_fleet_and_only_once(name: str) -> None:
    decide_it = find_policy(name).decide
    need = make_need()
    (start,) = _starts(decide_it(make_fleet(needs=(need,)), NOW_S))
    starting = make_load(phase=ReplicaPhase.STARTING, capacity=8 * len(start.stages))
    starting = replace(starting, idle_since_s=None)
    fleet = make_fleet(needs=(replace(need, replicas=(starting,)),))
    assert not _starts(decide_it(fleet, NOW_S + 1))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_scales_to_zero(name: str) -> None:
    need = make_need(waiting=0, oldest_s=None, replicas=(make_load(idle_since_s=NOW_S - 100),))
    assert _stops(find_policy(name).decide(make_fleet(needs=(need,)), NOW_S)) == ["chat.1"]


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_no_policy_stops_a_replica_that_works_or_grows(name: str) -> None:
    busy = make_load(in_flight=1, idle_since_s=None)
    growing = make_load("chat.2", is_growing=True, idle_since_s=NOW_S - 500)
    need = make_need(waiting=0, oldest_s=None, replicas=(busy, growing))
    assert not _stops(find_policy(name).decide(make_fleet(needs=(need,)), NOW_S))


def test_an_unknown_policy_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="no policy 'magic'; there are hydraserve"):
        find_policy("magic")


# ---- ours ----


def _full_fleet(**need: Any) -> Fleet:
    """Two nodes of one GPU each; two idle replicas of other models fill them."""
    nodes = [make_node(f"n{i}", gpus=(make_gpu(free_gb=4),)) for i in (0, 1)]
    idle = [
        make_need(
            name,
            waiting=0,
            oldest_s=None,
            arrivals_s=arrivals,
            replicas=(
                make_load(
                    f"{name}.1", reserved_bytes={(f"n{i}", 0): 28 * GB}, idle_since_s=NOW_S - 1
                ),
            ),
        )
        for i, (name, arrivals) in enumerate(
            [("rare", (NOW_S - 500, NOW_S - 300)), ("often", (NOW_S - 3, NOW_S - 2))]
        )
    ]
    return make_fleet(*nodes, needs=(*idle, make_need(**need)))


def test_the_idle_replica_that_is_least_likely_missed_makes_room() -> None:
    assert _stops(decide(_full_fleet(), NOW_S)) == ["rare.1"]


def test_room_is_made_for_what_waits_only() -> None:
    assert not _stops(decide(_full_fleet(waiting=0, oldest_s=None), NOW_S))


def test_of_two_deployments_the_more_urgent_gets_the_last_place() -> None:
    urgent = make_need("urgent", oldest_s=NOW_S - 2)
    calm = make_need("calm", oldest_s=NOW_S - 5, objectives=Objectives(ttft_s=60.0))
    fleet = make_fleet(make_node("n0", gpus=(make_gpu(free_gb=20),)), needs=(calm, urgent))
    assert [start.deployment for start in _starts(decide(fleet, NOW_S))] == ["urgent"]


def test_priority_goes_before_urgency() -> None:
    urgent = make_need("urgent", oldest_s=NOW_S - 2)
    important = make_need("important", oldest_s=NOW_S, priority=1)
    fleet = make_fleet(make_node("n0", gpus=(make_gpu(free_gb=20),)), needs=(urgent, important))
    assert [start.deployment for start in _starts(decide(fleet, NOW_S))] == ["important"]


def test_who_has_missed_anyway_lets_those_who_can_make_it_go_first() -> None:
    late = make_need("late", oldest_s=NOW_S - 100)
    fresh = make_need("fresh", oldest_s=NOW_S)
    fleet = make_fleet(make_node("n0", gpus=(make_gpu(free_gb=20),)), needs=(late, fresh))
    assert [start.deployment for start in _starts(decide(fleet, NOW_S))] == ["fresh"]


def test_who_has_newer_requests_in_time_goes_before_who_has_only_late_ones() -> None:
    late = make_need("late", oldest_s=NOW_S - 200, arrivals_s=(NOW_S - 200,))
    some = make_need(
        "some", waiting=2, oldest_s=NOW_S - 100, arrivals_s=(NOW_S - 300, NOW_S - 100, NOW_S - 1)
    )
    fleet = make_fleet(make_node("n0", gpus=(make_gpu(free_gb=20),)), needs=(late, some))
    assert [start.deployment for start in _starts(decide(fleet, NOW_S))] == ["some"]


def test_slots_are_kept_where_they_exist_and_starts_are_frequent() -> None:
    kind = make_kind(make_method(slot_runtime_s=0.3, slot_bytes=GB // 2))
    often = make_need(waiting=0, oldest_s=None, arrivals_s=(NOW_S - 2, NOW_S - 1))
    rare = make_need(waiting=0, oldest_s=None, arrivals_s=(NOW_S - 9e5, NOW_S - 8e5))
    bare, slotted = make_node("bare"), make_node("slotted", kind=kind)
    assert [
        it.node
        for it in decide(make_fleet(bare, slotted, needs=(often,)), NOW_S)
        if isinstance(it, WarmSlot)
    ] == ["slotted"]
    idle = replace(slotted, gpus=(make_gpu(slots=1),))
    expensive = replace(kind, start=replace(kind.start, slot_bytes=30 * GB, runtime_s=0.31))
    dropped = decide(make_fleet(replace(idle, kind=expensive), needs=(rare,)), NOW_S)
    assert [type(it) for it in dropped] == [DropSlot]


def test_the_more_often_starts_come_the_more_a_slot_is_worth() -> None:
    kind = make_kind(make_method(slot_runtime_s=0.3, slot_bytes=GB // 2))
    node = make_node("n0", kind=kind, gpus=(make_gpu(slots=1),))
    every_tenth = tuple(NOW_S - 0.1 * count for count in range(6, 0, -1))
    need = make_need(waiting=0, oldest_s=None, arrivals_s=every_tenth)
    assert not decide(make_fleet(node, needs=(need,)), NOW_S)


def test_deployments_share_a_slot_so_that_their_rates_add_up() -> None:
    """A slot of 1 GB saves 0.4 s: at 60 GB·s a second it is worth 24 s, a rate of 1.61 / 24."""
    kind = make_kind(make_method(runtime_s=0.7, slot_runtime_s=0.3, slot_bytes=GB))
    node = make_node("n0", kind=kind, gpus=(make_gpu(slots=1),))
    rare = [make_need(f"d{i}", waiting=0, arrivals_s=(NOW_S - 100, NOW_S)) for i in range(4)]
    kept = {
        count: not decide(make_fleet(node, needs=tuple(rare[:count])), NOW_S) for count in range(5)
    }
    assert kept == {0: True, 1: False, 2: False, 3: False, 4: True}


# ---- autoscaling ----


@pytest.mark.parametrize(
    ("waiting", "replicas", "wanted"),
    [
        (0, (), 0),
        (1, (), 1),
        (8, (), 1),
        (9, (), 2),
        (9, (make_load(phase=ReplicaPhase.STARTING),), 1),
        (3, (make_load(in_flight=4, idle_since_s=None),), 0),
        (90, (), 4),
    ],
)
def test_what_no_place_is_there_for_gets_replicas(
    waiting: int, replicas: tuple[Any, ...], wanted: int
) -> None:
    need = make_need(waiting=waiting, replicas=replicas)
    assert replicas_to_start(need, NOW_S, 5.0, SCALING) == wanted


def test_bounds_on_replicas_hold() -> None:
    assert replicas_to_start(make_need(waiting=90, max_replicas=2), NOW_S, 5.0, SCALING) == 2
    least = make_need(waiting=0, oldest_s=None, min_replicas=2, replicas=(make_load(),))
    assert replicas_to_start(least, NOW_S, 5.0, SCALING) == 1


def test_waiting_is_chosen_when_places_get_free_sooner_than_a_start_would_end() -> None:
    busy = make_load(in_flight=8, idle_since_s=None)
    need = make_need(waiting=2, replicas=(busy,), service_s=10.0)
    assert replicas_to_start(need, NOW_S, 5.0, SCALING) == 0
    assert replicas_to_start(need, NOW_S, 1.0, SCALING) == 1


def test_places_that_new_requests_take_are_not_counted_on() -> None:
    busy = make_load(in_flight=8, idle_since_s=None)
    steady = tuple(NOW_S - i for i in range(20, -1, -1))
    need = make_need(waiting=2, replicas=(busy,), service_s=10.0, arrivals_s=steady)
    assert replicas_to_start(need, NOW_S, 5.0, SCALING) == 1


def test_a_burst_that_goes_on_gets_more_than_what_waits_now() -> None:
    burst = tuple(NOW_S - 2 + i / 10 for i in range(20))
    calm = make_need(waiting=12)
    assert replicas_to_start(calm, NOW_S, 5.0, SCALING) == 2
    assert replicas_to_start(replace(calm, arrivals_s=burst), NOW_S, 5.0, SCALING) > 2


def test_steady_arrivals_are_forecast_at_their_rate() -> None:
    steady = tuple(NOW_S - i / 4 for i in range(100, 0, -1))
    assert arrival_rate(steady, NOW_S, 10.0) == pytest.approx(4.0, rel=0.03)
    assert arrival_rate(steady, NOW_S + 20, 10.0) == 0


# ---- keep-alive ----


@given(st.floats(1e-4, 10), st.floats(0.1, 100), st.floats(1e8, 1e11))
def test_a_layer_lives_within_its_bounds_and_no_longer_for_being_larger(
    rate: float, saved_s: float, held: float
) -> None:
    live_s = time_to_live_s(rate=rate, saved_s=saved_s, held_bytes=held)
    larger = time_to_live_s(rate=rate, saved_s=saved_s, held_bytes=2 * held)
    assert LEAST_LIFE_S <= larger <= live_s <= MOST_LIFE_S


def test_the_smaller_the_rate_the_longer_until_the_next_use_is_likely() -> None:
    """Break-even is the limit."""
    rare = time_to_live_s(rate=0.04, saved_s=1e9, held_bytes=1)
    often = time_to_live_s(rate=0.4, saved_s=1e9, held_bytes=1)
    assert rare == pytest.approx(10 * often)
    assert rare == pytest.approx(40, rel=0.01)


def test_the_rate_of_few_arrivals_is_not_known() -> None:
    assert rate_of((), NOW_S) is None
    assert rate_of((NOW_S - 1,), NOW_S) is None
    assert rate_of((NOW_S - 10, NOW_S - 5), NOW_S) == pytest.approx(0.2)


def test_low_priority_is_evicted_before_what_is_rarely_used() -> None:
    rare = make_need("rare", waiting=0, replicas=(make_load("rare.1"),), arrivals_s=())
    low = make_need(
        "low",
        waiting=0,
        priority=-1,
        replicas=(make_load("low.1", reserved_bytes={("n1", 0): 18 * GB}),),
        arrivals_s=(NOW_S - 2, NOW_S - 1),
    )
    nodes = [make_node(f"n{i}", gpus=(make_gpu(free_gb=14),)) for i in (0, 1)]
    idle = idle_by_gpu((rare, low), NOW_S)
    found = evictions(make_fleet(*nodes, needs=(rare, low)), 30 * GB, idle)
    assert [it.replicas for it in found] == [("low.1",), ("rare.1",)]


def test_no_more_is_evicted_than_one_gpu_needs() -> None:
    small = [
        make_need(
            f"d{i}",
            waiting=0,
            replicas=(make_load(f"d{i}.1", reserved_bytes={("n0", 0): 8 * GB}),),
            arrivals_s=(NOW_S - 100 + i, NOW_S - 50),
        )
        for i in range(4)
    ]
    node = make_node("n0", gpus=(make_gpu(free_gb=0),))
    idle = idle_by_gpu(small, NOW_S)
    (found,) = evictions(make_fleet(node, needs=tuple(small)), 18 * GB, idle)
    assert len(found.replicas) == 3
    assert found.freed_bytes == {("n0", 0): 24 * GB}
    assert not evictions(make_fleet(node, needs=tuple(small)), 40 * GB, idle)
