"""Phi-3, Phi-3.5 and Phi-4: Llama with fused matrices, rotating only a part of each head."""

from __future__ import annotations

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
    window = config.count_or_null("sliding_window", None)
    return replace(spec, windows=(window,) * spec.num_layers, qkv_order=QkvOrder.BLOCKS)


def _read_rope(config: Config, head_dim: int) -> Rope:
    field = "partial_rotary_factor"
    share = rope_section(config).number(field, config.number(field, 1.0))
    return read_rope(config, int(head_dim * min(share, 1.0)), renamed=_OLD_NAMES)
