"""Tensor elements as bytes: the raw form of KServe v2, little-endian, strings length-prefixed."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request_settings import CONTENT, show

Scalar = bool | int | float | str
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True, kw_only=True)
class Datatype:
    """How one KServe datatype is stored."""

    #: Letter of the `struct` module; empty for BYTES, whose elements differ in length.
    letter: str
    size_bytes: int
    #: Field of `InferTensorContents` that holds it.
    contents: str
    #: What JSON may give for it.
    types: tuple[type, ...]

    def pack(self, values: Sequence[object]) -> bytes:
        """Return the raw form of values other than strings."""
        return struct.pack(f"<{len(values)}{self.letter}", *values)


DATATYPES = {
    "BOOL": Datatype(letter="?", size_bytes=1, contents="bool_contents", types=(bool,)),
    "INT32": Datatype(letter="i", size_bytes=4, contents="int_contents", types=(int,)),
    "INT64": Datatype(letter="q", size_bytes=8, contents="int64_contents", types=(int,)),
    "UINT32": Datatype(letter="I", size_bytes=4, contents="uint_contents", types=(int,)),
    "UINT64": Datatype(letter="Q", size_bytes=8, contents="uint64_contents", types=(int,)),
    "FP32": Datatype(letter="f", size_bytes=4, contents="fp32_contents", types=(int, float)),
    "BYTES": Datatype(letter="", size_bytes=0, contents="bytes_contents", types=(str,)),
}


def encode(name: str, datatype: str, values: Sequence[object]) -> bytes:
    """Return the raw form of JSON values.

    Raises:
        InvalidRequest: a value is of another kind or out of range; names the tensor.
    """
    kind = DATATYPES[datatype]
    # The types alone: there may be a million values.
    if not set(map(type, values)) <= set(kind.types):
        value = next(value for value in values if type(value) not in kind.types)
        raise InvalidRequest(f"Input '{name}' takes {datatype} values, not {_shown(name, value)}.")
    if datatype == "BYTES":
        return join_strings([_encoded(name, str(value)) for value in values])
    try:
        return kind.pack(values)
    except (struct.error, OverflowError):
        raise InvalidRequest(f"Input '{name}' has a value out of {datatype}'s range.") from None


def decode(datatype: str, raw: bytes) -> list[Scalar]:
    """Return the elements of a raw tensor as JSON values; strings are taken as UTF-8.

    Raises:
        InvalidRequest: the bytes are not whole elements.
    """
    if datatype == "BYTES":
        return [raw[start:end].decode(errors="replace") for start, end in string_bounds(raw)]
    kind = DATATYPES[datatype]
    count, rest = divmod(len(raw), kind.size_bytes)
    if rest:
        raise InvalidRequest(f"{len(raw)} bytes are not whole {datatype} values.")
    return list(struct.unpack(f"<{count}{kind.letter}", raw))


def string_bounds(raw: bytes) -> Iterator[tuple[int, int]]:
    """Yield where each element of a raw BYTES tensor lies, `[start, end)`.

    Raises:
        InvalidRequest: a length points past the end.
    """
    position = 0
    while position < len(raw):
        start = position + _LENGTH.size
        if start > len(raw):
            raise InvalidRequest("A string's length is cut off.")
        (length,) = _LENGTH.unpack_from(raw, position)
        position = start + length
        if position > len(raw):
            raise InvalidRequest(
                f"A string of {length} bytes does not fit in the {len(raw) - start} bytes left."
            )
        yield start, position


def join_strings(strings: Iterable[bytes]) -> bytes:
    """Return the raw form of a BYTES tensor."""
    return b"".join(_LENGTH.pack(len(string)) + string for string in strings)


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"Input '{name}' has half a surrogate pair in its text.") from None


def _shown(name: str, value: object) -> str:
    """Show a JSON value; of what a prompt is made of, only what kind of value it is."""
    if value is None:
        return "null"
    if name not in CONTENT:
        return show(value)
    kinds = {bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")
