"""Fetching a plan's bytes into the tier: a few threads, each with its own connection.

Parts are taken in the plan's order, so that the first layers land first. Retry and resume are
`paraserve_backend.weights.transfer`'s.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass

from paraserve_backend.errors import Cancelled, DeadlineExceeded, ParaServeError, Unavailable
from paraserve_backend.weights.objects import Connection, Source, StoredObject
from paraserve_backend.weights.plan import FetchPlan
from paraserve_backend.weights.tier import Tier
from paraserve_backend.weights.tier_fetch import TierFetch
from paraserve_backend.weights.transfer import Retrier, RetryPolicy

DEFAULT_THREADS = 4
#: How soon a cancel or the time limit is noticed.
_WATCH_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """What one call of `fetch` did; `reused_bytes` were in the tier before it."""

    fetched_bytes: int
    reused_bytes: int
    file_bytes: int
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
) -> FetchReport:
    """Bring a plan's bytes into the tier and return once all are in place.

    `on_progress` gets the landed and the total bytes, in the calling thread. Safe to call again
    after a failure: what has landed is kept. Only one call per plan at a time. Raises `Cancelled`
    soon after `cancel` is set, `DeadlineExceeded` after `timeout_s`, and what `Tier.begin` and
    `Connection.read_into` raise; readers of the fetch raise the same.
    """
    landing = tier.begin(plan)
    workers = _Workers(landing, source, retry or RetryPolicy())
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

    def __init__(self, landing: TierFetch, source: Source, policy: RetryPolicy) -> None:
        self.landing = landing
        self._source = source
        self._retrier = Retrier(pause=self._pause, policy=policy, rng=random.Random())
        files, parts = landing.missing_files(), landing.missing_parts()
        self._tasks: deque[StoredObject | int] = deque([*files, *parts])
        self._left = len(self._tasks)
        sizes = [landing.parts[part].size_bytes for part in parts]
        self._largest_part_bytes = max(sizes, default=0)
        self._reused_bytes = landing.plan.total_bytes - sum(sizes)
        self._started_s = time.monotonic()
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._fetched_bytes = self._file_bytes = self._retries = 0
        self._first_part_s: float | None = None

    @property
    def landed_bytes(self) -> int:
        return self._reused_bytes + self._fetched_bytes

    @property
    def is_complete(self) -> bool:
        return self._left == 0

    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    def run(self, threads: int, watch: Callable[[], None]) -> None:
        """Do all tasks; ends early, with every thread gone, where one of them or `watch` raises."""
        with ThreadPoolExecutor(threads, thread_name_prefix="fetch") as pool:
            try:
                running = {pool.submit(self._work) for _ in range(threads)}
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
            reused_bytes=self._reused_bytes,
            file_bytes=self._file_bytes,
            retries=self._retries,
            first_part_s=self._first_part_s,
            total_s=self.elapsed_s(),
        )

    def _work(self) -> None:
        connection = self._connect()
        # One buffer for all parts: it stays in the processor's cache and its pages are there.
        buffer = memoryview(bytearray(self._largest_part_bytes))
        try:
            while not self._stopped.is_set() and (task := self._take()) is not None:
                if isinstance(task, StoredObject):
                    self._fetch_file(connection, task)
                else:
                    self._fetch_part(connection, task, buffer)
        finally:
            connection.close()

    def _take(self) -> StoredObject | int | None:
        with self._lock:
            return self._tasks.popleft() if self._tasks else None

    def _fetch_file(self, connection: Connection, stored: StoredObject) -> None:
        content = bytearray(stored.size_bytes)
        retries = 0
        if content:
            retries = self._retrier.read(connection, stored, 0, memoryview(content))
        self.landing.write_file(stored.key, content)
        with self._lock:
            self._left -= 1
            self._file_bytes += len(content)
            self._retries += retries

    def _fetch_part(self, connection: Connection, number: int, buffer: memoryview) -> None:
        part = self.landing.parts[number]
        stored = self.landing.object_of(number)
        content = buffer[: part.size_bytes]
        retries = self._retrier.read(connection, stored, part.start, content)
        self.landing.write_part(number, content)
        with self._lock:
            self._left -= 1
            self._fetched_bytes += part.size_bytes
            self._retries += retries
            if self._first_part_s is None:
                self._first_part_s = self.elapsed_s()

    def _connect(self) -> Connection:
        connection = self._source.connect()
        with self._lock:
            self._connections.append(connection)
        if self._stopped.is_set():  # `_stop` may have gone through the list just before
            connection.abort()
        return connection

    def _stop(self) -> None:
        self._stopped.set()
        with self._lock:
            for connection in self._connections:
                connection.abort()

    def _pause(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise Cancelled("the fetch has ended")


def _raise_first(futures: set[Future[None]]) -> None:
    for future in futures:
        future.result()
