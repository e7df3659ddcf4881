from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.engine.batch import (
    ForwardBatch,
    ForwardResult,
    Row,
    Sampling,
    decode_batch,
    decode_result,
    encode_batch,
    encode_result,
)

UINT32 = st.integers(0, 2**32 - 1)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 100),
    top_k=UINT32,
    top_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
)
ROWS = st.builds(
    Row,
    start=UINT32,
    num_tokens=st.integers(1, 2**32 - 1),
    block_table=st.lists(UINT32, max_size=9).map(tuple),
    sampling=st.none() | SAMPLINGS,
)
BATCHES = st.builds(ForwardBatch, rows=st.lists(ROWS, max_size=6).map(tuple))
ENTRIES = st.lists(st.tuples(UINT32, st.floats(max_value=0.0)), max_size=9)


def make_batch() -> ForwardBatch:
    return ForwardBatch(
        rows=(
            Row(start=0, num_tokens=3, block_table=(4, 2), sampling=None),
            Row(start=9, num_tokens=1, block_table=(7, 1, 3), sampling=Sampling(seed=5)),
        )
    )


@given(BATCHES)
def test_a_batch_survives_its_encoding(batch: ForwardBatch) -> None:
    assert decode_batch(encode_batch(batch)) == batch


@given(ENTRIES)
def test_a_result_survives_its_encoding(entries: list[tuple[int, float]]) -> None:
    result = ForwardResult(
        token_ids=tuple(token for token, _ in entries),
        logprobs=tuple(logprob for _, logprob in entries),
    )
    assert decode_result(encode_result(result)) == result


def test_every_kind_of_buffer_is_decoded() -> None:
    encoded = encode_batch(make_batch())
    for buffer in (encoded, bytearray(encoded), memoryview(encoded)):
        assert decode_batch(buffer) == make_batch()


def test_the_layout_is_fixed() -> None:
    batch = ForwardBatch(rows=(Row(start=1, num_tokens=2, block_table=(3,), sampling=Sampling()),))
    assert encode_batch(batch).hex(" ", 4) == (
        "50534231 01000000 01000000 "  # magic, rows, blocks
        "01000000 02000000 01000000 01000000 00000000 "  # start, tokens, blocks, sampled, top_k
        "00000000 00000000 00000000 00000000 00000000 0000f03f "  # seed, temperature, top_p
        "03000000"  # the block
    )


@given(BATCHES, st.data())
def test_a_truncated_or_longer_batch_is_refused(batch: ForwardBatch, data: st.DataObject) -> None:
    encoded = encode_batch(batch)
    end = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ValueError, match="bytes"):
        decode_batch(encoded[:end])
    with pytest.raises(ValueError, match="bytes"):
        decode_batch(encoded + b"\0")


@given(BATCHES, st.data())
def test_a_corrupt_batch_raises_nothing_but_value_errors(
    batch: ForwardBatch, data: st.DataObject
) -> None:
    encoded = bytearray(encode_batch(batch))
    encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        decode_batch(encoded)


def test_rows_that_claim_more_or_fewer_blocks_than_there_are_are_refused() -> None:
    encoded = bytearray(encode_batch(make_batch()))
    blocks_of_first_row = 12 + 8
    for lie in (1, 3, 255):
        encoded[blocks_of_first_row] = lie
        with pytest.raises(ValueError, match="holds 5 blocks, its rows name"):
            decode_batch(encoded)


def test_another_version_is_refused() -> None:
    encoded = bytearray(encode_batch(make_batch()))
    encoded[3] += 1
    with pytest.raises(ValueError, match="magic"):
        decode_batch(encoded)
    with pytest.raises(ValueError, match="magic"):
        decode_result(encode_batch(make_batch()))


def test_a_truncated_result_is_refused() -> None:
    encoded = encode_result(ForwardResult(token_ids=(1, 2), logprobs=(-0.5, -1.5)))
    for end in range(len(encoded)):
        with pytest.raises(ValueError, match="bytes"):
            decode_result(encoded[:end])


@pytest.mark.parametrize(
    "row",
    [
        Row(start=-1, num_tokens=1, block_table=(), sampling=None),
        Row(start=0, num_tokens=0, block_table=(), sampling=None),
        Row(start=0, num_tokens=1, block_table=(2**32,), sampling=None),
        Row(start=0, num_tokens=1, block_table=(), sampling=Sampling(seed=-1)),
        Row(start=0, num_tokens=1, block_table=(), sampling=Sampling(seed=2**64)),
    ],
)
def test_numbers_outside_their_field_cannot_be_encoded(row: Row) -> None:
    with pytest.raises(ValueError, match="forward batch"):
        encode_batch(ForwardBatch(rows=(row,)))


def test_a_result_with_a_missing_logprob_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="2 token ids with 1 logprobs"):
        encode_result(ForwardResult(token_ids=(1, 2), logprobs=(-0.5,)))
