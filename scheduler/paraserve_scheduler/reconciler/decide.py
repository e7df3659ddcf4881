"""What to do about the state of the cluster: a view and a time in, a sequence of actions out. Pure.

The rules here hold whatever the policy decides: a replica that lost a part is stopped as a whole,
stopped replicas and orphaned parts are removed. The policy is asked in `reconciler.starts`,
successors are decided in `reconciler.consolidation`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from paraserve_scheduler.reconciler import consolidation
from paraserve_scheduler.reconciler.capacity import (
    is_alive,
    node_trouble,
)
from paraserve_scheduler.reconciler.starts import follow_policy
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import (
    Action,
    DropDeployment,
    RemovePart,
    RemoveReplica,
    StopReplica,
)
from paraserve_scheduler.state.records import Failure, Phase, Replica


def decide(turn: Turn) -> tuple[Action, ...]:
    """Decide on all that is to be done now; every action is possible when those before it began."""
    turn = turn.without_silent_gateways()
    for rule in _RULES:
        rule(turn)
    return tuple(turn.actions)


# ---- stopping ----


def _stop_replicas(turn: Turn) -> None:
    for replica in turn.view.live_replicas():
        if replica.is_wanted:
            action = _stop(turn, replica)
            if action is not None:
                turn.do(action)


def _stop(turn: Turn, replica: Replica) -> StopReplica | None:
    state = turn.view.deployments[replica.deployment]
    if state.deleting:
        return StopReplica(replica=replica.id, reason=f"'{state.name}' is deleted")
    failure = _failure(turn, replica)
    if failure is not None:
        return StopReplica(replica=replica.id, reason=failure.message, failure=failure)
    return None


def _failure(turn: Turn, replica: Replica) -> Failure | None:
    """Why this replica cannot go on, if so."""
    for stage, part in replica.stage_plans:
        if part.phase is Phase.FAILED:
            # A part that ended without saying why is an error of ours or of the agent.
            return part.failure or _unavailable(f"{replica.id} failed on node {stage.node}.")
    for stage in replica.plan.stages:
        trouble = node_trouble(turn, stage.node)
        if trouble is not None:
            return replace(_unavailable(trouble), is_nodes_fault=True)
    started_s = turn.now_s - replica.planned_s
    if replica.phase is Phase.STARTING and started_s > _start_limit_s(turn, replica):
        return Failure(
            grpc_code="DEADLINE_EXCEEDED",
            message=f"{replica.id} was not ready within {turn.config.start_timeout_s:g} s.",
        )
    return None


def _start_limit_s(turn: Turn, replica: Replica) -> float:
    """Seconds from the plan until a starting replica must be ready."""
    if not replica.recovered:
        return turn.config.start_timeout_s
    # It may have served for hours before the scheduler restarted.
    return turn.view.started_s - replica.planned_s + turn.config.start_timeout_s


def _unavailable(message: str) -> Failure:
    return Failure(grpc_code="UNAVAILABLE", message=message)


# ---- removing ----


def _remove_replicas(turn: Turn) -> None:
    for replica in turn.view.live_replicas():
        if replica.phase is Phase.STOPPING and not replica.removing:
            reason = _removable(turn, replica)
            if reason is not None:
                turn.do(RemoveReplica(replica=replica.id, reason=reason))


def _removable(turn: Turn, replica: Replica) -> str | None:
    """Why a stopping replica may go now; `None` while requests may still run on it."""
    if replica.failure is not None:
        return "it failed"
    if replica.ready_s is None:
        return "it never served"
    stopping_s = replica.stopping_s or turn.now_s
    unrouted_s = replica.hand_over.since_s or stopping_s
    if turn.is_released(replica, unrouted_s):
        return "no request runs on it"
    if turn.now_s - stopping_s >= turn.config.drain_grace_s:
        in_flight = turn.view.replica_in_flight(replica)
        return f"{in_flight} requests did not end within {turn.config.drain_grace_s:g} s"
    return None


def _remove_orphans(turn: Turn) -> None:
    for name, node in turn.view.nodes.items():
        if not is_alive(turn, node):
            continue
        for replica in sorted({part.replica for part in turn.view.orphans(node)}):
            if (name, replica) not in turn.view.removing_parts:
                turn.do(RemovePart(node=name, replica=replica, reason="no replica has this part"))


def _drop_deployments(turn: Turn) -> None:
    for state in turn.view.deployments.values():
        if state.deleting and not turn.view.live_replicas(state.name):
            turn.do(DropDeployment(deployment=state.name, reason="deleted, and no replica is left"))


_RULES: tuple[Callable[[Turn], None], ...] = (
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
