"""A running controller over nodes without processes, for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.controller.loop import Controller
from paraserve_scheduler.state.events import DemandReported
from paraserve_scheduler.state.records import Phase, Replica
from paraserve_scheduler.store.sqlite import SqliteStore
from paraserve_scheduler.testing import FakeAgent, FakeAgents, ManualClock
from tests.support.scheduler_records import make_demand, make_deployment, make_node_info

CONFIG = SchedulerConfig()


class FakeControlPlane:
    """Nodes outlive schedulers: `restart_scheduler` takes a new one on the same state file."""

    def __init__(self, state_file: Path, nodes: Iterable[str]) -> None:
        self.clock = ManualClock()
        self.nodes = {name: FakeAgent(make_node_info(name)) for name in nodes}
        self._state_file = state_file
        self._boot()

    def _boot(self) -> None:
        self.store = SqliteStore(self._state_file)
        agents = FakeAgents(self.nodes.values())
        self.controller = Controller(
            store=self.store, agents=agents, clock=self.clock, config=CONFIG
        )
        self._task = asyncio.create_task(self.controller.run())

    async def stop_scheduler(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self.store.close()

    async def restart_scheduler(self) -> None:
        await self.stop_scheduler()
        self._boot()

    async def register(self, *names: str) -> None:
        for name in names or self.nodes:
            self.controller.notify(self.nodes[name].registered(self.clock.now_s()))
        await self.heartbeats(*names)

    async def heartbeats(self, *names: str) -> None:
        for name in names or self.nodes:
            self.controller.notify(self.nodes[name].heartbeat(self.clock.now_s()))
        await self.settle()

    async def demand(self, deployment: str = "tiny", **fields: Any) -> None:
        demands = (make_demand(deployment, **fields),)
        now_s = self.clock.now_s()
        self.controller.notify(DemandReported(gateway="g0", demands=demands, at_s=now_s))
        await self.settle()

    async def passes(self, seconds: float, *, silent: Iterable[str] = ()) -> None:
        self.clock.advance(seconds)
        await self.heartbeats(*(set(self.nodes) - set(silent)))

    async def serves(self, **spec: Any) -> Replica:
        """Deploy and bring up one replica; returns it. No request is left."""
        self.controller.add_deployment(make_deployment(**spec))
        await self.demand(waiting=1)
        await self.demand()
        (replica,) = self.live()
        assert replica.phase is Phase.READY
        return replica

    async def busy(self, replica: str = "tiny.1", in_flight: int = 1) -> None:
        """Requests run on a replica, which has answered."""
        await self.demand(
            in_flight=in_flight,
            replica_in_flight={replica: in_flight},
            first_token_s={replica: self.clock.now_s()},
        )

    async def hands_over(self) -> None:
        """Bring up a pipeline and its successor; the running request has not moved."""
        await self.serves(consolidate=True)
        await self.busy()
        await self.passes(CONFIG.policy.consolidation.after_s)

    def live(self) -> tuple[Replica, ...]:
        return self.controller.view.live_replicas()

    def held(self) -> set[tuple[str, str]]:
        """Which node holds a part of which replica, by the nodes' own account."""
        return {(name, replica) for name, node in self.nodes.items() for replica, _ in node.parts}

    async def settle(self) -> None:
        """Let everything happen that needs no time; nothing here waits for anything else."""
        for _ in range(50):
            await asyncio.sleep(0)
        if self._task.done():
            await self._task


@contextlib.asynccontextmanager
async def running(
    state_file: Path = Path(":memory:"), nodes: Iterable[str] = ("n0", "n1")
) -> AsyncIterator[FakeControlPlane]:
    cluster = FakeControlPlane(state_file, nodes)
    try:
        await cluster.register()
        yield cluster
    finally:
        await cluster.stop_scheduler()
