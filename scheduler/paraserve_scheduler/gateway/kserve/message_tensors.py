"""The tensors of KServe messages: finds, checks and reads those of a request, each once.

Clients of TensorRT-LLM's backend and Triton's OpenAI frontend send a leading dimension of 1. It is
taken off a request's inputs and put back onto the outputs of the responses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import UNSUPPORTED, refuse_unsupported
from paraserve_backend.protocol.request_settings import MAX_WORDS, show
from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS, TensorSpec
from paraserve_scheduler.gateway.kserve.message_parameters import check_name
from paraserve_scheduler.gateway.kserve.raw_tensors import (
    DATATYPES,
    decode,
    join_strings,
    string_bounds,
)

INPUT_SPECS = {spec.name: spec for spec in INPUTS}
#: Those that may have more than one value.
_USEFUL_INPUTS = tuple(name for name in INPUT_SPECS if name not in UNSUPPORTED)
_OUTPUT_NAMES = frozenset(spec.name for spec in OUTPUTS)
_PROMPTS = ("text_input", "input_ids")
#: Characters of a datatype, and dimensions of a shape, that an error shows.
_MAX_SHOWN = 8

_InputTensor = kserve.ModelInferRequest.InferInputTensor
#: What to do instead, for clients of `tensorrt_llm` that do not use its front model.
_TOKEN_LEVEL_INPUTS = {
    "input_lengths": "leave it out",
    "request_output_len": "send 'max_tokens'",
    "streaming": "send 'stream'",
    "runtime_top_k": "send 'top_k'",
    "runtime_top_p": "send 'top_p'",
    "len_penalty": "send 'length_penalty'",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestInputs:
    #: By name, the elements of each input, flat; strings as bytes.
    elements: Mapping[str, Sequence[Any]]
    #: Whether the prompt came with a leading dimension of 1.
    is_batch_of_one: bool


def read_inputs(message: kserve.ModelInferRequest) -> RequestInputs:
    """Take the batch dimension off a request's inputs, check each and return its elements.

    Raises:
        InvalidRequest: says which input is wrong and what is expected.
    """
    tensors: dict[str, _InputTensor] = {}
    is_batch_of_one = False
    for tensor in message.inputs:
        name = tensor.name
        is_batch_of_one |= _take_off_batch(tensor, name) and name in _PROMPTS
        tensors[name] = tensor
    if len(tensors) != len(message.inputs) or not tensors.keys() <= INPUT_SPECS.keys():
        _refuse_names([tensor.name for tensor in message.inputs])
    _check_prompt(tensors)
    return RequestInputs(elements=_read_all(message, tensors), is_batch_of_one=is_batch_of_one)


def check_outputs(message: kserve.ModelInferRequest) -> None:
    """Check the outputs that a request names.

    Raises:
        InvalidRequest: there is no such output, or it is wanted in shared memory.
    """
    for output in message.outputs:
        if output.name not in _OUTPUT_NAMES:
            raise InvalidRequest(
                f"Unexpected inference output {show(output.name)}; the outputs are "
                f"{', '.join(spec.name for spec in OUTPUTS)}."
            )
        if "shared_memory_region" in output.parameters:
            raise InvalidRequest(
                f"Output '{output.name}' is wanted in shared memory, which a replica on another "
                "machine cannot write; leave that out."
            )


def make_raw(message: kserve.ModelInferRequest) -> None:
    """Put the elements of a checked request's inputs into raw contents, if they are not there.

    Parsing those is a copy, while typed contents are parsed element by element.
    """
    if message.raw_input_contents:
        return
    for tensor in message.inputs:
        kind = DATATYPES[tensor.datatype]
        elements = getattr(tensor.contents, kind.contents)
        raw = join_strings(elements) if tensor.datatype == "BYTES" else kind.pack(elements)
        message.raw_input_contents.append(raw)
        tensor.ClearField("contents")


def put_on_batch(response: kserve.ModelInferResponse) -> None:
    """Give every output a leading dimension of 1."""
    for output in response.outputs:
        output.shape.insert(0, 1)


def _take_off_batch(tensor: _InputTensor, name: str) -> bool:
    """Remove a leading dimension of 1 from an input; return whether it had one."""
    spec = INPUT_SPECS.get(name)
    if spec is None or len(tensor.shape) != len(spec.shape) + 1:
        return False
    if tensor.shape[0] != 1:
        raise InvalidRequest(
            f"Input '{name}' is a batch of {tensor.shape[0]}, shape {_shown_shape(tensor)}; "
            "a request holds one prompt, so send each in its own."
        )
    del tensor.shape[0]
    return True


def _refuse_names(names: Sequence[str]) -> NoReturn:
    """Refuse the first input that is unknown or given again."""
    for name in names:
        if name not in INPUT_SPECS:
            refuse_input(name)
        if names.count(name) > 1:
            raise InvalidRequest(f"Input '{name}' is given more than once.")
    raise AssertionError("every name is known and given once")


def _check_prompt(tensors: Mapping[str, _InputTensor]) -> None:
    given = [name for name in _PROMPTS if name in tensors]
    if not given:
        raise InvalidRequest("Input 'text_input' is missing; it takes exactly one string.")
    if len(given) > 1:
        raise InvalidRequest("Give either 'text_input' or 'input_ids', not both.")


def _read_all(
    message: kserve.ModelInferRequest, tensors: Mapping[str, _InputTensor]
) -> dict[str, Sequence[Any]]:
    raw = message.raw_input_contents
    if not raw:
        return {name: _read(tensor, None) for name, tensor in tensors.items()}
    if len(raw) != len(tensors):
        raise InvalidRequest(
            f"The request has {len(tensors)} inputs but {len(raw)} raw contents; "
            "give raw contents for all inputs or for none."
        )
    return {
        name: _read(tensor, content)
        for (name, tensor), content in zip(tensors.items(), raw, strict=True)
    }


def _read(tensor: _InputTensor, raw: bytes | None) -> Sequence[Any]:
    _check_declaration(tensor)
    return _read_contents(tensor) if raw is None else _read_raw(tensor, raw)


def refuse_input(name: str) -> NoReturn:
    """Raise InvalidRequest for a name that no input has."""
    check_name(name)
    if name in UNSUPPORTED:
        refuse_unsupported(name)
    if name in _TOKEN_LEVEL_INPUTS:
        raise InvalidRequest(
            f"Input '{name}' belongs to TensorRT-LLM's token-level model, whose outputs are others "
            f"too; {_TOKEN_LEVEL_INPUTS[name]}."
        )
    raise InvalidRequest(
        f"Unexpected inference input {show(name)}; the inputs are {', '.join(_USEFUL_INPUTS)}."
    )


def _check_declaration(tensor: _InputTensor) -> None:
    spec = INPUT_SPECS[tensor.name]
    if "shared_memory_region" in tensor.parameters:
        raise InvalidRequest(
            f"Input '{tensor.name}' is in shared memory, which a replica on another machine "
            "cannot read; send its contents."
        )
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(
            f"Input '{tensor.name}' has datatype {tensor.datatype[:_MAX_SHOWN] or 'none'}; "
            f"expected {spec.datatype}."
        )
    if not _shape_fits(tensor.shape, spec):
        raise InvalidRequest(
            f"Unexpected shape for input '{tensor.name}': expected {list(spec.shape)}, "
            f"got {_shown_shape(tensor)}."
        )
    count = math.prod(tensor.shape)
    if tensor.name == "input_ids" and not count:
        raise InvalidRequest("Input 'input_ids' is empty; give at least one token.")
    check_element_count(tensor.name, count)


def check_element_count(name: str, count: int) -> None:
    """Refuse more elements than an input may have, before they are read.

    How many token ids a prompt may have depends on the deployment.

    Raises:
        InvalidRequest: there are too many.
    """
    if name != "input_ids" and count > MAX_WORDS:
        what = "words" if name in ("stop_words", "bad_words") else "values"
        raise InvalidRequest(f"'{name}' has {count} {what}; {MAX_WORDS} at most.")


def _shown_shape(tensor: _InputTensor) -> str:
    shown = ", ".join(str(size) for size in tensor.shape[:_MAX_SHOWN])
    return f"[{shown}{', ...' if len(tensor.shape) > _MAX_SHOWN else ''}]"


def _shape_fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        given >= 0 and wanted in (-1, given)
        for given, wanted in zip(shape, spec.shape, strict=True)
    )


def _read_raw(tensor: _InputTensor, raw: bytes) -> Sequence[Any]:
    if tensor.HasField("contents"):
        raise InvalidRequest(f"Input '{tensor.name}' has both contents and raw contents.")
    if tensor.datatype == "BYTES":
        return _read_strings(tensor, raw)
    expected_bytes = math.prod(tensor.shape) * DATATYPES[tensor.datatype].size_bytes
    if len(raw) != expected_bytes:
        raise InvalidRequest(
            f"Input '{tensor.name}' has {len(raw)} bytes; shape {_shown_shape(tensor)} of "
            f"{tensor.datatype} takes {expected_bytes}."
        )
    return decode(tensor.datatype, raw)


def _read_strings(tensor: _InputTensor, raw: bytes) -> Sequence[bytes]:
    bounds = string_bounds(raw)
    try:
        # Strings beyond the declared shape are only counted: there may be many.
        strings = [raw[start:end] for start, end in islice(bounds, math.prod(tensor.shape))]
        excess = sum(1 for _ in bounds)
    except InvalidRequest as error:
        raise InvalidRequest(f"Input '{tensor.name}' is not a BYTES tensor: {error}") from None
    _check_count(tensor, len(strings) + excess)
    return strings


def _read_contents(tensor: _InputTensor) -> Sequence[Any]:
    field = DATATYPES[tensor.datatype].contents
    for descriptor, _value in tensor.contents.ListFields():
        if descriptor.name != field:
            raise InvalidRequest(
                f"Input '{tensor.name}' has {descriptor.name}; {tensor.datatype} takes {field}."
            )
    elements = getattr(tensor.contents, field)
    _check_count(tensor, len(elements))
    return list(elements)


def _check_count(tensor: _InputTensor, count: int) -> None:
    expected = math.prod(tensor.shape)
    if count != expected:
        raise InvalidRequest(
            f"Input '{tensor.name}' has {count} elements; shape {_shown_shape(tensor)} takes "
            f"{expected}."
        )
