"""Qwen 2 (biases on queries, keys and values) and Qwen 3 (norms on queries and keys)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config, read_windows
from paraserve_backend.architectures.decoder import ATTENTION, MODULES, QKV, read_spec
from paraserve_backend.architectures.spec import ModelSpec, Module

QWEN2_DEFAULTS: Mapping[str, object] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
QWEN3_DEFAULTS: Mapping[str, object] = {
    **QWEN2_DEFAULTS,
    "head_dim": 128,
    "attention_bias": False,
}
_QWEN3_MODULES = {
    **MODULES,
    Module.QUERY_NORM: "self_attn.q_norm",
    Module.KEY_NORM: "self_attn.k_norm",
}


def read_qwen2(config: Config, architecture: str) -> ModelSpec:
    return _with_windows(read_spec(config, architecture, biased=QKV), config)


def read_qwen3(config: Config, architecture: str) -> ModelSpec:
    biased = ATTENTION if config.flag("attention_bias") else frozenset()
    spec = read_spec(config, architecture, modules=_QWEN3_MODULES, biased=biased)
    return _with_windows(spec, config)


def _with_windows(spec: ModelSpec, config: Config) -> ModelSpec:
    # Published configs carry a `sliding_window` that is meant to be ignored without this flag.
    if not config.flag("use_sliding_window"):
        return spec
    window = config.count_or_null("sliding_window")
    if window is None:
        return spec
    first = config.whole("max_window_layers")
    sliding = tuple(layer >= first for layer in range(spec.num_layers))
    return replace(spec, windows=read_windows(config, window, sliding))
