from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_scheduler.policies.keep_alive import UNKNOWN_LIFE_S
from paraserve_scheduler.policies.registry import POLICIES
from paraserve_scheduler.reconciler.placement import equal_split
from paraserve_scheduler.state.actions import (
    Action,
    DropDeployment,
    FailDeployment,
    KeepSlots,
    RemovePart,
    RemoveReplica,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.events import (
    DeletionRequested,
    HandOverFailed,
    NodeCordoned,
    NodeRegistered,
    PartRemoved,
    SlotsRefused,
)
from paraserve_scheduler.state.records import DeploymentState, Failure, NodeInfo, PartState, Phase
from tests.support.histories import (
    LOST_PROCESS,
    NO_OBJECT,
    TRIED_AGAIN_S,
    History,
)
from tests.support.scheduler_records import (
    CONFIG,
    NOW_S,
    make_deployment,
    make_heartbeat,
    make_node_info,
    make_state,
)


def _kinds(actions: tuple[Action, ...]) -> list[type]:
    return [type(action) for action in actions]


# ---- starting ----


def test_without_demand_nothing_is_started() -> None:
    history = History()
    history.demand(in_flight=0)
    assert history.decides() == ()


def test_waiting_demand_starts_one_replica_on_all_nodes() -> None:
    history = History()
    history.demand(waiting=3)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert start.plan.replica == "tiny.1"
    assert {stage.node for stage in start.plan.stages} == {"n0", "n1"}
    assert start.reason.startswith("3 wait: layers [0, 2) on n0, [2, 4) on n1; ready in 2.5")


def test_the_start_remembers_when_the_demand_was_first_seen() -> None:
    history = History(nodes=[])
    history.demand(waiting=1)
    history.passes(3)
    history.happens(NodeRegistered(info=make_node_info("n0"), at_s=history.now_s))
    assert history.decides() == (), "a node is not used before its first heartbeat"
    history.happens(make_heartbeat("n0", at_s=history.now_s))
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert start.requested_s == NOW_S


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.READY])
def test_a_starting_or_ready_replica_is_enough(phase: Phase) -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    if phase is Phase.READY:
        history.becomes_ready("tiny.1")
    history.demand(waiting=9)
    assert history.decides() == ()


def test_demand_that_comes_while_the_replica_stops_starts_a_new_one() -> None:
    history = History()
    history.serves()
    history.passes(60)
    assert _kinds(history.decides()) == [StopReplica]
    history.demand(waiting=1)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert start.plan.replica == "tiny.2"


def test_two_deployments_do_not_get_the_same_memory_or_ports() -> None:
    deployments = [make_state(make_deployment(name)) for name in ("a", "b")]
    history = History(deployments=deployments)
    history.demand("a", waiting=1)
    history.demand("b", waiting=1)
    first, second = history.decides()
    assert isinstance(first, StartReplica)
    assert isinstance(second, StartReplica)
    for node in ("n0", "n1"):
        assert not first.plan.ports_on(node) & second.plan.ports_on(node)


def test_what_a_silent_gateway_said_counts_no_more() -> None:
    history = History()
    history.demand(waiting=1)
    history.passes(CONFIG.gateway_timeout_s + 0.1, silent=["g0"])
    assert history.decides() == ()


def test_nodes_that_are_lost_or_without_triton_get_nothing() -> None:
    nodes = [make_node_info(name) for name in ("n0", "n1", "n2")]
    history = History(nodes=nodes)
    history.passes(TRIED_AGAIN_S, silent=["n0"])
    history.happens(make_heartbeat("n1", triton_live=False, at_s=history.now_s))
    history.demand(waiting=1)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert [stage.node for stage in start.plan.stages] == ["n2"]


# ---- scale to zero ----


