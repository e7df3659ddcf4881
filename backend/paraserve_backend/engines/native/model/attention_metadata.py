"""A batch as index tensors and masks, computed once per forward pass and used by every layer.

Rows with one new token are computed together, grouped by length; longer rows one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.forward import ForwardBatch, Row

#: By sliding window (`None`: full attention), what to add to the scores, `[rows or 1, 1, queries,
#: positions]`; `None`: nothing, the kernel hides what lies in the future.
Masks = Mapping[int | None, torch.Tensor | None]
_Indices = npt.NDArray[np.int64]

#: Decode rows are grouped by length, so that padding at most doubles a row that has more blocks.
_MIN_GROUP_BLOCKS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One row with several new tokens: the batch's tokens `[begin, end)`."""

    begin: int
    end: int
    #: Positions the last new token sees, its own included.
    length: int
    #: `[1, blocks]`, or `None` where nothing is cached before the new tokens.
    block_table: torch.Tensor | None
    masks: Masks


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """Rows with one new token each, attended together."""

    #: The rows' tokens, `[rows]`; `None` when they are the whole batch.
    tokens: torch.Tensor | None
    #: Positions of the longest row.
    length: int
    #: `[rows, blocks]`, each padded with the row's own first block, which the masks hide.
    block_tables: torch.Tensor
    masks: Masks


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Where a batch's tokens go in the cache, and which cached positions each of them sees."""

    #: `[tokens]`
    positions: torch.Tensor
    #: `[tokens]`, each block * block_size + offset.
    slots: torch.Tensor
    #: Blocks that this batch begins but does not fill, to be cleared first.
    opened: tuple[int, ...]
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]


def plan_attention(
    batch: ForwardBatch, cache: KvCache, windows: Collection[int | None], *, all_masks: bool
) -> AttentionPlan:
    """Plan one batch for layers that use these sliding `windows`.

    `all_masks` is for a kernel that hides nothing by itself.

    Raises:
        InvalidRequest: a block table is too short for its row or names a block we do not have.
    """
    if not batch.rows:
        raise InvalidRequest("A forward batch needs at least one row.")
    for row in batch.rows:
        _check_row(row, cache)
    planner = _Planner(cache, frozenset(windows), all_masks=all_masks)
    begins = list(accumulate((row.num_tokens for row in batch.rows), initial=0))
    placed = list(zip(begins, batch.rows, strict=False))
    return AttentionPlan(
        positions=planner.to_device(np.concatenate([_positions(row) for row in batch.rows])),
        slots=planner.to_device(
            np.concatenate([_slots(row, cache.block_size) for row in batch.rows])
        ),
        opened=_opened(batch, cache.block_size),
        prefills=tuple(planner.prefill(at, row) for at, row in placed if row.num_tokens > 1),
        decodes=tuple(
            planner.decode(group, whole_batch=len(group) == len(placed))
            for group in _decode_groups(placed, cache.block_size)
        ),
    )


class _Planner:
    """Makes the parts of one batch's plan."""

    def __init__(self, cache: KvCache, windows: frozenset[int | None], *, all_masks: bool) -> None:
        self._block_size = cache.block_size
        self._device = cache.device
        self._dtype = cache.storage.dtype
        self._windows = windows
        self._all_masks = all_masks

    def to_device(self, indices: _Indices) -> torch.Tensor:
        return torch.from_numpy(indices).to(self._device)

    def prefill(self, begin: int, row: Row) -> Prefill:
        length = row.start + row.num_tokens
        table = None
        if row.start:
            blocks = row.block_table[: _blocks(length, self._block_size)]
            table = self.to_device(np.array([blocks], dtype=np.int64))
        queries = torch.arange(row.start, length, device=self._device)
        return Prefill(
            begin=begin,
            end=begin + row.num_tokens,
            length=length,
            block_table=table,
            masks=self._masks(
                queries[None, None, :, None],
                length,
                ordered=row.start == 0 and not self._all_masks,
            ),
        )

    def decode(self, group: Sequence[tuple[int, Row]], *, whole_batch: bool) -> Decode:
        starts = [row.start for _, row in group]
        length = max(starts) + 1
        width = _blocks(length, self._block_size)
        tables = np.empty((len(group), width), dtype=np.int64)
        for index, (_, row) in enumerate(group):
            used = row.block_table[: _blocks(row.start + 1, self._block_size)]
            tables[index, : len(used)] = used
            # Hidden positions still meet weight 0, and 0 * NaN is NaN: what another sequence
            # computed must not stand there.
            tables[index, len(used) :] = used[0]
        queries = torch.tensor(starts, device=self._device)[:, None, None, None]
        tokens = np.array([at for at, _ in group], dtype=np.int64)
        return Decode(
            tokens=None if whole_batch else self.to_device(tokens),
            length=length,
            block_tables=self.to_device(tables),
            masks=self._masks(queries, length, ordered=min(starts) + 1 == length),
        )

    def _masks(self, queries: torch.Tensor, length: int, *, ordered: bool) -> Masks:
        """Masks for all windows; `ordered`: the kernel hides what lies in the future, if any."""
        return {
            window: None
            if ordered and (window is None or window >= length)
            else self._mask(queries, length, window)
            for window in self._windows
        }

    def _mask(self, queries: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
        """What hides from `queries` the positions in `[0, length)` that they must not see."""
        keys = torch.arange(length, device=self._device)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(
            hidden, float("-inf")
        )


def _decode_groups(
    placed: Sequence[tuple[int, Row]], block_size: int
) -> list[list[tuple[int, Row]]]:
    groups: dict[int, list[tuple[int, Row]]] = {}
    for at, row in placed:
        if row.num_tokens == 1:
            blocks = max(_blocks(row.start + 1, block_size), _MIN_GROUP_BLOCKS)
            groups.setdefault((blocks - 1).bit_length(), []).append((at, row))
    return list(groups.values())


def _check_row(row: Row, cache: KvCache) -> None:
    needed, held = row.start + row.num_tokens, len(row.block_table) * cache.block_size
    if row.num_tokens < 1 or needed > held:
        raise InvalidRequest(
            f"A row ends at position {needed}, but its {len(row.block_table)} KV blocks of "
            f"{cache.block_size} hold {held}."
        )
    if not 0 <= min(row.block_table) <= max(row.block_table) < cache.num_blocks:
        raise InvalidRequest(
            f"A row names KV blocks {min(row.block_table)} to {max(row.block_table)}, "
            f"but the stage has {cache.num_blocks}."
        )


def _opened(batch: ForwardBatch, block_size: int) -> tuple[int, ...]:
    blocks = []
    for row in batch.rows:
        last, filled = divmod(row.start + row.num_tokens, block_size)
        if filled and row.start <= last * block_size:
            blocks.append(row.block_table[last])
    return tuple(blocks)


def _positions(row: Row) -> _Indices:
    return np.arange(row.start, row.start + row.num_tokens, dtype=np.int64)


def _slots(row: Row, block_size: int) -> _Indices:
    positions = _positions(row)
    blocks = np.array(row.block_table, dtype=np.int64)
    slots: _Indices = blocks[positions // block_size] * block_size + positions % block_size
    return slots


def _blocks(positions: int, block_size: int) -> int:
    """Blocks that `positions` positions take."""
    return -(-positions // block_size)
