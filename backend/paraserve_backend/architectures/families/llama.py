"""Llama, and models that are Llama under another name."""

from __future__ import annotations

from collections.abc import Mapping

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.decoder import ATTENTION, MLP, read_spec
from paraserve_backend.architectures.spec import ModelSpec, Module

DEFAULTS: Mapping[str, object] = {
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}


def read_llama(config: Config, architecture: str) -> ModelSpec:
    biased: set[Module] = set()
    if config.flag("attention_bias"):
        biased |= ATTENTION
    if config.flag("mlp_bias"):
        biased |= MLP
    return read_spec(config, architecture, biased=biased)
