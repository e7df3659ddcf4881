"""Messages between scheduler and gateways: reported demand, and the route table. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.state.records import (
    Demand,
    DeploymentState,
    Failure,
    NodeState,
    Replica,
)
from paraserve_scheduler.state.spec import Deployment
from paraserve_scheduler.state.view import ClusterView

#: A replica is given one batch that runs and one that waits, so that its batch is always full. More
#: would only wait there, where no other replica can take it.
_BATCHES_ONGOING = 2
#: What the message can hold; a config.json may name any number.
_MOST_TOKENS = (1 << 32) - 1


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
        silent=frozenset(entry.replica for entry in message.replicas if entry.is_silent),
    )


def route_table(view: ClusterView) -> pb.RouteTable:
    """Every deployment that takes requests, with the replicas they may go to."""
    return pb.RouteTable(
        routes=[_route(view, state) for state in view.deployments.values() if not state.deleting]
    )


def _route(view: ClusterView, state: DeploymentState) -> pb.Route:
    routed = view.routed_replicas(state.name)
    max_context = _max_context(state.deployment, routed)
    return pb.Route(
        deployment=state.name,
        engine=state.deployment.spec.engine,
        max_waiting=state.deployment.spec.max_waiting,
        endpoints=[_endpoint(replica, view.nodes[replica.plan.head.node]) for replica in routed],
        max_context=max_context,
        max_prompt_bytes=max_context * state.deployment.longest_token_bytes,
        failure=failure_message(state.failure),
        failure_number=state.failure_number,
        lost_replicas=[
            replica.id for replica in view.live_replicas(state.name) if replica.failure is not None
        ],
    )


def _endpoint(replica: Replica, head: NodeState) -> pb.Endpoint:
    model = replica.plan.models.generate
    return pb.Endpoint(
        replica=replica.id,
        model=replica.parts[0].slots.get(model, model),
        triton_grpc_address=head.info.triton_grpc_address,
        max_ongoing=_BATCHES_ONGOING * replica.plan.max_sequences,
    )


def _max_context(deployment: Deployment, routed: Sequence[Replica]) -> int:
    """What a replica has that serves; before there is one, what it may have."""
    contexts = (replica.plan.max_context for replica in routed)
    return min(_MOST_TOKENS, max(contexts, default=deployment.context_limit))


def failure_message(failure: Failure | None) -> pb.Failure | None:
    if failure is None:
        return None
    return pb.Failure(grpc_code=failure.grpc_code, message=failure.message)
