"""What the generated packages do: a model whose next token follows from those before it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar

from paraserve_backend.engines.signatures import TENSORRT_LLM, VLLM
from tests.support.fake_package import FakePackage

VOCABULARY = 50


def next_id(ids: Sequence[int]) -> int:
    return (7 * ids[-1] + len(ids)) % VOCABULARY


def answer(prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_id(ids))
    return ids[len(prompt) :]


def candidates(token_id: int, count: int) -> dict[int, Any]:
    """The chosen token, second among `count` likeliest ones."""
    found = {token_id: SimpleNamespace(logprob=-1.0, rank=2)}
    best = (token_id + 1) % VOCABULARY
    if count > 0:
        found[best] = SimpleNamespace(logprob=-0.5, rank=1)
    return found


@dataclass(slots=True, kw_only=True)
class Seen:
    """What an adapter has done with its engine."""

    model: dict[str, Any] = field(default_factory=dict)
    sampling: list[dict[str, Any]] = field(default_factory=list)
    aborted: int = 0
    is_stopped: bool = False
    #: Generate no further than this; the test lets more come.
    until: int = 10**9
    dies: bool = False
    refuses: bool = False


def fake_tensorrt_llm(seen: Seen) -> FakePackage:
    class Arguments:
        def __init__(self, **arguments: Any) -> None:
            self.arguments = arguments

    class SamplingParams(Arguments):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            seen.sampling.append(arguments)

    class RequestOutput:
        """As the documented one: iterating gives itself, with all tokens so far."""

        def __init__(self, prompt: list[int], sampling: dict[str, Any]) -> None:
            self._prompt = prompt
            self._sampling = sampling
            self._count = 0
            self.finished = False

        @property
        def outputs(self) -> list[Any]:
            ids = answer(self._prompt, self._count)
            wanted = self._sampling["logprobs"]
            logprobs = [] if wanted is None else [candidates(each, wanted) for each in ids]
            return [package.record("CompletionOutput", token_ids=ids, logprobs=logprobs)]

        def __aiter__(self) -> RequestOutput:
            return self

        async def __anext__(self) -> RequestOutput:
            if self.finished:
                raise StopAsyncIteration
            while self._count >= seen.until:
                await asyncio.sleep(0.001)
            # Two at a time, then one: engines may run ahead of those who read.
            self._count = min(self._count + 2 - self._count % 3 // 2, self._sampling["max_tokens"])
            self.finished = self._count == self._sampling["max_tokens"]
            return self

        def abort(self) -> None:
            assert not self.finished
            seen.aborted += 1

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            seen.model = arguments

        def generate_async(
            self, inputs: list[int], sampling_params: SamplingParams, streaming: bool
        ) -> RequestOutput:
            assert streaming
            if seen.refuses:
                raise ValueError("too long")
            result: RequestOutput = made(inputs, sampling_params.arguments)
            return result

        def get_stats(self, timeout: float) -> list[dict[str, Any]]:
            assert timeout < 1
            kv_cache = {"usedNumBlocks": 3, "maxNumBlocks": 12}
            entry = {"numActiveRequests": 2, "numQueuedRequests": 1, "kvCacheStats": kv_cache}
            return [{}, entry]

        def shutdown(self) -> None:
            seen.is_stopped = True

    behaviours: dict[str, Callable[..., Any]] = {
        "LLM": LLM,
        "KvCacheConfig": Arguments,
        "SamplingParams": SamplingParams,
        "RequestOutput": RequestOutput,
    }
    package = FakePackage(TENSORRT_LLM, behaviours)
    made = package.load("tensorrt_llm.llmapi").RequestOutput
    return package


def fake_vllm(seen: Seen) -> FakePackage:
    class Arguments:
        def __init__(self, **arguments: Any) -> None:
            self.arguments = arguments

    class SamplingParams(Arguments):
        def __init__(self, **arguments: Any) -> None:
            super().__init__(**arguments)
            seen.sampling.append(arguments)

    class EngineDeadError(Exception):
        pass

    class VLLMClientError(Exception):
        pass

    class RequestOutputKind:
        DELTA: ClassVar[str] = "delta"

    class AsyncLLM:
        @classmethod
        def from_engine_args(cls, engine_args: Arguments) -> AsyncLLM:
            asyncio.get_running_loop()
            seen.model = engine_args.arguments
            return cls()

        async def generate(
            self, prompt: dict[str, list[int]], sampling_params: SamplingParams, request_id: str
        ) -> AsyncGenerator[Any, None]:
            assert request_id
            assert sampling_params.arguments["output_kind"] == RequestOutputKind.DELTA
            if seen.refuses:
                raise VLLMClientError("too long")
            ids = prompt["prompt_token_ids"]
            try:
                new_ids = answer(ids, sampling_params.arguments["max_tokens"])
                for number, token_id in enumerate(new_ids):
                    while number >= seen.until:
                        await asyncio.sleep(0.001)
                    if seen.dies:
                        raise EngineDeadError
                    wanted = sampling_params.arguments["logprobs"]
                    logprobs = None if wanted is None else [candidates(token_id, wanted)]
                    output = package.record(
                        "CompletionOutput", token_ids=[token_id], logprobs=logprobs
                    )
                    yield package.record("RequestOutput", outputs=[output])
            except (asyncio.CancelledError, GeneratorExit):
                seen.aborted += 1
                raise

        def shutdown(self) -> None:
            seen.is_stopped = True

    def get_metrics_snapshot() -> list[Any]:
        values = {
            "vllm:num_requests_running": 2.0,
            "vllm:num_requests_waiting": 1.0,
            "vllm:kv_cache_usage_perc": 0.25,
        }
        gauges = [package.record("Gauge", name=name, value=value) for name, value in values.items()]
        return [SimpleNamespace(name="vllm:histogram"), *gauges]

    behaviours: dict[str, Callable[..., Any]] = {
        "AsyncEngineArgs": Arguments,
        "SamplingParams": SamplingParams,
        "AsyncLLM": AsyncLLM,
        "EngineDeadError": EngineDeadError,
        "VLLMClientError": VLLMClientError,
        "RequestOutputKind": RequestOutputKind,
        "get_metrics_snapshot": get_metrics_snapshot,
    }
    package = FakePackage(VLLM, behaviours)
    return package
