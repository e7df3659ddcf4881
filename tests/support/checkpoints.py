"""Tiny checkpoints of random bytes, written by hand, and indexes that exist only in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path

from paraserve_backend.architectures.spec import LayerRange, TensorNames
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, plan_fetch
from paraserve_backend.weights.checkpoint.index import CheckpointIndex, read_index
from paraserve_backend.weights.checkpoint.safetensors import ITEM_BYTES, TensorEntry
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_backend.weights.sources.base import FOLDERS, Source, StoredObject
from paraserve_backend.weights.sources.open import open_source
from paraserve_backend.weights.tiers.writer import TierFetch

NAMES = TensorNames(
    layer_prefix="model.layers.",
    embedding=("model.embed_tokens.weight",),
    final=("model.norm.weight",),
    head="lm_head.weight",
)
Header = dict[str, dict[str, object]]


def tensor_shapes(
    num_layers: int = 4, *, tied: bool = False, width: int = 16
) -> dict[str, tuple[int, ...]]:
    """Return the F32 tensors of a tiny model; layers differ in size."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (64, width)}
    for layer in range(num_layers):
        shapes[f"model.layers.{layer}.attn.weight"] = (16 + layer, width)
        shapes[f"model.layers.{layer}.norm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not tied:
        shapes["lm_head.weight"] = (64, width)
    return shapes


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "F32") -> Header:
    """Return the header of a file that holds these tensors back to back, in order."""
    header: Header = {}
    position = 0
    for name, shape in shapes.items():
        end = position + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return header


def safetensors_file(header: Header | bytes, data: bytes) -> bytes:
    """Return a file; a header given as bytes is taken as it is, else it is padded to 8 bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if not isinstance(header, bytes):
        text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def write_shard(path: Path, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> None:
    size_bytes = sum(prod(shape) * 4 for shape in shapes.values())
    data = random.Random(seed).randbytes(size_bytes)
    path.write_bytes(safetensors_file(header_of(shapes), data))


def write_checkpoint(
    folder: Path, *, num_layers: int = 4, shards: int = 1, tied: bool = False, width: int = 16
) -> Path:
    """Write a model folder whose tensors are dealt out to `shards` files in name order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": num_layers}))
    (folder / "tokenizer.json").write_text('{"model": {}}')
    names = sorted(shapes := tensor_shapes(num_layers, tied=tied, width=width))
    if shards == 1:
        write_shard(folder / "model.safetensors", {name: shapes[name] for name in names})
        return folder
    weight_map: dict[str, str] = {}
    bounds = [len(names) * shard // shards for shard in range(shards + 1)]
    for shard, (start, end) in enumerate(pairwise(bounds)):
        key = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        write_shard(folder / key, {name: shapes[name] for name in names[start:end]}, seed=shard)
        weight_map |= dict.fromkeys(names[start:end], key)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def tensor_bytes(folder: Path, tensor: TensorEntry) -> bytes:
    """Return what a tensor's bytes must be, read straight from the file."""
    return (folder / tensor.object_key).read_bytes()[tensor.start : tensor.end]


def make_plan(
    model: Path | Source, *, fetch_id: str = "fetch-1", layers: tuple[int, int] | None = None
) -> FetchPlan:
    """Plan the fetch of a model's layers `[start, end)`, or of all."""
    index = read_index(open_source(str(model)) if isinstance(model, Path) else model)
    total = int(index.config["num_hidden_layers"])
    start, end = layers or (0, total)
    stage = LayerRange(start=start, end=end, total=total)
    tied = NAMES.head not in index.tensors
    return plan_fetch(
        index, stage_tensors(index, NAMES, tied=tied, layers=stage), fetch_id=fetch_id
    )


def land(fetch: TierFetch, folder: Path, parts: Iterable[int] | None = None) -> None:
    """Put parts in place, all that are missing by default, and the small files."""
    for number in fetch.missing_parts() if parts is None else parts:
        part = fetch.parts[number]
        content = (folder / part.object_key).read_bytes()[part.start : part.end]
        fetch.write_part(number, memoryview(content))
    for stored in fetch.missing_files():
        fetch.write_file(stored.key, (folder / stored.key).read_bytes())


def make_index(sizes_bytes: Mapping[str, int], *, objects: int = 1) -> CheckpointIndex:
    """Return an index of U8 tensors of these sizes, dealt out to objects in turn."""
    ends = [8] * objects
    tensors: dict[str, TensorEntry] = {}
    for number, (name, size) in enumerate(sizes_bytes.items()):
        at = number % objects
        tensors[name] = TensorEntry(
            name=name,
            dtype="U8",
            shape=(size,),
            object_key=f"object-{at}",
            start=ends[at],
            end=ends[at] + size,
        )
        ends[at] += size
    stored = [
        StoredObject(key=f"object-{at}", size_bytes=end, version="1") for at, end in enumerate(ends)
    ]
    return CheckpointIndex(
        source_uri="/model",
        config={},
        files=(),
        objects=tuple(stored),
        tensors=tensors,
        store=FOLDERS,
    )
