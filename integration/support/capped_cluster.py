"""A local cluster whose nodes have a network each, with a bandwidth cap on the way in.

Every node runs in its own network namespace, and so do scheduler, gateway and S3 server together
(the hub). As a command it brings such a cluster up or down:

    python -m integration.support.capped_cluster up --gbit 1 1 0.5 0.25
    python -m integration.support.capped_cluster down
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from integration.support.logs import log_tails
from integration.support.namespaces import (
    HUB,
    HUB_HOST,
    make_namespaces,
    missing_requirement,
    node_host,
    node_namespace,
    sweep_namespaces,
)
from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_scheduler.local.cluster import (
    StartStep,
    down,
    files_of,
    up,
)
from paraserve_scheduler.local.layout import ClusterFiles, ClusterLayout, NodeLayout

NAME = "capped"
_CHANNEL_PORTS = (18600, 18700)


@dataclass(frozen=True, slots=True, kw_only=True)
class CappedCluster:
    #: What reaches each node at most; one entry per node.
    rates_bits_per_s: tuple[float, ...]
    node_memory_bytes: int
    #: Of all agents. As it stands every cold start fetches everything.
    agent_settings: Mapping[str, object] = field(default_factory=lambda: {"tier_bytes": 0})
    scheduler_settings: Mapping[str, object] = field(default_factory=dict)
    #: Of each model process. By default the same on any machine, so that runs can be compared.
    compute_threads: int = 1
    name: str = NAME


@contextmanager
def capped_cluster(
    wanted: CappedCluster,
    environ: Mapping[str, str],
    on_progress: Callable[[StartStep], None] = lambda _progress: None,
) -> Iterator[ClusterLayout]:
    """Bring up a cluster with capped nodes; everything is gone after the body.

    Addresses in the layout are those inside the namespaces: enter `inside(HUB)` to reach them.
    An error that leaves the body has the ends of the cluster's logs as a note.

    Raises:
        Unavailable: this machine cannot have namespaces, or a process did not start.
    """
    files = files_of(wanted.name, environ)
    try:
        yield bring_up(wanted, environ, on_progress)
    except ParaServeError as error:
        error.add_note("\n".join(f"{name}:\n{tail}" for name, tail in log_tails(files)))
        raise
    finally:
        take_down(files)


def bring_up(
    wanted: CappedCluster, environ: Mapping[str, str], on_progress: Callable[[StartStep], None]
) -> ClusterLayout:
    """Start a cluster that stays; what is there of an earlier one goes first.

    Raises:
        Unavailable: this machine cannot have namespaces, or a process did not start.
    """
    reason = missing_requirement()
    if reason is not None:
        raise Unavailable(f"No cluster with capped nodes: {reason}.")
    files = files_of(wanted.name, environ)
    take_down(files)
    make_namespaces(wanted.rates_bits_per_s)
    layout = capped_layout(wanted, files)
    up(layout, on_progress, prefix=("ip", "netns", "exec", HUB))
    return layout


def take_down(files: ClusterFiles) -> None:
    """Remove a cluster with its namespaces, buckets and logs, also if it was killed."""
    down(files, delete=True)
    sweep_namespaces()


def capped_layout(wanted: CappedCluster, files: ClusterFiles) -> ClusterLayout:
    """Return a layout with one host per node; the ports are the same on all of them."""
    return ClusterLayout(
        name=wanted.name,
        host=HUB_HOST,
        scheduler_port=8470,
        gateway_grpc_port=8001,
        gateway_http_port=8000,
        s3_port=9000,
        nodes=tuple(
            _node(number, rate_bits_per_s, wanted, files)
            for number, rate_bits_per_s in enumerate(wanted.rates_bits_per_s, start=1)
        ),
        state_dir=files.state_dir,
        compute_threads=wanted.compute_threads,
        scheduler_settings=wanted.scheduler_settings,
    )


def _node(
    number: int, rate_bits_per_s: float, wanted: CappedCluster, files: ClusterFiles
) -> NodeLayout:
    name = f"node{number}"
    disk = {"disk_dir": str(files.state_dir / "nodes" / name / "disk")}
    return NodeLayout(
        name=name,
        host=node_host(number),
        triton_grpc_port=8001,
        triton_http_port=8000,
        triton_metrics_port=8002,
        agent_port=8500,
        channel_port_start=_CHANNEL_PORTS[0],
        channel_port_end=_CHANNEL_PORTS[1],
        memory_bytes=wanted.node_memory_bytes,
        nic_bytes_per_s=rate_bits_per_s / 8,
        agent_settings={**disk, **wanted.agent_settings},
        network_namespace=node_namespace(number),
    )


def main() -> int:
    arguments = _parse()
    try:
        if arguments.command == "down":
            take_down(files_of(NAME, os.environ))
        else:
            _up(arguments.gbit, arguments.node_gb)
    except ParaServeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _up(gbit: list[float], node_gb: float) -> None:
    wanted = CappedCluster(
        rates_bits_per_s=tuple(rate * 1e9 for rate in gbit), node_memory_bytes=int(node_gb * 1e9)
    )
    try:
        layout = bring_up(wanted, os.environ, lambda _progress: None)
    except BaseException:
        take_down(files_of(NAME, os.environ))
        raise
    bucket = layout.files.buckets
    sys.stdout.write(
        f"{len(gbit)} node(s) are up; what is in {bucket}/models is s3://models.\n"
        f"Use them from inside: ip netns exec {HUB} paraserve status --cluster {NAME}\n"
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="cluster", description="A local cluster with capped networks."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser("up", help="start one; it stays until down")
    starting.add_argument(
        "--gbit",
        type=float,
        nargs="+",
        default=[1.0] * 4,
        metavar="RATE",
        help="what reaches each node, Gbit/s, one number per node (default: 1 1 1 1)",
    )
    starting.add_argument(
        "--node-gb", type=float, default=3.0, help="memory for replicas of each node (default: 3)"
    )
    commands.add_parser("down", help="remove it with everything it made")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
