"""How a token is chosen, and what is reported about a chosen one. Records only, no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What changes a row's scores besides temperature, top-k and top-p; most rows have none.

    The last stage chooses the tokens but keeps nothing of a sequence, so what the sequence's tokens
    so far mean for its next one travels with the row: a few ids, and no state on any stage that a
    preemption, another cut of the layers or a hand-over would have to carry along.
    """

    #: Tokens less likely than `min_p` times the likeliest one are left out.
    min_p: float = 0.0
    #: Scores of seen tokens are divided by it if positive, else multiplied; 1.0 is off.
    repetition_penalty: float = 1.0
    #: Taken from the score of every token that was generated; 0.0 is off.
    presence_penalty: float = 0.0
    #: Taken from it as often as the token was generated; 0.0 is off.
    frequency_penalty: float = 0.0
    #: Likeliest tokens to report beside the chosen one and its rank; `None` reports neither.
    num_logprobs: int | None = None
    #: Tokens that must not come next.
    banned_ids: tuple[int, ...] = ()
    #: Distinct tokens the penalties apply to.
    seen_ids: tuple[int, ...] = ()
    #: How often each of `seen_ids` was generated; 0 if it is in the prompt alone.
    seen_counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose one next token.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1.0 switch their filter off. The draw depends
    only on `seed`, in [0, 2**64), and the token's position, never on what else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    steering: Steering | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A chosen token among its rivals."""

    #: 1 for the likeliest token.
    rank: int
    #: The likeliest tokens, best first.
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenToken:
    token_id: int
    logprob: float
    ranking: Ranking | None
