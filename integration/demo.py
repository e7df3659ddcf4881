"""The main path on this machine, start to end: `make demo`.

A cluster of four nodes comes up, a checkpoint is put into its bucket, one plain Triton request
starts the model on all nodes at once and streams tokens, the pipeline becomes one full instance
under a running request, and the model goes back to zero. The last line is one JSON object; the
exit status is 1 if anything was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from integration.support.bucket import upload
from integration.support.checkpoints import LlamaShape, cached, write_with_transformers
from integration.support.cutover import TimedAnswer, gap, wait_until_removed
from integration.support.limits import HANG_S
from integration.support.scenario import (
    Answer,
    ask,
    cold_start,
    wait_for_zero,
)
from paraserve_backend.errors import ParaServeError
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.cli.views import timeline
from paraserve_scheduler.client.generate import stream
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.cluster import (
    UpOptions,
    down,
    files_of,
    make_layout,
    up,
)
from paraserve_scheduler.local.layout import ClusterLayout

NAME = "demo"
SHAPE = LlamaShape(layers=8, hidden=768, intermediate=2048, heads=12, kv_heads=4)
PROMPT = "A model at zero starts when"
MAX_TOKENS = 32
LONG_PROMPT = "A pipeline that serves becomes"
#: More than it takes to consolidate.
LONG_TOKENS = 1900
KEEP_ALIVE_S = 5.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--nodes", type=int, default=4, help="(default: 4)")
    nodes = parser.parse_args().nodes
    signal.signal(signal.SIGTERM, _interrupt)
    console = Console(stderr=False, highlight=False)
    files = files_of(NAME, os.environ)
    try:
        down(files, delete=True)  # what a demo left that was killed
        result = run(nodes, console)
    except KeyboardInterrupt:
        console.print("\ninterrupted; stopping the cluster")
        return 130
    except ParaServeError as error:
        console.print(f"[bold red]The demo failed:[/] {error}", soft_wrap=True)
        return 1
    finally:
        down(files, delete=True)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def run(nodes: int, console: Console) -> dict[str, object]:
    """Do everything and return the last line."""
    files = files_of(NAME, os.environ)
    with console.status("writing a random checkpoint (once)"):
        checkpoint = _checkpoint(os.environ)
    options = UpOptions(name=NAME, nodes=nodes)
    layout = make_layout(
        options,
        files,
        available_bytes=available_bytes(Path("/proc")),
        cores=os.cpu_count() or 1,
    )
    with console.status("starting the cluster") as status:
        up(layout, lambda step: status.update(f"starting the cluster: {step.process}"))
    console.print(f"[bold]Cluster of {nodes} nodes is up.[/] Nothing is loaded.")
    source = upload(layout, checkpoint, NAME, console)
    token = files.token.read_text(encoding="utf-8")
    with SchedulerClient(layout.scheduler_address, token) as client:
        return _show(layout, client, checkpoint, source, console)


def _show(
    layout: ClusterLayout,
    client: SchedulerClient,
    checkpoint: Path,
    source: str,
    console: Console,
) -> dict[str, object]:
    deployed = client.deploy(pb.DeploymentSpec(name=NAME, source=source, keep_alive_s=KEEP_ALIVE_S))
    console.print(
        f"[bold]Deployed[/] {source}: {deployed.architecture}, "
        f"{deployed.weight_bytes / 1e6:.0f} MB of weights, at zero."
    )
    answer = _ask(layout, console)
    replica = cold_start(client, NAME)
    # At once: an idle replica goes to zero instead.
    long, pipeline = _consolidate(layout, client, replica.replica, console)
    felt = gap([long], pipeline)
    console.print()
    successors = timeline.successors(client.status(NAME), pipeline)
    console.print(timeline.render(pipeline, successors, width=console.width))
    console.print(
        f"[bold]Consolidated[/] into one full instance while a request was running. Its longest "
        f"pause was {felt.longest_s * 1e3:.0f} ms, {felt.over_tpot:.1f} times what a token took."
    )
    _require_reference(checkpoint, PROMPT, answer.token_ids, console)
    _require_reference(checkpoint, LONG_PROMPT, tuple(long.token_ids), console)
    with console.status(f"waiting for scale to zero (idle for {KEEP_ALIVE_S:.0f} s)"):
        wait_for_zero(layout, client, NAME, timeout_s=KEEP_ALIVE_S + HANG_S)
    console.print("[bold]At zero again:[/] no node holds a model.\n")
    return {
        "demo": "ok",
        "stages": len(replica.parts),
        "ttft_s": round(answer.ttft_s, 3),
        "tokens_match_reference": True,
        "consolidated": True,
        "gap_over_tpot": round(felt.over_tpot, 2),
        "scaled_to_zero": True,
    }


def _checkpoint(environ: Mapping[str, str]) -> Path:
    base = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cached(
        base / "paraserve" / "demo-checkpoint",
        SHAPE,
        lambda folder: write_with_transformers(folder, SHAPE, shard="64MB"),
    )


def _ask(layout: ClusterLayout, console: Console) -> Answer:
    console.print(f"\n[bold]Request[/] to {layout.gateway_address}: {PROMPT!r}\n")
    answer = ask(layout, NAME, PROMPT, MAX_TOKENS, on_text=_write_now)
    sys.stdout.write("\n")
    return answer


def _consolidate(
    layout: ClusterLayout, client: SchedulerClient, replica: str, console: Console
) -> tuple[TimedAnswer, pb.ReplicaStatus]:
    """Keep one request running until the pipeline has become a full instance."""
    answer, stopping = TimedAnswer(), threading.Event()
    settings = {"max_tokens": LONG_TOKENS, "ignore_eos": True}
    pieces = stream(layout.gateway_address, NAME, LONG_PROMPT, settings, timeout_s=HANG_S)
    with (
        console.status("a long request runs while the pipeline becomes one full instance"),
        ThreadPoolExecutor(1) as thread,
    ):
        asked = thread.submit(answer.read, pieces, stopping)
        try:
            pipeline = wait_until_removed(client, NAME, replica, timeout_s=HANG_S)
        finally:
            stopping.set()
        asked.result()
    return answer, pipeline


def _write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _require_reference(
    checkpoint: Path, prompt: str, token_ids: tuple[int, ...], console: Console
) -> None:
    with console.status("computing the same with transformers in one process"):
        expected = reference_ids(checkpoint, prompt, len(token_ids))
    if token_ids != expected:
        raise ParaServeError(
            f"The tokens differ from transformers': got {list(token_ids)}, "
            f"expected {list(expected)}."
        )
    console.print(f"\n[bold]All {len(expected)} token ids equal those of transformers.[/]")


def reference_ids(checkpoint: Path, prompt: str, max_tokens: int) -> tuple[int, ...]:
    """Return what transformers generates greedily, past every end of text, without the prompt."""
    # Takes seconds to import, so not before the cluster runs.
    from transformers import AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    # Typed or not, as the version has it.
    model: Any = LlamaForCausalLM.from_pretrained(checkpoint)
    # `min_new_tokens` would forbid the end's token instead of going on after it.
    model.generation_config.eos_token_id = None
    encoded = tokenizer(prompt, return_tensors="pt")
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        max_new_tokens=max_tokens,
        do_sample=False,
    )
    return tuple(output[0, encoded["input_ids"].shape[1] :].tolist())


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
