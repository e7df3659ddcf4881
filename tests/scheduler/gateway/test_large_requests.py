"""Requests that are cheap to send and dear to read: where they are read, and what they cost."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from integration.support.hostile import grpc_messages, http_requests
from paraserve_backend.errors import InvalidRequest, ParaServeError, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.admission import CheckedRequest, admit
from paraserve_scheduler.gateway.kserve.errors import Overloaded, TooCostly, TooLarge
from paraserve_scheduler.gateway.kserve.message_tensors import make_raw, read_inputs
from paraserve_scheduler.gateway.large_requests import RequestReading
from paraserve_scheduler.gateway.reading import MAX_SMALL_BYTES, Form, UnreadRequest, read
from tests.support.gateway import (
    DEPLOYMENT,
    checked,
    make_config,
    make_request,
    read_stream,
    serving,
)
from tests.support.gateway_fakes import hanging, one_answer
from tests.support.limits import HANG_S

_MIB = 1 << 20


def generate(text: str, *, packed: bool = False) -> UnreadRequest:
    body = json.dumps({"text_input": text, "max_tokens": 3, "seed": 1}).encode()
    return UnreadRequest(
        form=Form.GENERATE,
        body=gzip.compress(body) if packed else body,
        is_packed=packed,
        deployment=DEPLOYMENT,
    )


def make_reading(
    *, max_request_bytes: int = 4 * _MIB, max_large_requests: int = 4, timeout_s: float = HANG_S
) -> RequestReading:
    return RequestReading(
        max_request_bytes=max_request_bytes,
        max_large_requests=max_large_requests,
        large_request_timeout_s=timeout_s,
    )


def children() -> set[int]:
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("characters", [10, MAX_SMALL_BYTES + 1, 3 * _MIB])
async def test_a_request_is_read_alike_here_and_there(characters: int, packed: bool) -> None:
    reading = make_reading()
    reading.start()
    try:
        got = await reading.read(generate("a" * characters, packed=packed))
    finally:
        await reading.stop()
    here = read(generate("a" * characters))
    assert got.message == here.message
    assert got.checked == here.checked
    assert isinstance(got.checked, CheckedRequest)
    assert got.checked.prompt_bytes == characters
    assert got.checked.asked.text is None


async def test_a_large_message_comes_back_with_raw_contents_alone() -> None:
    reading = make_reading()
    reading.start()
    message = make_request("a" * 50_000)
    message.MergeFromString(b"\xc0\x3e\1" * 10)  # field 1000, which is unknown
    unread = UnreadRequest(form=Form.MESSAGE, body=message.SerializeToString(), is_packed=False)
    try:
        got = (await reading.read(unread)).message
    finally:
        await reading.stop()
    assert got.raw_input_contents[0] == struct.pack("<I", 50_000) + b"a" * 50_000
    assert got.raw_input_contents[1] == b"\1"
    assert not any(tensor.HasField("contents") for tensor in got.inputs)
    assert got.ByteSize() < 50_200


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1), st.lists(st.binary(), max_size=64))
def test_raw_contents_are_the_typed_ones(ids: list[int], words: list[bytes]) -> None:
    message = kserve.ModelInferRequest(model_name=DEPLOYMENT)
    prompt = message.inputs.add(name="input_ids", datatype="INT32", shape=[len(ids)])
    prompt.contents.int_contents.extend(ids)
    stops = message.inputs.add(name="stop_words", datatype="BYTES", shape=[len(words)])
    stops.contents.bytes_contents.extend(words)
    typed = read_inputs(message).elements
    make_raw(message)
    assert list(read_inputs(message).elements["input_ids"]) == ids == typed["input_ids"]
    assert list(read_inputs(message).elements["stop_words"]) == words


async def test_more_large_requests_than_may_be_are_told_to_come_again() -> None:
    reading = make_reading(max_large_requests=2)
    reading.start()
    large = generate("a" * _MIB)
    try:
        first = [asyncio.create_task(reading.read(large)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="reads 2 large requests already") as caught:
            await reading.read(large)
        assert caught.value.retry_after_s > 0
        assert (await reading.read(generate("small"))).checked
        await asyncio.gather(*first)
        await reading.read(large)
    finally:
        await reading.stop()


async def test_a_client_that_leaves_does_not_mix_up_what_others_get() -> None:
    reading = make_reading(max_large_requests=100)
    reading.start()
    try:
        leaving = [asyncio.create_task(reading.read(generate("x" * _MIB))) for _ in range(5)]
        await asyncio.sleep(0)
        for task in leaving[::2]:
            task.cancel()
        got = await reading.read(generate("y" * 100_000))
        assert got.message.raw_input_contents[0][4:] == b"y" * 100_000
    finally:
        await reading.stop()


async def test_reading_that_takes_too_long_is_refused_and_costs_the_process_nothing() -> None:
    before = children()
    reading = make_reading(timeout_s=0.02)
    reading.start()
    try:
        body = b'{"input_ids":[' + b"[]," * 1_000_000 + b"1]}"
        costly = UnreadRequest(form=Form.GENERATE, body=body, is_packed=False, deployment="d")
        pids: list[int] = []
        for _ in range(2):
            with pytest.raises(TooCostly, match="takes too much time"):
                await reading.read(costly)
            pids += children() - before
        assert len(set(pids)) == 1
    finally:
        await reading.stop()


async def test_a_process_that_is_killed_is_replaced() -> None:
    before = children()
    reading = make_reading()
    reading.start()
    try:
        await reading.read(generate("a" * 100_000))
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="retry later"):
            await reading.read(generate("a" * 100_000))
        assert (await reading.read(generate("a" * 100_000))).checked
    finally:
        await reading.stop()
    assert children() <= before


async def test_the_process_ends_with_its_gateway() -> None:
    before = children()
    async with serving() as cluster:
        body = json.dumps({"text_input": "a" * 100_000}).encode()
        cluster.triton.script = one_answer
        async with cluster.http.post(cluster.url(f"models/{DEPLOYMENT}/generate"), data=body) as r:
            assert r.status == 200
        assert children() - before
    assert children() <= before


@pytest.mark.parametrize(
    ("field", "count", "sentence"),
    [
        ("inputs", 257, "has 257 inputs"),
        ("outputs", 300, "has 300 outputs"),
        ("parameters", 1000, "has 1000 parameters"),
    ],
)
def test_a_message_has_a_limited_number_of_entries(field: str, count: int, sentence: str) -> None:
    request = make_request()
    for number in range(count):
        if field == "parameters":
            request.parameters[str(number)].bool_param = True
        elif field == "outputs":
            request.outputs.add(name="text_output")
        elif number > 1:
            request.inputs.add(name="text_input")
    with pytest.raises(InvalidRequest, match=f"{sentence} in one place; 256 at most"):
        checked(request)


@pytest.mark.parametrize(
    ("route", "text", "ids", "numbers"),
    [
        (pb.Route(max_prompt_bytes=100), "a" * 101, 0, ("101", "100")),
        (pb.Route(max_prompt_bytes=100), "ä" * 51, 0, ("102", "100")),
        (pb.Route(max_context=8), "", 8, ("8 tokens", "holds 8")),
        (pb.Route(max_context=8), "", 9, ("9 tokens", "holds 8")),
    ],
)
def test_a_prompt_that_cannot_fit_is_refused_with_both_numbers(
    route: pb.Route, text: str, ids: int, numbers: tuple[str, str]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        admit(checked(_prompt(text=text, ids=ids)), route, may_stream=True)
    assert all(number in str(caught.value) for number in numbers)


def test_a_prompt_that_may_fit_is_admitted() -> None:
    route = pb.Route(max_context=8, max_prompt_bytes=100)
    for prompt in (_prompt(text="a" * 100), _prompt(ids=7)):
        admit(checked(prompt), route, may_stream=True)
    # 0 says that the scheduler does not know it.
    admit(checked(_prompt(text="a" * 9000)), pb.Route(), may_stream=True)


def _prompt(*, text: str = "", ids: int = 0) -> kserve.ModelInferRequest:
    if not ids:
        return make_request(text)
    request = kserve.ModelInferRequest(model_name=DEPLOYMENT)
    request.inputs.add(name="input_ids", datatype="INT32", shape=[ids])
    request.raw_input_contents.append(bytes(4 * ids))
    return request


async def test_a_prompt_that_cannot_fit_wakes_nobody() -> None:
    async with serving(replicas=0) as cluster:
        await cluster.publish(max_prompt_bytes=1000)
        body = json.dumps({"text_input": "a" * 60_000}).encode()
        url = cluster.url(f"models/{DEPLOYMENT}/generate")
        async with cluster.http.post(url, data=body) as response:
            assert response.status == 400
            assert "60000 bytes" in (await response.json())["error"]
        assert not any(demand.waiting for r in cluster.scheduler.reports for demand in r.demands)


async def test_of_one_stream_so_many_requests_run_and_the_next_waits() -> None:
    async with serving(make_config(max_stream_requests=3)) as cluster:
        cluster.triton.script = hanging(1)
        is_over = asyncio.Event()

        async def many() -> AsyncIterator[kserve.ModelInferRequest]:
            for number in range(6):
                yield make_request(id=str(number))
            await is_over.wait()

        stream = cluster.stub.ModelStreamInfer(many())
        running = [(await anext(aiter(stream))).infer_response.id for _ in range(3)]
        assert set(running) == {"0", "1", "2"}
        # Another stream is answered, and by then the fourth would have been, too.
        cluster.triton.script = one_answer
        assert len(await read_stream(cluster, make_request(id="other", stream=False))) == 1
        assert sorted(r.id for r in cluster.triton.requests) == ["0", "1", "2", "other"]
        stream.cancel()


async def test_when_one_of_a_full_stream_ends_the_next_is_read() -> None:
    async with serving(make_config(max_stream_requests=1)) as cluster:
        cluster.triton.script = one_answer

        async def many() -> AsyncIterator[kserve.ModelInferRequest]:
            for number in range(5):
                yield make_request(id=str(number))

        stream = cluster.stub.ModelStreamInfer(many())
        answers = [entry.infer_response.id async for entry in stream]
        assert answers == ["0", "1", "2", "3", "4"]


def test_every_small_hostile_request_is_read_or_refused_with_one_short_sentence() -> None:
    for request in http_requests(DEPLOYMENT, sizes={"32 KiB"}):
        form = Form.INFER if request.path.endswith("infer") else Form.GENERATE
        if not request.headers:
            _read_or_refused(
                UnreadRequest(form=form, body=request.body, is_packed=False, deployment="d")
            )
    for message in grpc_messages(DEPLOYMENT, sizes={"32 KiB"}):
        _read_or_refused(UnreadRequest(form=Form.MESSAGE, body=message.message, is_packed=False))


def _read_or_refused(unread: UnreadRequest) -> None:
    try:
        got = read(unread)
    except (InvalidRequest, TooLarge) as error:
        refusal: ParaServeError = error
    else:
        if isinstance(got.checked, CheckedRequest):
            return
        refusal = got.checked
        assert got.message.ByteSize() < 5000
    assert len(str(refusal)) < 600
