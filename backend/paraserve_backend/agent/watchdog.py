"""Looks at Triton and at the models' processes, and tells parts and slots what it found.

It restarts nothing: a failed part is replaced by the scheduler, a failed slot by `agent.slots`. A
process that is alive but does nothing is killed: it would hold its memory and its requests for
ever. Who that is, `agent.liveness` judges.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from dataclasses import dataclass, replace
from typing import NoReturn

from paraserve_backend.agent.liveness import Answers, Punctuality, Standstills, Stops
from paraserve_backend.agent.parts.registry import Parts
from paraserve_backend.agent.run_files import RunFiles
from paraserve_backend.agent.slots import Slots
from paraserve_backend.tritonserver.host.client import Triton
from paraserve_backend.tritonserver.host.stubs import Stub, Stubs

logger = logging.getLogger(__name__)

#: How long Triton may take to notice that a process has loaded.
_STUCK_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchLimits:
    interval_s: float
    #: Of a generate loop.
    silence_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What one look has found, of whatever model."""

    at_s: float
    found: frozenset[Stub]
    stopped: frozenset[Stub]
    pulses: Mapping[Stub, int]
    loaded: frozenset[Stub]
    server_stopped: bool

    def of(self, *, ours: Set[str], serving: Set[str], loading: Set[str]) -> _Look:
        """Return what concerns our models: pulses of those that serve, and loads under way."""
        return replace(
            self,
            found=frozenset(stub for stub in self.found if stub.model in ours),
            stopped=frozenset(stub for stub in self.stopped if stub.model in ours),
            pulses={stub: pulse for stub, pulse in self.pulses.items() if stub.model in serving},
            loaded=frozenset(stub for stub in self.loaded if stub.model in loading),
        )


class Watchdog:
    """`changed` is set when Triton comes or goes. `now_s` is monotonic."""

    def __init__(
        self,
        *,
        triton: Triton,
        stubs: Stubs,
        run_files: RunFiles,
        parts: Parts,
        slots: Slots,
        changed: asyncio.Event,
        limits: WatchLimits,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._triton = triton
        self._stubs = stubs
        self._run_files = run_files
        self._parts = parts
        self._slots = slots
        self._changed = changed
        self._limits = limits
        self._now_s = now_s
        self._punctuality = Punctuality(limits.interval_s)
        self._stops = Stops[Stub]()
        self._server_stops = Stops[str]()
        self._silences = Standstills[Stub](interval_s=limits.interval_s, limit_s=limits.silence_s)
        self._stuck_loads = Standstills[Stub](interval_s=limits.interval_s, limit_s=_STUCK_S)
        self._answers = Answers()
        self._asking = asyncio.Lock()
        self._is_server_stopped = False
        self._triton_live: bool | None = None
        #: What was alive at the last look.
        self._alive: frozenset[Stub] = frozenset()

    @property
    def triton_live(self) -> bool:
        return self._triton_live is True

    async def run(self) -> None:
        """Look and ask until cancelled. A Triton that does not answer delays no look."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self.look))
            group.create_task(self._repeat(self.ask))

    async def look(self) -> None:
        """Look at all processes once, and tell what is gone or may as well be."""
        everything = await asyncio.to_thread(self._look)
        if self._alive - everything.found:
            # A process that died with its Triton is told from one that died alone. Others may have
            # come while Triton was asked.
            await self.ask()
            everything = await asyncio.to_thread(self._look)
        # By what is there now: a part that has come meanwhile must not miss its processes.
        seen = everything.of(
            ours=self._parts.triton_models | self._slots.triton_models,
            serving=self._parts.serving_models,
            loading=self._parts.loading_models | self._slots.loading_models,
        )
        on_time = self._punctuality.look(seen.at_s)
        stopped = self._stops.after(seen.stopped)
        silent = self._silences.after(seen.pulses, on_time=on_time)
        self._is_server_stopped = bool(
            self._server_stops.after(frozenset({"server"} if seen.server_stopped else ()))
        )
        self._judge_triton()
        # Triton 2.51 gives a load up for whose process it has waited in vain for a second, and then
        # waits for the end of that process, which waits for Triton.
        stuck = self._stuck_loads.after(dict.fromkeys(seen.loaded, 0), on_time=on_time)
        hung = stopped | silent | stuck
        alive = seen.found - hung
        self._alive = alive
        hung_models = frozenset(stub.model for stub in hung)
        self._parts.observe(alive, hung=hung_models, triton_live=self.triton_live)
        self._slots.observe(alive)
        self._kill(hung)

    async def ask(self) -> None:
        """Ask Triton once whether it is live."""
        async with self._asking:
            num_late = self._punctuality.num_late
            answer = await self._triton.live()
            was_late = self._punctuality.num_late > num_late or self._punctuality.is_overdue(
                self._now_s()
            )
            self._answers.after(answer, on_time=not was_late)
            self._judge_triton()

    def _judge_triton(self) -> None:
        live = False if self._is_server_stopped else self._answers.live
        if live != self._triton_live:
            logger.info("triton live=%s", live)
            self._triton_live = live
            self._changed.set()

    def _look(self) -> _Look:
        found = frozenset(self._stubs.find())
        pulses = ((stub, self._run_files.pulse(stub.model)) for stub in found)
        return _Look(
            at_s=self._now_s(),
            found=found,
            stopped=self._stubs.stopped(found),
            pulses={stub: pulse for stub, pulse in pulses if pulse is not None},
            loaded=frozenset(stub for stub in found if self._run_files.has_loaded(stub.model)),
            server_stopped=self._stubs.server_stopped(found),
        )

    def _kill(self, hung: Iterable[Stub]) -> None:
        for stub in hung:
            logger.warning("kill pid=%d model=%s: it does nothing", stub.pid, stub.model)
            self._stubs.kill(stub)

    async def _repeat(self, step: Callable[[], Awaitable[None]]) -> NoReturn:
        """Begin `step` every interval, or as soon as the one before has ended."""
        while True:
            due_s = self._now_s() + self._limits.interval_s
            await step()
            await asyncio.sleep(max(0.0, due_s - self._now_s()))
