"""Mistral: Llama with a sliding attention window in its first release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.decoder import read_spec
from paraserve_backend.architectures.spec import ModelSpec

DEFAULTS: Mapping[str, object] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "sliding_window": 4096,
}


def read_mistral(config: Config, architecture: str) -> ModelSpec:
    spec = read_spec(config, architecture)
    window = config.count_or_null("sliding_window")
    return replace(spec, windows=(window,) * spec.num_layers)
