"""A Triton and a process table in memory that behave like the real ones, as far as agents see."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from paraserve_backend.errors import InvalidRequest, ParaServeError, Unavailable
from paraserve_backend.tritonserver.host.client import ModelState
from paraserve_backend.tritonserver.host.stubs import Stub


class FakeProcesses:
    """`Stubs` whose processes a `FakeTriton` starts and ends."""

    def __init__(self) -> None:
        self.alive: dict[int, Stub] = {}
        self.killed: list[str] = []
        self.cleaned: list[str] = []
        self.unkillable = False
        self._pids = count(100)

    def start(self, model: str) -> None:
        pid = next(self._pids)
        self.alive[pid] = Stub(pid=pid, model=model, shm_region=Path(f"/shm/{pid}"))

    def end(self, model: str) -> None:
        self.alive = {pid: stub for pid, stub in self.alive.items() if stub.model != model}

    def find(self) -> tuple[Stub, ...]:
        return tuple(self.alive.values())

    def kill(self, stub: Stub) -> None:
        self.killed.append(stub.model)
        if not self.unkillable:
            self.alive.pop(stub.pid, None)

    def private_bytes(self, _stub: Stub) -> int:
        return 1000

    def remove_leftovers(self, stubs: Iterable[Stub]) -> None:
        self.cleaned += [stub.model for stub in stubs]


class FakeTriton:
    """`Triton` over a repository folder: loads what lies there, one process per model.

    An unload waits for a load of the same model and answers while the model is UNLOADING; it is
    gone a little later, or never if it is in `hung`.
    """

    def __init__(self, repository: Path, processes: FakeProcesses) -> None:
        self.processes = processes
        self.is_up = True
        #: Loads of these models, and commands to them, wait until their event is set.
        self.gates: dict[str, asyncio.Event] = {}
        self.load_errors: dict[str, ParaServeError] = {}
        #: Models whose load answers with this error although it goes on.
        self.late: dict[str, ParaServeError] = {}
        self.hung: set[str] = set()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        #: (model, command) as they came.
        self.commands: list[tuple[str, str]] = []
        #: What the next command is answered with instead.
        self.command_error: ParaServeError | None = None
        self._repository = repository
        self._states: dict[str, ModelState] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def live(self) -> bool:
        return self.is_up

    async def load(self, model: str) -> None:
        self._require_up()
        self.loads.append(model)
        # A caller that gives up does not end a load.
        loading = asyncio.ensure_future(self._load(model))
        if model in self.late:
            await asyncio.sleep(0)  # the load is under way
            raise self.late[model]
        await asyncio.shield(loading)

    async def unload(self, model: str) -> None:
        self._require_up()
        self.unloads.append(model)
        async with self._lock(model):
            if self._states.get(model) is ModelState.READY:
                self._states[model] = ModelState.UNLOADING
                asyncio.get_running_loop().call_soon(self._finish_unload, model)

    async def states(self) -> dict[str, ModelState]:
        self._require_up()
        return dict(self._states)

    async def command(
        self, model: str, command: str, *, replica: str = "", timeout_s: float | None = 5
    ) -> None:
        self._require_up()
        self.commands.append((model, command))
        async with asyncio.timeout(timeout_s):
            if model in self.gates:
                await self.gates[model].wait()
        if self.command_error is not None:
            raise self.command_error

    def _finish_unload(self, model: str) -> None:
        if model not in self.hung:
            self._states[model] = ModelState.UNAVAILABLE
            self.processes.end(model)

    async def _load(self, model: str) -> None:
        if not (self._repository / model).is_dir():
            raise InvalidRequest(f"failed to poll {model} from model repository")
        async with self._lock(model):
            if self._states.get(model) is ModelState.READY:
                return
            self._states[model] = ModelState.LOADING
            if model in self.gates:
                await self.gates[model].wait()
            self._finish_load(model)

    def _finish_load(self, model: str) -> None:
        error = self.load_errors.get(model)
        if error is not None:
            self._states[model] = ModelState.UNAVAILABLE
            raise error
        self._states[model] = ModelState.READY
        self.processes.start(model)

    def _require_up(self) -> None:
        if not self.is_up:
            raise Unavailable("Triton does not answer.")

    def _lock(self, model: str) -> asyncio.Lock:
        return self._locks.setdefault(model, asyncio.Lock())
