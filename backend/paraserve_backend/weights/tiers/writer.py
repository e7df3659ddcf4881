"""The write side of one fetch in the memory tier: where its chunks go, and which are in place."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paraserve_backend.byte_ranges import ByteRange, merge
from paraserve_backend.errors import InsufficientCapacity, ParaServeError
from paraserve_backend.protocol.run_dir import TierDir
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.sources.base import ObjectRange, StoredObject
from paraserve_backend.weights.tiers.filesystem import free_bytes
from paraserve_backend.weights.tiers.layout import (
    FILES,
    OBJECTS,
    PROGRESS,
    FetchStatus,
    Manifest,
    PartTable,
    ProgressFile,
    object_name,
    write_atomically,
)


class TierFetch:
    """Made by `paraserve_backend.weights.tiers.memory.Tier.begin`.

    Threads may write different parts at once.
    """

    def __init__(self, tier_dir: Path, manifest: Manifest) -> None:
        self.plan = manifest.plan
        self._tier_dir = tier_dir
        self._fetch_dir = TierDir(tier_dir).fetch(manifest.plan.fetch_id)
        self._objects = {stored.key: stored for stored in manifest.plan.objects}
        self._table = PartTable(manifest.parts)
        self._progress = ProgressFile(
            self._fetch_dir / PROGRESS, parts=len(self._table.parts), writable=True
        )
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        self._needed = {
            key: merge((part.start, part.end) for part in self.parts if part.object_key == key)
            for key in self._objects
        }
        #: File name in the tier to the object, and to the small file.
        self.object_names = {self.name_of(stored): stored for stored in self.plan.objects}
        self.file_names = {self.name_of(stored): stored for stored in self.plan.files}

    def name_of(self, stored: StoredObject) -> str:
        return object_name(self.plan.store, self.plan.source_uri, stored)

    @property
    def parts(self) -> tuple[ObjectRange, ...]:
        return self._table.parts

    @property
    def status(self) -> FetchStatus:
        return self._progress.status

    def object_of(self, part: int) -> StoredObject:
        return self._objects[self.parts[part].object_key]

    def missing_parts(self) -> list[int]:
        """Return the numbers of the parts still to fetch, in the plan's order."""
        landed = set(self._progress.landed())
        return [part for part in range(len(self.parts)) if part not in landed]

    def missing_files(self) -> list[StoredObject]:
        return [stored for stored in self.plan.files if not self.has_file(stored.key)]

    def write_part(self, part: int, content: memoryview) -> None:
        """Put a part's bytes in place and tell readers.

        Raises `InsufficientCapacity` where the tier's file system has no room for it.
        """
        wanted = self.parts[part]
        fd = self._descriptor(wanted.object_key)
        position = wanted.start
        # Not through a mapping: a page written whole need not be faulted in and zeroed first,
        # which costs more than the copy, and a full file system is an error instead of a SIGBUS.
        with room_for(self.plan, self._tier_dir):
            while position < wanted.end:
                position += os.pwrite(fd, content[position - wanted.start :], position)
        self._progress.mark_landed(part)

    def adopt_part(self, part: int) -> None:
        """Count a part as landed that another fetch has put in place."""
        self._progress.mark_landed(part)

    def write_file(self, key: str, content: bytes | bytearray | memoryview) -> None:
        with room_for(self.plan, self._tier_dir):
            write_atomically(self.file_path(key), content)

    def adopt_file(self, key: str, path: Path) -> None:
        """Take a small file that is in the tier already; another thread may have done so."""
        with suppress(FileExistsError):
            self.file_path(key).hardlink_to(path)

    def file_path(self, key: str) -> Path:
        return self._fetch_dir / FILES / key

    def has_file(self, key: str) -> bool:
        return self.file_path(key).exists()

    def finish(self) -> None:
        """Every part and file is in place."""
        self._close_objects()
        self._progress.status = FetchStatus.DONE

    def fail(self, error: ParaServeError) -> None:
        """End the fetch; readers that wait for more of it raise `error`. A cancel is one too."""
        self._close_objects()
        self._progress.fail(error)

    def landed_ranges(self, key: str) -> tuple[ByteRange, ...]:
        """Return which bytes of an object this fetch has in place."""
        landed = (self.parts[part] for part in self._progress.landed())
        return merge((part.start, part.end) for part in landed if part.object_key == key)

    def landed_within(self, key: str, byte_range: ByteRange) -> tuple[ByteRange, ...]:
        """Return which bytes of the parts that touch `byte_range` are in place."""
        parts = (
            self.parts[part]
            for part in self._table.touching(key, byte_range)
            if self._progress.has_landed(part)
        )
        return merge((part.start, part.end) for part in parts)

    def needed_ranges(self, key: str) -> tuple[ByteRange, ...]:
        return self._needed[key]

    def resume(self) -> None:
        """Go on after `fail`."""
        self._progress.status = FetchStatus.RUNNING

    def close(self) -> None:
        self._close_objects()
        self._progress.close()

    def _descriptor(self, key: str) -> int:
        with self._lock:
            if key not in self._descriptors:
                path = self._tier_dir / OBJECTS / self.name_of(self._objects[key])
                self._descriptors[key] = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            return self._descriptors[key]

    def _close_objects(self) -> None:
        with self._lock:
            for fd in self._descriptors.values():
                os.close(fd)
            self._descriptors.clear()


@contextmanager
def room_for(plan: FetchPlan, tier_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InsufficientCapacity(
            f"no room in the host-memory tier for fetch {plan.fetch_id}, which needs "
            f"{plan.total_bytes} bytes: {error.strerror}, {free_bytes(tier_dir)} bytes are free in "
            f"{tier_dir}; make that file system larger, or set a smaller memory_bytes"
        ) from None
