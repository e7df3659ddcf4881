"""How reported demand, and the times of cold starts and tokens, change the view. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from paraserve_scheduler.state.events import DemandReported
from paraserve_scheduler.state.learned import (
    Calibration,
    DemandHistory,
    StageTimes,
    blend,
    stage_times,
)
from paraserve_scheduler.state.records import Demand, DeploymentState, GatewayState, Phase, Replica
from paraserve_scheduler.state.view import ClusterView

#: A gateway reports every second.
_BLAME_KEPT_S = 5.0


def demand_reported(view: ClusterView, event: DemandReported) -> ClusterView:
    """The view after a gateway's report."""
    before = view.gateways.get(event.gateway)
    earlier = before.demands if before else {}
    demands = {demand.deployment: demand for demand in event.demands}
    gateway = GatewayState(last_report_s=event.at_s, demands=demands)
    others = {name: _heard(other, event.at_s) for name, other in view.gateways.items()}
    view = replace(view, gateways={**others, event.gateway: gateway})
    elapsed_s = event.at_s - before.last_report_s if before else 0.0
    changed = {
        name: _note_demand(
            view.deployments[name],
            _waits_for_a_start(view, name),
            earlier.get(name),
            demands.get(name),
            elapsed_s,
            event.at_s,
        )
        # Of others neither what waits nor what runs has changed.
        for name in earlier.keys() | demands.keys()
        if name in view.deployments
    }
    view = replace(view, deployments={**view.deployments, **changed})
    busy = {
        name: replace(view.replicas[name], last_busy_s=event.at_s)
        for demand in event.demands
        for name, running in demand.replica_in_flight.items()
        if running and name in view.replicas
    }
    if busy:
        view = replace(view, replicas={**view.replicas, **busy})
    return _with_measurements(view, event.demands)


def _heard(gateway: GatewayState, at_s: float) -> GatewayState:
    """What still holds of a gateway's last report: one that is gone blames nobody for ever."""
    is_old = at_s - gateway.last_report_s > _BLAME_KEPT_S
    if not is_old or not any(demand.silent for demand in gateway.demands.values()):
        return gateway
    demands = {
        name: replace(demand, silent=frozenset()) for name, demand in gateway.demands.items()
    }
    return replace(gateway, demands=demands)


def _with_measurements(view: ClusterView, demands: Iterable[Demand]) -> ClusterView:
    """The view once a gateway has said when first tokens came, and how fast tokens come."""
    for demand in demands:
        for name, first_token_s in demand.first_token_s.items():
            replica = view.replicas.get(name)
            if replica is not None and replica.first_token_s is None:
                view = measured_first_token(view, replace(replica, first_token_s=first_token_s))
        for name, tpot_s in demand.tpot_s.items():
            replica = view.replicas.get(name)
            if replica is not None and replica.phase is Phase.READY:
                view = _with_replica(view, replace(replica, tpot_s=tpot_s))
    return view


def _waits_for_a_start(view: ClusterView, deployment: str) -> bool:
    """Whether requests wait and no replica answers any.

    Where one does, each waits until another one ends, and how long there have been some says
    nothing of how long any of them has waited.
    """
    routed = view.routed_replicas(deployment)
    return view.waiting(deployment) > 0 and all(map(view.is_silent, routed))


def _note_demand(
    state: DeploymentState,
    waits_for_a_start: bool,
    earlier: Demand | None,
    demand: Demand | None,
    elapsed_s: float,
    at_s: float,
) -> DeploymentState:
    # A request may have come and gone since the last report.
    is_active = demand is not None and (
        not demand.is_idle or (earlier is not None and demand.arrived > earlier.arrived)
    )
    return replace(
        state,
        last_active_s=at_s if is_active else state.last_active_s,
        history=_history(state.history, earlier, demand, elapsed_s, at_s),
        waiting_since_s=(state.waiting_since_s or at_s) if waits_for_a_start else None,
    )


