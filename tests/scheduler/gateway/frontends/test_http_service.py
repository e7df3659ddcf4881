"""The gateway's HTTP service, driven by Triton's own client and by plain HTTP."""

from __future__ import annotations

import asyncio
import gzip
import json
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.kserve.json_codec import generate_request
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    admitted,
    make_config,
    read_events,
    serving,
)
from tests.support.gateway_fakes import (
    answer,
    failing,
    hanging,
    one_answer,
    tokens_then_empty,
)
from tests.support.limits import HANG_S

_MODEL = f"models/{DEPLOYMENT}"


async def post(cluster: GatewayHarness, path: str, body: object) -> tuple[int, Any]:
    """Post JSON and return the status and the JSON that comes back."""
    async with cluster.http.post(cluster.url(path), data=json.dumps(body)) as response:
        return response.status, await response.json()


async def get(cluster: GatewayHarness, path: str) -> tuple[int, Any]:
    async with cluster.http.get(cluster.url(path)) as response:
        body = await response.read()
        return response.status, json.loads(body) if body else None


def sent_tensors(request: kserve.ModelInferRequest) -> dict[str, bytes]:
    names = [tensor.name for tensor in request.inputs]
    return dict(zip(names, request.raw_input_contents, strict=True))


async def test_generate_maps_keys_to_tensors_and_parameters_as_triton_does() -> None:
    async with serving() as cluster:
        cluster.triton.script = one_answer
        body = {
            "id": "q1",
            "unknown": 1,
            "stop": "x",
            "parameters": {"logprobs": 2, "length_penalty": "1.5", "seed": -1, "top_k": 4},
            "temperature": 1,
            "stop_words": ["a", "bc"],
            "text_input": "hi",
        }
        status, fields = await post(cluster, f"{_MODEL}/generate", body)
        assert (status, fields) == (
            200,
            {
                "id": "q1",
                "model_name": DEPLOYMENT,
                "model_version": "1",
                "text_output": "whole text",
                "num_output_tokens": 7,
            },
        )
        (request,) = cluster.triton.requests
        assert sent_tensors(request) == {
            "text_input": b"\x02\0\0\0hi",
            "stop_words": b"\x01\0\0\0a\x02\0\0\0bc",
            "temperature": struct.pack("<f", 1.0),
            "top_k": struct.pack("<i", 4),
        }
        parameters = request.parameters
        assert parameters["stop"].string_param == "x"
        assert parameters["logprobs"].int64_param == 2
        assert parameters["length_penalty"].string_param == "1.5"
        assert parameters["seed"].int64_param == -1
        assert "unknown" not in parameters


@given(
    st.permutations(
        [("text_input", "hi"), ("max_tokens", 3), ("seed", 2**64 - 1), ("id", "a"), ("other", 1)]
    )
)
def test_generate_takes_its_fields_in_any_order(fields: list[tuple[str, object]]) -> None:
    request = generate_request("d", "", json.dumps(dict(fields)).encode())
    assert request.id == "a"
    assert sent_tensors(request) == {
        "text_input": b"\x02\0\0\0hi",
        "max_tokens": struct.pack("<i", 3),
        "seed": b"\xff" * 8,
    }


def test_generate_passes_a_number_in_a_string_on_as_a_parameter() -> None:
    body = {"text_input": "hi", "max_tokens": "3", "parameters": {"temperature": "0.5"}}
    request = generate_request("d", "", json.dumps(body).encode())
    assert set(sent_tensors(request)) == {"text_input"}
    assert request.parameters["max_tokens"].string_param == "3"
    asked = admitted(request).asked
    assert (asked.max_tokens, asked.sampling.temperature) == (3, 0.5)


async def test_generate_stream_sends_one_event_per_response() -> None:
    async with serving() as cluster:
        cluster.triton.script = tokens_then_empty
        body = json.dumps({"text_input": "hi", "stream": True, "id": "s"})
        url = cluster.url(f"{_MODEL}/generate_stream")
        async with cluster.http.post(url, data=body) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            events = await read_events(response)
        assert [event["text_output"] for event in events] == ["a", "b"]
        assert {(event["id"], event["model_name"]) for event in events} == {("s", DEPLOYMENT)}


