"""`paraserve simulate`: runs a policy on a described cluster, faster than real time."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.cli.parsing import at_least, whole
from paraserve_scheduler.cli.views.run_progress import shown
from paraserve_scheduler.policies.registry import POLICIES, find_policy
from paraserve_scheduler.simulator.description import ClusterDescription, read_cluster
from paraserve_scheduler.simulator.results import (
    Attainment,
    Summary,
    as_json,
    summarize,
)
from paraserve_scheduler.simulator.workload import (
    Crowd,
    Law,
    SimRequest,
    arrivals,
    columns_of,
    read_functions_trace,
    read_llm_trace,
    with_tokens,
)
from paraserve_scheduler.simulator.world import Simulation

_EXAMPLES = """\
examples:
  paraserve simulate --cluster cluster.yaml --trace AzureLLMInferenceTrace_conv.csv
  paraserve simulate --cluster cluster.yaml --rate 0.6 --cv 8 --policy hydraserve --chrome run.json
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "simulate",
        help="try a policy on a cluster that is only described",
        description="Run requests against a described cluster under one policy, in virtual time.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--cluster", type=Path, required=True, metavar="FILE", help="YAML: nodes, models, speeds"
    )
    parser.add_argument(
        "--policy", choices=sorted(POLICIES), default="paraserve", help="(default: paraserve)"
    )
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="CSV: Azure's LLM inference trace of 2023 (a column Deployment may be added) or its "
        "functions trace of 2021; without it requests are generated",
    )
    _add_law(parser)
    parser.add_argument("--seed", type=whole(0), default=0, metavar="N", help="(default: 0)")
    parser.add_argument("--json", action="store_true", help="the summary as JSON")
    parser.add_argument(
        "--chrome", type=Path, metavar="FILE", help="write a trace for chrome://tracing or Perfetto"
    )
    parser.set_defaults(run=_simulate)


def _add_law(parser: argparse.ArgumentParser) -> None:
    for flag, default, text in (
        ("--rate", 1.0, "generated requests per second"),
        ("--duration", 3600.0, "seconds of generated requests"),
        ("--cv", 1.0, "coefficient of variation of a deployment's gaps"),
        ("--zipf", 1.0, "exponent of the deployments' popularity"),
        ("--compression", 1.0, "divide all times of a functions trace"),
    ):
        parser.add_argument(
            flag,
            type=at_least(0.0 if flag == "--zipf" else 1e-6),
            default=default,
            metavar="X",
            help=f"{text} (default: {default:g})",
        )


def _simulate(arguments: argparse.Namespace, _environ: Mapping[str, str]) -> int:
    policy = find_policy(arguments.policy)
    cluster = read_cluster(arguments.cluster, policy.worker)
    requests = _requests(cluster, arguments)
    if not requests:
        raise InvalidRequest("There is no request to simulate: the trace is empty.")
    # Who reads JSON from a pipe wants no lines beside it.
    with shown(Console(stderr=True), with_lines=not arguments.json) as watch:
        outcome = Simulation(
            cluster,
            requests,
            policy.decide,
            keeps_trace=arguments.chrome is not None,
            watch=watch,
        ).run()
    summary = summarize(outcome, cluster.deployments)
    if arguments.chrome is not None:
        _write(arguments.chrome, json.dumps(outcome.trace.chrome()))
    console = Console()
    if arguments.json:
        console.out(json.dumps({"policy": policy.name, **as_json(summary)}, indent=2))
    else:
        console.print(_table(summary))
        console.print(_figures(summary), highlight=False)
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"Cannot write {path}: {error.strerror}.") from None


def _requests(cluster: ClusterDescription, arguments: argparse.Namespace) -> list[SimRequest]:
    names = [deployment.name for deployment in cluster.deployments]
    tokens = {deployment.name: deployment.tokens for deployment in cluster.deployments}
    seed = arguments.seed
    if arguments.trace is None:
        law = Law(
            rate_per_s=arguments.rate,
            duration_s=arguments.duration,
            cv=arguments.cv,
            zipf=arguments.zipf,
        )
        crowd = Crowd(names=tuple(names), share=1.0, active=len(names))
        return with_tokens(arrivals(law, [crowd], seed), tokens, seed)
    if "func" in columns_of(arguments.trace):
        arrived = read_functions_trace(arguments.trace, names, compression=arguments.compression)
        return with_tokens(arrived, tokens, seed)
    return read_llm_trace(arguments.trace, names, zipf=arguments.zipf, seed=seed)


def _table(summary: Summary) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("APPLICATION", no_wrap=True)
    for heading in ("REQS", "TTFT %", "TPOT %", "COLD %", "TTFT P50 S", "P90", "P99"):
        table.add_column(heading, justify="right")
    for heading in ("TPOT P50 MS", "P99"):
        table.add_column(heading, justify="right")
    for name, part in [*summary.applications.items(), ("all", summary.all)]:
        table.add_row(name, *_cells(part))
    return table


def _cells(part: Attainment) -> tuple[str, ...]:
    shares = (part.ttft_met, part.tpot_met, part.cold)
    ttfts = (part.ttft_p50_s, part.ttft_p90_s, part.ttft_p99_s)
    tpots = (part.tpot_p50_s, part.tpot_p99_s)
    return (
        str(part.requests),
        *(f"{share * 100:.1f}" for share in shares),
        *(f"{seconds:.2f}" for seconds in ttfts),
        *(f"{seconds * 1e3:.0f}" for seconds in tpots),
    )


def _figures(summary: Summary) -> str:
    lines = [
        f"{summary.cold_starts} cold starts of {summary.stages:.2f} stages on average, "
        f"{summary.moved_gb:.0f} GB fetched",
        f"{summary.gpu_gb_s_per_request:.0f} GPU-GB·s per request",
        f"{summary.all.refused} requests refused, {summary.all.unfinished} not finished, "
        f"{summary.lost_replicas} replicas lost with a node",
    ]
    if summary.prediction_error is not None:
        lines.append(
            f"cold starts took {summary.prediction_error:.1%} more or less than predicted (median)"
        )
    return "\n".join(lines)
