"""What a client is told when its replica is silent, lost or fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as kserve

from paraserve_scheduler.gateway.kserve.errors import clean_message
from tests.support.gateway import (
    GatewayHarness,
    make_config,
    make_request,
    serving,
    text_of,
)
from tests.support.gateway_fakes import (
    Context,
    answer,
    failing,
    hanging,
    one_answer,
)


async def failure(cluster: GatewayHarness) -> tuple[grpc.StatusCode, str]:
    """Return how a request that is streamed at the replica fails for its client."""
    stream = cluster.stub.ModelStreamInfer(_requests(), metadata=(("triton_grpc_error", "true"),))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stream:
            pass
    return caught.value.code(), caught.value.details() or ""


async def _requests() -> AsyncIterator[kserve.ModelInferRequest]:
    yield make_request()


async def test_a_replica_without_a_first_token_runs_into_its_own_limit() -> None:
    # Long enough for the request to reach the replica.
    async with serving(make_config(first_token_timeout_s=1.0)) as cluster:
        cluster.triton.script = hanging(0)
        code, sentence = await failure(cluster)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not send a first response within 1 s" in sentence
        await cluster.triton.cancelled.wait()


async def test_a_replica_that_falls_silent_runs_into_the_limit_between_tokens() -> None:
    async with serving(make_config(inter_token_timeout_s=0.05)) as cluster:
        cluster.triton.script = hanging(2)
        code, sentence = await failure(cluster)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not send a next token within 0.05 s" in sentence


async def test_waiting_for_a_replica_does_not_count_as_waiting_for_its_first_token() -> None:
    async with serving(make_config(unstreamed_timeout_s=2.0), replicas=0) as cluster:
        cluster.triton.script = one_answer
        call = cluster.stub.ModelInfer(make_request(stream=False))
        # After the first one, a report comes every second: it waits longer than its limit.
        await cluster.held()
        seen = len(cluster.scheduler.reports)
        await cluster.scheduler.demand(lambda _: len(cluster.scheduler.reports) > seen + 2)
        await cluster.publish(cluster.endpoint())
        assert text_of(await call) == "whole text"


async def test_a_request_that_is_not_streamed_has_a_limit_of_its_own() -> None:
    async with serving(make_config(unstreamed_timeout_s=0.05)) as cluster:
        cluster.triton.script = hanging(0)
        with pytest.raises(grpc.aio.AioRpcError, match=r"within 0\.05 s"):
            await cluster.stub.ModelInfer(make_request(stream=False))


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNIMPLEMENTED,
    ],
)
async def test_a_models_own_error_keeps_its_code_and_sentence(code: grpc.StatusCode) -> None:
    async with serving() as cluster:
        cluster.triton.script = failing(f"{code.name}: The model 'tiny.1' says no.")
        assert await failure(cluster) == (code, "The model 'tiny' says no.")
        assert len(cluster.triton.requests) == 1


async def test_an_internal_error_loses_its_traceback_and_paths() -> None:
    text = (
        "Failed to process the request(s) for model 'tiny.1_0_0', message: ValueError: boom"
        "\n\nAt:\n  /opt/models/tiny.1/1/model.py(53): execute\n"
    )
    async with serving() as cluster:
        cluster.triton.script = failing(text)
        code, sentence = await failure(cluster)
        assert code is grpc.StatusCode.INTERNAL
        assert sentence == "The model of 'tiny' failed: ValueError: boom"


async def test_a_replica_lost_in_the_middle_of_a_stream_is_unavailable() -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(1)
        stream = cluster.stub.ModelStreamInfer(
            _requests(), metadata=(("triton_grpc_error", "true"),)
        )
        responses = aiter(stream)
        await anext(responses)
        await cluster.server.stop(None)
        with pytest.raises(grpc.aio.AioRpcError, match="was lost") as caught:
            await anext(responses)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN])
async def test_a_stream_whose_connection_is_closed_is_another_replicas_work(
    code: grpc.StatusCode,
) -> None:
    async def closed(
        request: kserve.ModelInferRequest, context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        # Both are seen when a tritonserver is killed; the channel may not yet know it.
        await context.abort(code, "Stream removed (Socket closed)")
        yield answer(request, "never")

    async with serving() as cluster:
        await cluster.publish(cluster.endpoint(1), cluster.endpoint(2))
        cluster.tritons[0].script = closed
        cluster.tritons[1].script = one_answer
        assert text_of(await cluster.stub.ModelInfer(make_request(stream=False))) == "whole text"
        assert len(cluster.tritons[0].requests) == 1


async def test_after_three_replicas_refused_the_client_hears_of_it() -> None:
    async with serving() as cluster:
        await cluster.publish(*(cluster.endpoint(n, address="127.0.0.1:1") for n in range(1, 6)))
        code, sentence = await failure(cluster)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert sentence == "The replica of 'tiny' has just gone; retry."


async def test_a_dead_process_behind_a_live_server_is_another_replicas_work() -> None:
    async with serving(replicas=2) as cluster:
        dead = "Failed to process the request(s), message: Stub process 'x_0_0' is not healthy."
        cluster.triton.script = failing(dead)
        cluster.tritons[1].script = one_answer
        answered = await cluster.stub.ModelInfer(make_request(stream=False))
        assert text_of(answered) == "whole text"


async def test_a_slot_that_is_another_replica_by_now_is_another_replicas_work() -> None:
    async with serving() as cluster:
        await cluster.publish(cluster.endpoint(1), cluster.endpoint(2))
        cluster.tritons[0].script = failing("NOT_FOUND: Replica tiny.1 is not here.")
        cluster.tritons[1].script = one_answer
        assert text_of(await cluster.stub.ModelInfer(make_request(stream=False))) == "whole text"
        asked = [request for triton in cluster.tritons for request in triton.requests]
        named = [request.parameters["paraserve_replica"].string_param for request in asked]
        assert named == ["tiny.1", "tiny.2"]


async def test_requests_go_to_the_replica_with_fewest() -> None:
    async with serving(replicas=2) as cluster:
        for each in cluster.tritons:
            each.script = hanging(1)
        streams = [cluster.stub.ModelStreamInfer(_requests()) for _ in range(4)]
        await asyncio.gather(*(anext(aiter(stream)) for stream in streams))
        assert [len(each.requests) for each in cluster.tritons] == [2, 2]
        for stream in streams:
            stream.cancel()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The sentence.", "The sentence."),
        ("[request id: 7] The sentence.", "The sentence."),
        ("No file /models/tiny/config.json here.", "No file (path) here."),
        ("oops\n  File x\n  more", "oops"),
        ("", "no reason given"),
    ],
)
def test_server_texts_are_reduced_to_a_sentence(text: str, expected: str) -> None:
    assert clean_message(text) == expected


async def test_a_client_that_leaves_after_the_final_response_cancels_nothing() -> None:
    may_end, has_ended = asyncio.Event(), asyncio.Event()

    async def slow_to_end(
        request: kserve.ModelInferRequest, _context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        yield answer(request, "all", is_final=True)
        await may_end.wait()
        has_ended.set()

    async with serving() as cluster:
        cluster.triton.script = slow_to_end
        stream = cluster.stub.ModelStreamInfer(_requests())
        entry = await anext(aiter(stream))
        assert not entry.error_message
        stream.cancel()
        # The gateway has digested the cancel once it reports the request as gone.
        await cluster.scheduler.demand(lambda demand: demand.arrived == 1 and not demand.in_flight)
        may_end.set()
        await has_ended.wait()
        assert not cluster.triton.cancelled.is_set()
