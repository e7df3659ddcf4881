from __future__ import annotations

from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_scheduler.planner.bandwidth import BandwidthClaim, LinkForecast
from paraserve_scheduler.planner.fetch_time import Amounts, FetchTime, Holders
from tests.support.fleets import GB, make_model

_RATES = st.floats(0.5, 20)
_SIZES = st.integers(0, 100)


class _Sources:
    """A fetch time beside the numbers it is made of."""

    def __init__(
        self,
        link: float,
        claims: list[int],
        store: float | None,
        peers: list[tuple[float, int]],
        disk: tuple[float, int],
        store_only: int,
    ) -> None:
        self.store, self.peers, self.disk = store or inf, peers, disk
        running = [BandwidthClaim(remaining_bytes=size) for size in claims]
        limit = self.store + sum(rate for rate, _ in peers)
        self.link = LinkForecast(link, running, limit)
        self.fetch_time = FetchTime(
            link,
            running,
            store_rate=self.store,
            peer_rates=[rate for rate, _ in peers],
            disk_rate=disk[0],
        )
        sizes = tuple(size for _, size in peers)
        self.amounts = Amounts(
            total_bytes=sum(sizes) + disk[1] + store_only, disk_bytes=disk[1], peers_bytes=sizes
        )

    def there_after(self, seconds: float) -> float:
        """As the module's docstring has it."""
        given = sum(min(size, rate * seconds) for rate, size in self.peers)
        network = min(self.link.bytes_in(seconds), self.store * seconds + given)
        return min(self.disk[1], self.disk[0] * seconds) + network


_SOURCES = st.builds(
    _Sources,
    _RATES,
    st.lists(st.integers(1, 50), max_size=3),
    st.none() | _RATES,
    st.lists(st.tuples(_RATES, _SIZES), max_size=3),
    st.tuples(_RATES, _SIZES),
    st.integers(1, 100),
)


@settings(deadline=None)
@given(_SOURCES)
def test_all_is_there_when_the_sources_together_have_given_it_and_not_before(
    sources: _Sources,
) -> None:
    seconds, total = sources.fetch_time.seconds_for(sources.amounts), sources.amounts.total_bytes
    assert sources.there_after(seconds * 1.0001) >= total * 0.9999
    assert sources.there_after(seconds * 0.999) < total


@settings(deadline=None)
@given(_SOURCES, st.floats(0.1, 50), st.floats(0, 0.5))
def test_what_is_fetched_and_worked_on_in_time_is_the_most_that_can_be(
    sources: _Sources, seconds: float, work_s_per_byte: float
) -> None:
    size = sources.fetch_time.bytes_in(seconds, work_s_per_byte, sources.amounts)
    left_s = seconds - size * work_s_per_byte
    assert left_s >= -1e-6
    assert sources.there_after(left_s + 1e-6) >= size * 0.999
    more = size * 1.01
    assert sources.there_after(max(0.0, seconds - more * work_s_per_byte)) < more


@settings(deadline=None)
@given(_SOURCES)
def test_nobody_is_asked_for_more_than_it_has_or_can_give_in_time(sources: _Sources) -> None:
    seconds = sources.fetch_time.seconds_for(sources.amounts)
    given_by = sources.fetch_time.split(sources.amounts, seconds)
    shares = [*zip(given_by.peers_bytes, sources.peers, strict=True)]
    shares.append((given_by.disk_bytes, sources.disk))
    for size, (rate, has) in shares:
        assert 0 <= size <= has
        assert size <= rate * seconds * (1 + 1e-9)
    from_store = given_by.total_bytes - given_by.disk_bytes - sum(given_by.peers_bytes)
    # Each share is rounded to whole bytes, and seconds are a float.
    rounded = len(shares)
    assert 0 <= from_store <= sources.store * seconds * (1 + 1e-9) + rounded


def test_a_source_more_is_never_later() -> None:
    amounts = Amounts(total_bytes=100, disk_bytes=50, peers_bytes=(30,))
    seconds = [
        FetchTime(100.0, store_rate=1.0, peer_rates=(1e-9,)).seconds_for(amounts),
        FetchTime(100.0, store_rate=1.0, peer_rates=(2.0,)).seconds_for(amounts),
        FetchTime(100.0, store_rate=1.0, peer_rates=(2.0,), disk_rate=5.0).seconds_for(amounts),
    ]
    assert seconds == [pytest.approx(100.0), pytest.approx(70.0), pytest.approx(20.0)]


_LAYER_RANGES = st.sets(st.integers(0, 7)).map(
    lambda layers: tuple((layer, layer + 1) for layer in sorted(layers))
)


@given(
    _LAYER_RANGES,
    _LAYER_RANGES,
    st.lists(_LAYER_RANGES, max_size=2),
    st.integers(0, 7),
    st.integers(1, 8),
)
def test_every_byte_of_a_range_has_one_holder(
    memory: tuple[tuple[int, int], ...],
    disk: tuple[tuple[int, int], ...],
    peers: list[tuple[tuple[int, int], ...]],
    start: int,
    length: int,
) -> None:
    model = make_model("tiny", num_layers=8, size_bytes=8 * GB)
    end = min(8, start + length)
    amounts = Holders(model, memory=memory, disk=disk, peers=peers).amounts(start, end)
    in_memory = sum(model.bytes_of(a, b) for a, b in memory if start <= a < end)
    assert amounts.total_bytes == model.bytes_of(start, end) - in_memory
    held = {layer for layers in (disk, *peers) for layer, _ in layers} - {it for it, _ in memory}
    elsewhere = sum(model.bytes_of(it, it + 1) for it in held if start <= it < end)
    assert amounts.disk_bytes + sum(amounts.peers_bytes) == elsewhere
