"""Commands to the nodes' agents over gRPC, with retries. Nothing else here calls an agent."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Protocol

import grpc
import grpc.aio

from paraserve_backend.daemon.retry import Backoff
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.channels import cluster_channel
from paraserve_backend.rpc.errors import is_connection_lost
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentStub
from paraserve_scheduler.control_plane.messages.agents import part_state
from paraserve_scheduler.state.records import Failure, PartState, Phase

if TYPE_CHECKING:
    from paraserve_backend.rpc.paraserve_pb2_grpc import AgentAsyncStub

logger = logging.getLogger(__name__)

_TRIES = 5
#: What a reply may take beyond the agent's own time limit.
_SLACK_S = 5.0
#: Who gets the command only takes note of it.
_COMMAND_TIMEOUT_S = 10.0


class AgentCallFailed(Exception):
    """A node could not be reached or refused; `failure` is fit for users."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Agents(Protocol):
    """Commands to nodes, by their agent's host:port. All raise `AgentCallFailed`."""

    def apply(self, address: str, part: pb.Part) -> AsyncIterator[PartState]:
        """Make the node serve a part; yields its progress and ends with READY or FAILED."""

    async def remove(self, address: str, replica: str, deadline_s: float) -> None:
        """Return when nothing of the replica is left on the node."""

    async def hand_over(self, address: str, replica: str, successors: Mapping[str, str]) -> None:
        """Have a replica's head move its requests to others, given as replica to URL."""

    async def keep_slots(self, address: str, idle_slots: int) -> None:
        """Have the node keep so many idle sets of runtime slots; returns at once."""


class GrpcAgents:
    """`Agents` over gRPC; one connection for each address."""

    def __init__(self, token: str | None) -> None:
        self._metadata = metadata(token)
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def apply(self, address: str, part: pb.Part) -> AsyncIterator[PartState]:
        pauses = Backoff().pauses(random.Random())
        # An agent attaches to a part it already has, so that a lost stream can be taken up again.
        for tries_left in reversed(range(_TRIES)):
            try:
                async for status in self._stub(address).Apply(part, metadata=self._metadata):
                    state = part_state(status)
                    yield state
                    if state.phase in (Phase.READY, Phase.FAILED):
                        return
                logger.warning("%s ended its report on %s early", address, part.replica)
            except grpc.aio.AioRpcError as error:
                if not (is_connection_lost(error) and tries_left):
                    raise AgentCallFailed(_failure(address, error)) from error
            await asyncio.sleep(next(pauses))
        message = f"The agent at {address} does not say how {part.replica} goes on."
        raise AgentCallFailed(
            Failure(grpc_code="UNAVAILABLE", message=message, is_nodes_fault=True)
        )

    async def remove(self, address: str, replica: str, deadline_s: float) -> None:
        try:
            await self._stub(address).Remove(
                pb.RemoveRequest(replica=replica, deadline_s=deadline_s),
                metadata=self._metadata,
                timeout=deadline_s + _SLACK_S,
            )
        except grpc.aio.AioRpcError as error:
            raise AgentCallFailed(_failure(address, error)) from error

    async def hand_over(self, address: str, replica: str, successors: Mapping[str, str]) -> None:
        request = pb.HandOverRequest(
            replica=replica,
            targets=[
                pb.HandOverTarget(replica=successor, address=url)
                for successor, url in successors.items()
            ],
        )
        try:
            await self._stub(address).HandOver(
                request, metadata=self._metadata, timeout=_COMMAND_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            raise AgentCallFailed(_failure(address, error)) from error

    async def keep_slots(self, address: str, idle_slots: int) -> None:
        try:
            await self._stub(address).KeepSlots(
                pb.KeepSlotsRequest(idle_slots=idle_slots),
                metadata=self._metadata,
                timeout=_COMMAND_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            raise AgentCallFailed(_failure(address, error)) from error

    async def close(self) -> None:
        for channel in self._channels.values():
            await channel.close(grace=None)

    def _stub(self, address: str) -> AgentAsyncStub:
        channel = self._channels.get(address)
        if channel is None:
            channel = cluster_channel(address)
            self._channels[address] = channel
        return AgentStub(channel)


def _failure(address: str, error: grpc.aio.AioRpcError) -> Failure:
    code, details = error.code(), error.details() or "no reason given"
    is_lost = is_connection_lost(error)
    if is_lost:
        code = grpc.StatusCode.UNAVAILABLE
        details = f"The agent at {address} cannot be reached: {details}"
    return Failure(grpc_code=code.name, message=details, is_nodes_fault=is_lost)
