"""Compressed requests and answers, over both protocols; and what a small message can hide."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import sys
import tracemalloc
import zlib
from asyncio import to_thread
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.gateway.kserve.compression import (
    Coding,
    accepted_coding,
    pack,
    unpack,
)
from paraserve_scheduler.gateway.kserve.errors import TooLarge
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    make_config,
    make_request,
    serving,
    text_of,
)
from tests.support.gateway_fakes import Context, answer, one_answer
from tests.support.limits import HANG_S

_LIMIT_BYTES = 10_000
_BOMB_BYTES = 50_000_000
_LONG = "word " * 1000
_COMPRESSIONS = [
    (grpc.Compression.Gzip, b"\x1f\x8b"),
    (grpc.Compression.Deflate, b"\x78"),
]


async def long_answer(
    request: kserve.ModelInferRequest, _context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    yield answer(request, _LONG, is_final=True)


def raw_channel(cluster: GatewayHarness) -> grpc.aio.Channel:
    """A channel that hands compressed messages on as they are."""
    options = (("grpc.per_message_decompression", 0),)
    return grpc.aio.insecure_channel(cluster.gateway.grpc_address, options=options)


async def raw_infer(
    cluster: GatewayHarness, data: bytes, compression: grpc.Compression | None = None
) -> bytes:
    """Call ModelInfer with these bytes; return the response's as they came, still compressed."""
    async with raw_channel(cluster) as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        response: bytes = await call(data, compression=compression)
        return response


def bomb(coding: Coding) -> bytes:
    return pack(bytes(_BOMB_BYTES), coding)


@given(st.binary(), st.sampled_from(Coding), st.integers(0, 40))
def test_what_is_packed_unpacks_to_the_same_unless_it_is_too_large(
    data: bytes, coding: Coding, limit_bytes: int
) -> None:
    if len(data) <= limit_bytes:
        assert unpack(pack(data, coding), limit_bytes) == data
    else:
        with pytest.raises(TooLarge, match=f"larger than the {limit_bytes} bytes"):
            unpack(pack(data, coding), limit_bytes)


@given(st.binary(max_size=60))
def test_whatever_is_to_be_unpacked_is_unpacked_or_refused(data: bytes) -> None:
    with contextlib.suppress(InvalidRequest, TooLarge):
        assert len(unpack(data, 50)) <= 50


@pytest.mark.parametrize("coding", Coding)
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x"])
def test_what_is_cut_off_or_goes_on_is_refused(
    coding: Coding, damage: Callable[[bytes], bytes]
) -> None:
    with pytest.raises(InvalidRequest, match="cannot be unpacked"):
        unpack(damage(pack(b"a text", coding)), 100)


@pytest.mark.parametrize("coding", Coding)
def test_a_bomb_is_refused_before_it_is_unpacked(coding: Coding) -> None:
    packed = bomb(coding)
    tracemalloc.start()
    with pytest.raises(TooLarge):
        unpack(packed, _LIMIT_BYTES)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 20 * _LIMIT_BYTES < _BOMB_BYTES


@pytest.mark.parametrize(
    ("header", "coding"),
    [
        ("", None),
        ("identity", None),
        ("br, zstd", None),
        ("gzip", Coding.GZIP),
        ("deflate", Coding.DEFLATE),
        ("deflate, gzip", Coding.GZIP),
        ("gzip;q=0.5, deflate;q=0.8", Coding.DEFLATE),
        ("GZIP ; q=1", Coding.GZIP),
        ("gzip;q=0", None),
        ("gzip;q=much", None),
    ],
)
def test_the_client_says_which_coding_it_likes_best(header: str, coding: Coding | None) -> None:
    assert accepted_coding(header) == coding


@pytest.mark.parametrize(("compression", "start"), _COMPRESSIONS)
async def test_a_compressed_grpc_request_is_answered_in_the_same_compression(
    compression: grpc.Compression, start: bytes
) -> None:
    async with serving() as cluster:
        cluster.triton.script = long_answer
        request = make_request(_LONG, stream=False)
        packed = await raw_infer(cluster, request.SerializeToString(), compression)
        assert packed.startswith(start)
        assert text_of(kserve.ModelInferResponse.FromString(unpack(packed, 10_000))) == _LONG
        assert cluster.triton.requests[0].inputs[0].contents.bytes_contents == [_LONG.encode()]


async def test_a_compressed_stream_is_answered_in_the_same_compression() -> None:
    async def only() -> AsyncIterator[bytes]:
        yield make_request(_LONG).SerializeToString()

    async with serving() as cluster, raw_channel(cluster) as channel:
        cluster.triton.script = long_answer
        call = channel.stream_stream(
            "/inference.GRPCInferenceService/ModelStreamInfer",
            request_serializer=bytes,
            response_deserializer=bytes,
        )
        (packed,) = [data async for data in call(only(), compression=grpc.Compression.Gzip)]
        entry = kserve.ModelStreamInferResponse.FromString(unpack(packed, 10_000))
        assert text_of(entry.infer_response) == _LONG


async def test_an_uncompressed_grpc_request_is_answered_uncompressed() -> None:
    async with serving() as cluster:
        cluster.triton.script = long_answer
        response = await raw_infer(cluster, make_request(stream=False).SerializeToString())
        assert text_of(kserve.ModelInferResponse.FromString(response)) == _LONG


