"""How well the simulator foretells a real cluster: one trace through both.

Three deployments of 1, 2 and 4 stages on four nodes whose networks are capped. Each has a copy of
one checkpoint, so that none reads what another's fetch has left on its node. Some cold starts
first, from which the constants of nodes and store are measured; then a trace with overlapping cold
starts runs through the cluster, and through the simulator with these constants and the same policy.
What is compared is the time to first token of requests that found no replica.
Networks are slow enough by default that nodes share them, and not this machine's two cores.
The last line is one JSON object; the exit status is 1 if the target was missed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from integration.support.bucket import put_into_bucket
from integration.support.capped_bench import run_bench
from integration.support.capped_cluster import CappedCluster, capped_cluster
from integration.support.checkpoints import (
    LlamaShape,
    cached,
    llama_bytes,
    write_raw_bf16,
)
from integration.support.limits import HANG_S
from integration.support.namespaces import HUB, inside
from integration.support.scenario import (
    Answer,
    ask,
    cold_start,
    wait_for_zero,
)
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views.explanation import times_of
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.control_plane.api.admission import read_deployment
from paraserve_scheduler.local.layout import BUCKET, ClusterLayout
from paraserve_scheduler.planner.cost import (
    ModelShape,
    NodeKind,
    Speed,
    StartMethod,
)
from paraserve_scheduler.planner.fleet import Objectives
from paraserve_scheduler.policies.registry import find_policy
from paraserve_scheduler.reconciler.model_shapes import shape_of
from paraserve_scheduler.simulator.description import (
    ClusterDescription,
    DeploymentDescription,
    NodeDescription,
)
from paraserve_scheduler.simulator.workload import Lengths, SimRequest, Tokens
from paraserve_scheduler.simulator.world import Simulation
from paraserve_scheduler.state.learned import StageTimes
from paraserve_scheduler.state.spec import DeploymentSpec

#: 1 GB in bf16.
SHAPE = LlamaShape(layers=16, hidden=1792, intermediate=4352, heads=28, kv_heads=4, spread=0.02)
SHARD_BYTES = 500_000_000
NODES = 4
STAGES = (1, 2, 4)
REQUESTS = 16
#: Between two requests of the trace, on average.
MEAN_GAP_S = 5.0
MAX_TOKENS = 8
PROMPT = "The time to first token of a model at zero"
TARGETS = {"median_error": 0.15}
_MAX_CONTEXT = 512
_KEEP_ALIVE_S = 1.0
_NODE_MEMORY_BYTES = 4_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """Of the nodes and the store, measured."""

    runtime_s: float
    tail_s: float
    node_bytes_per_s: float
    store_bytes_per_s: float
    #: Time to first token and per token of a replica that serves.
    prefill_s: float
    decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One request that found no replica, in the cluster and in the simulator."""

    deployment: str
    arrival_s: float
    measured_s: float
    simulated_s: float

    @property
    def error(self) -> float:
        return self.simulated_s / self.measured_s - 1


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench_alignment", description=__doc__)
    parser.add_argument("--gbit", type=float, default=0.25, help="per node (default: 0.25)")
    parser.add_argument("--seed", type=int, default=1, help="of the trace (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next run")
    arguments = parser.parse_args()
    return run_bench(
        "alignment",
        lambda folder, console: run(folder, arguments.gbit, arguments.seed, console),
        keep=arguments.keep,
    )


