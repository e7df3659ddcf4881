"""How an event changes the view of the cluster. Pure.

Events of nodes, parts, deployments and hand-overs are folded here, demand and measurements in
`state.fold_reports`. What an action changes is in `state.begin`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from paraserve_scheduler.state.changes import (
    change_deployment,
    change_hand_over,
    change_node,
    change_replica,
    with_item,
)
from paraserve_scheduler.state.events import (
    DeletionRequested,
    DemandReported,
    DeploymentAdded,
    Event,
    HandOverFailed,
    HandOverNotified,
    NodeCordoned,
    NodeRegistered,
    NodeReported,
    PartRemoved,
    PartReported,
    ReplicaRemoved,
    SchedulerStalled,
    SlotsRefused,
)
from paraserve_scheduler.state.fold_reports import (
    demand_reported,
    measured_part,
    measured_ready,
)
from paraserve_scheduler.state.records import (
    DeploymentState,
    Failure,
    NodeState,
    PartState,
    Phase,
    Replica,
)
from paraserve_scheduler.state.view import ClusterView

#: Stopped replicas of each deployment that stay in the view, for their timelines.
KEPT_REPLICAS = 5


def fold(view: ClusterView, event: Event) -> ClusterView:
    """The view after `event`. What concerns nobody known any more changes nothing."""
    match event:
        case NodeRegistered():
            node = NodeState(info=event.info, last_seen_s=event.at_s)
            return replace(view, nodes=with_item(view.nodes, event.info.name, node))
        case NodeReported():
            return _node_reported(view, event)
        case PartReported():
            return _part_reported(view, event)
        case DemandReported():
            return demand_reported(view, event)
        case DeploymentAdded():
            return _deployment_added(view, event)
        case DeletionRequested():
            return change_deployment(
                view, event.deployment, lambda state: replace(state, deleting=True)
            )
        case ReplicaRemoved():
            return _replica_removed(view, event)
        case PartRemoved():
            return _part_removed(view, event)
        case HandOverNotified() | HandOverFailed():
            return _hand_over_answered(view, event)
        case SlotsRefused():
            return change_node(view, event.node, lambda node: replace(node, wanted_slots=None))
        case NodeCordoned():
            others = view.cordoned - {event.node}
            return replace(view, cordoned=others | {event.node} if event.cordoned else others)
        case SchedulerStalled():
            return replace(view, listening_since_s=event.at_s)


# ---- nodes and their parts ----


def _node_reported(view: ClusterView, event: NodeReported) -> ClusterView:
    known = view.nodes[event.node]
    node = replace(
        known,
        last_seen_s=event.at_s,
        triton_live=event.triton_live,
        triton_lost_s=known.triton_lost_s if event.triton_live else event.at_s,
        parts=event.parts,
        tier_used_bytes=event.tier_used_bytes,
        tier=event.tier,
        idle_slots=event.idle_slots,
        slots_bytes=event.slots_bytes,
    )
    view = replace(view, nodes=with_item(view.nodes, event.node, node))
    reported = {(part.replica, part.stage): part for part in event.parts}
    for replica in view.live_replicas():
        stage = replica.plan.stage_on(event.node)
        if stage is not None and replica.is_wanted:
            part = reported.get((replica.id, stage)) or _missing(replica, stage)
            if part is not None:
                reported_part = PartReported(part=replace(part, confirmed=True), at_s=event.at_s)
                view = _part_reported(view, reported_part)
    return view


def _missing(replica: Replica, stage: int) -> PartState | None:
    """What it means that a heartbeat does not list a part; `None` if it may not be there yet."""
    part = replica.parts[stage]
    if not (part.confirmed or replica.recovered):
        return None
    node = replica.plan.stages[stage].node
    failure = Failure(
        grpc_code="UNAVAILABLE",
        message=f"Node {node} no longer has {replica.id}.",
        is_nodes_fault=True,
    )
    return replace(part, phase=Phase.FAILED, failure=failure)


def _part_reported(view: ClusterView, event: PartReported) -> ClusterView:
    replica = view.replicas.get(event.part.replica)
    if replica is None or not replica.is_wanted:
        return view
    part = event.part
    parts = list(replica.parts)
    parts[part.stage] = _newer(parts[part.stage], part)
    was_ready = replica.parts[part.stage].phase is Phase.READY
    replica = replace(replica, parts=tuple(parts))
    if parts[part.stage].phase is Phase.READY and not (was_ready or replica.recovered):
        known = replace(view, replicas=with_item(view.replicas, replica.id, replica))
        view = measured_part(known, replica, part.stage)
    became_ready = replica.phase is Phase.STARTING and all(
        part.phase is Phase.READY for part in parts
    )
    if became_ready:
        was_recovered = replica.recovered
        ready_s = replica.ready_s or event.at_s
        replica = replace(replica, phase=Phase.READY, ready_s=ready_s, recovered=False)
        if not was_recovered:
            view = measured_ready(view, replica)
        view = change_deployment(
            view, replica.deployment, partial(_with_ready, replica=replica, at_s=event.at_s)
        )
    return replace(view, replicas=with_item(view.replicas, replica.id, replica))


def _with_ready(state: DeploymentState, *, replica: Replica, at_s: float) -> DeploymentState:
    # Nobody asked for a successor: it must not prolong the life of an idle deployment.
    active_s = at_s if replica.plan.succeeds is None else state.last_active_s
    return replace(state, failed_starts=(), failure=None, last_active_s=active_s)


def _newer(known: PartState, reported: PartState) -> PartState:
    """The later of two reports; a heartbeat may have been written before what is known."""
    confirmed = known.confirmed or reported.confirmed
    is_older = known.phase is Phase.READY and reported.phase is Phase.STARTING
    if is_older or known.phase is Phase.FAILED:
        return replace(known, confirmed=confirmed)
    return replace(reported, confirmed=confirmed)


def _part_removed(view: ClusterView, event: PartRemoved) -> ClusterView:
    removing = view.removing_parts - {(event.node, event.replica)}
    view = replace(view, removing_parts=removing)
    node = view.nodes.get(event.node)
    if node is None:
        return view
    return replace(view, nodes=with_item(view.nodes, event.node, node.without({event.replica})))


# ---- deployments and replicas ----


def _deployment_added(view: ClusterView, event: DeploymentAdded) -> ClusterView:
    state = DeploymentState(
        deployment=event.deployment,
        deployed_s=event.at_s,
        last_number=event.last_number,
        last_active_s=event.at_s,
        failure_number=event.failure_number,
    )
    return replace(view, deployments=with_item(view.deployments, state.name, state))


def _hand_over_answered(view: ClusterView, event: HandOverNotified | HandOverFailed) -> ClusterView:
    if isinstance(event, HandOverNotified):
        answered = partial(
            replace, is_notifying=False, notified=event.successors, notify_failed_s=None
        )
    else:
        answered = partial(replace, is_notifying=False, notify_failed_s=event.at_s)
    return change_hand_over(view, event.replica, answered)


def _replica_removed(view: ClusterView, event: ReplicaRemoved) -> ClusterView:
    view = change_replica(
        view,
        event.replica,
        lambda replica: replace(replica, phase=Phase.STOPPED, removed_s=event.at_s, removing=False),
    )
    deployment = view.replicas[event.replica].deployment
    stopped = [
        name
        for name, replica in view.replicas.items()
        if replica.deployment == deployment and replica.phase is Phase.STOPPED
    ]
    forgotten = set(stopped[:-KEPT_REPLICAS])
    kept = {name: replica for name, replica in view.replicas.items() if name not in forgotten}
    # What a node could not remove, its next heartbeat will list again.
    nodes = {name: node.without({event.replica}) for name, node in view.nodes.items()}
    return replace(view, replicas=kept, nodes=nodes)
