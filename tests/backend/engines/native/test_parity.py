"""Every family against transformers: the same greedy tokens, whatever the cut and the batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
import torch

from tests.support.models import (
    CONFIGS,
    Chain,
    TinyModel,
    write_model,
)
from tests.support.odd_shapes import (
    CONTEXT,
    Fields,
    odd_shape,
    rope_fields,
)

pytestmark = pytest.mark.usefixtures("one_thread")

#: Variants of a family that a draw of shapes could miss.
VARIANTS: Mapping[str, Fields] = {
    "falcon-7b": {},
    "falcon-40b": {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    "falcon-11b": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "falcon-multi-head": {"multi_query": False},
    "falcon-sequential": {"parallel_attn": False, "tie_word_embeddings": True},
    "gemma2-window": {"sliding_window": 6, "attention_bias": True},
    "gemma2-tied": {"tie_word_embeddings": True},
    "gemma2-uncapped": {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-multi-head": {"num_key_value_heads": 4},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral-window": {"sliding_window": 7},
    "opt-tied": {"tie_word_embeddings": True},
    "opt-norm-after": {"do_layer_norm_before": False},
    "opt-no-bias": {"enable_bias": False},
    "opt-no-final-norm": {"_remove_final_layer_norm": True},
    "phi3-window": {"sliding_window": 9},
    "qwen2-window": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3-alternating": {
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": [
            "full_attention" if layer % 3 else "sliding_attention" for layer in range(5)
        ],
    },
    "qwen3-tied": {"tie_word_embeddings": True},
}
SHAPES = range(4)
NEW_TOKENS = 20
LONG_CONTEXT = CONTEXT // 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", CONFIGS)
def test_odd_shapes_generate_the_tokens_of_transformers_at_1_to_4_stages(
    family: str, shape: int, tmp_path: Path
) -> None:
    model = varied_model(tmp_path, family, odd_shape(family, shape))
    prompt = make_prompt(model, 21 + shape)
    expected = model.greedy(prompt, NEW_TOKENS)
    for stages in (1, 2, 3, 4):
        chain = Chain(model, cut(model.spec.num_layers, stages, seed=shape))
        chunk = (None, 6)[stages % 2]
        assert chain.generate(chain.request(prompt), NEW_TOKENS, chunk) == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_generate_the_tokens_of_transformers(variant: str, tmp_path: Path) -> None:
    model = varied_model(tmp_path, variant.split("-")[0], VARIANTS[variant])
    prompt = make_prompt(model, 22)
    expected = model.greedy(prompt, NEW_TOKENS)
    for sizes in ([5], [2, 1, 2]):
        chain = Chain(model, sizes)
        assert chain.generate(chain.request(prompt), NEW_TOKENS) == expected


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        *(("llama", kind) for kind in ("linear", "dynamic", "llama3", "yarn", "longrope")),
        ("falcon", "linear"),
        ("falcon", "yarn"),
        ("phi3", "longrope"),
    ],
)
def test_every_scaling_generates_the_tokens_of_transformers_up_to_the_last_position(
    family: str, scaling: str, tmp_path: Path
) -> None:
    head_dim = 16 if family == "llama" else 12
    fields = {
        "max_position_embeddings": CONTEXT,
        "rope_parameters": rope_fields(scaling, head_dim // 2),
    }
    if family == "phi3":
        fields["original_max_position_embeddings"] = LONG_CONTEXT
    model = varied_model(tmp_path, family, fields)
    limit = model.spec.context_length
    assert limit == (LONG_CONTEXT if scaling == "longrope" else CONTEXT)
    prompt = make_prompt(model, limit - 12)
    chain = Chain(model, [3, 2])
    assert chain.generate(chain.request(prompt), 12, chunk=50) == model.greedy(prompt, 12)


@pytest.mark.parametrize("family", CONFIGS)
def test_rows_of_a_mixed_batch_get_the_tokens_they_get_alone(family: str, tmp_path: Path) -> None:
    model = varied_model(tmp_path, family, {"sliding_window": 7} if family == "mistral" else {})
    chain = Chain(model, [3, 2], num_blocks=96)
    # Lengths far enough apart that decode rows fall into groups of their own.
    prompts = [make_prompt(model, length) for length in (1, 9, 30, 150)]
    blocks = Random(family).sample(range(96), 96)
    tables = (blocks[:16], blocks[16:32], blocks[32:48], blocks[48:])
    requests = [chain.request(prompt, table) for prompt, table in zip(prompts, tables, strict=True)]
    # Joining one by one, with chunks of 16: at any time some decode while others prefill.
    for running in range(1, 22):
        chain.advance(requests[:running], chunk=16)
    for request, prompt in zip(requests, prompts, strict=True):
        generated = request.ids[len(prompt) :]
        assert len(generated) > 8
        assert generated == model.greedy(prompt, len(generated))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", CONFIGS)
def test_half_precision_logits_are_as_near_as_rounding_allows(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family, dtype=dtype)
    prompt = make_prompt(model, 21)
    chain = Chain(model, [2, 3])
    request = chain.request(prompt)
    batch, token_ids = request.batch()
    logits = chain.logits(batch, token_ids)
    assert logits.dtype == dtype
    expected = model.logits(prompt)
    # Weights of this size spread logits over tens; compare with that spread.
    error = (logits.float() - expected.float()).abs().max() / expected.float().std()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def varied_model(folder: Path, family: str, fields: Fields) -> TinyModel:
    """The first seed whose model does not just repeat itself: that would show nothing."""
    for seed in range(20):
        model = write_model(folder, family, seed=seed, **fields)
        if len(set(model.greedy(make_prompt(model, 21), 8))) > 3:
            return model
    raise AssertionError(f"no seed gives {family} with {fields} anything to say")


def make_prompt(model: TinyModel, length: int) -> list[int]:
    return Random(length).choices(range(1, model.spec.vocab_size), k=length)


def cut(num_layers: int, stages: int, seed: int) -> Sequence[int]:
    """Sizes of `stages` stages, uneven at random."""
    bounds = [0, *sorted(Random(seed).sample(range(1, num_layers), stages - 1)), num_layers]
    return [end - start for start, end in pairwise(bounds)]
