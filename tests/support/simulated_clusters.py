"""Small simulated clusters and requests, with a default for everything."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paraserve_scheduler.planner.fleet import Objectives
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.simulator.description import (
    ClusterDescription,
    DeploymentDescription,
    NodeDescription,
)
from paraserve_scheduler.simulator.results import Outcome
from paraserve_scheduler.simulator.workload import Lengths, SimRequest, Tokens
from paraserve_scheduler.simulator.world import Simulation
from tests.support.fleets import (
    GB,
    make_kind,
    make_method,
    make_model,
)

TOKENS = Tokens(prompt=Lengths(mean=100, cv=0, most=100), output=Lengths(mean=50, cv=0, most=50))


def make_node(name: str = "n0", **fields: Any) -> NodeDescription:
    defaults: dict[str, Any] = {
        "kind": make_kind(make_method(slot_runtime_s=0.3, slot_bytes=GB // 2)),
        "nic_bytes_per_s": 2e9,
        "gpu_bytes": (32 * GB,),
        "memory_bytes": 100 * GB,
    }
    return NodeDescription(**{"name": name, **defaults, **fields})


def make_deployment(name: str = "chat", **fields: Any) -> DeploymentDescription:
    defaults: dict[str, Any] = {
        "application": "chat",
        "model": make_model(),
        "objectives": Objectives(ttft_s=7.5, tpot_s=0.2),
        "max_sequences": 8,
        "max_stages": 4,
        "tokens": TOKENS,
    }
    return DeploymentDescription(**{"name": name, **defaults, **fields})


def make_cluster(
    nodes: Sequence[NodeDescription] = (),
    deployments: Sequence[DeploymentDescription] = (),
    **fields: Any,
) -> ClusterDescription:
    return ClusterDescription(
        nodes=tuple(nodes) or tuple(make_node(f"n{i}") for i in range(4)),
        deployments=tuple(deployments) or (make_deployment(),),
        **{"store_bytes_per_s": None, **fields},
    )


def make_request(arrival_s: float = 0.0, deployment: str = "chat", **fields: Any) -> SimRequest:
    defaults = {"prompt_tokens": 100, "output_tokens": 50}
    return SimRequest(deployment=deployment, arrival_s=arrival_s, **{**defaults, **fields})


def simulate(
    requests: Sequence[SimRequest],
    cluster: ClusterDescription | None = None,
    policy: str = "paraserve",
    *,
    keeps_trace: bool = False,
) -> Outcome:
    chosen = find_policy(policy)
    return Simulation(
        cluster or make_cluster(),
        requests,
        chosen.decide,
        keeps_trace=keeps_trace,
    ).run()
