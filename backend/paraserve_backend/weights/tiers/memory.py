"""The host-memory tier of a node: fetched bytes in files that other processes map.

The agent is the only writer; `tiers.reader` is the other side. Released bytes stay, up to a limit,
for the next fetch of the same object version; `tiers.eviction` says which.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paraserve_backend.byte_ranges import (
    ByteRange,
    merge,
    subtract,
    within,
)
from paraserve_backend.daemon.private_files import create_file, make_folder, own_folder
from paraserve_backend.errors import (
    AlreadyExists,
    InvalidRequest,
    NotFound,
    Unavailable,
)
from paraserve_backend.protocol.run_dir import TierDir
from paraserve_backend.weights.checkpoint.fetch_plan import DEFAULT_PART_BYTES, FetchPlan
from paraserve_backend.weights.sources.base import UNKNOWN_STORE, Holding, StoredObject
from paraserve_backend.weights.tiers.contents import Claim, TierContents, TierObject
from paraserve_backend.weights.tiers.digests import DigestBook
from paraserve_backend.weights.tiers.eviction import (
    CACHE,
    CachedObject,
    CacheIndex,
    page_range,
    whole_pages,
)
from paraserve_backend.weights.tiers.filesystem import (
    LOCK,
    first_hole,
    free_bytes,
    free_range,
    lock_folder,
)
from paraserve_backend.weights.tiers.inspection import object_problems
from paraserve_backend.weights.tiers.layout import (
    FILES,
    MANIFEST,
    OBJECTS,
    PROGRESS,
    FetchStatus,
    Manifest,
    ProgressFile,
    object_name,
    write_atomically,
)
from paraserve_backend.weights.tiers.writer import TierFetch, room_for

logger = logging.getLogger(__name__)

#: Room for a fetch's own files: its spans, the index of what stays of it.
_RECORDS_BYTES = 64 << 10


class Tier:
    """A folder of fetches and the objects they share; one process at a time writes to it.

    Bytes that a fetch needs, or somebody reads, are pinned. Of the others, which only might be
    wanted again, at most `cache_bytes` stay. Every method may be called from any thread. Those
    that begin, release or trim wait for one another, since to remove gigabytes takes a second.
    Nobody else waits for that: the books are changed first, and only then the files.
    """

    def __init__(self, directory: Path, lock_fd: int, cache_bytes: int) -> None:
        self.directory = directory
        self._lock_fd = lock_fd
        self._cache_bytes = cache_bytes
        self._cache = CacheIndex.open(directory / CACHE)
        self.digests = DigestBook()
        for name, found in self._cache.objects.items():
            self.digests.add(name, found.pieces)
        self._fetches: dict[str, TierFetch] = {}
        self._claims: list[tuple[str, ByteRange]] = []
        self._reads: list[tuple[str, ByteRange]] = []
        self._contents = TierContents(directory, self._cache, self._fetches, self._reads)
        #: Held by who makes or removes files; taken before `_lock`.
        self._changing = threading.Lock()
        #: Held while books are read or written, never while bytes are freed.
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, *, cache_bytes: int = 0) -> Tier:
        """Open or create a tier; fetches that another agent left unfinished count as failed.

        What an earlier agent had cached is used again as far as its bytes are there. Raises
        `AlreadyExists` where another process has the tier open, and `InvalidRequest` where the
        folder is not ours alone.
        """
        own_folder(directory, entries=(OBJECTS, CACHE, TierDir(directory).fetches.name, LOCK))
        make_folder(directory / OBJECTS)
        make_folder(TierDir(directory).fetches)
        tier = cls(directory, lock_folder(directory), cache_bytes)
        for fetch_dir in sorted(TierDir(directory).fetches.iterdir()):
            tier._load(fetch_dir)
        tier._drop_lost_bytes()
        for path in tier._contents.strays():
            _remove(path)  # left by a fetch whose creation or release was interrupted
        tier._drop_untrusted_bytes()
        tier._trim()
        return tier

    def begin(self, plan: FetchPlan, *, part_bytes: int = DEFAULT_PART_BYTES) -> TierFetch:
        """Make room for a fetch that readers can find from now on.

        With the same plan it is idempotent: a fetch that failed goes on where it stopped. Bytes
        that are in place already count as landed. Raises `AlreadyExists` where the id belongs to
        another plan, or to the same one with another store, and `InvalidRequest` where the plan
        does not say from which store it is.
        """
        if plan.store == UNKNOWN_STORE:
            raise InvalidRequest(f"fetch plan {plan.fetch_id} does not say from which store it is")
        with self._changing:
            fetch = self._fetches.get(plan.fetch_id)
            if fetch is None:
                with room_for(plan, self.directory):
                    fetch = self._create(Manifest(plan=plan, part_bytes=part_bytes))
            elif fetch.plan != plan:
                raise AlreadyExists(f"fetch {plan.fetch_id} is already there with another plan")
            if fetch.status is FetchStatus.FAILED:
                fetch.resume()
            with self._lock:
                self._adopt_landed(fetch)
            self._trim(wanted_bytes=_missing_bytes(fetch))
            return fetch

    def release(self, fetch_id: str) -> None:
        """Drop a fetch; what has landed stays as far as the cache has room.

        Only once no reader uses it: bytes that go are zeroed under their feet. Raises `NotFound`,
        or `InvalidRequest` while it runs.
        """
        with self._changing:
            with self._lock:
                fetch = self._fetches.get(fetch_id)
                if fetch is None:
                    raise NotFound(f"there is no fetch {fetch_id} on this node")
                if fetch.status is FetchStatus.RUNNING:
                    raise InvalidRequest(f"fetch {fetch_id} is still running: cancel it first")
                if self._cache_bytes > 0:
                    self._keep(fetch)
                del self._fetches[fetch_id]
                fetch.close()
            # The manifest goes first: without it the fetch is gone, whatever else remains.
            fetch_dir = TierDir(self.directory).fetch(fetch_id)
            (fetch_dir / MANIFEST).unlink(missing_ok=True)
            _remove(fetch_dir)
            for name, stored in fetch.object_names.items():
                self._free(name, fetch.needed_ranges(stored.key))
            self._trim()

    def limit_cache(self, cache_bytes: int) -> None:
        """Keep at most so much, from now on, of what no fetch needs."""
        with self._changing:
            self._cache_bytes = cache_bytes
            self._trim()

    def claim(self, name: str, byte_range: ByteRange) -> Claim:
        """Ask to bring bytes of an object: no two fetches shall bring the same at once.

        What is granted has to be given back with `unclaim`.
        """
        with self._lock:
            if any(other == name and _overlap(byte_range, taken) for other, taken in self._claims):
                return Claim.BUSY
            if (
                within(byte_range, self._contents.landed(name, byte_range))
                or self._contents.file(name) is not None
            ):
                return Claim.LANDED
            self._claims.append((name, byte_range))
            return Claim.GRANTED

    def unclaim(self, name: str, byte_range: ByteRange) -> None:
        with self._lock:
            self._claims.remove((name, byte_range))

    def adopt_files(self, fetch: TierFetch) -> None:
        """Take the small files that others have put in place since `begin`."""
        with self._lock:
            self._adopt_files(fetch)

    def holdings(self, names: Iterable[str]) -> dict[str, Holding]:
        """Return what there is of the objects with these file names."""
        with self._lock:
            return {name: self._contents.holding(name) for name in names}

    @contextmanager
    def reading(self, name: str, byte_range: ByteRange) -> Iterator[tuple[int, StoredObject]]:
        """Give a descriptor of bytes of an object, which stay there until the block ends.

        Raises `NotFound` where any of them is not in place.
        """
        with self._lock:
            path, found = self._contents.readable(name, byte_range)
            fd = _opened(path, found)
            self._reads.append((name, byte_range))
        try:
            yield fd, found
        finally:
            os.close(fd)
            with self._lock:
                self._reads.remove((name, byte_range))
                is_over = self._excess_bytes() > 0
            if is_over:
                with self._changing:
                    self._trim()

    def drop_damaged(self, name: str, byte_range: ByteRange) -> None:
        """Free bytes that are not what they were, unless a fetch needs them.

        A replica that has read them already goes on with what it has.
        """
        logger.error("damage in memory object=%s bytes=%d-%d", name, *byte_range)
        with self._changing:
            with self._lock:
                self._cache.remove(name, subtract([byte_range], self._contents.pinned(name)))
            self._free(name, [byte_range])

    def fetches(self) -> tuple[TierFetch, ...]:
        with self._lock:
            return tuple(self._fetches.values())

    def contents(self, *, with_files: bool = False) -> tuple[TierObject, ...]:
        """Return what is in place, by object; with the small files that only fetches have."""
        with self._lock:
            files = self._contents.files() if with_files else {}
            return tuple({**files, **self._contents.objects()}.values())

    @property
    def used_bytes(self) -> int:
        """Memory that the objects' landed bytes take, in whole pages."""
        return sum(whole_pages(part) for found in self.contents() for part in found.landed)

    def check_integrity(self) -> tuple[str, ...]:
        """Return one sentence for everything that is not as it must be."""
        with self._changing, self._lock:
            strays = self._contents.strays()
            unfinished = {
                name
                for fetch in self._fetches.values()
                if fetch.status is not FetchStatus.DONE
                for name in fetch.object_names
            }
            objects = self._contents.objects()
        problems = [f"object file {path.name} belongs to no fetch" for path in strays]
        for name, found in objects.items():
            path = self.directory / OBJECTS / name
            problems += object_problems(path, found, growing=name in unfinished)
        return tuple(problems)

    def close(self) -> None:
        """Give the tier back; what has landed stays for the next one who opens it."""
        with self._changing, self._lock:
            for fetch in self._fetches.values():
                fetch.close()
            self._fetches.clear()
            os.close(self._lock_fd)

    def _load(self, fetch_dir: Path) -> None:
        try:
            fetch = TierFetch(self.directory, Manifest.read(fetch_dir))
        except (OSError, ValueError, InvalidRequest):
            # Half made, half released, or by another release of this software: fetch it anew.
            _remove(fetch_dir)
            return
        self._fetches[fetch.plan.fetch_id] = fetch
        if fetch.status is FetchStatus.RUNNING:
            fetch.fail(Unavailable(f"fetch {fetch_dir.name} was interrupted, start it again"))

    def _create(self, manifest: Manifest) -> TierFetch:
        plan = manifest.plan
        for stored in plan.objects:
            path = self._path(plan, stored)
            if not path.exists():
                self._forget(path.name, stored)
            fd = create_file(path, at_most_one=False)
            try:
                os.ftruncate(fd, stored.size_bytes)
            finally:
                os.close(fd)
        fetch_dir = TierDir(self.directory).fetch(plan.fetch_id)
        make_folder(fetch_dir)
        make_folder(fetch_dir / FILES)
        ProgressFile.create(fetch_dir / PROGRESS, parts=len(manifest.parts))
        write_atomically(fetch_dir / MANIFEST, manifest.to_json())
        fetch = TierFetch(self.directory, manifest)
        with self._lock:
            self._fetches[plan.fetch_id] = fetch
        return fetch

    def _forget(self, name: str, stored: StoredObject) -> None:
        """Believe nothing of an object whose file is not there: somebody else removed it."""
        with self._lock:
            self._cache.remove(name, [(0, stored.size_bytes)])
            if any(self._contents.having(name)):
                raise Unavailable(
                    f"the file of {stored.key} has vanished from the host-memory tier while a "
                    "replica uses it: start that replica anew"
                )

    def _adopt_landed(self, fetch: TierFetch) -> None:
        landed = {
            stored.key: self._contents.landed(name) for name, stored in fetch.object_names.items()
        }
        for number in fetch.missing_parts():
            part = fetch.parts[number]
            if within((part.start, part.end), landed[part.object_key]):
                fetch.adopt_part(number)
        self._adopt_files(fetch)

    def _adopt_files(self, fetch: TierFetch) -> None:
        for stored in fetch.missing_files():
            path = self._contents.file(fetch.name_of(stored))
            if path is not None:
                fetch.adopt_file(stored.key, path)

    def _keep(self, fetch: TierFetch) -> None:
        """Trust what has landed of a fetch after its release."""
        used = self._cache.tick()
        for stored in fetch.plan.objects:
            self._cache.add(self._unused(fetch, stored), fetch.landed_ranges(stored.key), used)
        for stored in fetch.plan.files:
            path = self._path(fetch.plan, stored)
            if stored.size_bytes and fetch.has_file(stored.key):
                with suppress(FileExistsError):
                    path.hardlink_to(fetch.file_path(stored.key))
                self._cache.add(self._unused(fetch, stored), ((0, stored.size_bytes),), used)

    def _unused(self, fetch: TierFetch, stored: StoredObject) -> CachedObject:
        """Return an object as the cache has it before any of its bytes are to stay."""
        return CachedObject(
            store=fetch.plan.store,
            source_uri=fetch.plan.source_uri,
            stored=stored,
            extents=(),
            pieces=self.digests.of(fetch.name_of(stored)),
        )

    def _trim(self, *, wanted_bytes: int = 0) -> None:
        """Remove what is cached beyond the limit, or in the way of `wanted_bytes` to come.

        `_changing` is held, `_lock` is not.
        """
        while victims := self._take_victims(wanted_bytes):
            for name, byte_range in victims:
                self._free(name, [byte_range])

    def _take_victims(self, wanted_bytes: int) -> list[tuple[str, ByteRange]]:
        """Return what has to go; from now on nobody takes it for what is in place."""
        with self._lock:
            excess_bytes = self._excess_bytes(wanted_bytes)
            victims = list(self._cache.victims(excess_bytes, self._contents.pinned))
            for name, byte_range in victims:
                self._cache.remove(name, [byte_range])
        return victims

    def _excess_bytes(self, wanted_bytes: int = 0) -> int:
        return max(
            self._cache.unpinned_bytes(self._contents.pinned) - self._cache_bytes,
            wanted_bytes - free_bytes(self.directory),
        )

    def _free(self, name: str, byte_ranges: Iterable[ByteRange]) -> None:
        """Free what nobody has a use for; `_changing` is held, so nobody comes to need it."""
        path = self.directory / OBJECTS / name
        with self._lock:
            is_known = name in self._cache.objects or any(self._contents.having(name))
            kept = merge([*self._cache.byte_ranges(name), *self._contents.pinned(name)])
        if not is_known:
            self.digests.forget(name)
            path.unlink(missing_ok=True)  # who reads it still can
            return
        # A page goes only as a whole: with what surrounds the bytes, if nobody needs that.
        for byte_range in subtract(merge(map(page_range, byte_ranges)), kept):
            with suppress(FileNotFoundError):  # somebody else removed it
                free_range(path, byte_range)

    def _path(self, plan: FetchPlan, stored: StoredObject) -> Path:
        return self.directory / OBJECTS / object_name(plan.store, plan.source_uri, stored)

    def _drop_lost_bytes(self) -> None:
        """Trust nothing that the index has and the object file has not."""
        for name, found in list(self._cache.objects.items()):
            path = self.directory / OBJECTS / name
            if not path.exists() or path.stat().st_size != found.stored.size_bytes:
                self._cache.remove(name, [(0, found.stored.size_bytes)])
                continue
            lost = [range_ for range_ in found.byte_ranges if first_hole(path, range_) is not None]
            self._cache.remove(name, lost)

    def _drop_untrusted_bytes(self) -> None:
        """Free what an earlier agent wrote without having come to trust it."""
        for name, found in self._cache.objects.items():
            self._free(name, [(0, found.stored.size_bytes)])


def _remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _opened(path: Path, found: StoredObject) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise NotFound(f"{found.key} cannot be read in the tier: {error.strerror}") from None


def _missing_bytes(fetch: TierFetch) -> int:
    """Return the memory that a fetch will take, with some for what is written about it."""
    parts = (fetch.parts[part] for part in fetch.missing_parts())
    part_bytes = sum(whole_pages((part.start, part.end)) for part in parts)
    return part_bytes + sum(stored.size_bytes for stored in fetch.missing_files()) + _RECORDS_BYTES


def _overlap(one: ByteRange, other: ByteRange) -> bool:
    return one[0] < other[1] and other[0] < one[1]
