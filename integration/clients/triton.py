"""Triton's four Python clients, used as their examples use them."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections.abc import AsyncIterator
from typing import Any, Protocol

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio

from integration.clients.question import (
    UNKNOWN,
    Answer,
    Ask,
    Gateway,
    Look,
    Question,
    Sight,
)
from integration.support.limits import HANG_S

_Inbox = queue.SimpleQueue[
    tuple[triton_grpc.InferResult | None, triton_grpc.InferenceServerException | None]
]


class _Result(Protocol):
    def as_numpy(self, name: str) -> np.ndarray[Any, Any] | None: ...


def grpc_stream(gateway: Gateway, question: Question) -> Answer:
    got: _Inbox = queue.SimpleQueue()
    results: list[triton_grpc.InferResult] = []
    with contextlib.closing(triton_grpc.InferenceServerClient(gateway.grpc_address)) as client:
        client.start_stream(lambda result, error: got.put((result, error)))
        client.async_stream_infer(question.deployment, _grpc_inputs(question, stream=True))
        while not results or results[-1].as_numpy("finish_reason") is None:
            results.append(_next(got))
        client.stop_stream()
    return _answer(*results)


def grpc_infer(gateway: Gateway, question: Question) -> Answer:
    with contextlib.closing(triton_grpc.InferenceServerClient(gateway.grpc_address)) as client:
        return _answer(client.infer(question.deployment, _grpc_inputs(question)))


def grpc_async_infer(gateway: Gateway, question: Question) -> Answer:
    got: _Inbox = queue.SimpleQueue()
    with contextlib.closing(triton_grpc.InferenceServerClient(gateway.grpc_address)) as client:
        client.async_infer(
            question.deployment,
            _grpc_inputs(question),
            lambda result, error: got.put((result, error)),
        )
        return _answer(_next(got))


def grpc_aio_stream(gateway: Gateway, question: Question) -> Answer:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": question.deployment, "inputs": _grpc_inputs(question, stream=True)}

    async def ask() -> Answer:
        results = []
        async with triton_grpc_aio.InferenceServerClient(gateway.grpc_address) as client:
            async for result, error in client.stream_infer(requests()):
                if error is not None:
                    raise error
                assert result is not None
                results.append(result)
        return _answer(*results)

    return asyncio.run(ask())


def grpc_aio_infer(gateway: Gateway, question: Question) -> Answer:
    async def ask() -> Answer:
        async with triton_grpc_aio.InferenceServerClient(gateway.grpc_address) as client:
            return _answer(await client.infer(question.deployment, _grpc_inputs(question)))

    return asyncio.run(ask())


def http_infer(gateway: Gateway, question: Question) -> Answer:
    with triton_http.InferenceServerClient(gateway.http_address) as client:
        return _answer(client.infer(question.deployment, _http_inputs(question)))


def http_async_infer(gateway: Gateway, question: Question) -> Answer:
    with triton_http.InferenceServerClient(gateway.http_address) as client:
        request = client.async_infer(question.deployment, _http_inputs(question))
        return _answer(request.get_result(timeout=HANG_S))


def http_aio_infer(gateway: Gateway, question: Question) -> Answer:
    async def ask() -> Answer:
        async with triton_http_aio.InferenceServerClient(gateway.http_address) as client:
            return _answer(await client.infer(question.deployment, _http_inputs(question)))

    return asyncio.run(ask())


def grpc_look(gateway: Gateway, deployment: str) -> Sight:
    with contextlib.closing(triton_grpc.InferenceServerClient(gateway.grpc_address)) as client:
        return _look(client, deployment)


def http_look(gateway: Gateway, deployment: str) -> Sight:
    with triton_http.InferenceServerClient(gateway.http_address) as client:
        return _look(client, deployment)


def grpc_aio_look(gateway: Gateway, deployment: str) -> Sight:
    async def look() -> Sight:
        async with triton_grpc_aio.InferenceServerClient(gateway.grpc_address) as client:
            return await _look_async(client, deployment)

    return asyncio.run(look())


def http_aio_look(gateway: Gateway, deployment: str) -> Sight:
    async def look() -> Sight:
        async with triton_http_aio.InferenceServerClient(gateway.http_address) as client:
            return await _look_async(client, deployment)

    return asyncio.run(look())


WAYS: dict[str, Ask] = {
    "tritonclient.grpc-async_stream_infer": grpc_stream,
    "tritonclient.grpc-infer": grpc_infer,
    "tritonclient.grpc-async_infer": grpc_async_infer,
    "tritonclient.grpc.aio-stream_infer": grpc_aio_stream,
    "tritonclient.grpc.aio-infer": grpc_aio_infer,
    "tritonclient.http-infer": http_infer,
    "tritonclient.http-async_infer": http_async_infer,
    "tritonclient.http.aio-infer": http_aio_infer,
}
LOOKS: dict[str, Look] = {
    "tritonclient.grpc": grpc_look,
    "tritonclient.grpc.aio": grpc_aio_look,
    "tritonclient.http": http_look,
    "tritonclient.http.aio": http_aio_look,
}


def _look(
    client: triton_grpc.InferenceServerClient | triton_http.InferenceServerClient, deployment: str
) -> Sight:
    return Sight(
        is_server_live=client.is_server_live(),
        is_server_ready=client.is_server_ready(),
        is_deployment_ready=client.is_model_ready(deployment),
        is_unknown_ready=client.is_model_ready(UNKNOWN),
    )


async def _look_async(
    client: triton_grpc_aio.InferenceServerClient | triton_http_aio.InferenceServerClient,
    deployment: str,
) -> Sight:
    return Sight(
        is_server_live=await client.is_server_live(),
        is_server_ready=await client.is_server_ready(),
        is_deployment_ready=await client.is_model_ready(deployment),
        is_unknown_ready=await client.is_model_ready(UNKNOWN),
    )


def _tensors(question: Question, *, stream: bool) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "text_input": np.array([question.prompt.encode()], dtype=np.object_),
        "max_tokens": np.array([question.max_tokens], dtype=np.int32),
        "stream": np.array([stream]),
    }


_DATATYPES = {"text_input": "BYTES", "max_tokens": "INT32", "stream": "BOOL"}


def _grpc_inputs(question: Question, *, stream: bool = False) -> list[triton_grpc.InferInput]:
    return [
        triton_grpc.InferInput(name, [1], _DATATYPES[name]).set_data_from_numpy(values)
        for name, values in _tensors(question, stream=stream).items()
    ]


def _http_inputs(question: Question) -> list[triton_http.InferInput]:
    return [
        triton_http.InferInput(name, [1], _DATATYPES[name]).set_data_from_numpy(values)
        for name, values in _tensors(question, stream=False).items()
    ]


def _next(inbox: _Inbox) -> triton_grpc.InferResult:
    result, error = inbox.get(timeout=HANG_S)
    if error is not None:
        raise error
    assert result is not None
    return result


def _answer(*results: _Result) -> Answer:
    return Answer(
        token_ids=[token for result in results for token in _array(result, "output_ids").tolist()],
        text=b"".join(_array(result, "text_output")[0] for result in results).decode(),
    )


def _array(result: _Result, name: str) -> np.ndarray[Any, Any]:
    array = result.as_numpy(name)
    assert array is not None, f"the response has no {name}"
    return array
