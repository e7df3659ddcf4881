"""A request's way into the gateway: what it becomes, and in which order it is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import UNSUPPORTED
from paraserve_backend.protocol.tensors import INPUTS
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.admission import admit, take_time_limit_us
from paraserve_scheduler.gateway.kserve.raw_tensors import encode
from tests.support.gateway import (
    DEPLOYMENT,
    admitted,
    checked,
    make_raw_request,
    make_request,
    read_stream,
    serving,
)
from tests.support.gateway_fakes import one_answer

Change = Callable[[kserve.ModelInferRequest], object]

_DATATYPES = {spec.name: spec.datatype for spec in INPUTS}
#: "{}" is a string and also what sampling_parameters takes.
_VALUE = {"BYTES": "{}", "BOOL": True, "FP32": 0.5}
#: Any inputs with exactly one prompt.
_INPUT_NAMES = st.builds(
    lambda prompt, others: (others - {"text_input", "input_ids"}) | {prompt},
    st.sampled_from(["text_input", "input_ids"]),
    st.sets(st.sampled_from(sorted(_DATATYPES))),
)
#: One mistake for each step of admission, in the order in which they are refused. The mistakes of
#: one message do not hide each other.
_MISTAKES: list[tuple[Change, str]] = [
    (lambda r: r.inputs[1].shape.insert(0, 2), "'stream' is a batch of 2"),
    (lambda r: r.inputs.add(name="seed"), "'seed' is given more than once"),
    (lambda r: r.inputs.add(name="prompt"), "Unexpected inference input 'prompt'"),
    (lambda r: r.inputs.add(name="input_ids"), "either 'text_input' or 'input_ids'"),
    (lambda r: r.raw_input_contents.append(b""), "inputs but 1 raw contents"),
    (lambda r: setattr(r.inputs[0], "datatype", "INT32"), "'text_input' has datatype INT32"),
    (
        lambda r: r.inputs[0].contents.bytes_contents.append(b""),
        "'text_input' has 2 elements",
    ),
    (lambda r: r.inputs.add(name="seed", datatype="FP32"), "'seed' has datatype FP32"),
    (lambda r: r.outputs.add(name="logits"), "Unexpected inference output 'logits'"),
    (lambda r: _set(r, "max_tokens", 0), "'max_tokens' is 0"),
    (lambda r: _set(r, "n", 2), "'n' asks for several answers"),
    (lambda r: _set(r, "min_tokens", 1), "not something the engine tensorrt-llm can do"),
    (lambda r: r, "one response cannot have 'stream' true"),
]


def _set(request: kserve.ModelInferRequest, name: str, value: int) -> None:
    request.parameters[name].int64_param = value


def make_strict_request(names: set[str]) -> kserve.ModelInferRequest:
    """A request with these inputs as the interface wants them, at values that are taken."""

    def element(name: str) -> object:
        if name in UNSUPPORTED:
            return UNSUPPORTED[name][0]
        return _VALUE.get(_DATATYPES[name], 3)

    return make_raw_request(
        **{name: encode(name, _DATATYPES[name], [element(name)]) for name in sorted(names)}
    )


def copy_of(message: kserve.ModelInferRequest) -> kserve.ModelInferRequest:
    copy = kserve.ModelInferRequest()
    copy.CopyFrom(message)
    return copy


@pytest.mark.parametrize("step", range(len(_MISTAKES)))
def test_of_several_mistakes_the_first_in_order_is_refused(step: int) -> None:
    request = make_request(stream=True)
    for change, _ in reversed(_MISTAKES[step:]):
        change(request)
    with pytest.raises(InvalidRequest, match=_MISTAKES[step][1]):
        admit(checked(request), pb.Route(engine="tensorrt-llm"), may_stream=False)


async def test_the_limit_comes_before_the_model_and_the_model_before_the_rest() -> None:
    async def refusal(**changes: str) -> str:
        request = make_request()
        request.inputs[0].datatype = "INT32"
        for name, value in changes.items():
            if name == "timeout":
                request.parameters[name].string_param = value
            else:
                setattr(request, name, value)
        (entry,) = await read_stream(cluster, request)
        return entry.error_message

    async with serving(replicas=0) as cluster:
        unknown = {"model_name": "unknown", "model_version": "2"}
        assert "'timeout' is 'soon'" in await refusal(timeout="soon", **unknown)
        assert "unknown model: 'unknown' is not found" in await refusal(**unknown)
        assert "version 2 is not found" in await refusal(model_version="2")
        assert "has datatype INT32" in await refusal()


@given(_INPUT_NAMES, st.data())
def test_a_lenient_clients_request_becomes_a_strict_ones(
    names: set[str], data: st.DataObject
) -> None:
    strict = make_strict_request(names)
    lenient = copy_of(strict)
    batched = data.draw(st.sets(st.sampled_from(sorted(names))))
    for tensor in lenient.inputs:
        if tensor.name in batched:
            tensor.shape.insert(0, 1)
    lenient.parameters["timeout"].int64_param = 7
    assert take_time_limit_us(lenient) == 7
    became = admitted(lenient)
    assert became.message == strict
    assert became.asked == admitted(strict).asked
    assert became.is_batch_of_one == bool(batched & {"text_input", "input_ids"})


@given(_INPUT_NAMES, st.booleans(), st.sampled_from(["", "paraserve"]))
def test_what_was_admitted_is_admitted_again_as_it_is(
    names: set[str], is_batched: bool, engine: str
) -> None:
    request = make_strict_request(names)
    for tensor in request.inputs if is_batched else ():
        tensor.shape.insert(0, 1)
    first = admitted(request, engine=engine)
    message = copy_of(first.message)
    again = admitted(first.message, engine=engine)
    assert again.message == message
    assert (again.asked, again.can_move) == (first.asked, first.can_move)
    assert not again.is_batch_of_one


@pytest.mark.parametrize("value", [True, False])
def test_a_setting_is_read_from_wherever_it_is(value: bool) -> None:
    def is_stream(message: kserve.ModelInferRequest) -> bool:
        return admitted(message).asked.is_stream

    text = b"\1\0\0\0a"
    assert is_stream(make_request(stream=value)) is value
    assert is_stream(make_raw_request(text_input=text, stream=bytes([value]))) is value
    bare = make_raw_request(text_input=text)
    assert is_stream(bare) is False
    bare.parameters["stream"].bool_param = value
    assert is_stream(bare) is value


def test_the_routes_engine_decides_what_is_taken_and_whether_it_can_move() -> None:
    request = make_request()
    assert admitted(request, engine="vllm").can_move
    request.parameters["presence_penalty"].double_param = 0.5
    assert admitted(request).can_move
    assert not admitted(request, engine="vllm").can_move
    with pytest.raises(InvalidRequest, match="'presence_penalty' is not something the engine"):
        admitted(request, engine="tensorrt-llm")


def test_a_stream_is_refused_only_where_one_response_is_wanted() -> None:
    for is_stream, may_stream in [(False, False), (False, True), (True, True)]:
        request = make_request(stream=is_stream)
        assert admit(checked(request), pb.Route(), may_stream=may_stream).message is request


def test_the_fresh_seed_is_for_requests_that_name_none() -> None:
    def seed(message: kserve.ModelInferRequest) -> int:
        request = checked(message, fresh_seed=5)
        return admit(request, pb.Route(), may_stream=True).asked.sampling.seed

    request = make_request()
    assert seed(request) == 5
    request.parameters["seed"].int64_param = 6
    assert seed(request) == 6


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
