"""Which tensors, of which shapes, a range of layers reads from a checkpoint; needs no torch.

The bytes of KV cache per token are computed here too.
"""

from __future__ import annotations

from collections.abc import Mapping

from paraserve_backend.architectures.spec import (
    DTYPE_BYTES,
    LayerModule,
    LayerRange,
    LearnedPositions,
    ModelSpec,
)
from paraserve_backend.errors import InvalidCheckpoint

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(spec: ModelSpec, layers: LayerRange) -> Shapes:
    """Name to shape of every tensor a stage reads, in the order in which it reads them."""
    shapes: Shapes = {}
    if layers.is_first:
        shapes |= _embeddings(spec)
    for layer in range(layers.start, layers.end):
        for module in spec.layer_modules:
            name = layer_module_name(spec, layer, module)
            shapes[f"{name}.weight"] = module.shape
            if module.bias:
                shapes[f"{name}.bias"] = module.shape[:1]
    if layers.is_last:
        shapes |= dict.fromkeys(spec.names.final, (spec.hidden_size,))
        shapes[head_tensor_name(spec)] = (spec.vocab_size, spec.hidden_size)
    return shapes


def layer_module_name(spec: ModelSpec, layer: int, module: LayerModule) -> str:
    """What a module's tensors are called up to `.weight` and `.bias`."""
    return f"{spec.names.layer_prefix}{layer}.{module.name}"


def head_tensor_name(spec: ModelSpec) -> str:
    return spec.names.embedding[0] if spec.tie_word_embeddings else spec.names.head


def check_tensors(
    spec: ModelSpec, layers: LayerRange, stored: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare the shapes a checkpoint states with those `layers` need.

    Raises:
        InvalidCheckpoint: a tensor is missing or has another shape.
    """
    for name, shape in expected_tensors(spec, layers).items():
        if name not in stored:
            raise InvalidCheckpoint(f"The checkpoint lacks the tensor '{name}'.")
        if tuple(stored[name]) != shape:
            raise InvalidCheckpoint(
                f"The tensor '{name}' has shape {list(stored[name])}, "
                f"but config.json makes it {list(shape)}."
            )


def _embeddings(spec: ModelSpec) -> Shapes:
    rows = [spec.vocab_size]
    if isinstance(spec.positions, LearnedPositions):
        rows.append(spec.positions.offset + spec.context_length)
    return {
        name: (count, spec.hidden_size)
        for name, count in zip(spec.names.embedding, rows, strict=True)
    }


def kv_bytes_per_token(spec: ModelSpec, layers: LayerRange) -> int:
    """KV cache bytes that one token takes in these layers."""
    return 2 * len(layers) * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[spec.dtype]
