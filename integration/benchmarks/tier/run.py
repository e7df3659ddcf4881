"""The tiers of a node beside other loaders and the disk itself: GB/s, CPU-s/GB, peak memory.

    python -m integration.benchmarks.tier.run [--megabytes 1500] [--dir DIR]

Each way of reading runs in a process of its own, all in turn several times, and the median counts.
Before each the model's files leave the page cache, and what it will take of the machine's memory is
touched. As root, host memory has huge pages. DIR is on the disk to measure. The last line is JSON;
the exit status is 1 if a target was missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from integration.benchmarks.tier.reads import HELD, WAYS, shards
from integration.benchmarks.tier.whole_model import fetch_whole
from integration.support.checkpoints import LlamaShape, llama_bytes, write_raw_bf16
from integration.support.memory import backed_memory, huge_pages
from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.errors import ParaServeError
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_scheduler.local.layout import SHM

REPEATS = 3
_SHAPE = LlamaShape(layers=1, hidden=2048, intermediate=5632, heads=16, kv_heads=4)
#: Of the disk's own limit.
LEAST_DISK_SHARE = 0.85
#: A stage's process may take its weights, this share more, and what it takes without any.
MOST_MEMORY_SHARE = 1.15


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What one process reported."""

    gb_per_s: float
    cpu_s_per_gb: float
    base_bytes: int
    peak_bytes: int


def main() -> int:
    arguments = _parse()
    with huge_pages(), prepared(arguments.dir, arguments.megabytes * 1_000_000) as (model, node):
        size_bytes = sum(path.stat().st_size for path in shards(model))
        reads: dict[str, list[Read]] = {way: [] for way in _ways()}
        for _ in range(REPEATS):
            for way, done in reads.items():
                done.append(_read(way, model, node, size_bytes))
                _say(way, done[-1])
    result = summary(reads, size_bytes)
    sys.stdout.write(json.dumps(result) + "\n")
    return 0 if result["met"] else 1


def _ways() -> list[str]:
    if importlib.util.find_spec("fastsafetensors") is not None:
        return list(WAYS)
    sys.stdout.write("fastsafetensors is left out: pip install -e '.[bench]'\n")
    return [way for way in WAYS if way != "fastsafetensors_disk"]


@contextmanager
def prepared(folder: Path, size_bytes: int) -> Iterator[tuple[Path, Path]]:
    """Make a model, and a node that has it in memory, on disk, and as files in memory."""
    node = Path(tempfile.mkdtemp(prefix="paraserve-bench-", dir=SHM))
    on_disk = Path(tempfile.mkdtemp(prefix="paraserve-bench-", dir=folder))
    try:
        model = on_disk / "model"
        write_raw_bf16(model, _shape(size_bytes), shard_bytes=size_bytes // 2)
        (on_disk / "tier").mkdir()
        (node / "disk").symlink_to(on_disk / "tier")
        shutil.copytree(model, node / "copy")
        _fill(model, node)
        yield model, node
    finally:
        shutil.rmtree(on_disk)
        shutil.rmtree(node)


def _shape(size_bytes: int) -> LlamaShape:
    """Return a model of about so many bytes."""
    one, two = (llama_bytes(replace(_SHAPE, layers=layers)) for layers in (1, 2))
    return replace(_SHAPE, layers=max(1, (size_bytes - one) // (two - one) + 1))


def _fill(model: Path, node: Path) -> None:
    """Fetch the model as an agent does, and let it come to disk as in idle time."""
    tier = Tier.open(node / "memory")
    disk = DiskTier.open(node / "disk", disk_bytes=1 << 40)
    fetch_whole(model, tier, HELD)
    upkeep = DiskUpkeep(tier, disk)
    while upkeep.write_next():
        pass
    disk.close()
    tier.close()


def _read(way: str, model: Path, node: Path, size_bytes: int) -> Read:
    for path in shards(model):
        _leave_page_cache(path)
    command = [
        sys.executable,
        "-m",
        "integration.benchmarks.tier.reads",
        way,
        str(model),
        str(node),
    ]
    with backed_memory(2 * size_bytes):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    for cold in node.glob("cold-*"):
        shutil.rmtree(cold)
    if done.returncode != 0:
        raise ParaServeError(f"{way} ended with status {done.returncode}; see above.")
    report = json.loads(done.stdout)
    return Read(
        gb_per_s=size_bytes / report["seconds"] / 1e9,
        cpu_s_per_gb=report["cpu_s"] / size_bytes * 1e9,
        base_bytes=report["base_bytes"],
        peak_bytes=report["peak_bytes"],
    )


def _leave_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _say(way: str, read: Read) -> None:
    sys.stdout.write(
        f"{way:>21}: {read.gb_per_s:6.2f} GB/s, {read.cpu_s_per_gb:.3f} CPU-s/GB, "
        f"peak {read.peak_bytes / 1e6:.0f} MB\n"
    )
    sys.stdout.flush()


def summary(reads: Mapping[str, Sequence[Read]], size_bytes: int) -> dict[str, object]:
    """Return the last line: medians, and the targets with what they compare."""
    figures = {
        way: {
            "gb_per_s": round(statistics.median(each.gb_per_s for each in done), 3),
            "cpu_s_per_gb": round(statistics.median(each.cpu_s_per_gb for each in done), 3),
            "peak_mb": round(max(each.peak_bytes for each in done) / 1e6, 1),
        }
        for way, done in reads.items()
    }
    rate = {way: each["gb_per_s"] for way, each in figures.items()}
    stage = reads["stage"]
    floor_bytes = max(each.base_bytes for each in stage)
    least = {
        "disk_tier": round(LEAST_DISK_SHARE * rate["direct"], 3),
        "disk_to_tensors": max(rate[way] for way in _others(rate)),
        "memory_tier": rate["load_file_memory"],
    }
    most_mb = (MOST_MEMORY_SHARE * size_bytes + floor_bytes) / 1e6
    missed = [way for way, wanted in least.items() if rate[way] < wanted]
    if figures["stage"]["peak_mb"] > most_mb:
        missed.append("stage_peak_mb")
    return {
        "bench": "tier",
        "megabytes": round(size_bytes / 1e6, 1),
        "figures": figures,
        "targets": {"gb_per_s": least, "stage_peak_mb": round(most_mb, 1)},
        "missed": missed,
        "met": not missed,
    }


def _others(rate: Mapping[str, float]) -> list[str]:
    return [way for way in ("load_file_disk", "fastsafetensors_disk") if way in rate]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The tiers of a node beside other loaders.")
    parser.add_argument("--megabytes", type=int, default=1500, help="of the model")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"), help="on the disk to measure")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
