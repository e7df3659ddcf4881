"""The scheduler's view of the cluster as policies see it. Pure.

A policy knows fleets only, so that the simulator can ask it the same question; here is where the
real cluster becomes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from paraserve_backend.contract import LayerRange
from paraserve_backend.families.tensors import kv_bytes_per_token
from paraserve_backend.weights.plan import stage_tensors
from paraserve_scheduler.capacity import node_spaces
from paraserve_scheduler.config import PolicyConfig
from paraserve_scheduler.contention import Claim
from paraserve_scheduler.cost import ModelShape, NodeKind
from paraserve_scheduler.fleet import (
    Fleet,
    Gpu,
    Need,
    Node,
    Objectives,
    ReplicaLoad,
    ReplicaPhase,
)
from paraserve_scheduler.placement import NodeSpace
from paraserve_scheduler.plans import Deployment
from paraserve_scheduler.state import ClusterView, DeploymentState, Phase, Replica


def fleet_of(
    view: ClusterView,
    now_s: float,
    config: PolicyConfig,
    kinds: Mapping[str, NodeKind],
    *,
    kv_tokens: int,
) -> Fleet:
    """Return what policies may know of `view`.

    `kinds` are the measured constants of every node that has registered, by its name; `kv_tokens`
    the KV cache that a replica reserves.
    """
    spaces: dict[str, NodeSpace] = {}
    for state in view.deployments.values():
        for space in node_spaces(view, state.deployment.spec, now_s, config):
            spaces.setdefault(space.name, space)
    return Fleet(
        nodes=tuple(_node(view, spaces[name], kinds[name]) for name in sorted(spaces)),
        needs=tuple(
            _need(view, state, kv_tokens)
            for state in view.deployments.values()
            if not state.deleting and _is_active(view, state.name)
        ),
    )


def _is_active(view: ClusterView, deployment: str) -> bool:
    return view.waiting(deployment) > 0 or bool(view.live_replicas(deployment))


def _node(view: ClusterView, space: NodeSpace, kind: NodeKind) -> Node:
    info = view.nodes[space.name].info
    gpu = Gpu(index=0, capacity_bytes=info.memory_bytes, free_bytes=max(0, space.free_bytes))
    return Node(
        name=space.name,
        kind=kind,
        nic_bytes_per_s=info.nic_bytes_per_s,
        gpus=(gpu,),
        claims=_claims(view, space.name),
    )


def _claims(view: ClusterView, node: str) -> tuple[Claim, ...]:
    """What replicas that requests wait for still have to fetch to this node."""
    return tuple(
        Claim(remaining_bytes=remaining, deadline_s=_deadline_s(view, replica))
        for replica in view.live_replicas()
        if replica.phase is Phase.STARTING and replica.plan.succeeds is None
        for stage, part in replica.stage_plans
        if stage.node == node
        and part.phase is Phase.STARTING
        and (remaining := (part.total_bytes or stage.weight_bytes) - part.fetched_bytes) > 0
    )


def _deadline_s(view: ClusterView, replica: Replica) -> float | None:
    slo_s = view.deployments[replica.deployment].deployment.spec.ttft_slo_s
    return None if slo_s is None else replica.requested_s + slo_s


def _need(view: ClusterView, state: DeploymentState, kv_tokens: int) -> Need:
    spec = state.deployment.spec
    replicas = [it for it in view.live_replicas(state.name) if it.is_wanted]
    return Need(
        name=state.name,
        weights=spec.source,
        model=shape_of(state.deployment, kv_tokens),
        objectives=Objectives(ttft_s=spec.ttft_slo_s, tpot_s=spec.tpot_slo_s),
        waiting=view.waiting(state.name),
        oldest_s=state.waiting_since_s,
        replicas=tuple(_load(view, state, replica) for replica in replicas),
        max_sequences=spec.max_sequences,
        max_stages=spec.max_stages or len(view.nodes),
    )


def _load(view: ClusterView, state: DeploymentState, replica: Replica) -> ReplicaLoad:
    is_ready = replica.phase is Phase.READY
    in_flight = view.replica_in_flight(replica)
    is_growing = any(it.plan.succeeds == replica.id for it in view.live_replicas(state.name))
    return ReplicaLoad(
        name=replica.id,
        deployment=replica.deployment,
        phase=ReplicaPhase.READY if is_ready else ReplicaPhase.STARTING,
        capacity=replica.plan.max_sequences,
        in_flight=in_flight,
        reserved_bytes={(stage.node, 0): stage.reserved_bytes for stage in replica.plan.stages},
        idle_since_s=state.last_active_s if is_ready and not in_flight else None,
        is_growing=is_growing,
    )


@lru_cache(maxsize=1024)
def shape_of(deployment: Deployment, kv_tokens: int) -> ModelShape:
    """Bytes of every layer of a checkpoint, the embedding with the first, the head with the last.

    Where head and embedding are one tensor it counts once here, though the last stage of a
    pipeline fetches it again.
    """
    model, total = deployment.model, deployment.model.num_layers
    sizes = [_layer_bytes(deployment, layer, total) for layer in range(total)]
    whole = LayerRange(start=0, end=total, total=total)
    return ModelShape(
        name=deployment.name,
        layer_bytes=tuple(_without_repeats(deployment, sizes, whole)),
        kv_bytes=kv_tokens * kv_bytes_per_token(model, whole),
    )


def _layer_bytes(deployment: Deployment, layer: int, total: int) -> int:
    return _tensor_bytes(deployment, LayerRange(start=layer, end=layer + 1, total=total))


def _tensor_bytes(deployment: Deployment, layers: LayerRange) -> int:
    model = deployment.model
    tensors = stage_tensors(
        deployment.index, model.names, tied=model.tie_word_embeddings, layers=layers
    )
    return sum(tensor.size_bytes for tensor in tensors)


def _without_repeats(
    deployment: Deployment, sizes: Sequence[int], whole: LayerRange
) -> Sequence[int]:
    repeated = sum(sizes) - _tensor_bytes(deployment, whole)
    return (*sizes[:-1], sizes[-1] - repeated)
