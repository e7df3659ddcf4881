"""What a gateway counts, and how clients read it over both protocols."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as kserve

from paraserve_scheduler.gateway.kserve.metadata import Json
from paraserve_scheduler.gateway.kserve.statistics import Statistics
from tests.support.gateway import (
    DEPLOYMENT,
    GatewayHarness,
    make_inputs,
    make_request,
    read_stream,
    serving,
)
from tests.support.gateway_fakes import failing, hanging, one_answer
from tests.support.limits import HANG_S

_EPOCH_MS = 1_700_000_000_000


class Clock:
    """Nanoseconds, moved by hand."""

    def __init__(self) -> None:
        self.now_ns = 5

    def __call__(self) -> int:
        return self.now_ns


def make_statistics(clock: Clock) -> Statistics:
    return Statistics(clock, epoch=lambda: _EPOCH_MS * 1_000_000)


def run_request(
    statistics: Statistics, clock: Clock, *, queue_ns: int, replica_ns: int, fails: bool = False
) -> None:
    with contextlib.suppress(ConnectionError), statistics.request("d") as times:
        clock.now_ns += queue_ns
        times.given_to_replica()
        clock.now_ns += replica_ns
        if fails:
            raise ConnectionError


def only_model(report: Json) -> Json:
    (model,) = report["model_stats"]
    assert isinstance(model, dict)
    return model


async def http_statistics(cluster: GatewayHarness, path: str) -> tuple[int, Json]:
    async with cluster.http.get(cluster.url(path)) as response:
        return response.status, await response.json()


def test_a_request_is_its_wait_and_its_time_at_the_replica() -> None:
    clock = Clock()
    statistics = make_statistics(clock)
    run_request(statistics, clock, queue_ns=300, replica_ns=50)
    model = only_model(statistics.report(["d"]))
    assert (model["inference_count"], model["execution_count"]) == (1, 1)
    assert model["last_inference"] == _EPOCH_MS
    nothing = {"count": 0, "ns": 0}
    assert model["inference_stats"] == {
        "success": {"count": 1, "ns": 350},
        "fail": nothing,
        "queue": {"count": 1, "ns": 300},
        "compute_input": nothing,
        "compute_infer": {"count": 1, "ns": 50},
        "compute_output": nothing,
        "cache_hit": nothing,
        "cache_miss": nothing,
    }


def test_a_replica_that_refused_was_still_waiting() -> None:
    clock = Clock()
    statistics = make_statistics(clock)
    with statistics.request("d") as times:
        times.given_to_replica()
        clock.now_ns += 10
        times.given_to_replica()
        clock.now_ns += 1
    durations = only_model(statistics.report(["d"]))["inference_stats"]
    assert (durations["queue"]["ns"], durations["compute_infer"]["ns"]) == (10, 1)


_REQUESTS = st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12), st.booleans()))


@given(_REQUESTS)
def test_every_request_is_counted_once_and_all_its_time_is(
    requests: list[tuple[int, int, bool]],
) -> None:
    clock = Clock()
    statistics = make_statistics(clock)
    for queue_ns, replica_ns, fails in requests:
        run_request(statistics, clock, queue_ns=queue_ns, replica_ns=replica_ns, fails=fails)
    durations = only_model(statistics.report(["d"]))["inference_stats"]
    success, fail = durations["success"], durations["fail"]
    assert success["count"] + fail["count"] == len(requests)
    assert success["ns"] + fail["ns"] == clock.now_ns - 5
    assert success["ns"] == durations["queue"]["ns"] + durations["compute_infer"]["ns"]


def test_the_message_holds_what_the_json_does() -> None:
    clock = Clock()
    statistics = make_statistics(clock)
    run_request(statistics, clock, queue_ns=2**40, replica_ns=1)
    report, message = statistics.report(["d", "e"]), statistics.message(["d", "e"])
    assert json_format.ParseDict(report, kserve.ModelStatisticsResponse()) == message
    assert [model.name for model in message.model_stats] == ["d", "e"]
    assert message.model_stats[0].inference_stats.queue.ns == 2**40
    assert message.model_stats[1].last_inference == 0


async def test_the_wait_for_a_cold_start_is_queue_time() -> None:
    async with serving(replicas=0) as cluster, cluster.client() as client:
        cluster.triton.script = one_answer
        call = asyncio.create_task(client.infer(DEPLOYMENT, make_inputs(stream=False)))
        # The report after the first one comes a whole second later.
        await cluster.held()
        seen = len(cluster.scheduler.reports)
        await cluster.scheduler.demand(lambda _: len(cluster.scheduler.reports) > seen)
        await cluster.publish(cluster.endpoint())
        await call
        (model,) = (await client.get_inference_statistics(DEPLOYMENT)).model_stats
        durations = model.inference_stats
        assert (durations.success.count, durations.queue.count) == (1, 1)
        assert durations.queue.ns > 900_000_000
        assert durations.queue.ns > durations.compute_infer.ns > 0
        assert durations.success.ns == durations.queue.ns + durations.compute_infer.ns


async def test_a_request_that_fails_or_is_cancelled_counts_as_failed() -> None:
    async with serving() as cluster:
        cluster.triton.script = failing("UNAVAILABLE: Too busy.")
        await read_stream(cluster, make_request())
        cluster.triton.script = hanging(1)
        stream = cluster.stub.ModelStreamInfer(_only(make_request()))
        await anext(aiter(stream))
        stream.cancel()
        await cluster.failed(2)


async def test_a_request_that_is_refused_outright_is_no_inference() -> None:
    async with serving() as cluster:
        with pytest.raises(grpc.aio.AioRpcError):
            await cluster.stub.ModelInfer(kserve.ModelInferRequest(model_name=DEPLOYMENT))
        await cluster.failed(0)


@pytest.mark.parametrize(
    "path", ["models/stats", f"models/{DEPLOYMENT}/stats", f"models/{DEPLOYMENT}/versions/1/stats"]
)
async def test_http_reports_numbers_at_each_of_tritons_paths(path: str) -> None:
    async with serving() as cluster:
        await read_stream(cluster, make_request())
        status, report = await http_statistics(cluster, path)
        model = only_model(report)
        assert (status, model["name"], model["version"]) == (200, DEPLOYMENT, "1")
        assert model["inference_count"] == 1
        assert model["inference_stats"]["success"]["ns"] > 0


async def test_statistics_of_what_does_not_exist_are_not_found() -> None:
    async with serving() as cluster, cluster.client() as client:
        for path in ("models/nosuch/stats", f"models/{DEPLOYMENT}/versions/2/stats"):
            assert (await http_statistics(cluster, path))[0] == 404
        with pytest.raises(Exception, match="unknown model: 'nosuch'"):
            await client.get_inference_statistics("nosuch")
        assert "statistics" in (await client.get_server_metadata()).extensions


_TRITON_CLIENT = """
import json, sys
import tritonclient.http as triton

with triton.InferenceServerClient(sys.argv[1]) as client:
    print(json.dumps(client.get_inference_statistics()))
    assert client.get_inference_statistics("tiny", "1") == client.get_inference_statistics()
"""


async def test_tritons_http_client_reads_them() -> None:
    """In a process of its own: that client patches the interpreter's sockets."""
    async with serving() as cluster:
        await read_stream(cluster, make_request())
        run = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", _TRITON_CLIENT, cluster.gateway.http_address],
            capture_output=True,
            text=True,
            timeout=HANG_S,
        )
        assert run.returncode == 0, run.stderr
        assert only_model(json.loads(run.stdout))["inference_count"] == 1


async def _only(request: kserve.ModelInferRequest) -> AsyncIterator[kserve.ModelInferRequest]:
    yield request
