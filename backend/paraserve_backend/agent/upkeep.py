"""Looks after the disk tier while no fetch needs the disk, slowly enough to disturb nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.daemon.tasks import in_thread
from paraserve_backend.weights.tiers.disk_format import EXTENT_BYTES

#: No faster than this, nor than half of what the disk can do.
_WRITE_BYTES_PER_S = 200e6
#: Between two reads of what is there: 100 GB are looked at about once in seven hours.
_IDLE_S = 2.0
#: A start that has its bytes still has to come up, with all the processor time there is.
_QUIET_S = 5.0


class Upkeep:
    """`is_fetching` says whether it should wait."""

    def __init__(
        self,
        work: DiskUpkeep,
        is_fetching: Callable[[], bool],
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._is_fetching = is_fetching
        self._now = now
        self._quiet_since_s = now()

    async def run(self) -> NoReturn:
        while True:
            await asyncio.sleep(await self.step())

    async def step(self) -> float:
        """Do a little, if nothing is in the way; returns how long to wait then."""
        started_s = self._now()
        if self._is_fetching():
            self._quiet_since_s = started_s
        if started_s - self._quiet_since_s < _QUIET_S:
            return _IDLE_S
        if await in_thread(self._work.write_next):
            return max(self._now() - started_s, EXTENT_BYTES / _WRITE_BYTES_PER_S)
        await in_thread(self._work.verify_next)
        return _IDLE_S