@pytest.mark.parametrize(
    ("idle_s", "in_flight", "stops"), [(59, 0, False), (60, 0, True), (600, 1, False)]
)
def test_a_replica_stops_when_idle_for_its_keep_alive_time(
    idle_s: float, in_flight: int, stops: bool
) -> None:
    history = History()
    replica = history.serves()
    history.demand(in_flight=in_flight)
    history.passes(idle_s)
    assert _kinds(history.decides()) == ([StopReplica] if stops else [])
    assert (history.view.replicas[replica].phase is Phase.STOPPING) is stops


def test_a_request_between_two_reports_keeps_the_replica() -> None:
    history = History()
    history.serves()
    history.passes(50)
    history.demand(arrived=1)  # came and was answered
    history.passes(50)
    assert history.decides() == ()


def test_an_idle_replica_is_removed_when_every_gateway_has_let_go_of_it() -> None:
    history = History()
    replica = history.serves()
    history.demand(gateway="g1")
    history.passes(60)
    assert _kinds(history.decides()) == [StopReplica]
    assert history.decides() == (), "a request may still be on its way"
    history.passes(CONFIG.settle_s, silent=["g1"])
    assert history.decides() == (), "g1 has not reported since"
    history.demand(gateway="g1", in_flight=1, replica_in_flight={replica: 1})
    assert history.decides() == (), "g1 had sent it one more"
    history.demand(gateway="g1")
    assert history.decides() == (RemoveReplica(replica=replica, reason="no request runs on it"),)
    assert history.decides() == (), "it is being removed"


def test_a_request_that_never_ends_does_not_keep_a_stopping_replica() -> None:
    history = History()
    replica = history.serves()
    history.happens(DeletionRequested(deployment="tiny"))
    history.demand(in_flight=1, replica_in_flight={replica: 1})
    history.decides()
    history.passes(CONFIG.drain_grace_s - 1)
    assert history.decides() == ()
    history.passes(1)
    (removal,) = history.decides()
    assert isinstance(removal, RemoveReplica)
    assert removal.reason == "1 requests did not end within 30 s"


# ---- failures ----


def test_a_failed_part_takes_the_whole_replica_down_and_it_is_tried_again() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    history.part("tiny.1", 0, Phase.READY)
    history.part("tiny.1", 1, Phase.FAILED, LOST_PROCESS)
    stop, removal, start = history.decides()
    assert stop == StopReplica(replica="tiny.1", reason=LOST_PROCESS.message, failure=LOST_PROCESS)
    assert removal == RemoveReplica(replica="tiny.1", reason="it failed")
    assert isinstance(start, StartReplica)
    assert start.plan.replica == "tiny.2"


def _fail_start(history: History, failure: Failure) -> tuple[Action, ...]:
    """Let the newest replica fail; returns what is done next."""
    replica = history.view.live_replicas()[-1].id
    history.part(replica, 0, Phase.FAILED, failure)
    actions = history.decides()
    history.removed(replica)
    return actions


def _fail_starts(history: History, failure: Failure, count: int) -> tuple[Action, ...]:
    """Let as many starts fail, each once it is tried; returns what is done after the last."""
    for _ in range(count - 1):
        actions = _fail_start(history, failure)
        history.passes(TRIED_AGAIN_S)
        assert StartReplica in _kinds((*actions, *history.decides()))
    return _fail_start(history, failure)


def test_after_three_failed_starts_the_waiting_requests_fail_with_the_last_reason() -> None:
    history = History()
    history.demand(waiting=2)
    history.decides()
    *_, failed = _fail_starts(history, LOST_PROCESS, 3)
    assert isinstance(failed, FailDeployment)
    assert failed.failure == LOST_PROCESS
    state = history.view.deployments["tiny"]
    assert (state.failure, state.failure_number) == (LOST_PROCESS, 1)
    assert history.decides() == (), "one failure is told once"


