"""Causal attention of one layer over the paged cache, for a batch that mixes prefill and decode.

`attention_metadata` says which rows are attended together, and over which cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from paraserve_backend.engines.native.model.attention_metadata import AttentionPlan, Decode, Prefill
from paraserve_backend.engines.native.model.kv_cache import LayerCache
from paraserve_backend.engines.native.model.ops import level_off


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedAttention:
    """One layer's keys and values, and how its tokens attend to them."""

    cache: LayerCache
    window: int | None
    #: What scores are multiplied by, and where they level off.
    scale: float
    softcap: float | None

    def forward(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, plan: AttentionPlan
    ) -> torch.Tensor:
        """Store the new keys and values, then let each token attend to what it may see.

        `query` and the result are `[tokens, heads, head_dim]`, the others have kv_heads.
        """
        self.cache.write(plan.slots, keys, values)
        if plan.decodes and plan.decodes[0].tokens is None:
            return self._decode(query, plan.decodes[0])
        attended = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for part in plan.prefills:
            span = slice(part.begin, part.end)
            attended[span] = self._prefill(query[span], keys[span], values[span], part)
        for group in plan.decodes:
            assert group.tokens is not None, "a group that is the whole batch is the only one"
            chosen = query.index_select(0, group.tokens)
            attended.index_copy_(0, group.tokens, self._decode(chosen, group))
        return attended

    def _prefill(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, part: Prefill
    ) -> torch.Tensor:
        if part.block_table is None:
            seen_keys, seen_values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        else:
            cached_keys, cached_values = self.cache.gather(part.block_table)
            seen_keys = cached_keys[:, :, : part.length]
            seen_values = cached_values[:, :, : part.length]
        mask = part.masks[self.window]
        rows = query.transpose(0, 1)[None]
        if self.softcap is not None:
            attended = self._attend_capped(rows, seen_keys, seen_values, mask, self.softcap)
        else:
            attended = scaled_dot_product_attention(
                rows,
                seen_keys,
                seen_values,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=query.shape[1] != keys.shape[1],
            )
        return attended[0].transpose(0, 1)

    def _decode(self, query: torch.Tensor, group: Decode) -> torch.Tensor:
        cached_keys, cached_values = self.cache.gather(group.block_tables)
        keys, values = cached_keys[:, :, : group.length], cached_values[:, :, : group.length]
        mask = group.masks[self.window]
        rows, heads, head_dim = query.shape
        if self.softcap is not None:
            attended = self._attend_capped(query[:, :, None], keys, values, mask, self.softcap)
        else:
            # The query heads that share a key head take the place of query positions: no keys are
            # copied for them, and no order is implied, as a row has a single new token.
            attended = scaled_dot_product_attention(
                query.reshape(rows, keys.shape[1], -1, head_dim),
                keys,
                values,
                attn_mask=mask,
                scale=self.scale,
            )
        return attended.reshape(rows, heads, head_dim)

    def _attend_capped(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        cap: float,
    ) -> torch.Tensor:
        """Attention whose scores level off, which no fused kernel on CPU does.

        `query` and the result are `[rows, heads, queries, head_dim]`.
        """
        rows, kv_heads, length, head_dim = keys.shape
        queries = query.shape[2]
        grouped = query.reshape(rows, kv_heads, -1, head_dim)
        scores = level_off((grouped @ keys.transpose(2, 3)).mul_(self.scale), cap)
        if mask is not None:
            scores.view(rows, kv_heads, -1, queries, length).add_(mask[:, :, None])
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights @ values).view(query.shape)
