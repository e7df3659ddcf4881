"""Records of what is known of nodes, parts, replicas, deployments, demand and gateways."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType

from paraserve_backend.telemetry.spans import Span
from paraserve_scheduler.planner.decisions import Prediction
from paraserve_scheduler.state.learned import DemandHistory
from paraserve_scheduler.state.plans import ReplicaPlan, StagePlan
from paraserve_scheduler.state.spec import Deployment


class Phase(StrEnum):
    """Of a replica and of its parts."""

    #: After a restart of the scheduler, until the node has reported.
    UNKNOWN = "unknown"
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    #: Name of a `grpc.StatusCode` member.
    grpc_code: str
    message: str
    #: It says nothing about what was there: the node is gone, or forgot, or does not answer.
    is_nodes_fault: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeInfo:
    """What an agent says about its node when it registers."""

    name: str
    agent_address: str
    triton_grpc_address: str
    memory_bytes: int
    nic_bytes_per_s: float
    run_dir: str
    channel_host: str
    #: Ports `[start, end)` that replicas may bind there.
    channel_ports: tuple[int, int]
    devices: tuple[str, ...]
    #: Where other agents read its tier; empty: nowhere.
    peer_address: str = ""
    #: Of its hardware: nodes of one kind are equally fast.
    kind: str = ""
    #: Rack or zone; empty: not said.
    zone: str = ""
    #: Idle sets of runtime slots that it keeps at most.
    max_slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldObject:
    """One object version in a node's tier, of which it may have only a part."""

    #: Which object of which store: see `StoreIdentity.key_of`. Nodes report only what they would
    #: use themselves, so who read it need not be told.
    key: str
    version: str
    landed_bytes: int
    #: The same as ranges `[start, end)` of the object, disjoint and ascending.
    landed: tuple[tuple[int, int], ...] = ()
    #: Ranges that are on its disk, whether in the tier or not.
    on_disk: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartState:
    """One stage of a replica as its node last reported it."""

    replica: str
    stage: int
    phase: Phase
    spans: tuple[Span, ...] = ()
    fetched_bytes: int = 0
    total_bytes: int = 0
    failure: Failure | None = None
    #: Model of the part to the slot's Triton model that it is, where it has no process of its own.
    slots: Mapping[str, str] = field(default_factory=dict)
    #: A heartbeat has listed it, so a later one without it means that the node lost it.
    confirmed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeState:
    info: NodeInfo
    last_seen_s: float
    #: `None` until the first heartbeat after registration.
    triton_live: bool | None = None
    #: Every part on the node, also those that no replica wants.
    parts: tuple[PartState, ...] = ()
    tier_used_bytes: int = 0
    tier: tuple[HeldObject, ...] = ()
    #: Sets of slots that no part has bound, and what they hold.
    idle_slots: int = 0
    slots_bytes: int = 0
    #: How many it has been told to keep; None: nothing yet.
    wanted_slots: int | None = None
    #: How fast its large fetches really were; None: there was none.
    fetch_bytes_per_s: float | None = None
    #: When its Triton last was not live, as far as is known.
    triton_lost_s: float | None = None

    def without(self, replicas: Collection[str]) -> NodeState:
        """The node as it will be when it holds no part of these replicas."""
        return replace(
            self, parts=tuple(part for part in self.parts if part.replica not in replicas)
        )


