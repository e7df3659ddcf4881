"""Messages to users: the status of nodes, deployments and replicas. Pure."""

from __future__ import annotations

from dataclasses import fields

from paraserve_backend.protocol.span_messages import span_message
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.control_plane.messages.agents import PHASES
from paraserve_scheduler.control_plane.messages.gateways import failure_message
from paraserve_scheduler.planner.decisions import Prediction
from paraserve_scheduler.reconciler.capacity import is_alive
from paraserve_scheduler.reconciler.setbacks import pause_of, recent_deaths
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.records import (
    DeploymentState,
    NodeInfo,
    PartState,
    Replica,
)
from paraserve_scheduler.state.spec import DeploymentSpec
from paraserve_scheduler.state.view import ClusterView


def cluster_status(turn: Turn) -> pb.ClusterStatus:
    view = turn.view
    return pb.ClusterStatus(
        nodes=[
            pb.NodeView(
                info=_node_message(node.info),
                alive=is_alive(turn, node),
                last_seen_s=node.last_seen_s,
                reserved_bytes=view.reserved_bytes(name),
                tier_used_bytes=node.tier_used_bytes,
                cordoned=name in view.cordoned,
            )
            for name, node in sorted(view.nodes.items())
        ],
        deployments=[deployment_status(turn, state) for state in view.deployments.values()],
    )


def deployment_status(turn: Turn, state: DeploymentState) -> pb.DeploymentStatus:
    view, pause = turn.view, pause_of(turn, state)
    return pb.DeploymentStatus(
        spec=spec_message(state.deployment.spec),
        architecture=state.deployment.model.architecture,
        weight_bytes=state.deployment.index.size_bytes,
        replicas=[
            _replica_message(view, replica)
            for replica in view.replicas.values()
            if replica.deployment == state.name
        ],
        failure=failure_message(state.failure),
        starts_paused_until_s=0 if pause is None else pause.until_s,
        recent_deaths=recent_deaths(turn, state),
    )


def spec_message(spec: DeploymentSpec) -> pb.DeploymentSpec:
    # None, like a field that is left out, is what the user did not state.
    return pb.DeploymentSpec(**{field.name: getattr(spec, field.name) for field in fields(spec)})


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
        phase=PHASES[replica.phase],
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
        hand_over_begin_s=replica.hand_over.since_s or 0,
        hand_over_end_s=(replica.hand_over.since_s and replica.stopping_s) or 0,
        failure=failure_message(replica.failure),
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
        phase=PHASES[part.phase],
        spans=map(span_message, part.spans),
        fetched_bytes=part.fetched_bytes,
        total_bytes=part.total_bytes,
        failure=failure_message(part.failure),
        slots=part.slots,
    )
