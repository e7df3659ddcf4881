"""Time to first token from zero on one node and on four whose networks are capped.

One cluster, one checkpoint, two deployments of it that differ only in their longest pipeline; they
take turns, and each goes to zero before the other starts. The last line is one JSON object; the
exit status is 1 if the target was missed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from integration.bucket import progress_bar
from integration.capped_bench import run_bench
from integration.checkpoints import LlamaShape, cached, llama_bytes, write_raw_bf16
from integration.cluster import CappedCluster, capped_cluster, inside_hub
from integration.scenario import Answer, ask, cold_start, wait_for_zero
from paraserve_backend.errors import ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler import timeline
from paraserve_scheduler.client import SchedulerClient
from paraserve_scheduler.local.layout import BUCKET, ClusterLayout

#: 3.2 GB in bf16; the shape of a small real model.
SHAPE = LlamaShape(layers=36, hidden=2048, intermediate=5632, heads=32, kv_heads=4, spread=0.02)
SHARD_BYTES = 500_000_000
NODES = 4
PROMPT = "The time to first token of a model at zero"
MAX_TOKENS = 4
TARGETS = {"ratio_1_to_4": 2.5}
_NODE_MEMORY_BYTES = 4_000_000_000
_KEEP_ALIVE_S = 1.0
_ZERO_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One cold start."""

    stages: int
    ttft_s: float
    #: The longest fetch of any node.
    fetch_s: float
    token_ids: tuple[int, ...]


def main() -> int:
    arguments = _parse()
    return run_bench(
        "coldstart",
        lambda folder, console: run(folder, arguments.rounds, arguments.gbit, console),
        keep=arguments.keep,
    )


def run(folder: Path, rounds: int, gbit: float, console: Console) -> dict[str, object]:
    """Measure and return the last line."""
    checkpoint = _checkpoint(folder, console)
    cluster = CappedCluster(
        nodes=NODES, rate_bits_per_s=gbit * 1e9, node_memory_bytes=_NODE_MEMORY_BYTES
    )
    with (
        capped_cluster(cluster, os.environ) as layout,
        inside_hub(),
        SchedulerClient(layout.scheduler_address, layout.files.token.read_text()) as client,
    ):
        console.print(f"{NODES} nodes with {gbit:g} Gbit/s each are up.")
        _deploy(layout, client, checkpoint)
        starts = [
            _start(layout, client, stages, console) for _ in range(rounds) for stages in (1, NODES)
        ]
    return summary(starts, rounds=rounds, gbit=gbit)


def summary(starts: list[Start], *, rounds: int, gbit: float) -> dict[str, object]:
    """Compare the medians of both kinds of start."""
    if len({start.token_ids for start in starts}) != 1:
        raise ParaServeError("One and four stages gave different tokens.")
    one, four = ([start for start in starts if start.stages == count] for count in (1, NODES))
    ratio = _median_ttft(one) / _median_ttft(four)
    return {
        "bench": "coldstart",
        "checkpoint_bytes": llama_bytes(SHAPE),
        "gbit_per_node": gbit,
        "rounds": rounds,
        "ttft_1_node_s": [round(start.ttft_s, 2) for start in one],
        "ttft_4_nodes_s": [round(start.ttft_s, 2) for start in four],
        "fetch_1_node_s": [round(start.fetch_s, 2) for start in one],
        "fetch_4_nodes_s": [round(start.fetch_s, 2) for start in four],
        "ratio_1_to_4": round(ratio, 2),
        "targets": TARGETS,
        "met": ratio >= TARGETS["ratio_1_to_4"],
    }


def _median_ttft(starts: list[Start]) -> float:
    return statistics.median(start.ttft_s for start in starts)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_coldstart", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="two rounds instead of five")
    parser.add_argument("--rounds", type=int, help="starts of each kind (default: 5)")
    parser.add_argument("--gbit", type=float, default=1.0, help="per node, Gbit/s (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint for the next run")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (2 if arguments.smoke else 5)
    return arguments


def _checkpoint(folder: Path, console: Console) -> Path:
    with progress_bar(console) as progress:
        task = progress.add_task("write a random bf16 checkpoint", total=llama_bytes(SHAPE))
        cached(
            folder,
            SHAPE,
            lambda target: write_raw_bf16(
                target,
                SHAPE,
                shard_bytes=SHARD_BYTES,
                on_progress=lambda written: progress.advance(task, written),
            ),
        )
        progress.update(task, completed=llama_bytes(SHAPE))
    return folder


def put_into_bucket(layout: ClusterLayout, checkpoint: Path) -> None:
    """Make the checkpoint `s3://models/bench`, without a second copy where that is possible."""
    prefix = layout.files.buckets / BUCKET / "bench"
    prefix.mkdir()
    for path in checkpoint.iterdir():
        _link_or_copy(path, prefix / path.name)


def _deploy(layout: ClusterLayout, client: SchedulerClient, checkpoint: Path) -> None:
    """Deploy the checkpoint twice."""
    put_into_bucket(layout, checkpoint)
    for stages in (1, NODES):
        client.deploy(
            pb.DeploymentSpec(
                name=_name(stages),
                source=f"s3://{BUCKET}/bench",
                max_stages=stages,
                max_context=512,
                keep_alive_s=_KEEP_ALIVE_S,
                consolidate=False,
            )
        )


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, target)


def _start(layout: ClusterLayout, client: SchedulerClient, stages: int, console: Console) -> Start:
    name = _name(stages)
    with console.status(f"cold start on {stages} node(s)"):
        answer = ask(layout, name, PROMPT, MAX_TOKENS)
    replica = cold_start(client, name)
    console.print(timeline.render(replica, width=console.width))
    console.print(f"TTFT on {len(replica.parts)} node(s): [bold]{answer.ttft_s:.2f} s[/]\n")
    with console.status("waiting for scale to zero"):
        wait_for_zero(layout, client, name, timeout_s=_KEEP_ALIVE_S + _ZERO_TIMEOUT_S)
    return _record(replica, answer)


def _record(replica: pb.ReplicaStatus, answer: Answer) -> Start:
    fetches = [row.duration_s for row in timeline.rows(replica) if row.what == "fetch"]
    return Start(
        stages=len(replica.parts),
        ttft_s=answer.ttft_s,
        fetch_s=max(fetches, default=0.0),
        token_ids=answer.token_ids,
    )


def _name(stages: int) -> str:
    return f"on-{stages}"


if __name__ == "__main__":
    sys.exit(main())
