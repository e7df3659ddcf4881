"""The binary form of a forward pass, the same in a Triton tensor and in an activation frame.

Little-endian, fixed layout, no pickle. Optional fields of rows come after all rows, so that a batch
of plain rows is as small and as fast to read as if there were no such fields.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain

from paraserve_backend.protocol.forward import Export, ForwardBatch, ForwardResult, Row
from paraserve_backend.protocol.sampling import Ranking, Sampling, Steering

# magic with the version as its last byte, rows, block numbers of all rows together, steered rows,
# token ids and counts of all steered rows together, bytes of all exports together
_BATCH_HEADER = struct.Struct("<4sIIIII")
_BATCH_MAGIC = b"PSB3"
# start, num_tokens, blocks, kind, top_k, seed, temperature, top_p
_ROW = struct.Struct("<IIIIIQdd")
_PREFILL, _PLAIN, _STEERED = range(3)
# min_p, repetition, presence and frequency penalty, 1 + num_logprobs or 0, banned ids, seen ids;
# then, after all steered rows, the banned ids, seen ids and seen counts of each
_STEERING = struct.Struct("<ddddIII")
# ticket, first, blocks, length of the address; then, after each, its blocks and its address
_EXPORT = struct.Struct("<QIIH")
# magic with the version as its last byte, entries, rankings, tokens of all rankings together; then
# all token ids and logprobs, all rankings, and the rankings' token ids and logprobs
_RESULT_HEADER = struct.Struct("<4sIII")
_RESULT_MAGIC = b"PSR2"
# rank, tokens
_RANKING = struct.Struct("<II")
_ID_BYTES = 4
_ENTRY_BYTES = 4 + 8

Buffer = bytes | bytearray | memoryview


def encode_batch(batch: ForwardBatch) -> bytes:
    """The binary form of `batch`; raises ValueError where a number does not fit its field."""
    rows: list[bytes] = []
    blocks: list[int] = []
    steered: list[Steering] = []
    try:
        for row in batch.rows:
            rows.append(_encode_row(row))
            blocks += row.block_table
            if row.sampling is not None and row.sampling.steering is not None:
                steered.append(row.sampling.steering)
        ids = list(chain.from_iterable(map(_steering_ids, steered)))
        exports = b"".join(map(_encode_export, batch.exports))
        counts = (len(rows), len(blocks), len(steered), len(ids), len(exports))
        return b"".join(
            (
                _BATCH_HEADER.pack(_BATCH_MAGIC, *counts),
                *rows,
                _pack_ids(blocks),
                *map(_encode_steering, steered),
                _pack_ids(ids),
                exports,
            )
        )
    except struct.error as error:
        raise ValueError(f"a forward batch cannot be encoded: {error}") from None


def _encode_export(export: Export) -> bytes:
    address = export.address.encode()
    header = _EXPORT.pack(export.ticket, export.first, len(export.blocks), len(address))
    return header + _pack_ids(export.blocks) + address


def _encode_row(row: Row) -> bytes:
    num_tokens, sampling = row.num_tokens, row.sampling
    if num_tokens < 1:
        raise ValueError("a row of a forward batch needs at least one token")
    blocks = len(row.block_table)
    if sampling is None:
        return _ROW.pack(row.start, num_tokens, blocks, _PREFILL, 0, 0, 0.0, 1.0)
    return _ROW.pack(
        row.start,
        num_tokens,
        blocks,
        _PLAIN if sampling.steering is None else _STEERED,
        sampling.top_k,
        sampling.seed,
        sampling.temperature,
        sampling.top_p,
    )


def decode_batch(buffer: Buffer) -> ForwardBatch:
    """Reverse `encode_batch`; raises ValueError on anything it could not have written."""
    num_rows, num_blocks, num_steered, num_ids, exports_bytes = _read_header(
        _BATCH_HEADER, _BATCH_MAGIC, buffer
    )
    rows_end = _BATCH_HEADER.size + num_rows * _ROW.size
    blocks_end = rows_end + num_blocks * _ID_BYTES
    steered_end = blocks_end + num_steered * _STEERING.size
    ids_end = steered_end + num_ids * _ID_BYTES
    _check_size(buffer, ids_end + exports_bytes)
    view = memoryview(buffer)
    steered: deque[Steering] = deque()
    if num_steered or num_ids:
        ids = _unpack_ids(view, num_ids, steered_end)
        steered = _decode_steered(view[blocks_end:steered_end], ids)
    blocks = _unpack_ids(view, num_blocks, rows_end)
    return ForwardBatch(
        rows=_decode_rows(view[_BATCH_HEADER.size : rows_end], blocks, steered),
        exports=_decode_exports(view[ids_end:]) if exports_bytes else (),
    )


def _decode_exports(buffer: memoryview) -> tuple[Export, ...]:
    exports = []
    start = 0
    while start < len(buffer):
        try:
            ticket, first, num_blocks, address_bytes = _EXPORT.unpack_from(buffer, start)
            blocks_start = start + _EXPORT.size
            blocks = _unpack_ids(buffer, num_blocks, blocks_start)
        except struct.error:
            raise ValueError("an export of a forward batch is cut off") from None
        start = blocks_start + num_blocks * _ID_BYTES + address_bytes
        address = bytes(buffer[start - address_bytes : start]).decode()
        exports.append(Export(address=address, ticket=ticket, first=first, blocks=blocks))
    _check_size(buffer, start)
    return tuple(exports)


def _decode_rows(
    buffer: memoryview, blocks: tuple[int, ...], steered: deque[Steering]
) -> tuple[Row, ...]:
    rows: list[Row] = []
    taken = 0
    for start, num_tokens, num_blocks, kind, top_k, seed, temperature, top_p in _ROW.iter_unpack(
        buffer
    ):
        if num_tokens == 0 or kind > _STEERED or (kind == _STEERED and not steered):
            raise ValueError("a row of a forward batch is malformed")
        sampling = None if kind == _PREFILL else _sampling(top_k, seed, temperature, top_p)
        if sampling is not None and kind == _STEERED:
            sampling = replace(sampling, steering=steered.popleft())
        end = taken + num_blocks
        table = blocks[taken:end]
        taken = end
        rows.append(Row(start=start, num_tokens=num_tokens, block_table=table, sampling=sampling))
    if taken != len(blocks):
        raise ValueError(f"a forward batch holds {len(blocks)} blocks, its rows name {taken}")
    if steered:
        raise ValueError(f"a forward batch steers {len(steered)} rows too many")
    return tuple(rows)


@lru_cache(maxsize=1024)
def _sampling(top_k: int, seed: int, temperature: float, top_p: float) -> Sampling:
    """Remembered, because a request's settings come again with each of its tokens."""
    return Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)