async def test_an_event_arrives_before_the_next_one_is_made() -> None:
    may_go_on = asyncio.Event()

    async def script(
        request: kserve.ModelInferRequest, context: Any
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        yield answer(request, "first", is_final=False)
        await may_go_on.wait()
        yield answer(request, "second", is_final=True)

    async with serving() as cluster:
        cluster.triton.script = script
        url = cluster.url(f"{_MODEL}/generate_stream")
        async with cluster.http.post(url, data='{"text_input":"hi"}') as response:
            assert b"first" in await response.content.readuntil(b"\n\n")
            may_go_on.set()
            assert b"second" in await response.content.readuntil(b"\n\n")


async def test_an_error_before_the_first_event_has_its_http_status() -> None:
    async with serving() as cluster:
        cluster.triton.script = failing("UNAVAILABLE: Too busy.")
        answered = await post(cluster, f"{_MODEL}/generate_stream", {"text_input": "hi"})
        assert answered == (503, {"error": "Too busy."})


async def test_an_error_after_the_first_event_is_the_last_event() -> None:
    async with serving() as cluster:
        cluster.triton.script = failing("UNAVAILABLE: Too busy.", after=2)
        url = cluster.url(f"{_MODEL}/generate_stream")
        async with cluster.http.post(url, data='{"text_input":"hi"}') as response:
            assert response.status == 200
            *tokens, last = await read_events(response)
        assert len(tokens) == 2
        assert last == {"error": "Too busy."}


async def test_a_client_that_disconnects_cancels_its_request_at_the_replica() -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(1)
        url = cluster.url(f"{_MODEL}/generate_stream")
        async with cluster.http.post(url, data='{"text_input":"hi"}') as response:
            await response.content.readuntil(b"\n\n")
            response.close()
            await cluster.triton.cancelled.wait()


async def test_a_client_that_disconnects_while_held_is_no_longer_waiting() -> None:
    async with serving(replicas=0) as cluster:
        call = asyncio.create_task(post(cluster, f"{_MODEL}/generate", {"text_input": "hi"}))
        await cluster.held()
        call.cancel()
        await cluster.held(0)


async def test_a_held_request_is_answered_when_a_replica_is_ready() -> None:
    async with serving(replicas=0) as cluster:
        cluster.triton.script = one_answer
        call = asyncio.create_task(post(cluster, f"{_MODEL}/generate", {"text_input": "hi"}))
        await cluster.held()
        await cluster.publish(cluster.endpoint())
        status, fields = await call
        assert (status, fields["text_output"]) == (200, "whole text")


async def test_a_failed_cold_start_has_the_failures_status() -> None:
    async with serving(replicas=0) as cluster:
        call = asyncio.create_task(post(cluster, f"{_MODEL}/generate", {"text_input": "hi"}))
        await cluster.held()
        failure = pb.Failure(grpc_code="UNAVAILABLE", message="No node has room.")
        await cluster.publish(failure=failure, failure_number=1)
        assert await call == (
            503,
            {"error": "The cold start of 'tiny' failed: No node has room."},
        )


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ('{"text_input": NaN}', "NaN is no JSON number"),
        ("{}", "'text_input' is missing"),
        ('{"text_input": 5}', "takes BYTES values, not a number"),
        ('{"text_input": null}', "'text_input' is missing"),
        ('{"text_input": [null]}', "takes BYTES values, not null"),
        ('{"input_ids": "1,2"}', "Input 'input_ids' takes INT32 values, not a string."),
        ('{"input_ids": [1, "secret"]}', "Input 'input_ids' takes INT32 values, not a string."),
        ('{"text_input": "hi", "seed": -2}', "'seed' is -2; it must be at least -1"),
        ('{"text_input": "hi", "temperature": [null]}', "takes FP32 values, not null"),
        ('{"text_input": ["a", "b"]}', "expected [1], got [2]"),
        ('{"text_input": "hi", "max_tokens": 5.5}', "takes INT32 values"),
        ('{"text_input": "hi", "max_tokens": "five"}', "takes a whole number"),
        ('{"text_input": "hi", "max_tokens": true}', "takes INT32 values"),
        ('{"text_input": "hi", "max_tokens": 4294967296}', "out of INT32's range"),
        ('{"text_input": "hi", "temperature": 1e300}', "out of FP32's range"),
        ('{"text_input": "hi", "foo": [1]}', "Parameter 'foo' has an unsupported value"),
        ('{"text_input": "hi", "id": 5}', "'id' must be a string"),
        ('{"text_input": "hi", "parameters": 1}', "'parameters' must be"),
        ('{"text_input": "\\ud800"}', "half a surrogate pair"),
        ('{"text_input": "hi", "stream": true}', "generate_stream"),
        ('{"text_input": "hi", "input_ids": [1]}', "not both"),
        ('{"input_ids": []}', "'input_ids' is empty"),
    ],
)
async def test_a_wrong_generate_body_is_a_400_that_wakes_nobody(body: str, part: str) -> None:
    async with serving(replicas=0) as cluster:
        url = cluster.url(f"{_MODEL}/generate")
        async with cluster.http.post(url, data=body) as response:
            assert response.status == 400
            assert part in (await response.json())["error"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "'text_input' is missing"),
        ({"inputs": [1]}, "'inputs' must be a list"),
        ({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1]}]}, "neither data"),
        ({"inputs": [{"name": "x", "datatype": "FP64", "shape": [1], "data": [1]}]}, "FP64"),
        ({"inputs": [{"name": "x", "datatype": "INT32", "shape": [-1], "data": [1]}]}, "shape"),
        ({"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}, "'x'"),
        ({"parameters": [], "inputs": []}, "'parameters' of the request"),
    ],
)
async def test_a_wrong_infer_body_is_a_400(body: object, part: str) -> None:
    async with serving(replicas=0) as cluster:
        status, fields = await post(cluster, f"{_MODEL}/infer", body)
        assert status == 400
        assert part in fields["error"]


