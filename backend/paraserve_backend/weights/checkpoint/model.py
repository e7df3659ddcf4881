"""The index of a model that we can run: its specification, and only the tensors that it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

from paraserve_backend.architectures.registry import model_spec
from paraserve_backend.architectures.spec import Dtype, LayerRange, ModelSpec
from paraserve_backend.architectures.tensors import check_tensors, expected_tensors
from paraserve_backend.errors import InvalidCheckpoint
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.checkpoint.index import CheckpointIndex, read_index
from paraserve_backend.weights.sources.base import Source

#: Spelt as safetensors does. Integers would be a quantized model's, of no use without its scales.
_WEIGHT_DTYPES: Mapping[str, Dtype] = {
    "F32": Dtype.FLOAT32,
    "BF16": Dtype.BFLOAT16,
    "F16": Dtype.FLOAT16,
}


def read_model(source: Source) -> CheckpointIndex:
    """Read the index of the model folder that `source` is, and check that we can run it.

    Tensors that the model does not need are left out, and so are files of nothing else.

    Raises:
        InvalidCheckpoint, UnsupportedModel: the files are wrong or of a kind we cannot run.
        NotFound, AccessDenied, SourceUnavailable: the source cannot be read.
    """
    index = read_index(source)
    spec = spec_of(index)
    _check_layers(spec, index)
    whole = LayerRange(start=0, end=spec.num_layers, total=spec.num_layers)
    needed = expected_tensors(spec, whole)
    _check_shards(index, needed)
    check_tensors(spec, whole, {name: tensor.shape for name, tensor in index.tensors.items()})
    tensors = {name: tensor for name, tensor in index.tensors.items() if name in needed}
    for name, tensor in tensors.items():
        if tensor.dtype not in _WEIGHT_DTYPES:
            raise InvalidCheckpoint(
                f"The tensor '{name}' has data type {tensor.dtype}; weights are stored as one of "
                f"{', '.join(_WEIGHT_DTYPES)}."
            )
    used = {tensor.object_key for tensor in tensors.values()}
    objects = tuple(stored for stored in index.objects if stored.key in used)
    return replace(index, tensors=tensors, objects=objects)


def spec_of(index: CheckpointIndex) -> ModelSpec:
    """The specification of a whole checkpoint; raises what `model_spec` does."""
    return model_spec(index.config, tensors=index.tensors, dtype=_WEIGHT_DTYPES.get(index.dtype))


def spec_of_fetched(
    config: Mapping[str, object], generation_config: Mapping[str, object], plan: FetchPlan
) -> ModelSpec:
    """The same where only a plan's tensors are known; raises what `model_spec` does."""
    names = {tensor.name for tensor in plan.tensors}
    return model_spec(
        config, generation_config, tensors=names, dtype=_WEIGHT_DTYPES.get(plan.dtype)
    )


def _check_layers(spec: ModelSpec, index: CheckpointIndex) -> None:
    """Compare the number of layers that config.json states with those that are stored."""
    stored = _layer_numbers(spec, (*index.tensors, *index.missing))
    found = next((number for number in range(spec.num_layers) if number not in stored), None)
    if found is not None:
        raise InvalidCheckpoint(
            f"config.json: 'num_hidden_layers' is {spec.num_layers}, but the checkpoint has no "
            f"tensors {spec.names.layer_prefix}{found}.*."
        )


def _layer_numbers(spec: ModelSpec, names: Iterable[str]) -> Collection[int]:
    prefix = spec.names.layer_prefix
    numbers = (name[len(prefix) :].partition(".")[0] for name in names if name.startswith(prefix))
    # More digits than any layer has could only keep us busy.
    return {int(text) for text in numbers if text.isascii() and text.isdecimal() and len(text) < 10}


def _check_shards(index: CheckpointIndex, needed: Iterable[str]) -> None:
    for name in needed:
        if name in index.missing and name not in index.tensors:
            raise InvalidCheckpoint(
                f"The tensor '{name}' lies in {index.missing[name]}, which {index.source_uri} "
                "has not: upload it."
            )
