"""Penalties, bad words and the shortest answer, token by token, against transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from paraserve_backend.engines.native.model.sampler import steer
from paraserve_backend.generation.sequence import History
from paraserve_backend.protocol.sampling import Sampling, Steering

VOCAB_SIZE = 6
IDS = st.integers(0, VOCAB_SIZE - 1)


def steering_of(history: History) -> Steering:
    return history.sampling().steering or Steering()


@given(
    prompt=st.lists(IDS, min_size=1, max_size=5),
    output=st.lists(IDS, max_size=8),
    bad_words=st.lists(st.lists(IDS, min_size=1, max_size=3), min_size=1, max_size=5),
    min_tokens=st.integers(0, 5),
    end_ids=st.sets(IDS, min_size=1, max_size=2),
    penalty=st.sampled_from([1.0, 1.5, 0.5]),
)
def test_every_step_has_the_scores_transformers_would_give_it(
    prompt: list[int],
    output: list[int],
    bad_words: list[list[int]],
    min_tokens: int,
    end_ids: set[int],
    penalty: float,
) -> None:
    ends = sorted(end_ids)
    processors: list[Any] = [
        RepetitionPenaltyLogitsProcessor(penalty),
        MinNewTokensLengthLogitsProcessor(len(prompt), min_tokens, ends),
    ]
    if any(word not in [[end] for end in ends] for word in bad_words):  # it refuses none at all
        processors.insert(1, NoBadWordsLogitsProcessor(bad_words, ends))
    history = History(
        Sampling(steering=Steering(repetition_penalty=penalty)),
        prompt,
        bad_words=map(tuple, bad_words),
        end_ids=end_ids,
        min_tokens=min_tokens,
    )
    logits = torch.linspace(-2.0, 2.0, VOCAB_SIZE)
    for end in range(len(output) + 1):
        expected = logits[None]
        for processor in processors:
            expected = processor(torch.tensor([prompt + output[:end]]), expected)
        torch.testing.assert_close(steer(logits, steering_of(history)), expected[0])
        if end < len(output):
            history.append(output[end])


def test_presence_and_frequency_penalties_look_at_generated_tokens_alone() -> None:
    history = History(Sampling(steering=Steering(presence_penalty=1.0)), [1, 2, 2])
    for token in (2, 5, 2):
        history.append(token)
    steering = steering_of(history)
    assert dict(zip(steering.seen_ids, steering.seen_counts, strict=True)) == {2: 2, 5: 1}


def test_the_repetition_penalty_looks_at_the_prompt_too() -> None:
    history = History(Sampling(steering=Steering(repetition_penalty=1.5)), [1, 2, 2])
    history.append(2)
    steering = steering_of(history)
    assert dict(zip(steering.seen_ids, steering.seen_counts, strict=True)) == {1: 0, 2: 1}


@pytest.mark.parametrize("sampling", [Sampling(seed=3), Sampling(steering=Steering(min_p=0.5))])
def test_a_sequence_without_history_keeps_its_sampling(sampling: Sampling) -> None:
    history = History(sampling, [1, 2], bad_words=[(3, 4)])
    for token in (1, 2):
        history.append(token)
        assert history.sampling() is sampling


def test_end_tokens_are_banned_until_the_answer_is_long_enough() -> None:
    history = History(Sampling(), [1], end_ids={4, 5}, min_tokens=2)
    banned = []
    for token in (1, 1, 1):
        banned.append(steering_of(history).banned_ids)
        history.append(token)
    assert banned == [(4, 5), (4, 5), ()]
