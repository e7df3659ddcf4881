"""What one sequence computes, or has left in the cache, never reaches another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests.support.models import (
    VOCAB_SIZE,
    Chain,
    TinyModel,
    write_model,
)
from tests.support.odd_shapes import Fields

pytestmark = pytest.mark.usefixtures("one_thread")

POISON = VOCAB_SIZE - 1
SHORT, LONG = [5, 9, 33], list(range(10, 40))
#: Fused attention, and the one for capped scores, with and without a window.
FAMILIES: Mapping[str, Fields] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7},
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> TinyModel:
    family: str = request.param
    return write_model(tmp_path, family, **FAMILIES[family])


@pytest.mark.parametrize("left", [float("nan"), float("inf")])
def test_what_blocks_held_before_does_not_matter(model: TinyModel, left: float) -> None:
    chain = Chain(model, [2, 3])
    for engine in chain.engines:
        engine.model.kv_cache.storage.fill_(left)
    requests = [chain.request(SHORT, range(8)), chain.request(LONG, range(8, 24))]
    for _ in range(12):
        chain.advance(requests, chunk=7)
    for request, prompt in zip(requests, (SHORT, LONG), strict=True):
        generated = request.ids[len(prompt) :]
        assert generated == model.greedy(prompt, len(generated))


@pytest.mark.parametrize("is_longer", [True, False])
def test_a_sequence_that_overflows_harms_no_other_in_its_batches(
    model: TinyModel, is_longer: bool
) -> None:
    expected = model.greedy(SHORT if is_longer else LONG, 12)
    poison(model)
    chain = Chain(model, [3, 2])
    bad, good = (LONG, SHORT) if is_longer else (SHORT, LONG)
    # The poisoned one owns block 0, as whoever comes first does.
    poisoned = chain.request([POISON, *bad], range(16))
    watched = chain.request(good, range(16, 32))
    for _ in range(12):
        chain.advance([poisoned, watched])
    assert watched.ids[len(good) :] == expected
    assert chain.logits(*chain.request([POISON]).batch()).isnan().all()


def test_blocks_of_a_sequence_that_overflowed_serve_the_next_one(model: TinyModel) -> None:
    expected = [model.greedy(prompt, 8) for prompt in (SHORT, LONG)]
    poison(model)
    chain = Chain(model)
    chain.generate(chain.request([POISON, *LONG], range(10)), 8)
    requests = [chain.request(SHORT, range(7, 10)), chain.request(LONG, [*range(7), 10, 11, 12])]
    for _ in range(8):
        chain.advance(requests)
    assert [request.ids[-8:] for request in requests] == expected


def poison(model: TinyModel) -> None:
    """Make one token's embedding what a float16 overflow leads to."""
    model.weights[model.spec.names.embedding[0]][POISON] = torch.nan
