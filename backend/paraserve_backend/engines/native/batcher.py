"""Continuous batching: which sequences take part in the next forward pass, with how many tokens.

It owns the sequences of a replica and the pool of KV blocks: it admits, reserves, preempts and
frees. Pure bookkeeping on one thread: no tensors, no Triton, no clock. With several batches in
flight the sequences are shared out, so that all stages work; a sequence is in at most one batch.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from paraserve_backend.daemon.guard import guarded
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol.forward import (
    Export,
    ForwardBatch,
    ForwardResult,
    Row,
    chosen_tokens,
)
from paraserve_backend.protocol.sampling import ChosenToken

logger = logging.getLogger(__name__)


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
#: Tells whether somebody still waits for a sequence.
IsWanted = Callable[[TokenSequence], bool]


class MalformedResult(Exception):
    """What a forward pass returned does not fit its batch."""


class Batcher:
    """Owns the sequences and their KV blocks.

    What fails of one sequence alone takes only that one out (`take_failed`).
    """

    def __init__(
        self, limits: BatchingLimits, pool: BlockPool, exports: Exports = _no_exports
    ) -> None:
        self._limits = limits
        self.pool = pool
        self._exports = exports
        #: In order. Thousands may wait, so none is looked for from one end to the other.
        self.waiting: OrderedDict[TokenSequence, None] = OrderedDict()
        self._failed: list[TokenSequence] = []
        #: In order of admission: the last is the first to give its blocks up.
        self.running: list[TokenSequence] = []

    def add(self, sequence: TokenSequence) -> None:
        self.waiting[sequence] = None

    def adopt(self, sequence: TokenSequence, blocks: list[int] | None) -> None:
        """Go on with a sequence of another replica; it is the next to run.

        Args:
            sequence: with the tokens it got there.
            blocks: hold all of it but its newest token, and are free again where it does not need
                them; `None`: it is prefilled again.
        """
        if blocks is not None:
            needed = self._blocks_for(sequence.num_tokens - 1)
            # Fewer blocks than that cannot be this sequence's.
            kept = blocks[:needed] if needed <= len(blocks) else []
            sequence.num_computed = sequence.num_tokens - 1 if kept else 0
            sequence.block_table = kept
            self.pool.give_back(blocks[len(kept) :])
        self._put_first(sequence)

    @property
    def is_empty(self) -> bool:
        return not self.waiting and not self.running

    def drop(self, sequence: TokenSequence) -> None:
        """Take a sequence out; its blocks are free at once, or when its batch returns."""
        sequence.is_dropped = True
        if sequence in self.waiting:
            del self.waiting[sequence]
            self._free(sequence)
        elif not sequence.in_flight and sequence in self.running:
            self._leave(sequence)

    def schedule(self, is_wanted: IsWanted = lambda _: True) -> ScheduledBatch | None:
        """Put together the next forward pass, or `None` when nothing can run now.

        Args:
            is_wanted: asked of each sequence before it is admitted; one that nobody wants is
                dropped.
        """
        self._admit(is_wanted)
        while chosen := self._choose():
            batch = self._build(chosen)
            if batch is not None:
                return batch
        return None

    def take_failed(self) -> list[TokenSequence]:
        """Return the sequences that failed since the last call; they are here no more."""
        failed, self._failed = self._failed, []
        return failed

    def _choose(self) -> list[tuple[TokenSequence, int]]:
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
        return chosen

    def complete(self, batch: ScheduledBatch, result: ForwardResult) -> list[Advance]:
        """Fold a result back. Returns what each sequence got, dropped ones left out.

        Raises:
            MalformedResult: nothing has been folded back; `fail` is still to be called.
        """
        if len(result.token_ids) != sum(row.sampling is not None for row in batch.forward.rows):
            raise MalformedResult
        try:
            tokens = list(chosen_tokens(batch.forward, result))
        except (ValueError, RuntimeError) as error:  # how zip and an exhausted iterator say so
            raise MalformedResult from error
        advances = []
        for sequence, row, token in zip(batch.sequences, batch.forward.rows, tokens, strict=True):
            sequence.in_flight = False
            sequence.num_computed += row.num_tokens
            if token is not None and not sequence.is_dropped:
                with guarded(logger, "a request", partial(self._mark_failed, sequence)):
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

    def _admit(self, is_wanted: IsWanted) -> None:
        while self.waiting and len(self.running) < self._limits.max_sequences:
            first = next(iter(self.waiting))
            needed = self._blocks_for(first.num_tokens + 1) - len(first.block_table)
            if needed > self.pool.num_free - self._promised_blocks():
                return
            if not is_wanted(first):
                self.drop(first)
                continue
            del self.waiting[first]
            self.running.append(first)

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
        self._put_first(sequence)

    def _put_first(self, sequence: TokenSequence) -> None:
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)

    def _give_up(self, sequence: TokenSequence) -> None:
        self._mark_failed(sequence)
        self.drop(sequence)

    def _mark_failed(self, sequence: TokenSequence) -> None:
        sequence.is_dropped = True
        self._failed.append(sequence)

    def _leave(self, sequence: TokenSequence) -> None:
        self.running.remove(sequence)
        self._free(sequence)

    def _free(self, sequence: TokenSequence) -> None:
        self.pool.give_back(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = 0

    def _build(self, chosen: list[tuple[TokenSequence, int]]) -> ScheduledBatch | None:
        """Return the pass; `None` where each of its sequences has failed."""
        rows, ids, ends = [], [], []
        for sequence, count in chosen:
            end = sequence.num_computed + count
            with guarded(logger, "a request", partial(self._give_up, sequence)):
                row = self._row(sequence, count, end)
                new_ids = sequence.ids(sequence.num_computed, end)
                sequence.in_flight = True
                ends.append((sequence, end))
                ids.extend(new_ids)
                rows.append(row)
        if not rows:
            return None
        return ScheduledBatch(
            forward=ForwardBatch(rows=tuple(rows), exports=self._exports(ends)),
            token_ids=tuple(ids),
            sequences=tuple(sequence for sequence, _ in ends),
        )

    def _row(self, sequence: TokenSequence, count: int, end: int) -> Row:
        return Row(
            start=sequence.num_computed,
            num_tokens=count,
            block_table=tuple(sequence.block_table[: self._blocks_for(end)]),
            sampling=sequence.next_sampling() if end == sequence.num_tokens else None,
        )

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._limits.block_size)
