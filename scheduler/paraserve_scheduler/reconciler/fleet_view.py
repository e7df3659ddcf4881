"""Turns the scheduler's view of the cluster into the fleet that a policy sees. Pure.

Measured constants of nodes, or guesses until they are measured, are filled in here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from paraserve_scheduler.planner.bandwidth import BandwidthClaim
from paraserve_scheduler.planner.cost import (
    LayerRanges,
    NodeKind,
    Speed,
    StartMethod,
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
from paraserve_scheduler.reconciler.capacity import device_of, is_usable
from paraserve_scheduler.reconciler.config import PlacementConfig
from paraserve_scheduler.reconciler.model_shapes import held_keys, held_layers, shape_of
from paraserve_scheduler.reconciler.placement import LEAST_PORTS, least_kv_blocks
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.learned import Calibration
from paraserve_scheduler.state.records import (
    DeploymentState,
    HeldObject,
    NodeState,
    Phase,
    Replica,
)
from paraserve_scheduler.state.spec import Deployment
from paraserve_scheduler.state.view import ClusterView

#: Until measured: what a device reads of weights per second for a token, by kind of device, and how
#: many times more of them it works on per second when it reads a prompt.
_DECODE_BYTES_PER_S = {"cpu": 10e9, "cuda": 1.5e12}
_PREFILL_GAIN = {"cpu": 50.0, "cuda": 300.0}
#: Nobody tells how long prompts are; what first tokens really took is measured for this many.
_PROMPT_TOKENS = 256


def fleet_of(turn: Turn, held_back: Collection[str] = (), full: Collection[str] = ()) -> Fleet:
    """Return what policies may know of the view.

    Of deployments `held_back` nothing waits; those that are `full` may have no more replicas.
    """
    view, config = turn.view, turn.config.placement
    active = [state for state in view.deployments.values() if _is_active(view, state, held_back)]
    nodes = [
        node
        for _, node in sorted(view.nodes.items())
        if is_usable(turn, node) and _has_ports(view, node)
    ]
    of_kind = {_kind_key(node): node for node in nodes}
    kinds = {key: _kind(view, node, active, config) for key, node in of_kind.items()}
    owners = _owners(active)
    seen = tuple(_node(view, node, kinds[_kind_key(node)], owners) for node in nodes)
    most_bytes = max((gpu.free_bytes for node in seen for gpu in node.gpus), default=0)
    return Fleet(
        nodes=seen,
        needs=tuple(
            _need(view, state, most_bytes, config, held_back, is_full=state.name in full)
            for state in active
        ),
        leaving_bytes=_leaving_bytes(view),
    )


def with_only_waiting(fleet: Fleet, deployment: str) -> Fleet:
    """Return the fleet as if requests waited for this deployment alone, and others kept nothing."""
    return replace(
        fleet,
        needs=tuple(
            need if need.name == deployment else _satisfied(need)
            for need in fleet.needs
            if need.name == deployment or need.replicas
        ),
    )


def _satisfied(need: Need) -> Need:
    is_satisfied = not need.waiting and not need.min_replicas
    return need if is_satisfied else replace(need, waiting=0, min_replicas=0)


def _leaving_bytes(view: ClusterView) -> Mapping[tuple[str, int], int]:
    leaving: Counter[tuple[str, int]] = Counter()
    for replica in view.live_replicas():
        if replica.phase is Phase.STOPPING:
            for stage in replica.plan.stages:
                leaving[stage.node, 0] += stage.reserved_bytes
    return leaving


def _has_ports(view: ClusterView, node: NodeState) -> bool:
    (start, end), name = node.info.channel_ports, node.info.name
    used = sum(len(replica.plan.ports_on(name)) for replica in view.replicas_on(name))
    return end - start - used >= LEAST_PORTS


def _is_active(view: ClusterView, state: DeploymentState, held_back: Collection[str]) -> bool:
    if state.deleting:
        return False
    is_wanted = view.waiting(state.name) > 0 or state.deployment.spec.min_replicas > 0
    return (is_wanted and state.name not in held_back) or bool(view.live_replicas(state.name))


# ---- nodes ----


def _kind_key(node: NodeState) -> tuple[str, bool]:
    return node.info.kind, node.info.max_slots > 0


def _kind(
    view: ClusterView, node: NodeState, active: Sequence[DeploymentState], config: PlacementConfig
) -> NodeKind:
    known = view.calibrations.get(node.info.kind, Calibration())
    return NodeKind(
        name=node.info.kind,
        start=StartMethod(
            runtime_s=_or(known.runtime_s, config.runtime_s),
            tail_s=_or(known.tail_s, config.tail_s),
            load_s_per_byte=0.0,
            slot_runtime_s=_or(known.slot_runtime_s, 0.0) if node.info.max_slots else None,
            slot_bytes=node.slots_bytes,
        ),
        speeds={state.name: _speed(state, node, known) for state in active},
        disk_bytes_per_s=config.disk_bytes_per_s,
        shares_gpus=False,
    )


def _or(measured: float | None, guess: float) -> float:
    return guess if measured is None else measured


def _speed(state: DeploymentState, node: NodeState, known: Calibration) -> Speed:
    deployment = state.deployment
    device = (device_of(node, deployment.spec.device) or "cpu").partition(":")[0]
    decode_s = deployment.index.size_bytes / _DECODE_BYTES_PER_S[device]
    first_pass_s = _or(state.first_pass_s, _PROMPT_TOKENS * decode_s / _PREFILL_GAIN[device])
    return Speed(
        prefill_s_per_token=first_pass_s / _PROMPT_TOKENS,
        decode_s=decode_s * _or(known.decode_ratio, 1.0),
    )


def _node(view: ClusterView, node: NodeState, kind: NodeKind, owners: _Owners) -> Node:
    info = node.info
    free_bytes = max(0, info.memory_bytes - view.reserved_bytes(info.name))
    held = _held(node, owners)
    gpu = Gpu(
        index=0, capacity_bytes=info.memory_bytes, free_bytes=free_bytes, slots=node.idle_slots
    )
    return Node(
        name=info.name,
        kind=kind,
        nic_bytes_per_s=min(info.nic_bytes_per_s, node.fetch_bytes_per_s or info.nic_bytes_per_s),
        gpus=(gpu,),
        claims=_claims(view, info.name),
        cached=_layers(held, on_disk=False),
        on_disk=_layers(held, on_disk=True),
        zone=info.zone,
        devices=frozenset(device.partition(":")[0] for device in info.devices),
    )


def _claims(view: ClusterView, node: str) -> tuple[BandwidthClaim, ...]:
    """What replicas that requests wait for still have to fetch to this node."""
    return tuple(
        BandwidthClaim(remaining_bytes=remaining, deadline_s=_deadline_s(view, replica))
        for replica in view.replicas_on(node)
        if replica.phase is Phase.STARTING and replica.plan.succeeds is None
        for stage, part in replica.stage_plans
        if stage.node == node
        and part.phase is Phase.STARTING
        and (remaining := (part.total_bytes or stage.weight_bytes) - part.fetched_bytes) > 0
    )


def _deadline_s(view: ClusterView, replica: Replica) -> float | None:
    slo_s = view.deployments[replica.deployment].deployment.spec.ttft_slo_s
    return None if slo_s is None else replica.requested_s + slo_s


#: Active deployments by the objects that they need, under the objects' keys in a tier.
_Owners = Mapping[str, Sequence[Deployment]]


def _owners(active: Sequence[DeploymentState]) -> _Owners:
    owners: defaultdict[str, list[Deployment]] = defaultdict(list)
    for state in active:
        for key in held_keys(state.deployment):
            owners[key].append(state.deployment)
    return owners


def _held(node: NodeState, owners: _Owners) -> Mapping[Deployment, tuple[HeldObject, ...]]:
    """What the node's tier has of each active deployment that it has anything of."""
    held: defaultdict[Deployment, tuple[HeldObject, ...]] = defaultdict(tuple)
    for each in node.tier:
        for deployment in owners.get(each.key, ()):
            held[deployment] += (each,)
    return held


