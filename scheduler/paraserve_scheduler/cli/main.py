"""The command `paraserve`: one parser for all groups of commands, one place for errors.

A command's module is imported only when it is called: `paraserve status` imports no agent.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version

from paraserve_backend.errors import ParaServeError
from paraserve_scheduler.cli import (
    cluster,
    daemons,
    deployments,
    explain,
    generate,
    machine,
    moves,
    simulate,
)

_EPILOG = """\
examples:
  paraserve up --nodes 4                                   a cluster on this machine
  paraserve deploy tiny --source s3://models/tiny          a model at zero: nothing is loaded
  paraserve generate tiny "Once upon a time"               starts it, streams its answer
  paraserve timeline tiny                                  where the time of the start went
  paraserve explain tiny                                   why it started so, and what was predicted
  paraserve down

The commands find the local cluster by themselves; --scheduler and --gateway, or the variables
PARASERVE_SCHEDULER, PARASERVE_GATEWAY and PARASERVE_TOKEN, name another one.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="paraserve",
        description="Scale-to-zero LLMs on NVIDIA Triton: cold starts that fetch one model in "
        "parallel on several servers.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"paraserve {version('paraserve')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for group in (cluster, deployments, explain, generate, moves, simulate, machine, daemons):
        group.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 1 after an error and 2 after wrong usage."""
    given = list(sys.argv[1:] if argv is None else argv)
    try:
        if given and given[0] in daemons.DAEMONS:
            # Their settings records define their flags.
            return daemons.run(given[0], given[1:])
        signal.signal(signal.SIGTERM, _interrupt)
        arguments = build_parser().parse_args(given)
        return int(arguments.run(arguments, os.environ))
    except ParaServeError as error:
        sys.stderr.write(f"paraserve: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("paraserve: interrupted\n")
        return 130
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _interrupt(_number: int, _frame: object) -> None:
    # Ends like Ctrl-C, so that what was begun is taken back.
    raise KeyboardInterrupt
