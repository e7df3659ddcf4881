from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.byte_ranges import (
    ByteRange,
    merge,
    subtract,
    within,
)

byte_ranges = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda it: (it[0], sum(it)))
)


def members(some: tuple[ByteRange, ...] | list[ByteRange]) -> set[int]:
    return {position for start, end in some for position in range(start, end)}


@given(byte_ranges)
def test_merge_keeps_the_set_and_leaves_gaps_between_ranges(some: list[ByteRange]) -> None:
    merged = merge(some)
    assert members(merged) == members(some)
    assert all(start < end for start, end in merged)
    assert all(left[1] < right[0] for left, right in pairwise(merged))


@given(byte_ranges, byte_ranges)
def test_subtract_is_the_difference_of_sets(
    some: list[ByteRange], removed: list[ByteRange]
) -> None:
    assert members(subtract(merge(some), merge(removed))) == members(some) - members(removed)


@given(byte_ranges, st.integers(0, 50), st.integers(1, 12))
def test_within_is_the_subset_relation(some: list[ByteRange], start: int, length: int) -> None:
    byte_range = (start, start + length)
    assert within(byte_range, merge(some)) == (members([byte_range]) <= members(some))
