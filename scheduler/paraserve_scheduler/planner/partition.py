"""Which places take a model's stages, and which layers each, so that the latest is earliest. Pure.

A place says after how many seconds it has layers `[a, b)` ready; more layers never take less. First
the places are chosen as if layers were divisible, where that is exact; then the best cut into whole
layers is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

#: Up to so many stages `cut` looks at every order of the places.
_EXACT_STAGES = 4
_BISECTIONS = 40
#: A search ends when at most this part of the time found could still be saved.
_CLOSE_ENOUGH = 1e-3
#: A cut into whole layers is mostly ready within so many times the time of divisible ones.
_FIRST_TRY = 1.1
#: A cold start that takes longer is none.
_LONGEST_S = 1e5


class Place(Protocol):
    """Where a stage could go. Both must be monotone: a larger range never comes earlier."""

    def ready_s(self, start: int, end: int) -> float:
        """Seconds until layers `[start, end)` are ready; infinity where they do not fit."""

    def bytes_by(self, seconds: float) -> float:
        """The most bytes of weights that can be ready there by then."""


PlaceT = TypeVar("PlaceT", bound=Place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut(Generic[PlaceT]):
    """Places in the order of their layers; `bounds[i]` and `bounds[i + 1]` are place i's."""

    places: tuple[PlaceT, ...]
    bounds: tuple[int, ...]
    latest_s: float


def cut(
    places: Sequence[PlaceT],
    num_layers: int,
    *,
    heads: frozenset[int] | None = None,
    not_before_s: float = 0.0,
) -> Cut[PlaceT] | None:
    """Share `num_layers` out over all of `places`, at least one layer each.

    No cut is ready before `not_before_s`, as `divisible_s` says; to know that makes it quicker.

    `heads` are the indexes of places that may have the first layers; None: any. With up to four
    places no other order and no other cut is earlier by more than a thousandth; with more the order
    is that of the places as given, the first head moved to the front. None where it does not fit.
    """
    count = len(places)
    if not 1 <= count <= num_layers or heads == frozenset():
        return None
    reach = _Reach(places, num_layers, heads)
    found = reach.within(not_before_s * _FIRST_TRY) or reach.within(_LONGEST_S)
    if found is None:
        return None
    best = _scored(places, *found)
    low = not_before_s
    for _ in range(_BISECTIONS):
        if best.latest_s - low <= best.latest_s * _CLOSE_ENOUGH:
            break
        limit = (low + best.latest_s) / 2
        found = reach.within(limit)
        if found is None:
            low = limit
        else:
            best = _scored(places, *found)
    return _evened(best, num_layers, heads, places)


