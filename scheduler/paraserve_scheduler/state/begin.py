"""What an action changes in the view when it begins, before anything has come of it. Pure."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from paraserve_scheduler.state.actions import (
    Action,
    DropDeployment,
    FailDeployment,
    HandOver,
    KeepSlots,
    RemovePart,
    RemoveReplica,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.changes import (
    change_deployment,
    change_node,
    change_replica,
    with_item,
    without_item,
)
from paraserve_scheduler.state.fold_reports import (
    measured_decode,
)
from paraserve_scheduler.state.records import (
    FailedStart,
    Failure,
    GatewayState,
    PartState,
    Phase,
    Replica,
)
from paraserve_scheduler.state.view import ClusterView


def begin(view: ClusterView, action: Action, at_s: float) -> ClusterView:
    """The view when `action` has been started, before anything has come of it."""
    match action:
        case StartReplica():
            return _replica_started(view, action, at_s)
        case StopReplica():
            return _replica_stopping(view, action, at_s)
        case RemoveReplica():
            return change_replica(
                view, action.replica, lambda replica: replace(replica, removing=True)
            )
        case RemovePart():
            pair = (action.node, action.replica)
            return replace(view, removing_parts=view.removing_parts | {pair})
        case FailDeployment():
            return _deployment_failed(view, action)
        case HandOver():
            return _hand_over_begun(view, action, at_s)
        case KeepSlots():
            return change_node(
                view, action.node, lambda node: replace(node, wanted_slots=action.idle_slots)
            )
        case DropDeployment():
            return replace(
                view,
                deployments=without_item(view.deployments, action.deployment),
                replicas={
                    key: replica
                    for key, replica in view.replicas.items()
                    if replica.deployment != action.deployment
                },
            )


def _replica_started(view: ClusterView, action: StartReplica, at_s: float) -> ClusterView:
    plan = action.plan
    replica = Replica(
        plan=plan,
        phase=Phase.STARTING,
        parts=tuple(
            PartState(replica=plan.replica, stage=stage, phase=Phase.STARTING)
            for stage in range(len(plan.stages))
        ),
        requested_s=action.requested_s,
        planned_s=at_s,
        reason=action.reason,
        prediction=action.prediction,
    )
    view = change_deployment(
        view, plan.deployment, lambda state: replace(state, last_number=plan.number)
    )
    return replace(view, replicas=with_item(view.replicas, replica.id, replica))


def _replica_stopping(view: ClusterView, action: StopReplica, at_s: float) -> ClusterView:
    replica = view.replicas[action.replica]
    view = measured_decode(view, replica)
    if action.failure is not None:
        view = _note_failure(view, replica, action.failure, at_s)
    view = change_replica(
        view,
        action.replica,
        lambda replica: replace(
            replica,
            phase=Phase.STOPPING,
            stopping_s=at_s,
            stop_reason=action.reason,
            failure=action.failure,
        ),
    )
    predecessor = view.predecessor(replica)
    if predecessor is not None and not view.ready_successors(predecessor):
        # It serves again, so that the time without a request counts from the next hand-over on.
        view = change_replica(
            view, predecessor.id, lambda replica: replace(replica, hand_over_s=None)
        )
    return view


def _note_failure(
    view: ClusterView, replica: Replica, failure: Failure, at_s: float
) -> ClusterView:
    predecessor = view.predecessor(replica)
    if predecessor is not None:
        return change_replica(view, predecessor.id, partial(_with_failed_successor, at_s=at_s))
    failed = FailedStart(at_s=at_s, failure=failure)
    return change_deployment(
        view,
        replica.deployment,
        lambda state: replace(state, failed_starts=(*state.failed_starts, failed)),
    )


def _with_failed_successor(replica: Replica, *, at_s: float) -> Replica:
    return replace(
        replica, failed_successors=replica.failed_successors + 1, successor_failed_s=at_s
    )


def _hand_over_begun(view: ClusterView, action: HandOver, at_s: float) -> ClusterView:
    return change_replica(
        view,
        action.replica,
        lambda replica: replace(
            replica,
            telling=True,
            hand_over_s=(replica.hand_over_s or at_s) if action.successors else replica.hand_over_s,
        ),
    )


def _deployment_failed(view: ClusterView, action: FailDeployment) -> ClusterView:
    view = change_deployment(
        view,
        action.deployment,
        lambda state: replace(
            state,
            failure=action.failure,
            failure_number=state.failure_number + 1,
            waiting_since_s=None,
        ),
    )
    # The gateways will say so themselves, but until then these requests would fail it again.
    gateways = {
        name: _nothing_waiting(gateway, action.deployment)
        for name, gateway in view.gateways.items()
    }
    return replace(view, gateways=gateways)


def _nothing_waiting(gateway: GatewayState, deployment: str) -> GatewayState:
    demand = gateway.demands.get(deployment)
    if demand is None:
        return gateway
    return replace(
        gateway, demands=with_item(gateway.demands, deployment, replace(demand, waiting=0))
    )
