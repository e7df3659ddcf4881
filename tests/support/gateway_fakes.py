"""A scheduler and Triton servers that do what a test says, on real loopback connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.names import PROBE_PARAMETER
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerServicer
from paraserve_scheduler.gateway.frontends.refused_calls import RefusedCalls

Context = grpc.aio.ServicerContext[Any, Any]
Script = Callable[[kserve.ModelInferRequest, Context], AsyncIterator[kserve.ModelInferResponse]]


class StreamError(Exception):
    """What a model answers in place of a response; the stream stays open."""


class FakeScheduler(SchedulerServicer):
    """Publishes route tables and keeps the demand reports it gets."""

    def __init__(self) -> None:
        self.table = pb.RouteTable()
        self.reports: list[pb.DemandReport] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self._changed = asyncio.Condition()

    async def publish(self, *routes: pb.Route) -> None:
        async with self._changed:
            self.table = pb.RouteTable(routes=routes)
            self._changed.notify_all()

    async def demand(self, wanted: Callable[[pb.Demand], bool]) -> pb.Demand:
        """Wait until the newest report holds a demand as `wanted`."""
        async with self._changed:
            while True:
                for demand in self.reports[-1].demands if self.reports else ():
                    if wanted(demand):
                        return demand
                await self._changed.wait()

    async def WatchRoutes(  # type: ignore[override]
        self, request: pb.WatchRoutesRequest, context: Context
    ) -> None:
        self.metadata.append(dict(context.invocation_metadata() or ()))
        while True:
            table = self.table
            await context.write(table)
            async with self._changed:
                while self.table is table:
                    await self._changed.wait()

    async def ReportDemand(self, request: pb.DemandReport, context: Context) -> pb.DemandReply:
        async with self._changed:
            self.reports.append(request)
            self._changed.notify_all()
        return pb.DemandReply()

    async def Register(self, request: pb.NodeInfo, context: Context) -> pb.RegisterReply:
        raise NotImplementedError

    async def Heartbeat(self, request: pb.NodeStatus, context: Context) -> pb.HeartbeatReply:
        raise NotImplementedError

    async def Deploy(self, request: pb.DeploymentSpec, context: Context) -> pb.DeploymentStatus:
        raise NotImplementedError

    async def Delete(self, request: pb.DeleteRequest, context: Context) -> pb.DeleteReply:
        raise NotImplementedError

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.ClusterStatus:
        raise NotImplementedError

    async def Migrate(self, request: pb.MigrateRequest, context: Context) -> pb.MigrateReply:
        raise NotImplementedError

    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.DrainReply:
        raise NotImplementedError


class FakeTritonServer(RefusedCalls):
    """Answers streams by a script; as Triton, it says what it refuses inside the stream."""

    def __init__(self) -> None:
        self.script: Script = tokens
        self.requests: list[kserve.ModelInferRequest] = []
        #: As a replica answers probes that works; they are none of its requests.
        self.probe_script: Script = works
        self.probes: list[kserve.ModelInferRequest] = []
        self.models: set[str] | None = None
        #: Set when a stream was cancelled while its script ran.
        self.cancelled = asyncio.Event()

    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[kserve.ModelInferRequest], context: Context
    ) -> None:
        try:
            async for request in request_iterator:
                await self._answer(request, context)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise

    async def _answer(self, request: kserve.ModelInferRequest, context: Context) -> None:
        is_probe = PROBE_PARAMETER in request.parameters
        (self.probes if is_probe else self.requests).append(request)
        script = self.probe_script if is_probe else self.script
        if self.models is not None and request.model_name not in self.models:
            sentence = f"Request for unknown model: '{request.model_name}' is not found"
            await context.write(kserve.ModelStreamInferResponse(error_message=sentence))
            return
        try:
            async for response in script(request, context):
                await context.write(kserve.ModelStreamInferResponse(infer_response=response))
        except StreamError as error:
            await context.write(kserve.ModelStreamInferResponse(error_message=str(error)))

    async def ServerLive(
        self, request: kserve.ServerLiveRequest, context: Context
    ) -> kserve.ServerLiveResponse:
        raise NotImplementedError

    async def ServerReady(
        self, request: kserve.ServerReadyRequest, context: Context
    ) -> kserve.ServerReadyResponse:
        raise NotImplementedError

    async def ModelReady(
        self, request: kserve.ModelReadyRequest, context: Context
    ) -> kserve.ModelReadyResponse:
        raise NotImplementedError

    async def ServerMetadata(
        self, request: kserve.ServerMetadataRequest, context: Context
    ) -> kserve.ServerMetadataResponse:
        raise NotImplementedError

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: Context
    ) -> kserve.ModelMetadataResponse:
        raise NotImplementedError

    async def ModelConfig(
        self, request: kserve.ModelConfigRequest, context: Context
    ) -> kserve.ModelConfigResponse:
        raise NotImplementedError

    async def ModelStatistics(
        self, request: kserve.ModelStatisticsRequest, context: Context
    ) -> kserve.ModelStatisticsResponse:
        raise NotImplementedError

    async def ModelInfer(
        self, request: kserve.ModelInferRequest, context: Context
    ) -> kserve.ModelInferResponse:
        raise NotImplementedError

    async def RepositoryIndex(
        self, request: kserve.RepositoryIndexRequest, context: Context
    ) -> kserve.RepositoryIndexResponse:
        raise NotImplementedError


def answer(
    request: kserve.ModelInferRequest, text: str, *, is_final: bool, count: int = 1
) -> kserve.ModelInferResponse:
    """One response with a text and a token count, raw as Triton sends it."""
    response = kserve.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request.id
    )
    response.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    response.raw_output_contents.append(len(text.encode()).to_bytes(4, "little") + text.encode())
    response.outputs.add(name="num_output_tokens", datatype="UINT32", shape=[1])
    response.raw_output_contents.append(count.to_bytes(4, "little"))
    response.parameters["triton_final_response"].bool_param = is_final
    return response


def empty_final(request: kserve.ModelInferRequest) -> kserve.ModelInferResponse:
    response = kserve.ModelInferResponse(
        model_name=request.model_name, model_version="1", id=request.id
    )
    response.parameters["triton_final_response"].bool_param = True
    return response


async def tokens(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    """Three tokens, the last one marked final."""
    for index in range(3):
        yield answer(request, f"{request.id}-{index}", is_final=index == 2, count=index + 1)


async def tokens_then_empty(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    yield answer(request, "a", is_final=False)
    yield answer(request, "b", is_final=False)
    yield empty_final(request)


async def works(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    yield empty_final(request)


async def one_answer(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    yield answer(request, "whole text", is_final=True, count=7)


def hanging(responses: int) -> Script:
    """Send some responses, then nothing for ever, as a dead stub does."""

    async def script(
        request: kserve.ModelInferRequest, context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        for index in range(responses):
            yield answer(request, str(index), is_final=False)
        await asyncio.Event().wait()

    return script


def failing(sentence: str, *, after: int = 0) -> Script:
    """Send some responses, then an error."""

    async def script(
        request: kserve.ModelInferRequest, context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        for index in range(after):
            yield answer(request, str(index), is_final=False)
        raise StreamError(sentence)

    return script