def forget_settings() -> None:
    """Forget what is remembered of requests."""
    _sampling.cache_clear()


def _steering_ids(steering: Steering) -> Iterator[int]:
    if len(steering.seen_ids) != len(steering.seen_counts):
        raise ValueError(
            f"a forward batch has {len(steering.seen_ids)} seen tokens with "
            f"{len(steering.seen_counts)} counts"
        )
    return chain(steering.banned_ids, steering.seen_ids, steering.seen_counts)


def _encode_steering(steering: Steering) -> bytes:
    return _STEERING.pack(
        steering.min_p,
        steering.repetition_penalty,
        steering.presence_penalty,
        steering.frequency_penalty,
        0 if steering.num_logprobs is None else 1 + steering.num_logprobs,
        len(steering.banned_ids),
        len(steering.seen_ids),
    )


def _decode_steered(buffer: memoryview, ids: tuple[int, ...]) -> deque[Steering]:
    """Return the steering of each steered row; every one of `ids` belongs to one of them."""
    steered: deque[Steering] = deque()
    start = 0
    for min_p, repetition, presence, frequency, logprobs, banned, seen in _STEERING.iter_unpack(
        buffer
    ):
        seen_start, counts_start = start + banned, start + banned + seen
        end = counts_start + seen
        steered.append(
            Steering(
                min_p=min_p,
                repetition_penalty=repetition,
                presence_penalty=presence,
                frequency_penalty=frequency,
                num_logprobs=logprobs - 1 if logprobs else None,
                banned_ids=ids[start:seen_start],
                seen_ids=ids[seen_start:counts_start],
                seen_counts=ids[counts_start:end],
            )
        )
        start = end
    if start != len(ids):
        raise ValueError(f"a forward batch holds {len(ids)} token ids, its rows name {start}")
    return steered


