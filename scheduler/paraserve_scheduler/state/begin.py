"""What an action changes in the view when it begins, before anything has come of it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    change_hand_over,
    change_node,
    change_replica,
    with_item,
    without_item,
)
from paraserve_scheduler.state.fold_reports import (
    measured_decode,
)
from paraserve_scheduler.state.records import (
    GatewayState,
    HandOverState,
    PartState,
    Phase,
    Replica,
    Setback,
)
from paraserve_scheduler.state.view import ClusterView

#: More of them than make the longest pause.
_KEPT_SETBACKS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """An action at the moment it begins."""

    action: Action
    at_s: float


def begin(view: ClusterView, begun: Begun) -> ClusterView:
    """The view when an action has been started, before anything has come of it."""
    match begun.action:
        case StartReplica() as action:
            return _with_replica(view, _starting(action, begun.at_s))
        case StopReplica() as action:
            return _replica_stopping(view, action, begun)
        case RemoveReplica() as action:
            return change_replica(view, action.replica, partial(replace, removing=True))
        case RemovePart() as action:
            pair = (action.node, action.replica)
            return replace(view, removing_parts=view.removing_parts | {pair})
        case FailDeployment() as action:
            return _deployment_failed(view, action)
        case HandOver() as action:
            handing_over = partial(_handing_over, action=action, at_s=begun.at_s)
            return change_hand_over(view, action.replica, handing_over)
        case KeepSlots() as action:
            return change_node(view, action.node, partial(replace, wanted_slots=action.idle_slots))
        case DropDeployment() as action:
            return _deployment_dropped(view, action.deployment)


def _starting(action: StartReplica, at_s: float) -> Replica:
    plan = action.plan
    return Replica(
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


def _with_replica(view: ClusterView, replica: Replica) -> ClusterView:
    numbered = partial(replace, last_number=replica.plan.number)
    view = change_deployment(view, replica.deployment, numbered)
    return replace(view, replicas=with_item(view.replicas, replica.id, replica))


def _replica_stopping(view: ClusterView, action: StopReplica, begun: Begun) -> ClusterView:
    replica = view.replicas[action.replica]
    view = measured_decode(view, replica)
    if action.failure is not None:
        nodes = tuple(stage.node for stage in replica.plan.stages)
        setback = Setback(at_s=begun.at_s, failure=action.failure, nodes=nodes)
        view = _note_setback(view, replica, setback)
    stopping = partial(
        replace,
        phase=Phase.STOPPING,
        stopping_s=begun.at_s,
        stop_reason=action.reason,
        failure=action.failure,
    )
    view = change_replica(view, replica.id, stopping)
    predecessor = view.predecessor(replica)
    if predecessor is not None and not view.ready_successors(predecessor):
        # It serves again, so that the time without a request counts from the next hand-over on.
        view = change_hand_over(view, predecessor.id, partial(replace, since_s=None))
    return view


def _note_setback(view: ClusterView, replica: Replica, setback: Setback) -> ClusterView:
    if replica.ready_s is not None:
        view = change_deployment(
            view,
            replica.deployment,
            lambda state: replace(state, deaths=_with_newest(state.deaths, setback)),
        )
    predecessor = view.predecessor(replica)
    if predecessor is not None:
        failing = partial(_with_failed_successor, at_s=setback.at_s)
        return change_hand_over(view, predecessor.id, failing)
    return change_deployment(
        view,
        replica.deployment,
        lambda state: replace(state, failed_starts=_with_newest(state.failed_starts, setback)),
    )


def _with_newest(setbacks: tuple[Setback, ...], newest: Setback) -> tuple[Setback, ...]:
    return (*setbacks, newest)[-_KEPT_SETBACKS:]


def _with_failed_successor(state: HandOverState, *, at_s: float) -> HandOverState:
    return replace(state, failed_successors=state.failed_successors + 1, successor_failed_s=at_s)


def _handing_over(state: HandOverState, *, action: HandOver, at_s: float) -> HandOverState:
    since_s = (state.since_s or at_s) if action.successors else state.since_s
    return replace(state, is_notifying=True, since_s=since_s)


def _deployment_dropped(view: ClusterView, name: str) -> ClusterView:
    return replace(
        view,
        deployments=without_item(view.deployments, name),
        replicas={
            key: replica for key, replica in view.replicas.items() if replica.deployment != name
        },
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
