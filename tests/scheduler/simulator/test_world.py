from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views import timeline
from paraserve_scheduler.planner.decisions import Decision
from paraserve_scheduler.planner.fleet import Fleet, Objectives
from paraserve_scheduler.policies.registry import POLICIES
from paraserve_scheduler.simulator.description import FailureFile
from paraserve_scheduler.simulator.results import Outcome, RunProgress, percentile, summarize
from paraserve_scheduler.simulator.workload import SimRequest
from paraserve_scheduler.simulator.world import Simulation
from tests.support.fleets import GB, make_kind, make_method
from tests.support.simulated_clusters import (
    make_cluster,
    make_deployment,
    make_node,
    make_request,
    simulate,
)


def _crowd(seed: int, count: int = 120, deployments: int = 6) -> list[SimRequest]:
    generator = random.Random(seed)
    times = sorted(generator.uniform(0, 200) for _ in range(count))
    return [
        make_request(time_s, f"d{generator.randrange(deployments)}", output_tokens=200)
        for time_s in times
    ]


_MANY = make_cluster(deployments=[make_deployment(f"d{i}") for i in range(6)])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_request_is_served_and_nothing_is_left(policy: str) -> None:
    outcome = simulate(_crowd(1), _MANY, policy)
    for request in outcome.requests:
        assert request.first_token_s is not None
        assert request.end_s is not None
        assert request.arrival_s < request.first_token_s <= request.end_s


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_same_seed_gives_the_same_run(policy: str) -> None:
    def run() -> list[tuple[float | None, float | None]]:
        outcome = simulate(_crowd(2), _MANY, policy)
        return [(request.first_token_s, request.end_s) for request in outcome.requests]

    assert run() == run()


def _checked(fleet: Fleet) -> None:
    for node in fleet.nodes:
        for gpu in node.gpus:
            assert 0 <= gpu.free_bytes <= gpu.capacity_bytes
        for claim in node.claims:
            assert claim.remaining_bytes >= 0


@pytest.mark.parametrize("policy", sorted(POLICIES))
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 10_000))
def test_what_a_policy_is_told_adds_up_at_every_decision(policy: str, seed: int) -> None:
    """A GPU that is oversubscribed fails in the simulation itself."""

    def watched(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
        _checked(fleet)
        return POLICIES[policy].decide(fleet, now_s)

    small = [make_node(f"n{i}", gpu_bytes=(20 * GB, 32 * GB)) for i in range(3)]
    Simulation(replace(_MANY, nodes=tuple(small)), _crowd(seed, 60), watched).run()


def test_a_run_tells_how_far_it_is_until_every_request_is_done() -> None:
    cluster = make_cluster([make_node()], [make_deployment(max_waiting=4)])
    requests = [make_request(100.0 + i / 100) for i in range(10)]
    told: list[RunProgress] = []
    Simulation(cluster, requests, POLICIES["paraserve"].decide, watch=told.append).run()
    assert {progress.num_requests for progress in told} == {10}
    done = [progress.num_done for progress in told]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 10)
    assert 6 in done, "those that were refused are done"


def test_a_cold_start_takes_what_the_model_says() -> None:
    """13 GB over 2 GB/s, then 1 s and 0.1 s a GB, then a prompt of 100 tokens at 0.3 ms."""
    cluster = make_cluster([make_node(kind=make_kind(make_method(slot_runtime_s=None)))])
    (request,) = simulate([make_request(100.0)], cluster).requests
    assert request.ttft_s == pytest.approx(6.5 + 1.0 + 1.3 + 0.03, abs=0.05)
    assert request.tpot_s == pytest.approx(0.03)


def test_more_stages_start_sooner_where_the_objective_asks_for_it() -> None:
    tight = make_deployment(objectives=Objectives(ttft_s=3.5, tpot_s=0.2))
    loose = make_deployment(objectives=Objectives(ttft_s=60.0, tpot_s=0.2))
    ttfts = []
    for deployment in (tight, loose):
        outcome = simulate([make_request(100.0)], make_cluster(deployments=[deployment]))
        ttfts.append(outcome.requests[0].ttft_s or 0.0)
        (start,) = outcome.cold_starts
        assert (start.stages > 1) == (deployment is tight)
    assert ttfts[0] < ttfts[1] / 2


def test_the_prediction_comes_true_where_nothing_interferes() -> None:
    (start,) = simulate([make_request(100.0)]).cold_starts
    assert start.predicted_s == pytest.approx(start.actual_s, rel=0.01)


def test_two_fetches_to_one_node_share_its_card() -> None:
    deployments = [make_deployment(name) for name in ("a", "b")]
    node = make_node(gpu_bytes=(32 * GB, 32 * GB))
    cluster = make_cluster([node], deployments)
    both = simulate([make_request(100.0, "a"), make_request(100.0, "b")], cluster)
    alone = simulate([make_request(100.0, "a")], cluster)
    assert both.cold_starts[0].actual_s - alone.cold_starts[0].actual_s == pytest.approx(6.5, abs=1)


def test_a_second_start_takes_weights_from_host_memory() -> None:
    calm = make_cluster(deployments=[make_deployment(objectives=Objectives(ttft_s=60.0))])
    outcome = simulate([make_request(100.0), make_request(500.0)], calm)
    first, second = (request.ttft_s or 0.0 for request in outcome.requests)
    assert second < first - 3
    assert outcome.moved_bytes == pytest.approx(13 * GB)