#: How a change of a field of `Replica` gets into the store: it is written at once, ...
WRITTEN: Mapping[str, bool] = MappingProxyType({"written": True})
#: ... or together with the next one that is. What a crash loses of it is reported again.
FOLLOWS: Mapping[str, bool] = MappingProxyType({"written": False})


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOverState:
    """How far a replica is with handing its requests over to its successors."""

    #: Successors that its head has been notified of.
    notified: tuple[str, ...] = ()
    #: A command to its head is on its way; when the last one failed.
    is_notifying: bool = False
    notify_failed_s: float | None = None
    #: Since when its successors take its requests.
    since_s: float | None = None
    #: Successors that failed while it was there, and when the last one did.
    failed_successors: int = 0
    successor_failed_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    plan: ReplicaPlan = field(metadata=FOLLOWS)
    phase: Phase = field(metadata=WRITTEN)
    #: By stage. Their progress comes many times a second.
    parts: tuple[PartState, ...] = field(metadata=FOLLOWS)
    #: When the demand that started it was seen.
    requested_s: float = field(metadata=FOLLOWS)
    planned_s: float = field(metadata=FOLLOWS)
    #: Why it was started, and what was expected of that plan.
    reason: str = field(default="", metadata=FOLLOWS)
    prediction: Prediction | None = field(default=None, metadata=FOLLOWS)
    #: Time between two tokens as gateways see it; None: not known yet.
    tpot_s: float | None = field(default=None, metadata=FOLLOWS)
    #: When a gateway last reported a request on it.
    last_busy_s: float | None = field(default=None, metadata=FOLLOWS)
    ready_s: float | None = field(default=None, metadata=WRITTEN)
    first_token_s: float | None = field(default=None, metadata=WRITTEN)
    stopping_s: float | None = field(default=None, metadata=WRITTEN)
    removed_s: float | None = field(default=None, metadata=WRITTEN)
    stop_reason: str | None = field(default=None, metadata=FOLLOWS)
    failure: Failure | None = field(default=None, metadata=FOLLOWS)
    hand_over: HandOverState = field(default=HandOverState(), metadata=WRITTEN)
    #: The nodes have been told to remove it.
    removing: bool = field(default=False, metadata=FOLLOWS)
    #: Loaded from the store; its nodes must confirm every part.
    recovered: bool = field(default=False, metadata=FOLLOWS)

    @property
    def id(self) -> str:
        return self.plan.replica

    @property
    def deployment(self) -> str:
        return self.plan.deployment

    @property
    def is_wanted(self) -> bool:
        return self.phase in (Phase.STARTING, Phase.READY)

    @property
    def stage_plans(self) -> Iterator[tuple[StagePlan, PartState]]:
        return zip(self.plan.stages, self.parts, strict=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one gateway says about one deployment."""

    deployment: str
    waiting: int = 0
    in_flight: int = 0
    #: Requests since the gateway started.
    arrived: int = 0
    #: Running requests by replica.
    replica_in_flight: Mapping[str, int] = field(default_factory=dict)
    #: When a replica's first token reached the gateway.
    first_token_s: Mapping[str, float] = field(default_factory=dict)
    #: Mean time between two tokens of a replica since the last report.
    tpot_s: Mapping[str, float] = field(default_factory=dict)
    #: Replicas that send it neither tokens nor answers to probes.
    silent: frozenset[str] = frozenset()

    @property
    def is_idle(self) -> bool:
        return self.waiting == 0 and self.in_flight == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayState:
    last_report_s: float
    #: By deployment.
    demands: Mapping[str, Demand]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setback:
    """A start that failed, or a replica that died after it was ready."""

    at_s: float
    failure: Failure
    #: Where it was.
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentState:
    deployment: Deployment
    deployed_s: float
    #: The number of its newest replica; numbers are never used twice.
    last_number: int = 0
    last_active_s: float
    history: DemandHistory = field(default_factory=DemandHistory)
    #: From a replica that is ready to its first token; None: not measured yet.
    first_pass_s: float | None = None
    #: Since when requests have been waiting without a break while no replica serves.
    waiting_since_s: float | None = None
    #: Starts that failed since one last succeeded, and the death of what that had started.
    failed_starts: tuple[Setback, ...] = ()
    #: Its replicas that died after they were ready. Like failed starts they are forgotten when the
    #: scheduler restarts: what was wrong may be repaired, and five more deaths tell otherwise.
    deaths: tuple[Setback, ...] = ()
    #: The newest failure told to gateways, and how many there have been.
    failure: Failure | None = None
    failure_number: int = 0
    deleting: bool = False

    @property
    def name(self) -> str:
        return self.deployment.name
