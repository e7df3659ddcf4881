from __future__ import annotations

from itertools import combinations, permutations
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_scheduler.planner.partition import choose_places, cut, divisible_s
from paraserve_scheduler.policies.baseline_rules import equal_bounds

LAYER = 10


class _Place:
    """Layers of equal size fetched at `rate`; none fits beyond `room` layers."""

    def __init__(self, rate: float, delay_s: float = 0.0, room: int = 99) -> None:
        self.rate, self.delay_s, self.room = rate, delay_s, room

    def ready_s(self, start: int, end: int) -> float:
        layers = end - start
        return inf if layers > self.room else self.delay_s + layers * LAYER / self.rate

    def bytes_by(self, seconds: float) -> float:
        return min(self.room * LAYER, max(0.0, seconds - self.delay_s) * self.rate)


_PLACES = st.lists(
    st.builds(_Place, st.floats(0.5, 20), st.floats(0, 5), st.integers(1, 12)),
    min_size=1,
    max_size=4,
)


def _brute_force(places: list[_Place], layers: int, heads: set[int]) -> float:
    best = inf
    for order in permutations(range(len(places))):
        if order[0] not in heads:
            continue
        for inner in combinations(range(1, layers), len(places) - 1):
            bounds = (0, *inner, layers)
            times = [
                places[place].ready_s(bounds[i], bounds[i + 1]) for i, place in enumerate(order)
            ]
            best = min(best, max(times))
    return best


@settings(deadline=None)
@given(_PLACES, st.integers(1, 9), st.data())
def test_no_other_cut_or_order_is_earlier(
    places: list[_Place], layers: int, data: st.DataObject
) -> None:
    heads = data.draw(st.sets(st.integers(0, len(places) - 1), min_size=1))
    bound_s = data.draw(st.sampled_from([0.0, divisible_s(places, layers * LAYER)]))
    found = cut(places, layers, heads=frozenset(heads), not_before_s=min(bound_s, 1e5))
    best = _brute_force(places, layers, heads)
    if found is None:
        assert best == inf
    else:
        assert found.latest_s <= best * 1.002


@settings(deadline=None)
@given(_PLACES, st.integers(1, 40))
def test_every_layer_is_placed_exactly_once(places: list[_Place], layers: int) -> None:
    found = cut(places, layers)
    if found is not None:
        assert found.bounds[0] == 0
        assert found.bounds[-1] == layers
        assert list(found.bounds) == sorted(set(found.bounds)), "no stage is empty"
        assert sorted(map(id, found.places)) == sorted(map(id, places))


def test_faster_nodes_get_more_layers() -> None:
    found = cut([_Place(10), _Place(30)], 40)
    assert found is not None
    assert sorted(b - a for a, b in zip(found.bounds, found.bounds[1:], strict=False)) == [10, 30]


@pytest.mark.parametrize("count", [5, 6, 8])
def test_with_many_places_the_cut_is_close_to_the_divisible_bound(count: int) -> None:
    places = [_Place(1.0 + index) for index in range(count)]
    found = cut(places, 80)
    assert found is not None
    bound = 80 * LAYER / sum(place.rate for place in places)
    # One layer more than its share on the slowest place.
    assert found.latest_s <= bound + LAYER / places[0].rate


def test_a_place_without_room_for_one_layer_fits_nothing() -> None:
    assert cut([_Place(1, room=0)], 4) is None
    assert cut([_Place(1), _Place(1)], 1) is None


@settings(deadline=None)
@given(
    st.lists(
        st.builds(_Place, st.floats(0.5, 20), st.floats(0, 5), st.integers(1, 40)),
        min_size=1,
        max_size=7,
    ),
    st.integers(1, 4),
    st.data(),
)
def test_no_other_set_could_have_the_bytes_earlier(
    places: list[_Place], stages: int, data: st.DataObject
) -> None:
    heads = frozenset(data.draw(st.sets(st.integers(0, len(places) - 1), min_size=1)))
    total = 20 * LAYER
    found = choose_places(places, total, stages, heads=heads)
    others = [chosen for chosen in combinations(range(len(places)), stages) if heads & set(chosen)]
    best = min((_divisible_s([places[i] for i in chosen], total) for chosen in others), default=inf)
    if found is None:
        assert best == inf
    else:
        assert any(places[index] in found for index in heads)
        assert _divisible_s(list(found), total) <= best * 1.002 + 1e-6


def _divisible_s(places: list[_Place], total: float) -> float:
    """When these places together have `total` bytes."""
    if sum(place.room * LAYER for place in places) < total:
        return inf
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        if sum(place.bytes_by(middle) for place in places) >= total:
            high = middle
        else:
            low = middle
    return high


def test_equal_bounds_are_hydraserves() -> None:
    """The layer counts that its offline partitioner makes for three models."""
    layer, ends = 100, 65
    llama_7b = (layer + ends, *[layer] * 30, layer + ends)
    assert equal_bounds(llama_7b, 4) == (0, 8, 16, 24, 32)
    heavy_ends = (layer + 250, *[layer] * 30, layer + 250)
    assert equal_bounds(heavy_ends, 4) == (0, 7, 16, 25, 32)
    assert equal_bounds((1, 1, 1), 1) == (0, 3)


def test_of_equally_early_cuts_the_most_even_one_is_taken() -> None:
    # Processes take longer to start than any layers to come.
    places = [_Place(1e9, delay_s=10.0) for _ in range(3)]
    found = cut(places, 12)
    assert found is not None
    assert found.bounds == (0, 4, 8, 12)
