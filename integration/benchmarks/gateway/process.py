"""A gateway in a process of its own, as production runs it, whose scheduler is the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc.aio
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from integration.support.limits import HANG_S
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import add_SchedulerServicer_to_server
from tests.support.gateway_fakes import FakeScheduler
from tests.support.ports import free_ports

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceAsyncStub


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayProcess:
    scheduler: FakeScheduler
    grpc_address: str
    http_address: str
    pid: int

    async def publish(self, endpoints: Mapping[str, pb.Endpoint | None]) -> None:
        """Make these the deployments; those without an endpoint are at zero."""
        await self.scheduler.publish(*_routes(endpoints))

    async def held(self, deployment: str) -> None:
        """Wait until a request for the deployment waits for a replica."""
        await self.scheduler.demand(
            lambda demand: demand.deployment == deployment and demand.waiting == 1
        )

    def cpu_s(self) -> float:
        """Return the processor time it has used so far."""
        fields = (
            Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        )
        user_ticks, system_ticks = int(fields[11]), int(fields[12])
        return (user_ticks + system_ticks) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def gateway_process(
    folder: Path,
    endpoints: Mapping[str, pb.Endpoint | None],
    *,
    command: Sequence[str] = (str(Path(sys.executable).with_name("paraserve")), "gateway"),
) -> AsyncIterator[GatewayProcess]:
    """Run `paraserve gateway` until the end of the body; its log is in `folder`.

    When it begins, the gateway knows the deployments; `endpoints` is as for `publish`. `command`
    is another one that takes the same settings.
    """
    scheduler, server = FakeScheduler(), grpc.aio.server()
    await scheduler.publish(*_routes(endpoints))
    add_SchedulerServicer_to_server(scheduler, server)
    scheduler_port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    grpc_address, http_address = (f"127.0.0.1:{port}" for port in free_ports(2))
    log_path = folder / "gateway.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [
                *command,
                f"--scheduler-address=127.0.0.1:{scheduler_port}",
                f"--grpc-address={grpc_address}",
                f"--http-address={http_address}",
            ],
            stderr=log,
        )
    try:
        await _wait_until_ready(grpc_address, process, log_path)
        yield GatewayProcess(
            scheduler=scheduler,
            grpc_address=grpc_address,
            http_address=http_address,
            pid=process.pid,
        )
    finally:
        process.terminate()
        process.wait()
        await server.stop(None)


def _routes(endpoints: Mapping[str, pb.Endpoint | None]) -> list[pb.Route]:
    return [
        pb.Route(deployment=name, endpoints=[endpoint] if endpoint else [], max_waiting=1000)
        for name, endpoint in endpoints.items()
    ]


async def _wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + HANG_S
    async with grpc.aio.insecure_channel(address) as channel:
        while not await _is_ready(GRPCInferenceServiceStub(channel)):
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"The gateway did not start:\n{log.read_text()[-3000:]}")
            await asyncio.sleep(0.05)


async def _is_ready(stub: GRPCInferenceServiceAsyncStub) -> bool:
    try:
        return (await stub.ServerReady(kserve.ServerReadyRequest())).ready
    except grpc.aio.AioRpcError:
        return False
