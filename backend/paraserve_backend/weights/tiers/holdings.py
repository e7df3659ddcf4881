"""What a tier holds: the records of it, and whether an object's file agrees with them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from paraserve_backend.byte_ranges import Span
from paraserve_backend.weights.sources.base import StoredObject
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
