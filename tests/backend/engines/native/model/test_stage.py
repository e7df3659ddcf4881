from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.architectures.tensors import expected_tensors
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.engines.native.model.stage import StageModel
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.protocol.forward import ForwardBatch, Row
from paraserve_backend.protocol.sampling import Sampling
from tests.support.models import (
    CONFIGS,
    VOCAB_SIZE,
    Chain,
    TinyModel,
    write_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = [3, 141, 59, 26, 53, 58, 97, 93, 23, 84, 62, 64, 33, 83, 27, 95, 2, 88, 41, 97, 169]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("chunk", [1, 2, 5, 20])
def test_chunked_prefill_generates_what_whole_prefill_does(llama: TinyModel, chunk: int) -> None:
    chain = Chain(llama, [2, 3])
    assert chain.generate(chain.request(PROMPT), 8, chunk) == llama.greedy(PROMPT, 8)


def test_order_and_holes_of_block_tables_do_not_matter(llama: TinyModel) -> None:
    chain = Chain(llama, num_blocks=60)
    expected = llama.greedy(PROMPT, 12)
    for table in scatter_blocks(60, 4):
        assert chain.generate(chain.request(PROMPT, table), 12) == expected


def test_logits_equal_those_of_transformers(llama: TinyModel) -> None:
    logits = Chain(llama, [1, 4]).logits(batch_of(PROMPT), PROMPT)
    torch.testing.assert_close(logits, llama.logits(PROMPT), rtol=1e-4, atol=1e-4)


def test_bfloat16_begins_with_the_greedy_tokens_of_transformers(tmp_path: Path) -> None:
    model = write_model(tmp_path, dtype=torch.bfloat16)
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
    torch.testing.assert_close(logits[1:], llama.logits([11, 12]), rtol=1e-4, atol=1e-4)
    unsampled = ForwardBatch(rows=rows[:1])
    assert chain.logits(unsampled, [5, 6]).shape == (0, VOCAB_SIZE)


def test_inputs_are_left_unchanged(llama: TinyModel) -> None:
    hidden = torch.randn(len(PROMPT), llama.spec.hidden_size)
    before = hidden.clone()
    Chain(llama, [2, 3]).engines[1].step(batch_of(PROMPT), hidden)
    torch.testing.assert_close(hidden, before, rtol=0, atol=0)


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_asked_for_in_layer_order_and_used_in_place(
    family: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path, family)
    asked: list[str] = []

    class Recorder:
        def get(self, name: str) -> torch.Tensor:
            asked.append(name)
            return model.weights[name]

    layers = LayerRange(start=3, end=5, total=5)
    cache = KvCache(model.spec, layers, num_blocks=8)
    stage = StageModel(model.spec, layers, Recorder(), cache)
    assert asked == list(expected_tensors(model.spec, layers))
    # A change of the provider's bytes shows in the result: nothing was copied, fused or not.
    hidden = torch.randn(len(PROMPT), model.spec.hidden_size)
    before = stage.forward(batch_of(PROMPT), hidden)
    for name in asked:
        kept = model.weights[name].clone()
        model.weights[name].mul_(-0.5)
        assert not torch.equal(stage.forward(batch_of(PROMPT), hidden), before), name
        model.weights[name].copy_(kept)


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


def test_a_row_past_the_last_position_is_refused(llama: TinyModel) -> None:
    chain = Chain(llama, num_blocks=200)
    rows = (Row(start=512, num_tokens=1, block_table=tuple(range(200)), sampling=None),)
    with pytest.raises(InvalidRequest, match="ends at position 513, but the model has 512"):
        chain.logits(ForwardBatch(rows=rows), [1])


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


def scatter_blocks(num_blocks: int, parts: int) -> list[list[int]]:
    """All blocks in random order, dealt out so that the last part gets most."""
    blocks = random.Random(num_blocks).sample(range(num_blocks), num_blocks)
    share = num_blocks // 6
    cuts = [share * part for part in range(parts)] + [num_blocks]
    return [blocks[begin:end] for begin, end in pairwise(cuts)]
