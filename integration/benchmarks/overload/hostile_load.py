"""Sends the hostile set to a gateway, one request after the other, and waits for each answer."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import grpc
import grpc.aio

from integration.support.hostile import GrpcMessage, HttpRequest, grpc_messages, http_requests
from paraserve_backend.rpc.addresses import split_address
from paraserve_backend.rpc.channels import triton_channel

_ANSWER_TIMEOUT_S = 60.0
_METHOD = "/inference.GRPCInferenceService/ModelInfer"

#: A request of the set: its name, and what sends it and waits for its answer.
Sending = tuple[str, Callable[[], Awaitable[None]]]


async def over_http(address: str, deployment: str) -> AsyncIterator[Sending]:
    for each in http_requests(deployment):
        yield each.name, partial(_post, address, each)


async def over_grpc(address: str, deployment: str) -> AsyncIterator[Sending]:
    async with triton_channel(address) as channel:
        call = channel.unary_unary(_METHOD, _as_it_is, _as_it_is)
        for each in grpc_messages(deployment):
            yield each.name, partial(_call, call, each)


def _as_it_is(message: bytes) -> bytes:
    return message


async def _post(address: str, request: HttpRequest) -> None:
    host, port = split_address(address)
    reader, writer = await asyncio.open_connection(host, port)
    headers = {"Host": address, "Content-Length": str(len(request.body)), **request.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    # A gateway may answer, and close, before it has read everything.
    with contextlib.suppress(ConnectionError, TimeoutError):
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            writer.write(f"POST {request.path} HTTP/1.1\r\n{head}\r\n".encode() + request.body)
            await writer.drain()
            await reader.readline()
    writer.close()


async def _call(call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes], message: GrpcMessage) -> None:
    packing = grpc.Compression.Gzip if message.is_gzipped else grpc.Compression.NoCompression
    body = gzip.decompress(message.message) if message.is_gzipped else message.message
    with contextlib.suppress(grpc.aio.AioRpcError):
        await call(body, timeout=_ANSWER_TIMEOUT_S, compression=packing)
