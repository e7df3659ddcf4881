"""The gateway as Triton's gRPC service: the same calls, messages, error codes; health checks.

Requests go to `gateway.proxy`, whatever protocol they came by.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2 as health
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import NotFound, ParaServeError
from paraserve_scheduler.gateway.frontends.refused_calls import Context, RefusedCalls, abort
from paraserve_scheduler.gateway.kserve import metadata
from paraserve_scheduler.gateway.kserve.errors import INTERNAL_ERROR
from paraserve_scheduler.gateway.kserve.statistics import Statistics
from paraserve_scheduler.gateway.proxy import Proxy
from paraserve_scheduler.gateway.routes import Routes

logger = logging.getLogger(__name__)

#: Clients that send it want a stream's error as its gRPC status, which ends the stream.
_WANT_ERROR_CODES = "triton_grpc_error"

_HEALTH = health.DESCRIPTOR.services_by_name["Health"].full_name

Reply = TypeVar("Reply")


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
    def __init__(self, proxy: Proxy, routes: Routes, statistics: Statistics) -> None:
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
        except ParaServeError as error:
            await abort(context, error)
        return kserve.ModelReadyResponse(ready=True)

    async def ServerMetadata(
        self, request: kserve.ServerMetadataRequest, context: Context
    ) -> kserve.ServerMetadataResponse:
        return metadata.server_metadata_message()

    async def ModelMetadata(
        self, request: kserve.ModelMetadataRequest, context: Context
    ) -> kserve.ModelMetadataResponse:
        await self._require(request.name, request.version, context)
        return metadata.model_metadata_message(request.name)

    async def ModelConfig(
        self, request: kserve.ModelConfigRequest, context: Context
    ) -> kserve.ModelConfigResponse:
        await self._require(request.name, request.version, context)
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
        await self._require(request.name, request.version, context)
        return self._statistics.message([request.name])

    async def ModelInfer(
        self, request: kserve.ModelInferRequest, context: Context
    ) -> kserve.ModelInferResponse:
        return await _or_abort(context, self._proxy.single(request))

    # A coroutine that writes, not a generator: a cancelled client then cancels it at once, also
    # while a response is being written.
    async def ModelStreamInfer(  # type: ignore[override]
        self, request_iterator: AsyncIterator[kserve.ModelInferRequest], context: Context
    ) -> None:
        stream = _ClientStream(self._proxy, context)
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as tasks:
                async for request in request_iterator:
                    tasks.create_task(stream.answer(request))
        except* ParaServeError as errors:
            failure = errors.exceptions[0]
        if isinstance(failure, ParaServeError):
            await abort(context, failure)

    async def _require(self, deployment: str, version: str, context: Context) -> None:
        try:
            await self._routes.require(deployment, version)
        except ParaServeError as error:
            await abort(context, error)


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

    async def answer(self, request: kserve.ModelInferRequest) -> None:
        with contextlib.suppress(_ClientLeft):
            await self._answer(request)

    async def _answer(self, request: kserve.ModelInferRequest) -> None:
        async def send(response: kserve.ModelInferResponse) -> None:
            await self._write(kserve.ModelStreamInferResponse(infer_response=response))

        try:
            await self._proxy.stream(request, send)
        except _ClientLeft:
            raise
        except ParaServeError as error:
            await self._fail(request, error)
        except Exception:
            logger.exception("A streamed request failed.")
            await self._fail(request, ParaServeError(INTERNAL_ERROR))

    async def _fail(self, request: kserve.ModelInferRequest, error: ParaServeError) -> None:
        if self._ends_on_error:
            raise error
        entry = kserve.ModelStreamInferResponse(error_message=str(error))
        entry.infer_response.id = request.id
        entry.infer_response.model_name = request.model_name
        await self._write(entry)

    async def _write(self, entry: kserve.ModelStreamInferResponse) -> None:
        async with self._writing:
            try:
                await self._context.write(entry)
            except grpc.aio.InternalError:
                # A write that ran into the client's cancellation.
                raise _ClientLeft from None


async def _or_abort(context: Context, reply: Awaitable[Reply]) -> Reply:
    try:
        return await reply
    except ParaServeError as error:
        await abort(context, error)
    except Exception:
        logger.exception("A request failed.")
        await abort(context, ParaServeError(INTERNAL_ERROR))
