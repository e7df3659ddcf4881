"""Brings requests into the form that replicas take: no leading batch dimension, no `timeout`.

Clients of TensorRT-LLM's backend and Triton's OpenAI frontend send a leading dimension of 1; it is
taken off the inputs and put back onto the outputs. The time limit of a request is enforced here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import DeadlineExceeded, InvalidRequest
from paraserve_backend.protocol.request_settings import Settings
from paraserve_scheduler.gateway.kserve.validation import INPUT_SPECS, PROMPTS, parameter_value

#: Takes one response to the client; returns when the client can take more.
Send = Callable[[kserve.ModelInferResponse], Awaitable[None]]


def take_off(request: kserve.ModelInferRequest) -> bool:
    """Remove it from every input that has it; return whether the prompt had.

    Raises:
        InvalidRequest: an input is a batch of several.
    """
    names = set()
    for tensor in request.inputs:
        spec = INPUT_SPECS.get(tensor.name)
        if spec is None or len(tensor.shape) != len(spec.shape) + 1:
            continue
        if tensor.shape[0] != 1:
            raise InvalidRequest(
                f"Input '{tensor.name}' is a batch of {tensor.shape[0]}, shape "
                f"{list(tensor.shape)}; a request holds one prompt, so send each in its own."
            )
        del tensor.shape[0]
        names.add(tensor.name)
    return not names.isdisjoint(PROMPTS)


def put_on(send: Send) -> Send:
    """Return a `send` that gives every output a leading dimension of 1."""

    async def send_batch_of_one(response: kserve.ModelInferResponse) -> None:
        for output in response.outputs:
            output.shape.insert(0, 1)
        await send(response)

    return send_batch_of_one


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
