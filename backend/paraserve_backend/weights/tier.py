"""A node's host-memory tier: fetched bytes in files that other processes map.

The agent is the only writer; `weights.tier_reader` is the other side. Which fetches to
release when memory runs short is the agent's decision, not made here.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.errors import AlreadyExists, InvalidRequest, NotFound, Unavailable
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
from paraserve_backend.weights.sparse import first_hole, free_span
from paraserve_backend.weights.tier_fetch import TierFetch, room_for


@dataclass(frozen=True, slots=True, kw_only=True)
class TierObject:
    """One object version in the tier, and which of its bytes are in place (sorted, disjoint)."""

    source_uri: str
    stored: StoredObject
    landed: tuple[Span, ...]

    @property
    def landed_bytes(self) -> int:
        return sum(end - start for start, end in self.landed)


class Tier:
    """A folder of fetches and the objects they share; one process at a time writes to it."""

    def __init__(self, directory: Path, lock_fd: int) -> None:
        self.directory = directory
        self._lock_fd = lock_fd
        self._fetches: dict[str, TierFetch] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> Tier:
        """Open or create a tier; fetches that another agent left unfinished count as failed.

        Raises `AlreadyExists` where another process has it open.
        """
        (directory / OBJECTS).mkdir(parents=True, exist_ok=True)
        (directory / FETCHES).mkdir(exist_ok=True)
        tier = cls(directory, _lock_directory(directory))
        for fetch_dir in sorted((directory / FETCHES).iterdir()):
            tier._load(fetch_dir)
        for path in tier._strays():
            path.unlink()  # left by a fetch whose creation or release was interrupted
        return tier

    def begin(self, plan: FetchPlan, *, part_bytes: int = DEFAULT_PART_BYTES) -> TierFetch:
        """Make room for a fetch that readers can find from now on.

        With the same plan it is idempotent: a fetch that failed goes on where it stopped. Bytes
        that other fetches have in place count as landed. Raises `AlreadyExists` where the id
        belongs to another plan.
        """
        with self._lock:
            fetch = self._fetches.get(plan.fetch_id)
            if fetch is None:
                with room_for(plan):
                    fetch = self._create(Manifest(plan=plan, part_bytes=part_bytes))
            elif fetch.plan != plan:
                raise AlreadyExists(f"fetch {plan.fetch_id} is already there with another plan")
            if fetch.status is FetchStatus.FAILED:
                fetch.resume()
            self._adopt_landed(fetch)
            return fetch

    def release(self, fetch_id: str) -> None:
        """Drop a fetch and free the bytes that no other fetch needs.

        Only once no reader uses it: the bytes of an object that another fetch shares are zeroed
        under their feet. Raises `NotFound`, or `InvalidRequest` while it runs.
        """
        with self._lock:
            fetch = self._fetches.get(fetch_id)
            if fetch is None:
                raise NotFound(f"there is no fetch {fetch_id} on this node")
            if fetch.status is FetchStatus.RUNNING:
                raise InvalidRequest(f"fetch {fetch_id} is still running: cancel it first")
            del self._fetches[fetch_id]
            fetch.close()
            # The manifest goes first: without it the fetch is gone, whatever else remains.
            (self.directory / FETCHES / fetch_id / MANIFEST).unlink()
            shutil.rmtree(self.directory / FETCHES / fetch_id)
            for stored in fetch.plan.objects:
                self._free(fetch, stored)

    def fetches(self) -> tuple[TierFetch, ...]:
        with self._lock:
            return tuple(self._fetches.values())

    def contents(self) -> tuple[TierObject, ...]:
        """Return what is in place, by object."""
        with self._lock:
            landed: dict[tuple[str, StoredObject], list[Span]] = {}
            for fetch in self._fetches.values():
                for stored in fetch.plan.objects:
                    spans = landed.setdefault((fetch.plan.source_uri, stored), [])
                    spans += fetch.landed_spans(stored.key)
        return tuple(
            TierObject(source_uri=source_uri, stored=stored, landed=merge(spans))
            for (source_uri, stored), spans in landed.items()
        )

    @property
    def used_bytes(self) -> int:
        """Memory that the objects take, in whole pages."""
        return sum(path.stat().st_blocks * 512 for path in (self.directory / OBJECTS).iterdir())

    def check_integrity(self) -> tuple[str, ...]:
        """Return one sentence for everything that is not as it must be."""
        problems = [f"object file {path.name} belongs to no fetch" for path in self._strays()]
        for found in self.contents():
            problems += _object_problems(self._path(found.source_uri, found.stored), found)
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
        landed = {
            stored.key: merge(
                span
                for other in self._sharing(fetch, stored)
                for span in other.landed_spans(stored.key)
            )
            for stored in fetch.plan.objects
        }
        for number in fetch.missing_parts():
            part = fetch.parts[number]
            if within((part.start, part.end), landed[part.object_key]):
                fetch.adopt_part(number)

    def _free(self, released: TierFetch, stored: StoredObject) -> None:
        path = self._path(released.plan.source_uri, stored)
        sharing = list(self._sharing(released, stored))
        if not sharing:
            path.unlink()
            return
        kept = merge(span for other in sharing for span in other.needed_spans(stored.key))
        for span in subtract(released.needed_spans(stored.key), kept):
            free_span(path, span)

    def _path(self, source_uri: str, stored: StoredObject) -> Path:
        return self.directory / OBJECTS / object_name(source_uri, stored)

    def _strays(self) -> list[Path]:
        """Return the object files that belong to no fetch."""
        known = {self._path(found.source_uri, found.stored) for found in self.contents()}
        return [path for path in (self.directory / OBJECTS).iterdir() if path not in known]

    def _sharing(self, fetch: TierFetch, stored: StoredObject) -> Iterable[TierFetch]:
        return (
            other
            for other in self._fetches.values()
            if other is not fetch
            and other.plan.source_uri == fetch.plan.source_uri
            and stored in other.plan.objects
        )


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


def _object_problems(path: Path, found: TierObject) -> list[str]:
    key = found.stored.key
    if not path.exists():
        return [f"the file of {key} is missing"]
    if path.stat().st_size != found.stored.size_bytes:
        return [f"the file of {key} has {path.stat().st_size} bytes"]
    holes = [(span, first_hole(path, span)) for span in found.landed]
    return [f"{key} has no bytes at {hole} in {span}" for span, hole in holes if hole is not None]
