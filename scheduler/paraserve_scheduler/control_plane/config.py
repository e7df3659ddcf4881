"""Settings of the scheduler daemon, and the defaults of deployments; read from YAML and flags.

The settings of policy and placement inside are those of `reconciler.config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from paraserve_scheduler.gateway.config import GatewayConfig
from paraserve_scheduler.reconciler.config import PolicyConfig
from paraserve_scheduler.state.waiting import MAX_WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentDefaults:
    """For what a user does not state when deploying."""

    max_sequences: int = 16
    max_replicas: int = 4
    #: Requests that each gateway holds for a replica of a deployment.
    max_waiting: int = MAX_WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    listen: Annotated[str, "Where it listens, host:port; port 0 takes a free one."] = (
        "127.0.0.1:8470"
    )
    state_file: Annotated[Path, "SQLite file; made when it is missing."] = Path("paraserve.db")
    token_file: Annotated[
        Path | None,
        "File with the cluster token; without a token only loopback addresses may be used.",
    ] = None
    source_roots: Annotated[
        tuple[Path, ...],
        "Model folders are deployed only from below these, absolute paths; empty: from wherever "
        "this user may read.",
    ] = ()
    heartbeat_interval_s: Annotated[float, "How often agents report."] = 1.0
    remove_timeout_s: Annotated[
        float, "Longest time for a node to unload a replica that no request runs on."
    ] = 20.0
    failed_remove_timeout_s: Annotated[
        float,
        "The same for a replica that failed, whose requests are lost anyway.",
    ] = 2.0
    defaults: Annotated[DeploymentDefaults, "For what a user does not state when deploying."] = (
        field(default_factory=DeploymentDefaults)
    )
    policy: Annotated[PolicyConfig, "When replicas start and stop."] = field(
        default_factory=PolicyConfig
    )
    with_gateway: Annotated[
        bool,
        "Whether this process also runs a gateway.",
    ] = True
    gateway: Annotated[
        GatewayConfig | None, "Settings of that gateway, as those of paraserve gateway."
    ] = None
