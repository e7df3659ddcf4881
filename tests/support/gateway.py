"""A gateway between a fake scheduler and fake Triton servers, and requests for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import aiohttp
import grpc.aio
import numpy as np
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceStub,
    add_GRPCInferenceServiceServicer_to_server,
)

from paraserve_backend.protocol.tensors import INPUTS
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import add_SchedulerServicer_to_server
from paraserve_scheduler.gateway.admission import AdmittedRequest, ClientRequest, admit, check
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.server import Gateway
from tests.support.gateway_fakes import FakeScheduler, FakeTritonServer
from tests.support.limits import HANG_S

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceAsyncStub

DEPLOYMENT = "tiny"


async def end_all(tasks: Collection[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait for their ends, whatever those are."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(kw_only=True)
class GatewayHarness:
    gateway: Gateway
    scheduler: FakeScheduler
    scheduler_server: grpc.aio.Server
    scheduler_address: str
    #: Two servers, so that a request can go elsewhere.
    tritons: tuple[FakeTritonServer, FakeTritonServer]
    addresses: tuple[str, str]
    #: The first Triton's, so that it can vanish.
    server: grpc.aio.Server
    http: aiohttp.ClientSession
    channel: grpc.aio.Channel

    @property
    def triton(self) -> FakeTritonServer:
        return self.tritons[0]

    @property
    def stub(self) -> GRPCInferenceServiceAsyncStub:
        return GRPCInferenceServiceStub(self.channel)

    def url(self, path: str) -> str:
        return f"http://{self.gateway.http_address}/v2/{path}"

    def client(self) -> triton_aio.InferenceServerClient:
        return triton_aio.InferenceServerClient(self.gateway.grpc_address)

    def endpoint(self, number: int = 1, *, address: str | None = None) -> pb.Endpoint:
        """Replica `number`, on the server of that number."""
        return pb.Endpoint(
            replica=f"{DEPLOYMENT}.{number}",
            model=f"{DEPLOYMENT}.{number}",
            triton_grpc_address=address or self.addresses[(number - 1) % 2],
        )

    async def publish(self, *endpoints: pb.Endpoint, **fields: Any) -> None:
        """Make these the ready replicas of the one deployment."""
        route = {"max_waiting": 100, **fields}
        await self.scheduler.publish(pb.Route(deployment=DEPLOYMENT, endpoints=endpoints, **route))

    async def failed(self, count: int) -> None:
        """Wait until so many requests have ended otherwise than well, leaving nothing behind."""
        statistics = kserve.ModelStatisticsRequest(name=DEPLOYMENT)
        while True:
            (model,) = (await self.stub.ModelStatistics(statistics)).model_stats
            if model.inference_stats.fail.count == count:
                return

    async def held(self, count: int = 1) -> None:
        """Wait until so many requests are reported as waiting."""
        await self.scheduler.demand(lambda demand: demand.waiting == count)


@contextlib.asynccontextmanager
async def serving(
    config: GatewayConfig | None = None, *, replicas: int = 1, token: str | None = None
) -> AsyncIterator[GatewayHarness]:
    """Run a gateway for one deployment with so many ready replicas."""
    async with contextlib.AsyncExitStack() as stack:
        scheduler = FakeScheduler()
        tritons = (FakeTritonServer(), FakeTritonServer())
        scheduler_server, scheduler_address = await stack.enter_async_context(_listening(scheduler))
        listeners = [await stack.enter_async_context(_listening(each)) for each in tritons]
        settings = replace(config or make_config(), scheduler_address=scheduler_address)
        gateway = Gateway(settings, name="gateway-1", token=token)
        stack.push_async_callback(gateway.stop)
        await gateway.start()
        session = await stack.enter_async_context(aiohttp.ClientSession())
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(gateway.grpc_address))
        cluster = GatewayHarness(
            gateway=gateway,
            scheduler=scheduler,
            scheduler_server=scheduler_server,
            scheduler_address=scheduler_address,
            tritons=tritons,
            addresses=(listeners[0][1], listeners[1][1]),
            server=listeners[0][0],
            http=session,
            channel=channel,
        )
        await cluster.publish(*(cluster.endpoint(n + 1) for n in range(replicas)))
        async with _running(gateway):
            yield cluster


def make_config(**settings: Any) -> GatewayConfig:
    """Settings of a gateway on free ports that gives up no request, but for `settings`."""
    defaults = {
        "scheduler_address": "127.0.0.1:1",
        "grpc_address": "127.0.0.1:0",
        "http_address": "127.0.0.1:0",
        "cold_start_timeout_s": HANG_S,
        "first_token_timeout_s": HANG_S,
        "inter_token_timeout_s": HANG_S,
        "unstreamed_timeout_s": HANG_S,
    }
    return GatewayConfig(**{**defaults, **settings})


def make_request(
    text: str = "hi", *, id: str = "", stream: bool = True
) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name=DEPLOYMENT, id=id)
    prompt = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(text.encode())
    flag = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    flag.contents.bool_contents.append(stream)
    return request


def make_raw_request(**raw: bytes) -> kserve.ModelInferRequest:
    """A raw request with these inputs, declared as the interface wants them for one element."""
    datatypes = {spec.name: spec.datatype for spec in INPUTS}
    request = kserve.ModelInferRequest(model_name=DEPLOYMENT)
    for name, content in raw.items():
        request.inputs.add(name=name, datatype=datatypes[name], shape=[1])
        request.raw_input_contents.append(content)
    return request


def admitted(message: kserve.ModelInferRequest, *, engine: str = "") -> AdmittedRequest:
    """What a gateway makes of a message that came by a streaming call."""
    return admit(checked(message), pb.Route(engine=engine), may_stream=True)


def checked(message: kserve.ModelInferRequest, *, fresh_seed: int = 0) -> ClientRequest:
    """What a frontend hands on of a message that no deployment has to refuse."""
    return ClientRequest(message=message, checked=check(message, fresh_seed=fresh_seed))


def make_inputs(text: str = "hi", *, stream: bool = True) -> list[triton_aio.InferInput]:
    prompt = triton_aio.InferInput("text_input", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([text.encode()], dtype=np.object_))
    flag = triton_aio.InferInput("stream", [1], "BOOL")
    flag.set_data_from_numpy(np.array([stream]))
    return [prompt, flag]


def text_of(response: kserve.ModelInferResponse) -> str:
    index = [output.name for output in response.outputs].index("text_output")
    return response.raw_output_contents[index][4:].decode()


async def read_stream(
    cluster: GatewayHarness, request: kserve.ModelInferRequest
) -> list[kserve.ModelStreamInferResponse]:
    """Send one request on a stream of its own and return all that comes back."""

    async def only() -> AsyncIterator[kserve.ModelInferRequest]:
        yield request

    return [entry async for entry in cluster.stub.ModelStreamInfer(only())]


async def read_events(response: aiohttp.ClientResponse) -> list[dict[str, Any]]:
    """Return the server-sent events of a whole response."""
    blocks = (await response.read()).decode().split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks if block]


@contextlib.asynccontextmanager
async def _listening(
    servicer: FakeScheduler | FakeTritonServer,
) -> AsyncIterator[tuple[grpc.aio.Server, str]]:
    server = grpc.aio.server()
    if isinstance(servicer, FakeScheduler):
        add_SchedulerServicer_to_server(servicer, server)
    else:
        add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield server, f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def _running(gateway: Gateway) -> AsyncIterator[None]:
    task = asyncio.create_task(gateway.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
