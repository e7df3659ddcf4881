"""The continuous batching schedule, with a stand-in model that hashes what it is shown."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paraserve_backend.engines.native.batcher import (
    Batcher,
    BatchingLimits,
    BlockPool,
    ScheduledBatch,
)
from paraserve_backend.generation.sequence import History, TokenSequence
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.sampling import Sampling, Steering

BLOCK_SIZE = 4


def make_batcher(
    *,
    num_blocks: int = 64,
    max_sequences: int = 8,
    max_batch_tokens: int = 16,
    batches_in_flight: int = 1,
) -> Batcher:
    limits = BatchingLimits(
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        batches_in_flight=batches_in_flight,
        block_size=BLOCK_SIZE,
    )
    return Batcher(limits, BlockPool(num_blocks))


def make_remembering_sequence(prompt: Sequence[int], max_tokens: int) -> TokenSequence:
    """A sequence whose rows say which tokens it has seen how often."""
    sampling = Sampling(steering=Steering(repetition_penalty=2.0))
    return TokenSequence(
        prompt_ids=list(prompt),
        sampling=sampling,
        history=History(sampling, prompt),
        max_tokens=max_tokens,
    )


def make_sequence(
    prompt: Sequence[int] = (1, 2, 3), max_tokens: int = 4, eos: frozenset[int] = frozenset()
) -> TokenSequence:
    return TokenSequence(
        prompt_ids=list(prompt), sampling=Sampling(), max_tokens=max_tokens, end_ids=eos
    )


def next_token(ids: Sequence[int]) -> int:
    """What the stand-in model answers: it depends on every token so far."""
    value = 7
    for token in ids:
        value = (value * 31 + token) % 1009
    return value


def solo(prompt: Sequence[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(next_token(ids))
    return ids[len(prompt) :]


def solo_remembering(prompt: Sequence[int], max_tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(max_tokens):
        output = ids[len(prompt) :]
        seen = dict.fromkeys(ids)
        ids.append(next_token([*ids, *seen, *map(output.count, seen)]))
    return ids[len(prompt) :]


class PagedModel:
    """Keeps each position's token in the KV slot a real stage would write, and reads it back."""

    def __init__(self, num_blocks: int) -> None:
        self.slots: list[int | None] = [None] * (num_blocks * BLOCK_SIZE)

    def run(self, batch: ScheduledBatch) -> ForwardResult:
        tokens = iter(batch.token_ids)
        answers = []
        for row in batch.forward.rows:
            slots = [b * BLOCK_SIZE + i for b in row.block_table for i in range(BLOCK_SIZE)]
            for position in range(row.start, row.start + row.num_tokens):
                self.slots[slots[position]] = next(tokens)
            seen = [self.slots[slot] for slot in slots[: row.start + row.num_tokens]]
            if row.sampling is not None:
                steering = row.sampling.steering or Steering()
                shown = [token for token in seen if token is not None]
                answers.append(next_token([*shown, *steering.seen_ids, *steering.seen_counts]))
        return ForwardResult(token_ids=tuple(answers), logprobs=(0.0,) * len(answers))


def run_all(batcher: Batcher, model: PagedModel, batches_in_flight: int = 1) -> int:
    """Drive the batcher to the end; returns the number of passes."""
    flying: deque[ScheduledBatch] = deque()
    passes = 0
    while not batcher.is_empty:
        while len(flying) < batches_in_flight and (batch := batcher.schedule()):
            flying.append(batch)
        assert flying, "nothing can run but sequences are left"
        batch = flying.popleft()
        batcher.complete(batch, model.run(batch))
        batcher.check_integrity()
        passes += 1
    return passes


