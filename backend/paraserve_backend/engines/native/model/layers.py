"""The layers of the transformer: embedding, decoder layer (attention, MLP, norms), and head.

One implementation serves all families; a module that a family does not have is absent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import embedding

from paraserve_backend.architectures.spec import (
    LearnedPositions,
    ModelSpec,
    Module,
    QkvOrder,
    Residual,
)
from paraserve_backend.engines.native.model.attention import CachedAttention
from paraserve_backend.engines.native.model.attention_metadata import AttentionPlan
from paraserve_backend.engines.native.model.ops import ACTIVATIONS, Norm, Parameters, level_off
from paraserve_backend.engines.native.model.rope import Rotation

LayerParameters = Mapping[Module, Parameters]


class DecoderLayer:
    def __init__(
        self, spec: ModelSpec, parameters: LayerParameters, attention: CachedAttention
    ) -> None:
        self._residual = spec.residual
        self._attention = _SelfAttention(spec, parameters, attention)
        self._mlp = _Mlp(spec, parameters)
        self._attention_norm = _norm(spec, parameters[Module.ATTENTION_NORM])
        self._attention_post_norm = _optional_norm(spec, parameters, Module.ATTENTION_POST_NORM)
        self._mlp_norm = _optional_norm(spec, parameters, Module.MLP_NORM) or self._attention_norm
        self._mlp_post_norm = _optional_norm(spec, parameters, Module.MLP_POST_NORM)

    def forward(
        self, hidden: torch.Tensor, rotation: Rotation | None, plan: AttentionPlan
    ) -> torch.Tensor:
        """The next `[tokens, hidden_size]`; `hidden` itself is left as it is."""
        match self._residual:
            case Residual.SEQUENTIAL:
                return self._sequential(hidden, rotation, plan)
            case Residual.PARALLEL:
                return self._parallel(hidden, rotation, plan)
            case Residual.NORM_AFTER:
                return self._norm_after(hidden, rotation, plan)

    def _sequential(
        self, hidden: torch.Tensor, rotation: Rotation | None, plan: AttentionPlan
    ) -> torch.Tensor:
        attended = self._attention.forward(self._attention_norm.apply(hidden), rotation, plan)
        if self._attention_post_norm is not None:
            attended = self._attention_post_norm.apply(attended)
        hidden = attended.add_(hidden)
        mapped = self._mlp.forward(self._mlp_norm.apply(hidden))
        if self._mlp_post_norm is not None:
            mapped = self._mlp_post_norm.apply(mapped)
        return mapped.add_(hidden)

    def _parallel(
        self, hidden: torch.Tensor, rotation: Rotation | None, plan: AttentionPlan
    ) -> torch.Tensor:
        normed = self._attention_norm.apply(hidden)
        shared = self._mlp_norm is self._attention_norm
        mapped = self._mlp.forward(normed if shared else self._mlp_norm.apply(hidden))
        return mapped.add_(self._attention.forward(normed, rotation, plan)).add_(hidden)

    def _norm_after(
        self, hidden: torch.Tensor, rotation: Rotation | None, plan: AttentionPlan
    ) -> torch.Tensor:
        attended = self._attention.forward(hidden, rotation, plan)
        hidden = self._attention_norm.apply(attended.add_(hidden))
        return self._mlp_norm.apply(self._mlp.forward(hidden).add_(hidden))


class _SelfAttention:
    """From `[tokens, hidden_size]` through queries, keys and values back to it."""

    def __init__(
        self, spec: ModelSpec, parameters: LayerParameters, attention: CachedAttention
    ) -> None:
        self._head_dim = spec.head_dim
        self._num_kv_heads = spec.num_kv_heads
        self._block_ends = (spec.num_heads, spec.num_heads + spec.num_kv_heads)
        self._qkv_order = spec.qkv_order
        self._fused = parameters.get(Module.QKV)
        self._separate = [
            parameters[module]
            for module in (Module.QUERY, Module.KEY, Module.VALUE)
            if module in parameters
        ]
        self._query_norm = _optional_norm(spec, parameters, Module.QUERY_NORM)
        self._key_norm = _optional_norm(spec, parameters, Module.KEY_NORM)
        self._attention = attention
        self._output = parameters[Module.OUTPUT]

    def forward(
        self, hidden: torch.Tensor, rotation: Rotation | None, plan: AttentionPlan
    ) -> torch.Tensor:
        query, keys, values = self._heads(hidden)
        if self._query_norm is not None:
            query = self._query_norm.apply(query)
        if self._key_norm is not None:
            keys = self._key_norm.apply(keys)
        if rotation is not None:
            query, keys = rotation.apply(query), rotation.apply(keys)
        attended = self._attention.forward(query, keys, values, plan)
        return self._output.project(attended.flatten(1))

    def _heads(self, hidden: torch.Tensor) -> Sequence[torch.Tensor]:
        """Queries, keys and values, `[tokens, heads, head_dim]` each."""
        tokens, head_dim = len(hidden), self._head_dim
        if self._fused is None:
            return [each.project(hidden).view(tokens, -1, head_dim) for each in self._separate]
        fused = self._fused.project(hidden)
        if self._qkv_order is QkvOrder.BLOCKS:
            return fused.view(tokens, -1, head_dim).tensor_split(self._block_ends, dim=1)
        groups = fused.view(tokens, self._num_kv_heads, -1, head_dim)
        return groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]


class _Mlp:
    def __init__(self, spec: ModelSpec, parameters: LayerParameters) -> None:
        self._activation = ACTIVATIONS[spec.activation]
        self._gate = parameters.get(Module.GATE)
        self._fused = Module.GATE_UP in parameters
        self._up = parameters[Module.GATE_UP if self._fused else Module.UP]
        self._down = parameters[Module.DOWN]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._gate is not None:
            inner = self._activation(self._gate.project(hidden)).mul_(self._up.project(hidden))
        elif self._fused:
            gate, up = self._up.project(hidden).chunk(2, dim=-1)
            inner = self._activation(gate).mul_(up)
        else:
            inner = self._activation(self._up.project(hidden))
        return self._down.project(inner)


def _norm(spec: ModelSpec, parameters: Parameters) -> Norm:
    return Norm(kind=spec.normalisation, eps=spec.norm_eps, parameters=parameters)


def _optional_norm(spec: ModelSpec, parameters: LayerParameters, module: Module) -> Norm | None:
    return _norm(spec, parameters[module]) if module in parameters else None


class Embedding:
    """Token embeddings, scaled, and those of positions where the model learned some."""

    def __init__(self, spec: ModelSpec, tables: Sequence[torch.Tensor]) -> None:
        """`tables` are the tensors of `spec.names.embedding`."""
        self._tokens, *self._positions = tables
        self._offset = spec.positions.offset if isinstance(spec.positions, LearnedPositions) else 0
        self._scale: torch.Tensor | None = None
        if spec.embedding_scale is not None:
            self._scale = self._tokens.new_tensor(spec.embedding_scale)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden_size]` for `[tokens]` each."""
        hidden = embedding(token_ids, self._tokens)
        if self._scale is not None:
            hidden.mul_(self._scale)
        for table in self._positions:
            hidden.add_(embedding(positions + self._offset, table))
        return hidden


class Head:
    """The final norm, if the model has one, and the map to logits."""

    def __init__(
        self, spec: ModelSpec, final: Sequence[torch.Tensor], weight: torch.Tensor
    ) -> None:
        """`final` are the tensors of `spec.names.final`."""
        self._norm: Norm | None = None
        if final:
            parameters = Parameters(weight=final[0], bias=final[1] if len(final) > 1 else None)
            self._norm = Norm(kind=spec.normalisation, eps=spec.norm_eps, parameters=parameters)
        self._projection = Parameters(weight=weight)
        self._softcap = spec.logit_softcap

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[rows, vocab_size]` for `[rows, hidden_size]`."""
        normed = hidden if self._norm is None else self._norm.apply(hidden)
        logits = self._projection.project(normed)
        return logits if self._softcap is None else level_off(logits, self._softcap)
