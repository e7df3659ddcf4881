"""The part of the view that survives a restart: written on every change, read at start-up."""

from __future__ import annotations

from dataclasses import fields, replace

from paraserve_scheduler.state.records import DeploymentState, Phase, Replica
from paraserve_scheduler.state.view import ClusterView
from paraserve_scheduler.store.sqlite import Counters, Store, StoredDeployment

#: What makes a replica worth writing, as its fields declare.
_WRITTEN_FIELDS = tuple(field.name for field in fields(Replica) if field.metadata["written"])


def recover(store: Store, now_s: float) -> ClusterView:
    """The view a new scheduler process starts from: no nodes, no demand, parts unknown."""
    states = [_recover_deployment(store, stored, now_s) for stored in store.deployments()]
    return ClusterView(
        started_s=now_s,
        listening_since_s=now_s,
        deployments={state.name: state for state in states},
        replicas={replica.id: _recover_replica(replica) for replica in store.replicas()},
        cordoned=store.cordoned_nodes(),
    )


def record(store: Store, before: ClusterView, after: ClusterView) -> None:
    """Write what differs between two views that follow one another."""
    for name, state in after.deployments.items():
        if state is not before.deployments.get(name):
            _record_deployment(store, before.deployments.get(name), state)
    for name, replica in after.replicas.items():
        if replica is not before.replicas.get(name):
            _record_replica(store, before.replicas.get(name), replica)
    for name in before.replicas.keys() - after.replicas.keys():
        store.drop_replica(name)
    for name in before.deployments.keys() - after.deployments.keys():
        store.drop_deployment(name)
    if after.cordoned != before.cordoned:
        store.save_cordoned_nodes(after.cordoned)


def _recover_deployment(store: Store, stored: StoredDeployment, now_s: float) -> DeploymentState:
    counters = store.counters(stored.deployment.name)
    return DeploymentState(
        deployment=stored.deployment,
        deployed_s=stored.deployed_s,
        last_number=counters.last_number,
        last_active_s=now_s,
        failure_number=counters.failure_number,
        deleting=stored.deleting,
    )


def _recover_replica(replica: Replica) -> Replica:
    if not replica.is_wanted:
        # A removal that was under way is begun again.
        return replace(replica, removing=False)
    parts = tuple(replace(part, phase=Phase.UNKNOWN, confirmed=False) for part in replica.parts)
    # Whether its head knows of a hand-over is unknown too: it is told again.
    return replace(
        replica,
        phase=Phase.STARTING,
        parts=parts,
        recovered=True,
        hand_over=replace(
            replica.hand_over,
            notified=(),
            is_notifying=False,
            notify_failed_s=None,
            since_s=None,
        ),
    )


def _record_deployment(
    store: Store, before: DeploymentState | None, after: DeploymentState
) -> None:
    if before is None:
        store.add_deployment(after.deployment, after.deployed_s)
    elif after.deleting and not before.deleting:
        store.mark_deleting(after.name)
    if before is None or _counters(before) != _counters(after):
        store.save_counters(after.name, _counters(after))


def _counters(state: DeploymentState) -> Counters:
    return Counters(last_number=state.last_number, failure_number=state.failure_number)


def _record_replica(store: Store, before: Replica | None, after: Replica) -> None:
    if before is None or _written(before) != _written(after):
        store.save_replica(after)


def _written(replica: Replica) -> tuple[object, ...]:
    return tuple(getattr(replica, name) for name in _WRITTEN_FIELDS)
