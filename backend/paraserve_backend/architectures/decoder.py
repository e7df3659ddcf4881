"""A decoder's spec from its parts: what every family spells alike in config.json is read here."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from paraserve_backend.architectures.config_json import Config, read_dtype
from paraserve_backend.architectures.layout import LayerSizes, layer_modules
from paraserve_backend.architectures.rope import context_length
from paraserve_backend.architectures.spec import (
    Activation,
    LearnedPositions,
    ModelSpec,
    Module,
    Normalisation,
    Rope,
)
from paraserve_backend.protocol.names import TensorNames


def decoder_spec(
    config: Config,
    architecture: str,
    sizes: LayerSizes,
    *,
    modules: Mapping[Module, str],
    biased: Collection[Module],
    names: TensorNames,
    positions: Rope | LearnedPositions,
    max_positions: int,
    normalisation: Normalisation,
    norm_eps: float,
    activation: Activation,
    tied: bool,
) -> ModelSpec:
    """Attention and MLP in turn, each token attending to all before it; no caps, no scales.

    `modules` are in the order of a forward pass; `max_positions` is the config's own limit.
    """
    num_layers = config.count("num_hidden_layers")
    scaling = positions.scaling if isinstance(positions, Rope) else None
    return ModelSpec(
        architecture=architecture,
        dtype=read_dtype(config),
        vocab_size=config.count("vocab_size"),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_layers=num_layers,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        normalisation=normalisation,
        norm_eps=norm_eps,
        activation=activation,
        positions=positions,
        context_length=context_length(max_positions, scaling),
        windows=(None,) * num_layers,
        attention_scale=sizes.head_dim**-0.5,
        tie_word_embeddings=tied,
        eos_token_ids=config.token_ids("eos_token_id"),
        names=names,
        layer_modules=layer_modules(sizes, modules, biased),
    )
