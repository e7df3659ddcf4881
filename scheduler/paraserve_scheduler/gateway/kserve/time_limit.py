"""The request parameter `timeout`, in microseconds: here it limits the whole request.

Triton itself limits only the wait in a scheduler's queue, which its decoupled models do not have.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import DeadlineExceeded
from paraserve_backend.protocol.request_settings import Settings
from paraserve_scheduler.gateway.kserve.validation import parameter_value

_NAME = "timeout"
_MAX_US = 2**63 - 1


def take_time_limit_us(request: kserve.ModelInferRequest) -> int | None:
    """Take the limit out of a request's parameters; 0 is none, as in Triton.

    Raises:
        InvalidRequest: it is no whole number, or negative.
    """
    if _NAME not in request.parameters:
        return None
    given = Settings({}, {_NAME: parameter_value(request.parameters[_NAME])})
    limit_us = given.optional_integer(_NAME, low=0, high=_MAX_US)
    # It is kept here, and Triton's gRPC service takes it in one of its forms only.
    del request.parameters[_NAME]
    return limit_us or None


@contextlib.asynccontextmanager
async def time_limit(limit_us: int | None) -> AsyncIterator[None]:
    """Cancel the body when it takes longer.

    Raises:
        DeadlineExceeded: it did.
    """
    limit = asyncio.timeout(None if limit_us is None else limit_us / 1e6)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceeded(
            f"The request was not answered within its '{_NAME}' of {limit_us} microseconds, which "
            "include a cold start; allow more or leave it out."
        ) from None
