from __future__ import annotations

from dataclasses import replace

import pytest

from paraserve_scheduler.planner.decisions import Start
from paraserve_scheduler.planner.fleet import Fleet, Node, ReplicaPhase
from paraserve_scheduler.policies.paraserve import decide
from paraserve_scheduler.reconciler.capacity import node_spaces
from paraserve_scheduler.reconciler.fleet_view import fleet_of, with_only_waiting
from paraserve_scheduler.reconciler.model_shapes import held_keys, shape_of
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import StartReplica
from paraserve_scheduler.state.events import DemandReported
from paraserve_scheduler.state.fold import fold
from paraserve_scheduler.state.records import HeldObject
from paraserve_scheduler.state.view import ClusterView
from tests.support.scheduler_records import (
    CONFIG,
    NOW_S,
    lay_out_equally,
    make_demand,
    make_deployment,
    make_heartbeat,
    make_node_info,
    make_state,
    make_view,
)


def _turn(view: ClusterView) -> Turn:
    return Turn(view=view, now_s=NOW_S, config=CONFIG)


def _fleet(view: ClusterView) -> Fleet:
    return fleet_of(_turn(view))


def _node(fleet: Fleet, name: str) -> Node:
    return next(node for node in fleet.nodes if node.name == name)


def _waiting_view() -> ClusterView:
    state = make_state(make_deployment(ttft_slo_s=5.0))
    view = make_view(deployments=[state])
    demand = DemandReported(gateway="g", demands=(make_demand(waiting=3),), at_s=NOW_S - 1)
    return fold(view, demand)


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoints_layers_add_up_to_its_tensors(tied: bool) -> None:
    deployment = make_deployment(tied=tied)
    shape = shape_of(deployment, 0)
    assert shape.num_layers == 4
    assert shape.total_bytes == sum(it.size_bytes for it in deployment.index.tensors.values())
    assert all(size > 0 for size in shape.layer_bytes)


def test_what_waits_is_a_need_and_what_is_idle_at_zero_is_none() -> None:
    (need,) = _fleet(_waiting_view()).needs
    assert (need.name, need.waiting, need.oldest_s) == ("tiny", 3, NOW_S - 1)
    assert need.objectives.ttft_s == 5.0
    assert not _fleet(make_view(deployments=[make_state()])).needs


def test_the_policy_of_the_simulator_starts_it_on_the_real_view() -> None:
    (start,) = (it for it in decide(_fleet(_waiting_view()), NOW_S) if isinstance(it, Start))
    assert start.deployment == "tiny"
    assert {stage.node for stage in start.stages} <= {"n0", "n1"}


def test_a_fleet_in_which_one_waits_is_as_if_the_others_were_held_back() -> None:
    states = [make_state(make_deployment(name, min_replicas=1)) for name in ("a", "b", "c")]
    view = make_view(deployments=states)
    turn = _turn(view)
    plan = lay_out_equally(
        states[1].deployment, 1, node_spaces(turn, states[1].deployment.spec), CONFIG.placement
    )
    turn.do(StartReplica(plan=plan, requested_s=NOW_S - 1, reason="test"))
    demands = tuple(make_demand(name, waiting=2) for name in ("a", "b", "c"))
    view = fold(turn.view, DemandReported(gateway="g", demands=demands, at_s=NOW_S))
    for name in ("a", "b", "c"):
        held_back = fleet_of(_turn(view), held_back={"a", "b", "c"} - {name})
        assert with_only_waiting(_fleet(view), name).needs == held_back.needs


def test_a_start_takes_room_and_bandwidth_in_the_next_fleet() -> None:
    view = _waiting_view()
    state = view.deployments["tiny"]
    spaces = node_spaces(_turn(view), state.deployment.spec)
    plan = lay_out_equally(state.deployment, 1, spaces, CONFIG.placement)
    before = _fleet(view)
    turn = _turn(view)
    turn.do(StartReplica(plan=plan, requested_s=NOW_S - 1, reason="test"))
    view = turn.view
    after = _fleet(view)
    for stage in plan.stages:
        was, now = _node(before, stage.node), _node(after, stage.node)
        assert was.gpus[0].free_bytes - now.gpus[0].free_bytes == stage.reserved_bytes
        (claim,) = now.claims
        assert claim.remaining_bytes == stage.weight_bytes
        assert claim.deadline_s == NOW_S + 4
    (need,) = after.needs
    (replica,) = need.replicas
    assert (replica.name, replica.phase) == ("tiny.1", ReplicaPhase.STARTING)
    assert not [it for it in decide(after, NOW_S) if isinstance(it, Start)]


def test_a_node_has_the_layers_whose_tensors_are_all_in_its_memory_or_on_its_disk() -> None:
    view = _waiting_view()
    deployment = view.deployments["tiny"].deployment
    places = {name: (it.start, it.end) for name, it in deployment.index.tensors.items()}
    first = [place for name, place in places.items() if ".layers.0." in name or "embed" in name]
    third = [place for name, place in places.items() if ".layers.2." in name]
    held = HeldObject(
        key=next(iter(held_keys(deployment))),
        version="v1",
        landed_bytes=1,
        landed=tuple(sorted(first)),
        # All but the last bytes of the third layer.
        on_disk=(*sorted(first), *sorted(third)[:-1]),
    )
    other = replace(held, version="v2", landed=((0, 10**9),))
    report = replace(make_heartbeat("n0"), tier=(held, other))
    node = _node(_fleet(fold(view, report)), "n0")
    assert node.cached == {"s3://models/tiny": ((0, 1),)}
    assert node.on_disk == {"s3://models/tiny": ((0, 1),)}


def test_zones_are_known() -> None:
    view = make_view(nodes=[make_node_info("n0", zone="a")], deployments=[make_state()])
    assert [node.zone for node in _fleet(view).nodes] == ["a"]


def test_a_lost_node_is_not_in_the_fleet() -> None:
    view = make_view(
        nodes=[make_node_info("n0")],
        deployments=[make_state()],
        at_s=NOW_S - CONFIG.node_timeout_s - 1,
    )
    assert not _fleet(view).nodes