async def test_infer_takes_nested_json_and_answers_in_json() -> None:
    async with serving() as cluster:
        cluster.triton.script = one_answer
        body = {
            "id": "j",
            "inputs": [
                {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": [["hi"]]},
                {"name": "max_tokens", "shape": [1], "datatype": "INT32", "data": [3]},
            ],
        }
        status, fields = await post(cluster, f"{_MODEL}/versions/1/infer", body)
        assert status == 200
        assert (fields["id"], fields["model_name"]) == ("j", DEPLOYMENT)
        assert fields["outputs"] == [
            {"name": "text_output", "datatype": "BYTES", "shape": [1], "data": ["whole text"]},
            {"name": "num_output_tokens", "datatype": "UINT32", "shape": [1], "data": [7]},
        ]


@pytest.mark.parametrize("header", ["-1", "x", "99999"])
async def test_a_wrong_header_length_is_a_400(header: str) -> None:
    async with serving(replicas=0) as cluster:
        headers = {"Inference-Header-Content-Length": header}
        url = cluster.url(f"{_MODEL}/infer")
        async with cluster.http.post(url, data=b"{}", headers=headers) as response:
            assert response.status == 400
            assert "Inference-Header-Content-Length" in (await response.json())["error"]


async def test_a_binary_size_beyond_the_body_is_a_400() -> None:
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES"}
    head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": 9}}]}).encode()
    async with serving(replicas=0) as cluster:
        headers = {"Inference-Header-Content-Length": str(len(head))}
        url = cluster.url(f"{_MODEL}/infer")
        async with cluster.http.post(url, data=head + b"12345", headers=headers) as response:
            assert response.status == 400
            assert "but 5 binary bytes are left" in (await response.json())["error"]


_TRITON_CLIENT = """
import sys
import numpy as np
import tritonclient.http as triton

with triton.InferenceServerClient(sys.argv[1]) as client:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("tiny")
    assert not client.is_model_ready("nosuch")
    assert client.get_server_metadata()["name"] == "paraserve"
    assert client.get_model_config("tiny")["max_batch_size"] == 0
    assert client.get_model_repository_index()[0]["state"] == "READY"
    for binary_in, binary_out in ((True, True), (False, False), (True, False), (False, True)):
        prompt = triton.InferInput("text_input", [1], "BYTES")
        prompt.set_data_from_numpy(np.array([b"hi"], dtype=object), binary_data=binary_in)
        limit = triton.InferInput("max_tokens", [1], "INT32")
        limit.set_data_from_numpy(np.array([5], dtype=np.int32))
        names = ("text_output", "num_output_tokens")
        result = client.infer(
            "tiny",
            [prompt, limit],
            outputs=[triton.InferRequestedOutput(n, binary_data=binary_out) for n in names],
        )
        text = result.as_numpy("text_output").tolist()
        assert text in ([b"whole text"], ["whole text"]), text
        assert result.as_numpy("num_output_tokens").tolist() == [7]
    result = client.infer("tiny", [prompt, limit])
    assert result.as_numpy("text_output").tolist() == [b"whole text"]
    try:
        client.infer("nosuch", [prompt])
    except triton.InferenceServerException as error:
        print(error.status(), error.message())
"""


async def test_tritons_http_client_infers_in_json_and_in_binary() -> None:
    """In a process of its own: that client patches the interpreter's sockets."""
    async with serving() as cluster:
        cluster.triton.script = one_answer
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", _TRITON_CLIENT, cluster.gateway.http_address],
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith("404 Request for unknown model: 'nosuch' is not found")
        sent = cluster.triton.requests[0]
        assert sent_tensors(sent) == {
            "text_input": b"\x02\0\0\0hi",
            "max_tokens": struct.pack("<i", 5),
        }
        assert "binary_data" not in sent.outputs[0].parameters


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_a_body_over_the_limit_is_refused_also_when_compressed(encoding: str) -> None:
    async with serving(make_config(max_request_bytes=10_000)) as cluster:
        body = json.dumps({"text_input": "a" * 20_000}).encode()
        if encoding == "gzip":
            body = gzip.compress(body)
        url = cluster.url(f"{_MODEL}/generate")
        headers = {"Content-Encoding": encoding}
        async with cluster.http.post(url, data=body, headers=headers) as response:
            assert response.status == 413
            assert "10000 bytes" in (await response.json())["error"]


async def test_a_body_that_is_not_what_its_encoding_says_is_a_400() -> None:
    async with serving() as cluster:
        url = cluster.url(f"{_MODEL}/generate")
        headers = {"Content-Encoding": "gzip"}
        async with cluster.http.post(url, data=b"no gzip", headers=headers) as response:
            assert response.status == 400


async def test_unknown_things_are_404_in_json() -> None:
    async with serving() as cluster:
        for path in (
            "models/nosuch",
            "models/nosuch/ready",
            "models/tiny/versions/2",
            "models/tiny/nosuch",
            "nosuch",
        ):
            status, fields = await get(cluster, path)
            assert (status, list(fields)) == (404, ["error"])
        assert (await get(cluster, f"{_MODEL}/generate"))[0] == 405


@pytest.mark.parametrize(
    ("method", "path", "instead"),
    [
        ("POST", "repository/models/tiny/load", "paraserve deploy"),
        ("POST", "repository/models/tiny/unload", "paraserve deploy"),
        ("GET", "systemsharedmemory/status", "send tensors inside the request"),
        ("POST", "systemsharedmemory/region/a/register", "send tensors inside the request"),
        ("POST", "cudasharedmemory/unregister", "send tensors inside the request"),
        ("GET", "trace/setting", "set them on the nodes' Triton servers"),
        ("POST", "models/tiny/trace/setting", "set them on the nodes' Triton servers"),
        ("POST", "logging", "set them on the nodes' Triton servers"),
    ],
)
async def test_what_a_gateway_does_not_offer_is_501_with_what_to_do_instead(
    method: str, path: str, instead: str
) -> None:
    async with (
        serving() as cluster,
        cluster.http.request(method, cluster.url(path), data="{}") as response,
    ):
        assert response.status == 501
        assert instead in (await response.json())["error"]


async def test_a_deployment_at_zero_is_ready_and_described() -> None:
    async with serving(replicas=0) as cluster:
        assert await get(cluster, f"{_MODEL}/ready") == (200, {"name": DEPLOYMENT, "ready": True})
        assert await get(cluster, "health/live") == (200, {"live": True})
        assert await get(cluster, "health/ready") == (200, {"ready": True})
        status, metadata = await get(cluster, _MODEL)
        assert (status, metadata["inputs"][0]) == (
            200,
            {"name": "text_input", "datatype": "BYTES", "shape": [1]},
        )
        _, config = await get(cluster, f"{_MODEL}/versions/1/config")
        assert config["input"][0] == {
            "name": "text_input",
            "data_type": "TYPE_STRING",
            "dims": [1],
            "optional": True,
        }
        async with cluster.http.post(cluster.url("repository/index")) as response:
            assert [model["name"] for model in await response.json()] == [DEPLOYMENT]
