"""What the policy is told of the simulated cluster: no more than a scheduler would know."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from paraserve_scheduler.planner.bandwidth import BandwidthClaim
from paraserve_scheduler.planner.fleet import Need, Node, ReplicaLoad
from paraserve_scheduler.simulator.description import DeploymentDescription
from paraserve_scheduler.simulator.memory import NodeMemory
from paraserve_scheduler.simulator.replicas import SimReplica
from paraserve_scheduler.simulator.workload import SimRequest
from paraserve_scheduler.state.waiting import may_wait

#: What the arrival history of a deployment keeps.
_HISTORY = 32


@dataclass(slots=True, eq=False, kw_only=True)
class Served:
    """A deployment as its gateway and the scheduler see it."""

    description: DeploymentDescription
    queue: deque[SimRequest] = field(default_factory=deque)
    replicas: list[SimReplica] = field(default_factory=list)
    arrivals_s: deque[float] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    last_number: int = 0
    service_s: float | None = None

    def takes_one_more(self) -> bool:
        """Return whether its gateway holds one more request, or has a replica to send it to."""
        is_served = any(replica.batch is not None for replica in self.replicas)
        return is_served or may_wait(len(self.queue), self.description.max_waiting)


class NodeRecords:
    """Records of nodes, made anew only for those that have changed."""

    def __init__(self) -> None:
        self._records: dict[str, tuple[int, Node]] = {}

    def get(
        self, memory: NodeMemory, claims: tuple[BandwidthClaim, ...], uplink_fetches: int
    ) -> Node:
        name = memory.description.name
        version, record = self._records.get(name, (None, None))
        if record is None or version != memory.version:
            description = memory.description
            record = Node(
                name=name,
                kind=description.kind,
                nic_bytes_per_s=description.nic_bytes_per_s,
                gpus=memory.records(),
                cached=memory.memory.records(),
                on_disk=memory.disk.records(),
                zone=description.zone,
            )
            self._records[name] = (memory.version, record)
        if not claims and not uplink_fetches:
            return record
        return replace(record, claims=claims, uplink_fetches=uplink_fetches)


def need_of(served: Served) -> Need:
    description = served.description
    return Need(
        name=description.name,
        weights=description.name,
        model=description.model,
        objectives=description.objectives,
        waiting=len(served.queue),
        oldest_s=served.queue[0].arrival_s if served.queue else None,
        replicas=tuple(_load(replica) for replica in served.replicas),
        arrivals_s=tuple(served.arrivals_s),
        max_sequences=description.max_sequences,
        max_stages=description.max_stages,
        prompt_tokens=round(description.tokens.prompt.mean),
        service_s=served.service_s,
        must_grow=description.consolidate,
        keep_alive_s=description.keep_alive_s,
    )


def _load(replica: SimReplica) -> ReplicaLoad:
    reserved: dict[tuple[str, int], int] = {}
    for stage in replica.stages:
        reserved[stage.node, stage.gpu] = stage.reserved_bytes
    return ReplicaLoad(
        name=replica.name,
        deployment=replica.deployment.name,
        phase=replica.phase,
        capacity=replica.capacity,
        in_flight=replica.in_flight,
        reserved_bytes=reserved,
        idle_since_s=replica.idle_since_s,
        is_growing=replica.is_growing,
    )
