"""Time to first token from zero: ours beside what a Triton user has today, and beside the limit.

    python -m integration.benchmarks.coldstart.run [--smoke] [--rounds 5] [--only NAME ...] [--list]

Networks of nodes are capped. A round runs every variant once, each testbed on a cluster that is
fresh, so that nothing is cached; ratios are of medians of one run. The last line is one JSON
object; the exit status is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from integration.benchmarks.coldstart.chart import chart
from integration.benchmarks.coldstart.report import markdown, table
from integration.benchmarks.coldstart.summary import Results, Start, summary
from integration.benchmarks.coldstart.targets import TARGETS
from integration.benchmarks.coldstart.variants import (
    SHAPES,
    VARIANTS,
    Plain,
    Testbed,
    Variant,
)
from integration.support.bucket import progress_bar, put_into_bucket
from integration.support.capped_bench import run_bench, show_failure
from integration.support.capped_cluster import CappedCluster, capped_cluster
from integration.support.checkpoints import cached, llama_bytes, write_raw_bf16
from integration.support.memory import huge_pages
from integration.support.namespaces import HUB
from integration.support.plain_triton import Loader
from paraserve_backend.errors import InvalidRequest, NotFound, ParaServeError
from paraserve_scheduler.cli.views import timeline
from paraserve_scheduler.local.layout import ClusterLayout

SHARD_BYTES = 500_000_000
ROUNDS = 5
_REPORT = "bench-coldstart"
#: As HydraServe reckons a model of 2 GB takes 7 GB; ours takes far less.
_NODE_MEMORY_BYTES = 8_000_000_000
SMOKE = ("status-quo-1gb", "ours-4-1gb", "ours-4-slots-1gb")


def main() -> int:
    arguments = _parse()
    if arguments.list:
        for variant in VARIANTS:
            sys.stdout.write(f"{variant.name:>20}  {variant.testbed.name}: {variant.label}\n")
        return 0
    return run_bench(
        "coldstart",
        lambda folder, console: run(folder, arguments, console),
        keep=arguments.keep,
    )


def run(folder: Path, arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure and return the last line."""
    variants = chosen(arguments.only or (SMOKE if arguments.smoke else ()))
    checkpoints = {
        name: _checkpoint(folder / name, name, console)
        for name in dict.fromkeys(variant.checkpoint for variant in variants)
    }
    links: dict[float, float] = {}
    starts: list[Start] = []
    repeated: list[str] = []
    with huge_pages(), _progress(console) as progress:
        task = progress.add_task("", total=arguments.rounds * len(variants))
        for number in range(1, arguments.rounds + 1):
            for testbed in testbeds(variants):
                progress.update(
                    task, description=f"round {number}: {testbed.name}", completed=len(starts)
                )
                group = partial(_starts, testbed, variants, checkpoints, links)
                shown = partial(_reported, progress=progress, task=task, is_first=number == 1)
                try:
                    found = list(shown(group()))
                except ParaServeError as error:
                    # It is not worth an hour of other starts.
                    show_failure(f"{testbed.name} (which is repeated)", error, progress.console)
                    repeated.append(testbed.name)
                    found = list(shown(group()))
                starts += found
            results = Results(
                variants=variants,
                starts=starts,
                checkpoint_bytes={name: llama_bytes(SHAPES[name]) for name in checkpoints},
                link_bytes_per_s=links,
            )
            # After every round: who interrupts it keeps what the whole rounds have shown.
            last_line = {"bench": "coldstart", "rounds": number, "repeated": repeated}
            last_line |= summary(results, TARGETS)
            if arguments.out is not None:
                _write(arguments.out, results, last_line)
    console.print(table(results))
    return last_line


def _write(folder: Path, results: Results, last_line: dict[str, Any]) -> None:
    (folder / f"{_REPORT}.svg").write_text(chart(results), encoding="utf-8")
    (folder / f"{_REPORT}.md").write_text(markdown(results, last_line), encoding="utf-8")


