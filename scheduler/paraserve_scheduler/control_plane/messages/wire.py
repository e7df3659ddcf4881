"""Between the scheduler's records and the messages of paraserve.proto. Pure."""

from __future__ import annotations

from paraserve_backend.protocol.names import EngineName
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span
from paraserve_backend.weights.checkpoint.fetch_plan import plan_fetch, whole_objects
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_scheduler.control_plane.messages.triton_models import (
    fetch_id,
    generate_model,
    stage_models,
)
from paraserve_scheduler.planner.decisions import Prediction
from paraserve_scheduler.reconciler.capacity import is_alive
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.state.events import NodeReported
from paraserve_scheduler.state.plans import ReplicaPlan
from paraserve_scheduler.state.records import (
    Demand,
    DeploymentState,
    Failure,
    NodeInfo,
    NodeState,
    PartState,
    Phase,
    Replica,
    TierObject,
)
from paraserve_scheduler.state.spec import ChannelKeys, Deployment, DeploymentSpec
from paraserve_scheduler.state.view import ClusterView

#: Nodes that a fetch is told of.
_MOST_PEERS = 3

_PHASES = {
    Phase.UNKNOWN: pb.PHASE_UNSPECIFIED,
    Phase.STARTING: pb.STARTING,
    Phase.READY: pb.READY,
    Phase.STOPPING: pb.STOPPING,
    Phase.FAILED: pb.FAILED,
    Phase.STOPPED: pb.STOPPED,
}
_PHASE_OF = {number: phase for phase, number in _PHASES.items()}

# ---- from agents and gateways ----


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
            TierObject(
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
        spans=tuple(
            Span(name=span.name, start_s=span.start_s, end_s=span.end_s, size_bytes=span.bytes)
            for span in message.spans
        ),
        fetched_bytes=message.fetched_bytes,
        total_bytes=message.total_bytes,
        failure=_failure(message.failure) if message.HasField("failure") else None,
        slots=dict(message.slots),
    )


def _failure(message: pb.Failure) -> Failure:
    return Failure(grpc_code=message.grpc_code, message=message.message)


def demand(message: pb.Demand) -> Demand:
    return Demand(
        deployment=message.deployment,
        waiting=message.waiting,
        in_flight=message.in_flight,
        arrived=message.arrived,
        replica_in_flight={entry.replica: entry.in_flight for entry in message.replicas},
        first_token_s={
            entry.replica: entry.first_token_s
            for entry in message.replicas
            if entry.first_token_s > 0
        },
        tpot_s={entry.replica: entry.tpot_s for entry in message.replicas if entry.tpot_s > 0},
    )


# ---- to agents ----


def peer_addresses(view: ClusterView, deployment: Deployment, node: str) -> tuple[str, ...]:
    """Where `node` may read some of a deployment's weights, the nodes that have most first."""
    index = deployment.index
    wanted = {(f"{index.source_uri}/{stored.key}", stored.version) for stored in index.objects}
    held = [
        (sum(it.landed_bytes for it in peer.tier if (it.key, it.version) in wanted), peer.info)
        for name, peer in sorted(view.nodes.items())
        if name != node and peer.info.peer_address
    ]
    holders = sorted((it for it in held if it[0]), key=lambda it: -it[0])
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
        plan_json=plan_fetch(index, tensors, fetch_id=fetch_id(plan, stage)).to_json(),
        endpoint_url=deployment.spec.endpoint_url or "",
        region=deployment.spec.region or "",
        background=plan.background,
        peers=peers,
        # Of a GPU's memory the tier takes nothing.
        reserved_bytes=where.reserved_bytes if where.device == "cpu" else 0,
    )


# ---- to gateways ----


def route_table(view: ClusterView) -> pb.RouteTable:
    """Every deployment that takes requests, with the replicas they may go to."""
    return pb.RouteTable(
        routes=[_route(view, state) for state in view.deployments.values() if not state.deleting]
    )


def _route(view: ClusterView, state: DeploymentState) -> pb.Route:
    return pb.Route(
        deployment=state.name,
        engine=state.deployment.spec.engine,
        max_waiting=state.deployment.spec.max_waiting,
        endpoints=[
            _endpoint(replica, view.nodes[replica.plan.head.node])
            for replica in view.routed_replicas(state.name)
        ],
        failure=_failure_message(state.failure),
        failure_number=state.failure_number,
        lost_replicas=[
            replica.id for replica in view.live_replicas(state.name) if replica.failure is not None
        ],
    )


def _endpoint(replica: Replica, head: NodeState) -> pb.Endpoint:
    model = generate_model(replica.plan)
    return pb.Endpoint(
        replica=replica.id,
        model=replica.parts[0].slots.get(model, model),
        triton_grpc_address=head.info.triton_grpc_address,
    )


def _failure_message(failure: Failure | None) -> pb.Failure | None:
    if failure is None:
        return None
    return pb.Failure(grpc_code=failure.grpc_code, message=failure.message)


# ---- to users ----


