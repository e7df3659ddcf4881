"""HydraServe's policy as its released code has it, with and without its cache of whole models.

It takes the first feasible numbers of stages and full workers, cuts equally, and prefers nodes by
the bandwidth a new fetch would get. Its constants are its own; nothing is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from paraserve_scheduler.planner.cost import pipeline_factor
from paraserve_scheduler.planner.decisions import Decision, Growth, StageChoice, StageSource, Start
from paraserve_scheduler.planner.fleet import Fleet, Gpu, Need, Node
from paraserve_scheduler.planner.fleet_changes import with_start
from paraserve_scheduler.policies.baseline_rules import (
    by_arrival,
    equal_bounds,
    instances_lacking,
    reserved_bytes,
    stop_idle,
)

MAX_STAGES = 4
MAX_GROUP = 4
_AFTER_FETCH_S = 2.0
_HOP_S = 0.001
_PREFILL_S = 0.002
#: The claim of a growing worker cannot be met, so its node takes no other cold start meanwhile.
_GROWTH = Growth(is_background=False, pauses=True, deadline_after_s=0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """One node as the placer sees it."""

    node: Node
    offered: float
    free_bytes: int


def decide(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
    return (*stop_idle(fleet, now_s), *_starts(fleet, now_s, uses_cache=False))


def decide_with_cache(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
    return (*stop_idle(fleet, now_s), *_starts(fleet, now_s, uses_cache=True))


def _starts(fleet: Fleet, now_s: float, *, uses_cache: bool) -> Iterator[Start]:
    for need in by_arrival(fleet, now_s):
        lacking = instances_lacking(need)
        while lacking > 0:
            group = min(MAX_GROUP, lacking)
            start = _cached(need, fleet) if uses_cache else None
            start = start or _allocate(need, fleet, now_s, group, keeps=uses_cache)
            if start is None:
                break
            yield start
            fleet = with_start(fleet, start)
            lacking -= len(start.stages)


def offered(node: Node, now_s: float) -> float:
    """What a new fetch gets: an equal share, or nothing if any running one would then be late.

    A running one that is late already blocks the node until it has ended.
    """
    share = node.nic_bytes_per_s / (len(node.claims) + 1)
    for claim in node.claims:
        left_s = float("inf") if claim.deadline_s is None else claim.deadline_s - now_s
        if left_s * share < claim.remaining_bytes:
            return 0.0
    return share


def _cached(need: Need, fleet: Fleet) -> Start | None:
    """A node that has the whole model in host memory and room for it."""
    size = reserved_bytes(need.model, 1)
    for node in fleet.nodes:
        if node.cached.get(need.weights) == ((0, need.model.num_layers),):
            gpu = _best_fit(node.gpus, size)
            if gpu is not None:
                return _start(need, [(node, gpu, size)], 1, keeps=True, deadline_s=None)
    return None


def _allocate(
    need: Need, fleet: Fleet, now_s: float, required: int, *, keeps: bool
) -> Start | None:
    slots = [
        _Slot(node=node, offered=rate, free_bytes=free)
        for node in fleet.nodes
        if (rate := offered(node, now_s)) > 0
        and (free := max(gpu.free_bytes for gpu in node.gpus)) > 0
    ]
    size = reserved_bytes(need.model, 1)
    full = [slot for slot in slots if slot.free_bytes >= size]
    if not full:
        return None
    chosen = _feasible(need, slots, full, now_s, required)
    stages, workers = chosen or (1, 1)
    return _place(need, slots, stages, workers, now_s, keeps=keeps)


def _feasible(
    need: Need, slots: Sequence[_Slot], full: Sequence[_Slot], now_s: float, required: int
) -> tuple[int, int] | None:
    """The first (stages, full workers) that meets both objectives and has `required` stages.

    Failing that many, the largest feasible number below.
    """
    found: tuple[int, int] | None = None
    for stages in range(1, MAX_STAGES + 1):
        if found is not None and found[0] >= required:
            break
        size = reserved_bytes(need.model, stages)
        if sum(slot.free_bytes >= size for slot in slots) < stages:
            continue
        for workers in range(min(stages, required), min(stages, len(full)) + 1):
            if _meets(need, slots, full, stages, workers, now_s):
                found = (stages, workers)
                break
    return found


def _meets(
    need: Need,
    slots: Sequence[_Slot],
    full: Sequence[_Slot],
    stages: int,
    workers: int,
    now_s: float,
) -> bool:
    size = reserved_bytes(need.model, stages)
    able = sorted((slot.offered for slot in slots if slot.free_bytes >= size), reverse=True)
    best = sorted((slot.offered for slot in full), reverse=True)
    rate = best[0] if stages == 1 else min(best[workers - 1], able[stages - 1])
    factor = pipeline_factor(stages, workers)
    waited_s = now_s - need.oldest_s if need.oldest_s is not None else 0.0
    fetch_s = need.model.total_bytes / stages / rate
    ttft_s = fetch_s + _PREFILL_S * factor + waited_s + _AFTER_FETCH_S
    tpot_s = _tpot_s(need, slots) * factor + _HOP_S * (stages - 1)
    objectives = need.objectives
    return (objectives.tpot_s is None or tpot_s <= objectives.tpot_s) and (
        objectives.ttft_s is None or ttft_s < objectives.ttft_s
    )


def _tpot_s(need: Need, slots: Sequence[_Slot]) -> float:
    """Its profile: the mean over requests that ran on one worker, on whatever GPU."""
    speeds = [slot.node.kind.speeds[need.model.name].decode_s for slot in slots]
    return sum(speeds) / len(speeds)


def _place(
    need: Need, slots: Sequence[_Slot], stages: int, workers: int, now_s: float, *, keeps: bool
) -> Start | None:
    """Full workers on the nodes with most bandwidth, then the others; the first node wins ties."""
    order = sorted(slots, key=lambda slot: -slot.offered)
    whole, part = reserved_bytes(need.model, 1), reserved_bytes(need.model, stages)
    full = [slot for slot in order if slot.free_bytes >= whole][:workers]
    rest = [slot for slot in order if slot.free_bytes >= part and slot not in full]
    chosen = [*((slot.node, whole) for slot in full)]
    chosen += [(slot.node, part) for slot in rest[: stages - workers]]
    if len(chosen) < stages:
        return None
    workers_gpus = [
        (node, gpu, size) for node, size in chosen if (gpu := _best_fit(node.gpus, size))
    ]
    slo_s = need.objectives.ttft_s
    since_s = need.oldest_s if need.oldest_s is not None else now_s
    deadline_s = None if slo_s is None else since_s + slo_s - _AFTER_FETCH_S
    return _start(need, workers_gpus, workers, keeps=keeps, deadline_s=deadline_s)


def _start(
    need: Need,
    workers: Sequence[tuple[Node, Gpu, int]],
    full: int,
    *,
    keeps: bool,
    deadline_s: float | None,
) -> Start:
    count = len(workers)
    bounds = equal_bounds(need.model.layer_bytes, count)
    # With all workers full their pipeline is never consolidated.
    growing = full if full < count or count == 1 else 0
    return Start(
        deployment=need.name,
        stages=tuple(
            StageChoice(
                node=node.name,
                gpu=gpu.index,
                start=bounds[index],
                end=bounds[index + 1],
                reserved_bytes=size,
                grows=index < growing,
                sources=(_source(need, node, bounds[index], bounds[index + 1]),),
            )
            for index, (node, gpu, size) in enumerate(workers)
        ),
        reason=f"first feasible: {count} stages, {full} of them full",
        deadline_s=deadline_s,
        keeps_in_memory=keeps and count == 1,
        growth=_GROWTH,
    )


def _source(need: Need, node: Node, start: int, end: int) -> StageSource:
    is_there = node.cached.get(need.weights) == ((0, need.model.num_layers),)
    return StageSource(
        size_bytes=need.model.bytes_of(start, end), peer=node.name if is_there else None
    )


def _best_fit(gpus: Sequence[Gpu], size_bytes: int) -> Gpu | None:
    fitting = [gpu for gpu in gpus if gpu.free_bytes >= size_bytes]
    return min(fitting, key=lambda gpu: gpu.free_bytes, default=None)
