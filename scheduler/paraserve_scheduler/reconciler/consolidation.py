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
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.reconciler.placement import NodeSpace, place_successor
from paraserve_scheduler.state.actions import (
    Action,
    HandOver,
    StartReplica,
    StopReplica,
)
from paraserve_scheduler.state.begin import begin
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import DeploymentState, Phase, Replica
from paraserve_scheduler.state.view import ClusterView

#: Failures beyond which the pause before the next successor grows no more.
_MOST_DOUBLINGS = 6


# ---- rules of the policy ----


def start_successors(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    for replica in view.live_replicas():
        if may_move(view, replica) and not _is_backing_off(replica, now_s, config):
            for action in _moves(view, replica, now_s, config):
                yield action
                # The next replica cannot have the same room.
                view = begin(view, action, now_s)


def give_up_successors(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    """Stop successors that are still starting and no longer wanted."""
    for replica in view.live_replicas():
        for number, successor in enumerate(view.successors(replica)):
            if successor.phase is Phase.STARTING and replica.is_wanted:
                reason = _unwanted(view, replica, successor, now_s, config, is_first=number == 0)
                if reason is not None:
                    yield StopReplica(replica=successor.id, reason=reason)


def hand_over(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    """Tell every replica that is ready who takes its requests, until its head has taken note."""
    for replica in view.live_replicas():
        successors = tuple(successor.id for successor in view.ready_successors(replica))
        if replica.phase is not Phase.READY or replica.telling or successors == replica.targets:
            continue
        retry_s = config.consolidation.hand_over_retry_s
        failed_s = replica.telling_failed_s
        if failed_s is None or now_s - failed_s >= retry_s:
            verb = "is" if len(successors) == 1 else "are"
            reason = (
                f"{listed(successors)} {verb} ready" if successors else "its successors are lost"
            )
            yield HandOver(replica=replica.id, successors=successors, reason=reason)


def stop_succeeded(view: ClusterView, now_s: float, config: PolicyConfig) -> Iterator[Action]:
    """Stop replicas all of whose requests have moved."""
    for replica in view.live_replicas():
        successors = view.ready_successors(replica)
        if replica.phase is not Phase.READY or replica.hand_over_s is None or not successors:
            continue
        if view.is_released(replica, replica.hand_over_s + config.settle_s, now_s):
            into = listed(tuple(successor.id for successor in successors))
            verb = "moved to" if len(replica.plan.stages) == 1 else "consolidated into"
            yield StopReplica(replica=replica.id, reason=f"{verb} {into}")


# ---- whether, and where to ----


def may_move(view: ClusterView, replica: Replica) -> bool:
    """Whether it may get a successor: it serves, and neither hands over nor takes over now."""
    return (
        replica.phase is Phase.READY
        and replica.hand_over_s is None
        and view.wanted_predecessor(replica) is None
    )


def _is_backing_off(replica: Replica, now_s: float, config: PolicyConfig) -> bool:
    return pause_s(replica, now_s, config) > 0


def pause_s(replica: Replica, now_s: float, config: PolicyConfig) -> float:
    """Seconds until the next successor may be tried."""
    if replica.successor_failed_s is None:
        return 0.0
    doublings = min(replica.failed_successors - 1, _MOST_DOUBLINGS)
    whole_s = config.consolidation.retry_s * 2.0**doublings
    return max(0.0, replica.successor_failed_s + whole_s - now_s)


def _moves(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> tuple[Action, ...]:
    if any(stage.node in view.cordoned for stage in replica.plan.stages):
        return _evacuate(view, replica, now_s, config)
    is_pipeline = len(replica.plan.stages) > 1
    if is_pipeline and view.deployments[replica.deployment].deployment.spec.consolidate:
        return _consolidate(view, replica, now_s, config)
    return ()


def _evacuate(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> tuple[Action, ...]:
    if view.successors(replica):
        return ()
    where = listed(tuple(sorted(view.cordoned & {stage.node for stage in replica.plan.stages})))
    try:
        plan = evacuation(view, replica, now_s, config)
    except InsufficientCapacity:
        if not view.is_idle(replica.deployment):
            return ()
        return (StopReplica(replica=replica.id, reason=f"{where} is drained, and it is idle"),)
    reason = f"{where} is drained: {replica.id} moves to {plan.head.node}"
    return (StartReplica(plan=plan, requested_s=now_s, reason=reason),)


def evacuation(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> ReplicaPlan:
    """A successor elsewhere: where its weights lie already, else where there is most room.

    Raises:
        InsufficientCapacity: no node has room; says how much is missing on the best one.
    """
    spaces = successor_spaces(view, replica, now_s, config)
    own = [stage.node for stage in replica.plan.stages if stage.node in spaces]
    others = sorted(set(spaces) - set(own), key=lambda name: (-spaces[name].free_bytes, name))
    names = [*own, *others]
    plan = next(_fitting(view, replica, [spaces[name] for name in names], config), None)
    if plan is not None:
        return plan
    if not names:
        raise InsufficientCapacity(f"no other live node can take '{replica.deployment}'.")
    # Raises, and says why.
    roomiest = max(names, key=lambda name: spaces[name].free_bytes)
    return successor_plan(view, replica, spaces[roomiest], config)


def _consolidate(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig
) -> tuple[Action, ...]:
    if not _has_served(view, replica, now_s, config):
        return ()
    successors = view.successors(replica)
    wanted = _instances_wanted(view, replica, config)
    plans = _worthwhile(view, replica, now_s, config, is_calm=wanted == 1)
    # Under load one full instance would do less than the pipeline.
    if wanted > 1 and len(successors) + len(plans) == 1:
        return ()
    missing = max(0, wanted - len(successors))
    load = _load(view, replica)
    reason = f"{replica.id} serves {load} requests as a pipeline"
    return tuple(
        StartReplica(plan=replace(plan, background=wanted == 1), requested_s=now_s, reason=reason)
        for plan in plans[:missing]
    )


def _has_served(view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig) -> bool:
    """Whether it has been of use for long enough, and is still."""
    after_s = config.consolidation.after_s
    state = view.deployments[replica.deployment]
    ready_s = now_s if replica.ready_s is None else replica.ready_s
    return now_s - ready_s >= after_s and _idle_s(view, state, now_s) <= after_s


def _idle_s(view: ClusterView, state: DeploymentState, now_s: float) -> float:
    return now_s - state.last_active_s if view.is_idle(state.name) else 0.0


def _load(view: ClusterView, replica: Replica) -> int:
    """Requests that it and its successors work on or that wait."""
    replicas = (replica, *view.successors(replica))
    return view.waiting(replica.deployment) + sum(map(view.replica_in_flight, replicas))


def _instances_wanted(view: ClusterView, replica: Replica, config: PolicyConfig) -> int:
    """One when it is calm, else as many as the requests need, at most one for each stage.

    Nor more than the deployment may have replicas.
    """
    load = _load(view, replica) / replica.plan.max_sequences
    limit = config.consolidation.scale_up_load
    if load <= limit:
        return 1
    return max(1, min(max(2, math.ceil(load)), len(replica.plan.stages), _may_have(view, replica)))


def _may_have(view: ClusterView, replica: Replica) -> int:
    """Instances that a replica may become beside the others that serve or start."""
    others = sum(
        other.is_wanted and other.id != replica.id and other.plan.succeeds != replica.id
        for other in view.live_replicas(replica.deployment)
    )
    return view.deployments[replica.deployment].deployment.spec.max_replicas - others


def _worthwhile(
    view: ClusterView, replica: Replica, now_s: float, config: PolicyConfig, *, is_calm: bool
) -> list[ReplicaPlan]:
    """Full instances on nodes of its stages that have room and are there in time to be of use."""
    spaces = successor_spaces(view, replica, now_s, config)
    taken = {successor.plan.head.node for successor in view.successors(replica)}
    left_s = _life_left_s(view, replica, now_s)
    names = [
        stage.node
        for stage in replica.plan.stages
        if stage.node in spaces
        and stage.node not in taken
        # What nobody waits for must not slow down a start that somebody waits for.
        and not (is_calm and view.running_fetches(stage.node))
    ]
    return [
        plan
        for plan in _fitting(view, replica, [spaces[name] for name in names], config)
        if _start_s(view, replica, plan, spaces[plan.head.node], config) < left_s
    ]


def _life_left_s(view: ClusterView, replica: Replica, now_s: float) -> float:
    """How long it will probably be there; one that works, as long again as it has served."""
    state = view.deployments[replica.deployment]
    keep_alive_s = state.deployment.spec.keep_alive_s
    if keep_alive_s is None:
        keep_alive_s = UNKNOWN_LIFE_S
    if view.is_idle(state.name):
        return keep_alive_s - _idle_s(view, state, now_s)
    return keep_alive_s + now_s - (replica.ready_s or now_s)


def _start_s(
    view: ClusterView, replica: Replica, plan: ReplicaPlan, space: NodeSpace, config: PolicyConfig
) -> float:
    """Predicted time until a successor is ready; what the node has is not fetched again."""
    missing = plan.head.weight_bytes - view.host_bytes(replica, space.name)
    return missing / space.bytes_per_s + config.placement.runtime_s + config.placement.tail_s


def _fitting(
    view: ClusterView, replica: Replica, spaces: Sequence[NodeSpace], config: PolicyConfig
) -> Iterator[ReplicaPlan]:
    """A successor on each of these nodes that has room for one, with ascending numbers."""
    number = view.deployments[replica.deployment].last_number + 1
    for space in spaces:
        try:
            plan = successor_plan(view, replica, space, config)
        except InsufficientCapacity:
            continue
        yield replace(plan, number=number)
        number += 1


def successor_plan(
    view: ClusterView, replica: Replica, space: NodeSpace, config: PolicyConfig
) -> ReplicaPlan:
    state = view.deployments[replica.deployment]
    number = state.last_number + 1
    return place_successor(state.deployment, number, replica.plan, space, config.placement)


def _unwanted(
    view: ClusterView,
    replica: Replica,
    successor: Replica,
    now_s: float,
    config: PolicyConfig,
    *,
    is_first: bool,
) -> str | None:
    """Why `successor`, which is starting, is of no use any more."""
    node = successor.plan.head.node
    if node in view.cordoned:
        return f"{node} is drained"
    started_s = now_s - successor.planned_s
    calm = config.consolidation.scale_up_load * replica.plan.max_sequences / 2
    if not is_first and started_s >= config.consolidation.after_s and _load(view, replica) <= calm:
        return f"{replica.id} needs no further instance any more"
    return None


def listed(names: Sequence[str]) -> str:
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]
