from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from paraserve_backend.engines.native.model.sampler import sample, steer, warp
from paraserve_backend.protocol.sampling import Sampling, Steering

VOCAB_SIZE = 60


def make_logits(seed: int, rows: int = 1, spread: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, VOCAB_SIZE, generator=generator) * spread


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 5.0),
    top_k=st.integers(0, VOCAB_SIZE + 5),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
)
def test_filters_keep_what_those_of_transformers_keep(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = make_logits(seed)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)]
    expected = logits
    for warper in warpers:
        expected = warper(torch.zeros(1, 0, dtype=torch.int64), expected)
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, steering=Steering(min_p=min_p)
    )
    torch.testing.assert_close(warp(logits[0], sampling), expected[0], rtol=0, atol=0)


@given(
    seed=st.integers(0, 1000),
    ids=st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30),
    penalty=st.floats(0.01, 100),
)
def test_the_repetition_penalty_is_that_of_transformers(
    seed: int, ids: list[int], penalty: float
) -> None:
    logits = make_logits(seed)
    processor: Any = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([ids]), logits)
    seen = tuple(dict.fromkeys(ids))
    steering = Steering(
        repetition_penalty=penalty, seen_ids=seen, seen_counts=tuple(map(ids.count, seen))
    )
    torch.testing.assert_close(steer(logits[0], steering), expected[0], rtol=0, atol=0)


def test_presence_and_frequency_penalties_count_what_was_generated_and_not_the_prompt() -> None:
    logits = make_logits(2)[0]
    steering = Steering(
        presence_penalty=0.5, frequency_penalty=-0.25, seen_ids=(4, 7, 9), seen_counts=(0, 1, 3)
    )
    expected = logits.clone()
    expected[7] -= 0.5 - 0.25
    expected[9] -= 0.5 - 3 * 0.25
    torch.testing.assert_close(steer(logits, steering), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_banned_token_is_never_chosen(temperature: float) -> None:
    logits = make_logits(3).expand(200, -1)
    banned = tuple(logits[0].topk(VOCAB_SIZE - 2).indices.tolist())
    sampling = Sampling(temperature=temperature, steering=Steering(banned_ids=banned))
    chosen = set(sample(logits, [sampling] * 200, range(200)).token_ids)
    assert chosen
    assert not chosen & set(banned)


def test_a_steered_row_leaves_the_rows_beside_it_alone() -> None:
    logits = make_logits(4, rows=3)
    before = logits.clone()
    steering = Steering(banned_ids=(int(logits[1].argmax()),))
    result = sample(logits, [Sampling(), Sampling(steering=steering), Sampling()], [0, 0, 0])
    assert result.token_ids[::2] == tuple(before.argmax(-1).tolist())[::2]
    assert result.token_ids[1] == int(before[1].topk(2).indices[1])
    assert torch.equal(logits, before)


def test_rankings_belong_to_the_rows_that_asked() -> None:
    logits = make_logits(5, rows=3)
    expected = logits.log_softmax(-1)
    worst = int(logits[2].argmin())
    others = tuple(token for token in range(VOCAB_SIZE) if token != worst)
    samplings = [
        Sampling(steering=Steering(num_logprobs=3)),
        Sampling(),
        Sampling(steering=Steering(num_logprobs=0, banned_ids=others)),
    ]
    first, last = sample(logits, samplings, [0, 0, 0]).rankings
    assert first.rank == 1
    assert list(first.token_ids) == logits[0].topk(3).indices.tolist()
    assert first.logprobs == pytest.approx(expected[0].topk(3).values.tolist(), abs=1e-5)
    assert (last.rank, last.token_ids, last.logprobs) == (VOCAB_SIZE, (), ())


def test_more_rivals_than_tokens_are_all_tokens() -> None:
    result = sample(make_logits(6), [Sampling(steering=Steering(num_logprobs=999))], [0])
    assert sorted(result.rankings[0].token_ids) == list(range(VOCAB_SIZE))


def test_greedy_takes_the_best_token_with_its_log_probability() -> None:
    logits = make_logits(1, rows=5)
    result = sample(logits, [Sampling()] * 5, range(5))
    assert list(result.token_ids) == logits.argmax(-1).tolist()
    expected = logits.log_softmax(-1).max(-1).values.tolist()
    assert result.logprobs == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_p=1e-9),
        Sampling(temperature=2e-5),
        Sampling(temperature=1e-300),
    ],
)
def test_the_narrowest_settings_are_greedy(sampling: Sampling) -> None:
    logits = make_logits(2, rows=20)
    result = sample(logits, [sampling] * 20, range(20))
    assert list(result.token_ids) == logits.argmax(-1).tolist()


