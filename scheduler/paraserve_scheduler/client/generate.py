"""Sends one generate request over KServe v2 gRPC with Triton's own client; yields its answer."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from paraserve_backend.errors import DeadlineExceeded, ParaServeError, Unavailable
from paraserve_backend.rpc.channels import triton_client_arguments

#: KServe datatype and numpy type of the settings a request may carry.
_SETTINGS: Mapping[str, tuple[str, Any]] = {
    "max_tokens": ("INT32", np.int32),
    "temperature": ("FP32", np.float32),
    "top_p": ("FP32", np.float32),
    "top_k": ("INT32", np.int32),
    "seed": ("UINT64", np.uint64),
    "ignore_eos": ("BOOL", np.bool_),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One response of a stream: the new text and the new tokens."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str


def stream(
    address: str, model: str, prompt: str, settings: Mapping[str, float], *, timeout_s: float
) -> Iterator[Piece]:
    """Send a prompt to a gateway or a Triton and yield its answer as it comes.

    Args:
        address: host:port of the gRPC service.
        model: name of the deployment.
        prompt: the text to continue.
        settings: any of max_tokens, temperature, top_p, top_k, seed, ignore_eos.
        timeout_s: longest wait for one response; the first includes the cold start.

    Raises:
        ParaServeError: the server's error.
        DeadlineExceeded: no response in time.
    """
    inputs = _inputs(prompt, settings)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    is_cancelled: queue.SimpleQueue[bool] = queue.SimpleQueue()
    is_finished = False
    with ThreadPoolExecutor(1, thread_name_prefix="stream") as thread:
        try:
            thread.submit(_converse, address, model, inputs, answers, is_cancelled)
            yield from _pieces(answers, timeout_s)
            is_finished = True
        finally:
            # Triton 2.51 may never let go of a request that is cancelled when it is all but over.
            is_cancelled.put(not is_finished)


def _converse(
    address: str,
    model: str,
    inputs: list[triton.InferInput],
    answers: queue.SimpleQueue[Any],
    is_cancelled: queue.SimpleQueue[bool],
) -> None:
    """Hold the stream until it is to end: off the main thread.

    There, Ctrl-C would be raised inside gRPC, and closing what it has begun may then never end.
    """
    client = triton.InferenceServerClient(address, channel_args=triton_client_arguments())
    cancel = True
    try:
        client.start_stream(lambda result, error: answers.put(error or result))
        client.async_stream_infer(model, inputs, request_id="1", enable_empty_final_response=True)
        cancel = is_cancelled.get()
    except InferenceServerException as error:
        answers.put(error)
    finally:
        client.stop_stream(cancel_requests=cancel)
        client.close()


def _inputs(prompt: str, settings: Mapping[str, float]) -> list[triton.InferInput]:
    inputs = [
        _input("text_input", "BYTES", np.array([prompt.encode()], dtype=np.object_)),
        _input("stream", "BOOL", np.array([True])),
    ]
    for name, value in settings.items():
        datatype, dtype = _SETTINGS[name]
        inputs.append(_input(name, datatype, np.array([value], dtype=dtype)))
    return inputs


def _input(name: str, datatype: str, values: np.ndarray[Any, Any]) -> triton.InferInput:
    tensor = triton.InferInput(name, list(values.shape), datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def _pieces(answers: queue.SimpleQueue[Any], timeout_s: float) -> Iterator[Piece]:
    while True:
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded(f"No answer within {timeout_s:g} s.") from None
        if isinstance(answer, InferenceServerException):
            raise _ours(answer)
        if answer.as_numpy("text_output") is not None:
            yield _piece(answer)
        if answer.get_response().parameters["triton_final_response"].bool_param:
            return


def _piece(answer: Any) -> Piece:
    text = b"".join(answer.as_numpy("text_output").reshape(-1).tolist())
    ids = answer.as_numpy("output_ids")
    reason = answer.as_numpy("finish_reason")
    return Piece(
        text=text.decode(errors="replace"),
        token_ids=() if ids is None else tuple(ids.reshape(-1).tolist()),
        finish_reason="" if reason is None else reason.reshape(-1)[0].decode(),
    )


def _ours(error: InferenceServerException) -> ParaServeError:
    if "UNAVAILABLE" in str(error.status()):
        return Unavailable(error.message())
    return ParaServeError(error.message())
