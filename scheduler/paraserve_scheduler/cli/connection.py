"""Which cluster a command talks to: flags, then environment, then this user's local cluster."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.daemon.settings import read_token
from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.cluster import require_running


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConnection:
    #: host:port; None where only the other one was named.
    scheduler: str | None
    gateway: str | None
    token: str | None

    def require_scheduler(self) -> str:
        if self.scheduler is None:
            raise InvalidRequest("Name the scheduler too: --scheduler or PARASERVE_SCHEDULER.")
        return self.scheduler

    def require_gateway(self) -> str:
        if self.gateway is None:
            raise InvalidRequest("Name the gateway too: --gateway or PARASERVE_GATEWAY.")
        return self.gateway


def add_connection_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster")
    group.add_argument(
        "--cluster", default="default", metavar="NAME", help="local cluster (default: %(default)s)"
    )
    group.add_argument(
        "--scheduler",
        metavar="HOST:PORT",
        help="scheduler of another cluster (PARASERVE_SCHEDULER)",
    )
    group.add_argument(
        "--gateway", metavar="HOST:PORT", help="gRPC gateway of another cluster (PARASERVE_GATEWAY)"
    )
    group.add_argument(
        "--token-file", type=Path, metavar="FILE", help="its token (or PARASERVE_TOKEN)"
    )


def connect(arguments: argparse.Namespace, environ: Mapping[str, str]) -> ClusterConnection:
    """Find the cluster that the flags or the environment name, else the local one.

    Raises:
        NotFound: no cluster is named and no local one is up.
    """
    scheduler = arguments.scheduler or environ.get("PARASERVE_SCHEDULER")
    gateway = arguments.gateway or environ.get("PARASERVE_GATEWAY")
    if scheduler or gateway:
        token = read_token(arguments.token_file, environ)
        return ClusterConnection(scheduler=scheduler, gateway=gateway, token=token)
    layout = require_running(arguments.cluster, environ).layout
    return ClusterConnection(
        scheduler=layout.scheduler_address,
        gateway=layout.gateway_address,
        token=read_token(layout.files.token, environ),
    )


def open_client(arguments: argparse.Namespace, environ: Mapping[str, str]) -> SchedulerClient:
    """Return a client of the scheduler that `connect` finds; use it as a context manager."""
    connection = connect(arguments, environ)
    return SchedulerClient(connection.require_scheduler(), connection.token)