def _layers(
    held: Mapping[Deployment, tuple[HeldObject, ...]], *, on_disk: bool
) -> dict[str, LayerRanges]:
    """By checkpoint, the layers that lie in a node's host memory, or on its disk."""
    return {
        deployment.spec.source: layers
        for deployment, objects in held.items()
        if (layers := held_layers(deployment, objects, on_disk=on_disk))
    }


# ---- needs ----


def _need(
    view: ClusterView,
    state: DeploymentState,
    most_bytes: int,
    config: PlacementConfig,
    held_back: Collection[str],
    *,
    is_full: bool,
) -> Need:
    spec = state.deployment.spec
    model = shape_of(
        state.deployment, least_kv_blocks(state.deployment, config) * config.kv_block_size
    )
    # A silent replica is no capacity: what it was given waits, and another may start in its place.
    replicas = [each for each in view.live_replicas(state.name) if view.is_serving(each)]
    leading = [replica for replica in replicas if view.wanted_predecessor(replica) is None]
    loads = [_load(view, state, replica, is_only=len(leading) == 1) for replica in leading]
    # What a pipeline may become counts.
    most = spec.max_replicas - sum(_instances(state, replica) - 1 for replica in leading)
    least = spec.min_replicas
    is_held_back = state.name in held_back
    if is_full:
        most, least = min(most, len(leading)), min(least, len(leading))
    return Need(
        name=state.name,
        weights=spec.source,
        model=model,
        objectives=Objectives(ttft_s=spec.ttft_slo_s, tpot_s=spec.tpot_slo_s),
        waiting=0 if is_held_back else _waiting(view, state, replicas),
        oldest_s=state.waiting_since_s,
        replicas=tuple(loads),
        arrivals_s=state.history.arrivals_s,
        max_replicas=most,
        min_replicas=0 if is_held_back else least,
        priority=spec.priority,
        max_sequences=spec.max_sequences,
        max_stages=spec.max_stages or config.max_stages,
        prompt_tokens=_PROMPT_TOKENS,
        service_s=state.history.service_s,
        device=spec.device,
        # Better a pipeline that stays one than none.
        must_grow=spec.consolidate and model.full_bytes <= most_bytes,
        keep_alive_s=spec.keep_alive_s,
    )


