"""ParaServe's own policy: what to start, what to stop, which slots to keep. One pure function.

Deployments whose requests can still meet their objective come first, the most urgent of them
before the others. Idle replicas are evicted to make room.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from paraserve_scheduler.planner.cost import StartMethod, stage_ready_s
from paraserve_scheduler.planner.decisions import Decision, DropSlot, Start, Stop, WarmSlot
from paraserve_scheduler.planner.fleet import Fleet, Need, ReplicaLoad
from paraserve_scheduler.planner.fleet_changes import with_freed, with_start, without
from paraserve_scheduler.planner.planner import plan
from paraserve_scheduler.policies.autoscaling import AutoscalingConfig, replicas_to_start
from paraserve_scheduler.policies.keep_alive import (
    Eviction,
    evictions,
    is_idle,
    is_used_in_time,
    rate_of,
    time_to_live_s,
    union_rate,
)

_AUTOSCALING = AutoscalingConfig()


def decide(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
    return (
        *_start_replicas(fleet, now_s),
        *_stop_idle(fleet, now_s),
        *_keep_slots(fleet, now_s),
    )


# ---- starting ----


def _start_replicas(fleet: Fleet, now_s: float) -> Iterator[Decision]:
    needs = [_not_late_yet(need, now_s) for need in _waiting(fleet)]
    for need in sorted(needs, key=lambda need: _urgency(need, now_s)):
        wanted = replicas_to_start(need, now_s, _typical_start_s(need, fleet), _AUTOSCALING)
        while wanted > 0:
            start = plan(need, fleet, now_s, replicas=wanted)
            if start is None and _will_fit(need, fleet, now_s):
                break
            if start is None or (_is_late(start) and not _is_hopeless(need, now_s)):
                eviction = _make_room(need, fleet, now_s, start)
                if eviction is not None:
                    yield from _evict(eviction, need)
                    fleet = without(fleet, eviction.replicas)
                    break
            if start is None:
                break
            yield start
            fleet = with_start(fleet, start)
            wanted -= max(1, sum(stage.grows for stage in start.stages))


def _will_fit(need: Need, fleet: Fleet, now_s: float) -> bool:
    """Whether there is room for a replica once those that are being stopped have gone."""
    if not fleet.leaving_bytes:
        return False
    freed = with_freed(fleet, fleet.leaving_bytes)
    return plan(need, freed, now_s) is not None


def _evict(eviction: Eviction, need: Need) -> Iterator[Stop]:
    for replica in eviction.replicas:
        reason = f"idle, and '{need.name}' needs its room"
        yield Stop(replica=replica, reason=reason, leaves_slots=True)


def _waiting(fleet: Fleet) -> list[Need]:
    return [need for need in fleet.needs if need.waiting or len(need.replicas) < need.min_replicas]


def _not_late_yet(need: Need, now_s: float) -> Need:
    """As if the oldest that waits were the first that can still meet its objective, if one can.

    Those that wait are the last that came.
    """
    limit_s = need.objectives.ttft_s
    if limit_s is None or not need.waiting:
        return need
    last = need.arrivals_s[-need.waiting :]
    return replace(
        need,
        oldest_s=min(
            (arrival_s for arrival_s in last if arrival_s + limit_s > now_s), default=need.oldest_s
        ),
    )


def _urgency(need: Need, now_s: float) -> tuple[int, bool, float]:
    return (-need.priority, _is_hopeless(need, now_s), _deadline_s(need, now_s))


def _deadline_s(need: Need, now_s: float) -> float:
    if need.objectives.ttft_s is None:
        return float("inf")
    return (need.oldest_s if need.oldest_s is not None else now_s) + need.objectives.ttft_s


def _is_hopeless(need: Need, now_s: float) -> bool:
    """Its oldest request misses its objective whatever we do."""
    return _deadline_s(need, now_s) <= now_s


def _is_late(start: Start) -> bool:
    return start.prediction is not None and not start.prediction.meets_ttft


def _typical_start_s(need: Need, fleet: Fleet) -> float:
    """A cold start on the quickest kind of node, fetched by one idle node."""
    size = need.model.total_bytes
    return min(
        (
            stage_ready_s(
                node.kind.start,
                fetch_s=size / node.nic_bytes_per_s,
                size_bytes=size,
                has_slot=True,
                in_pipeline=False,
            )
            for node in fleet.nodes[:_LOOKED_AT]
        ),
        default=0.0,
    )


#: Places that are thought through for an eviction.
_EVICTIONS_TRIED = 4
#: Nodes that are looked at for what a cold start typically takes.
_LOOKED_AT = 8


def _make_room(need: Need, fleet: Fleet, now_s: float, late: Start | None) -> Eviction | None:
    """Idle replicas to stop if a plan gets possible by it, or gets to meet the objectives."""
    for eviction in evictions(fleet, need.model.full_bytes, now_s)[:_EVICTIONS_TRIED]:
        freed = with_freed(fleet, eviction.freed_bytes)
        start = plan(need, freed, now_s)
        if start is not None and (late is None or not _is_late(start)):
            return eviction
    return None


# ---- stopping ----


def _stop_idle(fleet: Fleet, now_s: float) -> Iterator[Stop]:
    for need in fleet.needs:
        spare = len(need.replicas) - need.min_replicas
        for replica in need.replicas:
            if spare > 0 and is_idle(replica) and not need.waiting:
                idle_s = now_s - (replica.idle_since_s or now_s)
                limit_s = _weights_live_s(need, replica, fleet, now_s)
                if idle_s >= limit_s:
                    spare -= 1
                    reason = f"idle for {idle_s:.1f} s, worth {limit_s:.1f} s"
                    yield Stop(replica=replica.name, reason=reason, leaves_slots=True)


def _weights_live_s(need: Need, replica: ReplicaLoad, fleet: Fleet, now_s: float) -> float:
    if need.keep_alive_s is not None:
        return need.keep_alive_s
    return time_to_live_s(
        rate=rate_of(need.arrivals_s, now_s),
        saved_s=_typical_start_s(need, fleet),
        held_bytes=sum(replica.reserved_bytes.values()),
    )


# ---- slots ----


def _keep_slots(fleet: Fleet, now_s: float) -> Iterator[Decision]:
    """One slot on every GPU that could take a stage, as long as starts are frequent enough."""
    rate = union_rate(rate_of(need.arrivals_s, now_s) for need in fleet.needs)
    # Requests choose among the nodes; a slot on one is asked for by its part of them.
    share = rate / max(1, len(fleet.nodes))
    worth: dict[str, bool] = {}
    for node in fleet.nodes:
        if node.kind.start.slot_runtime_s is None:
            continue
        if node.kind.name not in worth:
            worth[node.kind.name] = rate == 0 or _is_worth_a_slot(node.kind.start, share)
        is_worth_it, needed_bytes = worth[node.kind.name], node.kind.start.slot_bytes
        for gpu in node.gpus:
            if is_worth_it and gpu.slots == 0 and gpu.free_bytes >= needed_bytes:
                yield WarmSlot(node=node.name, gpu=gpu.index, reason="starts are frequent")
            elif gpu.slots and not is_worth_it:
                yield DropSlot(node=node.name, gpu=gpu.index, reason="starts are rare")


def _is_worth_a_slot(method: StartMethod, rate: float) -> bool:
    saved_s = method.runtime_s - (method.slot_runtime_s or 0.0)
    return is_used_in_time(rate=rate, saved_s=saved_s, held_bytes=method.slot_bytes)
