"""gRPC's standard health check, which Triton has too: for Kubernetes' probes and load balancers."""

from __future__ import annotations

from typing import Any

import grpc

from paraserve_scheduler.gateway.frontends.refused_calls import Context
from paraserve_scheduler.gateway.routes import Routes

_METHOD = "/grpc.health.v1.Health/Check"
#: A HealthCheckResponse: `status` is its only field.
SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"


class HealthCheck(grpc.GenericRpcHandler):  # type: ignore[type-arg]  # not at run time
    def __init__(self, routes: Routes) -> None:
        self._routes = routes

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method != _METHOD:
            return None
        return grpc.unary_unary_rpc_method_handler(self._check, request_deserializer=bytes)

    async def _check(self, _request: bytes, _context: Context) -> bytes:
        return SERVING if self._routes.is_known else NOT_SERVING
