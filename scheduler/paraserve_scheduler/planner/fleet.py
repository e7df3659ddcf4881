"""What a policy sees of the cluster at one moment, and what it can decide. Frozen records only.

The same records come from the scheduler's view and from the simulator. Times are seconds of the
same clock; sizes bytes. A node is a host: its GPUs share one network card and one host memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from paraserve_scheduler.planner.bandwidth import Claim
from paraserve_scheduler.planner.cost import ModelShape, NodeKind


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
    claims: tuple[Claim, ...] = ()
    #: Layers `[start, end)` in host memory, by `Need.weights`; disjoint and ascending.
    cached: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    #: The same on its disk.
    on_disk: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    #: How fast peers may read this node's host memory together, and how many fetches do.
    uplink_bytes_per_s: float | None = None
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where one part of a stage's bytes comes from; no peer: the object store."""

    size_bytes: int
    #: A node that has them in host memory; the stage's own node if they are there already.
    peer: str | None = None
    #: They are on the disk of the stage's own node.
    is_on_disk: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChoice:
    node: str
    gpu: int
    #: Layers `[start, end)`.
    start: int
    end: int
    reserved_bytes: int
    #: It has room for the whole model and takes in the rest once the pipeline serves.
    grows: bool = False
    uses_slot: bool = False
    sources: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePrediction:
    """What one stage of a plan is expected to take, all from the command on."""

    #: Until its process can take in weights.
    runtime_s: float
    fetch_s: float
    ready_s: float
    local_bytes: int
    peer_bytes: int
    store_bytes: int
    uses_slot: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a plan is expected to give, kept to be compared with what happens."""

    #: From the command to all stages ready.
    ready_s: float
    ttft_s: float
    tpot_s: float
    #: GPU bytes · seconds from the command until the pipeline is one instance.
    cost_byte_s: float
    meets_ttft: bool
    meets_tpot: bool
    stages: tuple[StagePrediction, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How a pipeline's growing stages take in the layers they lack."""

    #: Its fetches get only what others leave.
    is_background: bool = False
    #: Running requests stand still while their KV cache moves.
    pauses: bool = False
    #: Fetches have to end so many seconds after they begin, as far as others are concerned.
    deadline_after_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    deployment: str
    stages: tuple[StageChoice, ...]
    reason: str
    prediction: Prediction | None = None
    #: When its first request misses its objective; fetches of others are planned around it.
    deadline_s: float | None = None
    #: Layers a stage has fetched stay in host memory afterwards.
    keeps_in_memory: bool = False
    growth: Growth = field(default_factory=lambda: Growth())


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    replica: str
    reason: str
    #: Its processes stay as slots.
    leaves_slots: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DropSlot:
    node: str
    gpu: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmSlot:
    node: str
    gpu: int
    reason: str


Decision = Start | Stop | WarmSlot | DropSlot


class Admission(Protocol):
    """Whether a deployment may hold one more request; if not it is refused at once."""

    def __call__(self, need: Need) -> bool: ...


class Strategy(Protocol):
    """A policy: one pure function. What it did not do because of a lack of room it does later."""

    def __call__(self, fleet: Fleet, now_s: float) -> tuple[Decision, ...]: ...
