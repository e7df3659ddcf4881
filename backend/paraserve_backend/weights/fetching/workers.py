"""The threads of one fetch: each brings task after task from its source into the tier.

What the assignment decides, they carry out: claims in the tier, reads, writes.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from paraserve_backend.errors import Cancelled
from paraserve_backend.weights.fetching.assignment import Assignment, TakeOver, TaskOffer
from paraserve_backend.weights.fetching.readers import (
    DiskReader,
    PartBuffer,
    PeerReader,
    SourceReader,
    StoreReader,
)
from paraserve_backend.weights.fetching.tasks import (
    FetchSource,
    FetchWorker,
    Rank,
    Task,
)
from paraserve_backend.weights.sources.base import Source
from paraserve_backend.weights.sources.peer import Peer
from paraserve_backend.weights.sources.retry import Retrier, RetryPolicy
from paraserve_backend.weights.tiers.contents import Claim
from paraserve_backend.weights.tiers.digests import DamagedPiece
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.writer import TierFetch

logger = logging.getLogger(__name__)

#: Connections to each peer.
_PER_PEER = 2
#: While one thread's bytes are checked and copied, the others' are read: the disk is never idle.
_FROM_DISK = 3
#: How soon a cancel or the time limit is noticed.
_WATCH_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """Where the bytes of a fetch may come from."""

    store: Source
    #: Connections to the store, and at most so many reads of the disk at once.
    threads: int
    retry: RetryPolicy
    peers: Sequence[Peer]
    disk: DiskTier | None


class FetchWorkers:
    """Made for one run; `_lock` guards the counts."""

    def __init__(
        self, writer: TierFetch, tier: Tier, assignment: Assignment, origins: Origins
    ) -> None:
        self.writer = writer
        self._tier = tier
        self._assignment = assignment
        sizes = [writer.parts[part].size_bytes for part in writer.missing_parts()]
        self._buffer_bytes = max(sizes, default=0)
        self._found_bytes = writer.plan.total_bytes - sum(sizes)
        self._started_s = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._part_bytes = self._file_bytes = 0
        self._bytes_by_rank: Counter[Rank] = Counter()
        self._first_part_s: float | None = None
        self._stores: list[StoreReader] = []
        self._readers: list[tuple[FetchSource, SourceReader]] = []
        # A store takes a tenth of a second to open, which a model that is all here need not pay.
        if not self.is_complete:
            self._add_readers(origins)

    @property
    def fetched_bytes(self) -> int:
        """Bytes of parts that were brought here."""
        return self._part_bytes

    @property
    def reused_bytes(self) -> int:
        """Bytes of parts that were in place, or were brought by other fetches meanwhile."""
        return self._found_bytes + self._assignment.adopted_bytes

    @property
    def file_bytes(self) -> int:
        return self._file_bytes

    @property
    def first_part_s(self) -> float | None:
        return self._first_part_s

    @property
    def retries(self) -> int:
        return sum(reader.retries for reader in self._stores)

    @property
    def is_complete(self) -> bool:
        return self._assignment.is_complete

    def bytes_from(self, rank: Rank) -> int:
        """Return the bytes of parts and small files that came from sources of this rank."""
        return self._bytes_by_rank[rank]

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def run(self, watch: Callable[[], None]) -> None:
        """Do all tasks; ends early, with every thread gone, where one of them or `watch` raises."""
        if not self._readers:
            return
        with ThreadPoolExecutor(len(self._readers), thread_name_prefix="fetch") as pool:
            try:
                running = {pool.submit(self._work, *each) for each in self._readers}
                while running:
                    done, running = wait(running, timeout=_WATCH_S, return_when=FIRST_EXCEPTION)
                    _raise_first(done)
                    watch()
            except BaseException:
                self._stop()
                raise

    def _add_readers(self, origins: Origins) -> None:
        if origins.disk is not None:
            source = self._assignment.add_source(Rank.DISK)
            for _ in range(min(_FROM_DISK, origins.threads)):
                self._readers.append((source, DiskReader(origins.disk, source, self._assignment)))
        for peer in origins.peers:
            self._add_peer(peer)
        retrier = Retrier(pause=self._pause, policy=origins.retry, rng=random.Random())
        source = self._assignment.add_source(Rank.STORE)
        for _ in range(origins.threads):
            reader = StoreReader(origins.store, retrier, PartBuffer(self._buffer_bytes))
            self._stores.append(reader)
            self._readers.append((source, reader))

    def _add_peer(self, peer: Peer) -> None:
        names = {stored.key: name for name, stored in self.writer.object_names.items()}
        names |= {stored.key: name for name, stored in self.writer.file_names.items()}
        source = self._assignment.add_source(Rank.PEER)
        for _ in range(_PER_PEER):
            buffer = PartBuffer(self._buffer_bytes)
            reader = PeerReader(peer, source, self._assignment, names, buffer)
            self._readers.append((source, reader))

    def _work(self, source: FetchSource, reader: SourceReader) -> None:
        """Bring bytes for as long as the source has any."""
        worker = FetchWorker(source=source, break_off=reader.break_off)
        try:
            reader.refresh()
            while True:
                task = self._next_task(worker)
                if task is not None:
                    self._bring(task, worker, reader)
                elif self._assignment.wait(source):
                    reader.refresh()
                else:
                    return
        finally:
            reader.close()

    def _next_task(self, worker: FetchWorker) -> Task | None:
        """Return a task whose bytes this worker holds the claim to; `None` where there is none."""
        step = self._assignment.next(worker)
        while isinstance(step, TaskOffer):
            if self._claim(step.task, worker):
                return step.task
            step = self._assignment.next(worker, after=step)
        if isinstance(step, TakeOver):
            step.late_worker.break_off()
            return step.task
        return None

    def _claim(self, task: Task, worker: FetchWorker) -> bool:
        """Return whether the task is to be brought; adopts its bytes where they are in place."""
        match self._tier.claim(task.name, task.byte_range):
            case Claim.GRANTED:
                self._assignment.granted(task, worker)
                return True
            case Claim.LANDED:
                self._adopt(task)
                self._assignment.adopted(task)
            case Claim.BUSY:
                self._assignment.busy(task)
        return False

    def _adopt(self, task: Task) -> None:
        if task.part is None:
            self._tier.adopt_files(self.writer)
        else:
            self.writer.adopt_part(task.part)

    def _bring(self, task: Task, worker: FetchWorker, reader: SourceReader) -> None:
        is_there = False
        try:
            content = reader.read(task)
            if content is not None and self._is_right(task, content, worker, reader):
                self._put(task, content)
                is_there = True
        finally:
            self._end(task, worker, is_there=is_there)

    def _is_right(
        self, task: Task, content: memoryview, worker: FetchWorker, reader: SourceReader
    ) -> bool:
        """Learn what the store's bytes are, and compare with that what others bring."""
        if worker.source.rank is Rank.STORE:
            self._tier.digests.learn(task.name, task.byte_range, content)
            return True
        try:
            self._tier.digests.check(task.name, task.byte_range, content)
        except DamagedPiece as damage:
            logger.warning(
                "damage from %s object=%s reason=%s", worker.source.rank.name, task.name, damage
            )
            reader.distrust(task)
            return False
        return True

    def _end(self, task: Task, worker: FetchWorker, *, is_there: bool) -> None:
        if not self._assignment.settle(task, worker):
            return
        self._tier.unclaim(task.name, task.byte_range)
        if is_there:
            self._assignment.done(task, worker)
            self._count(task, worker.source.rank)
        else:
            self._assignment.give_back(task)

    def _put(self, task: Task, content: memoryview) -> None:
        if task.part is None:
            self.writer.write_file(task.stored.key, content)
        else:
            self.writer.write_part(task.part, content)

    def _count(self, task: Task, rank: Rank) -> None:
        with self._lock:
            self._bytes_by_rank[rank] += task.size_bytes
            if task.part is None:
                self._file_bytes += task.size_bytes
                return
            self._part_bytes += task.size_bytes
            if self._first_part_s is None:
                self._first_part_s = self.elapsed_s()

    def _stop(self) -> None:
        self._stopped.set()
        self._assignment.stop()
        for _, reader in self._readers:
            reader.break_off()

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Cancelled("the fetch has ended")


def _raise_first(futures: set[Future[None]]) -> None:
    for future in futures:
        future.result()
