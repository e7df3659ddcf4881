"""Rules that the baseline policies share: memory sizes, queue rule, fixed keep-alive, equal cut."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import ceil

from paraserve_scheduler.planner.cost import ModelShape
from paraserve_scheduler.planner.decisions import Stop
from paraserve_scheduler.planner.fleet import Fleet, Need, ReplicaPhase

GB = 10**9
KEEP_ALIVE_S = 30.0
#: KV cache that HydraServe reserves for each model.
_KV_GB = 5


def reserved_bytes(model: ModelShape, stages: int) -> int:
    """HydraServe's ceil((M + 5) / s) GB of a worker that holds one of `stages` equal parts."""
    return ceil((model.total_bytes / GB + _KV_GB) / stages) * GB


def instances_lacking(need: Need) -> int:
    """HydraServe's scale-out: what waits beyond the room of instances, in eights.

    What it sends to instances that are ready does not wait there; here it may not be sent yet.
    """
    starting = sum(r.capacity for r in need.replicas if r.phase is ReplicaPhase.STARTING)
    ready = (r for r in need.replicas if r.phase is ReplicaPhase.READY)
    places = starting + sum(max(0, r.capacity - r.in_flight) for r in ready)
    return max(0, ceil((need.waiting - places) / need.max_sequences))


def by_arrival(fleet: Fleet, now_s: float) -> list[Need]:
    """Deployments with requests waiting, the longest waiting first."""
    waiting = [need for need in fleet.needs if need.waiting]
    return sorted(waiting, key=lambda need: need.oldest_s if need.oldest_s is not None else now_s)


def stop_idle(fleet: Fleet, now_s: float) -> Iterator[Stop]:
    """Remove every instance that has been idle for longer than the fixed time, or its user's."""
    for need in fleet.needs:
        keep_alive_s = KEEP_ALIVE_S if need.keep_alive_s is None else need.keep_alive_s
        for replica in need.replicas:
            since_s = replica.idle_since_s
            if since_s is not None and not replica.is_growing and now_s - since_s > keep_alive_s:
                yield Stop(replica=replica.name, reason=f"idle for {keep_alive_s:g} s")


@lru_cache(maxsize=1024)
def equal_bounds(layer_bytes: tuple[int, ...], stages: int) -> tuple[int, ...]:
    """Cut by bytes as equally as whole layers allow, as HydraServe does offline.

    Each layer goes to the lightest stage, ties to the later one; the counts are then put in order.
    """
    sizes = [0.0] * stages
    counts = [0] * stages
    common = min(layer_bytes)
    sizes[0] += layer_bytes[0] - common
    sizes[-1] += layer_bytes[-1] - common
    for _ in layer_bytes:
        lightest = min(range(stages), key=lambda stage: (sizes[stage], -stage))
        sizes[lightest] += common
        counts[lightest] += 1
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return tuple(bounds)
