"""How a worker reads from one kind of source: the store, a peer, or this node's disk.

A reader handles the failures of its source and raises only those that end the whole fetch.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Protocol

from paraserve_backend.byte_ranges import merge, within
from paraserve_backend.errors import Cancelled, ParaServeError, SourceUnavailable
from paraserve_backend.weights.fetching.assignment import Assignment
from paraserve_backend.weights.fetching.tasks import FetchSource, Task
from paraserve_backend.weights.sources.base import BrokenTransfer, Connection, Holding, Source
from paraserve_backend.weights.sources.peer import Peer
from paraserve_backend.weights.sources.retry import Retrier
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.disk_format import DamagedExtent, aligned_buffer

logger = logging.getLogger(__name__)


class SourceReader(Protocol):
    """Used by one thread, but for `break_off`."""

    def refresh(self) -> None:
        """Ask the source again what it has."""

    def read(self, task: Task) -> memoryview | None:
        """Return the task's bytes, valid until the next read; `None` if they are not to be had."""

    def distrust(self, task: Task) -> None:
        """What was read last for the task is not what the store gave; ask no more for that."""

    def break_off(self) -> None:
        """Make the read that runs return or raise at once, if it can be ended."""

    def close(self) -> None: ...


class PartBuffer:
    """Memory for one task at a time: it stays in the processor's cache and its pages are there."""

    def __init__(self, part_bytes: int) -> None:
        self._whole = memoryview(bytearray(part_bytes))

    def for_task(self, task: Task) -> memoryview:
        if task.part is None:
            return memoryview(bytearray(task.size_bytes))
        return self._whole[: task.size_bytes]


class StoreReader:
    """Reads from the store, with its own connection; raises what stays after bounded retries.

    It connects when it first reads: to open a store takes a tenth of a second.
    """

    def __init__(self, store: Source, retrier: Retrier, buffer: PartBuffer) -> None:
        self._store = store
        self._retrier = retrier
        self._buffer = buffer
        self._connection: Connection | None = None
        self._is_broken_off = False
        self._lock = threading.Lock()
        self.retries = 0

    def refresh(self) -> None:
        """The store has everything."""

    def read(self, task: Task) -> memoryview | None:
        content = self._buffer.for_task(task)
        try:
            if content:
                self.retries += self._retrier.read(
                    self._connected(), task.stored, task.start, content
                )
        except Cancelled:
            self.close()
            with self._lock:
                self._connection, self._is_broken_off = None, False
            return None
        return content

    def distrust(self, task: Task) -> None:
        """The store says what is right."""

    def break_off(self) -> None:
        with self._lock:
            self._is_broken_off = True
            connection = self._connection
        if connection is not None:
            connection.abort()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def _connected(self) -> Connection:
        if self._connection is None:
            connection = self._store.connect()
            with self._lock:
                self._connection = connection
                is_broken_off = self._is_broken_off
            if is_broken_off:  # while it was made
                connection.abort()
        return self._connection


class PeerReader:
    """Reads from a peer for as long as it answers as it should; it is lost to the fetch then."""

    def __init__(
        self,
        peer: Peer,
        source: FetchSource,
        assignment: Assignment,
        names: Mapping[str, str],
        buffer: PartBuffer,
    ) -> None:
        self._peer = peer
        self._source = source
        self._assignment = assignment
        self._names = names
        self._buffer = buffer
        self._connection = peer.connect(names)

    def refresh(self) -> None:
        try:
            holdings = self._peer.holdings(self._assignment.names)
        except SourceUnavailable as error:
            self._give_up(error)
        else:
            self._assignment.update(self._source, holdings)

    def read(self, task: Task) -> memoryview | None:
        content = self._buffer.for_task(task)
        try:
            if content:
                self._connection.read_into(task.stored, task.start, content)
        except Cancelled:
            self._connection.close()
            self._connection = self._peer.connect(self._names)
            return None
        except (ParaServeError, BrokenTransfer) as error:
            self._give_up(error)
            return None
        return content

    def distrust(self, task: Task) -> None:
        self._assignment.lose(self._source)

    def break_off(self) -> None:
        self._connection.abort()

    def close(self) -> None:
        self._connection.close()

    def _give_up(self, error: Exception) -> None:
        logger.info("peer given up reason=%s", error)
        self._assignment.lose(self._source)


class DiskReader:
    """Reads what the disk tier has."""

    def __init__(self, disk: DiskTier, source: FetchSource, assignment: Assignment) -> None:
        self._disk = disk
        self._source = source
        self._assignment = assignment
        self._buffer = aligned_buffer()

    def refresh(self) -> None:
        """What the disk has only becomes less while a fetch runs, and then `read` sees it."""
        if not self._source.has_answered:
            self._report_holdings()

    def read(self, task: Task) -> memoryview | None:
        content = self._join(task)
        if content is None:
            self._report_holdings()
        else:
            self._disk.use(task.name, [task.byte_range])
        return content

    def distrust(self, task: Task) -> None:
        self._disk.drop(task.name, task.byte_range)
        self._report_holdings()

    def break_off(self) -> None:
        """A read of a disk cannot be ended."""

    def close(self) -> None:
        """Nothing is open between reads."""

    def _join(self, task: Task) -> memoryview | None:
        start, end = task.byte_range
        found = self._disk.touching(task.name, task.byte_range)
        if not within(task.byte_range, merge(held.extent.byte_range for held in found)):
            return None
        try:
            if len(found) == 1:
                at = found[0].extent.start
                return self._disk.load(found[0], self._buffer)[start - at : end - at]
            content = memoryview(bytearray(task.size_bytes))
            for held in found:
                first, last = max(start, held.extent.start), min(end, held.extent.end)
                loaded = self._disk.load(held, self._buffer)
                at = held.extent.start
                content[first - start : last - start] = loaded[first - at : last - at]
        except DamagedExtent:
            return None
        return content

    def _report_holdings(self) -> None:
        byte_ranges = {name: self._disk.byte_ranges(name) for name in self._assignment.names}
        self._assignment.update(
            self._source,
            {name: Holding(landed=landed, coming=()) for name, landed in byte_ranges.items()},
        )
