"""Requests whose replicas die, fail or fall silent: over real gRPC, as their clients see it."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.resume import RESUME, Resume
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    make_config,
    make_request,
    read_stream,
    serving,
    text_of,
)
from tests.support.gateway_fakes import (
    Context,
    Script,
    StreamError,
    answer,
    failing,
    hanging,
    one_answer,
)

_LAST = 6
_UNHEALTHY = "Failed to process the request(s), message: Stub process 'x_0_0' is not healthy."
_FAILED_PASS = "UNAVAILABLE: The pipeline lost a stage."


def counts(until: int, end: str | None = None) -> Script:
    """Go on counting from where the request is, up to `until`, then hang or fail."""

    async def script(
        request: kserve.ModelInferRequest, context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        done = len(Resume.decode(request.parameters[RESUME].string_param).tokens)
        for number in range(done + 1, until + 1):
            response = answer(request, str(number), is_final=number == _LAST)
            response.outputs.add(name="output_ids", datatype="INT32", shape=[1])
            response.raw_output_contents.append(struct.pack("<i", number))
            yield response
        if until < _LAST:
            if end is None:
                await asyncio.Event().wait()
            raise StreamError(end)

    return script


async def resets(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
    yield answer(request, "never", is_final=True)


async def says_nothing(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    await asyncio.Event().wait()
    yield answer(request, "never", is_final=True)


async def streamed(cluster: GatewayHarness) -> list[str]:
    """The texts of one streamed answer, its errors among them."""
    return [
        entry.error_message or text_of(entry.infer_response)
        for entry in await read_stream(cluster, make_request())
    ]


async def failure(cluster: GatewayHarness, text: str = "hi") -> tuple[str, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.stub.ModelInfer(make_request(text, stream=False))
    return caught.value.code().name, caught.value.details() or ""


ALL = [str(number) for number in range(1, _LAST + 1)]


@pytest.mark.parametrize("death", [failing(_UNHEALTHY), resets])
async def test_a_request_that_two_replicas_died_with_gets_no_third(death: Script) -> None:
    async with serving() as cluster:
        await cluster.publish(*map(cluster.endpoint, (1, 2, 3)))
        for triton in cluster.tritons:
            triton.script = death
        code, sentence = await failure(cluster)
        assert (code, "retry" in sentence) == ("INTERNAL", False)
        assert sum(len(triton.requests) for triton in cluster.tritons) == 2
        # The same is refused now, whoever sends it, and reaches nobody.
        assert await failure(cluster) == (code, sentence)
        assert sum(len(triton.requests) for triton in cluster.tritons) == 2


async def test_a_deadly_request_wakes_nothing() -> None:
    async with serving(replicas=2) as cluster:
        for triton in cluster.tritons:
            triton.script = failing(_UNHEALTHY)
        await failure(cluster)
        await cluster.publish()
        arrived = (await cluster.scheduler.demand(lambda _: True)).arrived
        await failure(cluster)
        seen = len(cluster.scheduler.reports)
        demand = await cluster.scheduler.demand(lambda _: len(cluster.scheduler.reports) > seen)
        assert (demand.waiting, demand.arrived) == (0, max(arrived, 1))


async def test_bystanders_are_not_sent_to_a_replica_that_has_just_died() -> None:
    async with serving(replicas=2) as cluster:
        cluster.triton.script = failing(_UNHEALTHY)
        cluster.tritons[1].script = one_answer
        for number in range(4):
            request = make_request(f"bystander {number}", stream=False)
            assert text_of(await cluster.stub.ModelInfer(request)) == "whole text"
        assert len(cluster.triton.requests) == 1


async def test_a_death_in_mid_stream_is_one_of_the_two() -> None:
    async with serving(replicas=2) as cluster:
        cluster.triton.script = counts(2, _UNHEALTHY)
        cluster.tritons[1].script = counts(4, _UNHEALTHY)
        *texts, error = await streamed(cluster)
        assert texts == ALL[:4]
        assert "retry" not in error
        (refused,) = await streamed(cluster)
        assert refused == error


@pytest.mark.parametrize("never_sent", ["127.0.0.1:1", "unknown model", "another slot"])
async def test_who_never_took_a_request_has_not_died_with_it(never_sent: str) -> None:
    async with serving() as cluster:
        address = never_sent if ":" in never_sent else None
        cluster.triton.script = failing(
            "NOT_FOUND: Another replica is here."
            if never_sent == "another slot"
            else "Request for unknown model: 'tiny.1' is not found"
        )
        cluster.tritons[1].script = failing(_UNHEALTHY)
        await cluster.publish(
            *(cluster.endpoint(n, address=address) for n in (1, 3)), cluster.endpoint(2)
        )
        call = asyncio.ensure_future(cluster.stub.ModelInfer(make_request(stream=False)))
        # Two refusals and one death: it still waits for another one.
        await cluster.held()
        await cluster.publish(cluster.endpoint(4))
        cluster.tritons[1].script = one_answer
        assert text_of(await call) == "whole text"


async def test_a_pass_that_fails_in_mid_stream_is_another_replicas_work() -> None:
    async with serving(replicas=2) as cluster:
        cluster.triton.script = counts(3, _FAILED_PASS)
        cluster.tritons[1].script = counts(_LAST)
        assert await streamed(cluster) == ALL
        assert [len(triton.requests) for triton in cluster.tritons] == [1, 1]


async def test_a_pass_that_fails_waits_for_the_next_replica_if_there_is_no_other() -> None:
    async with serving() as cluster:
        cluster.triton.script = counts(3, _FAILED_PASS)
        cluster.tritons[1].script = counts(_LAST)
        asked = asyncio.create_task(streamed(cluster))
        await cluster.held()
        assert len(cluster.triton.requests) == 1
        await cluster.publish(cluster.endpoint(2))
        assert await asked == ALL


async def test_a_first_pass_that_fails_is_another_replicas_work_too() -> None:
    async with serving(replicas=2) as cluster:
        cluster.triton.script = failing(_FAILED_PASS)
        cluster.tritons[1].script = one_answer
        answered = await cluster.stub.ModelInfer(make_request(stream=False))
        assert text_of(answered) == "whole text"


async def test_passes_that_fail_twice_end_the_request() -> None:
    async with serving(replicas=2) as cluster:
        cluster.triton.script = counts(2, _FAILED_PASS)
        cluster.tritons[1].script = counts(4, _FAILED_PASS)
        *texts, error = await streamed(cluster)
        assert texts == ALL[:4]
        assert "retry" not in error


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_replica_that_is_too_late_loses_its_request_once(is_stream: bool) -> None:
    # Long enough for the request to reach the replica.
    config = make_config(first_token_timeout_s=1.0, unstreamed_timeout_s=1.0)
    async with serving(config, replicas=2) as cluster:
        cluster.triton.script = hanging(0)
        cluster.tritons[1].script = hanging(0)
        if is_stream:
            (error,) = await streamed(cluster)
        else:
            _, error = await failure(cluster)
        assert "within 1 s" in error
        assert [len(triton.requests) for triton in cluster.tritons] == [1, 1]


@pytest.mark.parametrize("is_stream", [False, True])
async def test_one_silent_replica_beside_a_good_one_costs_no_request(is_stream: bool) -> None:
    async with serving(replicas=2) as cluster:
        cluster.triton.script = counts(3) if is_stream else hanging(0)
        cluster.triton.probe_script = says_nothing
        cluster.tritons[1].script = counts(_LAST) if is_stream else one_answer

        async def ask() -> list[str]:
            if is_stream:
                return await streamed(cluster)
            return [text_of(await cluster.stub.ModelInfer(make_request(stream=False)))]

        expected = ALL if is_stream else ["whole text"]
        assert await asyncio.gather(*(ask() for _ in range(6))) == [expected] * 6
        demand = await cluster.scheduler.demand(
            lambda demand: any(each.is_silent for each in demand.replicas)
        )
        assert [each.replica for each in demand.replicas if each.is_silent] == ["tiny.1"]
        # And those that come later are spared it.
        sent = len(cluster.triton.requests)
        assert await asyncio.gather(*(ask() for _ in range(6))) == [expected] * 6
        assert len(cluster.triton.requests) == sent
        # It answers again, and serves again.
        cluster.triton.script = cluster.tritons[1].script
        cluster.triton.probe_script = refuses_probes
        await cluster.scheduler.demand(
            lambda demand: not any(each.is_silent for each in demand.replicas)
        )
        assert await asyncio.gather(*(ask() for _ in range(6))) == [expected] * 6
        assert len(cluster.triton.requests) > sent


async def refuses_probes(
    request: kserve.ModelInferRequest, context: Context
) -> AsyncIterator[kserve.ModelInferResponse]:
    """As a replica of an older build does, which lives all the same."""
    raise StreamError("INVALID_ARGUMENT: Input 'text_input' is missing; it takes one string.")
    yield answer(request, "never", is_final=True)


async def test_a_slow_replica_of_an_older_build_keeps_its_requests() -> None:
    go_on = asyncio.Event()

    async def slow(
        request: kserve.ModelInferRequest, context: Context
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        await go_on.wait()
        yield answer(request, "whole text", is_final=True)

    async with serving(replicas=2) as cluster:
        cluster.triton.script = slow
        cluster.triton.probe_script = refuses_probes
        call = asyncio.ensure_future(cluster.stub.ModelInfer(make_request(stream=False)))
        while len(cluster.triton.probes) < 4:
            await asyncio.sleep(0.01)  # until it has been probed for seconds
        go_on.set()
        assert text_of(await call) == "whole text"
        assert not cluster.tritons[1].requests
        probe = cluster.triton.probes[0]
        assert not probe.inputs
        assert probe.parameters["paraserve_probe"].bool_param
        assert probe.parameters["paraserve_replica"].string_param == f"{DEPLOYMENT}.1"
