"""gzip and deflate for both protocols: unpacking within a limit, packing, and Accept-Encoding.

Both block; callers on an event loop use a thread, and zlib lets other threads work meanwhile.
"""

from __future__ import annotations

import gzip
import zlib
from enum import StrEnum

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.gateway.kserve.errors import TooLarge

#: Makes zlib tell by the first bytes which of the two a message is.
_GZIP_OR_ZLIB = zlib.MAX_WBITS + 32
#: As gRPC's own.
_LEVEL = 6


class Coding(StrEnum):
    """Names as HTTP and gRPC spell them; what HTTP calls deflate is zlib's format."""

    GZIP = "gzip"
    DEFLATE = "deflate"


def unpack(data: bytes, limit_bytes: int) -> bytes:
    """Return what was packed by either coding; never holds more than the limit.

    Raises:
        TooLarge: it is more than the limit.
        InvalidRequest: it is neither coding, is cut off, or has something after its end.
    """
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        unpacked = unpacker.decompress(data, limit_bytes + 1)
    except zlib.error:
        raise _damaged() from None
    if len(unpacked) > limit_bytes:
        raise TooLarge.than(limit_bytes)
    if not unpacker.eof or unpacker.unused_data:
        raise _damaged()
    return unpacked


def pack(data: bytes, coding: Coding) -> bytes:
    if coding is Coding.GZIP:
        return gzip.compress(data, _LEVEL, mtime=0)
    return zlib.compress(data, _LEVEL)


def accepted_coding(header: str) -> Coding | None:
    """Return which coding an Accept-Encoding header likes best; `None` for neither."""
    weights = dict(_weight(entry) for entry in header.lower().split(","))
    best = max(Coding, key=lambda coding: weights.get(coding, 0.0))
    return best if weights.get(best, 0.0) > 0 else None


def _weight(entry: str) -> tuple[str, float]:
    name, _, parameter = entry.partition(";")
    key, _, value = parameter.partition("=")
    if key.strip() != "q":
        return name.strip(), 1.0
    try:
        return name.strip(), float(value)
    except ValueError:
        return name.strip(), 0.0


def _damaged() -> InvalidRequest:
    return InvalidRequest(
        "The request cannot be unpacked: it is neither gzip nor deflate, or it is damaged."
    )
