from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.protocol.forward import (
    Export,
    ForwardBatch,
    ForwardResult,
    Row,
    chosen_tokens,
)
from paraserve_backend.protocol.forward_codec import (
    decode_batch,
    decode_result,
    encode_batch,
    encode_result,
)
from paraserve_backend.protocol.sampling import ChosenToken, Ranking, Sampling, Steering

UINT32 = st.integers(0, 2**32 - 1)
SEEN = st.lists(st.tuples(UINT32, UINT32), max_size=5)
STEERINGS = st.builds(
    lambda seen, **fields: Steering(
        seen_ids=tuple(token for token, _ in seen),
        seen_counts=tuple(count for _, count in seen),
        **fields,
    ),
    seen=SEEN,
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0.01, 100),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    num_logprobs=st.none() | st.integers(0, 20),
    banned_ids=st.lists(UINT32, max_size=5).map(tuple),
)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0, 100),
    top_k=UINT32,
    top_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    steering=st.none() | STEERINGS,
)
ROWS = st.builds(
    Row,
    start=UINT32,
    num_tokens=st.integers(1, 2**32 - 1),
    block_table=st.lists(UINT32, max_size=9).map(tuple),
    sampling=st.none() | SAMPLINGS,
)
EXPORTS = st.builds(
    Export,
    address=st.text(max_size=30),
    ticket=st.integers(0, 2**64 - 1),
    first=UINT32,
    blocks=st.lists(UINT32, max_size=9).map(tuple),
)
BATCHES = st.builds(
    ForwardBatch,
    rows=st.lists(ROWS, max_size=6).map(tuple),
    exports=st.lists(EXPORTS, max_size=3).map(tuple),
)
ENTRIES = st.lists(st.tuples(UINT32, st.floats(max_value=0.0)), max_size=9)
RANKINGS = st.builds(
    lambda rank, entries: Ranking(
        rank=rank,
        token_ids=tuple(token for token, _ in entries),
        logprobs=tuple(logprob for _, logprob in entries),
    ),
    UINT32,
    ENTRIES,
)


HEADER_BYTES = 24
ROW_BYTES = 44


def make_steered_row(steering: Steering) -> Row:
    return Row(start=0, num_tokens=1, block_table=(), sampling=Sampling(steering=steering))


def replace_steering(batch: ForwardBatch, steering: Steering | None) -> ForwardBatch:
    """The batch with this steering in every row that samples."""
    rows = [
        replace(row, sampling=replace(row.sampling, steering=steering)) if row.sampling else row
        for row in batch.rows
    ]
    return replace(batch, rows=tuple(rows))


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


@given(ENTRIES, st.lists(RANKINGS, max_size=4))
def test_a_result_survives_its_encoding(
    entries: list[tuple[int, float]], rankings: list[Ranking]
) -> None:
    result = ForwardResult(
        token_ids=tuple(token for token, _ in entries),
        logprobs=tuple(logprob for _, logprob in entries),
        rankings=tuple(rankings),
    )
    assert decode_result(encode_result(result)) == result


def test_every_kind_of_buffer_is_decoded() -> None:
    encoded = encode_batch(make_batch())
    for buffer in (encoded, bytearray(encoded), memoryview(encoded)):
        assert decode_batch(buffer) == make_batch()


def test_the_layout_is_fixed() -> None:
    batch = ForwardBatch(rows=(Row(start=1, num_tokens=2, block_table=(3,), sampling=Sampling()),))
    assert encode_batch(batch).hex(" ", 4) == (
        "50534233 01000000 01000000 00000000 00000000 "  # magic, rows, blocks, steered, ids
        "00000000 "  # bytes of exports
        "01000000 02000000 01000000 01000000 00000000 "  # start, tokens, blocks, kind, top_k
        "00000000 00000000 00000000 00000000 00000000 0000f03f "  # seed, temperature, top_p
        "03000000"  # the block
    )


def test_what_steers_a_row_lies_after_all_rows() -> None:
    steering = Steering(num_logprobs=4, banned_ids=(7,), seen_ids=(8, 9), seen_counts=(0, 2))
    sampling = Sampling(steering=steering)
    batch = ForwardBatch(rows=(Row(start=1, num_tokens=2, block_table=(3,), sampling=sampling),))
    plain = encode_batch(replace_steering(batch, None))
    encoded = encode_batch(batch)
    assert encoded[len(plain) :].hex(" ", 4) == (
        "00000000 00000000 00000000 0000f03f "  # min_p, repetition penalty
        "00000000 00000000 00000000 00000000 "  # presence and frequency penalty
        "05000000 01000000 02000000 "  # 1 + log-probabilities, banned, seen
        "07000000 08000000 09000000 00000000 02000000"
    )


@given(BATCHES, st.data())
def test_a_truncated_or_longer_batch_is_refused(batch: ForwardBatch, data: st.DataObject) -> None:
    encoded = encode_batch(batch)
    end = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ValueError, match="bytes"):
        decode_batch(encoded[:end])
    with pytest.raises(ValueError, match="bytes"):
        decode_batch(encoded + b"\0")


