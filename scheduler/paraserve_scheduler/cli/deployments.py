"""`paraserve deploy`, `status`, `timeline`, `delete`: what a cluster's users do."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path

from google.protobuf.json_format import MessageToDict
from rich.console import Console

from paraserve_backend.errors import NotFound
from paraserve_backend.protocol.names import EngineName
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.connection import add_connection_flags, open_client
from paraserve_scheduler.cli.parsing import any_whole, seconds, whole
from paraserve_scheduler.cli.views import timeline
from paraserve_scheduler.cli.views.tables import deployments_table, nodes_table, pause_lines

_DEPLOY_EPILOG = """\
examples:
  paraserve deploy tiny --source s3://models/tiny --ttft-slo 5 --tpot-slo 0.1
  paraserve deploy qwen --source /srv/models/qwen --keep-alive 300 --max-stages 2
"""
#: Flags of `deploy` by the field of the specification: (field, type, metavar, help).
_DEPLOY_FLAGS = (
    ("ttft_slo_s", seconds, "S", "goal for the time to first token, seconds"),
    ("tpot_slo_s", seconds, "S", "goal for the time per output token, seconds"),
    (
        "keep_alive_s",
        seconds,
        "S",
        "idle seconds before a replica goes (default: while it is worth it)",
    ),
    ("max_stages", whole(1), "N", "longest pipeline (default: as the scheduler sees fit)"),
    ("max_context", whole(1), "N", "tokens of prompt and answer (default: what the model allows)"),
    ("max_sequences", whole(1), "N", "requests a replica works on at once (default: 16)"),
    ("min_replicas", whole(0), "N", "replicas kept without any request (default: 0)"),
    ("max_replicas", whole(1), "N", "most replicas at once (default: 4)"),
    (
        "max_waiting",
        whole(1),
        "N",
        "requests a gateway holds while no replica is there (default: 1000)",
    ),
    ("priority", any_whole, "N", "where memory is short the higher one gets it (default: 0)"),
)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    _add_deploy(commands)
    parser = commands.add_parser(
        "status",
        help="show nodes, deployments and the newest cold start",
        description="Show nodes, deployments, replicas and the newest cold start.",
    )
    parser.add_argument("name", nargs="?", default="", metavar="NAME", help="only this deployment")
    parser.add_argument("--json", action="store_true", help="the scheduler's full answer as JSON")
    add_connection_flags(parser)
    parser.set_defaults(run=_status)
    parser = commands.add_parser(
        "timeline",
        help="show where the time of a deployment's newest cold start went",
        description="Draw the newest cold start of a deployment, and what took over from it.",
    )
    parser.add_argument("name", metavar="NAME")
    parser.add_argument(
        "--chrome",
        type=Path,
        metavar="FILE",
        help="write it for chrome://tracing or Perfetto instead",
    )
    add_connection_flags(parser)
    parser.set_defaults(run=_timeline)
    parser = commands.add_parser(
        "delete", help="remove a deployment", description="Remove a deployment and its replicas."
    )
    parser.add_argument("name", metavar="NAME")
    add_connection_flags(parser)
    parser.set_defaults(run=_delete)


def _add_deploy(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "deploy",
        help="make a model known; it starts with its first request",
        description="Make a model known to the cluster. Nothing is loaded until a request comes.",
        epilog=_DEPLOY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="what clients call the model")
    parser.add_argument(
        "--source",
        required=True,
        metavar="URI",
        help="Hugging Face checkpoint: s3://bucket/prefix, or a folder that every node can read",
    )
    for field, kind, metavar, text in _DEPLOY_FLAGS:
        flag = "--" + field.removesuffix("_s").replace("_", "-")
        parser.add_argument(flag, dest=field, type=kind, metavar=metavar, help=text)
    parser.add_argument("--endpoint-url", default="", metavar="URL", help="S3 endpoint")
    parser.add_argument("--region", default="", help="S3 region")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="", help="(default: what the nodes have)"
    )
    parser.add_argument(
        "--engine",
        choices=tuple(EngineName),
        default=EngineName.PARASERVE,
        help="what computes in full instances (default: paraserve; docs/engines.md)",
    )
    parser.add_argument(
        "--no-consolidate",
        dest="consolidate",
        action="store_false",
        help="leave pipelines as they start: never make full instances of them",
    )
    add_connection_flags(parser)
    parser.set_defaults(run=_deploy)


def _deploy(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    fields = {
        field.name: getattr(arguments, field.name) for field in pb.DeploymentSpec.DESCRIPTOR.fields
    }
    spec = pb.DeploymentSpec(**fields | {"source": _source(arguments.source)})
    with open_client(arguments, environ) as client:
        status = client.deploy(spec)
    size = f"{status.weight_bytes / 1e6:.0f} MB"
    Console().print(
        f"Deployed {spec.name}: {status.architecture}, {size} of weights, nothing loaded yet.",
        highlight=False,
    )
    return 0


def _source(given: str) -> str:
    """Make a folder absolute: the scheduler has another working directory."""
    return given if "://" in given else str(Path(given).absolute())


def _status(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_client(arguments, environ) as client:
        status = client.status(arguments.name)
    console = Console()
    if arguments.json:
        console.out(json.dumps(_as_dict(status), indent=2), highlight=False)
        return 0
    console.print(nodes_table(status, now_s=time.time()))
    console.print()
    console.print(deployments_table(status))
    for line in pause_lines(status):
        console.print(line, markup=False, soft_wrap=True)
    newest = timeline.newest(status)
    if newest is not None:
        console.print()
        successors = timeline.successors(status, newest)
        console.print(timeline.render(newest, successors, width=console.width))
    return 0


def _as_dict(status: pb.ClusterStatus) -> object:
    return MessageToDict(
        status, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def _timeline(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_client(arguments, environ) as client:
        status = client.status(arguments.name)
    replica = timeline.newest(status)
    if replica is None:
        raise NotFound(f"Deployment '{arguments.name}' has not been started yet.")
    successors = timeline.successors(status, replica)
    console = Console(highlight=False)
    if arguments.chrome is None:
        console.print(timeline.render(replica, successors, width=console.width))
        return 0
    trace = json.dumps(timeline.chrome_trace(replica, successors))
    arguments.chrome.write_text(trace, encoding="utf-8")
    console.print(f"Wrote {arguments.chrome}.")
    return 0


def _delete(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_client(arguments, environ) as client:
        client.delete(arguments.name)
    Console().print(f"Deleted {arguments.name}.", highlight=False)
    return 0
