"""The exception tree, split by what the caller can do.

    ParaServeError             one clear sentence for the user, never a secret
    ├── InvalidRequest         the request is wrong: change it           (INVALID_ARGUMENT, 400)
    │   └── UnsupportedModel   a kind of checkpoint we cannot run
    ├── NotFound               the named thing does not exist            (NOT_FOUND, 404)
    ├── AlreadyExists          the name is taken                         (ALREADY_EXISTS, 409)
    ├── InvalidCheckpoint      the stored bytes are wrong: replace them  (INVALID_ARGUMENT, 400)
    ├── AccessDenied           credentials are missing or refused        (PERMISSION_DENIED, 403)
    ├── ResourceExhausted      too much at once: retry later             (RESOURCE_EXHAUSTED, 429)
    ├── InsufficientCapacity   no set of nodes can hold it               (UNAVAILABLE, 503)
    ├── Unavailable            retry later or elsewhere                  (UNAVAILABLE, 503)
    │   └── SourceUnavailable  the byte source failed, bounded retries included
    ├── DeadlineExceeded       a stated time limit ran out               (DEADLINE_EXCEEDED, 504)
    └── Cancelled              the caller gave up                        (CANCELLED, 499)

Codes follow Triton's own mapping of errors to gRPC and HTTP where Triton has one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar


class ParaServeError(Exception):
    """Base of every error a user may see."""

    #: Name of a `grpc.StatusCode` member, so that this module needs no gRPC.
    grpc_code: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500


class InvalidRequest(ParaServeError):
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class UnsupportedModel(InvalidRequest):
    pass


class NotFound(ParaServeError):
    grpc_code = "NOT_FOUND"
    http_status = 404


class AlreadyExists(ParaServeError):
    grpc_code = "ALREADY_EXISTS"
    http_status = 409


class InvalidCheckpoint(ParaServeError):
    grpc_code = "INVALID_ARGUMENT"
    http_status = 400


class AccessDenied(ParaServeError):
    grpc_code = "PERMISSION_DENIED"
    http_status = 403


class ResourceExhausted(ParaServeError):
    grpc_code = "RESOURCE_EXHAUSTED"
    http_status = 429


class InsufficientCapacity(ParaServeError):
    grpc_code = "UNAVAILABLE"
    http_status = 503


class Unavailable(ParaServeError):
    grpc_code = "UNAVAILABLE"
    http_status = 503


class SourceUnavailable(Unavailable):
    pass


class DeadlineExceeded(ParaServeError):
    grpc_code = "DEADLINE_EXCEEDED"
    http_status = 504


class Cancelled(ParaServeError):
    grpc_code = "CANCELLED"
    http_status = 499


_CODED = re.compile(r"([A-Z_]{2,}): (.+)", re.DOTALL)


def coded(error: ParaServeError) -> str:
    """Return the sentence led by its code, for ways on which codes get lost."""
    return f"{error.grpc_code}: {error}"


def read_coded(text: str) -> tuple[str, str] | None:
    """Reverse `coded`: the code and the sentence; `None` where no code leads the text."""
    match = _CODED.fullmatch(text)
    return (match[1], match[2]) if match else None


#: The plainest error of each code: where only the code is known, the rest cannot matter.
BY_CODE: Mapping[str, type[ParaServeError]] = {
    kind.grpc_code: kind
    for kind in (
        InvalidRequest,
        NotFound,
        AlreadyExists,
        AccessDenied,
        ResourceExhausted,
        Unavailable,
        DeadlineExceeded,
        Cancelled,
    )
}
