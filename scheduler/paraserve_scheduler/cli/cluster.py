"""`paraserve up` and `paraserve down`: a whole cluster on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from paraserve_backend.machine.memory import available_bytes
from paraserve_scheduler.cli.parsing import size_bytes, whole
from paraserve_scheduler.local.cluster import (
    StartStep,
    UpOptions,
    down,
    files_of,
    make_layout,
    up,
)
from paraserve_scheduler.local.layout import BUCKET, ClusterLayout

_UP_EPILOG = """\
A local cluster is N Triton servers with an agent each, one scheduler with its gateway, and an S3
server. Everything listens on 127.0.0.1, on free ports unless given. State, logs and buckets lie in
$XDG_STATE_HOME/paraserve/NAME (~/.local/state/paraserve/NAME), weights in /dev/shm.

examples:
  paraserve up --nodes 4
  paraserve up --name lab --nodes 2 --node-memory 4GB --gateway-http-port 8000
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "up",
        help="start a cluster on this machine",
        description="Start a local cluster and return when it is ready.",
        epilog=_UP_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_name(parser)
    parser.add_argument(
        "--nodes", type=whole(1), default=4, metavar="N", help="Triton servers (default: 4)"
    )
    parser.add_argument(
        "--slots",
        type=whole(0),
        default=0,
        metavar="N",
        help="sets of pre-warmed processes that each node keeps at most (default: 0)",
    )
    parser.add_argument(
        "--node-memory",
        type=size_bytes,
        metavar="SIZE",
        help="what models may use on each node, e.g. 4GB (default: an equal share of 70%% of the "
        "free memory)",
    )
    parser.add_argument(
        "--no-s3",
        action="store_true",
        help="no embedded S3 server: nodes use the AWS settings of this environment",
    )
    for flag in ("scheduler", "gateway-grpc", "gateway-http", "s3"):
        parser.add_argument(
            f"--{flag}-port", type=whole(1), metavar="PORT", help="(default: a free one)"
        )
    parser.set_defaults(run=_up)
    parser = commands.add_parser(
        "down",
        help="stop it",
        description="Stop a local cluster, also one whose supervisor was killed. Deployments and "
        "buckets are kept for the next paraserve up.",
    )
    _add_name(parser)
    parser.add_argument(
        "--delete", action="store_true", help="also delete its deployments, buckets and logs"
    )
    parser.set_defaults(run=_down)


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", default="default", help="which cluster (default: %(default)s)")


def _up(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    options = UpOptions(
        name=arguments.name,
        nodes=arguments.nodes,
        node_memory_bytes=arguments.node_memory,
        with_s3=not arguments.no_s3,
        scheduler_port=arguments.scheduler_port,
        gateway_grpc_port=arguments.gateway_grpc_port,
        gateway_http_port=arguments.gateway_http_port,
        s3_port=arguments.s3_port,
        max_slots=arguments.slots,
    )
    layout = make_layout(
        options,
        files_of(options.name, environ),
        available_bytes=available_bytes(Path("/proc")),
        cores=os.cpu_count() or 1,
    )
    console = Console(stderr=True)
    with console.status(f"starting cluster '{options.name}'") as status:
        ready: list[str] = []

        def show(progress: StartStep) -> None:
            if progress.is_ready:
                ready.append(progress.process)
            status.update(f"starting {progress.process}; ready: {', '.join(ready) or 'none yet'}")

        up(layout, show)
    Console().print(_summary(layout), highlight=False, soft_wrap=True)
    return 0


def _summary(layout: ClusterLayout) -> str:
    http = f"{layout.host}:{layout.gateway_http_port}"
    lines = [
        f"Cluster '{layout.name}' is up: {len(layout.nodes)} nodes.",
        f"  gateway    gRPC {layout.gateway_address}, HTTP {http}",
        f"  scheduler  {layout.scheduler_address}",
    ]
    if layout.s3_url:
        folder = layout.files.buckets / BUCKET
        lines.append(f"  S3         {layout.s3_url}, s3://{BUCKET} is the folder {folder}")
    lines.append(f"  logs       {layout.files.logs}")
    return "\n".join(lines)


def _down(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    files = files_of(arguments.name, environ)
    with Console(stderr=True).status(f"stopping cluster '{arguments.name}'"):
        was_up = down(files, delete=arguments.delete)
    said = "is stopped" if was_up else "was not up"
    Console().print(f"Cluster '{arguments.name}' {said}.", highlight=False)
    return 0
