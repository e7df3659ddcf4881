"""Pauses of a deployment whose starts fail or whose replicas die, and what those who wait get."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.reconciler.setbacks import pause_of, recent_deaths, refusal
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import FailDeployment, StartReplica
from paraserve_scheduler.state.records import Failure, NodeState, Phase, Setback
from tests.support.histories import LOST_PROCESS, NO_OBJECT, History
from tests.support.scheduler_records import (
    CONFIG,
    NOW_S,
    make_deployment,
    make_heartbeat,
    make_node_info,
    make_state,
    make_view,
)

#: Seconds between two deaths: less than any pause.
SOON_S = 1.0


def setback(at_s: float, failure: Failure = LOST_PROCESS, *nodes: str) -> Setback:
    return Setback(at_s=at_s, failure=failure, nodes=nodes)


def turn_at(
    now_s: float,
    *,
    deaths: Sequence[Setback] = (),
    failed_starts: Sequence[Setback] = (),
    nodes: Sequence[NodeState] = (),
) -> Turn:
    state = make_state(deaths=tuple(deaths), failed_starts=tuple(failed_starts))
    view = make_view(nodes=(), deployments=[state])
    view = replace(view, nodes={node.info.name: node for node in nodes})
    return Turn(view=view, now_s=now_s, config=CONFIG)


def pause_s(turn: Turn, newest_s: float) -> float:
    """How long the deployment pauses after its newest setback."""
    pause = pause_of(turn, turn.view.deployments["tiny"])
    return 0.0 if pause is None else pause.until_s - newest_s


# ---- deaths ----


def test_the_fifth_death_and_those_after_it_cost_a_pause_that_doubles() -> None:
    times = [NOW_S]
    lengths = []
    for _ in range(12):
        deaths = [setback(at_s) for at_s in times]
        lengths.append(pause_s(turn_at(times[-1], deaths=deaths), times[-1]))
        times.append(times[-1] + lengths[-1] + SOON_S)
    # After the longest pause nothing has died for long enough.
    assert lengths == [0, 0, 0, 0, 10, 20, 40, 80, 160, 300, 0, 0]


@pytest.mark.parametrize(("within_s", "is_paused"), [(299.9, True), (300.0, False)])
def test_five_deaths_must_come_within_the_window(within_s: float, is_paused: bool) -> None:
    times = [NOW_S + number * within_s / 4 for number in range(5)]
    turn = turn_at(times[-1], deaths=[setback(at_s) for at_s in times])
    assert (pause_s(turn, times[-1]) > 0) is is_paused


def test_a_while_without_a_death_makes_them_forgotten() -> None:
    deaths = [setback(NOW_S + number) for number in range(8)]
    later_s = deaths[-1].at_s + CONFIG.death_window_s
    state = make_state(deaths=tuple(deaths))
    assert recent_deaths(turn_at(later_s - 0.1, deaths=deaths), state) == 1
    assert recent_deaths(turn_at(later_s, deaths=deaths), state) == 0
    deaths.append(setback(later_s))
    assert pause_s(turn_at(later_s, deaths=deaths), later_s) == 0


@given(st.lists(st.floats(0, 700), min_size=1, max_size=32))
def test_no_pause_is_longer_than_the_longest_or_comes_without_five_deaths(
    gaps: list[float],
) -> None:
    times = [NOW_S]
    for gap_s in gaps:
        times.append(times[-1] + gap_s)
    length_s = pause_s(turn_at(times[-1], deaths=list(map(setback, times))), times[-1])
    assert 0 <= length_s <= CONFIG.most_pause_s
    if length_s:
        windows = ([t for t in times if at_s - 300 < t <= at_s] for at_s in times)
        assert max(map(len, windows)) >= CONFIG.max_deaths


def _dies(history: History, failure: Failure = LOST_PROCESS) -> str:
    """Have the newest replica die; nothing is left of it."""
    replica = history.view.live_replicas()[-1].id
    history.part(replica, 0, Phase.FAILED, failure)
    history.decides()
    history.removed(replica)
    return replica


def _starts(history: History) -> list[str]:
    """What is started now."""
    actions = history.decides()
    return [action.plan.replica for action in actions if isinstance(action, StartReplica)]


def _dies_often(history: History, times: int, failure: Failure = LOST_PROCESS) -> None:
    """Have it serve and die so many times, each time at once."""
    for _ in range(times):
        history.serves()
        _dies(history, failure)


def test_after_five_deaths_requests_get_the_reason_and_nothing_starts_for_a_while() -> None:
    history = History()
    _dies_often(history, 5)
    history.demand(waiting=2)
    (failed,) = history.decides()
    assert isinstance(failed, FailDeployment)
    assert failed.failure.grpc_code == "UNAVAILABLE"
    assert LOST_PROCESS.message in failed.failure.message
    assert "5 of its replicas died within 5 minutes" in failed.failure.message
    history.passes(CONFIG.death_pause_s)
    history.demand(waiting=1)
    assert isinstance(history.decides()[0], FailDeployment)
    history.passes(0.1)
    history.demand(waiting=1)
    assert _starts(history) == ["tiny.6"]


def test_four_deaths_cost_nothing() -> None:
    history = History()
    _dies_often(history, 4)
    history.demand(waiting=1)
    assert _starts(history) == ["tiny.5"]


def test_a_deployment_that_pauses_starts_no_further_replica_beside_those_it_has() -> None:
    deployment = make_deployment(min_replicas=2, max_replicas=3)
    nodes = [make_node_info(name) for name in ("n0", "n1", "n2")]
    history = History(deployments=[make_state(deployment)], nodes=nodes)
    for _ in range(5):
        _starts(history)
        for replica in history.view.live_replicas():
            history.becomes_ready(replica.id)
        _dies(history)
        history.passes(0)
    (left,) = [each for each in history.view.live_replicas() if each.is_wanted]
    history.demand(waiting=20)
    assert history.decides() == ()
    assert history.view.replicas[left.id].is_wanted
    history.passes(CONFIG.death_pause_s + 0.1)
    assert _starts(history)


def test_removals_deletions_and_lost_nodes_are_no_deaths() -> None:
    nodes = [make_node_info(name) for name in ("n0", "n1")]
    history = History(nodes=nodes)
    for _ in range(6):
        history.serves()
        head = history.view.live_replicas()[-1].plan.head.node
        history.passes(CONFIG.node_timeout_s + 0.1, silent=[head])
        history.decides()
        for replica in history.view.live_replicas():
            history.removed(replica.id)
        history.passes(0)
    history.serves()
    history.passes(CONFIG.gateway_timeout_s)
    history.demand()
    history.passes(60)  # its keep-alive
    history.decides()
    turn = history.turn()
    state = turn.view.deployments["tiny"]
    assert recent_deaths(turn, state) <= 1
    assert pause_of(turn, state) is None


def test_a_replica_that_its_node_forgot_did_not_die() -> None:
    history = History()
    for _ in range(6):
        replica = history.serves()
        history.passes(0)  # a heartbeat lists it
        node = history.view.replicas[replica].plan.head.node
        history.happens(make_heartbeat(node, at_s=history.now_s))  # its agent has restarted
        history.decides()
        history.removed(replica)
        history.passes(6)
    turn = history.turn()
    assert recent_deaths(turn, turn.view.deployments["tiny"]) <= 3


# ---- a node's fault ----


def _node(lost_s: float | None) -> NodeState:
    info = make_node_info("n0")
    return NodeState(info=info, last_seen_s=NOW_S, triton_live=True, triton_lost_s=lost_s)


@pytest.mark.parametrize(
    ("lost_after_s", "is_forgiven"),
    [(None, False), (-61, False), (-59, True), (0, True), (14, True), (16, False)],
)
def test_what_dies_with_its_triton_or_soon_after_is_the_nodes_fault(
    lost_after_s: float | None, is_forgiven: bool
) -> None:
    node = _node(None if lost_after_s is None else NOW_S + lost_after_s)
    own = [setback(NOW_S, LOST_PROCESS, "n1") for _ in range(4)]
    deaths = [*own, setback(NOW_S, LOST_PROCESS, "n1", "n0")]
    assert (pause_s(turn_at(NOW_S, deaths=deaths, nodes=[node]), NOW_S) == 0) is is_forgiven


def test_failed_starts_that_are_the_nodes_fault_refuse_nobody() -> None:
    failures = [setback(NOW_S, LOST_PROCESS, "n0") for _ in range(3)]
    for lost_s, is_refused in ((None, True), (NOW_S, False)):
        turn = turn_at(NOW_S, failed_starts=failures, nodes=[_node(lost_s)])
        assert (refusal(turn, turn.view.deployments["tiny"]) is not None) is is_refused


def test_a_model_that_brings_every_triton_down_is_refused_in_the_end() -> None:
    failures = [setback(NOW_S, LOST_PROCESS, "n0") for _ in range(6)]
    turn = turn_at(NOW_S, failed_starts=failures, nodes=[_node(NOW_S)])
    assert refusal(turn, turn.view.deployments["tiny"]) == LOST_PROCESS


def test_a_report_that_triton_is_not_live_is_remembered() -> None:
    view = make_view()
    history = History()
    history.happens(make_heartbeat("n0", triton_live=False, at_s=NOW_S + 1))
    history.happens(make_heartbeat("n0", at_s=NOW_S + 2))
    assert history.view.nodes["n0"].triton_lost_s == NOW_S + 1
    assert view.nodes["n0"].triton_lost_s is None


# ---- starts that fail ----


def _fails_every_start(history: History, failure: Failure, seconds: int) -> list[int]:
    """Have every start fail, which is seen a second later; returns in which seconds one began."""
    tries = []
    for second in range(seconds):
        history.decides()
        for replica in history.view.live_replicas():
            if replica.is_wanted:
                tries.append(second)
                history.part(replica.id, 0, Phase.FAILED, failure)
            else:
                history.removed(replica.id)
        history.passes(1)
    return tries


def test_a_least_replica_that_never_starts_is_tried_less_and_less_often() -> None:
    history = History(deployments=[make_state(make_deployment(min_replicas=1))])
    tries = _fails_every_start(history, LOST_PROCESS, 33 * 60)
    gaps = [later - sooner for sooner, later in pairwise(tries)]
    assert gaps[:7] == [1, 7, 12, 22, 42, 82, 162]
    assert set(gaps[7:]) == {302}
    assert len(tries) == 13  # there were 201 before the pause grew


def test_what_can_only_fail_again_is_tried_less_and_less_often_where_nobody_asks() -> None:
    history = History(deployments=[make_state(make_deployment(min_replicas=1))])
    assert len(_fails_every_start(history, NO_OBJECT, 600)) < 10
    # Somebody who asks has repaired it, maybe.
    history.demand(waiting=1)
    assert _starts(history)


def test_requests_are_refused_while_a_start_that_fails_again_and_again_pauses() -> None:
    times = [NOW_S + 100 * number for number in range(8)]
    failures = [setback(at_s) for at_s in times]
    turn = turn_at(times[-1] + 200, failed_starts=failures)
    assert refusal(turn, turn.view.deployments["tiny"]) == LOST_PROCESS
    turn = turn_at(times[-1] + 301, failed_starts=failures)
    assert refusal(turn, turn.view.deployments["tiny"]) is None
