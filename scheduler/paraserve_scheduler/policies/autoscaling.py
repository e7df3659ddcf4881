"""How many replicas a deployment should have, by demand, capacity and forecast. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from paraserve_scheduler.planner.fleet import Need, ReplicaPhase


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscalingConfig:
    #: Arrivals of the last so many seconds make the forecast.
    forecast_window_s: float = 10.0
    #: One decision starts at most so many replicas of a deployment.
    max_starts: int = 4


def arrival_rate(arrivals_s: Sequence[float], now_s: float, window_s: float) -> float:
    """Requests per second over the last `window_s`; the newest weigh most.

    Weights fall linearly with age to zero at the window's start, so that a burst shows at once and
    an old one does not go all of a sudden.
    """
    ages = (now_s - at_s for at_s in arrivals_s)
    return sum(2 * (1 - age / window_s) for age in ages if 0 <= age < window_s) / window_s


def replicas_to_start(
    need: Need, now_s: float, ready_in_s: float, config: AutoscalingConfig
) -> int:
    """Replicas to add now, when a new one takes `ready_in_s`.

    As many as what waits does not fit into: free places of those that serve, those that are
    starting, and places that become free before a new replica would be ready. While requests wait
    that no replica has room for, the arrivals forecast until a start would end count as well.
    """
    serving = [r for r in need.replicas if r.phase is ReplicaPhase.READY]
    starting = [r for r in need.replicas if r.phase is ReplicaPhase.STARTING]
    places = sum(max(0, r.capacity - r.in_flight) for r in serving)
    places += sum(r.capacity for r in starting)
    places += _freed_by(need, now_s, ready_in_s, config)
    lacking = need.waiting - places
    missing_minimum = need.min_replicas - len(need.replicas)
    if lacking <= 0:
        return max(0, missing_minimum)
    rate = arrival_rate(need.arrivals_s, now_s, config.forecast_window_s)
    # Beyond one replica only sustained arrivals justify more than what waits now.
    expected = rate * ready_in_s if lacking > need.max_sequences else 0.0
    wanted = ceil((lacking + expected) / need.max_sequences)
    room = need.max_replicas - len(need.replicas)
    return max(missing_minimum, min(wanted, room, config.max_starts))


def _freed_by(need: Need, now_s: float, ready_in_s: float, config: AutoscalingConfig) -> int:
    """Places that running requests leave in time for what waits, by their mean duration.

    Less those for what comes meanwhile, or a replica that is always full would seem enough.
    """
    if need.service_s is None or need.service_s <= 0:
        return 0
    horizon_s = ready_in_s
    if need.objectives.ttft_s is not None and need.oldest_s is not None:
        horizon_s = min(horizon_s, need.oldest_s + need.objectives.ttft_s - now_s)
    running = sum(r.in_flight for r in need.replicas if r.phase is ReplicaPhase.READY)
    rate = arrival_rate(need.arrivals_s, now_s, config.forecast_window_s)
    return int(max(0.0, horizon_s) * max(0.0, running / need.service_s - rate))
