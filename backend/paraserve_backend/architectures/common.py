"""The decoder most families share: rotary positions, RMS norms, a gated MLP, Llama's names.

A family file calls `read_spec` and replaces in its result what it does differently.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from paraserve_backend.architectures.config_json import (
    Config,
    read_activation,
    read_kv_heads,
    split_hidden,
)
from paraserve_backend.architectures.decoder import decoder_spec
from paraserve_backend.architectures.layout import LayerSizes
from paraserve_backend.architectures.rope import read_rope
from paraserve_backend.architectures.spec import (
    ModelSpec,
    Module,
    Normalisation,
    Rope,
)
from paraserve_backend.protocol.names import TensorNames

#: Layer modules of Llama; other families add to them or replace some.
MODULES: Mapping[Module, str] = {
    Module.ATTENTION_NORM: "input_layernorm",
    Module.QUERY: "self_attn.q_proj",
    Module.KEY: "self_attn.k_proj",
    Module.VALUE: "self_attn.v_proj",
    Module.OUTPUT: "self_attn.o_proj",
    Module.MLP_NORM: "post_attention_layernorm",
    Module.GATE: "mlp.gate_proj",
    Module.UP: "mlp.up_proj",
    Module.DOWN: "mlp.down_proj",
}
QKV = frozenset({Module.QUERY, Module.KEY, Module.VALUE})
ATTENTION = QKV | {Module.OUTPUT}
MLP = frozenset({Module.GATE, Module.UP, Module.DOWN})

_NAMES = TensorNames(
    layer_prefix="model.layers.",
    embedding=("model.embed_tokens.weight",),
    final=("model.norm.weight",),
    head="lm_head.weight",
)


def read_spec(
    config: Config,
    architecture: str,
    *,
    modules: Mapping[Module, str] = MODULES,
    biased: Collection[Module] = (),
    rope: Callable[[Config, int], Rope] = read_rope,
) -> ModelSpec:
    """The spec of a model laid out like Llama, with these layer modules.

    `biased` are the modules with a bias; `rope` reads the rotation for a size of head.
    """
    sizes = _read_sizes(config)
    return decoder_spec(
        config,
        architecture,
        sizes,
        modules=modules,
        biased=biased,
        names=_NAMES,
        positions=rope(config, sizes.head_dim),
        max_positions=config.count("max_position_embeddings"),
        normalisation=Normalisation.RMS,
        norm_eps=config.number("rms_norm_eps"),
        activation=read_activation(config, "hidden_act", "silu"),
        tied=config.flag("tie_word_embeddings", False),
    )


def _read_sizes(config: Config) -> LayerSizes:
    num_heads = config.count("num_attention_heads")
    return LayerSizes(
        hidden=config.count("hidden_size"),
        intermediate=config.count("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=read_kv_heads(config, "num_key_value_heads", num_heads),
        head_dim=config.count("head_dim")
        if config.has("head_dim")
        else split_hidden(config, num_heads),
    )
