"""`paraserve migrate` and `paraserve drain`: running replicas go to other nodes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping

from rich.console import Console

from paraserve_backend.errors import Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.connection import add_connection_flags, open_client
from paraserve_scheduler.client.scheduler import SchedulerClient

_POLL_S = 0.3
_OVER = (pb.STOPPING, pb.STOPPED)


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "migrate",
        help="move a deployment to one node while it serves",
        description="Move a deployment's replica to one node; running requests go along. Returns "
        "when that is done; interrupting it does not end the move.",
    )
    parser.add_argument("name", metavar="DEPLOYMENT")
    parser.add_argument("--to", required=True, metavar="NODE", dest="node", help="where to")
    add_connection_flags(parser)
    parser.set_defaults(run=_migrate)
    parser = commands.add_parser(
        "drain",
        help="move everything off a node and keep new replicas away",
        description="Move everything off a node while it serves, and place nothing there any "
        "more. Returns when the node is empty; interrupting it does not end the drain.",
    )
    parser.add_argument("node", metavar="NODE")
    parser.add_argument("--undo", action="store_true", help="use the node again")
    add_connection_flags(parser)
    parser.set_defaults(run=_drain)


def _migrate(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    console = Console(stderr=True)
    with open_client(arguments, environ) as client:
        begun = client.migrate(arguments.name, arguments.node)
        with console.status(f"{begun.successor} starts on {arguments.node}") as status:
            while (text := _move_progress(client, arguments.name, begun)) is not None:
                status.update(text)
                time.sleep(_POLL_S)
    text = f"{begun.replica} has become {begun.successor} on {arguments.node}."
    Console().print(text, highlight=False)
    return 0


def _move_progress(client: SchedulerClient, deployment: str, move: pb.MigrateReply) -> str | None:
    """What happens now; None when it is done. Raises `Unavailable` where it failed."""
    (entry,) = client.status(deployment).deployments
    replicas = {replica.replica: replica for replica in entry.replicas}
    old, new = replicas.get(move.replica), replicas.get(move.successor)
    if new is None or new.phase in _OVER:
        reason = new.failure.message if new and new.HasField("failure") else "it was stopped"
        raise Unavailable(f"{move.successor} did not take over: {reason}.".replace("..", "."))
    if old is None or old.phase == pb.STOPPED:
        return None
    if old.hand_over_begin_s:
        return f"{old.replica} hands its requests over to {new.replica}, {old.in_flight} left"
    return f"{new.replica} is {pb.Phase.Name(new.phase).lower()}"


def _drain(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    with open_client(arguments, environ) as client:
        if arguments.undo:
            client.drain(arguments.node, undo=True)
        else:
            _until_empty(client, arguments.node)
    said = "is used again" if arguments.undo else "is empty"
    Console().print(f"Node {arguments.node} {said}.", highlight=False)
    return 0


def _until_empty(client: SchedulerClient, node: str) -> None:
    with Console(stderr=True).status(f"draining {node}") as status:
        while left := client.drain(node).replicas:
            status.update("; ".join(f"{each.replica} {each.progress}" for each in left))
            time.sleep(_POLL_S)
