"""One forward pass as data: what the generate loop sends to every stage, and what comes back.

The generate loop owns the schedule and the KV blocks, so a batch carries each sequence's block
table and the stages keep no scheduling state. Its binary form is `batch_codec`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
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
class Row:
    """One sequence's part of a batch: `num_tokens` new tokens from position `start` on."""

    start: int
    num_tokens: int
    #: KV blocks that hold positions `[0, start + num_tokens)`, in order.
    block_table: tuple[int, ...]
    #: `None` while a prompt is still being prefilled in chunks: no token is wanted yet.
    sampling: Sampling | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """KV blocks that every stage sends elsewhere, of its own layers, when the pass is done.

    It travels with a forward pass, so that it comes to every stage in the order of the passes.
    """

    #: Where to, `tcp://host:port`.
    address: str
    #: What the receiver knows the sequence by.
    ticket: int
    #: The first block's place in the sequence.
    first: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    rows: tuple[Row, ...]
    exports: tuple[Export, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A chosen token among its rivals."""

    #: 1 for the likeliest token.
    rank: int
    #: The likeliest tokens, best first.
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """One entry per row whose `sampling` was set, in row order."""

    token_ids: tuple[int, ...]
    #: Natural logarithm of each chosen token's probability by the model itself: before penalties,
    #: temperature and filters.
    logprobs: tuple[float, ...]
    #: One per row that asked for `num_logprobs`, in row order.
    rankings: tuple[Ranking, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenToken:
    token_id: int
    logprob: float
    ranking: Ranking | None


def chosen_tokens(batch: ForwardBatch, result: ForwardResult) -> Iterator[ChosenToken | None]:
    """Yield what `result` has for each row of `batch`; `None` where no token was wanted."""
    entries = zip(result.token_ids, result.logprobs, strict=True)
    rankings = iter(result.rankings)
    for row in batch.rows:
        if row.sampling is None:
            yield None
            continue
        token_id, logprob = next(entries)
        steering = row.sampling.steering
        is_ranked = steering is not None and steering.num_logprobs is not None
        ranking = next(rankings) if is_ranked else None
        yield ChosenToken(token_id=token_id, logprob=logprob, ranking=ranking)
