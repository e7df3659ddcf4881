from __future__ import annotations

import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.gateway.kserve.raw_tensors import decode, encode, string_bounds

_VALUES = {
    "BOOL": st.booleans(),
    "INT32": st.integers(-(2**31), 2**31 - 1),
    "INT64": st.integers(-(2**63), 2**63 - 1),
    "UINT32": st.integers(0, 2**32 - 1),
    "UINT64": st.integers(0, 2**64 - 1),
    "FP32": st.floats(width=32, allow_nan=False),
    "BYTES": st.text(),
}


@given(st.data(), st.sampled_from(sorted(_VALUES)))
def test_what_is_encoded_decodes_to_the_same(data: st.DataObject, datatype: str) -> None:
    values = data.draw(st.lists(_VALUES[datatype]))
    assert decode(datatype, encode("x", datatype, values)) == values


@given(st.binary(max_size=64))
def test_string_bounds_cover_the_bytes_or_are_refused(raw: bytes) -> None:
    try:
        bounds = list(string_bounds(raw))
    except InvalidRequest:
        return
    position = 0
    for start, end in bounds:
        assert start == position + 4
        assert end - start == struct.unpack_from("<I", raw, position)[0]
        position = end
    assert position == len(raw)


@pytest.mark.parametrize("raw", [b"\x01", b"\x02\0\0\0a", b"\xff\xff\xff\xffabc"])
def test_a_string_that_is_cut_off_is_refused(raw: bytes) -> None:
    with pytest.raises(InvalidRequest, match=r"cut off|does not fit"):
        list(string_bounds(raw))


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("BOOL", 1),
        ("INT32", 1.0),
        ("INT32", True),
        ("INT32", 2**31),
        ("UINT32", -1),
        ("UINT64", 2**64),
        ("FP32", "1"),
        ("FP32", True),
        ("FP32", 1e39),
        ("BYTES", 1),
        ("BYTES", ["nested"]),
        ("BYTES", "\ud800"),
    ],
)
def test_a_value_of_another_kind_or_range_is_refused_by_name(datatype: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match="Input 'limit'"):
        encode("limit", datatype, [value])


def test_a_whole_number_is_a_fine_float() -> None:
    assert math.isclose(struct.unpack("<f", encode("x", "FP32", [3]))[0], 3.0)


def test_bytes_that_are_not_whole_elements_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="5 bytes are not whole INT32"):
        decode("INT32", b"12345")
