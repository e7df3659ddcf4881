"""Tiny random checkpoints written by transformers, and a chain of stages to run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers.utils import logging as transformers_logging

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.engines.native.model.stage import StageEngine, StageModel
from paraserve_backend.protocol.forward import ForwardBatch, ForwardResult, Row
from paraserve_backend.protocol.sampling import Sampling

transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]

VOCAB_SIZE = 199
CONFIGS: Mapping[str, Callable[..., transformers.PreTrainedConfig]] = {
    "falcon": transformers.FalconConfig,
    "gemma2": transformers.Gemma2Config,
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "opt": transformers.OPTConfig,
    "phi3": transformers.Phi3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
# Weights far larger than a trained model's: with usual ones a random model repeats one token.
TINY: Mapping[str, object] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GATED: Mapping[str, object] = {"intermediate_size": 80, "num_key_value_heads": 2}
_LLAMA: Mapping[str, object] = {**_GATED, "head_dim": 16, "sliding_window": None}
#: What each family's config has besides `TINY`.
FAMILY_FIELDS: Mapping[str, Mapping[str, object]] = {
    "falcon": {"ffn_hidden_size": 80},
    "gemma2": {**_GATED, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 512},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": {"ffn_dim": 80, "init_std": 0.2},
    "phi3": _GATED,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A checkpoint folder, what we read from it, and the oracle."""

    folder: Path
    spec: ModelSpec
    weights: Mapping[str, torch.Tensor]
    oracle: Any

    def get(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """What transformers generates after `prompt`."""
        with torch.inference_mode():
            ids = self.oracle.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=num_tokens,
            )
        return [int(token) for token in ids[0, len(prompt) :]]

    def logits(self, prompt: Sequence[int]) -> torch.Tensor:
        """What transformers computes for the token after `prompt`, `[1, vocab_size]`."""
        with torch.inference_mode():
            logits: torch.Tensor = self.oracle(torch.tensor([prompt])).logits[:, -1]
        return logits


def write_model(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: object,
) -> TinyModel:
    """Write a random checkpoint as transformers does and read it back as we do."""
    print(f"{family} with seed {seed}: {overrides}")  # noqa: T201
    torch.manual_seed(seed)
    config = CONFIGS[family](**{**TINY, **FAMILY_FIELDS[family], **overrides})
    model: Any = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, dtype=dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # These start as ones and zeros.
            if "norm" in name or ".ln_" in name or name.endswith("bias"):
                # The last norm far off, or a model with tied embeddings repeats its last token.
                spread = 0.1 if any(part.isdecimal() for part in name.split(".")) else 2.0
                parameter.add_(torch.randn_like(parameter) * spread)
    model.eval().save_pretrained(folder)
    return TinyModel(
        folder=folder,
        spec=model_spec(json.loads((folder / "config.json").read_text())),
        weights=load_file(folder / "model.safetensors"),
        oracle=model,
    )


def write_words(folder: Path) -> None:
    """Write a tokenizer whose token `i` is the word `w<i>`."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB_SIZE)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))


@dataclass(slots=True, kw_only=True)
class Request:
    """One sequence on its way through a chain: prompt first, then what was generated."""

    ids: list[int]
    block_table: tuple[int, ...]
    sampling: Sampling
    #: Tokens whose keys and values are cached.
    done: int = 0

    def take(self, most: int | None = None) -> tuple[Row, list[int]]:
        """The next row and its tokens, at most so many."""
        start = self.done
        self.done = min(len(self.ids), start + (most or len(self.ids)))
        row = Row(
            start=start,
            num_tokens=self.done - start,
            block_table=self.block_table,
            sampling=self.sampling if self.done == len(self.ids) else None,
        )
        return row, self.ids[start : self.done]

    def batch(self) -> tuple[ForwardBatch, list[int]]:
        """All that is left to do, as a batch of its own, and its tokens."""
        row, token_ids = self.take()
        return ForwardBatch(rows=(row,)), token_ids


class Chain:
    """Stages in one process, of the given numbers of layers."""

    def __init__(
        self,
        model: TinyModel,
        sizes: Sequence[int] | None = None,
        *,
        num_blocks: int = 64,
        block_size: int = 4,
    ) -> None:
        self.num_blocks = num_blocks
        self.engines: list[StageEngine] = []
        start = 0
        for size in sizes or [model.spec.num_layers]:
            layers = LayerRange(start=start, end=start + size, total=model.spec.num_layers)
            cache = KvCache(model.spec, layers, num_blocks=num_blocks, block_size=block_size)
            self.engines.append(StageEngine(StageModel(model.spec, layers, model, cache)))
            start += size
        assert start == model.spec.num_layers

    def request(
        self,
        prompt: Sequence[int],
        blocks: Sequence[int] | None = None,
        sampling: Sampling | None = None,
    ) -> Request:
        table = tuple(range(self.num_blocks) if blocks is None else blocks)
        return Request(ids=list(prompt), block_table=table, sampling=sampling or Sampling())

    def logits(self, batch: ForwardBatch, token_ids: Sequence[int]) -> torch.Tensor:
        tensor = torch.tensor(token_ids)
        for engine in self.engines:
            tensor = engine.model.forward(batch, tensor)
        return tensor

    def step(self, batch: ForwardBatch, token_ids: Sequence[int]) -> ForwardResult:
        tensor = torch.tensor(token_ids)
        for engine in self.engines[:-1]:
            hidden = engine.step(batch, tensor)
            assert isinstance(hidden, torch.Tensor)
            tensor = hidden
        result = self.engines[-1].step(batch, tensor)
        assert isinstance(result, ForwardResult)
        return result

    def advance(self, requests: Sequence[Request], chunk: int | None = None) -> None:
        """One batch with the next row of each; chosen tokens join their requests."""
        taken = [request.take(chunk) for request in requests]
        batch = ForwardBatch(rows=tuple(row for row, _ in taken))
        result = self.step(batch, [token for _, tokens in taken for token in tokens])
        chosen = iter(result.token_ids)
        for request, (row, _) in zip(requests, taken, strict=True):
            if row.sampling is not None:
                request.ids.append(next(chosen))

    def generate(self, request: Request, num_tokens: int, chunk: int | None = None) -> list[int]:
        """Run `request` alone in its batches."""
        length = len(request.ids)
        while len(request.ids) < length + num_tokens:
            self.advance([request], chunk)
        return request.ids[length:]
