"""Which bytes of released fetches stay in host memory, and which of them are evicted first.

Only the index, one small file per object version; `tiers.memory` moves the bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from paraserve_backend.byte_ranges import ByteRange, merge, subtract
from paraserve_backend.daemon.private_files import make_folder
from paraserve_backend.weights.sources.base import StoredObject, StoreIdentity, check_key
from paraserve_backend.weights.tiers.digests import DigestPiece
from paraserve_backend.weights.tiers.layout import object_name, write_atomically

logger = logging.getLogger(__name__)

CACHE = "cache"
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Bytes `[start, end)` of an object; of two, the one with the lower `used` goes first."""

    start: int
    end: int
    used: int

    @property
    def byte_range(self) -> ByteRange:
        return (self.start, self.end)


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedObject:
    """An object version and which of its bytes may be used again (sorted, disjoint)."""

    store: StoreIdentity
    source_uri: str
    stored: StoredObject
    extents: tuple[Extent, ...]
    #: What is known of the bytes.
    pieces: tuple[DigestPiece, ...] = ()

    @property
    def name(self) -> str:
        return object_name(self.store, self.source_uri, self.stored)

    @property
    def byte_ranges(self) -> tuple[ByteRange, ...]:
        return merge(extent.byte_range for extent in self.extents)

    def with_ranges(self, byte_ranges: Sequence[ByteRange], used: int) -> CachedObject:
        """Add bytes, or mark those that are there as used again."""
        fresh = [Extent(start=start, end=end, used=used) for start, end in byte_ranges]
        return replace(self, extents=_sorted([*_cut(self.extents, byte_ranges), *fresh]))

    def without_ranges(self, byte_ranges: Sequence[ByteRange]) -> CachedObject:
        return replace(self, extents=_sorted(_cut(self.extents, byte_ranges)))

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, content: bytes) -> CachedObject:
        """Raises `ValueError` where it is no such record."""
        found = msgspec.json.decode(content, type=cls)
        check_key(found.stored.key)
        bounds = [bound for extent in found.extents for bound in extent.byte_range]
        size_bytes = found.stored.size_bytes
        if bounds != sorted(bounds) or not all(0 <= bound <= size_bytes for bound in bounds):
            raise ValueError("its extents overlap or leave the object")
        return found


class CacheIndex:
    """The cached objects of one tier by file name. Not thread-safe: the tier's lock guards it."""

    def __init__(self, directory: Path, objects: dict[str, CachedObject]) -> None:
        self._directory = directory
        self._objects = objects
        extents = (extent for found in objects.values() for extent in found.extents)
        self._clock = max((extent.used for extent in extents), default=0)

    @classmethod
    def open(cls, directory: Path) -> CacheIndex:
        """Read what an earlier agent left; an entry that cannot be read is dropped."""
        make_folder(directory)
        objects = {}
        for path in sorted(directory.iterdir()):
            try:
                found = CachedObject.from_json(path.read_bytes())
                if path.name != found.name:
                    raise ValueError("it is another object's")
            except ValueError as error:
                logger.warning("cache entry dropped name=%s reason=%s", path.name, error)
                path.unlink()
            else:
                objects[path.name] = found
        return cls(directory, objects)

    @property
    def objects(self) -> Mapping[str, CachedObject]:
        return self._objects

    def byte_ranges(self, name: str) -> tuple[ByteRange, ...]:
        found = self._objects.get(name)
        return found.byte_ranges if found else ()

    def tick(self) -> int:
        """Return the next `used`."""
        self._clock += 1
        return self._clock

    def add(self, found: CachedObject, byte_ranges: Sequence[ByteRange], used: int) -> None:
        """Trust these bytes of an object from now on; they must be in place.

        `found` is what is known of it; where the index has it already, that is added to.
        """
        if byte_ranges:
            before = self._objects.get(found.name, found)
            self._put(replace(before.with_ranges(byte_ranges, used), pieces=found.pieces))

    def remove(self, name: str, byte_ranges: Sequence[ByteRange]) -> None:
        """Trust these bytes no longer; to be called before they go."""
        if name in self._objects:
            self._put(self._objects[name].without_ranges(byte_ranges))

    def victims(
        self, excess_bytes: int, pinned: Callable[[str], Sequence[ByteRange]]
    ) -> Iterator[tuple[str, ByteRange]]:
        """Yield what to remove to free `excess_bytes`, least recently used and last bytes first.

        The start of an object stays longest: a forward pass wants the first layers first. The
        index may be changed meanwhile.
        """
        candidates = [
            (extent.used, name, extent.byte_range)
            for name, found in self._objects.items()
            for extent in found.extents
        ]
        candidates.sort(key=lambda candidate: (candidate[0], candidate[1], -candidate[2][0]))
        for _, name, byte_range in candidates:
            for start, end in reversed(subtract([byte_range], pinned(name))):
                if excess_bytes <= 0:
                    return
                # Part of a page frees nothing.
                cut = max(start, (end - excess_bytes) // PAGE_BYTES * PAGE_BYTES)
                excess_bytes -= whole_pages((cut, end))
                yield name, (cut, end)

    def unpinned_bytes(self, pinned: Callable[[str], Sequence[ByteRange]]) -> int:
        """Return the memory of what could be removed, in whole pages."""
        return sum(
            whole_pages(byte_range)
            for name, found in self._objects.items()
            for byte_range in subtract(found.byte_ranges, pinned(name))
        )

    def _put(self, found: CachedObject) -> None:
        path = self._directory / found.name
        if not found.extents:
            del self._objects[found.name]
            path.unlink(missing_ok=True)
            return
        self._objects[found.name] = found
        try:
            write_atomically(path, found.to_json())
        except OSError as error:
            # The file system is full, which is when bytes are removed. Forgotten at a restart.
            logger.warning("cache entry not written name=%s reason=%s", found.name, error.strerror)
            path.unlink(missing_ok=True)


def page_range(byte_range: ByteRange, page_bytes: int = PAGE_BYTES) -> ByteRange:
    """Return the bytes of all pages that `byte_range` touches."""
    start, end = byte_range
    return (start // page_bytes * page_bytes, -(-end // page_bytes) * page_bytes)


def whole_pages(byte_range: ByteRange, page_bytes: int = PAGE_BYTES) -> int:
    """Return the number of bytes of all pages that `byte_range` touches."""
    start, end = page_range(byte_range, page_bytes)
    return end - start


def _cut(extents: Iterable[Extent], byte_ranges: Sequence[ByteRange]) -> Iterator[Extent]:
    for extent in extents:
        for start, end in subtract([extent.byte_range], byte_ranges):
            yield replace(extent, start=start, end=end)


def _sorted(extents: Iterable[Extent]) -> tuple[Extent, ...]:
    """In order, neighbours of the same use as one."""
    joined: list[Extent] = []
    for extent in sorted(extents, key=lambda extent: extent.start):
        last = joined[-1] if joined else None
        if last and (last.end, last.used) == (extent.start, extent.used):
            joined[-1] = replace(last, end=extent.end)
        else:
            joined.append(extent)
    return tuple(joined)
