from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.errors import InsufficientCapacity
from paraserve_scheduler.reconciler.config import PlacementConfig
from paraserve_scheduler.reconciler.placement import (
    NodeSpace,
    check_room,
    equal_split,
    lay_out,
    place_successor,
)
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.spec import Deployment
from tests.support.scheduler_records import lay_out_equally, make_deployment, make_space

CONFIG = PlacementConfig()
BLOCK = CONFIG.kv_block_size
_MODELS = [make_deployment(num_layers=layers, tied=layers % 2 == 0) for layers in range(1, 7)]


def _nodes(count: int) -> list[NodeSpace]:
    return [make_space(f"n{index}") for index in range(count)]


def test_layers_go_where_they_were_planned_whatever_their_number() -> None:
    stages = [
        (LayerRange(start=0, end=1, total=4), make_space("a")),
        (LayerRange(start=1, end=4, total=4), make_space("b")),
    ]
    plan = lay_out(make_deployment(num_layers=4), 1, stages, CONFIG)
    assert [(it.node, it.layers.start, it.layers.end) for it in plan.stages] == [
        ("a", 0, 1),
        ("b", 1, 4),
    ]


def test_a_stage_that_has_no_room_is_not_laid_out() -> None:
    stages = [
        (LayerRange(start=0, end=2, total=4), make_space("a")),
        (LayerRange(start=2, end=4, total=4), make_space("full", free_bytes=1_000)),
    ]
    with pytest.raises(InsufficientCapacity, match="on node full"):
        lay_out(make_deployment(num_layers=4), 1, stages, CONFIG)


def test_room_for_any_number_of_equal_stages_is_enough() -> None:
    deployment = make_deployment(num_layers=4)
    largest = max(share.needs(16) for share in equal_split(deployment, 3, BLOCK))
    nodes = [make_space(f"n{index}", free_bytes=largest) for index in range(3)]
    check_room(deployment, nodes, CONFIG)
    with pytest.raises(InsufficientCapacity):
        check_room(deployment, nodes[:2], CONFIG)


def test_the_shortage_names_what_is_needed_free_and_missing() -> None:
    deployment = make_deployment(max_context=16)
    nodes = [make_space("n0", free_bytes=0), make_space("n1", free_bytes=10_000)]
    needed = sum(share.needs(1) for share in equal_split(deployment, 2, BLOCK))
    first, second = (share.needs(1) for share in equal_split(deployment, 2, BLOCK))
    missing = max(first, second) - 10_000 + min(first, second)
    with pytest.raises(InsufficientCapacity) as error:
        check_room(deployment, nodes, CONFIG)
    assert f"needs {needed / 1e6:.1f} MB in 2 equal stages" in str(error.value)
    assert "the 2 live nodes with most room have 0.0 MB free" in str(error.value)
    assert f"{missing / 1e6:.1f} MB are missing" in str(error.value)


def test_no_node_at_all_is_said_plainly() -> None:
    with pytest.raises(InsufficientCapacity, match="no live node with device cuda"):
        check_room(make_deployment(device="cuda"), [], CONFIG)


def test_kv_cache_covers_all_sequences_and_no_more() -> None:
    deployment = make_deployment(max_context=100, max_sequences=3)
    plan = lay_out_equally(deployment, 1, _nodes(2), CONFIG)
    assert plan.kv_blocks == 3 * 7  # 100 tokens are 7 blocks of 16
    assert plan.max_context == 100


def test_kv_cache_leaves_room_for_the_next_deployment() -> None:
    deployment = make_deployment(num_layers=1, max_sequences=1_000_000)
    (share,) = equal_split(deployment, 1, BLOCK)
    free_bytes = share.needs(100)
    plan = lay_out_equally(deployment, 1, [make_space(free_bytes=free_bytes)], CONFIG)
    assert plan.kv_blocks == 50


def test_every_stage_reserves_room_for_the_small_files() -> None:
    deployment = make_deployment(num_layers=2)
    file_bytes = deployment.index.file_bytes
    assert file_bytes == sum(stored.size_bytes for stored in deployment.index.files) > 0
    spaces = [make_space("n0"), make_space("n1")]
    plan = lay_out_equally(deployment, 1, spaces, CONFIG)
    for stage in plan.stages:
        assert stage.reserved_bytes == stage.weight_bytes + file_bytes + stage.kv_bytes
    (share,) = equal_split(deployment, 1, BLOCK)
    too_small = make_space(free_bytes=share.needs(32) - file_bytes)
    one_context = make_deployment(num_layers=2, max_context=512)
    with pytest.raises(InsufficientCapacity):
        lay_out_equally(one_context, 1, [too_small], CONFIG)


def test_one_context_fits_even_where_it_takes_more_than_its_share() -> None:
    deployment = make_deployment(num_layers=1, max_context=512)
    (share,) = equal_split(deployment, 1, BLOCK)
    free_bytes = share.needs(32)  # 512 tokens
    plan = lay_out_equally(deployment, 1, [make_space(free_bytes=free_bytes)], CONFIG)
    assert plan.kv_blocks == 32


def test_without_a_stated_context_memory_decides_how_long_it_is() -> None:
    deployment = make_deployment(num_layers=1)
    (share,) = equal_split(deployment, 1, BLOCK)
    plan = lay_out_equally(deployment, 1, [make_space(free_bytes=share.needs(16))], CONFIG)
    assert plan.max_context == 256


