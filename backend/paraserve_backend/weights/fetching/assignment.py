"""Decides which worker of a fetch brings which bytes next, and from which source.

Each byte comes from its cheapest source: local disk, then a peer that has it or is fetching it,
then the store, which is thus read once per cluster. Other sources help while the node's link is not
full, and an idle worker takes over what another brings too slowly. Bytes that another fetch of this
node is bringing are not requested twice.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from paraserve_backend.byte_ranges import ByteRange, merge, within
from paraserve_backend.weights.fetching.tasks import (
    FetchSource,
    FetchWorker,
    Rank,
    Task,
)
from paraserve_backend.weights.sources.base import Holding
from paraserve_backend.weights.tiers.contents import Claim
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.writer import TierFetch

#: How often waiting workers look whether other fetches of this node have brought something.
_RECHECK_S = 0.05
#: So long the others wait for a peer to say what it has.
_ANSWER_S = 0.15
#: So long the better sources are left alone, and so far back their rate is looked at; from then on
#: the others help if it is low.
_HELP_AFTER_S = 0.5
#: Low is less than this share of the node's link.
_HELP_BELOW = 0.7
#: Parts that make a rate: the time that so many take on the node's link is looked at, if longer.
_RATE_PARTS = 4
#: A task is late if it takes so many times what an idle worker would need for all of it, and
#: at least so long.
_LATE_FACTOR = 3.0
_LATE_AFTER_S = 1.0
#: What an idle worker is believed to bring before anybody has brought a part.
_LEAST_BYTES_PER_S = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """A task on its way."""

    task: Task
    worker: FetchWorker
    since_s: float
    #: It was late at another worker, which is not to happen to it twice.
    is_second: bool


class Assignment:
    """Hands out a fetch's tasks. Every method may be called from any thread."""

    def __init__(
        self,
        writer: TierFetch,
        tier: Tier,
        tasks: Iterable[Task],
        *,
        link_bytes_per_s: float | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._writer = writer
        self._tier = tier
        self._pending = {task.number: task for task in tasks}
        self._all = frozenset(self._pending)
        self._names = frozenset(task.name for task in self._pending.values())
        self._window_s = _window_s(self._pending.values(), link_bytes_per_s)
        self._taken: dict[int, _Taken] = {}
        self._sources: list[FetchSource] = []
        self._link_bytes_per_s = link_bytes_per_s
        self._now = now
        self._started_s = now()
        #: When how many bytes were brought.
        self._brought: deque[tuple[float, int]] = deque()
        self._last_bytes_per_s = _LEAST_BYTES_PER_S
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
        return self._names

    def add_source(self, rank: Rank) -> FetchSource:
        """Return a new source; the store has everything, the others have to say what."""
        source = FetchSource(rank)
        if rank is Rank.STORE:
            source.landed = self._all
        with self._changed:
            self._sources.append(source)
        return source

    def update(self, source: FetchSource, holdings: Mapping[str, Holding]) -> None:
        """Take in what a source says it has."""
        later = {
            name: merge([*holding.landed, *holding.coming]) for name, holding in holdings.items()
        }
        with self._changed:
            wanted = [*self._pending.values(), *(taken.task for taken in self._taken.values())]
        landed = _covered(wanted, {name: holding.landed for name, holding in holdings.items()})
        coming = _covered(wanted, later) - landed
        with self._changed:
            source.landed, source.coming = landed, coming
            source.has_answered = True
            self._changed.notify_all()

    def lose(self, source: FetchSource) -> None:
        """Expect nothing more from a source."""
        with self._changed:
            source.is_lost = True
            self._changed.notify_all()

    def take(self, worker: FetchWorker) -> Task | None:
        """Return something to bring; `None` where there is nothing at the moment."""
        with self._changed:
            if self._stopped or worker.source.is_lost:
                return None
            task = self._first(worker.source)
            late = self._late_for(worker) if task is None else None
            if late is not None:
                task = late.task
            if task is not None:
                self._taken[task.number] = _Taken(
                    task=task, worker=worker, since_s=self._now(), is_second=late is not None
                )
        if late is not None:
            late.worker.break_off()
        return task

    def wait(self, source: FetchSource) -> bool:
        """Wait a moment; returns whether the source is still of use to this fetch."""
        with self._changed:
            if self._is_over or source.is_lost:
                return False
            self._changed.wait(_RECHECK_S)
            wanted = self._pending.keys() | self._taken.keys()
            return not self._is_over and not wanted.isdisjoint(source.expected)

    def done(self, task: Task, worker: FetchWorker) -> bool:
        """The task's bytes are in place; returns whether it was still this worker's."""
        with self._changed:
            taken = self._end(task, worker)
            if taken is None:
                return False
            now_s = self._now()
            self._brought.append((now_s, task.size_bytes))
            if task.part is not None:
                worker.brought(task.size_bytes, now_s - taken.since_s)
                self._last_bytes_per_s = worker.bytes_per_s or _LEAST_BYTES_PER_S
            if self._is_over:
                self._changed.notify_all()
            return True

    def give_back(self, task: Task, worker: FetchWorker) -> None:
        """The task was not done; another worker may."""
        with self._changed:
            if self._end(task, worker) is None:
                return
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

    def _end(self, task: Task, worker: FetchWorker) -> _Taken | None:
        taken = self._taken.get(task.number)
        if taken is None or taken.worker is not worker:
            return None
        del self._taken[task.number]
        self._tier.unclaim(task.name, task.byte_range)
        return taken

    def _first(self, source: FetchSource) -> Task | None:
        numbers = self._pending.keys() & source.landed
        if numbers and not self._falls_short():
            numbers -= self._expected_before(source.rank)
        for number in sorted(numbers):
            task = self._pending[number]
            match self._tier.claim(task.name, task.byte_range):
                case Claim.GRANTED:
                    return self._pending.pop(number)
                case Claim.LANDED:
                    self._adopt(task)
                case Claim.BUSY:
                    pass
        return None

    def _adopt(self, task: Task) -> None:
        if task.part is None:
            self._tier.adopt_files(self._writer)
        else:
            self._writer.adopt_part(task.part)
            self._adopted_bytes += task.size_bytes
        del self._pending[task.number]
        if self._is_over:
            self._changed.notify_all()

    def _expected_before(self, rank: Rank) -> frozenset[int]:
        """Return the tasks that are left to better sources."""
        is_early = self._now() - self._started_s < _ANSWER_S
        expected: frozenset[int] = frozenset()
        for source in self._sources:
            if source.rank >= rank or source.is_lost:
                continue
            if is_early and not source.has_answered:
                return self._all
            expected |= source.expected
        return expected

    def _falls_short(self) -> bool:
        """Whether so little was brought lately that every source should help."""
        now_s = self._now()
        elapsed_s = now_s - self._started_s
        if elapsed_s < _HELP_AFTER_S:
            return False
        if self._link_bytes_per_s is None:
            return True
        window_s = min(self._window_s, elapsed_s)
        while self._brought and self._brought[0][0] < now_s - window_s:
            self._brought.popleft()
        lately_bytes = sum(size_bytes for _, size_bytes in self._brought)
        return lately_bytes / window_s < _HELP_BELOW * self._link_bytes_per_s

    def _late_for(self, stealing_worker: FetchWorker) -> _Taken | None:
        """Return a task that an idle worker had better bring itself, and take it off its worker."""
        bytes_per_s = stealing_worker.bytes_per_s or self._last_bytes_per_s
        for taken in self._taken.values():
            needed_s = taken.task.size_bytes / bytes_per_s
            age_s = self._now() - taken.since_s
            if (
                age_s > max(_LATE_AFTER_S, _LATE_FACTOR * needed_s)
                and not taken.is_second
                and taken.worker is not stealing_worker
                and taken.task.number in stealing_worker.source.landed
            ):
                if taken.worker.source is not stealing_worker.source:
                    taken.worker.source.is_lost = taken.worker.source.rank is not Rank.STORE
                return taken
        return None


def _window_s(tasks: Iterable[Task], link_bytes_per_s: float | None) -> float:
    largest_bytes = max((task.size_bytes for task in tasks), default=0)
    return max(_HELP_AFTER_S, _RATE_PARTS * largest_bytes / (link_bytes_per_s or float("inf")))


def _covered(
    tasks: Iterable[Task], byte_ranges: Mapping[str, tuple[ByteRange, ...]]
) -> frozenset[int]:
    return frozenset(
        task.number for task in tasks if within(task.byte_range, byte_ranges.get(task.name, ()))
    )
