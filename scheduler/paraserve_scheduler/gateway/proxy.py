"""One client request from its checks to its last response, whatever protocol it came in by."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest, Unavailable
from paraserve_backend.request import GenerateRequest
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.demand import Demand
from paraserve_scheduler.gateway.routes import ReplicaLost, Routes
from paraserve_scheduler.gateway.upstream import (
    WANT_EMPTY_FINAL,
    ReplicaRefused,
    ResponseTimeouts,
    Upstream,
    is_final,
)
from paraserve_scheduler.gateway.validation import validate

#: Takes one response to the client; returns when the client can take more.
Send = Callable[[kserve.ModelInferResponse], Awaitable[None]]

_MAX_REPLICAS_TRIED = 3


class _Delivery:
    """What the client has got: once it has seen a token, no other replica can start over."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False

    async def send(self, response: kserve.ModelInferResponse) -> None:
        self.has_begun = True
        await self._send(response)


class Proxy:
    """Both services of a gateway hand their requests to the same one."""

    def __init__(
        self, config: GatewayConfig, *, routes: Routes, demand: Demand, upstream: Upstream
    ) -> None:
        self._config = config
        self._routes = routes
        self._demand = demand
        self._upstream = upstream

    async def stream(self, request: kserve.ModelInferRequest, send: Send) -> None:
        """Send every response, in order; waits for a replica first if there is none.

        An empty final response is sent only if the client asked for it. Cancelling this cancels
        the request at its replica.

        Raises:
            ParaServeError: one sentence for the client, under the right code.
        """
        asked = await self._admit(request)
        await self._forward(request, send, is_stream=asked.is_stream)

    async def single(self, request: kserve.ModelInferRequest) -> kserve.ModelInferResponse:
        """Return the one response to a request that is not streamed.

        Raises:
            InvalidRequest: the request asks for a stream, or got one.
            ParaServeError: as `stream`.
        """
        asked = await self._admit(request)
        if asked.is_stream:
            raise InvalidRequest(
                "A request with one response cannot have 'stream' true: use ModelStreamInfer "
                "(gRPC) or generate_stream (HTTP)."
            )
        responses: list[kserve.ModelInferResponse] = []

        async def take_only_one(response: kserve.ModelInferResponse) -> None:
            if response.outputs and responses:
                raise InvalidRequest(
                    f"'{request.model_name}' sent several responses to a request for one: "
                    "use ModelStreamInfer (gRPC) or generate_stream (HTTP)."
                )
            if response.outputs:
                responses.append(response)

        await self._forward(request, take_only_one, is_stream=False)
        if not responses:
            raise Unavailable(f"The replica of '{request.model_name}' sent no response; retry.")
        return responses[0]

    async def _admit(self, request: kserve.ModelInferRequest) -> GenerateRequest:
        """Refuse what can only fail, before a replica is started for it."""
        await self._routes.require(request.model_name, request.model_version)
        return validate(request)

    async def _forward(
        self, request: kserve.ModelInferRequest, send: Send, *, is_stream: bool
    ) -> None:
        timeouts = self._timeouts(is_stream)
        self._demand.arrived(request.model_name)
        delivery = _Delivery(send)
        refused: frozenset[str] = frozenset()
        while True:
            try:
                async with self._routes.lease(request.model_name, refused=refused) as endpoint:
                    return await self._run(endpoint, request, delivery.send, timeouts)
            except (ReplicaLost, ReplicaRefused):
                refused |= {endpoint.replica}
                if delivery.has_begun or len(refused) == _MAX_REPLICAS_TRIED:
                    raise

    async def _run(
        self,
        endpoint: pb.Endpoint,
        request: kserve.ModelInferRequest,
        send: Send,
        timeouts: ResponseTimeouts,
    ) -> None:
        # Looking a missing one up would add it.
        wanted = request.parameters.get(WANT_EMPTY_FINAL)
        wants_empty_final = wanted is not None and wanted.bool_param
        responses = self._upstream.responses(endpoint, request, timeouts)
        async with aclosing(responses):
            async for response in responses:
                self._demand.first_token(request.model_name, endpoint.replica, time.time())
                if response.outputs or wants_empty_final or not is_final(response):
                    await send(response)

    def _timeouts(self, is_stream: bool) -> ResponseTimeouts:
        config = self._config
        return ResponseTimeouts(
            first_s=config.first_token_timeout_s if is_stream else config.unstreamed_timeout_s,
            next_s=config.inter_token_timeout_s,
        )
