"""Fetches as fluid flows over the links of nodes, peers, disks and the store."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

from paraserve_scheduler.planner.bandwidth import BandwidthClaim, Flow, fair_rates
from paraserve_scheduler.simulator.clock import Heap
from paraserve_scheduler.simulator.description import NodeDescription

#: Links: of a node and its disk as (what, node), and the object store's.
INTO, OUT_OF, DISK, STORE = "into", "out of", "disk of", "store"
#: Less than a byte is left by rounding only.
_NOTHING = 0.5


@dataclass(slots=True, eq=False, kw_only=True)
class Transfer:
    """A running fetch; owned by `Network`."""

    flow: Flow
    node: str
    deadline_s: float | None
    remaining_bytes: float
    done: Callable[[], None]
    rate: float = 0.0


def capacities(
    nodes: Iterable[NodeDescription], store_bytes_per_s: float | None
) -> dict[Hashable, float]:
    """Return what each link of these nodes and the store gives; the store may be unlimited."""
    links: dict[Hashable, float] = {}
    for node in nodes:
        links[INTO, node.name] = node.nic_bytes_per_s
        links[OUT_OF, node.name] = node.nic_bytes_per_s
        links[DISK, node.name] = node.kind.disk_bytes_per_s
    if store_bytes_per_s is not None:
        links[STORE] = store_bytes_per_s
    return links


class Network:
    """All running transfers. Their rates change only when one begins or ends."""

    def __init__(self, heap: Heap, capacities: Mapping[Hashable, float]) -> None:
        self._heap = heap
        self._capacities = dict(capacities)
        self._transfers: list[Transfer] = []
        self._updated_s = 0.0
        #: Wakes of earlier rates are out of date.
        self._version = 0
        self._moved_bytes: dict[Hashable, float] = {}

    def begin(
        self,
        size_bytes: float,
        *,
        node: str,
        links: tuple[Hashable, ...],
        done: Callable[[], None],
        rank: int = 0,
        deadline_s: float | None = None,
    ) -> Transfer:
        """Move bytes over `links` to `node`; `done` is called when the last has arrived."""
        transfer = Transfer(
            flow=Flow(links=links, rank=rank),
            node=node,
            deadline_s=deadline_s,
            remaining_bytes=size_bytes,
            done=done,
        )
        self._advance()
        self._transfers.append(transfer)
        self._share()
        return transfer

    def cancel(self, transfer: Transfer) -> None:
        if transfer in self._transfers:
            self._advance()
            self._transfers.remove(transfer)
            self._share()

    def claims(self) -> dict[str, list[BandwidthClaim]]:
        """The running fetches of every node that has any."""
        self._advance()
        claims: dict[str, list[BandwidthClaim]] = {}
        for transfer in self._transfers:
            claim = BandwidthClaim(
                remaining_bytes=transfer.remaining_bytes, deadline_s=transfer.deadline_s
            )
            # What runs in the background gives way to a new fetch, and a disk's read is not in it.
            if transfer.flow.rank >= 0 and (INTO, transfer.node) in transfer.flow.links:
                claims.setdefault(transfer.node, []).append(claim)
        return claims

    def remaining_bytes(self, transfer: Transfer) -> float:
        """What has still to come of a transfer; nothing once it has ended."""
        return transfer.remaining_bytes if transfer in self._transfers else 0.0

    def fetches_from(self, link: Hashable) -> int:
        return sum(link in transfer.flow.links for transfer in self._transfers)

    def fetches_by_peer(self) -> dict[str, int]:
        """How many fetches run out of each node that any run out of."""
        counts: dict[str, int] = {}
        for transfer in self._transfers:
            for link in transfer.flow.links:
                if isinstance(link, tuple) and link[0] == OUT_OF:
                    counts[link[1]] = counts.get(link[1], 0) + 1
        return counts

    def moved_into(self, nodes: Iterable[str]) -> float:
        """Bytes that have arrived at these nodes over the network."""
        return sum(self._moved_bytes.get((INTO, node), 0.0) for node in nodes)

    def _advance(self) -> None:
        passed_s = self._heap.now_s - self._updated_s
        self._updated_s = self._heap.now_s
        if passed_s > 0:
            for transfer in self._transfers:
                moved = min(transfer.remaining_bytes, transfer.rate * passed_s)
                transfer.remaining_bytes -= moved
                for link in transfer.flow.links:
                    self._moved_bytes[link] = self._moved_bytes.get(link, 0.0) + moved

    def _share(self) -> None:
        rates = fair_rates([transfer.flow for transfer in self._transfers], self._capacities)
        for transfer, rate in zip(self._transfers, rates, strict=True):
            transfer.rate = rate
        self._version += 1
        next_s = min(
            (
                transfer.remaining_bytes / transfer.rate
                for transfer in self._transfers
                if transfer.rate > 0
            ),
            default=None,
        )
        if next_s is not None:
            self._heap.after(next_s, self._wake, self._version)

    def _wake(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        ended = [
            transfer
            for transfer in self._transfers
            # Rounding of the time must not make one wait for ever.
            if transfer.remaining_bytes <= max(_NOTHING, transfer.rate * 1e-9)
        ]
        self._transfers = [transfer for transfer in self._transfers if transfer not in ended]
        self._share()
        for transfer in ended:
            transfer.done()
