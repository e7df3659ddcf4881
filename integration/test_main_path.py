"""The main path on a real cluster: tritonservers, agents, scheduler, gateway, S3, tritonclient.

The oracle is transformers' `generate` on the same checkpoint.
"""

from __future__ import annotations

import os
import queue
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from integration.bucket import upload
from paraserve_backend.agent.node import available_bytes
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.client import SchedulerClient
from paraserve_scheduler.local.cluster import UpOptions, down, files_of, make_layout, up
from paraserve_scheduler.local.layout import ClusterLayout
from tests.backend.models import VOCAB_SIZE, TinyModel, write_model

TIMEOUT_S = 120.0
STAGES = (1, 2, 3, 4)
#: Name to family, shape and largest shard.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-sharded": ("llama", {"num_hidden_layers": 6}, "60KB"),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 4}, "5GB"),
    "qwen3-odd": ("qwen3", {"num_hidden_layers": 5}, "5GB"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    layout: ClusterLayout
    client: SchedulerClient
    models: dict[str, TinyModel]
    sources: dict[str, str]

    def deploy(self, name: str, model: str, stages: int, keep_alive_s: float = 600) -> None:
        self.client.deploy(
            pb.DeploymentSpec(
                name=name,
                source=self.sources[model],
                max_stages=stages,
                max_context=256,
                keep_alive_s=keep_alive_s,
            )
        )

    def replica(self, name: str) -> pb.ReplicaStatus:
        """The deployment's newest replica."""
        (deployment,) = self.client.status(name).deployments
        return deployment.replicas[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    token_ids: list[int]
    is_final: bool


class Stream:
    """One request on a stream of its own, with Triton's own client."""

    def __init__(
        self, cluster: Cluster, model: str, prompt: Sequence[int], max_tokens: int
    ) -> None:
        self._got: queue.SimpleQueue[tuple[triton.InferResult | None, Exception | None]]
        self._got = queue.SimpleQueue()
        self._client = triton.InferenceServerClient(cluster.layout.gateway_address)
        self._client.start_stream(lambda result, error: self._got.put((result, error)))
        ids = triton.InferInput("input_ids", [len(prompt)], "INT32")
        ids.set_data_from_numpy(np.array(prompt, np.int32))
        stream = triton.InferInput("stream", [1], "BOOL")
        stream.set_data_from_numpy(np.array([True]))
        self._client.async_stream_infer(
            model, [ids, stream], parameters={"max_tokens": max_tokens}, request_id="r"
        )

    def next(self) -> Piece:
        result, error = self._got.get(timeout=TIMEOUT_S)
        if error is not None:
            raise error
        assert result is not None
        ids = result.as_numpy("output_ids")
        assert ids is not None
        return Piece(token_ids=ids.tolist(), is_final=result.as_numpy("finish_reason") is not None)

    def all_ids(self) -> list[int]:
        ids: list[int] = []
        while True:
            piece = self.next()
            ids += piece.token_ids
            if piece.is_final:
                self.close()
                return ids

    def close(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()


def generate(cluster: Cluster, model: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
    return Stream(cluster, model, prompt, max_tokens).all_ids()


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, 90, size=count)
    return [rng.integers(1, VOCAB_SIZE, size=int(length)).tolist() for length in lengths]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    files = files_of("main-path", environ)
    layout = make_layout(
        UpOptions(name="main-path", nodes=4),
        files,
        available_bytes=available_bytes(Path("/proc")),
        cores=os.cpu_count() or 1,
    )
    models, folders = write_models(tmp_path_factory.mktemp("models"))
    try:
        up(layout, lambda _news: None)
        token = files.token.read_text(encoding="utf-8")
        with SchedulerClient(layout.scheduler_address, token) as client:
            quiet = Console(quiet=True)
            sources = {name: upload(layout, folders[name], name, quiet) for name in MODELS}
            yield Cluster(layout=layout, client=client, models=models, sources=sources)
    finally:
        down(files, delete=True)


def write_models(folder: Path) -> tuple[dict[str, TinyModel], dict[str, Path]]:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    models, folders = {}, {}
    for seed, (name, (family, shape, shard)) in enumerate(MODELS.items()):
        models[name] = write_model(folder / f"{name}-whole", family, seed=seed, **shape)
        folders[name] = folder / name
        models[name].oracle.save_pretrained(folders[name], max_shard_size=shard)
        words.save(str(folders[name] / "tokenizer.json"))
    return models, folders


def test_the_sharded_checkpoint_has_shards_and_the_tied_one_no_head(cluster: Cluster) -> None:
    names = {name: model.weights.keys() for name, model in cluster.models.items()}
    assert "lm_head.weight" not in names["qwen2-tied"]
    assert "lm_head.weight" in names["llama-sharded"]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_equal_transformers(cluster: Cluster, model: str, stages: int) -> None:
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
    cluster: Cluster, stages: int
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
def test_a_cancelled_stream_frees_its_kv_blocks(cluster: Cluster, stages: int) -> None:
    name, model = f"cancel-{stages}", "llama-sharded"
    cluster.deploy(name, model, stages)
    first, second = prompts(2)
    try:
        endless = Stream(cluster, name, first, 240)
        endless.next()
        wait_for_blocks(cluster, name, lambda used: used > 0)
        endless.close()
        wait_for_blocks(cluster, name, lambda used: used == 0)
        assert generate(cluster, name, second, 8) == cluster.models[model].greedy(second, 8)
    finally:
        cluster.client.delete(name)


def test_an_idle_deployment_goes_to_zero_and_comes_back(cluster: Cluster) -> None:
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


def test_a_deleted_deployment_leaves_nothing_behind(cluster: Cluster) -> None:
    cluster.deploy("gone", "qwen2-tied", 3)
    generate(cluster, "gone", [1, 2, 3], 2)
    cluster.client.delete("gone")
    assert_nothing_left(cluster, "gone.")


def test_bad_requests_are_refused_without_waking_the_model(cluster: Cluster) -> None:
    cluster.deploy("strict", "qwen2-tied", 1)
    try:
        with pytest.raises(Exception, match="'max_tokens' is 0; it must be at least 1"):
            generate(cluster, "strict", [1], 0)
        assert not cluster.client.status("strict").deployments[0].replicas
        with pytest.raises(Exception, match="The prompt has 300 tokens; the context holds 256"):
            generate(cluster, "strict", [1] * 300, 4)
        assert generate(cluster, "strict", [1, 2], 3) == cluster.models["qwen2-tied"].greedy(
            [1, 2], 3
        )
    finally:
        cluster.client.delete("strict")


def test_an_unknown_deployment_is_named_with_those_there_are(cluster: Cluster) -> None:
    cluster.deploy("known", "qwen2-tied", 1)
    try:
        with pytest.raises(Exception, match=r"unknown model: 'unknown' is not found.*known"):
            generate(cluster, "unknown", [1], 1)
    finally:
        cluster.client.delete("known")


def wait_until(condition: object, timeout_s: float = TIMEOUT_S) -> None:
    """Poll the cluster until something has happened there; fails after the time limit."""
    assert callable(condition)
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def wait_for_blocks(cluster: Cluster, name: str, wanted: object) -> None:
    assert callable(wanted)
    replica = cluster.replica(name)
    head = next(node for node in cluster.layout.nodes if node.name == replica.parts[0].node)
    url = f"http://{head.host}:{head.triton_metrics_port}/metrics"
    line = f'paraserve_kv_blocks_used{{deployment="{name}",replica="{replica.replica}"}} '

    def used() -> float:
        with urllib.request.urlopen(url) as response:
            lines = response.read().decode().splitlines()
        return next((float(each.removeprefix(line)) for each in lines if each.startswith(line)), 0)

    wait_until(lambda: wanted(used()))


def assert_nothing_left(cluster: Cluster, replica: str) -> None:
    """No model, no process and no shared memory of a replica is on any node."""
    for node in cluster.layout.nodes:
        client = triton.InferenceServerClient(f"{node.host}:{node.triton_grpc_port}")
        index = client.get_model_repository_index()
        ready = [model.name for model in index.models if model.state == "READY"]
        assert not [model for model in ready if model.startswith(replica)]
        client.close()
        run_dir = cluster.layout.files.run_dir(node.name)
        fetches = list((run_dir / "tier" / "fetches").glob(f"{replica}*"))
        assert not fetches
        assert not list((run_dir / "keys").glob(f"{replica}*"))
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [line for line in lines if f"{replica}".encode() in line and b"stub" in line]
