"""ServerlessLLM's policy: whole GPUs, whole models cached in host memory, the server soonest ready.

It estimates a start as `queue + bytes / bandwidth` of the tier that holds the model on that server.
As in its code, one instance is added at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from paraserve_scheduler.planner.decisions import Decision, StageChoice, StageSource, Start
from paraserve_scheduler.planner.fleet import Fleet, Gpu, Need, Node
from paraserve_scheduler.planner.fleet_changes import with_start
from paraserve_scheduler.policies.baseline_rules import by_arrival, stop_idle

#: Hard-coded in its scheduler.
_PCIE_BYTES_PER_S = 25e9
#: Requests an instance is to run at once.
_TARGET = 8


def decide(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
    return (*stop_idle(fleet, now_s), *_starts(fleet, now_s))


def _starts(fleet: Fleet, now_s: float) -> Iterator[Start]:
    for need in by_arrival(fleet, now_s):
        running = sum(replica.in_flight for replica in need.replicas)
        desired = ceil((need.waiting + running) / _TARGET)
        start = _soonest(need, fleet) if len(need.replicas) < desired else None
        if start is not None:
            yield start
            fleet = with_start(fleet, start)


def _soonest(need: Need, fleet: Fleet) -> Start | None:
    places = [
        (_start_s(need, node), node.name, gpu, _is_cached(need, node))
        for node in fleet.nodes
        for gpu in node.gpus
        if gpu.free_bytes == gpu.capacity_bytes >= need.model.total_bytes
    ]
    if not places:
        return None
    estimate_s, node, gpu, is_cached = min(
        places, key=lambda place: (place[0], place[1], place[2].index)
    )
    return Start(
        deployment=need.name,
        stages=(_whole(need, node, gpu, is_cached),),
        reason=f"starts soonest there, in {estimate_s:.1f} s",
        keeps_in_memory=True,
    )


def _start_s(need: Need, node: Node) -> float:
    size = need.model.total_bytes
    if _is_cached(need, node):
        return size / _PCIE_BYTES_PER_S
    queue = sum(claim.remaining_bytes for claim in node.claims)
    return (queue + size) / node.nic_bytes_per_s


def _is_cached(need: Need, node: Node) -> bool:
    return node.cached.get(need.weights) == ((0, need.model.num_layers),)


def _whole(need: Need, node: str, gpu: Gpu, is_cached: bool) -> StageChoice:
    return StageChoice(
        node=node,
        gpu=gpu.index,
        start=0,
        end=need.model.num_layers,
        reserved_bytes=gpu.capacity_bytes,
        grows=True,
        sources=(StageSource(size_bytes=need.model.total_bytes, peer=node if is_cached else None),),
    )
