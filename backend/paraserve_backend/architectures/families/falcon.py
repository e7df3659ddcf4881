"""Falcon: attention and MLP in parallel, layer norms, fused queries, keys and values.

Falcon 7B has one key head. The newer layout (40B, 180B, Falcon 2) has several. In both, the
queries, key and value of a key head lie together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import (
    Config,
    read_activation,
    read_kv_heads,
    split_hidden,
)
from paraserve_backend.architectures.decoder import LayerSizes, decoder_spec
from paraserve_backend.architectures.rope import read_rope
from paraserve_backend.architectures.spec import (
    ModelSpec,
    Module,
    Normalisation,
    QkvOrder,
    Residual,
    TensorNames,
)
from paraserve_backend.errors import UnsupportedModel

DEFAULTS: Mapping[str, object] = {
    "vocab_size": 65_024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "num_ln_in_parallel_attn": None,
    "layer_norm_epsilon": 1e-5,
    "num_kv_heads": None,
    "alibi": False,
    "new_decoder_architecture": False,
    "multi_query": True,
    "parallel_attn": True,
    "bias": False,
    "max_position_embeddings": 2048,
    "ffn_hidden_size": None,
    "activation": "gelu",
    "tie_word_embeddings": True,
}
_NAMES = TensorNames(
    layer_prefix="transformer.h.",
    embedding=("transformer.word_embeddings.weight",),
    final=("transformer.ln_f.weight", "transformer.ln_f.bias"),
    head="lm_head.weight",
)
_MATRICES = {
    Module.QKV: "self_attention.query_key_value",
    Module.OUTPUT: "self_attention.dense",
    Module.UP: "mlp.dense_h_to_4h",
    Module.DOWN: "mlp.dense_4h_to_h",
}


def read_falcon(config: Config, architecture: str) -> ModelSpec:
    _check_variant(config, architecture)
    sizes = _read_sizes(config)
    norms = _norms(config)
    spec = decoder_spec(
        config,
        architecture,
        sizes,
        modules=norms | _MATRICES,
        biased={*norms, *(_MATRICES if config.flag_or_null("bias") else ())},
        names=_NAMES,
        positions=read_rope(config, sizes.head_dim),
        max_positions=config.count("max_position_embeddings"),
        normalisation=Normalisation.LAYER,
        norm_eps=config.number_or_zero("layer_norm_epsilon"),
        activation=read_activation(config, "activation"),
        tied=config.flag("tie_word_embeddings"),
    )
    residual = Residual.PARALLEL if config.flag_or_null("parallel_attn") else Residual.SEQUENTIAL
    return replace(spec, residual=residual, qkv_order=QkvOrder.GROUPS)


def _check_variant(config: Config, architecture: str) -> None:
    if config.flag_or_null("alibi"):
        raise UnsupportedModel(f"{architecture} with alibi positions is not supported.")
    if _is_new(config) and not config.flag_or_null("parallel_attn"):
        raise UnsupportedModel(
            f"{architecture} with new_decoder_architecture but not parallel_attn is not supported."
        )


def _read_sizes(config: Config) -> LayerSizes:
    num_heads = config.count("num_attention_heads")
    # The first releases called it `n_embed`.
    hidden = config.count("n_embed" if config.has("n_embed") else "hidden_size")
    return LayerSizes(
        hidden=hidden,
        intermediate=config.count("ffn_hidden_size", 4 * hidden),
        num_heads=num_heads,
        num_kv_heads=_read_kv_heads(config, num_heads),
        head_dim=split_hidden(config, hidden, num_heads),
    )


def _read_kv_heads(config: Config, num_heads: int) -> int:
    if _is_new(config):
        return read_kv_heads(config, "num_kv_heads", num_heads)
    return 1 if config.flag_or_null("multi_query") else num_heads


def _norms(config: Config) -> dict[Module, str]:
    if not config.flag_or_null("parallel_attn"):
        return {
            Module.ATTENTION_NORM: "input_layernorm",
            Module.MLP_NORM: "post_attention_layernorm",
        }
    if _is_new(config) and config.count("num_ln_in_parallel_attn", 2) == 2:
        return {Module.ATTENTION_NORM: "ln_attn", Module.MLP_NORM: "ln_mlp"}
    return {Module.ATTENTION_NORM: "input_layernorm"}


def _is_new(config: Config) -> bool:
    return config.flag_or_null("new_decoder_architecture")
