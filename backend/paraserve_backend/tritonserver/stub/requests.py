"""A request as the stub gives it: parameters, tensors, and an answer whatever happens."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import triton_python_backend_utils as pb_utils

from paraserve_backend.daemon.guard import concerns_one, internal_error, log_failure
from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_backend.generation.prompts import refuse_length
from paraserve_backend.tritonserver.stub.responses import fail

logger = logging.getLogger(__name__)
#: Of an input other than the prompt: the longest are lists of words, and far shorter.
_MOST_ELEMENTS = 1024


def request_parameters(request: pb_utils.InferenceRequest) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(request.parameters() or "{}")
    return parsed


def request_tensors(inputs: Sequence[pb_utils.Tensor], max_context: int) -> dict[str, list[Any]]:
    """Return each input's elements, flat.

    Raises:
        InvalidRequest: one has more elements than can mean anything; none has been converted then.
    """
    arrays = {tensor.name(): tensor.as_numpy() for tensor in inputs}
    for name, array in arrays.items():
        if name == "input_ids":
            refuse_length(array.size, max_context)
        elif array.size > _MOST_ELEMENTS:
            raise InvalidRequest(
                f"Input '{name}' has {array.size} elements; {_MOST_ELEMENTS} at most."
            )
    return {name: array.ravel().tolist() for name, array in arrays.items()}


def answer_errors(
    request: pb_utils.InferenceRequest,
    take: Callable[[pb_utils.InferenceRequest, pb_utils.ResponseSender], None],
) -> None:
    """Have a request taken; what `take` raises is its answer."""
    sender = request.get_response_sender()
    try:
        take(request, sender)
    except BaseException as error:
        fail(sender, shown(error, "a request"))


def shown(error: BaseException, what: str) -> ParaServeError:
    """Return what a client is told of an error, which is logged if it is a bug.

    Raises:
        BaseException: `error` itself, where it is not of one request.
    """
    if isinstance(error, ParaServeError):
        return error
    if not concerns_one(error):
        raise error
    log_failure(logger, what, error)
    return internal_error()
