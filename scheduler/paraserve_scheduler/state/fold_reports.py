"""How a gateway's report of its demand changes the view of the cluster. Pure."""

from __future__ import annotations

from dataclasses import replace

from paraserve_scheduler.state.events import DemandReported
from paraserve_scheduler.state.learned import DemandHistory
from paraserve_scheduler.state.measurements import measured_first_token, measured_tpot
from paraserve_scheduler.state.view import (
    ClusterView,
    Demand,
    DeploymentState,
    GatewayState,
)


def demand_reported(view: ClusterView, event: DemandReported) -> ClusterView:
    """The view after a gateway's report."""
    before = view.gateways.get(event.gateway)
    earlier = before.demands if before else {}
    demands = {demand.deployment: demand for demand in event.demands}
    gateway = GatewayState(last_report_s=event.at_s, demands=demands)
    view = replace(view, gateways={**view.gateways, event.gateway: gateway})
    elapsed_s = event.at_s - before.last_report_s if before else 0.0
    changed = {
        name: _note_demand(
            view,
            view.deployments[name],
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
    for demand in event.demands:
        for name, time_s in demand.first_token_s.items():
            view = measured_first_token(view, name, time_s)
        for name, tpot_s in demand.tpot_s.items():
            view = measured_tpot(view, name, tpot_s)
    return view


def _note_demand(
    view: ClusterView,
    state: DeploymentState,
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
        waiting_since_s=(state.waiting_since_s or at_s) if view.waiting(state.name) else None,
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
