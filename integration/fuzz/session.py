"""All targets beside one gateway, and how many inputs each gets."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from integration.fuzz.detokenizers import Detokenizers
from integration.fuzz.doors import GrpcDoor, HttpDoor
from integration.fuzz.runner import Outcome, fuzz
from integration.fuzz.sampling import SamplingParameters
from integration.fuzz.target import Target
from tests.support.gateway import serving
from tests.support.gateway_fakes import one_answer


async def run(num_inputs: int, seed: int) -> Outcome:
    torch.set_num_threads(1)
    async with serving() as harness:
        harness.triton.script = one_answer
        http, grpc = HttpDoor(harness), GrpcDoor(harness)
        detokenizers = Detokenizers()
        weights: Mapping[Target, int] = {
            detokenizers: 7,
            SamplingParameters(): 3,
            http: 2,
            grpc: 2,
        }
        whole = sum(weights.values())

        def forget() -> None:
            """Drop what the fakes keep for tests: it would look like growth of the product."""
            harness.triton.requests.clear()
            harness.scheduler.reports.clear()

        try:
            counts = {target: num_inputs * weight // whole for target, weight in weights.items()}
            counts[detokenizers] += num_inputs - sum(counts.values())
            return await fuzz(counts, seed, after_round=forget)
        finally:
            await http.close()
            grpc.close()
