"""Who gets how much of a network link: fair shares, deadlines of fetches, admission. Pure.

A fetch crosses two links: out of its source (the store or a peer) and into its node. Shares are
max-min fair on both ends, which is close to what TCP flows of equal round trips get.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthClaim:
    """A running fetch, as far as the node it goes to is concerned."""

    remaining_bytes: float
    #: When it must have ended for its replica to meet its objective; None: it may take its time.
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A running fetch over its links."""

    links: tuple[Hashable, ...]
    #: Flows of a lower rank get only what those of a higher one leave.
    rank: int = 0


def fair_rates(flows: Sequence[Flow], capacities: Mapping[Hashable, float]) -> tuple[float, ...]:
    """Bytes per second of each flow: max-min fair within a rank, higher ranks first.

    Links without a capacity do not limit. A flow over no limited link gets infinity.
    """
    rates = [0.0] * len(flows)
    left = dict(capacities)
    for rank in sorted({flow.rank for flow in flows}, reverse=True):
        _fill({i: flow for i, flow in enumerate(flows) if flow.rank == rank}, left, rates)
    return tuple(rates)


def _fill(flows: dict[int, Flow], left: dict[Hashable, float], rates: list[float]) -> None:
    """Water-filling: the tightest link fixes the share of all flows over it, then the next."""
    open_flows = dict(flows)
    while open_flows:
        counts: dict[Hashable, int] = {}
        for flow in open_flows.values():
            for link in flow.links:
                if link in left:
                    counts[link] = counts.get(link, 0) + 1
        if not counts:
            for i in open_flows:
                rates[i] = float("inf")
            return
        tightest = min(counts, key=lambda link: left[link] / counts[link])
        share = max(0.0, left[tightest] / counts[tightest])
        for i in [i for i, flow in open_flows.items() if tightest in flow.links]:
            rates[i] = share
            for link in open_flows.pop(i).links:
                if link in left:
                    left[link] -= share


def offered_rate(nic_bytes_per_s: float, claims: Iterable[BandwidthClaim], now_s: float) -> float:
    """What a new fetch would get on a link; 0 if a running one would then miss its deadline.

    HydraServe's admission test, with three differences: shares grow as others end, a fetch that is
    late whatever we do no longer blocks the node until it ends, and one without a deadline never
    does.
    """
    running = sorted(
        (claim for claim in claims if claim.remaining_bytes > 0),
        key=lambda claim: claim.remaining_bytes,
    )
    sizes = [claim.remaining_bytes for claim in running]
    before = _ends_s(nic_bytes_per_s, sizes, others=0)
    after = _ends_s(nic_bytes_per_s, sizes, others=1)
    for claim, before_s, after_s in zip(running, before, after, strict=True):
        if claim.deadline_s is not None:
            left_s = claim.deadline_s - now_s
            if before_s <= left_s < after_s:
                return 0.0
    return nic_bytes_per_s / (len(running) + 1)


def _ends_s(capacity: float, sizes: Sequence[float], *, others: int) -> list[float]:
    """When fetches of ascending `sizes` end that share a link evenly, and with endless `others`."""
    ends, end_s, done = [], 0.0, 0.0
    for index, size in enumerate(sizes):
        end_s += (size - done) * (len(sizes) - index + others) / capacity
        done = size
        ends.append(end_s)
    return ends


class LinkForecast:
    """What one more fetch gets of a link over time, as those that run now end one by one.

    Its rate is constant between their ends, so both questions are answered piece by piece.
    `limit` caps it from the source's side, `beside` comes past the link; in bytes per second.
    """

    def __init__(
        self,
        capacity: float,
        claims: Iterable[BandwidthClaim] = (),
        limit: float = float("inf"),
        *,
        beside: float = 0.0,
    ) -> None:
        sizes = sorted(claim.remaining_bytes for claim in claims if claim.remaining_bytes > 0)
        #: (seconds, bytes per second)
        self._pieces: list[tuple[float, float]] = []
        done = 0.0
        for index, size in enumerate(sizes):
            share = capacity / (len(sizes) - index + 1)
            self._pieces.append(((size - done) / share, min(share, limit) + beside))
            done = size
        self._last = min(capacity, limit) + beside

    def bytes_in(self, seconds: float, work_s_per_byte: float = 0.0) -> float:
        """Bytes that the new fetch has got and somebody has then worked on after `seconds`.

        The work on them comes after the last byte.
        """
        if seconds <= 0:
            return 0.0
        got = passed = 0.0
        for length_s, rate in self._pieces:
            end_s = passed + length_s + (got + length_s * rate) * work_s_per_byte
            if seconds <= end_s:
                left_s = seconds - passed - got * work_s_per_byte
                return got + max(0.0, left_s) / (1 / rate + work_s_per_byte)
            got += length_s * rate
            passed += length_s
        left_s = seconds - passed - got * work_s_per_byte
        return got + max(0.0, left_s) / (1 / self._last + work_s_per_byte)

    def seconds_for(self, size_bytes: float) -> float:
        """Seconds until the new fetch has got `size_bytes`."""
        if size_bytes <= 0:
            return 0.0
        passed = 0.0
        for length_s, rate in self._pieces:
            if size_bytes <= length_s * rate:
                return passed + size_bytes / rate
            size_bytes -= length_s * rate
            passed += length_s
        return passed + size_bytes / self._last
