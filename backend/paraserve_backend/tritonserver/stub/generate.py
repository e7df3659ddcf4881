"""Role `generate` inside Triton: requests in, streams of responses out.

The forward pass of a pipeline as a call of its ensemble is here too.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import triton_python_backend_utils as pb_utils

from paraserve_backend.daemon.guard import guarded
from paraserve_backend.engines.native.batcher import ScheduledBatch
from paraserve_backend.errors import InvalidRequest, ParaServeError, Unavailable, read_coded
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.forward_codec import decode_result, encode_batch
from paraserve_backend.protocol.hand_over import read_targets
from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
    PROBE_PARAMETER,
    REPLICA_PARAMETER,
    EngineName,
)
from paraserve_backend.protocol.parameters import (
    GenerateConfig,
)
from paraserve_backend.protocol.request import WantedOutputs, parse_request
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.roles.intake import Intake
from paraserve_backend.tritonserver.stub.authority import Authority
from paraserve_backend.tritonserver.stub.metrics import triton_gauges
from paraserve_backend.tritonserver.stub.outputs import output_tensors
from paraserve_backend.tritonserver.stub.requests import (
    answer_errors,
    request_parameters,
    request_tensors,
)
from paraserve_backend.tritonserver.stub.responses import FINAL, fail

if TYPE_CHECKING:
    from paraserve_backend.roles.external import ExternalRole
    from paraserve_backend.roles.generate import GenerateRole

logger = logging.getLogger(__name__)
#: What Triton puts before the error of an ensemble's step.
_IN_ENSEMBLE = re.compile(r"^in ensemble '[^']*', ")


class GenerateAdapter:
    def __init__(
        self, config: GenerateConfig, authority: Authority, pulse_file: Path | None
    ) -> None:
        self._authority = authority
        self._role = _generate_role(config, pulse_file)
        self._intake = Intake()

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> None:
        for request in requests:
            with guarded(logger, "a request"):
                answer_errors(request, self._take)

    def _take(self, request: pb_utils.InferenceRequest, sender: pb_utils.ResponseSender) -> None:
        parameters = request_parameters(request)
        inputs = request.inputs()
        command = self._authority.command(parameters, has_tensors=bool(inputs))
        if command is not None:
            self._role.hand_over(read_targets(command))
            sender.send(flags=FINAL)
        elif PROBE_PARAMETER in parameters:
            self._role.probe(partial(_answer_probe, sender))
        else:
            self._pass_on(request_tensors(inputs, self._role.max_context), parameters, sender)

    def _pass_on(
        self,
        tensors: Mapping[str, list[Any]],
        parameters: dict[str, Any],
        sender: pb_utils.ResponseSender,
    ) -> None:
        parameters.pop(REPLICA_PARAMETER, None)
        encoded = parameters.pop(RESUME, None)
        if not isinstance(encoded, str | None):
            raise InvalidRequest(f"Parameter '{RESUME}' is not one that a ParaServe replica made.")
        reply = _Reply(sender)

        def take_in() -> None:
            resume = Resume.decode(encoded) if encoded is not None else None
            fresh_seed = resume.seed if resume else secrets.randbits(63)
            parsed = parse_request(tensors, parameters, fresh_seed=fresh_seed)
            reply.wanted = parsed.wanted
            self._role.add(parsed, reply, resume)

        is_begun = encoded is not None and Resume.has_begun(encoded)
        self._intake.put(reply, take_in, is_begun=is_begun)

    def close(self) -> None:
        self._intake.close()
        self._role.close()


def _answer_probe(sender: pb_utils.ResponseSender, error: ParaServeError | None) -> None:
    if error is None:
        sender.send(flags=FINAL)
    else:
        fail(sender, error)


def _generate_role(config: GenerateConfig, pulse_file: Path | None) -> GenerateRole | ExternalRole:
    gauges = triton_gauges(config)
    if config.engine != EngineName.PARASERVE:
        from paraserve_backend.roles.external import ExternalRole

        return ExternalRole(config.engine, config, gauges, pulse_file)
    from paraserve_backend.roles.generate import GenerateRole

    forward = None
    if config.forward_model is not None:
        forward = _EnsembleForward(
            config.forward_model, config.batches_in_flight, replica=config.replica
        )
    return GenerateRole(config, forward, gauges, pulse_file)


class _Reply:
    def __init__(self, sender: pb_utils.ResponseSender) -> None:
        self._sender = sender
        #: Set when the request has been read.
        self.wanted = WantedOutputs()

    def send(self, delta: Delta) -> None:
        tensors = output_tensors(delta, self.wanted)
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
            raise _failed_pass(response.error().message())
        return decode_result(response.output_tensors()[0].as_numpy().tobytes())

    def close(self) -> None:
        self._threads.shutdown()


def _failed_pass(message: str) -> Unavailable:
    """Return what a client may know of a pass that a part of the pipeline did not carry out.

    Whatever it was, the request can go on elsewhere. What Triton itself says is of models that a
    client does not know.
    """
    said = read_coded(_IN_ENSEMBLE.sub("", message))
    if said is None:
        logger.error("a forward pass failed: %s", message)
        return Unavailable("A part of the pipeline does not answer; send the request again.")
    _code, sentence = said
    return Unavailable(sentence)
