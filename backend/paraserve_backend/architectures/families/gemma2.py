"""Gemma 2: four norms per layer, soft-capped scores and logits, a window on every other layer."""

from __future__ import annotations

import math
from dataclasses import replace

from paraserve_backend.architectures.config_json import Config, read_activation, read_windows
from paraserve_backend.architectures.decoder import ATTENTION, MODULES, read_spec
from paraserve_backend.architectures.spec import ModelSpec, Module, Normalisation
from paraserve_backend.errors import UnsupportedModel

_MODULES = {
    **MODULES,
    Module.ATTENTION_POST_NORM: "post_attention_layernorm",
    Module.MLP_NORM: "pre_feedforward_layernorm",
    Module.MLP_POST_NORM: "post_feedforward_layernorm",
}


def read_gemma2(config: Config, architecture: str) -> ModelSpec:
    if config.flag("use_bidirectional_attention", False):
        raise UnsupportedModel(f"{architecture} with bidirectional attention is not supported.")
    biased = ATTENTION if config.flag("attention_bias", False) else frozenset()
    spec = read_spec(config, architecture, modules=_MODULES, biased=biased)
    sliding = tuple(layer % 2 == 0 for layer in range(spec.num_layers))
    return replace(
        spec,
        normalisation=Normalisation.RMS_PLUS_ONE,
        activation=read_activation(config, "hidden_activation", "gelu_pytorch_tanh"),
        windows=read_windows(config, config.count("sliding_window", 4096), sliding),
        attention_scale=config.number("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=config.number_or_null("attn_logit_softcapping", 50.0),
        logit_softcap=config.number_or_null("final_logit_softcapping", 30.0),
        embedding_scale=math.sqrt(spec.hidden_size),
        tie_word_embeddings=config.flag("tie_word_embeddings", True),
    )