def run(folder: Path, gbit: float, seed: int, console: Console) -> dict[str, object]:
    """Measure and return the last line."""
    cached(folder, SHAPE, lambda target: write_raw_bf16(target, SHAPE, shard_bytes=SHARD_BYTES))
    wanted = CappedCluster(
        rates_bits_per_s=(gbit * 1e9,) * NODES,
        node_memory_bytes=_NODE_MEMORY_BYTES,
        agent_settings={"tier_bytes": 0, "max_slots": 0},
    )
    trace = make_trace(seed)
    with (
        capped_cluster(wanted, os.environ) as layout,
        inside(HUB),
        SchedulerClient(layout.scheduler_address, layout.files.token.read_text()) as client,
    ):
        for stages in STAGES:
            put_into_bucket(layout, folder, _name(stages))
        console.print(f"{NODES} nodes with {gbit:g} Gbit/s each are up.")
        cluster = _MeasuredCluster(layout, client, console)
        constants = cluster.measure()
        console.print(constants)
        answers = cluster.replay(trace)
    simulated = simulate(trace, constants, _shape(folder))
    pairs = compare(trace, answers, simulated)
    console.print(_table(pairs))
    return summary(pairs, gbit)


def make_trace(seed: int) -> list[SimRequest]:
    """Requests with irregular gaps, so that some cold starts overlap."""
    generator = random.Random(seed)
    at_s, trace = 1.0, []
    for _ in range(REQUESTS):
        trace.append(
            SimRequest(
                deployment=_name(generator.choice(STAGES)),
                arrival_s=at_s,
                prompt_tokens=len(PROMPT.split()),
                output_tokens=MAX_TOKENS,
            )
        )
        at_s += generator.gammavariate(0.7, MEAN_GAP_S / 0.7)
    return trace


class _MeasuredCluster:
    def __init__(self, layout: ClusterLayout, client: SchedulerClient, console: Console) -> None:
        self._layout = layout
        self._client = client
        self._console = console
        for stages in STAGES:
            client.deploy(
                pb.DeploymentSpec(
                    name=_name(stages),
                    source=f"s3://{BUCKET}/{_name(stages)}",
                    max_stages=stages,
                    max_context=_MAX_CONTEXT,
                    keep_alive_s=_KEEP_ALIVE_S,
                    max_replicas=1,
                    consolidate=False,
                )
            )

    def measure(self) -> Constants:
        """Start every deployment twice, alone; the second one also with a warm request."""
        starts, warm = [], []
        for stages in (*STAGES, *STAGES):
            name = _name(stages)
            with self._console.status(f"measure a cold start on {stages} node(s)"):
                self._ask(name)
                warm.append(self._ask(name).ttft_s)
                starts.append(cold_start(self._client, name))
                wait_for_zero(self._layout, self._client, name, timeout_s=HANG_S)
        return constants_of(starts, median(warm))

    def replay(self, trace: Sequence[SimRequest]) -> list[Answer]:
        """Send the trace's requests when they are due."""
        begun_s = time.monotonic()

        def send(request: SimRequest) -> Answer:
            time.sleep(max(0.0, begun_s + request.arrival_s - time.monotonic()))
            return self._ask(request.deployment)

        with (
            self._console.status(f"{len(trace)} requests in {trace[-1].arrival_s:.0f} s"),
            ThreadPoolExecutor(len(trace)) as threads,
        ):
            return list(threads.map(send, trace))

    def _ask(self, name: str) -> Answer:
        return ask(self._layout, name, PROMPT, MAX_TOKENS)


def constants_of(starts: Sequence[pb.ReplicaStatus], warm_ttft_s: float) -> Constants:
    """What these cold starts, each alone on its cluster, say about nodes and store."""
    stages = [[times_of(part) for part in start.parts] for start in starts]
    rates = [[it.bytes_per_s or 0.0 for it in parts] for parts in stages]
    tails = [
        start.ready_s - start.planned_s - max(map(_needed_s, parts))
        for start, parts in zip(starts, stages, strict=True)
    ]
    return Constants(
        runtime_s=median(it.runtime_s or 0.0 for parts in stages for it in parts),
        tail_s=median(tails),
        node_bytes_per_s=median(rate for each in rates if len(each) == 1 for rate in each),
        store_bytes_per_s=max(sum(each) for each in rates),
        prefill_s=warm_ttft_s,
        decode_s=median(start.tpot_s for start in starts),
    )


def _needed_s(times: StageTimes) -> float:
    return max(times.runtime_s or 0.0, times.fetch_s or 0.0)


