"""How a decision changes a fleet before anything has come of it. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from paraserve_scheduler.planner.bandwidth import BandwidthClaim
from paraserve_scheduler.planner.decisions import StageChoice, StageSource, Start
from paraserve_scheduler.planner.fleet import Fleet, Node


def with_start(fleet: Fleet, start: Start) -> Fleet:
    """The fleet once `start` has begun: its memory is reserved and its fetches run."""
    by_node = {stage.node: stage for stage in start.stages}
    read = Counter(
        source.peer
        for stage in start.stages
        for source in stage.sources
        if _is_fetched(source, stage)
    )
    nodes = tuple(
        _with_stage(node, by_node[node.name], start) if node.name in by_node else node
        for node in fleet.nodes
    )
    nodes = tuple(
        replace(node, uplink_fetches=node.uplink_fetches + read[node.name])
        if node.name in read
        else node
        for node in nodes
    )
    return replace(fleet, nodes=nodes, store_fetches=fleet.store_fetches + read[None])


def _with_stage(node: Node, stage: StageChoice, start: Start) -> Node:
    gpus = tuple(
        replace(
            gpu,
            free_bytes=gpu.free_bytes - stage.reserved_bytes,
            slots=gpu.slots - stage.uses_slot,
        )
        if gpu.index == stage.gpu
        else gpu
        for gpu in node.gpus
    )
    size = _fetched(stage)
    claim = (BandwidthClaim(remaining_bytes=size, deadline_s=start.deadline_s),) if size else ()
    return replace(node, gpus=gpus, claims=(*node.claims, *claim))


def _fetched(stage: StageChoice) -> int:
    return sum(source.size_bytes for source in stage.sources if _is_fetched(source, stage))


def _is_fetched(source: StageSource, stage: StageChoice) -> bool:
    """Over the network, that is."""
    return source.peer != stage.node


def with_freed(fleet: Fleet, reserved: Mapping[tuple[str, int], int]) -> Fleet:
    """The fleet once what a replica reserved is free again."""
    nodes = {name for name, _ in reserved}
    return replace(
        fleet,
        nodes=tuple(
            replace(
                node,
                gpus=tuple(
                    replace(
                        gpu,
                        free_bytes=gpu.free_bytes + reserved.get((node.name, gpu.index), 0),
                    )
                    for gpu in node.gpus
                ),
            )
            if node.name in nodes
            else node
            for node in fleet.nodes
        ),
    )


def without(fleet: Fleet, replicas: Collection[str]) -> Fleet:
    """The fleet without replicas that are to be stopped; their memory is not free yet."""
    return replace(
        fleet,
        needs=tuple(
            replace(
                need,
                replicas=tuple(
                    replica for replica in need.replicas if replica.name not in replicas
                ),
            )
            for need in fleet.needs
        ),
    )
