"""How much processor time the simulator takes for an hour of overload on the paper's testbed.

`python -m integration.benchmarks.simulate [--trace FILE]` simulates as many requests as Azure's LLM
inference trace of 2023 has, at its rate, or that trace itself; then all of them twice, one after
the other. Prints a row for each and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from paraserve_scheduler import simulator
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.simulator.description import ClusterDescription, read_cluster
from paraserve_scheduler.simulator.workload import (
    Crowd,
    Law,
    SimRequest,
    arrivals,
    read_llm_trace,
    with_tokens,
)
from paraserve_scheduler.simulator.world import Simulation

_TESTBED = Path(simulator.__path__[0]) / "testbeds" / "hydraserve-ii.yaml"
#: Of the conversations in Azure's trace.
_REQUESTS, _DURATION_S = 19_366, 3_502.0
_ZIPF = 1.0
_TARGETS = {"cpu_s": 120.0, "twice_ratio": 2.2}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_simulate", description=__doc__)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="CSV: Azure's trace itself")
    parser.add_argument("--policy", default="paraserve")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    policy = find_policy(arguments.policy)
    cluster = read_cluster(_TESTBED, policy.worker)
    took_s = []
    sys.stdout.write(f"{'REQUESTS':>8} {'SIMULATED, S':>12} {'CPU, S':>8}\n")
    for times in (1, 2):
        begun_s = time.process_time()
        once = _requests(cluster, arguments.trace, arguments.seed)
        outcome = Simulation(cluster, repeated(once, times), policy.decide).run()
        took_s.append(time.process_time() - begun_s)
        row = f"{len(outcome.requests):>8} {outcome.ended_s:>12.0f} {took_s[-1]:>8.1f}\n"
        sys.stdout.write(row)
    sys.stdout.write(json.dumps(summary(*took_s)) + "\n")
    return 0


def _requests(cluster: ClusterDescription, trace: Path | None, seed: int) -> list[SimRequest]:
    names = tuple(deployment.name for deployment in cluster.deployments)
    if trace is not None:
        return read_llm_trace(trace, names, zipf=_ZIPF, seed=seed)
    tokens = {deployment.name: deployment.tokens for deployment in cluster.deployments}
    rate = _REQUESTS / _DURATION_S
    law = Law(rate_per_s=rate, duration_s=_DURATION_S, cv=1.0, zipf=_ZIPF)
    crowd = Crowd(names=names, share=1.0, active=len(names))
    return with_tokens(arrivals(law, [crowd], seed), tokens, seed)


def repeated(requests: Sequence[SimRequest], times: int) -> list[SimRequest]:
    """Return the requests so many times after each other, at the rate they have."""
    begin_s, end_s = requests[0].arrival_s, requests[-1].arrival_s
    length_s = (end_s - begin_s) * len(requests) / max(1, len(requests) - 1)
    return [
        replace(request, arrival_s=request.arrival_s + turn * length_s)
        for turn in range(times)
        for request in requests
    ]


def summary(once_s: float, twice_s: float) -> dict[str, Any]:
    figures = {"cpu_s": round(once_s, 1), "twice_ratio": round(twice_s / once_s, 2)}
    return {
        "bench": "simulate",
        **figures,
        "targets": _TARGETS,
        "met": all(figures[name] <= target for name, target in _TARGETS.items()),
    }


if __name__ == "__main__":
    raise SystemExit(main())
