"""Names that only our own processes may use: refused on every way into a gateway."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.names import (
    COMMAND_PARAMETER,
    OWN_PREFIX,
    PROBE_PARAMETER,
    REPLICA_PARAMETER,
    SECRET_PARAMETER,
)
from paraserve_backend.protocol.request import SETTINGS
from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME
from paraserve_scheduler.gateway.kserve.message_parameters import TIME_LIMIT, WANT_EMPTY_FINAL
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    admitted,
    make_request,
    read_stream,
    serving,
)
from tests.support.gateway_fakes import one_answer

_RESERVED = [
    COMMAND_PARAMETER,
    RESUME,
    HAND_OVER_TO,
    REPLICA_PARAMETER,
    PROBE_PARAMETER,
    SECRET_PARAMETER,
    f"{OWN_PREFIX}anything",
    OWN_PREFIX,
    "triton_final_response",
    "triton_grpc_error",
]
#: What a client may want of a name: a command to a slot, nothing, a flag, a number.
_VALUES = ['{"unbind": true}', "", True, 1, 1.5]

Change = Callable[[kserve.ModelInferRequest, str, Any], object]


def _set(parameters: Any, name: str, value: Any) -> None:
    kinds = {bool: "bool_param", str: "string_param", int: "int64_param", float: "double_param"}
    setattr(parameters[name], kinds[type(value)], value)


_IN_MESSAGES: dict[str, Change] = {
    "a request parameter": lambda r, name, value: _set(r.parameters, name, value),
    "a tensor's parameter": lambda r, name, value: _set(r.inputs[1].parameters, name, value),
    "an output's parameter": lambda r, name, value: _set(
        r.outputs.add(name="text_output").parameters, name, value
    ),
    "an input": lambda r, name, _: r.inputs.add(name=name, datatype="BYTES", shape=[1]),
    "an output": lambda r, name, _: r.outputs.add(name=name),
    "a key of sampling_parameters": lambda r, name, value: _set(
        r.parameters, "sampling_parameters", json.dumps({name: value})
    ),
}


@pytest.mark.parametrize("where", _IN_MESSAGES)
@given(name=st.sampled_from(_RESERVED), value=st.sampled_from(_VALUES))
def test_a_reserved_name_is_refused_by_name_wherever_a_message_has_it(
    where: str, name: str, value: object
) -> None:
    request = make_request()
    _IN_MESSAGES[where](request, name, value)
    with pytest.raises(InvalidRequest) as caught:
        admitted(request)
    assert f"'{name}'" in str(caught.value)


@pytest.mark.parametrize("where", _IN_MESSAGES)
@pytest.mark.parametrize("is_stream", [True, False])
async def test_it_is_an_invalid_argument_over_grpc(where: str, is_stream: bool) -> None:
    async with serving() as cluster:
        cluster.triton.script = one_answer
        for name in _RESERVED:
            request = make_request(stream=False)
            _IN_MESSAGES[where](request, name, '{"unbind": true}')
            if is_stream:
                (entry,) = await read_stream(cluster, request)
                assert f"'{name}'" in entry.error_message
            else:
                with pytest.raises(grpc.aio.AioRpcError, match=f"'{name}'") as caught:
                    await cluster.stub.ModelInfer(request)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert cluster.triton.requests == []


def _infer(**fields: Any) -> dict[str, Any]:
    prompt = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    return {"inputs": [{**prompt, **fields.pop("prompt", {})}, *fields.pop("more", ())], **fields}


def _bodies(name: str, value: object) -> list[tuple[str, dict[str, Any]]]:
    generate = {"text_input": "a"}
    return [
        ("generate", {**generate, name: value}),
        ("generate_stream", {**generate, name: value}),
        ("generate", {**generate, "parameters": {name: value}}),
        ("generate", {**generate, name: None}),
        ("generate", {**generate, "sampling_parameters": json.dumps({name: value})}),
        ("infer", _infer(parameters={name: value})),
        ("infer", _infer(prompt={"parameters": {name: value}})),
        ("infer", _infer(outputs=[{"name": "text_output", "parameters": {name: value}}])),
        ("infer", _infer(outputs=[{"name": name}])),
        (
            "infer",
            _infer(more=[{"name": name, "datatype": "BYTES", "shape": [1], "data": ["x"]}]),
        ),
    ]


async def _refusal(cluster: GatewayHarness, call: str, body: bytes, **headers: str) -> str:
    url = cluster.url(f"models/{DEPLOYMENT}/{call}")
    async with cluster.http.post(url, data=body, headers=headers) as response:
        assert response.status == 400
        error: str = (await response.json())["error"]
        return error


async def test_it_is_a_400_over_http() -> None:
    async with serving() as cluster:
        cluster.triton.script = one_answer
        for name in _RESERVED:
            for call, body in _bodies(name, '{"unbind": true}'):
                assert f"'{name}'" in await _refusal(cluster, call, json.dumps(body).encode())
        assert cluster.triton.requests == []


async def test_it_is_a_400_in_binary_tensors_too() -> None:
    async with serving() as cluster:
        for name in _RESERVED:
            prompt = {"data": None, "parameters": {"binary_data_size": 5}}
            for fields in (
                {"parameters": {name: "x"}},
                {"prompt": {"parameters": {"binary_data_size": 5, name: "x"}}},
            ):
                merged = {"prompt": prompt, **fields}
                head = json.dumps(_infer(**merged)).encode()
                length = {"Inference-Header-Content-Length": str(len(head))}
                body = head + b"\1\0\0\0a"
                assert f"'{name}'" in await _refusal(cluster, "infer", body, **length)
        assert cluster.triton.requests == []


async def test_a_large_request_may_have_none_either() -> None:
    async with serving() as cluster:
        body = {"text_input": "a" * 50_000, COMMAND_PARAMETER: '{"unbind": true}'}
        refusal = await _refusal(cluster, "generate", json.dumps(body).encode())
        assert f"'{COMMAND_PARAMETER}'" in refusal
        request = make_request("a" * 50_000)
        _set(request.parameters, RESUME, "x")
        (entry,) = await read_stream(cluster, request)
        assert f"'{RESUME}'" in entry.error_message
        assert cluster.triton.requests == []


@given(st.text(), st.sampled_from(_VALUES))
def test_of_all_other_parameters_only_known_ones_go_on(name: str, value: object) -> None:
    request = make_request()
    _set(request.parameters, name, value)
    _set(request.inputs[1].parameters, name, value)
    try:
        message = admitted(request).message
    except InvalidRequest:
        return
    assert set(message.parameters) <= SETTINGS | {TIME_LIMIT, WANT_EMPTY_FINAL}
    assert not any(tensor.parameters for tensor in message.inputs)


def test_every_setting_goes_on_from_a_parameter() -> None:
    request = make_request()
    for name in SETTINGS:
        request.parameters[name]
    request.parameters[WANT_EMPTY_FINAL].bool_param = True
    assert set(admitted(request).message.parameters) == SETTINGS | {WANT_EMPTY_FINAL}
