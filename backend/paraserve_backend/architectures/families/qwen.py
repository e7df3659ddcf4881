"""Qwen 2 (biases on queries, keys and values) and Qwen 3 (norms on queries and keys)."""

from __future__ import annotations

from dataclasses import replace

from paraserve_backend.architectures.config_json import Config, read_windows
from paraserve_backend.architectures.decoder import ATTENTION, MODULES, QKV, read_spec
from paraserve_backend.architectures.spec import ModelSpec, Module

_QWEN3_MODULES = {
    **MODULES,
    Module.QUERY_NORM: "self_attn.q_norm",
    Module.KEY_NORM: "self_attn.k_norm",
}


def read_qwen2(config: Config, architecture: str) -> ModelSpec:
    return _with_windows(read_spec(config, architecture, biased=QKV), config)


def read_qwen3(config: Config, architecture: str) -> ModelSpec:
    biased = ATTENTION if config.flag("attention_bias", False) else frozenset()
    spec = read_spec(config, architecture, modules=_QWEN3_MODULES, biased=biased)
    return _with_windows(spec, config)


def _with_windows(spec: ModelSpec, config: Config) -> ModelSpec:
    # Published configs carry a `sliding_window` that is meant to be ignored without this flag.
    if not config.flag("use_sliding_window", False):
        return spec
    window = config.count_or_null("sliding_window", 4096)
    if window is None:
        return spec
    first = config.whole("max_window_layers", 28)
    sliding = tuple(layer >= first for layer in range(spec.num_layers))
    return replace(spec, windows=read_windows(config, window, sliding))
