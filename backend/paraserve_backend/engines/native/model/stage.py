"""One stage: the transformer restricted to a range of layers, and its forward pass over a batch.

It checks the weights' shapes and the inputs' sizes, samples on the last stage, and keeps no
scheduling state. It opens no files: weights come through an interface.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from paraserve_backend.architectures.spec import LayerRange, ModelSpec, Rope
from paraserve_backend.architectures.tensors import (
    expected_tensors,
    head_tensor_name,
    layer_module_name,
)
from paraserve_backend.engines.native.model.attention import CachedAttention
from paraserve_backend.engines.native.model.attention_metadata import plan_attention
from paraserve_backend.engines.native.model.kv_cache import KvCache
from paraserve_backend.engines.native.model.layers import (
    DecoderLayer,
    Embedding,
    Head,
    LayerParameters,
)
from paraserve_backend.engines.native.model.ops import Parameters
from paraserve_backend.engines.native.model.rope import RotaryTable
from paraserve_backend.engines.native.model.sampler import sample
from paraserve_backend.engines.native.model.tensors import (
    TORCH_DTYPE,
    hidden_from_bytes,
    hidden_to_bytes,
)
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.protocol.forward import ForwardBatch, ForwardResult

#: Hidden states as bytes, UINT8 [tokens, hidden_size * bytes per element], or chosen tokens.
Output = npt.NDArray[np.uint8] | ForwardResult


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
        self._rotary = _rotary_table(spec, kv_cache.device, self._dtype)
        self._embedding: Embedding | None = None
        self._head: Head | None = None
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
        plan = plan_attention(
            batch,
            self.kv_cache,
            self._windows,
            all_masks=self.spec.attention_softcap is not None,
        )
        hidden = self._enter(batch, inputs, plan.positions)
        self.kv_cache.clear(plan.opened)
        turn = self._rotary.rotation(plan.positions) if self._rotary is not None else None
        for layer in self._decoder:
            hidden = layer.forward(hidden, turn, plan)
        return self._leave(batch, hidden)

    def _load(self, weights: _CheckedWeights) -> None:
        spec, layers = self.spec, self.layers
        if layers.is_first:
            self._embedding = Embedding(spec, [weights.get(name) for name in spec.names.embedding])
        self._decoder = [
            DecoderLayer(
                spec, _layer_parameters(spec, layer, weights), self._cached_attention(layer)
            )
            for layer in range(layers.start, layers.end)
        ]
        if layers.is_last:
            final = [weights.get(name) for name in spec.names.final]
            self._head = Head(spec, final, weights.get(head_tensor_name(spec)))

    def _cached_attention(self, layer: int) -> CachedAttention:
        return CachedAttention(
            cache=self.kv_cache.layer(layer - self.layers.start),
            window=self.spec.windows[layer],
            scale=self.spec.attention_scale,
            softcap=self.spec.attention_softcap,
        )

    def _enter(
        self, batch: ForwardBatch, inputs: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
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
        _check_length(self.spec, batch)
        return self._embedding.forward(inputs.to(self.kv_cache.device), positions)

    def _leave(self, batch: ForwardBatch, hidden: torch.Tensor) -> torch.Tensor:
        if self._head is None:
            return hidden
        last_tokens = torch.tensor(_sampled_tokens(batch), dtype=torch.int64)
        return self._head.forward(hidden.index_select(0, last_tokens.to(hidden.device)))


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


def _layer_parameters(spec: ModelSpec, layer: int, weights: _CheckedWeights) -> LayerParameters:
    parameters = {}
    for module in spec.layer_modules:
        name = layer_module_name(spec, layer, module)
        parameters[module.module] = Parameters(
            weight=weights.get(f"{name}.weight"),
            bias=weights.get(f"{name}.bias") if module.bias else None,
        )
    return parameters


def _rotary_table(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> RotaryTable | None:
    if not isinstance(spec.positions, Rope):
        return None
    return RotaryTable(spec.positions, spec.head_dim, device, dtype)


def _sampled_tokens(batch: ForwardBatch) -> list[int]:
    """The last token of each row that wants a next one, as an index into the batch's tokens."""
    ends = accumulate(row.num_tokens for row in batch.rows)
    return [end - 1 for end, row in zip(ends, batch.rows, strict=True) if row.sampling is not None]


def _check_shape(what: str, inputs: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(inputs.shape) != expected:
        raise InvalidRequest(
            f"The {what} have shape {list(inputs.shape)}, the batch needs {list(expected)}."
        )


def _check_length(spec: ModelSpec, batch: ForwardBatch) -> None:
    end = max(row.start + row.num_tokens for row in batch.rows)
    if end > spec.context_length:
        raise InvalidRequest(
            f"A row ends at position {end}, but the model has {spec.context_length} positions."
        )


class StageEngine:
    def __init__(self, model: StageModel) -> None:
        self.model = model

    def step_raw(self, batch: ForwardBatch, inputs: memoryview | npt.NDArray[np.generic]) -> Output:
        """One forward pass for callers without torch.

        Args:
            batch: as in `step`.
            inputs: token ids INT32 [tokens] for the first stage, else hidden states as bytes,
                UINT8 [tokens, hidden_size * bytes per element].

        Returns:
            Hidden states as bytes in the same form, or the chosen tokens.
        """
        output = self.step(batch, self._inputs(batch, inputs))
        return output if isinstance(output, ForwardResult) else hidden_to_bytes(output)

    def _inputs(
        self, batch: ForwardBatch, inputs: memoryview | npt.NDArray[np.generic]
    ) -> torch.Tensor:
        if self.model.layers.is_first:
            return torch.from_numpy(np.asarray(inputs))
        spec = self.model.spec
        dtype = TORCH_DTYPE[spec.dtype]
        return hidden_from_bytes(inputs, batch.num_tokens, spec.hidden_size, dtype)

    def step(self, batch: ForwardBatch, inputs: torch.Tensor) -> torch.Tensor | ForwardResult:
        """One forward pass; arguments and errors are those of `StageModel.forward`.

        Returns:
            Hidden states for the next stage, or on the last stage the chosen tokens.
        """
        outputs = self.model.forward(batch, inputs)
        if not self.model.layers.is_last:
            return outputs
        sampled = [(row, row.sampling) for row in batch.rows if row.sampling is not None]
        return sample(
            outputs,
            [sampling for _, sampling in sampled],
            [row.start + row.num_tokens for row, _ in sampled],
        )
