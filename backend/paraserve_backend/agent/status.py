"""What the node's tiers hold, as messages for the heartbeat."""

from __future__ import annotations

from collections.abc import Iterable

from paraserve_backend.byte_ranges import ByteRange
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.weights.sources.open import Sources
from paraserve_backend.weights.tiers.contents import TierObject
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.memory import Tier


def tier_messages(tier: Tier, disk: DiskTier | None, sources: Sources) -> list[pb.TierObject]:
    """Return one message for each object version of which something is in memory or on disk.

    Left out is what no fetch of this node would use, since it reads that store as somebody else.
    """
    in_memory = {found.name: found for found in tier.contents()}
    on_disk = {found.name: found for found in disk.contents()} if disk else {}
    return [
        _message(found, in_memory.get(name), on_disk.get(name))
        for name, found in {**on_disk, **in_memory}.items()
        if sources.may_use(found.store)
    ]


def _message(
    found: TierObject, in_memory: TierObject | None, on_disk: TierObject | None
) -> pb.TierObject:
    return pb.TierObject(
        key=found.store.key_of(found.source_uri, found.stored.key),
        version=found.stored.version,
        landed_bytes=in_memory.landed_bytes if in_memory else 0,
        size_bytes=found.stored.size_bytes,
        landed=_ranges(in_memory.landed if in_memory else ()),
        on_disk=_ranges(on_disk.landed if on_disk else ()),
    )


def _ranges(byte_ranges: Iterable[ByteRange]) -> list[pb.ByteRange]:
    return [pb.ByteRange(start=start, end=end) for start, end in byte_ranges]
