"""The fetch plan: the exact bytes that one node fetches for one stage, and its JSON form. Pure.

Tensors become ranges, ranges become chunks of one request each. For external engines a plan covers
whole files, headers included. Which tensors a stage needs is decided in `checkpoint.stages`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from paraserve_backend.byte_ranges import cut
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.checkpoint.stages import total_bytes_of
from paraserve_backend.weights.sources.base import (
    UNKNOWN_STORE,
    ObjectRange,
    StoredObject,
    StoreIdentity,
    check_key,
)

DEFAULT_PART_BYTES = 8 << 20
_FETCH_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,199}")


def coalesce(tensors: Iterable[TensorEntry]) -> tuple[ObjectRange, ...]:
    """Return the bytes of `tensors` as few ranges, each byte once, in the tensors' order.

    Neighbours in the order that are neighbours in the object become one range, so that what is
    needed first still comes first.
    """
    ranges: list[ObjectRange] = []
    for tensor in tensors:
        last = ranges[-1] if ranges else None
        if tensor.start == tensor.end:
            continue
        if last and (last.object_key, last.end) == (tensor.object_key, tensor.start):
            ranges[-1] = ObjectRange(object_key=last.object_key, start=last.start, end=tensor.end)
        else:
            ranges.append(
                ObjectRange(object_key=tensor.object_key, start=tensor.start, end=tensor.end)
            )
    return tuple(ranges)


def split_parts(
    ranges: Iterable[ObjectRange], part_bytes: int = DEFAULT_PART_BYTES
) -> tuple[ObjectRange, ...]:
    """Cut ranges into parts of at most `part_bytes`: what one request fetches.

    Parts end at multiples of it in their object, so that plans with other layers share them.
    """
    return tuple(
        ObjectRange(object_key=whole.object_key, start=start, end=end)
        for whole in ranges
        for start, end in cut((whole.start, whole.end), part_bytes)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPlan:
    """What one node fetches for one stage, from one source.

    `tensors` are in the order in which they are wanted; `objects` are the objects they lie in;
    `files` are fetched whole. `dtype` is the index's: a stage cannot tell it from its own tensors
    alone. Raises `InvalidRequest` where it contradicts itself, since it also
    comes from the network.
    """

    fetch_id: str
    source_uri: str
    objects: tuple[StoredObject, ...]
    tensors: tuple[TensorEntry, ...]
    files: tuple[StoredObject, ...]
    dtype: str = ""
    #: What the source is to the node that fetches, which fills it in: its environment may name
    #: another endpoint and other credentials than the scheduler's.
    store: StoreIdentity = UNKNOWN_STORE

    def __post_init__(self) -> None:
        if not _FETCH_ID.fullmatch(self.fetch_id):
            raise InvalidRequest(f"fetch id {self.fetch_id!r} may only have a-z, 0-9, '.' and '-'")
        try:
            for stored in (*self.objects, *self.files):
                check_key(stored.key)
            _check_tensors(self)
        except ValueError as error:
            raise InvalidRequest(f"fetch plan {self.fetch_id} is inconsistent: {error}") from None

    @property
    def ranges(self) -> tuple[ObjectRange, ...]:
        """The bytes of `tensors`, in the order in which they are wanted."""
        return coalesce(self.tensors)

    @property
    def total_bytes(self) -> int:
        """Bytes of `tensors`; the small files are not counted."""
        return total_bytes_of(self.tensors)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, text: bytes) -> FetchPlan:
        """Read what `to_json` wrote; raises `InvalidRequest` for anything else."""
        try:
            return msgspec.json.decode(text, type=cls)
        except ValueError as error:
            raise InvalidRequest(f"not a fetch plan of this version: {error!r}") from None


def plan_fetch(
    index: CheckpointIndex, tensors: Sequence[TensorEntry], *, fetch_id: str
) -> FetchPlan:
    """Plan the fetch of `tensors`, in that order, and of the small files."""
    used = {tensor.object_key for tensor in tensors}
    return FetchPlan(
        fetch_id=fetch_id,
        source_uri=index.source_uri,
        objects=tuple(stored for stored in index.objects if stored.key in used),
        tensors=tuple(tensors),
        files=index.files,
        dtype=index.dtype,
        store=index.store,
    )


def _check_tensors(plan: FetchPlan) -> None:
    """Raise `ValueError` unless every tensor is where the plan's objects have bytes for it."""
    sizes = {stored.key: stored.size_bytes for stored in plan.objects}
    if len({tensor.name for tensor in plan.tensors}) != len(plan.tensors):
        raise ValueError("a tensor is named twice")
    ends = dict.fromkeys(sizes, 0)
    for tensor in sorted(plan.tensors, key=lambda tensor: (tensor.start, tensor.end)):
        key = tensor.object_key
        if key not in sizes or not ends[key] <= tensor.start <= tensor.end <= sizes[key]:
            raise ValueError(f"tensor {tensor.name} overlaps another or is outside its object")
        ends[key] = tensor.end


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
