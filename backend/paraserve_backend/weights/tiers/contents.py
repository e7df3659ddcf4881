"""Answers what a tier holds and who needs it; changes nothing.

Not thread-safe: `tiers.memory` asks with its lock held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from paraserve_backend.byte_ranges import (
    ByteRange,
    merge,
    subtract,
    within,
)
from paraserve_backend.errors import NotFound
from paraserve_backend.weights.sources.base import Holding, StoredObject, StoreIdentity
from paraserve_backend.weights.tiers.eviction import CacheIndex
from paraserve_backend.weights.tiers.layout import FILES, OBJECTS, FetchStatus, object_name
from paraserve_backend.weights.tiers.writer import TierFetch


class TierContents:
    """The bytes that the fetches and the cache of one tier have; names are objects' file names."""

    def __init__(
        self,
        directory: Path,
        cache: CacheIndex,
        fetches: Mapping[str, TierFetch],
        reads: Sequence[tuple[str, ByteRange]],
    ) -> None:
        self._directory = directory
        self._cache = cache
        self._fetches = fetches
        #: What somebody reads right now.
        self._reads = reads

    def objects(self) -> dict[str, TierObject]:
        """Return what has an object file: a small file has one once its fetch is released."""
        known = {
            name: (cached.store, cached.source_uri, cached.stored)
            for name, cached in self._cache.objects.items()
        }
        for fetch in self._fetches.values():
            for name, stored in fetch.object_names.items():
                known[name] = (fetch.plan.store, fetch.plan.source_uri, stored)
        return {
            name: TierObject(store=store, source_uri=uri, stored=stored, landed=self.landed(name))
            for name, (store, uri, stored) in known.items()
        }

    def files(self) -> dict[str, TierObject]:
        """Return the small files of fetches, which are there whole."""
        return {
            name: TierObject(
                store=fetch.plan.store,
                source_uri=fetch.plan.source_uri,
                stored=stored,
                landed=((0, stored.size_bytes),),
            )
            for fetch in self._fetches.values()
            for name, stored in fetch.file_names.items()
            if stored.size_bytes and fetch.has_file(stored.key)
        }

    def pinned(self, name: str) -> tuple[ByteRange, ...]:
        """Return the bytes of an object that have to stay."""
        byte_ranges = [byte_range for other, byte_range in self._reads if other == name]
        for fetch in self.having(name):
            if name in fetch.object_names:
                byte_ranges += fetch.needed_ranges(fetch.object_names[name].key)
            else:
                byte_ranges.append((0, fetch.file_names[name].size_bytes))
        return merge(byte_ranges)

    def landed(self, name: str, near: ByteRange | None = None) -> tuple[ByteRange, ...]:
        """Return what is in place of an object; with `near`, at least what touches that."""
        byte_ranges = list(self._cache.byte_ranges(name))
        for fetch in self.having(name):
            if name in fetch.object_names:
                key = fetch.object_names[name].key
                byte_ranges += fetch.landed_within(key, near) if near else fetch.landed_ranges(key)
        return merge(byte_ranges)

    def holding(self, name: str) -> Holding:
        landed = self.landed(name)
        if self.file(name) is not None:
            landed = ((0, self._identity(name).size_bytes),)
        coming: list[ByteRange] = []
        for fetch in self.having(name):
            if fetch.status is not FetchStatus.RUNNING:
                continue
            if name in fetch.object_names:
                coming += fetch.needed_ranges(fetch.object_names[name].key)
            else:
                coming.append((0, fetch.file_names[name].size_bytes))
        return Holding(landed=landed, coming=subtract(merge(coming), landed))

    def readable(self, name: str, byte_range: ByteRange) -> tuple[Path, StoredObject]:
        """Return the file with these bytes; raises `NotFound` where any is not in place."""
        stored = self._identity(name)
        path = self.file(name) or self._directory / OBJECTS / name
        landed = self.landed(name, byte_range)
        if path.parent.name == FILES:
            landed = ((0, stored.size_bytes),)
        if not within(byte_range, landed):
            raise NotFound(f"bytes {byte_range} of {stored.key} are not on this node")
        return path, stored

    def file(self, name: str) -> Path | None:
        """Return where a small file lies whole, if any fetch has or had it."""
        cached = self._cache.objects.get(name)
        if cached is not None and cached.byte_ranges == ((0, cached.stored.size_bytes),):
            path = self._directory / OBJECTS / name
            if path.exists():
                return path
        for fetch in self.having(name):
            if name in fetch.file_names and fetch.has_file(fetch.file_names[name].key):
                return fetch.file_path(fetch.file_names[name].key)
        return None

    def having(self, name: str) -> Iterator[TierFetch]:
        """Yield the fetches that need bytes of an object."""
        return (
            fetch
            for fetch in self._fetches.values()
            if name in fetch.object_names or name in fetch.file_names
        )

    def strays(self) -> list[Path]:
        """Return the object files that belong to no fetch and are not cached."""
        known = {name for fetch in self._fetches.values() for name in fetch.object_names}
        known |= self._cache.objects.keys()
        return [path for path in (self._directory / OBJECTS).iterdir() if path.name not in known]

    def _identity(self, name: str) -> StoredObject:
        """Raises `NotFound` where the tier has nothing by that name."""
        if name in self._cache.objects:
            return self._cache.objects[name].stored
        for fetch in self.having(name):
            return fetch.object_names.get(name) or fetch.file_names[name]
        raise NotFound(f"there is no object {name} on this node")


@dataclass(frozen=True, slots=True, kw_only=True)
class TierObject:
    """One object version in the tier, and which of its bytes are in place (sorted, disjoint)."""

    store: StoreIdentity
    source_uri: str
    stored: StoredObject
    landed: tuple[ByteRange, ...]

    @property
    def name(self) -> str:
        """The object's file name in any tier."""
        return object_name(self.store, self.source_uri, self.stored)

    @property
    def landed_bytes(self) -> int:
        return sum(end - start for start, end in self.landed)


class Claim(Enum):
    """What came of the wish to bring some bytes."""

    GRANTED = "granted"
    #: Another fetch of this tier is bringing some of them right now.
    BUSY = "busy"
    #: They are in place.
    LANDED = "landed"
