"""Whatever a header holds is read or refused by us."""

from __future__ import annotations

import contextlib
import json

from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.weights.checkpoint.safetensors import (
    LENGTH_BYTES,
    header_end,
    parse_header,
)
from paraserve_backend.weights.sources.base import StoredObject
from tests.support.checkpoints import header_of, safetensors_file

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
FILE = safetensors_file(header_of(SHAPES), bytes(44))

NUMBERS = st.integers() | st.sampled_from([0, -1, 2**31, 2**63, 2**64, 10**40])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4_NEW", ""]) | ANYTHING,
        "shape": st.lists(NUMBERS, max_size=3) | ANYTHING,
        "data_offsets": st.lists(NUMBERS, max_size=3) | ANYTHING,
    }
)


def read(content: bytes) -> None:
    """Read a file's header; what it says must lie within the file."""
    stored = StoredObject(key="model.safetensors", size_bytes=len(content), version="1")
    with contextlib.suppress(InvalidCheckpoint):
        end = header_end(stored, content[:LENGTH_BYTES])
        for entry in parse_header(stored, content[LENGTH_BYTES:end]):
            assert end <= entry.start <= entry.end <= len(content)


@given(
    header=st.dictionaries(st.text(max_size=4), ENTRIES | ANYTHING, max_size=4),
    size_bytes=st.integers(0, 64),
)
def test_a_header_of_any_json(header: dict[str, object], size_bytes: int) -> None:
    read(safetensors_file(json.dumps(header).encode(), bytes(size_bytes)))


@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), min_size=1, max_size=4
    ),
    end=st.integers(0, len(FILE)),
)
def test_a_file_with_some_bytes_changed_and_the_end_cut_off(
    changes: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(FILE)
    for position, value in changes:
        content[position] = value
    read(bytes(content))
    read(bytes(content[:end]))
