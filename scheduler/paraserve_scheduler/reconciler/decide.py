"""What to do about the state of the cluster: a view and a time in, a sequence of actions out. Pure.

The rules here hold whatever the policy decides: a replica that lost a part is stopped as a whole,
stopped replicas and orphaned parts are removed. The policy is asked in `reconciler.starts`,
successors are decided in `reconciler.consolidation`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from paraserve_scheduler.reconciler import consolidation
from paraserve_scheduler.reconciler.capacity import (
    is_alive,
    node_trouble,
)
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.reconciler.starts import follow_policy
from paraserve_scheduler.state.actions import (
    Action,
    DropDeployment,
    RemovePart,
    RemoveReplica,
    StopReplica,
)
from paraserve_scheduler.state.begin import begin
from paraserve_scheduler.state.records import Failure, Phase, Replica
from paraserve_scheduler.state.view import ClusterView


def decide(view: ClusterView, now_s: float, config: PolicyConfig) -> tuple[Action, ...]:
    """All that is to be done now; every action is possible when those before it have begun."""
    view = view.without_silent_gateways(now_s - config.gateway_timeout_s)
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
        if not is_alive(view, node, now_s, config):
            continue
        for replica in sorted({part.replica for part in view.orphans(node)}):
            if (name, replica) not in view.removing_parts:
                yield RemovePart(node=name, replica=replica, reason="no replica has this part")


def _drop_deployments(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    del now_s, config
    for state in view.deployments.values():
        if state.deleting and not view.live_replicas(state.name):
            yield DropDeployment(deployment=state.name, reason="deleted, and no replica is left")


_Rule = Callable[[ClusterView, float, PolicyConfig], Iterator[Action]]

_RULES: tuple[_Rule, ...] = (
    _stop_replicas,
    consolidation.give_up_successors,
    consolidation.stop_succeeded,
    _remove_replicas,
    _remove_orphans,
    # What requests wait for gets room first.
    follow_policy,
    consolidation.start_successors,
    consolidation.hand_over,
    _drop_deployments,
)
