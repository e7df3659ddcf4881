"""Chooses next tokens from logits: greedy, or drawn after penalties, temperature and filters.

The order is that of transformers: repetition penalty, presence and frequency penalty (as in vLLM),
banned tokens, temperature, top-k, top-p, min-p. A draw depends on the request's seed and the
token's position alone, so batches and replicas do not change a request's tokens.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence

import numpy as np
import torch

from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.sampling import Ranking, Sampling, Steering

#: One less than a float64 has, so that a fraction of a sum stays below the sum when rounded.
_FRACTION_BITS = 52
#: Up to here a draw would be greedy anyway, and dividing by it could overflow.
_GREEDY_TEMPERATURE = 1e-5


@torch.inference_mode()
def sample(
    logits: torch.Tensor, samplings: Sequence[Sampling], positions: Sequence[int]
) -> ForwardResult:
    """Choose one token per row of `logits` `[rows, vocab_size]`.

    `positions` are those the chosen tokens will take in their sequences. The log probabilities
    are those of the model itself, before penalties, temperature and filters.
    """
    logits = logits.float()
    token_ids = logits.argmax(dim=-1)
    for row, (sampling, position) in enumerate(zip(samplings, positions, strict=True)):
        if sampling.steering is not None or sampling.temperature > _GREEDY_TEMPERATURE:
            token_ids[row] = _choose(logits[row], sampling, position)
    chosen = logits.gather(1, token_ids[:, None])[:, 0]
    normalizers = logits.logsumexp(dim=-1)
    return ForwardResult(
        token_ids=tuple(token_ids.tolist()),
        logprobs=tuple((chosen - normalizers).tolist()),
        rankings=tuple(
            _rank(logits[row], chosen[row], normalizers[row], sampling.steering.num_logprobs)
            for row, sampling in enumerate(samplings)
            if sampling.steering is not None and sampling.steering.num_logprobs is not None
        ),
    )


def steer(logits: torch.Tensor, steering: Steering) -> torch.Tensor:
    """Scores `[vocab_size]` after the penalties; -inf where banned."""
    scores = logits.clone()
    if steering.seen_ids:
        seen_ids = _integers(steering.seen_ids, scores.device)
        scores[seen_ids] = _penalize(scores[seen_ids], steering)
    if steering.banned_ids:
        scores[_integers(steering.banned_ids, scores.device)] = float("-inf")
    return scores


def warp(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Scores `[vocab_size]` after temperature, top-k, top-p and min-p; -inf where filtered out.

    Tokens that tie with the last one kept are kept too.
    """
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores = _drop_below(scores, scores.topk(sampling.top_k).values[-1])
    if sampling.top_p < 1.0:
        scores = _drop_below(scores, _top_p_threshold(scores, sampling.top_p))
    if sampling.steering is not None and sampling.steering.min_p > 0.0:
        scores = _drop_unlikely(scores, sampling.steering.min_p)
    return scores


def _choose(logits: torch.Tensor, sampling: Sampling, position: int) -> torch.Tensor:
    scores = logits if sampling.steering is None else steer(logits, sampling.steering)
    if sampling.temperature <= _GREEDY_TEMPERATURE:
        return scores.argmax()
    return _draw(warp(scores, sampling), sampling.seed, position)


def _draw(scores: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    # In order of token id, not of probability: rounding that differs from batch to batch then
    # moves the borders a little, but never swaps two tokens of nearly equal probability.
    cumulative = scores.softmax(dim=-1).double().cumsum(dim=-1)
    point = cumulative[-1:] * _uniform(seed, position)
    # Scores that are not numbers would end past the last token.
    return torch.searchsorted(cumulative, point, right=True)[0].clamp(max=len(scores) - 1)


def _uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that looks random but follows from its arguments."""
    digest = hashlib.blake2b(struct.pack("<QQ", seed, position), digest_size=8).digest()
    return math.ldexp(int.from_bytes(digest, "little") >> (64 - _FRACTION_BITS), -_FRACTION_BITS)


def _top_p_threshold(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """The lowest score among the fewest best tokens whose probability together reaches `top_p`."""
    ascending = scores.sort().values
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1.0 - top_p
    # The best token stays, whatever `top_p`.
    first_kept = dropped[:-1].sum()
    return ascending[first_kept]


def _drop_below(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(scores < threshold, float("-inf"))


def _drop_unlikely(scores: torch.Tensor, min_p: float) -> torch.Tensor:
    probabilities = scores.softmax(dim=-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(), float("-inf"))


def _penalize(scores: torch.Tensor, steering: Steering) -> torch.Tensor:
    """Scores `[seen]` of the seen tokens after the three penalties."""
    penalty = steering.repetition_penalty
    scores = torch.where(scores < 0, scores * penalty, scores / penalty)
    counts = _integers(steering.seen_counts, scores.device)
    scores = scores - steering.frequency_penalty * counts
    return scores - steering.presence_penalty * (counts > 0)


def _integers(values: Sequence[int], device: torch.device) -> torch.Tensor:
    # By way of numpy: torch itself takes five times as long, a millisecond for a long prompt.
    return torch.from_numpy(np.array(values, np.int64)).to(device)


def _rank(
    logits: torch.Tensor, chosen: torch.Tensor, normalizer: torch.Tensor, num_logprobs: int
) -> Ranking:
    best = logits.topk(min(num_logprobs, len(logits)))
    return Ranking(
        rank=int((logits >= chosen).sum()),
        token_ids=tuple(best.indices.tolist()),
        logprobs=tuple((best.values - normalizer).tolist()),
    )
