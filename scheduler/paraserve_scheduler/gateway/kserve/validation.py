"""Checks a request's tensors and settings against the interface before it wakes a replica."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import (
    UNSUPPORTED,
    GenerateRequest,
    parse_request,
    refuse_unsupported,
)
from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS, TensorSpec
from paraserve_scheduler.gateway.kserve.raw_tensors import (
    DATATYPES,
    count_elements,
    decode,
    string_bounds,
)

INPUT_SPECS = {spec.name: spec for spec in INPUTS}
OUTPUT_NAMES = frozenset(spec.name for spec in OUTPUTS)

_InputTensor = kserve.ModelInferRequest.InferInputTensor
PROMPTS = ("text_input", "input_ids")
#: What to do instead, for clients of `tensorrt_llm` that do not use its front model.
_TOKEN_LEVEL_INPUTS = {
    "input_lengths": "leave it out",
    "request_output_len": "send 'max_tokens'",
    "streaming": "send 'stream'",
    "runtime_top_k": "send 'top_k'",
    "runtime_top_p": "send 'top_p'",
    "len_penalty": "send 'length_penalty'",
}


def validate(request: kserve.ModelInferRequest, *, fresh_seed: int = 0) -> GenerateRequest:
    """Check a request's tensors and settings, and return what it asks for.

    `fresh_seed` is the seed of a request that names none.

    Raises:
        InvalidRequest: says which tensor or setting is wrong and what is expected.
    """
    _check_prompt([tensor.name for tensor in request.inputs])
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest(
            f"The request has {len(request.inputs)} inputs but {len(raw)} raw contents; "
            "give raw contents for all inputs or for none."
        )
    for index, tensor in enumerate(request.inputs):
        _check_declaration(tensor)
        if raw:
            _check_raw(tensor, raw[index])
        else:
            _check_contents(tensor)
    _check_outputs(request)
    tensors = {tensor.name: _elements(request, i) for i, tensor in enumerate(request.inputs)}
    parameters = {
        name: parameter_value(parameter) for name, parameter in request.parameters.items()
    }
    return parse_request(tensors, parameters, fresh_seed=fresh_seed)


def _elements(request: kserve.ModelInferRequest, index: int) -> list[Any]:
    """Return the elements of a tensor that was checked; strings as bytes."""
    tensor = request.inputs[index]
    if not request.raw_input_contents:
        return list(getattr(tensor.contents, DATATYPES[tensor.datatype].contents))
    raw = request.raw_input_contents[index]
    if tensor.datatype == "BYTES":
        return [raw[start:end] for start, end in string_bounds(raw)]
    return list(decode(tensor.datatype, raw))


def parameter_value(parameter: kserve.InferParameter) -> Any:
    """Return the value in whichever form it was sent; `None` for none."""
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)


def _check_prompt(names: Sequence[str]) -> None:
    for name in names:
        if name not in INPUT_SPECS:
            _refuse_input(name)
        if names.count(name) > 1:
            raise InvalidRequest(f"Input '{name}' is given more than once.")
    given = [name for name in PROMPTS if name in names]
    if not given:
        raise InvalidRequest("Input 'text_input' is missing; it takes exactly one string.")
    if len(given) > 1:
        raise InvalidRequest("Give either 'text_input' or 'input_ids', not both.")


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
    if tensor.name == "input_ids" and not count_elements(tensor.shape):
        raise InvalidRequest("Input 'input_ids' is empty; give at least one token.")


def _shape_fits(shape: Sequence[int], spec: TensorSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        given >= 0 and wanted in (-1, given)
        for given, wanted in zip(shape, spec.shape, strict=True)
    )


def _check_raw(tensor: _InputTensor, raw: bytes) -> None:
    if tensor.HasField("contents"):
        raise InvalidRequest(f"Input '{tensor.name}' has both contents and raw contents.")
    expected = count_elements(tensor.shape)
    if tensor.datatype == "BYTES":
        _check_count(tensor, _count_strings(tensor, raw))
        return
    expected_bytes = expected * DATATYPES[tensor.datatype].size_bytes
    if len(raw) != expected_bytes:
        raise InvalidRequest(
            f"Input '{tensor.name}' has {len(raw)} bytes; shape {list(tensor.shape)} of "
            f"{tensor.datatype} takes {expected_bytes}."
        )


def _count_strings(tensor: _InputTensor, raw: bytes) -> int:
    try:
        return sum(1 for _ in string_bounds(raw))
    except InvalidRequest as error:
        raise InvalidRequest(f"Input '{tensor.name}' is not a BYTES tensor: {error}") from None


def _check_contents(tensor: _InputTensor) -> None:
    field = DATATYPES[tensor.datatype].contents
    for descriptor, _value in tensor.contents.ListFields():
        if descriptor.name != field:
            raise InvalidRequest(
                f"Input '{tensor.name}' has {descriptor.name}; {tensor.datatype} takes {field}."
            )
    _check_count(tensor, len(getattr(tensor.contents, field)))


def _check_count(tensor: _InputTensor, count: int) -> None:
    expected = count_elements(tensor.shape)
    if count != expected:
        raise InvalidRequest(
            f"Input '{tensor.name}' has {count} elements; shape {list(tensor.shape)} takes "
            f"{expected}."
        )


def _check_outputs(request: kserve.ModelInferRequest) -> None:
    for output in request.outputs:
        if output.name not in OUTPUT_NAMES:
            raise InvalidRequest(
                f"Unexpected inference output '{output.name}'; the outputs are "
                f"{', '.join(spec.name for spec in OUTPUTS)}."
            )
        if "shared_memory_region" in output.parameters:
            raise InvalidRequest(
                f"Output '{output.name}' is wanted in shared memory, which a replica on another "
                "machine cannot write; leave that out."
            )
