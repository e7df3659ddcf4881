"""Every gRPC call inside a cluster, in an environment whose proxies are for the way out of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.agent.registration import GrpcSchedulerPort
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.channels import cluster_server, listen
from paraserve_backend.rpc.paraserve_pb2_grpc import (
    AgentServicer,
    SchedulerServicer,
    add_AgentServicer_to_server,
    add_SchedulerServicer_to_server,
)
from paraserve_backend.tritonserver.host.client import TritonClient
from paraserve_scheduler.client.generate import stream
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.control_plane.controller.agents import GrpcAgents
from tests.support.gateway import DEPLOYMENT, GatewayHarness, serving
from tests.support.gateway_fakes import Context
from tests.support.limits import HANG_S

TOKEN = "t0ken"

pytestmark = pytest.mark.usefixtures("dead_proxies")


class Scheduler(SchedulerServicer):
    """Answers the calls of an agent and of a command."""

    async def Register(self, request: pb.NodeInfo, context: Context) -> pb.RegisterReply:
        return pb.RegisterReply(heartbeat_interval_s=7.0)

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.ClusterStatus:
        return pb.ClusterStatus(nodes=[pb.NodeView(alive=True)])


def make_scheduler() -> Scheduler:
    return Scheduler()  # type: ignore[abstract]  # the other calls are not made


class Agent(AgentServicer):
    def __init__(self) -> None:
        self.idle_slots = 0

    async def KeepSlots(self, request: pb.KeepSlotsRequest, context: Context) -> pb.KeepSlotsReply:
        self.idle_slots = request.idle_slots
        return pb.KeepSlotsReply()


@contextlib.asynccontextmanager
async def listening(servicer: Scheduler | Agent) -> AsyncIterator[str]:
    server = cluster_server(TOKEN)
    if isinstance(servicer, Scheduler):
        add_SchedulerServicer_to_server(servicer, server)
    else:
        add_AgentServicer_to_server(servicer, server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_grpc_alone_would_ask_the_proxy() -> None:
    """Else these tests would prove nothing."""
    async with serving() as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await cluster.stub.ServerLive(kserve.ServerLiveRequest(), timeout=HANG_S)
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_an_agent_registers_with_its_scheduler() -> None:
    async with listening(make_scheduler()) as address:
        scheduler = GrpcSchedulerPort(address, TOKEN)
        assert (await scheduler.register(pb.NodeInfo())).heartbeat_interval_s == 7.0
        await scheduler.close()


async def test_a_scheduler_commands_its_agents() -> None:
    agent = Agent()  # type: ignore[abstract]  # the other calls are not made
    async with listening(agent) as address:
        agents = GrpcAgents(TOKEN)
        await agents.keep_slots(address, 3)
        assert agent.idle_slots == 3
        await agents.close()


async def test_a_command_asks_the_scheduler() -> None:
    def ask(address: str) -> pb.ClusterStatus:
        with SchedulerClient(address, TOKEN) as client:
            return client.status()

    async with listening(make_scheduler()) as address:
        assert (await asyncio.to_thread(ask, address)).nodes[0].alive


async def test_an_agent_commands_its_triton() -> None:
    async with serving() as cluster:
        triton = TritonClient(cluster.addresses[0])
        await triton.command("tiny.1", "do it", secret="")
        assert cluster.triton.requests[0].parameters["command"].string_param == "do it"
        await triton.close()


async def test_generate_asks_a_gateway_and_that_its_scheduler_and_a_replica() -> None:
    def generate(cluster: GatewayHarness) -> str:
        address = cluster.gateway.grpc_address
        return "".join(
            piece.text for piece in stream(address, DEPLOYMENT, "", {}, timeout_s=HANG_S)
        )

    async with serving() as cluster:
        assert await asyncio.to_thread(generate, cluster) == "1-01-11-2"
