"""`paraserve explain`: why a replica was started as it was, and how good the prediction was."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping

from google.protobuf.json_format import MessageToDict
from rich.console import Console

from paraserve_backend.errors import NotFound
from paraserve_backend.protocol.names import named_deployment
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.connection import add_connection_flags, open_client
from paraserve_scheduler.cli.views import explanation, tables, timeline


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "explain",
        help="say why a replica was started as it was, and what was predicted",
        description="Say why a replica was started as it was: what its plan was expected to "
        "give, beside what happened.",
    )
    parser.add_argument(
        "replica", metavar="REPLICA", help="as `paraserve status` names it; of a deployment: NAME"
    )
    parser.add_argument("--json", action="store_true", help="everything that is known, as JSON")
    add_connection_flags(parser)
    parser.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    deployment = named_deployment(arguments.replica)
    with open_client(arguments, environ) as client:
        status = client.status(deployment)
    replica = _find(status, arguments.replica)
    console = Console(highlight=False)
    if arguments.json:
        console.out(json.dumps(MessageToDict(replica, preserving_proto_field_name=True), indent=2))
        return 0
    for line in tables.pause_lines(status):
        console.print(line, soft_wrap=True, markup=False)
    for part in explanation.render(replica):
        console.print(part, soft_wrap=isinstance(part, str), markup=not isinstance(part, str))
    return 0


def _find(status: pb.ClusterStatus, name: str) -> pb.ReplicaStatus:
    known = [replica for entry in status.deployments for replica in entry.replicas]
    if name != named_deployment(name):
        found = next((replica for replica in known if replica.replica == name), None)
    else:
        found = timeline.newest(status)
    if found is None:
        names = ", ".join(replica.replica for replica in known) or "none"
        raise NotFound(f"Nothing is known of a replica '{name}'. Replicas: {names}.")
    return found
