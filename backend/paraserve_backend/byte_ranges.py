"""Arithmetic on sets of half-open byte ranges `[start, end)`: union, difference, cuts. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

#: Bytes `[start, end)`.
ByteRange = tuple[int, int]


def merge(byte_ranges: Iterable[ByteRange]) -> tuple[ByteRange, ...]:
    """Return the union as sorted, disjoint, non-adjacent, non-empty ranges."""
    merged: list[ByteRange] = []
    for start, end in sorted(range_ for range_ in byte_ranges if range_[0] < range_[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def cut(byte_range: ByteRange, step: int) -> Iterator[ByteRange]:
    """Cut a range at all multiples of `step`, so that overlapping ranges have pieces in common."""
    start, end = byte_range
    for at in range(start // step * step, end, step):
        yield (max(start, at), min(end, at + step))


def subtract(
    byte_ranges: Sequence[ByteRange], removed: Sequence[ByteRange]
) -> tuple[ByteRange, ...]:
    """Return what is in `byte_ranges` but not in `removed`; all three are merged."""
    left: list[ByteRange] = []
    for start, end in byte_ranges:
        position = start
        for removed_start, removed_end in removed:
            if removed_end <= position or removed_start >= end:
                continue
            left.append((position, removed_start))
            position = removed_end
        left.append((position, end))
    return merge(left)


def within(byte_range: ByteRange, byte_ranges: Sequence[ByteRange]) -> bool:
    """Whether all of `byte_range` lies in the merged `byte_ranges`."""
    at = bisect_right(byte_ranges, (byte_range[0], byte_range[0])) - 1
    candidates = byte_ranges[max(at, 0) : at + 2]
    return any(start <= byte_range[0] and byte_range[1] <= end for start, end in candidates)
