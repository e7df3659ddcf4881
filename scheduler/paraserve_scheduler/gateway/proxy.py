"""One client request from its checks to its last response, whatever protocol it came by.

It admits a request, leases a replica, passes the responses on and resumes at another replica. It
decides when another replica is tried, and how many are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import DeadlineExceeded, InvalidRequest, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.admission import (
    AdmittedRequest,
    ClientRequest,
    admit,
    take_time_limit_us,
)
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import ReplicaLost
from paraserve_scheduler.gateway.kserve.message_parameters import TIME_LIMIT, WANT_EMPTY_FINAL
from paraserve_scheduler.gateway.kserve.message_tensors import put_on_batch
from paraserve_scheduler.gateway.kserve.statistics import RequestTimes, Statistics
from paraserve_scheduler.gateway.resumption import Resumption
from paraserve_scheduler.gateway.routes import Routes
from paraserve_scheduler.gateway.upstream import (
    ReplicaRefused,
    ResponseTimeouts,
    Upstream,
    is_final,
)

#: Takes one response to the client; returns when the client can take more.
Send = Callable[[kserve.ModelInferResponse], Awaitable[None]]

_MAX_REPLICAS_TRIED = 3


class _OnlyResponse:
    """Takes the response to a request that may have no more than one."""

    def __init__(self, deployment: str) -> None:
        self._deployment = deployment
        self._response: kserve.ModelInferResponse | None = None

    async def take(self, response: kserve.ModelInferResponse) -> None:
        if response.outputs and self._response is not None:
            raise InvalidRequest(
                f"'{self._deployment}' sent several responses to a request for one: "
                "use ModelStreamInfer (gRPC) or generate_stream (HTTP)."
            )
        if response.outputs:
            self._response = response

    def response(self) -> kserve.ModelInferResponse:
        if self._response is None:
            raise Unavailable(f"The replica of '{self._deployment}' sent no response; retry.")
        return self._response


class Proxy:
    """Both services of a gateway hand their requests to the same one."""

    def __init__(
        self,
        config: GatewayConfig,
        *,
        routes: Routes,
        demand: DemandMeter,
        upstream: Upstream,
        statistics: Statistics,
    ) -> None:
        self._config = config
        self._routes = routes
        self._demand = demand
        self._upstream = upstream
        self._statistics = statistics

    async def stream(self, request: ClientRequest, send: Send) -> None:
        """Send every response, in order; waits for a replica first if there is none.

        An empty final response is sent only if the client asked for it. Cancelling this cancels
        the request at its replica.

        Raises:
            ParaServeError: one sentence for the client, under the right code.
        """
        await self._answer(request, send, may_stream=True)

    async def single(self, request: ClientRequest) -> kserve.ModelInferResponse:
        """Return the one response to a request that is not streamed.

        Raises:
            InvalidRequest: the request asks for a stream, or got one.
            ParaServeError: as `stream`.
        """
        only = _OnlyResponse(request.message.model_name)
        await self._answer(request, only.take, may_stream=False)
        return only.response()

    async def _answer(self, request: ClientRequest, send: Send, *, may_stream: bool) -> None:
        message = request.message
        # The limit covers the wait for the route, so it is read before the route is known.
        async with time_limit(message):
            route = await self._routes.require(message.model_name, message.model_version)
            admitted = admit(request, route, may_stream=may_stream)
            with self._statistics.request(message.model_name) as times:
                await self._forward(admitted, send, times)

    async def _forward(self, request: AdmittedRequest, send: Send, times: RequestTimes) -> None:
        """Have replicas answer, one after the other, until the answer is whole."""
        deployment = request.message.model_name
        resumption = Resumption(request.message, request.asked, can_move=request.can_move)
        self._demand.arrived(deployment)
        refused: frozenset[str] = frozenset()
        while True:
            try:
                async with self._routes.lease(
                    deployment, preferred=resumption.next_replica, refused=refused
                ) as endpoint:
                    times.given_to_replica()
                    if await self._run(endpoint, request, send, resumption):
                        return
            except (ReplicaLost, ReplicaRefused):
                refused |= {endpoint.replica}
                if not resumption.lose() or len(refused) == _MAX_REPLICAS_TRIED:
                    raise

    async def _run(
        self, endpoint: pb.Endpoint, request: AdmittedRequest, send: Send, resumption: Resumption
    ) -> bool:
        """Pass a replica's responses on; returns whether the answer ended with it."""
        message = request.message
        # Looking a missing one up would add it.
        wanted = message.parameters.get(WANT_EMPTY_FINAL)
        wants_empty_final = wanted is not None and wanted.bool_param
        timeouts = self._timeouts(request.asked.is_stream)
        responses = self._upstream.responses(endpoint, message, timeouts)
        pace = self._demand.pace(message.model_name, endpoint.replica)
        async with aclosing(responses):
            async for response in responses:
                pace.receive(time.time())
                if not resumption.receive(response):
                    return False
                if response.outputs or wants_empty_final or not is_final(response):
                    if request.is_batch_of_one:
                        put_on_batch(response)
                    await send(response)
        pace.end()
        return True

    def _timeouts(self, is_stream: bool) -> ResponseTimeouts:
        config = self._config
        return ResponseTimeouts(
            first_s=config.first_token_timeout_s if is_stream else config.unstreamed_timeout_s,
            next_s=config.inter_token_timeout_s,
        )


@asynccontextmanager
async def time_limit(message: kserve.ModelInferRequest) -> AsyncIterator[None]:
    """Cancel the body when it takes longer than the request allows.

    Raises:
        InvalidRequest: the limit is none.
        DeadlineExceeded: the body took longer.
    """
    limit_us = take_time_limit_us(message)
    limit = asyncio.timeout(None if limit_us is None else limit_us / 1e6)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"The request was not answered within its '{TIME_LIMIT}' of {limit_us} microseconds, "
            "which include a cold start; allow more or leave it out."
        ) from None