def test_a_pipeline_becomes_one_instance_and_frees_the_other_nodes() -> None:
    deployment = make_deployment(objectives=Objectives(ttft_s=3.0, tpot_s=0.2))
    seen: list[tuple[int, float]] = []

    def watched(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
        for need in fleet.needs:
            for replica in need.replicas:
                seen.append((len(replica.reserved_bytes), now_s))
        return POLICIES["paraserve"].decide(fleet, now_s)

    long = make_request(100.0, output_tokens=2_000)
    Simulation(make_cluster(deployments=[deployment]), [long], watched).run()
    stages = [count for count, _ in seen]
    assert max(stages) > 1
    assert stages[-1] == 1
    assert long.tpot_s is not None
    assert long.tpot_s < 0.04, "most of it ran at one instance's speed"


def test_requests_of_a_lost_node_begin_again_elsewhere() -> None:
    failures = (FailureFile(node="n0", at_s=101.0, for_s=1000.0),)
    request = make_request(90.0, output_tokens=400)
    outcome = simulate([request], make_cluster(failures=failures))
    assert request.end_s is not None
    assert len(outcome.cold_starts) == 2
    assert outcome.lost_replicas == 1
    assert outcome.ended_s < 300, "each request ended once, and the run with the last"
    (calm,) = simulate([make_request(90.0, output_tokens=400)]).requests
    assert request.end_s > (calm.end_s or 0.0)


def test_a_burst_beyond_one_replicas_capacity_gets_more_replicas() -> None:
    burst = [make_request(100.0 + i / 100, output_tokens=400) for i in range(30)]
    outcome = simulate(burst)
    served = {request.first_token_s is not None for request in burst}
    assert served == {True}
    assert sum(start.stages for start in outcome.cold_starts) >= 2


def test_memory_is_paid_for_from_start_to_end() -> None:
    cluster = make_cluster(
        [make_node(kind=make_kind(make_method(slot_runtime_s=None)))],
        [make_deployment(objectives=Objectives())],
    )
    outcome: Outcome = simulate([make_request(0.0)], cluster, "serverless-vllm")
    (request,) = outcome.requests
    held_s = (request.end_s or 0.0) + 30.0
    assert outcome.gpu_byte_s == pytest.approx(18 * GB * held_s, rel=0.03)


def test_what_is_refused_never_runs_and_what_was_let_in_does() -> None:
    requests = [make_request(100.0 + i / 100) for i in range(10)]
    simulate(requests, make_cluster([make_node()], [make_deployment(max_waiting=4)]))
    refused = [request for request in requests if request.was_refused]
    assert len(refused) == 6
    assert all((request.end_s is None) == request.was_refused for request in requests)


def test_the_summary_counts_a_request_that_was_never_served_as_missed() -> None:
    huge = make_node(gpu_bytes=(1 * GB,))
    outcome = simulate([make_request(0.0)], make_cluster([huge]))
    summary = summarize(outcome, make_cluster().deployments)
    assert (summary.all.ttft_met, summary.all.tpot_met) == (0.0, 0.0)
    assert (summary.all.unfinished, summary.all.refused) == (1, 0)
    assert summary.cold_starts == 0


def _events(trace: dict[str, Any]) -> dict[str, set[str]]:
    """Keys of the events of a Chrome trace, by their names."""
    return {event["name"]: set(event) for event in trace["traceEvents"]}


def _real_cold_start() -> pb.ReplicaStatus:
    """Of two stages, with the spans that roles and agents write."""
    parts = [
        pb.ReplicaPart(
            node=f"n{stage}",
            layer_start=16 * stage,
            layer_end=16 * stage + 16,
            status=pb.PartStatus(
                phase=pb.READY,
                spans=[
                    pb.Span(name=name, start_s=100, end_s=103, bytes=size)
                    for name, size in [
                        ("fetch", 5),
                        (f"load chat.1.stage{stage}", 0),
                        ("import torch", 0),
                        ("adopt weights", 0),
                    ]
                ],
            ),
        )
        for stage in range(2)
    ]
    return pb.ReplicaStatus(
        replica="chat.1", requested_s=99, planned_s=99, ready_s=103, first_token_s=104, parts=parts
    )


def test_a_trace_has_the_names_and_the_schema_of_a_real_timeline() -> None:
    tight = make_deployment(max_stages=2, objectives=Objectives(ttft_s=0.1), consolidate=False)
    nodes = [make_node(f"n{i}", kind=make_kind(make_method(slot_runtime_s=None))) for i in range(2)]
    cluster = make_cluster(nodes, deployments=[tight])
    simulated = simulate([make_request(100.0)], cluster, keeps_trace=True).trace.chrome()
    real = timeline.chrome_trace(_real_cold_start())
    assert simulated.keys() == real.keys()
    expected = _events(real)
    for name in ("plan", "all ready", "ready [0, 16)", "ready [16, 32)"):
        # Instants of a real trace belong to its only replica.
        expected[name] |= {"args"}
    # Requests are not traced.
    del expected["first token"]
    assert _events(simulated) == expected
    spans = [event for event in simulated["traceEvents"] if event["ph"] == "X"]
    assert sum(e["args"].get("bytes", 0) for e in spans if e["name"] == "fetch") == 13 * GB
    assert {event["args"]["replica"] for event in spans} == {"chat.1"}


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0, 0.99))
def test_a_percentile_is_one_of_the_values_and_exceeds_its_part(
    values: list[float], part: float
) -> None:
    found = percentile(values, part)
    assert found in values
    assert sum(value <= found for value in values) >= part * len(values)
