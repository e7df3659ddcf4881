"""One forward pass as data: what the generate loop sends to every stage, and what comes back.

The generate loop owns the schedule and the KV blocks, so a batch carries each sequence's block
table and the stages keep no scheduling state. Its binary form is `forward_codec`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from paraserve_backend.protocol.sampling import ChosenToken, Ranking, Sampling


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
class ForwardResult:
    """One entry per row whose `sampling` was set, in row order."""

    token_ids: tuple[int, ...]
    #: Natural logarithm of each chosen token's probability by the model itself: before penalties,
    #: temperature and filters.
    logprobs: tuple[float, ...]
    #: One per row that asked for `num_logprobs`, in row order.
    rankings: tuple[Ranking, ...] = ()


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
