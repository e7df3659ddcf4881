"""Records that a fetch's workers and their assignment share: tasks, sources, workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.weights.sources.base import StoredObject
from paraserve_backend.weights.tiers.writer import TierFetch


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Bytes `[start, end)` of an object to bring; a small file is brought whole."""

    number: int
    stored: StoredObject
    #: The object's file name in any tier.
    name: str
    start: int
    end: int
    #: Number of the fetch's part; `None` where it is a small file.
    part: int | None

    @property
    def byte_range(self) -> ByteRange:
        return (self.start, self.end)

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def missing_tasks(writer: TierFetch) -> list[Task]:
    """Return what a fetch still has to bring, in the order in which it is wanted."""
    files = [(stored, 0, stored.size_bytes, None) for stored in writer.missing_files()]
    parts = [
        (writer.object_of(part), writer.parts[part].start, writer.parts[part].end, part)
        for part in writer.missing_parts()
    ]
    return [
        Task(
            number=number,
            stored=stored,
            name=writer.name_of(stored),
            start=start,
            end=end,
            part=part,
        )
        for number, (stored, start, end, part) in enumerate([*files, *parts])
    ]


class Rank(IntEnum):
    """Kinds of sources, the one that costs least first."""

    DISK = 0
    PEER = 1
    STORE = 2


class FetchSource:
    """Where bytes of a fetch can come from, and which tasks' it has, as it last said.

    The assignment's lock guards it.
    """

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.has_answered = False
        self.is_lost = False
        self.landed: frozenset[int] = frozenset()
        #: Not there yet.
        self.coming: frozenset[int] = frozenset()

    @property
    def expected(self) -> frozenset[int]:
        return self.landed | self.coming


@dataclass(slots=True, kw_only=True, eq=False)
class FetchWorker:
    """One worker, which brings one task after the other from a source."""

    source: FetchSource
    #: Ends the read that runs, if it can be ended. Any thread may call it.
    break_off: Callable[[], None]
    _recent_bytes: float = 0.0
    _recent_s: float = 0.0

    def brought(self, size_bytes: int, seconds: float) -> None:
        """Note how long a part took; each counts twice as much as the one before."""
        self._recent_bytes = self._recent_bytes / 2 + size_bytes
        self._recent_s = self._recent_s / 2 + seconds

    @property
    def bytes_per_s(self) -> float | None:
        """How fast it is; `None` before its first part."""
        return self._recent_bytes / max(self._recent_s, 1e-6) if self._recent_bytes else None
