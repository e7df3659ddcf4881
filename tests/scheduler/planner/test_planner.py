from __future__ import annotations

from dataclasses import replace

import pytest

from paraserve_scheduler.planner.bandwidth import BandwidthClaim
from paraserve_scheduler.planner.cost import Speed
from paraserve_scheduler.planner.decisions import Prediction, Start
from paraserve_scheduler.planner.fleet import Objectives
from paraserve_scheduler.planner.fleet_changes import with_freed, with_start
from paraserve_scheduler.planner.planner import plan
from tests.support.fleets import (
    GB,
    NOW_S,
    make_fleet,
    make_gpu,
    make_kind,
    make_method,
    make_model,
    make_need,
    make_node,
)


def _prediction(start: Start) -> Prediction:
    assert start.prediction is not None
    return start.prediction


def test_an_idle_fleet_pays_for_one_stage_only_where_that_is_soon_enough() -> None:
    need = make_need(objectives=Objectives(ttft_s=60.0))
    start = plan(need, make_fleet(), NOW_S)
    assert start is not None
    assert len(start.stages) == 1


def test_without_an_objective_a_start_is_as_parallel_as_it_may_be() -> None:
    need = make_need(objectives=Objectives(), max_stages=3)
    start = plan(need, make_fleet(*(make_node(f"n{i}") for i in range(5))), NOW_S)
    assert start is not None
    assert len(start.stages) == 3


@pytest.mark.parametrize(("ttft_s", "stages"), [(10.0, 1), (6.0, 2), (4.7, 3)])
def test_a_tighter_objective_takes_more_stages(ttft_s: float, stages: int) -> None:
    kind = make_kind(make_method(runtime_s=1.0))
    fleet = make_fleet(*(make_node(f"n{i}", kind=kind) for i in range(4)))
    start = plan(make_need(objectives=Objectives(ttft_s=ttft_s)), fleet, NOW_S)
    assert start is not None
    assert len(start.stages) == stages
    assert _prediction(start).meets_ttft


def test_where_no_plan_meets_the_objective_the_best_says_so() -> None:
    need = make_need(objectives=Objectives(ttft_s=1.0))
    start = plan(need, make_fleet(), NOW_S)
    assert start is not None
    assert not _prediction(start).meets_ttft
    assert "no plan meets its objectives" in start.reason


def test_of_plans_that_are_all_late_the_cheapest_is_taken_that_is_hardly_later() -> None:
    need = make_need(objectives=Objectives(ttft_s=0.1))
    start = plan(need, make_fleet(), NOW_S)
    assert start is not None
    # 5.65 s with two stages, 5.32 with four; 8.8 with one.
    assert len(start.stages) == 2


def test_for_who_is_late_already_a_start_is_soon_enough_that_is_for_who_comes_now() -> None:
    need = make_need(objectives=Objectives(ttft_s=10.0), oldest_s=NOW_S - 100)
    start = plan(need, make_fleet(), NOW_S)
    assert start is not None
    assert len(start.stages) == 1
    assert _prediction(start).ttft_s > 100


def test_mixed_bandwidths_add_up() -> None:
    """Cold TTFT at most 1.1 times M over the sum of bandwidths, plus the runtime's floor."""
    method = make_method(runtime_s=0.5, tail_s=0.5, load_s_per_byte=0.0)
    nodes = [
        make_node(f"n{i}", gbit=gbit, kind=make_kind(method), gpus=(make_gpu(free_gb=80),))
        for i, gbit in enumerate([10, 25, 100, 25])
    ]
    need = make_need(objectives=Objectives(ttft_s=0.1), model=make_model(size_bytes=60 * GB))
    start = plan(need, make_fleet(*nodes), NOW_S)
    assert start is not None
    chosen = [node for node in nodes if node.name in {stage.node for stage in start.stages}]
    limit_s = 60 * GB / sum(node.nic_bytes_per_s for node in chosen)
    assert len(chosen) == 4
    assert _prediction(start).ready_s <= 1.1 * limit_s + 1.0


def test_of_orders_that_are_equally_early_the_fastest_node_is_the_head() -> None:
    kind = make_kind(make_method(runtime_s=1.0))
    nodes = [make_node(f"n{gbit}", gbit=gbit, kind=kind) for gbit in (10, 25, 100)]
    need = make_need(objectives=Objectives(), must_grow=True)
    start = plan(need, make_fleet(*nodes), NOW_S)
    assert start is not None
    assert [stage.node for stage in start.stages] == ["n100", "n25", "n10"]


def test_what_is_in_host_memory_is_not_fetched() -> None:
    cached = make_node("warm", cached={"chat": ((0, 32),)})
    start = plan(make_need(), make_fleet(make_node("n0"), cached), NOW_S)
    assert start is not None
    assert [stage.node for stage in start.stages] == ["warm"]
    assert [source.peer for source in start.stages[0].sources] == ["warm"]


