"""The main path on a real cluster: tritonservers, agents, scheduler, gateway, S3, tritonclient.

The oracle is transformers' `generate` on the same checkpoint.
"""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from integration.support.tiny_cluster import (
    MODELS,
    Stream,
    TinyCluster,
    assert_nothing_left,
    generate,
    pids,
    prompts,
    stubs,
    wait_for_blocks,
    wait_until,
)

STAGES = (1, 2, 3, 4)


def test_the_sharded_checkpoint_has_shards_and_the_tied_one_no_head(cluster: TinyCluster) -> None:
    names = {name: model.weights.keys() for name, model in cluster.models.items()}
    assert "lm_head.weight" not in names["qwen2-tied"]
    assert "lm_head.weight" in names["llama-sharded"]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_transformers(cluster: TinyCluster, model: str, stages: int) -> None:
    name = f"{model}-{stages}"
    cluster.deploy(name, model, stages)
    prompt = prompts(1)[0]
    try:
        assert generate(cluster, name, prompt, 24) == cluster.models[model].greedy(prompt, 24)
        parts = cluster.replica(name).parts
        assert len(parts) == stages
        assert len({part.node for part in parts}) == stages
    finally:
        cluster.client.delete(name)


@pytest.mark.parametrize("stages", [1, 4])
def test_sixteen_requests_that_join_and_leave_equal_their_solo_runs(
    cluster: TinyCluster, stages: int
) -> None:
    name, model = f"crowd-{stages}", "llama-sharded"
    cluster.deploy(name, model, stages)
    asked = [(prompt, 4 + 3 * i) for i, prompt in enumerate(prompts(16))]
    try:
        with ThreadPoolExecutor(16) as threads:
            answers = [
                threads.submit(generate, cluster, name, prompt, count) for prompt, count in asked
            ]
        expected = [cluster.models[model].greedy(prompt, count) for prompt, count in asked]
        assert [answer.result() for answer in answers] == expected
        assert len(cluster.client.status(name).deployments[0].replicas) == 1
    finally:
        cluster.client.delete(name)


@pytest.mark.parametrize("stages", [1, 4])
def test_a_cancelled_stream_frees_its_kv_blocks(cluster: TinyCluster, stages: int) -> None:
    name, model = f"cancel-{stages}", "llama-sharded"
    cluster.deploy(name, model, stages, max_context=512)
    first, second = prompts(2)
    try:
        endless = Stream(cluster, name, first, 512 - len(first))
        endless.next()
        wait_for_blocks(cluster, name, lambda used: used > 0)
        endless.close()
        wait_for_blocks(cluster, name, lambda used: used == 0)
        assert generate(cluster, name, second, 8) == cluster.models[model].greedy(second, 8)
    finally:
        cluster.client.delete(name)


def test_an_idle_deployment_goes_to_zero_and_comes_back(cluster: TinyCluster) -> None:
    name, model = "sleepy", "qwen3-odd"
    cluster.deploy(name, model, 2, keep_alive_s=0.5)
    prompt = prompts(1)[0]
    expected = cluster.models[model].greedy(prompt, 6)
    try:
        assert generate(cluster, name, prompt, 6) == expected
        first = cluster.replica(name).replica
        wait_until(lambda: cluster.replica(name).removed_s > 0)
        assert_nothing_left(cluster, first)
        assert generate(cluster, name, prompt, 6) == expected
        assert cluster.replica(name).replica != first
    finally:
        cluster.client.delete(name)


def test_a_deleted_deployment_leaves_nothing_behind(cluster: TinyCluster) -> None:
    cluster.deploy("gone", "qwen2-tied", 3)
    generate(cluster, "gone", [1, 2, 3], 2)
    cluster.client.delete("gone")
    assert_nothing_left(cluster, "gone.")


def test_bad_requests_are_refused_without_waking_the_model(cluster: TinyCluster) -> None:
    cluster.deploy("strict", "qwen2-tied", 1)
    try:
        with pytest.raises(Exception, match="'max_tokens' is 0; it must be at least 1"):
            generate(cluster, "strict", [1], 0)
        too_long = "The prompt has 300 tokens; the context of 'strict' holds 256"
        with pytest.raises(Exception, match=too_long):
            generate(cluster, "strict", [1] * 300, 4)
        assert not cluster.client.status("strict").deployments[0].replicas
        assert generate(cluster, "strict", [1, 2], 3) == cluster.models["qwen2-tied"].greedy(
            [1, 2], 3
        )
    finally:
        cluster.client.delete("strict")


def test_an_unknown_deployment_is_named_with_those_there_are(cluster: TinyCluster) -> None:
    cluster.deploy("known", "qwen2-tied", 1)
    try:
        with pytest.raises(Exception, match=r"unknown model: 'unknown' is not found.*known"):
            generate(cluster, "unknown", [1], 1)
    finally:
        cluster.client.delete("known")


@pytest.mark.parametrize("victim", ["generate", "stage1", "triton"])
def test_requests_of_a_killed_process_go_on_at_the_replica_that_replaces_it(
    cluster: TinyCluster, victim: str
) -> None:
    name, model = f"kill-{victim}", "llama-sharded"
    cluster.deploy(name, model, 3)
    prompt = prompts(1)[0]
    expected = cluster.models[model].greedy(prompt, 160)
    try:
        generate(cluster, name, prompt, 1)
        # Found before the request runs: it must not end while we look.
        first = cluster.replica(name).replica
        if victim == "triton":
            process = pids(cluster.layout.files)[f"{cluster.replica(name).parts[0].node}-triton"]
        else:
            (process,) = stubs(first if victim == "generate" else f"{first}.{victim}")
        stream = Stream(cluster, name, prompt, 160)
        begun = stream.next().token_ids
        os.kill(process, signal.SIGKILL)
        assert begun + stream.all_ids() == expected
        assert cluster.replica(name).replica != first
        wait_until(lambda: not stubs(first) and not stubs(f"{first}.stage0"))
    finally:
        cluster.client.delete(name)
