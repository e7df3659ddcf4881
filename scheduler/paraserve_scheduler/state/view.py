"""The view: all that the scheduler knows of the cluster, immutable, with the questions asked of it.

`state.fold` and `state.begin` make the next view; `reconciler.decide` decides on one. Times are
seconds since the Unix epoch; `None` stands for what has not happened.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from paraserve_scheduler.state.learned import Calibration
from paraserve_scheduler.state.records import (
    Demand,
    DeploymentState,
    GatewayState,
    NodeState,
    PartState,
    Phase,
    Replica,
)


# Without slots: the replicas in their groups are kept, for many questions go to one view.
@dataclass(frozen=True, kw_only=True)
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
        if deployment is None:
            return self._live
        return self._live_by_deployment.get(deployment, ())

    @cached_property
    def _live(self) -> tuple[Replica, ...]:
        return tuple(
            replica for replica in self.replicas.values() if replica.phase is not Phase.STOPPED
        )

    @cached_property
    def _live_by_deployment(self) -> Mapping[str, tuple[Replica, ...]]:
        return _grouped((replica.deployment, replica) for replica in self._live)

    @cached_property
    def _live_by_node(self) -> Mapping[str, tuple[Replica, ...]]:
        return _grouped(
            (node, replica)
            for replica in self._live
            for node in {stage.node for stage in replica.plan.stages}
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

    def ready_successors(self, replica: Replica) -> tuple[Replica, ...]:
        """Its successors once all are ready: from then on they get its requests, old and new."""
        successors = self.successors(replica)
        return successors if all(each.phase is Phase.READY for each in successors) else ()

    def routed_replicas(self, deployment: str) -> tuple[Replica, ...]:
        """Those that new requests may go to; silent ones only where there are no others."""
        ready = [each for each in self.live_replicas(deployment) if each.phase is Phase.READY]
        speaking = [each for each in ready if not self.is_silent(each)]
        for candidates in (speaking, ready):
            # A replica whose successors are all silent takes requests again.
            routed = [
                each for each in candidates if not self._has_one_of(candidates, successors_of=each)
            ]
            if routed:
                return tuple(routed)
        return ()

    def _has_one_of(self, candidates: Sequence[Replica], *, successors_of: Replica) -> bool:
        return any(each in candidates for each in self.ready_successors(successors_of))

    def is_silent(self, replica: Replica) -> bool:
        """Whether a gateway gets neither tokens nor answers to probes from it."""
        return any(replica.id in demand.silent for demand in self.demands(replica.deployment))

    def is_serving(self, replica: Replica) -> bool:
        """Whether it works on requests, or will; one that is silent does not."""
        return replica.is_wanted and not self.is_silent(replica)

    def replicas_on(self, node: str) -> tuple[Replica, ...]:
        return self._live_by_node.get(node, ())

    def reserved_bytes(self, node: str) -> int:
        """What replicas may use there; weights that a successor shares count once."""
        replicas = self.replicas_on(node)
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
            *(replica.plan.ports_on(node) for replica in self.replicas_on(node))
        )

    def running_fetches(self, node: str) -> int:
        """How many parts are still fetching their weights to `node`."""
        return sum(
            stage.node == node and _is_fetching(part)
            for replica in self.replicas_on(node)
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

    def is_released(self, replica: Replica, since_s: float) -> bool:
        """Whether no request runs on it, by reports since `since_s`.

        An older report may not know of a request sent before its gateway saw the route go.
        """
        reported = all(gateway.last_report_s >= since_s for gateway in self.gateways.values())
        return reported and self.replica_in_flight(replica) == 0

    def without_silent_gateways(self, time_s: float) -> ClusterView:
        """The view without gateways that have been silent since `time_s`."""
        reporting = {
            name: gateway
            for name, gateway in self.gateways.items()
            if max(gateway.last_report_s, self.listening_since_s) >= time_s
        }
        return replace(self, gateways=reporting)

    def without(self, gone: tuple[Replica, ...]) -> ClusterView:
        """The view as it will be when these replicas have left their nodes."""
        names = {replica.id for replica in gone}
        return replace(
            self,
            nodes={key: node.without(names) for key, node in self.nodes.items()},
            replicas={key: value for key, value in self.replicas.items() if key not in names},
        )


def _grouped(replicas: Iterable[tuple[str, Replica]]) -> Mapping[str, tuple[Replica, ...]]:
    groups: defaultdict[str, list[Replica]] = defaultdict(list)
    for name, replica in replicas:
        groups[name].append(replica)
    return {name: tuple(group) for name, group in groups.items()}


def _is_fetching(part: PartState) -> bool:
    # Before the first report nothing is known of the fetch but that it will come.
    return part.phase is Phase.STARTING and not (0 < part.total_bytes <= part.fetched_bytes)
