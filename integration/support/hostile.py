"""The hostile set: requests that are cheap to send and dear to read. Data only, nothing is sent.

Each shape is filled to 32 KiB, which a gateway reads on its event loop, to the 4 MiB that it takes
by default, and to 64 MiB that come gzip'd in a few kilobytes. A gateway refuses or answers each of
them with a right status, and nobody else notices.
"""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

from tritonclient.grpc import service_pb2 as kserve

_KIB, _MIB = 1 << 10, 1 << 20
#: Filled a little less than full: a request just beyond a limit is refused unread.
_SLACK_BYTES = 512
#: What a shape is filled to; of what is packed, unpacked.
SIZES = {
    "32 KiB": 32 * _KIB,
    "4 MiB": 4 * _MIB,
    "4 MiB packed": 4 * _MIB,
    "64 MiB packed": 64 * _MIB,
}
#: Fastest: the set is made while somebody waits, and repetition packs well at any level.
_GZIP_LEVEL = 1

#: Makes one body or message of about that many bytes.
Shape = Callable[[int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRequest:
    name: str
    #: Below the gateway's address, with a leading slash.
    path: str
    body: bytes = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcMessage:
    """For ModelInfer, or one message of ModelStreamInfer."""

    name: str
    #: A serialized ModelInferRequest, or something that claims to be one.
    message: bytes = field(repr=False)
    #: Whether `message` is compressed; it is then sent with gRPC's compressed flag.
    is_gzipped: bool = False


def http_requests(deployment: str, *, sizes: Container[str] = SIZES) -> Iterator[HttpRequest]:
    """Yield every hostile HTTP request of these sizes for a deployment, all of them POST."""
    model = f"/v2/models/{deployment}"
    for path, shapes in _HTTP_SHAPES.items():
        for name, shape in shapes.items():
            for size in _plain(sizes):
                size_bytes = SIZES[size]
                body = shape(size_bytes - _SLACK_BYTES)
                yield HttpRequest(name=f"{path}: {name}, {size}", path=f"{model}/{path}", body=body)
            for size in _packed(sizes):
                size_bytes = SIZES[size]
                yield HttpRequest(
                    name=f"{path}: {name}, {size}",
                    path=f"{model}/{path}",
                    body=gzip.compress(shape(size_bytes - _SLACK_BYTES), _GZIP_LEVEL),
                    headers={"Content-Encoding": "gzip"},
                )
    yield from _lying_headers(model)


def grpc_messages(deployment: str, *, sizes: Container[str] = SIZES) -> Iterator[GrpcMessage]:
    """Yield every hostile message of these sizes for gRPC's inference calls."""
    head = _length_delimited(1, deployment.encode())
    for name, shape in _GRPC_SHAPES.items():
        for size in _plain(sizes):
            size_bytes = SIZES[size]
            message = head + shape(size_bytes - _SLACK_BYTES)
            yield GrpcMessage(name=f"{name}, {size}", message=message)
        for size in _packed(sizes):
            size_bytes = SIZES[size]
            message = gzip.compress(head + shape(size_bytes - _SLACK_BYTES), _GZIP_LEVEL)
            yield GrpcMessage(name=f"{name}, {size}", message=message, is_gzipped=True)


def _plain(sizes: Container[str]) -> list[str]:
    return [size for size in SIZES if size in sizes and not size.endswith("packed")]


def _packed(sizes: Container[str]) -> list[str]:
    return [size for size in SIZES if size in sizes and size.endswith("packed")]


# ---- JSON ----


def _filled(before: str, unit: str, after: str, *, last: str = "") -> Shape:
    """Repeat a unit between two texts; `last` closes the repetition where it needs that."""

    def shape(size_bytes: int) -> bytes:
        rest = len(before.encode()) + len(last.encode()) + len(after.encode())
        count = max(1, (size_bytes - rest) // len(unit.encode()))
        return (before + unit * count + last + after).encode()

    return shape


def _numbered(before: str, unit: Callable[[int], str], after: str) -> Shape:
    """Repeat a unit that is another one each time, such as a key."""

    def shape(size_bytes: int) -> bytes:
        width = len(unit(10**7)) + 1
        count = max(1, (size_bytes - len(before) - len(after)) // width)
        return (before + ",".join(unit(10**7 + n) for n in range(count)) + after).encode()

    return shape


def _in_sampling_parameters(inner: Shape) -> Shape:
    """Put JSON in a string in JSON, as vLLM's clients send their settings."""

    def shape(size_bytes: int) -> bytes:
        # Quotes and backslashes double in a string.
        text = inner((size_bytes - 64) // 2).decode()
        return json.dumps({"text_input": "a", "sampling_parameters": text}).encode()

    return shape


_PROMPT = '{"text_input":"a",'
_GENERATE_SHAPES: Mapping[str, Shape] = {
    "empty stop words": _filled(_PROMPT + '"stop_words":[', '"",', "]}", last='""'),
    "empty bad words": _filled(_PROMPT + '"bad_words":[', '"",', "]}", last='""'),
    "one-letter stop words": _filled(_PROMPT + '"stop_words":[', '"x",', "]}", last='"x"'),
    "input_ids": _filled('{"input_ids":[', "1,", "]}", last="1"),
    "input_ids that are floats": _filled('{"input_ids":[', "1.5,", "]}", last="1"),
    "input_ids that are strings": _filled('{"input_ids":[', '"1",', "]}", last='"1"'),
    "input_ids that are nulls": _filled('{"input_ids":[', "null,", "]}", last="1"),
    "empty lists": _filled('{"input_ids":[', "[],", "]}", last="[]"),
    "empty objects": _filled(_PROMPT + '"x":[', "{},", "]}", last="{}"),
    "lists, never closed": _filled('{"input_ids":', "[", ""),
    "objects, never closed": _filled("", '{"a":', ""),
    "lists in lists": lambda size: b'{"x":' + b"[" * (size // 2) + b"]" * (size // 2) + b"}",
    "a thousand levels, many times": _filled(
        _PROMPT + '"x":[', "[" * 900 + "]" * 900 + ",", "]}", last="1"
    ),
    "one number of many digits": _filled(_PROMPT + '"max_tokens":', "7", "}"),
    "one negative number of many digits": _filled(_PROMPT + '"max_tokens":-', "7", "}"),
    "one float of many digits": _filled(_PROMPT + '"temperature":0.', "7", "}"),
    "one exponent of many digits": _filled(_PROMPT + '"temperature":1e', "7", "}"),
    "numbers of 4000 digits": _filled(_PROMPT + '"x":[', "7" * 4000 + ",", "]}", last="7"),
    "numbers of 99 digits": _filled('{"input_ids":[', "7" * 99 + ",", "]}", last="7"),
    "digits in a string": _filled(_PROMPT + '"max_tokens":"', "7", '"}'),
    "many keys": _numbered(_PROMPT, lambda n: f'"{n}":1', "}"),
    "many keys below parameters": _numbered(_PROMPT + '"parameters":{', lambda n: f'"{n}":1', "}}"),
    "one key again and again": _filled(_PROMPT, '"max_tokens":1,', '"top_k":1}'),
    "one unknown key again and again": _filled(_PROMPT, '"":1,', '"top_k":1}'),
    "the prompt again and again": _filled("{", '"text_input":"a",', '"top_k":1}'),
    "a long prompt": _filled('{"text_input":"', "word ", '"}'),
    "a prompt of one letter": _filled('{"text_input":"', "a", '"}'),
    "a prompt of emoji": _filled('{"text_input":"', "\U0001f336", '"}'),
    "a prompt of escapes": _filled('{"text_input":"', "\\u0041", '"}'),
    "a prompt of backslashes": _filled('{"text_input":"', "\\\\", '"}'),
    "a prompt of surrogate pairs": _filled('{"text_input":"', "\\ud83c\\udf36", '"}'),
    "a prompt of half surrogates": _filled('{"text_input":"', "\\ud83c", '"}'),
    "a long key": _filled(_PROMPT + '"', "k", '":1}'),
    "a long value of a setting": _filled(_PROMPT + '"stream":"', "v", '"}'),
    "a long id": _filled(_PROMPT + '"id":"', "i", '"}'),
    "a long stop word": _filled(_PROMPT + '"stop_words":["', "w", '"]}'),
    "white space": _filled(_PROMPT, " ", '"top_k":1}'),
    "brackets alone": _filled("", "[]", ""),
    "zero bytes": lambda size: b"\0" * size,
    "bytes that are no UTF-8": lambda size: b'{"text_input":"' + b"\xff" * size + b'"}',
    "bytes that look like UTF-16": lambda size: "{".encode("utf-16") + b"a\0" * (size // 2),
    "settings, many keys": _in_sampling_parameters(_numbered("{", lambda n: f'"{n}":1', "}")),
    "settings, one long key": _in_sampling_parameters(_filled('{"', "k", '":1}')),
    "settings, one number": _in_sampling_parameters(_filled('{"max_tokens":', "7", "}")),
    "settings, lists in lists": _in_sampling_parameters(_filled('{"stop":', "[", "")),
    "settings, empty stop words": _in_sampling_parameters(
        _filled('{"stop":[', '"",', "]}", last='""')
    ),
    "settings, stop token ids": _in_sampling_parameters(
        _filled('{"stop_token_ids":[', "1,", "]}", last="1")
    ),
}

_TENSOR = '"name":"text_input","datatype":"BYTES","shape":[1]'
_INFER_SHAPES: Mapping[str, Shape] = {
    "empty strings in data": _filled(
        '{"inputs":[{' + _TENSOR + ',"data":[', '"",', "]}]}", last='""'
    ),
    "empty lists in data": _filled(
        '{"inputs":[{' + _TENSOR + ',"data":[', "[],", "]}]}", last="[]"
    ),
    "lists in lists in data": _filled('{"inputs":[{' + _TENSOR + ',"data":', "[", ""),
    "ids in data": _filled(
        '{"inputs":[{"name":"input_ids","datatype":"INT32","shape":[1],"data":[',
        "1,",
        "]}]}",
        last="1",
    ),
    "floats in data": _filled(
        '{"inputs":[{"name":"temperature","datatype":"FP32","shape":[1],"data":[',
        "1,",
        "]}]}",
        last="1",
    ),
    "a shape of many dimensions": _filled(
        '{"inputs":[{"name":"text_input","datatype":"BYTES","data":["a"],"shape":[',
        "1,",
        "]}]}",
        last="1",
    ),
    "a shape of huge dimensions": _filled(
        '{"inputs":[{"name":"text_input","datatype":"BYTES","data":["a"],"shape":[',
        "9223372036854775807,",
        "]}]}",
        last="1",
    ),
    "empty inputs": _filled('{"inputs":[', "{},", "]}", last="{}"),
    "equal inputs": _filled(
        '{"inputs":[',
        "{" + _TENSOR + ',"data":["a"]},',
        "]}",
        last="{" + _TENSOR + ',"data":["a"]}',
    ),
    "empty outputs": _filled(
        '{"inputs":[{' + _TENSOR + ',"data":["a"]}],"outputs":[', "{},", "]}", last="{}"
    ),
    "equal outputs": _filled(
        '{"inputs":[{' + _TENSOR + ',"data":["a"]}],"outputs":[',
        '{"name":"text_output"},',
        "]}",
        last='{"name":"text_output"}',
    ),
    "many parameters": _numbered('{"parameters":{', lambda n: f'"{n}":1', "}}"),
    "many parameters of a tensor": _numbered(
        '{"inputs":[{' + _TENSOR + ',"data":["a"],"parameters":{', lambda n: f'"{n}":1', "}}]}"
    ),
    "a long name": _filled('{"inputs":[{"name":"', "n", '","datatype":"BYTES","shape":[1]}]}'),
    "a long datatype": _filled(
        '{"inputs":[{"name":"text_input","shape":[1],"data":["a"],"datatype":"', "d", '"}]}'
    ),
}

_HTTP_SHAPES: Mapping[str, Mapping[str, Shape]] = {
    "generate": _GENERATE_SHAPES,
    "generate_stream": {
        name: _GENERATE_SHAPES[name] for name in ("empty stop words", "input_ids", "a long prompt")
    },
    "infer": _INFER_SHAPES,
}


def _lying_headers(model: str) -> Iterator[HttpRequest]:
    """Yield bodies whose headers or declared sizes are not true."""

    def binary(name: str, declared: object, raw: bytes, header: str | None = None) -> HttpRequest:
        fields = {
            "name": "stop_words",
            "datatype": "BYTES",
            "shape": [1],
            "parameters": {"binary_data_size": declared},
        }
        head = json.dumps({"inputs": [fields]}).encode()
        return HttpRequest(
            name=name,
            path=f"{model}/infer",
            body=head + raw,
            headers={"Inference-Header-Content-Length": header or str(len(head))},
        )

    empty_strings = bytes(4 * _MIB - _KIB)
    yield binary("binary: a million empty strings", len(empty_strings), empty_strings)
    yield binary("binary: more bytes than there are", 2**40, b"")
    yield binary("binary: a size of 2^80", 2**80, b"")
    yield binary("binary: a negative size", -1, b"abcd")
    yield binary("binary: a size that is a string", "4", b"abcd")
    yield binary("binary: a string of 4 GiB", 4, struct.pack("<I", 2**32 - 1))
    yield binary("binary: bytes that belong to nothing", 0, bytes(4 * _MIB - _KIB))
    for name, header in {
        "header length beyond the body": "999999999",
        "header length of 8000 digits": "9" * 8000,
        "header length that is negative": "-1",
        "header length of nothing": "0",
        "header length inside a string": "20",
        "header length with a line of letters": "x" * 4000,
    }.items():
        yield binary(name, 0, b"", header)
    good = b'{"text_input":"a"}'
    generate = f"{model}/generate"
    for name, body, coding in [
        ("gzip that is none", good, "gzip"),
        ("gzip cut off", gzip.compress(good)[:-4], "gzip"),
        ("gzip with more after its end", gzip.compress(good) + bytes(_MIB), "gzip"),
        ("gzip in gzip", gzip.compress(gzip.compress(bytes(64 * _MIB))), "gzip"),
        ("many gzip members", gzip.compress(b"") * 50_000, "gzip"),
        ("an unknown coding", good, "br" * 2000),
    ]:
        yield HttpRequest(name=name, path=generate, body=body, headers={"Content-Encoding": coding})
    yield HttpRequest(
        name="a long name of a model", path=f"/v2/models/{'m' * 8000}/generate", body=good
    )
    yield HttpRequest(
        name="a long Accept-Encoding",
        path=generate,
        body=good,
        headers={"Accept-Encoding": "gzip;q=0.1," * 700},
    )


# ---- protobuf, written by hand: no client's library makes such messages ----

# Fields of ModelInferRequest, InferInputTensor and InferTensorContents.
_ID, _PARAMETERS, _INPUTS, _OUTPUTS, _RAW = 3, 4, 5, 6, 7
_NAME, _DATATYPE, _TENSOR_SHAPE, _TENSOR_PARAMETERS, _CONTENTS = 1, 2, 3, 4, 5
_INT_CONTENTS, _FP32_CONTENTS, _BYTES_CONTENTS = 2, 6, 8
_UNKNOWN = 1000
_VARINT, _FIXED64, _LENGTH, _GROUP, _FIXED32 = 0, 1, 2, 3, 5


def _varint(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*digits, value))


def _tag(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _length_delimited(number: int, content: bytes) -> bytes:
    return _tag(number, _LENGTH) + _varint(len(content)) + content


def _repeated(unit: bytes) -> Shape:
    return lambda size_bytes: _a_prompt() + unit * (size_bytes // len(unit))


def _a_prompt() -> bytes:
    prompt = kserve.ModelInferRequest()
    tensor = prompt.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    tensor.contents.bytes_contents.append(b"a")
    return prompt.SerializeToString()


def _tensor(name: str, datatype: str, unit: bytes) -> Shape:
    """A tensor of one element by its shape that has `unit` repeated in it."""
    head = (
        _length_delimited(_NAME, name.encode())
        + _length_delimited(_DATATYPE, datatype.encode())
        + _tag(_TENSOR_SHAPE, _VARINT)
        + b"\1"
    )
    return lambda size: _length_delimited(_INPUTS, head + unit * (size // len(unit)))


def _contents(name: str, datatype: str, unit: bytes) -> Shape:
    """The same with `unit` repeated in its contents."""

    def shape(size_bytes: int) -> bytes:
        inside = _length_delimited(_CONTENTS, unit * (size_bytes // len(unit)))
        return _tensor(name, datatype, inside)(len(inside))

    return shape


def _packed_numbers(size_bytes: int) -> bytes:
    inside = _length_delimited(_CONTENTS, _length_delimited(_INT_CONTENTS, b"\1" * size_bytes))
    return _tensor("input_ids", "INT32", inside)(len(inside))


def _raw_tensor(name: str, datatype: str, unit: bytes, elements: int | None = None) -> Shape:
    """Raw contents; the shape is that of `elements`, by default of as many as there are units."""

    def shape(size_bytes: int) -> bytes:
        count = size_bytes // len(unit)
        message = kserve.ModelInferRequest()
        message.inputs.add(name=name, datatype=datatype, shape=[elements or count])
        message.raw_input_contents.append(unit * count)
        return message.SerializeToString()

    return shape


def _distinct_parameters(size_bytes: int) -> bytes:
    def entry(number: int) -> bytes:
        value = _length_delimited(2, _tag(2, _VARINT) + b"\1")
        return _length_delimited(_PARAMETERS, _length_delimited(1, str(number).encode()) + value)

    count = size_bytes // len(entry(10**7))
    return _a_prompt() + b"".join(entry(10**7 + n) for n in range(count))


def _long_text(number: int) -> Shape:
    return lambda size_bytes: _length_delimited(number, b"x" * size_bytes)


def _long_parameter_name(size_bytes: int) -> bytes:
    return _a_prompt() + _length_delimited(_PARAMETERS, _length_delimited(1, b"k" * size_bytes))


def _long_setting(size_bytes: int) -> bytes:
    message = kserve.ModelInferRequest()
    message.parameters["sampling_parameters"].string_param = '{"max_tokens":' + "7" * size_bytes
    return _a_prompt() + message.SerializeToString()


_GRPC_SHAPES: Mapping[str, Shape] = {
    "empty bytes_contents": _contents(
        "stop_words", "BYTES", _length_delimited(_BYTES_CONTENTS, b"")
    ),
    "empty bytes_contents of the prompt": _contents(
        "text_input", "BYTES", _length_delimited(_BYTES_CONTENTS, b"")
    ),
    "numbers one by one": _contents("input_ids", "INT32", _tag(_INT_CONTENTS, _VARINT) + b"\1"),
    "numbers packed one by one": _contents(
        "input_ids", "INT32", _length_delimited(_INT_CONTENTS, b"\1")
    ),
    "packed numbers": _packed_numbers,
    "floats one by one": _contents(
        "temperature", "FP32", _tag(_FP32_CONTENTS, _FIXED32) + bytes(4)
    ),
    "contents again and again": _tensor(
        "text_input",
        "BYTES",
        _length_delimited(_CONTENTS, _length_delimited(_BYTES_CONTENTS, b"")),
    ),
    "dimensions one by one": _tensor("text_input", "BYTES", _tag(_TENSOR_SHAPE, _VARINT) + b"\1"),
    "parameters of a tensor": _tensor(
        "text_input", "BYTES", _length_delimited(_TENSOR_PARAMETERS, b"")
    ),
    "empty inputs": _repeated(_length_delimited(_INPUTS, b"")),
    "equal inputs": _repeated(_a_prompt()),
    "empty outputs": _repeated(_length_delimited(_OUTPUTS, b"")),
    "equal outputs": _repeated(
        _length_delimited(_OUTPUTS, _length_delimited(_NAME, b"text_output"))
    ),
    "empty raw contents": _repeated(_length_delimited(_RAW, b"")),
    "empty parameters": _repeated(_length_delimited(_PARAMETERS, b"")),
    "one parameter again and again": _repeated(
        _length_delimited(_PARAMETERS, _length_delimited(1, b"a"))
    ),
    "distinct parameters": _distinct_parameters,
    "unknown numbers": _repeated(_tag(_UNKNOWN, _VARINT) + b"\1"),
    "unknown fixed numbers": _repeated(_tag(_UNKNOWN, _FIXED64) + bytes(8)),
    "unknown empty fields": _repeated(_length_delimited(_UNKNOWN, b"")),
    "unknown fields in tensors": _tensor("text_input", "BYTES", _length_delimited(_UNKNOWN, b"")),
    "groups, never closed": _repeated(_tag(_UNKNOWN, _GROUP)),
    "the id again and again": _repeated(_length_delimited(_ID, b"a")),
    "a long id": _long_text(_ID),
    "a long name of a model": _long_text(1),
    "a long version": _long_text(2),
    "a long name of a parameter": _long_parameter_name,
    "a long setting": _long_setting,
    "a long prompt": _raw_tensor("text_input", "BYTES", b"\1\0\0\0a", 1),
    "raw ids": _raw_tensor("input_ids", "INT32", struct.pack("<i", 1)),
    "raw empty strings": _raw_tensor("stop_words", "BYTES", bytes(4)),
    "raw strings of 4 GiB": _raw_tensor("stop_words", "BYTES", struct.pack("<I", 2**32 - 1)),
    "raw ids of an absurd shape": _raw_tensor("input_ids", "INT32", bytes(4), 2**62),
    "raw strings of an absurd shape": _raw_tensor("bad_words", "BYTES", bytes(4), 2**62),
    "zero bytes": lambda size_bytes: bytes(size_bytes),
    "bytes of ones": lambda size_bytes: b"\xff" * size_bytes,
}
