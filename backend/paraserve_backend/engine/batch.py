"""One forward pass as data: what the generate loop sends to every stage, and what comes back.

The generate loop owns the schedule and the KV blocks, so a batch carries each sequence's block
table and the stages keep no scheduling state. The binary form is the same in a Triton tensor and
in an activation frame: little-endian, fixed layout, no pickle.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose one next token.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1.0 switch their filter off. The draw depends
    only on `seed` and the token's position, never on what else is in the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


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
class ForwardBatch:
    rows: tuple[Row, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardResult:
    """One entry per row whose `sampling` was set, in row order."""

    token_ids: tuple[int, ...]
    #: Natural logarithm of each chosen token's probability under the unfiltered distribution.
    logprobs: tuple[float, ...]
