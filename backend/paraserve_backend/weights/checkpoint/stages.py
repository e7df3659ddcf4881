"""Which tensors a stage holds, and how to cut a model into stages of equal bytes. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise

from paraserve_backend.architectures.spec import LayerRange, TensorNames
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.weights.checkpoint.index import (
    CheckpointIndex,
)
from paraserve_backend.weights.checkpoint.safetensors import TensorEntry


def stage_tensors(
    index: CheckpointIndex, names: TensorNames, *, tied: bool, layers: LayerRange
) -> tuple[TensorEntry, ...]:
    """Return the tensors of one stage in the order in which a forward pass needs them.

    `tied` says that the head is the embedding. Raises `InvalidCheckpoint` where one is missing.
    """
    by_layer = _tensors_by_layer(index, names)
    groups: list[Sequence[TensorEntry]] = []
    if layers.is_first:
        groups.append(_named(index, names.embedding))
    for layer in range(layers.start, layers.end):
        groups.append(_layer_tensors(index, names, by_layer, layer))
    if layers.is_last:
        groups.append(_named(index, _last_names(names, tied=tied)))
    # A dict keeps the order and drops the tied embedding's second mention.
    return tuple({tensor.name: tensor for group in groups for tensor in group}.values())


def split_layers(
    index: CheckpointIndex, names: TensorNames, *, tied: bool, num_layers: int, stages: int
) -> tuple[LayerRange, ...]:
    """Share out the layers so that the largest stage has as few bytes as possible.

    Among such splits it takes the most even one. Every stage has at least one layer. Raises
    `InvalidRequest` where there are more stages than layers.
    """
    if not 1 <= stages <= num_layers:
        raise InvalidRequest(
            f"a model of {num_layers} layers can have 1 to {num_layers} stages, not {stages}"
        )
    size = _stage_sizes(index, names, tied=tied, num_layers=num_layers)
    largest, _ = _cut(num_layers, stages, size, max)

    def unevenness(start: int, end: int) -> float:
        return float("inf") if size(start, end) > largest else size(start, end) ** 2

    _, bounds = _cut(num_layers, stages, unevenness, lambda total, stage: total + stage)
    return tuple(
        LayerRange(start=start, end=end, total=num_layers) for start, end in pairwise(bounds)
    )


def _tensors_by_layer(index: CheckpointIndex, names: TensorNames) -> dict[int, list[TensorEntry]]:
    """Return each layer's tensors in the order in which they are stored."""
    layers: dict[int, list[TensorEntry]] = {}
    for name, tensor in index.tensors.items():
        number = name.removeprefix(names.layer_prefix).partition(".")[0]
        if name.startswith(names.layer_prefix) and number.isdecimal():
            layers.setdefault(int(number), []).append(tensor)
    for tensors in layers.values():
        tensors.sort(key=lambda tensor: (tensor.object_key, tensor.start))
    return layers


def _layer_tensors(
    index: CheckpointIndex,
    names: TensorNames,
    by_layer: Mapping[int, list[TensorEntry]],
    layer: int,
) -> list[TensorEntry]:
    if layer not in by_layer:
        raise InvalidCheckpoint(
            f"{index.source_uri} has no tensors {names.layer_prefix}{layer}.*: is it incomplete?"
        )
    return by_layer[layer]


def _named(index: CheckpointIndex, wanted: Iterable[str]) -> list[TensorEntry]:
    for name in wanted:
        if name not in index.tensors:
            raise InvalidCheckpoint(f"{index.source_uri} has no tensor {name}: is it incomplete?")
    return sorted(
        (index.tensors[name] for name in wanted),
        key=lambda tensor: (tensor.object_key, tensor.start),
    )


def _last_names(names: TensorNames, *, tied: bool) -> tuple[str, ...]:
    return (*names.final, names.embedding[0] if tied else names.head)


def _stage_sizes(
    index: CheckpointIndex, names: TensorNames, *, tied: bool, num_layers: int
) -> Callable[[int, int], int]:
    """Return a function that gives the bytes of a stage with layers `[start, end)`."""
    by_layer = _tensors_by_layer(index, names)
    sizes = [
        total_bytes_of(_layer_tensors(index, names, by_layer, layer)) for layer in range(num_layers)
    ]
    before = [0, *accumulate(sizes)]
    first = total_bytes_of(_named(index, names.embedding))
    last = total_bytes_of(_named(index, _last_names(names, tied=tied)))

    def size(start: int, end: int) -> int:
        return (
            before[end]
            - before[start]
            + (first if start == 0 else 0)
            + (last if end == num_layers else 0)
        )

    return size


def total_bytes_of(tensors: Iterable[TensorEntry]) -> int:
    return sum(tensor.size_bytes for tensor in tensors)


def _cut(
    num_layers: int,
    stages: int,
    cost: Callable[[int, int], float],
    combine: Callable[[float, float], float],
) -> tuple[float, list[int]]:
    """Return the least combined cost of `stages` stages and their bounds, 0 to `num_layers`."""
    # best[end]: the cheapest way to give layers [0, end) to the stages so far.
    best = {end: (cost(0, end), [0, end]) for end in range(1, num_layers + 1)}
    for stage in range(2, stages + 1):
        shorter, best = best, {}
        for end in range(stage, num_layers + 1):
            value, start = min(
                (combine(shorter[start][0], cost(start, end)), start)
                for start in range(stage - 1, end)
            )
            best[end] = (value, [*shorter[start][1], end])
    return best[num_layers]
