"""One forward pass as data: what the generate loop sends to every stage, and what comes back.

The generate loop owns the schedule and the KV blocks, so a batch carries each sequence's block
table and the stages keep no scheduling state. The binary form is the same in a Triton tensor and
in an activation frame: little-endian, fixed layout, no pickle.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any


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


# magic with the version as its last byte, rows, block numbers of all rows together
_BATCH_HEADER = struct.Struct("<4sII")
_BATCH_MAGIC = b"PSB1"
# start, num_tokens, blocks, sampled, top_k, seed, temperature, top_p
_ROW = struct.Struct("<IIIIIQdd")
_BLOCK_BYTES = 4
# magic with the version as its last byte, entries; then all token ids, then all logprobs
_RESULT_HEADER = struct.Struct("<4sI")
_RESULT_MAGIC = b"PSR1"
_RESULT_ENTRY_BYTES = 4 + 8

Buffer = bytes | bytearray | memoryview


def encode_batch(batch: ForwardBatch) -> bytes:
    """The binary form of `batch`; raises ValueError where a number does not fit its field."""
    blocks = [block for row in batch.rows for block in row.block_table]
    try:
        return b"".join(
            (
                _BATCH_HEADER.pack(_BATCH_MAGIC, len(batch.rows), len(blocks)),
                *map(_encode_row, batch.rows),
                struct.pack(f"<{len(blocks)}I", *blocks),
            )
        )
    except struct.error as error:
        raise ValueError(f"a forward batch cannot be encoded: {error}") from None


def decode_batch(buffer: Buffer) -> ForwardBatch:
    """Reverse `encode_batch`; raises ValueError on anything it could not have written."""
    num_rows, num_blocks = _read_header(_BATCH_HEADER, _BATCH_MAGIC, buffer)
    rows_end = _BATCH_HEADER.size + num_rows * _ROW.size
    _check_size(buffer, rows_end + num_blocks * _BLOCK_BYTES)
    blocks: tuple[int, ...] = struct.unpack_from(f"<{num_blocks}I", buffer, rows_end)
    rows = []
    taken = 0
    for fields in _ROW.iter_unpack(memoryview(buffer)[_BATCH_HEADER.size : rows_end]):
        end = taken + fields[2]
        rows.append(_decode_row(fields, blocks[taken:end]))
        taken = end
    if taken != num_blocks:
        raise ValueError(f"a forward batch holds {num_blocks} blocks, its rows name {taken}")
    return ForwardBatch(rows=tuple(rows))


def _encode_row(row: Row) -> bytes:
    if row.num_tokens < 1:
        raise ValueError("a row of a forward batch needs at least one token")
    # A row without sampling carries the defaults; only the flag says that they mean nothing.
    sampling = row.sampling or Sampling()
    return _ROW.pack(
        row.start,
        row.num_tokens,
        len(row.block_table),
        row.sampling is not None,
        sampling.top_k,
        sampling.seed,
        sampling.temperature,
        sampling.top_p,
    )


def _decode_row(fields: tuple[Any, ...], block_table: tuple[int, ...]) -> Row:
    start, num_tokens, _, sampled, top_k, seed, temperature, top_p = fields
    if num_tokens == 0 or sampled > 1:
        raise ValueError("a row of a forward batch is malformed")
    sampling = None
    if sampled:
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return Row(start=start, num_tokens=num_tokens, block_table=block_table, sampling=sampling)


def encode_result(result: ForwardResult) -> bytes:
    """The binary form of `result`; raises ValueError where a number does not fit its field."""
    count = len(result.token_ids)
    if len(result.logprobs) != count:
        raise ValueError(f"{count} token ids with {len(result.logprobs)} logprobs")
    try:
        header = _RESULT_HEADER.pack(_RESULT_MAGIC, count)
        return header + struct.pack(f"<{count}I{count}d", *result.token_ids, *result.logprobs)
    except struct.error as error:
        raise ValueError(f"a forward result cannot be encoded: {error}") from None


def decode_result(buffer: Buffer) -> ForwardResult:
    """Reverse `encode_result`; raises ValueError on anything it could not have written."""
    (count,) = _read_header(_RESULT_HEADER, _RESULT_MAGIC, buffer)
    _check_size(buffer, _RESULT_HEADER.size + count * _RESULT_ENTRY_BYTES)
    values = struct.unpack_from(f"<{count}I{count}d", buffer, _RESULT_HEADER.size)
    return ForwardResult(token_ids=values[:count], logprobs=values[count:])


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
