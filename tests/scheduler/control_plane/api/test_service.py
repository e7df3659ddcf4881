"""Service `Scheduler` over real gRPC on loopback, with agents that are real gRPC servers too."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import TokenInterceptor
from paraserve_backend.rpc.paraserve_pb2_grpc import (
    AgentServicer,
    SchedulerStub,
    add_AgentServicer_to_server,
    add_SchedulerServicer_to_server,
)
from paraserve_scheduler.control_plane.api.service import SchedulerService
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.controller.agents import AgentCallFailed, GrpcAgents
from paraserve_scheduler.control_plane.controller.clock import SystemClock
from paraserve_scheduler.control_plane.controller.loop import Controller
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.state.records import Phase
from paraserve_scheduler.store.sqlite import SqliteStore
from tests.support.limits import HANG_S
from tests.support.scheduler_records import make_node_info, write_model

if TYPE_CHECKING:
    from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerAsyncStub

TOKEN = "s3cret"
#: Nobody here reports as agents and gateways do, and nobody is lost for it.
CONFIG = SchedulerConfig(
    policy=PolicyConfig(
        settle_s=0.01, drain_grace_s=0.2, node_timeout_s=HANG_S, gateway_timeout_s=HANG_S
    )
)
Context = grpc.aio.ServicerContext[Any, Any]


class Agent(AgentServicer):
    """A node's agent that has every part ready at once."""

    def __init__(self) -> None:
        self.parts: dict[str, pb.Part] = {}
        self.hand_overs: list[pb.HandOverRequest] = []
        #: Streams that are broken off before they end.
        self.broken_streams = 0

    async def Apply(self, request: pb.Part, context: Context) -> AsyncIterator[pb.PartStatus]:
        self.parts[request.replica] = request
        yield pb.PartStatus(replica=request.replica, stage=request.stage, phase=pb.STARTING)
        if self.broken_streams:
            self.broken_streams -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
        yield pb.PartStatus(replica=request.replica, stage=request.stage, phase=pb.READY)

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        return pb.RemoveReply(was_there=self.parts.pop(request.replica, None) is not None)

    async def HandOver(self, request: pb.HandOverRequest, context: Context) -> pb.HandOverReply:
        self.hand_overs.append(request)
        return pb.HandOverReply()

    async def KeepSlots(self, request: pb.KeepSlotsRequest, context: Context) -> pb.KeepSlotsReply:
        return pb.KeepSlotsReply()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.NodeStatus:
        return pb.NodeStatus()


