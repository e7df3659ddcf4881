"""From whatever stopped a part to the one sentence that is reported. Pure."""

from __future__ import annotations

from paraserve_backend.errors import ParaServeError
from paraserve_backend.rpc import paraserve_pb2 as pb


def failure_of(error: BaseException) -> pb.Failure:
    """Return the report of `error`; what is not one of ours is only named, see the agent's log."""
    if isinstance(error, ParaServeError):
        return pb.Failure(grpc_code=error.grpc_code, message=str(error))
    return pb.Failure(
        grpc_code=ParaServeError.grpc_code,
        message=f"The node agent failed with {type(error).__name__}; its log says where.",
    )


def first_cause(error: BaseException) -> BaseException:
    """Return what failed first in a task group, however deep."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
