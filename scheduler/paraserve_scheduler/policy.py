"""What to do about the state of the cluster. Pure: a view and a time in, actions out.

A deployment has no replica until requests wait, one while there is demand, and none again when it
was idle for its keep-alive time. A replica that lost any part is stopped whole. When one gets
successors is `consolidation`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from paraserve_backend.errors import InsufficientCapacity
from paraserve_scheduler import consolidation
from paraserve_scheduler.actions import (
    Action,
    DropDeployment,
    FailDeployment,
    RemovePart,
    RemoveReplica,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.capacity import is_alive, node_spaces, node_trouble
from paraserve_scheduler.config import PolicyConfig
from paraserve_scheduler.fold import begin
from paraserve_scheduler.placement import place
from paraserve_scheduler.plans import ReplicaPlan
from paraserve_scheduler.state import (
    ClusterView,
    DeploymentState,
    Failure,
    Phase,
    Replica,
)

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


def decide(view: ClusterView, now_s: float, config: PolicyConfig) -> tuple[Action, ...]:
    """All that is to be done now; every action is possible when those before it have begun."""
    view = view.heard_since(now_s - config.gateway_timeout_s)
    actions: list[Action] = []
    for rule in _RULES:
        for action in rule(view, now_s, config):
            actions.append(action)
            view = begin(view, action, now_s)
    return tuple(actions)


# ---- stopping ----


def _stop_replicas(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    for replica in view.live_replicas():
        if replica.is_wanted:
            action = _stop(view, replica, now_s, config)
            if action is not None:
                yield action


def _stop(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> StopReplica | None:
    state = view.deployments[replica.deployment]
    if state.deleting:
        return StopReplica(replica=replica.id, reason=f"'{state.name}' is deleted")
    failure = _failure(view, replica, now_s, config)
    if failure is not None:
        return StopReplica(replica=replica.id, reason=failure.message, failure=failure)
    idle_s = now_s - state.last_active_s
    keep_alive_s = state.deployment.spec.keep_alive_s
    # A successor that is still starting was started for requests that have ended.
    may_end = replica.phase is Phase.READY or view.predecessor(replica) is not None
    if may_end and view.is_idle(state.name) and idle_s >= keep_alive_s:
        reason = f"idle for {idle_s:.1f} s, its keep-alive is {keep_alive_s:g} s"
        return StopReplica(replica=replica.id, reason=reason)
    return None


def _failure(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> Failure | None:
    """Why this replica cannot go on, if so."""
    for stage, part in replica.stage_plans:
        if part.phase is Phase.FAILED:
            # A part that ended without saying why is an error of ours or of the agent.
            return part.failure or _unavailable(f"{replica.id} failed on node {stage.node}.")
    for stage in replica.plan.stages:
        trouble = node_trouble(view, stage.node, now_s, config)
        if trouble is not None:
            return _unavailable(trouble)
    if replica.phase is Phase.STARTING and now_s - replica.planned_s > _start_limit(
        replica, view, config
    ):
        return Failure(
            grpc_code="DEADLINE_EXCEEDED",
            message=f"{replica.id} was not ready within {config.start_timeout_s:g} s.",
        )
    return None


def _start_limit(replica: Replica, view: ClusterView, config: PolicyConfig) -> float:
    """Seconds from the plan until a starting replica must be ready."""
    if not replica.recovered:
        return config.start_timeout_s
    # It may have served for hours before the scheduler restarted.
    return view.started_s - replica.planned_s + config.start_timeout_s


def _unavailable(message: str) -> Failure:
    return Failure(grpc_code="UNAVAILABLE", message=message)


# ---- removing ----


def _remove_replicas(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    for replica in view.live_replicas():
        if replica.phase is Phase.STOPPING and not replica.removing:
            reason = _removable(view, replica, now_s, config)
            if reason is not None:
                yield RemoveReplica(replica=replica.id, reason=reason)


def _removable(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> str | None:
    """Why a stopping replica may go now; `None` while requests may still run on it."""
    if replica.failure is not None:
        return "it failed"
    if replica.ready_s is None:
        return "it never served"
    stopping_s = replica.stopping_s or now_s
    unrouted_s = replica.hand_over_s or stopping_s
    if view.is_released(replica, unrouted_s + config.settle_s, now_s):
        return "no request runs on it"
    if now_s - stopping_s >= config.drain_grace_s:
        in_flight = view.replica_in_flight(replica)
        return f"{in_flight} requests did not end within {config.drain_grace_s:g} s"
    return None


def _remove_orphans(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    for name, node in view.nodes.items():
        if not is_alive(node, now_s, config):
            continue
        for replica in sorted({part.replica for part in view.orphans(node)}):
            if (name, replica) not in view.removing_parts:
                yield RemovePart(node=name, replica=replica, reason="no replica has this part")


def _drop_deployments(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    del now_s, config
    for state in view.deployments.values():
        if state.deleting and not view.live_replicas(state.name):
            yield DropDeployment(deployment=state.name, reason="deleted, and no replica is left")


# ---- starting ----


def _start_replicas(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    for name in view.deployments:
        for action in _start(view, view.deployments[name], now_s, config):
            yield action
            # The next deployment cannot have the same room.
            view = begin(view, action, now_s)


def _start(
    view: ClusterView, state: DeploymentState, now_s: float, config: PolicyConfig
) -> tuple[Action, ...]:
    waiting = view.waiting(state.name)
    served = any(replica.is_wanted for replica in view.live_replicas(state.name))
    if state.deleting or served or not waiting:
        return ()
    failure = _too_many_failures(state, now_s, config)
    if failure is not None:
        reason = f"{waiting} requests wait, but its start failed: {failure.message}"
        return (FailDeployment(deployment=state.name, failure=failure, reason=reason),)
    try:
        plan = _plan(view, state, now_s, config)
    except InsufficientCapacity as shortage:
        return _without_room(view, state, shortage, now_s, config)
    reason = f"{waiting} requests wait and no replica is there: {_describe(plan)}"
    requested_s = state.waiting_since_s or now_s
    return (StartReplica(plan=plan, requested_s=requested_s, reason=reason),)


def _too_many_failures(
    state: DeploymentState, now_s: float, config: PolicyConfig
) -> Failure | None:
    """The newest failure, if it is of no use to try again yet."""
    recent = [
        failed for failed in state.failed_starts if now_s - failed.at_s < config.failure_window_s
    ]
    if not recent:
        return None
    newest = recent[-1]
    if newest.failure.grpc_code in _PERMANENT:
        # Only somebody can repair it, and then wants to see so: whoever comes later, tries.
        tried_just_now = now_s - newest.at_s < config.repair_pause_s
        return newest.failure if tried_just_now else None
    return newest.failure if len(recent) >= config.max_failed_starts else None


def _plan(
    view: ClusterView, state: DeploymentState, now_s: float, config: PolicyConfig
) -> ReplicaPlan:
    spaces = node_spaces(view, state.deployment.spec, now_s, config)
    return place(state.deployment, state.last_number + 1, spaces, config.placement)


def _describe(plan: ReplicaPlan) -> str:
    return ", ".join(
        f"layers {stage.layers.start}-{stage.layers.end} on {stage.node}" for stage in plan.stages
    )


def _without_room(
    view: ClusterView,
    state: DeploymentState,
    shortage: InsufficientCapacity,
    now_s: float,
    config: PolicyConfig,
) -> tuple[Action, ...]:
    """Wait for replicas that are leaving, stop those nobody waits for, or give up."""
    leaving = tuple(r for r in view.live_replicas() if r.phase is Phase.STOPPING)
    spare = (*_starting_successors(view), *_longest_idle(view))
    for count in range(len(spare) + 1):
        if _fits(view.without((*leaving, *spare[:count])), state, now_s, config):
            reason = f"'{state.name}' needs its room, and nobody waits for it"
            return tuple(StopReplica(replica=each.id, reason=reason) for each in spare[:count])
    waited_s = now_s - (state.waiting_since_s or now_s)
    if waited_s < config.capacity_grace_s:
        return ()
    failure = Failure(grpc_code=shortage.grpc_code, message=str(shortage))
    reason = f"no room after {waited_s:.1f} s: {shortage}"
    return (FailDeployment(deployment=state.name, failure=failure, reason=reason),)


def _starting_successors(view: ClusterView) -> tuple[Replica, ...]:
    return tuple(
        replica
        for replica in view.live_replicas()
        if replica.phase is Phase.STARTING and view.wanted_predecessor(replica) is not None
    )


def _longest_idle(view: ClusterView) -> tuple[Replica, ...]:
    idle = [
        replica
        for replica in view.live_replicas()
        if replica.phase is Phase.READY and view.is_idle(replica.deployment)
    ]
    return tuple(sorted(idle, key=lambda r: view.deployments[r.deployment].last_active_s))


def _fits(view: ClusterView, state: DeploymentState, now_s: float, config: PolicyConfig) -> bool:
    try:
        _plan(view, state, now_s, config)
    except InsufficientCapacity:
        return False
    return True


_Rule = Callable[[ClusterView, float, PolicyConfig], Iterator[Action]]

_RULES: tuple[_Rule, ...] = (
    _stop_replicas,
    consolidation.give_up_successors,
    consolidation.stop_succeeded,
    _remove_replicas,
    _remove_orphans,
    # What requests wait for gets room first.
    _start_replicas,
    consolidation.start_successors,
    consolidation.hand_over,
    _drop_deployments,
)