def chosen(names: Sequence[str]) -> tuple[Variant, ...]:
    """Return the variants called so, all if none is; in the order in which they are run.

    Raises:
        InvalidRequest: there is none of that name.
        NotFound: one needs a package that is not installed.
    """
    known = {variant.name for variant in VARIANTS}
    for name in names:
        if name not in known:
            raise InvalidRequest(f"There is no variant '{name}': --list shows them.")
    variants = tuple(v for v in VARIANTS if not names or v.name in names)
    needs_runai = any(v.how == Plain(loader=Loader.RUNAI) for v in variants)
    if needs_runai and importlib.util.find_spec("runai_model_streamer") is None:
        raise NotFound("Run:ai's streamer is not installed: run pip install -e '.[bench]'.")
    return variants


def testbeds(variants: Sequence[Variant]) -> list[Testbed]:
    found: list[Testbed] = []
    for variant in variants:
        if variant.testbed not in found:
            found.append(variant.testbed)
    return found


def _starts(
    testbed: Testbed,
    variants: Sequence[Variant],
    checkpoints: Mapping[str, Path],
    links: dict[float, float],
) -> Iterator[Start]:
    """Start a testbed's variants once; `links` gets the best rates seen: a limit is no lower."""
    here = [variant for variant in variants if variant.testbed == testbed]
    wanted = CappedCluster(
        rates_bits_per_s=tuple(rate * 1e9 for rate in testbed.gbit),
        node_memory_bytes=_NODE_MEMORY_BYTES,
        agent_settings=testbed.agent_settings,
        scheduler_settings=testbed.scheduler_settings,
        # Only one node computes at a time, and a node has its processors to itself.
        compute_threads=os.cpu_count() or 1,
    )
    with capped_cluster(wanted, os.environ) as layout:
        for source, checkpoint in {v.source: v.checkpoint for v in here}.items():
            put_into_bucket(layout, checkpoints[checkpoint], source)
        lines = _session(layout, here)
        for gbit, rate in next(lines).items():
            links[float(gbit)] = max(rate, links.get(float(gbit), 0.0))
        yield from map(Start.from_json, lines)


def _session(layout: ClusterLayout, variants: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Yield what the process says that starts the variants, until it has ended.

    Raises:
        ParaServeError: it failed.
    """
    module = (sys.executable, "-m", "integration.benchmarks.coldstart.session")
    command = ["ip", "netns", "exec", HUB, *module, str(layout.files.cluster)]
    command += [variant.name for variant in variants]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield from map(json.loads, process.stdout)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise ParaServeError("A start failed: see above.")


def _reported(
    starts: Iterator[Start], progress: Progress, task: TaskID, *, is_first: bool
) -> Iterator[Start]:
    """Pass the starts on as they come, each with a line, the first of its kind with a timeline."""
    console = progress.console
    for start in starts:
        if is_first and start.replica is not None:
            console.print(timeline.render(start.replica, width=console.width))
        console.print(
            f"{start.variant}: [bold]{start.ttft_s:.2f} s[/], again {start.warm_ttft_s:.3f} s, "
            f"tokens {start.token_ids}"
        )
        progress.advance(task)
        yield start


def _checkpoint(folder: Path, name: str, console: Console) -> Path:
    shape = SHAPES[name]
    with progress_bar(console) as progress:
        task = progress.add_task(f"write a random {name} checkpoint", total=llama_bytes(shape))
        cached(
            folder,
            shape,
            lambda target: write_raw_bf16(
                target,
                shape,
                shard_bytes=SHARD_BYTES,
                on_progress=lambda written: progress.advance(task, written),
            ),
        )
        progress.update(task, completed=llama_bytes(shape))
    return folder


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench_coldstart", description="Time to first token from zero, side by side."
    )
    parser.add_argument("--smoke", action="store_true", help="three variants of 1 GB")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="starts of each variant (default: %(default)s)"
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these variants")
    parser.add_argument("--list", action="store_true", help="name the variants and end")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints for the next run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write tables and plot there")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
