"""The disk tier's files: one extent of an object per file, in one folder per object version.

Files are read and written past the page cache. A file's name says which bytes it has and their
checksum, so that no index can disagree with the data. What to keep is decided in `tiers.disk`.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.daemon.private_files import make_folder
from paraserve_backend.weights.checkpoint.fetch_plan import DEFAULT_PART_BYTES
from paraserve_backend.weights.sources.base import StoredObject, StoreIdentity, check_key
from paraserve_backend.weights.sources.digest import BLOCK_BYTES, digest_of
from paraserve_backend.weights.tiers.layout import OBJECTS, object_name, write_atomically

#: Extents end at multiples of this in their object, as a fetch's parts do.
EXTENT_BYTES = DEFAULT_PART_BYTES
_NAME = re.compile(r"(\d{1,18})-(\d{1,18})-([0-9a-f]{8})")


class DamagedExtent(Exception):
    """The file has not the bytes that its name says. Never reaches a user: they are elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskExtent:
    """Bytes `[start, end)` of an object, at most `EXTENT_BYTES`, and their checksum."""

    start: int
    end: int
    checksum: int

    @property
    def byte_range(self) -> ByteRange:
        return (self.start, self.end)

    @property
    def size_bytes(self) -> int:
        return self.end - self.start

    @property
    def disk_bytes(self) -> int:
        """What the file takes, in whole blocks."""
        return whole_blocks(self.size_bytes)

    @property
    def file_name(self) -> str:
        return f"{self.start}-{self.end}-{self.checksum:08x}"

    @classmethod
    def parse(cls, file_name: str) -> DiskExtent | None:
        """Reverse `file_name`; `None` for any other name."""
        found = _NAME.fullmatch(file_name)
        if found is None or not 0 < int(found[2]) - int(found[1]) <= EXTENT_BYTES:
            return None
        return cls(start=int(found[1]), end=int(found[2]), checksum=int(found[3], 16))


def aligned_buffer() -> memoryview:
    """Return memory for one extent in which direct I/O works."""
    return memoryview(mmap.mmap(-1, EXTENT_BYTES))


def read_extent(path: Path, extent: DiskExtent, buffer: memoryview) -> memoryview:
    """Return the extent's bytes, which lie in `buffer`, an `aligned_buffer`.

    Raises `DamagedExtent` where they are not what was written, or the file cannot be read.
    """
    try:
        with _opened(path, os.O_RDONLY) as fd:
            count = _read_all(fd, buffer[: extent.disk_bytes])
    except OSError as error:
        raise DamagedExtent(f"cannot be read: {error.strerror}") from None
    content = buffer[: extent.size_bytes]
    if count != extent.size_bytes:
        raise DamagedExtent(f"has {count} bytes instead of {extent.size_bytes}")
    if digest_of(content) != extent.checksum:
        raise DamagedExtent("has other bytes than were written")
    return content


def write_extent(folder: Path, start: int, size_bytes: int, buffer: memoryview) -> DiskExtent:
    """Write the first `size_bytes` of `buffer`, an `aligned_buffer`, as the extent at `start`.

    The file is there whole or not at all. Raises `OSError`.
    """
    extent = DiskExtent(
        start=start, end=start + size_bytes, checksum=digest_of(buffer[:size_bytes])
    )
    unfinished = folder / f".{extent.file_name}"
    try:
        unfinished.unlink(missing_ok=True)
        with _opened(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            os.fchmod(fd, 0o600)
            _write_all(fd, buffer[: extent.disk_bytes])
            os.ftruncate(fd, size_bytes)
        unfinished.rename(folder / extent.file_name)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    return extent


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open for direct I/O, or, where the file system has none, through the page cache."""
    try:
        fd = os.open(path, flags | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        is_direct = True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        is_direct = False
    try:
        yield fd
        if not is_direct:
            _leave_page_cache(fd)
    finally:
        os.close(fd)


def _leave_page_cache(fd: int) -> None:
    """Host memory is for what is in use; the page cache would hold these bytes twice."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_all(fd: int, view: memoryview) -> int:
    """Fill `view` as far as the file goes; returns how far."""
    landed = 0
    # A direct read ends within a block only at the file's end.
    while landed < len(view) and landed % BLOCK_BYTES == 0:
        count = os.preadv(fd, [view[landed:]], landed)
        if count == 0:
            break
        landed += count
    return landed


def _write_all(fd: int, view: memoryview) -> None:
    written = 0
    while written < len(view):
        written += os.pwrite(fd, view[written:], written)


def whole_blocks(size_bytes: int) -> int:
    """Return what a file of `size_bytes` takes."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


_OBJECT = "object.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One extent of the object with this file name."""

    name: str
    extent: DiskExtent

    def path(self, directory: Path) -> Path:
        return directory / OBJECTS / self.name / self.extent.file_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The object version that a folder is for."""

    store: StoreIdentity
    source_uri: str
    stored: StoredObject

    @property
    def name(self) -> str:
        return object_name(self.store, self.source_uri, self.stored)

    def make_folder(self, directory: Path) -> Path:
        """Make the folder for this object's extents, if it is not there."""
        folder = directory / OBJECTS / self.name
        if not (folder / _OBJECT).exists():
            make_folder(folder)
            write_atomically(folder / _OBJECT, msgspec.json.encode(self))
        return folder

    @classmethod
    def read(cls, folder: Path) -> Identity | None:
        """Return what `make_folder` wrote; `None` where the folder is not one of these."""
        try:
            found = msgspec.json.decode((folder / _OBJECT).read_bytes(), type=cls)
            check_key(found.stored.key)
        except (OSError, ValueError):
            return None
        return found if found.name == folder.name else None


def object_folders(directory: Path) -> list[Path]:
    return sorted((directory / OBJECTS).iterdir())


def whole_extents(folder: Path) -> Iterator[tuple[int, Held]]:
    """Yield when each extent of an object was used (ns) and it, if its file has the right size."""
    for path in folder.iterdir():
        extent = DiskExtent.parse(path.name)
        if extent is not None and path.stat().st_size == extent.size_bytes:
            yield path.stat().st_mtime_ns, Held(name=folder.name, extent=extent)


def strange_files(folder: Path, known: Iterable[Held]) -> list[Path]:
    """Return the files in an object's folder that are neither `known` nor its identity."""
    expected = {_OBJECT, *(held.extent.file_name for held in known if held.name == folder.name)}
    return sorted(path for path in folder.iterdir() if path.name not in expected)


def disk_problems(directory: Path, known: Iterable[Held]) -> Iterator[str]:
    """Yield one sentence for everything in the folder that is not as `known` says."""
    known = tuple(known)
    for folder in object_folders(directory):
        for path in strange_files(folder, known):
            yield f"{path} is no whole extent that is known"
    for held in known:
        path = held.path(directory)
        if not path.exists():
            yield f"{path} is missing"
        elif path.stat().st_size != held.extent.size_bytes:
            yield f"{path} has {path.stat().st_size} bytes"
