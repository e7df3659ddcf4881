"""The gateway process: two listeners, one proxy, one link to the scheduler, and their shutdown."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Sequence

from tritonclient.grpc.service_pb2_grpc import add_GRPCInferenceServiceServicer_to_server

from paraserve_backend.daemon.process import run_daemon
from paraserve_backend.daemon.settings import read_token
from paraserve_backend.rpc.addresses import split_address, with_port
from paraserve_backend.rpc.channels import cluster_channel, gateway_server, listen
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.frontends.grpc_service import GrpcService, health_handler
from paraserve_scheduler.gateway.frontends.http_listener import HttpListener
from paraserve_scheduler.gateway.frontends.http_service import HttpService
from paraserve_scheduler.gateway.frontends.request_reader import RequestReader
from paraserve_scheduler.gateway.kserve.statistics import Statistics
from paraserve_scheduler.gateway.large_requests import RequestReading
from paraserve_scheduler.gateway.proxy import Proxy
from paraserve_scheduler.gateway.routes import Routes
from paraserve_scheduler.gateway.scheduler_link import SchedulerLink
from paraserve_scheduler.gateway.silence import SilenceWatch
from paraserve_scheduler.gateway.upstream import Upstream

logger = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S = 2.0


class Gateway:
    """Listens between `start` and `stop`; `run` keeps up the link to the scheduler."""

    def __init__(self, config: GatewayConfig, *, name: str, token: str | None) -> None:
        self._config = config
        self._demand = DemandMeter(name)
        self._routes = Routes(
            self._demand,
            cold_start_timeout_s=config.cold_start_timeout_s,
            max_held_bytes=config.max_held_bytes,
        )
        self._upstream = Upstream()
        self._silence = SilenceWatch(self._routes, self._upstream.probe)
        self._statistics = Statistics()
        self._proxy = Proxy(
            config,
            routes=self._routes,
            demand=self._demand,
            upstream=self._upstream,
            statistics=self._statistics,
        )
        self._scheduler = cluster_channel(config.scheduler_address)
        self._link = SchedulerLink(
            self._scheduler, gateway=name, token=token, routes=self._routes, demand=self._demand
        )
        self._reading = RequestReading(
            max_request_bytes=config.max_request_bytes,
            max_large_requests=config.max_large_requests,
            large_request_timeout_s=config.large_request_timeout_s,
        )
        self._grpc = gateway_server(
            [RequestReader(self._reading)], max_request_bytes=config.max_request_bytes
        )
        service = HttpService(self._proxy, self._routes, self._statistics, self._reading)
        self._http = HttpListener(service.application(), shutdown_timeout_s=_SHUTDOWN_GRACE_S)
        self.grpc_address = config.grpc_address
        self.http_address = config.http_address

    async def start(self) -> None:
        """Listen; afterwards both addresses carry the real port where 0 was asked for.

        Raises:
            InvalidRequest: an address cannot be listened on.
        """
        add_GRPCInferenceServiceServicer_to_server(
            GrpcService(
                self._proxy,
                self._routes,
                self._statistics,
                max_stream_requests=self._config.max_stream_requests,
            ),
            self._grpc,
        )
        self._grpc.add_generic_rpc_handlers((health_handler(self._routes),))
        port = listen(self._grpc, self._config.grpc_address, setting="grpc_address")
        self.grpc_address = with_port(self._config.grpc_address, port)
        await self._grpc.start()
        host, port = split_address(self._config.http_address)
        self.http_address = with_port(self._config.http_address, await self._http.start(host, port))
        self._reading.start()

    async def run(self) -> None:
        """Follow the scheduler and watch the replicas until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._link.run(), name="follow the scheduler")
            tasks.create_task(self._silence.run(), name="watch for silence")

    async def stop(self) -> None:
        # Both at once: each waits for its own clients.
        await asyncio.gather(self._http.stop(), self._grpc.stop(_SHUTDOWN_GRACE_S))
        await self._reading.stop()
        await self._upstream.close()
        await self._scheduler.close(grace=None)


async def run(config: GatewayConfig) -> None:
    """Serve until cancelled.

    Raises:
        InvalidRequest: an address cannot be listened on, or the token file cannot be read.
    """
    token = read_token(config.token_file, os.environ)
    name = config.name or f"{socket.gethostname()}-{os.getpid()}"
    gateway = Gateway(config, name=name, token=token)
    try:
        await gateway.start()
        logger.info(
            "Gateway %s: gRPC %s, HTTP %s", name, gateway.grpc_address, gateway.http_address
        )
        await gateway.run()
    finally:
        await gateway.stop()


def main(argv: Sequence[str]) -> int:
    """Run a gateway of its own until SIGTERM or SIGINT.

    Raises:
        InvalidRequest: the settings are wrong.
    """
    return run_daemon(GatewayConfig, run, argv, program="paraserve gateway")
