"""What clients and logs are told of a failure: one short sentence, and nothing of a prompt."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest, ParaServeError
from paraserve_scheduler.gateway.kserve.errors import (
    NoCapacity,
    Overloaded,
    client_sentence,
    retry_after_s,
)
from paraserve_scheduler.gateway.kserve.json_codec import generate_request, infer_request
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    checked,
    make_request,
    read_stream,
    serving,
)

_SECRET = "sesame"
#: Lengths at which an error has to cut, but not yet so large that a worker reads it.
_LONG = 20_000


@given(st.text(max_size=2000) | st.text("\ud83c\n\U0001f336a", min_size=400))
def test_what_a_client_is_told_is_short_and_printable(text: str) -> None:
    sentence = client_sentence(InvalidRequest(text))
    assert len(sentence) <= 500
    assert sentence.isprintable()
    if text.isprintable() and len(text) <= 500:
        assert sentence == text


def test_a_huge_sentence_is_not_walked_through() -> None:
    assert len(client_sentence(InvalidRequest("\0" * 50_000_000))) == 500


_CONTENT_BODIES: list[dict[str, Any]] = [
    {"text_input": [_SECRET, _SECRET]},
    {"text_input": {_SECRET: 1}},
    {"text_input": f"{_SECRET}\ud800"},
    {"input_ids": _SECRET},
    {"input_ids": [_SECRET]},
    {"input_ids": [[_SECRET]]},
    {"text_input": "a", "stop_words": [_SECRET, 1]},
    {"text_input": "a", "stop_words": [f"{_SECRET}\ud800"]},
    {"text_input": "a", "stop_words": [_SECRET] * 65},
    {"text_input": "a", "stop_words": [_SECRET * 100]},
    {"text_input": "a", "stop": _SECRET * 100},
    {"text_input": "a", "bad_words": [[_SECRET], 1]},
    {"text_input": "a", "bad_words": [_SECRET * 100]},
    {"text_input": "a", "parameters": {"stop_words": [{_SECRET: 1}]}},
    {"text_input": "a", "sampling_parameters": json.dumps({"stop": [{_SECRET: 1}]})},
    {"text_input": "a", "sampling_parameters": json.dumps({"stop": [_SECRET * 100]})},
    {"text_input": "a", "sampling_parameters": _SECRET},
]


@pytest.mark.parametrize("body", _CONTENT_BODIES)
def test_no_error_shows_a_prompt_or_a_word(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked(generate_request(DEPLOYMENT, "", json.dumps(body).encode()))
    assert _SECRET not in str(caught.value)


_Request = Callable[[str], kserve.ModelInferRequest]


def _changed(change: Callable[[kserve.ModelInferRequest, str], object]) -> _Request:
    def make(text: str) -> kserve.ModelInferRequest:
        request = make_request(stream=False)
        change(request, text)
        return request

    return make


def _parameter(request: kserve.ModelInferRequest, name: str, value: str) -> None:
    request.parameters[name].string_param = value


_LONG_PLACES: dict[str, _Request] = {
    "an input's name": _changed(lambda r, text: setattr(r.inputs[0], "name", text)),
    "an input's datatype": _changed(lambda r, text: setattr(r.inputs[0], "datatype", text)),
    "an output's name": _changed(lambda r, text: r.outputs.add(name=text)),
    "a shape": _changed(lambda r, text: r.inputs[0].shape.extend([2**62] * len(text))),
    "an id": _changed(lambda r, text: setattr(r, "id", text)),
    "a deployment": _changed(lambda r, text: setattr(r, "model_name", text)),
    "a version": _changed(lambda r, text: setattr(r, "model_version", text)),
    "a reserved name": _changed(lambda r, text: _parameter(r, f"paraserve_{text}", "x")),
    "a time limit": _changed(lambda r, text: _parameter(r, "timeout", text)),
    "a flag": _changed(lambda r, text: _parameter(r, "ignore_eos", text)),
    "a number": _changed(lambda r, text: _parameter(r, "max_tokens", "9" * len(text))),
    "a fraction": _changed(lambda r, text: _parameter(r, "temperature", "." + "9" * len(text))),
    "an unknown setting": _changed(
        lambda r, text: _parameter(r, "sampling_parameters", json.dumps({text[:9000]: 1}))
    ),
    "settings": _changed(lambda r, text: _parameter(r, "sampling_parameters", text)),
}


@pytest.mark.parametrize("place", _LONG_PLACES)
async def test_something_long_is_cut_over_grpc(place: str) -> None:
    async with serving() as cluster:
        request = _LONG_PLACES[place]("x" * _LONG)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.ModelInfer(request)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert len(caught.value.details() or "") <= 500
        (entry,) = await read_stream(cluster, request)
        assert len(entry.error_message) <= 500
        assert len(entry.infer_response.id) <= 1024


@pytest.mark.parametrize("key", ["max_tokens", "x" * _LONG, "stream", "seed"])
@pytest.mark.parametrize("value", ["y" * _LONG, ["y" * _LONG], {"y" * _LONG: 1}, [[1] * 5000]])
async def test_something_long_is_cut_over_http(key: str, value: object) -> None:
    async with serving() as cluster:
        for body in (
            {"text_input": "a", key: value},
            {"inputs": [{"name": key, "datatype": "FP64", "shape": value, "data": value}]},
            {"inputs": [{"name": key, "datatype": key, "shape": [1], "data": value}]},
        ):
            call = "infer" if "inputs" in body else "generate"
            status, error = await _post(cluster, call, json.dumps(body).encode())
            assert len(error) <= 500
            assert status == 400 or (status, error) == (200, "")


async def _post(cluster: GatewayHarness, call: str, body: bytes, **headers: str) -> tuple[int, str]:
    url = cluster.url(f"models/{DEPLOYMENT}/{call}")
    async with cluster.http.post(url, data=body, headers=headers) as response:
        return response.status, (await response.json()).get("error", "")


@pytest.mark.parametrize("digits", [101, 4300, 4301, 20_000, 60_000])
@pytest.mark.parametrize(
    ("call", "body"),
    [
        ("generate", '{"text_input": "a", "max_tokens": DIGITS}'),
        ("generate", '{"text_input": "a", "unknown": -DIGITS}'),
        ("generate", '{"text_input": "a", "parameters": {"seed": DIGITS}}'),
        ("generate", '{"input_ids": [1, DIGITS]}'),
        ("infer", '{"inputs": [], "unknown": DIGITS}'),
        ("infer", '{"inputs": [{"name": "input_ids", "shape": [DIGITS], "data": [1]}]}'),
    ],
)
async def test_a_number_of_many_digits_is_a_400(call: str, body: str, digits: int) -> None:
    async with serving() as cluster:
        status, error = await _post(cluster, call, body.replace("DIGITS", "7" * digits).encode())
        assert status == 400
        assert f"a whole number of {digits} digits; 100 at most" in error


async def test_a_header_length_of_many_digits_is_a_400() -> None:
    async with serving() as cluster:
        for digits in (21, 4301, 8000):
            status, error = await _post(
                cluster, "infer", b"{}", **{"Inference-Header-Content-Length": "9" * digits}
            )
            assert status == 400
            assert "must be a number of bytes" in error


def test_only_errors_that_say_so_name_a_time_to_come_again() -> None:
    assert retry_after_s(Overloaded("x", retry_after_s=0.2)) == 1
    assert retry_after_s(NoCapacity("x", retry_after_s=2.1)) == 3
    assert retry_after_s(ParaServeError("x")) is None


@pytest.mark.parametrize("kind", [Overloaded, NoCapacity])
async def test_a_refusal_for_now_says_when_to_come_again(
    kind: Callable[..., ParaServeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: object, **__: object) -> None:
        raise kind("Full; retry later.", retry_after_s=1.5)

    async with serving() as cluster:
        monkeypatch.setattr(cluster.gateway._routes, "require", refuse)
        url = cluster.url(f"models/{DEPLOYMENT}/generate")
        async with cluster.http.post(url, data=b'{"text_input": "a"}') as response:
            assert response.status in (429, 503)
            assert response.headers["Retry-After"] == "2"
        calls = [
            cluster.stub.ModelInfer(make_request(stream=False)),
            cluster.stub.ModelStreamInfer(
                iter([make_request()]), metadata=(("triton_grpc_error", "true"),)
            ),
        ]
        for call in calls:
            assert await call.code() in (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.UNAVAILABLE,
            )
            trailing = dict(await call.trailing_metadata() or ())
            assert trailing["retry-after"] == "2"
            assert trailing["grpc-retry-pushback-ms"] == "2000"


async def test_a_bug_is_logged_without_what_it_says(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ValueError(f"cannot read {_SECRET}")

    async with serving() as cluster:
        monkeypatch.setattr(cluster.gateway._routes, "require", fail)
        body = json.dumps({"text_input": _SECRET}).encode()
        for call in ("generate", "generate_stream"):
            assert await _post(cluster, call, body) == (500, "internal error")
        with pytest.raises(grpc.aio.AioRpcError, match="internal error") as caught:
            await cluster.stub.ModelInfer(make_request(_SECRET, stream=False))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        (entry,) = await read_stream(cluster, make_request(_SECRET))
        assert entry.error_message == "internal error"
    assert caplog.text.count("failed with ValueError") == 4
    assert "in require" not in caplog.text
    assert "in fail" in caplog.text
    assert _SECRET not in caplog.text


async def test_http_that_is_broken_is_logged_without_what_it_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    body = json.dumps({"text_input": _SECRET}).encode()
    head = f"POST /v2/models/{DEPLOYMENT}/generate HTTP/1.1\r\nHost: x\r\n".encode()
    async with serving() as cluster:
        host, port = cluster.gateway.http_address.split(":")
        for sent in (
            # The rest of a body that is longer than it says is taken for the next request.
            head + b"Content-Length: 1\r\n\r\n" + body,
            head + b"Transfer-Encoding: chunked\r\n\r\n" + body + b"\r\n",
            body,
        ):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(sent)
            writer.write_eof()
            await reader.read()
            writer.close()
    assert _SECRET not in caplog.text


def test_null_is_not_given_in_any_key_of_generate() -> None:
    body = dict.fromkeys(
        ["temperature", "bad_words", "input_ids", "stop", "seed", "id", "unknown", "stream"]
    )
    for full in ({**body, "text_input": "a"}, {"text_input": "a", "parameters": body}):
        request = generate_request(DEPLOYMENT, "", json.dumps(full).encode())
        assert [tensor.name for tensor in request.inputs] == ["text_input"]
        assert not request.parameters


def test_null_is_not_given_in_the_parameters_of_infer() -> None:
    tensor = {"name": "text_input", "datatype": "BYTES", "shape": [1], "data": ["a"]}
    for parameters in ({"temperature": None}, None):
        body = json.dumps({"inputs": [tensor], "parameters": parameters}).encode()
        request, _ = infer_request(DEPLOYMENT, "", body, None)
        assert not request.parameters


@pytest.mark.parametrize("name", ["seed", "random_seed"])
def test_a_seed_of_minus_one_is_none_in_generate(name: str) -> None:
    def seed(value: int) -> int:
        body = json.dumps({"text_input": "a", name: value}).encode()
        request = checked(generate_request(DEPLOYMENT, "", body), fresh_seed=77).checked
        assert not isinstance(request, InvalidRequest)
        return request.asked.sampling.seed

    assert seed(-1) == 77
    assert seed(5) == 5
    assert seed(2**64 - 1) == 2**64 - 1
