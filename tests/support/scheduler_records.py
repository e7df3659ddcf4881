"""Records for tests of the scheduler, with a default for everything."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import Dtype, LayerRange
from paraserve_backend.architectures.tensors import expected_tensors
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.sources.base import StoredObject, StoreIdentity
from paraserve_scheduler.reconciler.config import PlacementConfig, PolicyConfig
from paraserve_scheduler.reconciler.placement import NodeSpace, equal_split, lay_out
from paraserve_scheduler.state.events import NodeRegistered, NodeReported
from paraserve_scheduler.state.fold import fold
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import Demand, DeploymentState, NodeInfo, PartState, Replica
from paraserve_scheduler.state.spec import Deployment, DeploymentSpec
from paraserve_scheduler.state.view import ClusterView
from tests.support.checkpoints import write_shard

NOW_S = 1_000.0
CONFIG = PolicyConfig()
_SHARD = "model.safetensors"
_SAFETENSORS_DTYPE = {Dtype.FLOAT32: "F32", Dtype.BFLOAT16: "BF16", Dtype.FLOAT16: "F16"}


def make_model_config(*, num_layers: int = 4, tied: bool = False) -> dict[str, Any]:
    """A Llama of 4 KB vocabulary rows, written as its config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "float32",
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "eos_token_id": 2,
    }


def make_deployment(
    name: str = "tiny", *, num_layers: int = 4, tied: bool = False, **spec: Any
) -> Deployment:
    config = make_model_config(num_layers=num_layers, tied=tied)
    model = model_spec(config)
    whole = LayerRange(start=0, end=num_layers, total=num_layers)
    tensors: dict[str, TensorEntry] = {}
    position = 1_000
    for tensor, shape in expected_tensors(model, whole).items():
        size = 4
        for length in shape:
            size *= length
        tensors[tensor] = TensorEntry(
            name=tensor,
            dtype=_SAFETENSORS_DTYPE[model.dtype],
            shape=shape,
            object_key=_SHARD,
            start=position,
            end=position + size,
        )
        position += size
    index = CheckpointIndex(
        source_uri="s3://models/tiny",
        config=config,
        files=tuple(_stored(key, 100) for key in ("config.json", "tokenizer.json")),
        objects=(_stored(_SHARD, position),),
        tensors=tensors,
        store=StoreIdentity(endpoint="https://s3.amazonaws.com", principal="scheduler"),
    )
    return Deployment(spec=make_spec(name, **spec), model=model, index=index)


def write_model(folder: Path, *, without: str | None = None, **config: Any) -> Path:
    """Write the checkpoint of `make_model_config`, changed by `config`, with random weights."""
    fields = make_model_config() | config
    model = model_spec(make_model_config())
    shapes = dict(expected_tensors(model, LayerRange(start=0, end=4, total=4)))
    shapes.pop(without or "", None)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields))
    (folder / "tokenizer.json").write_text("{}")
    write_shard(folder / _SHARD, shapes)
    return folder


def make_spec(name: str = "tiny", **fields: Any) -> DeploymentSpec:
    defaults = {
        "source": "s3://models/tiny",
        "keep_alive_s": 60.0,
        "max_sequences": 4,
        # Most tests are about replicas that stay as they are.
        "consolidate": False,
    }
    return DeploymentSpec(**{"name": name, **defaults, **fields})


def make_space(name: str = "n0", **fields: Any) -> NodeSpace:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "run_dir": f"/run/{name}",
        "channel_host": "10.0.0.1",
        "free_ports": (9000, 9001),
        "free_bytes": 1 << 30,
        "bytes_per_s": 1e9,
    }
    return NodeSpace(**{"name": name, **defaults, **fields})


def lay_out_equally(
    deployment: Deployment, number: int, nodes: Sequence[NodeSpace], config: PlacementConfig
) -> ReplicaPlan:
    """A replica of as many equal stages as there are nodes."""
    shares = equal_split(deployment, len(nodes), config.kv_block_size)
    stages = [(share.layers, node) for share, node in zip(shares, nodes, strict=True)]
    return lay_out(deployment, number, stages, config)


def make_node_info(name: str = "n0", **fields: Any) -> NodeInfo:
    defaults: dict[str, Any] = {
        "agent_address": f"{name}:8500",
        "triton_grpc_address": f"{name}:8001",
        "memory_bytes": 1 << 30,
        "nic_bytes_per_s": 1e9,
        "run_dir": f"/run/{name}",
        "channel_host": name,
        "channel_ports": (9000, 9010),
        "devices": ("cpu",),
    }
    return NodeInfo(**{"name": name, **defaults, **fields})


def make_view(
    *,
    nodes: Iterable[NodeInfo] = (make_node_info("n0"), make_node_info("n1")),
    deployments: Iterable[DeploymentState] = (),
    replicas: Iterable[Replica] = (),
    started_s: float = NOW_S - 100,
    at_s: float = NOW_S,
    parts: Mapping[str, tuple[PartState, ...]] | None = None,
) -> ClusterView:
    """A view of nodes that have just been heard of, with these `parts` by node."""
    view = ClusterView(
        started_s=started_s,
        listening_since_s=started_s,
        deployments={state.name: state for state in deployments},
        replicas={replica.id: replica for replica in replicas},
    )
    for info in nodes:
        view = fold(view, NodeRegistered(info=info, at_s=at_s))
        view = fold(
            view, make_heartbeat(info.name, parts=(parts or {}).get(info.name, ()), at_s=at_s)
        )
    return view


def make_heartbeat(
    node: str = "n0",
    *,
    parts: tuple[PartState, ...] = (),
    at_s: float = NOW_S,
    triton_live: bool = True,
) -> NodeReported:
    return NodeReported(
        node=node, triton_live=triton_live, parts=parts, tier_used_bytes=0, at_s=at_s
    )


def make_state(deployment: Deployment | None = None, **fields: Any) -> DeploymentState:
    defaults: dict[str, Any] = {"deployed_s": NOW_S - 100, "last_active_s": NOW_S}
    return DeploymentState(**{"deployment": deployment or make_deployment(), **defaults, **fields})


def make_demand(deployment: str = "tiny", **fields: Any) -> Demand:
    return Demand(**{"deployment": deployment, **fields})


def _stored(key: str, size_bytes: int) -> StoredObject:
    return StoredObject(key=key, size_bytes=size_bytes, version="v1")