def test_new_requests_fail_at_once_until_the_window_has_passed() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    _fail_starts(history, LOST_PROCESS, 3)
    history.passes(CONFIG.failure_window_s - 2 * TRIED_AGAIN_S - 1)
    history.demand(waiting=1)
    assert _kinds(history.decides()) == [FailDeployment]
    assert history.view.deployments["tiny"].failure_number == 2
    history.passes(1)
    history.demand(waiting=1)
    assert _kinds(history.decides()) == [StartReplica]


def test_what_cannot_be_better_next_time_is_not_tried_again() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    *_, failed = _fail_start(history, NO_OBJECT)
    assert isinstance(failed, FailDeployment)
    assert failed.failure == NO_OBJECT


def test_what_may_have_been_repaired_is_tried_again_soon() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    _fail_start(history, NO_OBJECT)
    history.passes(CONFIG.repair_pause_s - 1)
    history.demand(waiting=1)
    assert _kinds(history.decides()) == [FailDeployment], "nobody can have repaired it yet"
    history.passes(1)
    history.demand(waiting=1)
    assert _kinds(history.decides()) == [StartReplica]


def test_a_replica_that_became_ready_clears_earlier_failures() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    _fail_starts(history, LOST_PROCESS, 2)
    history.passes(TRIED_AGAIN_S)
    history.decides()
    history.becomes_ready("tiny.3")
    assert _kinds(_fail_start(history, LOST_PROCESS))[-1] is StartReplica


def test_the_third_try_waits_until_a_node_that_was_lost_is_known_to_be() -> None:
    history = History(nodes=[make_node_info(name) for name in ("n0", "n1", "n2")])
    history.demand(waiting=1)
    history.decides()
    assert _kinds(_fail_start(history, LOST_PROCESS))[-1] is StartReplica, "the second does not"
    assert StartReplica not in _kinds(_fail_start(history, LOST_PROCESS))
    history.passes(CONFIG.node_timeout_s, silent=["n0"])
    assert history.decides() == ()
    history.passes(0.1, silent=["n0"])
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert {stage.node for stage in start.plan.stages} == {"n1", "n2"}


def test_a_least_replica_that_cannot_start_is_tried_at_intervals() -> None:
    history = _several(min_replicas=1)
    history.decides()
    _fail_starts(history, LOST_PROCESS, 3)
    assert history.decides() == ()
    history.passes(2 * CONFIG.node_timeout_s)
    assert history.decides() == ()
    history.passes(0.5)
    assert _kinds(history.decides()) == [StartReplica]


def test_a_lost_node_stops_its_replicas_and_the_rest_serves() -> None:
    history = History(nodes=[make_node_info(name) for name in ("n0", "n1", "n2")])
    history.serves()
    history.demand(waiting=1)
    history.passes(CONFIG.node_timeout_s + 0.5, silent=["n1"])
    stop, removal, start = history.decides()
    assert isinstance(stop, StopReplica)
    assert stop.reason == "Node n1 was lost: silent for 5.5 s."
    assert isinstance(removal, RemoveReplica)
    assert isinstance(start, StartReplica)
    assert {stage.node for stage in start.plan.stages} == {"n0", "n2"}


def test_a_node_whose_triton_is_down_stops_its_replicas() -> None:
    history = History()
    history.serves()
    history.happens(make_heartbeat("n1", triton_live=False, at_s=history.now_s))
    stop, _ = history.decides()
    assert isinstance(stop, StopReplica)
    assert stop.reason == "Triton on node n1 does not answer."


def test_an_agent_that_registers_again_is_not_lost() -> None:
    history = History()
    history.serves()
    history.happens(NodeRegistered(info=make_node_info("n1"), at_s=history.now_s))
    assert history.decides() == ()


def test_a_part_that_a_heartbeat_no_longer_lists_is_lost() -> None:
    history = History()
    replica = history.serves()
    history.passes(1)  # both nodes have listed it
    history.happens(make_heartbeat("n1", at_s=history.now_s))
    stop, *_ = history.decides()
    assert isinstance(stop, StopReplica)
    assert stop.reason == f"Node n1 no longer has {replica}."


