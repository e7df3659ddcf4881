"""Both adapters against packages generated from their tables: they call what is listed, no more."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from paraserve_backend.engines.base import (
    Engine,
    EngineDead,
    EngineRequest,
    EngineSettings,
    EngineStats,
)
from paraserve_backend.engines.signatures import TENSORRT_LLM, VLLM, Table
from paraserve_backend.engines.tensorrt_llm.engine import TensorRtLlmEngine
from paraserve_backend.engines.vllm.engine import VllmEngine
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.sampling import ChosenToken, Ranking, Sampling, Steering
from tests.support.fake_engines import (
    Seen,
    answer,
    fake_tensorrt_llm,
    fake_vllm,
)
from tests.support.fake_package import FakePackage

PROMPT = (3, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    table: Table
    adapter: Callable[[Callable[[str], Any]], Engine]
    package: Callable[[Seen], FakePackage]


KINDS = (
    Kind(table=TENSORRT_LLM, adapter=TensorRtLlmEngine, package=fake_tensorrt_llm),
    Kind(table=VLLM, adapter=VllmEngine, package=fake_vllm),
)
each_engine = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.table.engine)


def settings(**changes: object) -> EngineSettings:
    fields: dict[str, Any] = {
        "model_dir": Path("/model"),
        "dtype": "bfloat16",
        "device": "cpu",
        "max_context": 100,
        "max_sequences": 4,
        "max_batch_tokens": 64,
        "kv_tokens": 300,
        "kv_bytes_per_token": 10,
        **changes,
    }
    return EngineSettings(**fields)


def request(**changes: object) -> EngineRequest:
    fields: dict[str, Any] = {
        "request_id": "r",
        "prompt_ids": PROMPT,
        "max_tokens": 5,
        "min_tokens": 0,
        "end_ids": frozenset({1, 2}),
        "sampling": Sampling(),
        "num_logprobs": None,
        "is_ranked": False,
        **changes,
    }
    return EngineRequest(**fields)


@asynccontextmanager
async def running(kind: Kind, seen: Seen) -> AsyncIterator[Engine]:
    """Start the adapter and stop it after the body."""
    engine = kind.adapter(kind.package(seen).load)
    await engine.start(settings())
    yield engine
    await engine.stop()
    assert seen.is_stopped


async def tokens_of(kind: Kind, seen: Seen, wanted: EngineRequest) -> list[ChosenToken]:
    async with running(kind, seen) as engine:
        return [token async for tokens in engine.submit(wanted) for token in tokens]


@each_engine
async def test_an_answer_is_each_token_once_and_in_order(kind: Kind) -> None:
    seen = Seen()
    got = await tokens_of(kind, seen, request(max_tokens=9))
    assert [token.token_id for token in got] == answer(PROMPT, 9)
    assert all(math.isnan(token.logprob) and token.ranking is None for token in got)
    assert seen.aborted == 0


@each_engine
async def test_only_our_end_tokens_count_and_nothing_is_turned_into_text(kind: Kind) -> None:
    seen = Seen()
    await tokens_of(kind, seen, request())
    (sampling,) = seen.sampling
    assert sampling["stop_token_ids"] == [1, 2]
    assert sampling["ignore_eos"] is True
    assert sampling["detokenize"] is False
    assert seen.model["skip_tokenizer_init"] is True
    assert seen.model["model"] == "/model"


@each_engine
async def test_log_probabilities_come_with_their_tokens(kind: Kind) -> None:
    got = await tokens_of(kind, Seen(), request(num_logprobs=1, is_ranked=True))
    ids = answer(PROMPT, 5)
    assert [token.token_id for token in got] == ids
    for token, token_id in zip(got, ids, strict=True):
        best = Ranking(rank=2, token_ids=((token_id + 1) % 50,), logprobs=(-0.5,))
        assert (token.logprob, token.ranking) == (-1.0, best)


@each_engine
async def test_a_log_probability_alone_has_no_rivals(kind: Kind) -> None:
    got = await tokens_of(kind, Seen(), request(num_logprobs=0))
    assert {(token.logprob, token.ranking) for token in got} == {(-1.0, None)}
    ranked = await tokens_of(kind, Seen(), request(num_logprobs=0, is_ranked=True))
    assert {token.ranking for token in ranked} == {Ranking(rank=2, token_ids=(), logprobs=())}


@each_engine
async def test_closing_the_answer_aborts_it_in_the_engine(kind: Kind) -> None:
    seen = Seen()

    async with running(kind, seen) as engine:
        steps = engine.submit(request(max_tokens=50))
        await anext(steps)
        await steps.aclose()
    assert seen.aborted == 1


@each_engine
async def test_cancelling_whoever_waits_for_a_token_aborts_it_too(kind: Kind) -> None:
    seen = Seen(until=3)

    async with running(kind, seen) as engine:
        reached = asyncio.Event()

        async def read() -> None:
            count = 0
            async for tokens in engine.submit(request(max_tokens=50)):
                count += len(tokens)
                if count == 3:
                    reached.set()

        task = asyncio.create_task(read())
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert seen.aborted == 1


@each_engine
async def test_the_engines_own_state_is_told(kind: Kind) -> None:
    async with running(kind, Seen()) as engine:
        assert await engine.stats() == EngineStats(running=2, waiting=1, kv_used=0.25)


@each_engine
async def test_a_request_the_engine_refuses_is_the_clients_mistake(kind: Kind) -> None:
    async with running(kind, Seen(refuses=True)) as engine:
        with pytest.raises(InvalidRequest, match="too long"):
            await anext(engine.submit(request()))


@each_engine
async def test_an_engine_that_is_not_installed_is_said_before_anything_else(kind: Kind) -> None:
    def load(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    engine = kind.adapter(load)
    with pytest.raises(InvalidRequest, match=f"engine {kind.table.engine} cannot be imported"):
        await engine.start(settings())
    await engine.stop()


async def test_a_dead_vllm_is_not_the_clients_mistake() -> None:
    async with running(KINDS[1], Seen(dies=True)) as engine:
        with pytest.raises(EngineDead):
            await anext(engine.submit(request()))


@each_engine
async def test_greedy_is_greedy_and_needs_no_seed(kind: Kind) -> None:
    seen = Seen()
    await tokens_of(kind, seen, request(sampling=Sampling(seed=9)))
    (sampling,) = seen.sampling
    assert sampling.get("seed") is None
    if kind.table is VLLM:
        assert sampling["temperature"] == 0.0
    else:
        assert not sampling.keys() & {"temperature", "top_k", "top_p"}


@each_engine
async def test_how_to_draw_reaches_the_engine(kind: Kind) -> None:
    seen = Seen()
    drawn = Sampling(temperature=0.5, top_k=7, top_p=0.9, seed=11)
    await tokens_of(kind, seen, request(sampling=drawn))
    (sampling,) = seen.sampling
    wanted = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "seed": 11}
    assert {name: sampling[name] for name in wanted} == wanted


async def test_filters_that_are_off_are_left_out_for_tensorrt_llm() -> None:
    # It takes 0 for top_k as "all" in some releases and refuses it in others.
    seen = Seen()
    await tokens_of(KINDS[0], seen, request(sampling=Sampling(temperature=1.0)))
    assert (seen.sampling[0]["top_k"], seen.sampling[0]["top_p"]) == (None, None)


async def test_what_vllm_has_besides_reaches_it() -> None:
    seen = Seen()
    steering = Steering(
        min_p=0.1, repetition_penalty=1.2, presence_penalty=0.3, frequency_penalty=0.4
    )
    await tokens_of(KINDS[1], seen, request(sampling=Sampling(steering=steering), min_tokens=2))
    wanted = {
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.4,
        "min_tokens": 2,
    }
    assert {name: seen.sampling[0][name] for name in wanted} == wanted


async def test_vllms_kv_cache_holds_what_was_planned_whatever_its_blocks_are() -> None:
    seen = Seen()
    await tokens_of(KINDS[1], seen, request())
    tokens = seen.model["kv_cache_memory_bytes"] // 10
    for block_tokens in (16, 32, 64, 128):
        # One block is vLLM's own.
        assert tokens // block_tokens * block_tokens - block_tokens >= 300


async def test_tensorrt_llms_kv_cache_holds_what_was_planned() -> None:
    seen = Seen()
    await tokens_of(KINDS[0], seen, request())
    assert seen.model["kv_cache_config"].arguments["max_tokens"] == 300
