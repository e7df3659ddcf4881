"""Arithmetic on sets of half-open byte ranges `[start, end)`: union, difference, cuts. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

#: Bytes `[start, end)`.
Span = tuple[int, int]


def merge(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Return the union as sorted, disjoint, non-adjacent, non-empty spans."""
    merged: list[Span] = []
    for start, end in sorted(span for span in spans if span[0] < span[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(merged)


def cut(span: Span, step: int) -> Iterator[Span]:
    """Cut a span at all multiples of `step`, so that spans which overlap have pieces in common."""
    start, end = span
    for at in range(start // step * step, end, step):
        yield (max(start, at), min(end, at + step))


def subtract(spans: Sequence[Span], removed: Sequence[Span]) -> tuple[Span, ...]:
    """Return what is in `spans` but not in `removed`; all three are merged."""
    left: list[Span] = []
    for start, end in spans:
        position = start
        for removed_start, removed_end in removed:
            if removed_end <= position or removed_start >= end:
                continue
            left.append((position, removed_start))
            position = removed_end
        left.append((position, end))
    return merge(left)


def within(span: Span, spans: Sequence[Span]) -> bool:
    """Whether all of `span` lies in the merged `spans`."""
    at = bisect_right(spans, (span[0], span[0])) - 1
    candidates = spans[max(at, 0) : at + 2]
    return any(start <= span[0] and span[1] <= end for start, end in candidates)
