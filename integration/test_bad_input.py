"""Bad input on a real cluster: one clear sentence, and the cluster as it was before."""

from __future__ import annotations

import json
import shutil
from math import prod
from pathlib import Path

import pytest
from rich.console import Console

from integration.bucket import s3_client, upload
from integration.tiny_cluster import Cluster, assert_nothing_left, generate
from paraserve_backend.errors import (
    InvalidRequest,
    NotFound,
    ParaServeError,
)
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.local.layout import BUCKET

SHARD = "model.safetensors"


@pytest.fixture
def folder(cluster: Cluster, tmp_path: Path) -> Path:
    """A good checkpoint that the test may spoil before it uploads it."""
    good = cluster.layout.files.buckets / BUCKET / "qwen2-tied"
    return Path(shutil.copytree(good, tmp_path / "spoilt"))


def uploaded(cluster: Cluster, folder: Path) -> str:
    return upload(cluster.layout, folder, "spoilt", Console(quiet=True))


def refusal(cluster: Cluster, source: str) -> ParaServeError:
    """Why a deployment is refused; it must not be there afterwards."""
    before = [deployment.spec.name for deployment in cluster.client.status().deployments]
    with pytest.raises(ParaServeError) as caught:
        cluster.client.deploy(pb.DeploymentSpec(name="bad", source=source))
    after = [deployment.spec.name for deployment in cluster.client.status().deployments]
    assert after == before
    return caught.value


def test_a_missing_bucket(cluster: Cluster) -> None:
    error = refusal(cluster, "s3://nowhere/model")
    assert (type(error), str(error)) == (
        NotFound,
        "the bucket of s3://nowhere/model does not exist",
    )


def test_a_missing_model(cluster: Cluster) -> None:
    error = refusal(cluster, f"s3://{BUCKET}/nothing")
    assert (type(error), str(error)) == (
        NotFound,
        f"there is nothing under s3://{BUCKET}/nothing: check the bucket and the prefix",
    )


def test_a_file_that_is_cut_off(cluster: Cluster, folder: Path) -> None:
    path = folder / SHARD
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 1000)
    error = refusal(cluster, uploaded(cluster, folder))
    assert (type(error), str(error)) == (
        InvalidRequest,  # a checkpoint's error has the code of a wrong request
        f"{SHARD} is cut off: {size - 1000} bytes of {size}, upload it again",
    )


def test_a_header_that_lies(cluster: Cluster, folder: Path) -> None:
    content = (folder / SHARD).read_bytes()
    header_bytes = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + header_bytes])
    name = next(name for name in header if name != "__metadata__")
    header[name]["shape"][0] += 1
    text = json.dumps(header, separators=(",", ":")).encode().ljust(header_bytes)
    (folder / SHARD).write_bytes(content[:8] + text + content[8 + header_bytes :])
    assert name in str(refusal(cluster, uploaded(cluster, folder)))


def test_an_architecture_we_cannot_run(cluster: Cluster, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Mystery"]}))
    message = str(refusal(cluster, uploaded(cluster, folder)))
    assert message.startswith("Architecture Mystery is not supported; supported are ")
    assert "LlamaForCausalLM" in message
    assert "Qwen3ForCausalLM" in message


def test_a_model_that_no_set_of_nodes_can_hold(cluster: Cluster, folder: Path) -> None:
    write_huge_model(folder)
    message = str(refusal(cluster, str(folder)))
    assert " GB are missing" in message


def test_an_unknown_deployment(cluster: Cluster) -> None:
    with pytest.raises(NotFound, match="There is no deployment 'nothing'"):
        cluster.client.delete("nothing")


@pytest.mark.parametrize("stages", [1, 3])
def test_weights_that_vanish_after_deploying_fail_the_start_and_leave_nothing(
    cluster: Cluster, folder: Path, stages: int
) -> None:
    cluster.client.deploy(
        pb.DeploymentSpec(name="vanished", source=uploaded(cluster, folder), max_stages=stages)
    )
    try:
        s3_client(cluster.layout).delete_object(Bucket=BUCKET, Key=f"spoilt/{SHARD}")
        # The embedded store tells versions by the folder's time, so the others look changed too.
        reason = rf"cold start of 'vanished' failed: .*({SHARD}|has changed)"
        with pytest.raises(Exception, match=reason):
            generate(cluster, "vanished", [1, 2], 2)
    finally:
        cluster.client.delete("vanished")
    assert_nothing_left(cluster, "vanished.")


def test_weights_that_change_after_deploying_are_never_mixed(
    cluster: Cluster, folder: Path
) -> None:
    source = uploaded(cluster, folder)
    cluster.client.deploy(pb.DeploymentSpec(name="changed", source=source))
    try:
        # The embedded store has no ETags; it tells versions apart by size.
        with (folder / SHARD).open("ab") as file:
            file.write(bytes(16))
        uploaded(cluster, folder)
        with pytest.raises(Exception, match=r"cold start of 'changed' failed: .*changed"):
            generate(cluster, "changed", [1, 2], 2)
    finally:
        cluster.client.delete("changed")
    assert_nothing_left(cluster, "changed.")


def write_huge_model(folder: Path) -> None:
    """A Llama of 60 GB whose file is one hole: only its header is ever read."""
    hidden, intermediate, layers, vocabulary = 8192, 65536, 16, 128
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"},
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        **{
            f"model.layers.{number}.{name}.weight": shape
            for number in range(layers)
            for name, shape in layer.items()
        },
        "model.norm.weight": (hidden,),
    }
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / SHARD).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "vocab_size": vocabulary,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