@contextlib.asynccontextmanager
async def _agent() -> AsyncIterator[tuple[Agent, str]]:
    agent = Agent()
    server = grpc.aio.server(interceptors=[TokenInterceptor(TOKEN)])
    add_AgentServicer_to_server(agent, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield agent, f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


@contextlib.asynccontextmanager
async def _scheduler() -> AsyncIterator[SchedulerAsyncStub]:
    agents, store = GrpcAgents(TOKEN), SqliteStore(Path(":memory:"))
    controller = Controller(store=store, agents=agents, clock=SystemClock(), config=CONFIG)
    server = grpc.aio.server()
    add_SchedulerServicer_to_server(SchedulerService(controller, CONFIG), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    loop = asyncio.create_task(controller.run())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield SchedulerStub(channel)
    finally:
        loop.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await loop
        await server.stop(grace=None)
        await agents.close()
        store.close()


def _node(name: str = "n0", address: str = "127.0.0.1:1", **fields: Any) -> pb.NodeInfo:
    info = make_node_info(name)
    values: dict[str, Any] = {
        "agent_address": address,
        "triton_grpc_address": info.triton_grpc_address,
        "memory_bytes": info.memory_bytes,
        "nic_bytes_per_s": info.nic_bytes_per_s,
        "run_dir": info.run_dir,
        "channel_host": info.channel_host,
        "channel_port_start": 9000,
        "channel_port_end": 9010,
        "devices": ["cpu"],
    }
    return pb.NodeInfo(name=name, **(values | fields))


async def _join(scheduler: SchedulerAsyncStub, name: str, address: str, **fields: Any) -> None:
    await scheduler.Register(_node(name, address, **fields))
    await scheduler.Heartbeat(pb.NodeStatus(name=name, triton_live=True))


def _demand(**fields: Any) -> pb.DemandReport:
    return pb.DemandReport(gateway="g0", demands=[pb.Demand(deployment="tiny", **fields)])


async def test_a_cold_start_from_deploy_to_delete(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    async with _agent() as (first, one), _agent() as (second, two), _scheduler() as scheduler:
        await _join(scheduler, "n0", one)
        await _join(scheduler, "n1", two)
        routes = aiter(scheduler.WatchRoutes(pb.WatchRoutesRequest(gateway="g0")))
        assert not (await anext(routes)).routes
        spec = pb.DeploymentSpec(name="tiny", source=str(folder), tpot_slo_s=0.5)
        status = await scheduler.Deploy(spec)
        assert (status.architecture, status.spec.tpot_slo_s) == ("LlamaForCausalLM", 0.5)
        assert [route.deployment for route in (await anext(routes)).routes] == ["tiny"]

        await scheduler.ReportDemand(_demand(waiting=1))
        (route,) = (await anext(routes)).routes
        assert [endpoint.model for endpoint in route.endpoints] == ["tiny.1"]
        assert [part.stage for part in (first.parts["tiny.1"], second.parts["tiny.1"])] == [
            0,
            1,
        ]

        cluster = await scheduler.Status(pb.StatusRequest(deployment="tiny"))
        (replica,) = cluster.deployments[0].replicas
        assert replica.phase == pb.READY
        assert [(part.node, part.layer_start, part.layer_end) for part in replica.parts] == [
            ("n0", 0, 2),
            ("n1", 2, 4),
        ]
        assert 0 < replica.requested_s <= replica.planned_s <= replica.ready_s
        assert all(node.reserved_bytes > 0 for node in cluster.nodes)

        await scheduler.ReportDemand(_demand())
        await scheduler.Delete(pb.DeleteRequest(name="tiny"))
        assert first.parts == second.parts == {}
        assert not (await scheduler.Status(pb.StatusRequest())).deployments


async def test_deploying_the_same_again_changes_nothing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    async with _scheduler() as scheduler:
        spec = pb.DeploymentSpec(name="tiny", source=str(folder))
        assert await scheduler.Deploy(spec) == await scheduler.Deploy(spec)
        spec.max_stages, spec.ttft_slo_s = 2, 0.5
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await scheduler.Deploy(spec)
        assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS
        assert error.value.details() == (
            "Deployment 'tiny' exists with other settings (ttft_slo_s unset, not 0.5; "
            "max_stages unset, not 2): delete it first, or choose another name."
        )


async def test_what_can_never_fit_is_refused_with_the_numbers(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    async with _scheduler() as scheduler:
        await _join(scheduler, "n0", "127.0.0.1:1", memory_bytes=1_000)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await scheduler.Deploy(pb.DeploymentSpec(name="tiny", source=str(folder)))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "are missing" in str(error.value.details())


async def test_errors_reach_the_caller_with_their_class(tmp_path: Path) -> None:
    async with _scheduler() as scheduler:
        source = str(tmp_path / "nowhere")
        calls: list[tuple[Any, grpc.StatusCode, str]] = [
            (
                scheduler.Deploy(pb.DeploymentSpec(name="Tiny")),
                grpc.StatusCode.INVALID_ARGUMENT,
                "Deployment name 'Tiny' is not valid",
            ),
            (
                scheduler.Deploy(pb.DeploymentSpec(name="tiny", source=source)),
                grpc.StatusCode.NOT_FOUND,
                "does not exist",
            ),
            (
                scheduler.Delete(pb.DeleteRequest(name="tiny")),
                grpc.StatusCode.NOT_FOUND,
                "There is no deployment 'tiny'. Deployments: none.",
            ),
            (
                scheduler.Status(pb.StatusRequest(deployment="tiny")),
                grpc.StatusCode.NOT_FOUND,
                "There is no deployment 'tiny'",
            ),
            (
                scheduler.Migrate(pb.MigrateRequest(deployment="tiny", node="n0")),
                grpc.StatusCode.NOT_FOUND,
                "There is no deployment 'tiny'",
            ),
            (
                scheduler.Drain(pb.DrainRequest(node="n7")),
                grpc.StatusCode.NOT_FOUND,
                "There is no node 'n7'. Nodes: none.",
            ),
            (
                scheduler.Register(_node(memory_bytes=0)),
                grpc.StatusCode.INVALID_ARGUMENT,
                "must state memory_bytes > 0",
            ),
        ]
        for call, code, sentence in calls:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call
            assert error.value.code() is code
            assert sentence in str(error.value.details())


async def test_an_unknown_node_is_told_to_register() -> None:
    async with _scheduler() as scheduler:
        reply = await scheduler.Heartbeat(pb.NodeStatus(name="n0"))
        assert not reply.known
        await scheduler.Register(_node())
        assert (await scheduler.Heartbeat(pb.NodeStatus(name="n0"))).known


async def test_two_live_nodes_cannot_have_one_name() -> None:
    async with _scheduler() as scheduler:
        await scheduler.Register(_node(address="127.0.0.1:1"))
        await scheduler.Register(_node(address="127.0.0.1:1"))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await scheduler.Register(_node(address="127.0.0.1:2"))
        assert error.value.code() is grpc.StatusCode.ALREADY_EXISTS


async def _serve(scheduler: SchedulerAsyncStub, folder: Path, **spec: Any) -> None:
    """Deploy and start a replica that has one request."""
    source = str(folder)
    await scheduler.Deploy(pb.DeploymentSpec(name="tiny", source=source, **spec))
    await scheduler.ReportDemand(_demand(waiting=1))
    async for table in scheduler.WatchRoutes(pb.WatchRoutesRequest(gateway="g1")):
        if table.routes[0].endpoints:
            break
    await scheduler.ReportDemand(_busy("tiny.1"))


def _busy(replica: str) -> pb.DemandReport:
    """A request runs on a replica, which has answered."""
    running = [pb.ReplicaDemand(replica=replica, in_flight=1, first_token_s=1.0)]
    return _demand(in_flight=1, replicas=running)


async def _status(scheduler: SchedulerAsyncStub) -> dict[str, pb.ReplicaStatus]:
    status = await scheduler.Status(pb.StatusRequest(deployment="tiny"))
    return {replica.replica: replica for replica in status.deployments[0].replicas}


async def test_a_replica_moves_to_another_node_and_status_tells_how(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    async with _agent() as (first, one), _agent() as (second, two), _scheduler() as scheduler:
        await _join(scheduler, "n0", one)
        await _serve(scheduler, folder, max_stages=1)
        await _join(scheduler, "n1", two)
        move = await scheduler.Migrate(pb.MigrateRequest(deployment="tiny", node="n1"))
        assert (move.replica, move.successor) == ("tiny.1", "tiny.2")
        while not first.hand_overs:
            await asyncio.sleep(0)
        (command,) = first.hand_overs
        (target,) = command.targets
        assert (command.replica, target.replica) == ("tiny.1", "tiny.2")
        assert target.address.startswith("tcp://n1:90")
        assert second.parts["tiny.2"].channel_keys == first.parts["tiny.1"].channel_keys
        replicas = await _status(scheduler)
        assert list(replicas["tiny.1"].successors) == ["tiny.2"]
        assert replicas["tiny.1"].in_flight == 1
        assert replicas["tiny.2"].succeeds == "tiny.1"
        while (await _status(scheduler))["tiny.1"].phase != pb.STOPPED:
            await scheduler.ReportDemand(_busy("tiny.2"))
        old = (await _status(scheduler))["tiny.1"]
        assert 0 < old.hand_over_begin_s <= old.hand_over_end_s <= old.removed_s
        assert (first.parts, list(second.parts)) == ({}, ["tiny.2"])


async def test_a_node_is_drained_and_used_again(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    async with _agent() as (first, one), _agent() as (second, two), _scheduler() as scheduler:
        await _join(scheduler, "n0", one)
        await _serve(scheduler, folder, max_stages=1)
        with pytest.raises(grpc.aio.AioRpcError, match="no other live node can take 'tiny'"):
            await scheduler.Drain(pb.DrainRequest(node="n0"))
        await _join(scheduler, "n1", two)
        left = await scheduler.Drain(pb.DrainRequest(node="n0"))
        assert [each.replica for each in left.replicas] == ["tiny.1"]
        while left.replicas:
            await scheduler.ReportDemand(_busy("tiny.2"))
            left = await scheduler.Drain(pb.DrainRequest(node="n0"))
        assert (first.parts, list(second.parts)) == ({}, ["tiny.2"])
        nodes = (await scheduler.Status(pb.StatusRequest())).nodes
        assert [node.cordoned for node in nodes] == [True, False]
        await scheduler.Drain(pb.DrainRequest(node="n0", undo=True))
        nodes = (await scheduler.Status(pb.StatusRequest())).nodes
        assert not any(node.cordoned for node in nodes)


# ---- the client side of service Agent ----


async def test_a_lost_stream_is_taken_up_again() -> None:
    async with _agent() as (agent, address):
        agent.broken_streams = 1
        agents = GrpcAgents(TOKEN)
        part = pb.Part(replica="tiny.1")
        phases = [state.phase async for state in agents.apply(address, part)]
        assert phases == [Phase.STARTING, Phase.STARTING, Phase.READY]
        await agents.close()


async def test_a_stream_that_is_lost_for_good_is_a_failure() -> None:
    async with _agent() as (agent, address):
        agent.broken_streams = 9
        agents = GrpcAgents(TOKEN)
        with pytest.raises(AgentCallFailed, match=f"agent at {address} cannot be reached"):
            async for _ in agents.apply(address, pb.Part(replica="tiny.1")):
                pass
        await agents.close()


async def test_an_agent_refuses_a_wrong_token() -> None:
    async with _agent() as (_, address):
        agents = GrpcAgents("wrong")
        with pytest.raises(AgentCallFailed) as error:
            await agents.remove(address, "tiny.1", 1.0)
        assert error.value.failure.grpc_code == "UNAUTHENTICATED"
        await agents.close()
