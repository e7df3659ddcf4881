"""What a node does for its disk tier while it is idle, in small steps.

It copies to disk what only host memory has, so that memory can be freed at once, and it reads
extents back to find damage before a start needs them. How fast, and how long after the last fetch,
is decided here. The disk tier itself is `weights.tiers.disk`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from paraserve_backend.byte_ranges import ByteRange, cut, subtract
from paraserve_backend.daemon.tasks import in_thread
from paraserve_backend.errors import NotFound
from paraserve_backend.weights.tiers.contents import TierObject
from paraserve_backend.weights.tiers.digests import DamagedPiece
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.disk_format import (
    EXTENT_BYTES,
    DamagedExtent,
    Held,
    aligned_buffer,
)
from paraserve_backend.weights.tiers.memory import Tier


class DiskUpkeep:
    """Not thread-safe: one thread at a time takes steps."""

    def __init__(self, tier: Tier, disk: DiskTier) -> None:
        self._tier = tier
        self._disk = disk
        self._buffer = aligned_buffer()
        self._in_memory: dict[str, Sequence[ByteRange]] = {}
        self._to_write: deque[tuple[TierObject, ByteRange]] = deque()
        self._to_verify: deque[Held] = deque()

    def write_next(self) -> bool:
        """Copy one extent to disk; returns whether there may be more to copy."""
        if self._disk.is_resting:
            return False
        if not self._to_write:
            self._look()
        if self._to_write and not self._write(*self._to_write.popleft()):
            self._to_write.clear()  # what to do with a full disk may look different next time
        return bool(self._to_write)

    def verify_next(self) -> None:
        """Read one extent, each in turn; one that is damaged is dropped, with a warning."""
        if not self._to_verify:
            self._to_verify.extend(self._disk.extents())
        if self._to_verify:
            with suppress(DamagedExtent):
                self._disk.load(self._to_verify.popleft(), self._buffer)

    def _look(self) -> None:
        contents = self._tier.contents(with_files=True)
        # Kept: whatever the disk alone has was used before anything that memory has.
        self._in_memory = {found.name: found.landed for found in contents}
        self._to_write.extend(
            (found, byte_range)
            for found in contents
            for missing in subtract(found.landed, self._disk.byte_ranges(found.name))
            for byte_range in cut(missing, EXTENT_BYTES)
        )

    def _write(self, found: TierObject, byte_range: ByteRange) -> bool:
        """Returns whether the disk takes more."""
        start, end = byte_range
        try:
            with self._tier.reading(found.name, byte_range) as (fd, _):
                count = os.preadv(fd, [self._buffer[: end - start]], start)
        except (NotFound, OSError):
            return True  # it has left the memory meanwhile
        if count != end - start:
            return True  # somebody has cut the file off
        if not self._is_right(found.name, byte_range):
            return True
        return self._disk.save(found, byte_range, self._buffer, self._kept)

    def _is_right(self, name: str, byte_range: ByteRange) -> bool:
        """Whether memory still has what the store gave; the disk gets nothing else."""
        content = self._buffer[: byte_range[1] - byte_range[0]]
        try:
            self._tier.digests.check(name, byte_range, content)
        except DamagedPiece:
            self._tier.drop_damaged(name, byte_range)
            return False
        return True

    def _kept(self, name: str) -> Sequence[ByteRange]:
        return self._in_memory.get(name, ())


#: No faster than this, nor than half of what the disk can do.
_WRITE_BYTES_PER_S = 200e6
#: Between two reads of what is there: 100 GB are looked at about once in seven hours.
_IDLE_S = 2.0
#: A start that has its bytes still has to come up, with all the processor time there is.
_QUIET_S = 5.0


class Upkeep:
    """`is_fetching` says whether it should wait."""

    def __init__(
        self,
        work: DiskUpkeep,
        is_fetching: Callable[[], bool],
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._is_fetching = is_fetching
        self._now = now
        self._quiet_since_s = now()

    async def run(self) -> NoReturn:
        while True:
            await asyncio.sleep(await self.step())

    async def step(self) -> float:
        """Do a little, if nothing is in the way; returns how long to wait then."""
        started_s = self._now()
        if self._is_fetching():
            self._quiet_since_s = started_s
        if started_s - self._quiet_since_s < _QUIET_S:
            return _IDLE_S
        if await in_thread(self._work.write_next):
            return max(self._now() - started_s, EXTENT_BYTES / _WRITE_BYTES_PER_S)
        await in_thread(self._work.verify_next)
        return _IDLE_S
