"""Continuous batching: which sequences take part in the next forward pass, with how many tokens.

It owns the sequences of a replica and the pool of KV blocks: it admits, reserves, preempts and
frees. Pure bookkeeping on one thread: no tensors, no Triton, no clock. With several batches in
flight the sequences are shared out, so that all stages work; a sequence is in at most one batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol.forward import (
    Export,
    ForwardBatch,
    ForwardResult,
    Row,
    chosen_tokens,
)
from paraserve_backend.protocol.sampling import ChosenToken


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def take(self, count: int) -> list[int] | None:
        """Hand out `count` blocks, or none at all when there are not enough."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))

    def check_integrity(self, owned: list[int]) -> None:
        """Assert that every block is either free or owned by exactly one sequence."""
        assert sorted([*self._free, *owned]) == list(range(self.num_blocks)), "KV blocks leaked"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingLimits:
    max_sequences: int
    #: Tokens in one forward pass; longer prompts are prefilled in chunks.
    max_batch_tokens: int
    #: Forward passes under way at once: the number of pipeline stages.
    batches_in_flight: int
    block_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledBatch:
    forward: ForwardBatch
    token_ids: tuple[int, ...]
    #: One per row of `forward`.
    sequences: tuple[TokenSequence, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Advance:
    """A sequence and the token it just got."""

    sequence: TokenSequence
    token: ChosenToken


def _no_exports(_rows: Iterable[tuple[TokenSequence, int]]) -> tuple[Export, ...]:
    return ()


#: What a pass shall send elsewhere, by its sequences and where each will end.
Exports = Callable[[Iterable[tuple[TokenSequence, int]]], tuple[Export, ...]]


class Batcher:
    """Owns the sequences and their KV blocks."""

    def __init__(
        self, limits: BatchingLimits, pool: BlockPool, exports: Exports = _no_exports
    ) -> None:
        self._limits = limits
        self.pool = pool
        self._exports = exports
        self.waiting: deque[TokenSequence] = deque()
        #: In order of admission: the last is the first to give its blocks up.
        self.running: list[TokenSequence] = []

    def add(self, sequence: TokenSequence) -> None:
        self.waiting.append(sequence)

    def adopt(self, sequence: TokenSequence, blocks: list[int] | None) -> None:
        """Go on with a sequence of another replica; it is the next to run.

        Args:
            sequence: with the tokens it got there.
            blocks: hold all of it but its newest token, and are free again where it does not need
                them; `None`: it is prefilled again.
        """
        if blocks is not None:
            sequence.num_computed = sequence.num_tokens - 1
            needed = self._blocks_for(sequence.num_computed)
            sequence.block_table = blocks[:needed]
            self.pool.give_back(blocks[needed:])
        self.waiting.appendleft(sequence)

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.running

    def drop(self, sequence: TokenSequence) -> None:
        """Take a sequence out; its blocks are free at once, or when its batch returns."""
        sequence.is_dropped = True
        if sequence in self.waiting:
            self.waiting.remove(sequence)
            self._free(sequence)
        elif not sequence.in_flight and sequence in self.running:
            self._leave(sequence)

    def schedule(self) -> ScheduledBatch | None:
        """Put together the next forward pass, or `None` when nothing can run now."""
        self._admit()
        chosen: list[tuple[TokenSequence, int]] = []
        budget = self._limits.max_batch_tokens
        for sequence in self._candidates():
            count = min(sequence.num_remaining, budget)
            if count == 0:
                break
            # Preemption below may have sent this one back to the queue.
            if sequence in self.running and self._reserve(sequence, count, chosen):
                chosen.append((sequence, count))
                budget -= count
        return self._build(chosen) if chosen else None

    def complete(self, batch: ScheduledBatch, result: ForwardResult) -> list[Advance]:
        """Fold a result back. Returns what each sequence got, dropped ones left out."""
        advances = []
        tokens = chosen_tokens(batch.forward, result)
        for sequence, row, token in zip(batch.sequences, batch.forward.rows, tokens, strict=True):
            sequence.in_flight = False
            sequence.num_computed += row.num_tokens
            if token is not None and not sequence.is_dropped:
                sequence.append(token.token_id)
                advances.append(Advance(sequence=sequence, token=token))
            if sequence.is_dropped or sequence.finish_reason is not None:
                self._leave(sequence)
        return advances

    def fail(self, batch: ScheduledBatch) -> tuple[TokenSequence, ...]:
        """Drop every sequence of a batch whose forward pass failed."""
        for sequence in batch.sequences:
            sequence.in_flight = False
            self.drop(sequence)
        return batch.sequences

    def check_integrity(self, kept: Sequence[int] = ()) -> None:
        """Assert that no block is lost or owned twice; `kept` are those of sequences to come."""
        sequences = (*self.running, *self.waiting)
        owned = [block for sequence in sequences for block in sequence.block_table]
        self.pool.check_integrity([*owned, *kept])

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._limits.max_sequences:
            first = self.waiting[0]
            needed = self._blocks_for(first.num_tokens + 1) - len(first.block_table)
            if needed > self.pool.num_free - self._promised_blocks():
                return
            self.running.append(self.waiting.popleft())

    def _promised_blocks(self) -> int:
        """Blocks that admitted sequences still need for the prompts they are prefilling."""
        return sum(
            max(0, self._blocks_for(sequence.num_tokens) - len(sequence.block_table))
            for sequence in self.running
        )

    def _candidates(self) -> list[TokenSequence]:
        """Idle sequences, decoding ones first, at most one batch's share of all that run."""
        idle = [s for s in self.running if not s.in_flight and not s.is_held]
        idle.sort(key=lambda sequence: sequence.num_remaining > 1)
        return idle[: -(-len(self.running) // self._limits.batches_in_flight)]

    def _reserve(
        self, sequence: TokenSequence, count: int, chosen: Sequence[tuple[TokenSequence, int]]
    ) -> bool:
        """Make sure it owns blocks for `count` more tokens, at younger ones' cost if need be."""
        missing = self._blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        while missing > self.pool.num_free:
            victim = self._victim(chosen)
            if victim is None or victim is sequence:
                return False
            self._preempt(victim)
        sequence.block_table.extend(self.pool.take(max(0, missing)) or [])
        return True

    def _victim(self, chosen: Sequence[tuple[TokenSequence, int]]) -> TokenSequence | None:
        """The youngest sequence that holds blocks and is neither busy nor chosen."""
        busy = {id(sequence) for sequence, _ in chosen}
        for sequence in reversed(self.running):
            is_busy = sequence.in_flight or sequence.is_held or id(sequence) in busy
            if sequence.block_table and not is_busy:
                return sequence
        return None

    def _preempt(self, sequence: TokenSequence) -> None:
        """Send it back to the queue; it will be prefilled again with what it has generated."""
        self._leave(sequence)
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: TokenSequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)

    def _free(self, sequence: TokenSequence) -> None:
        self.pool.give_back(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def _build(self, chosen: list[tuple[TokenSequence, int]]) -> ScheduledBatch:
        rows, ids, ends = [], [], []
        for sequence, count in chosen:
            sequence.in_flight = True
            end = sequence.num_computed + count
            ends.append((sequence, end))
            ids.extend(sequence.ids(sequence.num_computed, end))
            rows.append(
                Row(
                    start=sequence.num_computed,
                    num_tokens=count,
                    block_table=tuple(sequence.block_table[: self._blocks_for(end)]),
                    sampling=sequence.next_sampling() if end == sequence.num_tokens else None,
                )
            )
        return ScheduledBatch(
            forward=ForwardBatch(rows=tuple(rows), exports=self._exports(ends)),
            token_ids=tuple(ids),
            sequences=tuple(sequence for sequence, _ in chosen),
        )

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)
