from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from paraserve_backend.contract import LayerRange
from paraserve_backend.engine.batch import ForwardBatch, Row, Sampling
from paraserve_backend.engine.kv_cache import KvCache
from paraserve_backend.engine.model import StageModel
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.families.tensors import expected_tensors
from tests.backend.models import VOCAB_SIZE, Chain, TinyModel, write_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-multi-head": {"num_key_value_heads": 4},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-rope-llama3": {"rope_parameters": LLAMA3},
    "llama-rope-linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
    },
    "mistral": {},
    "mistral-window": {"sliding_window": 7},
    "qwen2": {"head_dim": 12},
    "qwen2-window": {
        "head_dim": 12,
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
    },
    "qwen3": {"head_dim": 24},
    "qwen3-tied": {"tie_word_embeddings": True},
}
PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97, 169]


def tiny(folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> TinyModel:
    family = variant.split("-")[0]
    seed = sorted(VARIANTS).index(variant)
    return write_model(folder, family, seed=seed, dtype=dtype, **VARIANTS[variant])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_any_cut_equal_those_of_transformers(variant: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, variant)
    expected = model.greedy(PROMPT, 24)
    assert len(set(expected)) > 4, "the oracle repeats itself and shows nothing"
    for sizes in ([5], [3, 2], [1, 3, 1], [2, 1, 1, 1]):
        chain = Chain(model, sizes)
        assert chain.generate(chain.request(PROMPT), 24) == expected


@pytest.mark.parametrize("variant", ["llama", "mistral-window", "qwen3"])
@pytest.mark.parametrize("chunk", [1, 2, 5, 20])
def test_chunked_prefill_generates_what_whole_prefill_does(
    variant: str, chunk: int, tmp_path: Path
) -> None:
    model = tiny(tmp_path, variant)
    whole, chunked = Chain(model, [2, 3]), Chain(model, [2, 3])
    expected = whole.generate(whole.request(PROMPT), 8)
    assert chunked.generate(chunked.request(PROMPT), 8, chunk) == expected


@pytest.mark.parametrize("variant", ["llama", "qwen2-window"])
def test_rows_of_a_mixed_batch_get_the_tokens_they_get_alone(variant: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, variant)
    chain = Chain(model, [3, 2], num_blocks=96)
    # Lengths far enough apart that decode rows fall into groups of their own.
    prompts = [random_prompt(length, seed=length) for length in (1, 9, 30, 150)]
    scattered = scatter_blocks(96, 4)
    requests = [
        chain.request(prompt, blocks) for prompt, blocks in zip(prompts, scattered, strict=True)
    ]
    # Joining one by one, with chunks of 16: at any time some decode while others prefill.
    for running in range(1, 24):
        chain.advance(requests[:running], chunk=16)
    for request, prompt in zip(requests, prompts, strict=True):
        generated = request.ids[len(prompt) :]
        assert len(generated) > 8
        assert generated == model.greedy(prompt, len(generated))


def test_order_and_holes_of_block_tables_do_not_matter(llama: TinyModel) -> None:
    chain = Chain(llama, num_blocks=60)
    expected = llama.greedy(PROMPT, 12)
    for table in scatter_blocks(60, 4):
        assert chain.generate(chain.request(PROMPT, table), 12) == expected


def test_what_blocks_held_before_does_not_matter(llama: TinyModel) -> None:
    chain = Chain(llama, [2, 3])
    for engine in chain.engines:
        engine.model.kv_cache.storage.fill_(1e4)
    assert chain.generate(chain.request(PROMPT), 12) == llama.greedy(PROMPT, 12)


def test_logits_equal_those_of_transformers(llama: TinyModel) -> None:
    logits = Chain(llama, [1, 4]).logits(batch_of(PROMPT), PROMPT)
    torch.testing.assert_close(logits, oracle_logits(llama, PROMPT), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_half_precision_logits_are_as_near_as_rounding_allows(
    variant: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = tiny(tmp_path, variant, dtype)
    logits = Chain(model, [2, 3]).logits(batch_of(PROMPT), PROMPT)
    assert logits.dtype == dtype
    expected = oracle_logits(model, PROMPT)
    # Weights of this size spread logits over tens; compare with that spread.
    error = (logits.float() - expected.float()).abs().max() / expected.float().std()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def test_bfloat16_begins_with_the_greedy_tokens_of_transformers(tmp_path: Path) -> None:
    model = tiny(tmp_path, "llama", torch.bfloat16)
    chain = Chain(model, [2, 3])
    assert chain.generate(chain.request(PROMPT), 6) == model.greedy(PROMPT, 6)


def test_only_rows_with_sampling_have_logits(llama: TinyModel) -> None:
    chain = Chain(llama)
    rows = tuple(
        Row(start=0, num_tokens=2, block_table=(block,), sampling=sampling)
        for block, sampling in enumerate((None, Sampling(), None, Sampling()))
    )
    logits = chain.logits(ForwardBatch(rows=rows), [5, 6, 7, 8, 9, 10, 11, 12])
    assert logits.shape == (2, VOCAB_SIZE)
    torch.testing.assert_close(logits[1:], oracle_logits(llama, [11, 12]), rtol=1e-4, atol=1e-4)
    unsampled = ForwardBatch(rows=rows[:1])
    assert chain.logits(unsampled, [5, 6]).shape == (0, VOCAB_SIZE)


def test_inputs_are_left_unchanged(llama: TinyModel) -> None:
    hidden = torch.randn(len(PROMPT), llama.spec.hidden_size)
    before = hidden.clone()
    Chain(llama, [2, 3]).engines[1].step(batch_of(PROMPT), hidden)
    torch.testing.assert_close(hidden, before, rtol=0, atol=0)


def test_weights_are_asked_for_in_layer_order_and_used_in_place(llama: TinyModel) -> None:
    asked: list[str] = []

    class Recorder:
        def get(self, name: str) -> torch.Tensor:
            asked.append(name)
            return llama.weights[name]

    layers = LayerRange(start=3, end=5, total=5)
    cache = KvCache(llama.spec, layers, num_blocks=8)
    stage = StageModel(llama.spec, layers, Recorder(), cache)
    assert asked == list(expected_tensors(llama.spec, layers))
    # A change of the provider's bytes shows in the result: nothing was copied.
    hidden = torch.randn(len(PROMPT), llama.spec.hidden_size)
    before = stage.forward(batch_of(PROMPT), hidden)
    for name in asked:
        kept = llama.weights[name].clone()
        llama.weights[name].mul_(-0.5)
        assert not torch.equal(stage.forward(batch_of(PROMPT), hidden), before), name
        llama.weights[name].copy_(kept)


def test_a_tensor_of_the_wrong_shape_is_named(llama: TinyModel) -> None:
    class Transposed:
        def get(self, name: str) -> torch.Tensor:
            return llama.weights[name].T if name.endswith("up_proj.weight") else llama.weights[name]

    layers = LayerRange(start=0, end=1, total=5)
    cache = KvCache(llama.spec, layers, num_blocks=1)
    with pytest.raises(InvalidCheckpoint, match=r"0\.mlp\.up_proj\.weight.*\[48, 80\].*\[80, 48\]"):
        StageModel(llama.spec, layers, Transposed(), cache)


@pytest.mark.parametrize(
    ("row", "token_ids", "message"),
    [
        ({"block_table": (0,)}, [1] * 5, "ends at position 5, but its 1 KV blocks of 4 hold 4"),
        ({"block_table": ()}, [1] * 5, "its 0 KV blocks"),
        ({"block_table": (0, 64)}, [1] * 5, "KV blocks 0 to 64, but the stage has 64"),
        ({}, [1] * 4, r"token ids have shape \[4\], the batch needs \[5\]"),
        ({}, [1] * 4 + [VOCAB_SIZE], rf"Token ids from 1 to {VOCAB_SIZE}"),
        ({}, [1] * 4 + [-1], "Token ids from -1 to 1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(
    llama: TinyModel, row: dict[str, Any], token_ids: list[int], message: str
) -> None:
    fields = {"start": 0, "num_tokens": 5, "block_table": (0, 1), "sampling": None, **row}
    with pytest.raises(InvalidRequest, match=message):
        Chain(llama).logits(ForwardBatch(rows=(Row(**fields),)), token_ids)


def test_an_empty_batch_is_refused(llama: TinyModel) -> None:
    with pytest.raises(InvalidRequest, match="at least one row"):
        Chain(llama).logits(ForwardBatch(rows=()), [])


def test_hidden_states_of_the_wrong_width_are_refused(llama: TinyModel) -> None:
    last = Chain(llama, [2, 3]).engines[1].model
    with pytest.raises(InvalidRequest, match="hidden states"):
        last.forward(batch_of([1, 2]), torch.zeros(2, llama.spec.hidden_size + 1))


def batch_of(prompt: Sequence[int]) -> ForwardBatch:
    row = Row(start=0, num_tokens=len(prompt), block_table=tuple(range(8)), sampling=Sampling())
    return ForwardBatch(rows=(row,))


def random_prompt(length: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(1, VOCAB_SIZE), k=length)


def scatter_blocks(num_blocks: int, parts: int) -> list[list[int]]:
    """All blocks in random order, dealt out so that the last part gets most."""
    blocks = random.Random(num_blocks).sample(range(num_blocks), num_blocks)
    share = num_blocks // 6
    cuts = [share * part for part in range(parts)] + [num_blocks]
    return [blocks[begin:end] for begin, end in pairwise(cuts)]


def oracle_logits(model: TinyModel, prompt: Sequence[int]) -> torch.Tensor:
    """What transformers computes for the token after `prompt`, `[1, vocab_size]`."""
    with torch.inference_mode():
        logits: torch.Tensor = model.oracle(torch.tensor([prompt])).logits[:, -1]
    return logits
