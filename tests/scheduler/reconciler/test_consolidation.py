from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from paraserve_scheduler.reconciler.placement import equal_split
from paraserve_scheduler.state.actions import (
    Action,
    HandOver,
    RemoveReplica,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.events import DeletionRequested, HandOverFailed
from paraserve_scheduler.state.records import NodeInfo, Phase
from tests.support.histories import (
    LOST_PROCESS,
    NO_OBJECT,
    TRIED_AGAIN_S,
    History,
)
from tests.support.scheduler_records import (
    CONFIG,
    make_deployment,
    make_node_info,
    make_state,
)

RULES = CONFIG.consolidation
BLOCK = CONFIG.placement.kv_block_size


def _history(*nodes: str | NodeInfo, **spec: Any) -> History:
    """A cluster with a deployment that is consolidated, on two nodes if none are named."""
    infos = [node if isinstance(node, NodeInfo) else make_node_info(node) for node in nodes]
    infos = infos or [make_node_info("n0"), make_node_info("n1")]
    # As many instances as its pipeline may become.
    deployment = make_deployment(**{"consolidate": True, "max_replicas": len(infos), **spec})
    return History(
        nodes=infos,
        deployments=[make_state(deployment)],
    )


def _busy(history: History, in_flight: int = 1, replica: str = "tiny.1") -> None:
    """Requests run on a replica, which has answered."""
    history.demand(
        in_flight=in_flight,
        replica_in_flight={replica: in_flight},
        first_token_s={replica: history.now_s},
    )


def _serving(*nodes: str | NodeInfo, in_flight: int = 1, **spec: Any) -> History:
    """A pipeline has served for as long as a pipeline must."""
    history = _history(*nodes, **spec)
    history.serves()
    _busy(history, in_flight)
    history.passes(RULES.after_s)
    return history


def _starts(actions: Iterable[Action]) -> list[StartReplica]:
    return [action for action in actions if isinstance(action, StartReplica)]


def _handing_over(*nodes: str | NodeInfo, in_flight: int = 1, **spec: Any) -> History:
    """Its successors are ready, and its head knows."""
    history = _serving(*nodes, in_flight=in_flight, **spec)
    successors = [start.plan.replica for start in _starts(history.decides())]
    for successor in successors:
        history.becomes_ready(successor)
    history.decides()
    history.notified("tiny.1", *successors)
    return history


# ---- when ----


def test_a_pipeline_that_serves_becomes_one_full_instance_on_its_head() -> None:
    history = _serving()
    (start,) = _starts(history.decides())
    (stage,) = start.plan.stages
    assert (start.plan.replica, start.plan.succeeds) == ("tiny.2", "tiny.1")
    assert stage.node == history.view.replicas["tiny.1"].plan.head.node
    assert (stage.layers.is_first, stage.layers.is_last) == (True, True)
    assert start.plan.background, "nobody waits for it"
    assert history.decides() == (), "one is enough"


def test_it_serves_as_a_pipeline_for_a_while_first() -> None:
    history = _history()
    history.serves()
    _busy(history)
    history.passes(RULES.after_s - 0.1)
    assert history.decides() == ()


def test_a_pipeline_that_nobody_uses_stays_as_it_is() -> None:
    history = _history()
    history.serves()
    history.passes(RULES.after_s + 0.1)
    assert history.decides() == ()


def test_a_request_that_has_just_ended_is_use_enough() -> None:
    history = _history()
    history.serves()
    history.passes(RULES.after_s - 1)
    history.demand(arrived=1)
    history.passes(1)
    assert len(_starts(history.decides())) == 1


@pytest.mark.parametrize("spec", [{"consolidate": False}, {"max_stages": 1}])
def test_what_may_not_or_need_not_be_consolidated_is_left_alone(spec: dict[str, Any]) -> None:
    history = _serving(**spec)
    assert history.decides() == ()


@pytest.mark.parametrize(
    ("keep_alive_s", "in_flight", "starts"),
    [(3.0, 0, False), (60.0, 0, True), (1.0, 1, True)],
)
def test_what_goes_to_zero_before_its_successor_is_ready_gets_none(
    keep_alive_s: float, in_flight: int, starts: bool
) -> None:
    # A start takes two and a half seconds; each has served or been idle for two.
    history = _serving(in_flight=in_flight, keep_alive_s=keep_alive_s)
    assert bool(_starts(history.decides())) is starts


def _tight_nodes(*rooms: int) -> list[NodeInfo]:
    """Nodes with room for so many KV blocks of the whole model after its weights."""
    (whole,) = equal_split(make_deployment(), 1, BLOCK)
    return [
        make_node_info(f"n{index}", memory_bytes=whole.needs(room))
        for index, room in enumerate(rooms)
    ]


def test_without_room_for_the_whole_model_it_stays_a_pipeline() -> None:
    history = _serving(*_tight_nodes(0, 0), max_context=256, max_sequences=1)
    assert len(history.view.replicas["tiny.1"].plan.stages) == 2
    assert history.decides() == ()


def test_another_node_of_the_pipeline_is_taken_where_the_head_has_no_room() -> None:
    history = _serving("n0", "n1")
    pipeline = history.view.replicas["tiny.1"]
    head, other = (stage.node for stage in pipeline.plan.stages)
    full = replace(history.view.nodes[head].info, memory_bytes=100_000)
    history.view = replace(
        history.view,
        nodes={**history.view.nodes, head: replace(history.view.nodes[head], info=full)},
    )
    (start,) = _starts(history.decides())
    assert start.plan.head.node == other


def test_it_waits_while_a_cold_start_fetches_to_its_nodes() -> None:
    deployments = [make_state(make_deployment(name, consolidate=True)) for name in ("tiny", "b")]
    history = History(deployments=deployments)
    history.serves()
    history.demand("b", waiting=1)
    history.decides()
    _busy(history)
    history.passes(RULES.after_s)
    assert history.decides() == ()
    history.becomes_ready("b.1")
    (start,) = _starts(history.decides())
    assert start.plan.succeeds == "tiny.1"


# ---- several instances ----


@pytest.mark.parametrize(("in_flight", "instances"), [(4, 1), (5, 2), (9, 3), (100, 3)])
def test_under_load_as_many_instances_as_the_requests_need(in_flight: int, instances: int) -> None:
    history = _serving("n0", "n1", "n2", in_flight=in_flight, max_sequences=4)
    starts = _starts(history.decides())
    assert len(starts) == instances
    nodes = [start.plan.head.node for start in starts]
    assert len(set(nodes)) == instances, "each on a stage node of its own"
    assert nodes[0] == history.view.replicas["tiny.1"].plan.head.node
    assert {start.plan.background for start in starts} == {instances == 1}
    assert [start.plan.number for start in starts] == list(range(2, instances + 2))


def test_under_load_a_single_instance_is_worse_than_the_pipeline() -> None:
    nodes = [make_node_info("n0"), make_node_info("n1", memory_bytes=180_000)]
    calm = _serving(*nodes, in_flight=1, max_context=256, max_sequences=2)
    assert len(_starts(calm.decides())) == 1
    loaded = _serving(*nodes, in_flight=3, max_context=256, max_sequences=2)
    assert loaded.decides() == ()


def test_a_burst_adds_instances_to_the_one_that_is_starting() -> None:
    history = _serving("n0", "n1")
    (first,) = _starts(history.decides())
    _busy(history, in_flight=9)
    (second,) = _starts(history.decides())
    assert second.plan.head.node != first.plan.head.node
    assert history.decides() == ()


def test_an_instance_that_is_needed_no_more_is_given_up_while_it_starts() -> None:
    history = _serving("n0", "n1", in_flight=9)
    first, second = (start.plan.replica for start in _starts(history.decides()))
    _busy(history, in_flight=2)
    assert history.decides() == (), "a moment says nothing"
    history.passes(RULES.after_s)
    stop, removal = history.decides()
    assert stop == StopReplica(replica=second, reason="tiny.1 needs no further instance any more")
    assert removal == RemoveReplica(replica=second, reason="it never served")
    assert history.view.replicas[first].phase is Phase.STARTING


def test_requests_move_when_all_instances_are_ready_and_not_before() -> None:
    history = _serving("n0", "n1", in_flight=9)
    first, second = (start.plan.replica for start in _starts(history.decides()))
    history.becomes_ready(first)
    assert history.decides() == ()
    assert history.routed() == ["tiny.1", first]
    history.becomes_ready(second)
    (hand_over,) = history.decides()
    assert isinstance(hand_over, HandOver)
    assert hand_over.successors == (first, second)
    assert history.routed() == [first, second]


def test_requests_move_to_the_instances_that_remain() -> None:
    history = _serving("n0", "n1", in_flight=9)
    first, second = (start.plan.replica for start in _starts(history.decides()))
    history.becomes_ready(first)
    history.part(second, 0, Phase.FAILED, LOST_PROCESS)
    hand_overs = [action for action in history.decides() if isinstance(action, HandOver)]
    assert [action.successors for action in hand_overs] == [(first,)]
    assert history.routed() == [first]


# ---- handing over ----


def test_a_ready_successor_gets_all_new_requests_and_then_the_running_ones() -> None:
    history = _serving()
    history.decides()
    assert history.routed() == ["tiny.1"]
    history.becomes_ready("tiny.2")
    assert history.routed() == ["tiny.2"]
    assert history.decides() == (
        HandOver(replica="tiny.1", successors=("tiny.2",), reason="tiny.2 is ready"),
    )
    assert history.decides() == (), "it is on its way"
    history.notified("tiny.1", "tiny.2")
    assert history.decides() == ()


def test_the_command_to_hand_over_is_repeated_until_it_arrives() -> None:
    history = _serving()
    history.decides()
    history.becomes_ready("tiny.2")
    (command,) = history.decides()
    history.happens(HandOverFailed(replica="tiny.1", at_s=history.now_s))
    assert history.decides() == ()
    history.passes(RULES.hand_over_retry_s)
    assert history.decides() == (command,)


def test_the_pipeline_goes_when_its_last_request_has_moved() -> None:
    history = _handing_over()
    history.passes(10 * CONFIG.drain_grace_s)
    assert history.decides() == (), "requests that cannot be moved run to their end"
    _busy(history, replica="tiny.2")
    assert history.decides() == (
        StopReplica(replica="tiny.1", reason="consolidated into tiny.2"),
        RemoveReplica(replica="tiny.1", reason="no request runs on it"),
    )
    history.removed("tiny.1")
    history.passes(100)
    assert history.decides() == ()
    assert history.routed() == ["tiny.2"]


def test_the_pipeline_stays_while_a_gateway_may_still_send_it_a_request() -> None:
    history = _handing_over()
    _busy(history, replica="tiny.2")
    history.demand(gateway="g1")
    assert history.decides() == ()
    history.passes(CONFIG.settle_s, silent=["g1"])
    assert history.decides() == (), "g1 has not reported since"
    history.demand(gateway="g1")
    assert [type(action) for action in history.decides()] == [StopReplica, RemoveReplica]


def test_the_pipeline_stays_until_its_successor_has_answered() -> None:
    """It was removed while a successor that had hung held all its requests."""
    history = _handing_over()
    history.passes(CONFIG.settle_s)
    history.demand(in_flight=1, replica_in_flight={"tiny.2": 1})
    history.passes(10 * CONFIG.drain_grace_s)
    assert history.decides() == ()
    _busy(history, replica="tiny.2")
    assert [type(action) for action in history.decides()] == [StopReplica, RemoveReplica]


def test_the_pipeline_stays_while_a_successor_that_has_answered_is_silent() -> None:
    history = _handing_over()
    history.passes(CONFIG.settle_s)
    _busy(history, replica="tiny.2")
    busy: dict[str, Any] = {"in_flight": 1, "replica_in_flight": {"tiny.2": 1}}
    history.demand(**busy, silent=frozenset({"tiny.2"}))
    assert history.decides() == ()
    assert history.routed() == ["tiny.1"], "it takes requests again"
    history.demand(**busy)
    assert history.routed() == ["tiny.2"]
    assert [type(action) for action in history.decides()] == [StopReplica, RemoveReplica]


def test_the_pipeline_goes_when_none_of_its_requests_came_to_its_successor() -> None:
    history = _handing_over()
    history.passes(CONFIG.settle_s)
    history.demand()
    assert [type(action) for action in history.decides()] == [StopReplica, RemoveReplica]


def test_the_pipeline_stays_while_its_successor_dies_before_it_has_answered() -> None:
    history = _handing_over()
    history.passes(CONFIG.settle_s)
    history.demand(in_flight=1, replica_in_flight={"tiny.2": 1})
    assert history.decides() == ()
    history.part("tiny.2", 0, Phase.FAILED, LOST_PROCESS)
    stop, *_ = history.decides()
    assert isinstance(stop, StopReplica)
    assert stop.replica == "tiny.2"
    assert history.routed() == ["tiny.1"]


def test_weights_that_a_successor_shares_are_reserved_once() -> None:
    history = _serving()
    pipeline = history.view.replicas["tiny.1"].plan
    before = history.view.reserved_bytes(pipeline.head.node)
    (start,) = _starts(history.decides())
    whole = start.plan.head.reserved_bytes
    after = history.view.reserved_bytes(pipeline.head.node)
    assert after == before + whole - pipeline.head.weight_bytes
    history.becomes_ready("tiny.2")
    history.part("tiny.1", 0, Phase.FAILED, LOST_PROCESS)
    history.decides()
    history.removed("tiny.1")
    assert history.view.reserved_bytes(pipeline.head.node) == whole


# ---- failures ----


def test_a_successor_that_fails_costs_only_time() -> None:
    history = _serving()
    history.decides()
    history.demand(in_flight=1, waiting=3, replica_in_flight={"tiny.1": 1})
    for doubling in range(3):
        replica = history.view.live_replicas()[-1].id
        history.part(replica, 0, Phase.FAILED, NO_OBJECT)
        assert [type(action) for action in history.decides()] == [StopReplica, RemoveReplica]
        assert history.routed() == ["tiny.1"]
        history.removed(replica)
        history.passes(RULES.retry_s * 2**doubling - 0.1)
        assert history.decides() == ()
        history.passes(0.1)
        assert len(_starts(history.decides())) == 1
    state = history.view.deployments["tiny"]
    assert (state.failed_starts, state.failure) == ((), None)


def test_a_ready_successor_that_is_lost_gives_the_requests_back() -> None:
    history = _handing_over()
    history.part("tiny.2", 0, Phase.FAILED, LOST_PROCESS)
    *_, command = history.decides()
    assert command == HandOver(replica="tiny.1", successors=(), reason="its successors are lost")
    assert history.routed() == ["tiny.1"]
    history.notified("tiny.1")
    history.demand()
    history.passes(CONFIG.settle_s)
    assert history.decides() == (), "it serves again"
    _busy(history)
    history.removed("tiny.2")
    history.passes(RULES.retry_s)
    (start,) = _starts(history.decides())
    assert (start.plan.replica, start.plan.succeeds) == ("tiny.3", "tiny.1")


def test_a_lost_node_of_a_successor_leaves_the_pipeline_serving() -> None:
    history = _serving("n0", "n1", "n2", in_flight=9, max_stages=2, max_replicas=2)
    history.decides()
    for replica in history.view.successors(history.view.replicas["tiny.1"]):
        history.becomes_ready(replica.id)
    history.decides()
    pipeline = history.view.replicas["tiny.1"].plan
    lost = pipeline.stages[1].node
    history.passes(CONFIG.node_timeout_s + 0.1, silent=[lost])
    stopped = {action.replica for action in history.decides() if isinstance(action, StopReplica)}
    assert stopped == {"tiny.1", "tiny.3"}, "what had a part there"
    assert history.routed() == ["tiny.2"]


def test_successors_of_a_lost_pipeline_stay_and_serve() -> None:
    history = _serving()
    history.decides()
    history.part("tiny.1", 1, Phase.FAILED, LOST_PROCESS)
    history.demand(waiting=3)
    assert not _starts(history.decides()), "the requests wait for the successor"
    history.becomes_ready("tiny.2")
    assert history.routed() == ["tiny.2"]
    history.removed("tiny.1")
    history.demand(in_flight=3, replica_in_flight={"tiny.2": 3})
    history.passes(60)
    assert history.decides() == ()


def test_the_start_of_a_lost_pipelines_successor_counts_as_a_cold_start() -> None:
    history = _serving()
    history.decides()
    history.part("tiny.1", 1, Phase.FAILED, LOST_PROCESS)
    history.decides()
    history.removed("tiny.1")
    history.demand(waiting=1)
    history.part("tiny.2", 0, Phase.FAILED, LOST_PROCESS)
    assert not _starts(history.decides()), "the second failure in a row"
    history.passes(TRIED_AGAIN_S)
    (start,) = _starts(history.decides())
    assert start.plan.succeeds is None
    assert len(history.view.deployments["tiny"].failed_starts) == 2


# ---- with the rest of a deployment's life ----


@pytest.mark.parametrize("is_ready", [False, True])
def test_an_idle_deployment_goes_to_zero_with_its_successors(is_ready: bool) -> None:
    history = _serving()
    history.decides()
    if is_ready:
        history.becomes_ready("tiny.2")
        history.decides()
    history.demand()
    history.passes(60)
    stopped = {action.replica for action in history.decides() if isinstance(action, StopReplica)}
    assert stopped == {"tiny.1", "tiny.2"}


def test_a_successor_does_not_prolong_the_life_of_an_idle_deployment() -> None:
    history = _serving(in_flight=0)
    history.decides()
    history.passes(50)
    history.becomes_ready("tiny.2")
    history.passes(8)
    actions = history.decides()
    assert "tiny.2" in {action.replica for action in actions if isinstance(action, StopReplica)}


def test_a_deletion_ends_both() -> None:
    history = _handing_over()
    history.happens(DeletionRequested(deployment="tiny"))
    stopped = {action.replica for action in history.decides() if isinstance(action, StopReplica)}
    assert stopped == {"tiny.1", "tiny.2"}


def test_a_start_that_requests_wait_for_takes_the_room_of_a_successor() -> None:
    # Each has room for a stage and one more whole model, but not for two.
    (whole,) = equal_split(make_deployment(), 1, BLOCK)
    room = int(1.6 * whole.needs(16))
    nodes = [make_node_info(name, memory_bytes=room) for name in ("n0", "n1")]
    spec: dict[str, Any] = {"max_context": 256, "max_sequences": 1}
    deployments = [
        make_state(make_deployment("tiny", consolidate=True, **spec)),
        make_state(make_deployment("b", max_stages=1, **spec)),
        make_state(make_deployment("c", max_stages=1, **spec)),
    ]
    history = History(nodes=nodes, deployments=deployments)
    history.serves()
    _busy(history)
    history.serves("b")
    history.demand("b", in_flight=1)
    history.passes(RULES.after_s)
    (start,) = _starts(history.decides())
    assert start.plan.succeeds == "tiny.1"
    history.demand("c", waiting=1)
    assert history.decides() == (
        StopReplica(replica="tiny.2", reason="'c' needs its room, and nobody waits for it"),
    )
    assert history.decides() == (RemoveReplica(replica="tiny.2", reason="it never served"),)
    history.removed("tiny.2")
    (cold_start,) = _starts(history.decides())
    assert cold_start.plan.deployment == "c"
