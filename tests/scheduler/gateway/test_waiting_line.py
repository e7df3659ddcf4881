"""Who waits while replicas are full: in order, woken one by one, with bounds, leaving no trace."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import DeadlineExceeded, ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import NoCapacity, Overloaded
from paraserve_scheduler.gateway.leases import Wish
from paraserve_scheduler.gateway.routes import Routes
from tests.support.gateway import end_all
from tests.support.limits import HANG_S

_RESUMED = Wish(is_resumed=True)


def route(
    *replicas: str, max_ongoing: int = 1, max_waiting: int = 10_000, failures: int = 0
) -> pb.RouteTable:
    """A table of one deployment, `d`."""
    endpoints = [pb.Endpoint(replica=name, max_ongoing=max_ongoing) for name in replicas]
    failure = pb.Failure(grpc_code="UNAVAILABLE", message="No room.")
    return pb.RouteTable(
        routes=[
            pb.Route(
                deployment="d",
                endpoints=endpoints,
                max_waiting=max_waiting,
                failure=failure,
                failure_number=failures,
            )
        ]
    )


class Crowd:
    """Requests for `d`, each of which keeps its replica until it is told to finish."""

    def __init__(
        self, demand: DemandMeter, *, max_held_bytes: int, cold_start_timeout_s: float
    ) -> None:
        self.demand = demand
        self.routes = Routes(
            self.demand, cold_start_timeout_s=cold_start_timeout_s, max_held_bytes=max_held_bytes
        )
        self.tasks: list[asyncio.Task[None]] = []
        #: Numbers of requests in the order in which they got a replica, and which one.
        self.served: list[int] = []
        self.replica: dict[int, str] = {}
        self._finish: dict[int, asyncio.Event] = {}

    def arrive(self, wish: Wish | None = None) -> int:
        number = len(self.tasks)
        self._finish[number] = asyncio.Event()
        self.tasks.append(asyncio.create_task(self._request(number, wish)))
        return number

    async def settled(self) -> None:
        # From a change to the task that it wakes, and to the one that this wakes.
        for _ in range(6):
            await asyncio.sleep(0)

    def finish(self, number: int) -> None:
        self._finish[number].set()

    @property
    def running(self) -> list[int]:
        return [number for number in self.served if not self.tasks[number].done()]

    @property
    def waiting(self) -> list[int]:
        return [n for n, task in enumerate(self.tasks) if not task.done() and n not in self.served]

    async def _request(self, number: int, wish: Wish | None) -> None:
        async with self.routes.lease("d", wish=wish) as lease:
            self.served.append(number)
            self.replica[number] = lease.replica
            await self._finish[number].wait()


@asynccontextmanager
async def crowd(
    table: pb.RouteTable,
    *,
    demand: DemandMeter | None = None,
    max_held_bytes: int = 1 << 30,
    cold_start_timeout_s: float = HANG_S,
) -> AsyncIterator[Crowd]:
    them = Crowd(
        demand or DemandMeter("g"),
        max_held_bytes=max_held_bytes,
        cold_start_timeout_s=cold_start_timeout_s,
    )
    them.routes.apply(table)
    try:
        yield them
    finally:
        await end_all(them.tasks)


_STEPS = st.sampled_from(["arrive", "arrive", "resume", "cancel", "leave", "finish", "table"])


@given(st.lists(st.tuples(_STEPS, st.integers(0, 99)), max_size=60), st.integers(1, 3))
async def test_replicas_are_full_or_nobody_waits_and_who_came_first_is_first(
    steps: list[tuple[str, int]], max_ongoing: int
) -> None:
    async with crowd(route()) as them:
        replicas = 0
        resumes: set[int] = set()
        order: list[int] = []  # as they should be served
        for step, choice in steps:
            before = list(them.waiting)
            if step == "arrive":
                order.append(them.arrive())
            elif step == "resume":
                resumed = [n for n in order if n in before and n in resumes]
                order.insert(len(resumed), number := them.arrive(_RESUMED))
                resumes.add(number)
            elif step == "cancel" and before:
                them.tasks[before[choice % len(before)]].cancel()
            elif step == "leave" and them.running:
                them.tasks[them.running[choice % len(them.running)]].cancel()
            elif step == "finish" and them.running:
                them.finish(them.running[choice % len(them.running)])
            elif step == "table":
                replicas = choice % 4
                names = (f"d.{number}" for number in range(replicas))
                them.routes.apply(route(*names, max_ongoing=max_ongoing))
            await them.settled()
            served_now = [n for n in order if n in them.served or them.tasks[n].done()]
            order = [n for n in order if n not in served_now]
            assert order == [n for n in order if n in them.waiting]
            per_replica = Counter(them.replica[n] for n in them.running)
            assert max(per_replica.values(), default=0) <= max_ongoing
            if order:
                listed = [f"d.{number}" for number in range(replicas)]
                assert all(per_replica[name] == max_ongoing for name in listed)
            assert them.demand.num_waiting("d") == len(order)
        served = [n for n in them.served if n not in resumes]
        assert served == sorted(served)
    assert _leaves_no_trace(them)


def _leaves_no_trace(them: Crowd) -> bool:
    demands = them.demand.report().demands
    return not any(demand.waiting or demand.in_flight for demand in demands)


class CountingMeter(DemandMeter):
    """Counts how often a replica is chosen for somebody, or looked for in vain."""

    looks = 0

    def num_in_flight(self, deployment: str, replica: str) -> int:
        self.looks += 1
        return super().num_in_flight(deployment, replica)


async def test_one_place_wakes_one_of_a_thousand_that_wait() -> None:
    demand = CountingMeter("g")
    async with crowd(route("d.1"), demand=demand) as them:
        for _ in range(1001):
            them.arrive()
        await them.settled()
        for number in range(3):
            assert them.served == list(range(number + 1))
            demand.looks = 0
            them.finish(number)
            await them.settled()
            # Neither do the others look whether it is for them.
            assert demand.looks <= 3


async def test_after_a_cold_start_the_held_go_on_as_far_as_there_is_room() -> None:
    async with crowd(route()) as them:
        for _ in range(50):
            them.arrive()
        await them.settled()
        them.routes.apply(route("d.1", max_ongoing=8))
        await them.settled()
        assert them.served == list(range(8))
        them.routes.apply(route("d.1", "d.2", max_ongoing=8))
        await them.settled()
        assert them.served == list(range(16))


async def test_what_no_limit_is_known_of_takes_all() -> None:
    async with crowd(route()) as them:
        for _ in range(50):
            them.arrive()
        them.routes.apply(route("d.1", max_ongoing=0))
        await them.settled()
        assert len(them.running) == 50


async def test_a_place_that_was_granted_to_a_request_that_left_goes_to_the_next() -> None:
    async with crowd(route("d.1")) as them:
        for _ in range(3):
            them.arrive()
        await them.settled()
        them.finish(0)
        # The first has let go, and its place is granted; then the one that got it leaves.
        while them.demand.num_waiting("d") == 2:
            await asyncio.sleep(0)
        them.tasks[1].cancel()
        await them.settled()
        assert them.served == [0, 2]


async def test_who_refuses_the_only_free_replica_holds_up_nobody() -> None:
    async with crowd(route("d.1")) as them:
        them.arrive()
        await them.settled()
        them.arrive(Wish(is_resumed=True, refused=frozenset({"d.1"})))
        them.arrive()
        them.finish(0)
        await them.settled()
        assert them.served == [0, 2]


async def refusal(them: Crowd, wish: Wish | None = None) -> ParaServeError | None:
    """The error with which one more request is refused at once."""
    number = them.arrive(wish)
    await them.settled()
    if not them.tasks[number].done():
        return None
    error = them.tasks[number].exception()
    assert isinstance(error, ParaServeError)
    return error


async def test_too_many_are_refused_by_what_serves() -> None:
    async with crowd(route(max_waiting=1)) as them:
        assert await refusal(them) is None
        cold = await refusal(them)
        assert isinstance(cold, NoCapacity)
        assert (cold.http_status, cold.grpc_code, cold.retry_after_s > 0) == (
            503,
            "UNAVAILABLE",
            True,
        )
        them.routes.apply(route("d.1", max_waiting=1))
        assert await refusal(them) is None
        full = await refusal(them)
        assert isinstance(full, Overloaded)
        assert (full.http_status, full.grpc_code, full.retry_after_s > 0) == (
            429,
            "RESOURCE_EXHAUSTED",
            True,
        )
        # Who has had a replica is not refused.
        assert await refusal(them, _RESUMED) is None


async def test_held_bytes_have_a_limit_of_their_own_for_all_deployments_together() -> None:
    async with crowd(route("d.1"), max_held_bytes=100) as them:
        them.arrive(Wish(held_bytes=1000))  # it is served, not held
        assert await refusal(them, Wish(held_bytes=60)) is None
        error = await refusal(them, Wish(held_bytes=41))
        assert isinstance(error, Overloaded)
        assert "max_held_bytes" in str(error)
        assert await refusal(them, Wish(held_bytes=40)) is None
        assert await refusal(them, Wish(held_bytes=41, is_resumed=True)) is None
        for task in them.tasks[1:]:
            task.cancel()
        await them.settled()
        assert await refusal(them, Wish(held_bytes=100)) is None


async def test_a_wait_at_full_replicas_has_the_limit_of_a_cold_start_and_says_so() -> None:
    async with crowd(route("d.1"), cold_start_timeout_s=0.01) as them:
        them.arrive()
        with pytest.raises(DeadlineExceeded, match=r"had room within 0\.01 s"):
            await them.tasks[them.arrive()]


async def test_a_failed_start_ends_the_wait_of_those_that_waited_for_it() -> None:
    async with crowd(route("d.1")) as them:
        them.arrive()
        waits = them.arrive()
        await them.settled()
        # Of a further replica: this one serves all the same.
        them.routes.apply(route("d.1", failures=1))
        await them.settled()
        assert them.waiting == [waits]
        them.routes.apply(route(failures=1))
        late = them.arrive()
        await them.settled()
        them.routes.apply(route(failures=2))
        for number in (waits, late):
            with pytest.raises(ParaServeError, match="cold start of 'd' failed: No room"):
                await them.tasks[number]


async def test_only_a_request_that_waits_for_a_start_is_urgent() -> None:
    async with crowd(route("d.1")) as them:
        for _ in range(2):
            them.arrive()
        await them.settled()
        assert them.demand.num_waiting("d") == 1
        assert not them.demand.urgent.is_set()
    async with crowd(route()) as them:
        them.arrive()
        await them.settled()
        assert them.demand.urgent.is_set()
