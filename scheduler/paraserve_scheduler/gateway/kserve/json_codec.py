"""JSON bodies of requests to KServe's message, and responses back to JSON.

Two forms of requests: `infer` (KServe v2 tensors, in JSON or in binary after it) and `generate`
(Triton's: keys that name an input are tensors, all others are request parameters).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.gateway.kserve.message_tensors import INPUT_SPECS
from paraserve_scheduler.gateway.kserve.raw_tensors import DATATYPES, decode, encode

Json = dict[str, Any]

_INT64_MAX = 2**63 - 1
_UINT64_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InferCall:
    """An `infer` request, and which outputs its client wants in binary form."""

    request: kserve.ModelInferRequest
    is_binary: bool
    is_output_binary: Mapping[str, bool]

    def wants_binary(self, output: str) -> bool:
        return self.is_output_binary.get(output, self.is_binary)


def generate_request(deployment: str, version: str, body: bytes) -> kserve.ModelInferRequest:
    """Read the body of a `generate` or `generate_stream` call.

    Raises:
        InvalidRequest: says which key is wrong.
    """
    request = kserve.ModelInferRequest(model_name=deployment, model_version=version)
    for key, value in _generate_fields(parse_object(body)):
        if key == "id":
            request.id = _text(value, "id")
        elif _is_tensor(key, value):
            values = value if isinstance(value, list) else [value]
            _add_input(request, key, INPUT_SPECS[key].datatype, [len(values)], values)
        else:
            _set_parameters(request.parameters, {key: value})
    return request


def infer_call(deployment: str, version: str, body: bytes, header_bytes: int | None) -> InferCall:
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
    return InferCall(
        request=request,
        is_binary=is_binary,
        is_output_binary=dict(_read_outputs(request, fields)),
    )


def generate_response(response: kserve.ModelInferResponse) -> Json:
    """Return a response as `generate` gives it: one-element outputs as plain values."""
    fields = _response_head(response)
    for output, raw in _outputs(response):
        values = decode(output.datatype, raw)
        fields[output.name] = values[0] if len(values) == 1 else values
    return fields


def infer_response(call: InferCall, response: kserve.ModelInferResponse) -> tuple[Json, bytes]:
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
        if call.wants_binary(output.name):
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
        fields = json.loads(body, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidRequest(
            f"The request body is not valid JSON: {error.msg} at byte {error.pos}."
        ) from None
    except (UnicodeDecodeError, RecursionError):
        raise InvalidRequest("The request body is not valid JSON.") from None
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
                f"Input '{name}' has binary_data_size {size!r}, but {left} binary bytes are left."
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
    return spec is not None and (spec.datatype == "BYTES" or not isinstance(value, str))


def _generate_fields(fields: Json) -> Iterator[tuple[str, object]]:
    # As Triton does: a nested "parameters" counts like the top level.
    for key, value in fields.items():
        if key != "parameters":
            yield key, value
        elif isinstance(value, dict):
            yield from value.items()
        else:
            raise InvalidRequest("'parameters' must be a JSON object.")


def _read_input(request: kserve.ModelInferRequest, tensor: Json, binary: _Binary) -> None:
    name = _text(tensor.get("name"), "inputs.name")
    datatype = _text(tensor.get("datatype"), f"datatype of input '{name}'")
    shape = _shape(tensor.get("shape"), name)
    parameters = _parameters(tensor, f"input '{name}'")
    if "binary_data_size" in parameters:
        raw = binary.take(name, parameters.pop("binary_data_size"))
        request.inputs.add(name=name, datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    elif "data" in tensor:
        _add_input(request, name, datatype, shape, list(_flat(tensor["data"])))
    else:
        raise InvalidRequest(f"Input '{name}' has neither data nor binary_data_size.")
    _set_parameters(request.inputs[-1].parameters, parameters)


def _add_input(
    request: kserve.ModelInferRequest,
    name: str,
    datatype: str,
    shape: list[int],
    values: list[object],
) -> None:
    if datatype not in DATATYPES:
        raise InvalidRequest(f"Input '{name}' has datatype {datatype}, which no input takes.")
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    request.raw_input_contents.append(encode(name, datatype, values))


def _flat(data: object) -> Iterator[object]:
    """Yield the elements of a flat or nested list in row-major order."""
    pending = [data]
    while pending:
        entry = pending.pop()
        if isinstance(entry, list):
            pending.extend(reversed(entry))
        else:
            yield entry


def _shape(value: object, name: str) -> list[int]:
    if isinstance(value, list) and all(type(n) is int and 0 <= n <= _INT64_MAX for n in value):
        return value
    raise InvalidRequest(f"Input '{name}' needs a shape: a list of whole numbers.")


def _read_outputs(request: kserve.ModelInferRequest, fields: Json) -> Iterator[tuple[str, bool]]:
    """Add the wanted outputs to the request; yield those that say whether they be binary."""
    for output in _objects(fields, "outputs"):
        name = _text(output.get("name"), "outputs.name")
        parameters = _parameters(output, f"output '{name}'")
        if "binary_data" in parameters:
            yield name, parameters.pop("binary_data") is True
        _set_parameters(request.outputs.add(name=name).parameters, parameters)


def _parameters(fields: Json, where: str) -> Json:
    given = fields.get("parameters", {})
    if not isinstance(given, dict):
        raise InvalidRequest(f"'parameters' of {where} must be a JSON object.")
    return dict(given)


def _set_parameters(parameters: Mapping[str, kserve.InferParameter], values: Json) -> None:
    for key, value in values.items():
        _set_parameter(parameters[_text(key, "the name of a parameter")], key, value)


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
            f"Parameter '{key}' has an unsupported value; give a number, a boolean or a string."
        )


def _objects(fields: Json, key: str) -> list[Json]:
    value = fields.get(key, [])
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return value
    raise InvalidRequest(f"'{key}' must be a list of JSON objects.")


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"'{what}' must be a string.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"'{what}' has half a surrogate pair in its text.") from None
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