def _evened(
    best: Cut[PlaceT], num_layers: int, heads: frozenset[int] | None, places: Sequence[PlaceT]
) -> Cut[PlaceT]:
    """The cut that is as early and has the fewest layers in its largest stage.

    Where processes start slower than the network brings weights, many cuts are equally early.
    """
    limit_s = best.latest_s * (1 + _CLOSE_ENOUGH)
    low, high = -(-num_layers // len(places)), max(_lengths(best.bounds))
    while low < high:
        middle = (low + high) // 2
        found = _Reach(places, num_layers, heads, longest=middle).within(limit_s)
        if found is None:
            low = middle + 1
        else:
            best, high = _scored(places, *found), middle
    return best


def _lengths(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _scored(places: Sequence[PlaceT], order: Sequence[int], bounds: Sequence[int]) -> Cut[PlaceT]:
    chosen = tuple(places[index] for index in order)
    latest = max(
        place.ready_s(start, end)
        for place, start, end in zip(chosen, bounds, bounds[1:], strict=False)
    )
    return Cut(places=chosen, bounds=tuple(bounds), latest_s=latest)


class _Reach:
    """How far a set of places gets into the model by a time limit."""

    def __init__(
        self,
        places: Sequence[Place],
        num_layers: int,
        heads: frozenset[int] | None,
        longest: int | None = None,
    ) -> None:
        self.places = places
        #: Most layers of a stage.
        self.longest = num_layers if longest is None else longest
        self.num_layers = num_layers
        self.heads = frozenset(range(len(places))) if heads is None else heads

    def within(self, limit_s: float) -> tuple[list[int], list[int]] | None:
        """An order of the places and bounds that are all ready by `limit_s`."""
        if len(self.places) <= _EXACT_STAGES:
            return _every_order(self, limit_s)
        return _given_order(self, limit_s)

    def extend(self, index: int, start: int, stages_after: int, limit_s: float) -> int | None:
        """The furthest end of a stage that begins at `start` there; None: not even one layer."""
        ready_s = self.places[index].ready_s
        low = start + 1
        high = min(start + self.longest, self.num_layers - stages_after)
        if low > high or ready_s(start, low) > limit_s:
            return None
        while low < high:
            middle = (low + high + 1) // 2
            if ready_s(start, middle) <= limit_s:
                low = middle
            else:
                high = middle - 1
        return low


def _every_order(reach: _Reach, limit_s: float) -> tuple[list[int], list[int]] | None:
    """Over sets of places: the furthest one gets with a set does not depend on the rest.

    Getting further with the same set is never worse, since a place that starts later gets at
    least as far. So 2^n sets are enough instead of n! orders.
    """
    count = len(reach.places)
    best: dict[int, tuple[int, list[int], list[int]]] = {0: (0, [], [0])}
    for used in range(1 << count):
        state = best.get(used)
        if state is None:
            continue
        at, order, bounds = state
        after = count - len(order) - 1
        for index in range(count):
            if used >> index & 1 or (not order and index not in reach.heads):
                continue
            end = reach.extend(index, at, after, limit_s)
            known = best.get(used | 1 << index)
            if end is not None and (known is None or end > known[0]):
                best[used | 1 << index] = (end, [*order, index], [*bounds, end])
    full = best.get((1 << count) - 1)
    return (full[1], full[2]) if full and full[0] == reach.num_layers else None


def _given_order(reach: _Reach, limit_s: float) -> tuple[list[int], list[int]] | None:
    count = len(reach.places)
    head = min(reach.heads)
    order = [head, *(index for index in range(count) if index != head)]
    bounds = [0]
    for position, index in enumerate(order):
        end = reach.extend(index, bounds[-1], count - position - 1, limit_s)
        if end is None:
            return None
        bounds.append(end)
    return (order, bounds) if bounds[-1] == reach.num_layers else None


def choose_places(
    places: Sequence[PlaceT],
    total_bytes: float,
    stages: int,
    *,
    heads: frozenset[int],
    full: int = 1,
) -> tuple[PlaceT, ...] | None:
    """The `stages` places that could have `total_bytes` of divisible weights ready earliest.

    At least `full` of them are among `heads` (indexes). By a given time each place can have so
    many bytes whatever the others do, so the best set for that time is the one with the most
    bytes; the earliest time at which that is enough is found by bisection, to a thousandth.
    """
    if len(places) < stages or len(heads) < full:
        return None
    low, high = 0.0, 1.0
    while (chosen := _enough_by(high, places, total_bytes, stages, heads, full)) is None:
        low, high = high, high * 2
        if high > _LONGEST_S:
            return None
    while high - low > high * _CLOSE_ENOUGH:
        middle = (low + high) / 2
        found = _enough_by(middle, places, total_bytes, stages, heads, full)
        if found is None:
            low = middle
        else:
            high, chosen = middle, found
    return tuple(places[index] for index in chosen)


def divisible_s(places: Sequence[Place], total_bytes: float) -> float:
    """When these places together have `total_bytes`, were layers divisible; to a thousandth.

    Never later than that; infinity if they never have.
    """
    low, high = 0.0, 1.0
    while sum(place.bytes_by(high) for place in places) < total_bytes:
        low, high = high, high * 2
        if high > _LONGEST_S:
            return float("inf")
    while high - low > high * _CLOSE_ENOUGH:
        middle = (low + high) / 2
        if sum(place.bytes_by(middle) for place in places) < total_bytes:
            low = middle
        else:
            high = middle
    return low


def _enough_by(
    seconds: float,
    places: Sequence[Place],
    total_bytes: float,
    stages: int,
    heads: frozenset[int],
    full: int,
) -> list[int] | None:
    amounts = [place.bytes_by(seconds) for place in places]
    order = sorted(range(len(places)), key=lambda index: (-amounts[index], index))
    best_heads = [index for index in order if index in heads][:full]
    others = [index for index in order if index not in best_heads]
    chosen = best_heads + others[: stages - full]
    return chosen if sum(amounts[index] for index in chosen) >= total_bytes else None
