"""A second engine for tests: `transformers` behind the interface that TensorRT-LLM and vLLM have.

It has nothing in common with our own engine but the checkpoint. Greedy, one sequence at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from paraserve_backend.engines.base import (
    EngineRequest,
    EngineSettings,
    EngineStats,
    chosen_token,
)
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.engine_abilities import Abilities
from paraserve_backend.protocol.sampling import ChosenToken
from tests.support.engine_packages import write_engine_package

#: The model.py of a Triton backend to which a package in `folder` offers this engine.
_MODEL_PY = """\
import sys
sys.path[:0] = [{folder!r}, {repository!r}]
from paraserve_backend.tritonserver.stub.model import TritonPythonModel
"""
_REPOSITORY = Path(__file__).resolve().parents[2]


def model_py(folder: Path) -> str:
    """Return the model.py of a backend that has this engine; `folder` is new."""
    engine = f"{TransformersEngine.__module__}:{TransformersEngine.__name__}"
    write_engine_package(folder, "second-engine", {TransformersEngine.abilities.name: engine})
    return _MODEL_PY.format(folder=str(folder), repository=str(_REPOSITORY))


class TransformersEngine:
    abilities = Abilities(name="transformers", settings=frozenset(), carried=frozenset())

    def __init__(self) -> None:
        self._model: Any = None
        self._running = 0

    async def start(self, settings: EngineSettings) -> None:
        torch.set_num_threads(1)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model_dir, dtype=getattr(torch, settings.dtype), local_files_only=True
        )

    async def submit(self, request: EngineRequest) -> AsyncGenerator[Sequence[ChosenToken], None]:
        if request.sampling.temperature > 0.0:
            raise InvalidRequest("The engine transformers is greedy; leave 'temperature' out.")
        self._running += 1
        try:
            new_ids, past = list(request.prompt_ids), None
            for _ in range(request.max_tokens):
                logprobs, past = await asyncio.to_thread(self._step, new_ids, past)
                token_id = int(logprobs.argmax())
                new_ids = [token_id]
                own = SimpleNamespace(logprob=float(logprobs[token_id]), rank=1)
                yield [chosen_token(request, token_id, {token_id: own})]
        finally:
            self._running -= 1

    async def stats(self) -> EngineStats:
        return EngineStats(running=self._running, waiting=0, kv_used=0.0)

    async def stop(self) -> None:
        self._model = None

    @torch.inference_mode()
    def _step(self, ids: list[int], past: Any) -> tuple[torch.Tensor, Any]:
        output = self._model(torch.tensor([ids]), past_key_values=past, use_cache=True)
        return output.logits[0, -1].float().log_softmax(-1), output.past_key_values
