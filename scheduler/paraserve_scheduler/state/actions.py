"""The actions the scheduler can take, each with its subject and its reason for the log."""

from __future__ import annotations

from dataclasses import dataclass

from paraserve_scheduler.planner.decisions import Prediction
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import Failure


@dataclass(frozen=True, slots=True, kw_only=True)
class StartReplica:
    plan: ReplicaPlan
    #: When the demand that caused it was seen.
    requested_s: float
    reason: str
    #: What the plan is expected to give; None where nobody reckoned.
    prediction: Prediction | None = None

    @property
    def subject(self) -> str:
        return self.plan.replica


@dataclass(frozen=True, slots=True, kw_only=True)
class StopReplica:
    """Send it no more requests and let the running ones end; its parts stay for now."""

    replica: str
    reason: str
    #: Set when it stops because it failed: then there is nothing to wait for.
    failure: Failure | None = None

    @property
    def subject(self) -> str:
        return self.replica


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveReplica:
    """Take a stopping replica off all its nodes."""

    replica: str
    reason: str

    @property
    def subject(self) -> str:
        return self.replica


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovePart:
    """Take off a node what no replica there wants."""

    node: str
    replica: str
    reason: str

    @property
    def subject(self) -> str:
        return f"{self.replica} on {self.node}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FailDeployment:
    """Tell the gateways that the requests they hold cannot be served."""

    deployment: str
    failure: Failure
    reason: str

    @property
    def subject(self) -> str:
        return self.deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class DropDeployment:
    """Forget a deleted deployment that has no replica left."""

    deployment: str
    reason: str

    @property
    def subject(self) -> str:
        return self.deployment


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOver:
    """Have a replica move its running requests to others; to none: stop moving them."""

    replica: str
    successors: tuple[str, ...]
    reason: str

    @property
    def subject(self) -> str:
        return self.replica


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepSlots:
    """Have a node keep so many idle sets of runtime slots."""

    node: str
    idle_slots: int
    reason: str

    @property
    def subject(self) -> str:
        return self.node


Action = (
    StartReplica
    | StopReplica
    | RemoveReplica
    | RemovePart
    | FailDeployment
    | DropDeployment
    | HandOver
    | KeepSlots
)
