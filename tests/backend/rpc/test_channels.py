"""Servers and channels as our daemons make them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.channels import (
    blocking_cluster_channel,
    cluster_channel,
    cluster_server,
    gateway_server,
    listen,
    triton_channel,
)

TOKEN = "t0ken"
#: More than gRPC takes without being told.
LARGE = bytes(5 << 20)
_ECHO = ("/test/Echo", bytes, bytes)


async def echo(request: bytes, _context: object) -> bytes:
    return request


def add_echo(server: grpc.aio.Server) -> None:
    handlers = {"Echo": grpc.unary_unary_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))


@contextlib.asynccontextmanager
async def started(server: grpc.aio.Server) -> AsyncIterator[str]:
    add_echo(server)
    port = listen(server, "127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def test_messages_of_any_size_pass_between_daemons() -> None:
    async with started(cluster_server(TOKEN)) as address:
        async with cluster_channel(address) as channel:
            answer = await channel.unary_unary(*_ECHO)(LARGE, metadata=metadata(TOKEN))
            assert answer == LARGE
        with blocking_cluster_channel(address) as blocking:
            call = blocking.unary_unary(*_ECHO)
            assert await asyncio.to_thread(call, LARGE, metadata=metadata(TOKEN)) == LARGE


async def test_a_cluster_server_asks_for_its_token() -> None:
    async with started(cluster_server(TOKEN)) as address, cluster_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await channel.unary_unary(*_ECHO)(b"")
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_gateway_takes_requests_up_to_its_limit() -> None:
    server = gateway_server([], max_request_bytes=6 << 20)
    async with started(server) as address, triton_channel(address) as channel:
        call = channel.unary_unary(*_ECHO)
        assert await call(LARGE) == LARGE
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(LARGE + LARGE)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("setting", ["", "grpc_address"])
async def test_an_address_in_use_is_named(setting: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InvalidRequest, match=f"Cannot listen on {setting} ?{address}: "):
            listen(cluster_server(None), address, setting=setting)


async def test_two_servers_never_share_a_port() -> None:
    async with started(cluster_server(None)) as address:
        with pytest.raises(InvalidRequest, match="in use"):
            listen(cluster_server(None), address)


async def test_what_is_no_address_is_not_listened_on() -> None:
    with pytest.raises(InvalidRequest, match="write it as host:port"):
        listen(cluster_server(None), "8001")