def test_an_equal_split_of_equal_layers_differs_only_by_embedding_and_head() -> None:
    shares = equal_split(make_deployment(num_layers=6), 3, BLOCK)
    assert [len(share.layers) for share in shares] == [2, 2, 2]


# ---- successors ----


def _tight_head(deployment: Deployment, kv_blocks: int) -> list[NodeSpace]:
    """A head with room for the whole model and so many of its KV blocks, and a node without."""
    (whole,) = equal_split(deployment, 1, BLOCK)
    _, second = equal_split(deployment, 2, BLOCK)
    return [
        make_space("head", free_bytes=whole.needs(kv_blocks)),
        make_space("other", free_bytes=second.needs(kv_blocks)),
    ]


def test_a_successor_is_whole_on_its_node_and_can_take_any_request() -> None:
    deployment = make_deployment()
    pipeline = lay_out_equally(deployment, 1, _nodes(2), CONFIG)
    plan = place_successor(deployment, 2, pipeline, make_space("n7"), CONFIG)
    (stage,) = plan.stages
    assert (plan.replica, plan.succeeds, stage.node) == ("tiny.2", "tiny.1", "n7")
    assert (stage.layers.is_first, stage.layers.is_last) == (True, True)
    assert plan.max_context >= pipeline.max_context


def test_without_room_for_the_longest_request_there_is_no_successor() -> None:
    deployment = make_deployment()
    pipeline = lay_out_equally(deployment, 1, _nodes(2), CONFIG)
    (whole,) = equal_split(deployment, 1, BLOCK)
    needed = whole.needs(pipeline.max_context // BLOCK)
    place_successor(deployment, 2, pipeline, make_space("n7", free_bytes=needed), CONFIG)
    small = make_space("n7", free_bytes=needed - 20_000)
    with pytest.raises(InsufficientCapacity) as error:
        place_successor(deployment, 2, pipeline, small, CONFIG)
    assert f"needs {needed / 1e6:.1f} MB on node n7" in str(error.value)
    assert "0.0 MB are missing" in str(error.value)


def test_without_a_port_there_is_no_successor() -> None:
    deployment = make_deployment()
    pipeline = lay_out_equally(deployment, 1, _nodes(2), CONFIG)
    with pytest.raises(InsufficientCapacity, match="no channel port left"):
        place_successor(deployment, 2, pipeline, make_space("n7", free_ports=()), CONFIG)


@pytest.mark.parametrize("kv_blocks", [20, 40, 100])
def test_a_pipeline_leaves_its_head_room_for_a_successor_with_as_much_kv_cache(
    kv_blocks: int,
) -> None:
    deployment = make_deployment(consolidate=True, max_sequences=1_000, max_context=64)
    nodes = _tight_head(deployment, kv_blocks)
    pipeline = lay_out_equally(deployment, 1, nodes, CONFIG)
    assert pipeline.head.node == "head"
    # Stage 0's weights are shared with the successor.
    left = nodes[0].free_bytes - pipeline.head.kv_bytes
    plan = place_successor(deployment, 2, pipeline, make_space("head", free_bytes=left), CONFIG)
    assert plan.kv_blocks >= pipeline.kv_blocks > 0


def test_a_head_that_could_not_be_whole_keeps_no_room_for_it() -> None:
    deployment = make_deployment(consolidate=True, max_sequences=1_000, max_context=256)
    _, larger = equal_split(deployment, 2, BLOCK)
    nodes = [make_space(f"n{index}", free_bytes=larger.needs(40)) for index in range(2)]
    assert lay_out_equally(deployment, 1, nodes, CONFIG).kv_blocks == 20


@st.composite
def _spaces(draw: st.DrawFn) -> list[NodeSpace]:
    count = draw(st.integers(1, 5))
    return [
        make_space(
            f"n{index}",
            free_bytes=draw(st.integers(0, 600_000)),
            bytes_per_s=draw(st.sampled_from([1e8, 1e9])),
            free_ports=draw(st.sampled_from([(9001, 9005), (9001, 9003, 9004)])),
        )
        for index in range(count)
    ]


@given(st.sampled_from(_MODELS), _spaces())
@settings(max_examples=300, deadline=None)
def test_any_plan_holds_every_layer_once_within_memory_and_ports(
    deployment: Deployment, nodes: list[NodeSpace]
) -> None:
    nodes = nodes[: deployment.model.num_layers]
    shares = equal_split(deployment, len(nodes), BLOCK)
    fits = all(it.free_bytes >= share.needs(16) for it, share in zip(nodes, shares, strict=True))
    try:
        plan = lay_out_equally(deployment, 1, nodes, CONFIG)
    except InsufficientCapacity:
        assert not fits
        return
    _check_layers(plan, deployment.model.num_layers)
    spaces = {node.name: node for node in nodes}
    for stage in plan.stages:
        assert stage.reserved_bytes <= spaces[stage.node].free_bytes
        assert plan.ports_on(stage.node) <= set(spaces[stage.node].free_ports)
        is_head_of_pipeline = stage is plan.head and len(plan.stages) > 1
        assert len(plan.ports_on(stage.node)) == (2 if is_head_of_pipeline else 1)
    assert len({stage.node for stage in plan.stages}) == len(plan.stages)
    assert plan.kv_blocks * plan.block_size >= plan.max_context


def _check_layers(plan: ReplicaPlan, num_layers: int) -> None:
    held = [layer for stage in plan.stages for layer in range(stage.layers.start, stage.layers.end)]
    assert held == list(range(num_layers))
