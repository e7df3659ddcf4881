"""Checks the tiers of a node from outside, beside the agent that uses them; changes nothing.

`paraserve doctor` reports what is found, and the memory tier checks its own objects with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from paraserve_backend.byte_ranges import ByteRange, merge
from paraserve_backend.errors import NotFound
from paraserve_backend.protocol.run_dir import TierDir
from paraserve_backend.weights.sources.base import StoredObject, StoreIdentity
from paraserve_backend.weights.tiers.contents import TierObject
from paraserve_backend.weights.tiers.disk_format import (
    DamagedExtent,
    Held,
    Identity,
    aligned_buffer,
    object_folders,
    read_extent,
    strange_files,
    whole_extents,
)
from paraserve_backend.weights.tiers.eviction import CACHE, CachedObject, whole_pages
from paraserve_backend.weights.tiers.filesystem import first_hole, used_bytes
from paraserve_backend.weights.tiers.layout import (
    OBJECTS,
    PROGRESS,
    FetchStatus,
    Manifest,
    ProgressFile,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a tier's folder has, and one sentence for everything that is wrong with it."""

    num_objects: int
    used_bytes: int
    problems: tuple[str, ...]


def inspect_tier(directory: Path) -> Inspection:
    """Compare what a host-memory tier should have with what its files have.

    Raises `NotFound` where there is no such tier.
    """
    _require(directory)
    # Looked at twice: in between, an agent that works may have made good what only seemed wrong.
    first = set(_tier_problems(directory))
    problems = tuple(problem for problem in _tier_problems(directory) if problem in first)
    paths = list((directory / OBJECTS).iterdir())
    return Inspection(
        num_objects=len(paths), used_bytes=sum(map(_used_bytes, paths)), problems=problems
    )


def inspect_disk(directory: Path) -> Inspection:
    """Read all of a disk tier and compare it with its checksums.

    Raises `NotFound` where there is no such tier.
    """
    _require(directory)
    folders = object_folders(directory)
    found = [held for folder in folders for _, held in whole_extents(folder)]
    return Inspection(
        num_objects=len(folders),
        used_bytes=sum(held.extent.disk_bytes for held in found),
        problems=(*_strange(folders, found), *_damage(directory, found)),
    )


def _require(directory: Path) -> None:
    if not (directory / OBJECTS).is_dir():
        raise NotFound(f"There is no tier in {directory}: is it that of an agent?")


def _tier_problems(directory: Path) -> Iterator[str]:
    found: dict[str, TierObject] = {}
    growing = set()
    for each, is_running in _landed(directory):
        name = each.name
        before = found[name].landed if name in found else ()
        found[name] = replace(each, landed=merge([*before, *each.landed]))
        if is_running:
            growing.add(name)
    for name, each in found.items():
        with suppress(FileNotFoundError):  # released while it was looked at
            yield from object_problems(directory / OBJECTS / name, each, growing=name in growing)
    for path in (directory / OBJECTS).iterdir():
        if path.name not in found:
            yield f"object file {path.name} belongs to no fetch"


def _landed(directory: Path) -> Iterator[tuple[TierObject, bool]]:
    """Yield what the cache and each fetch say is there, and whether that fetch still runs."""
    for path in (directory / CACHE).iterdir():
        with suppress(FileNotFoundError):
            cached = CachedObject.from_json(path.read_bytes())
            found = _found(cached.store, cached.source_uri, cached.stored, cached.byte_ranges)
            yield found, False
    for fetch_dir in TierDir(directory).fetches.iterdir():
        with suppress(FileNotFoundError):
            manifest = Manifest.read(fetch_dir)
            progress = ProgressFile(fetch_dir / PROGRESS, parts=len(manifest.parts), writable=False)
            parts = [manifest.parts[number] for number in progress.landed()]
            for stored in manifest.plan.objects:
                landed = merge(
                    (part.start, part.end) for part in parts if part.object_key == stored.key
                )
                is_done = progress.status is FetchStatus.DONE
                plan = manifest.plan
                yield _found(plan.store, plan.source_uri, stored, landed), not is_done
            progress.close()


def _found(
    store: StoreIdentity, source_uri: str, stored: StoredObject, landed: tuple[ByteRange, ...]
) -> TierObject:
    return TierObject(store=store, source_uri=source_uri, stored=stored, landed=landed)


def _used_bytes(path: Path) -> int:
    try:
        return used_bytes(path)
    except FileNotFoundError:
        return 0


def _strange(folders: list[Path], found: list[Held]) -> Iterator[str]:
    for folder in folders:
        if Identity.read(folder) is None:
            yield f"{folder} does not say which object it is for"
        for path in strange_files(folder, found):
            if not path.name.startswith("."):  # being written
                yield f"{path} is no whole extent"


def _damage(directory: Path, found: list[Held]) -> Iterator[str]:
    buffer = aligned_buffer()
    for held in found:
        path = held.path(directory)
        try:
            read_extent(path, held.extent, buffer)
        except DamagedExtent as damage:
            if path.exists():
                yield f"{path} {damage}"


def object_problems(path: Path, found: TierObject, *, growing: bool) -> list[str]:
    """Return one sentence for everything that is not as `found` says.

    A `growing` file may have bytes that are not known yet.
    """
    key = found.stored.key
    if not path.exists():
        return [f"the file of {key} is missing"]
    file = path.stat()
    if file.st_size != found.stored.size_bytes:
        return [f"the file of {key} has {file.st_size} bytes"]
    holes = [(byte_range, first_hole(path, byte_range)) for byte_range in found.landed]
    problems = [
        f"{key} has no bytes at {hole} in {byte_range}"
        for byte_range, hole in holes
        if hole is not None
    ]
    # What the file system gives at once: 2 MiB where it has huge pages.
    known_bytes = sum(whole_pages(byte_range, file.st_blksize) for byte_range in found.landed)
    if not growing and used_bytes(path) > known_bytes:
        problems.append(
            f"the file of {key} takes {used_bytes(path)} bytes, {known_bytes} are known"
        )
    return problems
