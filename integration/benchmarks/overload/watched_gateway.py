"""`paraserve gateway`, which also tells how long its event loop has stood still at worst.

    python -m integration.benchmarks.overload.watched_gateway SOCKET [settings of a gateway]

A timer task of the gateway's own loop is late by as long as anything else has held the loop.
Whoever connects to SOCKET gets the worst delay since the last one asked, in milliseconds.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from paraserve_backend.daemon.process import run_daemon
from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.gateway.server import run

_INTERVAL_S = 0.002


class LoopDelay:
    """Belongs to the loop that it watches."""

    def __init__(self) -> None:
        self._worst_s = 0.0

    async def measure(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due_s = loop.time() + _INTERVAL_S
            await asyncio.sleep(_INTERVAL_S)
            self._worst_s = max(self._worst_s, loop.time() - due_s)

    async def tell(self, _reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A pause that still lasts when it is asked for ends before this runs.
        writer.write(f"{1e3 * self._worst_s:.3f}\n".encode())
        self._worst_s = 0.0
        writer.close()


async def worst_delay_ms(socket: Path) -> float:
    """Ask a watched gateway."""
    reader, writer = await asyncio.open_unix_connection(socket)
    told = await reader.readline()
    writer.close()
    return float(told)


def main(socket: str, settings: list[str]) -> int:
    async def watched(config: GatewayConfig) -> None:
        delay = LoopDelay()
        await asyncio.start_unix_server(delay.tell, socket)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(delay.measure())
            tasks.create_task(run(config))

    return run_daemon(GatewayConfig, watched, settings, program="watched gateway")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
