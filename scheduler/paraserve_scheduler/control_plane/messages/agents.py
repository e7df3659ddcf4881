"""Messages between scheduler and agents: what nodes report, and the parts they are told to start.

Which peers a node may fetch from is decided here. Pure.
"""

from __future__ import annotations

from paraserve_backend.protocol.names import EngineName, fetch_id
from paraserve_backend.protocol.span_messages import read_span
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.weights.checkpoint.fetch_plan import plan_fetch, whole_objects
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_scheduler.control_plane.messages.triton_models import stage_models
from paraserve_scheduler.reconciler.capacity import is_alive
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.events import NodeReported
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import (
    Failure,
    HeldObject,
    NodeInfo,
    PartState,
    Phase,
)
from paraserve_scheduler.state.spec import ChannelKeys, Deployment

#: Nodes that a fetch is told of.
_MOST_PEERS = 3
PHASES = {
    Phase.UNKNOWN: pb.PHASE_UNSPECIFIED,
    Phase.STARTING: pb.STARTING,
    Phase.READY: pb.READY,
    Phase.STOPPING: pb.STOPPING,
    Phase.FAILED: pb.FAILED,
    Phase.STOPPED: pb.STOPPED,
}
_PHASE_OF = {number: phase for phase, number in PHASES.items()}


def node_info(message: pb.NodeInfo) -> NodeInfo:
    return NodeInfo(
        name=message.name,
        agent_address=message.agent_address,
        triton_grpc_address=message.triton_grpc_address,
        memory_bytes=message.memory_bytes,
        nic_bytes_per_s=message.nic_bytes_per_s,
        run_dir=message.run_dir,
        channel_host=message.channel_host,
        channel_ports=(message.channel_port_start, message.channel_port_end),
        devices=tuple(message.devices),
        peer_address=message.peer_address,
        kind=message.kind,
        zone=message.zone,
        max_slots=message.max_slots,
    )


def node_reported(message: pb.NodeStatus, at_s: float) -> NodeReported:
    return NodeReported(
        node=message.name,
        triton_live=message.triton_live,
        parts=tuple(map(part_state, message.parts)),
        tier_used_bytes=message.tier_used_bytes,
        tier=tuple(
            HeldObject(
                key=found.key,
                version=found.version,
                landed_bytes=found.landed_bytes,
                landed=tuple((part.start, part.end) for part in found.landed),
                on_disk=tuple((part.start, part.end) for part in found.on_disk),
            )
            for found in message.tier
        ),
        idle_slots=message.idle_slots,
        slots_bytes=message.slots_bytes,
        at_s=at_s,
    )


def part_state(message: pb.PartStatus) -> PartState:
    return PartState(
        replica=message.replica,
        stage=message.stage,
        phase=_PHASE_OF.get(message.phase, Phase.UNKNOWN),
        spans=tuple(map(read_span, message.spans)),
        fetched_bytes=message.fetched_bytes,
        total_bytes=message.total_bytes,
        failure=_failure(message.failure) if message.HasField("failure") else None,
        slots=dict(message.slots),
    )


def _failure(message: pb.Failure) -> Failure:
    return Failure(grpc_code=message.grpc_code, message=message.message)


def peer_addresses(turn: Turn, deployment: Deployment, node: str) -> tuple[str, ...]:
    """Where `node` may read some of a deployment's weights, the nodes that have most first.

    Only of live nodes: the address of one that is lost may be somebody else's by now.
    """
    index = deployment.index
    wanted = {
        (index.store.key_of(index.source_uri, stored.key), stored.version)
        for stored in index.objects
    }
    held = [
        (
            sum(
                held_object.landed_bytes
                for held_object in peer.tier
                if (held_object.key, held_object.version) in wanted
            ),
            peer.info,
        )
        for name, peer in sorted(turn.view.nodes.items())
        if name != node and peer.info.peer_address and is_alive(turn, peer)
    ]
    holders = sorted((entry for entry in held if entry[0]), key=lambda entry: -entry[0])
    return tuple(info.peer_address for _, info in holders[:_MOST_PEERS])


def part_message(
    deployment: Deployment,
    plan: ReplicaPlan,
    stage: int,
    keys: ChannelKeys,
    peers: tuple[str, ...] = (),
) -> pb.Part:
    """Everything the node of `stage` needs to serve it; `peers` are where it may find weights."""
    models = stage_models(plan, deployment.model, stage)
    return pb.Part(
        deployment=plan.deployment,
        replica=plan.replica,
        stage=stage,
        models=[
            pb.ModelFiles(name=model.name, files=model.files, load_wave=model.load_wave)
            for model in models
        ],
        fetch=_fetch(deployment, plan, stage, peers),
        channel_keys=pb.ChannelKeys(public_key=keys.public_key, secret_key=keys.secret_key),
    )


def _fetch(
    deployment: Deployment, plan: ReplicaPlan, stage: int, peers: tuple[str, ...]
) -> pb.Fetch:
    model, index, where = deployment.model, deployment.index, plan.stages[stage]
    if plan.engine is EngineName.PARASERVE:
        tied = model.tie_word_embeddings
        tensors = stage_tensors(index, model.names, tied=tied, layers=where.layers)
    else:
        tensors = whole_objects(index)
    return pb.Fetch(
        plan_json=plan_fetch(index, tensors, fetch_id=fetch_id(plan.replica, stage)).to_json(),
        endpoint_url=deployment.spec.endpoint_url or "",
        region=deployment.spec.region or "",
        background=plan.background,
        peers=peers,
        # Of a GPU's memory the tier takes nothing.
        reserved_bytes=where.reserved_bytes if where.device == "cpu" else 0,
    )
