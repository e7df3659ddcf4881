"""Memory of simulated nodes: what each GPU holds, which weights host memory and disk keep."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from paraserve_scheduler.planner.cost import LayerRanges, ModelShape
from paraserve_scheduler.planner.fleet import Gpu
from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.description import NodeDescription


def joined(layers: LayerRanges, start: int, end: int) -> LayerRanges:
    """Return `layers` and `[start, end)` together, disjoint and ascending."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted((*layers, (start, end))):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], high))
        else:
            merged.append((low, high))
    return tuple(merged)


class Meter:
    """Integrates GPU bytes held over time."""

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._held_bytes = 0
        self._since_s = 0.0
        self.byte_s = 0.0

    def add(self, size_bytes: int) -> None:
        now_s = self._heap.now_s
        self.byte_s += self._held_bytes * (now_s - self._since_s)
        self._since_s = now_s
        self._held_bytes += size_bytes


class GpuMemory:
    """One GPU. Slots give way to replicas; replicas never to each other."""

    def __init__(self, capacity_bytes: int, slot_bytes: int, meter: Meter) -> None:
        self.capacity_bytes = capacity_bytes
        self.reserved_bytes = 0
        self.slots = 0
        self._slot_bytes = slot_bytes
        self._meter = meter

    def reserve(self, size_bytes: int) -> None:
        assert self.reserved_bytes + size_bytes <= self.capacity_bytes, "a GPU is oversubscribed"
        self.reserved_bytes += size_bytes
        self._meter.add(size_bytes)
        self._fit_slots()

    def release(self, size_bytes: int) -> None:
        self.reserved_bytes -= size_bytes
        assert self.reserved_bytes >= 0, "more was released than reserved"
        self._meter.add(-size_bytes)

    def add_slot(self) -> None:
        self.slots += 1
        self._meter.add(self._slot_bytes)
        self._fit_slots()

    def take_slot(self) -> bool:
        """Use a slot for a stage; False if none is there."""
        if not self.slots:
            return False
        self.slots -= 1
        self._meter.add(-self._slot_bytes)
        return True

    def drop_all(self) -> None:
        """The node is lost: nothing is held any more."""
        self._meter.add(-self.reserved_bytes - self.slots * self._slot_bytes)
        self.reserved_bytes = self.slots = 0

    def _fit_slots(self) -> None:
        while self.slots and self.reserved_bytes + self.slots * self._slot_bytes > (
            self.capacity_bytes
        ):
            self.take_slot()


class Shelf:
    """Layers by weights that one tier of a node keeps; what was unused longest goes first."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._used_bytes = 0
        #: The longest unused first; layers and their bytes.
        self._kept: OrderedDict[str, tuple[LayerRanges, int]] = OrderedDict()

    def records(self) -> dict[str, LayerRanges]:
        return {weights: layers for weights, (layers, _) in self._kept.items()}

    def layers(self, weights: str) -> LayerRanges:
        return self._kept.get(weights, ((), 0))[0]

    def keep(
        self, weights: str, layers: LayerRanges, model: ModelShape
    ) -> list[tuple[str, LayerRanges]]:
        """Keep these layers too; returns what had to go. Nothing happens if they cannot fit."""
        both = self.layers(weights)
        for start, end in layers:
            both = joined(both, start, end)
        size = sum(model.bytes_of(start, end) for start, end in both)
        if size > self._capacity_bytes:
            return []
        self._used_bytes += size - self._kept.get(weights, ((), 0))[1]
        self._kept[weights] = (both, size)
        self._kept.move_to_end(weights)
        gone = []
        while self._used_bytes > self._capacity_bytes:
            name, (lost, lost_bytes) = self._kept.popitem(last=False)
            self._used_bytes -= lost_bytes
            gone.append((name, lost))
        return gone

    def used(self, weights: str) -> None:
        if weights in self._kept:
            self._kept.move_to_end(weights)

    def clear(self) -> None:
        self._kept.clear()
        self._used_bytes = 0


@dataclass(slots=True, eq=False, kw_only=True)
class NodeMemory:
    description: NodeDescription
    gpus: list[GpuMemory]
    #: Weights in host memory and on disk.
    memory: Shelf
    disk: Shelf
    is_lost: bool = False
    #: Counts changes, so that what was made of this node can be made again.
    version: int = 0
    #: Slots on their way, by GPU.
    warming: set[int] = field(default_factory=set)
    #: Shapes of what was ever kept.
    _models: dict[str, ModelShape] = field(default_factory=dict)

    @classmethod
    def of(cls, description: NodeDescription, meter: Meter) -> NodeMemory:
        """Return the memory of a node that holds nothing yet."""
        slot_bytes = description.kind.start.slot_bytes
        return cls(
            description=description,
            gpus=[GpuMemory(size, slot_bytes, meter) for size in description.gpu_bytes],
            memory=Shelf(description.memory_bytes),
            disk=Shelf(description.disk_bytes),
        )

    def records(self) -> tuple[Gpu, ...]:
        return tuple(
            Gpu(
                index=index,
                capacity_bytes=gpu.capacity_bytes,
                free_bytes=gpu.capacity_bytes - gpu.reserved_bytes,
                slots=gpu.slots,
            )
            for index, gpu in enumerate(self.gpus)
        )

    def keep(self, weights: str, start: int, end: int, model: ModelShape) -> None:
        """Keep these layers in host memory; what goes for them is kept on disk."""
        self._models[weights] = model
        for name, layers in self.memory.keep(weights, ((start, end),), model):
            self.disk.keep(name, layers, self._models[name])
        self.version += 1

    def used(self, weights: str) -> None:
        self.memory.used(weights)
        self.disk.used(weights)

    def lose(self) -> None:
        """The node is gone; what is on its disk is there again when it is back."""
        self.is_lost = True
        self.memory.clear()
        self.warming.clear()
        for gpu in self.gpus:
            gpu.drop_all()
        self.version += 1
