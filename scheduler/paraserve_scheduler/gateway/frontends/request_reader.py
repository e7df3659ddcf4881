"""Reads gRPC requests: unpacks compressed ones within the limit, answers in the same coding.

gRPC's own unpacking is off, because it does not tell a service that a request was compressed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_scheduler.gateway.frontends.refused_calls import Context, abort
from paraserve_scheduler.gateway.kserve.compression import unpack

#: How compressed messages begin, which no protobuf message of this protocol does.
_COMPRESSIONS = {b"\x1f": grpc.Compression.Gzip, b"\x78": grpc.Compression.Deflate}


class RequestReader(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    def __init__(self, max_request_bytes: int) -> None:
        self._max_request_bytes = max_request_bytes

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streamed(handler), response_serializer=handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler), response_serializer=handler.response_serializer
        )

    def _unary(self, handler: Any) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def answer(data: bytes, context: Context) -> Any:
            try:
                request = await self._read(data, handler)
            except ParaServeError as error:
                await abort(context, error)
            response = await handler.unary_unary(request, context)
            if _answer_in_kind(data, context):
                # grpc.aio forgets the compression where it sends these together with the answer.
                await context.send_initial_metadata(())
            return response

        return answer

    def _streamed(self, handler: Any) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
        async def requests(messages: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            is_first = True
            async for data in messages:
                if is_first:
                    _answer_in_kind(data, context)
                is_first = False
                yield await self._read(data, handler)

        async def answer(messages: AsyncIterator[bytes], context: Context) -> None:
            await handler.stream_stream(requests(messages, context), context)

        return answer

    async def _read(self, data: bytes, handler: Any) -> Any:
        """Parse a message.

        Raises:
            TooLarge: unpacked it is larger than the limit.
            InvalidRequest: it cannot be unpacked or parsed.
        """
        if data[:1] in _COMPRESSIONS:
            data = await asyncio.to_thread(unpack, data, self._max_request_bytes)
        try:
            return handler.request_deserializer(data)
        except DecodeError:
            raise InvalidRequest("The request is no message of this call.") from None


def _answer_in_kind(data: bytes, context: Context) -> bool:
    """Compress the answers if the request is, before the first is sent; return whether it is."""
    compression = _COMPRESSIONS.get(data[:1])
    if compression is None:
        return False
    context.set_compression(compression)
    return True
