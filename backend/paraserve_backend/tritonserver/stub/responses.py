"""Responses and errors in the form that Triton expects."""

from __future__ import annotations

import logging

import triton_python_backend_utils as pb_utils

from paraserve_backend.daemon.guard import guarded
from paraserve_backend.errors import (
    ParaServeError,
    coded,
)

logger = logging.getLogger(__name__)
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
# By name: the stub adds TritonError to its module only after it has imported this one.
_TRITON_CODES = {
    "INVALID_ARGUMENT": "INVALID_ARG",
    "NOT_FOUND": "NOT_FOUND",
    "ALREADY_EXISTS": "ALREADY_EXISTS",
    "CANCELLED": "CANCELLED",
    "UNAVAILABLE": "UNAVAILABLE",
    "DEADLINE_EXCEEDED": "UNAVAILABLE",  # Triton has no such code
}


def fail(sender: pb_utils.ResponseSender, error: ParaServeError) -> None:
    """End a request with an error; that this is not possible is only logged."""
    with guarded(logger, "the error of a request"):
        sender.send(error_response(error), flags=FINAL)


def error_response(error: ParaServeError) -> pb_utils.InferenceResponse:
    code = getattr(pb_utils.TritonError, _TRITON_CODES.get(error.grpc_code, "INTERNAL"))
    # In the text too: a stream's errors have no code, unless its client asks for them by a header
    # that makes tritonserver 2.51 crash now and then.
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(coded(error), code))
