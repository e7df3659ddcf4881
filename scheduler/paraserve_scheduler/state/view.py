"""What the scheduler knows of the cluster: one immutable view, replaced as things happen.

Pure records and questions about them. `fold` makes the next view, `policy` decides on one. Times
are seconds since the Unix epoch; `None` where something has not happened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from paraserve_backend.telemetry.spans import Span
from paraserve_scheduler.planner.decisions import Prediction
from paraserve_scheduler.state.learned import Calibration, DemandHistory
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
class TierObject:
    """One object version in a node's tier, of which it may have only a part."""

    #: The source's URI, a slash and the object's own key.
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
    tier: tuple[TierObject, ...] = ()
    #: Sets of slots that no part has bound, and what they hold.
    idle_slots: int = 0
    slots_bytes: int = 0
    #: How many it has been told to keep; None: nothing yet.
    wanted_slots: int | None = None
    #: How fast its large fetches really were; None: there was none.
    fetch_bytes_per_s: float | None = None

    def without(self, replicas: Collection[str]) -> NodeState:
        """The node as it will be when it holds no part of these replicas."""
        return replace(
            self, parts=tuple(part for part in self.parts if part.replica not in replicas)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    plan: ReplicaPlan
    phase: Phase
    #: By stage.
    parts: tuple[PartState, ...]
    #: When the demand that started it was seen.
    requested_s: float
    planned_s: float
    #: Why it was started, and what was expected of that plan.
    reason: str = ""
    prediction: Prediction | None = None
    #: Time between two tokens as gateways see it; None: not known yet.
    tpot_s: float | None = None
    #: When a gateway last reported a request on it.
    last_busy_s: float | None = None
    ready_s: float | None = None
    first_token_s: float | None = None
    stopping_s: float | None = None
    removed_s: float | None = None
    stop_reason: str | None = None
    failure: Failure | None = None
    #: Replicas that its head has been told to hand its requests over to.
    targets: tuple[str, ...] = ()
    #: A command to hand over is on its way; when the last one failed.
    telling: bool = False
    telling_failed_s: float | None = None
    #: Since when its successors take its requests.
    hand_over_s: float | None = None
    #: Successors that failed while it was there, and when the last one did.
    failed_successors: int = 0
    successor_failed_s: float | None = None
    #: The nodes have been told to remove it.
    removing: bool = False
    #: Loaded from the store; its nodes must confirm every part.
    recovered: bool = False

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

    @property
    def is_idle(self) -> bool:
        return self.waiting == 0 and self.in_flight == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayState:
    last_report_s: float
    #: By deployment.
    demands: Mapping[str, Demand]


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedStart:
    at_s: float
    failure: Failure


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
    #: Since when requests have been waiting without a break.
    waiting_since_s: float | None = None
    #: Starts that failed since one last succeeded.
    failed_starts: tuple[FailedStart, ...] = ()
    #: The newest failure told to gateways, and how many there have been.
    failure: Failure | None = None
    failure_number: int = 0
    deleting: bool = False

    @property
    def name(self) -> str:
        return self.deployment.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterView:
    """Everything the policy may look at."""

    #: When this scheduler process began: before, nobody could report.
    started_s: float
    #: Since when it has heard what reached it without a break; silence before is not others'.
    listening_since_s: float
    nodes: Mapping[str, NodeState] = field(default_factory=dict)
    deployments: Mapping[str, DeploymentState] = field(default_factory=dict)
    #: Live replicas, and the last stopped ones of every deployment.
    replicas: Mapping[str, Replica] = field(default_factory=dict)
    gateways: Mapping[str, GatewayState] = field(default_factory=dict)
    #: (node, replica) pairs that a node has been told to remove though no replica wants them.
    removing_parts: frozenset[tuple[str, str]] = frozenset()
    #: Nodes, known or not, that get no new replica and shall become empty.
    cordoned: frozenset[str] = frozenset()
    #: What cold starts have shown, by kind of node.
    calibrations: Mapping[str, Calibration] = field(default_factory=dict)

    def live_replicas(self, deployment: str | None = None) -> tuple[Replica, ...]:
        """Replicas that still hold something on a node, oldest first."""
        return tuple(
            replica
            for replica in self.replicas.values()
            if replica.phase is not Phase.STOPPED and deployment in (None, replica.deployment)
        )

    def predecessor(self, replica: Replica) -> Replica | None:
        """The live replica whose requests it takes over."""
        found = self.replicas.get(replica.plan.succeeds or "")
        return None if found is None or found.phase is Phase.STOPPED else found

    def wanted_predecessor(self, replica: Replica) -> Replica | None:
        """The same, if it still serves or will."""
        found = self.predecessor(replica)
        return found if found is not None and found.is_wanted else None

    def successors(self, replica: Replica) -> tuple[Replica, ...]:
        """Those that start or are ready to take over its requests, oldest first."""
        return tuple(
            other
            for other in self.live_replicas(replica.deployment)
            if other.is_wanted and other.plan.succeeds == replica.id
        )

    def takers(self, replica: Replica) -> tuple[Replica, ...]:
        """Its successors once all are ready: from then on they get its requests, old and new."""
        successors = self.successors(replica)
        return successors if all(each.phase is Phase.READY for each in successors) else ()

    def routed_replicas(self, deployment: str) -> tuple[Replica, ...]:
        """Those that new requests may go to."""
        return tuple(
            replica
            for replica in self.live_replicas(deployment)
            if replica.phase is Phase.READY and not self.takers(replica)
        )

    def replicas_on(self, node: str) -> tuple[Replica, ...]:
        return tuple(
            replica for replica in self.live_replicas() if replica.plan.stage_on(node) is not None
        )

    def reserved_bytes(self, node: str) -> int:
        """What replicas may use there; weights that a successor shares count once."""
        return self.reserved_by(self.replicas_on(node), node)

    def reserved_by(self, replicas: Collection[Replica], node: str) -> int:
        """The same, of `replicas`, which are all that have a stage there."""
        reserved = sum(
            stage.reserved_bytes
            for replica in replicas
            for stage in replica.plan.stages
            if stage.node == node
        )
        shared = (self.host_bytes(each, node) for each in replicas if self.is_shared(each, node))
        return reserved - sum(shared)

    def host_bytes(self, replica: Replica, node: str) -> int:
        """Weights of its stage there, as far as they lie in host memory, where others find them."""
        stage = replica.plan.stage_on(node)
        if stage is None or replica.plan.stages[stage].device != "cpu":
            return 0
        return replica.plan.stages[stage].weight_bytes

    def is_shared(self, replica: Replica, node: str) -> bool:
        """Whether a successor on the same node uses the weights of its stage there."""
        return any(
            other.plan.succeeds == replica.id and other.plan.head.node == node
            for other in self.live_replicas(replica.deployment)
        )

    def used_ports(self, node: str) -> frozenset[int]:
        return frozenset[int]().union(
            *(replica.plan.ports_on(node) for replica in self.live_replicas())
        )

    def running_fetches(self, node: str) -> int:
        """How many parts are still fetching their weights to `node`."""
        return sum(
            stage.node == node and _is_fetching(part)
            for replica in self.live_replicas()
            if replica.phase is Phase.STARTING
            for stage, part in replica.stage_plans
        )

    def orphans(self, node: NodeState) -> tuple[PartState, ...]:
        """Parts on a node that no replica there has."""
        return tuple(part for part in node.parts if not self._is_owned(node.info.name, part))

    def _is_owned(self, node: str, part: PartState) -> bool:
        replica = self.replicas.get(part.replica)
        if replica is None or replica.phase is Phase.STOPPED:
            return False
        return replica.plan.stage_on(node) == part.stage

    def demands(self, deployment: str) -> tuple[Demand, ...]:
        """What each gateway says about `deployment`."""
        return tuple(
            gateway.demands[deployment]
            for gateway in self.gateways.values()
            if deployment in gateway.demands
        )

    def waiting(self, deployment: str) -> int:
        return sum(demand.waiting for demand in self.demands(deployment))

    def is_idle(self, deployment: str) -> bool:
        return all(demand.is_idle for demand in self.demands(deployment))

    def replica_in_flight(self, replica: Replica) -> int:
        return sum(
            demand.replica_in_flight.get(replica.id, 0)
            for demand in self.demands(replica.deployment)
        )

    def is_released(self, replica: Replica, since_s: float, now_s: float) -> bool:
        """Whether no request runs on it, by reports since `since_s`.

        An older report may not know of a request sent before its gateway saw the route go.
        """
        reported = all(gateway.last_report_s >= since_s for gateway in self.gateways.values())
        return now_s >= since_s and reported and self.replica_in_flight(replica) == 0

    def heard_since(self, time_s: float) -> ClusterView:
        """The view without gateways that have been silent since `time_s`."""
        heard = {
            name: gateway
            for name, gateway in self.gateways.items()
            if max(gateway.last_report_s, self.listening_since_s) >= time_s
        }
        return replace(self, gateways=heard)

    def without(self, gone: tuple[Replica, ...]) -> ClusterView:
        """The view as it will be when these replicas have left their nodes."""
        names = {replica.id for replica in gone}
        return replace(
            self,
            nodes={key: node.without(names) for key, node in self.nodes.items()},
            replicas={key: value for key, value in self.replicas.items() if key not in names},
        )


def _is_fetching(part: PartState) -> bool:
    # Before the first report nothing is known of the fetch but that it will come.
    return part.phase is Phase.STARTING and not (0 < part.total_bytes <= part.fetched_bytes)