@pytest.mark.parametrize("sampling_seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 12, 1.0), (1.0, 0, 0.8)]
)
def test_draws_follow_the_distribution(
    sampling_seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    draws = 4000
    logits = make_logits(3)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=sampling_seed)
    expected = warp(logits[0], sampling).softmax(-1) * draws
    # Positions of one request: consecutive counters must behave like independent draws.
    result = sample(logits.expand(draws, -1), [sampling] * draws, range(draws))
    counts = torch.bincount(torch.tensor(result.token_ids), minlength=VOCAB_SIZE).float()
    assert not counts[expected == 0].any()
    assert chi_square_deviations(counts, expected) < 4


def test_draws_of_consecutive_seeds_are_independent_too() -> None:
    draws = 4000
    logits = make_logits(3)
    samplings = [Sampling(temperature=1.0, seed=seed) for seed in range(draws)]
    result = sample(logits.expand(draws, -1), samplings, [17] * draws)
    counts = torch.bincount(torch.tensor(result.token_ids), minlength=VOCAB_SIZE).float()
    assert chi_square_deviations(counts, logits[0].softmax(-1) * draws) < 4


def test_a_draw_depends_only_on_seed_and_position() -> None:
    logits = make_logits(4, rows=16)
    samplings = [Sampling(temperature=1.3, top_p=0.95, seed=row % 4) for row in range(16)]
    positions = [row // 4 for row in range(16)]
    together = sample(logits, samplings, positions).token_ids
    for row in reversed(range(16)):
        alone = sample(logits[row : row + 1], [samplings[row]], [positions[row]])
        assert alone.token_ids == together[row : row + 1]


def test_log_probabilities_ignore_penalties_temperature_and_filters() -> None:
    logits = make_logits(5)
    steering = Steering(repetition_penalty=3.0, seen_ids=(1, 2, 3), seen_counts=(1, 0, 2))
    result = sample(logits, [Sampling(temperature=4.0, top_k=3, seed=2, steering=steering)], [0])
    expected = float(logits[0].log_softmax(-1)[result.token_ids[0]])
    assert result.logprobs[0] == pytest.approx(expected, abs=1e-5)


def test_logits_that_are_not_numbers_still_give_a_token_of_the_vocabulary() -> None:
    logits = torch.full((2, VOCAB_SIZE), math.nan)
    result = sample(logits, [Sampling(temperature=1.0), Sampling()], [0, 0])
    assert all(0 <= token < VOCAB_SIZE for token in result.token_ids)


def test_a_small_change_of_the_logits_seldom_changes_the_token() -> None:
    logits = make_logits(6, rows=500)
    samplings = [Sampling(temperature=1.0, seed=9)] * 500
    nudged = logits + make_logits(7, rows=500, spread=1e-5)
    before = sample(logits, samplings, range(500)).token_ids
    after = sample(nudged, samplings, range(500)).token_ids
    assert sum(old != new for old, new in zip(before, after, strict=True)) <= 1


def chi_square_deviations(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """How many standard deviations the statistic lies above its mean; rare tokens are pooled."""
    common = expected >= 5
    pooled_counts = torch.cat((counts[common], counts[~common].sum()[None]))
    pooled = torch.cat((expected[common], expected[~common].sum()[None])).clamp(min=1e-9)
    statistic = float(((pooled_counts - pooled) ** 2 / pooled).sum())
    freedom = len(pooled) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)
