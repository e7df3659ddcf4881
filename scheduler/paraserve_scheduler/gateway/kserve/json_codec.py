"""JSON bodies of requests to KServe's message, and responses back to JSON.

Two forms of requests: `infer` (KServe v2 tensors, in JSON or in binary after it) and `generate`
(Triton's: keys that name an input are tensors, all others are request parameters).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.bounded_json import parse_json
from paraserve_backend.protocol.request_settings import show
from paraserve_scheduler.gateway.kserve.message_parameters import check_count, check_name
from paraserve_scheduler.gateway.kserve.message_tensors import (
    INPUT_SPECS,
    check_element_count,
    refuse_input,
)
from paraserve_scheduler.gateway.kserve.raw_tensors import DATATYPES, decode, encode

Json = dict[str, Any]

_INT64_MAX = 2**63 - 1
_UINT64_MAX = 2**64 - 1
#: No input has more dimensions than two, with that of the batch.
_MAX_DIMENSIONS = 8
_MAX_DATATYPE_CHARACTERS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BinaryOutputs:
    """Which outputs the client of an `infer` call wants in binary form."""

    by_default: bool = False
    is_binary: Mapping[str, bool] = field(default_factory=dict)

    def __contains__(self, output: str) -> bool:
        return self.is_binary.get(output, self.by_default)


def generate_request(deployment: str, version: str, body: bytes) -> kserve.ModelInferRequest:
    """Read the body of a `generate` or `generate_stream` call.

    Raises:
        InvalidRequest: says which key is wrong.
    """
    request = kserve.ModelInferRequest(model_name=deployment, model_version=version)
    for key, value in _generate_fields(parse_object(body)):
        if value is None:
            check_name(key)  # which says no value of it
        elif key == "id":
            request.id = _text(value, "id")
        elif _is_tensor(key, value):
            values = value if isinstance(value, list) else [value]
            _add_input(request, key, INPUT_SPECS[key].datatype, [len(values)], values)
        else:
            _set_parameters(request.parameters, {key: value})
    return request


def infer_request(
    deployment: str, version: str, body: bytes, header_bytes: int | None
) -> tuple[kserve.ModelInferRequest, BinaryOutputs]:
    """Read the body of an `infer` call; with binary tensors its first `header_bytes` are JSON.

    Raises:
        InvalidRequest: says which field is wrong.
    """
    if header_bytes is not None and header_bytes > len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {header_bytes}, but the body has {len(body)} "
            "bytes."
        )
    split = len(body) if header_bytes is None else header_bytes
    fields = parse_object(body[:split])
    request = kserve.ModelInferRequest(
        model_name=deployment, model_version=version, id=_text(fields.get("id", ""), "id")
    )
    parameters = _parameters(fields, "the request")
    is_binary = parameters.pop("binary_data_output", False) is True
    _set_parameters(request.parameters, parameters)
    binary = _Binary(body[split:])
    for tensor in _objects(fields, "inputs"):
        _read_input(request, tensor, binary)
    binary.require_end()
    wanted = BinaryOutputs(by_default=is_binary, is_binary=dict(_read_outputs(request, fields)))
    return request, wanted


def generate_response(response: kserve.ModelInferResponse) -> Json:
    """Return a response as `generate` gives it: one-element outputs as plain values."""
    fields = _response_head(response)
    for output, raw in _outputs(response):
        values = decode(output.datatype, raw)
        fields[output.name] = values[0] if len(values) == 1 else values
    return fields


def infer_response(
    response: kserve.ModelInferResponse, wanted: BinaryOutputs
) -> tuple[Json, bytes]:
    """Return the JSON part and the binary part of an `infer` response."""
    fields = _response_head(response)
    fields["outputs"] = []
    binary = b""
    for output, raw in _outputs(response):
        entry: Json = {
            "name": output.name,
            "datatype": output.datatype,
            "shape": list(output.shape),
        }
        if output.name in wanted:
            entry["parameters"] = {"binary_data_size": len(raw)}
            binary += raw
        else:
            entry["data"] = decode(output.datatype, raw)
        fields["outputs"].append(entry)
    return fields, binary


def parse_object(body: bytes) -> Json:
    """Parse a JSON object.

    Raises:
        InvalidRequest: it is not JSON, or not an object.
    """
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"The request body is not valid JSON: no UTF-8 at byte {error.start}."
        ) from None
    try:
        fields = parse_json(text, "The request body", parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        position = len(text[: error.pos].encode())
        raise InvalidRequest(
            f"The request body is not valid JSON: {error.msg} at byte {position}."
        ) from None
    if not isinstance(fields, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return fields


class _Binary:
    """The bytes after the JSON part, handed out tensor by tensor."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def take(self, name: str, size: object) -> bytes:
        left = len(self._data) - self._position
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= left:
            raise InvalidRequest(
                f"Input {show(name)} has binary_data_size {show(size)}, but {left} binary bytes "
                "are left."
            )
        start = self._position
        self._position += size
        return self._data[start : self._position]

    def require_end(self) -> None:
        left = len(self._data) - self._position
        if left:
            raise InvalidRequest(f"The body has {left} binary bytes that belong to no input.")


