"""Views of the cluster as histories make them: what happened, and what the policy did about it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.reconciler.decide import decide
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.actions import Action
from paraserve_scheduler.state.events import (
    DemandReported,
    Event,
    HandOverNotified,
    PartReported,
    ReplicaRemoved,
)
from paraserve_scheduler.state.fold import fold
from paraserve_scheduler.state.records import DeploymentState, Failure, NodeInfo, PartState, Phase
from paraserve_scheduler.state.view import ClusterView
from tests.support.scheduler_records import (
    CONFIG,
    NOW_S,
    make_demand,
    make_heartbeat,
    make_node_info,
    make_state,
    make_view,
)

LOST_PROCESS = Failure(grpc_code="UNAVAILABLE", message="The process of model d died.")
#: How long after its second failure in a row a start is tried again, at the latest.
TRIED_AGAIN_S = CONFIG.node_timeout_s + 0.5
NO_OBJECT = Failure(grpc_code="NOT_FOUND", message="model.safetensors does not exist.")


class History:
    """A cluster at one moment; every method is a step in its history."""

    def __init__(
        self,
        *,
        nodes: Iterable[NodeInfo] = (make_node_info("n0"), make_node_info("n1")),
        deployments: Iterable[DeploymentState] | None = None,
        config: PolicyConfig = CONFIG,
    ) -> None:
        if deployments is None:
            deployments = [make_state()]
        self.view: ClusterView = make_view(nodes=nodes, deployments=deployments)
        self.now_s = NOW_S
        self.config = config

    def happens(self, event: Event) -> None:
        self.view = fold(self.view, event)

    def passes(self, seconds: float, *, silent: Iterable[str] = ()) -> None:
        """Time goes by; nodes and gateways that are not `silent` report what they have."""
        self.now_s += seconds
        for name in set(self.view.nodes) - set(silent):
            parts = tuple(
                part
                for replica in self.view.live_replicas()
                for stage, part in replica.stage_plans
                if stage.node == name
            )
            self.happens(make_heartbeat(name, parts=parts, at_s=self.now_s))
        for name in set(self.view.gateways) - set(silent):
            demands = tuple(self.view.gateways[name].demands.values())
            self.happens(DemandReported(gateway=name, demands=demands, at_s=self.now_s))

    def demand(self, deployment: str = "tiny", *, gateway: str = "g0", **fields: Any) -> None:
        old = self.view.gateways.get(gateway)
        demands = dict(old.demands) if old else {}
        demands[deployment] = make_demand(deployment, **fields)
        self.happens(
            DemandReported(gateway=gateway, demands=tuple(demands.values()), at_s=self.now_s)
        )

    def decides(self) -> tuple[Action, ...]:
        """What the policy does now; it has begun when this returns."""
        actions = decide(self.turn())
        self.do(*actions)
        return actions

    def turn(self) -> Turn:
        return Turn(view=self.view, now_s=self.now_s, config=self.config)

    def do(self, *actions: Action) -> None:
        """Have these actions begun."""
        turn = self.turn()
        for action in actions:
            turn.do(action)
        self.view = turn.view

    def part(self, replica: str, stage: int, phase: Phase, failure: Failure | None = None) -> None:
        state = PartState(replica=replica, stage=stage, phase=phase, failure=failure)
        self.happens(PartReported(part=state, at_s=self.now_s))

    def becomes_ready(self, replica: str) -> None:
        for stage in range(len(self.view.replicas[replica].plan.stages)):
            self.part(replica, stage, Phase.READY)

    def notified(self, replica: str, *successors: str) -> None:
        """The head of `replica` has taken the command to hand over."""
        self.happens(HandOverNotified(replica=replica, successors=successors))

    def routed(self, deployment: str = "tiny") -> list[str]:
        """Where new requests may go."""
        return [replica.id for replica in self.view.routed_replicas(deployment)]

    def removed(self, replica: str) -> None:
        self.happens(ReplicaRemoved(replica=replica, at_s=self.now_s))

    def serves(self, deployment: str = "tiny") -> str:
        """Bring up a replica through a cold start; returns its name. No request is left."""
        self.demand(deployment, waiting=1)
        self.decides()
        replica = self.view.live_replicas(deployment)[-1].id
        self.becomes_ready(replica)
        self.demand(deployment)
        return replica
