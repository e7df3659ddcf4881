"""Unloads models and returns when their processes and memory are really gone.

Triton answers an unload before anything has ended, so its index and the process table are asked
until they agree. An unload during a load waits for the end of that load.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass

from paraserve_backend.errors import DeadlineExceeded, ParaServeError
from paraserve_backend.tritonserver.host.client import ModelState, Triton
from paraserve_backend.tritonserver.host.stubs import Stub, Stubs

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_GONE = (ModelState.ABSENT, ModelState.UNAVAILABLE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unloader:
    triton: Triton
    stubs: Stubs
    #: How long a killed process may take to go.
    kill_s: float = 5.0

    async def unload(
        self, waves: Sequence[Sequence[str]], deadline_s: float, seen: Iterable[Stub] = ()
    ) -> None:
        """Unload models wave after wave and return when their processes are gone.

        `seen` are processes that were seen to run the models. Those that are still there after
        `deadline_s` are killed.

        Raises:
            DeadlineExceeded: a process outlived even that.
        """
        models = [model for wave in waves for model in wave]
        with_process = {stub.model for stub in seen}
        try:
            async with asyncio.timeout(deadline_s):
                for wave in waves:
                    await asyncio.gather(*(self.triton.unload(model) for model in wave))
                while not await self._gone(models, with_process):
                    await asyncio.sleep(_POLL_S)
        except (TimeoutError, ParaServeError) as error:
            # Also where Triton is gone: its processes may have outlived it.
            logger.warning("unload models=%s failed=%r", ",".join(models), error)
            await self._kill(models)

    async def _kill(self, models: Sequence[str]) -> None:
        stubs = await self._stubs_of(models)
        for stub in stubs:
            logger.warning("kill pid=%d model=%s", stub.pid, stub.model)
            self.stubs.kill(stub)
        try:
            async with asyncio.timeout(self.kill_s):
                while await self._stubs_of(models):
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The processes of {', '.join(models)} did not end even when killed."
            ) from None
        self.stubs.remove_leftovers(stubs)

    async def _gone(self, models: Sequence[str], with_process: Set[str]) -> bool:
        if await self._stubs_of(models):
            return False
        states = await self.triton.states()
        # A model whose process died with a request in it stays UNLOADING for ever.
        return all(
            (state := states.get(model, ModelState.ABSENT)) in _GONE
            or (state is ModelState.UNLOADING and model in with_process)
            for model in models
        )

    async def _stubs_of(self, models: Sequence[str]) -> tuple[Stub, ...]:
        found = await asyncio.to_thread(self.stubs.find)
        return tuple(stub for stub in found if stub.model in models)
