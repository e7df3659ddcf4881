"""How long one decision of the policy takes, by the size of the cluster.

`python -m integration.benchmarks.policy` prints a row per number of nodes and, last, one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from statistics import median

from paraserve_scheduler.planner.bandwidth import BandwidthClaim
from paraserve_scheduler.planner.cost import (
    NodeKind,
    Speed,
    StartMethod,
    uniform_model,
)
from paraserve_scheduler.planner.fleet import (
    Fleet,
    Gpu,
    Need,
    Node,
    Objectives,
    ReplicaLoad,
    ReplicaPhase,
)
from paraserve_scheduler.policies.paraserve import decide

_GB = 10**9
_NOW_S = 1_000.0
_TARGET_S = 0.010
#: With so much of the objective gone every number of stages is tried, and what could be evicted.
_LATE_S = 5.0
_MODEL = uniform_model(
    "7b", size_bytes=13 * _GB, num_layers=32, ends_bytes=_GB // 4, kv_bytes=5 * _GB
)
_KIND = NodeKind(
    name="gpu",
    start=StartMethod(
        runtime_s=4.0,
        tail_s=1.0,
        load_s_per_byte=0.1 / _GB,
        slot_runtime_s=0.3,
        slot_bytes=_GB // 2,
    ),
    speeds={"7b": Speed(prefill_s_per_token=0.0003, decode_s=0.03)},
    disk_bytes_per_s=1.8e9,
)
#: Of the deployment in need.
_SOME = {"d0": ((0, 8), (20, 24))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench_policy", description=__doc__)
    parser.add_argument("--decisions", type=int, default=30, help="timed for each size")
    arguments = parser.parse_args(argv)
    seconds: dict[str, dict[int, float]] = {"in time": {}, "late": {}}
    sys.stdout.write(f"{'NODES':>6} {'DEPLOYMENTS':>12} {'IN TIME, MS':>12} {'LATE, MS':>10}\n")
    for nodes in (10, 100, 1_000, 10_000):
        for case, waited_s in (("in time", 0.0), ("late", _LATE_S)):
            seconds[case][nodes] = median_decision_s(nodes, nodes, arguments.decisions, waited_s)
        in_time, late = (seconds[case][nodes] * 1e3 for case in seconds)
        sys.stdout.write(f"{nodes:>6} {nodes:>12} {in_time:>12.2f} {late:>10.2f}\n")
    result = {
        "bench": "policy",
        "median_ms": _ms(seconds["in time"]),
        "median_ms_late": _ms(seconds["late"]),
        "target_ms_at_1000": _TARGET_S * 1e3,
        "met": seconds["in time"][1_000] <= _TARGET_S,
    }
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _ms(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(nodes): round(it * 1e3, 3) for nodes, it in seconds.items()}


def median_decision_s(nodes: int, deployments: int, decisions: int, waited_s: float = 0.0) -> float:
    """Median seconds of a decision that starts one replica; every one sees another fleet.

    Of the processor's time: a decision waits for nothing, and other processes may be running.
    """
    took = []
    for seed in range(decisions):
        fleet = make_fleet(nodes, deployments, seed, waited_s)
        begun = time.process_time()
        decide(fleet, _NOW_S)
        took.append(time.process_time() - begun)
    return median(took)


def make_fleet(nodes: int, deployments: int, seed: int, waited_s: float = 0.0) -> Fleet:
    """A fleet in use: half of its memory reserved, a tenth of its nodes fetching, one in need.

    Racks are named, and a seventh of the nodes have a part of what is needed in host memory.
    """
    generator = random.Random(seed)
    return Fleet(
        nodes=tuple(_node(index, generator) for index in range(nodes)),
        needs=tuple(_need(index, nodes, generator, waited_s) for index in range(deployments)),
        store_bytes_per_s=nodes * 1e9,
        store_fetches=nodes // 10,
    )


def _node(index: int, generator: random.Random) -> Node:
    claims = (
        BandwidthClaim(remaining_bytes=4.0 * _GB, deadline_s=_NOW_S + generator.uniform(1, 60)),
    )
    return Node(
        name=f"n{index}",
        kind=_KIND,
        nic_bytes_per_s=generator.choice([10, 25, 100]) * 1e9 / 8,
        gpus=tuple(
            Gpu(
                index=gpu,
                capacity_bytes=32 * _GB,
                free_bytes=generator.choice([0, 14, 32]) * _GB,
                slots=generator.randint(0, 1),
            )
            for gpu in range(4)
        ),
        claims=claims if generator.random() < 0.1 else (),
        cached=_SOME if index % 7 == 0 else {},
        on_disk=_SOME if index % 11 == 0 else {},
        zone=f"rack{index % 40}",
    )


def _need(index: int, nodes: int, generator: random.Random, waited_s: float) -> Need:
    name, node = f"d{index}", f"n{generator.randrange(nodes)}"
    replica = ReplicaLoad(
        name=f"{name}.1",
        deployment=name,
        phase=ReplicaPhase.READY,
        capacity=8,
        in_flight=generator.randint(0, 8),
        reserved_bytes={(node, 0): 18 * _GB},
        idle_since_s=_NOW_S - generator.uniform(0, 5),
    )
    return Need(
        name=name,
        weights=name,
        model=_MODEL,
        objectives=Objectives(ttft_s=7.5, tpot_s=0.2),
        waiting=1 if index == 0 else 0,
        oldest_s=_NOW_S - waited_s if index == 0 else None,
        replicas=() if index == 0 else (replica,),
        arrivals_s=tuple(_NOW_S - age for age in (300.0, 200.0, 100.0, 50.0, 20.0, waited_s)),
    )


if __name__ == "__main__":
    raise SystemExit(main())
