"""Looks at Triton and at the models' processes, and tells parts and slots what it found.

It restarts nothing: a failed part is replaced by the scheduler, a failed slot by `agent.slots`.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.agent.slots import Slots
from paraserve_backend.tritonserver.host.client import Triton
from paraserve_backend.tritonserver.host.stubs import Stubs

logger = logging.getLogger(__name__)


class Watchdog:
    """Checks every `interval_s`. `changed` is set when Triton comes or goes."""

    def __init__(
        self,
        *,
        triton: Triton,
        stubs: Stubs,
        parts: Parts,
        slots: Slots,
        changed: asyncio.Event,
        interval_s: float,
    ) -> None:
        self._triton = triton
        self._stubs = stubs
        self._parts = parts
        self._slots = slots
        self._changed = changed
        self._interval_s = interval_s
        #: None before the first look.
        self._triton_live: bool | None = None

    @property
    def triton_live(self) -> bool:
        return self._triton_live is True

    async def run(self) -> NoReturn:
        while True:
            await self.check()
            await asyncio.sleep(self._interval_s)

    async def check(self) -> None:
        """Look once. Triton is asked at the same time, so that its silence delays nothing."""
        live, found = await asyncio.gather(self._triton.live(), asyncio.to_thread(self._stubs.find))
        if live != self._triton_live:
            logger.info("triton live=%s", live)
            self._triton_live = live
            self._changed.set()
        self._parts.observe(found, triton_live=live)
        self._slots.observe(found)
