"""What the gateway adds to a request: one client straight to Triton, then through the gateway.

    python -m integration.bench_gateway [--responses 2000] [--requests 300]

Client, gateway, tritonserver and model share this machine's cores, so every figure is an upper
bound. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.grpc import InferenceServerClient as BlockingClient
from tritonclient.grpc.aio import InferenceServerClient, InferInput

from integration.counting_model import write_model
from integration.triton_server import TritonServer
from tests.scheduler.gateway.cluster import DEPLOYMENT, Cluster, serving

_REPLICA = f"{DEPLOYMENT}.1"
_REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    us_per_response: float
    first_response_ms: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--responses", type=int, default=2000, help="in one stream")
    parser.add_argument("--requests", type=int, default=300, help="one after the other")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, TritonServer(Path(folder)) as server:
        write_model(server.model_repository / _REPLICA)
        BlockingClient(server.grpc_address).load_model(_REPLICA)
        figures = asyncio.run(measure(server, arguments.responses, arguments.requests))
    print(json.dumps(figures))  # noqa: T201


async def measure(server: TritonServer, responses: int, requests: int) -> dict[str, Any]:
    async with serving(replicas=0) as cluster:
        await cluster.publish(cluster.endpoint(address=server.grpc_address))
        figures: dict[str, Any] = {}
        for name, address, model in (
            ("direct", server.grpc_address, _REPLICA),
            ("gateway", cluster.gateway.grpc_address, DEPLOYMENT),
        ):
            async with InferenceServerClient(address) as client:
                figures[name] = asdict(
                    Figures(
                        us_per_response=await us_per_response(client, model, responses),
                        first_response_ms=await first_response_ms(client, model, requests),
                    )
                )
        figures["resume_ms"] = await resume_ms(cluster, server)
        return figures


async def us_per_response(client: InferenceServerClient, model: str, responses: int) -> float:
    """The best of several whole streams."""
    return (
        1e6 / responses * min([await stream_s(client, model, responses) for _ in range(_REPEATS)])
    )


async def first_response_ms(client: InferenceServerClient, model: str, requests: int) -> float:
    """The median time of a stream of one response, each on a stream of its own."""
    return 1e3 * statistics.median([await stream_s(client, model, 1) for _ in range(requests)])


async def resume_ms(cluster: Cluster, server: TritonServer) -> float:
    """From the scheduler's new table to the answer of a request held for it: the median."""
    times_s = []
    for _ in range(20):
        await cluster.publish()
        async with cluster.client() as client:
            held = asyncio.create_task(stream_s(client, DEPLOYMENT, 1))
            await cluster.held()
            start_s = time.perf_counter()
            await cluster.publish(cluster.endpoint(address=server.grpc_address))
            await held
            times_s.append(time.perf_counter() - start_s)
    return 1e3 * statistics.median(times_s)


async def stream_s(client: InferenceServerClient, model: str, responses: int) -> float:
    start_s = time.perf_counter()
    async for _, error in client.stream_infer(_request(model, responses)):
        assert error is None
    return time.perf_counter() - start_s


async def _request(model: str, responses: int) -> AsyncIterator[dict[str, Any]]:
    text = InferInput("text_input", [1], "BYTES")
    limit = InferInput("max_tokens", [1], "INT32")
    text.set_data_from_numpy(np.array([b"count"], dtype=np.object_))
    limit.set_data_from_numpy(np.array([responses], dtype=np.int32))
    yield {"model_name": model, "inputs": [text, limit]}


if __name__ == "__main__":
    main()