def _waiting(view: ClusterView, state: DeploymentState, replicas: Sequence[Replica]) -> int:
    """Requests that no replica works on: held by gateways, or in one that is full or silent."""
    queued = sum(
        max(0, view.replica_in_flight(replica) - replica.plan.max_sequences) for replica in replicas
    )
    stuck = sum(
        view.replica_in_flight(each)
        for each in view.live_replicas(state.name)
        if each.is_wanted and view.is_silent(each)
    )
    return view.waiting(state.name) + queued + stuck


def _load(
    view: ClusterView, state: DeploymentState, replica: Replica, *, is_only: bool
) -> ReplicaLoad:
    """A replica with the successors that take over from it as one."""
    is_ready = replica.phase is Phase.READY
    successors = view.successors(replica)
    in_flight = sum(map(view.replica_in_flight, (replica, *successors)))
    if is_only:
        in_flight = sum(demand.in_flight for demand in view.demands(state.name))
    is_idle = is_ready and not in_flight
    # A deployment's own time also knows of requests that came and went between two reports.
    busy_s = state.last_active_s if is_only else replica.last_busy_s or replica.ready_s
    return ReplicaLoad(
        name=replica.id,
        deployment=replica.deployment,
        phase=ReplicaPhase.READY if is_ready else ReplicaPhase.STARTING,
        capacity=replica.plan.max_sequences * max(_instances(state, replica), len(successors)),
        in_flight=in_flight,
        reserved_bytes={(stage.node, 0): stage.reserved_bytes for stage in replica.plan.stages},
        idle_since_s=busy_s if is_idle else None,
        # One that nobody uses any more need not become anything.
        is_growing=bool(successors) and not is_idle,
    )


def _instances(state: DeploymentState, replica: Replica) -> int:
    """What it may become under load, which is sooner than a further replica."""
    spec = state.deployment.spec
    return min(len(replica.plan.stages), spec.max_replicas) if spec.consolidate else 1
