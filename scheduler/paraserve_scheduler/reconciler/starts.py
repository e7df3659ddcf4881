"""Asks the policy and turns its decisions into actions: starts, stops, slots. Pure.

It also holds back what failed, gives up on requests that no start can serve, and stops successors
whose room waiting requests need.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.errors import InsufficientCapacity
from paraserve_scheduler.planner.decisions import Decision, DropSlot, Start, Stop, WarmSlot
from paraserve_scheduler.planner.fleet import Fleet
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.reconciler.capacity import (
    node_spaces,
    space_on,
)
from paraserve_scheduler.reconciler.fleet_view import fleet_of, with_only_waiting
from paraserve_scheduler.reconciler.placement import check_room, lay_out
from paraserve_scheduler.reconciler.setbacks import pause_of, refusal
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import (
    Action,
    FailDeployment,
    KeepSlots,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.records import DeploymentState, Failure, Phase, Replica
from paraserve_scheduler.state.view import ClusterView


def follow_policy(turn: Turn) -> None:
    """Do what the policy decides, and refuse what waits for a start that cannot help."""
    failures = tuple(_refuse_starts(turn))
    for failed in failures:
        turn.do(failed)
    _reclaim(turn)
    pausing = _pausing(turn)
    at_zero = {state.name for state in pausing if _is_at_zero(turn.view, state)}
    held_back = {failed.deployment for failed in failures} | at_zero
    fleet = fleet_of(turn, held_back=held_back, full={state.name for state in pausing} - at_zero)
    for decision in find_policy(turn.config.name).decide(fleet, turn.now_s):
        for action in _carry_out(turn, decision):
            turn.do(action)
    _give_up(turn, held_back)


def _refuse_starts(turn: Turn) -> Iterator[FailDeployment]:
    """Fail what waits for a start that would only fail again."""
    for state in turn.view.deployments.values():
        if _is_left_waiting(turn.view, state):
            failure = refusal(turn, state)
            if failure is not None:
                waiting = turn.view.waiting(state.name)
                reason = f"{waiting} requests wait, but its start failed: {failure.message}"
                yield FailDeployment(deployment=state.name, failure=failure, reason=reason)


def _is_left_waiting(view: ClusterView, state: DeploymentState) -> bool:
    """Whether requests wait and no replica serves them, or will."""
    return not state.deleting and view.waiting(state.name) > 0 and _is_at_zero(view, state)


def _is_at_zero(view: ClusterView, state: DeploymentState) -> bool:
    return not any(map(view.is_serving, view.live_replicas(state.name)))


def _carry_out(turn: Turn, decision: Decision) -> tuple[Action, ...]:
    match decision:
        case Start():
            return _start(turn, decision)
        case Stop():
            return _stop_with_successors(turn.view, decision)
        case WarmSlot():
            return _keep_slots(turn.view, decision.node, 1, decision.reason)
        case DropSlot():
            return _keep_slots(turn.view, decision.node, 0, decision.reason)


def _start(turn: Turn, start: Start) -> tuple[Action, ...]:
    state = turn.view.deployments[start.deployment]
    total = state.deployment.model.num_layers
    stages = [
        (
            LayerRange(start=stage.start, end=stage.end, total=total),
            space_on(turn.view, stage.node, state.deployment.spec),
        )
        for stage in start.stages
    ]
    try:
        plan = lay_out(state.deployment, state.last_number + 1, stages, turn.config.placement)
    except InsufficientCapacity:
        # The policy reckons with its own sizes, which may be too small.
        return ()
    requested_s = state.waiting_since_s or turn.now_s
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


def _pausing(turn: Turn) -> tuple[DeploymentState, ...]:
    """The deployments whose next start is not yet due."""
    states = turn.view.deployments.values()
    return tuple(state for state in states if pause_of(turn, state) is not None)


def _reclaim(turn: Turn) -> None:
    """Stop successors that are still starting where requests that wait lack their room."""
    if not _starting_successors(turn.view):
        return
    #: By how many of them are gone.
    fleets: dict[int, Fleet] = {}
    for state in turn.view.deployments.values():
        if not _is_left_waiting(turn.view, state):
            continue
        spare, leaving = _starting_successors(turn.view), _leaving(turn.view)
        for count in range(len(spare) + 1):
            if count not in fleets:
                fleets[count] = _fleet_without(turn, (*leaving, *spare[:count]))
            if _fits(turn, fleets[count], state):
                for each in spare[:count]:
                    reason = f"'{state.name}' needs its room, and nobody waits for it"
                    turn.do(StopReplica(replica=each.id, reason=reason))
                    fleets.clear()
                break


def _leaving(view: ClusterView) -> tuple[Replica, ...]:
    return tuple(replica for replica in view.live_replicas() if replica.phase is Phase.STOPPING)


def _give_up(turn: Turn, held_back: Collection[str]) -> None:
    """Refuse what has waited for a while, unless replicas are leaving that it has room without."""
    freed: Fleet | None = None
    leaving = _leaving(turn.view)
    for state in turn.view.deployments.values():
        if state.name in held_back or not _is_left_waiting(turn.view, state):
            continue
        if _waited_s(turn, state) < turn.config.capacity_grace_s:
            continue
        if leaving:
            freed = freed or _fleet_without(turn, leaving)
            if _fits(turn, freed, state):
                continue
        _fail_without_room(turn, state)


def _waited_s(turn: Turn, state: DeploymentState) -> float:
    return turn.now_s - (state.waiting_since_s or turn.now_s)


def _fail_without_room(turn: Turn, state: DeploymentState) -> None:
    failure = Failure(
        grpc_code=InsufficientCapacity.grpc_code,
        message=_shortage(turn, state)
        or f"'{state.name}' has room on no set of nodes as policy '{turn.config.name}' needs it.",
    )
    reason = f"no room after {_waited_s(turn, state):.1f} s: {failure.message}"
    turn.do(FailDeployment(deployment=state.name, failure=failure, reason=reason))


def _fleet_without(turn: Turn, gone: tuple[Replica, ...]) -> Fleet:
    return fleet_of(turn.supposing(turn.view.without(gone)))


def _fits(turn: Turn, fleet: Fleet, state: DeploymentState) -> bool:
    """Whether the policy would start a replica in that fleet if nobody else waited."""
    asked = with_only_waiting(fleet, state.name)
    decisions = find_policy(turn.config.name).decide(asked, turn.now_s)
    return any(
        isinstance(decision, Start) and decision.deployment == state.name for decision in decisions
    )


def _shortage(turn: Turn, state: DeploymentState) -> str | None:
    spaces = node_spaces(turn, state.deployment.spec)
    try:
        check_room(state.deployment, spaces, turn.config.placement)
    except InsufficientCapacity as shortage:
        return str(shortage)
    return None


def _starting_successors(view: ClusterView) -> tuple[Replica, ...]:
    return tuple(
        replica
        for replica in view.live_replicas()
        if replica.phase is Phase.STARTING and view.wanted_predecessor(replica) is not None
    )
