"""Which replicas are taken for silent, when, and where their requests go; time is the test's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import ReplicaSilent
from paraserve_scheduler.gateway.leases import Lease, Wish
from paraserve_scheduler.gateway.routes import Routes
from paraserve_scheduler.gateway.silence import SilenceWatch
from tests.support.gateway import end_all
from tests.support.limits import HANG_S

_TICK_S = 0.05


class Replicas:
    """A gateway's routes, its watch, and replicas that answer probes when the test says so."""

    def __init__(self) -> None:
        self.demand = DemandMeter("g")
        self.routes = Routes(self.demand, cold_start_timeout_s=HANG_S)
        self.watch = SilenceWatch(self.routes, self._probe)
        #: By replica, every probe that it got.
        self.probes: dict[str, list[asyncio.Future[bool]]] = {}
        self.tasks: list[asyncio.Task[str]] = []

    def serve(self, *replicas: str) -> None:
        endpoints = [pb.Endpoint(replica=replica) for replica in replicas]
        routes = [pb.Route(deployment="d", endpoints=endpoints, max_waiting=100)]
        self.routes.apply(pb.RouteTable(routes=routes))

    async def request(self, *, may_leave: bool = True) -> Lease:
        """Begin a request that waits for responses; its task ends as its lease does."""
        leases: asyncio.Queue[Lease] = asyncio.Queue()

        async def ask() -> str:
            try:
                async with self.routes.lease("d", wish=Wish(may_leave=lambda: may_leave)) as lease:
                    leases.put_nowait(lease)
                    await asyncio.Event().wait()
            except ReplicaSilent:
                return "moves"
            raise AssertionError

        self.tasks.append(asyncio.create_task(ask()))
        return await leases.get()

    async def passes(self, seconds: float, *, elapsed_s: float = _TICK_S) -> None:
        for _ in range(round(seconds / elapsed_s)):
            self.watch.tick(elapsed_s)
            for _ in range(4):
                await asyncio.sleep(0)

    async def picked(self) -> str:
        """Where the next request would go."""
        async with self.routes.lease("d") as lease:
            return lease.replica

    @property
    def silent(self) -> list[str]:
        """As the scheduler is told."""
        demands = self.demand.report().demands
        return [each.replica for demand in demands for each in demand.replicas if each.is_silent]

    async def _probe(self, endpoint: pb.Endpoint) -> bool:
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.probes.setdefault(endpoint.replica, []).append(answer)
        return await answer


@asynccontextmanager
async def replicas(*names: str) -> AsyncIterator[Replicas]:
    them = Replicas()
    them.serve(*names)
    try:
        yield them
    finally:
        await end_all(them.tasks)


async def test_a_stopped_replica_is_silent_within_three_seconds_and_its_requests_move() -> None:
    async with replicas("d.1") as them:
        for _ in range(5):
            await them.request()
        them.serve("d.1", "d.2")
        await them.passes(0.9)
        assert not them.probes
        await them.passes(1.95)
        assert them.silent == ["d.1"]
        assert them.demand.urgent.is_set()
        await them.passes(_TICK_S * 2)
        assert [task.result() for task in them.tasks] == ["moves"] * 5
        # One probe at a time, however many of its requests are silent.
        assert len(them.probes["d.1"]) <= 3
        assert await them.picked() == "d.2"


async def test_one_failed_probe_is_not_enough() -> None:
    async with replicas("d.1", "d.2") as them:
        await them.request()
        await them.passes(2.5)
        first, second = them.probes["d.1"]
        assert not first.done()
        second.set_result(True)
        await them.passes(0.5)
        assert not them.silent


async def test_a_late_answer_to_the_first_probe_is_as_good() -> None:
    async with replicas("d.1", "d.2") as them:
        await them.request()
        await them.passes(2.5)
        them.probes["d.1"][0].set_result(True)
        await them.passes(0.5)
        assert not them.silent


async def test_one_that_says_that_its_passes_do_not_return_is_silent_at_once() -> None:
    async with replicas("d.1", "d.2") as them:
        await them.request()
        await them.passes(1.1)
        them.probes["d.1"][0].set_result(False)
        await them.passes(_TICK_S * 2)
        assert them.silent == ["d.1"]
        assert them.tasks[0].result() == "moves"


