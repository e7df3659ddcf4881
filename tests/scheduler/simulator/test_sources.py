"""Where weights come from in the simulator: host memory, disk, peers, the store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_scheduler.planner.decisions import Decision, Start
from paraserve_scheduler.planner.fleet import Fleet, Objectives
from paraserve_scheduler.policies.registry import POLICIES
from paraserve_scheduler.simulator.memory import Shelf
from paraserve_scheduler.simulator.world import Simulation
from tests.support.fleets import (
    GB,
    make_kind,
    make_method,
    make_model,
)
from tests.support.simulated_clusters import (
    make_cluster,
    make_deployment,
    make_node,
    make_request,
    simulate,
)

_KIND = make_kind(make_method(slot_runtime_s=None), disk_bytes_per_s=4e9)
_CALM = Objectives(ttft_s=60.0)


def _ttfts(disk_gb: int) -> list[float]:
    """Of a model, of another one that takes its place in host memory, and of the first again."""
    node = make_node(kind=_KIND, memory_bytes=20 * GB, disk_bytes=disk_gb * GB)
    deployments = [make_deployment(name, objectives=_CALM) for name in ("a", "b")]
    requests = [make_request(time_s, name) for time_s, name in [(10, "a"), (300, "b"), (600, "a")]]
    simulate(requests, make_cluster([node], deployments))
    return [request.ttft_s or 0.0 for request in requests]


def test_what_host_memory_has_no_room_for_is_read_from_disk_beside_the_store() -> None:
    first, _, without = _ttfts(disk_gb=0)
    *_, again = _ttfts(disk_gb=100)
    assert without == pytest.approx(first)
    # 13 GB at 2 GB/s, or at 4 more, which is sooner than the process is there.
    assert first - again == pytest.approx(6.5 - 4.0, abs=0.1)


def test_a_second_replica_reads_from_the_first_ones_memory_and_the_store_as_predicted() -> None:
    deployment = make_deployment(max_sequences=1, max_stages=1, objectives=_CALM)
    nodes = [make_node(f"n{i}", kind=_KIND, nic_bytes_per_s=4e9 - 2e9 * i) for i in range(2)]
    cluster = make_cluster(nodes, [deployment], store_bytes_per_s=1e9)
    requests = [make_request(time_s, output_tokens=2_000) for time_s in (10.0, 50.0)]
    starts: list[Start] = []

    def watched(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
        decisions = POLICIES["paraserve"].decide(fleet, now_s)
        starts.extend(it for it in decisions if isinstance(it, Start))
        return decisions

    outcome = Simulation(cluster, requests, watched).run()
    second = starts[1].stages[0]
    assert {source.peer for source in second.sources} == {"n0"}, "at once it gives all there is"
    for start in outcome.cold_starts:
        assert start.predicted_s == pytest.approx(start.actual_s, rel=0.01)
    first_s, second_s = (start.actual_s for start in outcome.cold_starts)
    assert first_s == pytest.approx(13.0 + 1.0 + 1.3, abs=0.1)
    assert second_s == pytest.approx(6.5 + 1.0 + 1.3, abs=0.1)


def test_disk_reads_are_not_counted_as_fetched() -> None:
    node = make_node(kind=_KIND, memory_bytes=20 * GB, disk_bytes=100 * GB, nic_bytes_per_s=1.0)
    deployments = [make_deployment(name, objectives=_CALM) for name in ("a", "b")]
    cluster = make_cluster([node], deployments)
    simulation = Simulation(cluster, [make_request(10.0, "a")], POLICIES["paraserve"].decide)
    simulation.nodes["n0"].disk.keep("a", ((0, 32),), deployments[0].model)
    outcome = simulation.run()
    assert outcome.moved_bytes < 10, "the store helps, at one byte a second"
    assert outcome.requests[0].ttft_s == pytest.approx(4.0 + 1.0 + 1.3 + 0.03, abs=0.1)


_MODEL = make_model(num_layers=8, size_bytes=8 * GB, ends_bytes=0)


@given(
    st.integers(0, 20),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 7), st.integers(1, 8))),
)
def test_a_shelf_holds_at_most_what_it_can_and_loses_nothing_silently(
    capacity_gb: int, kept: list[tuple[str, int, int]]
) -> None:
    shelf = Shelf(capacity_gb * GB)
    there: dict[str, set[int]] = {}
    for name, start, length in kept:
        layer_range = (start, min(8, start + length))
        wanted = there.get(name, set()) | set(range(*layer_range))
        for gone, layers in shelf.keep(name, (layer_range,), _MODEL):
            assert there.pop(gone) == {it for low, high in layers for it in range(low, high)}
        if len(wanted) <= capacity_gb:
            there[name] = wanted
        held = {
            weights: {it for low, high in layers for it in range(low, high)}
            for weights, layers in shelf.records().items()
        }
        assert held == there
        assert sum(map(len, held.values())) <= capacity_gb
