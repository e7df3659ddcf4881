"""The leading dimension of 1 that clients of TensorRT-LLM's backend and Triton's own OpenAI
frontend send: off the inputs, as replicas take them, and back onto the outputs.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.gateway.kserve.validation import INPUT_SPECS, PROMPTS

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
