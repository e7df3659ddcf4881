"""One client request from its checks to its last response, whatever protocol it came by.

It decides when a request is tried at another replica, and at how many.
"""

from __future__ import annotations

import secrets
import time
from contextlib import aclosing
from dataclasses import dataclass

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest, Unavailable
from paraserve_backend.protocol.engine_abilities import ABILITIES, can_be_carried, check
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve import normalisation
from paraserve_scheduler.gateway.kserve.errors import ReplicaLost
from paraserve_scheduler.gateway.kserve.normalisation import Send, take_time_limit_us, time_limit
from paraserve_scheduler.gateway.kserve.statistics import RequestTimes, Statistics
from paraserve_scheduler.gateway.kserve.validation import validate
from paraserve_scheduler.gateway.resumption import Resumption
from paraserve_scheduler.gateway.routes import Routes
from paraserve_scheduler.gateway.upstream import (
    WANT_EMPTY_FINAL,
    ReplicaRefused,
    ResponseTimeouts,
    Upstream,
    is_final,
)

_MAX_REPLICAS_TRIED = 3


class _Pace:
    """When the responses of a stream came."""

    def __init__(self) -> None:
        self.gaps = -1
        self.first_s = self._last_s = 0.0

    def receive(self, at_s: float) -> None:
        self.gaps += 1
        if self.gaps == 0:
            self.first_s = at_s
        self._last_s = at_s

    @property
    def decode_s(self) -> float:
        return self._last_s - self.first_s


@dataclass(frozen=True, slots=True, kw_only=True)
class _Admitted:
    """What the gateway itself has to know of a request that passed its checks."""

    is_stream: bool
    #: Whether the prompt came with a leading dimension of 1.
    is_batch_of_one: bool
    resumption: Resumption


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

    async def stream(self, request: kserve.ModelInferRequest, send: Send) -> None:
        """Send every response, in order; waits for a replica first if there is none.

        An empty final response is sent only if the client asked for it. Cancelling this cancels
        the request at its replica.

        Raises:
            ParaServeError: one sentence for the client, under the right code.
        """
        async with time_limit(take_time_limit_us(request)):
            admitted = await self._admit(request)
            await self._serve(request, send, admitted)

    async def single(self, request: kserve.ModelInferRequest) -> kserve.ModelInferResponse:
        """Return the one response to a request that is not streamed.

        Raises:
            InvalidRequest: the request asks for a stream, or got one.
            ParaServeError: as `stream`.
        """
        only = _OnlyResponse(request.model_name)
        async with time_limit(take_time_limit_us(request)):
            admitted = await self._admit(request)
            if admitted.is_stream:
                raise InvalidRequest(
                    "A request with one response cannot have 'stream' true: use ModelStreamInfer "
                    "(gRPC) or generate_stream (HTTP)."
                )
            await self._serve(request, only.take, admitted)
        return only.response()

    async def _admit(self, request: kserve.ModelInferRequest) -> _Admitted:
        """Refuse what can only fail, before a replica is started for it."""
        await self._routes.require(request.model_name, request.model_version)
        is_batch_of_one = normalisation.take_off(request)
        asked = validate(request, fresh_seed=secrets.randbits(63))
        abilities = ABILITIES.get(self._routes.engine(request.model_name))
        if abilities is not None:
            check(asked, abilities)
        can_move = abilities is None or can_be_carried(asked, abilities)
        return _Admitted(
            is_stream=asked.is_stream,
            is_batch_of_one=is_batch_of_one,
            resumption=Resumption(request, asked, can_move=can_move),
        )

    async def _serve(
        self, request: kserve.ModelInferRequest, send: Send, admitted: _Admitted
    ) -> None:
        if admitted.is_batch_of_one:
            send = normalisation.put_on(send)
        with self._statistics.request(request.model_name) as times:
            await self._forward(request, send, times, admitted)

    async def _forward(
        self,
        request: kserve.ModelInferRequest,
        send: Send,
        times: RequestTimes,
        admitted: _Admitted,
    ) -> None:
        """Have replicas answer, one after the other, until the answer is whole."""
        timeouts, resumption = self._timeouts(admitted.is_stream), admitted.resumption
        self._demand.arrived(request.model_name)
        refused: frozenset[str] = frozenset()
        while True:
            try:
                async with self._routes.lease(
                    request.model_name, preferred=resumption.next_replica, refused=refused
                ) as endpoint:
                    times.given_to_replica()
                    if await self._run(endpoint, request, send, timeouts, resumption):
                        return
            except (ReplicaLost, ReplicaRefused):
                refused |= {endpoint.replica}
                if not resumption.lose() or len(refused) == _MAX_REPLICAS_TRIED:
                    raise

    async def _run(
        self,
        endpoint: pb.Endpoint,
        request: kserve.ModelInferRequest,
        send: Send,
        timeouts: ResponseTimeouts,
        resumption: Resumption,
    ) -> bool:
        """Pass a replica's responses on; returns whether the answer ended with it."""
        # Looking a missing one up would add it.
        wanted = request.parameters.get(WANT_EMPTY_FINAL)
        wants_empty_final = wanted is not None and wanted.bool_param
        responses = self._upstream.responses(endpoint, request, timeouts)
        pace = _Pace()
        async with aclosing(responses):
            async for response in responses:
                pace.receive(time.time())
                if pace.gaps == 0:
                    self._demand.first_token(request.model_name, endpoint.replica, pace.first_s)
                if not resumption.receive(response):
                    return False
                if response.outputs or wants_empty_final or not is_final(response):
                    await send(response)
        if pace.gaps > 0:
            self._demand.decoded(request.model_name, endpoint.replica, pace.gaps, pace.decode_s)
        return True

    def _timeouts(self, is_stream: bool) -> ResponseTimeouts:
        config = self._config
        return ResponseTimeouts(
            first_s=config.first_token_timeout_s if is_stream else config.unstreamed_timeout_s,
            next_s=config.inter_token_timeout_s,
        )
