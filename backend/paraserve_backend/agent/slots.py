"""The node's runtime slots: which exist, when they are loaded and removed, and which a part gets.

Slots are loaded in quiet moments only. Their model configuration is in
`tritonserver.host.model_config`; what a slot does when it is bound is in `roles.slot`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count
from typing import NoReturn

from paraserve_backend.agent.run_files import RunFiles
from paraserve_backend.daemon.tasks import finish_all, in_thread
from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.names import slot_model
from paraserve_backend.tritonserver.host.model_config import SlotPlace, places, slot_files
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.stubs import Stub
from paraserve_backend.tritonserver.host.unloader import Unloader

logger = logging.getLogger(__name__)

#: New slots are loaded so long after a cold start, when the requests that waited for it are served:
#: importing torch takes a core for seconds.
_QUIET_S = 5.0
#: How long nothing is loaded after a load has failed.
_RETRY_S = 10.0
#: For the end of a process that has nothing to finish, and of one that did not let go.
_END_S = 5.0
_LAST_S = 1.0
_LOOK_S = 0.5
#: The first look that misses a process may be older than it.
_MISSED = 2


class SlotState(Enum):
    LOADING = auto()
    IDLE = auto()
    #: Of a part: being bound, bound, or being unbound.
    TAKEN = auto()
    #: Nobody's any more: it is to be ended.
    BROKEN = auto()


@dataclass(slots=True, kw_only=True, eq=False)
class Slot:
    #: Of its Triton model.
    name: str
    place: SlotPlace
    state: SlotState = SlotState.LOADING
    #: Whether it would take an unbind.
    is_bound: bool = False
    #: Its process, once it has one.
    stub: Stub | None = None
    #: In how many looks in a row it was not there.
    num_missed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLimits:
    run_dir: str
    #: A set of slots is a front and a stage on each of these, and a link.
    devices: Sequence[str]
    most_idle_sets: int


class Slots:
    """Lives on the event loop. `now_s` is monotonic; `changed` tells of another number of sets."""

    def __init__(
        self,
        repository: ModelRepository,
        unloader: Unloader,
        run_files: RunFiles,
        limits: SlotLimits,
        *,
        changed: Callable[[], None],
        now_s: Callable[[], float],
    ) -> None:
        self._repository = repository
        self._unloader = unloader
        self._run_files = run_files
        self._limits = limits
        self._places = places(limits.devices)
        self._changed = changed
        self._now_s = now_s
        self._slots: dict[str, Slot] = {}
        self._numbers = count()
        self._wanted_sets = 0
        self._num_cold_starts = 0
        #: Nothing is loaded before.
        self._load_from_s = now_s()
        self._wake = asyncio.Event()

    # ---- for the scheduler ----

    @property
    def idle_sets(self) -> int:
        """How many parts of each kind could be bound now."""
        idle = Counter(slot.place for slot in self._in(SlotState.IDLE))
        return min(idle[place] for place in self._places)

    def keep(self, idle_sets: int) -> None:
        """Have so many idle sets, but no more than the node's setting, as soon as it is quiet."""
        self._wanted_sets = min(idle_sets, self._limits.most_idle_sets)
        self._wake.set()

    async def idle_bytes(self) -> int:
        """Return the memory that idle slots hold."""
        idle = [slot.stub for slot in self._in(SlotState.IDLE) if slot.stub is not None]
        return sum(await in_thread(lambda: [*map(self._unloader.stubs.private_bytes, idle)]))

    # ---- for parts ----

    @contextmanager
    def cold_start(self) -> Iterator[None]:
        """Keep the node quiet for a part that starts."""
        self._num_cold_starts += 1
        try:
            yield
        finally:
            self._num_cold_starts -= 1
            self._wait(_QUIET_S)

    def take(self, place: SlotPlace) -> Slot | None:
        """Return an idle slot that is the caller's until it is released; `None`: there is none."""
        slot = next((idle for idle in self._in(SlotState.IDLE) if idle.place == place), None)
        if slot is not None:
            slot.state = SlotState.TAKEN
            self._changed()
        return slot

    async def bind(self, slot: Slot, replica: str, parameters: Mapping[str, str]) -> None:
        """Have a slot become a model; returns when that is ready.

        Raises:
            ParaServeError: why it failed.
        """
        await in_thread(lambda: self._run_files.forget_pulse(slot.name))
        command = self._unloader.triton.command(
            slot.name,
            json.dumps({"bind": dict(parameters)}),
            secret=self._run_files.secret(slot.name),
            replica=replica,
            timeout_s=None,
        )
        # Triton may never let go of a cancelled request: it goes on, and its part ends the slot.
        binding = asyncio.ensure_future(command)
        binding.add_done_callback(_seen)
        await asyncio.shield(binding)
        slot.is_bound = True

    async def release(self, slot: Slot, deadline_s: float) -> None:
        """Take a slot back; returns when nothing of what it was is in memory.

        A slot that could not be bound, or does not let go in time, is ended.

        Raises:
            DeadlineExceeded: its process survived; try again.
        """
        is_alive = slot.is_bound and await self._stub(slot.name) is not None
        if is_alive and await self._unbind(slot, deadline_s):
            slot.is_bound = False
            slot.state = SlotState.IDLE
            self._changed()
        else:
            # It stays taken: nobody else may end it at the same time.
            await self._end(slot, _LAST_S if slot.is_bound else deadline_s)
        self._wake.set()

    # ---- for the node ----

    @property
    def triton_models(self) -> frozenset[str]:
        return frozenset(self._slots)

    @property
    def loading_models(self) -> frozenset[str]:
        """Those that Triton is loading."""
        return frozenset(slot.name for slot in self._in(SlotState.LOADING))

    def observe(self, found: Iterable[Stub]) -> None:
        """Compare with the processes that live now."""
        alive = {stub.model for stub in found}
        for slot in self._in(SlotState.IDLE):
            slot.num_missed = 0 if slot.name in alive else slot.num_missed + 1
            if slot.num_missed == _MISSED:
                logger.warning("slot lost name=%s", slot.name)
                slot.state = SlotState.BROKEN
                self._changed()
                self._wake.set()

    async def run(self) -> NoReturn:
        """Load and remove slots as they are wanted."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._wake.wait()
            self._wake.clear()
            await self.tend()

    async def tend(self) -> None:
        """End what is broken or too many, and load what is missing if it is quiet."""
        try:
            await finish_all(*(self._end(slot, _END_S) for slot in self._surplus()))
            # One after the other: what serves, and a start that comes, have the other cores.
            while missing := self._missing():
                await self._load(missing[0])
        except Exception as error:  # the monitor of slots: without them parts are served, too
            is_bug = not isinstance(error, ParaServeError)
            logger.warning("slots failed reason=%s", error, exc_info=is_bug)
            self._wait(_RETRY_S)

    async def remove_all(self) -> None:
        """End all slots; those of parts must be released before."""
        self._wanted_sets = 0
        ended = await asyncio.gather(
            *(self._end(slot, _END_S) for slot in self._slots.values()), return_exceptions=True
        )
        for error in ended:
            if error is not None:
                logger.error("a slot could not be ended reason=%s", error)

    def _in(self, state: SlotState) -> list[Slot]:
        return [slot for slot in self._slots.values() if slot.state is state]

    def _wait(self, pause_s: float) -> None:
        self._load_from_s = max(self._load_from_s, self._now_s() + pause_s)

    def _surplus(self) -> list[Slot]:
        surplus = self._in(SlotState.BROKEN)
        for place in self._places:
            idle = [slot for slot in self._in(SlotState.IDLE) if slot.place == place]
            surplus += idle[self._wanted_sets :]
        for slot in surplus:
            slot.state = SlotState.BROKEN
        return surplus

    def _missing(self) -> list[SlotPlace]:
        if self._num_cold_starts or self._now_s() < self._load_from_s:
            return []
        idle = Counter(slot.place for slot in self._in(SlotState.IDLE))
        return [place for place in self._places for _ in range(self._wanted_sets - idle[place])]

    async def _load(self, place: SlotPlace) -> None:
        name = slot_model(next(self._numbers), place.kind)
        slot = self._slots[name] = Slot(name=name, place=place)
        files = slot_files(name, place, self._limits.run_dir)
        try:
            await in_thread(lambda: self._run_files.prepare(name))
            await in_thread(lambda: self._repository.write(name, files))
            await self._unloader.triton.load(name)
            slot.stub = await self._stub(name)
        except (ParaServeError, asyncio.CancelledError):
            slot.state = SlotState.BROKEN
            raise
        logger.info("slot ready name=%s", name)
        slot.state = SlotState.IDLE
        self._changed()

    async def _stub(self, name: str) -> Stub | None:
        found = await in_thread(self._unloader.stubs.find)
        return next((stub for stub in found if stub.model == name), None)

    async def _unbind(self, slot: Slot, deadline_s: float) -> bool:
        command = json.dumps({"unbind": True})
        try:
            await self._unloader.triton.command(
                slot.name,
                command,
                secret=self._run_files.secret(slot.name),
                timeout_s=deadline_s,
            )
        except (ParaServeError, TimeoutError) as error:
            logger.warning("unbind failed slot=%s reason=%r", slot.name, error)
            return False
        return True

    def _remove_files(self, name: str) -> None:
        self._repository.remove(name)
        self._run_files.remove(name)

    async def _end(self, slot: Slot, deadline_s: float) -> None:
        seen = [slot.stub] if slot.stub else []
        await self._unloader.unload([[slot.name]], deadline_s, seen)
        self._unloader.stubs.remove_leftovers(seen)
        await in_thread(lambda: self._remove_files(slot.name))
        self._slots.pop(slot.name, None)
        self._changed()


def _seen(binding: asyncio.Future[None]) -> None:
    """Take note of a result for which nobody may wait any more."""
    if not binding.cancelled() and (error := binding.exception()) is not None:
        logger.info("a bind ended reason=%s", error)
