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
from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS, TensorSpec
from paraserve_scheduler.gateway.kserve.raw_tensors import DATATYPES, decode, string_bounds

INPUT_SPECS = {spec.name: spec for spec in INPUTS}
_OUTPUT_NAMES = frozenset(spec.name for spec in OUTPUTS)
_PROMPTS = ("text_input", "input_ids")

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
                f"Unexpected inference output '{output.name}'; the outputs are "
                f"{', '.join(spec.name for spec in OUTPUTS)}."
            )
        if "shared_memory_region" in output.parameters:
            raise InvalidRequest(
                f"Output '{output.name}' is wanted in shared memory, which a replica on another "
                "machine cannot write; leave that out."
            )


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
            f"Input '{name}' is a batch of {tensor.shape[0]}, shape {list(tensor.shape)}; "
            "a request holds one prompt, so send each in its own."
        )
    del tensor.shape[0]
    return True


def _refuse_names(names: Sequence[str]) -> NoReturn:
    """Refuse the first input that is unknown or given again."""
    for name in names:
        if name not in INPUT_SPECS:
            _refuse_input(name)
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


def _refuse_input(name: str) -> NoReturn:
    if name in UNSUPPORTED:
        refuse_unsupported(name)
    if name in _TOKEN_LEVEL_INPUTS:
        raise InvalidRequest(
            f"Input '{name}' belongs to TensorRT-LLM's token-level model, whose outputs are others "
            f"too; {_TOKEN_LEVEL_INPUTS[name]}."
        )
    raise InvalidRequest(
        f"Unexpected inference input '{name}'; the inputs are {', '.join(INPUT_SPECS)}."
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
            f"Input '{tensor.name}' has datatype {tensor.datatype or 'none'}; "
            f"expected {spec.datatype}."
        )
    if not _shape_fits(tensor.shape, spec):
        raise InvalidRequest(
            f"Unexpected shape for input '{tensor.name}': expected {list(spec.shape)}, "
            f"got {list(tensor.shape)}."
        )
    if tensor.name == "input_ids" and not math.prod(tensor.shape):
        raise InvalidRequest("Input 'input_ids' is empty; give at least one token.")


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
            f"Input '{tensor.name}' has {len(raw)} bytes; shape {list(tensor.shape)} of "
            f"{tensor.datatype} takes {expected_bytes}."
        )
    return decode(tensor.datatype, raw)


def _read_strings(tensor: _InputTensor, raw: bytes) -> Sequence[bytes]:
    bounds = string_bounds(raw)
    try:
        # Strings beyond the declared shape are only counted: there may be millions.
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
    elements = list(getattr(tensor.contents, field))
    _check_count(tensor, len(elements))
    return elements


def _check_count(tensor: _InputTensor, count: int) -> None:
    expected = math.prod(tensor.shape)
    if count != expected:
        raise InvalidRequest(
            f"Input '{tensor.name}' has {count} elements; shape {list(tensor.shape)} takes "
            f"{expected}."
        )
