from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import UNSUPPORTED
from paraserve_backend.protocol.tensors import INPUTS
from paraserve_scheduler.gateway.kserve.raw_tensors import encode
from paraserve_scheduler.gateway.kserve.validation import validate
from tests.support.gateway import make_request

Change = Callable[[kserve.ModelInferRequest], None]

_STRING = kserve.InferParameter(string_param="region")
_IN_SHARED_MEMORY = {"shared_memory_region": _STRING}
#: "{}" is a string and also what sampling_parameters takes.
_VALUE = {"BYTES": "{}", "BOOL": True, "FP32": 0.5}


def make_raw_request(**raw: bytes) -> kserve.ModelInferRequest:
    """A raw request with these inputs, declared as the interface wants them for one element."""
    datatypes = {spec.name: spec.datatype for spec in INPUTS}
    request = kserve.ModelInferRequest(model_name="tiny")
    for name, content in raw.items():
        request.inputs.add(name=name, datatype=datatypes[name], shape=[1])
        request.raw_input_contents.append(content)
    return request


def test_both_forms_of_a_good_request_pass() -> None:
    validate(make_request())
    validate(make_raw_request(text_input=b"\x02\0\0\0hi", stream=b"\x01"))


@given(st.sets(st.sampled_from([spec.name for spec in INPUTS])))
def test_every_set_of_inputs_with_exactly_one_prompt_passes(names: set[str]) -> None:
    names = (names - {"input_ids"}) | {"text_input"}
    datatypes = {spec.name: spec.datatype for spec in INPUTS}
    raw = {
        name: encode(
            name,
            datatypes[name],
            [UNSUPPORTED[name][0] if name in UNSUPPORTED else _VALUE.get(datatypes[name], 3)],
        )
        for name in names
    }
    validate(make_raw_request(**raw))


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
        (lambda r: r.inputs[0].shape.append(1), r"expected \[1\], got \[1, 1\]"),
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
        validate(request)


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
        validate(make_raw_request(**raw))


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
        validate(request)


@pytest.mark.parametrize("value", [True, False])
def test_a_setting_is_read_from_wherever_it_is(value: bool) -> None:
    assert validate(make_request(stream=value)).is_stream is value
    text = b"\1\0\0\0a"
    assert validate(make_raw_request(text_input=text, stream=bytes([value]))).is_stream is value
    bare = make_raw_request(text_input=text)
    assert validate(bare).is_stream is False
    bare.parameters["stream"].bool_param = value
    assert validate(bare).is_stream is value


def test_a_setting_out_of_range_is_refused() -> None:
    request = make_request()
    request.parameters["max_tokens"].int64_param = 0
    with pytest.raises(InvalidRequest, match="'max_tokens' is 0; it must be at least 1"):
        validate(request)
