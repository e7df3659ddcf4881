"""Tokens per second of the stage engine against transformers eager: same weights, CPU, one process.

    python -m integration.benchmarks.engine [--dtype bfloat16] [--threads 2]

The two take turns and the best of several runs counts, so that a busy machine disturbs both alike.
The last line is JSON: figures, targets and whether they are met.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from paraserve_backend.architectures.spec import Dtype, LayerRange
from paraserve_backend.engines.native.model.kv_cache import BLOCK_SIZE, KvCache
from paraserve_backend.engines.native.model.stage import StageEngine, StageModel
from paraserve_backend.engines.native.model.tensors import TORCH_DTYPE
from paraserve_backend.protocol.forward import ForwardBatch, ForwardResult, Row
from paraserve_backend.protocol.sampling import Sampling
from tests.support.models import TinyModel, write_model

PROMPT_TOKENS = 256
NEW_TOKENS = 24
BATCH_SIZES = (1, 8)
REPEATS = 3
_BLOCKS_EACH = -(-(PROMPT_TOKENS + NEW_TOKENS) // BLOCK_SIZE)
NUM_BLOCKS = max(BATCH_SIZES) * _BLOCKS_EACH
#: About 100 million parameters.
SIZES: Mapping[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}

#: Prompts `[batch, tokens]` to seconds of prefill and of all decode steps.
Timed = Callable[[torch.Tensor], tuple[float, float]]


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder), dtype=TORCH_DTYPE[options.dtype], **SIZES)
        model.oracle.set_attn_implementation("eager")
        contenders = {
            "paraserve": run_ours(_engine(model)),
            "transformers": run_transformers(model.oracle),
        }
        figures = {
            f"{phase}_batch_{size}": figure
            for size in BATCH_SIZES
            for phase, figure in compare(contenders, size).items()
        }
    ratios = {
        name: figure["paraserve"] / figure["transformers"] for name, figure in figures.items()
    }
    targets = dict.fromkeys(ratios, 1.0)
    report = {
        "dtype": options.dtype,
        "threads": options.threads,
        "figures_tokens_per_s": figures,
        "ratios": {name: round(ratio, 2) for name, ratio in ratios.items()},
        "targets": targets,
        "met": all(ratios[name] >= target for name, target in targets.items()),
    }
    print(json.dumps(report))  # noqa: T201


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dtype", type=Dtype, default=Dtype.BFLOAT16, choices=list(Dtype))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def compare(
    contenders: Mapping[str, Timed], size: int, *, vocabulary: int = 32_000
) -> dict[str, dict[str, float]]:
    """Tokens per second by phase and contender; the first round only warms up."""
    prompts = torch.randint(1, vocabulary, (size, PROMPT_TOKENS))
    best = dict.fromkeys(contenders, (float("inf"), float("inf")))
    for repeat in range(REPEATS + 1):
        for name, run in contenders.items():
            prefill_s, decode_s = run(prompts)
            if repeat:
                best[name] = (min(best[name][0], prefill_s), min(best[name][1], decode_s))
    return {
        "prefill": {name: size * PROMPT_TOKENS / prefill for name, (prefill, _) in best.items()},
        "decode": {name: size * NEW_TOKENS / decode for name, (_, decode) in best.items()},
    }


def _engine(model: TinyModel) -> StageEngine:
    spec = model.spec
    layers = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    cache = KvCache(spec, layers, num_blocks=NUM_BLOCKS)
    return StageEngine(StageModel(spec, layers, model, cache))


def run_ours(engine: StageEngine) -> Timed:
    """Time an engine that holds all layers and has `NUM_BLOCKS` blocks of KV cache."""

    def forward(size: int, start: int, token_ids: torch.Tensor) -> torch.Tensor:
        rows = tuple(
            Row(
                start=start,
                num_tokens=len(token_ids) // size,
                block_table=tuple(range(row * _BLOCKS_EACH, (row + 1) * _BLOCKS_EACH)),
                sampling=Sampling(),
            )
            for row in range(size)
        )
        result = engine.step(ForwardBatch(rows=rows), token_ids)
        assert isinstance(result, ForwardResult)
        return torch.tensor(result.token_ids)

    def run(prompts: torch.Tensor) -> tuple[float, float]:
        size = len(prompts)
        began = time.perf_counter()
        token_ids = forward(size, 0, prompts.flatten())
        prefilled = time.perf_counter()
        for step in range(NEW_TOKENS):
            token_ids = forward(size, PROMPT_TOKENS + step, token_ids)
        return prefilled - began, time.perf_counter() - prefilled

    return run


def run_transformers(model: Any) -> Timed:
    """Time a model of `transformers`, on whatever device it is."""

    @torch.inference_mode()
    def run(prompts: torch.Tensor) -> tuple[float, float]:
        began = time.perf_counter()
        output = model(prompts.to(model.device), use_cache=True, logits_to_keep=1)
        token_ids = output.logits[:, -1].argmax(-1)
        token_ids.tolist()  # as ours, it must be there
        prefilled = time.perf_counter()
        for _ in range(NEW_TOKENS):
            output = model(
                token_ids[:, None], past_key_values=output.past_key_values, use_cache=True
            )
            token_ids = output.logits[:, -1].argmax(-1)
            token_ids.tolist()
        return prefilled - began, time.perf_counter() - prefilled

    return run


if __name__ == "__main__":
    main()
