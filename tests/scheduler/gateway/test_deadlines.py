"""How long a client is willing to wait, said by gRPC deadline or by the parameter `timeout`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import DeadlineExceeded
from paraserve_scheduler.gateway.admission import take_time_limit_us
from paraserve_scheduler.gateway.proxy import time_limit
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    make_inputs,
    make_request,
    read_events,
    read_stream,
    serving,
    text_of,
)
from tests.support.gateway_fakes import hanging, one_answer

#: Enough to reach a gateway and a replica on a very busy machine.
_LONG_S = 1.0
_LONG_US = 1_000_000
_SENTENCE = "0000 microseconds, which include a cold start"


def limited(limit_us: int) -> kserve.ModelInferRequest:
    request = make_request()
    request.parameters["timeout"].int64_param = limit_us
    return request


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_grpc_deadline_ends_a_request_at_its_replica(is_stream: bool) -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(1 if is_stream else 0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(cluster, is_stream=is_stream, timeout_s=_LONG_S)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await cluster.triton.cancelled.wait()
        await cluster.failed(1)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_grpc_deadline_ends_a_request_that_is_held(is_stream: bool) -> None:
    async with serving(replicas=0) as cluster:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _call(cluster, is_stream=is_stream, timeout_s=_LONG_S)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await cluster.failed(1)


async def test_tritons_client_timeout_is_such_a_deadline() -> None:
    async with serving(replicas=0) as cluster, cluster.client() as client:
        with pytest.raises(triton.InferenceServerException) as caught:
            await client.infer(DEPLOYMENT, make_inputs(stream=False), client_timeout=_LONG_S)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        await cluster.failed(1)


async def test_the_parameter_ends_a_unary_request_at_its_replica() -> None:
    async with serving() as cluster, cluster.client() as client:
        cluster.triton.script = hanging(0)
        with pytest.raises(triton.InferenceServerException, match=_SENTENCE) as caught:
            await client.infer(DEPLOYMENT, make_inputs(stream=False), timeout=_LONG_US)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        await cluster.triton.cancelled.wait()


async def test_the_parameter_ends_a_unary_request_that_is_held() -> None:
    async with serving(replicas=0) as cluster, cluster.client() as client:
        with pytest.raises(triton.InferenceServerException, match=_SENTENCE) as caught:
            await client.infer(DEPLOYMENT, make_inputs(stream=False), timeout=_LONG_US)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        await cluster.failed(1)


async def test_the_parameter_ends_one_request_of_a_stream_and_leaves_the_others() -> None:
    async def requests() -> AsyncIterator[kserve.ModelInferRequest]:
        yield limited(_LONG_US)
        await cluster.triton.cancelled.wait()
        cluster.triton.script = one_answer
        yield make_request()

    async with serving() as cluster:
        cluster.triton.script = hanging(2)
        entries = [entry async for entry in cluster.stub.ModelStreamInfer(requests())]
        assert [text_of(entry.infer_response) for entry in entries[:2]] == ["0", "1"]
        assert _SENTENCE in entries[2].error_message
        assert text_of(entries[3].infer_response) == "whole text"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("generate", {"text_input": "hi", "timeout": _LONG_US}),
        ("generate", {"text_input": "hi", "timeout": str(_LONG_US)}),
        ("generate", {"text_input": "hi", "parameters": {"timeout": _LONG_US}}),
        ("generate_stream", {"text_input": "hi", "timeout": _LONG_US}),
        (
            "infer",
            {
                "inputs": [
                    {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["hi"]}
                ],
                "parameters": {"timeout": _LONG_US},
            },
        ),
    ],
)
async def test_over_http_the_parameter_is_a_504(path: str, body: dict[str, Any]) -> None:
    async with serving(replicas=0) as cluster:
        url = cluster.url(f"models/{DEPLOYMENT}/{path}")
        async with cluster.http.post(url, data=json.dumps(body)) as response:
            assert response.status == 504
            assert _SENTENCE in (await response.json())["error"]
        await cluster.failed(1)


async def test_a_limit_hit_after_the_first_event_is_the_last_event() -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(2)
        url = cluster.url(f"models/{DEPLOYMENT}/generate_stream")
        body = json.dumps({"text_input": "hi", "timeout": _LONG_US})
        async with cluster.http.post(url, data=body) as response:
            *tokens, last = await read_events(response)
        assert len(tokens) == 2
        assert f"its 'timeout' of {_LONG_US} microseconds" in last["error"]


@pytest.mark.parametrize("limit_us", [0, 60_000_000])
async def test_a_request_within_its_limit_is_as_any_other(limit_us: int) -> None:
    async with serving() as cluster:
        assert len(await read_stream(cluster, limited(limit_us))) == 3
        # Triton would take it in one form only, and do nothing with it.
        assert "timeout" not in cluster.triton.requests[0].parameters


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"int64_param": -1}, "'timeout' is -1; it must be at least 0"),
        ({"string_param": "soon"}, "'timeout' is 'soon'; it takes a whole number"),
        ({"bool_param": True}, "'timeout' is True; it takes a whole number"),
    ],
)
async def test_a_limit_that_is_none_is_refused(given: dict[str, Any], sentence: str) -> None:
    async with serving(replicas=0) as cluster:
        request = make_request()
        request.parameters["timeout"].MergeFrom(kserve.InferParameter(**given))
        (entry,) = await read_stream(cluster, request)
        assert sentence in entry.error_message


@pytest.mark.parametrize(
    "parameter",
    [
        kserve.InferParameter(int64_param=5),
        kserve.InferParameter(uint64_param=5),
        kserve.InferParameter(double_param=5.0),
        kserve.InferParameter(string_param="5"),
    ],
)
def test_a_limit_is_read_in_every_form(parameter: kserve.InferParameter) -> None:
    request = kserve.ModelInferRequest(parameters={"timeout": parameter})
    assert take_time_limit_us(request) == 5
    assert take_time_limit_us(request) is None


async def test_a_time_out_of_something_else_is_not_taken_for_the_limit() -> None:
    with pytest.raises(TimeoutError):
        async with time_limit(limited(60_000_000)):
            raise TimeoutError
    with pytest.raises(DeadlineExceeded):
        async with time_limit(limited(1)):
            await asyncio.Event().wait()


async def _call(cluster: GatewayHarness, *, is_stream: bool, timeout_s: float) -> None:
    async def only() -> AsyncIterator[kserve.ModelInferRequest]:
        yield make_request()

    if not is_stream:
        await cluster.stub.ModelInfer(make_request(stream=False), timeout=timeout_s)
        return
    async for _ in cluster.stub.ModelStreamInfer(only(), timeout=timeout_s):
        pass