def test_a_node_with_a_fetch_that_would_be_late_is_left_alone_while_another_will_do() -> None:
    urgent = BandwidthClaim(remaining_bytes=10 * GB, deadline_s=NOW_S + 6)
    busy = make_node("busy", gbit=16, claims=(urgent,))
    slow = make_node("slow", gbit=4)
    start = plan(make_need(), make_fleet(busy, slow), NOW_S)
    assert start is not None
    assert {stage.node for stage in start.stages} == {"slow"}
    alone = plan(make_need(), make_fleet(busy), NOW_S)
    assert alone is not None, "with no other node it is used"


def test_several_replicas_wanted_make_several_growing_stages() -> None:
    start = plan(make_need(waiting=20), make_fleet(), NOW_S, replicas=3)
    assert start is not None
    assert 1 <= sum(stage.grows for stage in start.stages) <= 3


def test_a_full_store_is_left_for_a_peer() -> None:
    peer = make_node("peer", cached={"chat": ((0, 32),)}, gpus=(make_gpu(free_gb=0),))
    fleet = make_fleet(make_node("n0"), peer, store_bytes_per_s=1e8, store_fetches=9)
    without = replace(fleet, nodes=fleet.nodes[:1])
    with_peer = plan(make_need(), fleet, NOW_S)
    from_store = plan(make_need(), without, NOW_S)
    assert with_peer is not None
    assert from_store is not None
    assert _prediction(with_peer).ready_s < _prediction(from_store).ready_s / 5
    assert [source.peer for source in with_peer.stages[0].sources] == ["peer"]


def test_what_is_freed_is_free() -> None:
    fleet = make_fleet(make_node("n0", gpus=(make_gpu(free_gb=10),)))
    (node,) = with_freed(fleet, {("n0", 0): 5 * GB}).nodes
    assert node.gpus[0].free_bytes == 15 * GB


def _gigabytes(start: Start) -> dict[str, float]:
    """Of a start of one stage, by where they come from."""
    (stage,) = start.stages
    names = {None: "store", stage.node: "memory"}
    return {
        "disk" if it.is_on_disk else names.get(it.peer, it.peer or ""): it.size_bytes / GB
        for it in stage.sources
    }


def test_a_stage_comes_from_memory_disk_peers_and_the_store_at_once() -> None:
    model = make_model(size_bytes=32 * GB, num_layers=32, ends_bytes=0)
    kind = make_kind(disk_bytes_per_s=1e9)
    own = make_node(
        "own",
        kind=kind,
        gpus=(make_gpu(free_gb=64),),
        gbit=80,
        cached={"chat": ((0, 4),)},
        on_disk={"chat": ((2, 12),)},
    )
    peer = make_node(
        "peer", gbit=8, gpus=(make_gpu(free_gb=0),), cached={"chat": ((10, 32),)}, zone="x"
    )
    fleet = make_fleet(own, peer, store_bytes_per_s=2e9, store_fetches=0)
    start = plan(make_need(model=model, max_stages=1), fleet, NOW_S)
    assert start is not None
    # 28 GB at 1 from disk, 1 from the peer and 2 from the store: 7 s each.
    assert _prediction(start).stages[0].fetch_s == pytest.approx(7.0)
    assert _gigabytes(start) == pytest.approx({"memory": 4, "disk": 7, "peer": 7, "store": 14})


def test_a_peer_that_others_read_from_gives_its_share_only() -> None:
    peer = make_node("peer", cached={"chat": ((0, 32),)}, gpus=(make_gpu(free_gb=0),))
    need = make_need(max_stages=1)
    ready = []
    for fetches in (0, 3):
        busy = replace(peer, uplink_fetches=fetches)
        fleet = make_fleet(make_node("n0"), busy, store_bytes_per_s=1e6)
        start = plan(need, fleet, NOW_S)
        assert start is not None
        ready.append(_prediction(start).stages[0].fetch_s)
    assert ready[1] == pytest.approx(4 * ready[0], rel=0.01)


def test_a_start_counts_at_the_peers_and_the_store_it_reads_from() -> None:
    peer = make_node("peer", cached={"chat": ((0, 16),)}, gpus=(make_gpu(free_gb=0),))
    fleet = make_fleet(make_node("n0"), peer, store_bytes_per_s=1e9)
    start = plan(make_need(max_stages=1), fleet, NOW_S)
    assert start is not None
    after = with_start(fleet, start)
    assert (after.nodes[1].uplink_fetches, after.store_fetches) == (1, 1)


def test_the_kinds_that_meet_the_tpot_objective_go_before_those_that_start_sooner() -> None:
    slow_speed = Speed(prefill_s_per_token=0.0003, decode_s=0.1)
    early = make_kind(
        make_method(runtime_s=1.0, tail_s=0.1), name="slow", speeds={"7b": slow_speed}
    )
    nodes = [make_node(f"early{i}", kind=early, gbit=100) for i in range(3)]
    nodes += [make_node(f"fast{i}", gbit=16) for i in range(3)]
    need = make_need(objectives=Objectives(ttft_s=7.0, tpot_s=0.08))
    start = plan(need, make_fleet(*nodes), NOW_S)
    assert start is not None
    assert _prediction(start).meets_tpot
    assert _prediction(start).meets_ttft
    assert {stage.node[:4] for stage in start.stages} == {"fast"}