def simulate(
    trace: Sequence[SimRequest], constants: Constants, shape: ModelShape
) -> Sequence[SimRequest]:
    """Run the trace through the simulator; returns its requests."""
    tokens = trace[0].prompt_tokens
    kind = NodeKind(
        name="measured",
        start=StartMethod(
            runtime_s=constants.runtime_s, tail_s=constants.tail_s, load_s_per_byte=0.0
        ),
        speeds={
            shape.name: Speed(
                prefill_s_per_token=constants.prefill_s / tokens, decode_s=constants.decode_s
            )
        },
        shares_gpus=False,
    )
    cluster = ClusterDescription(
        nodes=tuple(
            NodeDescription(
                name=f"node{number}",
                kind=kind,
                nic_bytes_per_s=constants.node_bytes_per_s,
                gpu_bytes=(_NODE_MEMORY_BYTES,),
                memory_bytes=0,
            )
            for number in range(NODES)
        ),
        deployments=tuple(_described(stages, shape, tokens) for stages in STAGES),
        store_bytes_per_s=constants.store_bytes_per_s,
    )
    requests = [
        SimRequest(
            deployment=it.deployment,
            arrival_s=it.arrival_s,
            prompt_tokens=it.prompt_tokens,
            output_tokens=it.output_tokens,
        )
        for it in trace
    ]
    return Simulation(cluster, requests, find_policy("paraserve").decide).run().requests


def _described(stages: int, shape: ModelShape, tokens: int) -> DeploymentDescription:
    length = Lengths(mean=tokens, cv=0, most=tokens)
    return DeploymentDescription(
        name=_name(stages),
        application="all",
        model=shape,
        objectives=Objectives(),
        max_sequences=16,
        max_stages=stages,
        tokens=Tokens(prompt=length, output=Lengths(mean=MAX_TOKENS, cv=0, most=MAX_TOKENS)),
        consolidate=False,
        keep_alive_s=_KEEP_ALIVE_S,
    )


def _shape(folder: Path) -> ModelShape:
    deployment = read_deployment(DeploymentSpec(name="bench", source=str(folder), max_sequences=16))
    return shape_of(deployment, _MAX_CONTEXT)


def compare(
    trace: Sequence[SimRequest], answers: Sequence[Answer], simulated: Sequence[SimRequest]
) -> list[Pair]:
    """Requests that were cold in the simulator; what was warm says nothing about cold starts."""
    return [
        Pair(
            deployment=request.deployment,
            arrival_s=request.arrival_s,
            measured_s=answer.ttft_s,
            simulated_s=twin.ttft_s or 0.0,
        )
        for request, answer, twin in zip(trace, answers, simulated, strict=True)
        if twin.was_cold
    ]


def summary(pairs: Sequence[Pair], gbit: float) -> dict[str, object]:
    error = median(abs(pair.error) for pair in pairs)
    return {
        "bench": "alignment",
        "checkpoint_bytes": llama_bytes(SHAPE),
        "gbit_per_node": gbit,
        "cold_requests": len(pairs),
        "measured_ttft_s": [round(pair.measured_s, 2) for pair in pairs],
        "simulated_ttft_s": [round(pair.simulated_s, 2) for pair in pairs],
        "median_error": round(error, 3),
        "largest_error": round(max(abs(pair.error) for pair in pairs), 3),
        "targets": TARGETS,
        "met": error <= TARGETS["median_error"],
    }


def _table(pairs: Sequence[Pair]) -> Table:
    table = Table("DEPLOYMENT", "ARRIVAL S", "MEASURED S", "SIMULATED S", "ERROR", box=None)
    for pair in pairs:
        table.add_row(
            pair.deployment,
            f"{pair.arrival_s:.1f}",
            f"{pair.measured_s:.2f}",
            f"{pair.simulated_s:.2f}",
            f"{pair.error:+.0%}",
        )
    return table


def _name(stages: int) -> str:
    return f"on-{stages}"


if __name__ == "__main__":
    sys.exit(main())
