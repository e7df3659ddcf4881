"""Random bodies of both protocols: close to what clients send, then bent and broken.

Only makes bytes; `integration.fuzz.doors` sends them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.names import COMMAND_PARAMETER, PROBE_PARAMETER, REPLICA_PARAMETER
from paraserve_backend.protocol.request import UNSUPPORTED
from paraserve_backend.protocol.resume import RESUME
from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS

_DATATYPES = (
    "BYTES",
    "BOOL",
    "INT32",
    "INT64",
    "UINT32",
    "UINT64",
    "FP32",
    "FP16",
    "FP64",
    "",
    "ß",
)
_CONTENTS = (
    "bool_contents",
    "int_contents",
    "int64_contents",
    "uint_contents",
    "uint64_contents",
    "fp32_contents",
    "fp64_contents",
    "bytes_contents",
)
_INTEGERS = (
    0,
    1,
    -1,
    2,
    64,
    2**31 - 1,
    2**31,
    -(2**31) - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64,
    10**40,
)
_FLOATS = ("0.5", "-0.0", "1e308", "1e999", "-1e999", "1e-400", "0.1e1", "2.0", "NaN", "-Infinity")
_TEXTS = (
    "",
    "hi",
    "a",
    "true",
    "FALSE",
    "0",
    "-1",
    "1_0",
    " 7 ",
    "0x10",
    "1e3",
    "nan",
    "inf",
    "٣",
    "好🌶",
    "\0",
    "\ufffd",
    "x" * 300,
    "9" * 5000,
    '{"temperature": 1}',
    '{"n": 2, "x": []}',
    "[" * 3000,
    '{"a":' * 500,
)
_RAW_JSON = (
    '"\\ud800"',
    '"\\u0000"',
    "1" * 4301,
    "-" + "1" * 9000,
    "[[[[[]]]]]",
    "{}",
    "1E+2",
    "null",
)
_OTHER_NAMES = (
    *UNSUPPORTED,
    "timeout",
    "stop",
    "stop_token_ids",
    "prompt",
    "id",
    "parameters",
    "priority",
    "sequence_id",
    "triton_enable_empty_final_response",
    RESUME,
    REPLICA_PARAMETER,
    PROBE_PARAMETER,
    COMMAND_PARAMETER,
    "",
    "好",
    "a" * 1000,
)
_INPUT_NAMES = tuple(spec.name for spec in INPUTS)
_OUTPUT_NAMES = tuple(spec.name for spec in OUTPUTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class InferBody:
    body: bytes
    #: Length of its JSON part, where binary tensors follow.
    header_bytes: int | None


def generate_body(rng: Random) -> bytes:
    """Return the body of a `generate` call."""
    if rng.random() < 0.03:
        return json_value(rng, 4).encode(errors="surrogatepass")
    entries = [("text_input", '"hi"')] if rng.random() < 0.7 else []
    for _ in range(rng.choice((0, 1, 1, 2, 4, 9))):
        name = rng.choice(_INPUT_NAMES if rng.random() < 0.6 else _OTHER_NAMES)
        entries.append((name, json_value(rng, rng.choice((0, 0, 0, 1, 3)))))
    return mutated(rng, _object(entries).encode(errors="surrogatepass"))


def infer_body(rng: Random) -> InferBody:
    """Return the body of an `infer` call: tensors in JSON, in binary after it, or both."""
    binary = b""
    inputs = []
    for _ in range(rng.choice((0, 1, 1, 2, 3, 6))):
        tensor, raw = _json_tensor(rng)
        inputs.append(tensor)
        binary += raw
    entries = [("inputs", f"[{','.join(inputs)}]")]
    if rng.random() < 0.3:
        entries.append(("outputs", _outputs(rng)))
    if rng.random() < 0.3:
        entries.append(("parameters", _parameters(rng)))
    if rng.random() < 0.1:
        entries.append((rng.choice(("id", "inputs", "outputs")), json_value(rng, 2)))
    head = mutated(rng, _object(entries).encode(errors="surrogatepass"))
    header_bytes = len(head) if binary or rng.random() < 0.2 else None
    if header_bytes is not None and rng.random() < 0.1:
        header_bytes = rng.choice((0, 1, header_bytes + 1, 2**31, 10**30))
    return InferBody(body=head + binary, header_bytes=header_bytes)


def infer_message(rng: Random, model: str) -> bytes:
    """Return the bytes of a gRPC request, now and then damaged or compressed."""
    message = kserve.ModelInferRequest(model_name=model)
    if rng.random() < 0.05:
        message.model_version = rng.choice(("1", "2", "x", "好"))
    message.id = rng.choice(("", "", "7", "好" * 50))
    is_raw = rng.random() < 0.5
    for name in _names(rng):
        _add_tensor(rng, message, name, is_raw=is_raw)
    if rng.random() < 0.05:
        message.raw_input_contents.append(rng.randbytes(rng.choice((0, 1, 4, 9))))
    for _ in range(rng.choice((0, 0, 0, 1, 2))):
        output = message.outputs.add(name=rng.choice((*_OUTPUT_NAMES, "x", "")))
        if rng.random() < 0.1:
            output.parameters["shared_memory_region"].string_param = "r"
    for _ in range(rng.choice((0, 0, 1, 3))):
        name = rng.choice(_OTHER_NAMES if rng.random() < 0.6 else _INPUT_NAMES)
        set_parameter(rng, message.parameters[name])
    data = message.SerializeToString()
    if rng.random() < 0.35:
        data = _broken(rng, data)
    return packed(rng, data)[0] if rng.random() < 0.05 else data


def set_parameter(rng: Random, parameter: kserve.InferParameter) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        parameter.bool_param = rng.random() < 0.5
    elif kind == 1:
        parameter.int64_param = max(-(2**63), min(2**63 - 1, rng.choice(_INTEGERS)))
    elif kind == 2:
        parameter.uint64_param = max(0, min(2**64 - 1, rng.choice(_INTEGERS)))
    elif kind == 3:
        parameter.double_param = float(rng.choice(_FLOATS))
    elif kind == 4:
        parameter.string_param = rng.choice(_TEXTS)


def python_value(rng: Random, depth: int = 1) -> object:
    """Return what JSON or a tensor may hold for a setting."""
    kind = rng.randrange(7 if depth else 5)
    if kind == 0:
        return rng.random() < 0.5
    if kind == 1:
        return rng.choice(_INTEGERS)
    if kind == 2:
        return float(rng.choice(_FLOATS))
    if kind == 3:
        return rng.choice(_TEXTS)
    if kind == 4:
        return None
    if kind == 5:
        return [python_value(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 70)))]
    return {rng.choice(_TEXTS[:9]): python_value(rng, depth - 1) for _ in range(rng.randrange(3))}


def setting_name(rng: Random) -> str:
    return rng.choice(_INPUT_NAMES if rng.random() < 0.7 else _OTHER_NAMES)


def json_value(rng: Random, depth: int) -> str:
    """Return JSON text, valid but for constants such as NaN."""
    kind = rng.randrange(8 if depth else 5)
    if kind == 0:
        return rng.choice(("true", "false", "null"))
    if kind == 1:
        return str(rng.choice(_INTEGERS))
    if kind == 2:
        return rng.choice(_FLOATS)
    if kind == 3:
        return json.dumps(rng.choice(_TEXTS), ensure_ascii=rng.random() < 0.5)
    if kind == 4:
        return rng.choice(_RAW_JSON) if rng.random() < 0.1 else str(rng.randrange(100))
    if kind == 5:
        nesting = rng.choice((1, 2, 50, 3000)) if rng.random() < 0.2 else 1
        return "[" * nesting + json_value(rng, depth - 1) + "]" * nesting
    if kind == 6:
        values = [json_value(rng, depth - 1) for _ in range(rng.choice((0, 1, 2, 3, 80)))]
        return f"[{','.join(values)}]"
    names = [rng.choice(_TEXTS[:9]) for _ in range(rng.randrange(4))]
    return _object([(name, json_value(rng, depth - 1)) for name in names])


def mutated(rng: Random, data: bytes) -> bytes:
    """Return the bytes as they are, or, one time in four, damaged."""
    return _broken(rng, data) if rng.random() < 0.25 else data


def packed(rng: Random, data: bytes) -> tuple[bytes, str]:
    """Return the bytes in some content coding, seldom right, and that coding's name."""
    codings: Sequence[tuple[Callable[[bytes], bytes], str]] = (
        (gzip.compress, "gzip"),
        (zlib.compress, "deflate"),
        (lambda raw: zlib.compress(raw)[2:-4], "deflate"),
        (lambda raw: gzip.compress(raw)[:-3], "gzip"),
        (lambda raw: gzip.compress(raw) + b"x", "gzip"),
        (lambda raw: gzip.compress(raw) * 2, "GZIP"),
        (lambda raw: gzip.compress(bytes(rng.choice((1, 3)) << 21)), "gzip"),
        (lambda raw: raw, rng.choice(("br", "gzip", "identity", "gzip, gzip", "", "x" * 99))),
    )
    pack, name = rng.choice(codings)
    return pack(data), name


