"""Time for the control loop, so that tests and the simulator can replace it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds since the Unix epoch; never goes back."""

    async def wait(self, event: asyncio.Event, timeout_s: float) -> float:
        """Return when `event` is set or the time is over, and how many seconds late that is."""


class SystemClock:
    def __init__(self) -> None:
        # A corrected system clock must not make every node look lost.
        self._epoch_s = time.time() - time.monotonic()

    def now_s(self) -> float:
        return self._epoch_s + time.monotonic()

    async def wait(self, event: asyncio.Event, timeout_s: float) -> float:
        deadline_s = self.now_s() + timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await event.wait()
        return max(0.0, self.now_s() - deadline_s)
