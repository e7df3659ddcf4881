"""How long loaded weights and runtime slots stay, and which idle replicas are evicted. Pure.

RainbowCake's rule: a layer stays while its next use is likely soon, judged by the arrivals of all
who share it, and while keeping it costs less than making it again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log

from paraserve_scheduler.planner.fleet import (
    Fleet,
    Need,
    ReplicaLoad,
    ReplicaPhase,
)

#: Arrivals that make a rate, as in RainbowCake's code.
_WINDOW = 6
#: The chance with which the next arrival comes within the time a layer is kept.
_QUANTILE = 0.8
#: What a second of a user's waiting is worth in byte · seconds of GPU memory.
_WAIT_PRICE_BYTE_S = 60e9
#: How long a layer stays at least and at most.
LEAST_LIFE_S, MOST_LIFE_S = 2.0, 60.0
#: How long the layers of a deployment stay whose arrivals are not known yet.
UNKNOWN_LIFE_S = 15.0


def rate_of(arrivals_s: Sequence[float], now_s: float) -> float | None:
    """Arrivals per second since the oldest of the last few; None with fewer than two."""
    window = arrivals_s[-_WINDOW:]
    if len(window) < 2 or now_s <= window[0]:
        return None
    return len(window) / (now_s - window[0])


def time_to_live_s(*, rate: float | None, saved_s: float, held_bytes: float) -> float:
    """RainbowCake: min(quantile of the time to the next arrival, break-even time).

    The quantile of a Poisson process is -ln(1 - p) / rate. The break-even time is when what the
    layer's memory has cost equals the worth of the `saved_s` seconds that one start takes longer
    without it.
    """
    if rate is None:
        return UNKNOWN_LIFE_S
    live_s = min(_next_use_s(rate), _break_even_s(saved_s, held_bytes))
    return min(max(live_s, LEAST_LIFE_S), MOST_LIFE_S)


def _next_use_s(rate: float) -> float:
    return -log(1 - _QUANTILE) / rate if rate > 0 else inf


def _break_even_s(saved_s: float, held_bytes: float) -> float:
    return saved_s * _WAIT_PRICE_BYTE_S / held_bytes if held_bytes > 0 else inf


def is_used_in_time(*, rate: float, saved_s: float, held_bytes: float) -> bool:
    """Whether a layer's next use is likely before its memory has cost what a start would."""
    return _next_use_s(rate) <= _break_even_s(saved_s, held_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Eviction:
    """Idle replicas that make room on one GPU when they go."""

    node: str
    gpu: int
    replicas: tuple[str, ...]
    freed_bytes: Mapping[tuple[str, int], int]


def evictions(fleet: Fleet, needed_bytes: int, idle: IdleByGpu) -> list[Eviction]:
    """For every GPU the idle replicas to evict for `needed_bytes` there, the best choice first.

    On each GPU those go first whose next request is least likely soon for the memory they hold.
    Of the GPUs the best is the one that loses the lowest priorities, then the fewest requests.
    """
    if not idle:
        return []
    ranked = []
    for node in fleet.nodes:
        for gpu in node.gpus:
            chosen = _enough(idle.get((node.name, gpu.index), ()), needed_bytes - gpu.free_bytes)
            if chosen:
                loss = (
                    max(victim.priority for victim in chosen),
                    sum(victim.rate for victim in chosen),
                )
                ranked.append((loss, node.name, gpu.index, chosen))
    ranked.sort(key=lambda entry: entry[:3])
    return [_eviction(node, gpu, chosen) for _, node, gpu, chosen in ranked]


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleReplica:
    replica: ReplicaLoad
    priority: int
    rate: float

    @property
    def held_bytes(self) -> int:
        return max(1, sum(self.replica.reserved_bytes.values()))


#: By node and GPU; those first that go first.
IdleByGpu = Mapping[tuple[str, int], Sequence[IdleReplica]]


def idle_by_gpu(needs: Iterable[Need], now_s: float) -> IdleByGpu:
    """Return the replicas that `evictions` may choose from."""
    found: dict[tuple[str, int], list[IdleReplica]] = {}
    for need in needs:
        if need.waiting:
            continue
        for replica in need.replicas:
            if is_idle(replica):
                rate = rate_of(need.arrivals_s, now_s) or 0.0
                idle = IdleReplica(replica=replica, priority=need.priority, rate=rate)
                for place in replica.reserved_bytes:
                    found.setdefault(place, []).append(idle)
    for there in found.values():
        there.sort(
            key=lambda idle: (
                idle.priority,
                idle.rate / idle.held_bytes,
                idle.replica.idle_since_s or 0.0,
            )
        )
    return found


def most_room_bytes(fleet: Fleet, idle: IdleByGpu) -> int:
    """Return the most that any GPU has free, or would have free without its idle replicas."""
    return max(
        (
            gpu.free_bytes + sum(each.held_bytes for each in idle.get((node.name, gpu.index), ()))
            for node in fleet.nodes
            for gpu in node.gpus
        ),
        default=0,
    )


def is_idle(replica: ReplicaLoad) -> bool:
    """Nothing runs on it, and it is not on the way to anything."""
    is_serving = replica.phase is ReplicaPhase.READY
    return is_serving and replica.in_flight == 0 and not replica.is_growing


def _enough(idle: Sequence[IdleReplica], lacking_bytes: int) -> list[IdleReplica]:
    """The first of them that free so much together; none if all do not."""
    chosen: list[IdleReplica] = []
    for victim in idle:
        if lacking_bytes <= 0:
            break
        chosen.append(victim)
        lacking_bytes -= victim.held_bytes
    return chosen if lacking_bytes <= 0 else []


def _eviction(node: str, gpu: int, chosen: Sequence[IdleReplica]) -> Eviction:
    freed: dict[tuple[str, int], int] = {}
    for victim in chosen:
        for place, size in victim.replica.reserved_bytes.items():
            freed[place] = freed.get(place, 0) + size
    names = tuple(victim.replica.name for victim in chosen)
    return Eviction(node=node, gpu=gpu, replicas=names, freed_bytes=freed)
