"""The Triton models and channel keys of one part: bound to slots or loaded, and removed again.

When a part has failed is decided in `agent.parts.life`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from itertools import groupby

from paraserve_backend.agent.fetches import Fetches
from paraserve_backend.agent.parts.progress import PartProgress
from paraserve_backend.agent.run_files import RunFiles
from paraserve_backend.agent.slots import Slot, Slots
from paraserve_backend.channel.keys import KeyStore
from paraserve_backend.daemon.tasks import finish_all, in_thread
from paraserve_backend.errors import DeadlineExceeded, Unavailable
from paraserve_backend.protocol.names import Role
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import SpanName
from paraserve_backend.tritonserver.host.client import ModelState
from paraserve_backend.tritonserver.host.model_config import (
    own_parameters,
    slotted_model,
    with_steps,
)
from paraserve_backend.tritonserver.host.repository import ModelRepository
from paraserve_backend.tritonserver.host.stubs import Stub
from paraserve_backend.tritonserver.host.unloader import Unloader

logger = logging.getLogger(__name__)

_POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeContext:
    """What the parts of one node share. Limits are those of commands that name none."""

    run_dir: RunDir
    repository: ModelRepository
    unloader: Unloader
    fetches: Fetches
    keys: KeyStore
    run_files: RunFiles
    slots: Slots
    part_deadline_s: float
    remove_deadline_s: float
    #: Seconds since the Unix epoch.
    now: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Binding:
    slot: Slot
    parameters: Mapping[str, str]


class PartModels:
    """Lives on the event loop."""

    def __init__(self, part: pb.Part, node: NodeContext, progress: PartProgress) -> None:
        self._part = part
        self._node = node
        self._progress = progress
        self._names = frozenset(model.name for model in part.models)
        #: By model, what is one of the node's slots instead of being loaded.
        self._bindings: dict[str, _Binding] = {}
        #: Those that Triton is loading.
        self.loading: set[str] = set()

    @property
    def slots(self) -> Mapping[str, str]:
        """The slots' Triton models that stand for models of the part."""
        return {model: binding.slot.name for model, binding in self._bindings.items()}

    @property
    def triton_models(self) -> frozenset[str]:
        """Triton's names of the part's models."""
        slots = self.slots
        return frozenset(slots.get(model, model) for model in self._names)

    def name_of(self, triton_model: str) -> str:
        """Return the part's name of a Triton model, which may be a slot's."""
        names = {slot: model for model, slot in self.slots.items()}
        return names.get(triton_model, triton_model)

    @property
    def slot_stubs(self) -> frozenset[Stub]:
        """Return the processes of those slots, dead or alive."""
        stubs = (binding.slot.stub for binding in self._bindings.values())
        return frozenset(stub for stub in stubs if stub is not None)

    def stubs(self, found: Iterable[Stub]) -> frozenset[Stub]:
        """Return those processes that run the part's models."""
        models = self.triton_models
        return frozenset(stub for stub in found if stub.model in models)

    async def load(self) -> None:
        """Bind what slots there are and load the rest; returns when all models are ready.

        Raises:
            ParaServeError: why one of them is not.
            ExceptionGroup: of such errors.
        """
        self._take_slots()
        with self._progress.span(SpanName.WRITE_MODELS):
            await in_thread(self._write)
        for wave in self._waves(self._names):
            async with asyncio.TaskGroup() as group:
                for model in wave:
                    group.create_task(self._load(model))

    async def unload(self, deadline_s: float, seen: Set[Stub]) -> None:
        """Give the slots back and unload the rest; returns when no memory is held any more.

        Raises:
            DeadlineExceeded: a process survived; try again.
        """
        loaded = self._waves(self._names - self._bindings.keys())[::-1]
        await finish_all(
            self._node.unloader.unload(loaded, deadline_s, seen),
            *(self._release(model, deadline_s) for model in list(self._bindings)),
        )

    def delete(self, seen: Iterable[Stub]) -> None:
        """Delete the files of what is unloaded, and what its processes left."""
        ended = [stub for stub in seen if stub.model in self._names]
        self._node.unloader.stubs.remove_leftovers(ended)
        for model in self._names:
            self._node.repository.remove(model)
            self._node.run_files.remove(model)
        self._node.keys.remove(self._part.replica)

    def _take_slots(self) -> None:
        for model in self._part.models:
            slotted = slotted_model(model.files)
            slot = self._node.slots.take(slotted.place) if slotted is not None else None
            if slotted is not None and slot is not None:
                self._bindings[model.name] = _Binding(slot=slot, parameters=slotted.parameters)
        self._progress.use_slots(self.slots)

    def _write(self) -> None:
        if self._part.HasField("channel_keys"):
            self._node.keys.write(self._part.replica, self._part.channel_keys)
        slots = self.slots
        for model in self._part.models:
            if model.name not in slots:
                if _takes_commands(model):
                    self._node.run_files.prepare(model.name)
                else:
                    self._node.run_files.remove(model.name)
                self._node.repository.write(model.name, with_steps(model.files, slots))

    async def _load(self, model: str) -> None:
        binding = self._bindings.get(model)
        if binding is not None:
            with self._progress.span(SpanName.BIND, binding.slot.name):
                await self._node.slots.bind(binding.slot, self._part.replica, binding.parameters)
            return
        self.loading.add(model)
        try:
            with self._progress.span(SpanName.LOAD, model):
                await self._load_into_triton(model)
        finally:
            self.loading.discard(model)

    async def _load_into_triton(self, model: str) -> None:
        try:
            await self._node.unloader.triton.load(model)
        except DeadlineExceeded:
            logger.info("load goes on model=%s", model)
        await self._until_ready(model)

    async def _release(self, model: str, deadline_s: float) -> None:
        await self._node.slots.release(self._bindings[model].slot, deadline_s)
        del self._bindings[model]

    async def _until_ready(self, model: str) -> None:
        while (state := await self._state(model)) is ModelState.LOADING:
            await asyncio.sleep(_POLL_S)
        if state is not ModelState.READY:
            raise Unavailable(f"Model {model} is {state or 'absent'} after its load.")

    async def _state(self, model: str) -> ModelState:
        return (await self._node.unloader.triton.states()).get(model, ModelState.ABSENT)

    def _waves(self, names: Set[str]) -> list[list[str]]:
        """Return the models of these names, those that load first first."""
        chosen = [model for model in self._part.models if model.name in names]
        ordered = sorted(chosen, key=lambda model: model.load_wave)
        waves = groupby(ordered, key=lambda model: model.load_wave)
        return [[model.name for model in wave] for _, wave in waves]


def _takes_commands(model: pb.ModelFiles) -> bool:
    parameters = own_parameters(model.files)
    return parameters is not None and parameters.get("role") == Role.GENERATE
