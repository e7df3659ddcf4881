"""Candidates: nodes as places for a stage, and when each could have which layers. Pure.

Which nodes are looked at closely, and which peers a fetch may read from, is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nsmallest
from itertools import islice

from paraserve_scheduler.planner.bandwidth import LinkForecast
from paraserve_scheduler.planner.cost import LayerRanges, ModelShape, runtime_s, stage_ready_s
from paraserve_scheduler.planner.decisions import StageSource
from paraserve_scheduler.planner.fetch_time import Amounts, FetchTime, Holders
from paraserve_scheduler.planner.fleet import Fleet, Need, Node

#: Up to so many candidates every choice of them is tried.
EXACT_CANDIDATES = 4
_UNLIMITED = float("inf")
#: Candidates that are looked at closely; of thousands of nodes only the best can matter.
_MOST_CANDIDATES = 24
#: Peers that one fetch may read from.
_MOST_PEERS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A node whose host memory has some of a model's layers."""

    name: str
    #: What one more fetch gets from it.
    bytes_per_s: float
    layers: LayerRanges


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSources:
    """Where what a node lacks can come from: the object store has all of it, peers have some."""

    store_bytes_per_s: float
    peers: tuple[Holder, ...] = ()


# Frozen in what it says; what it is asked for many times is kept.
@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """One node as a candidate for a stage of one model; a `partition.Place`."""

    node: Node
    model: ModelShape
    weights: str
    layer_sources: LayerSources
    in_pipeline: bool
    #: A GPU there has room for the whole model.
    can_grow: bool

    @property
    def forecast(self) -> LinkForecast:
        """What one more fetch to the node gets over the network."""
        return self._fetch_time.link

    @cached_property
    def room_bytes(self) -> int:
        return max(gpu.free_bytes for gpu in self.node.gpus)

    @cached_property
    def has_slot(self) -> bool:
        return any(gpu.slots for gpu in self.node.gpus)

    @cached_property
    def _peers(self) -> tuple[Holder, ...]:
        return tuple(peer for peer in self.layer_sources.peers if peer.name != self.node.name)

    @cached_property
    def _fetch_time(self) -> FetchTime:
        return FetchTime(
            self.node.nic_bytes_per_s,
            self.node.claims,
            store_rate=self.layer_sources.store_bytes_per_s,
            peer_rates=[peer.bytes_per_s for peer in self._peers],
            disk_rate=self.node.kind.disk_bytes_per_s,
        )

    @cached_property
    def _holders(self) -> Holders:
        return Holders(
            self.model,
            memory=self.node.cached.get(self.weights, ()),
            disk=self.node.on_disk.get(self.weights, ()),
            peers=tuple(peer.layers for peer in self._peers),
        )

    def fetch_s(self, start: int, end: int) -> float:
        """Seconds until layers `[start, end)` are in the node's host memory."""
        return self._fetch_time.seconds_for(self._holders.amounts(start, end))

    def rest_fetch_s(self, start: int, end: int) -> float:
        """Seconds until all other layers are, with these there already."""
        rest = self._whole.less(self._holders.amounts(start, end))
        return self._fetch_time.seconds_for(rest)

    def sources(self, start: int, end: int) -> Iterator[StageSource]:
        """Where these layers come from, without sources of nothing."""
        amounts = self._holders.amounts(start, end)
        local = self.model.bytes_of(start, end) - amounts.total_bytes
        given = self._fetch_time.split(amounts, self._fetch_time.seconds_for(amounts))
        store = amounts.total_bytes - given.disk_bytes - sum(given.peers_bytes)
        name = self.node.name
        found = (
            StageSource(size_bytes=local, peer=name),
            StageSource(size_bytes=given.disk_bytes, peer=name, is_on_disk=True),
            *(
                StageSource(size_bytes=size, peer=peer.name)
                for peer, size in zip(self._peers, given.peers_bytes, strict=True)
            ),
            StageSource(size_bytes=store),
        )
        return (source for source in found if source.size_bytes > 0)

    @cached_property
    def _known_ready_s(self) -> dict[tuple[int, int], float]:
        return {}

    def ready_s(self, start: int, end: int) -> float:
        # Searches ask the same again and again.
        known = self._known_ready_s.get((start, end))
        if known is None:
            known = self._known_ready_s[start, end] = self._find_ready_s(start, end)
        return known

    def _find_ready_s(self, start: int, end: int) -> float:
        if self.model.reserved_bytes(start, end) > self.room_bytes:
            return _UNLIMITED
        return stage_ready_s(
            self.node.kind.start,
            fetch_s=self.fetch_s(start, end),
            size_bytes=self.model.bytes_of(start, end),
            has_slot=self.has_slot,
            in_pipeline=self.in_pipeline,
        )

    @cached_property
    def _whole(self) -> Amounts:
        return self._holders.amounts(0, self.model.num_layers)

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
        there = self.model.total_bytes - self._whole.total_bytes
        cached = min(there, fetching_s / load if load else _UNLIMITED)
        fetched = self._fetch_time.bytes_in(fetching_s - cached * load, load, self._whole)
        return min(room, loaded, cached + fetched)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    node: Node
    #: On the GPU with most.
    free_bytes: int


