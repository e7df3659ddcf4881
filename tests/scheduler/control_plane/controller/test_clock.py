from __future__ import annotations

import asyncio
import time

from paraserve_scheduler.control_plane.controller.clock import SystemClock


async def test_a_wait_says_how_late_it_ends() -> None:
    # As if the whole process had been stopped for that time.
    asyncio.get_running_loop().call_soon(time.sleep, 0.2)
    assert await SystemClock().wait(asyncio.Event(), 0.01) >= 0.15


async def test_a_wait_that_an_event_ends_is_not_late() -> None:
    event = asyncio.Event()
    event.set()
    assert await SystemClock().wait(event, 3600) == 0.0
