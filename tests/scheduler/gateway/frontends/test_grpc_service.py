"""The gateway's gRPC service, driven by Triton's own clients."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS
from paraserve_backend.rpc import paraserve_pb2 as pb
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    make_config,
    make_inputs,
    make_request,
    read_stream,
    serving,
    text_of,
)
from tests.support.gateway_fakes import (
    answer,
    failing,
    hanging,
    one_answer,
    tokens_then_empty,
)
from tests.support.limits import HANG_S


async def texts(cluster: GatewayHarness, request: kserve.ModelInferRequest) -> list[str]:
    return [text_of(entry.infer_response) for entry in await read_stream(cluster, request)]


async def error_of(cluster: GatewayHarness, request: kserve.ModelInferRequest) -> str:
    """Return the one error message that a streamed request gets."""
    *_, last = await read_stream(cluster, request)
    return last.error_message


async def test_a_stream_passes_every_token_under_the_deployments_name() -> None:
    async with serving() as cluster:
        entries = await read_stream(cluster, make_request(id="r1"))
        assert [text_of(entry.infer_response) for entry in entries] == ["r1-0", "r1-1", "r1-2"]
        assert {entry.infer_response.model_name for entry in entries} == {DEPLOYMENT}
        assert {entry.infer_response.id for entry in entries} == {"r1"}
        (upstream,) = cluster.triton.requests
        assert upstream.model_name == "tiny.1"
        assert upstream.parameters["triton_enable_empty_final_response"].bool_param


@pytest.mark.parametrize(("asked", "expected"), [(False, 2), (True, 3)])
async def test_an_empty_final_response_reaches_only_who_asked(asked: bool, expected: int) -> None:
    async with serving() as cluster:
        cluster.triton.script = tokens_then_empty
        request = make_request()
        if asked:
            request.parameters["triton_enable_empty_final_response"].bool_param = True
        assert len(await read_stream(cluster, request)) == expected


async def test_a_request_at_zero_is_held_reported_and_served_once_a_replica_is_ready() -> None:
    async with serving(replicas=0) as cluster:
        answered = asyncio.create_task(texts(cluster, make_request()))
        await cluster.held()
        assert not answered.done()
        await cluster.publish(cluster.endpoint())
        assert len(await answered) == 3
        demand = await cluster.scheduler.demand(lambda demand: demand.waiting == 0)
        assert demand.arrived == 1


async def test_the_first_token_of_a_replica_is_reported_with_its_time() -> None:
    async with serving() as cluster:
        await texts(cluster, make_request())
        demand = await cluster.scheduler.demand(
            lambda demand: any(replica.first_token_s for replica in demand.replicas)
        )
        assert [replica.replica for replica in demand.replicas] == ["tiny.1"]


async def test_a_client_that_leaves_while_held_is_no_longer_waiting() -> None:
    async with serving(replicas=0) as cluster:
        call = cluster.stub.ModelInfer(make_request(stream=False))
        await cluster.held()
        call.cancel()
        await cluster.held(0)


async def test_a_failed_cold_start_fails_the_requests_that_waited_for_it() -> None:
    async with serving(replicas=0) as cluster:
        call = cluster.stub.ModelInfer(make_request(stream=False))
        await cluster.held()
        failure = pb.Failure(grpc_code="PERMISSION_DENIED", message="The bucket refused the key.")
        await cluster.publish(failure=failure, failure_number=1)
        with pytest.raises(grpc.aio.AioRpcError, match="bucket refused") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_an_older_failure_does_not_fail_a_new_request() -> None:
    async with serving(replicas=0) as cluster:
        failure = pb.Failure(grpc_code="INTERNAL", message="old")
        await cluster.publish(failure=failure, failure_number=4)
        cluster.triton.script = one_answer
        call = cluster.stub.ModelInfer(make_request(stream=False))
        await cluster.held()
        await cluster.publish(cluster.endpoint(), failure=failure, failure_number=4)
        assert text_of(await call) == "whole text"


async def test_requests_beyond_the_limit_of_held_ones_are_refused_at_once() -> None:
    async with serving(replicas=0) as cluster:
        await cluster.publish(max_waiting=1)
        held = cluster.stub.ModelInfer(make_request(stream=False))
        await cluster.held()
        with pytest.raises(grpc.aio.AioRpcError, match="1 requests already wait") as caught:
            await cluster.stub.ModelInfer(make_request(stream=False))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        held.cancel()


async def test_a_cold_start_that_takes_too_long_ends_with_deadline_exceeded() -> None:
    async with serving(make_config(cold_start_timeout_s=0.05), replicas=0) as cluster:
        with pytest.raises(grpc.aio.AioRpcError, match=r"was ready within 0\.05 s") as caught:
            await cluster.stub.ModelInfer(make_request(stream=False))
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_an_unknown_deployment_is_not_found_and_the_others_are_named() -> None:
    async with serving() as cluster:
        request = make_request(stream=False)
        request.model_name = "nosuch"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await cluster.stub.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert caught.value.details() == (
            "Request for unknown model: 'nosuch' is not found. Deployments: tiny."
        )


async def test_a_bad_request_wakes_nobody() -> None:
    async with serving(replicas=0) as cluster:
        request = make_request()
        request.inputs[0].name = "prompt"
        assert "Unexpected inference input 'prompt'" in await error_of(cluster, request)
        # A good one afterwards is the only one ever counted.
        held = cluster.stub.ModelInfer(make_request(stream=False))
        demand = await cluster.scheduler.demand(lambda demand: demand.waiting > 0)
        assert (demand.waiting, demand.arrived) == (1, 1)
        held.cancel()


async def test_requests_on_one_stream_interleave() -> None:
    first_may_end = asyncio.Event()

    async def script(
        request: kserve.ModelInferRequest, context: Any
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        yield answer(request, "start", is_final=False)
        if request.id == "one":
            await first_may_end.wait()
        yield answer(request, "end", is_final=True)

    async with serving() as cluster:
        cluster.triton.script = script
        stream = _open_stream(cluster)
        await stream.write(make_request(id="one"))
        ids = [await _next_id(stream)]
        await stream.write(make_request(id="two"))
        ids += [await _next_id(stream), await _next_id(stream)]
        first_may_end.set()
        await stream.done_writing()
        ids += [entry.infer_response.id async for entry in _entries(stream)]
        assert ids == ["one", "two", "two", "one"]


async def test_an_error_on_a_stream_names_its_request_and_leaves_the_stream_open() -> None:
    async with serving() as cluster:
        stream = _open_stream(cluster)
        bad = make_request(id="bad")
        bad.model_name = "nosuch"
        await stream.write(bad)
        failed = await anext(_entries(stream))
        assert "unknown model: 'nosuch'" in failed.error_message
        assert failed.infer_response.id == "bad"
        await stream.write(make_request(id="good"))
        await stream.done_writing()
        assert len([entry async for entry in _entries(stream)]) == 3


async def test_a_stream_ends_with_the_errors_status_for_clients_that_ask_so() -> None:
    async with serving() as cluster:
        cluster.triton.script = failing("INVALID_ARGUMENT: 'top_p' is 3.")

        async def only() -> AsyncIterator[kserve.ModelInferRequest]:
            yield make_request()

        call = cluster.stub.ModelStreamInfer(only(), metadata=(("triton_grpc_error", "true"),))
        with pytest.raises(grpc.aio.AioRpcError, match="'top_p' is 3") as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_cancelling_a_stream_cancels_it_at_the_replica() -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(1)
        stream = _open_stream(cluster)
        await stream.write(make_request())
        await stream.read()
        stream.cancel()
        await cluster.triton.cancelled.wait()
        await cluster.scheduler.demand(lambda demand: demand.in_flight == 0)


async def test_clients_that_leave_in_full_flow_leave_nothing_behind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def endless(
        request: kserve.ModelInferRequest, context: Any
    ) -> AsyncIterator[kserve.ModelInferResponse]:
        while True:
            yield answer(request, "x", is_final=False)

    async with serving() as cluster:
        cluster.triton.script = endless
        for _ in range(50):
            stream = _open_stream(cluster)
            await stream.write(make_request(id="a"))
            await stream.write(make_request(id="b"))
            await stream.read()
            stream.cancel()
        await cluster.scheduler.demand(
            lambda demand: demand.arrived > 0 and demand.waiting == demand.in_flight == 0
        )
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_unary_call_returns_the_one_response() -> None:
    async with serving() as cluster, cluster.client() as client:
        cluster.triton.script = one_answer
        result = await client.infer(DEPLOYMENT, make_inputs(stream=False), request_id="7")
        text, count = result.as_numpy("text_output"), result.as_numpy("num_output_tokens")
        assert text is not None
        assert count is not None
        assert (text.tolist(), count.tolist()) == ([b"whole text"], [7])
        assert result.get_response().id == "7"


async def test_a_unary_call_that_asks_for_a_stream_is_refused() -> None:
    async with serving() as cluster, cluster.client() as client:
        with pytest.raises(triton.InferenceServerException, match="use ModelStreamInfer") as caught:
            await client.infer(DEPLOYMENT, make_inputs(stream=True))
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert cluster.triton.requests == []


async def test_a_unary_call_answered_with_several_responses_says_so() -> None:
    async with serving() as cluster, cluster.client() as client:
        with pytest.raises(triton.InferenceServerException, match="sent several responses"):
            await client.infer(DEPLOYMENT, make_inputs(stream=False))


async def test_tritons_asyncio_client_streams() -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield {"model_name": DEPLOYMENT, "inputs": make_inputs(), "request_id": "a"}

    async with serving() as cluster, cluster.client() as client:
        received = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            assert result is not None
            received.append(text_of(result.get_response()))
        assert received == ["a-0", "a-1", "a-2"]


async def test_tritons_blocking_client_streams_and_cancels() -> None:
    async with serving() as cluster:
        received: queue.Queue[object] = queue.Queue()
        client = triton.InferenceServerClient(cluster.gateway.grpc_address)

        def stream_and_cancel() -> None:
            client.start_stream(lambda result, error: received.put(result or error))
            client.async_stream_infer(DEPLOYMENT, _blocking_inputs(), request_id="b")
            for _ in range(3):
                assert isinstance(received.get(timeout=HANG_S), triton.InferResult)
            cluster.triton.script = hanging(1)
            client.async_stream_infer(DEPLOYMENT, _blocking_inputs(), request_id="c")
            assert isinstance(received.get(timeout=HANG_S), triton.InferResult)
            client.stop_stream(cancel_requests=True)
            client.close()

        await asyncio.to_thread(stream_and_cancel)
        await cluster.triton.cancelled.wait()


async def test_a_deployment_at_zero_is_ready_and_described() -> None:
    async with serving(replicas=0) as cluster, cluster.client() as client:
        metadata = await client.get_model_metadata(DEPLOYMENT)
        assert [tensor.name for tensor in metadata.inputs] == [spec.name for spec in INPUTS]
        assert [tuple(t.shape) for t in metadata.outputs] == [spec.shape for spec in OUTPUTS]
        config = (await client.get_model_config(DEPLOYMENT)).config
        assert (config.backend, config.max_batch_size) == ("paraserve", 0)
        assert config.model_transaction_policy.decoupled
        assert await client.is_model_ready(DEPLOYMENT)
        assert await client.is_model_ready(DEPLOYMENT, "1")
        assert not await client.is_model_ready(DEPLOYMENT, "2")
        assert not await client.is_model_ready("nosuch")
        index = await client.get_model_repository_index()
        assert [(m.name, m.state) for m in index.models] == [(DEPLOYMENT, "READY")]
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert (await client.get_server_metadata()).name == "paraserve"


async def test_repository_control_is_refused_with_what_to_do_instead() -> None:
    async with serving() as cluster, cluster.client() as client:
        with pytest.raises(triton.InferenceServerException, match="paraserve deploy") as caught:
            await client.load_model(DEPLOYMENT)
        assert caught.value.status() == "StatusCode.UNIMPLEMENTED"


async def test_an_error_about_something_long_still_fits_in_its_header() -> None:
    async with serving() as cluster:
        request = make_request(stream=False)
        request.inputs[0].name = "x" * 50_000
        with pytest.raises(grpc.aio.AioRpcError, match="Unexpected inference input 'xxx") as caught:
            await cluster.stub.ModelInfer(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_request_parameters_that_a_replica_knows_reach_it() -> None:
    async with serving() as cluster:
        cluster.triton.script = one_answer
        request = make_request(stream=False)
        request.parameters["top_k"].int64_param = 3
        request.parameters["unknown"].string_param = "dropped"
        await cluster.stub.ModelInfer(request)
        parameters = cluster.triton.requests[0].parameters
        assert parameters["top_k"].int64_param == 3
        assert "unknown" not in parameters


async def test_a_replica_that_has_just_gone_is_replaced_without_the_client_noticing() -> None:
    async with serving(replicas=2) as cluster:
        for triton_server in cluster.tritons:
            triton_server.models = {"tiny.2"}
        assert len(await texts(cluster, make_request())) == 3
        tried = [request.model_name for each in cluster.tritons for request in each.requests]
        assert tried == ["tiny.1", "tiny.2"]


async def test_a_request_refused_by_the_only_replica_waits_for_the_next() -> None:
    async with serving() as cluster:
        nobody = "127.0.0.1:1"
        await cluster.publish(cluster.endpoint(address=nobody))
        cluster.triton.models = {"tiny.3"}
        answered = asyncio.create_task(texts(cluster, make_request()))
        await cluster.held()
        await cluster.publish(cluster.endpoint(3))
        assert len(await answered) == 3


async def test_a_stream_of_a_lost_replica_ends_with_an_error_at_once() -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(2)
        stream = _open_stream(cluster)
        await stream.write(make_request())
        entries = _entries(stream)
        for _ in range(2):
            assert not (await anext(entries)).error_message
        await cluster.publish(lost_replicas=["tiny.1"])
        lost = await anext(entries)
        assert lost.error_message == "The replica of 'tiny' was lost."
        stream.cancel()


async def test_a_request_that_got_nothing_from_a_lost_replica_goes_to_the_next() -> None:
    async with serving() as cluster:
        cluster.triton.script = hanging(0)
        answered = asyncio.create_task(texts(cluster, make_request()))
        await cluster.scheduler.demand(lambda demand: demand.in_flight == 1)
        await cluster.publish(cluster.endpoint(2), lost_replicas=["tiny.1"])
        assert len(await answered) == 3


def _blocking_inputs() -> list[triton.InferInput]:
    prompt = triton.InferInput("text_input", [1], "BYTES")
    return [prompt.set_data_from_numpy(np.array([b"hi"], dtype=np.object_))]


def _open_stream(cluster: GatewayHarness) -> Any:
    # The type stubs do not know that requests may also be written one by one.
    call: Any = cluster.stub.ModelStreamInfer
    return call()


async def _entries(stream: Any) -> AsyncIterator[kserve.ModelStreamInferResponse]:
    while isinstance(entry := await stream.read(), kserve.ModelStreamInferResponse):
        yield entry


async def _next_id(stream: Any) -> str:
    entry = await anext(_entries(stream))
    return entry.infer_response.id
