"""How fast bytes come to one node from its disk, peers and the store at the same time. Pure.

What disk and peers have, the store has too: it helps where they are slow. So of `m` bytes, `d` on
disk and `p` with peers, `min(d, disk · t) + min(link(t), store · t + sum min(p, peer · t))` are
there after `t` seconds. Each such sum of minima is a minimum over straight or known lines, whose
inverses are known as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from paraserve_scheduler.contention import Claim, LinkForecast

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


class Inflow:
    """What a node gets; rates in bytes per second."""

    def __init__(
        self,
        link_rate: float,
        claims: Iterable[Claim] = (),
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
        self._store_rate = store_rate
        self._peer_rates = tuple(peer_rates)
        self._disk_rate = disk_rate

    def seconds_for(self, amounts: Amounts) -> float:
        """Seconds until all of `amounts` has come."""
        size = amounts.total_bytes
        if not self._has_choice(amounts):
            return self.link.seconds_for(size)
        return max(line.seconds_for(size - given) for given, line in self._limits(amounts))

    def bytes_in(self, seconds: float, work_s_per_byte: float, amounts: Amounts) -> float:
        """The most bytes that have come and been worked on after `seconds`, with `amounts` to get.

        The work on them comes after the last byte.
        """
        if seconds <= 0:
            return 0.0
        if not self._has_choice(amounts):
            return self.link.bytes_in(seconds, work_s_per_byte)
        most = seconds / work_s_per_byte if work_s_per_byte else _UNLIMITED
        return min(
            most,
            *(
                given + line.bytes_in(seconds - given * work_s_per_byte, work_s_per_byte)
                for given, line in self._limits(amounts)
            ),
        )

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

    def _has_choice(self, amounts: Amounts) -> bool:
        is_limited = self._store_rate < _UNLIMITED and bool(self._peer_rates)
        return is_limited or (self._disk_rate > 0 and amounts.disk_bytes > 0)

    def _limits(self, amounts: Amounts) -> Iterator[tuple[float, LinkForecast]]:
        """Lines, each with bytes given at once, none of which what has come ever exceeds."""
        disk, has_disk = amounts.disk_bytes, self._disk_rate > 0 and amounts.disk_bytes > 0
        yield (disk if has_disk else 0.0), self.link
        if has_disk:
            yield 0.0, self._link_and_disk
        for given, rate in self._sources_run_dry(amounts):
            yield given + (disk if has_disk else 0.0), LinkForecast(rate)
            if has_disk:
                yield given, LinkForecast(rate + self._disk_rate)

    def _sources_run_dry(self, amounts: Amounts) -> Iterator[tuple[float, float]]:
        """What peers have given and what the rest gives once the first, the second... is empty."""
        if self._store_rate == _UNLIMITED:
            return
        given, rate = 0.0, self._store_rate + sum(self._peer_rates)
        peers = zip(amounts.peers_bytes, self._peer_rates, strict=True)
        for size, peer_rate in sorted(peers, key=lambda peer: peer[0] / peer[1]):
            given, rate = given + size, rate - peer_rate
            yield given, rate
