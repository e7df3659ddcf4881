"""What users order: migrate a deployment, drain a node. Checks and progress. Pure.

What follows from an order is decided in `reconciler.consolidation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paraserve_backend.errors import (
    AlreadyExists,
    InsufficientCapacity,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from paraserve_scheduler.reconciler.capacity import is_alive, node_trouble, successor_spaces
from paraserve_scheduler.reconciler.consolidation import (
    evacuation,
    listed,
    may_move,
    pause_s,
    successor_plan,
)
from paraserve_scheduler.reconciler.placement import NodeSpace
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import StartReplica, StopReplica
from paraserve_scheduler.state.records import Phase, Replica
from paraserve_scheduler.state.view import ClusterView


def migrate(turn: Turn, deployment: str, node: str) -> tuple[tuple[StopReplica, ...], StartReplica]:
    """What moves the only replica of `deployment` to `node`: first the stops, then the start.

    Raises:
        NotFound: there is no such node.
        InvalidRequest, AlreadyExists: there is nothing to move, or it is there.
        Unavailable: the replica or the node is not ready for it.
        InsufficientCapacity: says how much is missing on the node.
    """
    replica = _movable_replica(turn.view, deployment, node)
    reason = f"a user moves {replica.id} to {node}"
    stops = tuple(
        StopReplica(replica=other.id, reason=reason) for other in turn.view.successors(replica)
    )
    for stop in stops:
        turn.do(stop)
    space = _space_on(turn, replica, node)
    plan = successor_plan(turn, replica, space)
    return stops, StartReplica(plan=plan, requested_s=turn.now_s, reason=reason)


def check_drain(turn: Turn, node: str) -> None:
    """Check that everything on `node` could go elsewhere, or is idle and may just end.

    Raises:
        InsufficientCapacity: names a replica and says how much is missing.
    """
    turn = turn.supposing(replace(turn.view, cordoned=turn.view.cordoned | {node}))
    for replica in turn.view.replicas_on(node):
        if may_move(turn.view, replica) and not turn.view.successors(replica):
            try:
                plan = evacuation(turn, replica)
            except InsufficientCapacity as shortage:
                if not turn.view.is_idle(replica.deployment):
                    raise InsufficientCapacity(
                        f"Node {node} cannot be drained: {shortage}"
                    ) from None
            else:
                start = StartReplica(plan=plan, requested_s=turn.now_s, reason="drained")
                turn.do(start)


def drain_progress(turn: Turn, node: str) -> tuple[tuple[str, str], ...]:
    """What is still on a drained node: names of replicas, and what is done about each."""
    there = turn.view.replicas_on(node)
    known = {replica.id for replica in there}
    state = turn.view.nodes.get(node)
    leftovers = {part.replica for part in state.parts} - known if state else set()
    if state is not None and not is_alive(turn, state):
        leftovers = set()
    return (
        *((replica.id, _progress(turn, replica)) for replica in there),
        *((name, "is being removed") for name in sorted(leftovers)),
    )


def require_node(view: ClusterView, node: str) -> None:
    """Check that there is such a node, or was when it was drained; raises `NotFound`."""
    if node not in view.nodes and node not in view.cordoned:
        known = ", ".join(sorted(view.nodes)) or "none"
        raise NotFound(f"There is no node '{node}'. Nodes: {known}.")


def _movable_replica(view: ClusterView, deployment: str, node: str) -> Replica:
    require_node(view, node)
    routed = view.routed_replicas(deployment)
    if not routed:
        raise Unavailable(
            f"'{deployment}' has no replica that is ready: send it a request, then migrate it."
        )
    if len(routed) > 1:
        names = listed(tuple(replica.id for replica in routed))
        raise InvalidRequest(
            f"'{deployment}' has several replicas ({names}): drain the node of the one to move."
        )
    (replica,) = routed
    predecessor = view.wanted_predecessor(replica)
    if predecessor is not None:
        raise Unavailable(
            f"{replica.id} is still taking over from {predecessor.id}: retry when that has ended."
        )
    there = [
        each.id
        for each in (replica, *view.successors(replica))
        if len(each.plan.stages) == 1 and each.plan.head.node == node
    ]
    if there:
        raise AlreadyExists(f"'{deployment}' is already on node {node}, as {there[0]}.")
    return replica


def _space_on(turn: Turn, replica: Replica, node: str) -> NodeSpace:
    if node in turn.view.cordoned:
        raise InvalidRequest(
            f"Node {node} is drained: end that with paraserve drain {node} --undo."
        )
    space = successor_spaces(turn, replica).get(node)
    if space is not None:
        return space
    trouble = node_trouble(turn, node)
    if trouble is not None:
        raise Unavailable(trouble)
    if turn.view.orphans(turn.view.nodes[node]):
        raise Unavailable(f"Node {node} is still removing what it had: retry shortly.")
    device = turn.view.deployments[replica.deployment].deployment.spec.device
    raise InvalidRequest(f"Node {node} has no device {device}, which '{replica.deployment}' needs.")


def _progress(turn: Turn, replica: Replica) -> str:
    """What is being done to get a replica off a drained node, or what that waits for."""
    running = turn.view.replica_in_flight(replica)
    if replica.phase is Phase.STOPPING:
        return "is being removed" if replica.removing else f"ends its requests, {running} left"
    if replica.phase is Phase.STARTING:
        return "is starting, and moves when it is ready"
    if ready := turn.view.ready_successors(replica):
        return f"hands its requests over to {listed(_places(ready))}, {running} left"
    if successors := turn.view.successors(replica):
        return f"waits for {listed(_places(successors))} to be ready"
    predecessor = turn.view.wanted_predecessor(replica)
    if predecessor is not None:
        return f"still takes over from {predecessor.id}"
    left_s = pause_s(turn, replica)
    if left_s > 0:
        is_own = replica.hand_over.successor_failed_s is not None
        cause = "its last successor failed" if is_own else "starts of its deployment are paused"
        return f"waits {left_s:.0f} s, for {cause}"
    return _shortage(turn, replica) or "moves at once"


def _shortage(turn: Turn, replica: Replica) -> str | None:
    try:
        evacuation(turn, replica)
    except InsufficientCapacity as shortage:
        return f"has no room elsewhere and stays until it is idle: {shortage}"
    return None


def _places(replicas: Sequence[Replica]) -> tuple[str, ...]:
    return tuple(f"{replica.id} on {replica.plan.head.node}" for replica in replicas)
