"""`paraserve agent`, `scheduler`, `gateway`: the daemons of a real cluster."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

#: Command to (module with `main`, what it is).
DAEMONS = {
    "agent": ("paraserve_backend.agent.main", "on every node beside its Triton server"),
    "scheduler": ("paraserve_scheduler.control_plane.main", "once per cluster; runs a gateway too"),
    "gateway": ("paraserve_scheduler.gateway.server", "the address clients talk to"),
}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, (_, where) in DAEMONS.items():
        # For the list of commands only: `run` gets their arguments.
        commands.add_parser(name, help=f"run the {name} daemon: {where}", add_help=False)


def run(name: str, argv: Sequence[str]) -> int:
    """Run a daemon until it is told to stop; returns its exit status."""
    module, _ = DAEMONS[name]
    return int(importlib.import_module(module).main(argv))
