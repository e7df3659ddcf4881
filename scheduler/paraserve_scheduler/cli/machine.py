"""`paraserve doctor` and `paraserve install-backend`: checking and preparing a machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paraserve_backend.tritonserver.host.backend_installer import install_backend, start_hint
from paraserve_scheduler.cli.doctor.engines import examine_engine
from paraserve_scheduler.cli.doctor.machine import Finding, State, examine
from paraserve_scheduler.cli.doctor.tiers import examine_tiers

_STYLES = {
    State.OK: "green",
    State.MISSING: "bold red",
    State.ABSENT: "yellow",
    State.DAMAGED: "bold red",
}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine and say what is missing",
        description="Check this machine for a local cluster, line by line. The exit status is 1 if "
        "something required is missing or damaged; what is only absent limits a feature.",
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    engines = parser.add_mutually_exclusive_group()
    for flag, engine in (("--trtllm", "tensorrt-llm"), ("--vllm", "vllm")):
        engines.add_argument(
            flag,
            dest="engine",
            action="store_const",
            const=engine,
            help=f"check instead whether the {engine} installed here is one ParaServe can use",
        )
    for flag, what in (("--run-dir", "memory"), ("--disk-dir", "disk")):
        parser.add_argument(
            flag,
            type=Path,
            metavar="DIR",
            help=f"check instead what an agent keeps of weights in {what}, with this setting",
        )
    parser.set_defaults(run=_doctor)
    parser = commands.add_parser(
        "install-backend",
        help="put the backend where a Triton server finds it",
        description="Write DIR/paraserve/model.py, which imports the backend from this package, "
        "and say how to start tritonserver.",
        epilog="example:\n  paraserve install-backend /opt/tritonserver/backends",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", type=Path, metavar="DIR", help="Triton's backend directory")
    parser.add_argument(
        "--python",
        type=Path,
        default=Path(sys.executable),
        metavar="PYTHON",
        help="interpreter whose packages Triton's stub shall use (default: this one)",
    )
    parser.set_defaults(run=_install_backend)


def _doctor(arguments: argparse.Namespace, environ: Mapping[str, str]) -> int:
    findings = _findings(arguments, environ)
    console = Console()
    if arguments.json:
        console.out(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(_table(findings))
    is_bad = any(finding.state in (State.MISSING, State.DAMAGED) for finding in findings)
    return 1 if is_bad else 0


def _findings(arguments: argparse.Namespace, environ: Mapping[str, str]) -> tuple[Finding, ...]:
    if arguments.engine:
        return examine_engine(arguments.engine)
    if arguments.run_dir or arguments.disk_dir:
        return examine_tiers(arguments.run_dir, arguments.disk_dir)
    return examine(environ)


def _table(findings: tuple[Finding, ...]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        style = _STYLES[finding.state]
        said = (
            finding.detail if finding.state is State.OK else f"{finding.detail}; {finding.remedy}"
        )
        table.add_row(f"[{style}]{finding.state}[/]", finding.name, said)
    return table


def _install_backend(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    installed = install_backend(arguments.dir.absolute(), arguments.python.absolute())
    Console().print(start_hint(installed), highlight=False, soft_wrap=True, markup=False)
    return 0
