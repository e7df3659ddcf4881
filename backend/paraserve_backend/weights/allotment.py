"""Which worker of a fetch brings which bytes next, and from where.

Bytes that a peer has, or will have, are left to its workers, so that the store is read once per
cluster; the store's workers help where the peers leave the node's link idle. Bytes that another
fetch of this node is bringing are not asked for twice. No I/O but the tier's own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from paraserve_backend.weights.holdings import Claim, Holding
from paraserve_backend.weights.objects import StoredObject
from paraserve_backend.weights.spans import Span, merge, within
from paraserve_backend.weights.tier import Tier
from paraserve_backend.weights.tier_fetch import TierFetch

#: How often waiting workers look whether other fetches of this node have brought something.
_RECHECK_S = 0.05
#: So long the store waits for a peer to say what it has.
_ANSWER_S = 0.15
#: So long the peers are left alone; from then on the store helps if they are slow.
_HELP_AFTER_S = 0.5
#: Slow is less than this share of the node's link.
_HELP_BELOW = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Bytes `[start, end)` of an object to bring; a small file is brought whole."""

    number: int
    stored: StoredObject
    #: The object's file name in any tier.
    name: str
    start: int
    end: int
    #: Number of the fetch's part; `None` where it is a small file.
    part: int | None

    @property
    def span(self) -> Span:
        return (self.start, self.end)

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


class PeerShare:
    """What one peer can bring of a fetch, as it last said."""

    def __init__(self) -> None:
        self.has_answered = False
        self.is_lost = False
        self.landed: frozenset[int] = frozenset()
        self.coming: frozenset[int] = frozenset()


def missing_tasks(landing: TierFetch) -> list[Task]:
    """Return what a fetch still has to bring, in the order in which it is wanted."""
    files = [(stored, 0, stored.size_bytes, None) for stored in landing.missing_files()]
    parts = [
        (landing.object_of(part), landing.parts[part].start, landing.parts[part].end, part)
        for part in landing.missing_parts()
    ]
    return [
        Task(
            number=number,
            stored=stored,
            name=landing.name_of(stored),
            start=start,
            end=end,
            part=part,
        )
        for number, (stored, start, end, part) in enumerate([*files, *parts])
    ]


class Allotment:
    """Hands out a fetch's tasks. Every method may be called from any thread."""

    def __init__(
        self,
        landing: TierFetch,
        tier: Tier,
        tasks: Iterable[Task],
        *,
        link_bytes_per_s: float | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._landing = landing
        self._tier = tier
        self._pending = {task.number: task for task in tasks}
        self._names = {task.name for task in self._pending.values()}
        self._taken: dict[int, Task] = {}
        self._peers: list[PeerShare] = []
        self._link_bytes_per_s = link_bytes_per_s
        self._now = now
        self._started_s = now()
        self._brought_bytes = 0
        self._adopted_bytes = 0
        self._stopped = False
        self._changed = threading.Condition()

    @property
    def is_complete(self) -> bool:
        return not self._pending and not self._taken

    @property
    def adopted_bytes(self) -> int:
        """Bytes of parts that other fetches of this node have brought meanwhile."""
        return self._adopted_bytes

    @property
    def names(self) -> frozenset[str]:
        """File names of all objects of which something was missing."""
        return frozenset(self._names)

    def add_peer(self) -> PeerShare:
        share = PeerShare()
        with self._changed:
            self._peers.append(share)
        return share

    def update_peer(self, share: PeerShare, holdings: Mapping[str, Holding]) -> None:
        """Take in what a peer says it has."""
        with self._changed:
            tasks = [*self._pending.values()]
        landed = frozenset(task.number for task in tasks if _covers(holdings, task, later=False))
        coming = frozenset(task.number for task in tasks if _covers(holdings, task, later=True))
        with self._changed:
            share.landed, share.coming = landed, coming - landed
            share.has_answered = True
            self._changed.notify_all()

    def lose_peer(self, share: PeerShare) -> None:
        """Expect nothing more from a peer."""
        with self._changed:
            share.is_lost = True
            self._changed.notify_all()

    def take_for_store(self) -> Task | None:
        """Wait for something to bring from the store; `None` once all is done or stopped."""
        with self._changed:
            while not self._is_over:
                task = self._first(self._is_for_store)
                if task is not None:
                    return task
                self._wait()
        return None

    def take_for_peer(self, share: PeerShare) -> Task | None:
        """Return something that a peer has; `None` where there is nothing at the moment."""
        with self._changed:
            return self._first(lambda task: task.number in share.landed)

    def wait_for_peer(self, share: PeerShare) -> bool:
        """Wait a moment; returns whether the peer is still of use to this fetch."""
        with self._changed:
            if self._is_over or share.is_lost:
                return False
            self._wait()
            wanted = self._pending.keys() | self._taken.keys()
            return not self._is_over and bool((share.landed | share.coming) & wanted)

    def done(self, task: Task) -> None:
        """The task's bytes are in place."""
        self._tier.unclaim(task.name, task.span)
        with self._changed:
            self._taken.pop(task.number)
            self._brought_bytes += task.size_bytes
            self._changed.notify_all()

    def give_back(self, task: Task) -> None:
        """The task was not done; another worker may."""
        self._tier.unclaim(task.name, task.span)
        with self._changed:
            self._taken.pop(task.number)
            # Wanted bytes come first again.
            self._pending = dict(sorted({**self._pending, task.number: task}.items()))
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def _is_over(self) -> bool:
        return self._stopped or self.is_complete

    def _first(self, wanted: Callable[[Task], bool]) -> Task | None:
        for task in list(self._pending.values()):
            if self._stopped or not wanted(task):
                continue
            match self._tier.claim(task.name, task.span):
                case Claim.GRANTED:
                    self._taken[task.number] = self._pending.pop(task.number)
                    return task
                case Claim.LANDED:
                    self._adopt(task)
                case Claim.BUSY:
                    pass
        return None

    def _adopt(self, task: Task) -> None:
        if task.part is None:
            self._tier.adopt_files(self._landing)
        else:
            self._landing.adopt_part(task.part)
            self._adopted_bytes += task.size_bytes
        del self._pending[task.number]
        self._changed.notify_all()

    def _is_for_store(self, task: Task) -> bool:
        at_peer = any(self._is_expected(task, share) for share in self._peers)
        return not at_peer or self._peers_are_slow()

    def _is_expected(self, task: Task, share: PeerShare) -> bool:
        if not share.has_answered and not share.is_lost:
            return self._now() - self._started_s < _ANSWER_S
        return not share.is_lost and (task.number in share.landed or task.number in share.coming)

    def _peers_are_slow(self) -> bool:
        elapsed_s = self._now() - self._started_s
        if elapsed_s < _HELP_AFTER_S:
            return False
        if self._link_bytes_per_s is None:
            return True
        return self._brought_bytes / elapsed_s < _HELP_BELOW * self._link_bytes_per_s

    def _wait(self) -> None:
        self._changed.wait(_RECHECK_S)


def _covers(holdings: Mapping[str, Holding], task: Task, *, later: bool) -> bool:
    held = holdings.get(task.name)
    if held is None:
        return False
    spans = merge([*held.landed, *held.coming]) if later else held.landed
    return within(task.span, spans)
