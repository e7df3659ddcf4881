"""The Triton models of bench_hop; runs inside Triton's Python stub, to which it is copied.

Which one an instance is says parameter `part` of its config.pbtxt. A stage adds one to every byte
of the hidden states: near-empty, but the last one can tell that all have seen them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import triton_python_backend_utils as pb_utils
from tritonclient.grpc import InferenceServerClient, InferInput

from paraserve_backend.channel.keys import CurveKeys
from paraserve_backend.channel.transport import Channel, Frame, FrameKind, relay
from paraserve_backend.protocol.names import (
    FORWARD_BATCH,
    FORWARD_HIDDEN,
    FORWARD_RESULT,
    FORWARD_TOKEN_IDS,
)

#: Bytes of a result: what one sequence's token and its log-probability take.
_RESULT_BYTES = 20
_MAX_FRAME_BYTES = 1 << 30

Bytes = npt.NDArray[np.uint8]
Tensors = Mapping[str, npt.NDArray[Any]]
Parameters = Mapping[str, str]


class _Part(Protocol):
    def answer(self, tensors: Tensors) -> pb_utils.Tensor: ...

    def close(self) -> None: ...


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        raw = json.loads(args["model_config"])["parameters"]
        parameters = {name: value["string_value"] for name, value in raw.items()}
        self._part = _part(parameters)
        # The link of the product answers through a sender; so does what stands in for it.
        self._by_sender = parameters["part"] == "echo"

    def execute(self, requests: list[pb_utils.InferenceRequest]) -> Any:
        if not self._by_sender:
            return [self._respond(request) for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            sender.send(self._respond(request), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None

    def finalize(self) -> None:
        self._part.close()

    def _respond(self, request: pb_utils.InferenceRequest) -> pb_utils.InferenceResponse:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            return pb_utils.InferenceResponse([self._part.answer(tensors)])
        except Exception as error:  # a raising stub leaks shared memory
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(repr(error)))


def _part(parameters: Parameters) -> _Part:
    match parameters["part"]:
        case "driver":
            return _Driver()
        case "stage":
            return _Stage(parameters)
        case "relay":
            return _RelayStage(parameters)
        case "call":
            return _CallLink(parameters)
        case "echo":
            return _EchoLink()
        case other:
            raise ValueError(f"unknown part {other}")


class _Driver:
    """Calls a forward model again and again, as the generate role does: by BLS from a thread."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(1)

    def answer(self, tensors: Tensors) -> pb_utils.Tensor:
        model = tensors["model"][0].decode()
        token_ids = np.zeros(int(tensors["tokens"][0]), np.int32)
        stages = int(tensors["stages"][0])
        seconds = np.empty(int(tensors["passes"][0]))
        for number in range(len(seconds)):
            began = time.perf_counter()
            result = self._threads.submit(_forward, model, token_ids).result()
            seconds[number] = time.perf_counter() - began
            if result != bytes([stages]) * _RESULT_BYTES:
                raise ValueError(f"{model} gave {result!r}")
        return pb_utils.Tensor("seconds", seconds)

    def close(self) -> None:
        self._threads.shutdown()


def _forward(model: str, token_ids: npt.NDArray[np.int32]) -> bytes:
    response = pb_utils.InferenceRequest(
        model_name=model,
        requested_output_names=[FORWARD_RESULT],
        inputs=[
            pb_utils.Tensor(FORWARD_BATCH, np.zeros(96, np.uint8)),  # a batch of one sequence
            pb_utils.Tensor(FORWARD_TOKEN_IDS, token_ids),
        ],
    ).exec()
    if response.has_error():
        raise RuntimeError(response.error().message())
    return response.output_tensors()[0].as_numpy().tobytes()


class _Stage:
    """A stage that Triton feeds."""

    def __init__(self, parameters: Parameters) -> None:
        self._row_bytes = int(parameters["row_bytes"])
        self._is_last = parameters["is_last"] == "true"

    def answer(self, tensors: Tensors) -> pb_utils.Tensor:
        if FORWARD_TOKEN_IDS in tensors:
            shape = (len(tensors[FORWARD_TOKEN_IDS]), self._row_bytes)
            return pb_utils.Tensor(FORWARD_HIDDEN, np.ones(shape, np.uint8))
        hidden = tensors[FORWARD_HIDDEN] + np.uint8(1)
        if self._is_last:
            return pb_utils.Tensor(FORWARD_RESULT, _result(hidden))
        return pb_utils.Tensor(FORWARD_HIDDEN, hidden)

    def close(self) -> None:
        pass


def _result(hidden: Bytes) -> Bytes:
    return hidden.ravel()[-_RESULT_BYTES:].copy()


class _RelayStage:
    """A stage that the activation channel feeds; the channel is the product's own."""

    def __init__(self, parameters: Parameters) -> None:
        self._is_last = parameters["is_last"] == "true"
        self._stopping = threading.Event()
        self._channel = Channel(
            listen=parameters["listen"],
            next_address=parameters["next"],
            keys=CurveKeys.read(Path(parameters["key_file"])),
            max_bytes=_MAX_FRAME_BYTES,
        )
        self._thread = threading.Thread(
            target=relay, args=(self._channel, self._step, self._stopping.is_set), daemon=True
        )
        self._thread.start()

    def _step(self, frame: Frame) -> Frame:
        hidden = np.frombuffer(frame.payload, np.uint8) + np.uint8(1)
        if self._is_last:
            body = _result(hidden).tobytes()
            return Frame(kind=FrameKind.RESULT, number=frame.number, body=body)
        return Frame(kind=frame.kind, number=frame.number, body=frame.body, payload=hidden.data)

    def answer(self, tensors: Tensors) -> pb_utils.Tensor:
        raise ValueError("this stage is fed by the activation channel")

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        self._channel.close()


class _CallLink:
    """The link of the chain of Triton calls: hands hidden states to the next server by gRPC."""

    def __init__(self, parameters: Parameters) -> None:
        self._client = InferenceServerClient(parameters["server"])
        self._model = parameters["model"]

    def answer(self, tensors: Tensors) -> pb_utils.Tensor:
        inputs = []
        for name in (FORWARD_BATCH, FORWARD_HIDDEN):
            given = InferInput(name, list(tensors[name].shape), "UINT8")
            given.set_data_from_numpy(tensors[name])
            inputs.append(given)
        result = self._client.infer(self._model, inputs).as_numpy(FORWARD_RESULT)
        assert result is not None
        return pb_utils.Tensor(FORWARD_RESULT, result)

    def close(self) -> None:
        self._client.close()


class _EchoLink:
    """A link to nowhere: what is left of a pass is the head's own Triton cost."""

    def answer(self, tensors: Tensors) -> pb_utils.Tensor:
        return pb_utils.Tensor(FORWARD_RESULT, _result(tensors[FORWARD_HIDDEN]))

    def close(self) -> None:
        pass
