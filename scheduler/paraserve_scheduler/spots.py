"""Nodes as places for the stages of one model: what each could have ready, and when. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest

from paraserve_scheduler.contention import LinkForecast
from paraserve_scheduler.cost import ModelShape, runtime_s, stage_ready_s
from paraserve_scheduler.fleet import Fleet, Need, Node

_UNLIMITED = float("inf")
#: Places that are looked at closely; of thousands of nodes only the best can matter.
_CANDIDATES = 24


# Frozen in what it says; the forecast is kept since it is asked many times.
@dataclass(frozen=True, kw_only=True)
class Spot:
    """One node as a place for a stage of one model; a `partition.Place`."""

    node: Node
    model: ModelShape
    weights: str
    #: Bytes per second that the source gives at most.
    source_limit: float
    in_pipeline: bool
    #: A GPU there has room for the whole model.
    can_grow: bool
    #: The node whose host memory is the source; None: the object store.
    peer: str | None = None

    @cached_property
    def forecast(self) -> LinkForecast:
        return LinkForecast(self.node.nic_bytes_per_s, self.node.claims, self.source_limit)

    @cached_property
    def room_bytes(self) -> int:
        return max(gpu.free_bytes for gpu in self.node.gpus)

    @cached_property
    def has_slot(self) -> bool:
        return any(gpu.slots for gpu in self.node.gpus)

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        return self.node.cached.get(self.weights, ())

    @cached_property
    def cached_bytes(self) -> int:
        return sum(self.model.bytes_of(start, end) for start, end in self.spans)

    def missing_bytes(self, start: int, end: int) -> int:
        size = self.model.bytes_of(start, end)
        for low, high in self.spans:
            if low < end and start < high:
                size -= self.model.bytes_of(max(low, start), min(high, end))
        return size

    def ready_s(self, start: int, end: int) -> float:
        if self.model.reserved_bytes(start, end) > self.room_bytes:
            return _UNLIMITED
        return stage_ready_s(
            self.node.kind.start,
            fetch_s=self.forecast.seconds_for(self.missing_bytes(start, end)),
            size_bytes=self.model.bytes_of(start, end),
            has_slot=self.has_slot,
            in_pipeline=self.in_pipeline,
        )

    def bytes_by(self, seconds: float) -> float:
        method = self.node.kind.start
        room = self.room_bytes * self.model.total_bytes / self.model.full_bytes
        if method.is_instant:
            return room
        left_s = seconds - method.tail_s - (method.pipeline_setup_s if self.in_pipeline else 0.0)
        start_s = runtime_s(method, has_slot=self.has_slot)
        if left_s <= start_s:
            return 0.0
        load = method.load_s_per_byte
        # What can be loaded after the process is there, however early it was fetched.
        loaded = (left_s - start_s) / load if load else _UNLIMITED
        fetching_s = left_s if method.is_overlapped else left_s - start_s
        cached = min(self.cached_bytes, fetching_s / load if load else _UNLIMITED)
        fetched = self.forecast.bytes_in(fetching_s - cached * load, load)
        return min(room, loaded, cached + fetched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    node: Node
    #: On the GPU with most.
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Supply:
    """Where what a node lacks comes from: the object store, or a peer that has the whole model."""

    bytes_per_s: float
    peer: str | None = None


def find_supply(need: Need, fleet: Fleet) -> Supply:
    """The faster of a fair share of the store and the fastest peer."""
    if fleet.store_bytes_per_s is None:
        return Supply(bytes_per_s=_UNLIMITED)
    share = Supply(bytes_per_s=fleet.store_bytes_per_s / (fleet.store_fetches + 1))
    whole = ((0, need.model.num_layers),)
    peers = [
        Supply(bytes_per_s=node.uplink_bytes_per_s or node.nic_bytes_per_s, peer=node.name)
        for node in fleet.nodes
        if node.cached.get(need.weights) == whole
    ]
    return max([share, *peers], key=lambda supply: supply.bytes_per_s)


def find_spots(need: Need, rooms: Sequence[Room], stages: int, supply: Supply) -> list[Spot]:
    """The best places for a stage; a GPU with next to nothing free is none."""
    model = need.model
    least = model.full_bytes if stages == 1 else model.full_bytes // (2 * stages)
    able = _quickest([room for room in rooms if room.free_bytes >= least], need)
    return [
        Spot(
            node=room.node,
            model=model,
            weights=need.weights,
            source_limit=supply.bytes_per_s,
            peer=supply.peer,
            in_pipeline=stages > 1,
            can_grow=room.free_bytes >= model.full_bytes,
        )
        for room in able
    ]


def _quickest(rooms: list[Room], need: Need) -> list[Room]:
    """Of many nodes those that are likely to be chosen, by what a fetch gets there at once.

    As many again that have room for the whole model, since one of them must be the head.
    """
    if len(rooms) <= _CANDIDATES:
        return rooms

    def slowness(room: Room) -> tuple[bool, float, bool]:
        node = room.node
        share = node.nic_bytes_per_s / (len(node.claims) + 1)
        return (need.weights not in node.cached, -share, not any(gpu.slots for gpu in node.gpus))

    whole = need.model.full_bytes
    best = nsmallest(_CANDIDATES, rooms, key=slowness)
    heads = nsmallest(_CANDIDATES, (it for it in rooms if it.free_bytes >= whole), key=slowness)
    seen = {room.node.name for room in best}
    return [*best, *(room for room in heads if room.node.name not in seen)]
