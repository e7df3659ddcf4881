"""How long a fetch to a node takes from its disk, peers and the store at the same time. Pure.

Every byte on disk or at a peer is also in the store, so the store can serve any part of it when
they are slow. Of `m` bytes, `d` on disk and `p` with peers,
`min(d, disk · t) + min(link(t), store · t + sum min(p, peer · t))` are there after `t` seconds.
Each such sum is a minimum over straight lines and what the link gives, whose inverses are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from paraserve_scheduler.planner.bandwidth import BandwidthClaim, LinkForecast
from paraserve_scheduler.planner.cost import LayerRanges, ModelShape


class Holders:
    """Bytes by holder, as prefix sums over the layers; made once, asked often."""

    def __init__(
        self,
        model: ModelShape,
        *,
        memory: LayerRanges = (),
        disk: LayerRanges = (),
        peers: Sequence[LayerRanges] = (),
    ) -> None:
        self._model = model
        left = set(range(model.num_layers))
        self._memory = _take(model, memory, left)
        self._disk = _take(model, disk, left)
        self._peers = tuple(_take(model, layers, left) for layers in peers)

    def amounts(self, start: int, end: int) -> Amounts:
        """What the node lacks of layers `[start, end)`."""
        total = self._model.bytes_of(start, end)
        return Amounts(
            total_bytes=total - self._of(self._memory, start, end),
            disk_bytes=self._of(self._disk, start, end),
            peers_bytes=tuple(self._of(prefix, start, end) for prefix in self._peers),
        )

    def _of(self, prefix: Sequence[int] | None, start: int, end: int) -> int:
        if prefix is None:
            return 0
        model = self._model
        held = prefix[end] - prefix[start]
        # Who has the last layer has all that a last stage needs.
        if model.tied_bytes and start > 0 and end == model.num_layers and prefix[end] > prefix[-2]:
            held += model.tied_bytes
        return held


def _take(model: ModelShape, layers: LayerRanges, left: set[int]) -> list[int] | None:
    """Prefix sums of those `layers` that nobody before has, taken out of `left`."""
    if not layers:
        return None
    taken = left & {layer for low, high in layers for layer in range(low, high)}
    left -= taken
    sizes = (size if layer in taken else 0 for layer, size in enumerate(model.layer_bytes))
    return [0, *accumulate(sizes)]


_UNLIMITED = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Amounts:
    """Bytes that a node lacks in its host memory, and who else has which of them."""

    total_bytes: int
    disk_bytes: int = 0
    #: By peer; none counts twice, or again on disk.
    peers_bytes: tuple[int, ...] = ()

    def less(self, other: Amounts) -> Amounts:
        return Amounts(
            total_bytes=self.total_bytes - other.total_bytes,
            disk_bytes=self.disk_bytes - other.disk_bytes,
            peers_bytes=tuple(
                mine - its for mine, its in zip(self.peers_bytes, other.peers_bytes, strict=True)
            ),
        )


class FetchTime:
    """What a node gets; rates in bytes per second."""

    def __init__(
        self,
        link_rate: float,
        claims: Iterable[BandwidthClaim] = (),
        *,
        store_rate: float = _UNLIMITED,
        peer_rates: Sequence[float] = (),
        disk_rate: float = 0.0,
    ) -> None:
        claims = tuple(claims)
        limit = store_rate + sum(peer_rates)
        #: What one more fetch gets over the network.
        self.link = LinkForecast(link_rate, claims, limit)
        self._link_and_disk = LinkForecast(link_rate, claims, limit, beside=disk_rate)
        self._link_rate = link_rate
        self._store_rate = store_rate
        self._peer_rates = tuple(peer_rates)
        self._disk_rate = disk_rate

    def seconds_for(self, amounts: Amounts) -> float:
        """Seconds until all of `amounts` has come."""
        size = amounts.total_bytes
        seconds = self.link.seconds_for(size)
        if self._has_disk(amounts):
            without = self.link.seconds_for(size - amounts.disk_bytes)
            seconds = max(without, self._link_and_disk.seconds_for(size))
        for given, rate in self._lines(amounts):
            seconds = max(seconds, (size - given) / rate)
        return seconds

    def bytes_in(self, seconds: float, work_s_per_byte: float, amounts: Amounts) -> float:
        """The most bytes that have come and been worked on after `seconds`, with `amounts` to get.

        The work on them comes after the last byte.
        """
        if seconds <= 0:
            return 0.0
        work = work_s_per_byte
        most = self.link.bytes_in(seconds, work)
        if self._has_disk(amounts):
            disk = min(amounts.disk_bytes, seconds / work if work else _UNLIMITED)
            beside = disk + self.link.bytes_in(seconds - disk * work, work)
            most = min(beside, self._link_and_disk.bytes_in(seconds, work))
        for given, rate in self._lines(amounts):
            line = given + max(0.0, seconds - given * work) / (1 / rate + work)
            most = min(most, line, seconds / work if work else _UNLIMITED)
        return most

    def split(self, amounts: Amounts, seconds: float) -> Amounts:
        """Who gives how much of `amounts` if all give what they can in `seconds`."""
        return Amounts(
            total_bytes=amounts.total_bytes,
            disk_bytes=min(amounts.disk_bytes, int(self._disk_rate * seconds)),
            peers_bytes=tuple(
                min(size, int(rate * seconds))
                for size, rate in zip(amounts.peers_bytes, self._peer_rates, strict=True)
            ),
        )

    def _has_disk(self, amounts: Amounts) -> bool:
        return self._disk_rate > 0 and amounts.disk_bytes > 0

    def _lines(self, amounts: Amounts) -> Iterator[tuple[float, float]]:
        """Straight lines, as bytes at once and a rate, that what has come never exceeds."""
        # Where the store alone fills the link, nothing but the link and the disk limits.
        if not self._peer_rates or self._store_rate >= self._link_rate:
            return
        disk, has_disk = amounts.disk_bytes, self._has_disk(amounts)
        for given, rate in self._sources_run_dry(amounts):
            yield given + (disk if has_disk else 0), rate
            if has_disk:
                yield given, rate + self._disk_rate

    def _sources_run_dry(self, amounts: Amounts) -> Iterator[tuple[int, float]]:
        """What peers have given and what the rest gives once the first, the second... is empty."""
        given, rate = 0, self._store_rate + sum(self._peer_rates)
        peers = zip(amounts.peers_bytes, self._peer_rates, strict=True)
        for size, peer_rate in sorted(peers, key=lambda peer: peer[0] / peer[1]):
            given, rate = given + size, rate - peer_rate
            yield given, rate
