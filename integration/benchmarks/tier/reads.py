"""One way of bench_tier to read a model, in a process of its own.

    python -m integration.benchmarks.tier.reads WAY MODEL_FOLDER NODE_FOLDER

NODE_FOLDER is what `prepare` in bench_tier made. It reports one JSON object: seconds and processor
time of the read, peak memory of the process, and what it had before. Imports are not timed.
"""

from __future__ import annotations

import json
import mmap
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.engines.native.model.load import load_engine
from paraserve_backend.engines.native.model.weights import WeightLoader
from paraserve_backend.errors import SourceUnavailable
from paraserve_backend.protocol.forward import ForwardBatch, Row
from paraserve_backend.protocol.parameters import KvConfig
from paraserve_backend.protocol.run_dir import TierDir
from paraserve_backend.protocol.sampling import Sampling
from paraserve_backend.roles.weights import Fetched, read_spec
from paraserve_backend.telemetry.spans import SpanFile
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.fetching.fetch import fetch
from paraserve_backend.weights.sources.base import FOLDERS, StoredObject
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.layout import Manifest
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader

#: The fetch that `prepare` leaves in the host-memory tier.
HELD = "held"
_STEP_BYTES = 8 << 20
_THREADS = 2
_PAGE_BYTES = 4096
_TIMEOUT_S = 600.0
_CPU = torch.device("cpu")

Tensors = Iterable[torch.Tensor]


def main() -> None:
    way, model, node = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    read = WAYS[way](model, node)
    base_bytes = peak_bytes()
    cpu_s, began_s = _cpu_s(), time.monotonic()
    for tensor in read():
        touch(tensor)
    seconds, cpu_s = time.monotonic() - began_s, _cpu_s() - cpu_s
    report = {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "base_bytes": base_bytes,
        "peak_bytes": peak_bytes(),
    }
    sys.stdout.write(json.dumps(report) + "\n")


def peak_bytes() -> int:
    """Return the most memory that this process had resident, shared pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def touch(tensor: torch.Tensor) -> None:
    """Read a byte of every page: a mapped tensor is not in memory before."""
    tensor.reshape(-1).view(torch.uint8)[::_PAGE_BYTES].sum()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_directly(model: Path, node: Path) -> Callable[[], Tensors]:
    """The disk's own limit."""
    return lambda: _read_files(model, os.O_DIRECT)


def read_buffered(model: Path, node: Path) -> Callable[[], Tensors]:
    return lambda: _read_files(model, 0)


def _read_files(model: Path, flags: int) -> Tensors:
    steps = [
        (path, at) for path in shards(model) for at in range(0, path.stat().st_size, _STEP_BYTES)
    ]

    def work(number: int) -> None:
        buffer = mmap.mmap(-1, _STEP_BYTES)
        for path, at in steps[number::_THREADS]:
            fd = os.open(path, os.O_RDONLY | flags)
            os.preadv(fd, [buffer], at)
            os.close(fd)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(_THREADS)))
    return ()


def disk_tier(model: Path, node: Path) -> Callable[[], Tensors]:
    """Our disk tier, until everything is in the host-memory tier."""
    disk, tier, plan = _cold(node)

    def read() -> Tensors:
        _fetch(disk, tier, plan)
        return ()

    return read


def disk_to_tensors(model: Path, node: Path) -> Callable[[], Tensors]:
    """The same, with a reader that adopts tensors as they land."""
    disk, tier, plan = _cold(node)
    tier.begin(plan)
    reader = TierReader.open(tier.directory, plan.fetch_id)
    loader = WeightLoader(reader, _CPU)

    def read() -> Tensors:
        fetching = threading.Thread(target=_fetch, args=(disk, tier, plan))
        fetching.start()
        for name in reader.iter_landed([it.name for it in plan.tensors], timeout_s=_TIMEOUT_S):
            yield loader.get(name)
        fetching.join()

    return read


def _cold(node: Path) -> tuple[DiskTier, Tier, FetchPlan]:
    """Open the node's disk tier, and a host-memory tier that has nothing."""
    plan = Manifest.read(TierDir(node / "memory").fetch(HELD)).plan
    disk = DiskTier.open(node / "disk", disk_bytes=1 << 40)
    return disk, Tier.open(node / f"cold-{os.getpid()}"), plan


class _NoStore:
    """Everything is to come from disk."""

    uri = "none:"
    store = FOLDERS

    def list(self) -> tuple[StoredObject, ...]:
        return ()

    def connect(self) -> _NoStore:
        return self

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        raise SourceUnavailable(f"{stored.key} is not on disk")

    def abort(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""


def _fetch(disk: DiskTier, tier: Tier, plan: FetchPlan) -> None:
    fetch(
        tier.begin(plan),
        _NoStore(),
        tier,
        timeout_s=_TIMEOUT_S,
        cancel=threading.Event(),
        disk=disk,
        link_bytes_per_s=1.0,  # the store has nothing to help with
    )


def memory_tier(model: Path, node: Path) -> Callable[[], Tensors]:
    reader = TierReader.open(node / "memory", HELD)
    loader = WeightLoader(reader, _CPU)
    names = [
        tensor.name for tensor in Manifest.read(TierDir(node / "memory").fetch(HELD)).plan.tensors
    ]
    return lambda: [loader.get(name) for name in reader.iter_landed(names, timeout_s=_TIMEOUT_S)]


def safetensors(model: Path, node: Path) -> Callable[[], Tensors]:
    return lambda: [tensor for path in shards(model) for tensor in load_file(path).values()]


def safetensors_in_memory(model: Path, node: Path) -> Callable[[], Tensors]:
    """The files are in /dev/shm."""
    return safetensors(node / "copy", node)


def fastsafetensors(model: Path, node: Path) -> Callable[[], Tensors]:
    package = import_module("fastsafetensors")
    loader = package.SafeTensorsFileLoader(package.SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: [str(path) for path in shards(model)]})

    def read() -> Tensors:
        buffers = loader.copy_files_to_device()
        return [buffers.get_tensor(key) for key in loader.get_keys()]

    return read


def stage(model: Path, node: Path) -> Callable[[], Tensors]:
    """A stage's process with all layers: what it needs of memory beside the weights."""
    tier = TierDir(node / "memory")
    fetched = Fetched(
        reader=TierReader.open(tier.path, HELD),
        spans=SpanFile(tier.spans(HELD)),
        close=lambda: None,
    )
    spec = read_spec(fetched)
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)

    def read() -> Tensors:
        engine = load_engine(
            fetched.reader,
            fetched.spans,
            spec=read_spec(fetched),
            layers=layers,
            kv=KvConfig(num_blocks=4, block_size=16),
            device="cpu",
        )
        row = Row(start=0, num_tokens=8, block_table=(0,), sampling=Sampling())
        engine.step(ForwardBatch(rows=(row,)), torch.arange(8))
        return ()

    return read


#: A way prepares itself and returns what is timed, which gives the tensors to touch.
WAYS: dict[str, Callable[[Path, Path], Callable[[], Tensors]]] = {
    "direct": read_directly,
    "buffered": read_buffered,
    "disk_tier": disk_tier,
    "disk_to_tensors": disk_to_tensors,
    "load_file_disk": safetensors,
    "fastsafetensors_disk": fastsafetensors,
    "memory_tier": memory_tier,
    "load_file_memory": safetensors_in_memory,
    "stage": stage,
}

if __name__ == "__main__":
    main()
