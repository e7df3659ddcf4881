"""A decoder-only transformer cut down to one stage's layers, over that stage's KV cache.

It keeps no scheduling state and opens no files: weights come through `Weights`.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import torch
from torch.nn.functional import embedding

from paraserve_backend.contract import LayerRange
from paraserve_backend.engine.attention import plan_attention
from paraserve_backend.engine.batch import ForwardBatch
from paraserve_backend.engine.dtypes import TORCH_DTYPE
from paraserve_backend.engine.kv_cache import KvCache
from paraserve_backend.engine.layers import DecoderLayer, LayerParameters, project, rms_norm
from paraserve_backend.engine.rope import frequencies, rotation
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.families.spec import ModelSpec
from paraserve_backend.families.tensors import (
    expected_tensors,
    head_tensor_name,
    layer_tensor_name,
)


class Weights(Protocol):
    def get(self, name: str) -> torch.Tensor:
        """The checkpoint's tensor, on the stage's device; waits until its bytes have landed."""
        ...


class StageModel:
    """Layers `[layers.start, layers.end)`, with the embedding if first, norm and head if last.

    The constructor asks for the weights in layer order, so that a layer is adopted as it lands.
    They are used in place; only a tensor of another dtype than the model's is converted.

    Raises:
        InvalidCheckpoint: a tensor has not the shape the spec gives it.
    """

    def __init__(
        self, spec: ModelSpec, layers: LayerRange, weights: Weights, kv_cache: KvCache
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.kv_cache = kv_cache
        self._dtype = TORCH_DTYPE[spec.dtype]
        self._windows = frozenset(spec.windows[layers.start : layers.end])
        self._frequencies = frequencies(spec.rope, spec.head_dim).to(kv_cache.device)
        self._embedding: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._head: torch.Tensor | None = None
        self._load(_CheckedWeights(spec, layers, weights))

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, inputs: torch.Tensor) -> torch.Tensor:
        """Run `batch`, whose rows' new tokens lie one after the other in `inputs`.

        Args:
            batch: The rows; keys and values of their new tokens go to the blocks they name.
            inputs: Token ids `[tokens]` on the first stage, else hidden states
                `[tokens, hidden_size]`; on any device, left unchanged.

        Returns:
            Hidden states `[tokens, hidden_size]`, or on the last stage logits
            `[rows with sampling, vocab_size]` for the last token of each such row.

        Raises:
            InvalidRequest: the inputs do not fit the batch, or the batch does not fit the cache.
        """
        plan = plan_attention(batch, self.kv_cache, self._windows)
        hidden = self._enter(batch, inputs)
        turn = rotation(self._frequencies, plan.positions, self._dtype)
        for layer in self._decoder:
            hidden = layer.forward(hidden, turn, plan)
        return self._leave(batch, hidden)

    def _load(self, weights: Weights) -> None:
        spec, layers = self.spec, self.layers
        if layers.is_first:
            self._embedding = weights.get(spec.names.embedding[0])
        self._decoder = [
            DecoderLayer(
                spec,
                _layer_parameters(spec, layer, weights),
                self.kv_cache.layer(layer - layers.start),
                spec.windows[layer],
            )
            for layer in range(layers.start, layers.end)
        ]
        if layers.is_last:
            self._norm = weights.get(spec.names.final[0])
            self._head = weights.get(head_tensor_name(spec))

    def _enter(self, batch: ForwardBatch, inputs: torch.Tensor) -> torch.Tensor:
        tokens = batch.num_tokens
        if self._embedding is None:
            _check_shape("hidden states", inputs, (tokens, self.spec.hidden_size))
            return inputs.to(device=self.kv_cache.device, dtype=self._dtype)
        _check_shape("token ids", inputs, (tokens,))
        low, high = int(inputs.min()), int(inputs.max())
        if low < 0 or high >= self.spec.vocab_size:
            raise InvalidRequest(
                f"Token ids from {low} to {high} are not all in [0, {self.spec.vocab_size})."
            )
        return embedding(inputs.to(self.kv_cache.device), self._embedding)

    def _leave(self, batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        if self._norm is None or self._head is None:
            return hidden
        last_tokens = torch.tensor(_sampled_tokens(batch), dtype=torch.int64)
        chosen = hidden.index_select(0, last_tokens.to(hidden.device))
        return project(rms_norm(chosen, self._norm, self.spec.norm_eps), self._head)


class _CheckedWeights:
    """Weights whose shapes are what the spec says, in the model's dtype."""

    def __init__(self, spec: ModelSpec, layers: LayerRange, weights: Weights) -> None:
        self._shapes = expected_tensors(spec, layers)
        self._dtype = TORCH_DTYPE[spec.dtype]
        self._weights = weights

    def get(self, name: str) -> torch.Tensor:
        tensor = self._weights.get(name)
        if tuple(tensor.shape) != self._shapes[name]:
            raise InvalidCheckpoint(
                f"The tensor '{name}' has shape {list(tensor.shape)}, "
                f"but config.json makes it {list(self._shapes[name])}."
            )
        return tensor.to(self._dtype)


def _layer_parameters(spec: ModelSpec, layer: int, weights: Weights) -> LayerParameters:
    return LayerParameters(
        **{
            tensor.parameter.value: weights.get(layer_tensor_name(spec, layer, tensor.suffix))
            for tensor in spec.layer_tensors
        }
    )


def _sampled_tokens(batch: ForwardBatch) -> list[int]:
    """The last token of each row that wants a next one, as an index into the batch's tokens."""
    ends = accumulate(row.num_tokens for row in batch.rows)
    return [end - 1 for end, row in zip(ends, batch.rows, strict=True) if row.sampling is not None]


def _check_shape(what: str, inputs: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(inputs.shape) != expected:
        raise InvalidRequest(
            f"The {what} have shape {list(inputs.shape)}, the batch needs {list(expected)}."
        )
