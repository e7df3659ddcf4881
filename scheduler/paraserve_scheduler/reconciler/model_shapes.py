"""The shape of a model for the planner: bytes per layer, and which layers a tier holds. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.architectures.tensors import kv_bytes_per_token
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry
from paraserve_backend.weights.checkpoint.stages import stage_tensors
from paraserve_backend.weights.sources.base import StoredObject
from paraserve_scheduler.planner.cost import (
    LayerRanges,
    ModelShape,
)
from paraserve_scheduler.reconciler.per_deployment import kept_per_deployment
from paraserve_scheduler.state.records import HeldObject
from paraserve_scheduler.state.spec import Deployment


@kept_per_deployment
def held_keys(deployment: Deployment) -> Mapping[str, StoredObject]:
    """The objects of a checkpoint by the keys that they have in a tier."""
    index = deployment.index
    return {index.store.key_of(index.source_uri, stored.key): stored for stored in index.objects}


@kept_per_deployment
def held_layers(
    deployment: Deployment, held: tuple[HeldObject, ...], *, on_disk: bool
) -> LayerRanges:
    """Layers `[start, end)` all of whose tensors are in what a tier holds of the deployment."""
    keys = held_keys(deployment)
    landed = {
        keys[each.key].key: each.on_disk if on_disk else each.landed
        for each in held
        if keys[each.key].version == each.version
    }
    if not any(landed.values()):
        return ()
    return _ranges(
        [
            layer
            for layer, places in enumerate(_layer_places(deployment))
            if all(
                any(low <= start and end <= high for low, high in landed.get(key, ()))
                for key, start, end in places
            )
        ]
    )


@kept_per_deployment
def _layer_places(deployment: Deployment) -> tuple[tuple[tuple[str, int, int], ...], ...]:
    """Of every layer the object, start and end of its tensors."""
    total = deployment.model.num_layers
    return tuple(
        tuple(
            (tensor.object_key, tensor.start, tensor.end)
            for tensor in _tensors(deployment, LayerRange(start=layer, end=layer + 1, total=total))
        )
        for layer in range(total)
    )


def _ranges(numbers: Sequence[int]) -> LayerRanges:
    """Ascending numbers as half-open ranges."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number:
            ranges[-1] = (ranges[-1][0], number + 1)
        else:
            ranges.append((number, number + 1))
    return tuple(ranges)


@kept_per_deployment
def shape_of(deployment: Deployment, kv_tokens: int) -> ModelShape:
    """Bytes of a checkpoint by layer: the embedding is of the first, the head of the last."""
    model, total = deployment.model, deployment.model.num_layers
    sizes = [_tensor_bytes(deployment, layer, layer + 1) for layer in range(total)]
    tied_bytes = sum(sizes) - _tensor_bytes(deployment, 0, total)
    whole = LayerRange(start=0, end=total, total=total)
    return ModelShape(
        name=deployment.name,
        layer_bytes=(*sizes[:-1], sizes[-1] - tied_bytes),
        kv_bytes=kv_tokens * kv_bytes_per_token(model, whole),
        tied_bytes=tied_bytes,
        file_bytes=deployment.index.file_bytes,
    )


def _tensor_bytes(deployment: Deployment, start: int, end: int) -> int:
    layers = LayerRange(start=start, end=end, total=deployment.model.num_layers)
    return sum(tensor.size_bytes for tensor in _tensors(deployment, layers))


def _tensors(deployment: Deployment, layers: LayerRange) -> tuple[TensorEntry, ...]:
    model = deployment.model
    return stage_tensors(
        deployment.index, model.names, tied=model.tie_word_embeddings, layers=layers
    )