def test_a_heartbeat_older_than_the_start_does_not_harm_it() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    history.happens(make_heartbeat("n0", at_s=history.now_s))
    history.part("tiny.1", 0, Phase.READY)
    late = PartState(replica="tiny.1", stage=0, phase=Phase.STARTING)
    history.happens(make_heartbeat("n0", parts=(late,), at_s=history.now_s))
    assert history.decides() == ()
    assert history.view.replicas["tiny.1"].parts[0].phase is Phase.READY


def test_a_start_that_takes_for_ever_is_given_up() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    history.passes(CONFIG.start_timeout_s + 1)
    stop, *_ = history.decides()
    assert isinstance(stop, StopReplica)
    assert stop.reason == "tiny.1 was not ready within 900 s."


# ---- room ----


def _one_context(name: str, **spec: Any) -> DeploymentState:
    """A deployment whose replicas take the least that any can."""
    return make_state(make_deployment(name, max_context=256, max_sequences=1, **spec))


def _small_node(deployments: int) -> list[NodeInfo]:
    """One node with room for the replicas of so many such deployments."""
    (whole,) = equal_split(make_deployment(), 1, CONFIG.placement.kv_block_size)
    return [make_node_info("n0", memory_bytes=deployments * whole.needs(16) + 1_000)]


def test_without_room_requests_wait_a_while_and_then_fail_with_the_numbers() -> None:
    history = History(nodes=[make_node_info("n0", memory_bytes=1_000)])
    history.demand(waiting=1)
    assert history.decides() == ()
    history.passes(CONFIG.capacity_grace_s - 1)
    assert history.decides() == ()
    history.passes(1)
    (failed,) = history.decides()
    assert isinstance(failed, FailDeployment)
    assert failed.failure.grpc_code == "UNAVAILABLE"
    assert "are missing" in failed.failure.message
    assert history.decides() == ()


def test_the_longest_idle_replica_makes_room_for_another_deployment() -> None:
    states = [_one_context(name) for name in ("a", "b", "c")]
    history = History(nodes=_small_node(2), deployments=states)
    first = history.serves("a")
    history.passes(1)
    history.serves("b")
    history.demand("c", waiting=1)
    (stop,) = history.decides()
    assert stop == StopReplica(replica=first, reason="idle, and 'c' needs its room")
    assert history.decides() == (), "what leaves is enough"
    history.passes(CONFIG.settle_s)
    assert _kinds(history.decides()) == [RemoveReplica]
    history.removed(first)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert start.plan.deployment == "c"


def test_a_busy_replica_makes_no_room() -> None:
    states = [_one_context(name) for name in ("a", "b")]
    history = History(nodes=_small_node(1), deployments=states)
    history.serves("a")
    history.demand("a", in_flight=1)
    history.demand("b", waiting=1)
    history.passes(CONFIG.capacity_grace_s)
    assert _kinds(history.decides()) == [FailDeployment]


# ---- several replicas ----


def _several(**spec: Any) -> History:
    nodes = [make_node_info(name) for name in ("n0", "n1", "n2")]
    states = [make_state(make_deployment(max_stages=1, **spec))]
    return History(nodes=nodes, deployments=states)


def _load(history: History, **running: int) -> None:
    """So many requests run on each replica."""
    by_replica = {name.replace("_", "."): count for name, count in running.items()}
    history.demand(in_flight=sum(running.values()), replica_in_flight=by_replica)


def test_requests_that_queue_in_a_full_replica_start_another_one() -> None:
    history = _several(max_replicas=2, max_sequences=4)
    history.serves()
    _load(history, tiny_1=4)
    assert history.decides() == ()
    _load(history, tiny_1=5)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert start.plan.replica == "tiny.2"
    history.becomes_ready("tiny.2")
    _load(history, tiny_1=9, tiny_2=9)
    assert history.decides() == (), "two are all it may have"


