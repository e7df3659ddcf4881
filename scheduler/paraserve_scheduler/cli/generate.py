"""`paraserve generate`: sends a prompt to the gateway and prints the answer as it comes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping

from paraserve_scheduler.cli.connection import add_connection_flags, connect
from paraserve_scheduler.cli.parsing import at_least, whole

_EPILOG = """\
examples:
  paraserve generate tiny "Once upon a time" --max-tokens 64
  paraserve generate tiny "Once upon a time" --temperature 0.8 --top-p 0.95 --seed 7
"""
_SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "seed")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "generate",
        help="send a prompt and stream the answer",
        description="Send a prompt to a deployment and stream its answer. A deployment at zero is "
        "started by it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="the deployment")
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "--max-tokens", type=whole(1), default=64, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument("--temperature", type=at_least(0), metavar="T", help="(default: 0, greedy)")
    parser.add_argument("--top-p", type=at_least(0), metavar="P", help="(default: 1, off)")
    parser.add_argument("--top-k", type=whole(0), metavar="K", help="(default: 0, off)")
    parser.add_argument("--seed", type=whole(0), metavar="N", help="(default: a fresh one)")
    parser.add_argument(
        "--timeout",
        type=at_least(0),
        default=600.0,
        metavar="S",
        help="longest wait for the next piece, cold start included (default: 600)",
    )
    add_connection_flags(parser)
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    # Imported late: the client brings numpy and gRPC's code for all of KServe.
    from paraserve_scheduler.client.generate import stream

    given = {name: getattr(arguments, name) for name in _SETTINGS}
    pieces = stream(
        connect(arguments, environ).require_gateway(),
        arguments.name,
        arguments.prompt,
        {name: value for name, value in given.items() if value is not None},
        timeout_s=arguments.timeout,
    )
    for piece in pieces:
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
