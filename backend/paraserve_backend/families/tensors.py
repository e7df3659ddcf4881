"""Which tensors, of which shapes, a range of layers needs from a checkpoint; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from paraserve_backend.contract import DTYPE_BYTES, LayerRange
from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.families.spec import ModelSpec

Shapes = dict[str, tuple[int, ...]]


def expected_tensors(spec: ModelSpec, layers: LayerRange) -> Shapes:
    """Name to shape of every tensor a stage reads, in the order in which it reads them."""
    shapes: Shapes = {}
    vocabulary = (spec.vocab_size, spec.hidden_size)
    if layers.is_first:
        shapes |= dict.fromkeys(spec.names.embedding, vocabulary)
    for layer in range(layers.start, layers.end):
        shapes |= {
            layer_tensor_name(spec, layer, tensor.suffix): tensor.shape
            for tensor in spec.layer_tensors
        }
    if layers.is_last:
        shapes |= dict.fromkeys(spec.names.final, (spec.hidden_size,))
        shapes[head_tensor_name(spec)] = vocabulary
    return shapes


def layer_tensor_name(spec: ModelSpec, layer: int, suffix: str) -> str:
    return f"{spec.names.layer_prefix}{layer}.{suffix}"


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


def kv_bytes_per_token(spec: ModelSpec, layers: LayerRange) -> int:
    """KV cache bytes that one token takes in these layers."""
    return 2 * len(layers) * spec.num_kv_heads * spec.head_dim * DTYPE_BYTES[spec.dtype]
