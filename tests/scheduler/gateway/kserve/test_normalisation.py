"""The leading dimension of 1 of clients written for TensorRT-LLM's backend."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.tensors import INPUTS
from paraserve_scheduler.gateway.kserve import normalisation
from paraserve_scheduler.gateway.kserve.validation import validate
from tests.support.gateway import (
    DEPLOYMENT,
    make_request,
    read_stream,
    serving,
)
from tests.support.gateway_fakes import one_answer


def make_batch_of_one() -> kserve.ModelInferRequest:
    request = make_request()
    for tensor in request.inputs:
        tensor.shape.insert(0, 1)
    return request


def make_tensors() -> list[triton_aio.InferInput]:
    """What a client of TensorRT-LLM's front model sends."""
    text = triton_aio.InferInput("text_input", [1, 1], "BYTES")
    limit = triton_aio.InferInput("max_tokens", [1, 1], "INT32")
    stops = triton_aio.InferInput("stop_words", [1, 2], "BYTES")
    return [
        text.set_data_from_numpy(np.array([[b"hi"]], dtype=np.object_)),
        limit.set_data_from_numpy(np.array([[7]], dtype=np.int32)),
        stops.set_data_from_numpy(np.array([[b"a", b"b"]], dtype=np.object_)),
    ]


@given(st.sets(st.sampled_from([spec.name for spec in INPUTS])))
def test_every_input_loses_it_and_only_the_prompts_counts(names: set[str]) -> None:
    shapes = {spec.name: [3 if size == -1 else size for size in spec.shape] for spec in INPUTS}
    request = kserve.ModelInferRequest()
    for name in names:
        request.inputs.add(name=name, shape=[1, *shapes[name]])
    assert normalisation.take_off(request) == bool(names & {"text_input", "input_ids"})
    assert {tensor.name: list(tensor.shape) for tensor in request.inputs} == {
        name: shapes[name] for name in names
    }


def test_a_request_without_it_stays_as_it_is() -> None:
    request, same = make_request(), make_request()
    assert not normalisation.take_off(request)
    assert request == same


@pytest.mark.parametrize("size", [0, 2, -1])
def test_a_batch_of_several_is_refused_in_one_sentence(size: int) -> None:
    request = make_request()
    request.inputs[0].shape.insert(0, size)
    with pytest.raises(InvalidRequest, match=rf"'text_input' is a batch of {size}.*each in its"):
        normalisation.take_off(request)


async def test_a_batch_of_one_is_forwarded_without_it_and_answered_with_it() -> None:
    async with serving() as cluster, cluster.client() as client:
        cluster.triton.script = one_answer
        result = await client.infer(DEPLOYMENT, make_tensors())
        text, count = result.as_numpy("text_output"), result.as_numpy("num_output_tokens")
        assert text is not None
        assert count is not None
        assert (text.tolist(), count.tolist()) == ([[b"whole text"]], [[7]])
        sent = cluster.triton.requests[0]
        assert [list(tensor.shape) for tensor in sent.inputs] == [[1], [1], [2]]
        assert sent.raw_input_contents[1] == struct.pack("<i", 7)


async def test_every_response_of_a_stream_has_it() -> None:
    async with serving() as cluster:
        entries = await read_stream(cluster, make_batch_of_one())
        shapes = [[list(t.shape) for t in entry.infer_response.outputs] for entry in entries]
        assert shapes == [[[1, 1], [1, 1]]] * 3


async def test_a_setting_may_have_it_while_the_prompt_has_not() -> None:
    async with serving() as cluster:
        request = make_request()
        request.inputs[1].shape.insert(0, 1)
        entries = await read_stream(cluster, request)
        assert [list(t.shape) for t in entries[0].infer_response.outputs] == [[1], [1]]


async def test_infer_over_http_takes_and_gives_it_too() -> None:
    tensor = {"name": "text_input", "shape": [1, 1], "datatype": "BYTES", "data": [["hi"]]}
    async with serving() as cluster:
        cluster.triton.script = one_answer
        url = cluster.url(f"models/{DEPLOYMENT}/infer")
        async with cluster.http.post(url, data=json.dumps({"inputs": [tensor]})) as response:
            outputs = (await response.json())["outputs"]
        assert [(output["shape"], output["data"]) for output in outputs] == [
            ([1, 1], ["whole text"]),
            ([1, 1], [7]),
        ]


async def test_a_batch_of_several_wakes_nobody() -> None:
    async with serving(replicas=0) as cluster, cluster.client() as client:
        text = triton_aio.InferInput("text_input", [2, 1], "BYTES")
        text.set_data_from_numpy(np.array([[b"a"], [b"b"]], dtype=np.object_))
        with pytest.raises(triton.InferenceServerException, match="a batch of 2, shape") as caught:
            await client.infer(DEPLOYMENT, [text])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("input_lengths", "leave it out"),
        ("request_output_len", "send 'max_tokens'"),
        ("streaming", "send 'stream'"),
        ("runtime_top_k", "send 'top_k'"),
        ("runtime_top_p", "send 'top_p'"),
        ("len_penalty", "send 'length_penalty'"),
    ],
)
def test_inputs_of_the_token_level_model_are_refused_with_their_names_here(
    name: str, advice: str
) -> None:
    request = make_request()
    request.inputs.add(name=name, datatype="INT32", shape=[1, 1])
    with pytest.raises(InvalidRequest, match=f"'{name}' belongs to TensorRT-LLM's .*{advice}"):
        validate(request)