def test_a_replica_that_is_spare_goes_while_the_other_works_on() -> None:
    history = _several(max_replicas=2, max_sequences=4, keep_alive_s=10.0)
    history.serves()
    _load(history, tiny_1=5)
    history.decides()
    history.becomes_ready("tiny.2")
    _load(history, tiny_1=1, tiny_2=1)
    _load(history, tiny_1=1)
    history.passes(9)
    assert history.decides() == ()
    history.passes(1)
    (stop,) = history.decides()
    assert isinstance(stop, StopReplica)
    assert stop.replica == "tiny.2"


def test_least_replicas_are_kept_without_a_request() -> None:
    history = _several(min_replicas=1)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    history.becomes_ready("tiny.1")
    history.passes(1_000)
    assert history.decides() == ()


def test_a_user_who_says_nothing_gets_a_replica_kept_while_it_is_worth_it() -> None:
    history = _several(keep_alive_s=None)
    history.serves()
    history.passes(UNKNOWN_LIFE_S - 1)
    assert history.decides() == ()
    history.passes(2)
    assert _kinds(history.decides()) == [StopReplica]


def test_of_two_deployments_that_lack_room_the_one_of_higher_priority_starts() -> None:
    states = [_one_context("low"), _one_context("high", priority=1)]
    history = History(nodes=_small_node(1), deployments=states)
    history.demand("low", waiting=1)
    history.demand("high", waiting=1)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert start.plan.deployment == "high"


# ---- slots ----


def test_a_node_is_told_once_to_keep_a_slot() -> None:
    history = History(nodes=[make_node_info("n0", max_slots=1), make_node_info("n1")])
    assert history.decides() == (KeepSlots(node="n0", idle_slots=1, reason="starts are frequent"),)
    assert history.decides() == ()


def test_a_node_that_refused_is_told_again() -> None:
    history = History(nodes=[make_node_info("n0", max_slots=1)])
    history.decides()
    history.happens(SlotsRefused(node="n0"))
    assert _kinds(history.decides()) == [KeepSlots]


# ---- other policies ----


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_every_policy_starts_what_waits_and_stops_what_is_idle(name: str) -> None:
    # Large enough for what HydraServe reserves whatever the model.
    nodes = [make_node_info(node, memory_bytes=64 << 30) for node in ("n0", "n1")]
    history = History(nodes=nodes, config=replace(CONFIG, name=name))
    history.serves()
    assert len(history.view.live_replicas()) == 1
    history.passes(61)
    assert _kinds(history.decides()) == [StopReplica]


# ---- tidying up ----


def test_a_deleted_deployment_goes_after_its_replicas() -> None:
    history = History()
    replica = history.serves()
    history.happens(DeletionRequested(deployment="tiny"))
    assert _kinds(history.decides()) == [StopReplica]
    history.passes(CONFIG.settle_s)
    assert _kinds(history.decides()) == [RemoveReplica]
    history.removed(replica)
    assert _kinds(history.decides()) == [DropDeployment]
    assert history.view.deployments == {}
    assert history.view.replicas == {}


def test_a_deletion_during_the_start_waits_for_nothing() -> None:
    history = History()
    history.demand(waiting=1)
    history.decides()
    history.happens(DeletionRequested(deployment="tiny"))
    assert _kinds(history.decides()) == [StopReplica, RemoveReplica]


def test_parts_that_no_replica_has_are_removed_before_the_node_is_used() -> None:
    history = History()
    orphan = PartState(replica="gone.4", stage=0, phase=Phase.READY)
    history.happens(make_heartbeat("n0", parts=(orphan,), at_s=history.now_s))
    history.demand(waiting=1)
    removal, start = history.decides()
    assert removal == RemovePart(node="n0", replica="gone.4", reason="no replica has this part")
    assert isinstance(start, StartReplica)
    assert [stage.node for stage in start.plan.stages] == ["n1"]
    assert history.decides() == ()
    history.happens(PartRemoved(node="n0", replica="gone.4"))
    assert history.decides() == ()


