"""Fleets for tests of policies, with a default for everything."""

from __future__ import annotations

from typing import Any

from paraserve_backend.protocol.names import deployment_of
from paraserve_scheduler.planner.cost import (
    ModelShape,
    NodeKind,
    Speed,
    StartMethod,
    uniform_model,
)
from paraserve_scheduler.planner.fleet import (
    Fleet,
    Gpu,
    Need,
    Node,
    Objectives,
    ReplicaLoad,
    ReplicaPhase,
)

GB = 10**9
NOW_S = 1_000.0


def make_method(**fields: Any) -> StartMethod:
    defaults = {"runtime_s": 4.0, "tail_s": 1.0, "load_s_per_byte": 0.1 / GB}
    return StartMethod(**{**defaults, **fields})


def make_model(name: str = "7b", **fields: Any) -> ModelShape:
    """13 GB in 32 layers with 5 GB of KV cache: the paper's 7B."""
    defaults: dict[str, Any] = {
        "size_bytes": 13 * GB,
        "num_layers": 32,
        "ends_bytes": GB // 4,
        "kv_bytes": 5 * GB,
    }
    return uniform_model(name, **{**defaults, **fields})


def make_kind(method: StartMethod | None = None, **fields: Any) -> NodeKind:
    speed = Speed(prefill_s_per_token=0.0003, decode_s=0.03, decode_s_per_sequence=0.001)
    defaults: dict[str, Any] = {
        "name": "gpu",
        "start": method or make_method(),
        "speeds": {"7b": speed, "13b": speed, "tiny": speed},
    }
    return NodeKind(**{**defaults, **fields})


def make_gpu(index: int = 0, *, free_gb: float = 32, size_gb: float = 32, slots: int = 0) -> Gpu:
    return Gpu(
        index=index,
        capacity_bytes=round(size_gb * GB),
        free_bytes=round(free_gb * GB),
        slots=slots,
    )


def make_node(name: str = "n0", *, gbit: float = 16, **fields: Any) -> Node:
    defaults: dict[str, Any] = {
        "kind": make_kind(),
        "nic_bytes_per_s": gbit * 1e9 / 8,
        "gpus": (make_gpu(),),
    }
    return Node(**{"name": name, **defaults, **fields})


def make_need(name: str = "chat", **fields: Any) -> Need:
    defaults: dict[str, Any] = {
        "weights": name,
        "model": make_model(),
        "objectives": Objectives(ttft_s=7.5, tpot_s=0.2),
        "waiting": 1,
        "oldest_s": NOW_S,
    }
    return Need(**{"name": name, **defaults, **fields})


def make_load(name: str = "chat.1", **fields: Any) -> ReplicaLoad:
    defaults: dict[str, Any] = {
        "deployment": deployment_of(name),
        "phase": ReplicaPhase.READY,
        "capacity": 8,
        "in_flight": 0,
        "reserved_bytes": {("n0", 0): 18 * GB},
        "idle_since_s": NOW_S - 10,
    }
    return ReplicaLoad(**{"name": name, **defaults, **fields})


def make_fleet(*nodes: Node, needs: tuple[Need, ...] = (), **fields: Any) -> Fleet:
    chosen = nodes or (make_node("n0"), make_node("n1"), make_node("n2"), make_node("n3"))
    return Fleet(nodes=chosen, needs=needs, **fields)
