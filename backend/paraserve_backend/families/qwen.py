"""Qwen 2 (biases on queries, keys and values) and Qwen 3 (norms on queries and keys)."""

from __future__ import annotations

from dataclasses import replace

from paraserve_backend.families.common import ATTENTION_BIASES, QK_NORMS, QKV_BIASES, read_spec
from paraserve_backend.families.config import Config
from paraserve_backend.families.spec import ModelSpec

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_qwen2(config: Config, architecture: str) -> ModelSpec:
    return _with_windows(read_spec(config, architecture, optional=QKV_BIASES), config)


def read_qwen3(config: Config, architecture: str) -> ModelSpec:
    biases = ATTENTION_BIASES if config.flag("attention_bias", False) else frozenset()
    return _with_windows(read_spec(config, architecture, optional=QK_NORMS | biases), config)


def _with_windows(spec: ModelSpec, config: Config) -> ModelSpec:
    # Published configs carry a `sliding_window` that is meant to be ignored without this flag.
    if not config.flag("use_sliding_window", False) or not config.has("sliding_window"):
        return spec
    window = config.count("sliding_window")
    kinds = _layer_kinds(config, spec.num_layers)
    return replace(spec, windows=tuple(window if kind == _SLIDING else None for kind in kinds))


def _layer_kinds(config: Config, num_layers: int) -> tuple[str, ...]:
    if not config.has("layer_types"):
        first = config.count("max_window_layers")
        return tuple(_SLIDING if layer >= first else _FULL for layer in range(num_layers))
    kinds = config.texts("layer_types")
    if len(kinds) != num_layers or not set(kinds) <= {_FULL, _SLIDING}:
        raise config.invalid(f"'layer_types' must name {_FULL} or {_SLIDING} for each layer")
    return kinds
