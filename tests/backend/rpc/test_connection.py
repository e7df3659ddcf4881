from __future__ import annotations

import grpc
import grpc.aio
import pytest

from paraserve_backend.rpc.errors import is_connection_lost

_UNAVAILABLE, _UNKNOWN = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN


@pytest.mark.parametrize(
    ("code", "details", "is_lost"),
    [
        (_UNAVAILABLE, "failed to connect to all addresses", True),
        (_UNAVAILABLE, None, True),
        (_UNKNOWN, "Stream removed (Socket closed)", True),
        (_UNKNOWN, "Unexpected <class 'ValueError'>: boom", False),
        (_UNKNOWN, None, False),
        (grpc.StatusCode.INTERNAL, "Stream removed", False),
    ],
)
def test_a_lost_connection_is_told_from_a_call_that_failed(
    code: grpc.StatusCode, details: str | None, is_lost: bool
) -> None:
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(code, metadata, metadata, details, None)
    assert is_connection_lost(error) is is_lost
