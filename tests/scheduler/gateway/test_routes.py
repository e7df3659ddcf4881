"""Holding and choosing, without any network: who waits, who goes where, what is counted."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import NotFound, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.routes import Routes
from tests.support.gateway import end_all
from tests.support.limits import HANG_S


def make_routes(
    demand: DemandMeter | None = None, *, first_table_timeout_s: float = HANG_S
) -> Routes:
    return Routes(
        demand or DemandMeter("g"),
        cold_start_timeout_s=HANG_S,
        first_table_timeout_s=first_table_timeout_s,
    )


def table(**replicas: list[str]) -> pb.RouteTable:
    """A route table: deployment to its ready replicas."""
    return pb.RouteTable(
        routes=[
            pb.Route(
                deployment=name,
                endpoints=[pb.Endpoint(replica=replica) for replica in ready],
                max_waiting=100,
            )
            for name, ready in replicas.items()
        ]
    )


async def take(routes: Routes, deployment: str) -> str:
    async with routes.lease(deployment) as endpoint:
        return endpoint.replica


async def test_held_requests_go_on_in_the_loop_turn_after_the_table_changed() -> None:
    routes = make_routes()
    routes.apply(table(d=[]))
    held = [asyncio.create_task(take(routes, "d")) for _ in range(3)]
    await asyncio.sleep(0)
    routes.apply(table(d=["d.1"]))
    for _ in range(2):
        await asyncio.sleep(0)
    assert [task.done() for task in held] == [True] * 3


async def test_a_table_without_news_for_a_deployment_leaves_its_requests_held() -> None:
    routes = make_routes()
    routes.apply(table(d=[]))
    held = asyncio.create_task(take(routes, "d"))
    await asyncio.sleep(0)
    routes.apply(table(d=[], other=["other.1"]))
    await asyncio.sleep(0)
    assert not held.done()
    routes.apply(table(d=["d.1"]))
    assert await held == "d.1"


async def test_a_deployment_deleted_while_requests_wait_is_not_found() -> None:
    routes = make_routes()
    routes.apply(table(d=[]))
    held = asyncio.create_task(take(routes, "d"))
    await asyncio.sleep(0)
    routes.apply(table(other=[]))
    with pytest.raises(NotFound, match="Deployments: other"):
        await held


async def test_the_first_table_is_waited_for() -> None:
    routes = make_routes()
    required = asyncio.create_task(routes.require("d"))
    await asyncio.sleep(0)
    assert not routes.is_known
    routes.apply(table(d=[]))
    await required


async def test_without_any_table_the_scheduler_is_named_as_the_reason() -> None:
    with pytest.raises(Unavailable, match="has not reached its scheduler"):
        await make_routes(first_table_timeout_s=0.01).require("d")


async def test_the_names_in_an_error_are_bounded() -> None:
    routes = make_routes()
    routes.apply(table(**{f"d{number:02}": [] for number in range(25)}))
    with pytest.raises(NotFound, match="d19 and 5 more"):
        await routes.require("nosuch")


@given(st.integers(1, 5), st.integers(0, 30))
async def test_leases_are_spread_evenly(num_replicas: int, num_requests: int) -> None:
    demand = DemandMeter("g")
    routes = make_routes(demand)
    routes.apply(table(d=[f"d.{n}" for n in range(num_replicas)]))
    taken: Counter[str] = Counter()
    leases = [routes.lease("d") for _ in range(num_requests)]
    for lease in leases:
        taken[(await lease.__aenter__()).replica] += 1
    assert max(taken.values(), default=0) - min(
        (taken[f"d.{n}"] for n in range(num_replicas)), default=0
    ) in (0, 1)
    for lease in leases:
        await lease.__aexit__(None, None, None)
    assert all(demand.num_in_flight("d", replica) == 0 for replica in taken)


@given(st.lists(st.sampled_from(["arrive", "cancel", "serve", "finish"]), max_size=40))
async def test_every_request_is_waiting_or_in_flight_or_over(steps: list[str]) -> None:
    demand = DemandMeter("g")
    routes = make_routes(demand)
    routes.apply(table(d=[]))
    done = asyncio.Event()

    async def request() -> None:
        demand.arrived("d")
        async with routes.lease("d"):
            await done.wait()

    tasks: list[asyncio.Task[None]] = []
    for step in steps:
        if step == "arrive":
            tasks.append(asyncio.create_task(request()))
        elif step == "cancel" and tasks:
            tasks.pop().cancel()
        elif step == "serve":
            routes.apply(table(d=["d.1"]))
        elif step == "finish":
            done.set()
        for _ in range(4):
            await asyncio.sleep(0)
        open_now = sum(not task.done() for task in tasks)
        assert demand.num_waiting("d") + demand.num_in_flight("d", "d.1") == open_now
    await end_all(tasks)
    assert demand.num_waiting("d") + demand.num_in_flight("d", "d.1") == 0


def test_a_report_forgets_what_is_gone_but_not_what_still_runs() -> None:
    demand = DemandMeter("g")
    with demand.working("d", "d.1"):
        demand.first_token("d", "d.1", 5.0)
        demand.first_token("d", "d.1", 6.0)
        demand.keep({})
        (reported,) = demand.report().demands
        (replica,) = reported.replicas
        assert (replica.replica, replica.in_flight, replica.first_token_s) == ("d.1", 1, 5.0)
    demand.keep({"d": []})
    assert [len(reported.replicas) for reported in demand.report().demands] == [0]
    demand.keep({})
    assert not demand.report().demands


def test_only_the_first_waiting_request_is_urgent() -> None:
    demand = DemandMeter("g")
    with demand.waiting("d"):
        assert demand.urgent.is_set()
        demand.urgent.clear()
        with demand.waiting("d"):
            assert not demand.urgent.is_set()


def test_only_the_end_of_a_cold_start_is_urgent() -> None:
    demand = DemandMeter("g")
    demand.first_token("d", "d.1", 5.0)
    assert demand.urgent.is_set()
    demand.urgent.clear()
    demand.first_token("d", "d.1", 6.0)
    assert not demand.urgent.is_set()


@pytest.mark.parametrize(
    ("times_s", "is_whole", "tpot_s"),
    [([5.0, 5.5, 7.0], True, 1.0), ([5.0, 5.5, 7.0], False, 0.0), ([5.0], True, 0.0)],
)
def test_a_streams_pace_counts_when_its_answer_is_whole(
    times_s: list[float], is_whole: bool, tpot_s: float
) -> None:
    demand = DemandMeter("g")
    pace = demand.pace("d", "d.1")
    for at_s in times_s:
        pace.receive(at_s)
    if is_whole:
        pace.end()
    (replica,) = demand.report().demands[0].replicas
    assert (replica.first_token_s, replica.tpot_s) == (5.0, tpot_s)


async def test_a_deployment_is_known_to_whoever_asks_right_after_deploying() -> None:
    routes = make_routes()
    routes.apply(table(other=[]))
    asked = asyncio.create_task(routes.require("d"))
    await asyncio.sleep(0)  # it has looked
    routes.apply(table(other=[], d=[]))
    await asked
