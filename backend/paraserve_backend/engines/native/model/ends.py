"""The two ends of a model: from token ids to hidden states, and from hidden states to logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import embedding

from paraserve_backend.architectures.spec import LearnedPositions, ModelSpec
from paraserve_backend.engines.native.model.ops import Norm, Parameters, level_off


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
