"""A gateway in front of a real tritonserver, driven by unmodified clients.

The scheduler is the unit tests' fake: what is real here is Triton, its streams and its errors.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from integration.support.counting_model import write_model
from integration.support.triton_server import TritonServer
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    make_request,
    read_events,
    read_stream,
    serving,
    text_of,
)

_REPLICA = f"{DEPLOYMENT}.1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    server: TritonServer
    client: triton.InferenceServerClient


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    with TritonServer(tmp_path_factory.mktemp("triton")) as server:
        write_model(server.model_repository / _REPLICA)
        client = triton.InferenceServerClient(server.grpc_address)
        client.load_model(_REPLICA)
        yield Replica(server=server, client=client)
        client.close()


@pytest.fixture
async def gateway(replica: Replica) -> AsyncIterator[GatewayHarness]:
    """A gateway whose one ready replica is the real one."""
    async with serving(replicas=0) as gateway:
        await gateway.publish(gateway.endpoint(address=replica.server.grpc_address))
        yield gateway


async def post(gateway: GatewayHarness, url: str, body: dict[str, Any]) -> tuple[int, list[Any]]:
    """Post JSON to a generate call; return the status and every JSON object that comes back."""
    async with gateway.http.post(url, data=json.dumps(body)) as response:
        return response.status, await read_events(response)


@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("generate", {"text_input": "count"}),
        ("generate", {"max_tokens": 1, "id": "7", "text_input": ["count"]}),
        ("generate", {"text_input": "parameters", "id": "", "logprobs": 1, "detokenize": True}),
        (
            "generate",
            {"text_input": "parameters", "id": "", "parameters": {"min_length": 5, "top_k": 2}},
        ),
        ("generate_stream", {"text_input": "count", "max_tokens": 4, "stream": True, "id": "s"}),
        ("generate_stream", {"text_input": "end empty", "max_tokens": 2}),
    ],
)
async def test_generate_answers_as_the_replicas_own_triton_does(
    gateway: GatewayHarness, replica: Replica, call: str, body: dict[str, Any]
) -> None:
    direct = f"http://{replica.server.http_address}/v2/models/{_REPLICA}/{call}"
    status, expected = await post(gateway, direct, body)
    for entry in expected:
        if "model_name" in entry:
            entry["model_name"] = DEPLOYMENT
    through = await post(gateway, gateway.url(f"models/{DEPLOYMENT}/{call}"), body)
    assert through == (status, expected)


# Not NOT_FOUND: it says that the replica is not there, and the gateway tries elsewhere.
@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "UNAVAILABLE", "UNIMPLEMENTED"])
async def test_a_models_error_reaches_a_unary_client_with_its_code(
    gateway: GatewayHarness, code: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="The sentence") as caught:
        await gateway.stub.ModelInfer(make_request(f"fail {code}", stream=False))
    assert caught.value.code().name == code


async def test_an_exception_in_the_model_is_one_sentence_without_paths(
    gateway: GatewayHarness,
) -> None:
    (entry,) = await read_stream(gateway, make_request("raise"))
    assert entry.error_message == "The model of 'tiny' failed: ValueError: boom"


async def test_tritons_client_gets_every_response_in_order(gateway: GatewayHarness) -> None:
    async with gateway.client() as client:
        stream = client.stream_infer(_requests(max_tokens=300))
        texts = [_text(result) async for result, _ in stream]
    assert texts == [f"token {number}" for number in range(300)]


async def test_a_unary_request_is_answered_by_the_decoupled_model(gateway: GatewayHarness) -> None:
    async with gateway.client() as client:
        result = await client.infer(DEPLOYMENT, _inputs(max_tokens=1), request_id="u")
    assert _text(result) == "token 0"
    ids = result.as_numpy("output_ids")
    assert ids is not None
    assert ids.tolist() == [0, 1]


@pytest.mark.parametrize("protocol", ["gRPC", "HTTP"])
async def test_a_client_that_leaves_cancels_the_request_in_the_model(
    gateway: GatewayHarness, replica: Replica, protocol: str
) -> None:
    await reload(replica)
    leave = _leave_grpc if protocol == "gRPC" else _leave_http
    await leave(gateway)
    answered = await gateway.stub.ModelInfer(make_request("was cancelled", stream=False))
    assert text_of(answered) == "True"


@pytest.mark.parametrize(("stream_timeout_s", "timeout_us"), [(2.0, None), (None, 2_000_000)])
async def test_a_client_that_waits_no_longer_ends_the_request_in_the_model(
    gateway: GatewayHarness,
    replica: Replica,
    stream_timeout_s: float | None,
    timeout_us: int | None,
) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        async for request in _requests(prompt="hang"):
            yield {**request, "timeout": timeout_us}

    await reload(replica)
    async with gateway.client() as client:
        stream = client.stream_infer(
            requests(), stream_timeout_s, headers={"triton_grpc_error": "true"}
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in stream:
                pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    answered = await gateway.stub.ModelInfer(make_request("was cancelled", stream=False))
    assert text_of(answered) == "True"


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
async def test_tritons_client_may_compress(gateway: GatewayHarness, algorithm: str) -> None:
    prompt = "count " * 500
    async with gateway.client() as client:
        result = await client.infer(
            DEPLOYMENT, _inputs(prompt, max_tokens=1), compression_algorithm=algorithm
        )
        assert _text(result) == "token 0"
        stream = client.stream_infer(
            _requests(prompt=prompt, max_tokens=3), compression_algorithm=algorithm
        )
        assert [_text(result) async for result, _ in stream] == [
            f"token {number}" for number in range(3)
        ]


async def test_inputs_with_a_batch_dimension_fit_a_model_without(gateway: GatewayHarness) -> None:
    inputs = _inputs("count", max_tokens=1)
    for tensor in inputs:
        tensor.set_shape([1, 1])
    async with gateway.client() as client:
        result = await client.infer(DEPLOYMENT, inputs)
    ids = result.as_numpy("output_ids")
    assert ids is not None
    assert ids.tolist() == [[0, 1]]


async def test_parameters_reserved_by_triton_are_taken_over_both_protocols(
    gateway: GatewayHarness,
) -> None:
    async with gateway.client() as client:
        result = await client.infer(
            DEPLOYMENT, _inputs(max_tokens=1), priority=1, sequence_id=7, timeout=30_000_000
        )
    assert _text(result) == "token 0"
    body = {"text_input": "count", "priority": 1, "sequence_id": 7, "timeout": 30_000_000}
    status, (fields,) = await post(gateway, gateway.url(f"models/{DEPLOYMENT}/generate"), body)
    assert (status, fields.get("text_output")) == (200, "token 0"), fields


async def test_statistics_count_what_was_asked(gateway: GatewayHarness) -> None:
    async with gateway.client() as client:
        for _ in range(3):
            await client.infer(DEPLOYMENT, _inputs(max_tokens=1))
        with pytest.raises(triton.InferenceServerException):
            await client.infer(DEPLOYMENT, _inputs("fail UNAVAILABLE", max_tokens=1))
        (model,) = (await client.get_inference_statistics(DEPLOYMENT, "1")).model_stats
    durations = model.inference_stats
    assert (durations.success.count, durations.fail.count) == (3, 1)
    assert durations.queue.ns > 0
    assert durations.compute_infer.ns > 0
    assert durations.success.ns == durations.queue.ns + durations.compute_infer.ns


async def test_an_unloaded_replica_is_left_for_the_next_without_an_error(
    gateway: GatewayHarness, replica: Replica
) -> None:
    gone = gateway.endpoint(2, address=replica.server.grpc_address)
    await gateway.publish(gone)
    call = gateway.stub.ModelInfer(make_request("count", stream=False))
    await gateway.held()
    await gateway.publish(gone, gateway.endpoint(address=replica.server.grpc_address))
    assert text_of(await call) == "token 0"


async def reload(replica: Replica) -> None:
    """Start the model afresh: unload and load, since a load alone changes nothing."""
    await asyncio.to_thread(replica.client.unload_model, _REPLICA)
    await asyncio.to_thread(replica.client.load_model, _REPLICA)


async def _leave_grpc(gateway: GatewayHarness) -> None:
    async with gateway.client() as client:
        stream = client.stream_infer(_requests(prompt="hang"))
        await anext(stream)
        stream.cancel()


async def _leave_http(gateway: GatewayHarness) -> None:
    url = gateway.url(f"models/{DEPLOYMENT}/generate_stream")
    async with gateway.http.post(url, data='{"text_input": "hang"}') as response:
        await response.content.readuntil(b"\n\n")
        response.close()


async def _requests(*, prompt: str = "count", max_tokens: int = 1) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": DEPLOYMENT, "inputs": _inputs(prompt, max_tokens=max_tokens)}


def _inputs(prompt: str = "count", *, max_tokens: int) -> list[triton_aio.InferInput]:
    text = triton_aio.InferInput("text_input", [1], "BYTES")
    limit = triton_aio.InferInput("max_tokens", [1], "INT32")
    return [
        text.set_data_from_numpy(np.array([prompt.encode()], dtype=np.object_)),
        limit.set_data_from_numpy(np.array([max_tokens], dtype=np.int32)),
    ]


def _text(result: triton_aio.InferResult | None) -> str:
    assert result is not None
    text = result.as_numpy("text_output")
    assert text is not None
    return str(text[0].decode())
