"""Fetches a plan into the tier, from start to end, as the caller sees it: limits, failure, report.

`assignment` decides who brings what, `workers` are the threads, and `sources.retry` resumes reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from paraserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    ParaServeError,
    Unavailable,
)
from paraserve_backend.weights.fetching.access import require_access
from paraserve_backend.weights.fetching.assignment import Assignment
from paraserve_backend.weights.fetching.tasks import Rank, missing_tasks
from paraserve_backend.weights.fetching.workers import FetchWorkers, Origins
from paraserve_backend.weights.sources.base import Source
from paraserve_backend.weights.sources.peer import Peer
from paraserve_backend.weights.sources.retry import RetryPolicy
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.writer import TierFetch

DEFAULT_THREADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchReport:
    """What one call of `fetch` did.

    Of the plan's bytes, `fetched_bytes` were brought here and `reused_bytes` were in the tier or
    brought there by another fetch; `file_bytes` of small files were brought, too. All that was
    brought is either `store_bytes`, `peer_bytes` or `disk_bytes`.
    """

    fetched_bytes: int
    reused_bytes: int
    file_bytes: int
    store_bytes: int
    peer_bytes: int
    disk_bytes: int
    retries: int
    #: From the start to the first part in place; `None` where none was missing.
    first_part_s: float | None
    total_s: float


def fetch(
    writer: TierFetch,
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
    disk: DiskTier | None = None,
) -> FetchReport:
    """Bring a fetch's bytes into the tier and return once all are in place.

    `writer` is what `tier.begin` has just returned; after a failure, the next `begin` returns it
    again, and what has landed is kept. Only one call per fetch at a time.
    What `disk` has is read from it, else what `peers` have from them, and the rest from `source`;
    where that is far below `link_bytes_per_s` all are asked for all. A disk or a peer that fails
    costs nothing but time. `threads` is the number of connections to the source, and at most so
    many read the disk at once.
    `on_progress` gets the landed and the total bytes, in the calling thread. Raises `Cancelled`
    soon after `cancel` is set, `DeadlineExceeded` after `timeout_s`, and what
    `Connection.read_into` and the writer raise; readers of the fetch raise the same.
    """
    assignment = Assignment(missing_tasks(writer), link_bytes_per_s=link_bytes_per_s)
    origins = Origins(
        store=source, threads=threads, retry=retry or RetryPolicy(), peers=peers, disk=disk
    )
    with _failure_recorded(writer):
        workers = FetchWorkers(writer, tier, assignment, origins)
        watch = _Watch(workers, cancel, timeout_s, on_progress or _ignore_progress)
        workers.run(watch.check)
        watch.check()
        if not workers.bytes_from(Rank.STORE):
            require_access(source, writer.plan)
    writer.finish()
    return _report(workers)


def _report(workers: FetchWorkers) -> FetchReport:
    return FetchReport(
        fetched_bytes=workers.fetched_bytes,
        reused_bytes=workers.reused_bytes,
        file_bytes=workers.file_bytes,
        store_bytes=workers.bytes_from(Rank.STORE),
        peer_bytes=workers.bytes_from(Rank.PEER),
        disk_bytes=workers.bytes_from(Rank.DISK),
        retries=workers.retries,
        first_part_s=workers.first_part_s,
        total_s=workers.elapsed_s(),
    )


def _ignore_progress(landed_bytes: int, total_bytes: int) -> None:
    pass


@contextmanager
def _failure_recorded(writer: TierFetch) -> Iterator[None]:
    """Tell readers why no more will come, whatever it is; they would wait for ever."""
    try:
        yield
    except ParaServeError as error:
        writer.fail(error)
        raise
    except BaseException:
        writer.fail(Unavailable(f"fetch {writer.plan.fetch_id} broke off: the node's log says why"))
        raise


class _Watch:
    """What the calling thread looks after while the workers fetch."""

    def __init__(
        self,
        workers: FetchWorkers,
        cancel: threading.Event,
        timeout_s: float,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._workers = workers
        self._cancel = cancel
        self._timeout_s = timeout_s
        self._on_progress = on_progress

    def check(self) -> None:
        plan = self._workers.writer.plan
        landed_bytes = self._workers.fetched_bytes + self._workers.reused_bytes
        self._on_progress(landed_bytes, plan.total_bytes)
        if self._workers.is_complete:
            return
        if self._cancel.is_set():
            raise Cancelled(f"fetch {plan.fetch_id} was cancelled")
        if self._workers.elapsed_s() > self._timeout_s:
            raise DeadlineExceeded(
                f"fetch {plan.fetch_id} did not finish within {self._timeout_s:g} s: "
                f"{landed_bytes} of {plan.total_bytes} bytes landed"
            )
