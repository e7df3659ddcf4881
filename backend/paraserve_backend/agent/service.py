"""The agent's gRPC service: passes the scheduler's commands to parts and slots.

It decides nothing itself.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.agent.slots import Slots
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.errors import Context, errors_to
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentServicer


class AgentService(AgentServicer):
    def __init__(
        self,
        parts: Parts,
        slots: Slots,
        status: Callable[[], Awaitable[pb.NodeStatus]],
    ) -> None:
        self._parts = parts
        self._slots = slots
        self._status = status

    async def Apply(self, request: pb.Part, context: Context) -> AsyncIterator[pb.PartStatus]:
        async with errors_to(context):
            progress = await self._parts.apply(request)
            async for status in progress.follow():
                yield status

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        async with errors_to(context):
            was_there = await self._parts.remove(request.replica, request.deadline_s)
        return pb.RemoveReply(was_there=was_there)

    async def HandOver(self, request: pb.HandOverRequest, context: Context) -> pb.HandOverReply:
        async with errors_to(context):
            await self._parts.hand_over(request)
        return pb.HandOverReply()

    async def KeepSlots(self, request: pb.KeepSlotsRequest, context: Context) -> pb.KeepSlotsReply:
        self._slots.keep(request.idle_slots)
        return pb.KeepSlotsReply()

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.NodeStatus:
        return await self._status()
