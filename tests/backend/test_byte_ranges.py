from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.byte_ranges import (
    Span,
    merge,
    subtract,
    within,
)

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)).map(lambda it: (it[0], sum(it))))


def members(some: tuple[Span, ...] | list[Span]) -> set[int]:
    return {position for start, end in some for position in range(start, end)}


@given(spans)
def test_merge_keeps_the_set_and_leaves_gaps_between_spans(some: list[Span]) -> None:
    merged = merge(some)
    assert members(merged) == members(some)
    assert all(start < end for start, end in merged)
    assert all(left[1] < right[0] for left, right in pairwise(merged))


@given(spans, spans)
def test_subtract_is_the_difference_of_sets(some: list[Span], removed: list[Span]) -> None:
    assert members(subtract(merge(some), merge(removed))) == members(some) - members(removed)


@given(spans, st.integers(0, 50), st.integers(1, 12))
def test_within_is_the_subset_relation(some: list[Span], start: int, length: int) -> None:
    span = (start, start + length)
    assert within(span, merge(some)) == (members([span]) <= members(some))