def encode_result(result: ForwardResult) -> bytes:
    """The binary form of `result`; raises ValueError where a number does not fit its field."""
    count = len(result.token_ids)
    if len(result.logprobs) != count:
        raise ValueError(f"{count} token ids with {len(result.logprobs)} logprobs")
    rankings = result.rankings
    top_ids = [token_id for each in rankings for token_id in each.token_ids]
    top_logprobs = [logprob for each in rankings for logprob in each.logprobs]
    if len(top_logprobs) != len(top_ids):
        raise ValueError(f"{len(top_ids)} ranked token ids with {len(top_logprobs)} logprobs")
    try:
        return b"".join(
            (
                _RESULT_HEADER.pack(_RESULT_MAGIC, count, len(rankings), len(top_ids)),
                _pack_entries(result.token_ids, result.logprobs),
                *[_RANKING.pack(each.rank, len(each.token_ids)) for each in rankings],
                _pack_entries(top_ids, top_logprobs),
            )
        )
    except struct.error as error:
        raise ValueError(f"a forward result cannot be encoded: {error}") from None


def decode_result(buffer: Buffer) -> ForwardResult:
    """Reverse `encode_result`; raises ValueError on anything it could not have written."""
    count, num_rankings, num_top = _read_header(_RESULT_HEADER, _RESULT_MAGIC, buffer)
    entries_end = _RESULT_HEADER.size + count * _ENTRY_BYTES
    rankings_end = entries_end + num_rankings * _RANKING.size
    _check_size(buffer, rankings_end + num_top * _ENTRY_BYTES)
    view = memoryview(buffer)
    token_ids, logprobs = _unpack_entries(view, count, _RESULT_HEADER.size)
    if not num_rankings and not num_top:
        return ForwardResult(token_ids=token_ids, logprobs=logprobs)
    top = _unpack_entries(view, num_top, rankings_end)
    rankings = _decode_rankings(view[entries_end:rankings_end], *top)
    return ForwardResult(token_ids=token_ids, logprobs=logprobs, rankings=rankings)


def _decode_rankings(
    buffer: memoryview, token_ids: tuple[int, ...], logprobs: tuple[float, ...]
) -> tuple[Ranking, ...]:
    rankings = []
    start = 0
    for rank, count in _RANKING.iter_unpack(buffer):
        end = start + count
        rankings.append(
            Ranking(rank=rank, token_ids=token_ids[start:end], logprobs=logprobs[start:end])
        )
        start = end
    if start != len(token_ids):
        raise ValueError(f"a forward result holds {len(token_ids)} ranked tokens, not {start}")
    return tuple(rankings)


def _pack_ids(ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}I", *ids)


def _unpack_ids(buffer: memoryview, count: int, offset: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}I", buffer, offset)


def _pack_entries(token_ids: Sequence[int], logprobs: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I{len(logprobs)}d", *token_ids, *logprobs)


def _unpack_entries(
    buffer: memoryview, count: int, offset: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    values = struct.unpack_from(f"<{count}I{count}d", buffer, offset)
    return values[:count], values[count:]


def _read_header(header: struct.Struct, magic: bytes, buffer: Buffer) -> tuple[int, ...]:
    if len(buffer) < header.size:
        raise ValueError(f"{len(buffer)} bytes are too few for a header of {header.size}")
    found, *counts = header.unpack_from(buffer)
    if found != magic:
        raise ValueError(f"expected magic {magic!r}, found {found!r}")
    return tuple(counts)


def _check_size(buffer: Buffer, expected_bytes: int) -> None:
    if len(buffer) != expected_bytes:
        raise ValueError(f"expected {expected_bytes} bytes, found {len(buffer)}")