async def test_a_replica_that_sends_tokens_to_others_is_only_slow_to_answer_probes() -> None:
    async with replicas("d.1") as them:
        await them.request()
        lively = await them.request()
        for _ in range(100):
            await them.passes(_TICK_S)
            them.routes.leases.heard(lively)
            them.routes.leases.delivered(lively)
        assert them.probes
        assert not them.silent


async def test_a_request_that_gets_tokens_has_nobody_probed() -> None:
    async with replicas("d.1") as them:
        lease = await them.request()
        for _ in range(100):
            await them.passes(_TICK_S)
            them.routes.leases.heard(lease)
            them.routes.leases.delivered(lease)
        assert not them.probes


async def test_time_in_which_the_gateway_stood_still_is_no_silence() -> None:
    async with replicas("d.1", "d.2") as them:
        await them.request()
        for _ in range(10):
            them.watch.tick(60.0)
        assert not them.probes
        await them.passes(0.7)
        (probe,) = them.probes["d.1"]
        for _ in range(10):
            them.watch.tick(60.0)
        probe.set_result(True)
        await them.passes(0.5)
        assert not them.silent


async def test_without_another_replica_requests_stay_until_it_answers() -> None:
    async with replicas("d.1") as them:
        await them.request()
        await them.passes(10.0)
        assert them.silent == ["d.1"]
        assert await them.picked() == "d.1", "there is no other one"
        assert not them.tasks[0].done()
        asked = len(them.probes["d.1"])
        await them.passes(3.0)
        assert len(them.probes["d.1"]) - asked in (2, 3, 4), "about one a second"
        them.probes["d.1"][-1].set_result(True)
        await them.passes(_TICK_S)
        assert not them.silent
        assert not them.tasks[0].done()


async def test_they_move_once_the_scheduler_has_started_another() -> None:
    async with replicas("d.1") as them:
        await them.request()
        await them.passes(5.0)
        them.serve("d.1", "d.2")
        await them.passes(_TICK_S * 2)
        assert them.tasks[0].result() == "moves"


@pytest.mark.parametrize("reason", ["cannot", "is delivering"])
async def test_what_could_not_go_on_elsewhere_stays(reason: str) -> None:
    async with replicas("d.1", "d.2") as them:
        lease = await them.request(may_leave=reason != "cannot")
        if reason != "cannot":
            them.routes.leases.heard(lease)  # its client has not taken the response yet
        await them.passes(5.0)
        assert them.silent == [lease.replica]
        assert not them.tasks[0].done()


async def test_one_that_is_left_is_probed_on_and_used_again_when_it_answers() -> None:
    async with replicas("d.1") as them:
        await them.request()
        them.serve("d.1", "d.2")
        await them.passes(5.0)
        assert them.tasks[0].done()
        them.probes["d.1"][-1].set_result(True)
        await them.passes(_TICK_S)
        assert not them.silent
        assert await them.picked() == "d.1"


async def test_a_replica_that_the_scheduler_has_withdrawn_is_forgotten() -> None:
    async with replicas("d.1") as them:
        await them.request()
        them.serve("d.1", "d.2")
        await them.passes(5.0)
        them.serve("d.2")
        assert not them.silent
        asked = len(them.probes["d.1"])
        await them.passes(5.0)
        assert len(them.probes["d.1"]) == asked
        assert all(probe.done() for probe in them.probes["d.1"])


async def test_a_dead_replica_gets_nobody_until_it_answers_a_probe() -> None:
    async with replicas("d.1") as them:
        them.routes.found_dead("d.1")
        waits = asyncio.create_task(them.request())
        await them.passes(2.0)
        assert not waits.done()
        them.serve("d.1")  # the scheduler does not know it yet
        await them.passes(_TICK_S)
        assert not waits.done()
        them.probes["d.1"][-1].set_result(True)
        await them.passes(_TICK_S)
        assert (await waits).replica == "d.1"


async def test_a_silent_replica_is_not_preferred_either() -> None:
    async with replicas("d.1") as them:
        await them.request()
        them.serve("d.1", "d.2")
        await them.passes(5.0)
        async with them.routes.lease("d", preferred="d.1") as lease:
            assert lease.replica == "d.2"
