"""The gateway as a process: settings, token and name from outside, then `Gateway`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Sequence

from paraserve_backend.daemon.settings import parse_arguments, read_token
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.server import Gateway

logger = logging.getLogger(__name__)


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


def main(argv: Sequence[str]) -> None:
    """Run a gateway of its own until SIGTERM or SIGINT.

    Raises:
        InvalidRequest: the settings are wrong.
    """
    config = parse_arguments(GatewayConfig, argv, program="paraserve gateway")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_run_until_signalled(config))


async def _run_until_signalled(config: GatewayConfig) -> None:
    task = asyncio.ensure_future(run(config))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    with contextlib.suppress(asyncio.CancelledError):
        await task
