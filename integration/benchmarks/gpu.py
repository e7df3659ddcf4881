"""The GPU path on one GPU: load, engine, hand-over, cold starts with stages as processes of Triton.

    python -m integration.benchmarks.gpu [--device cuda] [--shape 7b|tiny]

Without a GPU it says that it skipped. `--device cpu --shape tiny` runs every step on the CPU, which
shows that the script works and nothing else. The last line is JSON; the exit status is 1 if a
target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from integration.benchmarks.engine import (
    BATCH_SIZES,
    NUM_BLOCKS,
    compare,
    run_ours,
    run_transformers,
)
from integration.benchmarks.tier.whole_model import fetch_whole
from integration.support.bucket import put_into_bucket
from integration.support.checkpoints import LlamaShape, llama_bytes, write_raw_bf16
from integration.support.limits import HANG_S
from integration.support.scenario import ask, cold_start, wait_for_zero
from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.engines.native.model.kv_cache import BLOCK_SIZE, KvCache
from paraserve_backend.engines.native.model.kv_transfer import KvExporter, KvImporter
from paraserve_backend.engines.native.model.load import load_engine
from paraserve_backend.engines.native.model.stage import StageEngine
from paraserve_backend.engines.native.model.weights import WeightLoader
from paraserve_backend.errors import ParaServeError
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.protocol.forward import Export
from paraserve_backend.protocol.hand_over import KvBlocks, Message
from paraserve_backend.protocol.parameters import KvConfig
from paraserve_backend.roles.weights import Fetched, read_spec
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import SpanFile
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from paraserve_scheduler.cli.views import timeline
from paraserve_scheduler.client.scheduler import SchedulerClient
from paraserve_scheduler.local.cluster import (
    UpOptions,
    down,
    files_of,
    make_layout,
    up,
)
from paraserve_scheduler.local.layout import SHM, ClusterLayout

NAME = "bench-gpu"
SHAPES = {
    "7b": LlamaShape(
        layers=32, hidden=4096, intermediate=11008, heads=32, kv_heads=32, spread=0.02
    ),
    "tiny": LlamaShape(layers=4, hidden=128, intermediate=256, heads=4, kv_heads=2, spread=0.2),
}
STAGES = (1, 2, 4)
_FETCH = "whole"
_STAGING_BYTES = 32 << 20
_KV_BLOCKS_MOVED = 128
_PROMPT, _MAX_TOKENS = "Every stage is a process of its own", 16
_KEEP_ALIVE_S = 1.0
TARGETS = {
    "load_over_pinned_copy": 0.9,
    "decode_batch_8_over_eager": 3.0,
    "stages_agree": 1.0,
}


def main() -> int:
    arguments = _parse()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        reason = "torch finds no CUDA GPU on this machine"
        sys.stdout.write(f"Skipped: {reason}.\n")
        sys.stdout.write(json.dumps({"bench": "gpu", "skipped": reason}) + "\n")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="paraserve-bench-gpu-", dir=SHM))
    try:
        result = run(folder, SHAPES[arguments.shape], device, Console(highlight=False))
    except ParaServeError as error:
        sys.stderr.write(f"The benchmark failed: {error}\n")
        return 1
    finally:
        shutil.rmtree(folder)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["met"] else 1


def run(folder: Path, shape: LlamaShape, device: torch.device, console: Console) -> dict[str, Any]:
    """Measure and return the last line."""
    model = folder / "model"
    write_raw_bf16(model, shape, shard_bytes=4_000_000_000)
    fetched = _fill(model, folder)
    figures: dict[str, Any] = {"model_gb": round(llama_bytes(shape) / 1e9, 2)}
    figures |= load_figures(fetched, device)
    spec = read_spec(fetched)
    figures |= engine_figures(_whole_engine(fetched, spec, device), model, shape, device)
    figures |= hand_over_figures(spec, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the cluster's processes need the room
    figures |= cluster_figures(model, device, console)
    missed = [name for name, least in TARGETS.items() if figures[name] < least]
    return {
        "bench": "gpu",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "figures": figures,
        "targets": TARGETS,
        "missed": missed,
        "met": not missed,
    }


# ---- weights ----


def _fill(model: Path, folder: Path) -> Fetched:
    """Fetch the whole model into a host-memory tier, as an agent does."""
    tier = Tier.open(folder / "tier")
    fetch_whole(model, tier, _FETCH)
    tier.close()
    reader = TierReader.open(folder / "tier", _FETCH)
    return Fetched(reader=reader, spans=SpanFile(folder / "spans.jsonl"), close=lambda: None)


def load_figures(fetched: Fetched, device: torch.device) -> dict[str, Any]:
    """Host memory to the device, beside what page-locked buffers can be copied with."""
    names = [tensor.name for tensor in fetched.reader.plan.tensors]
    size_bytes = sum(tensor.size_bytes for tensor in fetched.reader.plan.tensors)
    loader = WeightLoader(fetched.reader, device)

    def load() -> None:
        for name in names:
            loader.get(name)

    load_s, copy_s = _seconds(load, device), _pinned_copy_s(size_bytes, device)
    return {
        "load_gb_per_s": round(size_bytes / load_s / 1e9, 2),
        "pinned_copy_gb_per_s": round(size_bytes / copy_s / 1e9, 2),
        "load_over_pinned_copy": round(copy_s / load_s, 3),
    }


def _pinned_copy_s(size_bytes: int, device: torch.device) -> float:
    num_copies = -(-size_bytes // _STAGING_BYTES)
    staged = torch.empty(_STAGING_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    target = torch.empty(_STAGING_BYTES, dtype=torch.uint8, device=device)

    def copy() -> None:
        for _ in range(num_copies):
            target.copy_(staged, non_blocking=True)

    return _seconds(copy, device) * size_bytes / (num_copies * _STAGING_BYTES)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time the second run, up to where the device has done it."""
    for _ in range(2):
        _synchronize(device)
        began_s = time.perf_counter()
        work()
        _synchronize(device)
        seconds = time.perf_counter() - began_s
    return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- engine ----


