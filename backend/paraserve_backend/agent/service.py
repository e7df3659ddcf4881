"""Service `Agent`: the network face of `parts` and `fetches`; no decisions of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from paraserve_backend.agent.fetches import Fetches, FetchRequest
from paraserve_backend.agent.parts import Parts
from paraserve_backend.errors import ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import AgentServicer

Context = grpc.aio.ServicerContext[Any, Any]


class AgentService(AgentServicer):
    def __init__(
        self,
        parts: Parts,
        fetches: Fetches,
        status: Callable[[], Awaitable[pb.NodeStatus]],
        *,
        fetch_timeout_s: float,
    ) -> None:
        self._parts = parts
        self._fetches = fetches
        self._status = status
        self._fetch_timeout_s = fetch_timeout_s

    async def Apply(self, request: pb.Part, context: Context) -> AsyncIterator[pb.PartStatus]:
        async with _errors_to(context):
            progress = await self._parts.apply(request)
            async for status in progress.follow():
                yield status

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.RemoveReply:
        async with _errors_to(context):
            was_there = await self._parts.remove(request.replica, request.deadline_s)
        return pb.RemoveReply(was_there=was_there)

    async def Prefetch(self, request: pb.Fetch, context: Context) -> pb.PrefetchReply:
        async with _errors_to(context):
            fetching = await self._fetches.start(
                FetchRequest.from_message(request), request.deadline_s or self._fetch_timeout_s
            )
            fetched_bytes = await fetching.wait()
        return pb.PrefetchReply(fetched_bytes=fetched_bytes)

    async def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.NodeStatus:
        return await self._status()


@asynccontextmanager
async def _errors_to(context: Context) -> AsyncIterator[None]:
    try:
        yield
    except ParaServeError as error:
        await context.abort(grpc.StatusCode[error.grpc_code], str(error))