def find_layer_sources(need: Need, fleet: Fleet) -> LayerSources:
    """A fair share of the store, and the peers that have most of the model."""
    share = _UNLIMITED
    if fleet.store_bytes_per_s is not None:
        share = fleet.store_bytes_per_s / (fleet.store_fetches + 1)
    holders = [node for node in fleet.nodes if need.weights in node.cached]
    best = nsmallest(_MOST_PEERS, holders, key=lambda node: (-_held(need, node), -_gives(node)))
    return LayerSources(
        store_bytes_per_s=share,
        peers=tuple(
            Holder(name=node.name, bytes_per_s=_gives(node), layers=node.cached[need.weights])
            for node in best
        ),
    )


def _held(need: Need, node: Node) -> int:
    return sum(need.model.bytes_of(start, end) for start, end in node.cached[need.weights])


def _gives(node: Node) -> float:
    return node.nic_bytes_per_s / (node.uplink_fetches + 1)


def find_rooms(need: Need, nodes: Sequence[Node]) -> list[Room]:
    """What nodes have free; if they are many, first those that get a fetch soonest."""
    rooms = [Room(node=node, free_bytes=max(gpu.free_bytes for gpu in node.gpus)) for node in nodes]
    if len(rooms) > _MOST_CANDIDATES:
        # Nodes without room are no places: of a full cluster they are most.
        rooms = [room for room in rooms if room.free_bytes]
        rooms.sort(key=lambda room: _slowness(need, room.node))
    return rooms


def _slowness(need: Need, node: Node) -> tuple[bool, float, bool]:
    is_there = need.weights in node.cached or need.weights in node.on_disk
    share = node.nic_bytes_per_s / (len(node.claims) + 1)
    return (not is_there, -share, not any(gpu.slots for gpu in node.gpus))


class Candidates:
    """The candidates for the stages of one model, made once for each node."""

    def __init__(self, need: Need, layer_sources: LayerSources) -> None:
        self._need = need
        self._layer_sources = layer_sources
        #: By node, and by whether it is for a stage of a pipeline.
        self._made: dict[tuple[str, bool], Candidate] = {}

    def find(self, rooms: Sequence[Room], stages: int) -> list[Candidate]:
        """Return those for one of `stages` stages, in the order of `rooms`.

        Of few rooms those with room for a layer, else those with room for half an equal stage. Of
        many the first, and as many again with room for the whole model: one must be the head.
        """
        least, whole = self._least_bytes(len(rooms), stages), self._need.model.full_bytes
        able = [room for room in rooms if room.free_bytes >= least]
        heads = (room for room in able[_MOST_CANDIDATES:] if room.free_bytes >= whole)
        chosen = (*able[:_MOST_CANDIDATES], *islice(heads, _MOST_CANDIDATES))
        return [self._candidate(room, in_pipeline=stages > 1) for room in chosen]

    def _least_bytes(self, num_rooms: int, stages: int) -> int:
        model = self._need.model
        if stages == 1:
            return model.full_bytes
        if num_rooms <= EXACT_CANDIDATES:
            return model.least_reserved_bytes
        return model.full_bytes // (2 * stages)

    def _candidate(self, room: Room, *, in_pipeline: bool) -> Candidate:
        key = (room.node.name, in_pipeline)
        if key not in self._made:
            need = self._need
            self._made[key] = Candidate(
                node=room.node,
                model=need.model,
                weights=need.weights,
                layer_sources=self._layer_sources,
                in_pipeline=in_pipeline,
                can_grow=room.free_bytes >= need.model.full_bytes or not need.must_grow,
            )
        return self._made[key]
