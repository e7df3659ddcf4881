"""The whole hostile set against a gateway that is a process: each is refused or answered, by one
short sentence under the right status, and the gateway answers others meanwhile and afterwards.

How long others wait is for `make bench-overload` to say. Scheduler and Triton are fakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as kserve

from integration.support.hostile import GrpcMessage, HttpRequest, grpc_messages, http_requests
from tests.support.gateway import DEPLOYMENT, make_request, serving
from tests.support.gateway_fakes import one_answer
from tests.support.limits import HANG_S
from tests.support.ports import free_ports

_HTTP_STATUSES = {200, 400, 404, 413, 415}
_GRPC_CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_PARASERVE = Path(sys.executable).with_name("paraserve")
_SERVICE = "/inference.GRPCInferenceService"


@contextlib.asynccontextmanager
async def _gateway() -> AsyncIterator[tuple[Process, str, str]]:
    """Run a gateway with one replica; yield its process and its two addresses."""
    grpc_address, http_address = (f"127.0.0.1:{port}" for port in free_ports(2))
    async with serving() as fakes:
        fakes.triton.script = one_answer
        arguments = {
            "--scheduler-address": fakes.scheduler_address,
            "--grpc-address": grpc_address,
            "--http-address": http_address,
        }
        flat = [text for pair in arguments.items() for text in pair]
        process = await asyncio.create_subprocess_exec(_PARASERVE, "gateway", *flat, stderr=PIPE)
        try:
            async with grpc.aio.insecure_channel(grpc_address) as channel:
                infer = channel.unary_unary(
                    f"{_SERVICE}/ModelInfer",
                    request_serializer=bytes,
                    response_deserializer=kserve.ModelInferResponse.FromString,
                )
                good = make_request(stream=False).SerializeToString()
                await infer(good, wait_for_ready=True, timeout=HANG_S)
                yield process, grpc_address, http_address
                await infer(good, timeout=HANG_S)
        finally:
            if process.returncode is None:
                process.terminate()
            _, log = await process.communicate()
        assert b"Traceback" not in log
        assert process.returncode == 0


@contextlib.asynccontextmanager
async def _others_are_answered(http: aiohttp.ClientSession, url: str) -> AsyncIterator[None]:
    """Ask for the gateway's health all the time; fails if one is not answered."""

    async def ask() -> None:
        while True:
            async with http.get(f"{url}/v2/health/ready") as response:
                assert response.status == 200
            await asyncio.sleep(0.01)

    asking = asyncio.create_task(ask())
    try:
        yield
        assert not asking.done()
    finally:
        asking.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asking


async def _post(http: aiohttp.ClientSession, url: str, request: HttpRequest) -> None:
    sent = http.post(url + request.path, data=io.BytesIO(request.body), headers=request.headers)
    async with sent as response:
        text = await response.text()
        assert response.status in _HTTP_STATUSES, (request.name, text[:200])
        if response.status != 200:
            assert len(json.loads(text)["error"]) <= 500, request.name
        if "64 MiB" in request.name:
            assert response.status == 413, request.name


async def _send(channel: grpc.aio.Channel, message: GrpcMessage) -> None:
    """Send a message by both calls."""
    unary = channel.unary_unary(
        f"{_SERVICE}/ModelInfer",
        request_serializer=bytes,
        response_deserializer=kserve.ModelInferResponse.FromString,
    )(message.message)
    stream = channel.stream_stream(
        f"{_SERVICE}/ModelStreamInfer",
        request_serializer=bytes,
        response_deserializer=kserve.ModelStreamInferResponse.FromString,
    )(iter([message.message]))
    with contextlib.suppress(grpc.aio.AioRpcError):
        await unary
    with contextlib.suppress(grpc.aio.AioRpcError):
        async for entry in stream:
            assert len(entry.error_message) <= 500
    for call in (unary, stream):
        code = await call.code()
        assert code in _GRPC_CODES, (message.name, await call.details())
        assert len(await call.details() or "") <= 500
        if "64 MiB" in message.name:
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED, message.name


@pytest.mark.timeout(3600)
async def test_a_gateway_refuses_or_answers_every_hostile_request_and_lives() -> None:
    async with _gateway() as (process, grpc_address, http_address), aiohttp.ClientSession() as http:
        url = f"http://{http_address}"
        async with _others_are_answered(http, url):
            for request in http_requests(DEPLOYMENT):
                await _post(http, url, request)
            async with grpc.aio.insecure_channel(grpc_address) as channel:
                for message in grpc_messages(DEPLOYMENT):
                    await _send(channel, message)
        assert process.returncode is None
