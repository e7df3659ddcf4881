"""OPT: learned positions, layer norms, biases and an MLP without a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config, read_activation, split_hidden
from paraserve_backend.architectures.decoder import LayerSizes, decoder_spec
from paraserve_backend.architectures.spec import (
    LearnedPositions,
    ModelSpec,
    Module,
    Normalisation,
    Residual,
    TensorNames,
)
from paraserve_backend.errors import UnsupportedModel

DEFAULTS: Mapping[str, object] = {
    "vocab_size": 50_272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "num_attention_heads": 12,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}
_MODULES = {
    Module.ATTENTION_NORM: "self_attn_layer_norm",
    Module.QUERY: "self_attn.q_proj",
    Module.KEY: "self_attn.k_proj",
    Module.VALUE: "self_attn.v_proj",
    Module.OUTPUT: "self_attn.out_proj",
    Module.MLP_NORM: "final_layer_norm",
    Module.UP: "fc1",
    Module.DOWN: "fc2",
}
_NORMS = frozenset({Module.ATTENTION_NORM, Module.MLP_NORM})
#: Rows of the position table before position 0.
_OFFSET = 2
#: PyTorch's own; the config has no field for it.
_NORM_EPS = 1e-5


def read_opt(config: Config, architecture: str) -> ModelSpec:
    _check_plain(config, architecture)
    norm_before = config.flag("do_layer_norm_before")
    spec = decoder_spec(
        config,
        architecture,
        _read_sizes(config),
        modules=_MODULES,
        biased=frozenset(_MODULES) if config.flag("enable_bias") else _NORMS,
        names=_names(final_norm=norm_before and not config.flag("_remove_final_layer_norm")),
        positions=LearnedPositions(offset=_OFFSET),
        max_positions=config.count("max_position_embeddings"),
        normalisation=Normalisation.LAYER,
        norm_eps=_NORM_EPS,
        activation=read_activation(config, "activation_function"),
        tied=config.flag("tie_word_embeddings"),
    )
    return replace(spec, residual=Residual.SEQUENTIAL if norm_before else Residual.NORM_AFTER)


def _check_plain(config: Config, architecture: str) -> None:
    hidden_size = config.count("hidden_size")
    projected = config.count("word_embed_proj_dim", hidden_size)
    if projected != hidden_size:
        raise UnsupportedModel(
            f"{architecture} with word_embed_proj_dim {projected} other than hidden_size "
            f"{hidden_size} is not supported."
        )
    if not config.flag("layer_norm_elementwise_affine"):
        raise UnsupportedModel(
            f"{architecture} with layer_norm_elementwise_affine false is not supported."
        )


def _read_sizes(config: Config) -> LayerSizes:
    num_heads = config.count("num_attention_heads")
    hidden = config.count("hidden_size")
    return LayerSizes(
        hidden=hidden,
        intermediate=config.count("ffn_dim"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=split_hidden(config, hidden, num_heads),
    )


def _names(*, final_norm: bool) -> TensorNames:
    prefix = "model.decoder."
    norm = (f"{prefix}final_layer_norm.weight", f"{prefix}final_layer_norm.bias")
    return TensorNames(
        layer_prefix=f"{prefix}layers.",
        embedding=(f"{prefix}embed_tokens.weight", f"{prefix}embed_positions.weight"),
        final=norm if final_norm else (),
        head="lm_head.weight",
    )