def _is_tensor(key: str, value: object) -> bool:
    # vLLM's clients put numbers in strings, which only a request parameter can carry.
    spec = INPUT_SPECS.get(key)
    if spec is None:
        return False
    if spec.datatype == "UINT64" and isinstance(value, int):
        return value >= 0  # -1 is none, which no tensor of that type can say
    return spec.datatype == "BYTES" or spec.shape != (1,) or not isinstance(value, str)


def _generate_fields(fields: Json) -> Iterator[tuple[str, object]]:
    # As Triton does: a nested "parameters" counts like the top level.
    check_count(fields, "keys")
    for key, value in fields.items():
        if key != "parameters":
            yield key, value
        elif isinstance(value, dict):
            check_count(value, "keys")
            yield from value.items()
        elif value is not None:
            raise InvalidRequest("'parameters' must be a JSON object.")


def _read_input(request: kserve.ModelInferRequest, tensor: Json, binary: _Binary) -> None:
    name = _text(tensor.get("name"), "inputs.name")
    datatype = _text(tensor.get("datatype"), f"datatype of input {show(name)}")
    shape = _shape(tensor.get("shape"), name)
    parameters = _parameters(tensor, f"input {show(name)}")
    if "binary_data_size" in parameters:
        raw = binary.take(name, parameters.pop("binary_data_size"))
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    elif "data" in tensor:
        _add_input(request, name, datatype, shape, _flat(tensor["data"]))
    else:
        raise InvalidRequest(f"Input {show(name)} has neither data nor binary_data_size.")
    _set_parameters(request.inputs[-1].parameters, parameters)


def _add_input(
    request: kserve.ModelInferRequest,
    name: str,
    datatype: str,
    shape: list[int],
    values: Sequence[object],
) -> None:
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"Input {show(name)} has datatype {datatype[:_MAX_DATATYPE_CHARACTERS]}, which no "
            "input takes."
        )
    if name not in INPUT_SPECS:
        refuse_input(name)
    check_element_count(name, len(values))
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(encode(name, datatype, values))


def _flat(data: object) -> Sequence[object]:
    """Return the elements of a flat or nested list in row-major order."""
    if isinstance(data, list) and list not in set(map(type, data)):
        return data
    flat: list[object] = []
    pending = [data]
    while pending:
        entry = pending.pop()
        if isinstance(entry, list):
            pending.extend(reversed(entry))
        else:
            flat.append(entry)
    return flat


def _shape(value: object, name: str) -> list[int]:
    if (
        isinstance(value, list)
        and len(value) <= _MAX_DIMENSIONS
        and all(type(size) is int and 0 <= size <= _INT64_MAX for size in value)
    ):
        return value
    raise InvalidRequest(
        f"Input {show(name)} needs a shape: a list of at most {_MAX_DIMENSIONS} whole numbers."
    )


def _read_outputs(request: kserve.ModelInferRequest, fields: Json) -> Iterator[tuple[str, bool]]:
    """Add the wanted outputs to the request; yield those that say whether they be binary."""
    for output in _objects(fields, "outputs"):
        name = _text(output.get("name"), "outputs.name")
        parameters = _parameters(output, f"output {show(name)}")
        if "binary_data" in parameters:
            yield name, parameters.pop("binary_data") is True
        _set_parameters(request.outputs.add(name=name).parameters, parameters)


def _parameters(fields: Json, where: str) -> Json:
    given = fields.get("parameters")
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequest(f"'parameters' of {where} must be a JSON object.")
    check_count(given, "parameters")
    return dict(given)


def _set_parameters(parameters: Mapping[str, kserve.InferParameter], values: Json) -> None:
    for key, value in values.items():
        name = _text(key, "the name of a parameter")
        check_name(name)
        if value is not None:
            _set_parameter(parameters[name], name, value)


def _set_parameter(parameter: kserve.InferParameter, key: str, value: object) -> None:
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, str):
        parameter.string_param = _text(value, key)
    elif isinstance(value, float):
        parameter.double_param = value
    elif isinstance(value, int) and -_INT64_MAX <= value <= _INT64_MAX:
        parameter.int64_param = value
    elif isinstance(value, int) and 0 <= value <= _UINT64_MAX:
        parameter.uint64_param = value
    else:
        raise InvalidRequest(
            f"Parameter {show(key)} has an unsupported value; give a number, a boolean or a string."
        )


def _objects(fields: Json, key: str) -> list[Json]:
    value = fields.get(key, [])
    if isinstance(value, list) and set(map(type, value)) <= {dict}:
        check_count(value, key)
        return value
    raise InvalidRequest(f"'{key}' must be a list of JSON objects.")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"'{what}' must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"{show(what)} has half a surrogate pair in its text.") from None
    return value


def _refuse_constant(name: str) -> object:
    raise InvalidRequest(f"The request body is not valid JSON: {name} is no JSON number.")


def _response_head(response: kserve.ModelInferResponse) -> Json:
    head = {"model_name": response.model_name, "model_version": response.model_version}
    return {"id": response.id, **head} if response.id else head


def _outputs(
    response: kserve.ModelInferResponse,
) -> Iterator[tuple[kserve.ModelInferResponse.InferOutputTensor, bytes]]:
    # Triton's gRPC responses always carry raw contents.
    yield from zip(response.outputs, response.raw_output_contents, strict=True)