requests = st.lists(
    st.tuples(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(1, 12)),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(
    requests=requests,
    num_blocks=st.integers(8, 40),
    max_batch_tokens=st.integers(1, 24),
    batches_in_flight=st.integers(1, 4),
    max_sequences=st.integers(1, 8),
)
def test_every_sequence_gets_its_solo_tokens_whatever_runs_beside_it(
    requests: list[tuple[list[int], int]],
    num_blocks: int,
    max_batch_tokens: int,
    batches_in_flight: int,
    max_sequences: int,
) -> None:
    batcher = make_batcher(
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        batches_in_flight=batches_in_flight,
        max_sequences=max_sequences,
    )
    sequences = [make_sequence(prompt, max_tokens) for prompt, max_tokens in requests]
    remembering = [make_remembering_sequence(prompt, most) for prompt, most in requests]
    for pair in zip(sequences, remembering, strict=True):
        for sequence in pair:
            batcher.add(sequence)
    run_all(batcher, PagedModel(num_blocks), batches_in_flight)
    assert [s.output_ids for s in sequences] == [solo(p, m) for p, m in requests]
    assert [s.output_ids for s in remembering] == [solo_remembering(p, m) for p, m in requests]
    assert batcher.pool.num_used == 0


@pytest.mark.parametrize("max_batch_tokens", [1, 2, 5, 16])
def test_long_prompts_are_prefilled_in_chunks_of_at_most_the_limit(max_batch_tokens: int) -> None:
    batcher = make_batcher(max_batch_tokens=max_batch_tokens)
    batcher.add(make_sequence(range(11), max_tokens=1))
    passes = run_all(batcher, PagedModel(64))
    assert passes == -(-11 // max_batch_tokens)


def test_running_sequences_are_shared_out_among_the_batches_in_flight() -> None:
    batcher = make_batcher(batches_in_flight=2, max_batch_tokens=64)
    for _ in range(4):
        batcher.add(make_sequence())
    first, second = batcher.schedule(), batcher.schedule()
    assert first is not None
    assert second is not None
    assert len(first.sequences) == len(second.sequences) == 2
    assert not set(first.sequences) & set(second.sequences)
    assert batcher.schedule() is None


def test_an_end_token_ends_a_sequence_and_frees_its_blocks() -> None:
    batcher = make_batcher()
    sequence = make_sequence([1, 2], max_tokens=5, eos=frozenset(solo([1, 2], 1)))
    batcher.add(sequence)
    run_all(batcher, PagedModel(64))
    assert (sequence.finish_reason, len(sequence.output_ids)) == ("stop", 1)
    assert batcher.pool.num_used == 0


def test_dropping_an_idle_sequence_frees_its_blocks_at_once() -> None:
    batcher = make_batcher()
    sequence = make_sequence(max_tokens=9)
    batcher.add(sequence)
    batch = batcher.schedule()
    assert batch is not None
    batcher.complete(batch, PagedModel(64).run(batch))
    assert batcher.pool.num_used > 0
    batcher.drop(sequence)
    assert batcher.pool.num_used == 0
    assert batcher.is_empty


def test_dropping_a_sequence_in_flight_frees_its_blocks_when_its_pass_returns() -> None:
    batcher = make_batcher()
    sequence = make_sequence(max_tokens=9)
    batcher.add(sequence)
    batch = batcher.schedule()
    assert batch is not None
    batcher.drop(sequence)
    # Another pass must not be given blocks that this one still writes to.
    assert batcher.pool.num_used > 0
    assert batcher.complete(batch, PagedModel(64).run(batch)) == []
    assert batcher.is_empty
    assert batcher.pool.num_used == 0


def test_a_sequence_joins_while_others_run() -> None:
    batcher, model = make_batcher(), PagedModel(64)
    early, late = make_sequence([1], max_tokens=6), make_sequence([2, 3], max_tokens=2)
    batcher.add(early)
    for _ in range(2):
        batch = batcher.schedule()
        assert batch is not None
        batcher.complete(batch, model.run(batch))
    batcher.add(late)
    batch = batcher.schedule()
    assert batch is not None
    assert batch.sequences == (early, late)
    batcher.complete(batch, model.run(batch))
    run_all(batcher, model)
    assert early.output_ids == solo([1], 6)
    assert late.output_ids == solo([2, 3], 2)


def test_a_failed_pass_drops_its_sequences_and_no_others() -> None:
    batcher = make_batcher(batches_in_flight=2)
    sequences = [make_sequence() for _ in range(2)]
    for sequence in sequences:
        batcher.add(sequence)
    first, second = batcher.schedule(), batcher.schedule()
    assert first is not None
    assert second is not None
    assert batcher.fail(first) == (sequences[0],)
    assert batcher.running == [sequences[1]]
    batcher.check_integrity()