def test_a_batch_with_a_wrong_byte_is_refused_or_is_a_batch_like_any_other() -> None:
    ends: Counter[str] = Counter()

    @given(BATCHES, st.data())
    def decode_corrupt(batch: ForwardBatch, data: st.DataObject) -> None:
        encoded = bytearray(encode_batch(batch))
        encoded[data.draw(st.integers(0, len(encoded) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            again = encode_batch(decode_batch(encoded))
        except ValueError:
            ends["refused"] += 1
        else:
            ends["taken"] += 1
            assert encode_batch(decode_batch(again)) == again

    decode_corrupt()
    assert ends.keys() == {"refused", "taken"}


def test_rows_that_claim_more_or_fewer_blocks_than_there_are_are_refused() -> None:
    encoded = bytearray(encode_batch(make_batch()))
    blocks_of_first_row = HEADER_BYTES + 8
    for lie in (1, 3, 255):
        encoded[blocks_of_first_row] = lie
        with pytest.raises(ValueError, match="holds 5 blocks, its rows name"):
            decode_batch(encoded)


@pytest.mark.parametrize("kind", [0, 1])
def test_steering_that_belongs_to_no_row_is_refused(kind: int) -> None:
    steered = replace_steering(make_batch(), Steering(banned_ids=(1,)))
    encoded = bytearray(encode_batch(steered))
    encoded[HEADER_BYTES + ROW_BYTES + 12] = kind
    with pytest.raises(ValueError, match="steers 1 rows too many"):
        decode_batch(encoded)


@pytest.mark.parametrize("kind", [2, 3, 255])
def test_a_row_that_lies_about_its_kind_is_refused(kind: int) -> None:
    encoded = bytearray(encode_batch(make_batch()))
    encoded[HEADER_BYTES + ROW_BYTES + 12] = kind
    with pytest.raises(ValueError, match="malformed"):
        decode_batch(encoded)


def test_steered_rows_that_claim_more_or_fewer_ids_than_there_are_are_refused() -> None:
    steered = replace_steering(make_batch(), Steering(banned_ids=(1, 2)))
    encoded = bytearray(encode_batch(steered))
    # The last numbers are: banned, seen, two ids.
    for lie in (0, 1, 3, 255):
        encoded[-16] = lie
        with pytest.raises(ValueError, match="holds 2 token ids, its rows name"):
            decode_batch(encoded)


def test_rankings_that_claim_more_or_fewer_tokens_than_there_are_are_refused() -> None:
    ranking = Ranking(rank=1, token_ids=(5,), logprobs=(-0.5,))
    encoded = bytearray(
        encode_result(ForwardResult(token_ids=(), logprobs=(), rankings=(ranking,)))
    )
    # The last numbers are: tokens, one id, one log-probability.
    for lie in (0, 2, 255):
        encoded[-16] = lie
        with pytest.raises(ValueError, match="holds 1 ranked tokens, not"):
            decode_result(encoded)


def test_another_version_is_refused() -> None:
    encoded = bytearray(encode_batch(make_batch()))
    encoded[3] += 1
    with pytest.raises(ValueError, match="magic"):
        decode_batch(encoded)
    with pytest.raises(ValueError, match="magic"):
        decode_result(encode_batch(make_batch()))


def test_a_truncated_result_is_refused() -> None:
    ranking = Ranking(rank=3, token_ids=(4, 5), logprobs=(-0.1, -0.2))
    encoded = encode_result(
        ForwardResult(token_ids=(1, 2), logprobs=(-0.5, -1.5), rankings=(ranking,))
    )
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
        make_steered_row(Steering(banned_ids=(-1,))),
        make_steered_row(Steering(seen_ids=(2**32,), seen_counts=(1,))),
        make_steered_row(Steering(seen_ids=(1,), seen_counts=(-1,))),
        make_steered_row(Steering(seen_ids=(1, 2), seen_counts=(1,))),
        make_steered_row(Steering(num_logprobs=2**32)),
    ],
)
def test_numbers_outside_their_field_cannot_be_encoded(row: Row) -> None:
    with pytest.raises(ValueError, match="forward batch"):
        encode_batch(ForwardBatch(rows=(row,)))


def test_a_result_with_a_missing_logprob_cannot_be_encoded() -> None:
    with pytest.raises(ValueError, match="2 token ids with 1 logprobs"):
        encode_result(ForwardResult(token_ids=(1, 2), logprobs=(-0.5,)))


def test_a_ranking_with_a_missing_logprob_cannot_be_encoded() -> None:
    ranking = Ranking(rank=1, token_ids=(1, 2), logprobs=(-0.5,))
    with pytest.raises(ValueError, match="2 ranked token ids with 1 logprobs"):
        encode_result(ForwardResult(token_ids=(), logprobs=(), rankings=(ranking,)))


def test_every_row_gets_its_own_entry_of_the_result() -> None:
    prefill = Row(start=0, num_tokens=1, block_table=(), sampling=None)
    plain = Row(start=0, num_tokens=1, block_table=(), sampling=Sampling())
    ranked = make_steered_row(Steering(num_logprobs=0))
    ranking = Ranking(rank=2, token_ids=(), logprobs=())
    result = ForwardResult(token_ids=(5, 6), logprobs=(-1.0, -2.0), rankings=(ranking,))
    batch = ForwardBatch(rows=(prefill, plain, prefill, ranked))
    assert list(chosen_tokens(batch, result)) == [
        None,
        ChosenToken(token_id=5, logprob=-1.0, ranking=None),
        None,
        ChosenToken(token_id=6, logprob=-2.0, ranking=ranking),
    ]
