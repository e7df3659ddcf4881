from __future__ import annotations

import asyncio
import time

from paraserve_scheduler.control_plane.controller.clock import SystemClock


def test_a_wait_says_how_late_it_ends() -> None:
    async def waits(blocked_s: float) -> float:
        # As if the whole process had been stopped for that time.
        asyncio.get_running_loop().call_soon(time.sleep, blocked_s)
        return await SystemClock().wait(asyncio.Event(), 0.01)

    assert asyncio.run(waits(0.2)) >= 0.15


def test_a_wait_that_an_event_ends_is_not_late() -> None:
    async def waits() -> float:
        event = asyncio.Event()
        event.set()
        return await SystemClock().wait(event, 3600)

    assert asyncio.run(waits()) == 0.0
