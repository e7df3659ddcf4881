"""The tables of `paraserve status`. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator

from rich.table import Table

from paraserve_backend.rpc import paraserve_pb2 as pb

_MB = 1e6


def nodes_table(status: pb.ClusterStatus, *, now_s: float) -> Table:
    table = _table("NODE", "STATE", "TRITON", "MEMORY MB", "RESERVED MB", "TIER MB")
    for node in status.nodes:
        table.add_row(
            node.info.name,
            _node_state(node, now_s),
            node.info.triton_grpc_address,
            *(_mb(size) for size in (node.info.memory_bytes, node.reserved_bytes)),
            _mb(node.tier_used_bytes),
        )
    if not status.nodes:
        table.add_row("none")
    return table


def deployments_table(status: pb.ClusterStatus) -> Table:
    table = _table("DEPLOYMENT", "REPLICA", "STATE", "STAGES", "WEIGHTS MB", "SOURCE")
    for entry in status.deployments:
        live = [replica for replica in entry.replicas if not replica.removed_s]
        weights, source = _mb(entry.weight_bytes), entry.spec.source
        if not live:
            state = f"failed: {entry.failure.message}" if entry.HasField("failure") else "at zero"
            table.add_row(entry.spec.name, "", state, "", weights, source)
        for replica in live:
            table.add_row(entry.spec.name, _name(replica), *_state(replica), weights, source)
    if not status.deployments:
        table.add_row("none")
    return table


def pause_lines(status: pb.ClusterStatus) -> Iterator[str]:
    """A line for each deployment whose starts are paused: until when, and why."""
    for entry in status.deployments:
        if not entry.starts_paused_until_s:
            continue
        until = time.strftime("%H:%M:%S", time.localtime(entry.starts_paused_until_s))
        line = f"{entry.spec.name}: starts paused until {until}"
        if entry.recent_deaths:
            replicas = (
                "1 replica" if entry.recent_deaths == 1 else f"{entry.recent_deaths} replicas"
            )
            line += f", {replicas} died in the last five minutes"
        yield f"{line}: {_last_reason(entry)}"


def _last_reason(entry: pb.DeploymentStatus) -> str:
    failures = [each.failure.message for each in entry.replicas if each.HasField("failure")]
    return failures[-1] if failures else entry.failure.message or "it failed to start"


def _node_state(node: pb.NodeView, now_s: float) -> str:
    state = "alive" if node.alive else f"silent for {now_s - node.last_seen_s:.0f} s"
    return f"{state}, drained" if node.cordoned else state


def _name(replica: pb.ReplicaStatus) -> str:
    """The replica and what takes over from it, as "tiny.1 -> tiny.2"."""
    if not replica.successors:
        return replica.replica
    return f"{replica.replica} -> {', '.join(replica.successors)}"


def _state(replica: pb.ReplicaStatus) -> tuple[str, str]:
    phase = pb.Phase.Name(replica.phase).lower()
    if replica.phase == pb.READY and replica.hand_over_begin_s:
        phase = f"hands over {replica.in_flight}"
    if replica.phase == pb.STARTING:
        fetched = sum(part.status.fetched_bytes for part in replica.parts)
        total = sum(part.status.total_bytes for part in replica.parts)
        if total:
            phase += f" {fetched / total:.0%}"
    return phase, str(len(replica.parts))


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading.endswith("MB") else "left")
    return table


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / _MB:.0f}"
