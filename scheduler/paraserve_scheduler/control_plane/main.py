"""The scheduler process: store, controller and service, and a gateway unless told otherwise."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence

from paraserve_backend.daemon.process import run_daemon
from paraserve_backend.daemon.settings import read_token
from paraserve_backend.rpc.auth import require_loopback
from paraserve_backend.rpc.channels import cluster_server, listen
from paraserve_backend.rpc.paraserve_pb2_grpc import add_SchedulerServicer_to_server
from paraserve_scheduler.control_plane.api.service import SchedulerService
from paraserve_scheduler.control_plane.config import SchedulerConfig
from paraserve_scheduler.control_plane.controller.agents import GrpcAgents
from paraserve_scheduler.control_plane.controller.clock import SystemClock
from paraserve_scheduler.control_plane.controller.loop import Controller
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.store.sqlite import SqliteStore

logger = logging.getLogger(__name__)


async def run(config: SchedulerConfig) -> None:
    """Serve until cancelled. Replicas go on serving then; the next scheduler takes them over.

    Raises:
        InvalidRequest: a setting is wrong, or the address or the state file is taken.
    """
    token = read_token(config.token_file, os.environ)
    require_loopback(config.listen, token)
    find_policy(config.policy.name)
    server = cluster_server(token)
    port = listen(server, config.listen)
    agents = GrpcAgents(token)
    with contextlib.closing(SqliteStore(config.state_file)) as store:
        controller = Controller(store=store, agents=agents, clock=SystemClock(), config=config)
        add_SchedulerServicer_to_server(SchedulerService(controller, config), server)
        await server.start()
        logger.info(
            "Scheduler on port %d, state in %s: %d deployments, %d replicas to take over",
            port,
            config.state_file,
            len(controller.view.deployments),
            len(controller.view.live_replicas()),
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(controller.run(), name="controller")
                if config.with_gateway:
                    tasks.create_task(_run_gateway(config, port), name="gateway")
        finally:
            await server.stop(grace=None)
            await agents.close()


def main(argv: Sequence[str]) -> int:
    """Run the scheduler until SIGTERM or SIGINT.

    Raises:
        InvalidRequest: see `run`.
    """
    return run_daemon(SchedulerConfig, run, argv, program="paraserve scheduler")


async def _run_gateway(config: SchedulerConfig, port: int) -> None:
    # A scheduler without a gateway needs none of its packages.
    from paraserve_scheduler.gateway.server import run as run_gateway

    own = GatewayConfig(scheduler_address=f"127.0.0.1:{port}", token_file=config.token_file)
    await run_gateway(config.gateway or own)
