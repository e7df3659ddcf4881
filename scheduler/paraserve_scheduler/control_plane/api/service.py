"""The scheduler's gRPC service, for agents, gateways and users.

It turns calls into events and actions for the controller, and checks what users ask for.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields, replace

from paraserve_backend.errors import AlreadyExists, InvalidRequest, NotFound
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.errors import Context, errors_to
from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerServicer
from paraserve_scheduler.control_plane.api.admission import read_deployment, validated_spec
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.controller.loop import Controller
from paraserve_scheduler.control_plane.messages.agents import node_info, node_reported
from paraserve_scheduler.control_plane.messages.gateways import demand, route_table
from paraserve_scheduler.control_plane.messages.status import cluster_status, deployment_status
from paraserve_scheduler.reconciler.capacity import is_alive, node_spaces
from paraserve_scheduler.reconciler.moves import (
    check_drain,
    drain_progress,
    migrate,
    require_node,
)
from paraserve_scheduler.reconciler.placement import check_room
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.events import DemandReported, NodeCordoned, NodeRegistered
from paraserve_scheduler.state.records import DeploymentState, NodeInfo
from paraserve_scheduler.state.spec import Deployment, DeploymentSpec


class SchedulerService(SchedulerServicer):
    def __init__(self, controller: Controller, config: SchedulerConfig) -> None:
        self._controller = controller
        self._config = config

    # ---- from agents ----

    async def Register(self, request: pb.NodeInfo, context: Context) -> pb.RegisterReply:
        async with errors_to(context):
            info = node_info(request)
            _check_node(info)
            self._check_name_is_free(info)
            self._controller.notify(NodeRegistered(info=info, at_s=self._controller.now_s()))
        return pb.RegisterReply(heartbeat_interval_s=self._config.heartbeat_interval_s)

    async def Heartbeat(self, request: pb.NodeStatus, context: Context) -> pb.HeartbeatReply:
        async with errors_to(context):
            known = request.name in self._controller.view.nodes
            if known:
                self._controller.notify(node_reported(request, self._controller.now_s()))
        return pb.HeartbeatReply(known=known)

    # ---- from gateways ----

    async def WatchRoutes(
        self, request: pb.WatchRoutesRequest, context: Context
    ) -> AsyncIterator[pb.RouteTable]:
        async with errors_to(context):
            async for table in self._controller.watch(route_table):
                yield table

    async def ReportDemand(self, request: pb.DemandReport, context: Context) -> pb.DemandReply:
        async with errors_to(context):
            self._controller.notify(
                DemandReported(
                    gateway=request.gateway,
                    demands=tuple(map(demand, request.demands)),
                    at_s=self._controller.now_s(),
                )
            )
        return pb.DemandReply()

    # ---- from users ----

    async def Deploy(self, request: pb.DeploymentSpec, context: Context) -> pb.DeploymentStatus:
        async with errors_to(context):
            state = await self._deploy(validated_spec(request, self._config.defaults))
        return deployment_status(self._controller.turn(), state)

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteReply:
        async with errors_to(context):
            self._named(request.name)
            await self._controller.delete_deployment(request.name)
        return pb.DeleteReply()

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.ClusterStatus:
        turn = self._controller.turn()
        async with errors_to(context):
            if request.deployment:
                state = self._named(request.deployment)
                turn = turn.supposing(replace(turn.view, deployments={state.name: state}))
        return cluster_status(turn)

    async def Migrate(self, request: pb.MigrateRequest, context: Context) -> pb.MigrateReply:
        async with errors_to(context):
            self._named(request.deployment)
            stops, start = migrate(self._turn(), request.deployment, request.node)
            for stop in stops:
                self._controller.carry_out(stop)
            self._controller.carry_out(start)
        return pb.MigrateReply(replica=start.plan.succeeds or "", successor=start.plan.replica)

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        async with errors_to(context):
            return self._drain(request.node, undo=request.undo)

    def _drain(self, node: str, *, undo: bool) -> pb.DrainReply:
        require_node(self._controller.view, node)
        if undo:
            self._controller.notify(NodeCordoned(node=node, cordoned=False))
            return pb.DrainReply()
        if node not in self._controller.view.cordoned:
            check_drain(self._turn(), node)
            self._controller.notify(NodeCordoned(node=node))
        left = drain_progress(self._turn(), node)
        return pb.DrainReply(
            replicas=[pb.DrainingReplica(replica=name, progress=text) for name, text in left]
        )

    def _turn(self) -> Turn:
        """The cluster as the policy sees it now."""
        return self._controller.turn().without_silent_gateways()

    async def _deploy(self, spec: DeploymentSpec) -> DeploymentState:
        state = self._existing(spec)
        if state is not None:
            return state
        deployment = await asyncio.to_thread(read_deployment, spec, self._config.source_roots)
        # Somebody else may have deployed under this name meanwhile.
        return self._existing(spec) or self._add(deployment)

    # ---- checks ----

    def _check_name_is_free(self, info: NodeInfo) -> None:
        other = self._controller.view.nodes.get(info.name)
        if other is None or other.info.agent_address == info.agent_address:
            return
        if is_alive(self._controller.turn(), other):
            raise AlreadyExists(
                f"A node '{info.name}' at {other.info.agent_address} is alive: give every node a "
                "name of its own."
            )

    def _existing(self, spec: DeploymentSpec) -> DeploymentState | None:
        """The deployment of that name if it is the very same, `None` if there is none."""
        state = self._controller.view.deployments.get(spec.name)
        if state is None:
            return None
        if state.deleting:
            raise AlreadyExists(
                f"Deployment '{spec.name}' is being deleted: retry when it is gone."
            )
        others = _differences(state.deployment.spec, spec)
        if others:
            raise AlreadyExists(
                f"Deployment '{spec.name}' exists with other settings ({'; '.join(others)}): "
                "delete it first, or choose another name."
            )
        return state

    def _add(self, deployment: Deployment) -> DeploymentState:
        self._check_fits(deployment)
        self._controller.add_deployment(deployment)
        return self._controller.view.deployments[deployment.name]

    def _check_fits(self, deployment: Deployment) -> None:
        """Raise `InsufficientCapacity` if the nodes, emptied, could not hold it."""
        turn = self._controller.turn()
        empty = turn.supposing(turn.view.without(turn.view.live_replicas()))
        nodes = turn.view.nodes.values()
        # While no node is up, nobody can tell.
        if any(is_alive(turn, node) and node.triton_live for node in nodes):
            check_room(deployment, node_spaces(empty, deployment.spec), turn.config.placement)

    def _named(self, name: str) -> DeploymentState:
        deployments = self._controller.view.deployments
        if name not in deployments:
            known = ", ".join(sorted(deployments)) or "none"
            raise NotFound(f"There is no deployment '{name}'. Deployments: {known}.")
        return deployments[name]


def _differences(known: DeploymentSpec, given: DeploymentSpec) -> list[str]:
    """Say in what the settings differ, each as "max_stages 1, not 2"."""
    names = [field.name for field in fields(DeploymentSpec)]
    pairs = [(name, getattr(known, name), getattr(given, name)) for name in names]
    return [
        f"{name} {_shown(was)}, not {_shown(wanted)}"
        for name, was, wanted in pairs
        if was != wanted
    ]


def _shown(value: object) -> str:
    return "unset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _check_node(info: NodeInfo) -> None:
    start, end = info.channel_ports
    problem = None
    if not (info.name and info.agent_address and info.triton_grpc_address):
        problem = "must state its name, its agent's address and its Triton's address"
    elif info.memory_bytes <= 0 or info.nic_bytes_per_s <= 0:
        problem = "must state memory_bytes > 0 and nic_bytes_per_s > 0"
    elif not start < end:
        problem = f"has no channel ports in [{start}, {end})"
    elif not info.devices:
        problem = "has no device"
    if problem is not None:
        raise InvalidRequest(f"Node '{info.name}' {problem}.")
