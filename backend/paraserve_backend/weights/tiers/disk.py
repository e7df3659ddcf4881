"""The disk tier of a node: weights on disk as extents, evicted by last use, within a limit.

`agent.disk_upkeep` decides when to write to it. Losing any of it costs only time, so no error here
fails a fetch.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from paraserve_backend.byte_ranges import ByteRange, merge, within
from paraserve_backend.daemon.private_files import make_folder, own_folder
from paraserve_backend.weights.tiers.contents import TierObject
from paraserve_backend.weights.tiers.disk_format import (
    DamagedExtent,
    DiskExtent,
    Held,
    Identity,
    disk_problems,
    object_folders,
    read_extent,
    strange_files,
    whole_blocks,
    whole_extents,
    write_extent,
)
from paraserve_backend.weights.tiers.filesystem import LOCK, lock_folder
from paraserve_backend.weights.tiers.layout import OBJECTS

logger = logging.getLogger(__name__)

#: So long nothing is written after the disk has refused to take something.
_REST_S = 600.0

#: Gives the ranges of an object, by its name, that must stay.
KeptRanges = Callable[[str], Sequence[ByteRange]]


class DiskTier:
    """A folder of extents, least recently used first to go; one process at a time uses it.

    Every method may be called from any thread, but `save` from one at a time.
    """

    def __init__(
        self, directory: Path, lock_fd: int, disk_bytes: int, now: Callable[[], float]
    ) -> None:
        self.directory = directory
        self._lock_fd = lock_fd
        self._disk_bytes = disk_bytes
        self._now = now
        self._rests_until_s = float("-inf")
        self._identities: dict[str, Identity] = {}
        self._extents: dict[str, list[DiskExtent]] = {}
        #: Least recently used first.
        self._order: OrderedDict[Held, None] = OrderedDict()
        self._used_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, directory: Path, *, disk_bytes: int, now: Callable[[], float] = time.monotonic
    ) -> DiskTier:
        """Open or create a tier of at most `disk_bytes`, with what an earlier agent left in it.

        Raises `AlreadyExists` where another process has it open, and `InvalidRequest` where the
        folder is not ours alone.
        """
        own_folder(directory, entries=(OBJECTS, LOCK))
        make_folder(directory / OBJECTS)
        disk = cls(directory, lock_folder(directory), disk_bytes, now)
        disk._load()
        disk._make_room(0, lambda _: ())
        return disk

    def close(self) -> None:
        os.close(self._lock_fd)

    @property
    def used_bytes(self) -> int:
        """Of the disk, in whole blocks."""
        return self._used_bytes

    @property
    def is_resting(self) -> bool:
        """Whether the disk has refused to take something, not long ago."""
        return self._now() < self._rests_until_s

    def byte_ranges(self, name: str) -> tuple[ByteRange, ...]:
        """Return which bytes of the object with this file name are there."""
        with self._lock:
            return merge(extent.byte_range for extent in self._extents.get(name, ()))

    def contents(self) -> tuple[TierObject, ...]:
        """Return what is there, by object."""
        with self._lock:
            identities = [self._identities[name] for name, found in self._extents.items() if found]
        return tuple(
            TierObject(
                store=identity.store,
                source_uri=identity.source_uri,
                stored=identity.stored,
                landed=self.byte_ranges(identity.name),
            )
            for identity in identities
        )

    def extents(self) -> tuple[Held, ...]:
        """Return what is there, least recently used first."""
        with self._lock:
            return tuple(self._order)

    def touching(self, name: str, byte_range: ByteRange) -> tuple[Held, ...]:
        """Return the extents that have any byte of `byte_range`, in the object's order."""
        with self._lock:
            return tuple(
                Held(name=name, extent=extent)
                for extent in self._extents.get(name, ())
                if extent.start < byte_range[1] and byte_range[0] < extent.end
            )

    def use(self, name: str, byte_ranges: Iterable[ByteRange]) -> None:
        """Count these bytes as used just now."""
        for held in [held for used in byte_ranges for held in self.touching(name, used)]:
            with self._lock:
                if held not in self._order:
                    continue
                self._order.move_to_end(held)
            with suppress(OSError):  # only the order after a restart depends on it
                os.utime(held.path(self.directory))

    def load(self, held: Held, buffer: memoryview) -> memoryview:
        """Return the bytes of an extent, which lie in `buffer`.

        Raises `DamagedExtent` where they are lost; they are dropped from the tier, too.
        """
        try:
            return read_extent(held.path(self.directory), held.extent, buffer)
        except DamagedExtent as damage:
            logger.warning("damage on disk file=%s reason=%s", held.path(self.directory), damage)
            self._drop(held)
            raise

    def save(
        self, found: TierObject, byte_range: ByteRange, buffer: memoryview, kept: KeptRanges
    ) -> bool:
        """Write an extent of an object, whose bytes begin `buffer`; returns whether it is there.

        To make room, what was used least recently goes, but nothing of what `kept` gives for an
        object's file name. Where the disk refuses, there is a warning, and a rest.
        """
        size_bytes = byte_range[1] - byte_range[0]
        if self.is_resting or not self._make_room(whole_blocks(size_bytes), kept):
            return False
        identity = Identity(store=found.store, source_uri=found.source_uri, stored=found.stored)
        try:
            folder = identity.make_folder(self.directory)
            extent = write_extent(folder, byte_range[0], size_bytes, buffer)
        except OSError as error:
            self._rest(error)
            return False
        with self._lock:
            self._add(identity, extent)
        return True

    def drop(self, name: str, byte_range: ByteRange) -> None:
        """Forget all extents that have any of these bytes."""
        for held in self.touching(name, byte_range):
            self._drop(held)

    def check_integrity(self) -> tuple[str, ...]:
        """Return one sentence for every file that is not as the index says; reads no content."""
        return tuple(disk_problems(self.directory, self.extents()))

    def _load(self) -> None:
        """Take in what is there, and remove what is not whole."""
        found: list[tuple[int, Identity, DiskExtent]] = []
        for folder in object_folders(self.directory):
            identity = Identity.read(folder)
            extents = list(whole_extents(folder)) if identity else []
            if identity is None or not extents:
                shutil.rmtree(folder)
                continue
            for path in strange_files(folder, [held for _, held in extents]):
                path.unlink()
            found += [(used, identity, held.extent) for used, held in extents]
        for _, identity, extent in sorted(found, key=lambda entry: entry[0]):
            self._add(identity, extent)

    def _add(self, identity: Identity, extent: DiskExtent) -> None:
        name = identity.name
        self._identities[name] = identity
        extents = self._extents.setdefault(name, [])
        extents.append(extent)
        extents.sort(key=lambda extent: extent.start)
        self._order[Held(name=name, extent=extent)] = None
        self._used_bytes += extent.disk_bytes

    def _make_room(self, size_bytes: int, kept: KeptRanges) -> bool:
        """Drop what was used least recently; returns whether so many bytes now fit."""
        excess_bytes = self._used_bytes + size_bytes - self._disk_bytes
        victims = []
        for held in self.extents() if excess_bytes > 0 else ():
            if not within(held.extent.byte_range, kept(held.name)):
                victims.append(held)
                excess_bytes -= held.extent.disk_bytes
            if excess_bytes <= 0:
                break
        if excess_bytes > 0:
            return False
        for held in victims:
            self._drop(held)
        return True

    def _drop(self, held: Held) -> None:
        with self._lock:
            if held not in self._order:
                return  # another thread was first
            del self._order[held]
            self._extents[held.name].remove(held.extent)
            self._used_bytes -= held.extent.disk_bytes
        with suppress(OSError):  # of a disk that fails; the next agent looks again
            held.path(self.directory).unlink()

    def _rest(self, error: OSError) -> None:
        self._rests_until_s = self._now() + _REST_S
        logger.warning(
            "disk tier takes nothing for %g s dir=%s reason=%s; free some of that disk, or set a "
            "smaller disk_bytes",
            _REST_S,
            self.directory,
            error.strerror,
        )
