"""A gateway's life: its link to the scheduler, its listeners, its process."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2 as health
from grpc_health.v1.health_pb2_grpc import HealthStub

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import add_SchedulerServicer_to_server
from paraserve_scheduler.gateway.server import Gateway
from tests.support.gateway import (
    DEPLOYMENT,
    make_config,
    make_inputs,
    serving,
)
from tests.support.gateway_fakes import FakeScheduler, one_answer
from tests.support.limits import HANG_S


async def test_the_cluster_token_goes_with_every_call() -> None:
    async with serving(token="t0ken") as cluster, cluster.client() as client:
        assert await client.is_model_ready(DEPLOYMENT)
        assert cluster.scheduler.metadata[0]["x-paraserve-token"] == "t0ken"


async def test_a_gateway_finds_its_scheduler_again_and_keeps_its_last_table() -> None:
    scheduler = FakeScheduler()
    scheduler.table = pb.RouteTable(routes=[pb.Route(deployment=DEPLOYMENT, max_waiting=100)])
    async with serving(replicas=0) as cluster, cluster.client() as client:
        assert await client.is_model_ready(DEPLOYMENT)
        address = cluster.scheduler_address
        await cluster.scheduler_server.stop(None)
        assert await client.is_model_ready(DEPLOYMENT)
        restarted = grpc.aio.server()
        add_SchedulerServicer_to_server(scheduler, restarted)
        restarted.add_insecure_port(address)
        await restarted.start()
        held = asyncio.create_task(client.infer(DEPLOYMENT, make_inputs(stream=False)))
        await scheduler.demand(lambda demand: demand.waiting == 1)
        await scheduler.publish(pb.Route(deployment=DEPLOYMENT, endpoints=[cluster.endpoint()]))
        cluster.triton.script = one_answer
        await held
        await restarted.stop(None)


async def test_grpcs_own_health_check_answers_as_the_ready_call_does() -> None:
    gateway = Gateway(make_config(), name="g", token=None)
    await gateway.start()
    assert await _health(gateway.grpc_address) == health.HealthCheckResponse.NOT_SERVING
    await gateway.stop()
    async with serving(replicas=0) as cluster, cluster.client() as client:
        assert await client.is_model_ready(DEPLOYMENT)
        for service in ("", "inference.GRPCInferenceService", "whatever"):
            status = await _health(cluster.gateway.grpc_address, service)
            assert status == health.HealthCheckResponse.SERVING


async def test_grpcs_own_health_cannot_be_watched() -> None:
    async with serving(replicas=0) as cluster:
        watch = HealthStub(cluster.channel).Watch(health.HealthCheckRequest())
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await anext(aiter(watch))
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def _health(address: str, service: str = "") -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health.HealthCheckRequest(service=service)
        answer: health.HealthCheckResponse = await HealthStub(channel).Check(request)
        return int(answer.status)


@pytest.mark.parametrize("setting", ["grpc_address", "http_address"])
async def test_an_address_in_use_is_named(setting: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway = Gateway(make_config(**{setting: address}), name="g", token=None)
        with pytest.raises(InvalidRequest, match=f"Cannot listen on {setting} {address}"):
            await gateway.start()
        await gateway.stop()


def test_a_gateway_process_serves_until_it_is_told_to_stop(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = tmp_path / "gateway.yaml"
    config.write_text(
        f"scheduler_address: 127.0.0.1:1\nhttp_address: 127.0.0.1:{port}\n", encoding="utf-8"
    )
    code = "import sys; from paraserve_scheduler.gateway.server import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "--config", str(config), "--grpc-address", "127.0.0.1:0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    while "HTTP" not in (line := process.stderr.readline()):
        assert line, "the gateway ended"
    with urllib.request.urlopen(
        f"http://127.0.0.1:{port}/v2/health/live", timeout=HANG_S
    ) as answer:
        assert answer.status == 200
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANG_S)
    assert process.returncode == 0
