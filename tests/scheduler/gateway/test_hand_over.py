"""Requests that change their replica in the middle, as their client sees them: not at all."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

import pytest
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.resume import HAND_OVER_TO, RESUME, Resume
from paraserve_backend.protocol.sampling import ChosenToken
from tests.support.gateway import (
    GatewayHarness,
    make_request,
    read_stream,
    serving,
)
from tests.support.gateway_fakes import (
    Context,
    Script,
    answer,
    empty_final,
)

LAST = 8


def token(token_id: int) -> ChosenToken:
    return ChosenToken(token_id=token_id, logprob=0.0, ranking=None)


def resume_of(request: kserve.ModelInferRequest) -> Resume:
    return Resume.decode(request.parameters[RESUME].string_param)


def piece(request: kserve.ModelInferRequest, token_id: int) -> kserve.ModelInferResponse:
    response = answer(request, str(token_id), is_final=token_id == LAST)
    response.outputs.add(name="output_ids", datatype="INT32", shape=[1])
    response.raw_output_contents.append(struct.pack("<i", token_id))
    return response


def string(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def move(request: kserve.ModelInferRequest, resume: Resume) -> kserve.ModelInferResponse:
    response = empty_final(request)
    for name, value in ((HAND_OVER_TO, "tiny.2"), (RESUME, resume.encode())):
        response.outputs.add(name=name, datatype="BYTES", shape=[1])
        response.raw_output_contents.append(string(value))
    return response


def counting(stop_after: int, hand_over: asyncio.Event | None = None) -> Script:
    """A replica counts from where the request is; tiny.1 stops, any other one goes to the end.

    When the event is set tiny.1 hands its request over.
    """

    async def script(
        request: kserve.ModelInferRequest, context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        known = resume_of(request)
        done = len(known.tokens)
        is_first = request.model_name == "tiny.1"
        for token_id in range(done + 1, (stop_after if is_first else LAST) + 1):
            yield piece(request, token_id)
        if not is_first:
            return
        if hand_over is not None:
            await hand_over.wait()
            ids = tuple(map(token, range(1, stop_after + 1)))
            resume = Resume(ticket=7, seed=known.seed, max_tokens=known.max_tokens, tokens=ids)
            yield move(request, resume)
        await asyncio.Event().wait()

    return script


@contextlib.asynccontextmanager
async def serving_with(script: Script) -> AsyncIterator[GatewayHarness]:
    async with serving() as cluster:
        for triton in cluster.tritons:
            triton.script = script
        yield cluster


async def texts(cluster: GatewayHarness) -> list[str]:
    entries = await read_stream(cluster, make_request())
    assert not [entry.error_message for entry in entries if entry.error_message]
    return [
        entry.infer_response.raw_output_contents[0][4:].decode()
        for entry in entries
        if entry.infer_response.outputs
    ]


@pytest.mark.parametrize("stop_after", [0, 1, 5])
async def test_a_request_that_is_handed_over_goes_on_at_the_named_replica(stop_after: int) -> None:
    hand_over = asyncio.Event()
    async with serving_with(counting(stop_after, hand_over)) as cluster:
        asked = asyncio.create_task(texts(cluster))
        await cluster.scheduler.demand(lambda demand: demand.in_flight == 1)
        # As the scheduler does: the successor takes the old replica's place in the table.
        await cluster.publish(cluster.endpoint(3), cluster.endpoint(2))
        hand_over.set()
        assert await asked == [str(number) for number in range(1, LAST + 1)]
        (first,), (second,) = (triton.requests for triton in cluster.tritons)
        assert (first.model_name, second.model_name) == ("tiny.1", "tiny.2")
        assert resume_of(first).tokens == ()
        assert resume_of(second).ticket == 7
        assert resume_of(second).seed == resume_of(first).seed


async def test_a_stream_of_a_lost_replica_goes_on_at_the_next_with_what_the_client_has() -> None:
    async with serving_with(counting(3)) as cluster:
        asked = asyncio.create_task(texts(cluster))
        await cluster.scheduler.demand(
            lambda demand: any(each.first_token_s for each in demand.replicas)
        )
        await cluster.publish(cluster.endpoint(2), lost_replicas=["tiny.1"])
        assert await asked == [str(number) for number in range(1, LAST + 1)]
        resume = resume_of(cluster.tritons[1].requests[-1])
        # It may have been lost before all three had come.
        assert 1 <= len(resume.tokens) <= 3
        assert resume.ticket == 0


async def test_a_target_that_vanished_is_replaced_by_any_other_replica() -> None:
    hand_over = asyncio.Event()
    async with serving_with(counting(2, hand_over)) as cluster:
        asked = asyncio.create_task(texts(cluster))
        await cluster.scheduler.demand(lambda demand: demand.in_flight == 1)
        await cluster.publish(cluster.endpoint(2, address="127.0.0.1:1"), cluster.endpoint(3))
        hand_over.set()
        assert await asked == [str(number) for number in range(1, LAST + 1)]
        assert cluster.triton.requests[-1].model_name == "tiny.3"


async def test_what_the_deployments_engine_cannot_do_is_refused_before_it_wakes() -> None:
    async with serving(replicas=0) as cluster:
        await cluster.publish(engine="vllm")
        request = make_request()
        words = request.inputs.add(name="bad_words", datatype="BYTES", shape=[1])
        words.contents.bytes_contents.append(b"no")
        (entry,) = await read_stream(cluster, request)
        assert entry.error_message == (
            "'bad_words' is not something the engine vllm can do; leave it out."
        )


async def test_what_the_engine_cannot_go_on_with_stays_where_it_is() -> None:
    async with serving() as cluster:
        await cluster.publish(cluster.endpoint(), engine="vllm")
        request = make_request()
        penalty = request.inputs.add(name="presence_penalty", datatype="FP32", shape=[1])
        penalty.contents.fp32_contents.append(0.5)
        await read_stream(cluster, request)
        await read_stream(cluster, make_request())
        penalised, plain = cluster.triton.requests
        assert (RESUME in penalised.parameters, RESUME in plain.parameters) == (False, True)
