"""Weights that are in a node's memory, on its disk, or in another node's memory are not read from
the store again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from integration.support.tiny_cluster import (
    TinyCluster,
    assert_nothing_left,
    generate,
    prompts,
    wait_until,
)
from paraserve_backend.protocol.span_messages import read_span
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import SpanName
from paraserve_scheduler.local.layout import BUCKET

MODEL = "llama-sharded"


@contextmanager
def without_store(cluster: TinyCluster) -> Iterator[None]:
    """Hide all models from the store."""
    bucket = cluster.layout.files.buckets / BUCKET
    hidden = bucket.rename(Path(f"{bucket}-hidden"))
    try:
        yield
    finally:
        hidden.rename(bucket)


def bytes_from(part: pb.ReplicaPart) -> dict[str, int]:
    return {
        span.detail: span.size_bytes
        for span in map(read_span, part.status.spans)
        if span.name is SpanName.FETCH_FROM
    }


def go_to_zero(cluster: TinyCluster, name: str) -> pb.ReplicaStatus:
    wait_until(lambda: cluster.replica(name).phase == pb.STOPPED)
    return cluster.replica(name)


def test_a_second_start_reads_its_tier_and_a_start_elsewhere_its_peer(
    caching_cluster: TinyCluster,
) -> None:
    cluster, name, prompt = caching_cluster, "warm", prompts(1)[0]
    expected = cluster.models[MODEL].greedy(prompt, 6)
    cluster.deploy(name, MODEL, 1, keep_alive_s=0.5)

    def start() -> pb.ReplicaPart:
        assert generate(cluster, name, prompt, 6) == expected
        replica = go_to_zero(cluster, name)
        assert_nothing_left(cluster, replica.replica)
        (part,) = replica.parts
        return part

    try:
        first = start()
        total_bytes = first.status.total_bytes
        assert bytes_from(first) == {}  # all of it from the store
        with without_store(cluster):
            second = start()
            assert second.node == first.node
            assert bytes_from(second) == {"tier": total_bytes}
            cluster.client.drain(second.node)
            elsewhere = start()
            assert elsewhere.node != second.node
            # The small files come from there, too.
            assert bytes_from(elsewhere)["peers"] > total_bytes
            assert bytes_from(elsewhere).keys() == {"peers"}
    finally:
        cluster.client.drain(first.node, undo=True)
        cluster.client.delete(name)


def extents(cluster: TinyCluster, node: str) -> list[Path]:
    (settings,) = (it.agent_settings for it in cluster.layout.nodes if it.name == node)
    return list(Path(str(settings["disk_dir"])).glob("objects/*/[0-9]*-*-*"))


def test_a_start_reads_the_disk_and_damage_on_it_changes_no_token(
    disk_cluster: TinyCluster,
) -> None:
    cluster, name, prompt = disk_cluster, "stored", prompts(1)[0]
    expected = cluster.models[MODEL].greedy(prompt, 6)

    def start() -> pb.ReplicaPart:
        assert generate(cluster, name, prompt, 6) == expected
        (part,) = cluster.replica(name).parts
        return part

    def leave_memory() -> None:
        """At once, and not when the replica has been idle for a while."""
        cluster.client.delete(name)
        cluster.deploy(name, MODEL, 1)

    cluster.deploy(name, MODEL, 1)
    try:
        first = start()
        total_bytes = first.status.total_bytes

        def is_on_disk() -> bool:
            found = extents(cluster, first.node)
            return sum(path.stat().st_size for path in found) > total_bytes

        # Bytes come to disk some seconds after the fetch, while they are still in memory.
        wait_until(is_on_disk)
        leave_memory()
        with without_store(cluster):
            second = start()
            assert second.node == first.node
            assert bytes_from(second).keys() == {"disk"}
            assert bytes_from(second)["disk"] > total_bytes  # the small files, too
        leave_memory()
        for path in extents(cluster, first.node):
            path.write_bytes(b"x" * path.stat().st_size)
        third = start()
        assert third.node == first.node
        assert bytes_from(third) == {}  # all of it from the store
    finally:
        cluster.client.delete(name)
