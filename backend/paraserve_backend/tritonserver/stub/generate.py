"""Role `generate` inside Triton: requests in, streams of responses out.

The forward pass of a pipeline as a call of its ensemble is here too.
"""

from __future__ import annotations

import logging
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import triton_python_backend_utils as pb_utils

from paraserve_backend.engines.native.batcher import ScheduledBatch
from paraserve_backend.errors import (
    ParaServeError,
    Unavailable,
)
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.forward_codec import decode_result, encode_batch
from paraserve_backend.protocol.hand_over import read_targets
from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
    REPLICA_PARAMETER,
    EngineName,
)
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
)
from paraserve_backend.protocol.request import WantedOutputs, parse_request
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.tritonserver.stub.outputs import output_tensors

if TYPE_CHECKING:
    from paraserve_backend.roles.external import ExternalRole
    from paraserve_backend.roles.generate import GenerateRole
from paraserve_backend.tritonserver.stub.metrics import triton_gauges
from paraserve_backend.tritonserver.stub.responses import (
    FINAL,
    fail,
    request_parameters,
)

logger = logging.getLogger(__name__)


class GenerateAdapter:
    def __init__(self, config: GenerateConfig) -> None:
        self._role = _generate_role(config)

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._add(request, sender)
            except ParaServeError as error:
                fail(sender, error)
            except Exception:
                logger.exception("a request could not be read")
                unreadable = Unavailable("The request could not be read; see the server's log.")
                fail(sender, unreadable)

    def _add(self, request: pb_utils.InferenceRequest, sender: pb_utils.ResponseSender) -> None:
        tensors = {t.name(): t.as_numpy().ravel().tolist() for t in request.inputs()}
        parameters = request_parameters(request)
        parameters.pop(REPLICA_PARAMETER, None)
        command = parameters.get("command")
        if command is not None and not tensors:
            self._role.hand_over(read_targets(command))
            sender.send(flags=FINAL)
            return
        encoded = parameters.pop(RESUME, None)
        resume = Resume.decode(encoded) if encoded is not None else None
        fresh_seed = resume.seed if resume else secrets.randbits(63)
        parsed = parse_request(tensors, parameters, fresh_seed=fresh_seed)
        reply = _Reply(sender, parsed.wanted)
        self._role.add(parsed, reply, resume)

    def close(self) -> None:
        self._role.close()


def _generate_role(config: GenerateConfig) -> GenerateRole | ExternalRole:
    gauges = triton_gauges(config)
    if config.engine != EngineName.PARASERVE:
        from paraserve_backend.roles.external import ExternalRole

        return ExternalRole(config.engine, config, gauges)
    from paraserve_backend.roles.generate import GenerateRole

    forward = None
    if config.forward_model is not None:
        forward = _EnsembleForward(
            config.forward_model, config.batches_in_flight, replica=config.replica
        )
    return GenerateRole(config, forward, gauges)


class _Reply:
    def __init__(self, sender: pb_utils.ResponseSender, wanted: WantedOutputs) -> None:
        self._sender = sender
        self._wanted = wanted

    def send(self, delta: Delta) -> None:
        tensors = output_tensors(delta, self._wanted)
        response = pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, values) for name, values in tensors.items()]
        )
        if delta.finish_reason is None:
            self._sender.send(response)
        else:
            self._sender.send(response, flags=FINAL)

    def fail(self, error: ParaServeError) -> None:
        fail(self._sender, error)

    def move(self, replica: str, resume: Resume) -> None:
        outputs = {HAND_OVER_TO: replica, RESUME: resume.encode()}
        response = pb_utils.InferenceResponse(
            [
                pb_utils.Tensor(name, np.array([value.encode()], np.object_))
                for name, value in outputs.items()
            ]
        )
        self._sender.send(response, flags=FINAL)

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()


class _EnsembleForward:
    """One forward pass = one BLS call of the ensemble; a call blocks, so each has its thread."""

    def __init__(self, model: str, batches_in_flight: int, *, replica: str) -> None:
        self._model = model
        # Ensembles hand parameters on to their steps, which may be slots.
        self._parameters: dict[str, str | int | bool] = {REPLICA_PARAMETER: replica}
        self._threads = ThreadPoolExecutor(batches_in_flight, thread_name_prefix="forward")

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        return self._threads.submit(self._call, batch)

    def _call(self, batch: ScheduledBatch) -> ForwardResult:
        encoded = np.frombuffer(encode_batch(batch.forward), np.uint8)
        response = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=[FORWARD_RESULT],
            inputs=[
                pb_utils.Tensor(FORWARD_BATCH, encoded),
                pb_utils.Tensor(FORWARD_TOKEN_IDS, np.array(batch.token_ids, np.int32)),
            ],
            parameters=self._parameters,
        ).exec()
        if response.has_error():
            raise Unavailable(response.error().message())
        return decode_result(response.output_tensors()[0].as_numpy().tobytes())

    def close(self) -> None:
        self._threads.shutdown()
