"""The events: everything that can happen to the cluster, as the controller is told of it."""

from __future__ import annotations

from dataclasses import dataclass

from paraserve_scheduler.state.records import Demand, HeldObject, NodeInfo, PartState
from paraserve_scheduler.state.spec import Deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRegistered:
    info: NodeInfo
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReported:
    """A heartbeat: all parts the node has, wanted or not."""

    node: str
    triton_live: bool
    parts: tuple[PartState, ...]
    tier_used_bytes: int
    at_s: float
    idle_slots: int = 0
    slots_bytes: int = 0
    tier: tuple[HeldObject, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartReported:
    """Progress of a part that a node was told to apply."""

    part: PartState
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandReported:
    gateway: str
    demands: tuple[Demand, ...]
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentAdded:
    deployment: Deployment
    #: Newest numbers of an earlier deployment of that name; they must go on growing.
    last_number: int
    failure_number: int
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletionRequested:
    deployment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRemoved:
    """All nodes have removed it, or are lost."""

    replica: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PartRemoved:
    """A node has removed an unwanted part, or could not be asked; a heartbeat will tell."""

    node: str
    replica: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOverNotified:
    """The head of a replica has taken the command to hand its requests over."""

    replica: str
    successors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOverFailed:
    """That command did not reach the head, or was refused."""

    replica: str
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsRefused:
    """A command to keep slots did not reach the node, or was refused."""

    node: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStalled:
    """The scheduler itself stood still until now: what reached it meanwhile is yet to be heard."""

    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCordoned:
    node: str
    #: False: the node is used again.
    cordoned: bool = True


Event = (
    NodeRegistered
    | NodeReported
    | PartReported
    | DemandReported
    | DeploymentAdded
    | DeletionRequested
    | ReplicaRemoved
    | PartRemoved
    | HandOverNotified
    | HandOverFailed
    | SlotsRefused
    | NodeCordoned
    | SchedulerStalled
)
