from __future__ import annotations

from typing import Any

import pytest

from paraserve_backend.errors import (
    AlreadyExists,
    InsufficientCapacity,
    InvalidRequest,
    NotFound,
    ParaServeError,
    Unavailable,
)
from paraserve_scheduler.reconciler.moves import (
    check_drain,
    drain_progress,
    migrate,
    require_node,
)
from paraserve_scheduler.reconciler.placement import equal_split
from paraserve_scheduler.state.actions import (
    HandOver,
    RemoveReplica,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.events import NodeCordoned, NodeRegistered, PartRemoved
from paraserve_scheduler.state.records import PartState, Phase
from tests.support.histories import LOST_PROCESS, History
from tests.support.scheduler_records import (
    CONFIG,
    make_deployment,
    make_heartbeat,
    make_node_info,
    make_state,
)

NODES = tuple(make_node_info(name) for name in ("n0", "n1", "n2"))


def _history(*, stages: int = 1, **spec: Any) -> History:
    """A replica of so many stages serves one request."""
    deployment = make_deployment(max_stages=stages, **spec)
    history = History(nodes=NODES, deployments=[make_state(deployment)])
    history.serves()
    _busy(history)
    return history


def _busy(history: History, replica: str = "tiny.1") -> None:
    """A request runs on a replica, which has answered."""
    history.demand(
        in_flight=1, replica_in_flight={replica: 1}, first_token_s={replica: history.now_s}
    )


def _migrate(history: History, node: str) -> str:
    """Order a move; returns the successor's name."""
    stops, start = migrate(history.turn(), "tiny", node)
    history.do(*stops, start)
    return start.plan.replica


def _drain(history: History, node: str) -> None:
    check_drain(history.turn(), node)
    history.happens(NodeCordoned(node=node))


def _progress(history: History, node: str) -> dict[str, str]:
    return dict(drain_progress(history.turn(), node))


def _node_of(history: History, replica: str) -> str:
    return history.view.replicas[replica].plan.head.node


def _become(history: History, replica: str, successor: str) -> None:
    """Let `successor` take over from `replica` until nothing is left of it."""
    history.becomes_ready(successor)
    history.decides()
    history.notified(replica, successor)
    history.passes(CONFIG.settle_s)
    _busy(history, successor)
    history.decides()
    history.removed(replica)


# ---- migrate ----


@pytest.mark.parametrize("stages", [1, 3])
def test_a_move_starts_a_successor_on_the_node_and_hands_over(stages: int) -> None:
    history = _history(stages=stages)
    assert _migrate(history, "n2") == "tiny.2"
    assert _node_of(history, "tiny.2") == "n2"
    assert not history.view.replicas["tiny.2"].plan.background, "somebody waits for it"
    assert history.decides() == ()
    assert history.routed() == ["tiny.1"]
    history.becomes_ready("tiny.2")
    assert [type(action) for action in history.decides()] == [HandOver]
    history.notified("tiny.1", "tiny.2")
    history.passes(CONFIG.settle_s)
    _busy(history, "tiny.2")
    stop, removal = history.decides()
    assert isinstance(stop, StopReplica)
    verb = "moved to" if stages == 1 else "consolidated into"
    assert stop.reason == f"{verb} tiny.2"
    assert isinstance(removal, RemoveReplica)


def test_a_move_replaces_a_successor_that_is_still_starting() -> None:
    history = _history(stages=2, consolidate=True)
    history.passes(CONFIG.consolidation.after_s)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert _migrate(history, "n2") == "tiny.3"
    assert history.view.replicas["tiny.2"].phase is Phase.STOPPING
    assert history.decides() == (RemoveReplica(replica="tiny.2", reason="it never served"),)


def _two_replicas() -> History:
    history = _history(stages=2, consolidate=True, max_replicas=2)
    history.demand(in_flight=9, replica_in_flight={"tiny.1": 9})
    history.passes(CONFIG.consolidation.after_s)
    for start in history.decides():
        assert isinstance(start, StartReplica)
        history.becomes_ready(start.plan.replica)
    return history


def _at_zero() -> History:
    return History(nodes=NODES)


def _handing_over() -> History:
    history = _history()
    history.becomes_ready(_migrate(history, "n2"))
    return history


def _drained() -> History:
    history = _history()
    history.happens(NodeCordoned(node="n2"))
    return history


def _lost() -> History:
    history = _history()
    history.passes(CONFIG.node_timeout_s + 1, silent=["n2"])
    return history


def _leftovers() -> History:
    history = _history()
    part = PartState(replica="old.1", stage=0, phase=Phase.READY)
    history.happens(make_heartbeat("n2", parts=(part,), at_s=history.now_s))
    return history


def _other_device() -> History:
    return _history(device="cpu")


@pytest.mark.parametrize(
    ("make_history", "node", "error", "said"),
    [
        (_history, "n7", NotFound, "There is no node 'n7'. Nodes: n0, n1, n2."),
        (_history, "n0", AlreadyExists, "'tiny' is already on node n0, as tiny.1."),
        (_at_zero, "n0", Unavailable, "'tiny' has no replica that is ready: send it a request"),
        (_two_replicas, "n2", InvalidRequest, "several replicas (tiny.2 and tiny.3)"),
        (_handing_over, "n1", Unavailable, "tiny.2 is still taking over from tiny.1: retry"),
        (_drained, "n2", InvalidRequest, "end that with paraserve drain n2 --undo"),
        (_lost, "n2", Unavailable, "Node n2 was lost: silent for 6.0 s."),
        (_leftovers, "n2", Unavailable, "Node n2 is still removing what it had"),
    ],
)
def test_a_move_that_cannot_be_is_refused_with_the_reason(
    make_history: Any, node: str, error: type[ParaServeError], said: str
) -> None:
    history = make_history()
    with pytest.raises(error) as caught:
        _migrate(history, node)
    assert said in str(caught.value)


def test_a_move_to_a_node_without_room_says_how_much_is_missing() -> None:
    (whole,) = equal_split(make_deployment(), 1, CONFIG.placement.kv_block_size)
    nodes = [make_node_info("n0"), make_node_info("n1", memory_bytes=whole.weight_bytes)]
    history = History(nodes=nodes, deployments=[make_state(make_deployment(max_stages=1))])
    history.serves()
    with pytest.raises(InsufficientCapacity, match=r"on node n1, which has 0\.2 MB free: 0\.3 MB"):
        _migrate(history, "n1")


# ---- drain ----


def test_a_drained_node_gets_no_new_replica() -> None:
    history = History(nodes=NODES)
    _drain(history, "n0")
    history.demand(waiting=1)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert {stage.node for stage in start.plan.stages} == {"n1", "n2"}
    history.happens(NodeCordoned(node="n0", cordoned=False))
    assert history.view.cordoned == set()


def test_a_replica_moves_off_a_drained_node() -> None:
    history = _history()
    _drain(history, "n0")
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    assert (start.plan.succeeds, start.plan.head.node) == ("tiny.1", "n1")
    assert start.reason == "n0 is drained: tiny.1 moves to n1"
    assert history.decides() == ()
    _become(history, "tiny.1", "tiny.2")
    assert _progress(history, "n0") == {}
    assert history.routed() == ["tiny.2"]


@pytest.mark.parametrize("drained", ["n0", "n1", "n2"])
def test_a_pipeline_moves_to_one_of_its_other_nodes(drained: str) -> None:
    history = _history(stages=3)
    _drain(history, drained)
    (start,) = history.decides()
    assert isinstance(start, StartReplica)
    pipeline = [stage.node for stage in history.view.replicas["tiny.1"].plan.stages]
    assert start.plan.head.node == next(node for node in pipeline if node != drained)


def test_a_successor_that_starts_on_a_drained_node_is_given_up_for_another() -> None:
    history = _history(stages=2, consolidate=True)
    history.passes(CONFIG.consolidation.after_s)
    history.decides()
    drained = _node_of(history, "tiny.2")
    _drain(history, drained)
    stop, removal, start = history.decides()
    assert stop == StopReplica(replica="tiny.2", reason=f"{drained} is drained")
    assert isinstance(removal, RemoveReplica)
    assert isinstance(start, StartReplica)
    assert start.plan.succeeds == "tiny.1"
    assert start.plan.head.node != drained


def test_what_takes_over_on_a_drained_node_moves_on_when_it_has() -> None:
    history = _history()
    _migrate(history, "n2")
    history.becomes_ready("tiny.2")
    history.decides()
    history.notified("tiny.1", "tiny.2")
    _drain(history, "n2")
    assert history.decides() == ()
    assert _progress(history, "n2") == {"tiny.2": "still takes over from tiny.1"}
    history.passes(CONFIG.settle_s)
    _busy(history, "tiny.2")
    *_, start = history.decides()
    assert isinstance(start, StartReplica)
    assert start.plan.succeeds == "tiny.2"


def test_an_idle_replica_without_room_elsewhere_just_ends() -> None:
    history = History(nodes=NODES[:1])
    history.serves()
    _drain(history, "n0")
    (stop,) = history.decides()
    assert stop == StopReplica(replica="tiny.1", reason="n0 is drained, and it is idle")


def test_a_drain_that_a_busy_replica_has_no_room_for_is_refused() -> None:
    history = History(nodes=NODES[:1])
    history.serves()
    _busy(history)
    with pytest.raises(InsufficientCapacity) as caught:
        _drain(history, "n0")
    assert str(caught.value) == ("Node n0 cannot be drained: no other live node can take 'tiny'.")


def test_two_replicas_cannot_count_on_the_same_room() -> None:
    (whole,) = equal_split(make_deployment(), 1, CONFIG.placement.kv_block_size)
    spec: dict[str, Any] = {"max_stages": 1, "max_context": 256, "max_sequences": 1}
    sizes = {"n0": 2.2, "n1": 1.1}
    nodes = [
        make_node_info(name, memory_bytes=int(size * whole.needs(16)))
        for name, size in sizes.items()
    ]
    states = [make_state(make_deployment(name, **spec)) for name in ("a", "b")]
    history = History(nodes=nodes[:1], deployments=states)
    for name in ("a", "b"):
        history.serves(name)
        history.demand(name, in_flight=1, replica_in_flight={f"{name}.1": 1})
    history.happens(NodeRegistered(info=nodes[1], at_s=history.now_s))
    history.happens(make_heartbeat("n1", at_s=history.now_s))
    with pytest.raises(InsufficientCapacity, match=r"'b' needs 0\.3 MB on node n1"):
        _drain(history, "n0")


def test_progress_says_what_each_replica_waits_for() -> None:
    history = _history()
    _drain(history, "n0")
    assert _progress(history, "n0") == {"tiny.1": "moves at once"}
    history.decides()
    assert _progress(history, "n0") == {"tiny.1": "waits for tiny.2 on n1 to be ready"}
    history.part("tiny.2", 0, Phase.FAILED, LOST_PROCESS)
    history.decides()
    assert _progress(history, "n0") == {"tiny.1": "waits 10 s, for its last successor failed"}
    history.removed("tiny.2")
    history.passes(10)
    history.decides()
    history.becomes_ready("tiny.3")
    history.decides()
    assert _progress(history, "n0") == {"tiny.1": "hands its requests over to tiny.3 on n1, 1 left"}


def test_what_no_replica_has_keeps_a_node_from_being_empty_until_it_is_gone() -> None:
    history = _leftovers()
    _drain(history, "n2")
    assert _progress(history, "n2") == {"old.1": "is being removed"}
    history.decides()
    history.happens(PartRemoved(node="n2", replica="old.1"))
    assert _progress(history, "n2") == {}


def test_a_drained_node_may_be_away() -> None:
    history = History(nodes=NODES)
    history.happens(NodeCordoned(node="n9"))
    require_node(history.view, "n9")
    assert _progress(history, "n9") == {}
