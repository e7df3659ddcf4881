"""The gateway as Triton's gRPC service: the same calls, messages, error codes; health checks.

Requests go to `gateway.proxy`, whatever protocol they came by.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as health
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.daemon.guard import internal_error
from paraserve_backend.errors import NotFound, ParaServeError
from paraserve_scheduler.gateway.admission import ClientRequest
from paraserve_scheduler.gateway.frontends.failures import Context, log_failure
from paraserve_scheduler.gateway.frontends.refused_calls import RefusedCalls
from paraserve_scheduler.gateway.kserve import metadata
from paraserve_scheduler.gateway.kserve.errors import client_sentence
from paraserve_scheduler.gateway.kserve.statistics import Statistics
from paraserve_scheduler.gateway.proxy import Proxy
from paraserve_scheduler.gateway.routes import Routes

#: Clients that send it want a stream's error as its gRPC status, which ends the stream.
_WANT_ERROR_CODES = "triton_grpc_error"

_HEALTH = health.DESCRIPTOR.services_by_name["Health"].full_name


def health_handler(routes: Routes) -> grpc.GenericRpcHandler[Any, Any]:
    """Answer `Check` of gRPC's own health protocol, for any service; there is no `Watch`."""

    async def check(
        _request: health.HealthCheckRequest, _context: Context
    ) -> health.HealthCheckResponse:
        answer = health.HealthCheckResponse
        return answer(status=answer.SERVING if routes.is_known else answer.NOT_SERVING)

    handler = grpc.unary_unary_rpc_method_handler(
        check,
        request_deserializer=health.HealthCheckRequest.FromString,
        response_serializer=health.HealthCheckResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(_HEALTH, {"Check": handler})


class GrpcService(RefusedCalls):
    """Raises what `request_reader` ends the calls with."""

    def __init__(
        self, proxy: Proxy, routes: Routes, statistics: Statistics, *, max_stream_requests: int
    ) -> None:
        self._max_stream_requests = max_stream_requests
        self._proxy = proxy
        self._routes = routes
        self._statistics = statistics

    async def ServerLive(
        self, request: kserve.ServerLiveRequest, context: Context
    ) -> kserve.ServerLiveResponse:
        return kserve.ServerLiveResponse(live=True)

    async def ServerReady(
        self, request: kserve.ServerReadyRequest, context: Context
    ) -> kserve.ServerReadyResponse:
        return kserve.ServerReadyResponse(ready=self._routes.is_known)

    async def ModelReady(
        self, request: kserve.ModelReadyRequest, context: Context
    ) -> kserve.ModelReadyResponse:
        try:
            await self._routes.require(request.name, request.version)
        except NotFound:
            return kserve.ModelReadyResponse(ready=False)
        return kserve.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: kserve.ServerMetadataRequest, context: Context
    ) -> kserve.ServerMetadataResponse:
        return metadata.server_metadata_message()

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: Context
    ) -> kserve.ModelMetadataResponse:
        await self._routes.require(request.name, request.version)
        return metadata.model_metadata_message(request.name)

    async def ModelConfig(
        self, request: kserve.ModelConfigRequest, context: Context
    ) -> kserve.ModelConfigResponse:
        await self._routes.require(request.name, request.version)
        return metadata.model_config_message(request.name)

    async def RepositoryIndex(
        self, request: kserve.RepositoryIndexRequest, context: Context
    ) -> kserve.RepositoryIndexResponse:
        return metadata.model_index_message(self._routes.deployments)

    async def ModelStatistics(
        self, request: kserve.ModelStatisticsRequest, context: Context
    ) -> kserve.ModelStatisticsResponse:
        if not request.name:
            return self._statistics.message(self._routes.deployments)
        await self._routes.require(request.name, request.version)
        return self._statistics.message([request.name])

    async def ModelInfer(  # type: ignore[override]
        self, request: ClientRequest, context: Context
    ) -> kserve.ModelInferResponse:
        return await self._proxy.single(request)

    # A coroutine that writes, not a generator: a cancelled client then cancels it at once, also
    # while a response is being written.
    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[ClientRequest | ParaServeError], context: Context
    ) -> None:
        stream = _ClientStream(self._proxy, context)
        # Of what comes beyond it no more is read than gRPC reads ahead.
        places = asyncio.Semaphore(self._max_stream_requests)
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                await places.acquire()
                async for request in request_iterator:
                    task = tasks.create_task(stream.answer(request))
                    task.add_done_callback(lambda _: places.release())
                    await places.acquire()
        except* ParaServeError as errors:
            failure = errors.exceptions[0]
        if isinstance(failure, ParaServeError):
            raise failure


class _ClientLeft(Exception):
    pass


class _ClientStream:
    """One ModelStreamInfer call: several requests at a time, their responses interleaved."""

    def __init__(self, proxy: Proxy, context: Context) -> None:
        self._proxy = proxy
        self._context = context
        self._writing = asyncio.Lock()
        sent = dict(context.invocation_metadata() or ())
        self._ends_on_error = sent.get(_WANT_ERROR_CODES) == "true"

    async def answer(self, request: ClientRequest | ParaServeError) -> None:
        """Answer a request, or say in the stream why it could not be read."""
        with contextlib.suppress(_ClientLeft):
            if isinstance(request, ParaServeError):
                await self._fail(kserve.ModelInferRequest(), request)
            else:
                await self._answer(request)

    async def _answer(self, request: ClientRequest) -> None:
        async def send(response: kserve.ModelInferResponse) -> None:
            await self._write(kserve.ModelStreamInferResponse(infer_response=response))

        try:
            await self._proxy.stream(request, send)
        except _ClientLeft:
            raise
        except ParaServeError as error:
            await self._fail(request.message, error)
        except Exception as error:
            log_failure(error)
            await self._fail(request.message, internal_error())

    async def _fail(self, request: kserve.ModelInferRequest, error: ParaServeError) -> None:
        if self._ends_on_error:
            raise error
        entry = kserve.ModelStreamInferResponse(error_message=client_sentence(error))
        entry.infer_response.id = request.id
        entry.infer_response.model_name = request.model_name
        await self._write(entry)

    async def _write(self, entry: kserve.ModelStreamInferResponse) -> None:
        async with self._writing:
            writing = asyncio.ensure_future(self._context.write(entry))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                # gRPC goes on writing, and takes no end of the stream before that is done.
                await asyncio.gather(writing, return_exceptions=True)
                raise
            except grpc.aio.InternalError:
                # A write that ran into the client's cancellation.
                raise _ClientLeft from None
