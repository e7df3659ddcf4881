"""One agent beside a real tritonserver, and the scheduler that it reports to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio

from integration.support.triton_server import TritonServer
from paraserve_backend.agent.config import AgentConfig
from paraserve_backend.agent.main import run
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import (
    AgentStub,
    SchedulerServicer,
    add_SchedulerServicer_to_server,
)
from paraserve_backend.tritonserver.host.client import ModelState, TritonClient
from paraserve_backend.tritonserver.host.stubs import ProcessTable, Stub

if TYPE_CHECKING:
    from paraserve_backend.rpc.paraserve_pb2_grpc import AgentAsyncStub


class AgentsScheduler(SchedulerServicer):
    """Takes every agent and keeps what it reports."""

    def __init__(self, heartbeat_interval_s: float) -> None:
        self._heartbeat_interval_s = heartbeat_interval_s
        self.info: asyncio.Queue[pb.NodeInfo] = asyncio.Queue()
        self.statuses: asyncio.Queue[pb.NodeStatus] = asyncio.Queue()

    async def Register(self, request: pb.NodeInfo, context: object) -> pb.RegisterReply:
        self.info.put_nowait(request)
        return pb.RegisterReply(heartbeat_interval_s=self._heartbeat_interval_s)

    async def Heartbeat(self, request: pb.NodeStatus, context: object) -> pb.HeartbeatReply:
        self.statuses.put_nowait(request)
        return pb.HeartbeatReply(known=True)

    async def until(self, wanted: Callable[[pb.NodeStatus], bool]) -> pb.NodeStatus:
        """Return the first report from now on that is as wanted."""
        while not self.statuses.empty():
            self.statuses.get_nowait()
        while not wanted(status := await self.statuses.get()):
            pass
        return status


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentNode:
    """A running agent, its Triton, and what a test asks them."""

    config: AgentConfig
    agent: AgentAsyncStub
    scheduler: AgentsScheduler
    triton: TritonClient
    server: TritonServer

    async def apply(self, part: pb.Part) -> list[pb.PartStatus]:
        return [status async for status in self.agent.Apply(part)]

    async def remove(self, replica: str = "tiny.1", deadline_s: float = 0) -> bool:
        reply = await self.agent.Remove(pb.RemoveRequest(replica=replica, deadline_s=deadline_s))
        return reply.was_there

    async def describe(self) -> pb.NodeStatus:
        return await self.agent.Describe(pb.DescribeRequest())

    def processes(self) -> tuple[Stub, ...]:
        return ProcessTable(self.config.model_repository).find()

    async def assert_nothing_left(self) -> None:
        states = set((await self.triton.states()).values())
        assert states <= {ModelState.ABSENT, ModelState.UNAVAILABLE, ModelState.UNLOADING}
        self.assert_no_traces()
        status = await self.describe()
        assert (list(status.tier), status.tier_used_bytes) == ([], 0)

    def assert_no_traces(self) -> None:
        assert self.processes() == ()
        assert self.server.shm_regions() == []
        assert list(self.config.model_repository.iterdir()) == []
        assert not (self.config.run_dir / "keys" / "tiny.1").exists()


def _make_config(triton: TritonServer, scheduler: str, tmp_path: Path) -> AgentConfig:
    return AgentConfig(
        name="node-1",
        scheduler=scheduler,
        triton=triton.grpc_address,
        model_repository=triton.model_repository,
        run_dir=tmp_path / "run",
        listen="127.0.0.1:0",
        memory_bytes=1 << 30,
        tier_bytes=0,
    )


@asynccontextmanager
async def scheduler_server(
    heartbeat_interval_s: float = 0.2,
) -> AsyncIterator[tuple[AgentsScheduler, str]]:
    # An agent calls no more of it.
    scheduler = AgentsScheduler(heartbeat_interval_s)  # type: ignore[abstract]
    server = grpc.aio.server()
    add_SchedulerServicer_to_server(scheduler, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield scheduler, f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


@asynccontextmanager
async def running_node(
    triton: TritonServer, tmp_path: Path, *, heartbeat_interval_s: float = 0.2, **settings: Any
) -> AsyncIterator[AgentNode]:
    """Run an agent until the block ends; a crash of the agent ends the test."""
    client = TritonClient(triton.grpc_address)
    async with scheduler_server(heartbeat_interval_s) as (scheduler, address):
        config = replace(_make_config(triton, address, tmp_path), **settings)
        agent = asyncio.create_task(run(config))
        registered = asyncio.create_task(scheduler.info.get())
        await asyncio.wait({agent, registered}, return_when=asyncio.FIRST_COMPLETED)
        if agent.done():
            agent.result()
        async with grpc.aio.insecure_channel(registered.result().agent_address) as channel:
            yield AgentNode(
                config=config,
                agent=AgentStub(channel),
                scheduler=scheduler,
                triton=client,
                server=triton,
            )
        agent.cancel()
        with suppress(asyncio.CancelledError):
            await agent
    await client.close()
