"""The fleet: what a policy sees of the cluster at one moment. Frozen records only.

The scheduler's view and the simulator both make it. Times are seconds of one clock, sizes bytes. A
node is a host: its GPUs share one network card and one host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from paraserve_scheduler.planner.bandwidth import BandwidthClaim
from paraserve_scheduler.planner.cost import LayerRanges, ModelShape, NodeKind


class ReplicaPhase(StrEnum):
    STARTING = "starting"
    READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    index: int
    capacity_bytes: int
    #: Not reserved by any replica. Memory of slots is free: they go when it is needed.
    free_bytes: int
    #: Processes waiting there without weights.
    slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    name: str
    kind: NodeKind
    nic_bytes_per_s: float
    gpus: tuple[Gpu, ...]
    #: Running fetches to this node.
    claims: tuple[BandwidthClaim, ...] = ()
    #: Layers `[start, end)` in host memory, by `Need.weights`; disjoint and ascending.
    cached: Mapping[str, LayerRanges] = field(default_factory=dict)
    #: The same on its disk.
    on_disk: Mapping[str, LayerRanges] = field(default_factory=dict)
    #: Fetches of peers that read this node's host memory; they share its link.
    uplink_fetches: int = 0
    #: Rack or zone; empty: not known.
    zone: str = ""
    #: Kinds of device that replicas may use there: "cpu", "cuda".
    devices: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    name: str
    deployment: str
    phase: ReplicaPhase
    #: Requests it can run at once, and does.
    capacity: int
    in_flight: int
    #: (node, GPU) to reserved bytes.
    reserved_bytes: Mapping[tuple[str, int], int]
    #: Since when no request has run on it; None while one does.
    idle_since_s: float | None = None
    #: Still a pipeline that is growing into full instances: not to be stopped.
    is_growing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One deployment with demand or with replicas."""

    name: str
    #: Which checkpoint; deployments of the same one share what is fetched.
    weights: str
    model: ModelShape
    objectives: Objectives
    waiting: int = 0
    #: When the oldest waiting request arrived.
    oldest_s: float | None = None
    replicas: tuple[ReplicaLoad, ...] = ()
    #: Times of the last arrivals, oldest first.
    arrivals_s: tuple[float, ...] = ()
    max_replicas: int = 100
    min_replicas: int = 0
    #: Of two deployments that lack memory the higher one gets it.
    priority: int = 0
    #: Sequences one full worker runs at once.
    max_sequences: int = 8
    max_stages: int = 4
    prompt_tokens: int = 512
    #: Mean time a request runs; None: not known.
    service_s: float | None = None
    #: Kind of device its replicas must have; None: any.
    device: str | None = None
    #: Whether its head must have room for the whole model.
    must_grow: bool = True
    #: How long its user wants an idle replica kept; None: as long as it is worth it.
    keep_alive_s: float | None = None

    def may_use(self, node: Node) -> bool:
        return self.device is None or self.device in node.devices


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    nodes: tuple[Node, ...]
    needs: tuple[Need, ...]
    #: What the object store gives to all nodes together, and to how many fetches; None: enough.
    store_bytes_per_s: float | None = None
    store_fetches: int = 0
    #: (node, GPU) to bytes of replicas that are being stopped: free before long.
    leaving_bytes: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def has_room(self, size_bytes: int) -> bool:
        """Whether any GPU has so much free."""
        return any(gpu.free_bytes >= size_bytes for node in self.nodes for gpu in node.gpus)
