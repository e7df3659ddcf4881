"""Gemma 2: four norms per layer, soft-capped scores and logits, a window on every other layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config, read_windows
from paraserve_backend.architectures.decoder import ATTENTION, MODULES, read_spec
from paraserve_backend.architectures.spec import ModelSpec, Module, Normalisation
from paraserve_backend.errors import UnsupportedModel

DEFAULTS: Mapping[str, object] = {
    "vocab_size": 256_000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
_MODULES = {
    **MODULES,
    Module.ATTENTION_POST_NORM: "post_attention_layernorm",
    Module.MLP_NORM: "pre_feedforward_layernorm",
    Module.MLP_POST_NORM: "post_feedforward_layernorm",
}


def read_gemma2(config: Config, architecture: str) -> ModelSpec:
    if config.flag_or_null("use_bidirectional_attention"):
        raise UnsupportedModel(f"{architecture} with bidirectional attention is not supported.")
    spec = read_spec(
        config,
        architecture,
        modules=_MODULES,
        biased=ATTENTION if config.flag("attention_bias") else frozenset(),
        activation="hidden_activation",
    )
    sliding = tuple(layer % 2 == 0 for layer in range(spec.num_layers))
    return replace(
        spec,
        normalisation=Normalisation.RMS_PLUS_ONE,
        windows=read_windows(config, config.count_or_null("sliding_window"), sliding),
        attention_scale=config.number("query_pre_attn_scalar") ** -0.5,
        attention_softcap=config.number_or_null("attn_logit_softcapping"),
        logit_softcap=config.number_or_null("final_logit_softcapping"),
        embedding_scale=math.sqrt(spec.hidden_size),
    )
