"""TensorRT-LLM as the engine of a full instance, through its documented LLM API.

Written for the API of 1.2 to 1.4; this project has never run it (docs/engines.md).
`engines.signatures` lists what is called of it, and the tests hold this module to that list.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from paraserve_backend.engines.base import (
    EngineRequest,
    EngineSettings,
    EngineStats,
    chosen_token,
)
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.engine_abilities import TENSORRT_LLM
from paraserve_backend.protocol.sampling import ChosenToken

#: How long it may wait for statistics of an iteration that is under way.
_STATS_TIMEOUT_S = 0.05


class TensorRtLlmEngine:
    abilities = TENSORRT_LLM

    def __init__(self, load: Callable[[str], Any] = importlib.import_module) -> None:
        """`load` imports a module by its name."""
        self._load = load
        self._api: Any = None
        self._llm: Any = None
        self._stats = EngineStats(running=0, waiting=0, kv_used=0.0)

    async def start(self, settings: EngineSettings) -> None:
        try:
            self._api = await asyncio.to_thread(self._load, "tensorrt_llm.llmapi")
        except ImportError as error:
            raise InvalidRequest(
                f"The engine tensorrt-llm cannot be imported in this server's Python ({error}); "
                "use a Triton image that has it: docs/engines.md."
            ) from error
        # Room for the KV cache is what the plan reserved, not a share of the GPU: stages of the
        # same replica may still be on it.
        kv_cache = self._api.KvCacheConfig(max_tokens=settings.kv_tokens, enable_block_reuse=True)
        arguments = llm_arguments(settings)
        self._llm = await asyncio.to_thread(
            lambda: self._api.LLM(kv_cache_config=kv_cache, **arguments)
        )

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Sequence[ChosenToken], None]:
        try:
            result = self._llm.generate_async(
                inputs=list(request.prompt_ids),
                sampling_params=self._sampling(request),
                streaming=True,
            )
        except ValueError as error:
            raise InvalidRequest(f"TensorRT-LLM refuses the request: {error}") from error
        num_seen = 0
        try:
            async for step in result:
                # What it has so far, each time: the new tokens are the rest.
                output = step.outputs[0]
                new_ids = list(output.token_ids[num_seen:])
                candidates: list[Any] = [None] * len(new_ids)
                if request.num_logprobs is not None:
                    candidates = output.logprobs[num_seen : num_seen + len(new_ids)]
                num_seen += len(new_ids)
                if new_ids:
                    yield [
                        chosen_token(request, token_id, each)
                        for token_id, each in zip(new_ids, candidates, strict=True)
                    ]
        finally:
            if not result.finished:
                result.abort()

    async def stats(self) -> EngineStats:
        # One entry for every iteration since the last call; none says nothing new.
        entries = await asyncio.to_thread(self._llm.get_stats, timeout=_STATS_TIMEOUT_S)
        if entries:
            newest = entries[-1]
            kv_cache = newest.get("kvCacheStats") or {}
            self._stats = EngineStats(
                running=int(newest.get("numActiveRequests", 0)),
                waiting=int(newest.get("numQueuedRequests", 0)),
                kv_used=kv_cache.get("usedNumBlocks", 0) / max(1, kv_cache.get("maxNumBlocks", 0)),
            )
        return self._stats

    async def stop(self) -> None:
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)

    def _sampling(self, request: EngineRequest) -> Any:
        sampling = request.sampling
        how: dict[str, Any] = {}
        if sampling.temperature > 0.0:
            how = {
                "temperature": sampling.temperature,
                "top_k": sampling.top_k or None,
                "top_p": sampling.top_p if sampling.top_p < 1.0 else None,
                "seed": sampling.seed,
            }
        # Greedy is where none of these is given.
        return self._api.SamplingParams(
            max_tokens=request.max_tokens,
            # Our end tokens alone; without a tokenizer it must be told of one all the same.
            end_id=min(request.end_ids, default=0),
            pad_id=0,
            ignore_eos=True,
            stop_token_ids=sorted(request.end_ids) or None,
            include_stop_str_in_output=True,
            # It takes 0 for "none" in some releases.
            logprobs=None if request.num_logprobs is None else max(1, request.num_logprobs),
            detokenize=False,
            add_special_tokens=False,
            **how,
        )


def llm_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Return TensorRT-LLM's arguments for one full instance, besides its KV cache."""
    return {
        "model": str(settings.model_dir),
        "dtype": settings.dtype,
        # Prompts come as token ids, and text is made of the answer's ids here.
        "skip_tokenizer_init": True,
        "max_batch_size": settings.max_sequences,
        "max_seq_len": settings.max_context,
        "max_input_len": settings.max_context - 1,
        "max_num_tokens": max(settings.max_batch_tokens, settings.max_sequences),
        # A prompt may be longer than one forward pass.
        "enable_chunked_prefill": True,
        # What `get_stats` reports.
        "enable_iter_perf_stats": True,
    }
