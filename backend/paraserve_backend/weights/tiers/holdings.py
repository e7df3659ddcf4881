"""What a tier holds: the records of it, and whether an object's file agrees with them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from paraserve_backend.byte_ranges import Span
from paraserve_backend.weights.sources.base import StoredObject
from paraserve_backend.weights.tiers.cache_index import whole_pages
from paraserve_backend.weights.tiers.filesystem import first_hole, used_bytes
from paraserve_backend.weights.tiers.layout import object_name


@dataclass(frozen=True, slots=True, kw_only=True)
class TierObject:
    """One object version in the tier, and which of its bytes are in place (sorted, disjoint)."""

    source_uri: str
    stored: StoredObject
    landed: tuple[Span, ...]

    @property
    def name(self) -> str:
        """The object's file name in any tier."""
        return object_name(self.source_uri, self.stored)

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
    holes = [(span, first_hole(path, span)) for span in found.landed]
    problems = [
        f"{key} has no bytes at {hole} in {span}" for span, hole in holes if hole is not None
    ]
    # What the file system gives at once: 2 MiB where it has huge pages.
    known_bytes = sum(whole_pages(span, file.st_blksize) for span in found.landed)
    if not growing and used_bytes(path) > known_bytes:
        problems.append(
            f"the file of {key} takes {used_bytes(path)} bytes, {known_bytes} are known"
        )
    return problems
