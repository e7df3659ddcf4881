"""The writer's side of one fetch: where its parts go, and which of them are in place."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from paraserve_backend.errors import InsufficientCapacity, ParaServeError
from paraserve_backend.landing import (
    FETCHES,
    FILES,
    OBJECTS,
    PROGRESS,
    FetchStatus,
    Manifest,
    PartTable,
    Progress,
    object_name,
    write_atomically,
    write_error,
)
from paraserve_backend.objects import ObjectRange, StoredObject
from paraserve_backend.plan import FetchPlan
from paraserve_backend.spans import Span, merge


class TierFetch:
    """Made by `paraserve_backend.tier.Tier.begin`.

    Threads may fill and mark different parts at once.
    """

    def __init__(self, tier_dir: Path, manifest: Manifest) -> None:
        self.plan = manifest.plan
        self._tier_dir = tier_dir
        self._fetch_dir = tier_dir / FETCHES / manifest.plan.fetch_id
        self._objects = {stored.key: stored for stored in manifest.plan.objects}
        self._table = PartTable(manifest.parts)
        self._progress = Progress(
            self._fetch_dir / PROGRESS, parts=len(self._table.parts), writable=True
        )
        self._maps: dict[str, tuple[int, mmap.mmap]] = {}
        self._lock = threading.Lock()

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
        folder = self._fetch_dir / FILES
        return [stored for stored in self.plan.files if not (folder / stored.key).exists()]

    def view(self, part: int) -> memoryview:
        """Return where a part's bytes go.

        Raises `InsufficientCapacity` where the tier's file system has no room for it.
        """
        wanted = self.parts[part]
        fd, mapped = self._object_map(wanted.object_key)
        with room_for(self.plan):
            # Without this, running out of room while the mapping is written to is a SIGBUS.
            os.posix_fallocate(fd, wanted.start, wanted.size_bytes)
        return memoryview(mapped)[wanted.start : wanted.end]

    def mark_landed(self, part: int) -> None:
        self._progress.mark_landed(part)

    def write_file(self, key: str, content: bytes | bytearray) -> None:
        with room_for(self.plan):
            write_atomically(self._fetch_dir / FILES / key, content)

    def finish(self) -> None:
        """Every part and file is in place."""
        self._unmap()
        self._progress.status = FetchStatus.DONE

    def fail(self, error: ParaServeError) -> None:
        """End the fetch; readers that wait for more of it raise `error`. A cancel is one too."""
        self._unmap()
        write_error(self._fetch_dir, error)
        self._progress.status = FetchStatus.FAILED

    def landed_spans(self, key: str) -> tuple[Span, ...]:
        """Return which bytes of an object this fetch has in place."""
        landed = (self.parts[part] for part in self._progress.landed())
        return merge((part.start, part.end) for part in landed if part.object_key == key)

    def needed_spans(self, key: str) -> tuple[Span, ...]:
        return merge((part.start, part.end) for part in self.parts if part.object_key == key)

    def resume(self) -> None:
        """Go on after `fail`."""
        self._progress.status = FetchStatus.RUNNING

    def close(self) -> None:
        self._unmap()
        self._progress.close()

    def _object_map(self, key: str) -> tuple[int, mmap.mmap]:
        with self._lock:
            if key not in self._maps:
                stored = self._objects[key]
                path = self._tier_dir / OBJECTS / object_name(self.plan.source_uri, stored)
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                self._maps[key] = (fd, mmap.mmap(fd, stored.size_bytes))
            return self._maps[key]

    def _unmap(self) -> None:
        """Let go of the object files; a mapping that is still viewed goes with its last view."""
        with self._lock:
            for fd, _ in self._maps.values():
                os.close(fd)
            self._maps.clear()


@contextmanager
def room_for(plan: FetchPlan) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InsufficientCapacity(
            f"no room in the host-memory tier for fetch {plan.fetch_id}: {error.strerror}"
        ) from None
