"""Our errors over gRPC: servers end a call with code and sentence, clients make the error again.

Which gRPC codes count as a lost connection is decided here too.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

from paraserve_backend.errors import (
    BY_CODE,
    InvalidRequest,
    ParaServeError,
)

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
#: gRPC sends the text in a header, and clients refuse headers of more than 8 KiB.
_MAX_CHARACTERS = 1000


@asynccontextmanager
async def errors_to(context: Context) -> AsyncIterator[None]:
    """End the call with what the body raises; what is none of our errors is only in the log."""
    try:
        yield
    except ParaServeError as error:
        await context.abort(grpc.StatusCode[error.grpc_code], sentence(str(error)))
    except Exception:
        logger.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, "Internal error; the server's log says why.")


def sentence(text: str) -> str:
    """Make a text fit for a header and a terminal: it may quote a file that means harm."""
    # Cut twice: a text of millions of characters would take long, and some become longer.
    shown = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in text[: _MAX_CHARACTERS + 1]
    )
    return shown if len(shown) <= _MAX_CHARACTERS else f"{shown[: _MAX_CHARACTERS - 3]}..."


#: gRPC's own words for a stream that was open when its connection was closed.
_STREAM_REMOVED = "Stream removed"


def is_connection_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether nobody answered, or no longer: gRPC says so under either of two codes."""
    if error.code() is grpc.StatusCode.UNKNOWN:
        return (error.details() or "").startswith(_STREAM_REMOVED)
    return error.code() is grpc.StatusCode.UNAVAILABLE


class Unimplemented(ParaServeError):
    """A call of the inference protocol that a gateway does not offer."""

    grpc_code = "UNIMPLEMENTED"
    http_status = 501


_BY_CODE: Mapping[str, type[ParaServeError]] = {
    **BY_CODE,
    # What our models and scheduler never say, but gRPC and Triton do.
    "OUT_OF_RANGE": InvalidRequest,
    "UNIMPLEMENTED": Unimplemented,
}


def error_from_code(code: str, message: str) -> ParaServeError:
    """Return the error for the name of a `grpc.StatusCode`; an unknown one is INTERNAL."""
    return _BY_CODE.get(code, ParaServeError)(message)
