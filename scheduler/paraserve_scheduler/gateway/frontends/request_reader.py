"""Reads gRPC requests: unpacks compressed ones within the limit, answers in the same coding.

gRPC's own unpacking is off, because it does not tell a service that a request was compressed. Its
own parsing is off too, because it is done on the event loop, however large a message is.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.daemon.guard import internal_error
from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_scheduler.gateway.admission import ClientRequest
from paraserve_scheduler.gateway.frontends.failures import Context, abort, log_failure
from paraserve_scheduler.gateway.kserve.compression import unpack
from paraserve_scheduler.gateway.kserve.errors import TooLarge
from paraserve_scheduler.gateway.large_requests import RequestReading
from paraserve_scheduler.gateway.reading import MAX_SMALL_BYTES, Form, UnreadRequest

#: How compressed messages begin, which no protobuf message of this protocol does.
_COMPRESSIONS = {b"\x1f": grpc.Compression.Gzip, b"\x78": grpc.Compression.Deflate}
_SERVICE = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
_INFER = f"/{_SERVICE}/ModelInfer"


class RequestReader(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # not at run time
    """Hands the inference calls a `ClientRequest`, all others their own message.

    What a handler raises ends its call: here is the one place for that.
    """

    def __init__(self, reading: RequestReading) -> None:
        self._reading = reading

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
        is_infer = handler_call_details.method == _INFER
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler, is_infer=is_infer),
            response_serializer=handler.response_serializer,
        )

    def _unary(self, handler: Any, *, is_infer: bool) -> Callable[[bytes, Context], Awaitable[Any]]:
        async def answer(data: bytes, context: Context) -> Any:
            try:
                request = await self._read(data) if is_infer else _parsed(data, handler)
                response = await handler.unary_unary(request, context)
            except ParaServeError as error:
                await abort(context, error)
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                log_failure(error)
                await abort(context, internal_error())
            if _answer_in_kind(data, context):
                # grpc.aio forgets the compression where it sends these together with the answer.
                await context.send_initial_metadata(())
            return response

        return answer

    def _streamed(self, handler: Any) -> Callable[[AsyncIterator[bytes], Context], Awaitable[None]]:
        async def requests(
            messages: AsyncIterator[bytes], context: Context
        ) -> AsyncIterator[ClientRequest | ParaServeError]:
            is_first = True
            async for data in messages:
                if is_first:
                    _answer_in_kind(data, context)
                is_first = False
                try:
                    request = await self._read(data)
                except (InvalidRequest, TooLarge):
                    raise  # as what gRPC itself cannot take, it ends the stream
                except ParaServeError as error:
                    yield error
                else:
                    yield request

        async def answer(messages: AsyncIterator[bytes], context: Context) -> None:
            try:
                await handler.stream_stream(requests(messages, context), context)
            except ParaServeError as error:
                await abort(context, error)

        return answer

    async def _read(self, data: bytes) -> ClientRequest:
        is_packed = data[:1] in _COMPRESSIONS
        return await self._reading.read(
            UnreadRequest(form=Form.MESSAGE, body=data, is_packed=is_packed)
        )


def _parsed(data: bytes, handler: Any) -> Any:
    """Parse the message of a call that names something and no more.

    Raises:
        InvalidRequest: it is too large for that, or cannot be unpacked or parsed.
    """
    if data[:1] in _COMPRESSIONS:
        data = unpack(data, MAX_SMALL_BYTES)
    if len(data) > MAX_SMALL_BYTES:
        raise InvalidRequest(
            f"The request has {len(data)} bytes; this call takes {MAX_SMALL_BYTES} at most."
        )
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
