"""One client request from its checks to its last response, whatever protocol it came by.

It admits a request, leases a replica, passes the responses on and resumes at another replica;
`attempts` says at how many.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ParaServeError,
    Unavailable,
)
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.admission import ClientRequest, admit, take_time_limit_us
from paraserve_scheduler.gateway.attempts import Attempts, Content, DeadlyRequests
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import (
    ReplicaFailing,
    ReplicaLate,
    ReplicaLost,
    ReplicaRefused,
    ReplicaSilent,
)
from paraserve_scheduler.gateway.kserve.message_parameters import TIME_LIMIT, WANT_EMPTY_FINAL
from paraserve_scheduler.gateway.kserve.message_tensors import put_on_batch
from paraserve_scheduler.gateway.kserve.statistics import RequestTimes, Statistics
from paraserve_scheduler.gateway.leases import Lease, Wish
from paraserve_scheduler.gateway.resumption import Resumption
from paraserve_scheduler.gateway.routes import Routes
from paraserve_scheduler.gateway.upstream import (
    ResponseTimeouts,
    Upstream,
    is_final,
)

#: Takes one response to the client; returns when the client can take more.
Send = Callable[[kserve.ModelInferResponse], Awaitable[None]]

#: How a request may be lost without its being to blame, or not surely.
_LOSSES = (ReplicaLost, ReplicaFailing, ReplicaSilent, ReplicaLate, ReplicaRefused)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """An admitted request while replicas answer it; what was read of its prompt is not kept."""

    message: kserve.ModelInferRequest
    content: Content
    resumption: Resumption
    attempts: Attempts
    is_stream: bool
    is_batch_of_one: bool

    @property
    def deployment(self) -> str:
        return self.message.model_name

    def wish(self) -> Wish:
        attempts, resumption = self.attempts, self.resumption
        return Wish(
            refused=attempts.refused,
            avoided=attempts.avoided,
            is_resumed=attempts.is_resumed or resumption.has_moved,
            held_bytes=self.message.ByteSize(),
            may_leave=resumption.can_go_on_elsewhere,
        )


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
        self._deadly = DeadlyRequests()

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
            admitted = self._admitted(request, route, may_stream=may_stream)
            with self._statistics.request(message.model_name) as times:
                await self._forward(admitted, send, times)

    def _admitted(self, request: ClientRequest, route: pb.Route, *, may_stream: bool) -> _Request:
        admitted = admit(request, route, may_stream=may_stream)
        asked = admitted.asked
        content = Content.of(admitted.message, asked)
        self._deadly.require_harmless(content, time.monotonic())
        return _Request(
            message=admitted.message,
            content=content,
            resumption=Resumption(admitted.message, asked, can_move=admitted.can_move),
            attempts=Attempts(route.deployment),
            is_stream=asked.is_stream,
            is_batch_of_one=admitted.is_batch_of_one,
        )

    async def _forward(self, request: _Request, send: Send, times: RequestTimes) -> None:
        """Have replicas answer, one after the other, until the answer is whole."""
        self._demand.arrived(request.deployment)
        try:
            while not await self._try(request, send, times):
                pass
        except ParaServeError as error:
            if request.attempts.is_deadly:
                self._deadly.add(request.content, time.monotonic())
            raise request.attempts.shown(error) from None

    async def _try(self, request: _Request, send: Send, times: RequestTimes) -> bool:
        """Have one replica answer; returns whether the answer ended with it."""
        preferred = request.resumption.next_replica
        try:
            async with self._routes.lease(
                request.deployment, preferred=preferred, wish=request.wish()
            ) as lease:
                times.given_to_replica()
                return await self._run(lease, request, send)
        except _LOSSES as error:
            self._lost(request, lease.replica, error)
            return False

    def _lost(self, request: _Request, replica: str, error: ParaServeError) -> None:
        """Prepare to go on elsewhere; raises the error where that is not possible."""
        if isinstance(error, ReplicaLost):
            self._routes.found_dead(replica)
        elif isinstance(error, (ReplicaFailing, ReplicaLate)) and not self._may_go_on(
            request, replica, error
        ):
            raise error
        request.attempts.failed(replica, error)
        if not request.resumption.lose():
            raise error

    def _may_go_on(self, request: _Request, replica: str, error: ParaServeError) -> bool:
        """Whether it is worth while to leave a replica that is alive.

        In the middle of an answer it is worth waiting for another one to say why passes fail.
        """
        if self._routes.has_other(replica):
            return True
        return isinstance(error, ReplicaFailing) and request.resumption.has_begun

    async def _run(self, lease: Lease, request: _Request, send: Send) -> bool:
        """Pass a replica's responses on; returns whether the answer ended with it."""
        message, endpoint = request.message, lease.endpoint
        # Looking a missing one up would add it.
        wanted = message.parameters.get(WANT_EMPTY_FINAL)
        wants_empty_final = wanted is not None and wanted.bool_param
        timeouts = self._timeouts(request.is_stream)
        responses = self._upstream.responses(endpoint, message, timeouts)
        pace = self._demand.pace(request.deployment, endpoint.replica)
        async with aclosing(responses):
            async for response in responses:
                pace.receive(time.time())
                self._routes.leases.heard(lease)
                if not request.resumption.receive(response):
                    return False
                if response.outputs or wants_empty_final or not is_final(response):
                    if request.is_batch_of_one:
                        put_on_batch(response)
                    await send(response)
                self._routes.leases.delivered(lease)
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