def _object(entries: Sequence[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in entries) + "}"


def _broken(rng: Random, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randint(0, len(damaged))
        kind = rng.randrange(6)
        if kind == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif kind == 2:
            del damaged[at : at + rng.choice((1, 3, 20))]
        elif kind == 3:
            del damaged[at:]
        elif kind == 4:
            damaged[at:at] = damaged[max(0, at - rng.choice((2, 30))) : at]
        else:
            damaged[at:at] = rng.choice(
                (b"[", b"]", b"{", b'"', b"\\u", b",", b"-", b"\xff", b"\0")
            )
    return bytes(damaged)


def _names(rng: Random) -> list[str]:
    names = [rng.choice(("text_input", "text_input", "input_ids"))] if rng.random() < 0.85 else []
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        names.append(rng.choice(_INPUT_NAMES if rng.random() < 0.9 else _OTHER_NAMES))
    return names


def _datatype(rng: Random, name: str) -> str:
    fitting = [spec.datatype for spec in INPUTS if spec.name == name]
    return fitting[0] if fitting and rng.random() < 0.9 else rng.choice(_DATATYPES)


def _shape(rng: Random, count: int) -> list[int]:
    if rng.random() < 0.85:
        return rng.choice(([count], [count], [1, count]))
    return [rng.choice((0, 1, 2, -1, 2**40, 2**62)) for _ in range(rng.choice((0, 1, 2, 5)))]


def _raw(rng: Random, datatype: str, count: int) -> bytes:
    sizes = {"BOOL": 1, "INT32": 4, "UINT32": 4, "INT64": 8, "UINT64": 8, "FP32": 4}
    if datatype in sizes:
        size = sizes[datatype] * count
        raw = bytes(size) if rng.random() < 0.3 else rng.randbytes(size)
    else:
        texts = [rng.choice(_TEXTS).encode() for _ in range(count)]
        raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    return mutated(rng, raw) if rng.random() < 0.4 else raw


def _json_tensor(rng: Random) -> tuple[str, bytes]:
    """Return an input's entry and the binary bytes that belong to it."""
    name = _names(rng)[-1:] or ["text_input"]
    count = rng.choice((1, 1, 1, 0, 2, 40))
    datatype = _datatype(rng, name[0])
    entries = [
        ("name", json.dumps(name[0]) if rng.random() < 0.97 else json_value(rng, 1)),
        ("datatype", json.dumps(datatype) if rng.random() < 0.97 else json_value(rng, 1)),
        ("shape", json.dumps(_shape(rng, count)) if rng.random() < 0.95 else json_value(rng, 2)),
    ]
    if rng.random() < 0.4:
        raw = _raw(rng, datatype, count)
        size = str(len(raw)) if rng.random() < 0.9 else json_value(rng, 0)
        return _object([*entries, ("parameters", f'{{"binary_data_size":{size}}}')]), raw
    if datatype == "BYTES" and rng.random() < 0.8:
        values = [json.dumps(rng.choice(_TEXTS)) for _ in range(count)]
        entries.append(("data", f"[{','.join(values)}]"))
    elif rng.random() < 0.95:
        entries.append(("data", f"[{','.join(json_value(rng, 0) for _ in range(count))}]"))
    if rng.random() < 0.1:
        entries.append(("parameters", _parameters(rng)))
    return _object(entries), b""


def _outputs(rng: Random) -> str:
    if rng.random() < 0.1:
        return json_value(rng, 3)
    entries = []
    for _ in range(rng.randrange(3)):
        entry = [("name", json.dumps(rng.choice((*_OUTPUT_NAMES, "x"))))]
        if rng.random() < 0.5:
            entry.append(("parameters", _parameters(rng)))
        entries.append(_object(entry))
    return f"[{','.join(entries)}]"


def _parameters(rng: Random) -> str:
    if rng.random() < 0.1:
        return json_value(rng, 2)
    names = [setting_name(rng) for _ in range(rng.randrange(4))]
    names += rng.sample(("binary_data", "binary_data_output", "shared_memory_region"), 1)
    return _object([(name, json_value(rng, rng.choice((0, 0, 2)))) for name in names])


def _add_tensor(rng: Random, message: kserve.ModelInferRequest, name: str, *, is_raw: bool) -> None:
    count = rng.choice((1, 1, 1, 1, 0, 2, 60))
    datatype = _datatype(rng, name)
    shape = [max(-(2**63), min(2**63 - 1, size)) for size in _shape(rng, count)]
    tensor = message.inputs.add(name=name, datatype=datatype, shape=shape)
    if rng.random() < 0.03:
        set_parameter(rng, tensor.parameters[rng.choice(("shared_memory_region", "x"))])
    if is_raw:
        message.raw_input_contents.append(_raw(rng, datatype, count))
        return
    field = rng.choice(_CONTENTS) if rng.random() < 0.1 else _field(datatype)
    getattr(tensor.contents, field).extend(_contents(rng, field) for _ in range(count))


def _field(datatype: str) -> str:
    return {
        "BOOL": "bool_contents",
        "INT32": "int_contents",
        "INT64": "int64_contents",
        "UINT32": "uint_contents",
        "UINT64": "uint64_contents",
        "FP32": "fp32_contents",
        "FP64": "fp64_contents",
    }.get(datatype, "bytes_contents")


def _contents(rng: Random, field: str) -> bool | int | float | bytes:
    if field == "bool_contents":
        return rng.random() < 0.5
    if field == "bytes_contents":
        return mutated(rng, rng.choice(_TEXTS).encode())
    if field.startswith("fp"):
        return float(rng.choice(_FLOATS))
    bits = 64 if "64" in field else 32
    low, high = (0, 2**bits - 1) if "uint" in field else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return int(max(low, min(high, rng.choice(_INTEGERS))))
