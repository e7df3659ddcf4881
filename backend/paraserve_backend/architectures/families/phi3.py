"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices, rotating only a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config
from paraserve_backend.architectures.decoder import read_spec
from paraserve_backend.architectures.rope import read_rope, rope_section
from paraserve_backend.architectures.spec import (
    ModelSpec,
    Module,
    QkvOrder,
    Rope,
)

DEFAULTS: Mapping[str, object] = {
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
_MODULES = {
    Module.ATTENTION_NORM: "input_layernorm",
    Module.QKV: "self_attn.qkv_proj",
    Module.OUTPUT: "self_attn.o_proj",
    Module.MLP_NORM: "post_attention_layernorm",
    Module.GATE_UP: "mlp.gate_up_proj",
    Module.DOWN: "mlp.down_proj",
}
#: What the first releases called it.
_OLD_NAMES = {"su": "longrope", "yarn": "longrope"}


def read_phi3(config: Config, architecture: str) -> ModelSpec:
    spec = read_spec(config, architecture, modules=_MODULES, rope=_read_rope)
    window = config.count_or_null("sliding_window")
    return replace(spec, windows=(window,) * spec.num_layers, qkv_order=QkvOrder.BLOCKS)


def _read_rope(config: Config, head_dim: int) -> Rope:
    field = "partial_rotary_factor"
    share = rope_section(config).number(field, config.number(field, 1.0))
    return read_rope(config, int(head_dim * min(share, 1.0)), renamed=_OLD_NAMES)
