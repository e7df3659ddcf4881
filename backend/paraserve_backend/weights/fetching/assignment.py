"""Decides which worker of a fetch brings which bytes next, and from which source.

Each byte comes from its cheapest source: local disk, then a peer that has it or is fetching it,
then the store, which is thus read once per cluster. Other sources help while the node's link is not
full, and an idle worker takes over what another brings too slowly. An assignment only decides:
its workers ask the tier, move the bytes and report what came of it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from paraserve_backend.byte_ranges import ByteRange, merge, within
from paraserve_backend.weights.fetching.tasks import (
    FetchSource,
    FetchWorker,
    Rank,
    Task,
)
from paraserve_backend.weights.sources.base import Holding

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
class TaskOffer:
    """A task for a worker to claim in the tier: another fetch may have or be bringing its bytes.

    The answer is `granted`, `adopted` or `busy`. Until then, nobody else is offered the task.
    """

    task: Task
    #: Numbers of the tasks that this worker may be offered after it. The assignment's lock guards
    #: them.
    rest: Iterator[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeOver:
    """A task for a worker to bring in place of another, whose read is to be broken off.

    The claim to its bytes goes over with it.
    """

    task: Task
    late_worker: FetchWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """A task on its way."""

    task: Task
    worker: FetchWorker
    since_s: float
    #: It stays its worker's, however long that takes: it was late before, or its read is over.
    is_settled: bool


class Assignment:
    """Decides about a fetch's tasks and does no I/O. Every method may be called from any thread.

    A task is pending, then offered, then taken, and in the end its bytes are in place.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        *,
        link_bytes_per_s: float | None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        #: Those whose bytes are not in place.
        self._unfinished = {task.number: task for task in tasks}
        self._pending = set(self._unfinished)
        self._all = frozenset(self._unfinished)
        self._names = frozenset(task.name for task in self._unfinished.values())
        self._window_s = _window_s(self._unfinished.values(), link_bytes_per_s)
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
        return not self._unfinished

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
            wanted = list(self._unfinished.values())
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

    def next(
        self, worker: FetchWorker, after: TaskOffer | None = None
    ) -> TaskOffer | TakeOver | None:
        """Return what a worker should do; `None` where there is nothing at the moment.

        After an offer that was not granted, no task comes up again that was offered before it.
        """
        with self._changed:
            if self._stopped or worker.source.is_lost:
                return None
            # The first bytes are wanted first.
            numbers = after.rest if after else iter(sorted(self._free_for(worker.source)))
            for number in numbers:
                if number in self._pending:
                    self._pending.remove(number)
                    return TaskOffer(task=self._unfinished[number], rest=numbers)
            late = self._late_for(worker)
            return None if late is None else self._take_over(late, worker)

    def granted(self, task: Task, worker: FetchWorker) -> None:
        """The claim to an offered task is the worker's, who brings it now."""
        with self._changed:
            self._take(task, worker, is_settled=False)

    def adopted(self, task: Task) -> None:
        """Another fetch had brought the bytes of an offered task; they count for this one, too."""
        with self._changed:
            if task.part is not None:
                self._adopted_bytes += task.size_bytes
            self._finish(task)

    def busy(self, task: Task) -> None:
        """Another fetch is bringing the bytes of an offered task: to be offered again later."""
        with self._changed:
            # Nobody is woken: the answer would be the same.
            self._pending.add(task.number)

    def settle(self, task: Task, worker: FetchWorker) -> bool:
        """Return whether a task is still this worker's; if so, nobody takes it over any more.

        The worker then gives up its claim in the tier, and says `done` or `give_back`.
        """
        with self._changed:
            taken = self._taken.get(task.number)
            if taken is None or taken.worker is not worker:
                return False
            self._taken[task.number] = replace(taken, is_settled=True)
            return True

    def done(self, task: Task, worker: FetchWorker) -> None:
        """The bytes of a settled task are in place."""
        with self._changed:
            taken = self._taken.pop(task.number)
            now_s = self._now()
            self._brought.append((now_s, task.size_bytes))
            if task.part is not None:
                worker.brought(task.size_bytes, now_s - taken.since_s)
                self._last_bytes_per_s = worker.bytes_per_s or _LEAST_BYTES_PER_S
            self._finish(task)

    def give_back(self, task: Task) -> None:
        """A settled task was not done; another worker may."""
        with self._changed:
            del self._taken[task.number]
            self._pending.add(task.number)
            self._changed.notify_all()

    def wait(self, source: FetchSource) -> bool:
        """Wait a moment; returns whether the source is still of use to this fetch."""
        with self._changed:
            if self._is_over or source.is_lost:
                return False
            self._changed.wait(_RECHECK_S)
            return not self._is_over and not self._unfinished.keys().isdisjoint(source.expected)

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def _is_over(self) -> bool:
        return self._stopped or self.is_complete

    def _take(self, task: Task, worker: FetchWorker, *, is_settled: bool) -> None:
        self._taken[task.number] = _Taken(
            task=task, worker=worker, since_s=self._now(), is_settled=is_settled
        )

    def _finish(self, task: Task) -> None:
        del self._unfinished[task.number]
        if self._is_over:
            self._changed.notify_all()

    def _free_for(self, source: FetchSource) -> set[int]:
        """Return the pending tasks that a source has and that are not left to better ones."""
        numbers = self._pending & source.landed
        if numbers and not self._falls_short():
            numbers -= self._expected_before(source.rank)
        return numbers

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
        """Return a task on its way that an idle worker had better bring itself."""
        bytes_per_s = stealing_worker.bytes_per_s or self._last_bytes_per_s
        for taken in self._taken.values():
            needed_s = taken.task.size_bytes / bytes_per_s
            age_s = self._now() - taken.since_s
            if (
                age_s > max(_LATE_AFTER_S, _LATE_FACTOR * needed_s)
                and not taken.is_settled
                and taken.worker is not stealing_worker
                and taken.task.number in stealing_worker.source.landed
            ):
                return taken
        return None

    def _take_over(self, late: _Taken, worker: FetchWorker) -> TakeOver:
        """Give a late task to another worker; a source that is so slow is asked no more."""
        slow = late.worker.source
        if slow is not worker.source and slow.rank is not Rank.STORE:
            slow.is_lost = True
        self._take(late.task, worker, is_settled=True)
        return TakeOver(task=late.task, late_worker=late.worker)


def _window_s(tasks: Iterable[Task], link_bytes_per_s: float | None) -> float:
    largest_bytes = max((task.size_bytes for task in tasks), default=0)
    return max(_HELP_AFTER_S, _RATE_PARTS * largest_bytes / (link_bytes_per_s or float("inf")))


def _covered(
    tasks: Iterable[Task], byte_ranges: Mapping[str, tuple[ByteRange, ...]]
) -> frozenset[int]:
    return frozenset(
        task.number for task in tasks if within(task.byte_range, byte_ranges.get(task.name, ()))
    )