@pytest.mark.parametrize(("compression", "_start"), _COMPRESSIONS)
async def test_compressed_streams_carry_several_requests(
    compression: grpc.Compression, _start: bytes
) -> None:
    async def requests() -> AsyncIterator[kserve.ModelInferRequest]:
        yield make_request(_LONG, id="a")
        yield make_request(_LONG, id="b")

    async with serving() as cluster:
        cluster.triton.script = long_answer
        stream = cluster.stub.ModelStreamInfer(requests(), compression=compression)
        responses = [entry.infer_response async for entry in stream]
        assert {response.id: text_of(response) for response in responses} == {
            "a": _LONG,
            "b": _LONG,
        }


@pytest.mark.parametrize("coding", Coding)
async def test_a_grpc_bomb_is_resource_exhausted(coding: Coding) -> None:
    async with serving(make_config(max_request_bytes=100_000), replicas=0) as cluster:
        with pytest.raises(grpc.aio.AioRpcError, match="larger than the 100000 bytes") as caught:
            await raw_infer(cluster, bomb(coding))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_a_grpc_message_over_the_limit_is_resource_exhausted(
    compression: grpc.Compression,
) -> None:
    async def only() -> AsyncIterator[kserve.ModelInferRequest]:
        yield make_request("a" * 2 * _LIMIT_BYTES)

    async with serving(make_config(max_request_bytes=_LIMIT_BYTES), replicas=0) as cluster:
        with pytest.raises(grpc.aio.AioRpcError, match="larger than") as caught:
            await cluster.stub.ModelInfer(
                make_request("a" * 2 * _LIMIT_BYTES), compression=compression
            )
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(grpc.aio.AioRpcError, match="larger than") as caught:
            async for _ in cluster.stub.ModelStreamInfer(only(), compression=compression):
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("data", "sentence"),
    [(b"\x1f\x8bx", "cannot be unpacked"), (b"\xff", "is no message of this call")],
)
async def test_grpc_bytes_that_are_no_message_are_an_invalid_argument(
    data: bytes, sentence: str
) -> None:
    async with serving(replicas=0) as cluster:
        with pytest.raises(grpc.aio.AioRpcError, match=sentence) as caught:
            await raw_infer(cluster, data)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("name", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
async def test_a_packed_body_is_read_and_answered_as_accepted(
    name: str, compress: Callable[[bytes], bytes]
) -> None:
    async with serving() as cluster:
        cluster.triton.script = long_answer
        headers = {"Content-Encoding": name, "Accept-Encoding": name}
        async with cluster.http.post(
            cluster.url(f"models/{DEPLOYMENT}/generate"),
            data=compress(json.dumps({"text_input": "hi"}).encode()),
            headers=headers,
        ) as response:
            assert response.headers["Content-Encoding"] == name
            assert int(response.headers["Content-Length"]) < len(_LONG)
            assert (await response.json())["text_output"] == _LONG


async def test_a_short_answer_and_an_error_are_never_packed() -> None:
    async with serving() as cluster:
        cluster.triton.script = one_answer
        for body in ({"text_input": "hi"}, {"text_input": "hi", "a" * 2000: [1]}):
            url = cluster.url(f"models/{DEPLOYMENT}/generate")
            async with cluster.http.post(url, data=json.dumps(body)) as response:
                assert "Content-Encoding" not in response.headers


@pytest.mark.parametrize("coding", Coding)
async def test_an_http_bomb_is_a_413(coding: Coding) -> None:
    async with serving(make_config(max_request_bytes=100_000), replicas=0) as cluster:
        url = cluster.url(f"models/{DEPLOYMENT}/infer")
        headers = {"Content-Encoding": coding}
        async with cluster.http.post(url, data=bomb(coding), headers=headers) as response:
            assert response.status == 413
            assert "larger than the 100000 bytes" in (await response.json())["error"]


async def test_a_coding_nobody_offered_is_a_415() -> None:
    async with serving(replicas=0) as cluster:
        url = cluster.url(f"models/{DEPLOYMENT}/generate")
        headers = {"Content-Encoding": "br"}
        async with cluster.http.post(url, data=b"x", headers=headers) as response:
            assert response.status == 415
            assert "'br'; use gzip, deflate or none" in (await response.json())["error"]


_TRITON_CLIENT = """
import itertools, sys
import numpy as np
import tritonclient.http as triton

with triton.InferenceServerClient(sys.argv[1]) as client:
    codings = (None, "gzip", "deflate")
    for packed_in, packed_out, binary in itertools.product(codings, codings, (True, False)):
        prompt = triton.InferInput("text_input", [1], "BYTES")
        text = np.array([b"word " * 1000], dtype=object)
        prompt.set_data_from_numpy(text, binary_data=binary)
        result = client.infer(
            "tiny",
            [prompt],
            outputs=[triton.InferRequestedOutput("text_output", binary_data=binary)],
            request_compression_algorithm=packed_in,
            response_compression_algorithm=packed_out,
        )
        (answer,) = result.as_numpy("text_output").tolist()
        assert answer in (b"word " * 1000, "word " * 1000), answer
    prompt.set_data_from_numpy(np.array([b"a" * 5_000_000], dtype=object))
    for packed_in in codings:
        try:
            client.infer("tiny", [prompt], request_compression_algorithm=packed_in)
        except triton.InferenceServerException as error:
            print(error.status())
"""


async def test_tritons_http_client_packs_and_unpacks_with_binary_tensors() -> None:
    """In a process of its own: that client patches the interpreter's sockets."""
    async with serving(make_config(max_request_bytes=1_000_000)) as cluster:
        cluster.triton.script = long_answer
        run = await to_thread(
            subprocess.run,
            [sys.executable, "-c", _TRITON_CLIENT, cluster.gateway.http_address],
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.split() == ["413"] * 3
        assert len(cluster.triton.requests) == 18
