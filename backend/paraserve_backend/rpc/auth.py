"""The cluster token on our gRPC calls: sent by clients, checked by servers.

Without a token a service must listen on loopback only; that is enforced here.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc.addresses import split_address

TOKEN_HEADER = "x-paraserve-token"


def metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    return ((TOKEN_HEADER, token),) if token else ()


class TokenInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Refuses every call that does not carry the cluster token."""

    def __init__(self, token: str) -> None:
        self._token = token.encode()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        sent = dict(handler_call_details.invocation_metadata or ()).get(TOKEN_HEADER, "")
        given = sent if isinstance(sent, bytes) else sent.encode()
        if handler is None or hmac.compare_digest(given, self._token):
            return handler
        return _refusal(handler)


def _refusal(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        await context.abort(
            grpc.StatusCode.UNAUTHENTICATED, "The cluster token is missing or wrong."
        )

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


def require_loopback(address: str, token: str | None) -> None:
    """Refuse to listen beyond this machine without a cluster token.

    Raises:
        InvalidRequest: `address` is not host:port, or not a loopback address without a token.
    """
    host, _ = split_address(address)
    if token or host == "localhost":
        return
    try:
        if ipaddress.ip_address(host).is_loopback:
            return
    except ValueError:
        pass
    raise InvalidRequest(
        f"Refusing to listen on {address} without a cluster token: set token_file "
        "(or PARASERVE_TOKEN), or listen on 127.0.0.1."
    )
