"""Serverless vLLM as HydraServe's authors set it up: first fit, one worker, nothing overlaps."""

from __future__ import annotations

from collections.abc import Iterator

from paraserve_scheduler.planner.decisions import Decision, StageChoice, StageSource, Start
from paraserve_scheduler.planner.fleet import Fleet, Need
from paraserve_scheduler.planner.fleet_changes import with_start
from paraserve_scheduler.policies.baseline_rules import (
    by_arrival,
    instances_lacking,
    reserved_bytes,
    stop_idle,
)


def decide(fleet: Fleet, now_s: float) -> tuple[Decision, ...]:
    return (*stop_idle(fleet, now_s), *_starts(fleet, now_s))


def _starts(fleet: Fleet, now_s: float) -> Iterator[Start]:
    for need in by_arrival(fleet, now_s):
        for _ in range(instances_lacking(need)):
            start = _first_fit(need, fleet)
            if start is None:
                break
            yield start
            fleet = with_start(fleet, start)


def _first_fit(need: Need, fleet: Fleet) -> Start | None:
    size = reserved_bytes(need.model, 1)
    for node in fleet.nodes:
        fitting = [gpu for gpu in node.gpus if gpu.free_bytes >= size]
        if fitting:
            gpu = min(fitting, key=lambda gpu: gpu.free_bytes)
            stage = StageChoice(
                node=node.name,
                gpu=gpu.index,
                start=0,
                end=need.model.num_layers,
                reserved_bytes=size,
                grows=True,
                sources=(StageSource(size_bytes=need.model.total_bytes),),
            )
            return Start(deployment=need.name, stages=(stage,), reason="first node with room")
    return None