def _history(
    history: DemandHistory,
    earlier: Demand | None,
    demand: Demand | None,
    elapsed_s: float,
    at_s: float,
) -> DemandHistory:
    if demand is None:
        return history
    known = earlier or Demand(deployment=demand.deployment)
    arrived = max(0, demand.arrived - known.arrived)
    there = known.waiting + known.in_flight + arrived
    return history.after(
        arrived=arrived,
        completed=max(0, there - demand.waiting - demand.in_flight),
        running=known.in_flight,
        elapsed_s=elapsed_s,
        at_s=at_s,
    )


def times_of(replica: Replica, stage: int) -> StageTimes:
    part = replica.parts[stage]
    return stage_times(part.spans, part.fetched_bytes)


def measured_part(view: ClusterView, replica: Replica, stage: int) -> ClusterView:
    """The view once a stage is ready: how long its process took, and how fast its fetch was."""
    times, name = times_of(replica, stage), replica.plan.stages[stage].node
    node = view.nodes.get(name)
    if node is None:
        return view
    if times.runtime_s is not None:
        known = view.calibrations.get(node.info.kind, Calibration())
        view = _with(
            view, node.info.kind, known.with_runtime(times.runtime_s, used_slot=times.used_slot)
        )
    # Fetches at the same time share the card, and those in the background hold back.
    is_alone = not view.running_fetches(name) and not replica.plan.background
    if times.bytes_per_s is None or not is_alone:
        return view
    measured = replace(node, fetch_bytes_per_s=blend(node.fetch_bytes_per_s, times.bytes_per_s))
    return replace(view, nodes={**view.nodes, name: measured})


def measured_ready(view: ClusterView, replica: Replica) -> ClusterView:
    """The view once all stages are ready: what came after the last bytes and processes."""
    stages = [times_of(replica, stage) for stage in range(len(replica.parts))]
    needed_s = max(max(it.runtime_s or 0.0, it.fetch_s or 0.0) for it in stages)
    if needed_s == 0 or replica.ready_s is None:
        return view
    tail_s = max(0.0, replica.ready_s - replica.planned_s - needed_s)
    for kind in _kinds(view, replica):
        known = view.calibrations.get(kind, Calibration())
        view = _with(view, kind, known.with_tail(tail_s))
    return view


def measured_first_token(view: ClusterView, replica: Replica) -> ClusterView:
    """The view once `first_token_s` of a replica is known: how long its first pass took."""
    view = _with_replica(view, replica)
    if replica.plan.succeeds is not None:
        return view
    if replica.first_token_s is None or replica.ready_s is None:
        return view
    # Clocks of two machines may differ a little.
    took_s = max(0.0, replica.first_token_s - replica.ready_s)
    state = view.deployments[replica.deployment]
    state = replace(state, first_pass_s=blend(state.first_pass_s, took_s))
    return replace(view, deployments={**view.deployments, state.name: state})


def _with_replica(view: ClusterView, replica: Replica) -> ClusterView:
    return replace(view, replicas={**view.replicas, replica.id: replica})


def measured_decode(view: ClusterView, replica: Replica) -> ClusterView:
    """The view when a replica stops: how well its time per token was predicted."""
    if replica.prediction is None or replica.tpot_s is None:
        return view
    for kind in _kinds(view, replica):
        known = view.calibrations.get(kind, Calibration())
        ratio = (known.decode_ratio or 1.0) * replica.tpot_s / replica.prediction.tpot_s
        view = _with(view, kind, known.with_decode_ratio(ratio))
    return view


def _kinds(view: ClusterView, replica: Replica) -> set[str]:
    nodes = [view.nodes[stage.node] for stage in replica.plan.stages if stage.node in view.nodes]
    return {node.info.kind for node in nodes}


def _with(view: ClusterView, kind: str, calibration: Calibration) -> ClusterView:
    return replace(view, calibrations={**view.calibrations, kind: calibration})
