"""Every byte of a checkpoint's objects, headers too, for engines that read safetensors files.

Our own engine needs tensors only and leaves holes in the tier's files. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.sources.base import StoredObject

#: Begins the names of bytes that are no tensor of the model, as no tensor's name does.
_FILLER = "\0bytes/"


def whole_objects(index: CheckpointIndex) -> tuple[TensorEntry, ...]:
    """Return the index's tensors as they are stored, and entries for all bytes between them.

    It takes the place of `stage_tensors` in `plan_fetch`: the objects of such a plan have no holes.
    """
    return tuple(entry for stored in index.objects for entry in _entries(index, stored))


def model_tensors(plan: FetchPlan) -> Iterator[TensorEntry]:
    """Yield what `plan` has of the model itself."""
    return (entry for entry in plan.tensors if not entry.name.startswith(_FILLER))


def has_whole_objects(plan: FetchPlan) -> bool:
    size_bytes = sum(stored.size_bytes for stored in plan.objects)
    # Tensors of a plan never overlap.
    return plan.total_bytes == size_bytes


def _entries(index: CheckpointIndex, stored: StoredObject) -> Iterator[TensorEntry]:
    tensors = [tensor for tensor in index.tensors.values() if tensor.object_key == stored.key]
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start > position:
            yield _filler(stored, position, tensor.start)
        yield tensor
        position = tensor.end
    if position < stored.size_bytes:
        yield _filler(stored, position, stored.size_bytes)


def _filler(stored: StoredObject, start: int, end: int) -> TensorEntry:
    return TensorEntry(
        name=f"{_FILLER}{stored.key}/{start}",
        dtype="U8",
        shape=(end - start,),
        object_key=stored.key,
        start=start,
        end=end,
    )
