"""vLLM as the engine of a full instance: its asynchronous engine, given token ids.

vLLM is imported when an engine starts, not with this module. `engines.signatures` lists what is
called of it.
"""

from __future__ import annotations

import importlib
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

from paraserve_backend.engines.base import (
    EngineDead,
    EngineRequest,
    EngineSettings,
    EngineStats,
    chosen_token,
)
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.engine_abilities import VLLM
from paraserve_backend.protocol.sampling import ChosenToken, Steering

#: It rounds its KV cache down to blocks of at most so many tokens, and keeps one for itself.
_LARGEST_BLOCK_TOKENS = 128
_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_KV_USED = "vllm:kv_cache_usage_perc"


class VllmEngine:
    abilities = VLLM

    def __init__(self, load: Callable[[str], Any] = importlib.import_module) -> None:
        """`load` imports a module by its name."""
        self._load = load
        self._vllm: Any = None
        self._llm: Any = None
        self._dead_error: type[Exception] = EngineDead
        self._refusals: tuple[type[Exception], ...] = ()

    async def start(self, settings: EngineSettings) -> None:
        try:
            self._vllm = self._load("vllm")
        except ImportError as error:
            raise InvalidRequest(
                f"The engine vllm cannot be imported in this server's Python ({error}); install "
                "it there: docs/engines.md."
            ) from error
        self._dead_error = self._load("vllm.v1.engine.exceptions").EngineDeadError
        self._refusals = (ValueError, self._load("vllm.exceptions").VLLMClientError)
        arguments = self._vllm.AsyncEngineArgs(**engine_arguments(settings))
        # On the event loop, which it needs, though it blocks: nobody else uses the loop yet.
        async_llm = self._load("vllm.v1.engine.async_llm").AsyncLLM
        self._llm = async_llm.from_engine_args(engine_args=arguments)

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Sequence[ChosenToken], None]:
        steps = self._llm.generate(
            prompt={"prompt_token_ids": list(request.prompt_ids)},
            sampling_params=self._sampling(request),
            request_id=request.request_id,
        )
        try:
            # vLLM aborts what is closed.
            async with aclosing(steps):
                async for step in steps:
                    output = step.outputs[0]
                    candidates = output.logprobs or [None] * len(output.token_ids)
                    yield [
                        chosen_token(request, token_id, each)
                        for token_id, each in zip(output.token_ids, candidates, strict=True)
                    ]
        except self._dead_error as error:
            raise EngineDead("vLLM's engine process has died") from error
        except self._refusals as error:
            raise InvalidRequest(f"vLLM refuses the request: {error}") from error

    async def stats(self) -> EngineStats:
        metrics = self._load("vllm.v1.metrics.reader").get_metrics_snapshot()
        wanted = {_RUNNING, _WAITING, _KV_USED}
        values = {metric.name: metric.value for metric in metrics if metric.name in wanted}
        return EngineStats(
            running=int(values.get(_RUNNING, 0)),
            waiting=int(values.get(_WAITING, 0)),
            kv_used=float(values.get(_KV_USED, 0.0)),
        )

    async def stop(self) -> None:
        if self._llm is not None:
            self._llm.shutdown()

    def _sampling(self, request: EngineRequest) -> Any:
        sampling = request.sampling
        steering = sampling.steering or Steering()
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=steering.min_p,
            seed=sampling.seed if sampling.temperature > 0.0 else None,
            repetition_penalty=steering.repetition_penalty,
            presence_penalty=steering.presence_penalty,
            frequency_penalty=steering.frequency_penalty,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            # Our end tokens alone, not those it finds in the model's configuration.
            ignore_eos=True,
            stop_token_ids=sorted(request.end_ids),
            logprobs=request.num_logprobs,
            detokenize=False,
            output_kind=self._load("vllm.sampling_params").RequestOutputKind.DELTA,
        )


def engine_arguments(settings: EngineSettings) -> dict[str, Any]:
    """Return vLLM's arguments for one full instance."""
    kv_blocks = -(-settings.kv_tokens // _LARGEST_BLOCK_TOKENS) + 1
    return {
        "model": str(settings.model_dir),
        "load_format": "safetensors",
        "dtype": settings.dtype,
        # Prompts come as token ids, and text is made of the answer's ids here.
        "skip_tokenizer_init": True,
        # Defaults for sampling that a model brings along are not for us.
        "generation_config": "vllm",
        "max_model_len": settings.max_context,
        "max_num_seqs": settings.max_sequences,
        "max_num_batched_tokens": max(settings.max_batch_tokens, settings.max_sequences),
        "enable_chunked_prefill": True,
        "kv_cache_memory_bytes": kv_blocks * _LARGEST_BLOCK_TOKENS * settings.kv_bytes_per_token,
        # Compilation pays on a GPU; on a CPU it needs a C++ compiler, and minutes.
        "enforce_eager": settings.device == "cpu",
    }
