from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.tensors import INPUTS
from paraserve_scheduler.gateway.kserve.message_tensors import check_outputs, read_inputs
from tests.support.gateway import make_raw_request, make_request

Change = Callable[[kserve.ModelInferRequest], None]

_STRING = kserve.InferParameter(string_param="region")
_IN_SHARED_MEMORY = {"shared_memory_region": _STRING}


def read(message: kserve.ModelInferRequest) -> Mapping[str, Sequence[Any]]:
    elements = read_inputs(message).elements
    check_outputs(message)
    return elements


def test_both_forms_of_a_good_request_are_read() -> None:
    elements = {"text_input": [b"hi"], "stream": [True]}
    assert read(make_request()) == elements
    assert read(make_raw_request(text_input=b"\x02\0\0\0hi", stream=b"\x01")) == elements


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda r: r.inputs.pop(0), "'text_input' is missing"),
        (lambda r: r.inputs.add(name="prompt"), "Unexpected inference input 'prompt'"),
        (
            lambda r: r.inputs.add(name="prompt_embedding_table", datatype="FP16"),
            "'prompt_embedding_table' asks for prompt tuning, which is not supported; leave it out",
        ),
        (lambda r: r.inputs.append(r.inputs[0]), "'text_input' is given more than once"),
        (lambda r: setattr(r.inputs[0], "datatype", "INT32"), "has datatype INT32"),
        (lambda r: setattr(r.inputs[0], "datatype", ""), "has datatype none"),
        (lambda r: r.inputs[0].shape.extend([1, 1]), r"expected \[1\], got \[1, 1, 1\]"),
        (lambda r: r.inputs[0].shape.pop(), r"expected \[1\], got \[\]"),
        (lambda r: r.inputs[0].contents.ClearField("bytes_contents"), "has 0 elements"),
        (lambda r: r.inputs[0].contents.int_contents.append(1), "takes bytes_contents"),
        (lambda r: r.inputs[1].contents.bool_contents.append(True), "has 2 elements"),
        (lambda r: r.raw_input_contents.append(b""), "2 inputs but 1 raw contents"),
        (lambda r: r.raw_input_contents.extend([b"", b""]), "both contents and raw"),
        (lambda r: r.outputs.add(name="logits"), "Unexpected inference output 'logits'"),
        (
            lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(_STRING),
            "is in shared memory",
        ),
        (
            lambda r: r.outputs.add(name="text_output", parameters=_IN_SHARED_MEMORY),
            "wanted in shared memory",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(change: Change, sentence: str) -> None:
    request = make_request()
    change(request)
    with pytest.raises(InvalidRequest, match=sentence):
        read(request)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"text_input": b"\x05\0\0\0hi"}, "'text_input' is not a BYTES tensor: A string of 5"),
        ({"text_input": b""}, "'text_input' has 0 elements"),
        ({"text_input": b"\0\0\0\0" * 2}, "'text_input' has 2 elements"),
        ({"text_input": b"\0\0\0\0", "max_tokens": b"123"}, "'max_tokens' has 3 bytes"),
        ({"text_input": b"\0\0\0\0", "input_ids": b"1234"}, "not both"),
    ],
)
def test_wrong_raw_contents_are_refused(raw: dict[str, bytes], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        read(make_raw_request(**raw))


@given(st.lists(st.binary(max_size=20), max_size=4), st.lists(st.integers(), max_size=3))
def test_whatever_comes_is_accepted_or_refused_and_never_crashes(
    raw: list[bytes], shape: list[int]
) -> None:
    request = kserve.ModelInferRequest(raw_input_contents=raw)
    names = ["text_input", "stop_words", "seed", "stream"]
    for name in names[: len(raw)]:
        datatype = {spec.name: spec.datatype for spec in INPUTS}[name]
        fitting = [value for value in shape if -(2**63) <= value < 2**63]
        request.inputs.add(name=name, datatype=datatype, shape=fitting)
    with contextlib.suppress(InvalidRequest):
        read(request)


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
        read(request)


@pytest.mark.parametrize("size", [0, 2, -1])
def test_a_batch_of_several_is_refused_in_one_sentence(size: int) -> None:
    request = make_request()
    request.inputs[0].shape.insert(0, size)
    with pytest.raises(InvalidRequest, match=rf"'text_input' is a batch of {size}.*each in its"):
        read(request)


@pytest.mark.parametrize("name", ["text_input", "input_ids"])
def test_only_the_prompts_batch_dimension_counts(name: str) -> None:
    def batches(*names: str) -> bool:
        request = make_raw_request(**{name: b"\0\0\0\0", "stream": b"\1"})
        for tensor in request.inputs:
            if tensor.name in names:
                tensor.shape.insert(0, 1)
        return read_inputs(request).is_batch_of_one

    assert batches(name)
    assert batches(name, "stream")
    assert not batches("stream")
    assert not batches()


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["text_input", "stream", "stream", "prompt"], "'stream' is given more than once"),
        (["stream", "prompt", "stream"], "'stream' is given more than once"),
        (["prompt", "stream", "stream"], "Unexpected inference input 'prompt'"),
    ],
)
def test_the_first_wrong_name_is_refused(names: list[str], sentence: str) -> None:
    request = kserve.ModelInferRequest()
    for name in names:
        request.inputs.add(name=name)
    with pytest.raises(InvalidRequest, match=sentence):
        read(request)


def test_strings_beyond_the_declared_shape_are_counted() -> None:
    with pytest.raises(InvalidRequest, match=r"'text_input' has 1000 elements; shape \[1\]"):
        read(make_raw_request(text_input=b"\0\0\0\0" * 1000))
    with pytest.raises(InvalidRequest, match="'text_input' is not a BYTES tensor: A string's len"):
        read(make_raw_request(text_input=b"\0\0\0\0" * 1000 + b"\0"))
