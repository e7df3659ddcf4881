"""Causal attention over the paged cache for a batch that mixes prefill and decode rows.

`plan_attention` turns a batch into index tensors and masks once; every layer then reuses them.
Rows with one new token are attended together over padded block tables, longer ones one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from paraserve_backend.engine.batch import ForwardBatch, Row
from paraserve_backend.engine.kv_cache import KvCache, LayerCache
from paraserve_backend.errors import InvalidRequest

#: By sliding window (`None`: full attention), what to add to the scores; `None`: nothing.
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
    #: `[rows, blocks]`, padded with block 0, which the masks hide.
    block_tables: torch.Tensor
    masks: Masks


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Where a batch's tokens go in the cache, and which cached positions each of them sees."""

    #: `[tokens]`
    positions: torch.Tensor
    #: `[tokens]`, each block * block_size + offset.
    slots: torch.Tensor
    prefills: tuple[Prefill, ...]
    decodes: tuple[Decode, ...]


def plan_attention(
    batch: ForwardBatch, cache: KvCache, windows: Collection[int | None]
) -> AttentionPlan:
    """Plan one batch for layers that use these sliding `windows`.

    Raises:
        InvalidRequest: a block table is too short for its row or names a block we do not have.
    """
    if not batch.rows:
        raise InvalidRequest("A forward batch needs at least one row.")
    for row in batch.rows:
        _check_row(row, cache)
    planner = _Planner(cache, frozenset(windows))
    begins = list(accumulate((row.num_tokens for row in batch.rows), initial=0))
    placed = list(zip(begins, batch.rows, strict=False))
    return AttentionPlan(
        positions=planner.to_device(np.concatenate([_positions(row) for row in batch.rows])),
        slots=planner.to_device(
            np.concatenate([_slots(row, cache.block_size) for row in batch.rows])
        ),
        prefills=tuple(planner.prefill(at, row) for at, row in placed if row.num_tokens > 1),
        decodes=tuple(
            planner.decode(group, whole_batch=len(group) == len(placed))
            for group in _decode_groups(placed, cache.block_size)
        ),
    )


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache: LayerCache,
    plan: AttentionPlan,
    window: int | None,
) -> torch.Tensor:
    """Store the new keys and values, then let each token attend to what it may see.

    `query` and the result are `[tokens, heads, head_dim]`, the others have kv_heads.
    """
    cache.write(plan.slots, keys, values)
    if plan.decodes and plan.decodes[0].tokens is None:
        return _attend_decode(query, cache, plan.decodes[0], window)
    attended = torch.empty_like(query)
    for part in plan.prefills:
        span = slice(part.begin, part.end)
        attended[span] = _attend_prefill(query[span], keys[span], values[span], cache, part, window)
    for group in plan.decodes:
        assert group.tokens is not None, "a group that is the whole batch is the only one"
        chosen = query.index_select(0, group.tokens)
        attended.index_copy_(0, group.tokens, _attend_decode(chosen, cache, group, window))
    return attended


def _attend_prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cache: LayerCache,
    part: Prefill,
    window: int | None,
) -> torch.Tensor:
    if part.block_table is None:
        seen_keys, seen_values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    else:
        cached_keys, cached_values = cache.gather(part.block_table)
        seen_keys = cached_keys[:, :, : part.length]
        seen_values = cached_values[:, :, : part.length]
    mask = part.masks[window]
    attended = scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        seen_keys,
        seen_values,
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return attended[0].transpose(0, 1)


def _attend_decode(
    query: torch.Tensor, cache: LayerCache, group: Decode, window: int | None
) -> torch.Tensor:
    keys, values = cache.gather(group.block_tables)
    rows, heads, head_dim = query.shape
    # The query heads that share a key head take the place of query positions: no keys are copied
    # for them, and no order between them is implied, as a row has a single new token.
    attended = scaled_dot_product_attention(
        query.view(rows, keys.shape[1], -1, head_dim),
        keys[:, :, : group.length],
        values[:, :, : group.length],
        attn_mask=group.masks[window],
    )
    return attended.reshape(rows, heads, head_dim)


class _Planner:
    """Makes the parts of one batch's plan."""

    def __init__(self, cache: KvCache, windows: frozenset[int | None]) -> None:
        self._block_size = cache.block_size
        self._device = cache.device
        self._dtype = cache.storage.dtype
        self._windows = windows

    def to_device(self, indices: _Indices) -> torch.Tensor:
        return torch.from_numpy(indices).to(self._device)

    def prefill(self, begin: int, row: Row) -> Prefill:
        length = row.start + row.num_tokens
        table = None
        if row.start:
            blocks = row.block_table[: _blocks(length, self._block_size)]
            table = self.to_device(np.array([blocks], dtype=np.int64))
        queries = torch.arange(row.start, length, device=self._device)[:, None]
        return Prefill(
            begin=begin,
            end=begin + row.num_tokens,
            length=length,
            block_table=table,
            masks=self._masks(queries, length, ordered=row.start == 0),
        )

    def decode(self, group: Sequence[tuple[int, Row]], *, whole_batch: bool) -> Decode:
        starts = [row.start for _, row in group]
        length = max(starts) + 1
        tables = np.zeros((len(group), _blocks(length, self._block_size)), dtype=np.int64)
        for index, (_, row) in enumerate(group):
            used = row.block_table[: _blocks(row.start + 1, self._block_size)]
            tables[index, : len(used)] = used
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
