"""A gateway and the simulator refuse the same requests."""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import NoCapacity, Overloaded
from paraserve_scheduler.gateway.routes import Routes
from paraserve_scheduler.simulator.description import DeploymentFile
from paraserve_scheduler.state.records import Phase
from paraserve_scheduler.state.spec import DeploymentSpec
from paraserve_scheduler.state.waiting import MAX_WAITING, may_wait
from tests.support.fleets import GB
from tests.support.histories import LOST_PROCESS, History
from tests.support.limits import HANG_S
from tests.support.simulated_clusters import (
    make_cluster,
    make_deployment,
    make_node,
    make_request,
    simulate,
)


async def _refused_by_gateway(
    num_requests: int, max_waiting: int, replicas: list[str]
) -> list[bool]:
    """Which of requests that all come at once a gateway refuses."""

    async def ask(routes: Routes) -> bool:
        try:
            async with routes.lease("chat"):
                return False
        except (NoCapacity, Overloaded):
            return True

    routes = Routes(DemandMeter("g"), cold_start_timeout_s=HANG_S)
    endpoints = [pb.Endpoint(replica=replica) for replica in replicas]
    route = pb.Route(deployment="chat", endpoints=endpoints, max_waiting=max_waiting)
    routes.apply(pb.RouteTable(routes=[route]))
    asked = [asyncio.create_task(ask(routes)) for _ in range(num_requests)]
    await asyncio.sleep(0)
    route.endpoints.append(pb.Endpoint(replica="chat.1"))
    routes.apply(pb.RouteTable(routes=[route]))
    return await asyncio.gather(*asked)


def _refused_by_simulator(num_requests: int, max_waiting: int) -> list[bool]:
    """The same of the simulator, on nodes without room for any replica."""
    cluster = make_cluster(
        [make_node(gpu_bytes=(1 * GB,))], [make_deployment(max_waiting=max_waiting)]
    )
    outcome = simulate([make_request() for _ in range(num_requests)], cluster)
    return [request.was_refused for request in outcome.requests]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 12), st.integers(0, 12))
async def test_a_gateway_and_the_simulator_refuse_the_same_requests(
    num_requests: int, max_waiting: int
) -> None:
    by_rule = [not may_wait(num_before, max_waiting) for num_before in range(num_requests)]
    assert await _refused_by_gateway(num_requests, max_waiting, []) == by_rule
    assert _refused_by_simulator(num_requests, max_waiting) == by_rule


async def test_neither_refuses_what_a_ready_replica_takes_however_full_it_is() -> None:
    assert await _refused_by_gateway(20, 1, ["chat.1"]) == [False] * 20
    cluster = make_cluster([make_node()], [make_deployment(max_waiting=1)])
    late = [make_request(130.0) for _ in range(20)]
    outcome = simulate([make_request(100.0, output_tokens=2_000), *late], cluster)
    assert len(outcome.cold_starts) == 1, "it is always the same replica"
    assert not any(request.was_refused for request in outcome.requests)


def test_a_deployment_that_states_no_number_has_the_same_limit_in_both() -> None:
    in_simulator = DeploymentFile(name="chat", model="7b").max_waiting
    in_product = DeploymentSpec(name="chat", source="s3://m/chat", max_sequences=8).max_waiting
    assert in_simulator == in_product == MAX_WAITING


def test_only_what_no_replica_serves_waits_for_a_start() -> None:
    history = History()
    history.demand(waiting=1)
    since_s = history.view.deployments["tiny"].waiting_since_s
    assert since_s == history.now_s
    replica = history.serves()
    for _ in range(5):
        history.passes(10)
        history.demand(waiting=3, in_flight=4, replica_in_flight={replica: 4})
        # Each of them waits for a place only, and a further start is not late.
        assert history.view.deployments["tiny"].waiting_since_s is None
    history.part(replica, 0, Phase.FAILED, LOST_PROCESS)
    history.decides()
    history.demand(waiting=3)
    assert history.view.deployments["tiny"].waiting_since_s == history.now_s
