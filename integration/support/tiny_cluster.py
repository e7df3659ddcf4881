"""A local cluster with tiny checkpoints in its bucket, as the integration tests share it."""

from __future__ import annotations

import contextlib
import queue
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from integration.support.limits import HANG_S
from paraserve_backend.protocol.run_dir import RunDir
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.layout import (
    SHM,
    ClusterFiles,
    ClusterLayout,
    read_running,
)
from tests.support.models import VOCAB_SIZE, TinyModel, write_model, write_words

#: Name to family, shape and largest shard.
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-sharded": ("llama", {"num_hidden_layers": 6}, "60KB"),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True, "num_hidden_layers": 4}, "5GB"),
    "qwen3-odd": ("qwen3", {"num_hidden_layers": 5}, "5GB"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyCluster:
    layout: ClusterLayout
    client: SchedulerClient
    models: dict[str, TinyModel]
    sources: dict[str, str]

    def deploy(
        self,
        name: str,
        model: str,
        stages: int,
        keep_alive_s: float = HANG_S,
        max_context: int = 256,
    ) -> None:
        self.client.deploy(
            pb.DeploymentSpec(
                name=name,
                source=self.sources[model],
                max_stages=stages,
                max_context=max_context,
                keep_alive_s=keep_alive_s,
                # The number of stages is what these tests are about.
                consolidate=False,
            )
        )
        self.until_known(name)

    def until_known(self, name: str) -> None:
        """Wait until the gateway has heard of it, a moment after the scheduler has answered."""
        with contextlib.closing(
            triton.InferenceServerClient(self.layout.gateway_address)
        ) as client:
            wait_until(lambda: client.is_model_ready(name))

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
        self, cluster: TinyCluster, model: str, prompt: Sequence[int], max_tokens: int
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
        result, error = self._got.get(timeout=HANG_S)
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


def generate(cluster: TinyCluster, model: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
    return Stream(cluster, model, prompt, max_tokens).all_ids()


def prompts(count: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    lengths = rng.integers(1, 90, size=count)
    return [rng.integers(1, VOCAB_SIZE, size=int(length)).tolist() for length in lengths]


def write_models(folder: Path) -> tuple[dict[str, TinyModel], dict[str, Path]]:
    models, folders = {}, {}
    for seed, (name, (family, shape, shard)) in enumerate(MODELS.items()):
        models[name] = write_model(folder / f"{name}-whole", family, seed=seed, **shape)
        folders[name] = folder / name
        models[name].oracle.save_pretrained(folders[name], max_shard_size=shard)
        write_words(folders[name])
    return models, folders


def wait_until(condition: Callable[[], bool], timeout_s: float = HANG_S) -> None:
    """Poll the cluster until something has happened there; fails after the time limit."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def wait_for_blocks(cluster: TinyCluster, name: str, wanted: Callable[[float], bool]) -> None:
    replica = cluster.replica(name)
    head = next(node for node in cluster.layout.nodes if node.name == replica.parts[0].node)
    url = f"http://{head.host}:{head.triton_metrics_port}/metrics"
    line = f'paraserve_kv_blocks_used{{deployment="{name}",replica="{replica.replica}"}} '

    def used() -> float:
        with urllib.request.urlopen(url) as response:
            lines = response.read().decode().splitlines()
        return next((float(each.removeprefix(line)) for each in lines if each.startswith(line)), 0)

    wait_until(lambda: wanted(used()))


def assert_nothing_left(cluster: TinyCluster, replica: str) -> None:
    """No model, no process and no shared memory of a replica is on any node."""
    for node in cluster.layout.nodes:
        client = triton.InferenceServerClient(f"{node.host}:{node.triton_grpc_port}")
        index = client.get_model_repository_index()
        ready = [model.name for model in index.models if model.state == "READY"]
        assert not [model for model in ready if model.startswith(replica)]
        client.close()
        run_dir = RunDir(cluster.layout.files.run_dir(node.name))
        fetches = list(run_dir.tier.fetches.glob(f"{replica}*"))
        assert not fetches
        assert not list(run_dir.keys.glob(f"{replica}*"))
    lines = _stub_lines()
    assert not [line for line in lines if replica.encode() in line]
    # Triton gives every stub a region of shared memory and tells it the name.
    regions = SHM.glob(f"{cluster.layout.files.shm_prefix}node*")
    assert not [r for r in regions if not any(r.name.encode() in line for line in lines)]


def _stub_lines() -> list[bytes]:
    """The command line of every stub process."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may end while we look
            lines.append(path.read_bytes())
    return [line for line in lines if b"python_backend_stub" in line]


def stubs(model: str) -> list[int]:
    """Processes that serve exactly this Triton model."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may end while we look
            words = path.read_bytes().split(b"\0")
            if b"stub" in words[0] and f"{model}_0_0".encode() in words:
                found.append(int(path.parent.name))
    return found


def pids(files: ClusterFiles) -> dict[str, int]:
    """The processes of a cluster, by name, as they are now: one that ended has a successor."""
    return {process.name: process.pid for process in read_running(files.cluster).processes}