# ---- whatever happens ----

_STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            [
                *("wait", "idle", "ready", "fail", "pass", "lose", "delete", "removed"),
                *("busy", "burst", "notified", "not notified", "drain", "undo"),
            ]
        ),
        st.integers(0, 2),
    ),
    max_size=60,
)


@given(_STEPS)
@settings(max_examples=200, deadline=None)
def test_no_history_overbooks_a_node_or_starts_a_second_replica_or_successor(
    steps: list[tuple[str, int]],
) -> None:
    names = ["a", "b", "c"]
    (whole,) = equal_split(make_deployment(), 1, CONFIG.placement.kv_block_size)
    nodes = [
        make_node_info(
            f"n{index}", memory_bytes=int(2.5 * whole.needs(16)), channel_ports=(9000, 9005)
        )
        for index in range(3)
    ]
    deployments = [make_deployment(name, consolidate=True, max_context=256) for name in names]
    history = History(nodes=nodes, deployments=[make_state(each) for each in deployments])
    for step, which in steps:
        _take_step(history, step, which, names)
        history.decides()
        _check_invariants(history)


def _take_step(history: History, step: str, which: int, names: list[str]) -> None:
    live = history.view.live_replicas()
    replica = live[which % len(live)] if live else None
    if step == "wait" and names[which] in history.view.deployments:
        history.demand(names[which], waiting=1)
    elif step == "idle":
        history.demand(names[which])
    elif step == "pass":
        history.passes(4.0)
    elif step == "lose":
        history.passes(6.0, silent=[f"n{which}"])
    elif step == "delete":
        history.happens(DeletionRequested(deployment=names[which]))
    elif step == "ready" and replica is not None:
        history.becomes_ready(replica.id)
    elif step == "fail" and replica is not None:
        history.part(replica.id, 0, Phase.FAILED, LOST_PROCESS)
    elif step == "removed" and replica is not None and replica.removing:
        history.removed(replica.id)
    elif step in ("busy", "burst") and replica is not None:
        in_flight = 1 if step == "busy" else 9
        running = {replica.id: in_flight}
        history.demand(replica.deployment, in_flight=in_flight, replica_in_flight=running)
    elif step == "notified" and replica is not None and replica.hand_over.is_notifying:
        history.notified(
            replica.id, *(successor.id for successor in history.view.ready_successors(replica))
        )
    elif step == "not notified" and replica is not None and replica.hand_over.is_notifying:
        history.happens(HandOverFailed(replica=replica.id, at_s=history.now_s))
    elif step in ("drain", "undo"):
        history.happens(NodeCordoned(node=f"n{which}", cordoned=step == "drain"))


def _check_invariants(history: History) -> None:
    view = history.view
    for name, node in view.nodes.items():
        assert view.reserved_bytes(name) <= node.info.memory_bytes
        ports = [port for r in view.live_replicas() for port in r.plan.ports_on(name)]
        assert len(ports) == len(set(ports))
    for deployment in view.deployments:
        wanted = [replica for replica in view.live_replicas(deployment) if replica.is_wanted]
        assert sum(replica.plan.succeeds is None for replica in wanted) <= 1
        ready = any(replica.phase is Phase.READY for replica in wanted)
        assert bool(view.routed_replicas(deployment)) is ready
    for replica in view.live_replicas():
        assert replica.deployment in view.deployments
        successors = view.successors(replica)
        assert len(successors) <= len(replica.plan.stages)
        heads = {successor.plan.head.node for successor in successors}
        assert len(heads) == len(successors)
        if successors and len(replica.plan.stages) == 1:
            assert replica.plan.head.node not in heads
