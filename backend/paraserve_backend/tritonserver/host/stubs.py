"""The Python processes in which Triton runs its models ("stubs"): found through /proc, and killed.

The agent must share Triton's pid namespace and the path of the model repository.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_STUB = "triton_python_backend_stub"


#: States in /proc of processes that do nothing by themselves any more: stopped by a signal, dead
#: and not collected, dead. One that a debugger has stopped for a moment (t) is none of them.
_STOPPED = frozenset("TZX")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Status:
    #: A letter; empty where the process is gone.
    state: str
    #: 0: none.
    parent: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stub:
    """One process that runs an instance of a model."""

    pid: int
    model: str
    #: Its file in /dev/shm. Triton removes it at unload, but not after the process was killed.
    shm_region: Path | None


class Stubs(Protocol):
    """What the agent needs of the machine's processes. Blocking, some milliseconds."""

    def find(self) -> tuple[Stub, ...]:
        """Return the living processes of this repository's models."""

    def stopped(self, found: Iterable[Stub]) -> frozenset[Stub]:
        """Return those that a signal has stopped, or that are dead."""

    def server_stopped(self, found: Iterable[Stub]) -> bool:
        """Say the same of the Triton that started them."""

    def kill(self, stub: Stub) -> None:
        """Kill a process; one that is gone already is no error."""

    def private_bytes(self, stub: Stub) -> int:
        """Return the memory that would be free without this process; 0 if it is gone."""

    def remove_leftovers(self, stubs: Iterable[Stub]) -> None:
        """Delete the shared memory of processes that are gone."""


class ProcessTable:
    """`Stubs` of the running machine; the folders are arguments for tests."""

    def __init__(
        self, repository: Path, *, proc: Path = Path("/proc"), shm: Path = Path("/dev/shm")
    ) -> None:
        self._repository = f"{repository}/"
        self._proc = proc
        self._shm = shm

    def find(self) -> tuple[Stub, ...]:
        pids = [int(entry.name) for entry in os.scandir(self._proc) if entry.name.isdecimal()]
        return tuple(stub for pid in pids if (stub := self._stub(pid)) is not None)

    def stopped(self, found: Iterable[Stub]) -> frozenset[Stub]:
        return frozenset(stub for stub in found if self._status(stub.pid).state in _STOPPED)

    def server_stopped(self, found: Iterable[Stub]) -> bool:
        servers = {self._status(stub.pid).parent for stub in found}
        return any(self._status(server).state in _STOPPED for server in servers if server)

    def kill(self, stub: Stub) -> None:
        if self._stub(stub.pid) != stub:
            return  # the number is another process's by now
        try:
            os.kill(stub.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def private_bytes(self, stub: Stub) -> int:
        try:
            pages = (self._proc / str(stub.pid) / "statm").read_text(encoding="ascii").split()
        except (FileNotFoundError, ProcessLookupError):
            return 0
        _, resident, shared, *_ = map(int, pages)
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    def remove_leftovers(self, stubs: Iterable[Stub]) -> None:
        for stub in stubs:
            if stub.shm_region is not None:
                stub.shm_region.unlink(missing_ok=True)

    def _stub(self, pid: int) -> Stub | None:
        """Read a process; a dead one that its parent has not collected has no arguments."""
        try:
            raw = (self._proc / str(pid) / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return None
        command, *arguments = os.fsdecode(raw).split("\0")
        if Path(command).name != _STUB:
            return None
        # The stub's first argument is <repository>/<model>/<version>/model.py.
        path = next((a for a in arguments if a.startswith(self._repository)), None)
        if path is None:
            return None
        model = path.removeprefix(self._repository).partition("/")[0]
        return Stub(pid=pid, model=model, shm_region=self._region(arguments))

    def _status(self, pid: int) -> _Status:
        try:
            text = (self._proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return _Status(state="", parent=0)
        # "7 (a name that may hold anything) S 1 ...".
        state, parent, *_ = text.rpartition(")")[2].split()
        return _Status(state=state, parent=int(parent))

    def _region(self, arguments: list[str]) -> Path | None:
        names = [name for name in arguments if name and "/" not in name]
        return next((self._shm / name for name in names if (self._shm / name).is_file()), None)