def cluster_status(view: ClusterView, now_s: float, config: PolicyConfig) -> pb.ClusterStatus:
    return pb.ClusterStatus(
        nodes=[
            pb.NodeView(
                info=_node_message(node.info),
                alive=is_alive(view, node, now_s, config),
                last_seen_s=node.last_seen_s,
                reserved_bytes=view.reserved_bytes(name),
                tier_used_bytes=node.tier_used_bytes,
                cordoned=name in view.cordoned,
            )
            for name, node in sorted(view.nodes.items())
        ],
        deployments=[deployment_status(view, state) for state in view.deployments.values()],
    )


def deployment_status(view: ClusterView, state: DeploymentState) -> pb.DeploymentStatus:
    return pb.DeploymentStatus(
        spec=spec_message(state.deployment.spec),
        architecture=state.deployment.model.architecture,
        weight_bytes=state.deployment.index.size_bytes,
        replicas=[
            _replica_message(view, replica)
            for replica in view.replicas.values()
            if replica.deployment == state.name
        ],
        failure=_failure_message(state.failure),
    )


def spec_message(spec: DeploymentSpec) -> pb.DeploymentSpec:
    return pb.DeploymentSpec(
        name=spec.name,
        source=spec.source,
        ttft_slo_s=spec.ttft_slo_s,
        tpot_slo_s=spec.tpot_slo_s,
        endpoint_url=spec.endpoint_url or "",
        region=spec.region or "",
        keep_alive_s=spec.keep_alive_s,
        max_stages=spec.max_stages or 0,
        max_context=spec.max_context or 0,
        max_sequences=spec.max_sequences,
        device=spec.device or "",
        consolidate=spec.consolidate,
        engine=spec.engine,
        min_replicas=spec.min_replicas,
        max_replicas=spec.max_replicas,
        priority=spec.priority,
        max_waiting=spec.max_waiting,
    )


def _node_message(info: NodeInfo) -> pb.NodeInfo:
    start, end = info.channel_ports
    return pb.NodeInfo(
        name=info.name,
        agent_address=info.agent_address,
        triton_grpc_address=info.triton_grpc_address,
        memory_bytes=info.memory_bytes,
        nic_bytes_per_s=info.nic_bytes_per_s,
        run_dir=info.run_dir,
        channel_host=info.channel_host,
        channel_port_start=start,
        channel_port_end=end,
        devices=info.devices,
        peer_address=info.peer_address,
        kind=info.kind,
        zone=info.zone,
        max_slots=info.max_slots,
    )


def _replica_message(view: ClusterView, replica: Replica) -> pb.ReplicaStatus:
    return pb.ReplicaStatus(
        replica=replica.id,
        phase=_PHASES[replica.phase],
        parts=[
            pb.ReplicaPart(
                node=stage.node,
                layer_start=stage.layers.start,
                layer_end=stage.layers.end,
                status=_part_message(part),
            )
            for stage, part in replica.stage_plans
        ],
        requested_s=replica.requested_s,
        planned_s=replica.planned_s,
        ready_s=replica.ready_s or 0,
        first_token_s=replica.first_token_s or 0,
        removed_s=replica.removed_s or 0,
        succeeds=replica.plan.succeeds or "",
        successors=[successor.id for successor in view.successors(replica)],
        hand_over_begin_s=replica.hand_over_s or 0,
        hand_over_end_s=(replica.hand_over_s and replica.stopping_s) or 0,
        failure=_failure_message(replica.failure),
        in_flight=view.replica_in_flight(replica),
        tpot_s=replica.tpot_s or 0,
        reason=replica.reason,
        prediction=_prediction_message(replica.prediction),
    )


def _prediction_message(prediction: Prediction | None) -> pb.Prediction | None:
    if prediction is None:
        return None
    return pb.Prediction(
        ready_s=prediction.ready_s,
        ttft_s=prediction.ttft_s,
        tpot_s=prediction.tpot_s,
        cost_byte_s=prediction.cost_byte_s,
        meets_ttft=prediction.meets_ttft,
        meets_tpot=prediction.meets_tpot,
        stages=[
            pb.StagePrediction(
                runtime_s=stage.runtime_s,
                fetch_s=stage.fetch_s,
                ready_s=stage.ready_s,
                local_bytes=stage.local_bytes,
                peer_bytes=stage.peer_bytes,
                store_bytes=stage.store_bytes,
                uses_slot=stage.uses_slot,
            )
            for stage in prediction.stages
        ],
    )


def _part_message(part: PartState) -> pb.PartStatus:
    return pb.PartStatus(
        replica=part.replica,
        stage=part.stage,
        phase=_PHASES[part.phase],
        spans=[
            pb.Span(name=span.name, start_s=span.start_s, end_s=span.end_s, bytes=span.size_bytes)
            for span in part.spans
        ],
        fetched_bytes=part.fetched_bytes,
        total_bytes=part.total_bytes,
        failure=_failure_message(part.failure),
        slots=part.slots,
    )
