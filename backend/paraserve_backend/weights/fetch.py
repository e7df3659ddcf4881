"""Fetching a plan's bytes into the tier: a few threads, each with its own connection.

Parts are taken in the plan's order, so that the first layers land first. Who brings which is
`weights.allotment`'s; retry and resume are `weights.transfer`'s.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from paraserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    ParaServeError,
    SourceUnavailable,
    Unavailable,
)
from paraserve_backend.weights.allotment import Allotment, PeerShare, Task, missing_tasks
from paraserve_backend.weights.objects import BrokenTransfer, Connection, Source
from paraserve_backend.weights.peers import Peer
from paraserve_backend.weights.plan import FetchPlan
from paraserve_backend.weights.tier import Tier
from paraserve_backend.weights.tier_fetch import TierFetch
from paraserve_backend.weights.transfer import Retrier, RetryPolicy

_log = logging.getLogger(__name__)

DEFAULT_THREADS = 4
#: Connections to each peer.
_PER_PEER = 2
#: How soon a cancel or the time limit is noticed.
_WATCH_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """What one call of `fetch` did.

    Of the plan's bytes, `fetched_bytes` came over the network and `reused_bytes` were in the tier
    or brought there by another fetch; `file_bytes` of small files were fetched, too. All that was
    fetched is either `store_bytes` or `peer_bytes`.
    """

    fetched_bytes: int
    reused_bytes: int
    file_bytes: int
    store_bytes: int
    peer_bytes: int
    retries: int
    #: From the start to the first part in place; `None` where none was missing.
    first_part_s: float | None
    total_s: float


def fetch(
    plan: FetchPlan,
    source: Source,
    tier: Tier,
    *,
    timeout_s: float,
    cancel: threading.Event,
    threads: int = DEFAULT_THREADS,
    retry: RetryPolicy | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    peers: Sequence[Peer] = (),
    link_bytes_per_s: float | None = None,
) -> FetchReport:
    """Bring a plan's bytes into the tier and return once all are in place.

    What `peers` have is read from them, and from `source` too where they leave more than a bit of
    `link_bytes_per_s` unused; a peer that fails costs nothing but time. `threads` is the number of
    connections to the source.
    `on_progress` gets the landed and the total bytes, in the calling thread. Safe to call again
    after a failure: what has landed is kept. Only one call per plan at a time. Raises `Cancelled`
    soon after `cancel` is set, `DeadlineExceeded` after `timeout_s`, and what `Tier.begin` and
    `Connection.read_into` raise; readers of the fetch raise the same.
    """
    landing = tier.begin(plan)
    allotment = Allotment(landing, tier, missing_tasks(landing), link_bytes_per_s=link_bytes_per_s)
    workers = _Workers(landing, allotment, source, peers, retry or RetryPolicy())
    watch = _Watch(workers, cancel, timeout_s, on_progress or _ignore_progress)
    with _failure_recorded(landing):
        workers.run(threads, watch.check)
        watch.check()
    landing.finish()
    return workers.report()


def _ignore_progress(landed_bytes: int, total_bytes: int) -> None:
    pass


@contextmanager
def _failure_recorded(landing: TierFetch) -> Iterator[None]:
    """Tell readers why no more will come, whatever it is; they would wait for ever."""
    try:
        yield
    except ParaServeError as error:
        landing.fail(error)
        raise
    except BaseException:
        landing.fail(
            Unavailable(f"fetch {landing.plan.fetch_id} broke off: the node's log says why")
        )
        raise


class _Watch:
    """What the calling thread looks after while the workers fetch."""

    def __init__(
        self,
        workers: _Workers,
        cancel: threading.Event,
        timeout_s: float,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._workers = workers
        self._cancel = cancel
        self._timeout_s = timeout_s
        self._on_progress = on_progress

    def check(self) -> None:
        plan = self._workers.landing.plan
        self._on_progress(self._workers.landed_bytes, plan.total_bytes)
        if self._workers.is_complete:
            return
        if self._cancel.is_set():
            raise Cancelled(f"fetch {plan.fetch_id} was cancelled")
        if self._workers.elapsed_s() > self._timeout_s:
            raise DeadlineExceeded(
                f"fetch {plan.fetch_id} did not finish within {self._timeout_s:g} s: "
                f"{self._workers.landed_bytes} of {plan.total_bytes} bytes landed"
            )


class _Workers:
    """The threads of one fetch and what they share; `_lock` guards everything that changes."""

    def __init__(
        self,
        landing: TierFetch,
        allotment: Allotment,
        source: Source,
        peers: Sequence[Peer],
        policy: RetryPolicy,
    ) -> None:
        self.landing = landing
        self._allotment = allotment
        self._source = source
        self._peers = peers
        self._retrier = Retrier(pause=self._pause, policy=policy, rng=random.Random())
        sizes = [landing.parts[part].size_bytes for part in landing.missing_parts()]
        self._largest_part_bytes = max(sizes, default=0)
        self._reused_bytes = landing.plan.total_bytes - sum(sizes)
        self._started_s = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._fetched_bytes = self._file_bytes = self._peer_bytes = self._retries = 0
        self._first_part_s: float | None = None

    @property
    def landed_bytes(self) -> int:
        return self._reused_bytes + self._fetched_bytes + self._allotment.adopted_bytes

    @property
    def is_complete(self) -> bool:
        return self._allotment.is_complete

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def run(self, threads: int, watch: Callable[[], None]) -> None:
        """Do all tasks; ends early, with every thread gone, where one of them or `watch` raises."""
        shares = [(peer, self._allotment.add_peer()) for peer in self._peers]
        work = [self._work] * threads
        work += [partial(self._work_with, *share) for share in shares for _ in range(_PER_PEER)]
        with ThreadPoolExecutor(len(work), thread_name_prefix="fetch") as pool:
            try:
                running = {pool.submit(each) for each in work}
                while running:
                    done, running = wait(running, timeout=_WATCH_S, return_when=FIRST_EXCEPTION)
                    _raise_first(done)
                    watch()
            except BaseException:
                self._stop()
                raise

    def report(self) -> FetchReport:
        return FetchReport(
            fetched_bytes=self._fetched_bytes,
            reused_bytes=self._reused_bytes + self._allotment.adopted_bytes,
            file_bytes=self._file_bytes,
            store_bytes=self._fetched_bytes + self._file_bytes - self._peer_bytes,
            peer_bytes=self._peer_bytes,
            retries=self._retries,
            first_part_s=self._first_part_s,
            total_s=self.elapsed_s(),
        )

    def _work(self) -> None:
        """Bring bytes from the store until all are there."""
        connection = self._opened(self._source.connect())
        buffer = self._buffer()
        try:
            while (task := self._allotment.take_for_store()) is not None:
                with self._allotted(task):
                    content = buffer(task)
                    retries = 0
                    if content:
                        retries = self._retrier.read(connection, task.stored, task.start, content)
                    self._put(task, content, retries)
        finally:
            connection.close()

    def _work_with(self, peer: Peer, share: PeerShare) -> None:
        """Bring bytes from a peer for as long as it has any and answers."""
        names = {stored.key: name for name, stored in self.landing.object_names.items()}
        names |= {stored.key: name for name, stored in self.landing.file_names.items()}
        connection = self._opened(peer.connect(names))
        buffer = self._buffer()
        try:
            self._ask(peer, share)
            while not share.is_lost:
                task = self._allotment.take_for_peer(share)
                if task is None:
                    if not self._allotment.wait_for_peer(share):
                        return
                    self._ask(peer, share)
                    continue
                with self._allotted(task):
                    content = buffer(task)
                    connection.read_into(task.stored, task.start, content)
                    self._put(task, content, retries=0, from_peer=True)
        except (ParaServeError, BrokenTransfer) as error:
            self._allotment.lose_peer(share)
            if not self._stopped.is_set():
                _log.info("peer given up fetch=%s reason=%s", self.landing.plan.fetch_id, error)
        finally:
            connection.close()

    def _ask(self, peer: Peer, share: PeerShare) -> None:
        try:
            holdings = peer.holdings(self._allotment.names)
        except SourceUnavailable as error:
            _log.info("peer given up fetch=%s reason=%s", self.landing.plan.fetch_id, error)
            self._allotment.lose_peer(share)
        else:
            self._allotment.update_peer(share, holdings)

    @contextmanager
    def _allotted(self, task: Task) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._allotment.give_back(task)
            raise
        self._allotment.done(task)

    def _buffer(self) -> Callable[[Task], memoryview]:
        # One buffer for all parts: it stays in the processor's cache and its pages are there.
        whole = memoryview(bytearray(self._largest_part_bytes))

        def content(task: Task) -> memoryview:
            if task.part is None:
                return memoryview(bytearray(task.size_bytes))
            return whole[: task.size_bytes]

        return content

    def _put(
        self, task: Task, content: memoryview, retries: int, *, from_peer: bool = False
    ) -> None:
        if task.part is None:
            self.landing.write_file(task.stored.key, content)
        else:
            self.landing.write_part(task.part, content)
        with self._lock:
            self._retries += retries
            self._peer_bytes += task.size_bytes if from_peer else 0
            if task.part is None:
                self._file_bytes += task.size_bytes
                return
            self._fetched_bytes += task.size_bytes
            if self._first_part_s is None:
                self._first_part_s = self.elapsed_s()

    def _opened(self, connection: Connection) -> Connection:
        with self._lock:
            self._connections.append(connection)
        if self._stopped.is_set():  # `_stop` may have gone through the list just before
            connection.abort()
        return connection

    def _stop(self) -> None:
        self._stopped.set()
        self._allotment.stop()
        with self._lock:
            for connection in self._connections:
                connection.abort()

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Cancelled("the fetch has ended")


def _raise_first(futures: set[Future[None]]) -> None:
    for future in futures:
        future.result()
