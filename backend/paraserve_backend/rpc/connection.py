"""Whether a gRPC call failed, or only its connection."""

from __future__ import annotations

import grpc
import grpc.aio

#: gRPC's own words for a stream that was open when its connection was closed.
_STREAM_REMOVED = "Stream removed"


def is_connection_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether nobody answered, or no longer: gRPC says so under either of two codes."""
    if error.code() is grpc.StatusCode.UNKNOWN:
        return (error.details() or "").startswith(_STREAM_REMOVED)
    return error.code() is grpc.StatusCode.UNAVAILABLE
