"""Asks the policy and turns its decisions into actions: starts, stops, slots. Pure.

It also holds back what failed, gives up on requests that no start can serve, and stops successors
whose room waiting requests need.
"""

from __future__ import annotations

from collections.abc import Iterator

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.errors import InsufficientCapacity
from paraserve_scheduler.planner.decisions import Decision, DropSlot, Start, Stop, WarmSlot
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.reconciler.capacity import (
    node_spaces,
    space_on,
)
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.reconciler.fleet_view import fleet_of
from paraserve_scheduler.reconciler.placement import check_room, lay_out
from paraserve_scheduler.state.actions import (
    Action,
    FailDeployment,
    KeepSlots,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.begin import begin
from paraserve_scheduler.state.records import DeploymentState, FailedStart, Failure, Phase, Replica
from paraserve_scheduler.state.view import ClusterView

#: Failures that another try would only repeat.
_PERMANENT = frozenset(
    {
        "INVALID_ARGUMENT",
        "NOT_FOUND",
        "ALREADY_EXISTS",
        "PERMISSION_DENIED",
        "UNAUTHENTICATED",
        "UNIMPLEMENTED",
        "FAILED_PRECONDITION",
    }
)


def follow_policy(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    failures = tuple(_refuse_starts(view, now_s, config))
    for failed in failures:
        yield failed
        view = begin(view, failed, now_s)
    for stop in _reclaim(view, now_s, config):
        yield stop
        view = begin(view, stop, now_s)
    held_back = {failed.deployment for failed in failures} | _pausing(view, now_s, config)
    fleet = fleet_of(view, now_s, config, held_back=held_back)
    for decision in find_policy(config.name).decide(fleet, now_s):
        for action in _carry_out(view, decision, now_s, config):
            yield action
            view = begin(view, action, now_s)
    for state in view.deployments.values():
        if _is_left_waiting(view, state) and state.name not in held_back:
            yield from _without_room(view, state, now_s, config)


def _refuse_starts(
    view: ClusterView, now_s: float, config: PolicyConfig
) -> Iterator[FailDeployment]:
    """Fail what waits for a start that would only fail again."""
    for state in view.deployments.values():
        if _is_left_waiting(view, state):
            failure = _too_many_failures(state, now_s, config)
            if failure is not None:
                waiting = view.waiting(state.name)
                reason = f"{waiting} requests wait, but its start failed: {failure.message}"
                yield FailDeployment(deployment=state.name, failure=failure, reason=reason)


def _is_left_waiting(view: ClusterView, state: DeploymentState) -> bool:
    """Whether requests wait and no replica serves them, or will."""
    return not state.deleting and view.waiting(state.name) > 0 and _is_at_zero(view, state)


def _is_at_zero(view: ClusterView, state: DeploymentState) -> bool:
    return not any(replica.is_wanted for replica in view.live_replicas(state.name))


def _carry_out(
    view: ClusterView, decision: Decision, now_s: float, config: PolicyConfig
) -> tuple[Action, ...]:
    match decision:
        case Start():
            return _start(view, decision, now_s, config)
        case Stop():
            return _stop_with_successors(view, decision)
        case WarmSlot():
            return _keep_slots(view, decision.node, 1, decision.reason)
        case DropSlot():
            return _keep_slots(view, decision.node, 0, decision.reason)


def _start(
    view: ClusterView, start: Start, now_s: float, config: PolicyConfig
) -> tuple[Action, ...]:
    state = view.deployments[start.deployment]
    total = state.deployment.model.num_layers
    stages = [
        (
            LayerRange(start=stage.start, end=stage.end, total=total),
            space_on(view, stage.node, state.deployment.spec),
        )
        for stage in start.stages
    ]
    try:
        plan = lay_out(state.deployment, state.last_number + 1, stages, config.placement)
    except InsufficientCapacity:
        # The policy reckons with its own sizes, which may be too small.
        return ()
    requested_s = state.waiting_since_s or now_s
    return (
        StartReplica(
            plan=plan, requested_s=requested_s, reason=start.reason, prediction=start.prediction
        ),
    )


def _stop_with_successors(view: ClusterView, stop: Stop) -> tuple[StopReplica, ...]:
    replica = view.replicas[stop.replica]
    # Those were started for requests that have ended.
    going = (replica, *view.successors(replica))
    return tuple(StopReplica(replica=stopped.id, reason=stop.reason) for stopped in going)


def _keep_slots(view: ClusterView, node: str, wanted: int, reason: str) -> tuple[KeepSlots, ...]:
    if view.nodes[node].wanted_slots == wanted:
        return ()
    return (KeepSlots(node=node, idle_slots=wanted, reason=reason),)


def _too_many_failures(
    state: DeploymentState, now_s: float, config: PolicyConfig
) -> Failure | None:
    """The newest failure, if it is of no use to try again yet."""
    recent = _recent_failures(state, now_s, config)
    if not recent:
        return None
    newest = recent[-1]
    if newest.failure.grpc_code in _PERMANENT:
        # Only somebody can repair it, and then wants to see so: whoever comes later, tries.
        tried_just_now = now_s - newest.at_s < config.repair_pause_s
        return newest.failure if tried_just_now else None
    return newest.failure if len(recent) >= config.max_failed_starts else None


def _pausing(view: ClusterView, now_s: float, config: PolicyConfig) -> set[str]:
    """The deployments at zero that failed again when tried again; the next try is not yet due.

    If a node is lost, or its Triton, that is known in time for the try to go around it.
    """
    return {
        state.name
        for state in view.deployments.values()
        # What is rare first: the rest looks at every replica there is.
        if len(recent := _recent_failures(state, now_s, config)) > 1
        and now_s - recent[-1].at_s <= config.node_timeout_s
        and _is_at_zero(view, state)
    }


def _recent_failures(
    state: DeploymentState, now_s: float, config: PolicyConfig
) -> tuple[FailedStart, ...]:
    return tuple(
        failed for failed in state.failed_starts if now_s - failed.at_s < config.failure_window_s
    )


def _reclaim(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[StopReplica]:
    """Stop successors that are still starting where requests that wait lack their room."""
    if not _starting_successors(view):
        return
    for state in view.deployments.values():
        if not _is_left_waiting(view, state):
            continue
        spare, leaving = _starting_successors(view), _leaving(view)
        for count in range(len(spare) + 1):
            if _fits(view.without((*leaving, *spare[:count])), state, now_s, config):
                for each in spare[:count]:
                    reason = f"'{state.name}' needs its room, and nobody waits for it"
                    stop = StopReplica(replica=each.id, reason=reason)
                    yield stop
                    view = begin(view, stop, now_s)
                break


def _leaving(view: ClusterView) -> tuple[Replica, ...]:
    return tuple(replica for replica in view.live_replicas() if replica.phase is Phase.STOPPING)


def _without_room(
    view: ClusterView, state: DeploymentState, now_s: float, config: PolicyConfig
) -> Iterator[Action]:
    """Wait for replicas that are leaving, or for others to end; give up after a while."""
    leaving = _leaving(view)
    if leaving and _fits(view.without(leaving), state, now_s, config):
        return
    waited_s = now_s - (state.waiting_since_s or now_s)
    if waited_s < config.capacity_grace_s:
        return
    failure = Failure(
        grpc_code=InsufficientCapacity.grpc_code,
        message=_shortage(view, state, now_s, config)
        or f"'{state.name}' has room on no set of nodes as policy '{config.name}' needs it.",
    )
    reason = f"no room after {waited_s:.1f} s: {failure.message}"
    yield FailDeployment(deployment=state.name, failure=failure, reason=reason)


def _fits(view: ClusterView, state: DeploymentState, now_s: float, config: PolicyConfig) -> bool:
    """Whether the policy would start a replica in that cluster."""
    others = view.deployments.keys() - {state.name}
    fleet = fleet_of(view, now_s, config, held_back=others)
    decisions = find_policy(config.name).decide(fleet, now_s)
    return any(
        isinstance(decision, Start) and decision.deployment == state.name for decision in decisions
    )


def _shortage(
    view: ClusterView, state: DeploymentState, now_s: float, config: PolicyConfig
) -> str | None:
    spaces = node_spaces(view, state.deployment.spec, now_s, config)
    try:
        check_room(state.deployment, spaces, config.placement)
    except InsufficientCapacity as shortage:
        return str(shortage)
    return None


def _starting_successors(view: ClusterView) -> tuple[Replica, ...]:
    return tuple(
        replica
        for replica in view.live_replicas()
        if replica.phase is Phase.STARTING and view.wanted_predecessor(replica) is not None
    )
