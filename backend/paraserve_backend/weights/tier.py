"""A node's host-memory tier: fetched bytes in files that other processes map.

The agent is the only writer; `weights.tier_reader` is the other side. What no fetch needs any more
stays, up to a limit, for the next fetch of the same object version; `weights.cache` says what.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from paraserve_backend.errors import AlreadyExists, InvalidRequest, NotFound, Unavailable
from paraserve_backend.weights.cache import CACHE, CacheIndex, page_span, whole_pages
from paraserve_backend.weights.holdings import Claim, Holding, TierObject, object_problems
from paraserve_backend.weights.landing import (
    FETCHES,
    FILES,
    MANIFEST,
    OBJECTS,
    PROGRESS,
    FetchStatus,
    Manifest,
    Progress,
    object_name,
    write_atomically,
)
from paraserve_backend.weights.objects import StoredObject
from paraserve_backend.weights.plan import DEFAULT_PART_BYTES, FetchPlan
from paraserve_backend.weights.spans import Span, merge, subtract, within
from paraserve_backend.weights.sparse import first_hole, free_bytes, free_span, used_bytes
from paraserve_backend.weights.tier_fetch import TierFetch, room_for

#: Room for a fetch's own files: its spans, the index of what stays of it.
_RECORDS_BYTES = 64 << 10


class Tier:
    """A folder of fetches and the objects they share; one process at a time writes to it.

    Bytes that a fetch needs, or somebody reads, are pinned. Of the others, which only might be
    wanted again, at most `cache_bytes` stay.
    """

    def __init__(self, directory: Path, lock_fd: int, cache_bytes: int) -> None:
        self.directory = directory
        self._lock_fd = lock_fd
        self._cache_bytes = cache_bytes
        self._cache = CacheIndex.open(directory / CACHE)
        self._fetches: dict[str, TierFetch] = {}
        self._claims: list[tuple[str, Span]] = []
        self._reads: list[tuple[str, Span]] = []
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, *, cache_bytes: int = 0) -> Tier:
        """Open or create a tier; fetches that another agent left unfinished count as failed.

        What an earlier agent had cached is used again as far as its bytes are there. Raises
        `AlreadyExists` where another process has the tier open.
        """
        (directory / OBJECTS).mkdir(parents=True, exist_ok=True)
        (directory / FETCHES).mkdir(exist_ok=True)
        tier = cls(directory, _lock_directory(directory), cache_bytes)
        for fetch_dir in sorted((directory / FETCHES).iterdir()):
            tier._load(fetch_dir)
        tier._drop_lost_bytes()
        for path in tier._strays():
            path.unlink()  # left by a fetch whose creation or release was interrupted
        tier._drop_untrusted_bytes()
        tier._trim()
        return tier

    def begin(self, plan: FetchPlan, *, part_bytes: int = DEFAULT_PART_BYTES) -> TierFetch:
        """Make room for a fetch that readers can find from now on.

        With the same plan it is idempotent: a fetch that failed goes on where it stopped. Bytes
        that are in place already count as landed. Raises `AlreadyExists` where the id belongs to
        another plan.
        """
        with self._lock:
            fetch = self._fetches.get(plan.fetch_id)
            if fetch is None:
                with room_for(plan, self.directory):
                    fetch = self._create(Manifest(plan=plan, part_bytes=part_bytes))
            elif fetch.plan != plan:
                raise AlreadyExists(f"fetch {plan.fetch_id} is already there with another plan")
            if fetch.status is FetchStatus.FAILED:
                fetch.resume()
            self._adopt_landed(fetch)
            self._trim(wanted_bytes=_missing_bytes(fetch))
            return fetch

    def release(self, fetch_id: str) -> None:
        """Drop a fetch; what has landed stays as far as the cache has room.

        Only once no reader uses it: bytes that go are zeroed under their feet. Raises `NotFound`,
        or `InvalidRequest` while it runs.
        """
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
            (self.directory / FETCHES / fetch_id / MANIFEST).unlink()
            shutil.rmtree(self.directory / FETCHES / fetch_id)
            for name, stored in fetch.object_names.items():
                self._free(name, fetch.needed_spans(stored.key))
            self._trim()

    def limit_cache(self, cache_bytes: int) -> None:
        """Keep at most so much, from now on, of what no fetch needs."""
        with self._lock:
            self._cache_bytes = cache_bytes
            self._trim()

    def claim(self, name: str, span: Span) -> Claim:
        """Ask to bring bytes of an object: no two fetches shall bring the same at once.

        What is granted has to be given back with `unclaim`.
        """
        with self._lock:
            if any(other == name and _overlap(span, taken) for other, taken in self._claims):
                return Claim.BUSY
            if within(span, self._landed(name, span)) or self._file(name) is not None:
                return Claim.LANDED
            self._claims.append((name, span))
            return Claim.GRANTED

    def unclaim(self, name: str, span: Span) -> None:
        with self._lock:
            self._claims.remove((name, span))

    def adopt_files(self, fetch: TierFetch) -> None:
        """Take the small files that others have put in place since `begin`."""
        with self._lock:
            self._adopt_files(fetch)

    def holdings(self, names: Iterable[str]) -> dict[str, Holding]:
        """Return what there is of the objects with these file names."""
        with self._lock:
            return {name: self._holding(name) for name in names}

    @contextmanager
    def reading(self, name: str, span: Span) -> Iterator[tuple[Path, StoredObject]]:
        """Give the file that holds bytes of an object, which stay there until the block ends.

        Raises `NotFound` where any of them is not in place.
        """
        with self._lock:
            path, found = self._readable(name, span)
            self._reads.append((name, span))
        try:
            yield path, found
        finally:
            with self._lock:
                self._reads.remove((name, span))
                self._trim()

    def fetches(self) -> tuple[TierFetch, ...]:
        with self._lock:
            return tuple(self._fetches.values())

    def contents(self) -> tuple[TierObject, ...]:
        """Return what is in place, by object."""
        with self._lock:
            known = {name: (it.source_uri, it.stored) for name, it in self._cache.objects.items()}
            for fetch in self._fetches.values():
                for name, stored in fetch.object_names.items():
                    known[name] = (fetch.plan.source_uri, stored)
            return tuple(
                TierObject(source_uri=uri, stored=stored, landed=self._landed(name))
                for name, (uri, stored) in known.items()
            )

    @property
    def used_bytes(self) -> int:
        """Memory that the objects take, in whole pages."""
        return sum(used_bytes(path) for path in (self.directory / OBJECTS).iterdir())

    @property
    def cached_bytes(self) -> int:
        """The part of it that goes when there is need for the room."""
        with self._lock:
            return self._cache.unpinned_bytes(self._pinned)

    def check_integrity(self) -> tuple[str, ...]:
        """Return one sentence for everything that is not as it must be."""
        with self._lock:
            strays = self._strays()
            unfinished = {
                name
                for fetch in self._fetches.values()
                if fetch.status is not FetchStatus.DONE
                for name in fetch.object_names
            }
        problems = [f"object file {path.name} belongs to no fetch" for path in strays]
        for found in self.contents():
            path = self._path(found.source_uri, found.stored)
            problems += object_problems(path, found, growing=path.name in unfinished)
        return tuple(problems)

    def close(self) -> None:
        """Give the tier back; what has landed stays for the next one who opens it."""
        with self._lock:
            for fetch in self._fetches.values():
                fetch.close()
            self._fetches.clear()
            os.close(self._lock_fd)

    def _load(self, fetch_dir: Path) -> None:
        try:
            fetch = TierFetch(self.directory, Manifest.read(fetch_dir))
        except (OSError, ValueError, KeyError, InvalidRequest):
            # Half made, half released, or by another release of this software: fetch it anew.
            shutil.rmtree(fetch_dir)
            return
        self._fetches[fetch.plan.fetch_id] = fetch
        if fetch.status is FetchStatus.RUNNING:
            fetch.fail(Unavailable(f"fetch {fetch_dir.name} was interrupted, start it again"))

    def _create(self, manifest: Manifest) -> TierFetch:
        plan = manifest.plan
        for stored in plan.objects:
            with self._path(plan.source_uri, stored).open("ab") as file:
                file.truncate(stored.size_bytes)
        fetch_dir = self.directory / FETCHES / plan.fetch_id
        (fetch_dir / FILES).mkdir(parents=True, exist_ok=True)
        Progress.create(fetch_dir / PROGRESS, parts=len(manifest.parts))
        write_atomically(fetch_dir / MANIFEST, manifest.to_json())
        fetch = self._fetches[plan.fetch_id] = TierFetch(self.directory, manifest)
        return fetch

    def _adopt_landed(self, fetch: TierFetch) -> None:
        landed = {stored.key: self._landed(name) for name, stored in fetch.object_names.items()}
        for number in fetch.missing_parts():
            part = fetch.parts[number]
            if within((part.start, part.end), landed[part.object_key]):
                fetch.adopt_part(number)
        self._adopt_files(fetch)

    def _adopt_files(self, fetch: TierFetch) -> None:
        for stored in fetch.missing_files():
            path = self._file(fetch.name_of(stored))
            if path is not None:
                fetch.adopt_file(stored.key, path)

    def _keep(self, fetch: TierFetch) -> None:
        """Trust what has landed of a fetch after its release."""
        used = self._cache.tick()
        for stored in fetch.plan.objects:
            spans = fetch.landed_spans(stored.key)
            self._cache.add(fetch.plan.source_uri, stored, spans, used)
        for stored in fetch.plan.files:
            path = self._path(fetch.plan.source_uri, stored)
            if stored.size_bytes and fetch.has_file(stored.key):
                with suppress(FileExistsError):
                    path.hardlink_to(fetch.file_path(stored.key))
                self._cache.add(fetch.plan.source_uri, stored, ((0, stored.size_bytes),), used)

    def _trim(self, *, wanted_bytes: int = 0) -> None:
        """Remove what is cached beyond the limit, or in the way of `wanted_bytes` to come."""
        while (excess_bytes := self._excess_bytes(wanted_bytes)) > 0:
            victims = list(self._cache.victims(excess_bytes, self._pinned))
            if not victims:
                return
            for name, span in victims:
                self._cache.remove(name, [span])
                self._free(name, [span])

    def _excess_bytes(self, wanted_bytes: int) -> int:
        return max(
            self._cache.unpinned_bytes(self._pinned) - self._cache_bytes,
            wanted_bytes - free_bytes(self.directory),
        )

    def _free(self, name: str, spans: Iterable[Span]) -> None:
        """Free what nobody has a use for."""
        path = self.directory / OBJECTS / name
        if name not in self._cache.objects and not any(self._having(name)):
            path.unlink(missing_ok=True)  # who reads it still can
            return
        kept = merge([*self._cache.spans(name), *self._pinned(name)])
        # A page goes only as a whole: with what surrounds the bytes, if nobody needs that.
        for span in subtract(merge(map(page_span, spans)), kept):
            free_span(path, span)

    def _pinned(self, name: str) -> tuple[Span, ...]:
        spans = [span for other, span in self._reads if other == name]
        for fetch in self._having(name):
            if name in fetch.object_names:
                spans += fetch.needed_spans(fetch.object_names[name].key)
            else:
                spans.append((0, fetch.file_names[name].size_bytes))
        return merge(spans)

    def _landed(self, name: str, near: Span | None = None) -> tuple[Span, ...]:
        """Return what is in place of an object; with `near`, at least what touches that."""
        spans = list(self._cache.spans(name))
        for fetch in self._having(name):
            if name in fetch.object_names:
                key = fetch.object_names[name].key
                spans += fetch.landed_within(key, near) if near else fetch.landed_spans(key)
        return merge(spans)

    def _holding(self, name: str) -> Holding:
        landed = self._landed(name)
        if (path := self._file(name)) is not None:
            landed = ((0, path.stat().st_size),)
        coming: list[Span] = []
        for fetch in self._having(name):
            if fetch.status is not FetchStatus.RUNNING:
                continue
            if name in fetch.object_names:
                coming += fetch.needed_spans(fetch.object_names[name].key)
            else:
                coming.append((0, fetch.file_names[name].size_bytes))
        return Holding(landed=landed, coming=subtract(merge(coming), landed))

    def _readable(self, name: str, span: Span) -> tuple[Path, StoredObject]:
        stored = self._identity(name)
        path = self._file(name) or self.directory / OBJECTS / name
        landed = self._landed(name, span)
        if path.parent.name == FILES:
            landed = ((0, stored.size_bytes),)
        if not within(span, landed):
            raise NotFound(f"bytes {span} of {stored.key} are not on this node")
        return path, stored

    def _identity(self, name: str) -> StoredObject:
        """Raises `NotFound` where the tier has nothing by that name."""
        if name in self._cache.objects:
            return self._cache.objects[name].stored
        for fetch in self._having(name):
            return fetch.object_names.get(name) or fetch.file_names[name]
        raise NotFound(f"there is no object {name} on this node")

    def _file(self, name: str) -> Path | None:
        """Return where a small file lies whole, if any fetch has or had it."""
        cached = self._cache.objects.get(name)
        if cached is not None and cached.spans == ((0, cached.stored.size_bytes),):
            return self.directory / OBJECTS / name
        for fetch in self._having(name):
            if name in fetch.file_names and fetch.has_file(fetch.file_names[name].key):
                return fetch.file_path(fetch.file_names[name].key)
        return None

    def _path(self, source_uri: str, stored: StoredObject) -> Path:
        return self.directory / OBJECTS / object_name(source_uri, stored)

    def _strays(self) -> list[Path]:
        """Return the object files that belong to no fetch and are not cached."""
        known = {name for fetch in self._fetches.values() for name in fetch.object_names}
        known |= self._cache.objects.keys()
        return [path for path in (self.directory / OBJECTS).iterdir() if path.name not in known]

    def _drop_lost_bytes(self) -> None:
        """Trust nothing that the index has and the object file has not."""
        for name, found in list(self._cache.objects.items()):
            path = self.directory / OBJECTS / name
            if not path.exists() or path.stat().st_size != found.stored.size_bytes:
                self._cache.remove(name, [(0, found.stored.size_bytes)])
                continue
            lost = [span for span in found.spans if first_hole(path, span) is not None]
            self._cache.remove(name, lost)

    def _drop_untrusted_bytes(self) -> None:
        """Free what an earlier agent wrote without having come to trust it."""
        for name, found in self._cache.objects.items():
            self._free(name, [(0, found.stored.size_bytes)])

    def _having(self, name: str) -> Iterable[TierFetch]:
        return (
            fetch
            for fetch in self._fetches.values()
            if name in fetch.object_names or name in fetch.file_names
        )


def _missing_bytes(fetch: TierFetch) -> int:
    """Return the memory that a fetch will take, with some for what is written about it."""
    parts = (fetch.parts[part] for part in fetch.missing_parts())
    part_bytes = sum(whole_pages((part.start, part.end)) for part in parts)
    return part_bytes + sum(it.size_bytes for it in fetch.missing_files()) + _RECORDS_BYTES


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def _lock_directory(directory: Path) -> int:
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyExists(
            f"another agent uses the tier {directory}: give each agent its own"
        ) from None
    return fd
