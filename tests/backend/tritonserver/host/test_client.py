"""Commands to models, over real gRPC on loopback with a server that answers as Triton does.

And what Triton says of a load that failed.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc.service_pb2_grpc import (
    GRPCInferenceServiceServicer,
    add_GRPCInferenceServiceServicer_to_server,
)

from paraserve_backend.errors import (
    DeadlineExceeded,
    InvalidCheckpoint,
    InvalidRequest,
    NotFound,
    ParaServeError,
    SourceUnavailable,
    Unavailable,
)
from paraserve_backend.tritonserver.host.client import TritonClient, load_error

Context = grpc.aio.ServicerContext[Any, Any]


class Triton(GRPCInferenceServiceServicer):
    """Answers a request with an empty final response, or with an error."""

    def __init__(self) -> None:
        self.requests: list[messages.ModelInferRequest] = []
        self.sentence = ""
        #: How the next questions whether it is live end instead of with yes, one each.
        self.silences: list[grpc.StatusCode] = []

    async def ServerLive(
        self, request: messages.ServerLiveRequest, context: Context
    ) -> messages.ServerLiveResponse:
        if self.silences:
            await context.abort(self.silences.pop(0))
        return messages.ServerLiveResponse(live=True)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[messages.ModelInferRequest], context: Context
    ) -> AsyncIterator[messages.ModelStreamInferResponse]:
        async for request in requests:
            self.requests.append(request)
            answer = messages.ModelStreamInferResponse(error_message=self.sentence)
            answer.infer_response.parameters["triton_final_response"].bool_param = True
            yield answer


@contextlib.asynccontextmanager
async def _client(triton: Triton) -> AsyncIterator[TritonClient]:
    server = grpc.aio.server()
    add_GRPCInferenceServiceServicer_to_server(triton, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = TritonClient(f"127.0.0.1:{port}")
    try:
        yield client
    finally:
        await client.close()
        await server.stop(grace=None)


async def _command(triton: Triton) -> None:
    async with _client(triton) as client:
        await client.command("tiny.1", "do it", secret="abc")


async def _is_live(triton: Triton) -> bool | None:
    async with _client(triton) as client:
        return await client.live()


def _triton() -> Triton:
    return Triton()  # type: ignore[abstract] # the other calls are not made


async def test_a_command_is_a_request_without_inputs() -> None:
    triton = _triton()
    await _command(triton)
    (request,) = triton.requests
    assert (request.model_name, list(request.inputs)) == ("tiny.1", [])
    assert request.parameters["command"].string_param == "do it"
    assert request.parameters["paraserve_secret"].string_param == "abc"
    assert request.parameters["triton_enable_empty_final_response"].bool_param


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.UNAVAILABLE, Unavailable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
        (grpc.StatusCode.INTERNAL, ParaServeError),
    ],
)
async def test_a_command_that_fails_raises_what_the_model_answered(
    code: grpc.StatusCode, kind: type[ParaServeError]
) -> None:
    triton = _triton()
    triton.sentence = f"{code.name}: There is no tiny.2."
    with pytest.raises(ParaServeError, match=r"^There is no tiny\.2\.$") as caught:
        await _command(triton)
    assert type(caught.value) is kind


async def test_what_triton_itself_refuses_is_an_error_too() -> None:
    triton = _triton()
    triton.sentence = "Request for unknown model: 'tiny.1' is not found"
    with pytest.raises(Unavailable, match="unknown model"):
        await _command(triton)


_LATE, _GONE = grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("silences", "is_live"),
    [([], True), ([_LATE], None), ([_GONE], False)],
)
async def test_a_late_answer_is_told_from_a_triton_that_is_gone(
    silences: list[grpc.StatusCode], is_live: bool | None
) -> None:
    triton = _triton()
    triton.silences = silences
    assert await _is_live(triton) is is_live


# ---- loads that failed ----

_PREAMBLE = "load failed for model 'm': version 1 is at UNAVAILABLE state: "


@pytest.mark.parametrize(
    ("details", "kind", "message"),
    [
        (
            _PREAMBLE + "Internal: InvalidCheckpoint: Tensor x is missing. Replace it.\n\nAt:\n"
            "  /tmp/be/paraserve/model.py(7): initialize\n;\n",
            InvalidCheckpoint,
            "Tensor x is missing. Replace it.",
        ),
        (
            _PREAMBLE + "Internal: paraserve_backend.errors.SourceUnavailable: No answer: try: "
            "later\n\nAt:\n  /x.py(1): y\n;\n",
            SourceUnavailable,
            "No answer: try: later",
        ),
        (
            _PREAMBLE + "Internal: TritonModelException: It is broken.\n\nAt:\n  /x.py(1): y\n;\n",
            ParaServeError,
            "Model m failed to load: It is broken.",
        ),
        (
            _PREAMBLE + "Internal: TritonModelException: INVALID_ARGUMENT: tokenizer.json cannot "
            "be read: no.\n\nAt:\n  /x.py(1): y\n;\n",
            InvalidRequest,
            "tokenizer.json cannot be read: no.",
        ),
        (
            _PREAMBLE + "Internal: ValueError: 3 is\n  not 4\n\nAt:\n  /x.py(1): y\n;\n",
            ParaServeError,
            "Model m failed to load: ValueError: 3 is not 4",
        ),
        (
            _PREAMBLE + "Internal: Stub process 'm_0_0' is not healthy.;",
            Unavailable,
            "The process of model m died while it loaded.",
        ),
        (
            "failed to load 'm', failed to poll from model repository",
            ParaServeError,
            "Model m failed to load: failed to load 'm', failed to poll from model repository",
        ),
    ],
)
def test_the_cause_is_taken_out_of_tritons_text(
    details: str, kind: type[ParaServeError], message: str
) -> None:
    error = load_error("m", details)
    assert (type(error), str(error)) == (kind, message)
