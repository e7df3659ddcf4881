"""How a fetch lies in a tier's folder: what its writer and its readers, two processes, agree on.

objects/<name>                 one sparse file per object version, tensors at their own offset
cache/<name>                   which bytes of it stay when no fetch needs them
fetches/<fetch_id>/manifest.json    the plan, the chunk size, the objects' file names
fetches/<fetch_id>/progress         one status byte, then one byte per chunk
fetches/<fetch_id>/files/<key>      small files, each complete as soon as it is there
fetches/<fetch_id>/error.json       why it failed
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import msgspec

from paraserve_backend import errors
from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.daemon.private_files import create_file
from paraserve_backend.errors import ParaServeError
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan, split_parts
from paraserve_backend.weights.sources.base import (
    UNKNOWN_STORE,
    ObjectRange,
    StoredObject,
    StoreIdentity,
)

OBJECTS = "objects"
MANIFEST = "manifest.json"
PROGRESS = "progress"
FILES = "files"
#: Room for the failure, taken from the start: a fetch also fails because the tier is full.
_ERROR_BYTES = 4096


class FetchStatus(IntEnum):
    RUNNING = 1
    DONE = 2
    FAILED = 3


def object_name(store: StoreIdentity, source_uri: str, stored: StoredObject) -> str:
    """Return the file name of one object version; two fetches of it share that file.

    It is the same on every node and tells nobody anything: peers ask each other by it.
    """
    identity = json.dumps([store.endpoint, store.principal, source_uri, stored.key, stored.version])
    return hashlib.sha256(identity.encode()).hexdigest()[:40]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A fetch as both sides see it."""

    plan: FetchPlan
    part_bytes: int

    @property
    def parts(self) -> tuple[ObjectRange, ...]:
        return split_parts(self.plan.ranges, self.part_bytes)

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def read(cls, fetch_dir: Path) -> Manifest:
        """Raises `FileNotFoundError` where there is no such fetch, `ValueError` for other bytes."""
        found = msgspec.json.decode((fetch_dir / MANIFEST).read_bytes(), type=cls)
        if found.plan.store == UNKNOWN_STORE:
            raise ValueError("it does not say from which store its bytes are")
        return found


class PartTable:
    """The parts of a fetch by number, and which of them hold a given range."""

    def __init__(self, parts: tuple[ObjectRange, ...]) -> None:
        self.parts = parts
        self._numbers: dict[str, list[int]] = {}
        for number in sorted(range(len(parts)), key=lambda number: parts[number].start):
            self._numbers.setdefault(parts[number].object_key, []).append(number)
        self._starts = {
            key: [parts[number].start for number in numbers]
            for key, numbers in self._numbers.items()
        }

    def covering(self, wanted: ObjectRange) -> list[int]:
        """Return the numbers of the parts that hold bytes of `wanted`, which the fetch has."""
        if wanted.size_bytes == 0:
            return []
        starts = self._starts[wanted.object_key]
        first = bisect_right(starts, wanted.start) - 1
        return self._numbers[wanted.object_key][first : bisect_left(starts, wanted.end)]

    def touching(self, key: str, byte_range: ByteRange) -> list[int]:
        """Return the numbers of the parts that hold any byte of a range, in the object's order."""
        starts = self._starts.get(key, [])
        first = max(bisect_right(starts, byte_range[0]) - 1, 0)
        numbers = self._numbers.get(key, [])[first : bisect_left(starts, byte_range[1])]
        return [number for number in numbers if self.parts[number].end > byte_range[0]]


class ProgressFile:
    """The progress file, mapped: a status byte, then 1 for every part in place, then the error.

    The writer sets a part's byte after the read that filled it has returned, so a reader that
    sees the byte sees the part.
    """

    def __init__(self, path: Path, *, parts: int, writable: bool) -> None:
        self._error_at = 1 + parts
        size_bytes = self._error_at + _ERROR_BYTES
        with path.open("r+b" if writable else "rb") as file:
            if os.fstat(file.fileno()).st_size != size_bytes:
                raise ValueError(f"{path.name} does not fit its manifest")
            access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
            self._map = mmap.mmap(file.fileno(), size_bytes, access=access)

    @staticmethod
    def create(path: Path, *, parts: int) -> None:
        fd = create_file(path)
        with open(fd, "wb") as file:
            file.write(bytes([FetchStatus.RUNNING]) + bytes(parts + _ERROR_BYTES))

    @property
    def status(self) -> FetchStatus:
        return FetchStatus(self._map[0])

    @status.setter
    def status(self, status: FetchStatus) -> None:
        self._map[0] = status

    def has_landed(self, part: int) -> bool:
        return self._map[1 + part] == 1

    def mark_landed(self, part: int) -> None:
        self._map[1 + part] = 1

    def landed(self) -> Iterator[int]:
        """Yield the numbers of the parts that are in place."""
        flags = self.snapshot()
        return (part for part in range(len(flags) - 1) if flags[1 + part])

    def snapshot(self) -> bytes:
        """Return status and parts, to see cheaply whether anything has happened."""
        return self._map[: self._error_at]

    def fail(self, error: ParaServeError) -> None:
        record = f"{type(error).__name__}\n{error}".encode()[:_ERROR_BYTES]
        self._map[self._error_at :] = record.ljust(_ERROR_BYTES, b"\0")
        self.status = FetchStatus.FAILED

    def error(self) -> ParaServeError:
        """Return the error of a failed fetch, of the class that the writer raised."""
        record = self._map[self._error_at :].rstrip(b"\0").decode(errors="ignore")
        name, _, message = record.partition("\n")
        kind = getattr(errors, name, ParaServeError)
        if not (isinstance(kind, type) and issubclass(kind, ParaServeError)):
            kind = ParaServeError
        return kind(message)

    def close(self) -> None:
        self._map.close()


def write_atomically(path: Path, content: bytes | bytearray | memoryview) -> None:
    """Write a file of ours that a reader finds complete or not at all."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.unlink(missing_ok=True)
    with open(create_file(unfinished), "wb") as file:
        file.write(content)
    unfinished.rename(path)
