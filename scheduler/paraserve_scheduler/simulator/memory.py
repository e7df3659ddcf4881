"""Memory of the simulated nodes: what each GPU holds, and weights kept in host memory."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from paraserve_scheduler.fleet import Gpu
from paraserve_scheduler.simulator.description import NodeDescription
from paraserve_scheduler.simulator.heap import Heap

Spans = tuple[tuple[int, int], ...]


def joined(spans: Spans, start: int, end: int) -> Spans:
    """Disjoint ascending spans that also cover `[start, end)`."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted((*spans, (start, end))):
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


@dataclass(slots=True, eq=False, kw_only=True)
class NodeMemory:
    description: NodeDescription
    gpus: list[GpuMemory]
    is_lost: bool = False
    #: Layers in host memory by weights, the longest unused first; and their bytes.
    cached: OrderedDict[str, Spans] = field(default_factory=OrderedDict)
    cached_bytes: dict[str, int] = field(default_factory=dict)
    #: Counts changes, so that what was made of this node can be made again.
    version: int = 0
    #: Slots on their way, by GPU.
    warming: set[int] = field(default_factory=set)

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

    def keep(self, weights: str, start: int, end: int, layer_bytes: tuple[int, ...]) -> None:
        """Keep these layers in host memory; what was unused longest goes when it is full."""
        spans = joined(self.cached.get(weights, ()), start, end)
        size = sum(sum(layer_bytes[low:high]) for low, high in spans)
        if size > self.description.memory_bytes:
            return
        self.cached[weights] = spans
        self.cached_bytes[weights] = size
        self.cached.move_to_end(weights)
        while sum(self.cached_bytes.values()) > self.description.memory_bytes:
            oldest, _ = self.cached.popitem(last=False)
            del self.cached_bytes[oldest]
        self.version += 1

    def used(self, weights: str) -> None:
        if weights in self.cached:
            self.cached.move_to_end(weights)

    def lose(self) -> None:
        self.is_lost = True
        self.cached.clear()
        self.cached_bytes.clear()
        self.warming.clear()
        for gpu in self.gpus:
            gpu.drop_all()
        self.version += 1
