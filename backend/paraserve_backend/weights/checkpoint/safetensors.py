"""The safetensors format: reads a header and checks it against the file.

A file is 8 bytes of header length (little-endian), a JSON header, then the tensors without gaps.
Pure: `checkpoint.index` reads the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any

import msgspec

from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.weights.sources.base import StoredObject

LENGTH_BYTES = 8
#: What the format allows; a longer header is a damaged or hostile file.
MAX_HEADER_BYTES = 100_000_000
#: No file has more; a header that claims more could only keep us busy with its numbers.
_MAX_SIZE, _MAX_DIMENSIONS = 2**63 - 1, 64

ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


class TensorEntry(
    msgspec.Struct, frozen=True, kw_only=True, array_like=True, forbid_unknown_fields=True
):
    """Bytes `[start, end)` of an object are one tensor, row-major.

    `dtype` is spelt as safetensors does, e.g. `BF16`. In JSON it is an array of these values in
    this order, since a model may have 100 000 tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    object_key: str
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def header_end(stored: StoredObject, length: bytes) -> int:
    """Return where the tensors begin, from the file's first 8 bytes.

    Raises `InvalidCheckpoint` where no header of that length can be there.
    """
    if len(length) < LENGTH_BYTES:
        raise InvalidCheckpoint(f"{stored.key} is not a safetensors file, replace it")
    size = int.from_bytes(length[:LENGTH_BYTES], "little")
    if size > MAX_HEADER_BYTES:
        raise InvalidCheckpoint(
            f"{stored.key} is not a safetensors file (its header would be {size} bytes, "
            f"{MAX_HEADER_BYTES} at most are allowed), replace it"
        )
    if LENGTH_BYTES + size > stored.size_bytes:
        raise InvalidCheckpoint(
            f"{stored.key} is cut off: its header alone should be {size} bytes, upload it again"
        )
    return LENGTH_BYTES + size


def parse_header(stored: StoredObject, header: bytes) -> tuple[TensorEntry, ...]:
    """Return the tensors of a file, by offset, from its JSON header.

    Raises `InvalidCheckpoint` unless they fill the rest of the file without gap or overlap.
    """
    data_start = LENGTH_BYTES + len(header)
    fields = _parse_json(stored, header)
    fields.pop("__metadata__", None)
    entries = [_parse_entry(stored, name, field, data_start) for name, field in fields.items()]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    _check_contiguous(stored, entries, data_start)
    return tuple(entries)


def _parse_json(stored: StoredObject, header: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(header, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpoint(f"the header of {stored.key} is not valid: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidCheckpoint(f"the header of {stored.key} is not a JSON object")
    if not is_text("".join(fields)):
        raise InvalidCheckpoint(f"the header of {stored.key} has a name that is not valid Unicode")
    return fields


def is_text(name: str) -> bool:
    """Tell whether a name can be written as UTF-8: JSON can spell half of a surrogate pair."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _parse_entry(stored: StoredObject, name: str, field: object, data_start: int) -> TensorEntry:
    match field:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end]} if (
            _are_sizes(shape) and _are_sizes([start, end]) and len(shape) <= _MAX_DIMENSIONS
        ):
            _check_size(stored, name, dtype, shape, end - start)
            return TensorEntry(
                name=name,
                dtype=dtype,
                shape=tuple(shape),
                object_key=stored.key,
                start=data_start + start,
                end=data_start + end,
            )
    raise InvalidCheckpoint(f"the header of {stored.key} describes tensor {name} wrongly")


def _are_sizes(values: list[object]) -> bool:
    # type() and not isinstance(): true is no size.
    return all(type(value) is int and 0 <= value <= _MAX_SIZE for value in values)


def _check_size(
    stored: StoredObject, name: str, dtype: str, shape: list[int], size_bytes: int
) -> None:
    if dtype not in ITEM_BYTES:
        # A newer type than we know: whoever needs the tensor says so.
        return
    expected = prod(shape) * ITEM_BYTES[dtype]
    if size_bytes != expected:
        raise InvalidCheckpoint(
            f"tensor {name} in {stored.key} has {size_bytes} bytes, its shape {shape} of {dtype} "
            f"needs {expected}"
        )


def _check_contiguous(stored: StoredObject, entries: list[TensorEntry], data_start: int) -> None:
    position = data_start
    for entry in entries:
        if entry.start != position:
            what = "overlaps another tensor" if entry.start < position else "leaves a gap before it"
            raise InvalidCheckpoint(f"tensor {entry.name} in {stored.key} {what}")
        position = entry.end
    if position > stored.size_bytes:
        raise InvalidCheckpoint(
            f"{stored.key} is cut off: {stored.size_bytes} bytes of {position}, upload it again"
        )
    if position < stored.size_bytes:
        raise InvalidCheckpoint(
            f"{stored.key} has {stored.size_bytes - position} bytes that belong to no tensor"
        )
