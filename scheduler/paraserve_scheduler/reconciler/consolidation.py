"""When a replica gets successors, how many and where, and when it hands over to them. Pure.

Pipelines become full instances, and drained nodes become empty. A successor is an ordinary replica
of one stage that takes over the requests of another one; it is placed and removed like any other. A
replica serves until all its successors are ready.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from paraserve_backend.errors import InsufficientCapacity
from paraserve_scheduler.policies.keep_alive import UNKNOWN_LIFE_S
from paraserve_scheduler.reconciler.capacity import successor_spaces
from paraserve_scheduler.reconciler.placement import NodeSpace, place_successor
from paraserve_scheduler.reconciler.setbacks import pause_of
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import (
    Action,
    HandOver,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import DeploymentState, Phase, Replica
from paraserve_scheduler.state.view import ClusterView

#: Failures beyond which the pause before the next successor grows no more.
_MOST_DOUBLINGS = 6


# ---- rules of the policy ----


def start_successors(turn: Turn) -> None:
    for replica in turn.view.live_replicas():
        if may_move(turn.view, replica) and not _is_backing_off(turn, replica):
            # The next replica cannot have the same room.
            for action in _moves(turn, replica):
                turn.do(action)


def give_up_successors(turn: Turn) -> None:
    """Stop successors that are still starting and no longer wanted."""
    for replica in turn.view.live_replicas():
        for number, successor in enumerate(turn.view.successors(replica)):
            if successor.phase is Phase.STARTING and replica.is_wanted:
                reason = _unwanted(turn, replica, successor, is_first=number == 0)
                if reason is not None:
                    turn.do(StopReplica(replica=successor.id, reason=reason))


def hand_over(turn: Turn) -> None:
    """Tell every replica that is ready who takes its requests, until its head has taken note."""
    for replica in turn.view.live_replicas():
        successors = tuple(successor.id for successor in turn.view.ready_successors(replica))
        state = replica.hand_over
        if replica.phase is not Phase.READY or state.is_notifying or successors == state.notified:
            continue
        retry_s = turn.config.consolidation.hand_over_retry_s
        failed_s = state.notify_failed_s
        if failed_s is None or turn.now_s - failed_s >= retry_s:
            verb = "is" if len(successors) == 1 else "are"
            reason = (
                f"{listed(successors)} {verb} ready" if successors else "its successors are lost"
            )
            turn.do(HandOver(replica=replica.id, successors=successors, reason=reason))


def stop_succeeded(turn: Turn) -> None:
    """Stop replicas all of whose requests have moved."""
    for replica in turn.view.live_replicas():
        successors = turn.view.ready_successors(replica)
        since_s = replica.hand_over.since_s
        if replica.phase is not Phase.READY or since_s is None or not successors:
            continue
        if turn.is_released(replica, since_s) and all(
            _has_taken_over(turn.view, successor) for successor in successors
        ):
            into = listed(tuple(successor.id for successor in successors))
            verb = "moved to" if len(replica.plan.stages) == 1 else "consolidated into"
            turn.do(StopReplica(replica=replica.id, reason=f"{verb} {into}"))


def _has_taken_over(view: ClusterView, successor: Replica) -> bool:
    """Whether it answers what was handed to it; until it does, its predecessor may be needed."""
    if view.is_silent(successor):
        return False
    return successor.first_token_s is not None or view.replica_in_flight(successor) == 0


# ---- whether, and where to ----


def may_move(view: ClusterView, replica: Replica) -> bool:
    """Whether it may get a successor: it serves, and neither hands over nor takes over now."""
    return (
        replica.phase is Phase.READY
        and replica.hand_over.since_s is None
        and view.wanted_predecessor(replica) is None
    )


def _is_backing_off(turn: Turn, replica: Replica) -> bool:
    return pause_s(turn, replica) > 0


def pause_s(turn: Turn, replica: Replica) -> float:
    """Seconds until the next successor may be tried."""
    state = turn.view.deployments[replica.deployment]
    pause = pause_of(turn, state)
    paused_s = 0.0 if pause is None else pause.until_s - turn.now_s
    failed_s = replica.hand_over.successor_failed_s
    if failed_s is None:
        return paused_s
    doublings = min(replica.hand_over.failed_successors - 1, _MOST_DOUBLINGS)
    whole_s = turn.config.consolidation.retry_s * 2.0**doublings
    return max(paused_s, failed_s + whole_s - turn.now_s)


def _moves(turn: Turn, replica: Replica) -> tuple[Action, ...]:
    if any(stage.node in turn.view.cordoned for stage in replica.plan.stages):
        return _evacuate(turn, replica)
    is_pipeline = len(replica.plan.stages) > 1
    if is_pipeline and turn.view.deployments[replica.deployment].deployment.spec.consolidate:
        return _consolidate(turn, replica)
    return ()


def _evacuate(turn: Turn, replica: Replica) -> tuple[Action, ...]:
    if turn.view.successors(replica):
        return ()
    nodes = {stage.node for stage in replica.plan.stages}
    where = listed(tuple(sorted(turn.view.cordoned & nodes)))
    try:
        plan = evacuation(turn, replica)
    except InsufficientCapacity:
        if not turn.view.is_idle(replica.deployment):
            return ()
        return (StopReplica(replica=replica.id, reason=f"{where} is drained, and it is idle"),)
    reason = f"{where} is drained: {replica.id} moves to {plan.head.node}"
    return (StartReplica(plan=plan, requested_s=turn.now_s, reason=reason),)


def evacuation(turn: Turn, replica: Replica) -> ReplicaPlan:
    """A successor elsewhere: where its weights lie already, else where there is most room.

    Raises:
        InsufficientCapacity: no node has room; says how much is missing on the best one.
    """
    spaces = successor_spaces(turn, replica)
    own = [stage.node for stage in replica.plan.stages if stage.node in spaces]
    others = sorted(set(spaces) - set(own), key=lambda name: (-spaces[name].free_bytes, name))
    names = [*own, *others]
    plan = next(_fitting(turn, replica, [spaces[name] for name in names]), None)
    if plan is not None:
        return plan
    if not names:
        raise InsufficientCapacity(f"no other live node can take '{replica.deployment}'.")
    # Raises, and says why.
    roomiest = max(names, key=lambda name: spaces[name].free_bytes)
    return successor_plan(turn, replica, spaces[roomiest])


def _consolidate(turn: Turn, replica: Replica) -> tuple[Action, ...]:
    if not _has_served(turn, replica):
        return ()
    successors = turn.view.successors(replica)
    wanted = _instances_wanted(turn, replica)
    plans = _worthwhile(turn, replica, is_calm=wanted == 1)
    # Under load one full instance would do less than the pipeline.
    if wanted > 1 and len(successors) + len(plans) == 1:
        return ()
    missing = max(0, wanted - len(successors))
    load = _load(turn.view, replica)
    reason = f"{replica.id} serves {load} requests as a pipeline"
    chosen = [replace(plan, background=wanted == 1) for plan in plans[:missing]]
    return tuple(StartReplica(plan=plan, requested_s=turn.now_s, reason=reason) for plan in chosen)


def _has_served(turn: Turn, replica: Replica) -> bool:
    """Whether it has been of use for long enough, and is still."""
    after_s = turn.config.consolidation.after_s
    state = turn.view.deployments[replica.deployment]
    ready_s = turn.now_s if replica.ready_s is None else replica.ready_s
    return turn.now_s - ready_s >= after_s and _idle_s(turn, state) <= after_s


def _idle_s(turn: Turn, state: DeploymentState) -> float:
    return turn.now_s - state.last_active_s if turn.view.is_idle(state.name) else 0.0


def _load(view: ClusterView, replica: Replica) -> int:
    """Requests that it and its successors work on or that wait."""
    replicas = (replica, *view.successors(replica))
    return view.waiting(replica.deployment) + sum(map(view.replica_in_flight, replicas))


def _instances_wanted(turn: Turn, replica: Replica) -> int:
    """One when it is calm, else as many as the requests need, at most one for each stage.

    Nor more than the deployment may have replicas.
    """
    load = _load(turn.view, replica) / replica.plan.max_sequences
    limit = turn.config.consolidation.scale_up_load
    if load <= limit:
        return 1
    most = min(len(replica.plan.stages), _may_have(turn.view, replica))
    return max(1, min(max(2, math.ceil(load)), most))


def _may_have(view: ClusterView, replica: Replica) -> int:
    """Instances that a replica may become beside the others that serve or start."""
    others = sum(
        other.is_wanted and other.id != replica.id and other.plan.succeeds != replica.id
        for other in view.live_replicas(replica.deployment)
    )
    return view.deployments[replica.deployment].deployment.spec.max_replicas - others


def _worthwhile(turn: Turn, replica: Replica, *, is_calm: bool) -> list[ReplicaPlan]:
    """Full instances on nodes of its stages that have room and are there in time to be of use."""
    spaces = successor_spaces(turn, replica)
    taken = {successor.plan.head.node for successor in turn.view.successors(replica)}
    left_s = _life_left_s(turn, replica)
    names = [
        stage.node
        for stage in replica.plan.stages
        if stage.node in spaces
        and stage.node not in taken
        # What nobody waits for must not slow down a start that somebody waits for.
        and not (is_calm and turn.view.running_fetches(stage.node))
    ]
    return [
        plan
        for plan in _fitting(turn, replica, [spaces[name] for name in names])
        if _start_s(turn, replica, plan, spaces[plan.head.node]) < left_s
    ]


def _life_left_s(turn: Turn, replica: Replica) -> float:
    """How long it will probably be there; one that works, as long again as it has served."""
    state = turn.view.deployments[replica.deployment]
    keep_alive_s = state.deployment.spec.keep_alive_s
    if keep_alive_s is None:
        keep_alive_s = UNKNOWN_LIFE_S
    if turn.view.is_idle(state.name):
        return keep_alive_s - _idle_s(turn, state)
    return keep_alive_s + turn.now_s - (replica.ready_s or turn.now_s)


def _start_s(turn: Turn, replica: Replica, plan: ReplicaPlan, space: NodeSpace) -> float:
    """Predicted time until a successor is ready; what the node has is not fetched again."""
    missing = plan.head.weight_bytes - turn.view.host_bytes(replica, space.name)
    placement = turn.config.placement
    return missing / space.bytes_per_s + placement.runtime_s + placement.tail_s


def _fitting(turn: Turn, replica: Replica, spaces: Sequence[NodeSpace]) -> Iterator[ReplicaPlan]:
    """A successor on each of these nodes that has room for one, with ascending numbers."""
    number = turn.view.deployments[replica.deployment].last_number + 1
    for space in spaces:
        try:
            plan = successor_plan(turn, replica, space)
        except InsufficientCapacity:
            continue
        yield replace(plan, number=number)
        number += 1


def successor_plan(turn: Turn, replica: Replica, space: NodeSpace) -> ReplicaPlan:
    state = turn.view.deployments[replica.deployment]
    number = state.last_number + 1
    return place_successor(state.deployment, number, replica.plan, space, turn.config.placement)


def _unwanted(
    turn: Turn,
    replica: Replica,
    successor: Replica,
    *,
    is_first: bool,
) -> str | None:
    """Why `successor`, which is starting, is of no use any more."""
    node = successor.plan.head.node
    if node in turn.view.cordoned:
        return f"{node} is drained"
    started_s = turn.now_s - successor.planned_s
    config = turn.config.consolidation
    is_calm = _load(turn.view, replica) <= config.scale_up_load * replica.plan.max_sequences / 2
    if not is_first and started_s >= config.after_s and is_calm:
        return f"{replica.id} needs no further instance any more"
    return None


def listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
