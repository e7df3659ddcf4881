"""How a request's failure leaves a gateway: to the client as one sentence, to the log without it.

An exception's own text may quote a prompt, so the log has only its type and where it was raised.
"""

from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc
import grpc.aio

from paraserve_backend.daemon.guard import frames_of
from paraserve_backend.errors import ParaServeError
from paraserve_scheduler.gateway.kserve.errors import client_sentence, retry_after_s

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
RETRY_AFTER = "Retry-After"
#: gRPC's own clients wait so long where they have a policy to retry.
_PUSHBACK = "grpc-retry-pushback-ms"


async def abort(context: Context, error: ParaServeError) -> NoReturn:
    """End a gRPC call with an error; its trailing metadata say when to try again."""
    after_s = retry_after_s(error)
    metadata: tuple[tuple[str, str], ...] = ()
    if after_s is not None:
        metadata = ((RETRY_AFTER.lower(), str(after_s)), (_PUSHBACK, str(after_s * 1000)))
    await context.abort(grpc.StatusCode[error.grpc_code], client_sentence(error), metadata)
    raise AssertionError("abort returned")


def log_failure(error: Exception) -> None:
    """Log what is a bug of ours."""
    logger.error("A request failed with %s:\n%s", type(error).__name__, frames_of(error))
