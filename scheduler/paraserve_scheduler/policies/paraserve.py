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
    IdleByGpu,
    evictions,
    idle_by_gpu,
    is_idle,
    is_used_in_time,
    most_room_bytes,
    rate_of,
    time_to_live_s,
)

_AUTOSCALING = AutoscalingConfig()


def decide(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
    return (
        *_start_replicas(fleet, now_s),
        *_stop_idle(fleet, now_s),
        *_keep_slots(fleet, now_s),
    )


# ---- starting ----


class _Room:
    """What is left of a fleet as one decision goes on. Starts and evictions only make it less."""

    def __init__(self, fleet: Fleet, now_s: float) -> None:
        self._now_s = now_s
        self._idle: IdleByGpu | None = None
        #: Sizes for which there is room, and for which there is none.
        self._enough_bytes: float = 0
        self._too_many_bytes = float("inf")
        self.fleet = fleet

    @property
    def idle(self) -> IdleByGpu:
        if self._idle is None:
            self._idle = idle_by_gpu(self.fleet.needs, self._now_s)
        return self._idle

    def may_suffice(self, need: Need) -> bool:
        """Return whether a head could go somewhere, be it that idle replicas go."""
        size_bytes = need.model.full_bytes
        if not need.must_grow or size_bytes <= self._enough_bytes:
            return True
        if size_bytes >= self._too_many_bytes:
            return False
        fleet = self.fleet
        if fleet.has_room(size_bytes) or size_bytes <= most_room_bytes(fleet, self.idle):
            self._enough_bytes = size_bytes
            return True
        self._too_many_bytes = size_bytes
        return False

    def take(self, start: Start) -> None:
        self.fleet = with_start(self.fleet, start)
        self._enough_bytes = 0

    def evict(self, eviction: Eviction) -> None:
        """Their memory is not free yet."""
        self.fleet = without(self.fleet, eviction.replicas)
        self._idle, self._enough_bytes = None, 0


def _start_replicas(fleet: Fleet, now_s: float) -> Iterator[Decision]:
    room = _Room(fleet, now_s)
    # Of a full cluster hardly any has to be looked at.
    needs = [_not_late_yet(need, now_s) for need in _waiting(fleet) if room.may_suffice(need)]
    for need in sorted(needs, key=lambda need: _urgency(need, now_s)):
        if room.may_suffice(need):
            yield from _start_for(need, room, now_s)


def _start_for(need: Need, room: _Room, now_s: float) -> Iterator[Decision]:
    ready_in_s = _typical_start_s(need, room.fleet)
    wanted = replicas_to_start(need, now_s, ready_in_s, _AUTOSCALING)
    while wanted > 0:
        start = plan(need, room.fleet, now_s, replicas=wanted)
        if start is None and _will_fit(need, room.fleet, now_s):
            return
        if start is None or (_is_late(start) and not _is_hopeless(need, now_s)):
            eviction = _make_room(need, room, now_s, start)
            if eviction is not None:
                yield from _evict(eviction, need)
                room.evict(eviction)
                return
        if start is None:
            return
        yield start
        room.take(start)
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
    oldest_s = min(
        (arrival_s for arrival_s in last if arrival_s + limit_s > now_s), default=need.oldest_s
    )
    return need if oldest_s == need.oldest_s else replace(need, oldest_s=oldest_s)


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


def _make_room(need: Need, room: _Room, now_s: float, late: Start | None) -> Eviction | None:
    """Idle replicas to stop if a plan gets possible by it, or gets to meet the objectives."""
    found = evictions(room.fleet, need.model.full_bytes, room.idle)
    for eviction in found[:_EVICTIONS_TRIED]:
        freed = with_freed(room.fleet, eviction.freed_bytes)
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
    worth: dict[str, bool] = {}
    for node in fleet.nodes:
        if node.kind.start.slot_runtime_s is None:
            continue
        if node.kind.name not in worth:
            worth[node.kind.name] = _are_starts_frequent(fleet, node.kind.start, now_s)
        is_worth_it, needed_bytes = worth[node.kind.name], node.kind.start.slot_bytes
        for gpu in node.gpus:
            if is_worth_it and gpu.slots == 0 and gpu.free_bytes >= needed_bytes:
                yield WarmSlot(node=node.name, gpu=gpu.index, reason="starts are frequent")
            elif gpu.slots and not is_worth_it:
                yield DropSlot(node=node.name, gpu=gpu.index, reason="starts are rare")


def _are_starts_frequent(fleet: Fleet, method: StartMethod, now_s: float) -> bool:
    """Whether a slot is worth its memory: all deployments share it, so that their rates add up.

    Where no rate is known yet it is.
    """
    rate = 0.0
    for need in fleet.needs:
        rate += rate_of(need.arrivals_s, now_s) or 0.0
        # Requests choose among the nodes; a slot on one is asked for by its part of them. Further
        # rates would only add to it.
        if rate and _is_worth_a_slot(method, rate / max(1, len(fleet.nodes))):
            return True
    return rate == 0


def _is_worth_a_slot(method: StartMethod, rate: float) -> bool:
    saved_s = method.runtime_s - (method.slot_runtime_s or 0.0)
    return is_used_in_time(rate=rate, saved_s=saved_s, held_bytes=method.slot_bytes)