def _whole_engine(fetched: Fetched, spec: ModelSpec, device: torch.device) -> StageEngine:
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    kv = KvConfig(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
    return load_engine(
        fetched.reader, fetched.spans, spec=spec, layers=layers, kv=kv, device=str(device)
    )


def engine_figures(
    engine: StageEngine, model: Path, shape: LlamaShape, device: torch.device
) -> dict[str, Any]:
    """Tokens per second beside transformers, eager and compiled."""
    # Typed or not, as the version has it.
    load: Any = AutoModelForCausalLM.from_pretrained
    eager = load(model, dtype=torch.bfloat16, attn_implementation="eager").to(device)
    contenders = {"paraserve": run_ours(engine), "eager": run_transformers(eager)}
    if device.type == "cuda":
        compiled = load(model, dtype=torch.bfloat16).to(device)
        compiled.forward = torch.compile(compiled.forward, dynamic=True)
        contenders["compiled"] = run_transformers(compiled)
    figures: dict[str, Any] = {}
    for size in BATCH_SIZES:
        rates = compare(contenders, size, vocabulary=shape.vocabulary)
        for phase, by_name in rates.items():
            name = f"{phase}_batch_{size}"
            figures[f"{name}_tokens_per_s"] = {who: round(it, 1) for who, it in by_name.items()}
            figures[f"{name}_over_eager"] = round(by_name["paraserve"] / by_name["eager"], 2)
    return figures


def hand_over_figures(spec: ModelSpec, device: torch.device) -> dict[str, Any]:
    """KV blocks out of one cache and into another, without the network between them."""
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    caches = [KvCache(spec, layers, num_blocks=_KV_BLOCKS_MOVED, device=device) for _ in range(2)]
    blocks = tuple(range(_KV_BLOCKS_MOVED))
    importer = KvImporter(caches[1])
    moved_bytes = 0

    def send(_address: str, message: Message) -> None:
        nonlocal moved_bytes
        assert isinstance(message, KvBlocks)
        moved_bytes = len(message.payload)
        importer.write(message, blocks)

    exporter = KvExporter(caches[0], layers, send)
    export = Export(address="", ticket=0, first=0, blocks=blocks)
    seconds = _seconds(lambda: exporter.send([export]), device)
    return {"kv_hand_over_gb_per_s": round(moved_bytes / seconds / 1e9, 2)}


# ---- real Triton ----


def cluster_figures(model: Path, device: torch.device, console: Console) -> dict[str, Any]:
    """Cold starts of 1, 2 and 4 stages, each a process on the one device; greedy ids must agree."""
    files = files_of(NAME, os.environ)
    layout = make_layout(
        UpOptions(name=NAME, nodes=max(STAGES), tier_bytes=0),
        files,
        available_bytes=available_bytes(Path("/proc")),
        cores=os.cpu_count() or 1,
    )
    try:
        up(layout, lambda _step: None)
        source = put_into_bucket(layout, model, NAME)
        token = files.token.read_text(encoding="utf-8")
        with SchedulerClient(layout.scheduler_address, token) as client:
            answers = {
                stages: _start(layout, client, source, stages, device, console) for stages in STAGES
            }
    finally:
        down(files, delete=True)
    agree = len({token_ids for _, token_ids in answers.values()}) == 1
    starts = {f"cold_start_{stages}_s": round(ttft_s, 2) for stages, (ttft_s, _) in answers.items()}
    return starts | {"stages_agree": float(agree)}


def _start(
    layout: ClusterLayout,
    client: SchedulerClient,
    source: str,
    stages: int,
    device: torch.device,
    console: Console,
) -> tuple[float, tuple[int, ...]]:
    name = f"gpu-{stages}"
    client.deploy(
        pb.DeploymentSpec(
            name=name,
            source=source,
            device=device.type,
            max_stages=stages,
            max_context=512,
            keep_alive_s=_KEEP_ALIVE_S,
            consolidate=False,
        )
    )
    answer = ask(layout, name, _PROMPT, _MAX_TOKENS)
    console.print(timeline.render(cold_start(client, name), width=console.width))
    wait_for_zero(layout, client, name, timeout_s=HANG_S)
    return answer.ttft_s, answer.token_ids


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench_gpu", description="The GPU path on one GPU.")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="7b", choices=sorted(SHAPES))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
