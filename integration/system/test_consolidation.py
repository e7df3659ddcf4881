"""Requests that run while their replica is consolidated, moved or drained, on a real cluster.

They are asked for by unmodified Triton clients through the gateway, new ones keep coming, and every
answer is compared with transformers', token for token.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from integration.support.steady_load import (
    MAX_TOKENS,
    MODEL,
    PROMPTS,
    deployed,
    load,
    replicas,
    serving,
    wait_until_gone,
)
from integration.support.tiny_cluster import TinyCluster, assert_nothing_left, stubs, wait_until
from paraserve_backend.rpc import paraserve_pb2 as pb


@pytest.fixture(scope="module")
def expected(cluster: TinyCluster) -> list[list[int]]:
    return [cluster.models[MODEL].greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize(("stages", "clients"), [(2, 1), (2, 16), (3, 1), (3, 16), (4, 1), (4, 16)])
def test_a_pipeline_becomes_one_full_instance_and_no_request_notices(
    cluster: TinyCluster, expected: list[list[int]], stages: int, clients: int
) -> None:
    with (
        deployed(cluster, f"down-{stages}-{clients}", max_stages=stages) as name,
        load(cluster, name, expected, clients) as running,
    ):
        wait_until(lambda: f"{name}.1" in replicas(cluster, name))
        pipeline = wait_until_gone(cluster, name, f"{name}.1")
        assert not pipeline.failure.message
        (full,) = serving(cluster, name)
        assert len(pipeline.parts) == stages
        assert len(full.parts) == 1
        assert full.parts[0].node == pipeline.parts[0].node
        assert full.succeeds == f"{name}.1"
        assert_nothing_left(cluster, f"{name}.1")
        # Some were asked before the full instance took over and ended after the pipeline was left.
        running.stopping.set()
        began_s, ended_s = pipeline.hand_over_begin_s, pipeline.hand_over_end_s
    assert 0 < began_s < ended_s
    assert running.spanning(began_s, began_s) > 0


def test_under_load_several_stage_nodes_become_full_instances(
    cluster: TinyCluster, expected: list[list[int]]
) -> None:
    with (
        deployed(cluster, "up", max_stages=3, max_sequences=4, max_replicas=3) as name,
        load(cluster, name, expected, 12),
    ):
        wait_until(lambda: f"{name}.1" in replicas(cluster, name))
        pipeline = wait_until_gone(cluster, name, f"{name}.1")
        full = serving(cluster, name)
        assert len(full) == 3
        nodes = {part.node for part in pipeline.parts}
        assert {replica.parts[0].node for replica in full} == nodes


def test_a_replica_moves_to_a_named_node_and_a_drained_node_is_left(
    cluster: TinyCluster, expected: list[list[int]]
) -> None:
    with (
        deployed(cluster, "mover", max_stages=1) as name,
        load(cluster, name, expected, 4),
    ):
        wait_until(lambda: bool(serving(cluster, name)))
        home = serving(cluster, name)[0].parts[0].node
        there = next(node.name for node in cluster.layout.nodes if node.name != home)
        cluster.client.migrate(name, there)
        wait_until_gone(cluster, name, f"{name}.1")
        assert [r.parts[0].node for r in serving(cluster, name)] == [there]
        try:
            wait_until(lambda: not cluster.client.drain(there).replicas)
            wait_until_gone(cluster, name, f"{name}.2")
            assert there not in {r.parts[0].node for r in serving(cluster, name)}
        finally:
            cluster.client.drain(there, undo=True)


def kill(model: str) -> None:
    """Kill a model's process as soon as it has torch, which is in the middle of its start.

    By then the node's agent has seen it: a process that dies in the first half second of its life
    is missed only at its part's deadline, because Triton waits for it for ever.
    """
    wait_until(lambda: any(map(_has_torch, stubs(model))))
    for pid in stubs(model):
        os.kill(pid, signal.SIGKILL)


def _has_torch(pid: int) -> bool:
    try:
        return "libtorch" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # it has just ended
        return False


def test_a_full_instance_that_dies_while_it_loads_leaves_the_pipeline_serving(
    cluster: TinyCluster, expected: list[list[int]]
) -> None:
    with (
        deployed(cluster, "early", max_stages=3) as name,
        load(cluster, name, expected, 4) as running,
    ):
        kill(f"{name}.2")
        wait_until(lambda: replicas(cluster, name)[f"{name}.2"].removed_s > 0)
        assert replicas(cluster, name)[f"{name}.1"].phase == pb.READY
        answered = len(running.answers)
        wait_until(lambda: len(running.answers) > answered + 4)
        # And it is tried again.
        wait_until_gone(cluster, name, f"{name}.1")
        assert [len(r.parts) for r in serving(cluster, name)] == [1]


def test_a_full_instance_that_dies_while_it_takes_over_loses_no_request(
    cluster: TinyCluster, expected: list[list[int]]
) -> None:
    with (
        deployed(cluster, "late", max_stages=3) as name,
        load(cluster, name, expected, 4) as running,
    ):
        wait_until(lambda: f"{name}.2" in replicas(cluster, name))
        wait_until(lambda: replicas(cluster, name)[f"{name}.2"].phase == pb.READY)
        kill(f"{name}.2")
        died_s = time.time()
        wait_until(lambda: running.spanning(died_s, died_s) >= 1)
        answered = len(running.answers)
        wait_until(lambda: len(running.answers) > answered + 4)


def test_a_stage_that_dies_while_it_hands_over_loses_no_request(
    cluster: TinyCluster, expected: list[list[int]]
) -> None:
    with (
        deployed(cluster, "stage-dies", max_stages=3) as name,
        load(cluster, name, expected, 4) as running,
    ):
        wait_until(lambda: f"{name}.2" in replicas(cluster, name))
        # Found before the hand-over: it must not end while we look.
        (stage,) = stubs(f"{name}.1.stage2")
        wait_until(lambda: replicas(cluster, name)[f"{name}.2"].phase == pb.READY)
        os.kill(stage, signal.SIGKILL)
        died_s = time.time()
        wait_until(lambda: running.spanning(died_s, died_s) >= 1)
        answered = len(running.answers)
        wait_until(lambda: len(running.answers) > answered + 4)
