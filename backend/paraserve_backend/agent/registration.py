"""Registers this node with the scheduler and sends heartbeats, again and again after every loss.

A heartbeat is sent every interval that the scheduler asked for, and at once after a change.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn, Protocol

import grpc.aio

from paraserve_backend.daemon.retry import Backoff
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.channels import cluster_channel
from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerStub

if TYPE_CHECKING:
    from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerAsyncStub

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S = 5.0


class SchedulerPort(Protocol):
    """The two calls an agent makes; both raise `grpc.aio.AioRpcError`."""

    async def register(self, info: pb.NodeInfo) -> pb.RegisterReply: ...

    async def heartbeat(self, status: pb.NodeStatus) -> pb.HeartbeatReply: ...


class GrpcSchedulerPort:
    """`SchedulerPort` over gRPC."""

    def __init__(self, address: str, token: str | None) -> None:
        self._metadata = metadata(token)
        self._channel = cluster_channel(address)
        self._stub: SchedulerAsyncStub = SchedulerStub(self._channel)

    async def register(self, info: pb.NodeInfo) -> pb.RegisterReply:
        return await self._stub.Register(info, metadata=self._metadata, timeout=_ANSWER_TIMEOUT_S)

    async def heartbeat(self, status: pb.NodeStatus) -> pb.HeartbeatReply:
        return await self._stub.Heartbeat(
            status, metadata=self._metadata, timeout=_ANSWER_TIMEOUT_S
        )

    async def close(self) -> None:
        await self._channel.close(grace=None)


class Registration:
    """Keeps this node known to the scheduler."""

    def __init__(
        self,
        scheduler: SchedulerPort,
        info: pb.NodeInfo,
        status: Callable[[], Awaitable[pb.NodeStatus]],
        changed: asyncio.Event,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._scheduler = scheduler
        self._info = info
        self._status = status
        self._changed = changed
        self._pause = pause
        #: What was logged last, so that a long outage is one line.
        self._logged = ""

    async def run(self) -> NoReturn:
        while True:
            interval_s = await self._register()
            await self._report(interval_s)

    async def _register(self) -> float:
        """Return the heartbeat interval, once the scheduler has taken us."""
        pauses = Backoff().pauses(random.Random())
        while True:
            try:
                reply = await self._scheduler.register(self._info)
            except grpc.aio.AioRpcError as error:
                self._log(f"scheduler away code={error.code().name} reason={error.details()}")
                await self._pause(next(pauses))
            else:
                self._log("registered")
                return reply.heartbeat_interval_s

    async def _report(self, interval_s: float) -> None:
        """Send heartbeats until the scheduler does not know us or does not answer."""
        while True:
            self._changed.clear()
            status = await self._status()
            try:
                reply = await self._scheduler.heartbeat(status)
            except grpc.aio.AioRpcError as error:
                self._log(f"scheduler away code={error.code().name} reason={error.details()}")
                return
            if not reply.known:
                self._log("scheduler forgot this node")
                return
            await self._wait(interval_s)

    async def _wait(self, interval_s: float) -> None:
        try:
            async with asyncio.timeout(interval_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def _log(self, state: str) -> None:
        if state != self._logged:
            self._logged = state
            logger.info("%s", state)
