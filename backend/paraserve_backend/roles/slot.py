"""Role `slot`: a process that has imported everything and waits to be bound as another role.

Binding builds the role with the code of a fresh load; unbinding leaves nothing of it. The agent
decides what happens to a slot whose binding failed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from paraserve_backend.errors import AlreadyExists, InvalidRequest, NotFound
from paraserve_backend.protocol.forward_codec import forget_settings
from paraserve_backend.protocol.names import (
    SLOT_ROLE,
    EngineName,
    SlotKind,
    deployment_of,
    fetch_id,
)
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
    LinkConfig,
    RoleConfig,
    SlotConfig,
    StageConfig,
    read_parameters,
)
from paraserve_backend.protocol.run_dir import RunDir

#: Nice value.
_LOWEST_PRIORITY = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotCommand:
    #: Parameters of the model to become; `None`: become nothing.
    bind: Mapping[str, str] | None


def read_slot_command(command: str | None) -> SlotCommand | None:
    """Read `{"bind": {parameters}}` or `{"unbind": true}`; `None` where it is neither."""
    if command is None:
        return None
    try:
        parsed = json.loads(command)
    except ValueError:
        return None
    match parsed:
        case {"bind": dict(parameters)}:
            return SlotCommand(bind={str(key): str(value) for key, value in parameters.items()})
        case {"unbind": True}:
            return SlotCommand(bind=None)
        case _:
            return None


class Closable(Protocol):
    def close(self) -> None: ...


Bound = TypeVar("Bound", bound=Closable)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binding(Generic[Bound]):
    replica: str
    role: Bound


class SlotRole(Generic[Bound]):
    """One slot; `build` makes what serves a role. May be used by several threads."""

    def __init__(self, config: SlotConfig, build: Callable[[RoleConfig], Bound]) -> None:
        self._config = config
        self._build = build
        self._binding: _Binding[Bound] | None = None
        #: Held while the slot changes, which may take as long as a load does.
        self._changing = threading.Lock()
        #: Held while the role is used: it is not closed meanwhile.
        self._using = threading.Lock()

    def bind(self, parameters: Mapping[str, str]) -> None:
        """Become the model whose config.pbtxt has these parameters; returns when it is ready.

        Raises:
            InvalidRequest: it does not belong into this slot.
            AlreadyExists: the slot is bound.
            ParaServeError: why the model could not be loaded.
        """
        config = read_parameters(parameters)
        _check(self._config, config, Path(parameters.get("key_file") or "/"))
        with self._changing:
            if self._binding is not None:
                raise AlreadyExists(f"This slot is {self._binding.replica} already.")
            self._binding = _Binding(replica=config.replica, role=self._build(config))

    def unbind(self) -> None:
        """Close the role and forget it; returns when its memory is free. Idle is no error."""
        with self._changing:
            with self._using:
                binding, self._binding = self._binding, None
            if binding is not None:
                binding.role.close()
                del binding
                _free_memory(self._config)

    @contextmanager
    def use(self, replica: str | None) -> Iterator[Bound]:
        """Lend the role to a request that is meant for `replica`.

        Raises:
            NotFound: the slot is idle, or another replica by now.
        """
        with self._using:
            if self._binding is None or self._binding.replica != replica:
                raise NotFound(f"Replica {replica or '(none named)'} is not here.")
            yield self._binding.role


def import_all(config: SlotConfig) -> None:
    """Import what the slot's role needs, and initialise its device."""
    at_low_priority(lambda: _import(config))


def at_low_priority(work: Callable[[], None]) -> None:
    """Do what nobody waits for: what serves on this machine goes first."""

    def yield_processor() -> None:
        # On Linux a thread has a priority of its own. It may not be allowed to raise it again, so
        # it must not be one that serves later.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)

    with ThreadPoolExecutor(1, initializer=yield_processor) as thread:
        thread.submit(work).result()


def _import(config: SlotConfig) -> None:
    if config.kind is SlotKind.LINK:
        import paraserve_backend.roles.link

        return
    import paraserve_backend.roles.generate
    import paraserve_backend.roles.stage  # noqa: F401
    from paraserve_backend.engines.native.model.device import warm_up

    warm_up(config.device)


def _check(slot: SlotConfig, config: RoleConfig, key_file: Path) -> None:
    """Refuse what the agent of this slot cannot have meant."""
    role = SLOT_ROLE[slot.kind]
    expected = {"generate": GenerateConfig, "stage": StageConfig, "link": LinkConfig}[role]
    if not isinstance(config, expected):
        raise InvalidRequest(f"This slot takes models of role {role} only.")
    if not deployment_of(config.replica) or Path(config.replica).name != config.replica:
        raise InvalidRequest(f"This slot takes replicas only; {config.replica!r} is none.")
    if key_file != RunDir(slot.run_dir).key_file(config.replica):
        raise InvalidRequest("This slot takes a replica with its own key in its own run_dir only.")
    if isinstance(config, LinkConfig):
        return
    if config.weights.source is not None or config.weights.run_dir != slot.run_dir:
        raise InvalidRequest("This slot takes models with weights in its own run_dir only.")
    if not _is_fetch_of(config.weights.fetch_id or "", config.replica):
        raise InvalidRequest("This slot takes a replica with its own fetch only.")
    if config.device != slot.device:
        raise InvalidRequest(f"This slot takes models on {slot.device} only.")
    if isinstance(config, GenerateConfig) and config.engine != EngineName.PARASERVE:
        raise InvalidRequest(f"This slot takes models of engine {EngineName.PARASERVE} only.")


def _is_fetch_of(fetch: str, replica: str) -> bool:
    stage = fetch.rpartition(".")[2]
    return stage.isdecimal() and fetch == fetch_id(replica, int(stage))


def _free_memory(config: SlotConfig) -> None:
    forget_settings()
    gc.collect()
    if config.kind is not SlotKind.LINK:
        from paraserve_backend.engines.native.model.device import release_memory

        release_memory(config.device)
    # What was freed goes back to the kernel, so that it holds nothing of one who was here.
    ctypes.CDLL(None).malloc_trim(0)
