"""Roles `stage` and `link` inside Triton: one forward pass per request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils

from paraserve_backend.channel.transport import Buffer
from paraserve_backend.daemon.guard import concerns_one, guarded
from paraserve_backend.errors import InvalidRequest, ParaServeError, Unavailable
from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_HIDDEN,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
)
from paraserve_backend.protocol.parameters import (
    LinkConfig,
    StageConfig,
)
from paraserve_backend.roles.weights import open_weights
from paraserve_backend.telemetry.spans import SpanName
from paraserve_backend.tritonserver.stub.requests import answer_errors
from paraserve_backend.tritonserver.stub.responses import FINAL, error_response

logger = logging.getLogger(__name__)


class StageAdapter:
    def __init__(self, config: StageConfig) -> None:
        fetched = open_weights(config.weights)
        with fetched.spans.span(SpanName.IMPORT_TORCH):
            from paraserve_backend.roles.stage import StageRole

        self._role = StageRole(config, fetched)
        self._input = FORWARD_TOKEN_IDS if config.layers.is_first else FORWARD_HIDDEN
        self._output = FORWARD_RESULT if config.layers.is_last else FORWARD_HIDDEN

    def execute(
        self, requests: list[pb_utils.InferenceRequest]
    ) -> list[pb_utils.InferenceResponse]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        try:
            tensors = _tensors(request, FORWARD_BATCH, self._input)
            output = self._role.step(tensors[FORWARD_BATCH].tobytes(), tensors[self._input])
            return pb_utils.InferenceResponse([pb_utils.Tensor(self._output, output)])
        except ParaServeError as error:
            return error_response(error)
        except BaseException as error:
            if not concerns_one(error):
                raise
            # It knows numbers alone, and what a device says of itself is needed.
            logger.error("a forward pass failed", exc_info=error)
            return error_response(Unavailable("A forward pass failed; see the server's log."))

    def close(self) -> None:
        self._role.close()


class LinkAdapter:
    def __init__(self, config: LinkConfig) -> None:
        from paraserve_backend.roles.link import LinkRole

        self._role = LinkRole(config)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        for request in requests:
            with guarded(logger, "a forward pass"):
                answer_errors(request, self._forward)

    def _forward(self, request: pb_utils.InferenceRequest, sender: pb_utils.ResponseSender) -> None:
        tensors = _tensors(request, FORWARD_BATCH, FORWARD_HIDDEN)
        batch = tensors[FORWARD_BATCH].tobytes()
        self._role.forward(batch, tensors[FORWARD_HIDDEN], _answer(sender))

    def close(self) -> None:
        self._role.close()


def _answer(sender: pb_utils.ResponseSender) -> Callable[[Buffer | ParaServeError], None]:
    def answer(outcome: Buffer | ParaServeError) -> None:
        if isinstance(outcome, ParaServeError):
            response = error_response(outcome)
        else:
            result = _bytes_tensor(FORWARD_RESULT, outcome)
            response = pb_utils.InferenceResponse([result])
        sender.send(response, flags=FINAL)

    return answer


def _bytes_tensor(name: str, data: Buffer) -> pb_utils.Tensor:
    value: npt.NDArray[np.uint8] = np.frombuffer(data, np.uint8)
    return pb_utils.Tensor(name, value)


def _tensors(request: pb_utils.InferenceRequest, *names: str) -> dict[str, npt.NDArray[Any]]:
    tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    for name in names:
        if name not in tensors:
            raise InvalidRequest(f"A forward pass has an input '{name}'; this one has none.")
    return tensors
