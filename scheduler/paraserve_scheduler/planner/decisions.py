"""The decisions a policy can make, each with its reason, and what is predicted of a start.

A decision becomes actions in `reconciler.starts`. The type of policies is here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from paraserve_scheduler.planner.fleet import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSource:
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
    sources: tuple[StageSource, ...] = ()


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


class PolicyFunction(Protocol):
    """A policy: one pure function. What it did not do because of a lack of room it does later."""

    def __call__(self, fleet: Fleet, now_s: float) -> tuple[Decision, ...]: ...
